"""GPT-Neo's own scripts with this library's functions in place of theirs: tests/dropin, run as they are.

Each program is a process of its own, for it turns TensorFlow 2's behaviour off.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import reference
from helpers_model import reference_config, variable_shapes

from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling._compat import tensorflow, tf

FOLDER = pathlib.Path(__file__).parent / "dropin"
TENSORFLOW = tuple(int(n) for n in tensorflow.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    TENSORFLOW >= (2, 16),
    reason=f"needs the Estimator, which TensorFlow 2.15 is the last to have; this is {tensorflow.__version__}",
)

PROMPTS = [[3, 4, 5], [7], [9, 10, 11, 12], [1 + i % 13 for i in range(14)]]
PARAMS = {
    "n_vocab": 16, "n_ctx": 14, "n_embd": 16, "n_head": 4, "n_layer": 2, "padding_id": 0, "eos_id": 13,
    "attention_types": [[["global", "local"], 1]], "local_attention_radius": 5, "activation_function": "gelu",
    "entmax_loss": True, "recompute_grad": True, "num_microbatches": 1, "use_tpu": False, "seed": 1,
    "mesh_shape": "all:1", "layout": "batch:all", "train_batch_size": 8, "train_steps": 40, "iterations": 10,
    "steps_per_checkpoint": 20, "lr": 0.02, "weight_decay": 0.01, "gradient_clipping": 1.0,
    "prompts": PROMPTS, "predict_batch_size": len(PROMPTS), "predict_max_steps": 8,
    "samples": {
        "default": {},
        "greedy": {"temperature": 0.0},
        "entmax": {"sampling_use_entmax": True},
        "top_k": {"sampling_keep_top_k": 2},
        "alone": {"temperature": 0.0, "remove_partial_sequences": True},
    },
}  # fmt: skip


# --- The models, one row in NumPy: {name: weight}, tokens -> logits [tokens, vocab] --------------------


def bundled_logits(w, row):
    return reference.gpt_neo_forward(w, [row], **reference_config(PARAMS))[0]


def attention_logits(w, row):
    h = w["wte"][row] + w["wpe"][: len(row)]
    q, k, v = (h @ w[name] for name in "qkv")
    seen = reference.softmax(np.where(np.tri(len(row)) == 1, q @ k.T, -np.inf))
    return (h + seen @ v @ w["o"]) @ w["wte"].T


def averaging_logits(w, row):
    totals = [sum(0.5 ** (t - u) * w["wte"][row[u]] for u in range(t + 1)) for t in range(len(row))]
    return np.tanh(totals @ w["in"]) @ w["out"] @ w["wte"].T


# What runs before the program's own imports, which name mesh_tensorflow first. That one
# does not import by itself on TensorFlow 2.13 and later.
AS_IT_IS = "" if TENSORFLOW < (2, 13) else "import gpt_neo_sampling; "
PROGRAMS = {
    "GPT2": (AS_IT_IS, bundled_logits, variable_shapes(PARAMS), {"mesh_shape": "x:2,y:2", "layout": "batch:x,vocab:y"}),
    "attention": ("import gpt_neo_sampling; ", attention_logits, {"wte", "wpe", *"qkvo"}, {"num_microbatches": 2}),
    "averaging": ("import tensorflow; " + AS_IT_IS, averaging_logits, {"wte", "in", "out"}, {}),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program, tmp_path):
    before, logits_of, names, options = PROGRAMS[program]
    params = {**PARAMS, **options, "model": program, "model_path": str(tmp_path)}
    rows = run(before, params, tmp_path)

    losses = [
        value.simple_value
        for path in tmp_path.glob("events.*")
        for event in tf.train.summary_iterator(str(path))
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert len(losses) == params["train_steps"] and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]), losses

    reader = tf.train.load_checkpoint(str(tmp_path))
    assert reader.get_tensor("global_step") == params["train_steps"]
    saved = [name for name in reader.get_variable_to_shape_map() if not name.endswith(("/adam_m", "/adam_v"))]
    assert set(saved) == {"global_step", *("gpt2/" + name for name in names)}
    weights = {name: reader.get_tensor("gpt2/" + name).astype(np.float64) for name in names}

    supports = []
    for prompt, row in zip(PROMPTS, rows):
        for name, allowed in ALLOWED.items():
            check_row(row[name], prompt, lambda row: allowed(logits_of(weights, row)[-1]))
        new = row["greedy"][len(prompt) :]
        assert row["alone"] == new + [0] * len(prompt)
        p = reference.entmax(logits_of(weights, prompt), 1.3)
        assert (p[range(len(prompt)), row["drawn"][: len(prompt)]] > 0).all()
        supports.append((p > 0).mean())
    assert np.mean(supports) < 0.5

    if program == "GPT2":  # the library takes the folder as it is
        generator, some = TextGenerator.from_pretrained(str(tmp_path)), PROMPTS[:3]
        samples = generator.generate(some, max_new_tokens=8, temperature=0, eos_token_id=params["eos_id"])
        assert [s.tokens for s in samples] == [[t for t in r["greedy"][len(p) :] if t] for p, r in zip(some, rows)]


def run(before, params, folder):
    """The program's predictions, a dict for each prompt."""
    config, predictions = folder / "config.json", folder / "predictions.json"
    config.write_text(json.dumps(params))
    code = before + "import runpy, sys; del sys.argv[0]; runpy.run_path('main.py', run_name='__main__')"
    command = [sys.executable, "-c", code, "main.py", str(config), str(predictions)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(predictions.read_text())


def largest(logits, k):
    return set(np.argsort(-logits, kind="stable")[:k])


ALLOWED = {  # the tokens that may be drawn from these logits
    "default": lambda logits: range(PARAMS["n_vocab"]),
    "greedy": lambda logits: largest(logits, 1),
    "entmax": lambda logits: np.flatnonzero(reference.entmax(logits, 1.3)),
    "top_k": lambda logits: largest(logits, 2),
}


def check_row(row, prompt, allowed):
    """Asserts that a row is its prompt, tokens that may follow, then padding."""
    assert len(row) == PARAMS["n_ctx"] and row[: len(prompt)] == prompt
    for at in range(len(prompt), len(row)):
        new = row[len(prompt) : at]
        if len(new) >= PARAMS["predict_max_steps"] or PARAMS["eos_id"] in new:
            assert row[at] == PARAMS["padding_id"]
        else:
            assert row[at] in allowed(row[:at])

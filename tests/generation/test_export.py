"""SavedModels, run without this package, give the results of TextGenerator."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import DATA
from helpers_model import config, random_weights
from test_cli import main

from gpt_neo_sampling import TextGenerator, export_saved_model
from gpt_neo_sampling._compat import tensorflow, tf
from gpt_neo_sampling.checkpoint import open_checkpoint, write_mesh_tf_checkpoint
from gpt_neo_sampling.generation import export

BATCH, LENGTH, PROMPT_LENGTH, TOP_K = 4, 40, 20, 8
CLIENT = pathlib.Path(__file__).parents[1] / "saved_model_client.py"
PROMPTS = [[5, 17, 101], [9] * PROMPT_LENGTH, [], [300, 2, 3, 4, 1999, 6, 7]]
STOP = "the fourth of row 0's greedy tokens"
# (signature, inputs) beside prompts, and the options of TextGenerator.generate that ask for the same
REQUESTS = {
    "greedy": ("serving_default", dict(temperature=0.0, seed=1), dict(do_sample=False)),
    "stop": ("serving_default", dict(temperature=0.0, seed=1, eos_token_id=STOP), dict(do_sample=False)),
    "softmax": ("serving_default", dict(temperature=0.8, seed=3_000_000_000), dict(temperature=0.8)),
    "top-k": ("serving_default", dict(temperature=1.1, seed=-5, top_k=TOP_K), dict(temperature=1.1, top_k=TOP_K)),
    "controls": ("serving_default", dict(temperature=1.3, seed=9, top_p=0.7, repetition_penalty=1.4, top_k=TOP_K),
                 dict(temperature=1.3, top_p=0.7, repetition_penalty=1.4, top_k=TOP_K)),
    "dry, xtc": (
        "serving_default", dict(temperature=0.9, seed=4, dry_multiplier=0.9, xtc_probability=0.5, xtc_threshold=0.01),
        dict(temperature=0.9, dry_multiplier=0.9, xtc_probability=0.5, xtc_threshold=0.01),
    ),
    "mirostat": ("serving_default", dict(temperature=1.0, seed=6, mirostat=2), dict(temperature=1.0, mirostat=2)),
    "entmax": ("entmax", dict(temperature=1.0, seed=7, entmax_alpha=1.5), dict(entmax_alpha=1.5)),
    "entmax, top-k": ("entmax", dict(temperature=1.0, seed=7, entmax_alpha=1.1, top_k=3),
                      dict(entmax_alpha=1.1, top_k=3)),
}  # fmt: skip
DEFAULTS = dict(seed=7)
CONTROLS = ["top_p", "repetition_penalty", "dry_multiplier", "xtc_probability", "xtc_threshold", "mirostat"]
ALL = dict(max_new_tokens=12, top_k=0, stream=list(range(BATCH)), eos_token_id=-1, top_p=1.0, repetition_penalty=1.0,
           dry_multiplier=0.0, xtc_probability=0.0, xtc_threshold=0.1, mirostat=0)  # fmt: skip
MIXED = dict(
    temperature=[0.0, 0.8, 1.1, 0.8],
    seed=[1, 3_000_000_000, -5, 3_000_000_000],
    top_k=[0, 0, TOP_K, 0],
    max_new_tokens=[12, 5, 12, 0],
)
WRONG = dict(temperature=[0.8, -1.0, 0.8, 0.8], seed=1, top_k=[TOP_K + 1, 0, 0, 0])


def padded(prompts, width=PROMPT_LENGTH):
    rows = np.full([len(prompts), width], 77)  # what stands behind a prompt does not count
    for row, prompt in zip(rows, prompts):
        row[: len(prompt)] = prompt
    return dict(prompts=rows.tolist(), prompt_lengths=[len(prompt) for prompt in prompts])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with the bundled one's vocabulary and tokenizer."""
    folder = tmp_path_factory.mktemp("export") / "source"
    params = config(["global", "local"], n_vocab=2048, n_ctx=48, local_attention_radius=5, eos_id=0)
    del params["mode"]
    weights = random_weights(params, seed=2)
    weights["wpe"] *= 8  # else each token is followed by itself
    weights["wte"] *= 0.2
    write_mesh_tf_checkpoint(folder, params, weights)
    shutil.copy(export.DEMO_FOLDER / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def generated(model):
    """A function: a request's name -> TextGenerator's samples; and the stop token."""
    generator = TextGenerator.from_pretrained(model)

    def samples(inputs, options, **more):
        return generator.generate(PROMPTS, seed=inputs["seed"], max_new_tokens=12, **options, **more)

    @functools.cache
    def of(name):
        if name == "defaults":
            return samples(DEFAULTS, {})
        _, inputs, options = REQUESTS[name]
        return samples(inputs, options, eos_token_id=stop if name == "stop" else -1)

    stop = samples(*REQUESTS["greedy"][1:], eos_token_id=-1)[0].tokens[3]
    return of, stop


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "new" / "model"
    export_saved_model(folder, model, batch=BATCH, length=LENGTH, prompt_length=PROMPT_LENGTH, max_top_k=TOP_K,
                       controls=CONTROLS)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def answers(saved, generated):
    """{request: the client's four answers}, from one process without this package."""
    _, stop = generated
    requests = {}
    for name, (signature, inputs, _) in REQUESTS.items():
        inputs = {**ALL, **inputs, **padded(PROMPTS)}
        if signature == "entmax":
            inputs = {"entmax_alpha": 1.3, **inputs}
        requests[name] = (signature, {k: stop if v == STOP else v for k, v in inputs.items()})
    requests["mixed"] = ("serving_default", {**ALL, **MIXED, **padded(PROMPTS, LENGTH)})
    requests["wrong"] = ("serving_default", {**ALL, **WRONG, **padded([[5, 6], [7], [8, 2048], [9] * 21], 21)})
    requests["defaults"] = ("serving_default", {**DEFAULTS, **padded(PROMPTS)})
    requests["shape"] = ("serving_default", {**ALL, **MIXED, **padded(PROMPTS[:3])})
    done = subprocess.run(
        [sys.executable, CLIENT, saved],
        input=json.dumps(list(requests.values())), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(requests, json.loads(done.stdout)))


def rows_of(answer):
    return [row[:n] for row, n in zip(answer["tokens"], answer["lengths"])]


FURTHER = ("controls", "entmax, top-k")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in FURTHER)) for n in REQUESTS])
def test_tokens_are_those_of_generate(answers, generated, name):
    assert rows_of(answers[name]["v2"]) == [s.prompt_tokens + s.tokens for s in generated[0](name)]
    tails = [row[n:] for row, n in zip(answers[name]["v2"]["tokens"], answers[name]["v2"]["lengths"])]
    assert all(len(row) == LENGTH for row in answers[name]["v2"]["tokens"]) and not np.any(sum(tails, []))


def test_the_stop_token_ends_its_row_alone(generated):
    samples, stop = generated
    assert samples("stop")[0].tokens == samples("greedy")[0].tokens[:3] + [stop]
    assert max(len(s.tokens) for s in samples("stop")) == 12


def test_rows_of_one_request_have_options_of_their_own(answers, generated):
    greedy, softmax, top_k = (generated[0](name) for name in ("greedy", "softmax", "top-k"))
    rows = rows_of(answers["mixed"]["v2"])
    assert rows[0] == PROMPTS[0] + greedy[0].tokens
    assert rows[1] == PROMPTS[1] + softmax[1].tokens[:5]
    assert rows[2] == top_k[2].prompt_tokens + top_k[2].tokens
    assert rows[3] == PROMPTS[3]


@pytest.mark.parametrize("way", ["v1", "threads", "again"])
def test_sessions_threads_and_later_calls_give_the_same(answers, way):
    for name, answer in answers.items():
        if name not in ("shape", "defaults"):
            assert answer[way] == answer["v2"], name


def test_a_session_may_leave_options_out(answers, generated):
    rows = rows_of(answers["defaults"]["v1"])
    for row, sample in zip(rows, generated[0]("defaults")):
        asked = sample.prompt_tokens + sample.tokens
        assert row[: len(asked)] == asked
    assert max(map(len, rows)) == LENGTH
    assert "eos_token_id" in answers["defaults"]["v2"]["error"]


def test_rows_with_wrong_values_are_invalid_and_leave_the_others(answers):
    rows = rows_of(answers["wrong"]["v2"])
    assert rows[:2] == [[5, 6, -1], [7, -1]]
    assert rows[2:] == [[-1] * LENGTH] * 2


@pytest.mark.slow
def test_an_empty_prompt_of_a_model_whose_first_token_is_outside(tmp_path):
    params = config(["none"], n_vocab=10, n_ctx=4, eos_id=50256)
    del params["mode"]
    write_mesh_tf_checkpoint(tmp_path / "source", params, random_weights(params))
    export_saved_model(tmp_path / "model", tmp_path / "source", batch=2, length=4, max_top_k=1)
    signature = tensorflow.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    inputs = dict(prompts=[[5], [0]], prompt_lengths=[1, 0], max_new_tokens=2, temperature=0.0, top_k=0,
                  eos_token_id=-1, stream=0)  # fmt: skip
    out = signature(seed=tf.constant(1, tf.int64), **{name: tf.constant(value) for name, value in inputs.items()})
    tokens, lengths = out["tokens"].numpy().tolist(), out["lengths"].numpy().tolist()
    assert tokens[1] == [-1] * 4 and lengths == [3, 4] and tokens[0][0] == 5 and min(tokens[0]) >= 0


def test_another_shape_is_tensorflows_error(answers):
    assert "is not compatible with expected shape [4" in answers["shape"]["v2"]["error"]  # prompts or their lengths
    assert "(4, None)" in answers["shape"]["v1"]["error"] or "(4, ?)" in answers["shape"]["v1"]["error"]


def test_what_is_exported_beside_the_graph(saved, model):
    extra = saved / "assets.extra"
    facts = json.loads((extra / "export.json").read_text())
    assert facts.items() >= dict(batch=BATCH, length=LENGTH, prompt_length=PROMPT_LENGTH, max_top_k=TOP_K).items()
    assert (extra / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (saved / "saved_model.pb").stat().st_size < 4 * 2**20  # the weights are not in it
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_bundled_model_where_none_is_given(tmp_path):
    export_saved_model(tmp_path / "model", batch=1, length=4, max_top_k=1)
    facts = json.loads((tmp_path / "model" / "assets.extra" / "export.json").read_text())
    config = json.loads((export.DEMO_FOLDER / "config.json").read_text())
    assert (facts["n_vocab"], facts["n_ctx"]) == (config["n_vocab"], config["n_ctx"])
    exported = tf.train.load_checkpoint(str(tmp_path / "model" / "variables" / "variables"))
    with open_checkpoint(export.DEMO_FOLDER) as checkpoint:
        np.testing.assert_array_equal(exported.get_tensor("gpt2/wpe"), checkpoint.read("wpe"))


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no more room")

    monkeypatch.setattr(export, "fill_variables", fail)
    with pytest.raises(OSError, match="no more room"):
        export_saved_model(tmp_path / "model", DATA / "gpt_neo_checkpoints" / "global", batch=1, length=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_into_an_empty_folder(capfd, tmp_path, model):
    sizes = ["--batch", 1, "--length", 6, "--max-top-k", 2]
    status, out, err = main(capfd, "export", "--model", model, "--output", tmp_path, *sizes)
    assert (status, out, err) == (0, "", f"wrote {tmp_path}\n")
    assert {p.name for p in tmp_path.iterdir()} == {"saved_model.pb", "variables", "assets.extra"}

"""GPT-Neo's options of the model, against GPT-Neo's own code.

tests/data/gpt_neo_variants was made with the model and the sampling of EleutherAI/gpt-neo, commit 23485e3, in Python
3.11, TensorFlow 2.12.1 and mesh-tensorflow 0.1.18. For each case it has the config and the variables' names and shapes
(cases.json), and the logits of `ids` and greedy continuations of the first `lengths` of them (golden.npz), by its
full pass at every step as by its incremental one, which agree. The weights are those of `golden_weights`. Where that
code stops with an error, three lines were mended: `mlp_glu` does not hand on variable_dtype, mtf's tensors have no
operator `**`, and there is no `tanh`. tests/data/gpt_neo_checkpoints/variants is a checkpoint that it wrote, of
nearly all options at once.
"""

import functools
import json
import re

import numpy as np
import pytest
import reference
from conftest import DATA
from helpers_checkpoint import MESH_TF, TINY, random_weights
from helpers_model import call_model, checkpoint, features, incremental_logits, reference_config, variable_shapes
from programs import MeshRunner, Program
from test_gpt2 import EACH_DIM, TRAINING_LAYOUTS, check_by_central_differences, gradients, token_losses

from gpt_neo_sampling import (
    CheckpointError,
    TextGenerator,
    convert_checkpoint,
    export_saved_model,
    open_checkpoint,
)
from gpt_neo_sampling._compat import mtf, tensorflow, tf
from gpt_neo_sampling.checkpoint import variable_shapes as checkpoint_shapes
from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint
from gpt_neo_sampling.models.config import SWITCHES
from gpt_neo_sampling.sample import sample_autoregressive

slow = pytest.mark.slow
VARIANTS = DATA / "gpt_neo_variants"
CASES = json.loads((VARIANTS / "cases.json").read_text())
MODELS = [name for name in CASES if not name.startswith("activation ")]
QUICK = ("macaron, mlp_glu, scalenorm, none", "num_mem_kv, rotary")
N_STEPS = 2  # of the incremental pass
TOLERANCE = 2e-5  # of float32 logits up to 6.4 in size, two implementations


@functools.cache
def golden():
    return dict(np.load(VARIANTS / "golden.npz"))


def params_of(case):
    config = CASES[case]["config"]
    return {**config, "attention_types": [[config["attention_types"], 1]], "mode": "predict"}


def golden_weights(shapes):
    """{name: float32 array}, in the order of the names from a generator whose numbers NumPy does not change."""
    rng, weights = np.random.RandomState(0), {}
    for name in sorted(shapes):
        w = np.asarray(rng.standard_normal(shapes[name]))
        if "norm_rezero" in name:  # without norms 1 would grow beyond all bounds
            w = 0.3 + 0.1 * w
        elif name.endswith("/g"):
            w = 1 + 0.3 * w
        elif "mem_" in name:
            w = 0.7 * w
        elif w.ndim == 1 or "wpe" in name:
            w = 0.3 * w
        else:
            w = 0.5 * w if name == "wte" else w * len(w) ** -0.5
        weights[name] = np.asarray(w, np.float32)
    return weights


def shapes_of(case):
    """The original's variables, {name: shape}."""
    return {name: tuple(shape) for name, shape in CASES[case]["variables"].items()}


def largest_difference(a, b):
    assert np.shape(a) == np.shape(b) and np.all(np.isfinite(a))
    return np.abs(np.asarray(a, np.float64) - b).max()


# --- The reference is the original ------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_original(case):
    params, ids, lengths = params_of(case), golden()["ids"], golden()["lengths"]
    weights, config = golden_weights(shapes_of(case)), reference_config(params)
    want = golden()[f"logits of {case}"]
    assert largest_difference(reference.gpt_neo_forward(weights, ids[: len(want)], **config), want) < TOLERANCE
    assert np.std(want) > 0.5
    if case in MODELS:
        rows = reference.greedy_decode(weights, [row[:n] for row, n in zip(ids, lengths)], 12, 12, **config)
        np.testing.assert_array_equal(rows, golden()[f"tokens of {case}"])


@pytest.mark.parametrize("case", MODELS)
def test_variables(case):
    assert checkpoint_shapes(params_of(case)) == variable_shapes(params_of(case)) == shapes_of(case)


# --- The library is the reference --------------------------------------------------


def run(params, weights, ids, lengths, mesh_shape="", layout=""):
    """(logits of the whole pass, on one device [logits of steps behind the first lengths], greedy tokens)."""
    batch, length = ids.shape

    def build(mesh, ids, lengths):
        shape, other = features(mesh, params, batch, length)
        ids, lengths = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, lengths, shape[:1])
        steps = [] if layout else incremental_logits(ids, ids, lengths, other, params, N_STEPS)[1]
        tokens = sample_autoregressive(
            ids, other, params, stop_at_token=None, temperature=0, prompt_lengths=lengths, max_prompt_length=6
        )
        return call_model(ids, other, params)[0], steps, tokens

    inputs = [(tf.int32, ids.shape), (tf.int32, lengths.shape)]
    program = Program(build, inputs, weights, MeshRunner(mesh_shape, layout))
    return program(ids, lengths)


def check(case, mesh_shape="", layout=""):
    ids, lengths = golden()["ids"], golden()["lengths"]
    if "batch" in layout:  # 4 rows, which can be split
        ids, lengths = np.concatenate([ids, ids[:1]]), np.append(lengths, lengths[0])
    rows = np.arange(len(ids)) % 3
    want = golden()[f"logits of {case}"][rows]
    logits, steps, tokens = run(params_of(case), golden_weights(shapes_of(case)), ids, lengths, mesh_shape, layout)
    assert largest_difference(logits, want) < TOLERANCE
    assert len(steps) == (0 if layout else N_STEPS)
    for i, step in enumerate(steps):
        assert largest_difference(step[:, 0], want[np.arange(len(ids)), lengths - 1 + i]) < TOLERANCE
    np.testing.assert_array_equal(tokens, golden()[f"tokens of {case}"][rows])


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=slow) for c in MODELS])
def test_logits_and_greedy_tokens(case):
    check(case)


@pytest.mark.parametrize(
    "case, mesh_shape, layout",
    [
        ("all", "x:2", EACH_DIM),
        pytest.param("all", *TRAINING_LAYOUTS[0], marks=slow),
        pytest.param("all", *TRAINING_LAYOUTS[1], marks=slow),
        pytest.param("share_parameters, scalenorm, num_mem_kv", *TRAINING_LAYOUTS[1], marks=slow),
        pytest.param("softmax, mlp_glu", *TRAINING_LAYOUTS[0], marks=slow),
    ],
)
def test_on_a_mesh(case, mesh_shape, layout):
    layout = layout.replace(",embed_sequence:x", "") if "axial_pos_emb" in CASES[case]["config"] else layout
    check(case, mesh_shape, layout)


@slow
@pytest.mark.parametrize("case", ["all", "share_parameters, scalenorm, num_mem_kv", "softmax, mlp_glu"])
def test_bfloat16(case):
    """Rounded, not wrong: see test_gpt2.test_half_precision; here some sixty values on the way are rounded."""
    dtype = mtf.VariableDType(tf.bfloat16)
    params, ids, lengths = params_of(case), golden()["ids"], golden()["lengths"]
    rounded = {name: w.astype(tf.bfloat16.as_numpy_dtype) for name, w in golden_weights(shapes_of(case)).items()}

    def build(mesh, ids, lengths):
        shape, other = features(mesh, params, *golden()["ids"].shape, variable_dtype=dtype)
        ids, lengths = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, lengths, shape[:1])
        steps = incremental_logits(ids, ids, lengths, other, params, 1, dtype)[1]
        return call_model(ids, other, params, variable_dtype=dtype)[0], steps[0]

    logits, step = Program(build, [(tf.int32, ids.shape), (tf.int32, lengths.shape)], rounded)(ids, lengths)
    want = reference.gpt_neo_forward(rounded, ids, **reference_config(params))
    bound = 6 * 60**0.5 * 2.0**-9 * np.std(want)
    assert largest_difference(logits.astype(np.float64), want) < bound
    assert largest_difference(step[:, 0].astype(np.float64), want[range(3), lengths - 1]) < bound


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param("all", ("", ""), marks=slow),
        pytest.param("all", TRAINING_LAYOUTS[0], marks=slow),
        pytest.param("share_parameters, scalenorm, num_mem_kv", ("", ""), marks=slow),
        pytest.param("macaron, mlp_glu, scalenorm, none", TRAINING_LAYOUTS[1], marks=slow),
        pytest.param("softmax, mlp_glu", ("", ""), marks=slow),
    ],
)
@pytest.mark.parametrize("recompute_grad", [False, True])
def test_gradients_by_central_differences(case, layout, recompute_grad):
    params = {**params_of(case), "mode": "train", "recompute_grad": recompute_grad}
    weights, ids = golden_weights(shapes_of(case)), np.concatenate([golden()["ids"], golden()["ids"][:1]])
    labels = np.roll(ids, -1, 1)

    def build(mesh, ids, labels):
        shape, other = features(mesh, params, *golden_shape)
        ids, labels = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, labels, shape)
        return gradients(mesh, call_model(ids, other, params, labels=labels)[1])

    golden_shape = ids.shape
    found = Program(build, [(tf.int32, ids.shape)] * 2, weights, MeshRunner(*layout))(ids, labels)
    assert token_losses(reference.gpt_neo_forward(weights, ids, **reference_config(params)), labels).mean() > 1
    check_by_central_differences(found, params, (ids, labels), weights)


# --- A checkpoint that GPT-Neo wrote -------------------------------------------------

WRITTEN = MESH_TF / "variants"


def test_a_checkpoint_with_nearly_all_options():
    """Opened, generated from, scored, inspected."""
    params, weights, made = checkpoint("variants")
    ids, lengths = made["ids"], made["lengths"]
    generator = TextGenerator.from_pretrained(WRITTEN)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    samples = generator.generate([row[:n].tolist() for row, n in zip(ids, lengths)], **options)
    for sample, row, n in zip(samples, made["tokens"], lengths):
        assert sample.tokens == row[n : n + 6].tolist()
    (score,) = generator.score([ids[0].tolist()])
    logits = made["logits"][0].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(score.logprobs[1:], want[range(11), ids[0, 1:]], rtol=0, atol=2e-5)
    model, *_ = generator.inspect(ids[0].tolist(), temperature=0.5)
    np.testing.assert_allclose(model.probabilities, np.exp(want[-1]), rtol=0, atol=1e-6)
    assert (
        largest_difference(reference.gpt_neo_forward(weights, ids, **reference_config(params)), made["logits"])
        < TOLERANCE
    )


@slow
def test_exported_and_on_a_mesh(tmp_path):
    prompt = checkpoint("variants")[2]["ids"][1, :4].tolist()
    options = dict(max_new_tokens=6, seed=3, eos_token_id=-1)
    (want,) = TextGenerator.from_pretrained(WRITTEN).generate([prompt], **options)
    layout = "vocab:x,heads:x,intermediate_expanded:x,memory_length:y"
    split = dict(mesh_shape="x:2,y:2", layout=layout, devices="cpu:0,cpu:1,cpu:2,cpu:3")
    assert TextGenerator.from_pretrained(WRITTEN, **split).generate([prompt], **options) == [want]
    export_saved_model(tmp_path / "saved", WRITTEN, batch=1, length=10, max_top_k=16)
    serve = tensorflow.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    feeds = dict(prompts=[prompt], prompt_lengths=[4], temperature=0.9, seed=3, top_k=0, max_new_tokens=6,
                 eos_token_id=-1, stream=0)  # fmt: skip
    specs = serve.structured_input_signature[1]
    found = serve(**{name: tf.constant(value, specs[name].dtype) for name, value in feeds.items()})
    assert found["tokens"].numpy()[0, :10].tolist() == prompt + want.tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_in_its_own_format(tmp_path, dtype):
    convert_checkpoint(WRITTEN, tmp_path / "m", to="mesh-tf", dtype=dtype)
    with open_checkpoint(WRITTEN) as a, open_checkpoint(tmp_path / "m") as b:
        assert a.params == b.params and a.names() == b.names() and "/norm_rezero_1/g" in a.names()
        for name in a.names():
            np.testing.assert_allclose(a.read(name), b.read(name), rtol=0 if dtype == "float32" else 2**-8)
            assert a.read(name).shape == b.shape(name)


@pytest.mark.parametrize("option", [*SWITCHES, "axial_pos_emb", "num_mem_kv"])
def test_hugging_faces_format_has_none_of_them(tmp_path, option):
    value = {"axial_pos_emb": [2, 3], "num_mem_kv": 2}.get(option, True)
    params = {**TINY, option: value}
    write_mesh_tf_checkpoint(tmp_path / "m", params, random_weights(params))
    message = re.escape(f"Hugging Face's GPT-Neo has no {option}={value!r}; allowed: to='mesh-tf'")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "m", tmp_path / "hf", to="huggingface")
    assert not (tmp_path / "hf").exists()


def test_a_memory_without_room_for_what_is_learned():
    """As GPT-Neo's model_fn makes it, whose own model fails there."""
    params = params_of("num_mem_kv")

    def build(mesh):
        shape, other = features(mesh, {**params, "num_mem_kv": 0}, 1, 12)
        return call_model(mtf.zeros(mesh, shape, tf.int32), other, params)[0]

    with pytest.raises(ValueError, match="memory_length_dim has 12 entries; with num_mem_kv=3 and 12 positions 15 are"):
        Program(build)


def test_a_layout_that_splits_memory():
    devices = dict(mesh_shape="x:4", layout="memory_length:x", devices="cpu:0,cpu:1,cpu:2,cpu:3")
    with pytest.raises(ValueError, match="memory_length:x splits memory_length=2 over x:4, which does not divide it"):
        TextGenerator.from_pretrained(WRITTEN, **devices)

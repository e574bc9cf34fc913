"""models/gpt2.py against the NumPy float64 forward pass of tests/reference.py."""

import functools

import numpy as np
import pytest
import reference
from helpers_model import (
    call_model,
    checkpoint,
    config,
    context,
    features,
    incremental_logits,
    random_weights,
    reference_config,
    variable_shapes,
)
from programs import MeshRunner, Program

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.config import SWITCHES, UNSUPPORTED_OPTIONS

LOGITS_TOLERANCE = 1e-4
slow = pytest.mark.slow


def logits_program(params, weights, batch, length, **kwargs):
    def build(mesh, ids):
        shape, other = features(mesh, params, batch, length, **kwargs)
        return call_model(mtf.import_tf_tensor(mesh, ids, shape), other, params)[0]

    return Program(build, [(tf.int32, [batch, length])], weights)


def largest_difference(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.all(np.isfinite(a)) and np.all(np.isfinite(b))
    return np.abs(a - b).max()


# --- The forward pass -----------------------------------------------------------


@pytest.mark.parametrize("name", ["global", "local", "padding_outside", "rotary"])
def test_logits_of_the_checkpoints(name, record_property):
    params, weights, golden = checkpoint(name)
    logits = logits_program(params, weights, *golden["ids"].shape)(golden["ids"])
    assert logits.dtype == np.float32
    difference = largest_difference(logits, golden["logits"])
    record_property("golden logits", float(difference))
    assert difference < LOGITS_TOLERANCE


SHAPES = {
    "one head, a window of one": (config(["local"], n_head=1, local_attention_radius=1), 2, 12),
    "a window of two, odd sizes": (
        config(["local", "global"], n_head=3, n_embd=15, n_vocab=29, n_ctx=7, local_attention_radius=2), 3, 7),
    "a window longer than the text": (config(["local", "global"], n_head=8, local_attention_radius=100), 2, 12),
    "no window given": (config(["local"], n_head=2), 2, 12),
    "mixed types, the local ones first": (config(["local", "local", "global"], local_attention_radius=5), 2, 12),
    "shorter than n_ctx": (config(["global", "local"], n_ctx=40, local_attention_radius=3), 2, 9),
    "one token": (config(["global", "local"], local_attention_radius=3), 1, 1),
    "heads of width one": (config(["global"], n_head=16), 2, 12),
    "rotary, heads of width two": (
        config(["local", "global"], n_head=8, local_attention_radius=3, rotary_emb=True), 2, 12),
    "rotary, shorter than n_ctx": (config(["global"], n_ctx=40, rotary_emb=True), 2, 9),
    "layers without attention": (config(["none", "global", "none"]), 2, 12),
    "no attention at all": (config(["none"], activation_fn="silu"), 2, 12),
    "another activation function": (config(["global"], activation_fn="relu"), 2, 12),
    "what only Hugging Face's configs say": (
        config(["local", "global"], activation_fn="gelu_erf", intermediate_size=21, layer_norm_epsilon=0.3), 2, 12),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_logits_against_the_reference(case):
    params, batch, length = SHAPES[case]
    weights = random_weights(params)
    ids = np.random.default_rng(1).integers(0, params["n_vocab"], (batch, length))
    logits = logits_program(params, weights, batch, length)(ids)
    expected = reference.gpt_neo_forward(weights, ids, **reference_config(params))
    assert largest_difference(logits, expected) < LOGITS_TOLERANCE
    assert np.std(expected) > 0.5  # the logits are of a size at which 1e-4 is small


def test_the_window_counts_the_token_itself():
    """A radius of r sees r positions: a change r − 1 back matters, one r back does not."""
    params = config(["local"], local_attention_radius=3)
    run = logits_program(params, random_weights(params), 2, 12)
    ids = np.random.default_rng(2).integers(0, 32, (2, 12))
    ids[1] = ids[0]
    ids[1, 4] = (ids[0, 4] + 1) % 32
    changed = np.abs(np.diff(run(ids), axis=0)[0]).max(-1) > 1e-6
    assert changed.tolist() == [4 <= position <= 6 for position in range(12)]


def test_an_id_outside_the_vocabulary_looks_up_a_zero_vector():
    params = config(["global", "local"], padding_id=32, local_attention_radius=3)
    weights = random_weights(params)
    ids = np.random.default_rng(3).integers(0, 32, (2, 12))
    ids[0, 5:] = 32  # the padding id of a config whose padding_id is n_vocab
    ids[1, [0, 4, 11]] = 50257, -1, 32
    logits = logits_program(params, weights, 2, 12)(ids)
    assert largest_difference(logits, reference.gpt_neo_forward(weights, ids, **reference_config(params))) < 1e-4
    zeroed = dict(weights, wte=np.concatenate([weights["wte"], np.zeros((1, 16))]))
    inside = np.where((ids < 0) | (ids > 32), 32, ids)  # an entry of the table that holds zeros
    expected = reference.gpt_neo_forward(zeroed, inside, **reference_config(params))[..., :32]
    assert largest_difference(logits, expected) < LOGITS_TOLERANCE


def test_without_a_mask_global_attention_sees_all_positions():
    params = config(["global"], causal=False)
    run = logits_program(params, random_weights(params), 2, 12, causal=False)
    ids = np.random.default_rng(4).integers(0, 32, (2, 12))
    ids[1] = ids[0]
    ids[1, 11] = (ids[0, 11] + 1) % 32
    assert np.all(np.abs(np.diff(run(ids), axis=0)[0]).max(-1) > 1e-6)


def test_a_sequence_longer_than_n_ctx_is_refused():
    params = config(["global"], n_ctx=6)
    with pytest.raises(ValueError, match="7 positions; the model has 6"):
        logits_program(params, None, 1, 7)


@pytest.mark.parametrize("options", [pytest.param({}, marks=slow), {"rotary_emb": True}, {"use_tpu": True}])
def test_incremental_logits(options):
    """Each step's, whatever the first pass saw where the prompts had ended."""
    params = config(["global", "none", "local"], n_ctx=20, n_vocab=31, local_attention_radius=3, **options)
    weights = random_weights(params)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 31, (3, 12))
    ids[2, 6:8] = 31  # outside the vocabulary
    lengths = np.array([1, 4, 6])
    first = np.where(np.arange(12) < lengths[:, None], ids, rng.integers(0, 31, (3, 12)))

    def build(mesh, first, ids, lengths):
        shape, other = features(mesh, params, 3, 12)
        first, ids = mtf.import_tf_tensor(mesh, first, shape), mtf.import_tf_tensor(mesh, ids, shape)
        lengths = mtf.import_tf_tensor(mesh, lengths, shape[:1])
        return incremental_logits(first, ids, lengths, other, params, 4)[1]

    run = Program(build, [(tf.int32, [3, 12]), (tf.int32, [3, 12]), (tf.int32, [3])], weights)
    logits = np.stack(run(first, ids, lengths), 1)
    assert logits.shape == (3, 4, 1, 31)
    expected = reference.gpt_neo_forward(weights, ids, **reference_config(params))
    expected = np.stack([expected[row, n - 1 : n + 3] for row, n in enumerate(lengths)])
    assert largest_difference(logits[:, :, 0], expected) < LOGITS_TOLERANCE


RING = 128  # the least multiple of 128 from the window's size on


@pytest.mark.parametrize(
    "mesh_shape, layout",
    [("", ""), pytest.param("x:2,y:2", "batch:x,memory_length:y,embd:y", marks=slow)],
)
def test_incremental_logits_from_a_ring(mesh_shape, layout):
    """Prompts that end before, at and after the ring's seams, and steps across them."""
    params = config(["local", "global"], n_ctx=304, n_vocab=31, local_attention_radius=100, use_tpu=True)
    weights = random_weights(params)
    lengths = np.array([1, 126, 128, 129, 255, 299])
    ids = np.random.default_rng(5).integers(0, 31, (6, 304))
    first = np.where(np.arange(304) < lengths[:, None], ids, 7)

    def build(mesh, first, ids, lengths):
        shape, other = features(mesh, params, 6, 304)
        first, ids = mtf.import_tf_tensor(mesh, first, shape), mtf.import_tf_tensor(mesh, ids, shape)
        lengths = mtf.import_tf_tensor(mesh, lengths, shape[:1])
        return incremental_logits(first, ids, lengths, other, params, 4, knows_lengths=True)[1]

    inputs = [(tf.int32, [6, 304]), (tf.int32, [6, 304]), (tf.int32, [6])]
    logits = np.stack(Program(build, inputs, weights, MeshRunner(mesh_shape, layout))(first, ids, lengths), 1)
    expected = reference.gpt_neo_forward(weights, ids, **reference_config(params))
    expected = np.stack([expected[row, n - 1 : n + 3] for row, n in enumerate(lengths)])
    assert largest_difference(logits[:, :, 0], expected) < LOGITS_TOLERANCE


def test_what_the_cache_of_a_tpu_holds():
    """Heads side by side; of local attention the last positions alone, each at its remainder."""
    params = config(["global", "local"], n_ctx=300, local_attention_radius=100)
    weights = random_weights(params)
    ids = np.random.default_rng(11).integers(0, 32, (2, 300))
    lengths = np.array([140, 300])

    def build(mesh, ids, lengths):
        shape, other = features(mesh, params, 2, 300)
        ids, lengths = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, lengths, shape[:1])
        found = []
        for use_tpu in (False, True):
            ctx = context(ids, "first_part", mtf.range(mesh, shape[1], tf.int32), initial_position=lengths)
            call_model(ids, other, {**params, "use_tpu": use_tpu}, ctx)
            found.append(ctx.new_states)
        return found

    plain, states = Program(build, [(tf.int32, [2, 300]), (tf.int32, [2])], weights)(ids, lengths)
    plain = [x.transpose(0, 2, 1, 3).reshape(2, 300, 16) for x in plain]
    assert largest_difference(states[:2], plain[:2]) == 0
    for state, x in zip(states[2:], plain[2:]):
        assert state.shape == (2, RING, 16)
        for row, n in enumerate(lengths):
            for position in range(n - RING, n):
                np.testing.assert_array_equal(state[row, position % RING], x[row, position])


def test_what_the_cache_holds():
    """[k, v] a layer that has attention, k as it is before it is turned."""
    params = config(["none", "global"], rotary_emb=True)
    weights = random_weights(params)
    ids = np.random.default_rng(11).integers(0, 32, (2, 12))

    def build(mesh, ids):
        shape, other = features(mesh, params, 2, 12)
        ids = mtf.import_tf_tensor(mesh, ids, shape)
        ctx = context(ids, "first_part", mtf.range(mesh, shape[1], tf.int32))
        call_model(ids, other, params, ctx)
        return ctx.new_states

    states = Program(build, [(tf.int32, [2, 12])], weights)(ids)
    h = 2 * weights["wte"][ids].astype(np.float64)  # layer 0 adds its input
    h += reference.mlp(h, weights, "h0/")
    normal = reference.layer_norm(h, weights["h1/norm_1/g"], weights["h1/norm_1/b"])
    assert len(states) == 2
    for state, name in zip(states, "kv"):
        expected = (normal @ weights[f"h1/attn/{name}"]).reshape(2, 12, 4, 4).transpose(0, 2, 1, 3)
        assert largest_difference(state, expected) < 1e-5


def test_decoding_without_a_mask_is_refused():
    params = config(["global"])

    def build(mesh):
        shape, other = features(mesh, params, 1, 4, causal=False)
        ids = mtf.zeros(mesh, shape, tf.int32)
        return incremental_logits(ids, ids, mtf.ones(mesh, shape[:1], tf.int32), other, params, 1)[1]

    with pytest.raises(ValueError, match="attn_bias is None"):
        Program(build)


@pytest.mark.parametrize(
    "dtypes, rotary_emb",
    [
        ((tf.bfloat16,) * 3, False),
        pytest.param((tf.bfloat16,) * 3, True, marks=slow),
        pytest.param((tf.float32, tf.bfloat16, tf.bfloat16), False, marks=slow),
        ((tf.float32, tf.bfloat16, tf.bfloat16), True),
        pytest.param((tf.float16,) * 3, False, marks=slow),
        pytest.param((tf.float16,) * 3, True, marks=slow),
    ],
)
def test_half_precision(dtypes, rotary_emb):
    """Rounded, not wrong, in the whole pass and step by step; logits come in the master dtype, as in GPT-Neo.

    The reference has the rounded weights. Some thirty values on the way from token
    to logit are rounded by up to half a unit of the last of 8 (11) bits: √30 · 2⁻⁹
    (2⁻¹²) of a standard deviation of the logits is to be expected, and the largest of
    768 errors below six times that.
    """
    params = config(["global", "local"], local_attention_radius=3, rotary_emb=rotary_emb)
    weights = random_weights(params)
    variable_dtype = mtf.VariableDType(*dtypes)

    def build(mesh, ids, lengths):
        shape, other = features(mesh, params, 2, 12, variable_dtype=variable_dtype)
        ids, lengths = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, lengths, shape[:1])
        steps = incremental_logits(ids, ids, lengths, other, params, 1, variable_dtype)[1]
        return call_model(ids, other, params, variable_dtype=variable_dtype)[0], steps[0]

    ids, lengths = np.random.default_rng(6).integers(0, 32, (2, 12)), np.array([3, 7])
    activation_dtype = dtypes[2].as_numpy_dtype
    rounded = {name: w.astype(activation_dtype) for name, w in weights.items()}
    as_master = {name: w.astype(dtypes[0].as_numpy_dtype) for name, w in rounded.items()}
    logits, step = Program(build, [(tf.int32, [2, 12]), (tf.int32, [2])], as_master)(ids, lengths)
    assert logits.dtype == step.dtype == dtypes[0].as_numpy_dtype
    expected = reference.gpt_neo_forward(rounded, ids, **reference_config(params))
    bound = 6 * 30**0.5 * 2.0 ** (-9 if dtypes[2] == tf.bfloat16 else -12) * np.std(expected)
    assert largest_difference(logits.astype(np.float64), expected) < bound
    assert largest_difference(step[:, 0].astype(np.float64), expected[[0, 1], lengths - 1]) < bound


# --- Variables ------------------------------------------------------------------


@pytest.mark.parametrize("types, rotary_emb, count", [(["global", "local"], False, 4 + 2 * 13),
                                                      (["none", "global"], True, 3 + 6 + 13)])  # fmt: skip
def test_variables_are_gpt_neos(types, rotary_emb, count):
    params = config(types, n_vocab=31, n_ctx=20, rotary_emb=rotary_emb)
    run = logits_program(params, None, 2, 12)
    assert run.variables == {"gpt2/" + name: shape for name, shape in variable_shapes(params).items()}
    assert len(run.variables) == count


# --- Layouts ----------------------------------------------------------------------

SPLIT = config(["global", "local"], n_ctx=16, local_attention_radius=3)  # every dim a multiple of 4
ROTARY = config(["global", "none", "local"], n_ctx=16, local_attention_radius=3, rotary_emb=True, activation_fn="mish")
SPLIT_BATCH, SPLIT_LENGTH, SPLIT_STEPS = 4, 8, 2

# Every dim that a layout may split: dims that no tensor has two of share a dim of the mesh.
EACH_DIM = "vocab:x,heads:x,intermediate_expanded:x,embed_sequence:x"
LAYOUTS = [("all:2", "batch:all"), ("x:2", "embd:x"), ("x:2", "memory_length:x")]
# GPT-Neo's own; with the gradients
TRAINING_LAYOUTS = [
    ("x:2,y:2", "batch:x,heads:y,vocab:y,intermediate_expanded:y"),
    ("x:2,y:2", "batch:x,memory_length:y,embd:y"),
]


def split_inputs():
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 32, (SPLIT_BATCH, SPLIT_LENGTH))
    ids[1, 3], ids[2, 7] = 32, 50257
    labels = rng.integers(0, 32, ids.shape)
    return ids, labels, np.array([1, 3, 6, 4])


def run_split(mesh_shape, layout, training, rotary=False):
    params = dict(ROTARY if rotary else SPLIT, mode="train" if training else "predict")

    def build(mesh, ids, labels, lengths):
        shape, other = features(mesh, params, SPLIT_BATCH, SPLIT_LENGTH)
        ids, labels = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, labels, shape)
        lengths = mtf.import_tf_tensor(mesh, lengths, shape[:1])
        if training:
            logits, loss, loss_batch = call_model(ids, other, params, labels=labels)
            return {"logits": logits, "loss": loss, "loss_batch": loss_batch, "gradients": gradients(mesh, loss)}
        logits, incremental = incremental_logits(ids, ids, lengths, other, params, SPLIT_STEPS)
        return {"logits": logits, "incremental": incremental}

    shape = [SPLIT_BATCH, SPLIT_LENGTH]
    inputs = [(tf.int32, shape), (tf.int32, shape), (tf.int32, shape[:1])]
    run = Program(build, inputs, random_weights(params), MeshRunner(mesh_shape, layout))
    return run(*split_inputs())


def gradients(mesh, loss):
    """{name less "gpt2/": gradient} for every variable."""
    variables = mesh.graph.trainable_variables
    return {
        v.name.removeprefix("gpt2/"): g
        for v, g in zip(variables, mtf.gradients([loss], [v.outputs[0] for v in variables]))
    }


def training_gradients(ids, labels, other, params):
    """{name: gradient} of the loss, as GPT-Neo's model_fn has it: with `num_microbatches`, summed over them."""
    mesh, microbatches = ids.mesh, params.get("num_microbatches", 1)

    def model_fn(features):
        return {"loss": call_model(features["inputs"], other, params, labels=features["labels"])[1]}

    features = {"inputs": ids, "labels": labels}
    if microbatches == 1:
        return gradients(mesh, model_fn(features)["loss"])
    summed, _ = mtf.serialize_training_step(features, model_fn, ids.shape[0], microbatches)
    return {v.name.removeprefix("gpt2/"): g for v, g in zip(mesh.graph.trainable_variables, summed)}


@functools.cache
def on_one_device(training, rotary=False):
    return run_split("", "", training, rotary)


@pytest.mark.parametrize(
    "mesh_shape, layout, rotary",
    [
        ("x:2", EACH_DIM, False),
        *(pytest.param(*layout, False, marks=slow) for layout in LAYOUTS),
        *(pytest.param(*layout, True, marks=slow) for layout in TRAINING_LAYOUTS),
    ],
)
def test_split_logits(mesh_shape, layout, rotary):
    single, split = on_one_device(False, rotary), run_split(mesh_shape, layout, False, rotary)
    assert largest_difference(split["logits"], single["logits"]) < LOGITS_TOLERANCE
    assert len(split["incremental"]) == SPLIT_STEPS
    for a, b in zip(split["incremental"], single["incremental"]):
        assert largest_difference(a, b) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    "mesh_shape, layout, rotary",
    [
        pytest.param("x:2", EACH_DIM, False, marks=slow),
        *(pytest.param(*layout, False, marks=slow) for layout in TRAINING_LAYOUTS),
        pytest.param(*TRAINING_LAYOUTS[1], True, marks=slow),
    ],
)
def test_split_training(mesh_shape, layout, rotary):
    single, split = on_one_device(True, rotary), run_split(mesh_shape, layout, True, rotary)
    for name in ("logits", "loss", "loss_batch"):
        assert largest_difference(split[name], single[name]) < LOGITS_TOLERANCE, name
    assert set(split["gradients"]) == set(variable_shapes(ROTARY if rotary else SPLIT))
    for name, g in single["gradients"].items():
        assert largest_difference(split["gradients"][name], g) < 1e-5 * max(1, np.abs(g).max()), name


@pytest.mark.parametrize("rotary", [False, pytest.param(True, marks=slow)])
def test_one_device_is_right(rotary):
    """What the layouts are compared with is the reference's own answer."""
    single, training = on_one_device(False, rotary), on_one_device(True, rotary)
    ids, labels, lengths = split_inputs()
    params = ROTARY if rotary else SPLIT
    expected = reference.gpt_neo_forward(random_weights(params), ids, **reference_config(params))
    assert largest_difference(single["logits"], expected) < LOGITS_TOLERANCE
    assert largest_difference(training["logits"], expected) < LOGITS_TOLERANCE
    for step, logits in enumerate(single["incremental"]):
        wanted = expected[np.arange(SPLIT_BATCH), lengths - 1 + step]
        assert largest_difference(logits[:, 0], wanted) < LOGITS_TOLERANCE
    assert largest_difference(training["loss_batch"], token_losses(expected, labels)) < LOGITS_TOLERANCE


# --- What a config may not say ------------------------------------------------------


@pytest.mark.parametrize("option", UNSUPPORTED_OPTIONS)
def test_an_unsupported_option(option):
    with pytest.raises(ValueError, match=rf"{option}=True is not supported; .* sample_autoregressive's model="):
        gpt2.check_params(config(["global"], **{option: True}))
    for harmless in (None, False, 0, []):
        gpt2.check_params(config(["global"], **{option: harmless}))


BAD_OPTIONS = [
    ({"activation_fn": "maxout"}, r"activation_fn='maxout'.*allowed: abs, arcsinh, .*, logsoftmax, .*model="),
    ({"activation_fn": "rrelu"}, r"activation_fn='rrelu'"),
    ({"activation_fn": "prelu"}, r"activation_fn='prelu'"),
    ({"activation_fn": ["gelu"]}, r"activation_fn=\['gelu'\]"),
    ({"rotary_emb": True, "n_head": 16}, r"rotary_emb .*n_embd=16 over n_head=16 .*odd number, 1"),
    ({"n_layer": None}, r"n_layer=None"),
    ({"n_layer": 0}, r"n_layer=0"),
    ({"n_layer": 2.0}, r"n_layer=2\.0"),
    ({"n_head": None}, r"n_head=None"),
    ({"n_head": -1}, r"n_head=-1"),
    ({"n_embd": 0}, r"n_embd=0"),
    ({"n_head": 3}, r"n_embd=16 .*n_head=3"),
    ({"n_layer": 3}, r"attention_types .*2.*n_layer is 3"),
    ({"attention_types": [[["global"], 3]]}, r"attention_types .*3.*n_layer is 2"),
    ({"attention_types": ["global"]}, r"attention_types .*1.*n_layer is 2"),
    ({"attention_types": [[["global", "linear"], 1]]}, r"attention_types.*'linear'.*global, local, none; .*model="),
    ({"attention_types": [[["global", "conv"], 1]]}, r"attention_types.*'conv'"),
    ({"attention_types": None}, r"attention_types"),
    ({"causal": False}, r"causal=False.*'local'"),
    ({"attention_types": "global"}, r"attention_types"),
    ({"attention_types": [["global", "local"]]}, r"attention_types"),
    ({"attention_types": []}, r"attention_types"),
    ({"local_attention_radius": 0}, r"local_attention_radius=0"),
    ({"local_attention_radius": -5}, r"local_attention_radius=-5"),
    ({"local_attention_radius": "256"}, r"local_attention_radius='256'"),
    ({"intermediate_size": 0}, r"intermediate_size=0: a whole number of at least 1"),
    ({"intermediate_size": "64"}, r"intermediate_size='64'"),
    ({"layer_norm_epsilon": -1e-5}, r"layer_norm_epsilon=-1e-05: a number of at least 0"),
    ({"layer_norm_epsilon": float("nan")}, r"layer_norm_epsilon=nan"),
    ({"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon=10000"),
    *(({option: "yes"}, f"{option}='yes'; allowed: true, false") for option in SWITCHES),
    ({"axial_pos_emb": True}, r"axial_pos_emb=True; allowed: \[rows, columns\]"),
    ({"axial_pos_emb": [4]}, r"axial_pos_emb=\[4\]; allowed: \[rows, columns\]"),
    ({"axial_pos_emb": [4, 0]}, r"axial_pos_emb=\[4, 0\]; allowed: \[rows, columns\], at least 1 each"),
    ({"axial_pos_emb": [4, 2.5]}, r"axial_pos_emb=\[4, 2.5\]"),
    ({"num_mem_kv": -1}, r"num_mem_kv=-1; allowed: a whole number of at least 0"),
    ({"num_mem_kv": 1.5}, r"num_mem_kv=1.5"),
    ({"num_mem_kv": True}, r"num_mem_kv=True"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_a_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        gpt2.check_params({**config(["global", "local"]), **options})


def test_a_missing_option():
    for option in ("n_layer", "n_head", "n_embd", "attention_types"):
        params = config(["global"])
        del params[option]
        with pytest.raises(ValueError, match=option):
            gpt2.check_params(params)


def test_the_model_itself_checks():
    with pytest.raises(ValueError, match=r"moe_layers=\[0\]"):
        logits_program(config(["global"], moe_layers=[0]), None, 1, 4)


def test_configs_that_are_allowed():
    nested = [[["global", "local"], 1]]
    for types in (nested, [[["global"], 1], [["local"], 1]], ["global", "local"]):
        gpt2.check_params({**config(["global", "local"]), "attention_types": types})
    gpt2.check_params(config(["global"], activation_fn="gelu", activation_function="prelu", local_attention_radius=1))
    for off in (None, False, 0):
        gpt2.check_params(config(["global"], **dict.fromkeys([*SWITCHES, "axial_pos_emb", "num_mem_kv"], off)))


# --- The loss ---------------------------------------------------------------------


def token_losses(logits, labels, z_loss=1e-4, entmax=False):
    """float64 [batch, sequence]: cross entropy, or the 1.3-entmax loss, plus the z-loss."""
    target = (labels[..., None] == np.arange(logits.shape[-1])).astype(np.float64)
    top = logits.max(-1)
    log_z = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    loss = reference.entmax_loss(logits, target, 1.3) if entmax else log_z - (target * logits).sum(-1)
    return loss + z_loss * log_z**2


TRAIN = config(["global", "local"], n_ctx=8, n_vocab=29, local_attention_radius=3)
TRAIN_SHAPE = (4, 8)


def train_inputs():
    rng = np.random.default_rng(8)
    ids, labels = rng.integers(1, 29, (2, *TRAIN_SHAPE))
    ids[0, 5:] = labels[0, 4:] = labels[2, 1] = 0
    return ids, labels


ALL_GLOBAL = [[["global"], TRAIN["n_layer"]]]
LOSSES = {
    "default": ({}, {}),
    "z_loss of 0": ({"z_loss": 0}, {"z_loss": 0}),
    "z_loss of 0.1": ({"z_loss": 0.1}, {"z_loss": 0.1}),
    "entmax_loss": ({"entmax_loss": True}, {"entmax": True}),
    "entmax_loss with z_loss": ({"entmax_loss": True, "z_loss": 0.1}, {"entmax": True, "z_loss": 0.1}),
    "microbatches": ({"num_microbatches": 4}, {}),
    "recompute_grad": ({"recompute_grad": True}, {}),
    "eval": ({"mode": "eval"}, {}),
    "eval with dropout": ({"mode": "eval", "embed_dropout": 0.5, "attn_dropout": 0.5, "res_dropout": 0.5}, {}),
    "causal": ({"causal": True}, {}),
    "masked": ({"causal": False, "attention_types": ALL_GLOBAL}, {"padding": 0}),
    "masked, another padding id": (
        {"causal": False, "attention_types": ALL_GLOBAL, "padding_id": 7},
        {"padding": 7},
    ),
}


@pytest.fixture(scope="module")
def losses():
    """{case: (loss, loss_batch, logits)}, all from one graph."""

    def build(mesh, ids, labels):
        shape, other = features(mesh, TRAIN, *TRAIN_SHAPE)
        ids, labels = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, labels, shape)
        out = {}
        for case, (options, _) in LOSSES.items():
            logits, loss, loss_batch = call_model(ids, other, {**TRAIN, "mode": "train", **options}, labels=labels)
            assert loss.shape.dims == [] and loss_batch.shape == shape
            out[case] = loss, loss_batch, logits
        return out

    inputs = [(tf.int32, TRAIN_SHAPE)] * 2
    ids, labels = train_inputs()
    labels[1, 2:4] = 7
    return Program(build, inputs, random_weights(TRAIN))(ids, labels), ids, labels


@pytest.mark.parametrize("case", LOSSES)
def test_loss(losses, case):
    values, ids, labels = losses
    (options, expected), (loss, loss_batch, logits) = LOSSES[case], values[case]
    expected = dict(expected)
    padding = expected.pop("padding", None)
    types = options.get("attention_types", TRAIN["attention_types"])
    config = reference_config({**TRAIN, "attention_types": types})
    right = reference.gpt_neo_forward(random_weights(TRAIN), ids, **config)
    assert largest_difference(logits, right) < LOGITS_TOLERANCE
    wanted = token_losses(right, labels, **expected)
    if padding is not None:
        assert 0 < np.mean(labels == padding) < 1
        wanted = wanted * (labels != padding)
    assert loss_batch.dtype == np.float32
    assert largest_difference(loss_batch, wanted) < 3e-5
    assert largest_difference(loss, wanted.mean() / options.get("num_microbatches", 1)) < 1e-5


def test_predict_gives_no_loss():
    def build(mesh):
        shape, other = features(mesh, TRAIN, 1, 4)
        logits, loss, loss_batch = call_model(mtf.zeros(mesh, shape, tf.int32), other, TRAIN)
        assert loss is None and loss_batch is None
        return logits

    Program(build)


@pytest.mark.parametrize("entmax", [False, True])
def test_a_label_outside_the_vocabulary_teaches_nothing(entmax):
    """As with mtf's own cross entropy: padding of id n_vocab, as real configs have it."""
    params = {**TRAIN, "padding_id": 29, "mode": "train", "z_loss": 0, "entmax_loss": entmax}

    def build(mesh, ids, labels):
        shape, other = features(mesh, params, *TRAIN_SHAPE)
        ids, labels = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, labels, shape)
        _, loss, loss_batch = call_model(ids, other, params, labels=labels)
        return loss_batch, gradients(mesh, loss)

    ids, labels = train_inputs()
    run = Program(build, [(tf.int32, TRAIN_SHAPE)] * 2, random_weights(TRAIN))
    loss_batch, grads = run(ids, np.full_like(labels, 29))
    assert np.all(loss_batch == 0)
    assert all(np.all(g == 0) for g in grads.values())
    _, grads = run(ids, labels)
    assert all(np.any(g != 0) for g in grads.values())


def test_dropout():
    """Each rate counts, in train mode alone, and is drawn anew at each run."""
    rates = ("embed_dropout", "attn_dropout", "res_dropout")

    def build(mesh, ids, labels):
        shape, other = features(mesh, TRAIN, *TRAIN_SHAPE)
        ids, labels = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, labels, shape)

        def loss(**options):
            return call_model(ids, other, {**TRAIN, **options}, labels=labels)[1]

        out = {rate: loss(mode="train", **{rate: 0.2}) for rate in rates}
        out |= {"tiny " + rate: loss(mode="train", **{rate: 1e-7}) for rate in rates}
        out["none"] = loss(mode="train", **dict.fromkeys(rates, 0.0))
        out["eval"] = loss(mode="eval", **dict.fromkeys(rates, 0.2))
        out["predict"] = call_model(ids, other, {**TRAIN, **dict.fromkeys(rates, 0.2)})[0]
        return out

    run = Program(build, [(tf.int32, TRAIN_SHAPE)] * 2, random_weights(TRAIN))
    ids, labels = train_inputs()
    first, second = run(ids, labels), run(ids, labels)
    assert first["eval"] == pytest.approx(first["none"], abs=1e-6)
    right = reference.gpt_neo_forward(random_weights(TRAIN), ids, **reference_config(TRAIN))
    assert largest_difference(first["predict"], right) < LOGITS_TOLERANCE
    for rate in rates:
        assert abs(first[rate] - first["none"]) > 1e-5, rate
        assert abs(first[rate] - second[rate]) > 1e-5, rate
        # the rate is that of the dropped, and what is left is scaled by 1 / (1 − rate)
        assert first["tiny " + rate] == pytest.approx(first["none"], abs=1e-4), rate


# --- Gradients ----------------------------------------------------------------------

MODELS = {
    "softmax": {},
    "entmax": {"entmax_loss": True},
    "rotary": {"rotary_emb": True, "attention_types": [[["none", "local"], 1]], "activation_fn": "mish"},
}
EACH_MODEL = [pytest.param("softmax", marks=slow), "entmax", pytest.param("rotary", marks=slow)]
WAYS = {
    "plain": {},
    "recomputed": {"recompute_grad": True},
    "microbatches": {"num_microbatches": 2},
    "recomputed in microbatches": {"recompute_grad": True, "num_microbatches": 2},
}


def gradients_each_way(params, shape, inputs, ways=WAYS, mesh_shape="", layout=""):
    """{way: {name: gradient}}, from one graph."""

    def build(mesh, ids, labels):
        dims, other = features(mesh, params, *shape)
        ids, labels = mtf.import_tf_tensor(mesh, ids, dims), mtf.import_tf_tensor(mesh, labels, dims)
        return {way: training_gradients(ids, labels, other, {**params, "mode": "train", **WAYS[way]}) for way in ways}

    runner = MeshRunner(mesh_shape, layout)
    return Program(build, [(tf.int32, shape)] * 2, random_weights(params), runner)(*inputs)


@functools.cache
def all_gradients(model):
    return gradients_each_way({**TRAIN, **MODELS[model]}, TRAIN_SHAPE, train_inputs())


def check_by_central_differences(gradients, params, inputs, weights=None):
    """Each weight's gradient along two random directions of unit length.

    The differences are of the float64 loss, so they are good to 1e-9; the
    tolerance is float32's.
    """
    ids, labels = inputs
    weights = {name: w.astype(np.float64) for name, w in (weights or random_weights(params)).items()}
    rng = np.random.default_rng(9)

    def loss(weights):
        logits = reference.gpt_neo_forward(weights, ids, **reference_config(params))
        return token_losses(logits, labels, entmax=params.get("entmax_loss", False)).mean()

    assert set(gradients) == set(weights)
    for name, w in weights.items():
        for _ in range(2):
            direction = rng.standard_normal(w.shape)
            direction /= np.linalg.norm(direction)
            step = 1e-5 * direction
            expected = (loss({**weights, name: w + step}) - loss({**weights, name: w - step})) / 2e-5
            found = np.sum(gradients[name].astype(np.float64) * direction)
            scale = np.linalg.norm(gradients[name])
            assert scale > 1e-4, name
            assert abs(found - expected) < 2e-5 * scale + 1e-8, name


@pytest.mark.parametrize("model", EACH_MODEL)
def test_gradients_by_central_differences(model):
    check_by_central_differences(all_gradients(model)["plain"], {**TRAIN, **MODELS[model]}, train_inputs())


@pytest.mark.parametrize("model", EACH_MODEL)
def test_gradients_in_bfloat16(model):
    """Each within a tenth of float32's, as a whole: some sixty roundings of 2⁻⁹ on the way there and back."""
    variable_dtype = mtf.VariableDType(tf.bfloat16)
    params = {**TRAIN, **MODELS[model], "mode": "train"}

    def build(mesh, ids, labels):
        shape, other = features(mesh, params, *TRAIN_SHAPE, variable_dtype=variable_dtype)
        ids, labels = mtf.import_tf_tensor(mesh, ids, shape), mtf.import_tf_tensor(mesh, labels, shape)
        return gradients(mesh, call_model(ids, other, params, labels=labels, variable_dtype=variable_dtype)[1])

    weights = {n: w.astype(tf.bfloat16.as_numpy_dtype) for n, w in random_weights(params).items()}
    found = Program(build, [(tf.int32, TRAIN_SHAPE)] * 2, weights)(*train_inputs())
    assert set(found) == set(weights)
    for name, g in found.items():
        expected = all_gradients(model)["plain"][name]
        assert g.dtype == tf.bfloat16.as_numpy_dtype
        assert np.linalg.norm(g.astype(np.float32) - expected) < 0.1 * np.linalg.norm(expected), name


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("model", EACH_MODEL)
def test_recomputing_and_microbatches_change_no_gradient(model, way):
    for name, g in all_gradients(model)["plain"].items():
        assert largest_difference(all_gradients(model)[way][name], g) < 1e-6, name


@pytest.mark.slow
def test_entmax_gradients_with_the_vocabulary_split():
    params, inputs = {**SPLIT, **MODELS["entmax"]}, split_inputs()[:2]
    ways = ("plain", "recomputed in microbatches")
    split = gradients_each_way(params, (SPLIT_BATCH, SPLIT_LENGTH), inputs, ways, *TRAINING_LAYOUTS[0])
    check_by_central_differences(split["plain"], params, inputs)
    for name, g in split["plain"].items():
        assert largest_difference(split["recomputed in microbatches"][name], g) < 1e-6 * max(1, np.abs(g).max()), name


# --- Initial values --------------------------------------------------------------------


def test_initial_values():
    """The standard deviations that GPT-Neo starts training from."""
    params = config(["global"] * 4, n_head=4, n_embd=64, n_vocab=256, n_ctx=64)

    def build(mesh, **options):
        shape, other = features(mesh, params, 1, 4)
        call_model(mtf.zeros(mesh, shape, tf.int32), other, {**params, **options})
        return {v.name.removeprefix("gpt2/"): v.outputs[0] for v in mesh.graph.trainable_variables}

    def spread(values, ending):
        return np.std([w for name, w in values.items() if name.endswith(ending)])

    plain = Program(build)()
    expected = {"wte": 0.02, "wpe": 0.01, "attn/q": 64**-0.5 * 16**-0.5, "attn/k": 64**-0.5, "attn/v": 64**-0.5,
                "attn/o": 64**-0.5, "c_fc/kernel": 0.02, "c_proj/kernel": 0.02}  # fmt: skip
    for ending, stddev in expected.items():
        assert spread(plain, ending) == pytest.approx(stddev, rel=0.05), ending
    assert all(np.all(w == 1) for name, w in plain.items() if name.endswith("/g"))
    assert all(np.all(w == 0) for name, w in plain.items() if name.endswith(("/b", "bias", "o_b")))
    by_depth = Program(functools.partial(build, scale_by_depth=True))()
    assert spread(by_depth, "c_fc/kernel") == pytest.approx(0.02, rel=0.05)
    assert spread(by_depth, "c_proj/kernel") == pytest.approx(0.01, rel=0.05)
    by_both = Program(functools.partial(build, scale_by_depth=True, scale_by_in=True))()
    assert spread(by_both, "c_fc/kernel") == pytest.approx(0.02 / 8, rel=0.05)
    assert spread(by_both, "c_proj/kernel") == pytest.approx(0.01 / 16, rel=0.05)

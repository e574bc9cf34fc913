"""gpt_neo_sampling.checkpoint: what is read, what is written, what is refused.

Safetensors files are made here byte by byte, so that the reader is not checked
against the library that it reads with.
"""

import functools
import json
import os
import shutil
import stat
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import reference

from gpt_neo_sampling._compat import quiet_logging, tf
from gpt_neo_sampling.checkpoint import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    variable_shapes,
    write_mesh_tf_checkpoint,
)
from gpt_neo_sampling.models.gpt2 import expand_attention_types

DATA = Path(__file__).parent / "data"
MESH_TF = DATA / "gpt_neo_checkpoints"
HUGGING_FACE = DATA / "hf_gpt_neo_tiny"
GOLDEN = ("global", "local", "padding_outside", "rotary")

TINY = {
    "n_vocab": 11,
    "n_ctx": 6,
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 2,
    "attention_types": [[["global", "local"], 1]],
    "local_attention_radius": 3,
    "padding_id": 11,
    "eos_id": 4,
}
TINY_HF = {
    "model_type": "gpt_neo",
    "vocab_size": 11,
    "max_position_embeddings": 6,
    "hidden_size": 8,
    "num_heads": 2,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "attention_layers": ["global", "local"],
    "window_size": 3,
    "activation_function": "gelu_new",
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 5,
    "eos_token_id": 4,
}
TINY_NAMES = {"wte", "wpe", "ln_f/g", "ln_f/b"} | {
    f"h{layer}/{name}"
    for layer in (0, 1)
    for name in (
        "norm_1/g",
        "norm_1/b",
        "attn/q",
        "attn/k",
        "attn/v",
        "attn/o",
        "attn/compute_output_bias/o_b",
        "norm_2/g",
        "norm_2/b",
        "mlp/conv1d_main/c_fc/kernel",
        "mlp/conv1d_main/c_fc/bias",
        "mlp/conv1d_main/c_proj/kernel",
        "mlp/conv1d_main/c_proj/bias",
    )
}


# ----------------------------------------------------------------- helpers


def random_weights(params, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in variable_shapes(params).items()}


def bfloat16_bits(x):
    """The upper 16 bits of finite float32 values, rounded to nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_rounded(x):
    return (bfloat16_bits(x).astype(np.uint32) << 16).view(np.float32)


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def write_safetensors(path, tensors):
    """tensors: name -> (dtype such as "F32", array of its storage type)."""
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, value) in tensors.items():
        blob = value.tobytes()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


HF_LAYER = {
    "norm_1/g": "ln_1.weight",
    "norm_1/b": "ln_1.bias",
    "attn/q": "attn.attention.q_proj.weight",
    "attn/k": "attn.attention.k_proj.weight",
    "attn/v": "attn.attention.v_proj.weight",
    "attn/o": "attn.attention.out_proj.weight",
    "attn/compute_output_bias/o_b": "attn.attention.out_proj.bias",
    "norm_2/g": "ln_2.weight",
    "norm_2/b": "ln_2.bias",
    "mlp/conv1d_main/c_fc/kernel": "mlp.c_fc.weight",
    "mlp/conv1d_main/c_fc/bias": "mlp.c_fc.bias",
    "mlp/conv1d_main/c_proj/kernel": "mlp.c_proj.weight",
    "mlp/conv1d_main/c_proj/bias": "mlp.c_proj.bias",
}
HF_TOP = {"wte": "wte.weight", "wpe": "wpe.weight", "ln_f/g": "ln_f.weight", "ln_f/b": "ln_f.bias"}


def as_hugging_face(weights, dtype="F32", scope="transformer."):
    """Weights by GPT-Neo's names, as Hugging Face stores them."""
    store = {"F32": np.float32, "F16": np.float16}
    tensors = {}
    for name, value in weights.items():
        if name in HF_TOP:
            hf_name = HF_TOP[name]
        else:
            layer, rest = name.split("/", 1)
            hf_name = f"h.{layer[1:]}.{HF_LAYER[rest]}"
            value = value.T
        stored = bfloat16_bits(value) if dtype == "BF16" else value.astype(store[dtype])
        tensors[scope + hf_name] = (dtype, np.ascontiguousarray(stored))
    return tensors


def make_hugging_face(folder, config=None, tensors=None):
    folder.mkdir()
    write_json(folder / "config.json", {**TINY_HF, **(config or {})})
    write_safetensors(
        folder / "model.safetensors", as_hugging_face(random_weights(TINY)) if tensors is None else tensors
    )
    return folder


@functools.cache
def mesh_tf_files(rotary=False):
    """The files of TINY's model: name -> bytes."""
    with tempfile.TemporaryDirectory() as folder:
        params = {**TINY, "rotary_emb": True} if rotary else TINY
        write_mesh_tf_checkpoint(folder, params, random_weights(params))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def make_mesh_tf(folder, rotary=False):
    folder.mkdir(parents=True)
    for name, content in mesh_tf_files(rotary).items():
        (folder / name).write_bytes(content)
    return folder


def copy(source, target):
    """A copy that may be written to."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    return target


def save_variables(folder, variables):
    """A TensorFlow checkpoint of these variables: name -> array, and TINY's config."""
    folder.mkdir()
    write_json(folder / "config.json", TINY)
    with quiet_logging(), tf.Graph().as_default(), tf.Session() as session:
        saved = {n: tf.Variable(v) for n, v in variables.items()}
        session.run(tf.global_variables_initializer())
        tf.train.Saver(saved).save(session, str(folder / "model.ckpt"), global_step=3, write_meta_graph=False)
    return folder


def all_equal(checkpoint, weights):
    assert checkpoint.names() == sorted(weights)
    for name in weights:
        value = checkpoint.read(name)
        assert value.dtype == np.float32 and value.shape == checkpoint.shape(name)
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


# ------------------------------------------------------------ golden models


def reference_logits(checkpoint, ids):
    params = checkpoint.params
    return reference.gpt_neo_forward(
        {name: checkpoint.read(name) for name in checkpoint.names()},
        ids,
        n_head=params["n_head"],
        attention_types=params["attention_types"],
        local_attention_radius=params["local_attention_radius"],
        rotary_emb=params.get("rotary_emb", False),
    )


@pytest.mark.parametrize("case", GOLDEN)
def test_mesh_tf_weights_give_the_originals_logits(case):
    golden = np.load(MESH_TF / case / "golden.npz")
    with open_checkpoint(MESH_TF / case) as checkpoint:
        logits = reference_logits(checkpoint, golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4 * np.abs(golden["logits"]).max())


def test_hugging_face_weights_give_transformers_logits():
    golden = np.load(HUGGING_FACE / "golden.npz")
    with open_checkpoint(HUGGING_FACE) as checkpoint:
        logits = reference_logits(checkpoint, golden["logits_ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4 * np.abs(golden["logits"]).max())


@pytest.mark.parametrize("case", GOLDEN)
def test_mesh_tf_config_is_kept(case):
    config = json.loads((MESH_TF / case / "config.json").read_text())
    checkpoint = open_checkpoint(str(MESH_TF / case))
    assert isinstance(checkpoint, Checkpoint)
    assert (checkpoint.kind, checkpoint.folder) == ("mesh-tf", MESH_TF / case)
    expected = {"local_attention_radius": 256, **config}
    expected["attention_types"] = reference.expand_attention_types(config["attention_types"])
    assert checkpoint.params == expected
    assert checkpoint.generation_defaults == {"eos_token_id": 1, "pad_token_id": config["padding_id"]}
    assert ("wpe" in checkpoint.names()) == (case != "rotary")
    assert len(checkpoint.names()) == 4 * 13 + 3 + (case != "rotary")
    assert (checkpoint.tokenizer_file, checkpoint.tokenizer_files) == (None, None)


def test_hugging_face_config_is_translated():
    checkpoint = open_checkpoint(HUGGING_FACE)
    assert (checkpoint.kind, checkpoint.folder) == ("huggingface", HUGGING_FACE)
    assert checkpoint.params == {
        "n_vocab": 211,
        "n_ctx": 64,
        "n_embd": 48,
        "n_head": 6,
        "n_layer": 4,
        "attention_types": ["global", "local", "global", "local"],
        "local_attention_radius": 8,
        "eos_id": 1,
        "bos_id": 1,
    }
    assert checkpoint.generation_defaults == {"eos_token_id": 1, "bos_token_id": 1}


def test_names_and_shapes():
    shapes = variable_shapes(TINY)
    assert set(shapes) == TINY_NAMES
    assert shapes["wte"] == (11, 8) and shapes["wpe"] == (6, 8) and shapes["ln_f/b"] == (8,)
    assert shapes["h1/attn/o"] == (8, 8) and shapes["h1/attn/compute_output_bias/o_b"] == (8,)
    assert shapes["h0/mlp/conv1d_main/c_fc/kernel"] == (8, 32) and shapes["h0/mlp/conv1d_main/c_fc/bias"] == (32,)
    assert shapes["h0/mlp/conv1d_main/c_proj/kernel"] == (32, 8) and shapes["h0/mlp/conv1d_main/c_proj/bias"] == (8,)
    rotary = variable_shapes({**TINY, "rotary_emb": True})
    assert set(rotary) == TINY_NAMES - {"wpe"}
    without_attention = variable_shapes({**TINY, "attention_types": [[["none", "linear"], 1]]})
    assert set(without_attention) == {n for n in TINY_NAMES if not n.startswith(("h0/attn", "h0/norm_1"))}


# ---------------------------------------------------------- attention types


@pytest.mark.parametrize(
    ("nested", "expanded"),
    [
        ([[["global", "local"], 2]], ["global", "local", "global", "local"]),
        ([[["global"], 1], [["local", "none"], 1], [["linear"], 1]], ["global", "local", "none", "linear"]),
        ([[["global"], 0], [["local"], 4]], ["local"] * 4),
        (["local", "local", "global", "none"], ["local", "local", "global", "none"]),
    ],
)
def test_attention_types_are_expanded(nested, expanded):
    assert expand_attention_types(nested, 4) == expanded


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        ([[["global"], 3]], "attention_types names 3 layers, but n_layer is 4"),
        ([[["global"], 10**15]], "attention_types names 1000000000000000 layers, but n_layer is 4"),
        ([[["global"], 5], [["global"], -1]], "attention_types names 4 layers, but n_layer is 4"),
        ([[["global", "sparse"], 2]], "attention_types has 'sparse'; allowed: global, local, linear, none"),
        ([[["global", 3], 2]], "attention_types has 3; allowed"),
        ("global", "attention_types is 'global'; allowed: [[[types…], repeats], …]"),
        ([], "attention_types is []; allowed"),
        ([["global", 4]], "attention_types is [['global', 4]]; allowed"),
        ([[["global"], 4.0]], "attention_types is [[['global'], 4.0]]; allowed"),
        ([["global"], 4], "attention_types is [['global'], 4]; allowed"),
        ({"global": 4}, "attention_types is {'global': 4}; allowed"),
    ],
)
def test_attention_types_are_checked(nested, message):
    with pytest.raises(ValueError) as error:
        expand_attention_types(nested, 4)
    assert message in str(error.value)


# ------------------------------------------------------- reading, mesh-TF


def test_the_checkpoint_file_decides_the_step(tmp_path):
    folder = tmp_path / "model"
    weights = {step: random_weights(TINY, seed=step) for step in (9, 10)}
    for step in (10, 9):  # 9 is written last, so the file names it
        write_mesh_tf_checkpoint(folder, TINY, weights[step], step=step)
    all_equal(open_checkpoint(folder), weights[9])
    for line in (
        'model_checkpoint_path: "gs://bucket/models/x/model.ckpt-10"',
        r'model_checkpoint_path: "C:\\x\\model.ckpt-10"',
    ):
        (folder / "checkpoint").write_text(f'{line}\nall_model_checkpoint_paths: "model.ckpt-9"\n')
        all_equal(open_checkpoint(folder), weights[10])
    (folder / "checkpoint").unlink()
    all_equal(open_checkpoint(folder), weights[10])  # the highest number, not the last in the alphabet


def test_a_config_of_another_name(tmp_path):
    folder = make_mesh_tf(tmp_path / "model")
    (folder / "config.json").rename(folder / "GPT3_XL.json")
    write_json(folder / "tokenizer.json", {"model": {}})
    write_json(folder / "list.json", ["n_embd"])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.params["n_embd"] == 8
    assert checkpoint.tokenizer_file == folder / "tokenizer.json"
    write_json(folder / "config.json", {"name": "of something else"})
    assert open_checkpoint(folder).params == checkpoint.params
    write_json(folder / "config.json", {**TINY, "extra": [1]})  # now this is the one
    assert open_checkpoint(folder).params["extra"] == [1]


def test_optimizer_state_is_passed_over(tmp_path):
    weights = random_weights(TINY)
    variables = {"gpt2/" + n: v for n, v in weights.items()}
    for name, value in list(variables.items()):
        variables[name + "/adam_m"] = variables[name + "/adam_v"] = np.zeros_like(value)
        variables[name + "_slot_vr"] = variables[name + "_slot_vc"] = np.zeros(value.shape[:1], np.float32)
    variables["gpt2/wte/vr"] = variables["gpt2/wte/vc"] = np.zeros(3, np.float32)
    variables["global_step"] = np.int64(3)
    all_equal(open_checkpoint(save_variables(tmp_path / "model", variables)), weights)


def test_float16_variables(tmp_path):
    weights = {n: v.astype(np.float16) for n, v in random_weights(TINY).items()}
    all_equal(open_checkpoint(save_variables(tmp_path / "m", {"gpt2/" + n: v for n, v in weights.items()})), weights)


def test_one_damaged_tensor_leaves_the_others(tmp_path):
    """So a tensor is read alone; TensorFlow checks the sum of what it reads."""
    folder = make_mesh_tf(tmp_path / "model")
    expected = random_weights(TINY)
    data = folder / "model.ckpt-0.data-00000-of-00001"
    blob = data.read_bytes()
    place = blob.index(expected["wte"].tobytes())
    data.write_bytes(blob[:place] + bytes(8) + blob[place + 8 :])
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.read("wpe"), expected["wpe"])
    with pytest.raises(CheckpointError, match="gpt2/wte in .*model.ckpt-0 cannot be read: .*[Cc]hecksum"):
        checkpoint.read("wte")


def test_a_folder_whose_name_is_a_pattern(tmp_path):
    """TensorFlow takes what it opens for a glob pattern."""
    folder = make_mesh_tf(tmp_path / "a [b]" / "c*")
    with open_checkpoint(folder) as checkpoint:
        all_equal(checkpoint, random_weights(TINY))


def test_names_that_are_not_there_and_closed_files(tmp_path):
    for folder in (make_mesh_tf(tmp_path / "a"), make_hugging_face(tmp_path / "b")):
        with open_checkpoint(folder) as checkpoint:
            for method in (checkpoint.read, checkpoint.shape):
                with pytest.raises(CheckpointError, match="no variable 'gpt2/wte' in .*; it has .* and 25 more"):
                    method("gpt2/wte")
        with pytest.raises(CheckpointError, match="is closed; open it again to read 'wte'"):
            checkpoint.read("wte")
        checkpoint.close()
        assert checkpoint.params["n_embd"] == 8 and checkpoint.shape("wte") == (11, 8)


# -------------------------------------------------- reading, Hugging Face


@pytest.mark.parametrize("scope", ["transformer.", ""])
@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [("F32", lambda x: x), ("F16", lambda x: x.astype(np.float16).astype(np.float32)), ("BF16", bfloat16_rounded)],
)
def test_safetensors_dtypes(tmp_path, dtype, rounded, scope):
    weights = random_weights(TINY)
    folder = make_hugging_face(tmp_path / "m", tensors=as_hugging_face(weights, dtype, scope))
    with open_checkpoint(folder) as checkpoint:
        all_equal(checkpoint, {n: rounded(v) for n, v in weights.items()})
        value = checkpoint.read("h0/attn/q")
        assert value.flags.c_contiguous and value.flags.writeable


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_reading_a_tensor_does_not_read_the_file(tmp_path, dtype):
    weights = random_weights({**TINY, "n_vocab": 100_000})
    wte_bytes = 4 * 8 * 100_000
    folder = make_hugging_face(tmp_path / "m", {"vocab_size": 100_000}, as_hugging_face(weights, dtype))
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(folder)
        checkpoint.read("h1/attn/q")
        _, peak = tracemalloc.get_traced_memory()
        checkpoint.read("wte")
        _, peak_with_wte = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < wte_bytes / 10
    assert peak_with_wte >= wte_bytes  # so the measure does see what is read


def make_sharded(folder, tensors, n_shards=3, config=None):
    folder.mkdir()
    write_json(folder / "config.json", {**TINY_HF, **(config or {})})
    files = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
    weight_map = {name: files[i % n_shards] for i, name in enumerate(tensors)}
    for file in files:
        write_safetensors(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return folder


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_sharded_safetensors(tmp_path, dtype):
    weights = random_weights(TINY)
    folder = make_sharded(tmp_path / "m", as_hugging_face(weights, dtype))
    all_equal(
        open_checkpoint(folder), weights if dtype == "F32" else {n: bfloat16_rounded(v) for n, v in weights.items()}
    )


def test_buffers_and_a_tied_output_are_passed_over(tmp_path):
    weights = random_weights(TINY)
    tensors = as_hugging_face(weights)
    for layer in (0, 1):
        tensors[f"transformer.h.{layer}.attn.attention.bias"] = ("BOOL", np.tri(6, dtype=np.uint8).reshape(1, 1, 6, 6))
        tensors[f"transformer.h.{layer}.attn.attention.masked_bias"] = ("F32", np.float32(-1e9).reshape(()))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    all_equal(open_checkpoint(make_hugging_face(tmp_path / "tied", tensors=tensors)), weights)
    untied = {"tie_word_embeddings": False}  # in word only: the table is the same, or not stored twice
    all_equal(open_checkpoint(make_hugging_face(tmp_path / "same", untied, tensors)), weights)
    del tensors["lm_head.weight"]
    all_equal(open_checkpoint(make_hugging_face(tmp_path / "absent", untied, tensors)), weights)


@pytest.mark.parametrize(
    "config",
    [
        {"activation_function": "gelu_pytorch_tanh"},
        {"intermediate_size": 32},
        {"attention_layers": None},
        {"attention_types": None},
        {"tie_word_embeddings": True},
        {"window_size": 3, "torch_dtype": "float16", "use_cache": False},
    ],
)
def test_other_ways_to_say_the_same(tmp_path, config):
    expected = open_checkpoint(make_hugging_face(tmp_path / "plain")).params
    assert open_checkpoint(make_hugging_face(tmp_path / "m", config)).params == expected


def test_token_ids_and_generation_config(tmp_path):
    folder = make_hugging_face(tmp_path / "m", {"eos_token_id": [7, 4], "pad_token_id": 9, "bos_token_id": None})
    checkpoint = open_checkpoint(folder)
    assert [checkpoint.params.get(k) for k in ("eos_id", "padding_id", "bos_id")] == [7, 9, None]
    assert "bos_id" not in checkpoint.params
    assert checkpoint.generation_defaults == {"eos_token_id": [7, 4], "pad_token_id": 9}
    generation = {"eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_k": 40, "max_new_tokens": 12}
    write_json(folder / "generation_config.json", {**generation, "pad_token_id": None, "top_p": 1.0, "_x": 1})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_defaults == {**generation, "pad_token_id": 9}
    assert checkpoint.params["eos_id"] == 7


def test_tokenizer_files(tmp_path):
    folder = make_hugging_face(tmp_path / "m")
    (folder / "vocab.json").write_text("{}")
    assert open_checkpoint(folder).tokenizer_files is None  # one of the two
    (folder / "merges.txt").write_text("")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_files == (folder / "vocab.json", folder / "merges.txt")
    assert checkpoint.tokenizer_file is None
    (folder / "tokenizer.json").write_text("{}")
    assert open_checkpoint(folder).tokenizer_file == folder / "tokenizer.json"


def test_safetensors_not_installed(tmp_path, monkeypatch):
    folder = make_hugging_face(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"pip install gpt_neo_sampling\[hf\]"):
        open_checkpoint(folder)


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize("rotary", [False, True])
def test_float32_round_trip_is_exact(tmp_path, rotary):
    params = {**TINY, "rotary_emb": rotary, "embed_dropout": 0.1}
    weights = random_weights(params)
    odd = np.array([np.inf, -0.0, 1e-45, 3.4e38, np.pi, -np.inf, 1e-30, 7], np.float32)
    weights["ln_f/g"] = odd
    write_mesh_tf_checkpoint(tmp_path / "a" / "b", params, weights, step=12)
    checkpoint = open_checkpoint(tmp_path / "a" / "b")
    all_equal(checkpoint, weights)
    assert checkpoint.read("ln_f/g").tobytes() == odd.tobytes()
    assert checkpoint.params == {**params, "attention_types": ["global", "local"]}
    assert checkpoint.generation_defaults == {"eos_token_id": 4, "pad_token_id": 11}


def test_bfloat16_round_trip_rounds_to_nearest_even(tmp_path):
    weights = random_weights(TINY)
    one = np.array([1], np.float32).view(np.uint32)[0]
    # Halfway up to odd, halfway up from odd, just below and above halfway; and negated.
    halves = np.array([one + 0x8000, one + 0x18000, one + 0x7FFF, one + 0x8001], np.uint32).view(np.float32)
    weights["ln_f/b"] = np.concatenate([halves, -halves])
    up = np.float32(2**-7)
    rounded = np.array([1, 1 + 2 * up, 1, 1 + up], np.float32)
    write_mesh_tf_checkpoint(tmp_path / "m", TINY, weights, dtype="bfloat16", step=2)
    checkpoint = open_checkpoint(tmp_path / "m")
    all_equal(checkpoint, {n: bfloat16_rounded(v) for n, v in weights.items()})
    np.testing.assert_array_equal(checkpoint.read("ln_f/b"), np.concatenate([rounded, -rounded]))
    values = sum(v.size for v in weights.values())
    assert (tmp_path / "m" / "model.ckpt-2.data-00000-of-00001").stat().st_size == 2 * values


def test_files_that_are_written(tmp_path):
    folder = tmp_path / "m"
    write_mesh_tf_checkpoint(folder, TINY, random_weights(TINY), step=5)
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert sorted(os.listdir(folder)) == [
        "checkpoint", "config.json", "model.ckpt-5.data-00000-of-00001", "model.ckpt-5.index",
    ]  # fmt: skip
    assert (folder / "checkpoint").read_text().splitlines()[0] == 'model_checkpoint_path: "model.ckpt-5"'
    config = json.loads((folder / "config.json").read_text())
    assert reference.expand_attention_types(config["attention_types"]) == ["global", "local"]
    assert {k: v for k, v in config.items() if k != "attention_types"} == {
        k: v for k, v in TINY.items() if k != "attention_types"
    }
    with quiet_logging():
        reader = tf.train.NewCheckpointReader(str(folder / "model.ckpt-5"))
    assert set(reader.get_variable_to_shape_map()) == {"gpt2/" + n for n in TINY_NAMES}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    shutil.move(folder, tmp_path / "moved")
    all_equal(open_checkpoint(tmp_path / "moved"), random_weights(TINY))


def test_params_of_an_open_checkpoint_can_be_written(tmp_path):
    with open_checkpoint(MESH_TF / "local") as golden:
        weights = {n: golden.read(n) for n in golden.names()}
        write_mesh_tf_checkpoint(tmp_path / "m", golden.params, weights)
    again = open_checkpoint(tmp_path / "m")
    all_equal(again, weights)
    assert again.params == golden.params


def test_writing_into_a_folder_keeps_its_other_files(tmp_path):
    folder = make_mesh_tf(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    weights = random_weights(TINY, seed=1)
    write_mesh_tf_checkpoint(folder, TINY, weights, step=2)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_file is not None and (folder / "model.ckpt-0.index").exists()
    all_equal(checkpoint, weights)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    folder = make_mesh_tf(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(tf.train.Saver, "save", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            write_mesh_tf_checkpoint(target, TINY, random_weights(TINY, seed=1))
    assert os.listdir(tmp_path) == ["m"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_write_that_stops_half_way_leaves_the_old_model(tmp_path, monkeypatch):
    folder = make_mesh_tf(tmp_path / "m")
    replace = os.replace

    def stop_at_the_index(source, target):
        if Path(target).name == "model.ckpt-1.index":
            raise OSError("stopped")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_index)
    with pytest.raises(OSError, match="stopped"):
        write_mesh_tf_checkpoint(folder, TINY, random_weights(TINY, seed=1), step=1)
    assert os.listdir(tmp_path) == ["m"]
    all_equal(open_checkpoint(folder), random_weights(TINY))


def without(d, *keys):
    return {k: v for k, v in d.items() if k not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, w: {"dtype": "float16"}, "dtype 'float16'; allowed: 'float32', 'bfloat16'"),
        (lambda p, w: {"step": -1}, "step -1; allowed: a whole number of at least 0"),
        (lambda p, w: {"step": 1.0}, "step 1.0; allowed"),
        (lambda p, w: {"weights": without(w, "h1/attn/q")}, "1 missing: h1/attn/q"),
        (lambda p, w: {"weights": {**w, "gpt2/wte": w["wte"]}}, "1 left over: gpt2/wte"),
        (lambda p, w: {"weights": {**w, "wte": w["wte"].T}}, "1 of wrong shape: wte (is [8, 11], should be [11, 8])"),
        (lambda p, w: {"params": without(p, "n_head")}, "params does not give n_head"),
        (lambda p, w: {"params": {**p, "n_head": 3}}, "params: n_embd is 8; allowed: a multiple of n_head, 3"),
        (lambda p, w: {"params": {**p, "x": object()}}, "params cannot be written as JSON"),
    ],
)
def test_what_is_not_written(tmp_path, change, message):
    arguments = {"params": TINY, "weights": random_weights(TINY)}
    arguments.update(change(arguments["params"], arguments["weights"]))
    with pytest.raises(CheckpointError) as error:
        write_mesh_tf_checkpoint(tmp_path / "m", **arguments)
    assert message in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_file_is_not_written_over(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(CheckpointError, match="m is a file; allowed: a folder"):
        write_mesh_tf_checkpoint(tmp_path / "m", TINY, random_weights(TINY))
    assert (tmp_path / "m").read_text() == "mine"


# -------------------------------------------------------------- bad folders
# Each takes a path, makes something there and is refused with the message.


def mesh_tf(change=None, rotary=False):
    def make(folder):
        make_mesh_tf(folder, rotary)
        if change:
            change(folder)

    return make


def hugging_face(change=None, config=None, tensors=None, drop=()):
    def make(folder):
        stored = {**as_hugging_face(random_weights(TINY)), **(tensors or {})}
        make_hugging_face(folder, config, without(stored, *drop))
        if change:
            change(folder)

    return make


def sharded(change):
    def make(folder):
        make_sharded(folder, as_hugging_face(random_weights(TINY)))
        change(folder)

    return make


def edit_json(name, change):
    def edit(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        write_json(folder / name, value)

    return edit


def config_with(**changes):
    return edit_json("config.json", lambda config: config.update(changes))


def config_without(key):
    return edit_json("config.json", lambda config: config.pop(key))


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def only(**files):
    def make(folder):
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return make


def many_left_over(folder):
    extra = {f"transformer.extra.{i}": ("F32", np.zeros(2, np.float32)) for i in range(8)}
    make_hugging_face(folder, tensors={**as_hugging_face(random_weights(TINY)), **extra})


def with_another_variable(folder):
    variables = {"gpt2/" + n: v for n, v in random_weights(TINY).items()}
    save_variables(folder, {**variables, "gpt2/h2/attn/q": np.zeros((8, 8), np.float32)})


def with_double_precision(folder):
    save_variables(folder, {"gpt2/" + n: v.astype(np.float64) for n, v in random_weights(TINY).items()})


DATA_FILE = "model.ckpt-0.data-00000-of-00001"
INDEX_FILE = "model.ckpt-0.index"
SHARD_INDEX = "model.safetensors.index.json"
HEAD = {"lm_head.weight": ("F32", np.ones((11, 8), np.float32))}

BAD_FOLDERS = {
    # -- what is there
    "nothing there": (lambda folder: None, "is not there; allowed: a folder on this machine"),
    "a file": (lambda folder: folder.write_text("x"), "is a file; allowed: the folder that holds the model"),
    "empty": (lambda folder: folder.mkdir(), "is empty; allowed: a GPT-Neo mesh-TF checkpoint"),
    "no model": (
        only(readme__txt=b"x", flax_model__msgpack=b"x"),
        "holds no model, only flax_model.msgpack, readme.txt",
    ),
    "pickle": (
        only(config__json=b"{}", pytorch_model__bin=b"x"),
        "pytorch_model.bin, which is not supported yet; allowed",
    ),
    "both kinds": (mesh_tf(put("model.safetensors", b"x")), "holds both a TensorFlow checkpoint and safetensors"),
    # -- mesh-TF: config
    "no config": (mesh_tf(remove("config.json")), "holds no *.json file; its config is config.json or the only *.json"),
    "config without n_embd": (mesh_tf(config_without("n_embd")), "holds config.json, without n_embd"),
    "two configs": (
        lambda folder: (
            make_mesh_tf(folder),
            (folder / "config.json").rename(folder / "a.json"),
            write_json(folder / "b.json", TINY),
        ),
        "holds 2 configs: a.json, b.json; allowed: config.json, or a single *.json file with n_embd",
    ),
    "config is not JSON": (mesh_tf(put("config.json", b'{"n_embd": ')), "config.json is not JSON: Expecting value"),
    "config is not text": (mesh_tf(put("config.json", b"\xff\xfe\x00")), "config.json is not UTF-8 text"),
    "config is a list": (mesh_tf(put("config.json", b"[1]")), "config.json holds a JSON list; allowed: an object"),
    "only config is not JSON": (
        mesh_tf(lambda folder: (remove("config.json")(folder), put("XL.json", b"{")(folder))),
        "XL.json is not JSON",
    ),
    "key missing": (mesh_tf(config_without("n_vocab")), "config.json does not give n_vocab"),
    "no attention types": (mesh_tf(config_without("attention_types")), "config.json does not give attention_types"),
    "too few layers": (
        mesh_tf(config_with(attention_types=[[["global"], 3]])),
        "config.json: attention_types names 3 layers, but n_layer is 2",
    ),
    "size of zero": (mesh_tf(config_with(n_ctx=0)), "config.json: n_ctx is 0; allowed: a whole number, at least 1"),
    "size is text": (mesh_tf(config_with(n_layer="2")), "config.json: n_layer is '2'; allowed"),
    "size is true": (mesh_tf(config_with(n_layer=True)), "config.json: n_layer is True; allowed"),
    "radius": (mesh_tf(config_with(local_attention_radius=-1)), "local_attention_radius is -1; allowed"),
    "heads": (mesh_tf(config_with(n_head=3)), "n_embd is 8; allowed: a multiple of n_head, 3"),
    "eos": (mesh_tf(config_with(eos_id="<end>")), "eos_id is '<end>'; allowed: a whole number"),
    # -- mesh-TF: files
    "checkpoint names another": (
        mesh_tf(put("checkpoint", b'model_checkpoint_path: "model.ckpt-8"\n')),
        "names model.ckpt-8, but model.ckpt-8.index is not there; the folder has model.ckpt-0.index",
    ),
    "checkpoint is garbage": (
        mesh_tf(put("checkpoint", b"x")),
        'checkpoint has no line model_checkpoint_path: "model.ckpt-N"',
    ),
    "no index": (
        mesh_tf(lambda folder: (remove(INDEX_FILE)(folder), remove("checkpoint")(folder))),
        f"has no model.ckpt-N.index, only {DATA_FILE}",
    ),
    "no data": (mesh_tf(remove(DATA_FILE)), f"has {INDEX_FILE} but not {DATA_FILE}"),
    "a shard is missing": (
        mesh_tf(lambda folder: (folder / DATA_FILE).rename(folder / DATA_FILE.replace("of-00001", "of-00002"))),
        f"has {INDEX_FILE} but not model.ckpt-0.data-00001-of-00002",
    ),
    "data cut short": (mesh_tf(cut(DATA_FILE, 3000)), "model.ckpt-0.data-* is cut short: 3000 bytes of at least "),
    "index cut short": (mesh_tf(cut(INDEX_FILE, 500)), f"{INDEX_FILE} cannot be read, it is damaged"),
    "index empty": (mesh_tf(cut(INDEX_FILE, 0)), f"{INDEX_FILE} cannot be read, it is damaged"),
    "index garbage": (mesh_tf(put(INDEX_FILE, b"x" * 999)), f"{INDEX_FILE} cannot be read, it is damaged"),
    # -- mesh-TF: variables
    "another vocabulary": (
        mesh_tf(config_with(n_vocab=12)),
        "not those of the config: 1 of wrong shape: gpt2/wte (is [11, 8], should be [12, 8])",
    ),
    "fewer layers stored": (
        mesh_tf(config_with(n_layer=3, attention_types=[[["global"], 3]])),
        "13 missing: gpt2/h2/norm_1/g, gpt2/h2/norm_1/b, gpt2/h2/attn/q, gpt2/h2/attn/k, gpt2/h2/attn/v and 8 more",
    ),
    "one more stored": (with_another_variable, "not those of the config: 1 left over: gpt2/h2/attn/q"),
    "wpe beside rotary": (mesh_tf(config_with(rotary_emb=True)), "1 left over: gpt2/wpe"),
    "no wpe": (mesh_tf(config_with(rotary_emb=False), rotary=True), "1 missing: gpt2/wpe"),
    "an option that has other variables": (
        mesh_tf(config_with(attention_types=[[["none", "local"], 1]], scalenorm=True)),
        "(the config sets scalenorm=True, which is not supported): 7 left over",
    ),
    "float64": (with_double_precision, "30 variables of an unsupported dtype: gpt2/wte (float64)"),
    # -- Hugging Face: config
    "no config.json": (hugging_face(remove("config.json")), "has safetensors but no config.json"),
    "damaged config.json": (hugging_face(cut("config.json", 30)), "config.json is not JSON"),
    "another model": (hugging_face(config={"model_type": "gptj"}), "model_type is 'gptj'; allowed: 'gpt_neo'"),
    "activation": (
        hugging_face(config={"activation_function": "gelu"}),
        "activation_function is 'gelu'; allowed: 'gelu_new', 'gelu_pytorch_tanh'",
    ),
    "intermediate_size": (
        hugging_face(config={"intermediate_size": 16}),
        "intermediate_size is 16; allowed: null or 4 * hidden_size = 32",
    ),
    "epsilon": (hugging_face(config={"layer_norm_epsilon": 1e-6}), "layer_norm_epsilon is 1e-06; allowed: 1e-05"),
    "epsilon is not a number": (hugging_face(config={"layer_norm_epsilon": float("nan")}), "layer_norm_epsilon is nan"),
    "hidden_size missing": (hugging_face(config={"hidden_size": None}), "config.json does not give hidden_size"),
    "window_size": (hugging_face(config={"window_size": 0}), "window_size is 0; allowed: a whole number, at least 1"),
    "num_heads": (hugging_face(config={"num_heads": 5}), "hidden_size is 8; allowed: a multiple of num_heads, 5"),
    "linear attention": (
        hugging_face(config={"attention_layers": None, "attention_types": [[["linear", "local"], 1]]}),
        "attention type 'linear'; allowed: 'global', 'local'",
    ),
    "two answers": (
        hugging_face(config={"attention_layers": ["local", "local"]}),
        "attention_types and attention_layers do not say the same",
    ),
    "layers": (
        hugging_face(config={"attention_layers": ["local"]}),
        "attention_types names 1 layers, but n_layer is 2",
    ),
    "pad_token_id": (
        hugging_face(config={"pad_token_id": "<pad>"}),
        "pad_token_id is '<pad>'; allowed: a whole number",
    ),
    "eos_token_id": (
        hugging_face(config={"eos_token_id": []}),
        "eos_token_id is []; allowed: a whole number, or a list",
    ),
    "generation_config.json": (
        hugging_face(put("generation_config.json", b'{"temperature": "warm"}')),
        "generation_config.json: temperature is 'warm'; allowed: a number",
    ),
    "damaged generation_config.json": (
        hugging_face(put("generation_config.json", b"{")),
        "generation_config.json is not JSON",
    ),
    # -- Hugging Face: files
    "safetensors cut short": (
        hugging_face(cut("model.safetensors", 9000)),
        "model.safetensors cannot be read as safetensors, damaged",
    ),
    "safetensors empty": (
        hugging_face(cut("model.safetensors", 0)),
        "model.safetensors cannot be read as safetensors, damaged",
    ),
    "safetensors garbage": (
        hugging_face(put("model.safetensors", b"x" * 99)),
        "cannot be read as safetensors, damaged",
    ),
    "Git LFS": (
        hugging_face(put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")),
        "model.safetensors cannot be read as safetensors, it is a Git LFS pointer, run git lfs pull",
    ),
    "shard missing": (
        sharded(remove("model-00002-of-00003.safetensors")),
        "lacks 1 files that its index names: model-00002-of-00003.safetensors",
    ),
    "shard cut short": (
        sharded(cut("model-00003-of-00003.safetensors", 999)),
        "model-00003-of-00003.safetensors cannot be read",
    ),
    "index without a map": (sharded(put(SHARD_INDEX, b"{}")), "has no weight_map"),
    "index is not JSON": (sharded(put(SHARD_INDEX, b"nope")), f"{SHARD_INDEX} is not JSON"),
    "index leads outside": (
        sharded(edit_json(SHARD_INDEX, lambda index: index["weight_map"].update(x="../x.safetensors"))),
        "weight_map names '../x.safetensors'; allowed: files beside it",
    ),
    "index leads to no file": (
        sharded(edit_json(SHARD_INDEX, lambda index: index["weight_map"].update(x=None))),
        "weight_map names None; allowed: files beside it",
    ),
    "index is wrong": (
        sharded(edit_json(SHARD_INDEX, lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"))),
        "names 1 tensors that are not in the file it gives: x",
    ),
    # -- Hugging Face: variables
    "tensor missing": (hugging_face(drop=["transformer.h.1.ln_2.bias"]), "1 missing: transformer.h.1.ln_2.bias"),
    "tensor not transposed": (
        hugging_face(tensors={"transformer.h.0.mlp.c_fc.weight": ("F32", np.zeros((8, 32), np.float32))}),
        "1 of wrong shape: transformer.h.0.mlp.c_fc.weight (is [8, 32], should be [32, 8])",
    ),
    "tensors left over": (
        many_left_over,
        "8 left over: " + ", ".join(f"transformer.extra.{i}" for i in range(5)) + " and 3 more",
    ),
    "integers": (
        hugging_face(tensors={"transformer.wpe.weight": ("I8", np.zeros((6, 8), np.int8))}),
        "1 variables of an unsupported dtype: transformer.wpe.weight (I8); allowed: float32, float16, bfloat16",
    ),
    "untied": (
        hugging_face(config={"tie_word_embeddings": False}, tensors=HEAD),
        "tie_word_embeddings is false and lm_head.weight is not transformer.wte.weight; allowed: an output tied",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(tmp_path, case):
    make, message = BAD_FOLDERS[case]
    make(tmp_path / "model")
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path / "model")
    assert type(error.value) is CheckpointError
    assert message in str(error.value)
    assert str(tmp_path / "model") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_run(tmp_path):
    """The file would make a folder if it were unpickled."""
    made = tmp_path / "made"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S" + repr(str(made)).encode() + b"\ntR.")
    with pytest.raises(CheckpointError, match="not supported yet"):
        open_checkpoint(tmp_path / "m")
    assert not made.exists()


def test_data_cut_after_opening(tmp_path):
    """TensorFlow raises an IndexError for it, which does not come through."""
    folder = make_mesh_tf(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    cut(DATA_FILE, 100)(folder)
    with pytest.raises(CheckpointError, match="gpt2/wte in .*model.ckpt-0 cannot be read"):
        checkpoint.read("wte")


def test_golden_folders_may_be_read_only(tmp_path):
    folder = copy(MESH_TF / "global", tmp_path / "m")
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert open_checkpoint(folder).read("wte").shape == (127, 32)
    finally:
        folder.chmod(0o755)

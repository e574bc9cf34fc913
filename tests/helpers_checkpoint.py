"""Writes checkpoints in both formats.

Safetensors files are written byte by byte, so that the reader is not tested with
the library that it uses.
"""

import functools
import json
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto

from gpt_neo_sampling._compat import quiet_logging, tf
from gpt_neo_sampling.checkpoint import (
    open_checkpoint,
    tensorflow_index,
    variable_shapes,
    write_mesh_tf_checkpoint,
)

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
    """A writable copy."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    return target


def save_variables(folder, variables):
    """Writes a TensorFlow checkpoint of these variables, name -> array, and TINY's config."""
    folder.mkdir()
    write_json(folder / "config.json", TINY)
    with quiet_logging(), tf.Graph().as_default(), tf.Session() as session:
        saved = {n: tf.Variable(v) for n, v in variables.items()}
        session.run(tf.global_variables_initializer())
        tf.train.Saver(saved).save(session, str(folder / "model.ckpt"), global_step=3, write_meta_graph=False)
    return folder


def spoiled(folder, name, index, value):
    """Writes the golden model "global" with `value` at an index of a weight."""
    with open_checkpoint(MESH_TF / "global") as opened:
        weights = {n: opened.read(n).copy() for n in opened.names()}
        weights[name][index] = value
        write_mesh_tf_checkpoint(folder, opened.params, weights)
    return folder


def all_equal(checkpoint, weights):
    assert checkpoint.names() == sorted(weights)
    for name in weights:
        value = checkpoint.read(name)
        assert value.dtype == np.float32 and value.shape == checkpoint.shape(name)
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


def make_sharded(folder, tensors, n_shards=3, config=None):
    folder.mkdir()
    write_json(folder / "config.json", {**TINY_HF, **(config or {})})
    files = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
    weight_map = {name: files[i % n_shards] for i, name in enumerate(tensors)}
    for file in files:
        write_safetensors(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return folder


def without(d, *keys):
    return {k: v for k, v in d.items() if k not in keys}


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


def in_index(name, change):
    """A function of a folder that applies change(BundleEntryProto) to a variable's entry in a checkpoint's index."""

    def edit(folder):
        entries = dict(tensorflow_index.entries((folder / INDEX_FILE).read_bytes()))
        entry = BundleEntryProto.FromString(entries[name])
        change(entry)
        (folder / INDEX_FILE).write_bytes(table({**entries, name: entry.SerializeToString()}))

    return edit


def table(entries, first_restart=0, handles=1, n_restarts=None, compression=0):
    """A LevelDB table whose index names its one block `handles` times; readers begin at the first restart."""
    blocks = b""

    def put_block(items, first_restart=0):
        nonlocal blocks
        block, restarts = b"", []
        for key, value in items:
            restarts.append(len(block))
            block += bytes([0]) + number(len(key)) + number(len(value)) + key + value
        restarts[:1] = [first_restart]
        block += struct.pack(f"<{len(restarts) + 1}I", *restarts, n_restarts or len(restarts))
        handle = number(len(blocks)) + number(len(block))
        blocks += block + bytes([compression]) + masked_checksum(block + bytes([compression]))
        return handle

    data, meta = put_block(sorted(entries.items()), first_restart), put_block([])
    footer = meta + put_block([(b"\xff", data)] * handles)
    return blocks + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def number(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + number(n >> 7)


def masked_checksum(data):
    """The masked CRC of TensorFlow's records, taken from the end of one."""
    with tempfile.TemporaryDirectory() as folder:
        with tf.io.TFRecordWriter(f"{folder}/record") as writer:
            writer.write(data)
        return Path(folder, "record").read_bytes()[-4:]


DATA_FILE = "model.ckpt-0.data-00000-of-00001"
INDEX_FILE = "model.ckpt-0.index"
SHARD_INDEX = "model.safetensors.index.json"

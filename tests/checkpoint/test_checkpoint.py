"""What all checkpoints share: golden logits, names, attention types; and folders that are refused."""

import json

import numpy as np
import pytest
import reference
from helpers_checkpoint import (
    DATA_FILE,
    GOLDEN,
    HUGGING_FACE,
    INDEX_FILE,
    MESH_TF,
    SHARD_INDEX,
    TINY,
    TINY_NAMES,
    as_hugging_face,
    config_with,
    config_without,
    copy,
    cut,
    edit_json,
    make_hugging_face,
    make_mesh_tf,
    make_sharded,
    only,
    put,
    random_weights,
    remove,
    save_variables,
    without,
    write_json,
)

from gpt_neo_sampling.checkpoint import (
    Checkpoint,
    CheckpointError,
    convert_checkpoint,
    open_checkpoint,
    variable_shapes,
    write_mesh_tf_checkpoint,
)
from gpt_neo_sampling.models.config import expand_attention_types

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


def test_a_folder_named_checkpoint_is_no_tensorflow_checkpoint(tmp_path):
    (make_hugging_face(tmp_path / "m") / "checkpoint").mkdir()
    assert open_checkpoint(tmp_path / "m").kind == "huggingface"
    (make_mesh_tf(tmp_path / "n") / "checkpoint").unlink()
    (tmp_path / "n" / "checkpoint").mkdir()
    assert open_checkpoint(tmp_path / "n").kind == "mesh-tf"


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


def many_left_over(folder):
    extra = {f"transformer.extra.{i}": ("F32", np.zeros(2, np.float32)) for i in range(8)}
    make_hugging_face(folder, tensors={**as_hugging_face(random_weights(TINY)), **extra})


def with_another_variable(folder):
    variables = {"gpt2/" + n: v for n, v in random_weights(TINY).items()}
    save_variables(folder, {**variables, "gpt2/h2/attn/q": np.zeros((8, 8), np.float32)})


def with_whole_numbers(folder):
    save_variables(folder, {"gpt2/" + n: v.astype(np.int32) for n, v in random_weights(TINY).items()})


HEAD = {"lm_head.weight": ("F32", np.ones((12, 8), np.float32))}

BAD_FOLDERS = {
    # -- what is there
    "nothing there": (lambda folder: None, "does not exist; allowed: a folder on this machine"),
    "a file": (lambda folder: folder.write_text("x"), "is a file; allowed: the model's folder"),
    "empty": (lambda folder: folder.mkdir(), "is empty; allowed: a GPT-Neo mesh-TF checkpoint"),
    "no model": (
        only(readme__txt=b"x", flax_model__msgpack=b"x"),
        "holds no model, only flax_model.msgpack, readme.txt",
    ),
    "both kinds": (
        mesh_tf(put("model.safetensors", b"x")),
        "both a TensorFlow checkpoint and Hugging Face",
    ),
    # -- mesh-TF: config
    "no config": (
        mesh_tf(remove("config.json")),
        "has no *.json file; allowed: config.json, or a",
    ),
    "config without n_embd": (mesh_tf(config_without("n_embd")), "has config.json, without n_embd"),
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
    "size of zero": (mesh_tf(config_with(n_ctx=0)), "config.json: n_ctx is 0; allowed: a whole number from 1 to"),
    "size is text": (mesh_tf(config_with(n_layer="2")), "config.json: n_layer is '2'; allowed"),
    "size is true": (mesh_tf(config_with(n_layer=True)), "config.json: n_layer is True; allowed"),
    "radius": (mesh_tf(config_with(local_attention_radius=-1)), "local_attention_radius is -1; allowed"),
    "heads": (mesh_tf(config_with(n_head=3)), "n_embd is 8; allowed: a multiple of n_head=3"),
    "eos": (mesh_tf(config_with(eos_id="<end>")), "eos_id is '<end>'; allowed: a whole number"),
    # -- mesh-TF: files
    "checkpoint names another": (
        mesh_tf(put("checkpoint", b'model_checkpoint_path: "model.ckpt-8"\n')),
        "names model.ckpt-8, but model.ckpt-8.index does not exist; the folder has model.ckpt-0.index",
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
        "do not match the config: 1 of wrong shape: gpt2/wte (is [11, 8], should be [12, 8])",
    ),
    "fewer layers stored": (
        mesh_tf(config_with(n_layer=3, attention_types=[[["global"], 3]])),
        "13 missing: gpt2/h2/norm_1/g, gpt2/h2/norm_1/b, gpt2/h2/attn/q, gpt2/h2/attn/k, gpt2/h2/attn/v and 8 more",
    ),
    "one more stored": (with_another_variable, "do not match the config: 1 unexpected: gpt2/h2/attn/q"),
    "wpe beside rotary": (mesh_tf(config_with(rotary_emb=True)), "1 unexpected: gpt2/wpe"),
    "no wpe": (mesh_tf(config_with(rotary_emb=False), rotary=True), "1 missing: gpt2/wpe"),
    "an option that has other variables": (
        mesh_tf(config_with(attention_types=[[["none", "local"], 1]], moe_layers=[1])),
        "(the config sets moe_layers=[1], which is not supported): 7 unexpected",
    ),
    "an option that the variables lack": (mesh_tf(config_with(rezero=True)), "4 missing: gpt2/h0/norm_rezero_1/g"),
    "a grid of one side": (mesh_tf(config_with(axial_pos_emb=[6])), "config.json: config option axial_pos_emb=[6]"),
    "int32": (with_whole_numbers, "30 variables of an unsupported dtype: gpt2/wte (int32)"),
    # -- Hugging Face: config
    "no config.json": (hugging_face(remove("config.json")), "has weights but no config.json"),
    "damaged config.json": (hugging_face(cut("config.json", 30)), "config.json is not JSON"),
    "another model": (hugging_face(config={"model_type": "gptj"}), "model_type is 'gptj'; allowed: 'gpt_neo'"),
    "activation": (
        hugging_face(config={"activation_function": "prelu"}),
        "activation_function is 'prelu'; allowed: gelu, gelu_10, gelu_accurate, ",
    ),
    "activation is a list": (hugging_face(config={"activation_function": ["gelu"]}), "is ['gelu']; allowed: gelu, "),
    "intermediate_size": (
        hugging_face(config={"intermediate_size": 16}),
        "6 of wrong shape: transformer.h.0.mlp.c_fc.weight (is [32, 8], should be [16, 8])",
    ),
    "no intermediate_size": (
        hugging_face(config={"intermediate_size": 0}),
        "intermediate_size is 0; allowed: a whole number from 1 to",
    ),
    "epsilon": (hugging_face(config={"layer_norm_epsilon": -1e-6}), "layer_norm_epsilon is -1e-06; allowed: a number"),
    "epsilon is not a number": (hugging_face(config={"layer_norm_epsilon": float("nan")}), "layer_norm_epsilon is nan"),
    "hidden_size missing": (hugging_face(config={"hidden_size": None}), "config.json does not give hidden_size"),
    "window_size": (hugging_face(config={"window_size": 0}), "window_size is 0; allowed: a whole number from 1 to"),
    "num_heads": (hugging_face(config={"num_heads": 5}), "hidden_size is 8; allowed: a multiple of num_heads=5"),
    "linear attention": (
        hugging_face(config={"attention_layers": None, "attention_types": [[["linear", "local"], 1]]}),
        "attention type 'linear'; allowed: 'global', 'local'",
    ),
    "two answers": (
        hugging_face(config={"attention_layers": ["local", "local"]}),
        "attention_types and attention_layers do not agree",
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
        "weight_map names '../x.safetensors'; allowed: names of files beside it",
    ),
    "index leads to no file": (
        sharded(edit_json(SHARD_INDEX, lambda index: index["weight_map"].update(x=None))),
        "weight_map names None; allowed: names of files beside it",
    ),
    "index is wrong": (
        sharded(edit_json(SHARD_INDEX, lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"))),
        "names 1 tensors that are not in the file it assigns them to: x",
    ),
    # -- Hugging Face: variables
    "tensor missing": (hugging_face(drop=["transformer.h.1.ln_2.bias"]), "1 missing: transformer.h.1.ln_2.bias"),
    "tensor not transposed": (
        hugging_face(tensors={"transformer.h.0.mlp.c_fc.weight": ("F32", np.zeros((8, 32), np.float32))}),
        "1 of wrong shape: transformer.h.0.mlp.c_fc.weight (is [8, 32], should be [32, 8])",
    ),
    "tensors left over": (
        many_left_over,
        "8 unexpected: " + ", ".join(f"transformer.extra.{i}" for i in range(5)) + " and 3 more",
    ),
    "integers": (
        hugging_face(tensors={"transformer.wpe.weight": ("I8", np.zeros((6, 8), np.int8))}),
        "1 variables of an unsupported dtype: transformer.wpe.weight (I8); allowed: float32, float16, bfloat16",
    ),
    "a head of another shape": (
        hugging_face(tensors=HEAD),
        "1 of wrong shape: lm_head.weight (is [12, 8], should be [11, 8])",
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


def test_data_cut_after_opening(tmp_path):
    """TensorFlow raises an IndexError, which becomes a CheckpointError."""
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


def test_fingerprints(tmp_path):
    """It does not depend on the folder's path, but on any weight, the tokenizer, the generation defaults."""
    with open_checkpoint(MESH_TF / "local") as checkpoint:
        params, weights = checkpoint.params, {name: checkpoint.read(name) for name in checkpoint.names()}

    def fingerprints(name, weights):
        write_mesh_tf_checkpoint(tmp_path / name, params, weights)
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}-hf")
        return [open_checkpoint(tmp_path / folder).fingerprint() for folder in (name, f"{name}-hf")]

    once = fingerprints("once", weights)
    assert fingerprints("again", weights) == once
    for name in ("wte", "ln_f/b"):
        last = weights[name].copy()
        last.flat[-1] += 1e-3
        assert not set(once) & set(fingerprints(f"other-{name[:2]}", {**weights, name: last}))
    (tmp_path / "again-hf" / "generation_config.json").write_text('{"temperature": 0.5}')
    (tmp_path / "again" / "tokenizer.json").write_text("{}")
    for folder, same in (("again", once[0]), ("again-hf", once[1])):
        assert open_checkpoint(tmp_path / folder).fingerprint() != same

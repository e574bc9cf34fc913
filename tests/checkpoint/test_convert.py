"""Conversion between the formats, and that the other library reads the result."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import DATA
from helpers_checkpoint import (
    HUGGING_FACE,
    MESH_TF,
    TINY,
    all_equal,
    bfloat16_rounded,
    make_mesh_tf,
    random_weights,
    write_json,
)

from gpt_neo_sampling import CheckpointError, TextGenerator, convert_checkpoint, open_checkpoint
from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.generation import generator as generate


def weights_of(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names()}


@pytest.mark.parametrize("source", [MESH_TF / "local", MESH_TF / "padding_outside", HUGGING_FACE, DATA / "pytorch"])
def test_there_and_back_keeps_every_bit(tmp_path, source):
    if source.name == "pytorch":
        from test_pytorch_files import folder_of

        source = folder_of(tmp_path)
    sizes = ["100KB", None] if open_checkpoint(source).kind == "mesh-tf" else [None, 10**9]  # mesh-tf has no shards
    convert_checkpoint(source, tmp_path / "there", max_shard_size=sizes[0])
    convert_checkpoint(tmp_path / "there", tmp_path / "back", max_shard_size=sizes[1])
    there, back, first = (open_checkpoint(f) for f in (tmp_path / "there", tmp_path / "back", source))
    assert first.kind == back.kind != there.kind
    all_equal(there, weights_of(source))
    all_equal(back, weights_of(source))
    assert back.params["attention_types"] == first.params["attention_types"]
    outside = first.params.get("padding_id") == first.params["n_vocab"]
    keys = {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "local_attention_radius", "eos_id", "bos_id"}
    for key in keys if outside else {*keys, "padding_id"}:
        assert back.params.get(key) == there.params.get(key) == first.params.get(key), key


def test_odd_numbers_keep_their_bits(tmp_path):
    weights = random_weights(TINY)
    weights["ln_f/g"] = np.array([np.inf, -0.0, 1e-45, 3.4e38, np.nan, -np.inf, 1e-30, 7], np.float32)
    write_mesh_tf_checkpoint(tmp_path / "a", TINY, weights)
    convert_checkpoint(tmp_path / "a", tmp_path / "b")
    assert weights_of(tmp_path / "b")["ln_f/g"].tobytes() == weights["ln_f/g"].tobytes()


@pytest.mark.parametrize(
    ("to", "dtype", "rounded"),
    [
        ("mesh-tf", "bfloat16", bfloat16_rounded),
        ("huggingface", "bfloat16", bfloat16_rounded),
        ("huggingface", "float16", lambda x: x.astype(np.float16).astype(np.float32)),
    ],
)
def test_dtypes(tmp_path, to, dtype, rounded):
    make_mesh_tf(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to=to, dtype=dtype)
    all_equal(open_checkpoint(tmp_path / "b"), {n: rounded(v) for n, v in random_weights(TINY).items()})


def test_shards_have_an_index(tmp_path):
    convert_checkpoint(MESH_TF / "global", tmp_path / "m", max_shard_size="60KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(files) < set(os.listdir(tmp_path / "m")) and "model.safetensors" not in os.listdir(tmp_path / "m")
    sizes = [os.path.getsize(tmp_path / "m" / f) for f in files]
    assert max(sizes) <= 60_000 + 4000 and index["metadata"]["total_size"] == sum(
        w.nbytes for w in weights_of(tmp_path / "m").values()
    )


def test_what_stands_beside_the_weights_comes_along(tmp_path):
    source = shutil.copytree(generate.DEMO_FOLDER, tmp_path / "a")
    write_json(source / "generation_config.json", {"temperature": 0.5, "penalty_alpha": 0.9})
    write_json(source / "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    convert_checkpoint(source, tmp_path / "b")
    convert_checkpoint(tmp_path / "b", tmp_path / "c")
    for folder in (tmp_path / "b", tmp_path / "c"):
        for name in ("generation_config.json", "special_tokens_map.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        checkpoint = open_checkpoint(folder)
        assert checkpoint.generation_defaults["temperature"] == 0.5
        assert checkpoint.ignored_generation_options == {"penalty_alpha": 0.9}
    prompt = dict(prompts="The family of", max_new_tokens=12, do_sample=False)
    texts = [TextGenerator.from_pretrained(tmp_path / f).generate(**prompt)[0].text for f in "abc"]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (MESH_TF / "rotary", {}, "Hugging Face's GPT-Neo has no rotary_emb=True; allowed: to='mesh-tf'"),
        (MESH_TF / "global", {"dtype": "float64"}, "dtype 'float64'; allowed: 'float32', 'float16', 'bfloat16'"),
        (HUGGING_FACE, {"dtype": "float16"}, "dtype 'float16'; allowed: 'float32', 'bfloat16'"),
        (HUGGING_FACE, {"to": "flax"}, "to 'flax'; allowed: 'mesh-tf', 'huggingface'"),
        (MESH_TF / "global", {"max_shard_size": "5 apples"}, "max_shard_size '5 apples'; allowed: a number of bytes"),
        (MESH_TF / "nowhere", {}, "nowhere does not exist"),
    ],
)
def test_what_is_not_converted_leaves_nothing(tmp_path, source, options, message):
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(source, tmp_path / "m", **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_an_activation_that_hugging_face_lacks_is_named(tmp_path):
    write_mesh_tf_checkpoint(tmp_path / "a", {**TINY, "activation_fn": "selu"}, random_weights(TINY))
    with pytest.raises(CheckpointError, match="Hugging Face's GPT-Neo has no activation_fn='selu'; allowed: to='mesh"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_float16_overflow_is_named(tmp_path):
    weights = random_weights(TINY)
    weights["wte"][3, 3] = 1e6
    write_mesh_tf_checkpoint(tmp_path / "a", TINY, weights)
    with pytest.raises(CheckpointError, match="wte holds numbers beyond float16's 65504"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "m").mkdir()
    convert_checkpoint(HUGGING_FACE, tmp_path / "m")  # empty: it may be
    before = sorted(os.listdir(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="m exists already; allowed: a folder that is new or empty"):
        convert_checkpoint(HUGGING_FACE, tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == before and os.listdir(tmp_path) == ["m"]


def test_the_command(tmp_path, capfd):
    assert cli.main(["convert", str(HUGGING_FACE), str(tmp_path / "m"), "--dtype", "bfloat16"]) == 0
    all_equal(open_checkpoint(tmp_path / "m"), {n: bfloat16_rounded(v) for n, v in weights_of(HUGGING_FACE).items()})
    assert capfd.readouterr().out == ""
    assert cli.main(["convert", str(HUGGING_FACE), str(tmp_path / "m")]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["global", "local", "padding_outside"])
def test_transformers_reads_what_is_written(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    golden = np.load(MESH_TF / name / "golden.npz")
    convert_checkpoint(MESH_TF / name, tmp_path / "m", max_shard_size="60KB")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows = (golden["ids"] < 127).all(1)  # transformers has no row for a padding id outside
    with torch.no_grad():
        logits = model(torch.tensor(golden["ids"][rows].astype(np.int64))).logits.numpy()
    assert rows.any()
    np.testing.assert_allclose(logits, golden["logits"][rows], rtol=0, atol=1e-4 * np.abs(golden["logits"]).max())

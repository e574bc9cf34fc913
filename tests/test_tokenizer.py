"""Tokenizers: the bundled one taken apart into vocab.json and merges.txt, and what is refused."""

import json
import shutil

import pytest
from helpers_checkpoint import make_mesh_tf, write_json

from gpt_neo_sampling import CheckpointError, generate, open_checkpoint
from gpt_neo_sampling.checkpoint import load_tokenizer

TOKENIZER = generate.DEMO_FOLDER / "tokenizer.json"
TEXT = "It is a truth universally acknowledged, that Zoë paid 3.50.\n<|endoftext|>She"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(generate.DEMO_FOLDER, tmp_path / "m")


def take_apart(folder):
    (folder / "tokenizer.json").unlink()
    model = json.loads(TOKENIZER.read_text())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    pairs = (" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}, "model_max_length": 2048}),
    ],
)
def test_vocab_and_merges_are_the_same_tokenizer(folder, name, content):
    whole = load_tokenizer(open_checkpoint(folder))
    take_apart(folder)
    write_json(folder / name, content)
    parts = load_tokenizer(open_checkpoint(folder))
    end = whole.token_to_id("<|endoftext|>")
    ids = whole.encode(TEXT).ids
    assert end in ids and parts.encode(TEXT).ids == ids
    assert parts.decode(ids) == whole.decode(ids)


def test_without_special_tokens_the_text_is_cut(folder):
    take_apart(folder)
    tokenizer = load_tokenizer(open_checkpoint(folder))
    assert tokenizer.token_to_id("<|endoftext|>") not in tokenizer.encode(TEXT).ids


def test_added_tokens_have_their_ids(folder):
    take_apart(folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    write_json(folder / "added_tokens.json", {"<b>": size + 1, "<a>": size})
    with pytest.raises(CheckpointError, match=f"has {size + 2} tokens; the model's vocabulary has {size}"):
        load_tokenizer(open_checkpoint(folder))
    write_json(folder / "added_tokens.json", {"<a>": size + 5})
    with pytest.raises(CheckpointError, match=f"<a> is to be token {size + 5}, but is token {size}"):
        load_tokenizer(open_checkpoint(folder))


def test_damaged_pair(folder):
    take_apart(folder)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="vocab.json cannot be read as a tokenizer"):
        load_tokenizer(open_checkpoint(folder))


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(open_checkpoint(make_mesh_tf(tmp_path / "m"))) is None

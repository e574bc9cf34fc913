"""Tokenizers: the bundled one as vocab.json and merges.txt, and files that are refused."""

import json
import shutil

import pytest
from helpers_checkpoint import make_mesh_tf, write_json

from gpt_neo_sampling import CheckpointError, TextGenerator, open_checkpoint
from gpt_neo_sampling.checkpoint import load_tokenizer
from gpt_neo_sampling.generation import generator as generate

pytestmark = pytest.mark.any_version

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
    tokenizer = load_tokenizer(open_checkpoint(folder))
    assert [tokenizer.token_to_id(text) for text in ("<a>", "<b>")] == [size, size + 1]
    write_json(folder / "added_tokens.json", {"<a>": size + 5})
    with pytest.raises(CheckpointError, match=f"<a> should be token {size + 5}, but is token {size}"):
        load_tokenizer(open_checkpoint(folder))


def test_more_tokens_than_the_model_has(folder):
    """A padding token was added, say, but the table not extended: only a prompt that uses the token is refused."""
    take_apart(folder)
    write_json(folder / "added_tokens.json", {"<pad>": 2048})
    generator = TextGenerator.from_pretrained(folder)
    assert len(generator.generate("Emma", max_new_tokens=2, seed=1)[0].tokens) == 2
    with pytest.raises(ValueError, match="token id 2048 is outside the vocabulary; 0 to 2047 are allowed"):
        generator.generate("Emma <pad>")


def added(**flags):
    return {"added_tokens_decoder": {"2048": {"content": "<m>", "special": False, **flags}}}


@pytest.mark.parametrize(
    "flags, same",  # texts that come to the same pieces around <m>
    [
        (dict(lstrip=True), ("a <m>b", "a<m>b")),
        (dict(rstrip=True), ("a<m> b", "a<m>b")),
        (dict(single_word=True), None),
    ],
    ids=str,
)
def test_flags_of_added_tokens(folder, flags, same):
    """lstrip and rstrip swallow spaces; single_word does not match inside a word."""
    take_apart(folder)

    def tokens(config, text):
        write_json(folder / "tokenizer_config.json", config)
        return load_tokenizer(open_checkpoint(folder)).encode(text).ids

    if same is None:
        assert 2048 in tokens(added(), "a<m>b") and 2048 not in tokens(added(**flags), "a<m>b")
    else:
        assert tokens(added(**flags), same[0]) == tokens(added(**flags), same[1])
        assert tokens(added(), same[0]) != tokens(added(), same[1])


@pytest.mark.parametrize("bos", [{}, {"bos_token": "<|endoftext|>"}, {"bos_token": {"content": "She"}}], ids=str)
def test_add_bos_token(folder, bos):
    """It is put before a prompt, but not before a continuation."""
    take_apart(folder)
    plain = TextGenerator.from_pretrained(folder).encode("Emma was")
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True, **bos})
    generator = TextGenerator.from_pretrained(folder)
    first = generator.tokenizer.token_to_id("She" if "She" in str(bos) else "<|endoftext|>")
    assert generator.encode("Emma was") == [first, *plain]
    whole = generator.inspect("Emma", " was", temperature=1)
    assert whole[0].probabilities.tolist() == generator.inspect("Emma was", temperature=1)[0].probabilities.tolist()


def test_what_is_not_honoured_is_named(folder, caplog):
    take_apart(folder)
    write_json(folder / "tokenizer_config.json", {"split_special_tokens": True, "add_eos_token": False})
    load_tokenizer(open_checkpoint(folder))
    assert "tokenizer_config.json: settings that would change ids are ignored: split_special_tokens" in caplog.text
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "bos_token": "<s>"})
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(open_checkpoint(folder))
    assert tokenizer.encode("a").ids[0] == tokenizer.token_to_id("<s>") == 2048


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("tokenizer_config.json", {"pad_token": "<pad>", "eos_token": "<|endoftext|>"}, "token <pad>"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2048": {"content": "<m>"}}}, "token <m>"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<m>"]}, "token <m>"),
        ("added_tokens.json", {"<m>": 2048}, "token <m>"),
        ("special_tokens_map.json", {"eos_token": "She"}, "token She"),  # else a piece that others may take part of
        ("tokenizer_config.json", {"add_prefix_space": True}, "add_prefix_space"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2048": "<m>"}}, "cannot be read and are ignored"),
        ("tokenizer_config.json", {"add_prefix_space": False, "model_max_length": 2, "chat_template": "x",
                                   "bos_token": "<|endoftext|>", "add_bos_token": True}, None),
    ],
)  # fmt: skip
def test_what_stands_beside_tokenizer_json_is_named(folder, caplog, name, content, named):
    """It is logged where transformers (4.57 and 5) would give other ids; those of tokenizer.json are kept."""
    plain = load_tokenizer(open_checkpoint(folder)).encode("Emma <m> <pad>").ids
    write_json(folder / name, content)
    assert load_tokenizer(open_checkpoint(folder)).encode("Emma <m> <pad>").ids == plain
    assert (named in caplog.text) if named else not caplog.text


def test_a_space_that_tokenizer_json_puts_ahead_itself(folder, caplog):
    whole = json.loads(TOKENIZER.read_text())
    whole["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    write_json(folder / "tokenizer.json", whole)
    write_json(folder / "tokenizer_config.json", {"add_prefix_space": True})
    load_tokenizer(open_checkpoint(folder))
    assert not caplog.text


def test_damaged_pair(folder):
    take_apart(folder)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="vocab.json cannot be read as a tokenizer"):
        load_tokenizer(open_checkpoint(folder))


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(open_checkpoint(make_mesh_tf(tmp_path / "m"))) is None

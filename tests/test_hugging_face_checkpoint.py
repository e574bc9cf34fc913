"""Hugging Face's format in safetensors."""

import sys
import tracemalloc

import numpy as np
import pytest
from helpers_checkpoint import (
    TINY,
    all_equal,
    as_hugging_face,
    bfloat16_rounded,
    make_hugging_face,
    make_sharded,
    random_weights,
    write_json,
)

from gpt_neo_sampling.checkpoint import (
    CheckpointError,
    open_checkpoint,
)

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
    generation = {"eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_k": 40, "max_new_tokens": 12,
                  "top_p": 1.0}  # fmt: skip
    write_json(folder / "generation_config.json", {**generation, "pad_token_id": None, "_x": 1})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_defaults == {**generation, "pad_token_id": 9}
    assert checkpoint.params["eos_id"] == 7


def test_what_is_asked_for_and_not_built_is_kept(tmp_path):
    """A token's id may be 0; what changes nothing is no demand."""
    folder = make_hugging_face(tmp_path / "m")
    asked = {"forced_eos_token_id": 0, "begin_suppress_tokens": [0], "num_beams": 4}
    neutral = {"forced_bos_token_id": None, "suppress_tokens": [], "num_beam_groups": 1, "length_penalty": 1.0,
               "min_length": 0, "renormalize_logits": False, "use_cache": True}  # fmt: skip
    write_json(folder / "generation_config.json", {**asked, **neutral})
    assert open_checkpoint(folder).ignored_generation_options == asked


def test_an_adapter_is_named(tmp_path, caplog):
    folder = make_hugging_face(tmp_path / "m")
    open_checkpoint(folder)
    assert caplog.text == ""
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    open_checkpoint(folder)
    assert "holds an adapter (adapter_config.json), which is left out" in caplog.text


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

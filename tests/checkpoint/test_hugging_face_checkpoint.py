"""Hugging Face's format in safetensors."""

import logging
import math
import sys
import tracemalloc

import numpy as np
import pytest
import reference
from helpers_checkpoint import (
    TINY,
    TINY_HF,
    all_equal,
    as_hugging_face,
    bfloat16_rounded,
    make_hugging_face,
    make_sharded,
    random_weights,
    without,
    write_json,
    write_safetensors,
)
from helpers_model import reference_config

from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling.checkpoint import CheckpointError, convert_checkpoint, hugging_face, open_checkpoint

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


# What other libraries' models have one of many of, and GPT-Neo's own one.
OTHER = {"intermediate_size": 12, "layer_norm_epsilon": 0.3, "activation_function": "gelu"}
OTHER_PARAMS = {"intermediate_size": 12, "layer_norm_epsilon": 0.3, "activation_fn": "gelu_erf"}


@pytest.mark.parametrize("where", [
    {}, pytest.param(dict(mesh_shape="x:2", layout="intermediate_expanded:x,heads:x", devices="cpu:0,cpu:1"),
                     marks=pytest.mark.slow)])  # fmt: skip
def test_another_width_epsilon_and_activation_function(tmp_path, where):
    params = {**TINY, **OTHER_PARAMS}
    weights = {name: 0.5 * value for name, value in random_weights(params).items()}
    folder = make_hugging_face(tmp_path / "m", OTHER, as_hugging_face(weights))
    with open_checkpoint(folder) as checkpoint:
        all_equal(checkpoint, weights)
        assert {key: checkpoint.params[key] for key in OTHER_PARAMS} == OTHER_PARAMS
    ids = [1, 7, 3, 10, 2]
    logits = reference.gpt_neo_forward(weights, np.array([ids]), **reference_config(params))[0]
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    (score,) = TextGenerator.from_pretrained(folder, **where).score([ids])
    np.testing.assert_allclose(score.logprobs[1:], want[range(4), ids[1:]], rtol=0, atol=2e-5)


def test_what_mesh_tf_cannot_say_is_refused_by_name(tmp_path):
    folder = make_hugging_face(tmp_path / "m", OTHER, as_hugging_face(random_weights({**TINY, **OTHER_PARAMS})))
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(folder, tmp_path / "out")
    assert str(error.value) == (
        "GPT-Neo's checkpoints have no intermediate_size=12 (only 4 * n_embd), layer_norm_epsilon=0.3 (only 1e-05), "
        "activation_fn='gelu_erf'; allowed: to='huggingface'"
    )
    convert_checkpoint(folder, tmp_path / "out", to="huggingface")
    with open_checkpoint(folder) as first, open_checkpoint(tmp_path / "out") as second:
        assert {key: second.params.get(key) for key in first.params} == first.params


def test_epsilon_rounded_to_float32_is_gpt_neo_s(tmp_path):
    folder = make_hugging_face(tmp_path / "m", {"layer_norm_epsilon": float(np.float32(1e-5))})
    assert "layer_norm_epsilon" not in open_checkpoint(folder).params


def erf(x):
    return np.vectorize(math.erf)(x)


def exact_gelu(x):
    return x * (1 + erf(x / 2**0.5)) / 2


def tanh_gelu(x):
    return x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def silu(x):
    return x / (1 + np.exp(-x))


ACTIVATIONS = {  # transformers', and whether GPT-Neo has the same
    "gelu": (exact_gelu, False),
    "gelu_10": (lambda x: np.clip(exact_gelu(x), -10, 10), False),
    "gelu_accurate": (tanh_gelu, True),
    "gelu_fast": (tanh_gelu, True),
    "gelu_new": (tanh_gelu, True),
    "gelu_python": (exact_gelu, False),
    "gelu_python_tanh": (tanh_gelu, True),
    "gelu_pytorch_tanh": (tanh_gelu, True),
    "hardswish": (lambda x: x * np.clip(x + 3, 0, 6) / 6, False),
    "laplace": (lambda x: (1 + erf((x - 0.707107) / (0.282095 * 2**0.5))) / 2, False),
    "leaky_relu": (lambda x: np.maximum(x, 0.01 * x), True),
    "linear": (lambda x: x, True),
    "mish": (lambda x: x * np.tanh(np.log1p(np.exp(x))), True),
    "quick_gelu": (lambda x: silu(1.702 * x) / 1.702, False),
    "relu": (lambda x: np.maximum(x, 0), True),
    "relu2": (lambda x: np.maximum(x, 0) ** 2, False),
    "relu6": (lambda x: np.clip(x, 0, 6), False),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), True),
    "silu": (silu, True),
    "sqrtsoftplus": (lambda x: np.log1p(np.exp(x)) ** 0.5, False),
    "swish": (silu, True),
    "tanh": (np.tanh, True),
}


def test_activation_functions_of_transformers(tmp_path):
    """Each name is that function, in both directions. (tests/models/test_layers.py: the functions in TensorFlow.)"""
    assert ACTIVATIONS.keys() == hugging_face._ACTIVATIONS.keys()
    x = np.linspace(-13, 13, 53)
    for name, (function, gpt_neo_has_it) in ACTIVATIONS.items():
        folder = make_hugging_face(tmp_path / name, {"activation_function": name})
        to = "mesh-tf" if gpt_neo_has_it else "huggingface"
        convert_checkpoint(folder, tmp_path / f"{name}-there", to=to)
        convert_checkpoint(tmp_path / f"{name}-there", tmp_path / f"{name}-back", to="huggingface")
        for place in ("", "-there", "-back"):
            with open_checkpoint(tmp_path / f"{name}{place}") as checkpoint:
                ours = reference.ACTIVATIONS[checkpoint.params.get("activation_fn", "gelu")]
            np.testing.assert_allclose(ours(x), function(x), rtol=1e-9, atol=1e-12, err_msg=name)
        if not gpt_neo_has_it:
            with pytest.raises(CheckpointError, match="GPT-Neo's checkpoints have no activation_fn="):
                convert_checkpoint(folder, tmp_path / "refused", to="mesh-tf")


def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path, caplog):
    params = {"n_vocab": 50257, "n_ctx": 2048, "n_embd": 16, "n_layer": 24, "n_head": 16,
              "attention_types": ["global", "local"] * 12, "local_attention_radius": 256,
              "eos_id": 50256, "bos_id": 50256}  # fmt: skip
    folder = tmp_path / "m"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "gpt_neo", "hidden_size": 16})
    write_safetensors(folder / "model.safetensors", as_hugging_face(random_weights(params), "F16"))
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(folder).params == params
    assert "config.json lacks some keys; transformers' defaults are used: vocab_size 50257, " in caplog.text
    assert "num_heads 16" in caplog.text and "hidden_size" not in caplog.text


def test_what_is_left_out_of_a_small_config(tmp_path, caplog):
    """Alternative keys; and no default token outside the vocabulary."""
    plain = open_checkpoint(make_hugging_face(tmp_path / "plain")).params
    caplog.clear()
    folder = make_hugging_face(tmp_path / "m", {"num_attention_heads": 2, "num_heads": 4, "num_hidden_layers": 2})
    assert open_checkpoint(folder).params == plain and caplog.text == ""  # transformers takes the first of two
    gone = ["num_layers", "eos_token_id", "bos_token_id", "activation_function"]
    write_json(folder / "config.json", without({**TINY_HF, "num_hidden_layers": 2}, *gone))
    assert open_checkpoint(folder).params == without(plain, "eos_id", "bos_id")
    assert caplog.text.count("defaults are used: activation_function gelu_new\n") == 1


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace(".h.0.", ".h.0._checkpoint_wrapped_module.").replace(".attn.", ".attn._orig_mod."),
    ],
)
@pytest.mark.parametrize("scope", ["transformer.", ""])
def test_names_of_wrapped_models(tmp_path, caplog, rename, scope):
    tensors = {rename(name): value for name, value in as_hugging_face(random_weights(TINY), scope=scope).items()}
    if scope:
        tensors[rename("lm_head.weight")] = tensors[rename("transformer.wte.weight")]
    all_equal(open_checkpoint(make_hugging_face(tmp_path / "m", tensors=tensors)), random_weights(TINY))
    assert caplog.text.count("dropped from tensor names: ") == 1


def test_a_tensor_under_two_wrappers(tmp_path):
    tensors = as_hugging_face(random_weights(TINY))
    tensors["module.transformer.ln_f.bias"] = ("F32", np.zeros(8, np.float32))
    with pytest.raises(CheckpointError, match="ln_f.bias twice, under module.transformer.ln_f.bias and another"):
        open_checkpoint(make_hugging_face(tmp_path / "m", tensors=tensors))


def doubled(tensors):
    return {name: ("F64", value.astype(np.float64)) for name, (_, value) in tensors.items()}


def test_float64(tmp_path, caplog):
    weights = random_weights(TINY)
    tensors = doubled(as_hugging_face(weights))
    tensors["transformer.wpe.weight"][1][0, 0] = 1 + 1e-9  # which float32 does not have
    weights["wpe"][0, 0] = 1
    tensors["transformer.ln_f.bias"][1][0] = np.inf
    weights["ln_f/b"][0] = np.inf
    tensors["transformer.ln_f.weight"][1][3] = -1e39
    checkpoint = open_checkpoint(make_hugging_face(tmp_path / "m", tensors=tensors))
    assert "30 float64 variables are rounded to float32: " in caplog.text
    with pytest.raises(CheckpointError, match="m: ln_f/g holds numbers beyond float32's 3.4e38"):
        checkpoint.read("ln_f/g")
    for name in weights.keys() - {"ln_f/g"}:
        value = checkpoint.read(name)
        assert value.dtype == np.float32 and value.flags.c_contiguous
        np.testing.assert_array_equal(value, weights[name])


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
    """A token's id may be 0; options without effect are not reported."""
    folder = make_hugging_face(tmp_path / "m")
    asked = {"forced_bos_token_id": 0, "force_words_ids": [[0]], "num_beams": 4}
    neutral = {"forced_decoder_ids": None, "constraints": [], "num_beam_groups": 1, "length_penalty": 1.0,
               "min_length": 0, "renormalize_logits": False, "remove_invalid_values": True}  # fmt: skip
    built = {"forced_eos_token_id": 0, "begin_suppress_tokens": [0], "suppress_tokens": [],
             "sequence_bias": [[[1, 2], -1.5]], "exponential_decay_length_penalty": [5, 1.1]}  # fmt: skip
    write_json(folder / "generation_config.json", {**asked, **neutral, **built})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.ignored_generation_options == asked
    assert {name: checkpoint.generation_defaults[name] for name in built} == built


def test_an_adapter_is_named(tmp_path, caplog):
    folder = make_hugging_face(tmp_path / "m")
    open_checkpoint(folder)
    assert caplog.text == ""
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    open_checkpoint(folder)
    assert "holds an adapter (adapter_config.json), which is ignored" in caplog.text


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
    with pytest.raises(CheckpointError, match="needs the package safetensors: .*pip install .?safetensors"):
        open_checkpoint(folder)

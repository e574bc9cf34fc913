"""sampling/other_names.py: what is said of arguments by other libraries' names."""

import inspect
import re

import pytest

from gpt_neo_sampling import GenerationOptions, TextGenerator, sample_autoregressive
from gpt_neo_sampling.generation.generator import OPTION_NAMES
from gpt_neo_sampling.sampling.other_names import (
    _FROM_PRETRAINED,
    HUGGING_FACE_NAMES,
    advice,
    explained,
    explains_names,
)

OURS = {
    *GenerationOptions.__dataclass_fields__,
    *inspect.signature(TextGenerator.from_pretrained).parameters,
    "greedy",  # the command's
}


def test_the_table_names_options_that_there_are():
    placeholders = {name for sentence in HUGGING_FACE_NAMES.values() for name in re.findall(r"\{(\w+)\}", sentence)}
    assert placeholders and placeholders <= OURS
    assert all(s and s.isprintable() and not s.endswith(".") for s in HUGGING_FACE_NAMES.values())
    # the others are those of generate's, which the command lacks
    assert HUGGING_FACE_NAMES.keys() & OURS == {
        "do_sample", "pad_token_id", "prefix_allowed_tokens_fn", "renormalize_logits", "remove_invalid_values"
    }  # fmt: skip


def test_advice_is_spelled_as_it_is_asked_for():
    assert advice("max_length") == "max_new_tokens counts the new tokens alone, without the prompt"
    as_flag = advice("max_length", lambda name: "--" + name.replace("_", "-"))
    assert as_flag == "--max-new-tokens counts the new tokens alone, without the prompt"
    assert advice("max_tokens") == "max_new_tokens bounds the new tokens"
    assert advice("do_sample") == "tokens are drawn, unless do_sample=False asks for the likeliest each time"
    assert advice("device", sentences={"device": "{devices} takes it"}) == "devices takes it"
    assert advice("warmth") is None
    assert (
        advice("num_samples") == "num_return_sequences draws several samples of each prompt"
    )  # the command's own name


def test_an_unknown_name_is_explained():
    assert explained("num_beams", ["a"]).startswith("beam search is not built; ")
    assert explained("device", OPTION_NAMES).endswith(" how it is split (with TextGenerator.from_pretrained)")
    assert explained("device", ["devices", "mesh_shape", "layout"]).endswith(" how it is split")
    assert explained("max_length", ["devices"]).endswith(" without the prompt (with TextGenerator.generate)")
    assert _FROM_PRETRAINED <= inspect.signature(TextGenerator.from_pretrained).parameters.keys()
    assert explained("temprature", ["top_k", "temperature"]) == "did you mean temperature?"
    assert explained("xtc_prob", ["top_k", "xtc_probability", "xtc_threshold"]) == "did you mean xtc_probability?"
    assert explained("mirostat_mode", ["mirostat", "mirostat_eta"]) == "mirostat is 2, or 0 for none"
    assert explained("warmth", ["top_k", "temperature"]) == "allowed: top_k, temperature"


def test_a_function_keeps_its_signature_and_refuses_other_names():
    def function(a, *, max_new_tokens=1, **more):
        """Says it."""
        return a, max_new_tokens, more

    decorated = explains_names(["top_k"])(function)
    assert decorated(1, max_new_tokens=2, top_k=3) == (1, 2, {"top_k": 3})
    assert inspect.signature(decorated) == inspect.signature(function) and decorated.__doc__ == "Says it."
    with pytest.raises(TypeError, match=r"function has no argument max_length; max_new_tokens counts"):
        decorated(1, max_length=2)
    with pytest.raises(TypeError, match=r"function has no argument b; allowed: a, max_new_tokens, top_k$"):
        decorated(1, b=2)


def test_the_loop_s_own_names_for_options_of_generate():
    """Each is an argument of the loop's, or says one."""
    from gpt_neo_sampling.sample import _GENERATE_NAMES

    parameters = inspect.signature(sample_autoregressive).parameters
    assert {name.split("=")[0] for name in _GENERATE_NAMES.values()} <= parameters.keys()
    assert _GENERATE_NAMES.keys() & parameters.keys() == set()

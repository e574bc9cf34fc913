"""How a model asks to be sampled: generation_config.json, and the ids of a config."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt_neo_sampling._types import is_real
from gpt_neo_sampling.checkpoint.base import CheckpointError, is_int32, one_line, read_json
from gpt_neo_sampling.sampling.controls import NUMBERS, TOKEN_SETS

log = logging.getLogger(__name__)

# GPT-Neo's key of each of Hugging Face's.
ID_KEYS = {"eos_token_id": "eos_id", "pad_token_id": "padding_id", "bos_token_id": "bos_id"}


def _is_int_or_ints(value: object) -> bool:
    return is_int32(value) or _are_ints(value)


def _are_ints(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_int32, value))


def _are_words(value: object) -> bool:
    return isinstance(value, list) and all(map(_are_ints, value))


def _is_set(value: object) -> bool:
    return value == [] or _is_int_or_ints(value)


def _are_breakers(value: object) -> bool:
    return isinstance(value, list) and all(is_int32(v) or (isinstance(v, str) and v) for v in value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_real, value))


def _are_biases(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _are_ints(pair[0]) and is_real(pair[1]) for pair in value
    )


def _is_text_or_texts(value: object) -> bool:
    return all(isinstance(text, str) and text for text in (value if isinstance(value, list) else [value]))


_Check = tuple[Callable[[object], bool], str]  # and what it allows, in words
_WHOLE = (is_int32, "a whole number of 32 bits")
_NUMBER = (is_real, "a number")
_TOKEN_IDS = {
    "eos_token_id": (_is_int_or_ints, "a whole number, or a list of them, of 32 bits"),
    "pad_token_id": _WHOLE,
    "bos_token_id": _WHOLE,
}
# What says how a token is drawn. A file with one of these is read as transformers reads it: what it says nothing of
# is as in _WITH_SAMPLING. Without any of them the library's own defaults stand.
_SAMPLING = ("do_sample", "temperature", *(name for name, number in NUMBERS.items() if number.argmax_invariant))
_WITH_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50}  # the others' defaults are neutral
_OPTIONS = {
    **{name: _WHOLE if number.whole else _NUMBER for name, number in NUMBERS.items()},
    **{name: (_is_set, "a whole number, or a list of them, of 32 bits") for name in TOKEN_SETS},
    "dry_sequence_breakers": (_are_breakers, "a list of texts and of whole numbers of 32 bits"),
    "exponential_decay_length_penalty": (_is_pair, "a list of a whole number and a factor"),
    "sequence_bias": (_are_biases, "a list of pairs, a list of whole numbers of 32 bits and a number"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "bad_words_ids": (_are_words, "a list of lists of whole numbers of 32 bits"),
    "max_length": _WHOLE,
    "max_new_tokens": _WHOLE,
    "min_length": _WHOLE,
    "no_repeat_ngram_size": _WHOLE,
    "num_return_sequences": _WHOLE,
    "stop_strings": (_is_text_or_texts, "a text or a list of texts, none of them empty"),
}

# transformers' options that are not built here: the value at which each changes nothing,
# besides null and false, which never change anything.
_NEUTRAL = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "length_penalty": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": 0,
}
# The same of the options that are built.
_NEUTRAL_OPTIONS = {
    **{name: number.neutral for name, number in NUMBERS.items()},
    **_WITH_SAMPLING,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
}
# Prefixes of keys that say how transformers computes or reports, and not what is sampled.
_WITHOUT_EFFECT = (
    "_",
    "assistant_",
    "cache_",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",  # of models with an encoder
    "disable_compile",
    "early_stopping",  # of beam search
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "output_",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",  # speculates, as assistants do, on the same tokens
    "remove_invalid_values",
    "renormalize_logits",
    "return_",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
    "use_mtp",
)


def token_ids(config: dict[str, Any], config_file: Path) -> dict[str, Any]:
    """The ids that a Hugging Face config names: a dict, see `Checkpoint.generation_defaults`."""
    return _checked(config, _TOKEN_IDS, config_file)


def note_old_options(config: dict[str, Any], config_file: Path) -> None:
    """Names in a note the options that a Hugging Face config has, as old ones may, and that count for nothing there."""
    neutral = {**_NEUTRAL, **_NEUTRAL_OPTIONS}
    odd = [
        f"{key}={value!r}"
        for key, value in config.items()
        if key in (*_OPTIONS, *neutral) and not _changes_nothing(value, neutral.get(key))
    ]
    if odd:
        log.warning("%s: options are read from generation_config.json only; ignored: %s",
                    config_file, one_line(", ".join(odd)))  # fmt: skip


def read_generation(ids: dict[str, Any], folder: Path, files: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(generation_defaults, ignored_generation_options) of a folder whose config names these ids."""
    if "generation_config.json" not in files:
        return ids, {}
    config_file = folder / "generation_config.json"
    config = read_json(config_file)
    given = _checked(config, {**_TOKEN_IDS, **_OPTIONS}, config_file)
    ignored = {
        key: value
        for key, value in config.items()
        if key not in (*_TOKEN_IDS, *_OPTIONS)
        and not key.startswith(_WITHOUT_EFFECT)
        and not _changes_nothing(value, _NEUTRAL.get(key))
    }
    sampling = [key for key in _SAMPLING if key in given]
    if sampling:
        if "do_sample" not in given:
            log.warning(
                "%s has no do_sample, so requests are greedy, as in transformers; its sampling options (%s) apply only "
                "to requests that ask to sample, for example with a temperature",
                config_file, ", ".join(sampling),
            )  # fmt: skip
        given = {**_WITH_SAMPLING, **given}
        if given.get("mirostat"):  # in place of masks
            given["top_k"] = config.get("top_k") or 0
    return {**ids, **given}, ignored


def _changes_nothing(value: object, neutral: float | None) -> bool:
    # a 0 is not False, but a token's id
    return value is None or value is False or value in ([], {}) or value == neutral


def _checked(config: dict[str, Any], keys: Mapping[str, _Check], config_file: Path) -> dict[str, Any]:
    given = {key: config[key] for key in keys if config.get(key) is not None}
    for key, value in given.items():
        is_valid, allowed = keys[key]
        if not is_valid(value):
            raise CheckpointError(f"{config_file}: {key} is {value!r}; allowed: {allowed}")
    return given

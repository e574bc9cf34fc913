"""How a model asks to be sampled: generation_config.json, and the ids of a config."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt_neo_sampling._types import is_real
from gpt_neo_sampling.checkpoint.base import CheckpointError, is_int32, read_json

# GPT-Neo's key of each of Hugging Face's.
ID_KEYS = {"eos_token_id": "eos_id", "pad_token_id": "padding_id", "bos_token_id": "bos_id"}


def _is_int_or_ints(value: object) -> bool:
    return is_int32(value) or (isinstance(value, list) and len(value) > 0 and all(map(is_int32, value)))


_Check = tuple[Callable[[object], bool], str]  # and what it allows, in words
_WHOLE = (is_int32, "a whole number of 32 bits")
_NUMBER = (is_real, "a number")
_TOKEN_IDS = {
    "eos_token_id": (_is_int_or_ints, "a whole number, or a list of them, of 32 bits"),
    "pad_token_id": _WHOLE,
    "bos_token_id": _WHOLE,
}
_OPTIONS = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "max_length": _WHOLE,
    "max_new_tokens": _WHOLE,
    "min_new_tokens": _WHOLE,
    "no_repeat_ngram_size": _WHOLE,
    "repetition_penalty": _NUMBER,
    "temperature": _NUMBER,
    "top_k": _WHOLE,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "typical_p": _NUMBER,
    "epsilon_cutoff": _NUMBER,
    "eta_cutoff": _NUMBER,
}

# transformers' options that are not built here: the value at which each changes nothing,
# beside null and false, which change nothing in any.
_NEUTRAL = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "length_penalty": 1,
    "min_length": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
}
# What says how transformers computes or reports, and not what is sampled.
_WITHOUT_EFFECT = (
    "cache_",
    "compile_config",
    "disable_compile",
    "early_stopping",  # of beam search
    "return_",
    "output_",
    "transformers_version",
    "use_cache",
    "_",
)


def token_ids(config: dict[str, Any], config_file: Path) -> dict[str, Any]:
    """The ids that a Hugging Face config names: a dict, see `Checkpoint.generation_defaults`."""
    return _checked(config, _TOKEN_IDS, config_file)


def read_generation(ids: dict[str, Any], folder: Path, files: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(generation_defaults, ignored_generation_options) of a folder whose config names these ids."""
    if "generation_config.json" not in files:
        return ids, {}
    config_file = folder / "generation_config.json"
    config = read_json(config_file)
    defaults = {**ids, **_checked(config, {**_TOKEN_IDS, **_OPTIONS}, config_file)}
    ignored = {
        key: value
        for key, value in config.items()
        if key not in (*_TOKEN_IDS, *_OPTIONS)
        and not key.startswith(_WITHOUT_EFFECT)
        and not _changes_nothing(key, value)
    }
    return defaults, ignored


def _changes_nothing(key: str, value: object) -> bool:
    # a 0 is not False, but a token's id
    return value is None or value is False or value in ([], {}) or (key in _NEUTRAL and value == _NEUTRAL[key])


def _checked(config: dict[str, Any], keys: Mapping[str, _Check], config_file: Path) -> dict[str, Any]:
    given = {key: config[key] for key in keys if config.get(key) is not None}
    for key, value in given.items():
        is_valid, allowed = keys[key]
        if not is_valid(value):
            raise CheckpointError(f"{config_file}: {key} is {value!r}; allowed: {allowed}")
    return given

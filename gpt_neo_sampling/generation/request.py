"""A request, checked, with all defaults in place."""

import dataclasses
import secrets
from typing import Any

import numpy as np

from gpt_neo_sampling._types import FLOAT32_MAX, LogitsProcessor, Tokenizer, is_real
from gpt_neo_sampling.checkpoint import Checkpoint
from gpt_neo_sampling.checkpoint.tokenizer import why_no_tokenizer
from gpt_neo_sampling.generation.decode_graph import stop_tokens_of
from gpt_neo_sampling.generation.options import (
    ARGMAX_INVARIANT,
    DEFAULT_NEW_TOKENS,
    PER_PROMPT,
    SAMPLING,
    SHARED,
    GenerationOptions,
    check_default,
    check_least_and_most,
    check_shared,
    of_the_model,
    per_prompt,
    resolve,
)
from gpt_neo_sampling.sampling.controls import INT32_MAX, check_bool, check_int


@dataclasses.dataclass
class Request:
    """What is asked for."""

    prompts: list[list[int]]
    options: GenerationOptions  # those that are not below
    values: dict[str, np.ndarray]  # of PER_PROMPT, each [prompts]
    num_return_sequences: int
    stop_tokens: list[int]
    stop_strings: tuple[str, ...]
    logit_bias: np.ndarray | None  # float32 [vocab]
    n_vocab: int  # the model's
    n_ctx: int

    @property
    def greedy(self) -> bool:
        return not np.any(self.values["temperature"])

    @property
    def steps(self) -> frozenset[str]:
        """The names of those numbers that change anything in some row: a frozenset."""
        return frozenset(
            name
            for name in SAMPLING
            if PER_PROMPT[name].neutral is not None
            and np.any(self.values[name] != PER_PROMPT[name].neutral)
            and not (self.greedy and name in ARGMAX_INVARIANT)
        )

    def setting(self, step: str) -> str:
        """The first prompt's values for a step of the chain, as text."""
        if step == "entmax":
            step = "entmax_alpha"
        if step == "no_repeat_ngram_size":
            return str(self.options.no_repeat_ngram_size)
        return ", ".join(f"{self.values[name][0]:g}" for name in step.split(", ") if name in self.values)


def checked_request(
    prompts: list[list[int]],
    options: GenerationOptions,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    n_new: int = 0,
) -> Request:
    """Takes a list of prompts, lists of ids, and GenerationOptions for a model; returns a Request.

    The last `n_new` ids of each prompt count as new tokens.

    Raises:
      ValueError: for a value that is out of range; the message says what was given
        and what is allowed.
    """
    n_vocab, n_ctx = checkpoint.params["n_vocab"], checkpoint.params["n_ctx"]
    defaults = checkpoint.generation_defaults
    check_shared(options, n_vocab)
    check_bool("return_logprobs", options.return_logprobs)
    if options.do_sample is not None:
        check_bool("do_sample", options.do_sample)
    own = {name: defaults[name] for name in SHARED if name in defaults and getattr(options, name) is None}
    if "stop_strings" in own:
        own["stop_strings"], _ = models_stop_strings(checkpoint, tokenizer)
    with of_the_model():
        check_shared(GenerationOptions(**own), n_vocab)
    options = dataclasses.replace(options, **own)
    n_samples = 1 if options.num_return_sequences is None else int(options.num_return_sequences)

    values = resolve(options, [_with_min_new_tokens(defaults, len(prompt) - n_new) for prompt in prompts])
    values["top_k"][values["top_k"] >= n_vocab] = 0  # all of them: no mask
    new_tokens = per_prompt("max_new_tokens", options.max_new_tokens, len(prompts))
    new_tokens = [_default_new_tokens(len(p), defaults) if n is None else n for p, n in zip(prompts, new_tokens)]
    values["max_new_tokens"] = np.array(new_tokens, np.int32)
    if options.min_new_tokens is not None:
        for least, most in zip(values["min_new_tokens"], values["max_new_tokens"]):
            check_least_and_most(least, most)
    fresh = secrets.randbits(32)
    seeds = [fresh if s is None else int(s) for s in per_prompt("seed", options.seed, len(prompts))]
    values["seed"] = np.array([s % 2**32 for s in seeds], np.uint32).view(np.int32)
    values["stream"] = _streams(options.stream, len(prompts), n_samples)

    longest = max(map(len, prompts))
    if longest > n_ctx:
        raise ValueError(f"a prompt of {longest} tokens is longer than the context; at most {n_ctx} are allowed")
    if options.pad_token_id is not None:
        check_int("pad_token_id", options.pad_token_id, 0)
    stop_tokens = stop_tokens_of(checkpoint, options.eos_token_id)
    return Request(
        prompts=prompts,
        options=dataclasses.replace(
            options,
            no_repeat_ngram_size=options.no_repeat_ngram_size or None,  # 0 is off
            logits_processors=_processors(options.logits_processors),
        ),
        values=values,
        num_return_sequences=n_samples,
        stop_tokens=stop_tokens,
        stop_strings=_stop_strings(options.stop_strings, checkpoint, tokenizer),
        logit_bias=_logit_bias(options, stop_tokens, n_vocab),
        n_vocab=n_vocab,
        n_ctx=n_ctx,
    )


def _with_min_new_tokens(defaults: dict[str, Any], length: int) -> dict[str, Any]:
    """The defaults for a prompt of `length` tokens, which a min_length counts too."""
    if "min_new_tokens" in defaults or "min_length" not in defaults:
        return defaults
    return {**defaults, "min_new_tokens": max(0, defaults["min_length"] - length)}


def _default_new_tokens(length: int, defaults: dict[str, Any]) -> int:
    """For a prompt of `length` tokens."""
    if "max_new_tokens" in defaults or "max_length" not in defaults:
        new_tokens = defaults.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        check_default("max_new_tokens", new_tokens)
        return new_tokens
    if length >= defaults["max_length"]:
        raise ValueError(
            f"a prompt of {length} tokens leaves nothing of max_length={defaults['max_length']}, "
            "which the model's generation_config.json gives; give max_new_tokens"
        )
    check_default("max_new_tokens", defaults["max_length"] - length)
    return defaults["max_length"] - length


def _processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    if not isinstance(processors, (list, tuple)) or not all(map(callable, processors)):
        raise ValueError(f"logits_processors={processors!r}; a list of functions is needed")
    try:
        hash(tuple(processors))
    except TypeError as e:
        raise ValueError(f"logits_processors: {e}; hashable functions are needed") from None
    return tuple(processors)


def _streams(given: Any, n_prompts: int, n_samples: int) -> np.ndarray:
    """int32 [prompts]: that of each one's first sample. One for all is the first prompt's, and the others follow."""
    given = given.tolist() if isinstance(given, np.ndarray) else given
    streams = per_prompt("stream", given, n_prompts)
    if not isinstance(given, (list, tuple)):
        streams = [(given or 0) + i * n_samples for i in range(n_prompts)]
    elif None in streams:
        raise ValueError("stream: a list needs a number for each prompt, not None")
    if max(streams) + n_samples - 1 > INT32_MAX:
        raise ValueError(f"stream {max(streams)} and {n_samples} samples pass the largest stream, {INT32_MAX}")
    return np.array(streams, np.int32)


def _stop_strings(stop_strings: Any, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    if stop_strings is None:
        return ()
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(stop_strings, (list, tuple)) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"stop_strings={stop_strings!r}; a text or a list of texts, none of them empty, is needed")
    if not stop_strings:
        return ()
    if tokenizer is None:
        raise ValueError(f"stop_strings need a tokenizer: {why_no_tokenizer(checkpoint)}; give eos_token_id")
    for s in stop_strings:
        if _holds_special(s, tokenizer):
            raise ValueError(f"stop_strings: {s!r} holds a special token, which no text does; give eos_token_id")
    return tuple(stop_strings)


def _holds_special(text: str, tokenizer: Tokenizer) -> bool:
    return any(token.content in text for token in tokenizer.get_added_tokens_decoder().values() if token.special)


def models_stop_strings(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[list[str], list[str]]:
    """Of the stop strings of generation_config.json those that can come up, and the others."""
    given = checkpoint.generation_defaults.get("stop_strings", [])
    given = [given] if isinstance(given, str) else given
    used = [s for s in given if tokenizer is not None and not _holds_special(s, tokenizer)]
    return used, [s for s in given if s not in used]


def _logit_bias(options: GenerationOptions, stop_tokens: list[int], n_vocab: int) -> np.ndarray | None:
    """What logit_bias and bad_words_ids add to the logits; None for nothing."""
    given, banned = options.logit_bias, options.bad_words_ids
    if not (given is None or isinstance(given, dict)):
        raise ValueError(f"logit_bias={given!r}; a dict, token id -> number, is needed")
    if not given and not banned:
        return None
    bias = np.zeros(n_vocab, np.float32)
    for token, value in (given or {}).items():
        check_int("logit_bias: token id", token, 0, n_vocab - 1)
        if not is_real(value) or not (abs(value) <= FLOAT32_MAX or value == -np.inf):
            raise ValueError(f"logit_bias={{{token}: {value!r}}}; a finite number of 32 bits, or -inf, is needed")
        bias[token] = value
    for (token,) in banned or ():
        if token not in stop_tokens:  # as in transformers: a row could not end
            bias[token] = -np.inf
    return bias

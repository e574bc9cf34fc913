"""A request, checked, with all defaults in place."""

import dataclasses
import secrets
from typing import Any, cast

import numpy as np

from gpt_neo_sampling._types import FLOAT32_MAX, LogitsProcessor, Tokenizer, is_real
from gpt_neo_sampling.checkpoint import Checkpoint
from gpt_neo_sampling.checkpoint.tokenizer import encoded, tokens_with, why_no_tokenizer
from gpt_neo_sampling.generation.decode_graph import stop_tokens_of
from gpt_neo_sampling.generation.options import (
    DEFAULT_NEW_TOKENS,
    PER_PROMPT,
    SAMPLING,
    SHARED,
    GenerationOptions,
    check_default,
    check_least_and_most,
    check_sequences,
    check_shared,
    check_token_set,
    of_the_model,
    per_prompt,
    resolve,
)
from gpt_neo_sampling.sampling.controls import INT32_MAX, MOST_TOP_LOGPROBS, NUMBERS, TOKEN_SETS, check_bool, check_int
from gpt_neo_sampling.sampling.prefix_function import PrefixFunction
from gpt_neo_sampling.sampling.token_sequences import TokenSequences, listed

DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's own, where a request gives none


@dataclasses.dataclass
class Request:
    """What is asked for."""

    prompts: list[list[int]]
    options: GenerationOptions  # those that are not below
    values: dict[str, np.ndarray]  # of PER_PROMPT, each [prompts]
    num_return_sequences: int
    stop_tokens: list[int]
    stop_strings: tuple[str, ...]
    arrays: dict[str, np.ndarray]  # logit_bias, and of TOKEN_SETS those that are given as flags: float32 [vocab]
    sequences: dict[str, TokenSequences]  # of SEQUENCES those that are given
    prefix_function: PrefixFunction | None
    n_vocab: int  # the model's
    n_ctx: int
    prompt_logprobs: list[list[float | None]] | None = None  # of each prompt, once they are asked for

    @property
    def greedy(self) -> bool:
        return not np.any(self.values["temperature"])

    @property
    def steps(self) -> frozenset[str]:
        """The names of those numbers that change anything in some row: a frozenset."""
        return frozenset(filter(self._changes, SAMPLING))

    def _changes(self, name: str) -> bool:
        number = NUMBERS[name]
        if number.unset is None or (self.greedy and number.argmax_invariant):
            return False
        is_used = not number.of or any(map(self._changes, number.of))
        return is_used and bool(np.any(self.values[name] != number.unset))

    def setting(self, step: str) -> str:
        """The first prompt's values for a step of the chain, as text."""
        if step == "entmax":
            step = "entmax_alpha"
        if step == "no_repeat_ngram_size":
            return str(self.options.no_repeat_ngram_size)
        names = [name for name in step.split(", ") if name in self.values]
        return ", ".join(PER_PROMPT[name].as_text(self.values[name][0]) for name in names)


def checked_request(
    prompts: list[list[int]],
    options: GenerationOptions,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
) -> Request:
    """Takes a list of prompts, lists of ids, and GenerationOptions for a model; returns a Request.

    Raises:
      ValueError: for a value that is out of range; the message says what was given
        and what is allowed.
    """
    n_vocab, n_ctx = checkpoint.params["n_vocab"], checkpoint.params["n_ctx"]
    defaults = checkpoint.generation_defaults
    check_shared(options, n_vocab)
    check_bool("return_logprobs", options.return_logprobs)
    check_bool("return_prompt_logprobs", options.return_prompt_logprobs)
    top_logprobs = 0 if options.top_logprobs is None else options.top_logprobs
    check_int("top_logprobs", top_logprobs, 0, min(MOST_TOP_LOGPROBS, n_vocab))
    options = dataclasses.replace(
        options, top_logprobs=int(top_logprobs), return_logprobs=bool(options.return_logprobs or top_logprobs)
    )
    if options.do_sample is not None:
        check_bool("do_sample", options.do_sample)
    asks_for_breakers = options.dry_sequence_breakers is not None
    own = {name: defaults[name] for name in SHARED if name in defaults and getattr(options, name) is None}
    if "stop_strings" in own:
        own["stop_strings"], _ = models_stop_strings(checkpoint, tokenizer)
    with of_the_model():
        check_shared(GenerationOptions(**own), n_vocab)
    options = dataclasses.replace(options, **own)
    function = options.prefix_allowed_tokens_fn
    if not (function is None or callable(function)):
        raise ValueError(f"prefix_allowed_tokens_fn={function!r}; a function is needed")
    n_samples = 1 if options.num_return_sequences is None else int(options.num_return_sequences)

    values = resolve(options, [defaults] * len(prompts))
    values["top_k"][values["top_k"] >= n_vocab] = 0  # all of them: no mask
    new_tokens = per_prompt("max_new_tokens", options.max_new_tokens, len(prompts))
    new_tokens = [_default_new_tokens(len(p), defaults) if n is None else n for p, n in zip(prompts, new_tokens)]
    values["max_new_tokens"] = np.array(new_tokens, np.int32)
    if options.min_new_tokens is not None:
        for least, most in zip(values["min_new_tokens"], values["max_new_tokens"]):
            check_least_and_most(least, most)
    if options.min_length is not None:
        for least, most, prompt in zip(values["min_length"], values["max_new_tokens"], prompts):
            if int(least) > len(prompt) + int(most):
                raise ValueError(
                    f"min_length={least} is more than a prompt of {len(prompt)} tokens and max_new_tokens={most}"
                )
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
    arrays = _arrays(options, values, checkpoint, tokenizer, asks_for_breakers)
    words = _words(options, stop_tokens, tokenizer, checkpoint)
    _check_some_are_left(arrays, words, n_vocab)
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
        arrays=arrays,
        sequences=_sequences(options.sequence_bias, words, n_vocab),
        prefix_function=None if function is None else PrefixFunction(function),
        n_vocab=n_vocab,
        n_ctx=n_ctx,
    )


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


def _arrays(
    options: GenerationOptions,
    values: dict[str, np.ndarray],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    asks_for_breakers: bool,
) -> dict[str, np.ndarray]:
    """Request.arrays; asks_for_breakers: whether dry_sequence_breakers are the request's own, not the model's."""
    arrays, n_vocab = {}, checkpoint.params["n_vocab"]
    given = options.logit_bias
    if not (given is None or isinstance(given, dict)):
        raise ValueError(f"logit_bias={given!r}; a dict, token id -> number, is needed")
    if given:
        bias = arrays["logit_bias"] = np.zeros(n_vocab, np.float32)
        for token, value in given.items():
            check_int("logit_bias: token id", token, 0, n_vocab - 1)
            if not is_real(value) or not (abs(value) <= FLOAT32_MAX or value == -np.inf):
                raise ValueError(f"logit_bias={{{token}: {value!r}}}; a finite number of 32 bits, or -inf, is needed")
            bias[token] = value
    for name in TOKEN_SETS:
        ids = check_token_set(name, getattr(options, name), n_vocab)
        if name == "dry_sequence_breakers":
            if not np.any(values["dry_multiplier"]):
                if ids and asks_for_breakers and options.dry_multiplier is None:
                    raise ValueError(f"dry_sequence_breakers={ids!r} without dry_multiplier, which it belongs to")
                continue
            ids = _breakers(None if options.dry_sequence_breakers is None else ids, checkpoint, tokenizer)
        if ids:
            arrays[name] = np.zeros(n_vocab, np.float32)
            arrays[name][ids] = 1
    return arrays


def _breakers(given: list[Any] | None, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens of dry_sequence_breakers: of a text all that hold it. given: ids and texts; None for the default."""
    if given is None:
        return default_breakers(checkpoint, tokenizer)
    ids = [token for token in given if not isinstance(token, str)]
    for text in given:
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(f"dry_sequence_breakers need a tokenizer: {why_no_tokenizer(checkpoint)}; give ids")
            found = tokens_with(tokenizer, (text,), checkpoint.params["n_vocab"])
            if not found:
                raise ValueError(f"dry_sequence_breakers: no token of the vocabulary holds {text!r}; shorter texts, or "
                                 "token ids, are needed")  # fmt: skip
            ids += found
    return ids


def default_breakers(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens at which DRY's sequences end where a request names none; none without a tokenizer."""
    return tokens_with(tokenizer, DRY_BREAKERS, checkpoint.params["n_vocab"]) if tokenizer else []


def _sequences(sequence_bias: Any, words: list[list[int]], n_vocab: int) -> dict[str, TokenSequences]:
    """Request.sequences."""
    given = {"sequence_bias": sequence_bias, "bad_words_ids": words}
    pairs = {name: check_sequences(name, value, n_vocab) for name, value in given.items()}
    return {name: TokenSequences.of(biases) for name, biases in pairs.items() if biases}


def _words(
    options: GenerationOptions, stop_tokens: list[int], tokenizer: Tokenizer | None, checkpoint: Checkpoint
) -> list[list[int]]:
    """The sequences that never come up whole."""
    words = [*map(list, listed(options.bad_words_ids) or ())] + _bad_words(options.bad_words, tokenizer, checkpoint)
    # as in transformers: a row could not end
    return [word for word in words if not (len(word) == 1 and word[0] in stop_tokens)]


def _check_some_are_left(arrays: dict[str, np.ndarray], words: list[list[int]], n_vocab: int) -> None:
    """Raises ValueError where no token is left whatever the row."""
    masked = {}
    if "logit_bias" in arrays:
        masked["logit_bias"] = np.isneginf(arrays["logit_bias"])
    if alone := [word[0] for word in words if len(word) == 1]:
        masked["bad_words_ids"] = np.isin(np.arange(n_vocab), alone)
    if "allowed_token_ids" in arrays:
        masked["allowed_token_ids"] = arrays["allowed_token_ids"] == 0
    if "suppress_tokens" in arrays:
        masked["suppress_tokens"] = arrays["suppress_tokens"] > 0
    if masked and np.any(list(masked.values()), 0).all():
        names = [name for name, tokens in masked.items() if tokens.any()]
        raise ValueError(f"all {n_vocab} tokens are masked by {' and '.join(names)}; some have to be left")
    forced = arrays.get("forced_eos_token_id")
    if forced is not None and "suppress_tokens" in masked and masked["suppress_tokens"][forced > 0].all():
        raise ValueError("suppress_tokens has all of forced_eos_token_id, so no row could end; leave one out")


def _bad_words(words: Any, tokenizer: Tokenizer | None, checkpoint: Checkpoint) -> list[list[int]]:
    """The tokens of texts, each as it is and, unless it begins with white space, behind a space too."""
    if words is None:
        return []
    given, words = words, [words] if isinstance(words, str) else words
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"bad_words={given!r}; a text or a list of texts, none of them empty, is needed")
    if words and tokenizer is None:
        raise ValueError(f"bad_words need a tokenizer: {why_no_tokenizer(checkpoint)}; give bad_words_ids")
    texts = [space + word for word in words for space in ("", " ") if not (space and word[0].isspace())]
    return [encoded(cast("Tokenizer", tokenizer), text, is_begin=False) for text in dict.fromkeys(texts)]

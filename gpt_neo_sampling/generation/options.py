"""The options of a request besides the controls, resolved to a value for each prompt."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._types import is_int
from gpt_neo_sampling.sampling.controls import (
    CONTROLS,
    INT32_MAX,
    MASKS,
    NUMBERS,
    SEQUENCES,
    TOKEN_SETS,
    Control,
    Controls,
    Number,
    check_bool,
    check_int,
    check_together,
    control,
    controls_of,
    with_sentences,
)
from gpt_neo_sampling.sampling.defaults import ENTMAX_TEMPERATURE, SOFTMAX_TEMPERATURE
from gpt_neo_sampling.sampling.other_names import check_names
from gpt_neo_sampling.sampling.token_sequences import TokenSequences, banned, biased, listed

DEFAULT_NEW_TOKENS = 64
DTYPES = ("float32", "bfloat16")  # of weights and activations
DEFAULT_MAX_TOP_K = 64  # of an exported model: the largest that a request may ask for


PerPrompt = float | Sequence[float | None] | np.ndarray  # one for all prompts, or one a prompt


@with_sentences
@dataclasses.dataclass
class GenerationOptions(Controls[PerPrompt]):
    """What `TextGenerator.generate` may be asked for, by the names of Hugging Face's `generate`.

    The controls of `sampling.controls.Controls` and the fields below. A number may also be a list, with one for each
    prompt. None is the model's own, if its generation_config.json gives one (see `Checkpoint.generation_defaults`), and
    else what changes nothing. `logits_processors` are functions of (logits, ids, position) on mtf tensors, see
    `sample_autoregressive`; a graph is built for each set of them, so hand over the same objects again.
    `return_logprobs` says whether samples have their `logprobs` and `draw_logprobs`; `top_logprobs`, an int up to
    1,024, of how many likeliest tokens they tell, and their `ranks` with them; `return_prompt_logprobs`, whether they
    have their `prompt_logprobs`. docs/sampling.md shows what each option does.

    Nothing is checked before a generator has a request to check:

        >>> from gpt_neo_sampling import TextGenerator
        >>> options = GenerationOptions(temperature=0.7, min_p=1.5)
        >>> TextGenerator.from_pretrained().generate("Emma", **vars(options))
        Traceback (most recent call last):
        ValueError: min_p=1.5; a number from 0 to 1 is needed
    """

    bad_words: str | Sequence[str] | None = control(
        Control(
            "texts that never come up, as bad_words_ids of their tokens, with a space ahead of them and without, "
            "but for a text that is one stop token"
        )
    )
    do_sample: bool | None = control(
        Control("False: the likeliest token each time, as with temperature 0; None: True, also where the model says "
                "otherwise and a prompt has a temperature or an option that only sampling has"))  # fmt: skip
    eos_token_id: int | Sequence[int] | None = control(
        Control("tokens that end a continuation, at most 256; -1 for none")
    )
    stop_strings: str | Sequence[str] | None = control(
        Control("texts that end a continuation, which stops before them")
    )
    max_new_tokens: PerPrompt | None = control(
        Number(f"the longest continuation, in tokens; {DEFAULT_NEW_TOKENS}, or up to the model's max_length, prompt "
               "included. A row ends earlier at a stop token or stop string and, with a warning, at the end of the "
               "context", least=1, most=INT32_MAX, whole=True))  # fmt: skip
    num_return_sequences: int | None = control(Control("continuations of each prompt, which share the pass over it; 1"))
    seed: PerPrompt | None = control(
        Number("the same seed, stream and prompt give the same tokens; a fresh one",
               least=-(2**31), most=2**32 - 1, whole=True))  # fmt: skip
    stream: PerPrompt | None = control(
        Number("tells rows of one seed apart; samples of a prompt count on from it, so a list leaves room for them; "
               "from 0 on", least=-(2**31), most=INT32_MAX, whole=True))  # fmt: skip
    pad_token_id: int | None = control(
        Control("accepted for scripts that pass it; changes nothing, as what is returned has no padding")
    )
    renormalize_logits: bool | None = control(
        Control("accepted for scripts that pass it; changes nothing, as what is left is always renormalized")
    )
    remove_invalid_values: bool | None = control(
        Control("accepted for scripts that pass it; changes nothing, as a row whose logits are NaN or +inf is an error")
    )
    return_logprobs: bool = False
    top_logprobs: int | None = None
    return_prompt_logprobs: bool = False

    def __new__(cls, *args: Any, **options: Any) -> "GenerationOptions":
        check_names(cls.__name__, options, cls.__dataclass_fields__)
        return super().__new__(cls)


OPTIONS = controls_of(GenerationOptions)
# Numbers, of which each prompt may have its own.
PER_PROMPT = {name: c for name, c in OPTIONS.items() if isinstance(c, Number)}
SAMPLING = tuple(NUMBERS)  # those that say how a token is drawn
ARGMAX_INVARIANT = tuple(name for name in SAMPLING if PER_PROMPT[name].argmax_invariant)
# Numbers that an exported model may be asked for, besides those that each has.
EXPORTABLE = tuple(
    n for n, c in NUMBERS.items() if c.unset is not None and not c.shape and n not in ("top_k", "entmax_alpha")
)
# All that say how a token is drawn.
TOKEN_OPTIONS = ("logits_processors", *CONTROLS, "bad_words", "eos_token_id", "do_sample")

# Sets of tokens that may be given as texts, which stand for all tokens with them.
TEXTS_TOO = ("dry_sequence_breakers",)
ONLY_PYTHON = ("logits_processors", "prefix_allowed_tokens_fn")  # functions

# Options that all prompts share, and that a generation_config.json may give.
SHARED = ("no_repeat_ngram_size", "num_return_sequences", "stop_strings", *SEQUENCES, *TOKEN_SETS)


def check_shared(options: GenerationOptions, n_vocab: int) -> None:
    """Raises ValueError if one of SHARED is out of range, but for stop strings."""
    if options.num_return_sequences is not None:
        check_int("num_return_sequences", options.num_return_sequences, 1, INT32_MAX)
    if options.no_repeat_ngram_size is not None:
        check_int("no_repeat_ngram_size", options.no_repeat_ngram_size, 0, INT32_MAX)
    for name in ("renormalize_logits", "remove_invalid_values"):
        if getattr(options, name) is not None:
            check_bool(name, getattr(options, name))
    for name in TOKEN_SETS:
        check_token_set(name, getattr(options, name), n_vocab)
    for name in SEQUENCES:
        check_sequences(name, getattr(options, name), n_vocab)


def check_token_set(name: str, value: Any, n_vocab: int) -> list[Any]:
    """The ids of a set, a list, with texts among those of TEXTS_TOO.

    Raises:
      ValueError: for what is not an id or a list of them, an id outside the vocabulary, or no allowed ones.
    """
    if value is None:
        return []
    ids = value.tolist() if isinstance(value, np.ndarray) else value
    ids = [ids] if is_int(ids) or (isinstance(ids, str) and name in TEXTS_TOO) else ids
    if not isinstance(ids, (list, tuple)) or (name == "allowed_token_ids" and not ids):
        raise ValueError(f"{name}={value!r}; a list of token ids is needed, as in [50256]")
    for token in ids:
        if isinstance(token, str) and name in TEXTS_TOO:
            if not token:
                raise ValueError(f"{name}={value!r}; texts or token ids, and no text that is empty, are needed")
        else:
            check_int(f"{name}: token id", token, 0, n_vocab - 1)
    return list(ids)


def check_sequences(name: str, value: Any, n_vocab: int) -> list[tuple[Sequence[int], float]]:
    """The sequences of a control of SEQUENCES with their biases. Raises ValueError as `biased` and `banned`."""
    value = listed(value)
    if value is None or (isinstance(value, (list, tuple, dict)) and not value):
        return []
    if isinstance(value, TokenSequences):
        raise ValueError(f"{name}: TokenSequences; they are for sample_autoregressive: lists of token ids are needed")
    return {"sequence_bias": biased, "bad_words_ids": banned}[name](value, n_vocab)


def per_prompt(name: str, value: Any, n_prompts: int) -> list[Any]:
    """A list of n_prompts values, None among them, from one value or one a prompt; checked.

    Raises:
      ValueError: for a value out of range, or a list whose length differs from the number of prompts.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    is_list = isinstance(value, (list, tuple))
    if is_list and PER_PROMPT[name].shape:  # rather than one value, which is a list itself
        is_list = all(v is None or isinstance(v, (list, tuple)) for v in value)
    if is_list:
        if len(value) != n_prompts:
            prompts = "1 prompt" if n_prompts == 1 else f"{n_prompts} prompts"
            raise ValueError(f"{name} has {len(value)} values for {prompts}; one, or one each, is needed")
        values = list(value)
    else:
        values = [value] * n_prompts
    for v in values:
        if v is not None:
            PER_PROMPT[name].check(name, v)
    return values


def resolve(options: GenerationOptions, defaults: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The numbers of SAMPLING for each prompt, none of them None.

    Args:
      options: GenerationOptions.
      defaults: a list, for each prompt a dict of the values that replace None; what it
        lacks is neutral.

    Returns:
      a dict, name -> ndarray [n_prompts].

    Raises:
      ValueError: for a number out of range, or options that exclude each other.
    """
    given = {name: per_prompt(name, getattr(options, name), len(defaults)) for name in SAMPLING}
    rows = [
        _resolve_row({name: values[i] for name, values in given.items()}, options.do_sample, own)
        for i, own in enumerate(defaults)
    ]
    return {
        name: np.array([row[name] for row in rows], PER_PROMPT[name].dtype).reshape(-1, *PER_PROMPT[name].shape)
        for name in SAMPLING
    }


def check_alone(options: GenerationOptions) -> None:
    """Raises ValueError for what is wrong with a request for one prompt, whatever the model is."""
    check_shared(options, n_vocab=INT32_MAX)
    resolve(options, [{}])
    given = {name: per_prompt(name, getattr(options, name), 1)[0] for name in PER_PROMPT}
    least, most = given["min_new_tokens"], given["max_new_tokens"]
    if least is not None and most is not None:
        check_least_and_most(least, most)


def check_least_and_most(min_new_tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError where a row has to be longer than it may be."""
    if min_new_tokens > max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens} is more than max_new_tokens={max_new_tokens}")


def _resolve_row(given: dict[str, Any], do_sample: bool | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """A prompt's numbers of SAMPLING, from those given, None for some."""
    asks_to_sample = [n for n in ("temperature", *ARGMAX_INVARIANT) if given[n] not in (None, PER_PROMPT[n].neutral)]
    if do_sample is None:
        do_sample = bool(asks_to_sample) or defaults.get("do_sample", True)
    elif do_sample and given["temperature"] == 0:
        raise ValueError("do_sample=True with temperature=0, which is greedy; leave one out")
    elif not do_sample:
        for name in asks_to_sample:
            if name != "temperature" or given[name]:
                raise ValueError(f"{name}={given[name]} with do_sample=False, which is greedy; leave one out")

    if given["mirostat"]:  # in place of what the model has
        defaults = {name: value for name, value in defaults.items() if name not in MASKS}
    elif any(given[name] not in (None, PER_PROMPT[name].neutral) for name in MASKS):
        defaults = {name: value for name, value in defaults.items() if name != "mirostat"}

    def default(name: str) -> Any:
        option = PER_PROMPT[name]
        if name == "temperature" and name not in defaults:
            return SOFTMAX_TEMPERATURE if given["entmax_alpha"] is None else ENTMAX_TEMPERATURE
        value = defaults.get(name, option.unset)
        if value != option.unset:
            check_default(name, value)
        return value

    if not do_sample:
        given = {**given, **{name: PER_PROMPT[name].unset or 0 for name in ("temperature", *ARGMAX_INVARIANT)}}
    if given["min_length"] is not None and given["min_new_tokens"] is not None:
        raise ValueError(
            f"min_length={given['min_length']} with min_new_tokens={given['min_new_tokens']}; leave one out: the first "
            "counts the prompt too"
        )
    if given["min_length"] is not None:  # which takes the place of what the model has
        given = {**given, "min_new_tokens": 0}
    elif given["min_new_tokens"] is not None or "min_new_tokens" in defaults:  # as in transformers
        given = {**given, "min_length": 0}
    row = {name: default(name) if value is None else value for name, value in given.items()}
    check_together(given)
    with of_the_model():
        check_together(row)
    for name, value in given.items():
        of = NUMBERS[name].of
        is_used = do_sample or not NUMBERS[name].argmax_invariant
        if of and value is not None and is_used and all(given[o] is None and o not in defaults for o in of):
            raise ValueError(f"{name}={value:g} without {' or '.join(of)}, which it belongs to")
    return {name: _neutral_if_same(name, value) for name, value in row.items()}


def _neutral_if_same(name: str, value: Any) -> Any:
    """A pair that changes nothing, whatever its start is."""
    return PER_PROMPT[name].neutral if PER_PROMPT[name].shape and value[1] == 1 else value


def check_default(name: str, value: object) -> None:
    """Raises ValueError for a value of generation_config.json that is out of range."""
    with of_the_model():
        PER_PROMPT[name].check(name, value)


@contextlib.contextmanager
def of_the_model() -> Iterator[None]:
    """Where a ValueError is raised, it says that the value is one of generation_config.json."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"the model's generation_config.json: {e}") from None

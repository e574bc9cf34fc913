"""The options of a request besides the controls, resolved to a value for each prompt."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling.sampling.controls import (
    CONTROLS,
    INT32_MAX,
    NUMBERS,
    Control,
    Controls,
    Number,
    check_int,
    control,
    controls_of,
    with_sentences,
)
from gpt_neo_sampling.sampling.defaults import ENTMAX_TEMPERATURE, SOFTMAX_TEMPERATURE
from gpt_neo_sampling.sampling.other_names import check_names

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
    `return_logprobs` says whether samples have their `logprobs` and `draw_logprobs`. docs/sampling.md shows what each
    option does.

    Nothing is checked before a generator has a request to check:

        >>> from gpt_neo_sampling import TextGenerator
        >>> options = GenerationOptions(temperature=0.7, min_p=1.5)
        >>> TextGenerator.from_pretrained().generate("Emma", **vars(options))
        Traceback (most recent call last):
        ValueError: min_p=1.5; a number from 0 to 1 is needed
    """

    bad_words_ids: Sequence[Sequence[int]] | None = control(
        Control("lists of one token id each, never drawn, except stop tokens")
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
    return_logprobs: bool = False

    def __new__(cls, *args: Any, **options: Any) -> "GenerationOptions":
        check_names(cls.__name__, options, cls.__dataclass_fields__)
        return super().__new__(cls)


OPTIONS = controls_of(GenerationOptions)
# Numbers, of which each prompt may have its own.
PER_PROMPT = {name: c for name, c in OPTIONS.items() if isinstance(c, Number)}
SAMPLING = tuple(NUMBERS)  # those that say how a token is drawn
ARGMAX_INVARIANT = tuple(name for name in SAMPLING if PER_PROMPT[name].argmax_invariant)
# Numbers that an exported model may be asked for, besides those that each has.
EXPORTABLE = tuple(n for n in SAMPLING if NUMBERS[n].neutral is not None and n not in ("top_k", "entmax_alpha"))
# All that say how a token is drawn.
TOKEN_OPTIONS = ("logits_processors", *CONTROLS, "bad_words_ids", "eos_token_id", "do_sample")

# Options that all prompts share, and that a generation_config.json may give.
SHARED = ("bad_words_ids", "no_repeat_ngram_size", "num_return_sequences", "stop_strings")


def check_shared(options: GenerationOptions, n_vocab: int) -> None:
    """Raises ValueError if one of SHARED is out of range, but for stop strings."""
    if options.num_return_sequences is not None:
        check_int("num_return_sequences", options.num_return_sequences, 1, INT32_MAX)
    if options.no_repeat_ngram_size is not None:
        check_int("no_repeat_ngram_size", options.no_repeat_ngram_size, 0, INT32_MAX)
    banned = options.bad_words_ids
    if not (banned is None or isinstance(banned, (list, tuple))):
        raise ValueError(f"bad_words_ids={banned!r}; a list is needed, as in [[50256]]")
    for word in banned or ():
        if not isinstance(word, (list, tuple)) or len(word) != 1:
            raise ValueError(f"bad_words_ids: {word!r}; lists of one token id each are supported, as in [[50256]]")
        check_int("bad_words_ids: token id", word[0], 0, n_vocab - 1)


def per_prompt(name: str, value: Any, n_prompts: int) -> list[Any]:
    """A list of n_prompts values, None among them, from one value or one a prompt; checked.

    Raises:
      ValueError: for a value out of range, or a list whose length differs from the number of prompts.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if len(value) != n_prompts:
            raise ValueError(f"{name} has {len(value)} values for {n_prompts} prompts; one, or one each, is needed")
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
    return {name: np.array([row[name] for row in rows], PER_PROMPT[name].dtype) for name in SAMPLING}


def check_alone(options: GenerationOptions) -> None:
    """Raises ValueError for what is wrong with a request for one prompt, whatever the model is."""
    check_shared(dataclasses.replace(options, bad_words_ids=None), n_vocab=INT32_MAX)
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

    def default(name: str) -> Any:
        option = PER_PROMPT[name]
        if name == "temperature" and name not in defaults:
            return SOFTMAX_TEMPERATURE if given["entmax_alpha"] is None else ENTMAX_TEMPERATURE
        value = defaults.get(name, option.neutral)
        if value != option.neutral:
            check_default(name, value)
        return value

    if not do_sample:
        given = {**given, **{name: PER_PROMPT[name].neutral or 0 for name in ("temperature", *ARGMAX_INVARIANT)}}
    return {name: default(name) if value is None else value for name, value in given.items()}


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

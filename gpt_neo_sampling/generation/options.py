"""What a request may ask for: names, ranges, defaults, and a value for each row."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._types import FLOAT32_MAX, LogitsProcessor, is_int, is_real
from gpt_neo_sampling.sampling.next_token import ENTMAX_TEMPERATURE, SOFTMAX_TEMPERATURE

INT32_MAX = 2**31 - 1


def check_int(name: str, value: object, least: float, most: float | None = None) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`, and at most `most` if that is given."""
    if is_int(value) and least <= value:
        if most is None or value <= most:
            return
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    shown = " ".join(repr(value).split())  # an array's has many lines
    raise ValueError(f"{name}={shown}; a whole number {allowed} is needed")


def check_bool(name: str, value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r}; True or False is needed")


@dataclasses.dataclass(frozen=True)
class RowOption:
    """A number that each row of a batch may have its own of."""

    name: str
    least: float
    most: float = float("inf")
    neutral: float | None = None  # what changes nothing; None where every value says something
    whole: bool = False
    above_least: bool = False  # `least` itself is out of range
    below_most: bool = False  # and so is `most`

    @property
    def dtype(self) -> type[np.number]:
        return np.int32 if self.whole else np.float32

    def check(self, value: object) -> None:
        """Raises ValueError for a value that is no such number, or out of range."""
        if not is_real(value):
            raise ValueError(f"{self.name}={value!r}; a number is needed")
        if self.whole:
            check_int(self.name, value, self.least, self.most)
            return
        fits = abs(value) <= FLOAT32_MAX  # NaN is not
        if fits:
            number = float(np.float32(value))  # as which it is used
            fits = self.least <= number <= self.most
            fits = fits and not (self.above_least and number == self.least or self.below_most and number == self.most)
        if not fits:
            raise ValueError(f"{self.name}={value!r}; {self._allowed} is needed")

    @property
    def _allowed(self) -> str:
        if abs(self.least) == float("inf"):
            return "a finite number"
        if self.most == float("inf"):
            return f"a finite number {'above' if self.above_least else 'of at least'} {self.least}"
        first = f"{'above' if self.above_least else 'from'} {self.least}"
        return f"a number {first} to {'below ' if self.below_most else ''}{self.most}"


# By transformers' names (presence and frequency: OpenAI's), in the order of application.
ROW_OPTIONS = {
    option.name: option
    for option in (
        RowOption("repetition_penalty", 0, neutral=1, above_least=True),
        RowOption("presence_penalty", -float("inf"), neutral=0),
        RowOption("frequency_penalty", -float("inf"), neutral=0),
        RowOption("min_new_tokens", 0, INT32_MAX, neutral=0, whole=True),
        RowOption("temperature", 0),
        RowOption("top_k", 0, INT32_MAX, neutral=0, whole=True),
        RowOption("top_p", 0, 1, neutral=1),
        RowOption("min_p", 0, 1, neutral=0),
        RowOption("typical_p", 0, 1, neutral=1, above_least=True),
        RowOption("epsilon_cutoff", 0, 1, neutral=0, below_most=True),
        RowOption("eta_cutoff", 0, 1, neutral=0, below_most=True),
        RowOption("entmax_alpha", 1, 2, neutral=1),
        RowOption("max_new_tokens", 1, INT32_MAX, whole=True),
        RowOption("seed", -(2**31), 2**32 - 1, whole=True),
        RowOption("stream", -(2**31), INT32_MAX, whole=True),
    )
}

# What has no say where the likeliest token is taken.
SAMPLING_ONLY = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "entmax_alpha")


PerPrompt = float | Sequence[float | None] | np.ndarray | None  # one for all prompts, or one a prompt


@dataclasses.dataclass
class GenerationOptions:
    """What `TextGenerator.generate` may be asked for, by the names of Hugging Face's `generate`.

    Numbers marked † may also be lists, with a value for each prompt. None is the
    model's own, if its generation_config.json gives one (see
    `Checkpoint.generation_defaults`), and else as said here. In the order of
    application (docs/sampling.md shows what each does):

        logits_processors     functions of (logits, ids, position) on mtf tensors, see `sample_autoregressive`; a graph
                              is built for each set of them, so hand over the same objects again
        repetition_penalty    † above 1: tokens of the row, prompt included, get less likely; 1
        presence_penalty      † taken from the logits of the row's new tokens; 0
        frequency_penalty     † the same, for each time that they stand there; 0
        no_repeat_ngram_size  int: no sequence of so many tokens comes twice; 0, off
        logit_bias            dict, token id -> what is added to its logit; none
        bad_words_ids         list of lists of one token id each, which are never drawn but for stop tokens; none
        min_new_tokens        † int: no stop token before there are so many new ones (a stop string may end the
                              text earlier); 0
        do_sample             False: greedy decoding, the likeliest token each time. None: True, also where the model
                              says otherwise and a prompt has a temperature or an option that only sampling has
        temperature           † larger is more random, 0 is greedy; 0.9, with entmax_alpha 1.0
        top_k                 † int: draw from the k likeliest tokens alone; 0, all
        top_p                 † from the fewest likeliest tokens that have this probability together; 1
        min_p                 † from tokens at least this times as likely as the likeliest; 0
        typical_p             † from the fewest tokens with this probability whose information is nearest the mean; 1
        epsilon_cutoff        † from tokens at least this likely; 0
        eta_cutoff            † the same, less where the distribution is flat; 0
        entmax_alpha          † from 1 to 2: entmax in place of softmax, the larger the fewer tokens; softmax

        max_new_tokens        † int, at least 1; 64, or up to the model's max_length, prompt included. A row ends
                              earlier at a stop token or stop string and, with a warning, at the end of the context
        eos_token_id          the stop token or a list of at most 256; −1 for none; none
        stop_strings          a str or a list: a row ends once its text holds one; the text ends ahead of it; none
        seed                  † int: the same seed, stream and prompt give the same tokens; a fresh one
        stream                † int: what tells rows of one seed apart; samples of a prompt count on from it, so a list
                              leaves room for them. From 0 on
        num_return_sequences  int: samples of each prompt, which share the pass over it; 1
        pad_token_id          taken for the sake of scripts: what is returned has no padding, so it changes nothing
        return_logprobs       whether samples have their `logprobs` and `draw_logprobs`; False

    Nothing is checked before a generator has a request to check:

        >>> from gpt_neo_sampling import TextGenerator
        >>> options = GenerationOptions(temperature=0.7, top_p=1.5)
        >>> TextGenerator.from_pretrained().generate("Emma", **vars(options))
        Traceback (most recent call last):
        ValueError: top_p=1.5; a number from 0 to 1 is needed
    """

    logits_processors: Sequence[LogitsProcessor] = ()
    repetition_penalty: PerPrompt = None
    presence_penalty: PerPrompt = None
    frequency_penalty: PerPrompt = None
    no_repeat_ngram_size: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_new_tokens: PerPrompt = None
    do_sample: bool | None = None
    temperature: PerPrompt = None
    top_k: PerPrompt = None
    top_p: PerPrompt = None
    min_p: PerPrompt = None
    typical_p: PerPrompt = None
    epsilon_cutoff: PerPrompt = None
    eta_cutoff: PerPrompt = None
    entmax_alpha: PerPrompt = None
    max_new_tokens: PerPrompt = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    seed: PerPrompt = None
    stream: PerPrompt = None
    num_return_sequences: int | None = None
    pad_token_id: int | None = None
    return_logprobs: bool = False


def per_prompt(name: str, value: Any, n_prompts: int) -> list[Any]:
    """A list of n_prompts values, None among them, from one value or one a prompt; checked.

    Raises:
      ValueError: for a value out of range, or as many values as there are no prompts.
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
            ROW_OPTIONS[name].check(v)
    return values


# What says how a token is drawn, and the rest of ROW_OPTIONS says where and how often.
SAMPLING = tuple(name for name in ROW_OPTIONS if name not in ("max_new_tokens", "seed", "stream"))
# The same, and what all rows have in common.
TOKEN_OPTIONS = (*SAMPLING, "no_repeat_ngram_size", "logit_bias", "bad_words_ids", "eos_token_id", "do_sample",
                 "logits_processors")  # fmt: skip


def resolve(options: GenerationOptions, defaults: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The numbers of SAMPLING for each prompt, none of them None.

    Args:
      options: GenerationOptions.
      defaults: a list, for each prompt a dict of what stands for None; what it
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
    return {name: np.array([row[name] for row in rows], ROW_OPTIONS[name].dtype) for name in SAMPLING}


def _resolve_row(given: dict[str, Any], do_sample: bool | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """A prompt's numbers of SAMPLING, from those given, None for some."""
    asks_to_sample = [n for n in ("temperature", *SAMPLING_ONLY) if given[n] not in (None, ROW_OPTIONS[n].neutral)]
    if do_sample is None:
        do_sample = bool(asks_to_sample) or defaults.get("do_sample", True)
    elif do_sample and given["temperature"] == 0:
        raise ValueError("do_sample=True with temperature=0, which is greedy; leave one out")
    elif not do_sample:
        for name in asks_to_sample:
            if name != "temperature" or given[name]:
                raise ValueError(f"{name}={given[name]} with do_sample=False, which is greedy; leave one out")

    def default(name: str) -> Any:
        option = ROW_OPTIONS[name]
        if name == "temperature" and name not in defaults:
            return SOFTMAX_TEMPERATURE if given["entmax_alpha"] is None else ENTMAX_TEMPERATURE
        value = defaults.get(name, option.neutral)
        if value != option.neutral:
            check_default(name, value)
        return value

    if not do_sample:
        given = {**given, **{name: ROW_OPTIONS[name].neutral or 0 for name in ("temperature", *SAMPLING_ONLY)}}
    return {name: default(name) if value is None else value for name, value in given.items()}


def check_default(name: str, value: object) -> None:
    """Raises ValueError for a value of generation_config.json that is out of range."""
    with of_the_model():
        ROW_OPTIONS[name].check(value)


@contextlib.contextmanager
def of_the_model() -> Iterator[None]:
    """Where a ValueError is raised, it says that the value is one of generation_config.json."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"the model's generation_config.json: {e}") from None

"""Every control of sampling, once: its name, its range, what it does and which function does it.

The fields of `Controls` are in the order in which they are applied. The keywords of `sample_autoregressive`,
`GenerationOptions`, the command's options, prompts files, exports, generation_config.json, `inspect` and the table in
docs/sampling.md follow from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypedDict, TypeVar, cast

import numpy as np

from gpt_neo_sampling._compat import LazyModule, mtf, tf
from gpt_neo_sampling._types import FLOAT32_MAX, LogitsProcessor, RowValue, Tensor, TokenSet, is_int, is_real
from gpt_neo_sampling.sampling import token_sequences
from gpt_neo_sampling.sampling.defaults import DEFAULT_ALPHA, ENTMAX_TEMPERATURE, MOST_TO_KEEP, SOFTMAX_TEMPERATURE
from gpt_neo_sampling.sampling.token_sequences import TokenSequences

if TYPE_CHECKING:
    from gpt_neo_sampling.mesh import ops
    from gpt_neo_sampling.sampling import dry, masks, penalties, prefix_function, random
    from gpt_neo_sampling.sampling.prefix_function import PrefixFunctions
else:  # they define operations of mesh-tensorflow; the list can be read without
    ops = LazyModule("gpt_neo_sampling.mesh.ops")
    dry = LazyModule("gpt_neo_sampling.sampling.dry")
    random = LazyModule("gpt_neo_sampling.sampling.random")
    masks = LazyModule("gpt_neo_sampling.sampling.masks")
    penalties = LazyModule("gpt_neo_sampling.sampling.penalties")
    prefix_function = LazyModule("gpt_neo_sampling.sampling.prefix_function")
    PrefixFunctions = Any

Class = TypeVar("Class")
KEEP_SOME = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # the masks that min_tokens_to_keep is of
MOST_TOP_LOGPROBS = 1024
INT32_MAX = 2**31 - 1
INF = float("inf")


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


@dataclasses.dataclass
class History:
    """The rows before the token that is drawn.

    Attributes:
      ids: int32 mtf.Tensor [rows, length]: prompts, new tokens, padding.
      position: int32 mtf.Tensor [rows]: where the next token goes.
      begin: int32 mtf.Tensor [rows]: where the first new one went.
      limit: int32 mtf.Tensor [rows]: where no new one goes, as the row may not be that long; None where no row ends so.
      done: bool mtf.Tensor [rows]: rows that get no token any more; None for none.
    """

    ids: mtf.Tensor
    position: mtf.Tensor
    begin: mtf.Tensor
    limit: mtf.Tensor | None = None
    done: mtf.Tensor | None = None


@dataclasses.dataclass
class Draw:
    """What a step may ask about the draw that it is part of.

    Attributes:
      bits: a function of a level, an int, to the 32 random bits that a control of its own draws there: int32 mtf.Tensor
        [rows]. Levels of controls are in `random`.
      states: name -> mtf.Tensor [rows], of the controls that keep one from step to step.
    """

    bits: Callable[[int], mtf.Tensor]
    states: dict[str, mtf.Tensor] = dataclasses.field(default_factory=dict)


TokenStep = Callable[["mtf.Tensor", "mtf.Dimension", "SamplingOptions", History], "mtf.Tensor"]
MaskStep = Callable[["mtf.Tensor", "mtf.Dimension", "SamplingOptions", "Draw | None"], "mtf.Tensor"]


@dataclasses.dataclass(frozen=True)
class Control:
    """The facts about a control.

    Attributes:
      help: what it does, in a sentence: the command's help and the guide's table.
      token_step: the function that applies it before the temperature, for greedy decoding too. Neighbouring fields with
        the same function are one step.
      mask_step: the function that applies it after the temperature.
      argmax_invariant: whether greedy decoding skips it: it keeps the likeliest token or, like typical_p, has a say in
        sampling only.
      keeps_state: whether it has a number a row that lasts from step to step: see `next_token.initial_states`.
    """

    help: str
    token_step: TokenStep | None = None
    mask_step: MaskStep | None = None
    argmax_invariant: bool = False
    keeps_state: bool = False


@dataclasses.dataclass(frozen=True)
class Number(Control):
    """A control that is a number; each row of a batch may have its own.

    Attributes:
      least, most: its range.
      above_least, below_most: whether that end itself is out of range.
      neutral: the number that changes nothing; None if every number has an effect.
      whole: whether it is an int32 rather than a float32.
      of: the names of the controls that this belongs to, of which one is needed with it.
      default: with `of`, the number that counts where none is given.
    """

    least: float = -INF
    most: float = INF
    neutral: Any = None
    whole: bool = False
    above_least: bool = False
    below_most: bool = False
    of: tuple[str, ...] = ()
    default: float | None = None

    shape: ClassVar[tuple[int, ...]] = ()  # of one row's value

    @property
    def unset(self) -> Any:
        """The number where none is given: None if there is none."""
        return self.default if self.of else self.neutral

    def as_text(self, value: Any) -> str:
        return f"{value:g}"

    @property
    def dtype(self) -> type[np.number]:
        return np.int32 if self.whole else np.float32

    def check(self, name: str, value: object) -> None:
        """Raises ValueError for a value that is not a number or out of range."""
        if not is_real(value):
            raise ValueError(f"{name}={value!r}; a number is needed")
        if self.whole:
            check_int(name, value, self.least, self.most)
            return
        fits = abs(value) <= FLOAT32_MAX  # NaN does not
        if fits:
            number = float(np.float32(value))  # as which it is used
            fits = self.least <= number <= self.most
            fits = fits and not (self.above_least and number == self.least or self.below_most and number == self.most)
        if not fits:
            raise ValueError(f"{name}={value!r}; {self._allowed} is needed")

    @property
    def _allowed(self) -> str:
        if abs(self.least) == INF:
            return "a finite number"
        if self.most == INF:
            return f"a finite number {'above' if self.above_least else 'of at least'} {self.least}"
        first = f"{'above' if self.above_least else 'from'} {self.least}"
        return f"a number {first} to {'below ' if self.below_most else ''}{self.most}"


@dataclasses.dataclass(frozen=True)
class Decay(Number):
    """exponential_decay_length_penalty: a pair of a whole number and a factor."""

    shape: ClassVar[tuple[int, ...]] = (2,)

    def check(self, name: str, value: object) -> None:
        wanted = "a pair (start, factor), a whole number below 2**24 and a finite number of at least 2**-126,"
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(is_real, value)):
            raise ValueError(f"{name}={value!r}; {wanted} is needed")
        start, factor = value
        if not (0 <= start < 2**24 and start == int(start) and 2.0**-126 <= factor <= FLOAT32_MAX):
            raise ValueError(f"{name}={value!r}; {wanted} is needed")

    def as_text(self, value: Any) -> str:
        return "({:g}, {:g})".format(*value)


@dataclasses.dataclass(frozen=True)
class Tokens(Control):
    """A control that is a set of tokens: a list of ids, the same for all rows."""


@dataclasses.dataclass(frozen=True)
class Sequences(Control):
    """A control that is made of sequences of tokens, the same for all rows."""


def control(facts: Control) -> Any:
    """A dataclass's field with a Control, None by default."""
    return dataclasses.field(default=None, metadata={"control": facts})


def with_sentences(options: type[Class]) -> type[Class]:
    """Adds the sentences of a dataclass's controls to its docstring, for `help`."""
    sentences = [f"        {name:21} {control.help}\n" for name, control in controls_of(options).items()]
    heading = "In a sentence each (the order of application: docs/sampling.md):"
    options.__doc__ = f"{options.__doc__}\n    {heading}\n\n{''.join(sentences)}    "
    return options


def controls_of(options: type[Any]) -> dict[str, Control]:
    """name -> Control, of the fields of a dataclass that have one."""
    return {f.name: f.metadata["control"] for f in dataclasses.fields(options) if "control" in f.metadata}


# --- Steps ahead of the temperature ------------------------------------------------------


def _bias_sequences(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return _with_sequences(token_sequences.biased, options.sequence_bias, x, dim, options, history)


def _with_sequences(
    checked: Callable[[Any, int], Any],
    given: Any,
    x: mtf.Tensor,
    dim: mtf.Dimension,
    options: SamplingOptions,
    history: History,
) -> mtf.Tensor:
    """given: TokenSequences, or what `checked` takes with the size of the vocabulary."""
    if not isinstance(given, TokenSequences):
        given = TokenSequences.of(checked(given, options.vocab_size or dim.size))
    return penalties.sequence_bias(x, given, history.ids, history.position, dim)


def _penalise_repetition(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return penalties.repetition_penalty(
        x, penalties.token_counts(history.ids, dim, end=history.position), options.repetition_penalty, dim
    )


def _penalise_new_tokens(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    counts = penalties.token_counts(history.ids, dim, begin=history.begin, end=history.position)
    presence, frequency = options.number("presence_penalty"), options.number("frequency_penalty")
    return penalties.presence_frequency_penalty(x, counts, presence, frequency, dim)


def _penalise_sequences(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    breakers = None
    if options.changes("dry_sequence_breakers"):
        breakers = penalties.token_flags(x.mesh, options.dry_sequence_breakers, dim, "dry_sequence_breakers")
    multiplier, base, least = map(options.number, ("dry_multiplier", "dry_base", "dry_allowed_length"))
    return dry.dry_penalty(x, history.ids, history.position, multiplier, base, least, breakers, dim)


def _mask_ngrams(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    size = cast(int, options.no_repeat_ngram_size)
    return penalties.no_repeat_ngram_mask(x, history.ids, history.position, size, dim)


def _add_bias(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return penalties.logit_bias(x, options.logit_bias, dim)


def _ban_words(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return _with_sequences(token_sequences.banned, options.bad_words_ids, x, dim, options, history)


def _mask_early_stop(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    def too_early(at: tf.Tensor, begin: tf.Tensor, least: tf.Tensor, least_new: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.logical_or(at < least, at - begin < least_new), tf.float32)

    least = [
        ops.import_rows(x.mesh, options.number(name), tf.int32, x.shape - dim, name)
        for name in ("min_length", "min_new_tokens")
    ]
    when = ops.cwise_broadcast(too_early, [history.position, history.begin, *least], None, tf.float32)
    return penalties.tokens_mask(x, options.stop_tokens, dim, when=when)


def _ask_prefix_function(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return prefix_function.prefix_mask(
        x, options.prefix_allowed_tokens_fn, history.ids, history.position, history.done, dim, options.vocab_size
    )


def _allow_tokens(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return penalties.token_set_mask(x, options.allowed_token_ids, dim, allowed=True, name="allowed_token_ids")


def _force_end(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    if history.limit is None:
        return x
    is_last = ops.cwise_broadcast(
        lambda at, limit: tf.cast(at >= limit - 1, tf.float32), [history.position, history.limit], None, tf.float32
    )
    return penalties.force_tokens(x, options.forced_eos_token_id, is_last, dim, "forced_eos_token_id")


def _grow_towards_end(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    start, factor = cast(Sequence[RowValue], options.exponential_decay_length_penalty)
    start = ops.import_rows(x.mesh, start, tf.int32, x.shape - dim, "exponential_decay_length_penalty")
    n_late = ops.cwise_broadcast(lambda at, begin, n: at - begin - n, [history.position, history.begin, start])
    most = history.ids.shape[-1].size
    return penalties.exponential_decay(x, options.stop_tokens, n_late, factor, most, dim)


def _suppress_tokens(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return penalties.token_set_mask(x, options.suppress_tokens, dim, name="suppress_tokens")


def _suppress_at_begin(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    is_first = ops.cwise_broadcast(
        lambda at, begin: tf.cast(at <= begin, tf.float32), [history.position, history.begin], None, tf.float32
    )
    tokens = options.begin_suppress_tokens
    return penalties.token_set_mask(x, tokens, dim, when=is_first, name="begin_suppress_tokens")


# --- Steps after the temperature --------------------------------------------------------


def _exclude_top(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, draw: Draw | None) -> mtf.Tensor:
    bits = cast("Draw", draw).bits(random.XTC_LEVEL)
    return masks.xtc_mask(x, options.number("xtc_probability"), options.number("xtc_threshold"), bits, dim)


def _follow_surprise(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, draw: Draw | None) -> mtf.Tensor:
    return masks.mirostat_mask(x, cast("Draw", draw).states["mirostat"], dim)


# --- The list ----------------------------------------------------------------------------------

Value = TypeVar("Value")  # of a number: what a caller may give


def _mask(name: str, help: str, neutral: float, **facts: Any) -> Any:
    """A control that greedy decoding skips, by the mask of this name; by default a number from 0 to 1."""
    facts = {"least": 0, "most": 1, "neutral": neutral, **facts}
    option = name.removesuffix("_mask")
    option = {"epsilon": "epsilon_cutoff", "eta": "eta_cutoff"}.get(option, option)

    def step(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, draw: Draw | None) -> mtf.Tensor:
        more = {} if options.min_tokens_to_keep is None or option not in KEEP_SOME else {
            "min_tokens_to_keep": options.min_tokens_to_keep}  # fmt: skip
        return getattr(masks, name)(x, getattr(options, option), dim, **more)

    return control(Number(help, mask_step=step, argmax_invariant=True, **facts))


@with_sentences
@dataclasses.dataclass
class Controls(Generic[Value]):
    """The controls, in the order in which they are applied; None leaves one out. By transformers' names where it has
    them; presence and frequency are OpenAI's, top_n_sigma is llama.cpp's."""

    logits_processors: Sequence[LogitsProcessor] = ()  # the caller's own, applied first
    # what looks at the row so far, or at tokens by their names
    sequence_bias: Any = control(
        Sequences("added to the logit of a sequence's last token, where a row ends with its others",
                  _bias_sequences))  # fmt: skip
    repetition_penalty: Value | None = control(
        Number("above 1, tokens that the row holds, its prompt included, get less likely", _penalise_repetition,
               least=0, above_least=True, neutral=1))  # fmt: skip
    presence_penalty: Value | None = control(
        Number("tokens of the new text lose this much of their logit, once", _penalise_new_tokens,
               neutral=0))  # fmt: skip
    frequency_penalty: Value | None = control(
        Number("the same for each time that they occur", _penalise_new_tokens, neutral=0))  # fmt: skip
    dry_multiplier: Value | None = control(
        Number("tokens that would continue a repeated sequence lose this much of their logit, times a power of "
               "dry_base", _penalise_sequences, least=0, neutral=0))  # fmt: skip
    dry_base: Value | None = control(
        Number("of dry_multiplier: the penalty grows by this factor for each token of the sequence", least=1,
               of=("dry_multiplier",), default=1.75))  # fmt: skip
    dry_allowed_length: Value | None = control(
        Number("of dry_multiplier: shorter sequences are free to repeat", least=1, most=INT32_MAX, whole=True,
               of=("dry_multiplier",), default=2))  # fmt: skip
    dry_sequence_breakers: TokenSet | None = control(
        Tokens('of dry_multiplier: texts or token ids at which a sequence ends (default: a newline, :, " and *)')
    )
    no_repeat_ngram_size: int | None = control(
        Control("no sequence of this many tokens occurs twice", _mask_ngrams))  # fmt: skip
    logit_bias: dict[int, float] | Tensor | None = control(
        Control("added to the logits of single tokens", _add_bias))  # fmt: skip
    bad_words_ids: Any = control(
        Sequences("sequences of token ids that never come up whole, but for a stop token by itself",
                  _ban_words))  # fmt: skip
    min_length: Value | None = control(
        Number("no stop token before the row has this many tokens, its prompt included", _mask_early_stop,
               least=0, most=INT32_MAX, neutral=0, whole=True))  # fmt: skip
    min_new_tokens: Value | None = control(
        Number("no stop token before there are this many new tokens; a stop string may end the text earlier",
               _mask_early_stop, least=0, most=INT32_MAX, neutral=0, whole=True))  # fmt: skip
    prefix_allowed_tokens_fn: Any = control(
        Control("a Python function of (row, ids so far) to the ids that may come next", _ask_prefix_function)
    )
    allowed_token_ids: TokenSet | None = control(Tokens("no other tokens are drawn", _allow_tokens))
    forced_eos_token_id: TokenSet | None = control(
        Tokens("the last token that a row has room for is this one, or one of these", _force_end)
    )
    exponential_decay_length_penalty: Any = control(
        Decay("(start, factor): after so many new tokens stop tokens get likelier, by the factor for each token more",
              _grow_towards_end, neutral=(0, 1.0)))  # fmt: skip
    suppress_tokens: TokenSet | None = control(Tokens("tokens that are never drawn", _suppress_tokens))
    begin_suppress_tokens: TokenSet | None = control(
        Tokens("tokens that are never drawn as the first new one", _suppress_at_begin)
    )
    temperature: Value | None = control(
        Number("divides the logits: larger is more random, 0 takes the likeliest token (default: "
               f"{SOFTMAX_TEMPERATURE}; with entmax {ENTMAX_TEMPERATURE})", least=0))  # fmt: skip
    dynatemp_range: Value | None = control(
        Number("the temperature is up to this much lower where the model is sure, and higher where it is not",
               argmax_invariant=True, least=0, neutral=0))  # fmt: skip
    dynatemp_exponent: Value | None = control(
        Number("of dynatemp_range: above 1, it is lower more often than higher", argmax_invariant=True, least=0,
               of=("dynatemp_range",), default=1.0))  # fmt: skip
    # what keeps the likelier tokens
    min_tokens_to_keep: Value | None = control(
        Number("of top_p, min_p, typical_p, epsilon_cutoff and eta_cutoff: each leaves at least this many tokens",
               argmax_invariant=True, least=1, most=MOST_TO_KEEP, whole=True, of=KEEP_SOME, default=1))  # fmt: skip
    top_n_sigma: Value | None = _mask(
        "top_n_sigma_mask", "keeps logits within this many standard deviations of the largest",
        neutral=0, most=INF)  # fmt: skip
    top_h: Value | None = _mask(
        "top_h_mask", "of the 100 likeliest tokens keeps the fewest that together have this part of their entropy",
        neutral=0)  # fmt: skip
    top_k: Value | None = control(  # `next_token` applies it: it needs max_top_k too, and may draw from the k alone
        Number("keeps this many of the likeliest tokens",
               argmax_invariant=True, least=0, most=INT32_MAX, neutral=0, whole=True))  # fmt: skip
    top_p: Value | None = _mask(
        "top_p_mask", "keeps the fewest tokens that together have this probability", neutral=1)  # fmt: skip
    min_p: Value | None = _mask(
        "min_p_mask", "keeps tokens at least this many times as likely as the likeliest",
        neutral=0)  # fmt: skip
    typical_p: Value | None = _mask(
        "typical_p_mask", "keeps the fewest tokens that together have this probability, nearest the mean "
        "information first", neutral=1, above_least=True)  # fmt: skip
    epsilon_cutoff: Value | None = _mask(
        "epsilon_mask", "keeps tokens of at least this probability",
        neutral=0, below_most=True)  # fmt: skip
    eta_cutoff: Value | None = _mask(
        "eta_mask", "the same, with a lower bar where the distribution is flat",
        neutral=0, below_most=True)  # fmt: skip
    xtc_probability: Value | None = control(
        Number("with this chance cuts all tokens whose probability is at least xtc_threshold, but for the least likely "
               "of them", mask_step=_exclude_top, argmax_invariant=True, least=0, most=1, neutral=0))  # fmt: skip
    xtc_threshold: Value | None = control(
        Number("of xtc_probability; above 0.5 it cuts nothing", argmax_invariant=True, least=0, most=1,
               of=("xtc_probability",), default=0.1))  # fmt: skip
    mirostat: Value | None = control(
        Number("2 keeps the surprise of new tokens near mirostat_tau, by a bar that follows what was drawn; in place "
               "of all masks", mask_step=_follow_surprise, argmax_invariant=True, keeps_state=True, least=0, most=2,
               neutral=0, whole=True))  # fmt: skip
    mirostat_tau: Value | None = control(
        Number("of mirostat: the surprise to aim at, in bits", argmax_invariant=True, least=0, of=("mirostat",),
               default=5.0))  # fmt: skip
    mirostat_eta: Value | None = control(
        Number("of mirostat: how fast the bar follows", argmax_invariant=True, least=0, of=("mirostat",),
               default=0.1))  # fmt: skip
    entmax_alpha: Value | None = control(
        Number("entmax in place of softmax: the larger, the fewer tokens; 1 is softmax, 2 sparsemax",
               argmax_invariant=True, neutral=1, least=1, most=2))  # fmt: skip


CONTROLS = controls_of(Controls)
NUMBERS = {name: c for name, c in CONTROLS.items() if isinstance(c, Number)}
# What keeps the likelier tokens, in place of which mirostat stands.
MASKS = tuple(
    name for name, c in NUMBERS.items() if (c.mask_step or name in ("top_k", "entmax_alpha")) and name != "mirostat"
)
TOKEN_SETS = tuple(name for name, c in CONTROLS.items() if isinstance(c, Tokens))
SEQUENCES = tuple(name for name, c in CONTROLS.items() if isinstance(c, Sequences))


def check_together(numbers: Mapping[str, Any]) -> None:
    """Raises ValueError for what is wrong with a row's numbers of NUMBERS together; None and tensors pass."""
    if is_real(numbers["mirostat"]) and numbers["mirostat"] == 1:
        raise ValueError("mirostat=1 is not built; 2, or 0 for none, is allowed")
    if is_real(numbers["mirostat"]) and numbers["mirostat"]:
        for name, value in numbers.items():
            number = NUMBERS[name]
            if name in MASKS and is_real(value) and value != number.neutral:
                raise ValueError(
                    f"mirostat=2 with {name}={value:g}; mirostat takes the place of all masks: leave one out"
                )


def numbers_of(name: str, options: SamplingOptions) -> list[str]:
    """Those that are given of the numbers that belong to a control alone: xtc_threshold is xtc_probability's."""
    return [of for of, number in NUMBERS.items() if number.of == (name,) and getattr(options, of) is not None]


# --- What a loop is given --------------------------------------------------------------


class ControlKeywords(TypedDict, total=False):
    """The same names for type checkers and editors, as keywords; temperature and top-k are arguments of GPT-Neo's."""

    logits_processors: Sequence[LogitsProcessor]
    sequence_bias: dict[tuple[int, ...], float] | Sequence[Any] | TokenSequences | None
    repetition_penalty: RowValue | None
    presence_penalty: RowValue | None
    frequency_penalty: RowValue | None
    dry_multiplier: RowValue | None
    dry_base: RowValue | None
    dry_allowed_length: RowValue | None
    dry_sequence_breakers: TokenSet | None
    no_repeat_ngram_size: int | None
    logit_bias: Tensor | None
    bad_words_ids: Sequence[Sequence[int]] | TokenSequences | None
    min_length: RowValue | None
    min_new_tokens: RowValue | None
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | PrefixFunctions | None
    allowed_token_ids: TokenSet | None
    forced_eos_token_id: TokenSet | None
    exponential_decay_length_penalty: tuple[RowValue, RowValue] | None
    suppress_tokens: TokenSet | None
    begin_suppress_tokens: TokenSet | None
    dynatemp_range: RowValue | None
    dynatemp_exponent: RowValue | None
    min_tokens_to_keep: RowValue | None
    top_n_sigma: RowValue | None
    top_h: RowValue | None
    top_p: RowValue | None
    min_p: RowValue | None
    typical_p: RowValue | None
    epsilon_cutoff: RowValue | None
    eta_cutoff: RowValue | None
    xtc_probability: RowValue | None
    xtc_threshold: RowValue | None
    mirostat: RowValue | None
    mirostat_tau: RowValue | None
    mirostat_eta: RowValue | None
    entmax_alpha: RowValue | None


@with_sentences
@dataclasses.dataclass
class SamplingOptions(Controls[RowValue]):
    """How a token is drawn from its logits: the controls, and what the loop adds to them.

    A number may be a Python number or an mtf tensor, scalar or one a row.

    Attributes:
      logits_processors: functions of (logits, ids, position), as of `sample_autoregressive`.
      temperature: above 0; 0 is argmax.
      max_top_k: an int, needed where top_k is a tensor.
      use_entmax: True for entmax in place of softmax; entmax_alpha, 1.3 by default, is for it only.
      stop_tokens: a tuple of ids, each a number as above.
      never_end: True for no stop token at all.
      vocab_size: None, or where the vocabulary is padded an int: ids from there on are never drawn.
    """

    temperature: RowValue = SOFTMAX_TEMPERATURE
    max_top_k: int | None = None
    use_entmax: bool = False
    stop_tokens: tuple[RowValue, ...] = ()
    never_end: bool = False
    vocab_size: int | None = None

    def check(self) -> None:
        """Looks at the numbers.

        Raises:
          ValueError: for one that is out of range.
        """
        for name, number in NUMBERS.items():
            value = getattr(self, name)
            if is_real(value) or (number.shape and value is not None and all(map(is_real, value))):
                number.check(name, value)
            if number.of and value is not None and not any(map(self.changes, number.of)):
                raise ValueError(f"{name}={value!r} without {' or '.join(number.of)}, which it belongs to")
        check_together({name: getattr(self, name) for name in NUMBERS})
        if self.use_entmax and is_real(self.mirostat) and self.mirostat:
            raise ValueError("mirostat=2 with sampling_use_entmax=True; leave one out")
        if isinstance(self.allowed_token_ids, (list, tuple)) and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids=[]; at least one token id is needed")
        if self.entmax_alpha is not None and not self.use_entmax:
            raise ValueError(
                "entmax_alpha is given, but entmax is not used; sampling_use_entmax=True is needed with it"
            )

    @property
    def alpha(self) -> RowValue:
        """entmax_alpha, or its default."""
        return DEFAULT_ALPHA if self.entmax_alpha is None else self.entmax_alpha

    def changes(self, name: str) -> bool:
        """Whether the control of this name is given, and not as the number that changes nothing."""
        value, control = getattr(self, name), CONTROLS[name]
        if value is None or (isinstance(control, Number) and control.of):
            return False
        if isinstance(value, (list, tuple, dict)):
            return len(value) > 0 and not (isinstance(control, Decay) and is_real(value[1]) and value[1] == 1)
        return not (isinstance(control, Number) and is_real(value) and value == control.neutral)

    def number(self, name: str) -> RowValue:
        """The number of the control of this name, or what counts where it is not given."""
        value = getattr(self, name)
        return cast(RowValue, NUMBERS[name].unset if value is None else value)

    def imported(self, mesh: mtf.Mesh, rows: mtf.Shape) -> SamplingOptions:
        """The same with its tensors imported into the mesh, once for all steps of a loop; numbers stay as they are.

        Args:
          mesh: mtf.Mesh.
          rows: mtf.Shape, the dims of the request.

        Returns:
          SamplingOptions.

        Raises:
          ValueError: for a tensor that is neither scalar nor one a row.
        """

        def per_row(name: str, value: Any, whole: bool) -> Any:
            if value is None or is_real(value):
                return value
            if isinstance(NUMBERS.get(name), Decay):
                return tuple(
                    per_row(of, v, whole)
                    for of, v, whole in zip((f"{name}: start", f"{name}: factor"), value, (True, False))
                )
            return ops.force_allreduce(ops.import_rows(mesh, value, tf.int32 if whole else tf.float32, rows, name))

        bias = self.logit_bias
        numbers: dict[str, Any] = {name: per_row(name, getattr(self, name), n.whole) for name, n in NUMBERS.items()}
        return dataclasses.replace(
            self,
            stop_tokens=tuple(cast(RowValue, per_row("stop_at_token", t, True)) for t in self.stop_tokens),
            logit_bias=ops.force_allreduce(bias) if isinstance(bias, mtf.Tensor) else bias,
            **numbers,
        )

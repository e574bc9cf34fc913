"""Every control of sampling, once: its name, its range, what it does and which function does it.

The fields of `Controls` are in the order in which they are applied. The keywords of `sample_autoregressive`,
`GenerationOptions`, the command's options, prompts files, exports, generation_config.json, `inspect` and the table in
docs/sampling.md follow from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, cast

import numpy as np

from gpt_neo_sampling._compat import LazyModule, mtf, tf
from gpt_neo_sampling._types import FLOAT32_MAX, LogitsProcessor, RowValue, Tensor, is_int, is_real
from gpt_neo_sampling.sampling.defaults import DEFAULT_ALPHA, ENTMAX_TEMPERATURE, SOFTMAX_TEMPERATURE

if TYPE_CHECKING:
    from gpt_neo_sampling.mesh import ops
    from gpt_neo_sampling.sampling import masks, penalties
else:  # they define operations of mesh-tensorflow; the list can be read without
    ops = LazyModule("gpt_neo_sampling.mesh.ops")
    masks = LazyModule("gpt_neo_sampling.sampling.masks")
    penalties = LazyModule("gpt_neo_sampling.sampling.penalties")

Class = TypeVar("Class")
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
    """

    ids: mtf.Tensor
    position: mtf.Tensor
    begin: mtf.Tensor


TokenStep = Callable[["mtf.Tensor", "mtf.Dimension", "SamplingOptions", History], "mtf.Tensor"]
Mask = Callable[["mtf.Tensor", RowValue, "mtf.Dimension"], "mtf.Tensor"]


@dataclasses.dataclass(frozen=True)
class Control:
    """The facts about a control.

    Attributes:
      help: what it does, in a sentence: the command's help and the guide's table.
      token_step: the function that applies it before the temperature, for greedy decoding too. Neighbouring fields with
        the same function are one step.
      mask: a function without arguments to the function that applies it after the temperature.
      argmax_invariant: whether greedy decoding skips it: it keeps the likeliest token or, like typical_p, has a say in
        sampling only.
    """

    help: str
    token_step: TokenStep | None = None
    mask: Callable[[], Mask] | None = None
    argmax_invariant: bool = False


@dataclasses.dataclass(frozen=True)
class Number(Control):
    """A control that is a number; each row of a batch may have its own.

    Attributes:
      least, most: its range.
      above_least, below_most: whether that end itself is out of range.
      neutral: the number that changes nothing; None if every number has an effect.
      whole: whether it is an int32 rather than a float32.
    """

    least: float = -INF
    most: float = INF
    neutral: float | None = None
    whole: bool = False
    above_least: bool = False
    below_most: bool = False

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


# --- Steps that look at the row so far -----------------------------------------------------


def _penalise_repetition(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return penalties.repetition_penalty(
        x, penalties.token_counts(history.ids, dim, end=history.position), options.repetition_penalty, dim
    )


def _penalise_new_tokens(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    counts = penalties.token_counts(history.ids, dim, begin=history.begin, end=history.position)
    presence, frequency = (0.0 if v is None else v for v in (options.presence_penalty, options.frequency_penalty))
    return penalties.presence_frequency_penalty(x, counts, presence, frequency, dim)


def _mask_ngrams(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    size = cast(int, options.no_repeat_ngram_size)
    return penalties.no_repeat_ngram_mask(x, history.ids, history.position, size, dim)


def _add_bias(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    return penalties.logit_bias(x, options.logit_bias, dim)


def _mask_early_stop(x: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History) -> mtf.Tensor:
    least = ops.import_rows(x.mesh, options.min_new_tokens, tf.int32, x.shape - dim, "min_new_tokens")
    too_early = ops.cwise_broadcast(
        lambda at, begin, n: tf.cast(at - begin < n, tf.float32),
        [history.position, history.begin, least],
        None,
        tf.float32,
    )
    return penalties.tokens_mask(x, options.stop_tokens, dim, when=too_early)


# --- The list ----------------------------------------------------------------------------------

Value = TypeVar("Value")  # of a number: what a caller may give


def _mask(mask: Callable[[], Mask] | None, help: str, neutral: float, **facts: Any) -> Any:
    """A control that greedy decoding skips; by default a number from 0 to 1."""
    facts = {"least": 0, "most": 1, "neutral": neutral, **facts}
    return control(Number(help, mask=mask, argmax_invariant=True, **facts))


@with_sentences
@dataclasses.dataclass
class Controls(Generic[Value]):
    """The controls, in the order in which they are applied; None leaves one out. By transformers' names where it has
    them; presence and frequency are OpenAI's, top_n_sigma is llama.cpp's."""

    logits_processors: Sequence[LogitsProcessor] = ()  # the caller's own, applied first
    # what looks at the row so far
    repetition_penalty: Value | None = control(
        Number("above 1, tokens that the row holds, its prompt included, get less likely", _penalise_repetition,
               least=0, above_least=True, neutral=1))  # fmt: skip
    presence_penalty: Value | None = control(
        Number("tokens of the new text lose this much of their logit, once", _penalise_new_tokens,
               neutral=0))  # fmt: skip
    frequency_penalty: Value | None = control(
        Number("the same for each time that they occur", _penalise_new_tokens, neutral=0))  # fmt: skip
    no_repeat_ngram_size: int | None = control(
        Control("no sequence of this many tokens occurs twice", _mask_ngrams))  # fmt: skip
    logit_bias: dict[int, float] | Tensor | None = control(
        Control("added to the logits of single tokens", _add_bias))  # fmt: skip
    min_new_tokens: Value | None = control(
        Number("no stop token before there are this many new tokens; a stop string may end the text earlier",
               _mask_early_stop, least=0, most=INT32_MAX, neutral=0, whole=True))  # fmt: skip
    temperature: Value | None = control(
        Number("divides the logits: larger is more random, 0 takes the likeliest token (default: "
               f"{SOFTMAX_TEMPERATURE}; with entmax {ENTMAX_TEMPERATURE})", least=0))  # fmt: skip
    # what keeps the likelier tokens
    top_n_sigma: Value | None = _mask(
        lambda: masks.top_n_sigma_mask, "keeps logits within this many standard deviations of the largest",
        neutral=0, most=INF)  # fmt: skip
    top_h: Value | None = _mask(
        lambda: masks.top_h_mask, "keeps the likeliest of 100 tokens that together have this part of their entropy",
        neutral=0)  # fmt: skip
    top_k: Value | None = control(  # `next_token` applies it: it needs max_top_k too, and may draw from the k alone
        Number("keeps this many of the likeliest tokens",
               argmax_invariant=True, least=0, most=INT32_MAX, neutral=0, whole=True))  # fmt: skip
    top_p: Value | None = _mask(
        lambda: masks.top_p_mask, "keeps the fewest tokens that together have this probability", neutral=1)  # fmt: skip
    min_p: Value | None = _mask(
        lambda: masks.min_p_mask, "keeps tokens at least this many times as likely as the likeliest",
        neutral=0)  # fmt: skip
    typical_p: Value | None = _mask(
        lambda: masks.typical_p_mask, "keeps the fewest tokens that together have this probability, nearest the mean "
        "information first", neutral=1, above_least=True)  # fmt: skip
    epsilon_cutoff: Value | None = _mask(
        lambda: masks.epsilon_mask, "keeps tokens of at least this probability",
        neutral=0, below_most=True)  # fmt: skip
    eta_cutoff: Value | None = _mask(
        lambda: masks.eta_mask, "the same, with a lower bar where the distribution is flat",
        neutral=0, below_most=True)  # fmt: skip
    entmax_alpha: Value | None = _mask(
        None, "entmax in place of softmax: the larger, the fewer tokens; 1 is softmax, 2 sparsemax",
        neutral=1, least=1, most=2)  # fmt: skip


CONTROLS = controls_of(Controls)
NUMBERS = {name: c for name, c in CONTROLS.items() if isinstance(c, Number)}


# --- What a loop is given --------------------------------------------------------------


class ControlKeywords(TypedDict, total=False):
    """The same names for type checkers and editors, as keywords; temperature and top-k are arguments of GPT-Neo's."""

    logits_processors: Sequence[LogitsProcessor]
    repetition_penalty: RowValue | None
    presence_penalty: RowValue | None
    frequency_penalty: RowValue | None
    no_repeat_ngram_size: int | None
    logit_bias: Tensor | None
    min_new_tokens: RowValue | None
    top_n_sigma: RowValue | None
    top_h: RowValue | None
    top_p: RowValue | None
    min_p: RowValue | None
    typical_p: RowValue | None
    epsilon_cutoff: RowValue | None
    eta_cutoff: RowValue | None
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
            if is_real(value):
                number.check(name, value)
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
        return value is not None and not (isinstance(control, Number) and is_real(value) and value == control.neutral)

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

        def per_row(name: str, value: RowValue | None, whole: bool) -> RowValue | None:
            if value is None or is_real(value):
                return value
            return ops.force_allreduce(ops.import_rows(mesh, value, tf.int32 if whole else tf.float32, rows, name))

        bias = self.logit_bias
        numbers: dict[str, Any] = {name: per_row(name, getattr(self, name), n.whole) for name, n in NUMBERS.items()}
        return dataclasses.replace(
            self,
            stop_tokens=tuple(cast(RowValue, per_row("stop_at_token", t, True)) for t in self.stop_tokens),
            logit_bias=ops.force_allreduce(bias) if isinstance(bias, mtf.Tensor) else bias,
            **numbers,
        )

"""The chain of a step: from a model's logits to a token.

The order is that of transformers: what looks at the row so far, the
temperature, the masks, softmax or entmax, the draw.
"""

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import FLOAT32_MAX, LogitsProcessor, RowValue, is_int, is_real
from gpt_neo_sampling.mesh.compiled_rows import compiled_rows
from gpt_neo_sampling.mesh.ops import cwise_broadcast, dim_of, finite, import_rows, take
from gpt_neo_sampling.sampling import float_pairs
from gpt_neo_sampling.sampling.categorical import draw_uniforms, score_draw
from gpt_neo_sampling.sampling.controls import (
    CONTROLS,
    Draw,
    History,
    MaskStep,
    SamplingOptions,
    TokenStep,
    numbers_of,
)
from gpt_neo_sampling.sampling.cutoffs import with_top_zero
from gpt_neo_sampling.sampling.dynamic_temperature import dynamic_temperature
from gpt_neo_sampling.sampling.entmax import entmax, log_softmax_at, softmax
from gpt_neo_sampling.sampling.entmax_solver import n_candidates_for
from gpt_neo_sampling.sampling.information import surprise
from gpt_neo_sampling.sampling.masks import has_no_top_k, mask_value, padding_mask, top_k_candidates, top_k_mask
from gpt_neo_sampling.sampling.penalties import tokens_mask
from gpt_neo_sampling.sampling.random import computed_apart
from gpt_neo_sampling.sampling.top_k import first_argmax, top_k

OFF = FLOAT32_MAX  # a state of mirostat's that masks nothing; finite, to travel between shards
MOST_CANDIDATES = 1024  # of top-k; where there may be more, the whole vocabulary is masked and drawn from


Step = Callable[[mtf.Tensor, mtf.Dimension], mtf.Tensor]  # (logits, dim) to logits


def token_steps(options: SamplingOptions, history: History | None) -> list[tuple[str, Step]]:
    """The steps before the temperature, which apply to greedy decoding too.

    Args:
      options: SamplingOptions.
      history: History; None if no step needs one.

    Returns:
      a list of pairs, the step's name and a function of (logits, dim).
    """
    h = cast(History, history)  # not None where a step looks at it

    def user_step(processor: LogitsProcessor) -> tuple[str, Step]:
        name = getattr(processor, "__name__", type(processor).__name__)

        def step(x: mtf.Tensor, dim: mtf.Dimension) -> mtf.Tensor:
            found = processor(x, h.ids, h.position)
            if not isinstance(found, mtf.Tensor) or set(found.shape.dims) != set(x.shape.dims):
                raise ValueError(f"logits_processors: {name} gave {found!r}; logits of shape {x.shape} are needed")
            return found

        return name, step

    names: dict[TokenStep, list[str]] = {}  # of each step's controls
    for name, control in CONTROLS.items():
        if control.token_step is not None and options.changes(name):
            names.setdefault(control.token_step, []).extend([name, *numbers_of(name, options)])

    def bound(step: TokenStep) -> Step:
        return lambda x, dim: step(x, dim, options, h)

    steps = [(", ".join(of_step), bound(step)) for step, of_step in names.items()]
    if options.never_end:
        steps.append(("never_end", lambda x, dim: tokens_mask(x, options.stop_tokens, dim)))
    return [user_step(p) for p in options.logits_processors] + steps


def mask_steps(options: SamplingOptions, draw: Draw | None = None) -> list[tuple[str, Step]]:
    """The masks after the temperature, "top_k" among them.

    Args:
      options: SamplingOptions.
      draw: Draw; None if no step needs one.

    Returns:
      pairs like those of `token_steps`.
    """

    def step(name: str, mask_step: MaskStep | None) -> tuple[str, Step]:
        if mask_step is None:  # top-k, which the draw may apply in a way of its own
            return name, lambda x, dim: top_k_mask(x, options.top_k, dim, max_top_k=options.max_top_k)
        return ", ".join([name, *numbers_of(name, options)]), lambda x, dim: mask_step(x, dim, options, draw)

    found = {name: c.mask_step for name, c in CONTROLS.items() if c.mask_step is not None or name == "top_k"}
    return [step(name, mask_step) for name, mask_step in found.items() if options.changes(name)]


def _without_padding(logits: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions) -> mtf.Tensor:
    if options.vocab_size is None:
        return logits
    # −inf, not a finite number: padding is not drawn from a row that has nothing else
    return padding_mask(logits, options.vocab_size, dim, masked=-np.inf)


def _before_temperature(
    logits: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions, history: History | None
) -> list[tuple[str, mtf.Tensor]]:
    """Pairs of a step's name and the logits after it; the first pair is the model's own."""
    logits = _without_padding(mtf.cast(logits, tf.float32), dim, options)
    found = [("model", logits)]
    for name, step in token_steps(options, history):
        logits = mtf.cast(step(logits, dim), tf.float32)
        if options.logits_processors:  # which may give any number to an entry that is padding
            logits = _without_padding(logits, dim, options)
        found.append((name, logits))
    if len(found) > 1:  # masked entries become −inf, so that a row with nothing else is recognised
        lowest = mask_value(tf.float32)
        logits = mtf.cwise(lambda x: tf.where_v2(x <= lowest, tf.constant(-np.inf), x), [logits])
        found[-1] = found[-1][0], logits
    return found


def chain_distributions(
    logits: mtf.Tensor, vocab_dim: mtf.Dimension, options: SamplingOptions, history: History | None = None
) -> list[tuple[str, mtf.Tensor]]:
    """The distribution that a token would be drawn from, if the chain ended after each of its steps.

    Args:
      logits, vocab_dim, options, history: as for `next_token`; temperatures above
        0, or the number 0.

    Returns:
      a list of pairs: the step's name, "model" for what the model gave and
      "softmax", "entmax" or "argmax" for the last; and a float32 mtf.Tensor like
      logits, NaN in a row whose logits are no distribution.

    Raises:
      ValueError: as `next_token`.
    """
    vocab_dim = dim_of(logits, vocab_dim)
    rows = logits.shape - vocab_dim
    found = _before_temperature(logits, vocab_dim, options, history)
    if is_real(options.temperature) and options.temperature == 0:
        likeliest = mtf.one_hot(first_argmax(found[-1][1], vocab_dim), vocab_dim, dtype=tf.float32)
        return [(name, softmax(x, vocab_dim)) for name, x in found] + [("argmax", likeliest)]
    x = found[-1][1]
    shown = [(name, softmax(y, vocab_dim)) for name, y in found]
    factor = _factor(x, vocab_dim, options)
    fired = mtf.constant(logits.mesh, 0, rows, tf.int32)  # bits of the uniform 0, at which a chance above 0 is taken
    draw = Draw(lambda level: fired, initial_states(options, logits.mesh, rows))
    named = ["temperature"]
    if options.changes("dynatemp_range"):
        named += ["dynatemp_range", *numbers_of("dynatemp_range", options)]
    steps: list[tuple[str, Step]] = [(", ".join(named), lambda x, dim: _scaled(x, factor, dim))]
    without: mtf.Tensor | None = None  # the logits where xtc does not cut: with its chance, either is drawn from

    def distribution(of: Callable[[mtf.Tensor], mtf.Tensor]) -> mtf.Tensor:
        if without is None:
            return of(x)
        chance = import_rows(x.mesh, options.number("xtc_probability"), tf.float32, rows, "xtc_probability")
        mixed = lambda p, q, chance: (1 - chance) * p + chance * q  # noqa: E731
        return cwise_broadcast(mixed, [of(without), of(x), chance], x.shape)

    for name, step in steps + mask_steps(options, draw):
        before, x = x, step(x, vocab_dim)
        if name.startswith("xtc_probability"):
            without = before
        shown.append((name, distribution(lambda x: softmax(x, vocab_dim))))
    if options.use_entmax:
        return [*shown, ("entmax", distribution(lambda x: entmax(x, options.alpha, vocab_dim)))]
    return [*shown, ("softmax", shown[-1][1])]


def next_token(
    logits: mtf.Tensor,
    vocab_dim: mtf.Dimension,
    options: SamplingOptions,
    seed: RowValue | None,
    stream: RowValue | None,
    step: RowValue,
    history: History | None = None,
    return_logprobs: bool = False,
) -> mtf.Tensor | tuple[mtf.Tensor, ...]:
    """Draws one token a row: all that `options` say, then the draw.

    Args:
      logits: mtf.Tensor [batch…, vocab], any float dtype; computed in float32.
      vocab_dim: mtf.Dimension of logits.
      options: SamplingOptions.
      seed, stream, step: as for `sample_categorical`.
      history: History, for the options that look at it: logits_processors, and
        most of those ahead of the temperature.
      return_logprobs: whether to return log-probabilities too.

    Returns:
      int32 mtf.Tensor [batch…]; −1 where the logits hold NaN or +inf or nothing
      above −inf. Where the temperature is 0, the first of the largest logits.
      With return_logprobs (token, logprob, draw_logprob): and float32 mtf.Tensors
      [batch…], the natural logarithms of the token's probability under the
      model's own distribution, and under the one that it was drawn from (0 where
      the temperature is 0). NaN where the token is −1.

    Raises:
      ValueError: for a number that is out of range, or a wrong shape.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> options = SamplingOptions(temperature=0.7, top_k=2)
        >>> logits = [[0.0, 3.0, 2.0, 1.0], [5.0, 0.0, 0.0, 0.0], [np.nan, 0.0, 0.0, 0.0]]
        >>> run(lambda x: next_token(x, x.shape[-1], options, seed=1, stream=None, step=0), logits)
        array([ 1,  0, -1], dtype=int32)
    """
    drawn = draw_token(logits, vocab_dim, options, seed, stream, step, history, return_logprobs=return_logprobs)
    return (drawn.token, *drawn.answers.values()) if return_logprobs else drawn.token


@dataclasses.dataclass
class Drawn:
    """What a step of the loop draws.

    Attributes:
      token: int32 mtf.Tensor [batch…].
      answers: name -> mtf.Tensor [batch…] or [batch…, top_logprobs], of `answers_of`.
      states: name -> mtf.Tensor [batch…], what controls that keep a state take to the next step.
    """

    token: mtf.Tensor
    answers: dict[str, mtf.Tensor] = dataclasses.field(default_factory=dict)
    states: dict[str, mtf.Tensor] = dataclasses.field(default_factory=dict)


def answers_of(return_logprobs: bool, top_logprobs: int = 0) -> dict[str, tuple[tf.DType, mtf.Shape]]:
    """What a step says of its token beside it: name -> (dtype, the dims that it has beside the rows').

    logprobs and draw_logprobs are the natural logarithms of its probability under the model's own distribution, and
    under the one that it was drawn from; ranks are 1 where it is the model's likeliest; top_ids and top_logprobs are
    the model's likeliest tokens, as many as top_logprobs, and their log-probabilities.
    """
    one, several = mtf.Shape([]), mtf.Shape([mtf.Dimension("top_logprobs", top_logprobs)])
    found = {"logprobs": (tf.float32, one), "draw_logprobs": (tf.float32, one)} if return_logprobs else {}
    if top_logprobs:
        found |= {"ranks": (tf.int32, one), "top_ids": (tf.int32, several), "top_logprobs": (tf.float32, several)}
    return found


def draw_token(
    logits: mtf.Tensor,
    vocab_dim: mtf.Dimension,
    options: SamplingOptions,
    seed: RowValue | None,
    stream: RowValue | None,
    step: RowValue,
    history: History | None = None,
    states: dict[str, mtf.Tensor] | None = None,
    *,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
) -> Drawn:
    """`next_token`, with what else a step gives.

    Args:
      top_logprobs: how many of the model's likeliest tokens are told.
      states: name -> mtf.Tensor, of the last step's `Drawn`, or of `initial_states`, which is also what None means.
      The rest is as for `next_token`, and so are the errors.
    """
    vocab_dim = dim_of(logits, vocab_dim)
    rows, mesh = logits.shape - vocab_dim, logits.mesh
    states = initial_states(options, mesh, rows) if states is None else states
    # outside, as a user's functions may do what XLA cannot compile
    runs_python = options.logits_processors or options.prefix_allowed_tokens_fn is not None
    ahead = _before_temperature(logits, vocab_dim, options, history) if runs_python else None

    def drawn() -> list[mtf.Tensor]:
        steps = ahead or _before_temperature(logits, vocab_dim, options, history)
        return _drawn(steps, vocab_dim, options, seed, stream, step, states, return_logprobs)

    token, *more = compiled_rows(mesh, rows, drawn, name="next_token")
    n = 2 if return_logprobs else 0
    answers = more[:n]
    if top_logprobs:
        answers += _likeliest(
            _without_padding(mtf.cast(logits, tf.float32), vocab_dim, options), token, vocab_dim, top_logprobs
        )
    return Drawn(token, dict(zip(answers_of(return_logprobs, top_logprobs), answers)), dict(zip(states, more[n:])))


def _likeliest(x: mtf.Tensor, token: mtf.Tensor, dim: mtf.Dimension, n: int) -> list[mtf.Tensor]:
    """Of logits x the rank of tokens [rows], and the n likeliest tokens with their log-probabilities, [rows, n]."""
    x, entry = mtf.cwise(finite, [x]), mtf.range(x.mesh, dim, tf.int32)

    def is_ahead(x: tf.Tensor, entry: tf.Tensor, own: tf.Tensor, token: tf.Tensor) -> tf.Tensor:
        equal = tf.logical_and(tf.equal(x, own), entry < token)
        return tf.cast(tf.logical_or(x > own, equal), tf.float32)

    ahead = cwise_broadcast(is_ahead, [x, entry, take(x, token, dim), token], x.shape, tf.float32)
    rank = mtf.cast(mtf.reduce_sum(ahead, reduced_dim=dim), tf.int32) + 1
    top_dim = mtf.Dimension("top_logprobs", n)
    values, ids = top_k(x, dim, top_dim)
    first, largest = (mtf.reshape(mtf.slice(t, 0, 1, top_dim.name), token.shape) for t in (ids, values))
    logprob = log_softmax_at(x, first, dim)
    logprobs = cwise_broadcast(
        lambda v, most, p, token: tf.where_v2(token < 0, np.nan, tf.maximum(v - most, tf.float32.min) + p),
        [values, largest, logprob, token], values.shape,
    )  # fmt: skip
    # of an invalid row nothing is the likeliest
    rank, ids = (cwise_broadcast(lambda x, t: tf.where_v2(t < 0, 0, x), [x, token], x.shape) for x in (rank, ids))
    return [rank, ids, logprobs]


# --- Controls that keep a state from step to step ------------------------------------------


def initial_states(options: SamplingOptions, mesh: mtf.Mesh, rows: mtf.Shape) -> dict[str, mtf.Tensor]:
    """Before a row's first token: name of a control -> float32 mtf.Tensor [rows]. Empty where none keeps a state."""
    if not options.changes("mirostat"):
        return {}
    tau = import_rows(mesh, options.number("mirostat_tau"), tf.float32, rows, "mirostat_tau")
    eta = import_rows(mesh, options.number("mirostat_eta"), tf.float32, rows, "mirostat_eta")
    version = import_rows(mesh, options.mirostat, tf.int32, rows, "mirostat")

    def start(tau: tf.Tensor, eta: tf.Tensor, version: tf.Tensor) -> tf.Tensor:
        is_valid = (tau >= 0) & (tau < np.inf) & (eta >= 0) & (eta < np.inf) & tf.equal(version, 2)
        return tf.where_v2(tf.equal(version, 0), OFF, tf.where_v2(is_valid, 2 * tau, np.nan))

    return {"mirostat": mtf.broadcast(cwise_broadcast(start, [tau, eta, version], None, tf.float32), rows)}


def _next_states(
    states: dict[str, mtf.Tensor],
    x: mtf.Tensor,
    token: mtf.Tensor,
    dim: mtf.Dimension,
    ids: mtf.Tensor | None,
    options: SamplingOptions,
) -> dict[str, mtf.Tensor]:
    """The states after tokens [rows], of scores x of all tokens, or of the tokens `ids`."""
    if not states:
        return {}
    rows = token.shape
    eta, tau = (
        import_rows(x.mesh, options.number(name), tf.float32, rows, name) for name in ("mirostat_eta", "mirostat_tau")
    )

    def follow(mu: tf.Tensor, surprise: tf.Tensor, eta: tf.Tensor, tau: tf.Tensor) -> tf.Tensor:
        # in pairs: a product and a sum, which some backends round once and others twice
        step = float_pairs.times((eta, tf.zeros_like(eta)), surprise - tau)
        return tf.where_v2(mu >= OFF, mu, float_pairs.add((mu, tf.zeros_like(mu)), float_pairs.negative(step))[0])

    inputs = [states["mirostat"], surprise(x, _entry_of(token, dim, ids), dim), eta, tau]
    return {"mirostat": cwise_broadcast(follow, inputs, rows, tf.float32)}


# --- The draw ---------------------------------------------------------------------------


def _drawn(
    steps: list[tuple[str, mtf.Tensor]],
    vocab_dim: mtf.Dimension,
    options: SamplingOptions,
    seed: RowValue | None,
    stream: RowValue | None,
    step: RowValue,
    states: dict[str, mtf.Tensor],
    return_logprobs: bool,
) -> list[mtf.Tensor]:
    """A `Drawn`'s tensors as a list; `steps` is what `_before_temperature` returned."""
    raw, logits = steps[0][1], steps[-1][1]
    rows, mesh = logits.shape - vocab_dim, logits.mesh
    fixed = is_real(options.temperature)
    if fixed and options.temperature == 0:
        drawn = [first_argmax(logits, vocab_dim), *[mtf.zeros(mesh, rows)] * return_logprobs, *states.values()]
    else:

        def bits(level: int) -> mtf.Tensor:
            return computed_apart(draw_uniforms(mesh, rows, seed, stream, step, level=level)[0])

        draw = Draw(bits, states)
        uniforms = draw_uniforms(mesh, rows, seed, stream, step)
        drawn = _draw(logits, vocab_dim, options, uniforms, draw, return_logprobs)
        if not fixed:
            temperature = import_rows(mesh, options.temperature, tf.float32, rows, "temperature")
            is_greedy = mtf.broadcast(mtf.cast(mtf.equal(temperature, 0.0), tf.float32), rows)
            others = [mtf.zeros(mesh, rows)] * return_logprobs
            drawn = _select(is_greedy, [first_argmax(logits, vocab_dim), *others, *states.values()], drawn)
    if not return_logprobs:
        return drawn
    token, draw_logprob, *more = drawn
    return [token, _log_probability(raw, token, vocab_dim), _nan_without(token, draw_logprob), *more]


def _draw(
    logits: mtf.Tensor,
    dim: mtf.Dimension,
    options: SamplingOptions,
    uniforms: tuple[mtf.Tensor, mtf.Tensor],
    of_draw: Draw,
    return_logprob: bool,
) -> list[mtf.Tensor]:
    """[token, its log-probability if that is wanted, the next states], for temperatures above 0.

    Without top-k, from the whole row. With it, from the k candidates only; from the whole row, masked, where there may
    be more than MOST_CANDIDATES of them, or masks follow a tensor k; and where a tensor k leaves rows without top-k,
    from the candidates and from the whole row, each row taking its own.
    """
    rows, mesh = logits.shape - dim, logits.mesh
    factor = _factor(logits, dim, options)
    alpha = import_rows(mesh, options.alpha, tf.float32, rows, "entmax_alpha") if options.use_entmax else None
    masks = mask_steps(options, of_draw)
    names = [name for name, _ in masks]
    ahead = names.index("top_k") if "top_k" in names else 0  # masks before top-k, which look at scaled logits
    if ahead:
        logits, factor = _scaled(logits, factor, dim), None
        for _, mask in masks[:ahead]:
            logits = mask(logits, dim)
    masks = masks[ahead + ("top_k" in names) :]
    size, n_candidates = options.vocab_size or dim.size, n_candidates_for(options.alpha)

    def draw(
        x: mtf.Tensor, dim: mtf.Dimension, ids: mtf.Tensor | None = None, wanted: mtf.Tensor | None = None
    ) -> list[mtf.Tensor]:
        scale = factor
        if factor is not None and (masks or return_logprob):
            x, scale = _scaled(x, factor, dim), None
        for _, mask in masks:
            x = mask(x, dim)
        token = score_draw(
            x, *uniforms, dim, alpha, size, factor=scale, ids=ids, wanted=wanted, n_candidates=n_candidates
        )
        logprob = [_log_probability(x, token, dim, alpha, ids)] if return_logprob else []
        states = _next_states(of_draw.states, x, token, dim, ids, options)
        return [token, *logprob, *states.values()]

    k, max_k = options.top_k, options.max_top_k
    if k is None or not options.changes("top_k"):
        return draw(logits, dim)
    most = k if is_int(k) else max_k or 0
    if most > MOST_CANDIDATES or (masks and not is_int(k)):
        return draw(top_k_mask(logits, k, dim, max_top_k=max_k, masked=-np.inf), dim)
    candidates = top_k_candidates(logits, k, dim, max_top_k=max_k)
    if candidates is None:
        return draw(logits, dim)
    values, ids = candidates
    drawn = draw(values, values.shape[-1], ids)
    if is_int(k):
        return drawn
    no_mask = mtf.broadcast(has_no_top_k(import_rows(mesh, k, tf.int32, rows, "top-k"), dim), rows)
    return _select(no_mask, draw(logits, dim, wanted=no_mask), drawn)  # rows without a mask draw from all


def _factor(logits: mtf.Tensor, dim: mtf.Dimension, options: SamplingOptions) -> mtf.Tensor | None:
    """`inverse_temperature` of the options."""
    temperature = options.temperature
    if options.changes("dynatemp_range"):
        width, exponent = options.number("dynatemp_range"), options.number("dynatemp_exponent")
        temperature = dynamic_temperature(logits, temperature, width, exponent, dim)
    return inverse_temperature(logits.mesh, temperature, logits.shape - dim)


def _scaled(x: mtf.Tensor, factor: mtf.Tensor | None, dim: mtf.Dimension) -> mtf.Tensor:
    """x minus its largest entry, times a `factor` of `inverse_temperature`."""
    top = mtf.reduce_max(mtf.cwise(finite, [x]), reduced_dim=dim)
    if factor is None:
        return with_top_zero(cwise_broadcast(tf.subtract, [x, top], x.shape))
    return with_top_zero(cwise_broadcast(lambda x, top, factor: (x - top) * factor, [x, top, factor], x.shape))


def _log_probability(
    x: mtf.Tensor, token: mtf.Tensor, dim: mtf.Dimension, alpha: mtf.Tensor | None = None, ids: mtf.Tensor | None = None
) -> mtf.Tensor:
    """log p of tokens [rows] under softmax, or entmax of `alpha`, of x, whose entries are those of the tokens `ids`."""
    at, x = _entry_of(token, dim, ids), mtf.cwise(finite, [x])  # to travel
    if alpha is None:
        log_p = log_softmax_at(x, at, dim)
    else:
        log_p = mtf.log(take(entmax(x, alpha, dim), at, dim))
    return _nan_without(token, log_p)


def _entry_of(token: mtf.Tensor, dim: mtf.Dimension, ids: mtf.Tensor | None) -> mtf.Tensor:
    """Where tokens [rows] stand among entries of the tokens `ids` [rows, dim]; without ids, the tokens themselves."""
    if ids is None:
        return token
    is_token = cwise_broadcast(
        lambda i, t: tf.cast(tf.equal(i, t), tf.float32), [ids, token], token.shape + dim, tf.float32
    )
    return first_argmax(is_token, dim)


def _nan_without(token: mtf.Tensor, value: mtf.Tensor) -> mtf.Tensor:
    return cwise_broadcast(lambda t, v: tf.where_v2(t < 0, np.nan, v), [token, value], token.shape, tf.float32)


def _select(flag: mtf.Tensor, yes: list[mtf.Tensor], no: list[mtf.Tensor]) -> list[mtf.Tensor]:
    """Of two lists of tensors [rows], those of `yes` where `flag` is 1.0."""
    return [
        cwise_broadcast(lambda f, y, n: tf.where_v2(f > 0, y, n), [flag, y, n], flag.shape, y.dtype)
        for y, n in zip(yes, no)
    ]


def inverse_temperature(mesh: mtf.Mesh, temperature: RowValue, rows: mtf.Shape) -> mtf.Tensor | None:
    """The factor that logits, minus the largest, are multiplied by.

    The reciprocal is taken here, as some backends do not divide as others do.

    Args:
      mesh: mtf.Mesh.
      temperature: a number, or a float32 tensor, scalar or one a row.
      rows: mtf.Shape, the dims of the request.

    Returns:
      None where the temperature is the number 1, or else a float32 mtf.Tensor,
      scalar or with dims among `rows`: 1 where the temperature is 0, and NaN where
      it is below. Never so small that masked logits would come near the others.
    """
    if is_real(temperature) and temperature == 1:
        return None

    def reciprocal(t: tf.Tensor) -> tf.Tensor:
        valid = tf.where_v2(t > 0, 1.0 / tf.clip_by_value(t, 2.0**-126, 2.0**100), np.nan)
        return tf.where_v2(tf.equal(t, 0.0), 1.0, valid)

    return mtf.cwise(reciprocal, [import_rows(mesh, temperature, tf.float32, rows, "temperature")], name="reciprocal")

"""Penalties for tokens that a row already holds, and masks of sets of tokens: logits in, logits of the same shape out.

In all of them an entry that is masked already (−inf, or the lowest number of its
dtype) stays as it is, and so does an invalid one (NaN, +inf). What would overflow
becomes the largest or the lowest number.
"""

import functools
from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import RowValue, Tensor, TensorFunction, is_int, is_real
from gpt_neo_sampling.mesh.ops import as_dim, check_tensor, cwise_broadcast, dim_of, import_rows, scatter_add, size_of
from gpt_neo_sampling.sampling.masks import mask_out, mask_value

# --- Tokens that a row holds ---------------------------------------------------


def token_counts(ids: mtf.Tensor, dim: mtf.Dimension, begin: RowValue = 0, end: RowValue | None = None) -> mtf.Tensor:
    """How often each token occurs in a row, at positions begin ≤ position < end.

    Args:
      ids: int32 mtf.Tensor [rows…, length]; an id outside `dim` does not count.
      dim: mtf.Dimension of the vocabulary.
      begin, end: an int, or an int32 tensor, scalar or [rows…]; an end of None is
        the length. With the prompt's length as begin, only new tokens count.

    Returns:
      float32 mtf.Tensor [rows…, dim].

    Raises:
      ValueError: for a begin or an end of the wrong shape.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> run(lambda ids: token_counts(ids, mtf.Dimension("vocab", 4), end=3), [[1, 3, 1, 1]], "length")
        array([[0., 2., 0., 1.]], dtype=float32)
    """
    check_tensor(ids, "ids")
    dim = as_dim(dim, "dim")
    ids = _whole_rows(ids)
    length_dim = ids.shape[-1]
    rows = ids.shape - length_dim
    begin = import_rows(ids.mesh, begin, tf.int32, rows, "begin")
    end = import_rows(ids.mesh, length_dim.size if end is None else end, tf.int32, rows, "end")

    def inside(ids: tf.Tensor, at: tf.Tensor, begin: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
        return tf.broadcast_to(tf.cast(tf.logical_and(at >= begin, at < end), tf.float32), ids.shape)

    at = mtf.range(ids.mesh, length_dim, tf.int32)
    counted = cwise_broadcast(inside, [ids, at, begin, end], ids.shape, tf.float32)
    return scatter_add(counted, ids, rows + dim, dim, small_whole_numbers=True)


def _whole_rows(ids: mtf.Tensor) -> mtf.Tensor:
    """ids with a last dim of a name that no layout splits."""
    length_dim = ids.shape[-1]
    return mtf.rename_dimension(ids, length_dim.name, "whole_" + length_dim.name)


def repetition_penalty(
    logits: mtf.Tensor, counts: mtf.Tensor, penalty: RowValue, dim: mtf.Dimension | None = None
) -> mtf.Tensor:
    """Makes tokens that the row already holds less likely (Keskar et al. 2019, arXiv 1909.05858).

    For entries with a count above 0: x / penalty where x > 0, else x · penalty, as
    transformers does it. (The paper divides in both cases, which makes a token
    with a logit below 0 likelier.)

    Args:
      logits: mtf.Tensor, any float dtype; computed in float32.
      counts: float32 mtf.Tensor of the dims of logits, as from `token_counts`.
      penalty: a number above 0, or a float32 tensor, scalar or [logits.shape − dim]:
        above 1 repeats are less likely, below 1 likelier. A row of a tensor that is
        out of range becomes NaN, hence invalid.
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      mtf.Tensor like logits. No gradient flows through it.

    Raises:
      ValueError: for a number out of range, or counts of another shape.
    """
    penalty = _import_number(logits, penalty, dim, "repetition_penalty", 2.0**-126, "finite number above 0")

    def penalise(x: tf.Tensor, count: tf.Tensor, penalty: tf.Tensor) -> tf.Tensor:
        # a product in both cases: some backends do not divide as others do
        factor = tf.where_v2(count > 0, tf.where_v2(x > 0, 1.0 / penalty, penalty), 1.0)
        return tf.where_v2(tf.logical_and(penalty > 0, penalty < np.inf), x * factor, np.nan)

    return _penalise(penalise, logits, counts, penalty)


def presence_frequency_penalty(
    logits: mtf.Tensor,
    counts: mtf.Tensor,
    presence: RowValue = 0.0,
    frequency: RowValue = 0.0,
    dim: mtf.Dimension | None = None,
) -> mtf.Tensor:
    """Makes tokens that the row already holds less likely: x − presence · [count > 0] − frequency · count.

    The presence and frequency penalties of OpenAI's API and of vLLM, which take
    numbers from −2 to 2 and count only new tokens.

    Args:
      logits, counts, dim: as for `repetition_penalty`.
      presence, frequency: a finite number, or a float32 tensor, scalar or
        [logits.shape − dim]: above 0 repeats are less likely, below 0 likelier. A
        row of a tensor that is not finite becomes NaN, hence invalid.

    Returns:
      mtf.Tensor like logits. No gradient flows through it.

    Raises:
      ValueError: for a number that is not finite, or counts of another shape.
    """
    presence = _import_number(logits, presence, dim, "presence_penalty")
    frequency = _import_number(logits, frequency, dim, "frequency_penalty")

    def penalise(x: tf.Tensor, count: tf.Tensor, presence: tf.Tensor, frequency: tf.Tensor) -> tf.Tensor:
        # 0 · ±inf is NaN: it shows in every entry
        return x - tf.cast(count > 0, tf.float32) * presence - count * frequency

    return _penalise(penalise, logits, counts, presence, frequency)


def _import_number(
    logits: mtf.Tensor,
    value: RowValue,
    dim: mtf.Dimension | None,
    name: str,
    lowest: float = -np.inf,
    allowed: str = "finite number",
) -> mtf.Tensor:
    largest = float(tf.float32.max)
    if is_real(value) and not max(lowest, -largest) <= value <= largest:
        raise ValueError(f"{name}={value}; a {allowed} is needed")
    return import_rows(logits.mesh, value, tf.float32, logits.shape - dim_of(logits, dim), name)


def _penalise(fn: TensorFunction, logits: mtf.Tensor, counts: mtf.Tensor, *values: mtf.Tensor) -> mtf.Tensor:
    if set(counts.shape.dims) != set(logits.shape.dims):
        raise ValueError(f"counts of shape {counts.shape}; logits {logits.shape} need the same dims")
    return _adjust(fn, logits, counts, *values)


def _adjust(fn: TensorFunction, logits: mtf.Tensor, *inputs: mtf.Tensor) -> mtf.Tensor:
    """logits with fn(x, *inputs), of float32, kept within the dtype's range; masked and invalid entries as they are."""
    low, high = float(mask_value(logits.dtype)), float(logits.dtype.max)

    def tf_fn(x: tf.Tensor, *inputs: tf.Tensor) -> tf.Tensor:
        wide = tf.cast(x, tf.float32)
        new = fn(wide, *inputs)
        new = tf.where_v2(new < low, low, tf.where_v2(new > high, high, new))  # NaN passes
        return tf.cast(tf.where_v2(tf.logical_and(wide > low, wide < np.inf), new, wide), x.dtype)

    return cwise_broadcast(tf_fn, [logits, *inputs], logits.shape, name=fn.__name__)


def no_repeat_ngram_mask(
    logits: mtf.Tensor, ids: mtf.Tensor, position: RowValue, ngram_size: int, dim: mtf.Dimension | None = None
) -> mtf.Tensor:
    """Masks the tokens that would make an n-gram that the row has already (Paulus et al. 2017, arXiv 1705.04304).

    A token t is masked where the last n − 1 of the row's tokens, then t, stand
    among them in that order. It takes n passes over ids, and none over n-grams.

    Args:
      logits: mtf.Tensor.
      ids: int32 mtf.Tensor [logits.shape − dim, length]; an id outside `dim` masks nothing.
      position: an int, or an int32 tensor, scalar or [logits.shape − dim]: how many
        of the ids the row has, from its first on.
      ngram_size: an int of at least 1; 1 masks every token that the row has.
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      mtf.Tensor like logits.

    Raises:
      ValueError: for an ngram_size below 1, ids of other rows, or a `dim` that
        logits lack.
    """
    dim = dim_of(logits, dim)
    rows = mtf.Shape(ids.shape.dims[:-1])
    if not is_int(ngram_size) or ngram_size < 1:
        raise ValueError(f"no_repeat_ngram_size={ngram_size!r}; a whole number of at least 1 is needed")
    if set(rows.dims) != set((logits.shape - dim).dims):
        raise ValueError(f"ids of shape {ids.shape}; logits {logits.shape} need rows of {logits.shape - dim}")
    ids = _whole_rows(ids)
    position = mtf.broadcast(import_rows(ids.mesh, position, tf.int32, rows, "position"), rows)

    def repeats(ids: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        """1.0 for each id of the row that follows the same n − 1 ids that the row ends with, else 0.0."""
        length = size_of(ids, -1)
        at = tf.range(length)
        position = tf.minimum(position[..., tf.newaxis], length)
        found = tf.logical_and(at >= ngram_size - 1, at < position)
        for back in range(1, min(ngram_size, length)):
            last = tf.gather(ids, tf.maximum(position - back, 0), batch_dims=len(rows.dims))
            found = tf.logical_and(found, tf.equal(tf.roll(ids, back, -1), last))
        return tf.cast(found, tf.float32)

    found = mtf.slicewise(
        repeats, [ids, position], ids.shape, tf.float32, splittable_dims=rows.dims, grad_function=0, name="repeats"
    )
    counts = scatter_add(found, ids, rows + dim, dim, small_whole_numbers=True)
    return _mask_where(lambda entry, count: count > 0.5, logits, dim, counts)


# --- Sets of tokens ----------------------------------------------------------------


def tokens_mask(
    logits: mtf.Tensor, tokens: Sequence[RowValue], dim: mtf.Dimension | None = None, when: mtf.Tensor | None = None
) -> mtf.Tensor:
    """Masks some entries, so that they are never drawn; those outside `dim` change nothing.

    Args:
      logits: mtf.Tensor.
      tokens: a list of ids, each an int, or an int32 tensor, scalar or [logits.shape − dim].
      dim: mtf.Dimension of logits; the last by default.
      when: None, or a bool or float32 mtf.Tensor, its dims among [logits.shape − dim]:
        the rows that are masked, those of True or 1.0; by default all.

    Returns:
      mtf.Tensor like logits.

    Raises:
      ValueError: for a `dim` that logits lack, or a tensor of the wrong shape.
    """
    dim = dim_of(logits, dim)
    if not len(tokens):
        return logits
    inputs = [import_rows(logits.mesh, t, tf.int32, logits.shape - dim, "token") for t in tokens]
    if when is not None:
        inputs.append(import_rows(logits.mesh, when, tf.float32, logits.shape - dim, "when"))

    def masked(entry: tf.Tensor, *inputs: tf.Tensor) -> tf.Tensor:
        found = functools.reduce(tf.logical_or, [tf.equal(entry, token) for token in inputs[: len(tokens)]])
        return found if when is None else tf.logical_and(found, inputs[-1] > 0.5)

    return _mask_where(masked, logits, dim, *inputs)


def _mask_where(masked: TensorFunction, logits: mtf.Tensor, dim: mtf.Dimension, *inputs: mtf.Tensor) -> mtf.Tensor:
    """logits, masked where masked(entry, *inputs) says so; not an invalid one, whose row would pass for valid."""

    def keep(x: tf.Tensor, entry: tf.Tensor, *inputs: tf.Tensor) -> tf.Tensor:
        invalid = tf.logical_or(tf.is_nan(x), x >= np.inf)
        return tf.logical_or(tf.logical_not(masked(entry, *inputs)), invalid)

    entry = mtf.range(logits.mesh, dim, tf.int32)
    return mask_out(logits, cwise_broadcast(keep, [logits, entry, *inputs], logits.shape, tf.bool))


def logit_bias(logits: mtf.Tensor, bias: Tensor, dim: mtf.Dimension | None = None) -> mtf.Tensor:
    """Adds a bias to the logits; −inf masks an entry.

    Args:
      logits: mtf.Tensor, any float dtype; computed in float32.
      bias: an array or a tf.Tensor [dim] or [logits.shape − dim, dim], or an
        mtf.Tensor whose dims are among those of logits. NaN or +inf in a tensor makes
        its row invalid.
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      mtf.Tensor like logits. No gradient flows through it.

    Raises:
      ValueError: for an array with NaN or +inf, or another shape.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> bias = [0.0, np.log(2.0), -np.inf]
        >>> run(lambda x: mtf.softmax(logit_bias(x, bias), x.shape[-1]), [[1.0, 1.0, 5.0]]).round(3)
        array([[0.333, 0.667, 0.   ]], dtype=float32)
    """
    dim = dim_of(logits, dim)
    rows = logits.shape - dim
    if not isinstance(bias, (mtf.Tensor, tf.Tensor)):
        bias = np.asarray(bias, np.float32)
        if not (bias < np.inf).all():  # NaN is not either
            raise ValueError(f"logit_bias holds {bias[~(bias < np.inf)][0]}; finite numbers or -inf are needed")
    if not isinstance(bias, mtf.Tensor):
        per_row = len(bias.shape) != 1
        bias = import_rows(logits.mesh, bias, tf.float32, [*(rows.dims if per_row else []), dim], "logit_bias")
    elif any(d not in logits.shape.dims for d in bias.shape.dims):
        raise ValueError(f"logit_bias has shape {bias.shape}; its dims must be among those of logits, {logits.shape}")

    def add(x: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        bias = tf.cast(bias, tf.float32)
        return x + tf.where_v2(bias < np.inf, bias, np.nan)

    return _adjust(add, logits, bias)

"""Penalties for tokens that a row already holds, and masks of sets of tokens: logits in, logits of the same shape out.

In all of them an entry that is masked already (−inf, or the lowest number of its
dtype) stays as it is, and so does an invalid one (NaN, +inf). What would overflow
becomes the largest or the lowest number.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import RowValue, Tensor, TensorFunction, TokenSet, is_int, is_real
from gpt_neo_sampling.mesh.ops import as_dim, check_tensor, cwise_broadcast, dim_of, import_rows, scatter_add, size_of
from gpt_neo_sampling.sampling.masks import mask_out, mask_value
from gpt_neo_sampling.sampling.token_sequences import TokenSequences

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


def rows_so_far(
    logits: mtf.Tensor, ids: mtf.Tensor, position: RowValue, dim: mtf.Dimension
) -> tuple[mtf.Tensor, mtf.Tensor, mtf.Shape]:
    """(ids [rows, length], whose length no layout splits; position [rows]; rows) of rows of logits; checked.

    Raises:
      ValueError: for ids of other rows, or a position of the wrong shape.
    """
    rows = mtf.Shape(ids.shape.dims[:-1])
    if set(rows.dims) != set((logits.shape - dim).dims):
        raise ValueError(f"ids of shape {ids.shape}; logits {logits.shape} need rows of {logits.shape - dim}")
    position = import_rows(ids.mesh, position, tf.int32, rows, "position")
    return _whole_rows(ids), mtf.broadcast(position, rows), rows


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
    penalty = import_number(logits, penalty, dim, "repetition_penalty", 2.0**-126, "finite number above 0")

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
    presence = import_number(logits, presence, dim, "presence_penalty")
    frequency = import_number(logits, frequency, dim, "frequency_penalty")

    def penalise(x: tf.Tensor, count: tf.Tensor, presence: tf.Tensor, frequency: tf.Tensor) -> tf.Tensor:
        # 0 · ±inf is NaN: it shows in every entry
        return x - tf.cast(count > 0, tf.float32) * presence - count * frequency

    return _penalise(penalise, logits, counts, presence, frequency)


def import_number(
    logits: mtf.Tensor,
    value: RowValue,
    dim: mtf.Dimension | None,
    name: str,
    lowest: float = -np.inf,
    allowed: str = "finite number",
    dtype: tf.DType | None = None,
) -> mtf.Tensor:
    """A number as an mtf tensor, float32 by default; raises ValueError for one that is out of range."""
    largest = float(tf.float32.max)
    if is_real(value) and not max(lowest, -largest) <= value <= largest:
        raise ValueError(f"{name}={value}; a {allowed} is needed")
    return import_rows(logits.mesh, value, dtype or tf.float32, logits.shape - dim_of(logits, dim), name)


def _penalise(fn: TensorFunction, logits: mtf.Tensor, counts: mtf.Tensor, *values: mtf.Tensor) -> mtf.Tensor:
    if set(counts.shape.dims) != set(logits.shape.dims):
        raise ValueError(f"counts of shape {counts.shape}; logits {logits.shape} need the same dims")
    return adjust(fn, logits, counts, *values)


def adjust(fn: TensorFunction, logits: mtf.Tensor, *inputs: mtf.Tensor) -> mtf.Tensor:
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
    if not is_int(ngram_size) or ngram_size < 1:
        raise ValueError(f"no_repeat_ngram_size={ngram_size!r}; a whole number of at least 1 is needed")
    ids, position, rows = rows_so_far(logits, ids, position, dim)

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
    return mask_where(lambda entry, count: count > 0.5, logits, dim, counts)


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

    return mask_where(masked, logits, dim, *inputs)


def token_flags(mesh: mtf.Mesh, tokens: TokenSet, dim: mtf.Dimension, name: str) -> mtf.Tensor:
    """A set of tokens as a tensor.

    Args:
      mesh: mtf.Mesh.
      tokens: an id or a list of ids; or flags, one for each entry of `dim`: a bool or float32 array or tensor, above 0
        for those in the set.
      dim: mtf.Dimension of the vocabulary.
      name: what the option is called, for the error.

    Returns:
      float32 mtf.Tensor [dim], 1.0 for those in the set, else 0.0.

    Raises:
      ValueError: for an id outside `dim`, or flags of another shape.
    """
    if is_int(tokens):
        tokens = [tokens]
    if isinstance(tokens, (list, tuple, range)) or (isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu"):
        flags = np.zeros(dim.size, np.float32)
        for token in tokens:
            if not is_int(token) or not 0 <= token < dim.size:
                raise ValueError(f"{name}: {token!r}; token ids from 0 to {dim.size - 1} are needed")
            flags[token] = 1
    else:
        flags = tokens
    if not isinstance(flags, mtf.Tensor):
        flags = tf.convert_to_tensor(flags)
        if flags.shape.as_list() != [dim.size]:
            raise ValueError(f"{name} has shape {flags.shape.as_list()}; a list of ids, or flags {dim}, is needed")
        flags = mtf.import_tf_tensor(mesh, tf.cast(flags, tf.float32), mtf.Shape([dim]))
    elif flags.shape.dims != [dim]:
        raise ValueError(f"{name} has shape {flags.shape}; a list of ids, or flags {dim}, is needed")
    return mtf.cast(mtf.greater(mtf.cast(flags, tf.float32), 0.0), tf.float32)


def token_set_mask(
    logits: mtf.Tensor,
    tokens: TokenSet,
    dim: mtf.Dimension | None = None,
    *,
    allowed: bool = False,
    when: mtf.Tensor | None = None,
    name: str = "tokens",
) -> mtf.Tensor:
    """Masks the entries of a set, or all others.

    Args:
      logits: mtf.Tensor.
      tokens: as for `token_flags`.
      dim: mtf.Dimension of logits; the last by default.
      allowed: True to mask all but the set.
      when: None, or a float32 mtf.Tensor, its dims among [logits.shape − dim]: the rows that are masked, those of 1.0.
      name: what the option is called, for the error.

    Returns:
      mtf.Tensor like logits.

    Raises:
      ValueError: as `token_flags`, and for a `dim` that logits lack.
    """
    dim = dim_of(logits, dim)
    inputs = [token_flags(logits.mesh, tokens, dim, name), *([] if when is None else [when])]

    def masked(_: tf.Tensor, flag: tf.Tensor, *when: tf.Tensor) -> tf.Tensor:
        found = flag < 0.5 if allowed else flag > 0.5
        return tf.logical_and(found, when[0] > 0.5) if when else found

    return mask_where(masked, logits, dim, *inputs)


def force_tokens(
    logits: mtf.Tensor,
    tokens: TokenSet,
    when: mtf.Tensor,
    dim: mtf.Dimension | None = None,
    name: str = "tokens",
) -> mtf.Tensor:
    """Gives the entries of a set the logit 0, also those that are masked, and masks all others.

    transformers' ForcedEOSTokenLogitsProcessor.

    Args:
      logits: mtf.Tensor.
      tokens, dim, name: as for `token_set_mask`.
      when: float32 mtf.Tensor, its dims among [logits.shape − dim]: the rows that it is done to, those of 1.0.

    Returns:
      mtf.Tensor like logits. A row with NaN or +inf stays invalid.

    Raises:
      ValueError: as `token_set_mask`.
    """
    dim = dim_of(logits, dim)
    low = mask_value(logits.dtype)

    def force(x: tf.Tensor, flag: tf.Tensor, when: tf.Tensor) -> tf.Tensor:
        forced = tf.where_v2(flag > 0.5, tf.zeros_like(x), tf.constant(low, x.dtype))
        changes = tf.logical_and(when > 0.5, x < np.inf)  # not NaN, nor +inf
        return tf.where_v2(changes, forced, x)

    flags = token_flags(logits.mesh, tokens, dim, name)
    return cwise_broadcast(force, [logits, flags, when], logits.shape, name="force_tokens")


def exponential_decay(
    logits: mtf.Tensor,
    tokens: Sequence[RowValue],
    n_late: mtf.Tensor,
    factor: RowValue,
    most: int,
    dim: mtf.Dimension | None = None,
) -> mtf.Tensor:
    """Makes stop tokens likelier the longer a row gets: x + |x| · (factorⁿ − 1) for them.

    transformers' ExponentialDecayLengthPenalty.

    Args:
      logits: mtf.Tensor, any float dtype; computed in float32.
      tokens: a list of ids, as for `tokens_mask`.
      n_late: int32 mtf.Tensor, its dims among [logits.shape − dim]: n, how many tokens too many the row has; nothing
        changes where it is below 1.
      factor: a finite number above 0, or a float32 tensor, scalar or [logits.shape − dim]; a row of a tensor that is
        out of range becomes NaN, hence invalid.
      most: an int, the largest that n may be.
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      mtf.Tensor like logits. No gradient flows through it.

    Raises:
      ValueError: for a number out of range, or a tensor of the wrong shape.
    """
    dim = dim_of(logits, dim)
    rows = logits.shape - dim
    factor = import_number(logits, factor, dim, "exponential_decay_length_penalty", 2.0**-126, "factor above 0")
    stops = [import_rows(logits.mesh, t, tf.int32, rows, "token") for t in tokens]

    def penalise(x: tf.Tensor, entry: tf.Tensor, n: tf.Tensor, factor: tf.Tensor, *stops: tf.Tensor) -> tf.Tensor:
        power = whole_power(factor, n, most)
        # one product, without a sum that some backends would fuse with it
        late = x * tf.where_v2(x > 0, power, 2.0 - power)
        found = functools.reduce(tf.logical_or, [tf.equal(entry, stop) for stop in stops], tf.zeros_like(entry) > 0)
        found = tf.logical_and(found, tf.not_equal(x, 0.0))  # which stays, also where the power is infinite
        x = tf.where_v2(tf.logical_and(found, n > 0), late, x)
        return tf.where_v2(tf.logical_and(factor > 0, factor < np.inf), x, np.nan)

    entry = mtf.range(logits.mesh, dim, tf.int32)
    return adjust(penalise, logits, entry, n_late, factor, *stops)


def whole_power(base: tf.Tensor, exponent: tf.Tensor, most: int) -> tf.Tensor:
    """base ** exponent, float32, by squaring: the same bits on every backend, which a power of their own has not.

    Args:
      base: float32 tf.Tensor, above 0.
      exponent: int32 tf.Tensor; below 0 it counts as 0.
      most: int, the largest exponent.
    """
    power, square = tf.ones_like(base), base
    exponent = tf.maximum(exponent, 0)
    for bit in range(max(1, most.bit_length())):
        has_bit = tf.not_equal(tf.bitwise.bitwise_and(exponent, tf.constant(1 << bit, tf.int32)), 0)
        power = tf.where_v2(has_bit, power * square, power)
        square = square * square
    return power


def mask_where(masked: TensorFunction, logits: mtf.Tensor, dim: mtf.Dimension, *inputs: mtf.Tensor) -> mtf.Tensor:
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

    return adjust(add, logits, bias)


# --- Sequences of tokens ------------------------------------------------------------


def sequence_bias(
    logits: mtf.Tensor,
    sequences: TokenSequences,
    ids: mtf.Tensor,
    position: RowValue,
    dim: mtf.Dimension | None = None,
) -> mtf.Tensor:
    """Adds each sequence's bias to the logit of its last token, in the rows that end with its other tokens.

    transformers' SequenceBiasLogitsProcessor and, with −inf, its NoBadWordsLogitsProcessor; but a sequence counts
    as soon as the row has its other tokens, where transformers waits until the row has one token more.

    Args:
      logits: mtf.Tensor, any float dtype; computed in float32.
      sequences: TokenSequences.
      ids: int32 mtf.Tensor [logits.shape − dim, length].
      position: an int, or an int32 tensor, scalar or [logits.shape − dim]: how many of the ids the row has.
      dim: mtf.Dimension of logits; the last by default.

    Returns:
      mtf.Tensor like logits. No gradient flows through it. Biases of one token are added up in the order of
      `sequences`, by halving, on any layout.

    Raises:
      ValueError: for ids of other rows, or a `dim` that logits lack.
    """
    dim, mesh = dim_of(logits, dim), logits.mesh
    ids, position, rows = rows_so_far(logits, ids, position, dim)
    tables = []
    for field, array in zip(dataclasses.fields(sequences), sequences.arrays()):
        array = tf.convert_to_tensor(array)
        names = (f"{field.name}_{i}" for i in itertools.count())
        tables.append(
            mtf.import_tf_tensor(mesh, array, mtf.Shape(list(map(mtf.Dimension, names, array.shape.as_list()))))
        )
    last = tables[3]
    last_dim = last.shape[0]

    def sums(
        ids: tf.Tensor,
        position: tf.Tensor,
        before: tf.Tensor,
        lengths: tf.Tensor,
        biases: tf.Tensor,
        members: tf.Tensor,
    ) -> tf.Tensor:
        """What is added to each of the last tokens: [rows, T]."""
        counts = tf.ones_like(position)[..., tf.newaxis] * tf.ones_like(lengths) > 0  # [rows, S]
        counts = tf.logical_and(counts, lengths >= 0)
        position = tf.minimum(position, size_of(ids, -1))[..., tf.newaxis]
        for back in range(1, size_of(before, 1) + 1):
            token = tf.gather(ids, tf.maximum(position - back, 0), batch_dims=len(rows.dims))
            is_same = tf.logical_and(tf.equal(token, before[:, back - 1]), position >= back)
            counts = tf.logical_and(counts, tf.logical_or(is_same, lengths < back))
        # not by a product, in which −inf would be NaN
        found = tf.where_v2(counts, tf.maximum(biases, tf.float32.min), 0.0)
        found = tf.pad(found, [[0, 0]] * len(rows.dims) + [[0, 1]])
        found = tf.gather(found, members, axis=-1)
        while size_of(found, -1) > 1:  # in an order that no backend chooses
            half = size_of(found, -1) // 2
            found = tf.maximum(found[..., :half] + found[..., half:], tf.float32.min)
        return found[..., 0]

    inputs = [ids, position, *tables[:3], tables[4]]
    added = mtf.slicewise(
        sums, inputs, rows + last_dim, tf.float32, splittable_dims=rows.dims, grad_function=0, name="sequence_bias"
    )
    added = scatter_add(added, last, rows + dim, dim)

    def add(x: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(bias <= tf.float32.min, tf.float32.min, x + bias)  # NaN stays

    return adjust(add, logits, added)

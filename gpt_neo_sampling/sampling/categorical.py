"""The draw: from weights or from scores to an index, in two levels.

A dimension is taken in at most 64 contiguous groups, whose borders depend on its size alone. A draw first chooses a
group, then an entry in it, by inverse CDF with a uniform of its own for each. One float32 uniform has 24 bits: too few
for 50,257 entries at once, or for an entry of 1e-7 in a group that has most of the mass. So each uniform has 32,
and sums of entries are float64.

The textbook draw comes first; below it, what makes it fast without changing what is drawn.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut, RowValue
from gpt_neo_sampling.mesh.ops import (
    MeshOperation,
    as_dim,
    check_floating,
    dim_of,
    finite,
    import_rows,
    laid_out_cond,
    laid_out_while_loop,
    pad_last,
    row_index,
    size_of,
)
from gpt_neo_sampling.mesh.sharded_rows import (
    CandidateRows,
    ShardedRows,
    any_of,
    fast_sum,
    largest_of_cores,
    spread_rows,
    whole_axis,
)
from gpt_neo_sampling.mesh.xla import kept_together, update_slice
from gpt_neo_sampling.sampling import candidate_draw, fixed_point, softmax_draw
from gpt_neo_sampling.sampling.core_draw import draw_few_kernels
from gpt_neo_sampling.sampling.entmax_solver import (
    NEAR_EDGE,
    entmax_by_candidates,
    residual,
    solve_in_few_kernels,
    weights_and_slopes,
)
from gpt_neo_sampling.sampling.random import bits_again, counter_bits, import_seed


def sample_categorical(
    x: mtf.Tensor,
    dim: mtf.Dimension | None = None,
    *,
    seed: RowValue | None = None,
    stream: RowValue | None = None,
    step: RowValue = 0,
    samples_dim: mtf.Dimension | None = None,
    size: int | None = None,
) -> mtf.Tensor:
    """Draws indices along `dim` in proportion to the weights `x`.

    By inverse CDF in two levels (see `grouped_draw`), each with a uniform of 32 bits of its own: time and memory are
    linear in `dim`, and the index drawn is the same on every layout and backend. (The decode loop draws from scores
    instead, by `score_draw`.)

    Args:
      x: mtf.Tensor of weights, float32, bfloat16 or float16; groups of them
        are summed in float32, and they need not be normalised.
      dim: mtf.Dimension of x; the last by default.
      seed: an int in [−2³¹, 2³²), or an int32 tensor, scalar or [x.shape − dim];
        None draws a fresh one at each execution, in a loop at each iteration.
      stream: int32, one a row: what tells rows apart under one seed. By default
        a row's index in the request, counted in row-major order.
      step: an int or an int32 tensor, scalar or one a row: the number of the
        draw in its stream. The uniforms are a function of (seed, stream, step,
        level) alone.
      samples_dim: mtf.Dimension; that many independent draws from each row.
      size: int, where the entries of `dim` from there on are padding, of weight
        0: the draws are then those without the padding.

    Returns:
      int32 mtf.Tensor [x.shape − dim], then samples_dim. An entry of weight 0
      is never drawn. A row that has a negative or non-finite weight, or no mass
      at all, gives −1 (weights below 2⁻¹²⁶ may count as none).

    Raises:
      ValueError: for weights of another dtype, a `dim` that x lacks, a
        `samples_dim` that it has, a seed out of range or an option of the wrong
        shape.

    Example (`run` is defined in the docstring of `models.utils`):

        >>> samples = mtf.Dimension("samples", 6)
        >>> run(lambda x: sample_categorical(x, seed=1, samples_dim=samples), [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
        array([[ 2,  2,  2,  2,  2,  0],
               [-1, -1, -1, -1, -1, -1]], dtype=int32)
    """
    dim = dim_of(x, dim)
    rows = x.shape - dim
    check_floating(x, "sample_categorical: weights")
    samples_dim = None if samples_dim is None else as_dim(samples_dim, "samples_dim")
    if samples_dim in x.shape.dims:
        raise ValueError(f"samples_dim {samples_dim} is a dim of the weights, {x.shape}; it must be a new one")
    uniforms = draw_uniforms(x.mesh, rows, seed, stream, step, samples_dim)
    return grouped_draw(x, *uniforms, dim, samples_dim, size)


def draw_uniforms(
    mesh: mtf.Mesh,
    rows: mtf.Shape,
    seed: RowValue | None = None,
    stream: RowValue | None = None,
    step: RowValue = 0,
    samples_dim: mtf.Dimension | None = None,
    level: int | None = None,
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """The two uniforms of each draw, as 32 bits each; arguments as those of `sample_categorical`.

    Args:
      mesh: mtf.Mesh.
      rows: mtf.Shape, the dims of the request.
      level: an int of `random`'s, in place of samples_dim: a draw beside the token's own.

    Returns:
      a pair of int32 mtf.Tensors [rows], then samples_dim: see `counter_bits`.
    """
    seed = import_seed(mesh, seed, rows)
    stream = row_index(mesh, rows) if stream is None else (
        mtf.broadcast(import_rows(mesh, stream, tf.int32, rows, "stream"), rows))  # fmt: skip
    step = import_rows(mesh, step, tf.int32, rows, "step")
    sample = None if samples_dim is None else mtf.range(mesh, samples_dim, tf.int32)
    if level is not None:
        sample = mtf.constant(mesh, level, dtype=tf.int32)
    return counter_bits(seed, stream, step, sample)


# --- The textbook draw ----------------------------------------------------------------
#
#   weights    . 3 1 . 2 . | . . 1 . . 4 | 2 . . . . .    a row, in groups
#   sums            6      |      5      |      2         of the groups, 13 in all
#   u₁ = 0.6                      ▲                       0.6 · 13 = 7.8: the first group with which the sum passes that
#   entries                | . . 1 . . 4 |                of that group, 5 in all
#   u₂ = 0.5                           ▲                  0.5 · 5 = 2.5: the first entry with which the sum passes that


def _exact_draw(rows: ShardedRows, weights: LaidOut, uniforms: Sequence[LaidOut]) -> LaidOut:
    """Draws a group, then an entry in it, with sums in one fixed order.

    Equal weights and uniforms give equal draws, to the bit, on any layout and backend.

    Args:
      rows: ShardedRows.
      weights: laid-out float32, as `rows.in_groups` gives them; one below 0, +inf or NaN makes a row invalid.
      uniforms: a pair, for the group and for the entry, laid-out [rows, samples]: see `_as_float64`.

    Returns:
      laid-out int32 [rows, samples], −1 for an invalid row or one without mass.
    """

    def choose_entry(weights: tf.Tensor, group: tf.Tensor, u: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor]:
        return (_inverse_cdf(weights, group, u),)

    (drawn,) = _two_level_draw(rows, [weights], uniforms, _scaled_group_sums, _choose_group, choose_entry)
    return drawn


def _two_level_draw(
    rows: ShardedRows,
    weights: Sequence[LaidOut],
    uniforms: Sequence[LaidOut],
    sum_groups: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    choose_group: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, ...]],
    choose_entry: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, ...]],
) -> tuple[LaidOut, ...]:
    """The steps of every draw, whatever the arithmetic.

    Args:
      rows, uniforms: as for `_exact_draw`.
      weights: laid-out [rows, groups of the shard, places of a group]; with what else `sum_groups` takes.
      sum_groups: a function from slices of `weights` to (weights, sums), sums [k, rows, groups of the shard]:
        whatever `choose_group` needs, finite, as it travels between shards.
      choose_group: a function from (sums of all groups, u) to (group, …), int32 [rows, samples], −1 for none.
      choose_entry: a function from (weights, group, u, sums), of a shard, to (place in the group, …), int32
        [rows, samples].

    Returns:
      (index, …): laid-out int32 [rows, samples], −1 where there is no group; then what else the choices return, the
      larger of the two.
    """
    slicewise = rows.mesh_impl.slicewise
    group_uniform, entry_uniform = uniforms
    summed, sums = slicewise(sum_groups, *weights)
    group, *of_group = slicewise(choose_group, rows.across_groups(sums), group_uniform)
    index, *of_entry = rows.choose_within(group, choose_entry, summed, entry_uniform, sums)
    return index, *(slicewise(tf.maximum, *pair) for pair in zip(of_group, of_entry, strict=True))


def _scaled_group_sums(weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The weights of each group times a power of two, so that none over- or underflows; and their sums.

    The sums are [2, rows, groups]: what each group's scaled weights add up to, and the exponent that was taken out of
    it, biased; 255 for an invalid group.
    """
    least, most = tf.reduce_min(weights, -1, keepdims=True), tf.reduce_max(weights, -1, keepdims=True)
    most = tf.where_v2(least >= 0, tf.abs(most), np.inf)  # without −0.0's sign
    exponent = tf.bitwise.right_shift(tf.bitcast(most, tf.int32), tf.constant(23))
    scale = tf.bitwise.left_shift(254 - tf.minimum(exponent, 253), tf.constant(23))
    weights *= tf.bitcast(scale, tf.float32)  # the largest is in [1, 4) now
    total = _fold_sum(weights)  # NaN where a weight is, which maxima may miss
    exponent = tf.where_v2(total < np.inf, exponent, 255)
    total = tf.where_v2(exponent < 255, total, 0.0)
    return weights, tf.stack([total[..., 0], tf.cast(exponent[..., 0], tf.float32)])


def _choose_group(sums: tf.Tensor, u: tf.Tensor) -> tuple[tf.Tensor]:
    totals, valid = _group_totals(sums)
    group = _inverse_cdf(totals[:, tf.newaxis], tf.zeros_like(u, tf.int32), u)
    return (tf.where_v2(valid, group, -1),)


def _group_totals(sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(totals [rows, groups], relative to one power of two; whether a row is valid [rows, 1])."""
    exponent = tf.cast(sums[1], tf.int32)
    largest = tf.reduce_max(exponent, -1, keepdims=True)
    relative = tf.minimum(exponent, 253) - tf.minimum(largest, 253) + 127
    relative = tf.bitwise.left_shift(tf.maximum(relative, 0), tf.constant(23))
    return sums[0] * tf.bitcast(relative, tf.float32), largest < 255


def _inverse_cdf(weights: tf.Tensor, which: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    """Draws from one of several vectors of weights: the first entry up to which the sum passes u times the total.

    Args:
      weights: [rows, vectors, n] float32, none below 0.
      which: [rows, samples] int32 in [0, vectors): the vector that each sample is drawn from.
      u: [rows, samples], uniforms: see `_as_float64`.

    Returns:
      [rows, samples] int32; only entries of weight above 0, and −1 where there is none.
    """
    if size_of(u, 1) > size_of(weights, 1):
        return _inverse_cdf_of_many(weights, which, u)
    return _first_passed(tf.gather(weights, which, batch_dims=1), u)


def _first_passed(weights: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    """The first of weights [..., n] up to which the sum passes u [...] times the total; −1 where there is no mass."""
    sums, last = _exact_cdf(weights)
    target = _as_float64(u)[..., tf.newaxis] * tf.reduce_max(sums, -1, keepdims=True)
    return _first_above(sums, target, last[..., tf.newaxis])


def _exact_cdf(weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(sums, last) of float32 weights [..., n], none below 0.

    sums [..., n], float64, are those up to each entry of weight above 0, and 0 at the others:
    taken in log₂ steps they need not be monotone in floating point. last [...]
    int32 is the last entry of weight above 0, −1 where there is none.
    """
    has_mass, weights = weights > 0, tf.cast(weights, tf.float64)
    sums = tf.where_v2(has_mass, _scan(weights, tf.add), tf.zeros_like(weights))
    last = tf.reduce_max(tf.where_v2(has_mass, tf.range(size_of(weights, -1)), -1), -1)
    return sums, last


def _first_above(sums: tf.Tensor, target: tf.Tensor, last: int | tf.Tensor) -> tf.Tensor:
    """The first of [..., n] `sums` above the target, or `last` where none is; both [..., 1]."""
    at = np.arange(size_of(sums, -1), dtype=np.int32)
    return tf.reduce_min(tf.where_v2(sums > target, at, last), -1)


def _scan(x: tf.Tensor, combine: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Inclusive prefix scan over the last axis of values ≥ 0, in log₂ steps."""
    shift, size = 1, size_of(x, -1)
    while shift < size:
        x = combine(x, pad_last(x[..., :-shift], before=shift))
        shift *= 2
    return x


def _fold_sum(x: tf.Tensor) -> tf.Tensor:
    """Sum over the last axis, keeping it: halves are added until one is left.

    The backend chooses the order of reduce_sum's additions, and even that of two in a row: XLA makes one sum of them.
    """
    size = size_of(x, -1)
    while size > 1:
        half = (size + 1) // 2
        upper = pad_last(x[..., half:], after=size % 2)
        x, size = x[..., :half] + upper, half
    return x


def _as_float64(u: tf.Tensor) -> tf.Tensor:
    """Uniforms, float32 in [0, 1) or 32 bits as int32, without rounding."""
    return tf.cast(u, tf.float64) if u.dtype == tf.float32 else tf.cast(tf.bitcast(u, tf.uint32), tf.float64) * 2.0**-32


# --- What makes it fast: sums in any order, and a bound on their error ------------------------
#
# One draw a row is first made with sums in whatever order is fast. If it falls so near to a border between two entries
# that rounding may have moved it across, it is ambiguous, and the exact draw is made too: what is drawn is always what
# the exact draw gives.

SUM_ERROR_BOUND = 1e-6  # how far sums in two orders may be apart, in parts of the total
UNIFORM_ERROR_BOUND = 2.0**-24  # what float32 loses of a uniform of 32 bits
# How far weights are taken to be from those of `fixed_point`, on any backend, rounding of their sums included: for
# softmax in parts of the weight, for entmax in units of `solve_entmax`'s u. The most that was seen on CPUs, by
# tests/sampling/test_draws.py among others, is 4e-7 and 5e-7.
SOFTMAX_ERROR_BOUND, ENTMAX_ERROR_BOUND = 1e-6, 2e-6


def _fast_draw(
    rows: ShardedRows,
    weights: LaidOut,
    uniforms: Sequence[LaidOut],
    error_bound: float,
    slope: LaidOut | None = None,
    validate: bool = False,
) -> tuple[LaidOut, LaidOut]:
    """`_exact_draw` of one sample a row, with sums in any order.

    Args:
      rows, weights, uniforms: as for `_exact_draw`.
      error_bound: a number: how far each weight may be wrong, rounding of the sums included, in parts of it, or of its
        `slope`.
      slope: None, or laid-out like weights.
      validate: whether weights may be below 0, or so large or small that their sums over- or underflow; the draw of
        such a row is ambiguous.

    Returns:
      (drawn, ambiguous): laid-out [rows, 1], int32, −1 for an invalid row; and float32, 1.0 for a draw so near to a
      border that errors may have moved it across.
    """

    def sum_groups(*weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The sums are [1 or 2, rows, groups]: of weights, −1 for an invalid group, and of slopes."""
        sums = [fast_sum(w)[..., 0] for w in weights]
        valid = functools.reduce(tf.logical_and, [s < np.inf for s in sums])  # false for NaN too
        if validate:
            valid = tf.logical_and(valid, tf.reduce_min(weights[0], -1) >= 0)
        return weights[0], tf.stack([tf.where_v2(valid, s, -1.0) for s in sums])

    def choose_group(sums: tf.Tensor, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        bound = error_bound if slope is None else error_bound * tf.reduce_sum(sums[1], -1, keepdims=True)
        totals = tf.maximum(sums[0], 0.0)[:, tf.newaxis]
        group, ambiguous = _fast_inverse_cdf(totals, tf.zeros_like(u, tf.int32), u, bound)
        least, most = tf.reduce_min(sums[0], -1, keepdims=True), tf.reduce_max(sums[0], -1, keepdims=True)
        valid = tf.logical_and(least >= 0, most > 0)
        ambiguous = tf.where_v2(valid, ambiguous, 0.0)
        if validate:
            moderate = tf.logical_and(most > 2.0**-100, most < 2.0**100)  # far from float32's limits
            ambiguous = tf.where_v2(tf.logical_and(least >= 0, moderate), ambiguous, 1.0)
        return tf.where_v2(valid, group, -1), ambiguous

    def choose_entry(
        weights: tf.Tensor, group: tf.Tensor, u: tf.Tensor, sums: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return _fast_inverse_cdf(weights, group, u, error_bound if slope is None else error_bound * sums[1])

    weights_and_slope = [weights] if slope is None else [weights, slope]
    drawn, ambiguous = _two_level_draw(rows, weights_and_slope, uniforms, sum_groups, choose_group, choose_entry)
    return drawn, ambiguous


def _fast_inverse_cdf(
    weights: tf.Tensor, which: tf.Tensor, u: tf.Tensor, error_bound: float | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """`_inverse_cdf` of one sample a row, with sums in any order.

    Args:
      weights, which, u: as for `_inverse_cdf`; each vector that is drawn from has mass.
      error_bound: of the sums: a number, in parts of the total, or float32 [rows, vectors], in the weights' own units.

    Returns:
      (entry, ambiguous): [rows, 1], int32 in [0, n), and float32, 1.0 where the target is that close to a sum.
    """
    sums = _fast_cdf(tf.gather(weights, which, batch_dims=1))
    total = sums[..., -1]
    target = (_as_float32(u) * total)[..., tf.newaxis]
    bound = error_bound * total if isinstance(error_bound, float) else tf.gather(error_bound, which, batch_dims=1)
    ambiguous = tf.reduce_min(tf.abs(sums - target), -1) < bound + UNIFORM_ERROR_BOUND * total
    return _first_above(sums, target, size_of(weights, -1) - 1), tf.cast(ambiguous, tf.float32)


def _fast_cdf(weights: tf.Tensor) -> tf.Tensor:
    """Cumulative sums over the last axis, with an error like that of `fast_sum`; the last of them may be repeated."""
    size = size_of(weights, -1)
    if size <= 32:
        return tf.cumsum(weights, -1)
    part, shape = min(math.isqrt(size), 32), weights.shape.as_list()[:-1]
    within = tf.cumsum(tf.reshape(pad_last(weights, after=-size % part), shape + [-1, part]), -1)
    n_parts = size_of(within, -2)
    before = pad_last(_fast_cdf(within[..., -1])[..., : n_parts - 1], before=1)
    return tf.reshape(before[..., tf.newaxis] + within, shape + [-1])


def _as_float32(u: tf.Tensor) -> tf.Tensor:
    """Uniforms as of `_as_float64`, their upper 24 bits."""
    if u.dtype == tf.float32:
        return u
    upper = tf.bitwise.right_shift(tf.bitcast(u, tf.uint32), tf.constant(8, tf.uint32))
    return tf.cast(upper, tf.float32) * 2.0**-24


def _inverse_cdf_of_many(weights: tf.Tensor, which: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    """`_inverse_cdf` of more samples than there are vectors: the sums are computed once, then searched by bisection."""
    rows, vectors, n = weights.shape.as_list()
    sums, last = _exact_cdf(weights)
    cdf = tf.reshape(_scan(sums, tf.maximum), [-1])  # which a sum passes where, for the first time, one of `sums` does
    vector = which + tf.range(rows)[:, tf.newaxis] * vectors
    begin = vector * n
    target = _as_float64(u) * tf.gather(cdf, begin + (n - 1))
    low, high = tf.zeros_like(which), tf.fill(tf.shape(which), n)  # cdf[low − 1] ≤ target < cdf[high]
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        right = tf.logical_and(low < high, tf.gather(cdf, begin + tf.minimum(middle, n - 1)) <= target)
        low, high = tf.where_v2(right, middle + 1, low), tf.where_v2(right, high, middle)
    return tf.minimum(low, tf.gather(tf.reshape(last, [-1]), vector))


# --- Draws from weights ---------------------------------------------------------------


def grouped_draw(
    weights: mtf.Tensor,
    group_uniform: mtf.Tensor,
    entry_uniform: mtf.Tensor,
    dim: mtf.Dimension,
    samples_dim: mtf.Dimension | None = None,
    size: int | None = None,
) -> mtf.Tensor:
    """Draws indices along `dim` in proportion to `weights`, in two levels.

    The result is that of `_exact_draw`: equal weights and uniforms give equal draws on any layout and backend, and no
    float32 weight over- or underflows. One draw a row is first tried with `_fast_draw`. Time and memory are linear in
    `dim`. A layout that splits `dim` moves 128 numbers a row (all of the row if it cuts through a group).

    Args:
      weights: mtf.Tensor, any float dtype; groups are summed in float32, entries in
        float64.
      group_uniform: mtf.Tensor [weights.shape − dim], then samples_dim where there is
        one: float32 in [0, 1), or int32, read as unsigned multiples of 2⁻³². With
        32 bits an entry's probability is exact to 2⁻³² of its group's.
      entry_uniform: likewise.
      dim: mtf.Dimension of `weights`.
      samples_dim: mtf.Dimension, for many draws from each row.
      size: int, where the entries of `dim` from there on are padding, of weight
        0: the draws are then those without the padding.

    Returns:
      int32 mtf.Tensor of the uniforms' shape. An entry of weight 0 is never
      drawn; a row with a negative or non-finite weight, or with no mass, gives
      −1.
    """
    return _GroupedDrawOperation(weights, group_uniform, entry_uniform, dim, samples_dim, size).outputs[0]


class _DrawOperation(MeshOperation):
    def __init__(
        self,
        inputs: list[mtf.Tensor],
        dim: mtf.Dimension,
        samples_dim: mtf.Dimension | None,
        size: int | None,
        name: str,
    ) -> None:
        x, group_uniform, entry_uniform = inputs[:3]
        rows = x.shape - dim
        shape = rows if samples_dim is None else rows + samples_dim
        for u in (group_uniform, entry_uniform):
            if u.shape != shape:
                raise ValueError(f"{name}: uniforms of shape {u.shape} where {shape} is needed")
            if u.dtype not in (tf.float32, tf.int32):
                raise ValueError(f"{name}: uniforms of dtype {u.dtype.name}; float32 or int32 is needed")
        if size is not None and not 1 <= size <= dim.size:
            raise ValueError(f"{name}: size={size} of {dim}; from 1 to {dim.size} is needed")
        super().__init__(inputs, [(shape, tf.int32)], name)
        self._dim = dim
        self._samples_dim = samples_dim
        self._size = size

    def _rows(self, mesh_impl: mtf.MeshImpl) -> ShardedRows:
        rows = ShardedRows(mesh_impl, self.inputs[0].shape, self._dim, self._size)
        if rows.mesh_axis is not None:
            for d in self.outputs[0].shape.dims:
                if mesh_impl.tensor_dimension_to_mesh_axis(d) == rows.mesh_axis:
                    raise ValueError(
                        f"{self.name}: the layout splits both {self._dim.name} and {d.name} along mesh axis "
                        f"{mesh_impl.shape[rows.mesh_axis].name}; drawing along {self._dim.name} needs {d.name} "
                        "elsewhere"
                    )
        return rows


class _GroupedDrawOperation(_DrawOperation):
    def __init__(
        self,
        weights: mtf.Tensor,
        group_uniform: mtf.Tensor,
        entry_uniform: mtf.Tensor,
        dim: mtf.Dimension,
        samples_dim: mtf.Dimension | None,
        size: int | None,
    ) -> None:
        super().__init__([weights, group_uniform, entry_uniform], dim, samples_dim, size, "grouped_draw")

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        rows = self._rows(mesh_impl)
        weights, *uniforms = (lowering.tensors[t] for t in self.inputs)
        slicewise = mesh_impl.slicewise

        w = slicewise(lambda w: rows.to_rows(tf.cast(w, tf.float32)), weights)
        if rows.gathered_axis is not None:  # in finite values; −1 stands for whatever makes a row invalid
            w = rows.gather(slicewise(lambda w: tf.where_v2(tf.logical_and(w >= 0, w < np.inf), w, -1.0), w))
        uniforms = [slicewise(lambda u, w: tf.reshape(u, [size_of(w, 0), -1]), u, w) for u in uniforms]

        def draw_again() -> LaidOut:
            return _exact_draw(rows, rows.in_groups(w), uniforms)

        if self._samples_dim is not None:  # whose sums are computed once for all
            drawn = draw_again()
        else:
            drawn, ambiguous = _fast_draw(rows, rows.in_groups(w), uniforms, SUM_ERROR_BOUND, validate=True)
            drawn = laid_out_cond(mesh_impl, any_of(mesh_impl, ambiguous), draw_again, lambda: drawn)
        out_shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, out_shape), drawn))


# --- Draws from scores --------------------------------------------------------------


def score_draw(
    scores: mtf.Tensor,
    group_uniform: mtf.Tensor,
    entry_uniform: mtf.Tensor,
    dim: mtf.Dimension,
    alpha: mtf.Tensor | None = None,
    size: int | None = None,
    *,
    factor: mtf.Tensor | None = None,
    ids: mtf.Tensor | None = None,
    wanted: mtf.Tensor | None = None,
    n_candidates: int = 256,
) -> mtf.Tensor:
    """Draws an index along `dim` from softmax or entmax of `scores`, times `factor`.

    Equal scores and uniforms give the same index on every layout, backend and device, although the bits of exp differ
    between them. `_fast_draw` is from weights computed in floating point; if it is ambiguous, about one draw in a
    thousand, all rows draw again by `_exact_draw`, from weights computed in integers (see `fixed_point`). So the index
    is always the one that those weights give.

    A layout that splits `dim` moves 64 numbers a row, for entmax 128 and 2 more for
    each step of its solver (all of the row if it cuts through a group).

    Args:
      scores: float32 mtf.Tensor; −inf is allowed.
      group_uniform, entry_uniform: mtf.Tensors [scores.shape − dim], as for
        `grouped_draw`.
      dim: mtf.Dimension of `scores`.
      alpha: None for softmax; a float32 mtf.Tensor in [1, 2], its dims among
        [scores.shape − dim], for entmax.
      size: int, where the entries of `dim` from there on are padding, of score
        −inf or the lowest number: the draws are then those without the padding.
      factor: None or a float32 mtf.Tensor, its dims among [scores.shape − dim]: multiplies
        the scores, after the largest one of their row is subtracted.
      ids: None, or an int32 mtf.Tensor of the shape of `scores`, no two of a row
        equal: the scores are those of these entries of a dimension of `size` entries, and all
        others are masked. The draw is one of the ids, the same as from the masked row.
      wanted: None, or a float32 mtf.Tensor [scores.shape − dim]: 1.0 for a row whose
        index is used. If there is no such row, nothing is drawn and all give −1.
      n_candidates: int: entmax is first solved for this many entries of a shard, see `entmax_by_candidates`.

    Returns:
      int32 mtf.Tensor [scores.shape − dim]; −1 for a row with NaN or +inf, no score
      above −inf, a factor that is not a number above 0, or an alpha outside [1, 2].
    """
    return _ScoreDrawOperation(
        scores, group_uniform, entry_uniform, dim, alpha, size, factor, ids, wanted, n_candidates
    ).outputs[0]


class _ScoreDrawOperation(_DrawOperation):
    def __init__(
        self,
        scores: mtf.Tensor,
        group_uniform: mtf.Tensor,
        entry_uniform: mtf.Tensor,
        dim: mtf.Dimension,
        alpha: mtf.Tensor | None,
        size: int | None,
        factor: mtf.Tensor | None,
        ids: mtf.Tensor | None,
        wanted: mtf.Tensor | None,
        n_candidates: int,
    ) -> None:
        if scores.dtype != tf.float32:
            raise ValueError(f"score_draw: scores of dtype {scores.dtype.name}; float32 is needed")
        self._n_candidates = n_candidates
        self._whole_size = dim.size if size is None else size  # of the rows that the ids are entries of
        self._optional = {"factor": factor, "alpha": alpha, "ids": ids, "wanted": wanted}
        inputs = [scores, group_uniform, entry_uniform, *(t for t in self._optional.values() if t is not None)]
        super().__init__(inputs, dim, None, size if ids is None else None, "score_draw")

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        draw = functools.partial(self._draw_rows, lowering)
        if self._optional["wanted"] is None:
            drawn = draw()
        else:
            wanted = any_of(mesh_impl, lowering.tensors[self._optional["wanted"]])
            none = slicewise(lambda u: tf.fill([u.shape.num_elements(), 1], -1), lowering.tensors[self.inputs[1]])
            drawn = laid_out_cond(mesh_impl, wanted, draw, lambda: none)
        shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, shape), drawn))

    def _draw_rows(self, lowering: mtf.Lowering) -> LaidOut:
        """Laid-out [rows, 1]: what is drawn."""
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        scores, *uniforms = (lowering.tensors[t] for t in self.inputs[:3])
        uniforms = [slicewise(lambda u: tf.reshape(u, [-1, 1]), u) for u in uniforms]
        rows = self._rows(mesh_impl)
        x = slicewise(rows.to_rows, scores)
        factor, epsilon = self._factor_and_epsilon(lowering)
        if self._optional["ids"] is not None:
            ids = slicewise(rows.to_rows, lowering.tensors[self._optional["ids"]])
            if epsilon is None and candidate_draw.can_draw(mesh_impl, self._dim.size):
                return self._draw_on_core(lowering, CandidateRows(mesh_impl, self._whole_size, ids), x, factor, None)
            x, ids = slicewise(_by_id, x, ids)
            rows = CandidateRows(mesh_impl, self._whole_size, ids)
        if softmax_draw.can_draw(rows):
            return self._draw_on_core(lowering, rows, x, factor, epsilon)
        scores_of = self._scores_of(rows, x, factor)
        if rows.gathered_axis is not None:  # in finite values; 1 stands for an invalid score
            lowest = tf.float32.min
            x = slicewise(lambda z: tf.where_v2(z <= 0, tf.maximum(z, lowest), 1.0), scores_of(x))
            x = slicewise(lambda z: tf.where_v2(z <= 0, z, np.nan), rows.gather(x))
            scores_of = lambda x: x  # noqa: E731

        def draw_by_entmax(rows: ShardedRows, *weights_and_slope: LaidOut) -> tuple[LaidOut, tf.Tensor]:
            weights, slope = map(rows.in_groups, weights_and_slope)
            drawn, ambiguous = _fast_draw(rows, weights, uniforms, ENTMAX_ERROR_BOUND, slope)
            return drawn, any_of(mesh_impl, ambiguous)

        def draw_candidates(ids: LaidOut, p: LaidOut, slope: LaidOut) -> tuple[LaidOut, tf.Tensor]:
            p, ids, slope = slicewise(_by_id, p, ids, slope)
            candidates = CandidateRows(mesh_impl, rows.size, ids, rows.mesh_axis, x.slice_shape[1])
            return draw_by_entmax(candidates, p, slope)

        if epsilon is None:
            # grouped first: all that follows is done in place
            weights = slicewise(tf.exp, scores_of(rows.in_groups(x, -np.inf)))
            drawn, ambiguous = _fast_draw(rows, weights, uniforms, SOFTMAX_ERROR_BOUND)
            ambiguous = any_of(mesh_impl, ambiguous)
        else:
            draw_all = functools.partial(draw_by_entmax, rows)
            drawn, ambiguous = entmax_by_candidates(
                rows, x, self._n_candidates, scores_of, epsilon, 50, draw_candidates, draw_all
            )

        def draw_again() -> LaidOut:
            return self._draw_exactly(rows, scores_of(x), uniforms, epsilon)

        return laid_out_cond(mesh_impl, ambiguous, draw_again, lambda: drawn)

    def _scores_of(self, rows: ShardedRows, x: LaidOut, factor: LaidOut | None) -> Callable[[LaidOut], LaidOut]:
        """A function from x, or some of it, to scores less the largest of their row, so that no factor overflows.

        An invalid score becomes NaN or +inf.
        """
        slicewise = rows.mesh_impl.slicewise
        top = slicewise(lambda x: finite(tf.reduce_max(x, -1, keepdims=True)), x)
        if rows.split_axis is not None:
            top = rows.mesh_impl.allreduce(top, [rows.split_axis], "MAX")

        return lambda x: slicewise(_scaled, x, top, *([] if factor is None else [factor]))

    def _draw_exactly(
        self, rows: ShardedRows, z: LaidOut, uniforms: Sequence[LaidOut], epsilon: LaidOut | None = None
    ) -> LaidOut:
        """Laid-out [rows, 1]: what is drawn from weights in integers, of scores z less the largest of their row."""
        slicewise = rows.mesh_impl.slicewise
        z = slicewise(lambda z: tf.where_v2(z <= 0, z, np.nan), z)
        if epsilon is None:
            weights = slicewise(fixed_point.softmax_weights, z)
        else:
            weights = fixed_point.entmax_weights(rows.mesh_impl, z, epsilon, lambda x: rows.across_shards(x, "SUM"))
        weights = slicewise(lambda w, z: tf.where_v2(tf.is_nan(z), np.inf, w), weights, z)
        return _exact_draw(rows, rows.in_groups(weights), uniforms)

    def _draw_on_core(
        self, lowering: mtf.Lowering, rows: ShardedRows, x: LaidOut, factor: LaidOut | None, epsilon: LaidOut | None
    ) -> LaidOut:
        """`_draw_rows` in a core program: from whole rows, or, softmax alone, from few candidates."""
        mesh_impl = rows.mesh_impl
        slicewise = mesh_impl.slicewise

        def in_columns(bits: Sequence[LaidOut]) -> list[LaidOut]:
            return [slicewise(lambda u: tf.reshape(u, [-1, 1]), u) for u in bits]

        # What an exact draw is made from is computed in its branch: no other step needs it.
        def draw_again() -> LaidOut:
            bits = in_columns(bits_again(lowering, self.inputs[1:3]))
            if epsilon is not None:
                return _exact_draw_on_core(rows, rows.in_groups(exact_weights()), lambda w: w, [], bits)
            if rows.ids is None:
                exact_rows, exact_x, top_of_row = rows, x, top
            else:
                exact_x, ids = slicewise(_by_id, x, rows.ids)
                exact_rows = CandidateRows(mesh_impl, self._whole_size, ids)
                top_of_row = slicewise(lambda x: finite(tf.reduce_max(x, -1, keepdims=True)), exact_x)
            of_row = [top_of_row, *([] if factor is None else [factor])]
            return _exact_draw_on_core(
                exact_rows, exact_rows.in_groups(exact_x, -np.inf), _exact_softmax_weights, of_row, bits
            )

        uniforms = in_columns([lowering.tensors[u] for u in self.inputs[1:3]])
        if epsilon is not None:
            drawn, ambiguous, exact_weights = _core_entmax_draw(rows, x, factor, epsilon, uniforms)
        elif rows.ids is not None:
            drawn, ambiguous = candidate_draw.draw_candidates(
                mesh_impl, self._whole_size, x, rows.ids, factor, uniforms
            )
        else:
            some = factor or slicewise(lambda u: tf.ones_like(u, tf.float32), uniforms[0])
            drawn, ambiguous, top = softmax_draw.softmax_draw(rows, x, some, uniforms)
        return laid_out_cond(mesh_impl, largest_of_cores(rows, ambiguous), draw_again, lambda: drawn)

    def _factor_and_epsilon(self, lowering: mtf.Lowering) -> tuple[LaidOut | None, LaidOut | None]:
        """(factor, ε), each None or laid-out [rows, 1]; NaN and 0 where α is invalid."""
        mesh_impl = lowering.mesh_impl(self)
        shape = self.inputs[0].shape - self._dim
        given = (self._optional[name] for name in ("factor", "alpha"))
        factor, alpha = (None if t is None else spread_rows(lowering, t, shape) for t in given)
        if factor is not None:
            factor = mesh_impl.slicewise(lambda f: tf.where_v2(f > 0, f, np.nan), factor)
        if alpha is None:
            return factor, None

        def split(alpha: tf.Tensor, *factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            valid = tf.logical_and(alpha >= 1, alpha <= 2)
            return tf.where_v2(valid, factor[0] if factor else 1.0, np.nan), tf.where_v2(valid, alpha - 1.0, 0.0)

        return mesh_impl.slicewise(split, alpha, *([] if factor is None else [factor]))


# --- For a TPU core's program: few kernels ---------------------------------------------

_GROUPS_AT_ONCE = 32  # of all rows


def _core_entmax_draw(
    rows: ShardedRows, x: LaidOut, factor: LaidOut | None, epsilon: LaidOut, uniforms: Sequence[LaidOut]
) -> tuple[LaidOut, LaidOut, Callable[[], LaidOut]]:
    """Draws from entmax of scores x [rows, entries], laid out.

    Returns:
      (drawn, ambiguous, exact_weights): what `draw_few_kernels` returns, and a function to laid-out weights like x that
      are the same on every backend, +inf where a score is invalid.
    """
    mesh_impl = rows.mesh_impl
    slicewise = mesh_impl.slicewise
    grouped = rows.in_groups(x, -np.inf)
    # one reduction of all at once would take the TPU longer
    of_groups = whole_axis(rows, slicewise(lambda x: kept_together(tf.reduce_max(x, 2))[0], grouped))

    def top_and_start(of_groups: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        top = tf.reduce_max(of_groups, -1, keepdims=True)
        return top, tf.where_v2(tf.abs(top) < np.inf, 1.0, np.nan)  # what is not finite is invalid

    top, start = slicewise(top_and_start, of_groups)

    def scores_of(x: tf.Tensor, *factor_and_top: tf.Tensor) -> tf.Tensor:
        *factor, top = factor_and_top
        return _scaled(x, top, *factor)

    of_row = [*([] if factor is None else [factor]), top]
    beta = solve_in_few_kernels(rows, scores_of, [grouped, *of_row], epsilon, start, 50)
    weights, slope = slicewise(
        lambda eps, beta, *given: weights_and_slopes(scores_of(*given), eps, beta, NEAR_EDGE),
        epsilon, beta, grouped, *of_row,
    )  # fmt: skip
    drawn, ambiguous = draw_few_kernels(
        rows, weights, uniforms, lambda *sums: ENTMAX_ERROR_BOUND + residual(*sums), slope, [epsilon, beta]
    )

    def exact_weights() -> LaidOut:
        def valid_scores(*given: tf.Tensor) -> tf.Tensor:
            z = scores_of(*given)
            return tf.where_v2(z <= 0, z, np.nan)

        z = slicewise(valid_scores, x, *of_row)
        weights = fixed_point.entmax_weights_near(
            mesh_impl, z, epsilon, beta, lambda x: rows.across_shards(x, "SUM"),
            lambda x: largest_of_cores(rows, x),
        )  # fmt: skip
        return slicewise(lambda w, z: tf.where_v2(tf.is_nan(z), np.inf, w), weights, z)

    return drawn, ambiguous, exact_weights


def _exact_draw_on_core(
    rows: ShardedRows,
    x: LaidOut,
    weights_of: Callable[..., tf.Tensor],
    of_row: Sequence[LaidOut],
    uniforms: Sequence[LaidOut],
) -> LaidOut:
    """`_exact_draw` from weights that are computed a few groups at a time: a TPU's code grows with what a kernel takes.

    Args:
      rows, uniforms: as for `_exact_draw`.
      x: laid-out, as `rows.in_groups` gives them.
      weights_of: a function from some groups of slices of x, and of `of_row`, to weights, none below 0.
      of_row: laid-out [rows, 1].

    Returns:
      laid-out int32 [rows, 1], as `_exact_draw`.
    """
    slicewise = rows.mesh_impl.slicewise
    n_rows, n_groups, _ = x.slice_shape
    n_at_once = next(n for n in range(max(_GROUPS_AT_ONCE // n_rows, 1), 0, -1) if n_groups % n == 0)

    def sum_groups(at: tf.Tensor, sums: LaidOut) -> tuple[tf.Tensor, LaidOut]:
        def sum_some(sums: tf.Tensor, x: tf.Tensor, *of_row: tf.Tensor) -> tf.Tensor:
            some = tf.slice(x, tf.stack([0, at, 0]), [n_rows, n_at_once, size_of(x, 2)])
            return update_slice(sums, _scaled_group_sums(weights_of(some, *of_row))[1], [0, 0, at])

        return at + n_at_once, slicewise(sum_some, sums, x, *of_row)

    def choose_group(sums: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        totals, valid = _group_totals(sums)
        return tf.where_v2(valid, _first_passed(totals, u[:, 0])[:, tf.newaxis], -1)

    def choose_entry(x: tf.Tensor, group: tf.Tensor, u: tf.Tensor, *of_row: tf.Tensor) -> tuple[tf.Tensor]:
        chosen = tf.gather(x, group[:, 0], batch_dims=1)  # [rows, places]: a row's 1 among the axes costs eight times
        weights, _ = _scaled_group_sums(weights_of(chosen, *of_row))
        return (_first_passed(weights, u[:, 0])[:, tf.newaxis],)

    group_uniform, entry_uniform = uniforms
    start = tf.constant(0), slicewise(lambda x: tf.zeros([2, n_rows, n_groups]), x)
    _, sums = laid_out_while_loop(rows.mesh_impl, lambda at, _: at < n_groups, sum_groups, start)
    group = slicewise(choose_group, rows.across_groups(sums), group_uniform)
    (drawn,) = rows.choose_within(group, choose_entry, x, entry_uniform, *of_row)
    return drawn


def _scaled(x: tf.Tensor, top: tf.Tensor, *factor: tf.Tensor) -> tf.Tensor:
    """Scores of x [rows, …] less the largest of their row, times a factor if there is one, [rows, 1] both."""
    per_row = [-1] + [1] * (x.shape.rank - 1)
    z = x - tf.reshape(top, per_row)
    return z * tf.reshape(factor[0], per_row) if factor else z


def _exact_softmax_weights(x: tf.Tensor, top: tf.Tensor, *factor: tf.Tensor) -> tf.Tensor:
    """Weights in integers of scores [rows, …], +inf for an invalid one."""
    z = _scaled(x, top, *factor)
    return tf.where_v2(z <= 0, fixed_point.softmax_weights(z), np.inf)


def _by_id(x: tf.Tensor, ids: tf.Tensor, *others: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """(x, ids, …), all [rows, n], sorted by ids in ascending order."""
    ids, order = tf.math.top_k(-ids, size_of(ids, 1))
    x, *rest = (tf.gather(t, order, batch_dims=1) for t in (x, *others))
    return x, -ids, *rest

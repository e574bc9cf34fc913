"""Draws: from weights or from scores to an index, in two levels.

A dimension is taken in at most 64 contiguous groups, whose borders depend on
its size alone. A draw first chooses a group, then an entry in it, by inverse
CDF with a uniform of its own for each. One float32 uniform has 24 bits, which
is not enough for 50,257 entries at once, nor for an entry of 1e-7 in a group that
has most of the mass; so each has 32, and float64 sums.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut, RowValue
from gpt_neo_sampling.mesh.ops import (
    MeshOperation,
    check_floating,
    dim_of,
    finite,
    import_rows,
    pad_last,
    row_index,
    size_of,
)
from gpt_neo_sampling.mesh.sharded_rows import ChosenRows, Rows, any_of, as_list, near_sum, spread_rows
from gpt_neo_sampling.sampling import fixed_point
from gpt_neo_sampling.sampling.entmax_solver import entmax_by_chosen
from gpt_neo_sampling.sampling.random import counter_bits, import_seed

SUM_MARGIN = 1e-6  # how far sums in two orders may be apart, in parts of the total
UNIFORM_MARGIN = 2.0**-24  # and what the bits add that float32 has no room for


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

    By inverse CDF in two levels (see `grouped_draw`), each with a uniform
    of 32 bits of its own: time and memory are linear in `dim`, and the index drawn
    is the same on every layout and backend.

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

    Example (`run` is that of `models.utils`):

        >>> samples = mtf.Dimension("samples", 6)
        >>> run(lambda x: sample_categorical(x, seed=1, samples_dim=samples), [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
        array([[ 2,  2,  2,  2,  2,  0],
               [-1, -1, -1, -1, -1, -1]], dtype=int32)
    """
    dim = dim_of(x, dim)
    rows = x.shape - dim
    check_floating(x, "sample_categorical: weights")
    if samples_dim is not None and samples_dim in x.shape.dims:
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
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """The two uniforms of each draw, as 32 bits each; arguments as those of `sample_categorical`.

    Args:
      mesh: mtf.Mesh.
      rows: mtf.Shape, the dims of the request.

    Returns:
      a pair of int32 mtf.Tensors [rows], then samples_dim: see `counter_bits`.
    """
    seed = import_seed(mesh, seed, rows)
    stream = row_index(mesh, rows) if stream is None else (
        mtf.broadcast(import_rows(mesh, stream, tf.int32, rows, "stream"), rows))  # fmt: skip
    step = import_rows(mesh, step, tf.int32, rows, "step")
    sample = None if samples_dim is None else mtf.range(mesh, samples_dim, tf.int32)
    return counter_bits(seed, stream, step, sample)


def _fold_sum(x: tf.Tensor) -> tf.Tensor:
    """Sum over the last axis, keeping it: halves are added until one is left.

    Unlike reduce_sum, whose order of additions is the backend's affair (even of
    two at a time: XLA makes one sum of several).
    """
    size = size_of(x, -1)
    while size > 1:
        half = (size + 1) // 2
        upper = pad_last(x[..., half:], after=size % 2)
        x, size = x[..., :half] + upper, half
    return x


def _near_cdf(weights: tf.Tensor) -> tf.Tensor:
    """Cumulative sums over the last axis, as near as `near_sum`; the last of them may be repeated."""
    size = size_of(weights, -1)
    if size <= 32:
        return tf.cumsum(weights, -1)
    part, shape = min(math.isqrt(size), 32), weights.shape.as_list()[:-1]
    within = tf.cumsum(tf.reshape(pad_last(weights, after=-size % part), shape + [-1, part]), -1)
    n_parts = size_of(within, -2)
    before = pad_last(_near_cdf(within[..., -1])[..., : n_parts - 1], before=1)
    return tf.reshape(before[..., tf.newaxis] + within, shape + [-1])


def _scan(x: tf.Tensor, combine: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Inclusive prefix scan over the last axis of values ≥ 0, in log₂ steps."""
    shift, size = 1, size_of(x, -1)
    while shift < size:
        x = combine(x, pad_last(x[..., :-shift], before=shift))
        shift *= 2
    return x


def _sums_and_last(weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(sums, last) of float32 weights [..., n], none below 0.

    sums [..., n], float64, are those up to each entry of weight above 0, and 0 at the others:
    taken in log₂ steps they need not be monotone in floating point. last [...]
    int32 is the last entry of weight above 0, −1 where there is none.
    """
    has_mass, weights = weights > 0, tf.cast(weights, tf.float64)
    sums = tf.where_v2(has_mass, _scan(weights, tf.add), tf.zeros_like(weights))
    last = tf.reduce_max(tf.where_v2(has_mass, tf.range(size_of(weights, -1)), -1), -1)
    return sums, last


def _as_float64(u: tf.Tensor) -> tf.Tensor:
    """A uniform, float32 in [0, 1) or 32 bits as int32, as it is."""
    return tf.cast(u, tf.float64) if u.dtype == tf.float32 else tf.cast(tf.bitcast(u, tf.uint32), tf.float64) * 2.0**-32


def _as_float32(u: tf.Tensor) -> tf.Tensor:
    """The upper 24 bits of the same."""
    if u.dtype == tf.float32:
        return u
    upper = tf.bitwise.right_shift(tf.bitcast(u, tf.uint32), tf.constant(8, tf.uint32))
    return tf.cast(upper, tf.float32) * 2.0**-24


def _search(weights: tf.Tensor, which: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    """Draws from chosen ones of several weight vectors, by inverse CDF, with float64 sums in a fixed order.

    Args:
      weights: [rows, vectors, n] float32, none below 0.
      which: [rows, samples] int32 in [0, vectors).
      u: [rows, samples], uniforms: see `_as_float64`.

    Returns:
      [rows, samples] int32, the first entry with mass up to which the sum passes u
      times the largest sum (the last entry with mass where rounding leaves none),
      −1 without mass.
    """
    rows, vectors, n = weights.shape.as_list()
    u = _as_float64(u)
    if size_of(u, 1) <= vectors:  # few draws: look only at what they draw from
        sums, last = _sums_and_last(tf.gather(weights, which, batch_dims=1))
        target = u[..., tf.newaxis] * tf.reduce_max(sums, -1, keepdims=True)
        return tf.minimum(tf.reduce_min(tf.where_v2(sums > target, tf.range(n), n), -1), last)
    sums, last = _sums_and_last(weights)
    cdf = tf.reshape(_scan(sums, tf.maximum), [-1])  # which a sum passes where, for the first time, one of `sums` does
    vector = which + tf.range(rows)[:, tf.newaxis] * vectors
    begin = vector * n
    target = u * tf.gather(cdf, begin + (n - 1))
    low, high = tf.zeros_like(which), tf.fill(tf.shape(which), n)  # cdf[low − 1] ≤ target < cdf[high]
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        right = tf.logical_and(low < high, tf.gather(cdf, begin + tf.minimum(middle, n - 1)) <= target)
        low, high = tf.where_v2(right, middle + 1, low), tf.where_v2(right, high, middle)
    return tf.minimum(low, tf.gather(tf.reshape(last, [-1]), vector))


def _search_near(
    weights: tf.Tensor, which: tf.Tensor, u: tf.Tensor, margin: float | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """`_search` of one sample a row, with sums in whatever order is fast.

    Args:
      weights, which, u: as for `_search`; each vector that is drawn from has mass.
      margin: how near to a border a draw is in doubt: a number, in parts of the
        total, or float32 [rows, vectors], in the weights' own units.

    Returns:
      (entry, doubt): [rows, 1], int32 in [0, n), and float32, 1.0 in doubt.
    """
    cdf = _near_cdf(tf.gather(weights, which, batch_dims=1)[:, 0])
    total = cdf[:, -1:]
    margin = margin * total if isinstance(margin, float) else tf.gather(margin, which, batch_dims=1)
    margin += UNIFORM_MARGIN * total
    target = _as_float32(u) * total
    entry = tf.reduce_sum(tf.cast(cdf <= target, tf.int32), -1, keepdims=True)
    doubt = tf.reduce_min(tf.abs(cdf - target), -1, keepdims=True) < margin
    return tf.minimum(entry, size_of(weights, -1) - 1), tf.cast(doubt, tf.float32)


def _draw(rows: Rows, weights: LaidOut, uniforms: Sequence[LaidOut]) -> LaidOut:
    """Both levels of a draw, at the level of laid-out tensors, with sums in a fixed order.

    They are of weights scaled by powers of two, so that none of float32 over- or
    underflows.

    Args:
      rows: Rows.
      weights: laid-out float32 [rows, entries]; one below 0, +inf or NaN makes a
        row invalid.
      uniforms: a pair, for the group and for the entry, laid-out [rows, samples]: see `_as_float64`.

    Returns:
      laid-out int32 [rows, samples], −1 for an invalid row or one without mass.
    """
    slicewise = rows.mesh_impl.slicewise
    group_uniform, entry_uniform = uniforms

    def sum_groups(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """w scaled; and [2, rows, groups], to travel: what each adds up to, and the
        exponent taken out of it, biased, 255 for an invalid one."""
        least, most = tf.reduce_min(w, -1, keepdims=True), tf.reduce_max(w, -1, keepdims=True)
        most = tf.where_v2(least >= 0, tf.abs(most), np.inf)  # without −0.0's sign
        exponent = tf.bitwise.right_shift(tf.bitcast(most, tf.int32), tf.constant(23))
        scale = tf.bitwise.left_shift(254 - tf.minimum(exponent, 253), tf.constant(23))
        w *= tf.bitcast(scale, tf.float32)  # its largest is in [1, 4) now
        total = _fold_sum(w)  # NaN where one is, as maxima need not be
        exponent = tf.where_v2(total < np.inf, exponent, 255)
        total = tf.where_v2(exponent < 255, total, 0.0)  # finite, to travel
        return w, tf.stack([total[..., 0], tf.cast(exponent[..., 0], tf.float32)])

    def choose_group(sums: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        exponent = tf.cast(sums[1], tf.int32)
        largest = tf.reduce_max(exponent, -1, keepdims=True)
        relative = tf.minimum(exponent, 253) - tf.minimum(largest, 253) + 127
        relative = tf.bitwise.left_shift(tf.maximum(relative, 0), tf.constant(23))
        totals = sums[0] * tf.bitcast(relative, tf.float32)
        group = _search(totals[:, tf.newaxis], tf.zeros_like(u, tf.int32), u)
        return tf.where_v2(largest < 255, group, -1)

    weights, sums = slicewise(sum_groups, rows.in_groups(weights))
    group = slicewise(choose_group, rows.across_groups(sums), group_uniform)
    (drawn,) = rows.choose_within(group, lambda w, group, u: [_search(w, group, u)], weights, entry_uniform)
    return drawn


def _draw_near(
    rows: Rows,
    weights: LaidOut,
    uniforms: Sequence[LaidOut],
    margin: float,
    slope: LaidOut | None = None,
    checked: bool = True,
) -> tuple[LaidOut, LaidOut]:
    """`_draw` of one sample a row, with sums in whatever order is fast.

    Args:
      weights: laid-out, as `rows.in_groups` gives them.
      margin: a number: how far each weight may be wrong, rounding of the sums
        included, in parts of it, or of its `slope`.
      slope: None, or laid-out like weights.
      checked: False where weights may be below 0, or so large or so small that
        sums of them over- or underflow; the draw of such a row is in doubt.

    Returns:
      (drawn, doubt): laid-out [rows, 1], int32, −1 for an invalid row; and
      float32, 1.0 for a draw so near to a border that errors may have moved it
      across.
    """
    slicewise = rows.mesh_impl.slicewise
    group_uniform, entry_uniform = uniforms

    def sum_groups(*weights: tf.Tensor) -> tf.Tensor:
        """[1 or 2, rows, groups], to travel: what the weights add up to, −1 for an invalid group; and what they may
        be wrong by."""
        sums = [near_sum(w)[..., 0] for w in weights]
        valid = functools.reduce(tf.logical_and, [s < np.inf for s in sums])  # false for NaN too
        if not checked:
            valid = tf.logical_and(valid, tf.reduce_min(weights[0], -1) >= 0)
        return tf.stack([tf.where_v2(valid, s, -1.0) for s in sums])

    def choose_group(sums: tf.Tensor, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        row_margin = margin if slope is None else margin * tf.reduce_sum(sums[1], -1, keepdims=True)
        group, doubt = _search_near(tf.maximum(sums[0], 0.0)[:, tf.newaxis], tf.zeros_like(u, tf.int32), u, row_margin)
        least, most = tf.reduce_min(sums[0], -1, keepdims=True), tf.reduce_max(sums[0], -1, keepdims=True)
        valid = tf.logical_and(least >= 0, most > 0)
        doubt = tf.where_v2(valid, doubt, 0.0)
        if not checked:
            doubt = tf.where_v2(tf.logical_and(least >= 0, _is_moderate(most)), doubt, 1.0)
        return tf.where_v2(valid, group, -1), doubt

    def choose_entry(
        weights: tf.Tensor, group: tf.Tensor, u: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return _search_near(weights, group, u, margin * sums[0][1] if sums else margin)

    sums = slicewise(sum_groups, *([weights] if slope is None else [weights, slope]))
    group, group_doubt = slicewise(choose_group, rows.across_groups(sums), group_uniform)
    more = [] if slope is None else [sums]
    drawn, entry_doubt = rows.choose_within(group, choose_entry, weights, entry_uniform, *more)
    return drawn, slicewise(tf.maximum, group_doubt, entry_doubt)


def _is_moderate(total: tf.Tensor) -> tf.Tensor:
    """Whether a row's sums are far from float32's limits."""
    return tf.logical_and(total > 2.0**-100, total < 2.0**100)


def _draw_near_first(rows: Rows, weights: LaidOut, uniforms: Sequence[LaidOut]) -> LaidOut:
    """`_draw` of one sample a row: its result, in half the time where no draw is in doubt."""
    mesh_impl = rows.mesh_impl
    drawn, doubt = _draw_near(rows, rows.in_groups(weights), uniforms, SUM_MARGIN, checked=False)

    def draw_again() -> list[tf.Tensor]:
        return _draw(rows, weights, uniforms).tensor_list

    drawn = _unless(any_of(mesh_impl, doubt), drawn.tensor_list, draw_again)
    return mesh_impl.LaidOutTensor.from_tensor_list(drawn)


def _unless(doubt: tf.Tensor, drawn: Sequence[tf.Tensor], draw_again: Callable[[], list[tf.Tensor]]) -> list[tf.Tensor]:
    """A list of tensors: `drawn`, or what `draw_again` returns where `doubt` is 1.0."""
    return as_list(tf.cond(doubt > 0.5, draw_again, lambda: [tf.identity(d) for d in drawn]))


def grouped_draw(
    weights: mtf.Tensor,
    group_uniform: mtf.Tensor,
    entry_uniform: mtf.Tensor,
    dim: mtf.Dimension,
    samples_dim: mtf.Dimension | None = None,
    size: int | None = None,
) -> mtf.Tensor:
    """Draws indices along `dim` in proportion to `weights`, in two levels.

    What is drawn is what sums in one fixed order, of weights scaled by powers of
    two, would give: equal weights and uniforms give equal draws on any layout and
    backend, and no weight that float32 holds over- or underflows. One draw a row
    is first made with sums in any order, which is what comes out unless it falls
    within rounding of a border. Time and memory are linear in
    `dim`. A layout that splits `dim` moves 128 numbers a row (all of the row if
    it cuts through a group).

    Args:
      weights: mtf.Tensor, any float dtype; groups are summed in float32, entries in
        float64.
      group_uniform: mtf.Tensor [weights.shape − dim], then samples_dim where there is
        one: float32 in [0, 1), or int32, of which taken for unsigned each unit is
        2⁻³². With 32 bits an entry's probability is exact to 2⁻³² of its group's.
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

    def _rows(self, mesh_impl: mtf.MeshImpl) -> Rows:
        rows = Rows(mesh_impl, self.inputs[0].shape, self._dim, self._size)
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
        if self._samples_dim is None:
            drawn = _draw_near_first(rows, w, uniforms)
        else:
            drawn = _draw(rows, w, uniforms)
        out_shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, out_shape), drawn))


# --- Draws from scores --------------------------------------------------------------

# How far weights are taken to be from the exact ones, whatever the backend, and rounding
# of their sums included: for softmax in parts of the weight, for entmax in units of
# `solve_entmax`'s u. Seen on CPUs at the most, by tests/sampling/test_draws.py among others: 4e-7 and 5e-7.
SOFTMAX_MARGIN, ENTMAX_MARGIN = 1e-6, 2e-6


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
    only: mtf.Tensor | None = None,
    n_chosen: int = 256,
) -> mtf.Tensor:
    """Draws an index along `dim` from softmax or entmax of `scores`, times `factor`.

    Equal scores and uniforms give the same index on every layout, backend and
    device, although exp does not give the same bits there. The weights are
    computed in floating point, and where a draw falls so near to a border
    between two entries that rounding may have moved it across, all rows draw
    again, from weights computed in integers (see `fixed_point`). So what comes out is
    always what those would have given; that is rare, about one draw in a
    thousand.

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
      factor: None or a float32 mtf.Tensor, its dims among [scores.shape − dim]: what
        the scores, taken from the largest one of their row, are multiplied by.
      ids: None, or an int32 mtf.Tensor of the shape of `scores`, no two of a row
        equal: the entries that these are of a dimension of `size` entries, whose
        others are masked. What is drawn is one of them, as from all.
      only: None, or a float32 mtf.Tensor [scores.shape − dim]: 1.0 for a row of which
        an index is wanted. Where no row's is, none is drawn.

    Returns:
      int32 mtf.Tensor [scores.shape − dim]; −1 for a row with NaN or +inf, no score
      above −inf, a factor that is not a number above 0, or an alpha outside [1, 2].
    """
    return _ScoreDrawOperation(
        scores, group_uniform, entry_uniform, dim, alpha, size, factor, ids, only, n_chosen
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
        only: mtf.Tensor | None,
        n_chosen: int,
    ) -> None:
        if scores.dtype != tf.float32:
            raise ValueError(f"score_draw: scores of dtype {scores.dtype.name}; float32 is needed")
        self._n_chosen = n_chosen
        self._of = dim.size if size is None else size  # what the ids are entries of
        self._more = {"factor": factor, "alpha": alpha, "ids": ids, "only": only}
        inputs = [scores, group_uniform, entry_uniform, *(t for t in self._more.values() if t is not None)]
        super().__init__(inputs, dim, None, size if ids is None else None, "score_draw")

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        like = mesh_impl.LaidOutTensor.from_tensor_list
        draw = functools.partial(self._draw_rows, lowering)
        if self._more["only"] is None:
            drawn = draw()
        else:
            wanted = any_of(mesh_impl, lowering.tensors[self._more["only"]]) > 0.5
            none = slicewise(lambda u: tf.fill([u.shape.num_elements(), 1], -1), lowering.tensors[self.inputs[1]])
            drawn = as_list(tf.cond(wanted, draw, lambda: [tf.identity(n) for n in none.tensor_list]))
        shape = mesh_impl.slice_shape(self.outputs[0].shape)
        lowering.set_tensor_lowering(self.outputs[0], slicewise(lambda d: tf.reshape(d, shape), like(drawn)))

    def _draw_rows(self, lowering: mtf.Lowering) -> list[tf.Tensor]:
        """A list of the slices of what is drawn, each [rows, 1]."""
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        scores, *uniforms = (lowering.tensors[t] for t in self.inputs[:3])
        uniforms = [slicewise(lambda u: tf.reshape(u, [-1, 1]), u) for u in uniforms]
        rows = self._rows(mesh_impl)
        x = slicewise(rows.to_rows, scores)
        if self._more["ids"] is not None:
            x, ids = slicewise(_by_id, x, slicewise(rows.to_rows, lowering.tensors[self._more["ids"]]))
            rows = ChosenRows(mesh_impl, self._of, ids)
        factor, epsilon = self._factor_and_epsilon(lowering)

        top = slicewise(lambda x: finite(tf.reduce_max(x, -1, keepdims=True)), x)
        if rows.split_axis is not None:
            top = mesh_impl.allreduce(top, [rows.split_axis], "MAX")

        def scores_of(x: LaidOut) -> LaidOut:
            """Taken from the largest, no factor overflows. An invalid score becomes NaN or +inf."""

            def scale(x: tf.Tensor, top: tf.Tensor, *factor: tf.Tensor) -> tf.Tensor:
                per_row = [-1] + [1] * (x.shape.rank - 1)
                z = x - tf.reshape(top, per_row)
                return z * tf.reshape(factor[0], per_row) if factor else z

            return slicewise(scale, x, top, *([] if factor is None else [factor]))

        if rows.gathered_axis is not None:  # in finite values; 1 stands for an invalid score
            lowest = tf.float32.min
            x = slicewise(lambda z: tf.where_v2(z <= 0, tf.maximum(z, lowest), 1.0), scores_of(x))
            x = slicewise(lambda z: tf.where_v2(z <= 0, z, np.nan), rows.gather(x))
            top, factor = slicewise(tf.zeros_like, top), None

        def draw_by_entmax(rows: Rows, *weights_and_slope: LaidOut) -> list[tf.Tensor]:
            """[*slices of what is drawn, whether any is in doubt]"""
            weights, *slope = map(rows.in_groups, weights_and_slope)
            drawn, doubt = _draw_near(rows, weights, uniforms, ENTMAX_MARGIN, *slope)
            return [*drawn.tensor_list, any_of(mesh_impl, doubt)]

        def draw_chosen(ids: LaidOut, p: LaidOut, slope: LaidOut) -> list[tf.Tensor]:
            p, ids, slope = slicewise(_by_id, p, ids, slope)
            chosen = ChosenRows(mesh_impl, rows.size, ids, rows.mesh_axis, x.slice_shape[1])
            return draw_by_entmax(chosen, p, slope)

        if epsilon is None:
            # grouped first: all that follows is done in place
            weights = slicewise(tf.exp, scores_of(rows.in_groups(x, -np.inf)))
            drawn, doubt = _draw_near(rows, weights, uniforms, SOFTMAX_MARGIN)
            drawn, doubt = drawn.tensor_list, any_of(mesh_impl, doubt)
        else:
            draw_all = functools.partial(draw_by_entmax, rows)
            *drawn, doubt = entmax_by_chosen(rows, x, self._n_chosen, scores_of, epsilon, 50, draw_chosen, draw_all)

        def draw_again() -> list[tf.Tensor]:
            z = slicewise(lambda z: tf.where_v2(z <= 0, z, np.nan), scores_of(x))
            if epsilon is None:
                weights = slicewise(fixed_point.softmax_weights, z)
            else:
                weights = fixed_point.entmax_weights(mesh_impl, z, epsilon, lambda x: rows.across_shards(x, "SUM"))
            weights = slicewise(lambda w, z: tf.where_v2(tf.is_nan(z), np.inf, w), weights, z)
            return _draw(rows, weights, uniforms).tensor_list

        return _unless(doubt, drawn, draw_again)

    def _factor_and_epsilon(self, lowering: mtf.Lowering) -> tuple[LaidOut | None, LaidOut | None]:
        """(factor, ε), each None or laid-out [rows, 1]; where α is not valid, NaN and 0."""
        mesh_impl = lowering.mesh_impl(self)
        shape = self.inputs[0].shape - self._dim
        given = (self._more[name] for name in ("factor", "alpha"))
        factor, alpha = (None if t is None else spread_rows(lowering, t, shape) for t in given)
        if factor is not None:
            factor = mesh_impl.slicewise(lambda f: tf.where_v2(f > 0, f, np.nan), factor)
        if alpha is None:
            return factor, None

        def split(alpha: tf.Tensor, *factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            valid = tf.logical_and(alpha >= 1, alpha <= 2)
            return tf.where_v2(valid, factor[0] if factor else 1.0, np.nan), tf.where_v2(valid, alpha - 1.0, 0.0)

        return mesh_impl.slicewise(split, alpha, *([] if factor is None else [factor]))


def _by_id(x: tf.Tensor, ids: tf.Tensor, *more: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """(x, ids, …), all [rows, n], in ascending order of their ids."""
    ids, order = tf.math.top_k(-ids, size_of(ids, 1))
    x, *rest = (tf.gather(t, order, batch_dims=1) for t in (x, *more))
    return x, -ids, *rest

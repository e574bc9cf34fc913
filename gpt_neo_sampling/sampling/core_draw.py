"""The draw from weights in few kernels, for a TPU core's program.

A TPU takes about as long for a small kernel as for one over whole rows, so each step here is one reduction that keeps
several numbers, and nothing is gathered: what is looked for is counted, what is chosen is picked by a mask. What is
drawn is what `categorical`'s textbook draw gives: a draw near a border is ambiguous, and made again by that.
"""

from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.ops import size_of
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, whole_axis
from gpt_neo_sampling.mesh.xla import Values, add_each, prefix_sums, reduce_together

# How far a border between groups may be off, in parts of the total: the sum of 64 terms, none of whose partial sums is
# above a quarter of the total, and a uniform as float32.
BORDER_ERROR_BOUND = 2e-6
ENTRY_ERROR_BOUND = 1e-6  # likewise for entries in a group, as three products add them up
LARGEST_GROUP = 1023  # its entries are multiplied by a triangle of its square; `softmax_draw` flags above its count
_NONE = 2.0**22  # stands for the first entry of a group where there is none


def draw_few_kernels(
    rows: ShardedRows,
    weights: LaidOut,
    uniforms: Sequence[LaidOut],
    error_bound: float | Callable[..., tf.Tensor],
    slope: LaidOut | None = None,
    given: Sequence[LaidOut] = (),
) -> tuple[LaidOut, LaidOut]:
    """`categorical._fast_draw` for core programs: of one sample a row, from whole rows.

    Args:
      rows: ShardedRows, of at most LARGEST_GROUP entries a group, none of them missing.
      weights: laid-out float32, as `rows.in_groups` gives them, none below 0; NaN or +inf, or a sum of +inf, makes a
        row invalid.
      uniforms: a pair, for the group and for the entry, laid-out [rows, 1]: see `uniform`.
      error_bound: a number: how far each weight may be wrong, rounding of a group's sum included, in parts of it, or
        of its `slope`. Or a function to such numbers, from the sums of a row's weights and slopes and what is `given`.
      slope: None, or laid-out like weights.
      given: laid-out [rows, 1].

    Returns:
      (drawn, ambiguous): laid-out [rows, 1], int32, −1 for an invalid row or one without mass; and float32, 1.0 for a
      draw so near to a border that errors may have moved it across.
    """
    slicewise = rows.mesh_impl.slicewise
    group_uniform, entry_uniform = (slicewise(uniform, u) for u in uniforms)
    parts = [weights] if slope is None else [weights, slope]
    n_sums = len(parts)

    def sum_groups(*parts: tf.Tensor) -> Values:
        """[rows, groups of the shard]: sums of weights, and of slopes."""
        return reduce_together(parts, [0.0] * n_sums, [2], add_each)

    def choose_group(u: tf.Tensor, *sums_and_given: tf.Tensor) -> Values:
        """[rows, 1] each: the group's first entry, _NONE or more for none; whether it is ambiguous; the error bound.

        Only the sign of a border's distance from the target matters, and whether it is near 0.
        """
        sums, given = list(sums_and_given[:n_sums]), sums_and_given[n_sums:]
        n = size_of(sums[0], 1)
        up_to = np.tril(np.ones([n, n], np.float32))  # [border, group]
        u, *sums = (tf.broadcast_to(x[:, tf.newaxis], [size_of(x, 0), n, n]) for x in (u, *sums))
        distance, total, *slopes = reduce_together([sums[0] * (up_to - u), *sums], [0.0] * (1 + n_sums), [2], add_each)
        bound = error_bound(total, *slopes, *given) if callable(error_bound) else tf.fill(total.shape, error_bound)
        valid = tf.logical_and(total > 0, total < np.inf)  # false for NaN too
        off = BORDER_ERROR_BOUND * total + bound * (slopes or [total])[0]
        near = tf.logical_and(valid, tf.abs(distance) <= off)
        first = tf.where_v2(valid, tf.where_v2(distance <= 0, float(rows.group), 0.0), _NONE)

        def combine(a: Values, b: Values) -> Values:
            return a[0] + b[0], tf.maximum(a[1], b[1]), tf.maximum(a[2], b[2])

        found = reduce_together([first, tf.where_v2(near, 1.0, 0.0), bound], [0.0] * 3, [1], combine)
        return tuple(x[:, tf.newaxis] for x in found)

    def choose_entry(first: tf.Tensor, bound: tf.Tensor, u: tf.Tensor, *parts_and_sums: tf.Tensor) -> Values:
        """[rows, 1]: the place in the group, and how many borders are near the target; 0 where another shard has it."""
        parts, sums, pcoord = parts_and_sums[:n_sums], parts_and_sums[n_sums : 2 * n_sums], parts_and_sums[2 * n_sums :]
        n_groups, n = parts[0].shape.as_list()[1:]
        from_middle = np.reshape(np.arange(n_groups * n, dtype=np.float32), [n_groups, n]) - (n - 1) / 2
        from_middle = from_middle - first[..., tf.newaxis]
        if pcoord:
            from_middle += tf.cast(pcoord[0] * rows.entries, tf.float32)  # last, or XLA would do it in another kernel
        here = tf.abs(from_middle) < n / 2
        picked = [parts[0], *(tf.broadcast_to(s[..., tf.newaxis], parts[0].shape) for s in sums)]
        picked = [tf.where_v2(here, x, 0.0) for x in picked]
        weights, total, *slopes = reduce_together(picked, [0.0] * len(picked), [1], add_each)  # sums, in every place
        distance = prefix_sums(weights) - u * total
        held = total > 0
        near = tf.abs(distance) <= ENTRY_ERROR_BOUND * total + bound * (slopes or [total])[0]
        counted = [tf.where_v2(tf.logical_and(held, x), 1.0, 0.0) for x in (distance <= 0, near)]
        return tuple(x[:, tf.newaxis] for x in reduce_together(counted, [0.0, 0.0], [1], add_each))

    def finish(first: tf.Tensor, near_group: tf.Tensor, place: tf.Tensor, near_entries: tf.Tensor) -> Values:
        drawn = tf.where_v2(first < _NONE, tf.cast(first + place, tf.int32), -1)
        return drawn, tf.cast(near_group + near_entries > 0, tf.float32)

    sums = slicewise(sum_groups, *parts)
    whole = (whole_axis(rows, s) for s in sums)  # NaN and infinities too
    first, near, bound = slicewise(choose_group, group_uniform, *whole, *given)
    found = slicewise(choose_entry, first, bound, entry_uniform, *parts, *sums, *rows.pcoords())
    return slicewise(finish, first, near, *(rows.across_shards(x, "SUM") for x in found))


def uniform(u: tf.Tensor) -> tf.Tensor:
    """Uniforms, float32 in [0, 1] or 32 bits as int32, as float32: wrong by at most 2⁻²⁵."""
    return u if u.dtype == tf.float32 else tf.cast(tf.bitcast(u, tf.uint32), tf.float32) * 2.0**-32

"""The draw from weights in few kernels, for a TPU core's program.

A TPU takes about as long for a small kernel as for one over whole rows, so each step here is one reduction that keeps
several numbers, and nothing is gathered: what is looked for is counted, what is chosen is picked by a mask. What is
drawn is what `categorical`'s textbook draw gives: a draw near a border is ambiguous, and made again by that.
"""

from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.ops import size_of
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, whole_axis
from gpt_neo_sampling.mesh.xla import Values, prefix_sums, reduce_together

# How far the sum of up to 64 groups' sums, and a uniform as float32, may be off, in parts of the total: 64 roundings.
BORDER_ERROR_BOUND = 4e-6
ENTRY_ERROR_BOUND = 1e-6  # likewise for entries in a group, as three products add them up
_NONE = 2.0**22  # stands for the first entry of a group where there is none
LARGEST_GROUP = 1023  # its entries are counted, and a flag put above the count; a triangle of its square is a constant
_FLAG = LARGEST_GROUP + 1.0


def draw_few_kernels(
    rows: ShardedRows,
    weights: LaidOut,
    uniforms: Sequence[LaidOut],
    error_bound: float,
    slope: LaidOut | None = None,
) -> tuple[LaidOut, LaidOut]:
    """`categorical._fast_draw` for core programs: of one sample a row, from whole rows.

    Args:
      rows: ShardedRows, of at most LARGEST_GROUP entries a group, none of them missing.
      weights: laid-out float32 [rows, entries], none below 0; NaN or +inf, or a sum of +inf, makes a row invalid.
      uniforms: a pair, for the group and for the entry, laid-out [rows, 1]: see `uniform`.
      error_bound: a number: how far each weight may be wrong, rounding of a group's sum included, in parts of it, or
        of its `slope`.
      slope: None, or laid-out like weights.

    Returns:
      (drawn, ambiguous): laid-out [rows, 1], int32, −1 for an invalid row or one without mass; and float32, 1.0 for a
      draw so near to a border that errors may have moved it across.
    """
    slicewise = rows.mesh_impl.slicewise
    group_uniform, entry_uniform = (slicewise(uniform, u) for u in uniforms)
    parts = [rows.in_groups(w) for w in ([weights] if slope is None else [weights, slope])]

    def sum_groups(*parts: tf.Tensor) -> Values:
        """Sums of weights and of slopes, [rows, groups of the shard] each; −1 for what is not finite."""
        sums = reduce_together(parts, [0.0] * len(parts), [2], _add)
        return tuple(tf.where_v2(s < np.inf, s, -1.0) for s in sums)

    def choose_group(u: tf.Tensor, *sums_and_pcoord: tf.Tensor) -> Values:
        """[rows, 1] each: the group's first entry, in the row and in the shard, _NONE for none; and ambiguity.

        Only the sign of a border's distance from the target matters, and whether it is near 0.
        """
        *sums, pcoord = sums_and_pcoord if rows.mesh_axis is not None else (*sums_and_pcoord, None)
        n = size_of(sums[0], 1)
        up_to = np.tril(np.ones([n, n], np.float32))  # [border, group]
        sums = [tf.where_v2(s >= 0, s, np.nan) for s in sums]
        u, *sums = (tf.broadcast_to(x[:, tf.newaxis], [size_of(x, 0), n, n]) for x in (u, *sums))
        distance, total, *slopes = reduce_together([sums[0] * (up_to - u), *sums], [0.0] * (1 + len(sums)), [2], _add)
        bound = BORDER_ERROR_BOUND * total + error_bound * (slopes or [total])[0]
        first = tf.where_v2(total > 0, tf.where_v2(distance <= 0, float(rows.group), 0.0), _NONE)  # NaN is not above 0
        near = tf.where_v2(tf.abs(distance) <= bound, 1.0, 0.0)
        local = first
        if pcoord is not None:  # taken off in one place of n
            local -= tf.where_v2(np.arange(n) == 0, tf.cast(pcoord, tf.float32) * rows.entries, 0.0)
        return tuple(x[:, tf.newaxis] for x in reduce_together([first, local, near], [0.0] * 3, [1], _add))

    def choose_entry(first: tf.Tensor, u: tf.Tensor, weights: tf.Tensor, *sums: tf.Tensor) -> tf.Tensor:
        """[rows, 1]: the place in the group, and _FLAG on top where it is ambiguous; 0 where another shard holds it."""
        n_groups, n = weights.shape.as_list()[1:]
        entry = np.reshape(np.arange(n_groups * n, dtype=np.float32), [n_groups, n])
        from_middle = entry - first[..., tf.newaxis] - (n - 1) / 2
        here = tf.abs(from_middle) < n / 2
        operands = [weights, *(tf.broadcast_to(s[..., tf.newaxis], weights.shape) for s in sums)]
        picked = [tf.where_v2(here, x, 0.0) for x in operands]
        weights, total, *slopes = reduce_together(picked, [0.0] * len(picked), [1], _add)  # sums, in every place
        bound = ENTRY_ERROR_BOUND * total + error_bound * (slopes or [total])[0]
        distance = prefix_sums(weights) - u * total
        held = total > 0
        passed = tf.where_v2(tf.logical_and(held, distance <= 0), 1.0, 0.0)
        near = tf.where_v2(tf.logical_and(held, tf.abs(distance) <= bound), 1.0, 0.0)
        passed, near = reduce_together([passed, near], [0.0, 0.0], [1], _add)
        return (tf.minimum(passed, LARGEST_GROUP) + tf.where_v2(near > 0, _FLAG, 0.0))[:, tf.newaxis]

    def finish(first: tf.Tensor, near: tf.Tensor, found: tf.Tensor) -> Values:
        valid, in_doubt = first < _NONE, found >= _FLAG
        place = tf.where_v2(in_doubt, found - _FLAG, found)
        drawn = tf.where_v2(valid, tf.cast(first + place, tf.int32), -1)
        ambiguous = tf.logical_and(valid, tf.logical_or(near > 0, in_doubt))
        return drawn, tf.cast(ambiguous, tf.float32)

    sums = slicewise(sum_groups, *parts)
    first, local, near = slicewise(choose_group, group_uniform, *(whole_axis(rows, s) for s in sums), *rows.pcoords())
    found = slicewise(choose_entry, local, entry_uniform, parts[0], *sums)
    return slicewise(finish, first, near, rows.across_shards(found, "SUM"))


def _add(a: Values, b: Values) -> Values:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def uniform(u: tf.Tensor) -> tf.Tensor:
    """Uniforms, float32 in [0, 1] or 32 bits as int32, as float32: wrong by at most 2⁻²⁵."""
    return u if u.dtype == tf.float32 else tf.cast(tf.bitcast(u, tf.uint32), tf.float32) * 2.0**-32

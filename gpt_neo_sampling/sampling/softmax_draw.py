"""The draw from softmax of scores in few kernels, for a TPU core's program: `core_draw`'s, without its weights.

A first pass over the scores finds each group's largest score and the sum of its weights relative to that, together, so
that the largest of the whole row need not be known ahead. Weights themselves are computed for one group alone.
"""

from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import FLOAT32_MAX, LaidOut
from gpt_neo_sampling.mesh.ops import size_of
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, whole_axis
from gpt_neo_sampling.mesh.xla import Values, is_core_program, kept_together, prefix_sums, reduce_together
from gpt_neo_sampling.sampling.core_draw import LARGEST_GROUP, uniform

# How far sums up to a border may be off, in parts of the total. Between groups: a group's sum may be rounded once
# for each entry, where a backend adds them one by one (a TPU does so some 14 times), and the distance of its largest
# score from the row's is rounded. In a group there are only exp's error, and that of the products that add up.
GROUP_ERROR_BOUND, ENTRY_ERROR_BOUND = 8e-6, 2e-6
_NONE = 2.0**22  # stands for the first entry of a group where there is none
_FLAG = LARGEST_GROUP + 1


def can_draw(rows: ShardedRows) -> bool:
    """Whether these rows are of a core program, with all entries there, in groups that are whole and not too large."""
    whole = rows.ids is None and rows.gathered_axis is None
    return is_core_program(rows.mesh_impl) and whole and rows.group <= LARGEST_GROUP


def softmax_draw(
    rows: ShardedRows, scores: LaidOut, factor: LaidOut, uniforms: Sequence[LaidOut]
) -> tuple[LaidOut, LaidOut, LaidOut]:
    """Draws one entry a row from softmax of scores times a factor.

    Args:
      rows: ShardedRows, of at most LARGEST_GROUP entries a group, none of them missing.
      scores: laid-out float32 [rows, entries]; NaN or +inf makes a row invalid.
      factor: laid-out float32 [rows, 1], above 0; NaN makes a row invalid.
      uniforms: a pair, for the group and for the entry, laid-out [rows, 1]: see `uniform`.

    Returns:
      (drawn, ambiguous, top): laid-out [rows, 1], int32, −1 for an invalid row or one of nothing but −inf; float32, 1.0
      for a draw so near to a border that errors may have moved it across; and a valid row's largest score, finite.
    """
    slicewise = rows.mesh_impl.slicewise

    def sum_groups(scores: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """[rows, groups of the shard] each: the largest score, finite, and the sum of weights relative to it; the sum
        is NaN for an invalid group."""
        scores = rows.grouped(scores, -np.inf)
        factor = tf.broadcast_to(factor[:, tf.newaxis], scores.shape)
        valid = tf.logical_and(scores < np.inf, factor > 0)  # false for NaN too
        mass = tf.where_v2(valid, tf.where_v2(scores > -np.inf, 1.0, 0.0), np.nan)
        scores = tf.where_v2(valid, tf.maximum(scores, -FLOAT32_MAX), 0.0)
        top, _, total = reduce_together([scores, factor, mass], [-FLOAT32_MAX, 0.0, 0.0], [2], _add_relative)
        return top, total

    def choose_group(top: tf.Tensor, total: tf.Tensor, factor: tf.Tensor, u: tf.Tensor, *pcoord: tf.Tensor) -> Values:
        """[rows, 1] each: the group's first entry, in the row and in the shard, _NONE for none; whether that is
        ambiguous; and the row's largest score."""
        n = size_of(top, 1)
        up_to = np.tril(np.ones([n, n], np.float32))  # [border, group]
        top, total, factor, u = (
            tf.broadcast_to(x[:, tf.newaxis], [size_of(x, 0), n, n]) for x in (top, total, factor, u)
        )
        top, _, distance, total = reduce_together(
            [top, factor, total * (up_to - u), total], [-FLOAT32_MAX, 0.0, 0.0, 0.0], [2], _add_relative
        )
        near = tf.where_v2(tf.abs(distance) < GROUP_ERROR_BOUND * total, 1.0, 0.0)
        first = tf.where_v2(total > 0, tf.where_v2(distance <= 0, float(rows.group), 0.0), _NONE)  # NaN is not above 0
        local = first
        if pcoord:  # taken off in one place of n
            here = np.tile(np.arange(n) == 0, [size_of(first, 0), 1])
            local -= tf.where_v2(here, tf.cast(pcoord[0], tf.float32) * rows.entries, 0.0)
        found = reduce_together(
            [first, local, near, top],
            [0.0, 0.0, 0.0, -FLOAT32_MAX],
            [1],
            lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] + b[2], tf.maximum(a[3], b[3])),
        )
        return tuple(x[:, tf.newaxis] for x in found)

    def choose_entry(scores: tf.Tensor, factor: tf.Tensor, top: tf.Tensor, first: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        """[rows, 1]: the place in the group, and _FLAG for each entry near u; 0 where another shard holds it."""
        scores = rows.grouped(scores, -np.inf)
        n_groups, n = scores.shape.as_list()[1:]
        entry = np.reshape(np.arange(n_groups * n, dtype=np.float32), [n_groups, n])
        here = tf.abs(entry - (n - 1) / 2 - first[..., tf.newaxis]) < n / 2  # picked by a mask: nothing is gathered
        weights = tf.exp((scores - top[..., tf.newaxis]) * factor[..., tf.newaxis])
        (weights,) = kept_together(tf.reduce_sum(tf.where_v2(here, weights, 0.0), 1))
        part = prefix_sums(weights) / tf.reduce_sum(weights, -1, keepdims=True)  # NaN where another shard holds it
        passed, near = part < u, tf.abs(part - u) < ENTRY_ERROR_BOUND
        count = tf.where_v2(passed, 1.0, 0.0) + tf.where_v2(near, float(_FLAG), 0.0)
        return tf.reduce_sum(count, -1, keepdims=True)

    def finish(first: tf.Tensor, near: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        place = tf.bitwise.bitwise_and(tf.cast(found, tf.int32), _FLAG - 1)
        drawn = tf.where_v2(first < _NONE, tf.cast(first, tf.int32) + place, -1)
        return drawn, tf.where_v2(found + near * _FLAG >= _FLAG, 1.0, 0.0)

    group_uniform, entry_uniform = (slicewise(uniform, u) for u in uniforms)
    top, total = (whole_axis(rows, x) for x in slicewise(sum_groups, scores, factor))
    first, local, near, top = slicewise(choose_group, top, total, factor, group_uniform, *rows.pcoords())
    found = slicewise(choose_entry, scores, factor, top, local, entry_uniform)
    return *slicewise(finish, first, near, rows.across_shards(found, "SUM")), top


def _add_relative(a: Values, b: Values) -> Values:
    """Adds sums of weights that are relative to a largest score each: (score, factor, sum, …)."""
    top, factor = tf.maximum(a[0], b[0]), tf.maximum(a[1], b[1])  # a start's factor is 0
    scales = [tf.exp((x[0] - top) * factor) for x in (a, b)]
    return top, factor, *(scales[0] * x + scales[1] * y for x, y in zip(a[2:], b[2:], strict=True))

"""The draw from softmax in few kernels, for a TPU core's program.

A TPU takes about as long for a small kernel as for one over a whole row, so each step here is one reduction that keeps
several numbers. What is drawn is what `categorical`'s textbook draw gives: a draw near a border is flagged, and made
again by that.
"""

from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.ops import size_of
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows
from gpt_neo_sampling.mesh.xla import Values, exact_prefix_sums, kept_together, reduce_together, whole_axis

HIGHEST, LOWEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).min)
INVALID = -1e30
GROUP_ERROR_BOUND = 8e-6
ENTRY_ERROR_BOUND = 2e-6
FLAG = 1024.0


def _add_scaled(a: Values, b: Values) -> Values:
    """Adds sums that are relative to a largest score each; all finite: (score, …, sums …)."""
    top = tf.maximum(a[0], b[0])
    factor = tf.maximum(a[1], b[1])
    low, high = tf.exp((a[0] - top) * factor), tf.exp((b[0] - top) * factor)
    return top, factor, *(x * low + y * high for x, y in zip(a[2:], b[2:], strict=True))


def softmax_draw(
    rows: ShardedRows, x: LaidOut, factor: LaidOut, uniforms: Sequence[LaidOut]
) -> tuple[LaidOut, LaidOut]:
    slicewise = rows.mesh_impl.slicewise
    group_uniform, entry_uniform = uniforms

    def sum_groups(x: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """[rows, groups] each: the largest score, and the sum relative to that; the highest and below 0 for an invalid group."""
        x = rows.grouped(x, -np.inf)
        mass = tf.where_v2(x < np.inf, tf.where_v2(x > -np.inf, 1.0, 0.0), np.nan)
        x = tf.where_v2(x < np.inf, tf.maximum(x, LOWEST), 0.0)
        factor = tf.broadcast_to(factor[:, tf.newaxis], x.shape)
        top, _, total = reduce_together([x, factor, mass], [LOWEST, 0.0, 0.0], [2], _add_scaled)
        return top, total

    def choose_group(top: tf.Tensor, total: tf.Tensor, factor: tf.Tensor, u: tf.Tensor, *pcoord: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """([rows, 1] group, −1 for none; ambiguous; the row's largest score)"""
        n = size_of(top, 1)
        before = np.tril(np.ones([n, n], np.float32))  # [border, group]
        shape = [size_of(top, 0), n, n]
        top, total, factor, u = (tf.broadcast_to(s[:, tf.newaxis], shape) for s in (top, total, factor, u))
        top, _, distance, total = reduce_together(
            [top, factor, total * (before - u), total], [LOWEST, 0.0, 0.0, 0.0], [2], _add_scaled
        )
        ambiguous = tf.cast(tf.abs(distance) < GROUP_ERROR_BOUND * total, tf.float32)
        count = tf.where_v2(total > 0, tf.cast(distance <= 0, tf.float32) * rows.group, 2.0**20)  # NaN is not above 0 either
        local = count
        if pcoord:
            is_first = np.tile(np.arange(n) == 0, [shape[0], 1])
            local -= tf.where_v2(is_first, tf.cast(pcoord[0] * rows.entries, tf.float32), 0.0)
        return tuple(t[:, tf.newaxis] for t in reduce_together(
            [count, local, ambiguous, top], [0.0, 0.0, 0.0, LOWEST], [1], lambda a, b: (a[0] + b[0], a[1] + b[1], a[2]+b[2], tf.maximum(a[3], b[3]))
        ))

    def choose_entry(
        x: tf.Tensor, factor: tf.Tensor, top: tf.Tensor, first: tf.Tensor, u: tf.Tensor
    ) -> tf.Tensor:
        x = rows.grouped(x, -np.inf)
        n_groups, n = x.shape.as_list()[1:]
        entry = np.reshape(np.arange(n_groups * n, dtype=np.float32), [n_groups, n]) + (1 - n) / 2
        here = tf.abs(entry - first[..., tf.newaxis]) < n / 2
        weights = tf.exp((x - top[..., tf.newaxis]) * factor[..., tf.newaxis])
        (weights,) = kept_together(tf.reduce_sum(tf.where_v2(here, weights, 0.0), 1))
        part = exact_prefix_sums(weights) / tf.reduce_sum(weights, -1, keepdims=True)  # NaN where another shard holds the group
        passed, near = part < u, tf.abs(part - u) < ENTRY_ERROR_BOUND
        return tf.reduce_sum(tf.where_v2(passed, 1.0, 0.0) + tf.where_v2(near, FLAG, 0.0), -1, keepdims=True)

    def finish(first: tf.Tensor, ambiguous: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        place = tf.bitwise.bitwise_and(tf.cast(found, tf.int32), int(FLAG) - 1)
        index = tf.where_v2(first < 2.0**20, tf.cast(first, tf.int32) + place, -1)
        return index, tf.reduce_max(tf.where_v2(found + ambiguous * FLAG >= FLAG, 1.0, 0.0))

    top, total = slicewise(sum_groups, x, factor)
    if rows.mesh_axis is not None:
        top, total = (whole_axis(rows.mesh_impl, t, rows.mesh_axis) for t in (top, total))
    first, local, ambiguous, top = slicewise(choose_group, top, total, factor, group_uniform, *rows.pcoords())
    found = slicewise(choose_entry, x, factor, top, local, entry_uniform)
    return slicewise(finish, first, ambiguous, rows.across_shards(found, "SUM"))


def uniform(u: tf.Tensor) -> tf.Tensor:
    if u.dtype == tf.float32:
        return u
    return tf.cast(tf.bitcast(u, tf.uint32), tf.float32) * 2.0**-32

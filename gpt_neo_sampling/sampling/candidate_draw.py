"""The draw from softmax of few candidates in two kernels, for a TPU core's program.

What is drawn is what `categorical`'s textbook draw gives: a draw near a border is told, to be made again by that.
No sums in order are needed, hence no sort by id. Each candidate sees by itself whether the sum up to its group passes
the first target, and the sum up to it within its group the second; of those that pass both, the lowest id is drawn.
"""

from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh import xla
from gpt_neo_sampling.mesh.ops import size_of
from gpt_neo_sampling.mesh.sharded_rows import group_size
from gpt_neo_sampling.sampling.core_draw import uniform

MOST = 128  # candidates: all pairs are compared
# How far the sums may be from the exact draw's, in parts of the total: weights and uniforms as in `categorical`, and a
# rounding of three factors at each of up to 128 steps.
ERROR_BOUND = 1e-5
_LOWEST = float(np.finfo(np.float32).min)


def can_draw(mesh_impl: mtf.MeshImpl, n_candidates: int) -> bool:
    """Whether so many candidates are drawn from here."""
    return xla.is_core_program(mesh_impl) and n_candidates <= MOST


def draw_candidates(
    mesh_impl: mtf.MeshImpl, size: int, x: LaidOut, ids: LaidOut, factor: LaidOut | None, uniforms: Sequence[LaidOut]
) -> tuple[LaidOut, LaidOut]:
    """One draw a row from softmax of scores.

    Args:
      mesh_impl: mtf.MeshImpl, of one core.
      size: int, the entries of a whole row, whose groups are drawn from first.
      x: laid-out float32 [rows, candidates]: scores; −inf is allowed.
      ids: laid-out int32 like x, no two of a row equal: which entries they are.
      factor: None or laid-out float32 [rows, 1], above 0 or NaN: multiplies the scores.
      uniforms: a pair, for the group and for the entry, laid-out [rows, 1], as for `categorical.grouped_draw`.

    Returns:
      (drawn, ambiguous): laid-out [rows, 1], int32, −1 for an invalid row, and float32, above 0 for a draw so near to
      a border that errors may have moved it across.
    """
    group = group_size(size)

    def compare(x: tf.Tensor, ids: tf.Tensor, *per_row: tf.Tensor) -> xla.Values:
        """[rows, candidates] each: how far the sums up to a candidate's group, and up to it within the group, are above
        their targets, and the totals; relative to the largest score."""
        n = size_of(x, 1)
        shape = [size_of(x, 0), n, n]
        x = tf.broadcast_to(x[:, tf.newaxis], shape)
        other, own = _spread(ids[:, tf.newaxis], shape), _spread(ids[:, :, tf.newaxis], shape)
        *factor, group_uniform, entry_uniform = (tf.broadcast_to(t[:, tf.newaxis], shape) for t in per_row)
        beyond = other - (own - own % group)  # the first entry of the candidate's own group
        up_to_group = tf.where_v2(beyond < group, 1.0, 0.0)
        in_group = tf.where_v2(tf.logical_and(beyond >= 0, beyond < group), 1.0, 0.0)
        sums = [
            up_to_group - group_uniform,
            tf.ones(shape),
            in_group * (tf.where_v2(other <= own, 1.0, 0.0) - entry_uniform),
            in_group,
        ]
        scale = factor[0] if factor else tf.ones_like(x)
        return xla.reduce_together([x, scale, *sums], [_LOWEST, *[0.0] * 5], [2], _add_scaled)[2:]

    def choose(ids: tf.Tensor, *sums: tf.Tensor) -> xla.Values:
        above, total, above_in_group, total_of_group = sums
        passed = tf.logical_and(above > 0, above_in_group > 0)

        def near(distance: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
            return tf.logical_and(total > 0, tf.abs(distance) <= ERROR_BOUND * total)

        ambiguous = tf.logical_or(near(above, total), near(above_in_group, total_of_group))
        found = xla.reduce_together(
            [tf.where_v2(passed, ids, -1), tf.where_v2(ambiguous, 1.0, 0.0)],
            [-1, 0.0],
            [1],
            lambda a, b: (_lowest_id(a[0], b[0]), a[1] + b[1]),
        )
        return tuple(t[:, tf.newaxis] for t in found)

    def floats(*uniforms: tf.Tensor) -> xla.Values:
        """Each computed once, and not for each pair."""
        return xla.kept_together(*(uniform(u) for u in uniforms))

    per_row = [*([] if factor is None else [factor]), *mesh_impl.slicewise(floats, *uniforms)]
    return mesh_impl.slicewise(choose, ids, *mesh_impl.slicewise(compare, x, ids, *per_row))


def _spread(ids: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """ids broadcast to a shape [rows, n, n], in the kernel that computes from them.

    XLA would compute before it broadcasts, in a kernel of its own, if there were no literal that differs along each
    axis; the largest of that and an id is the id.
    """
    below_ids = -1 - np.add.outer(np.arange(shape[1], dtype=np.int32), np.arange(shape[2], dtype=np.int32))
    return tf.maximum(tf.broadcast_to(ids, shape), below_ids)


def _add_scaled(a: xla.Values, b: xla.Values) -> xla.Values:
    """Adds sums that are relative to a largest score each: (score, the row's factor, sums…).

    −inf adds nothing; NaN and +inf make all sums NaN, also where a maximum misses NaN.
    """
    top, factor = tf.maximum(tf.maximum(a[0], b[0]), _LOWEST), tf.maximum(a[1], b[1])
    of_a, of_b = (tf.exp((t - top) * factor) for t in (a[0], b[0]))
    return top, factor, *(x * of_a + y * of_b for x, y in zip(a[2:], b[2:], strict=True))


def _lowest_id(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The lower of two ids; −1 is none."""
    return tf.where_v2(a < 0, b, tf.where_v2(b < 0, a, tf.minimum(a, b)))

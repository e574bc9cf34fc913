"""The solver of entmax, for rows on a mesh."""

from collections.abc import Callable

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut, RowValue, is_number
from gpt_neo_sampling.largest import largest
from gpt_neo_sampling.mtf_ops import finite, size_of
from gpt_neo_sampling.rows import Rows, any_of, as_list, near_sum


def chosen_of(alpha: RowValue) -> int:
    """How many of a shard's entries entmax is first sought among: some more than count in logits of a wide spread."""
    return 64 if is_number(alpha) and alpha >= 1.45 else 256


def entmax_by_chosen(
    rows: Rows,
    x: LaidOut,
    n_chosen: int,
    scores_of: Callable[[LaidOut], LaidOut],
    epsilon: LaidOut,
    n_iter: int,
    of_chosen: Callable[[LaidOut, LaidOut, LaidOut], list[tf.Tensor]],
    of_all: Callable[[LaidOut, LaidOut], list[tf.Tensor]],
) -> list[tf.Tensor]:
    """What becomes of entmax, which as a rule few entries count in.

    It is solved for the n_chosen largest entries of each shard; and again for all
    where the last of them is in the support of some row, as others may be then, or
    a row is invalid, which all of its entries are to show.

    Args:
      rows: Rows.
      x: laid-out float32 [rows, entries].
      scores_of: a function from x, or some of its entries, to scores less the
        largest one of their row, NaN throughout an invalid one; it keeps their order.
      epsilon, n_iter: as for `solve_entmax`.
      of_chosen: a function from laid-out ids [rows, chosen], p and its slope to a
        list of tensors.
      of_all: a function from p and its slope, for all of x, to such a list.

    Returns:
      a list of tensors.
    """
    mesh_impl = rows.mesh_impl

    def solve_all() -> list[tf.Tensor]:
        return of_all(*solve_entmax(rows, scores_of(x), epsilon, n_iter))

    if x.slice_shape[1] < 8 * n_chosen:
        return solve_all()
    values, ids = mesh_impl.slicewise(lambda x: largest(x, n_chosen), x)
    z = scores_of(values)
    start = rows.across_shards(mesh_impl.slicewise(_least_delta, z, epsilon), "MAX")
    p, slope = solve_entmax(rows, z, epsilon, n_iter, start)

    def may_differ(p: tf.Tensor) -> tf.Tensor:
        last = p[:, -1:]
        return tf.cast(tf.logical_or(last > 0, tf.is_nan(last)), tf.float32)

    too_few = any_of(mesh_impl, mesh_impl.slicewise(may_differ, p)) > 0.5
    return as_list(tf.cond(too_few, solve_all, lambda: of_chosen(ids, p, slope)))


def _least_delta(z: tf.Tensor, epsilon: tf.Tensor) -> tf.Tensor:
    """A δ that entmax's is not below, [rows, 1]: m weights of at least [1 + ε(zₘ − δ)]₊^(1/ε) sum to no more than 1.

    z: float32 [rows, n], scores in descending order. (0, for which this is true too, in a row with NaN.)
    """
    log_m = tf.log(tf.range(1.0, size_of(z, 1) + 1.0))
    gain = tf.where_v2(epsilon > 0, -tf.math.expm1(-epsilon * log_m) / epsilon, log_m)
    return tf.maximum(finite(tf.reduce_max(z + gain, -1, keepdims=True)), 0.0)


def solve_entmax(
    rows: Rows, z: LaidOut, epsilon: LaidOut, n_iter: int, start: LaidOut | None = None
) -> tuple[LaidOut, LaidOut]:
    """α-entmax of laid-out rows, by Newton's method.

    With y = z − δ and ε = α − 1, p = [1 + εy]₊^(1/ε), which is exp(y) at ε = 0,
    and δ is sought: Σp = 1 at the root, more to its left. (Σp)^ε as a function
    of δ is convex, so no step passes the root, but by rounding.

    Args:
      rows: Rows.
      z: laid-out float32 [rows, entries], scores less the largest one of their
        row; a row that holds NaN comes out as NaN.
      epsilon: laid-out float32 [rows, 1].
      n_iter: int, the most steps.
      start: None or laid-out like epsilon: a δ that is not above the one sought.

    Returns:
      (p, slope), laid-out like z: p sums to 1 along its rows; slope is by how much
      each entry of it moves with y, at the most: ∂p/∂y, and at the edge of the
      support what it rises to.
    """
    mesh_impl = rows.mesh_impl
    slicewise = mesh_impl.slicewise

    def evaluate(z: tf.Tensor, eps: tf.Tensor, delta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """p, ∂p/∂y and 1 + εy, and [2, rows, 1] with Σp and Σ∂p/∂y, over this shard."""
        y = z - delta
        base = 1.0 + eps * y
        inside = tf.logical_or(base > 0, tf.equal(eps, 0.0))
        log_p = tf.where_v2(eps > 0, tf.log1p(eps * y) / eps, y)
        # XLA may compute εy + 1 more than once, rounded once here and twice there. So no
        # entry at the edge may depend on equal answers, and p/base must not get large.
        p = tf.where_v2(tf.is_nan(y), y, tf.exp(tf.where_v2(inside, log_p, -np.inf)))
        slope = tf.where_v2(tf.logical_and(p > 0, eps > 0), p / tf.maximum(base, 2.0**-24), p)
        return p, slope, base, tf.stack([near_sum(p), near_sum(slope)])

    def newton_step(sums: tf.Tensor, eps: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        total, slope = sums[0], sums[1]
        log_total = tf.log(total)
        gain = tf.where_v2(eps > 0, -tf.math.expm1(-eps * log_total) / eps, log_total)
        # Back it goes where rounding made the last step too long, and not all the way
        # to where that began: past the edge of many ties it would, for ever.
        return tf.maximum(gain * total / slope, -0.5 * tf.abs(last))

    every_axis = list(range(mesh_impl.ndims))
    like = mesh_impl.LaidOutTensor.from_tensor_list

    def body(
        i: tf.Tensor, _: list[tf.Tensor], *slices: list[tf.Tensor]
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        step, delta = map(like, slices)
        *_, sums = slicewise(evaluate, z, epsilon, delta)
        step = slicewise(newton_step, rows.across_shards(sums, "SUM"), epsilon, step)
        delta = slicewise(tf.add, delta, step)

        # NaN is not greater: an invalid row never keeps the loop going.
        def moving(step: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
            return tf.reduce_max(tf.cast(tf.abs(step) > 2e-7 * (1.0 + tf.abs(delta)), tf.float32))

        going = mesh_impl.allreduce(slicewise(moving, step, delta), every_axis, "MAX")
        return i + 1, going.tensor_list, step.tensor_list, delta.tensor_list

    delta = start or slicewise(tf.zeros_like, epsilon)
    step = slicewise(tf.ones_like, epsilon)
    going = slicewise(lambda d: tf.ones([], tf.float32), delta)
    *_, delta = tf.while_loop(
        lambda i, going, *_: tf.logical_and(i < n_iter, going[0] > 0),
        body,
        (tf.constant(0), going.tensor_list, step.tensor_list, delta.tensor_list),
    )

    def normalise(
        p: tf.Tensor, slope: tf.Tensor, base: tf.Tensor, sums: tf.Tensor, eps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        near_edge = 1e-6
        at_edge = tf.exp((1.0 / tf.maximum(eps, 2.0**-23) - 1.0) * np.log(2 * near_edge))
        slope = tf.where_v2(tf.abs(base) < near_edge, at_edge, slope)
        return p / sums[0], slope / sums[0]

    *entries, sums = slicewise(evaluate, z, epsilon, like(delta))
    return slicewise(normalise, *entries, rows.across_shards(sums, "SUM"), epsilon)

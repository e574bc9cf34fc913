"""The solver of entmax, for rows on a mesh."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut, RowValue, is_number
from gpt_neo_sampling.mesh.ops import laid_out_cond, laid_out_while_loop, size_of
from gpt_neo_sampling.mesh.sharded_rows import Rows, any_of, near_sum, sum_across
from gpt_neo_sampling.sampling.top_k import largest


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
    of_chosen: Callable[[LaidOut, LaidOut, LaidOut], Any],
    of_all: Callable[[LaidOut, LaidOut], Any],
) -> Any:
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
        nest of laid-out tensors and tf.Tensors.
      of_all: a function from p and its slope, for all of x, to such a nest.

    Returns:
      such a nest.
    """
    mesh_impl = rows.mesh_impl

    def solve_all() -> Any:
        return of_all(*solve_entmax(rows, scores_of(x), epsilon, n_iter))

    if x.slice_shape[1] < 8 * n_chosen:
        return solve_all()
    values, ids = mesh_impl.slicewise(lambda x: largest(x, n_chosen), x)
    z = scores_of(values)
    bounds = rows.across_shards(mesh_impl.slicewise(lambda *args: -_bound(*args), z, epsilon), "MAX")
    p, slope = solve_entmax(rows, z, epsilon, n_iter, mesh_impl.slicewise(tf.negative, bounds))

    def may_differ(p: tf.Tensor) -> tf.Tensor:
        last = p[:, -1:]
        return tf.cast(tf.logical_or(last > 0, tf.is_nan(last)), tf.float32)

    too_few = any_of(mesh_impl, mesh_impl.slicewise(may_differ, p))
    return laid_out_cond(mesh_impl, too_few, solve_all, lambda: of_chosen(ids, p, slope))


def _bound(z: tf.Tensor, epsilon: tf.Tensor) -> tf.Tensor:
    """A β that entmax's is not above, [rows, 1]: m weights of at least [β + εzₘ]^(1/ε) sum to no more than 1.

    z: float32 [rows, n], scores in descending order. (1, for which this is true too, in a row with NaN.)
    """
    log_m = tf.log(tf.range(1.0, size_of(z, 1) + 1.0))
    bound = tf.reduce_min(tf.exp(-epsilon * log_m) - tf.maximum(epsilon * z, -1.0), -1, keepdims=True)
    return tf.where_v2(bound < 1, bound, 1.0)


def solve_entmax(
    rows: Rows, z: LaidOut, epsilon: LaidOut, n_iter: int, start: LaidOut | None = None
) -> tuple[LaidOut, LaidOut]:
    """α-entmax of laid-out rows, by Newton's method.

    With ε = α − 1 and u = z/β, p = q/Σq of q = [1 + εu]₊^(1/ε), which is exp(u) at
    ε = 0, and β in (0, 1] is sought: β = (Σq)^−ε, the largest p to the power of ε.
    β·(Σq)^ε, a norm of [β + εz]₊, is convex in β, so no step down from above
    passes the root, but by rounding. In rows that are nearly flat 1 + ε(z − δ) would be
    a small difference of numbers near 1; here β itself is small, and float32 holds it
    with all its bits.

    Args:
      rows: Rows.
      z: laid-out float32 [rows, entries], scores less the largest one of their
        row; a row that holds NaN comes out as NaN.
      epsilon: laid-out float32 [rows, 1].
      n_iter: int, the most steps.
      start: None or laid-out like epsilon: a β that is not below the one sought.

    Returns:
      (p, slope), laid-out like z: p sums to 1 along its rows; slope is by how much
      each entry of it moves with u, at the most: ∂p/∂u, and at the edge of the
      support what it rises to.
    """
    mesh_impl = rows.mesh_impl
    slicewise = mesh_impl.slicewise

    def entries_of(u: tf.Tensor, eps: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """q, ∂q/∂u and 1 + εu."""
        base = 1.0 + eps * u
        inside = tf.logical_or(base > 0, tf.equal(eps, 0.0))
        log_q = tf.where_v2(eps > 0, tf.log1p(eps * u) / eps, u)
        # XLA may compute εu + 1 more than once, rounded once here and twice there. So no
        # entry at the edge may depend on equal answers, and q/base must not get large.
        q = tf.where_v2(tf.is_nan(u), u, tf.exp(tf.where_v2(inside, log_q, -np.inf)))
        slope = tf.where_v2(tf.logical_and(q > 0, eps > 0), q / tf.maximum(base, 2.0**-24), q)
        return q, slope, base

    def sums_of(z: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        """[2, rows, 1] with Σq and Σ∂q/∂u, over this shard."""
        q, slope, _ = entries_of(z / beta, eps)
        return tf.stack([near_sum(q), near_sum(slope)])

    def newton_step(sums: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        total, slope = sums[0], sums[1]
        step = (beta - tf.exp(-eps * tf.log(total))) * (total / slope)
        # Back it goes where rounding made the last step too long, and not all the way
        # to where that began: past the edge of many ties it would, for ever.
        return tf.maximum(step, -0.5 * tf.abs(last))

    def body(i: tf.Tensor, _: tf.Tensor, step: LaidOut, beta: LaidOut) -> tuple[tf.Tensor, tf.Tensor, LaidOut, LaidOut]:
        sums = rows.across_shards(slicewise(sums_of, z, epsilon, beta), "SUM")
        step = slicewise(newton_step, sums, epsilon, beta, step)
        beta = slicewise(tf.subtract, beta, step)

        # NaN is not greater: an invalid row never keeps the loop going.
        def moving(step: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
            return tf.cast(tf.abs(step) > 2e-7 * beta, tf.float32)

        return i + 1, any_of(mesh_impl, slicewise(moving, step, beta)), step, beta

    beta = start or slicewise(tf.ones_like, epsilon)
    *_, beta = laid_out_while_loop(
        mesh_impl,
        lambda i, going, *_: tf.logical_and(i < n_iter, going > 0),
        body,
        (tf.constant(0), tf.constant(1.0), slicewise(tf.ones_like, epsilon), beta),
    )

    def last_step(total: tf.Tensor, slope: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        """β in float64, which holds all of it."""
        beta, eps = tf.cast(beta, tf.float64), tf.cast(eps, tf.float64)
        return beta - (beta - tf.exp(-eps * tf.log(total))) * total / tf.cast(slope, tf.float64)

    def scale(z: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.cast(z, tf.float64) * (1.0 / beta), tf.float32)  # rounded once

    def with_total(u: LaidOut) -> tuple[LaidOut, LaidOut, LaidOut, LaidOut]:
        """entries_of, and Σq in float64: what float32 rounds there would move all of p."""
        q, slope, base = slicewise(entries_of, u, epsilon)
        return q, slope, base, sum_across(rows, slicewise(lambda q: near_sum(tf.cast(q, tf.float64)), q))

    def normalise(
        q: tf.Tensor, slope: tf.Tensor, base: tf.Tensor, total: tf.Tensor, eps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        near_edge = 1e-6
        at_edge = tf.exp((1.0 / tf.maximum(eps, 2.0**-23) - 1.0) * np.log(2 * near_edge))
        slope = tf.where_v2(tf.abs(base) < near_edge, at_edge, slope)
        p = tf.cast(tf.cast(q, tf.float64) * (1.0 / total), tf.float32)  # rounded once
        return p, slope / tf.cast(total, tf.float32)

    _, slope, _, total = with_total(slicewise(tf.divide, z, beta))
    slope_total = rows.across_shards(slicewise(near_sum, slope), "SUM")
    beta = slicewise(last_step, total, slope_total, epsilon, beta)
    return slicewise(normalise, *with_total(slicewise(scale, z, beta)), epsilon)

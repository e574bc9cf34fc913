"""The solver of entmax, for rows on a mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut, RowValue, is_real
from gpt_neo_sampling.mesh.ops import laid_out_cond, laid_out_while_loop, size_of
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, any_of, fast_sum, largest_of_cores, sum_across
from gpt_neo_sampling.mesh.xla import Values, add_each, kept_together, reduce_together
from gpt_neo_sampling.sampling.top_k import largest


def n_candidates_for(alpha: RowValue) -> int:
    """How many of a shard's entries entmax is solved for first: more than the support of widely spread logits has."""
    return 64 if is_real(alpha) and alpha >= 1.45 else 256


def entmax_by_candidates(
    rows: ShardedRows,
    x: LaidOut,
    n_candidates: int,
    scores_of: Callable[[LaidOut], LaidOut],
    epsilon: LaidOut,
    n_iter: int,
    for_candidates: Callable[[LaidOut, LaidOut, LaidOut], Any],
    for_all: Callable[[LaidOut, LaidOut], Any],
) -> Any:
    """Solves entmax among the largest entries of each row; falls back to whole rows.

    The support has few entries as a rule. If the last of a shard's n_candidates largest entries is outside it, so are
    all that are smaller. Otherwise, for any row, or where a row is invalid (which must show in all of its entries),
    entmax is solved for all entries.

    Args:
      rows: ShardedRows.
      x: laid-out float32 [rows, entries].
      scores_of: a function from x, or some of its entries, to scores less the
        largest one of their row, NaN throughout an invalid one; it keeps their order.
      epsilon, n_iter: as for `solve_entmax`.
      for_candidates: a function from laid-out ids [rows, candidates], p and its slope to a
        nest of laid-out tensors and tf.Tensors.
      for_all: a function from p and its slope, for all of x, to such a nest.

    Returns:
      such a nest.
    """
    mesh_impl = rows.mesh_impl

    def solve_all() -> Any:
        return for_all(*solve_entmax(rows, scores_of(x), epsilon, n_iter))

    if x.slice_shape[1] < 8 * n_candidates:
        return solve_all()
    values, ids = mesh_impl.slicewise(lambda x: largest(x, n_candidates), x)
    z = scores_of(values)
    bounds = rows.across_shards(mesh_impl.slicewise(lambda *args: -_bound(*args), z, epsilon), "MAX")
    p, slope = solve_entmax(rows, z, epsilon, n_iter, mesh_impl.slicewise(tf.negative, bounds))

    def may_differ(p: tf.Tensor) -> tf.Tensor:
        last = p[:, -1:]
        return tf.cast(tf.logical_or(last > 0, tf.is_nan(last)), tf.float32)

    too_few = any_of(mesh_impl, mesh_impl.slicewise(may_differ, p))
    return laid_out_cond(mesh_impl, too_few, solve_all, lambda: for_candidates(ids, p, slope))


def _bound(z: tf.Tensor, epsilon: tf.Tensor) -> tf.Tensor:
    """An upper bound on entmax's β, [rows, 1]: m weights of at least [β + εzₘ]^(1/ε) sum to no more than 1.

    z: float32 [rows, n], scores in descending order. In a row with NaN the bound is 1, which always holds.
    """
    log_m = tf.log(tf.range(1.0, size_of(z, 1) + 1.0))
    bound = tf.reduce_min(tf.exp(-epsilon * log_m) - tf.maximum(epsilon * z, -1.0), -1, keepdims=True)
    return tf.where_v2(bound < 1, bound, 1.0)


def _entries_of(u: tf.Tensor, eps: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """q, ∂q/∂u and 1 + εu."""
    base = 1.0 + eps * u
    inside = tf.logical_or(base > 0, tf.equal(eps, 0.0))
    log_q = tf.where_v2(eps > 0, tf.log1p(eps * u) / eps, u)
    # XLA may compute εu + 1 more than once, rounded once here and twice there. So no
    # entry at the edge may depend on equal answers, and q/base must not get large.
    q = tf.where_v2(tf.is_nan(u), u, tf.exp(tf.where_v2(inside, log_q, -np.inf)))
    slope = tf.where_v2(tf.logical_and(q > 0, eps > 0), q / tf.maximum(base, 2.0**-24), q)
    return q, slope, base


def _with_edge(slope: tf.Tensor, base: tf.Tensor, eps: tf.Tensor, near: float) -> tf.Tensor:
    """∂q/∂u; where the base is `near` 0, the value that q rises to beyond that."""
    at_edge = tf.exp((1.0 / tf.maximum(eps, 2.0**-23) - 1.0) * np.log(2 * near))
    return tf.where_v2(tf.abs(base) < near, at_edge, slope)


def solve_entmax(
    rows: ShardedRows, z: LaidOut, epsilon: LaidOut, n_iter: int, start: LaidOut | None = None
) -> tuple[LaidOut, LaidOut]:
    """α-entmax of laid-out rows, by Newton's method.

    With ε = α − 1 and u = z/β, p = q/Σq of q = [1 + εu]₊^(1/ε), which is exp(u) at
    ε = 0. Solved for is β in (0, 1]: β = (Σq)^−ε, the largest p to the power of ε.
    β·(Σq)^ε, a norm of [β + εz]₊, is convex in β, so only rounding lets a step from
    above pass the root. In rows that are nearly flat 1 + ε(z − δ) would be
    a small difference of numbers near 1; here β itself is small, and float32 holds it
    with all its bits.

    Args:
      rows: ShardedRows.
      z: laid-out float32 [rows, entries], scores less the largest one of their
        row; a row that holds NaN comes out as NaN.
      epsilon: laid-out float32 [rows, 1].
      n_iter: int, the most steps.
      start: None or laid-out like epsilon: an upper bound on β.

    Returns:
      (p, slope), laid-out like z: p sums to 1 along its rows; slope bounds how
      fast each entry of it changes with u: ∂p/∂u, and at the edge of the support
      the value that it rises to.
    """
    mesh_impl = rows.mesh_impl
    slicewise = mesh_impl.slicewise

    def sums_of(z: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        """[2, rows, 1] with Σq and Σ∂q/∂u, over this shard."""
        q, slope, _ = _entries_of(z / beta, eps)
        return tf.stack([fast_sum(q), fast_sum(slope)])

    def newton_step(sums: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        step = newton_step_of(sums[0], sums[1], eps, beta)
        # Where rounding made the last step too long, this one goes back, but never all the way: at the
        # edge of many ties it would go back and forth for ever.
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
        """_entries_of, and Σq in float64: rounding it to float32 would move all of p."""
        q, slope, base = slicewise(_entries_of, u, epsilon)
        return q, slope, base, sum_across(rows, slicewise(lambda q: fast_sum(tf.cast(q, tf.float64)), q))

    def normalise(
        q: tf.Tensor, slope: tf.Tensor, base: tf.Tensor, total: tf.Tensor, eps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        slope = _with_edge(slope, base, eps, 1e-6)
        p = tf.cast(tf.cast(q, tf.float64) * (1.0 / total), tf.float32)  # rounded once
        return p, slope / tf.cast(total, tf.float32)

    _, slope, _, total = with_total(slicewise(tf.divide, z, beta))
    slope_total = rows.across_shards(slicewise(fast_sum, slope), "SUM")
    beta = slicewise(last_step, total, slope_total, epsilon, beta)
    return slicewise(normalise, *with_total(slicewise(scale, z, beta)), epsilon)


# --- For a TPU core's program: few kernels -------------------------------------------------------

RESIDUAL_FLOOR = 2e-7  # how far β may be off, relatively, by rounding alone


def solve_in_few_kernels(
    rows: ShardedRows,
    scores_of: Callable[..., tf.Tensor],
    given: Sequence[LaidOut],
    epsilon: LaidOut,
    start: LaidOut,
    n_iter: int,
) -> LaidOut:
    """β of `solve_entmax`, in float32: all that a draw needs, which knows a bound on the error that is left.

    Each round is one reduction of whole rows, and the step.

    Args:
      rows: ShardedRows.
      scores_of: a function from slices of what is `given` to scores z [rows, groups of the shard, places], as for
        `solve_entmax`; computed anew in each round, from what is `given` last.
      given: laid-out tensors.
      epsilon, start, n_iter: as for `solve_entmax`.

    Returns:
      laid-out float32 [rows, 1]; NaN for a row that holds NaN.
    """
    mesh_impl = rows.mesh_impl
    slicewise = mesh_impl.slicewise

    def sums_of(eps: tf.Tensor, beta: tf.Tensor, *given: tf.Tensor) -> Values:
        """Σq and Σ∂q/∂u, over this shard, [rows, 1] each."""
        last, beta = kept_together(given[-1], beta)  # or XLA would compute all of z in another kernel, and keep it
        entries = weights_and_slopes(scores_of(*given[:-1], last), eps, beta)
        return tuple(s[:, tf.newaxis] for s in reduce_together(entries, [0.0, 0.0], [1, 2], add_each))

    def newton_step(total: tf.Tensor, slope: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor) -> Values:
        new = beta - newton_step_of(total, slope, eps, beta)
        # an error of this size leaves its square; NaN is not greater: an invalid row never keeps the loop going
        return new, tf.cast(tf.abs(new - beta) > 2e-4 * new, tf.float32)

    def body(i: tf.Tensor, _: tf.Tensor, beta: LaidOut) -> tuple[tf.Tensor, tf.Tensor, LaidOut]:
        sums = [rows.across_shards(s, "SUM") for s in slicewise(sums_of, epsilon, beta, *given)]
        beta, going = slicewise(newton_step, *sums, epsilon, beta)
        return i + 1, largest_of_cores(rows, going), beta

    *_, beta = laid_out_while_loop(
        mesh_impl,
        lambda i, going, *_: tf.logical_and(i < n_iter, going > 0),
        body,
        (tf.constant(0), tf.constant(1.0), start),
    )
    return beta


def weights_and_slopes(z: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor, near_edge: float = 0.0) -> Values:
    """q and ∂q/∂u, as `_with_edge` has it, of scores [rows, groups, places], by ε and β [rows, 1]."""
    eps, beta = (tf.broadcast_to(x[..., tf.newaxis], z.shape) for x in (eps, beta))
    q, slope, base = _entries_of(z / beta, eps)
    return q, _with_edge(slope, base, eps, near_edge) if near_edge else slope


NEAR_EDGE = 4e-6  # as of `_with_edge`, where β is that of `solve_in_few_kernels`


def residual(total: tf.Tensor, slope: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    """How far u may be off, where q and ∂q/∂u sum to this: the relative step that β lacks, times the largest |u|.

    1 where that is more than NEAR_EDGE allows for.
    """
    missing = tf.abs(newton_step_of(total, slope, eps, beta)) / beta
    off = tf.maximum(missing - RESIDUAL_FLOOR, 0.0) / tf.maximum(eps, 1 / 32)  # further off, q is nothing
    return tf.where_v2(off < NEAR_EDGE / 2, off, 1.0)


def newton_step_of(total: tf.Tensor, slope: tf.Tensor, eps: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    return (beta - tf.exp(-eps * tf.log(total))) * (total / slope)

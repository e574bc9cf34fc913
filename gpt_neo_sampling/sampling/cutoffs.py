"""Cutoffs of top-p and related masks.

The entries that are kept must not depend on layout or backend, although float32 sums do. So probabilities are summed in
float64, where two orders differ by 1e-15. Only a hundred entries or so are sorted: entries are put into some thousand
buckets, whose sums say in which bucket the cutoff lies.
"""

import functools
import math
import typing
from collections.abc import Callable

import numpy as np

from gpt_neo_sampling._compat import PlacementMeshImpl, is_in_function, mtf, tf
from gpt_neo_sampling._types import LaidOut, TensorFunction
from gpt_neo_sampling.mesh.gpu import may_be_gpu
from gpt_neo_sampling.mesh.ops import MeshOperation, laid_out_cond, laid_out_while_loop, pad_last, size_of
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, any_of, fast_sum, spread_rows, sum_across
from gpt_neo_sampling.mesh.xla import is_core_program
from gpt_neo_sampling.sampling import core_cutoffs, float_pairs
from gpt_neo_sampling.sampling.core_exact_cutoffs import ExactSums, exact_mean, exact_sums
from gpt_neo_sampling.sampling.core_rows import CoreRows, typical_key
from gpt_neo_sampling.sampling.float_pairs import Pair
from gpt_neo_sampling.sampling.top_k import has_invalid, largest, largest_of_rows

_FEW = 128  # entries of a shard that are sorted
_BINADES = 5  # of buckets; the last ends at a distance of 62, beyond which entries have no mass to speak of
_BUCKET_BITS, _BUCKET_BITS_SPLIT = 10, 6  # 2ⁿ buckets a binade; fewer where their sums travel
_BLOCK = 64  # buckets in each part of a sum over them
_FARTHEST = 1000.0  # exp(−1000) is 0 in float64
_EVERYTHING = np.array([[-np.inf, np.inf]], np.float32)  # ends of a Cut behind all entries
_NOTHING = np.array([[np.inf, -1.0]], np.float32)  # and ahead of all


def mask_below(
    logits: mtf.Tensor,
    option: mtf.Tensor,
    dim: mtf.Dimension,
    find_cut: "FindCut",
    masked: float,
    at_least: mtf.Tensor | None = None,
    most: int = 1,
) -> mtf.Tensor:
    """Masks the entries below a cutoff, one for each row.

    Args:
      logits: mtf.Tensor of a floating dtype.
      option: float32 mtf.Tensor, its dims among [logits.shape − dim]; a row where it is NaN becomes NaN.
      dim: mtf.Dimension of logits.
      find_cut: one of this module's functions from (Softmax, laid-out option [rows, 1]) to a Cut.
      masked: the number that replaces masked entries.
      at_least: int32 mtf.Tensor, its dims among [logits.shape − dim]: so many entries are kept, the first in the order
        of the cut, of equal ones by index, but none that is −inf or the lowest number; None for no such number.
      most: the largest that at_least may be.

    Returns:
      mtf.Tensor like logits. A row that holds NaN or +inf becomes NaN; one of nothing but −inf or the lowest number
      stays as it is. The gradient flows through the survivors.
    """
    y = _MaskOperation(logits, option, dim, find_cut, masked, at_least=at_least, most=most).outputs[0]
    return with_top_zero(y) if is_top_zero(logits) else y


def mask_above(
    logits: mtf.Tensor, option: mtf.Tensor, dim: mtf.Dimension, find_cut: "FindCut", masked: float
) -> mtf.Tensor:
    """Masks the entries that `mask_below` would keep, and keeps the others. A row without a cut stays as it is.

    The arguments are those of `mask_below`.
    """
    return _MaskOperation(logits, option, dim, find_cut, masked, keeps_rest=True).outputs[0]


def with_top_zero(x: mtf.Tensor) -> mtf.Tensor:
    """x, each of whose rows has 0, NaN or +inf for its largest entry, or nothing but −inf: a core need not look."""
    x.top_is_zero = True
    return x


def is_top_zero(x: mtf.Tensor) -> bool:
    return getattr(x, "top_is_zero", False)


class _MaskOperation(MeshOperation):
    def __init__(
        self,
        logits: mtf.Tensor,
        option: mtf.Tensor,
        dim: mtf.Dimension,
        find_cut: "FindCut",
        masked: float,
        keeps_rest: bool = False,
        at_least: mtf.Tensor | None = None,
        most: int = 1,
    ) -> None:
        inputs = [logits, option] + ([] if at_least is None else [at_least])
        super().__init__(inputs, [(logits.shape, logits.dtype)], find_cut.__name__)
        self._dim, self._find_cut, self._masked, self._keeps_rest = dim, find_cut, masked, keeps_rest
        self._most = min(most, dim.size)

    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor | None]:
        def survivors(dy: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            return tf.where_v2(tf.equal(x, y), dy, tf.zeros_like(dy))

        of_logits = mtf.cwise(survivors, [grad_ys[0], self.inputs[0], self.outputs[0]])
        return [of_logits] + [None] * (len(self.inputs) - 1)

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        slicewise = mesh_impl.slicewise
        logits, option, *at_least = self.inputs
        rest = logits.shape - self._dim
        rows = ShardedRows(mesh_impl, logits.shape, self._dim, whole_groups=False)
        x = slicewise(rows.to_rows, lowering.tensors[logits])
        option = spread_rows(lowering, option, rest)
        # The cut by standard deviations asks the largest entry whether a row has mass.
        top_is_zero = is_core_program(mesh_impl) and is_top_zero(logits) and self._find_cut is not sigma_cut
        x32 = slicewise(lambda x: tf.cast(x, tf.float32), x)
        softmax = Softmax(rows, x32, lowest=float(logits.dtype.min), top_is_zero=top_is_zero)
        cut = self._find_cut(softmax, option)
        if at_least:
            cut = _with_at_least(softmax, cut, spread_rows(lowering, at_least[0], rest), self._most, rest)
        if isinstance(cut, CoreCut):
            lowering.set_tensor_lowering(self.outputs[0], self._masked_on_core(rows, x, cut))
            return

        def mask(x: tf.Tensor, top: tf.Tensor, option: tf.Tensor, ends: tf.Tensor, *others: tf.Tensor) -> tf.Tensor:
            of_row, pcoord = others[: len(cut.of_row)], others[len(cut.of_row) :]
            at = tf.cast(rows.entry_numbers(*pcoord), tf.float32)
            # Not by the maximum alone, in which XLA loses a row of nothing but NaN.
            has_mass = tf.logical_or(top > float(x.dtype.min), tf.is_nan(ends[:, :1]))
            ends = tf.where_v2(has_mass, ends, _NOTHING if self._keeps_rest else _EVERYTHING)
            ends = tf.where_v2(tf.is_nan(option), np.nan, ends)
            least, last = ends[:, :1], ends[:, 1:]
            key = cut.key(tf.cast(x, tf.float32), *of_row)

            def with_ties_and_invalid_rows() -> tf.Tensor:
                return self._kept(x, key, at, least, last)

            def plain() -> tf.Tensor:
                return tf.where_v2(key >= least, x, tf.constant(self._masked, x.dtype))

            if self._keeps_rest:
                return rows.from_rows(with_ties_and_invalid_rows())
            whole_ties = tf.logical_and(last >= np.inf, least >= -np.inf)  # false for NaN
            is_plain = tf.reduce_min(tf.cast(whole_ties, tf.float32)) > 0.5
            return rows.from_rows(tf.cond(is_plain, plain, with_ties_and_invalid_rows))

        y = slicewise(mask, x, softmax.top, option, cut.ends, *cut.of_row, *rows.pcoords())
        lowering.set_tensor_lowering(self.outputs[0], y)

    def _masked_on_core(self, rows: ShardedRows, x: LaidOut, cut: "CoreCut") -> LaidOut:
        def mask(x: tf.Tensor, least: tf.Tensor, last: tf.Tensor, *others: tf.Tensor) -> tf.Tensor:
            of_row, pcoord = others[: len(cut.of_row)], others[len(cut.of_row) :]
            least, last = tf.reshape(least, [-1, 1]), tf.reshape(last, [-1, 1])
            key = cut.key(tf.cast(x, tf.float32), *of_row)
            at = tf.cast(rows.entry_numbers(*pcoord), tf.float32)
            return rows.from_rows(self._kept(x, key, at, least, last))

        return rows.mesh_impl.slicewise(mask, x, cut.least, cut.last, *cut.of_row, *rows.pcoords())

    def _kept(self, x: tf.Tensor, key: tf.Tensor, at: tf.Tensor, least: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        """x [rows, entries], masked where it is on the other side of the cut; NaN where that is."""
        if self._keeps_rest:
            kept = tf.logical_or(key < least, tf.logical_and(tf.equal(key, least), at > last))
            kept = tf.logical_or(kept, tf.is_nan(key))
        else:
            kept = _is_ahead(key, at, least, last)
        fill = tf.where_v2(tf.is_nan(least), np.nan, self._masked)
        return tf.where_v2(kept, x, tf.cast(fill, x.dtype))


class CoreCut(typing.NamedTuple):
    """A Cut of a core's program, whose ends account for rows without mass and invalid options too.

    least, last: laid-out float32, one number a row.
    exact_of_row: None, or a function to an `of_row` by which no two keys are in another order than by exact ones.
    """

    least: LaidOut
    last: LaidOut
    key: TensorFunction = lambda x: x
    of_row: tuple[LaidOut, ...] = ()
    exact_of_row: Callable[[], tuple[LaidOut, ...]] | None = None


class Cut(typing.NamedTuple):
    """Entries of a larger key are kept, and of those of the key at the cut the first ones.

    ends: laid-out float32 [rows, 2]: the key at the cut, and the index of the last entry of that key that is kept (+inf
      if all are); NaN for an invalid row.
    key: a function from x, a slice [rows, …], and those of `of_row` to float32 keys of x's shape.
    of_row: laid-out tensors [rows, 1].
    """

    ends: typing.Any
    key: TensorFunction = lambda x: x
    of_row: tuple[LaidOut, ...] = ()


class Softmax:
    """What cuts need to know of the softmax of laid-out float32 rows; all but `top` is float64.

    A row with NaN or +inf has a total of NaN. Entries of the `lowest` number, or −inf, are masked.
    """

    def __init__(self, rows: ShardedRows, x: LaidOut, lowest: float, top_is_zero: bool = False) -> None:
        self.rows, self.x, self.lowest = rows, x, lowest
        if top_is_zero:
            self.top = rows.mesh_impl.slicewise(lambda x: tf.zeros([size_of(x, 0), 1]), x)
            return
        # Finite in any row: what is invalid shows in the sums, for XLA's maximum passes over NaN.
        top = rows.mesh_impl.slicewise(lambda x: _finite_top(tf.reduce_max(x, -1, keepdims=True)), x)
        self.top = rows.across_shards(top, "MAX")

    @functools.cached_property
    def core(self) -> CoreRows:
        return CoreRows(self.rows, self.x, self.top, self.lowest)

    @functools.cached_property
    def _core_sums(self) -> ExactSums:
        return exact_sums(self.core)

    @functools.cached_property
    def weights(self) -> LaidOut:
        """exp(x − max x)."""
        return self.rows.mesh_impl.slicewise(weights_of, self.x, self.top)

    @functools.cached_property
    def total(self) -> LaidOut:
        """Σ weights [rows, 1]."""
        if is_core_program(self.rows.mesh_impl):
            return self._core_sums.total
        return sum_across(self.rows, self.rows.mesh_impl.slicewise(fast_sum, self.weights))

    @functools.cached_property
    def depth(self) -> LaidOut:
        """The mean distance below the largest entry, Σ p·(max x − x) [rows, 1]."""

        def part(weights: tf.Tensor, x: tf.Tensor, top: tf.Tensor) -> tf.Tensor:
            return fast_sum(weights * tf.cast(tf.minimum(top - x, _FARTHEST), tf.float64))

        slicewise = self.rows.mesh_impl.slicewise
        if is_core_program(self.rows.mesh_impl):
            depth = self._core_sums.depth
        else:
            depth = sum_across(self.rows, slicewise(part, self.weights, self.x, self.top))
        return slicewise(tf.math.divide_no_nan, depth, self.total)  # 0 in a row without mass


FindCut = Callable[[Softmax, LaidOut], Cut | CoreCut]  # of an option, [rows, 1]


def _finite_top(top: tf.Tensor) -> tf.Tensor:
    highest = tf.float32.max
    return tf.where_v2(tf.is_nan(top), highest, tf.clip_by_value(top, -highest, highest))


def weights_of(x: tf.Tensor, top: tf.Tensor) -> tf.Tensor:
    return tf.exp(tf.cast(x - top, tf.float64))


# --- A least number of entries -----------------------------------------------------------


def _with_at_least(softmax: Softmax, cut: Cut | CoreCut, n: LaidOut, most: int, rest: mtf.Shape) -> Cut | CoreCut:
    """The cut; in rows of which it keeps too few entries, behind the first n of those that are not masked.

    n: laid-out int32 [rows, 1], from 1 to `most`; rest: mtf.Shape, the dims of the rows.
    """
    rows, mesh_impl = softmax.rows, softmax.rows.mesh_impl
    slicewise = mesh_impl.slicewise

    def count(x: tf.Tensor, ends: tf.Tensor, *others: tf.Tensor) -> tf.Tensor:
        """[2, rows, 1]: of entries that are kept, and of all that are not masked."""
        of_row, pcoord = others[: len(cut.of_row)], others[len(cut.of_row) :]
        kept = _is_ahead(
            cut.key(x, *of_row), tf.cast(rows.entry_numbers(*pcoord), tf.float32), ends[:, :1], ends[:, 1:]
        )
        there = tf.where_v2(x > softmax.lowest, 1.0, tf.zeros_like(x))
        return tf.stack([tf.reduce_sum(t, -1, keepdims=True) for t in (tf.where_v2(kept, there, 0.0), there)])

    def lacks(n: tf.Tensor, ends: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        kept, there = tf.unstack(counts)
        too_few = kept < tf.minimum(tf.cast(n, tf.float32), there)
        return tf.where_v2(tf.logical_and(too_few, tf.equal(ends[:, :1], ends[:, :1])), 1.0, 0.0)  # not of NaN

    def keys_of(x: tf.Tensor, *of_row: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(x > softmax.lowest, cut.key(x, *of_row), -np.inf)

    def ends_of(values: tf.Tensor, indices: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
        """Where the n-th of them is, or the last that is not masked."""
        there = tf.reduce_sum(tf.cast(values > -np.inf, tf.int32), -1, keepdims=True)
        is_last = tf.equal(np.arange(most, dtype=np.int32), tf.minimum(n, there) - 1)
        ends = [tf.where_v2(is_last, tf.cast(t, tf.float32), 0.0) for t in (values, indices)]
        return tf.concat([tf.reduce_sum(end, -1, keepdims=True) for end in ends], -1)

    def choose(lacking: tf.Tensor, *new_and_old: tf.Tensor) -> tuple[tf.Tensor, ...]:
        half = len(new_and_old) // 2
        pairs = zip(new_and_old[:half], new_and_old[half:], strict=True)
        return tuple(tf.where_v2(lacking > 0, new, old) for new, old in pairs)

    def behind_the_first() -> tuple[LaidOut, ...]:
        of_row = cut.exact_of_row() if isinstance(cut, CoreCut) and cut.exact_of_row else cut.of_row
        keys = slicewise(keys_of, softmax.x, *of_row)
        values, indices = largest_of_rows(mesh_impl, keys, most, rows.mesh_axis, rest)
        return slicewise(choose, lacking, slicewise(ends_of, values, indices, n), *of_row, ends, *cut.of_row)

    if isinstance(cut, CoreCut):
        ends = slicewise(lambda *ends: tf.concat([tf.reshape(e, [-1, 1]) for e in ends], -1), cut.least, cut.last)
    else:
        ends = cut.ends
    counts = rows.across_shards(slicewise(count, softmax.x, ends, *cut.of_row, *rows.pcoords()), "SUM")
    lacking = slicewise(lacks, n, ends, counts)
    any_lacks = softmax.core.any_of(lacking) if isinstance(cut, CoreCut) else any_of(mesh_impl, lacking)
    ends, *of_row = laid_out_cond(mesh_impl, any_lacks, behind_the_first, lambda: (ends, *cut.of_row))
    if isinstance(cut, CoreCut):
        least, last = slicewise(lambda ends: tuple(tf.split(ends, 2, -1)), ends)
        return CoreCut(least, last, cut.key, tuple(of_row))
    return Cut(ends, cut.key, tuple(of_row))


def _is_ahead(key: tf.Tensor, at: tf.Tensor, least: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
    """Whether entries [rows, entries] are on the side of a cut that has the larger keys."""
    return tf.logical_or(key > least, tf.logical_and(tf.equal(key, least), at <= last))


# --- Cuts by probability ----------------------------------------------------------------


def _cut_at_probability(
    softmax: Softmax,
    option: LaidOut,
    depth_of: Callable[..., Pair],
    looks_at: str,
    exact: Callable[[Softmax, LaidOut], Cut],
    measure: core_cutoffs.Measure = core_cutoffs.PROBABILITY,
) -> Cut | CoreCut:
    """The cut that `exact` gives; in a core program in few kernels: see `core_cutoffs.probability_ends`."""
    if not is_core_program(softmax.rows.mesh_impl):
        return exact(softmax, option)
    ends = core_cutoffs.probability_ends(
        softmax.core, option, depth_of, looks_at, lambda: exact(softmax, option).ends, measure
    )
    return CoreCut(*ends)


def min_p_cut(softmax: Softmax, min_p: LaidOut) -> Cut | CoreCut:
    """At min_p times the largest probability."""
    return _cut_at_probability(softmax, min_p, lambda minus_log: minus_log, "", _min_p_cut)


def _min_p_cut(softmax: Softmax, min_p: LaidOut) -> Cut:
    mesh_impl, rows = softmax.rows.mesh_impl, softmax.rows
    invalid = rows.across_shards(mesh_impl.slicewise(lambda x: has_invalid(x, keepdims=True), softmax.x), "MAX")

    def depth(min_p: tf.Tensor, invalid: tf.Tensor) -> tf.Tensor:
        depth = -tf.log(tf.cast(min_p, tf.float64))
        return tf.where_v2(invalid > 0, tf.constant(np.nan, tf.float64), depth)

    return _cut_at_depth(softmax, mesh_impl.slicewise(depth, min_p, invalid))


def epsilon_cut(softmax: Softmax, epsilon: LaidOut) -> Cut | CoreCut:
    """At probability ε."""
    return _cut_at_probability(softmax, epsilon, _below_top, "total", _epsilon_cut)


def _below_top(minus_log: Pair, log_total: Pair) -> Pair:
    """How far an entry of that probability is below the largest."""
    return float_pairs.add(minus_log, float_pairs.negative(log_total))


def _epsilon_cut(softmax: Softmax, epsilon: LaidOut) -> Cut:
    def depth(epsilon: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
        return -tf.log(tf.cast(epsilon, tf.float64)) - tf.log(total)

    return _cut_at_depth(softmax, softmax.rows.mesh_impl.slicewise(depth, epsilon, softmax.total))


def mirostat_cut(softmax: Softmax, mu: LaidOut) -> Cut | CoreCut:
    """At a surprise of mu bits, −log2 of a probability; +inf is no cut."""
    return _cut_at_probability(softmax, mu, _below_top, "total", _mirostat_cut, core_cutoffs.BITS)


def _mirostat_cut(softmax: Softmax, mu: LaidOut) -> Cut:
    def depth(mu: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
        return tf.cast(mu, tf.float64) * math.log(2) - tf.log(total)

    return _cut_at_depth(softmax, softmax.rows.mesh_impl.slicewise(depth, mu, softmax.total))


def xtc_cut(softmax: Softmax, threshold: LaidOut) -> Cut | CoreCut:
    """Ahead of the least likely entry of at least this probability; of equal ones, of the last. None if above 0.5."""
    mesh_impl = softmax.rows.mesh_impl
    if is_core_program(mesh_impl):
        return CoreCut(*core_cutoffs.xtc_ends(softmax.core, threshold, lambda: _xtc_ends(softmax, threshold)))
    none = mesh_impl.slicewise(
        lambda top: tf.concat([tf.fill(tf.shape(top), end) for end in _NOTHING[0]], -1), softmax.top
    )
    is_used = any_of(mesh_impl, mesh_impl.slicewise(lambda t: tf.cast(t <= 0.5, tf.float32), threshold))
    return Cut(laid_out_cond(mesh_impl, is_used, lambda: _xtc_ends(softmax, threshold), lambda: none))


def _xtc_ends(softmax: Softmax, threshold: LaidOut) -> LaidOut:
    rows, slicewise = softmax.rows, softmax.rows.mesh_impl.slicewise

    def border(threshold: tf.Tensor, total: tf.Tensor, top: tf.Tensor) -> tf.Tensor:
        return _border(-tf.log(tf.cast(threshold, tf.float64)) - tf.log(total), top)

    def above(x: tf.Tensor, border: tf.Tensor) -> tf.Tensor:
        return tf.logical_and(x >= border, x > softmax.lowest)

    def smallest(x: tf.Tensor, border: tf.Tensor) -> tf.Tensor:
        """Its negative."""
        return _finite_top(tf.reduce_max(tf.where_v2(above(x, border), -x, -np.inf), -1, keepdims=True))

    def last_of(x: tf.Tensor, border: tf.Tensor, smallest: tf.Tensor, *pcoord: tf.Tensor) -> tf.Tensor:
        at = tf.cast(rows.entry_numbers(*pcoord), tf.float32)
        found = tf.logical_and(above(x, border), tf.equal(x, -smallest))
        return tf.reduce_max(tf.where_v2(found, at, -1.0), -1, keepdims=True)

    def ends(threshold: tf.Tensor, total: tf.Tensor, smallest: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        ends = tf.where_v2(last >= 0, tf.concat([-smallest, last - 1.0], -1), _NOTHING)
        ends = tf.where_v2(tf.is_nan(total), np.nan, ends)
        return tf.where_v2(threshold <= 0.5, ends, _NOTHING)

    borders = slicewise(border, threshold, softmax.total, softmax.top)
    least = rows.across_shards(slicewise(smallest, softmax.x, borders), "MAX")
    last = rows.across_shards(slicewise(last_of, softmax.x, borders, least, *rows.pcoords()), "MAX")
    return slicewise(ends, threshold, softmax.total, least, last)


def eta_cut(softmax: Softmax, eta: LaidOut) -> Cut | CoreCut:
    """At probability min(η, √η · exp(−H))."""

    def pair(minus_log: Pair, log_total: Pair, mean: Pair) -> Pair:
        entropy = float_pairs.add(log_total, mean)
        other = float_pairs.add((0.5 * minus_log[0], 0.5 * minus_log[1]), entropy)
        larger = tuple(tf.where_v2(other[0] > minus_log[0], o, m) for o, m in zip(other, minus_log, strict=True))
        return float_pairs.add(larger, float_pairs.negative(log_total))

    return _cut_at_probability(softmax, eta, pair, "mean", _eta_cut)


def _eta_cut(softmax: Softmax, eta: LaidOut) -> Cut:
    def depth(eta: tf.Tensor, total: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        log_eta, log_total = tf.log(tf.cast(eta, tf.float64)), tf.log(total)
        entropy = tf.where_v2(total > 0, log_total + mean, tf.zeros_like(mean))  # of −inf alone: not NaN
        return -tf.minimum(log_eta, 0.5 * log_eta - entropy) - log_total

    return _cut_at_depth(softmax, softmax.rows.mesh_impl.slicewise(depth, eta, softmax.total, softmax.depth))


def sigma_cut(softmax: Softmax, n: LaidOut) -> Cut:
    """At n standard deviations of the row's logits, of those that are not masked, below the largest; 0 is no cut."""
    rows, slicewise = softmax.rows, softmax.rows.mesh_impl.slicewise

    def depth_of_lowest(x: tf.Tensor, top: tf.Tensor) -> tf.Tensor:
        return _finite_top(tf.reduce_max(tf.where_v2(x > softmax.lowest, top - x, 0.0), -1, keepdims=True))

    def moments(x: tf.Tensor, top: tf.Tensor, span: tf.Tensor) -> tf.Tensor:
        """Float64 [rows, 3]: how many entries, and the sums of their depths and these squared, in units of the span."""
        depth = (tf.cast(top, tf.float64) - tf.cast(x, tf.float64)) / tf.cast(tf.maximum(span, 1e-30), tf.float64)
        is_masked, zero = x <= softmax.lowest, tf.zeros([], tf.float64)
        depth = tf.where_v2(is_masked, zero, depth)
        count = tf.where_v2(is_masked, zero, tf.ones_like(depth))
        return tf.concat([fast_sum(count), fast_sum(depth), fast_sum(depth * depth)], -1)

    def depth(n: tf.Tensor, moments: tf.Tensor, span: tf.Tensor) -> tf.Tensor:
        count, first, second = tf.split(moments, 3, -1)
        mean = tf.math.divide_no_nan(first, count)
        variance = tf.math.divide_no_nan(second, count) - mean * mean
        sigma = tf.sqrt(tf.where_v2(variance < 0, tf.zeros_like(variance), variance)) * tf.cast(span, tf.float64)
        far = tf.constant(np.inf, tf.float64)
        return tf.where_v2(tf.logical_or(n > 0, tf.is_nan(sigma)), tf.cast(n, tf.float64) * sigma, far)

    span = rows.across_shards(slicewise(depth_of_lowest, softmax.x, softmax.top), "MAX")
    sums = sum_across(rows, slicewise(moments, softmax.x, softmax.top, span))
    return _cut_at_depth(softmax, slicewise(depth, n, sums, span))


def _cut_at_depth(softmax: Softmax, depth: LaidOut) -> Cut:
    """At this depth below the largest entry, which itself stays. depth: laid-out float64 [rows, 1]."""

    def ends(depth: tf.Tensor, top: tf.Tensor) -> tf.Tensor:
        least = _border(tf.maximum(depth, 0.0), top)
        least = tf.where_v2(tf.is_nan(depth), np.nan, least)  # which the maximum may have lost
        return tf.concat([least, tf.fill(tf.shape(least), np.float32(np.inf))], -1)

    return Cut(softmax.rows.mesh_impl.slicewise(ends, depth, softmax.top))


def _border(depth: tf.Tensor, top: tf.Tensor) -> tf.Tensor:
    """The least float32 that is not more than a float64 depth below the largest entry."""
    return _rounded_up(tf.cast(top, tf.float64) - depth)


def _rounded_up(x: tf.Tensor) -> tf.Tensor:
    """The least float32 that is not below a float64 x (as normal numbers go)."""
    y = tf.cast(x, tf.float32)
    above = tf.bitcast(tf.bitcast(y, tf.int32) + tf.where_v2(y > 0, 1, -1), tf.float32)
    above = tf.where_v2(tf.equal(y, 0.0), np.float32(2.0**-126), above)
    return tf.where_v2(tf.cast(y, tf.float64) < x, above, y)


# --- Cuts by mass -----------------------------------------------------------------------


def nucleus_cut(softmax: Softmax, mass: LaidOut) -> Cut | CoreCut:
    """Behind the fewest of the likeliest entries whose mass is at least `mass`."""
    if is_core_program(softmax.rows.mesh_impl):
        return CoreCut(*core_cutoffs.nucleus_ends(softmax.core, mass))
    return _cut_at_mass(softmax, mass, softmax.top)


def typical_p_cut(softmax: Softmax, typical_p: LaidOut) -> Cut | CoreCut:
    """Behind the fewest entries whose mass is at least typical_p, by how far −log p is from the entropy.

    |−log p − H| is the distance of x from the mean logit, Σ p·x. A mean less than 2⁻²⁰ below the largest logit is taken
    to equal it: a smaller difference is rounding, which depends on the layout.
    """
    mesh_impl = softmax.rows.mesh_impl
    if is_core_program(mesh_impl):
        core = softmax.core
        least, last, *mean = core_cutoffs.typical_ends(core, typical_p)

        def exact_mean_of_rows() -> tuple[LaidOut, ...]:
            sums = exact_sums(core)
            return tuple(core.slicewise(exact_mean, core.flat_top, sums.total, sums.depth))

        return CoreCut(least, last, typical_key, tuple(mean), exact_mean_of_rows)

    def key(x: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        return -tf.cast(tf.abs(tf.cast(x, tf.float64) - mean), tf.float32)

    def mean_of(top: tf.Tensor, depth: tf.Tensor) -> tf.Tensor:
        return tf.cast(top, tf.float64) - tf.where_v2(depth < 2.0**-20, tf.zeros_like(depth), depth)

    mean = mesh_impl.slicewise(mean_of, softmax.top, softmax.depth)
    largest_key = mesh_impl.slicewise(tf.zeros_like, softmax.top)
    return _cut_at_mass(softmax, typical_p, largest_key, key, (mean,))


def _cut_at_mass(
    softmax: Softmax,
    mass: LaidOut,
    first: LaidOut,
    key: Callable[..., tf.Tensor] = lambda x: x,
    of_row: tuple[LaidOut, ...] = (),
) -> Cut:
    """A Cut behind the fewest entries, in descending order of their keys, whose mass is at least `mass`.

    Args:
      softmax: Softmax.
      mass: laid-out float32 [rows, 1], a part of the total.
      first: laid-out float32 [rows, 1], not below any key of the row, nor far above all that has mass.
      key, of_row: as for Cut.
    """
    rows, mesh_impl = softmax.rows, softmax.rows.mesh_impl
    slicewise = mesh_impl.slicewise
    keys = slicewise(key, softmax.x, *of_row)
    if rows.size <= _FEW:
        total, ahead, left = softmax.total, slicewise(tf.zeros_like, softmax.total), keys
        wanted = slicewise(_part_of, total, mass)
    else:
        bits = _BUCKET_BITS if rows.mesh_axis is None else _BUCKET_BITS_SPLIT
        buckets = slicewise(functools.partial(_distance_bucket, bits=bits), keys, first)
        sums = _bucket_sums(softmax, buckets, _BINADES << bits)
        total = slicewise(lambda sums: tf.reduce_sum(sums, -1, keepdims=True), sums)
        wanted = slicewise(_part_of, total, mass)
        bucket, ahead = slicewise(_reached, sums, wanted, slicewise(tf.zeros_like, total))
        left = slicewise(_keys_of_bucket, keys, buckets, bucket)

    def cut_among(ahead: LaidOut, few: tuple[LaidOut, LaidOut], has_all_ties: bool = True) -> LaidOut:
        """Laid-out [rows, 2]: where the cut lies among those few, behind a mass of `ahead`."""
        x, index = few
        if rows.mesh_axis is not None:
            x, index = (mesh_impl.allconcat(t, rows.mesh_axis, 1) for t in (x, index))
        choose = functools.partial(_ends_among, key, has_all_ties)
        return slicewise(choose, x, index, ahead, wanted, softmax.top, *of_row)

    few = _few_of(rows, left, softmax.x)
    if rows.entries <= _FEW:
        ends = cut_among(ahead, few)
    else:

        def narrowed() -> LaidOut:
            ahead_of, fewer = _narrow(softmax, ahead, left, wanted)
            return cut_among(ahead_of, _few_of(rows, fewer, softmax.x), has_all_ties=False)

        crowded = any_of(mesh_impl, slicewise(lambda index: tf.cast(index[:, -1:] >= 0, tf.float32), few[1]))
        ends = laid_out_cond(mesh_impl, crowded, narrowed, lambda: cut_among(ahead, few))

    def finish(ends: tf.Tensor, mass: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
        ends = tf.where_v2(mass < 1, ends, _EVERYTHING)
        return tf.where_v2(tf.is_nan(total), np.nan, ends)

    return Cut(slicewise(finish, ends, mass, total), key, of_row)


def _part_of(total: tf.Tensor, mass: tf.Tensor) -> tf.Tensor:
    return total * tf.cast(mass, tf.float64)


def _keys_of_bucket(keys: tf.Tensor, buckets: tf.Tensor, bucket: tf.Tensor) -> tf.Tensor:
    return tf.where_v2(tf.equal(buckets, bucket), keys, -np.inf)


def _distance_bucket(keys: tf.Tensor, first: tf.Tensor, bits: int) -> tf.Tensor:
    """Each key's bucket, by its distance from the first: 2**bits equal ones for each of [0, 2), [2, 6), [6, 14),
    [14, 30) and [30, 62), and one for all greater distances and NaN.

    The bits of a positive float, read as an integer, grow with it.
    """
    shift = 23 - bits
    distance = tf.bitcast(2.0 - (keys - first), tf.uint32)
    bucket = tf.bitcast(tf.bitwise.right_shift(distance, tf.constant(shift, tf.uint32)), tf.int32)
    zero = int(np.float32(2.0).view(np.int32)) >> shift
    return tf.minimum(bucket - zero, _BINADES << bits)


def _bucket_sums(softmax: Softmax, buckets: LaidOut, n: int) -> LaidOut:
    """Laid-out float64 [rows, n + _BLOCK]: the mass in each of buckets 0 to n, over all shards."""
    mesh_impl = softmax.rows.mesh_impl

    def sums(buckets: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        n_rows = size_of(buckets, 0)
        place = tf.reshape(buckets + np.arange(n_rows, dtype=np.int32)[:, np.newaxis] * width, [-1])
        weights, size = tf.reshape(weights, [-1]), n_rows * width
        if on_cpu:
            sums = tf.raw_ops.DenseBincount(input=place, size=size, weights=weights, binary_output=False)
        else:
            sums = tf.math.unsorted_segment_sum(weights, place, size)
        return tf.reshape(sums, [n_rows, width])

    width = n + _BLOCK
    # DenseBincount is three times as fast, but only CPUs have it, and XLA does not.
    on_cpu = isinstance(mesh_impl, PlacementMeshImpl) and not is_in_function() and not may_be_gpu(mesh_impl)
    return sum_across(softmax.rows, mesh_impl.slicewise(sums, buckets, softmax.weights))


def _reached(sums: tf.Tensor, wanted: tf.Tensor, ahead: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The bucket, but for those of the last block, in which a mass of `wanted` is reached, and the mass ahead of it."""
    blocks = tf.reshape(sums, [size_of(sums, 0), -1, _BLOCK])
    block, ahead = _first_reached(tf.reduce_sum(blocks, -1)[:, :-1], wanted, ahead)
    within, ahead = _first_reached(tf.gather(blocks, block, batch_dims=1)[:, 0], wanted, ahead)
    return block * _BLOCK + within, ahead


def _first_reached(sums: tf.Tensor, wanted: tf.Tensor, ahead: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(the first of [rows, n] `sums` up to which they reach what is wanted, what is ahead of it), [rows, 1].

    Where rounding leaves none, the last one above 0.
    """
    at = tf.range(size_of(sums, 1))
    before = ahead + tf.cumsum(sums, -1, exclusive=True)
    last = tf.reduce_max(tf.where_v2(sums > 0, at, 0), -1, keepdims=True)
    reached = tf.where_v2(tf.logical_and(sums > 0, before + sums >= wanted), at, last)
    first = tf.reduce_min(reached, -1, keepdims=True)
    return first, tf.gather(before, first, batch_dims=1)


def _ends_among(
    key: Callable[..., tf.Tensor],
    has_all_ties: bool,
    x: tf.Tensor,
    index: tf.Tensor,
    ahead: tf.Tensor,
    wanted: tf.Tensor,
    top: tf.Tensor,
    *of_row: tf.Tensor,
) -> tf.Tensor:
    """[rows, 2], a Cut's ends, among a few entries [rows, n], where index is −1 for none.

    has_all_ties: whether all entries that equal one of these are among them.
    """
    keys = tf.where_v2(index >= 0, key(x, *of_row), -np.inf)
    keys, order = largest(keys, size_of(keys, 1))
    x, index = (tf.gather(t, order, batch_dims=1) for t in (x, index))
    weights = tf.where_v2(index >= 0, weights_of(x, top), tf.zeros([], tf.float64))
    before = ahead + tf.cumsum(weights, -1, exclusive=True)
    kept = tf.logical_and(before < wanted, index >= 0)
    n_kept = tf.maximum(tf.reduce_sum(tf.cast(kept, tf.int32), -1, keepdims=True), 1)
    least, last = (tf.gather(t, n_kept - 1, batch_dims=1) for t in (keys, tf.cast(index, tf.float32)))
    if has_all_ties:
        following = tf.gather(pad_last(keys, after=1, value=-np.inf), n_kept, batch_dims=1)
        last = tf.where_v2(following < least, np.inf, last)
    return tf.concat([least, last], -1)


def _few_of(rows: ShardedRows, left: LaidOut, x: LaidOut) -> tuple[LaidOut, LaidOut]:
    """Laid-out (x, index) [rows, at most _FEW] of each shard's first ones by `left`; 0 and −1 where it has fewer."""

    def of_shard(left: tf.Tensor, x: tf.Tensor, *pcoord: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        values, entry = largest(left, min(_FEW, rows.entries))
        found = values > -np.inf
        x = tf.where_v2(found, tf.gather(x, entry, batch_dims=1), 0.0)
        return x, tf.where_v2(found, tf.gather(rows.entry_numbers(*pcoord), entry), -1)

    return rows.mesh_impl.slicewise(of_shard, left, x, *rows.pcoords())


def _narrow(softmax: Softmax, ahead: LaidOut, left: LaidOut, wanted: LaidOut) -> tuple[LaidOut, LaidOut]:
    """(ahead, left) with fewer than _FEW left of each row and shard.

    Repeatedly puts the keys that are left into buckets between the largest and the smallest. Where these two are
    equal, entries are told apart by their index from then on, and `left` holds its negative.
    """
    rows, mesh_impl = softmax.rows, softmax.rows.mesh_impl
    slicewise = mesh_impl.slicewise
    n = _BINADES << _BUCKET_BITS_SPLIT

    def ends(left: tf.Tensor) -> tf.Tensor:
        """[2, rows, 1], to travel: the largest, and the smallest's negative."""
        smallest = tf.reduce_max(tf.where_v2(left > -np.inf, -left, -np.inf), -1, keepdims=True)
        return _finite_top(tf.stack([tf.reduce_max(left, -1, keepdims=True), smallest]))

    def bucket_of(left: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
        width = tf.maximum(ends[0] + ends[1], 1e-30)
        return tf.cast(tf.minimum((ends[0] - left) * (n - 1) / width, n), tf.int32)

    def shrink(
        left: tf.Tensor, ends: tf.Tensor, buckets: tf.Tensor, bucket: tf.Tensor, *pcoord: tf.Tensor
    ) -> tf.Tensor:
        at = tf.cast(rows.entry_numbers(*pcoord), tf.float32)
        by_index = tf.where_v2(left > -np.inf, -at, -np.inf)
        return tf.where_v2(ends[0] + ends[1] < 1e-30, by_index, _keys_of_bucket(left, buckets, bucket))

    def is_crowded(left: tf.Tensor) -> tf.Tensor:
        count = tf.reduce_sum(tf.cast(left > -np.inf, tf.int32), -1)
        return tf.cast(count >= _FEW, tf.float32)

    def body(_: tf.Tensor, ahead: LaidOut, left: LaidOut) -> tuple[tf.Tensor, LaidOut, LaidOut]:
        row_ends = rows.across_shards(slicewise(ends, left), "MAX")
        buckets = slicewise(bucket_of, left, row_ends)
        bucket, ahead = slicewise(_reached, _bucket_sums(softmax, buckets, n), wanted, ahead)
        left = slicewise(shrink, left, row_ends, buckets, bucket, *rows.pcoords())
        return any_of(mesh_impl, slicewise(is_crowded, left)), ahead, left

    start = (tf.constant(1.0), ahead, left)
    return laid_out_while_loop(mesh_impl, lambda crowded, *_: crowded > 0.5, body, start)[1:]

"""Cutoffs of top-p and related masks for the program of a TPU's core.

A TPU has no float64, sorts slowly, and takes long for any kernel. So a cutoff is searched for by cutting a range of
distances into 16 again and again, and what decides is summed in pairs of float32. Rows that this leaves in doubt, a
few in a thousand, are decided by `core_exact_cutoffs`. What is kept is what `cutoffs` keeps.
"""

import functools
import math
import typing
from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh import xla
from gpt_neo_sampling.mesh.ops import laid_out_cond, laid_out_while_loop
from gpt_neo_sampling.mesh.sharded_rows import largest_of_cores
from gpt_neo_sampling.sampling import float_pairs
from gpt_neo_sampling.sampling.core_exact_cutoffs import exact_mass_ends, exact_mean, exact_sums, index_of_last
from gpt_neo_sampling.sampling.core_rows import (
    FAR,
    NO_DEPTH,
    NOTHING,
    CoreRows,
    distance_of,
    finished,
    joined,
    sums_of,
)
from gpt_neo_sampling.sampling.float_pairs import PAIR_ERROR_BOUND, Pair

# Of distances: 1/4, 3/8, 1/2, 3/4 … 32. What lies between two of them is a power of two, and so is each part of it that
# is looked at: no border is rounded.
_FIRST_BORDERS = [factor * 2.0**n for n in range(-2, 5) for factor in (1.0, 1.5)] + [32.0]
_FARTHEST_BORDER = 64.0  # beyond which no entry has mass to speak of
_WAYS = 16  # into which a range is cut
EXP_ERROR_BOUND = 2e-6  # of float32 weights, and a compensated sum of them


# --- Cuts by mass ----------------------------------------------------------------------------------


def mass_ends(core: CoreRows, mass: LaidOut, *mean: LaidOut) -> tuple[LaidOut, LaidOut]:
    """Where a `cutoffs.Cut` lies behind the fewest entries, nearest first, whose mass is at least `mass`.

    Args:
      core: CoreRows.
      mass: laid-out float32 [rows, 1], a part of the total; NaN makes a row invalid.
      mean: nothing, where the nearest entries are the largest; or laid-out float32 [rows, 1], the high and the low part
        of the number that they are nearest to.

    Returns:
      (ends, in_doubt): laid-out float32 [rows, 2], and [rows, 1, 1], 1.0 where the ends may be wrong.
    """
    slicewise, mass = core.slicewise, core.of_rows(mass)
    x, top, mean = core.x, core.top, tuple(core.of_rows(m) for m in mean)

    def first_sums(x: tf.Tensor, top: tf.Tensor, *mean: tf.Tensor) -> tuple[tf.Tensor, ...]:
        valid = x < np.inf
        weights = tf.where_v2(valid, tf.exp(tf.minimum(x - top, 0.0)), 0.0)
        distance = distance_of(x, top, *mean)
        parts = [tf.where_v2(distance < border, weights, 0.0) for border in _FIRST_BORDERS]
        return sums_of([*parts, weights, tf.where_v2(valid, 0.0, 1.0)])

    def first_range(mass: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        *parts, total, invalid = sums
        wanted = tf.maximum(mass * total, NOTHING)
        zero = tf.zeros_like(total)
        found = _range_reached(_FIRST_BORDERS, parts, wanted, zero, zero + _FARTHEST_BORDER, zero, total)
        return invalid, wanted, *found

    sums = core.summed(slicewise(first_sums, x, top, *mean))
    invalid, wanted, *found = slicewise(first_range, mass, *sums)

    def part_sums(
        borders: Sequence[int], x: tf.Tensor, top: tf.Tensor, origin: tf.Tensor, scale: tf.Tensor, *mean: tf.Tensor,
        start: tf.Tensor | None = None, with_pairs: bool = False,
    ) -> tuple[tf.Tensor, ...]:  # fmt: skip
        """Sums up to each border, in steps of 1/scale from the origin, of what is not ahead of the start."""
        distance = distance_of(x, top, *mean)
        pairs, weights = [], tf.exp(x - top)
        if with_pairs:
            precise = float_pairs.exp_of_minus(top - x)
            pairs = [precise, tuple(tf.where_v2(distance < start, p, 0.0) for p in precise)]
        if start is not None:
            weights = tf.where_v2(distance >= start, weights, 0.0)
        steps = (distance - origin) * scale
        return sums_of([tf.where_v2(steps < float(border), weights, 0.0) for border in borders], pairs)

    # Into 16 equal parts.

    inner = range(1, _WAYS)

    def scale_of(begin: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
        return _WAYS / (end - begin)

    def window(
        wanted: tf.Tensor, begin: tf.Tensor, end: tf.Tensor, low: tf.Tensor, high: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """(origin, scale) of the quarter of the range where an even density has the border, cut into 16."""
        width = end - begin
        at = (wanted - low) / tf.maximum(high - low, NOTHING)
        first = tf.clip_by_value(tf.floor(at * (4 * _WAYS)) - _WAYS / 2, 0.0, 3.0 * _WAYS)
        return begin + width * (first * (0.25 / _WAYS)), 4 * _WAYS / width

    def second(
        wanted: tf.Tensor, begin: tf.Tensor, end: tf.Tensor, low: tf.Tensor, high: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        borders = [begin + (end - begin) * (i / _WAYS) for i in inner]
        found = _range_reached(borders, sums, wanted, begin, end, low, high)
        return xla.kept_together(*found[:2], *window(wanted, *found))

    scale = slicewise(scale_of, *found[:2])
    sums = slicewise(functools.partial(part_sums, inner), x, top, found[0], scale, *mean)
    start, end, origin, scale = slicewise(second, wanted, *found, *core.summed(sums))

    # In the window; and what is ahead of it, in pairs, leaves little to be reached in it.

    outer = range(_WAYS + 1)

    def third_sums(
        x: tf.Tensor, top: tf.Tensor, start: tf.Tensor, origin: tf.Tensor, scale: tf.Tensor, *mean: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return part_sums(outer, x, top, origin, scale, *mean, start=start, with_pairs=True)

    def third(
        mass: tf.Tensor, start: tf.Tensor, end: tf.Tensor, origin: tf.Tensor, scale: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        sums, (total, ahead) = sums[:-4], (joined(*sums[-4:-2]), joined(*sums[-2:]))
        wanted = float_pairs.add(float_pairs.times(total, mass), float_pairs.negative(ahead))
        borders = [origin + float(i) / scale for i in outer]
        zero = tf.zeros_like(start)
        begin, end, *_ = _range_reached(
            borders, sums, tf.maximum(wanted[0] + wanted[1], NOTHING), start, end, zero, zero
        )
        return xla.kept_together(total[0], *wanted, begin, end, scale_of(begin, end))

    sums = slicewise(third_sums, x, top, start, origin, scale, *mean)
    sums, pairs = core.summed(sums[:-4]), core.gathered(sums[-4:])
    window_scale = scale
    total, *wanted, begin, end, scale = slicewise(third, mass, start, end, origin, scale, *sums, *pairs)

    # Twice more into 16 equal parts; once more where entries go by their distance from the mean and the border was not
    # in the window, as may often be: there a single entry, far above the mean, has the mass of hundreds.

    def later_sums(
        x: tf.Tensor, top: tf.Tensor, start: tf.Tensor, begin: tf.Tensor, scale: tf.Tensor, *mean: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return part_sums(inner, x, top, begin, scale, *mean, start=start)

    def later(
        high: tf.Tensor, low: tf.Tensor, begin: tf.Tensor, end: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        borders = [begin + (end - begin) * (i / _WAYS) for i in inner]
        zero = tf.zeros_like(begin)
        begin, end, *_ = _range_reached(borders, sums, tf.maximum(high + low, NOTHING), begin, end, zero, zero)
        return xla.kept_together(begin, end, scale_of(begin, end))

    def missed(begin: tf.Tensor, end: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
        return tf.where_v2((end - begin) * scale > 1.5, 1.0, 0.0)

    def narrow(left: tf.Tensor, begin: LaidOut, end: LaidOut, scale: LaidOut) -> tuple[tf.Tensor | LaidOut, ...]:
        sums = core.summed(slicewise(later_sums, x, top, start, begin, scale, *mean))
        return left - 1.0, *slicewise(later, *wanted, begin, end, *sums)

    if mean:
        rounds = 2.0 + largest_of_cores(core.rows, slicewise(missed, begin, end, window_scale))
        loop = rounds, begin, end, scale
        _, begin, end, _ = laid_out_while_loop(core.mesh_impl, lambda left, *_: left > 0.5, narrow, loop)
    else:  # fewer cycles, more code
        _, begin, end, _ = narrow(*narrow(tf.constant(2.0), begin, end, scale))

    # The few entries that are left.

    def few(
        x: tf.Tensor, top: tf.Tensor, start: tf.Tensor, begin: tf.Tensor, end: tf.Tensor, *mean: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        distance, zero = distance_of(x, top, *mean), tf.zeros_like(x)
        if mean:
            begin, end = begin - _slack(begin), end + _slack(end)
        before = tf.logical_and(distance >= start, distance < begin)
        inside = tf.logical_and(distance >= begin, distance < end)
        found = xla.reduce_together(
            [tf.where_v2(before, tf.exp(x - top), 0.0), zero, tf.where_v2(inside, 1.0, zero),
             tf.where_v2(inside, x, tf.float32.min), tf.where_v2(inside, -x, tf.float32.min)],
            [0, 0, 0, tf.float32.min, tf.float32.min], [1, 2],
            lambda a, b: (*float_pairs.add(a[:2], b[:2]), a[2] + b[2], tf.maximum(a[3], b[3]), tf.maximum(a[4], b[4])),
        )  # fmt: skip
        high, _, *others = (tf.reshape(f, [-1, 1, 1]) for f in found)
        return high, *others

    def decide(
        mass: tf.Tensor,
        top: tf.Tensor,
        invalid: tf.Tensor,
        total: tf.Tensor,
        high: tf.Tensor,
        low: tf.Tensor,
        start: tf.Tensor,
        begin: tf.Tensor,
        before: tf.Tensor,
        count: tf.Tensor,
        largest: tf.Tensor,
        smallest: tf.Tensor,
        *mean: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        largest, smallest = (functools.reduce(tf.maximum, tf.unstack(t)) for t in (largest, smallest))
        near, far = largest, -smallest
        near_distance, far_distance = (distance_of(t, top, *mean) for t in (near, far))
        if mean:
            swap = far_distance < near_distance
            near, far = tf.where_v2(swap, far, near), tf.where_v2(swap, near, far)
            near_distance, far_distance = (
                tf.minimum(near_distance, far_distance),
                tf.maximum(near_distance, far_distance),
            )
        of_near, of_far = tf.exp(near - top), tf.exp(far - top)
        rest = (high - before) + low
        precise = float_pairs.exp_of_minus(top - near)
        needed = rest / precise[0]
        bound = 2 * PAIR_ERROR_BOUND * total + EXP_ERROR_BOUND * (before + of_near)
        is_first = tf.logical_and(start <= 0, before <= 0)
        begins = tf.logical_and(count > 0, tf.logical_or(is_first, rest > bound))
        ends_at_near = rest + bound < of_near
        needs_far = rest - bound > of_near
        # of equal ones the first, as many as are needed, and the first of all in any case
        needed = tf.where_v2(is_first, tf.maximum(needed, 0.5), needed)
        whole = tf.math.ceil(needed)
        off = bound / tf.maximum(of_near, NOTHING) + needed * 2.0**-21
        clear_number = tf.logical_and(
            whole - needed > off, tf.logical_or(needed - (whole - 1) > off, is_first & (whole < 2))
        )
        equal = tf.equal(near, far)
        clear_equal = tf.logical_and(equal, tf.logical_and(clear_number, whole <= count))
        of_two = tf.logical_and(needs_far, rest + bound < (of_near + of_far) * (1 - EXP_ERROR_BOUND))
        clear_two = tf.logical_and(tf.equal(count, 2.0), tf.logical_or(ends_at_near, of_two))
        if mean:
            clear_two = tf.logical_and(clear_two, far_distance - near_distance > _slack(far_distance))
            begins = tf.logical_and(begins, tf.logical_or(start <= 0, begin - _slack(begin) > start))
        clear_two = tf.logical_and(clear_two, tf.logical_not(equal))
        clear = tf.logical_and(begins, tf.logical_or(clear_equal, clear_two))
        has_mass = tf.logical_and(total > 0, top > core.lowest)
        settled = tf.logical_or(tf.logical_not(mass < 1), tf.logical_or(invalid > 0, tf.logical_not(has_mass)))
        least = tf.where_v2(tf.logical_and(tf.logical_not(equal), needs_far), far, near)
        if mean:
            least = -distance_of(least, top, *mean)
        whole = tf.where_v2(tf.logical_and(equal, whole < count), tf.maximum(whole, 1.0), np.inf)
        ends = finished(least, whole, mass, mass < 1, invalid > 0, has_mass)
        return xla.kept_together(*ends, tf.where_v2(tf.logical_or(clear, settled), 0.0, 1.0))

    *sums, largest, smallest = slicewise(few, x, top, start, begin, end, *mean)
    found = *core.summed(sums), *core.gathered([largest, smallest])
    least, number, in_doubt = slicewise(decide, mass, top, invalid, total, *wanted, start, begin, *found, *mean)
    return [least, number], in_doubt


def _range_reached(
    borders: Sequence[float | tf.Tensor], sums: Sequence[tf.Tensor], wanted: tf.Tensor,
    begin: tf.Tensor, end: tf.Tensor, low: tf.Tensor, high: tf.Tensor,
) -> tuple[tf.Tensor, ...]:  # fmt: skip
    """(begin, end, low, high): between which borders, and sums up to there, what is wanted is reached."""
    for border, part in zip(borders, sums, strict=True):
        short = part < wanted
        begin, low = tf.where_v2(short, border, begin), tf.where_v2(short, part, low)
    for border, part in reversed(list(zip(borders, sums, strict=True))):
        short = part < wanted
        end, high = tf.where_v2(short, end, border), tf.where_v2(short, high, part)
    return begin, end, low, high


def _slack(distance: tf.Tensor) -> tf.Tensor:
    """How far apart distances may be that lie in this order, but in the other one from another, as exact, mean."""
    return distance * 2.0**-22 + 2.0**-26


def nucleus_ends(core: CoreRows, mass: LaidOut) -> tuple[LaidOut, ...]:
    """Of a cut behind the fewest of the likeliest entries whose mass is at least `mass`."""
    (least, number), in_doubt = mass_ends(core, mass)

    def exact() -> tuple[LaidOut, ...]:
        return exact_mass_ends(core, mass, exact_sums(core, with_weights=True))

    return _settled(core, in_doubt, exact, least, number)


def _settled(
    core: CoreRows, in_doubt: LaidOut, exact: Callable[[], Sequence[LaidOut]], least: LaidOut, number: LaidOut,
    *mean: LaidOut,
) -> tuple[LaidOut, ...]:  # fmt: skip
    """(least, last, …): those of `exact` where a row is in doubt; else as found, with the index of the last tie."""

    def with_index() -> tuple[LaidOut, ...]:
        return least, index_of_last(core, least, number, *mean), *mean

    def unsettled(in_doubt: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        return in_doubt + tf.where_v2(number < np.inf, 1.0, 0.0)

    return laid_out_cond(
        core.mesh_impl,
        core.any_of(core.slicewise(unsettled, in_doubt, number)),
        lambda: laid_out_cond(core.mesh_impl, core.any_of(in_doubt), exact, with_index),
        lambda: (least, number, *mean),
    )


def typical_ends(core: CoreRows, mass: LaidOut) -> tuple[LaidOut, ...]:
    """Of a cut behind the fewest entries, nearest to the mean first; then the mean's two parts, [rows, 1]."""

    def sums(x: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, ...]:
        weights, depth = float_pairs.exp_of_minus(top - x), tf.minimum(top - x, FAR)
        return sums_of([], [weights, float_pairs.times(weights, depth)])

    def mean_of(top: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        depth = float_pairs.quotient(joined(*sums[2:]), joined(*sums[:2]))
        near = tf.abs(depth[0] - NO_DEPTH) < 1e-11
        minus_depth = tuple(tf.where_v2(depth[0] >= NO_DEPTH, -d, 0.0) for d in depth)
        high, low = float_pairs.add((top, tf.zeros_like(top)), minus_depth)
        high, low = float_pairs.two_sum(high, low)
        return *(tf.reshape(t, [-1, 1]) for t in (high, low)), tf.where_v2(near, 1.0, 0.0)

    def exact() -> tuple[LaidOut, ...]:
        sums = exact_sums(core, with_weights=True)
        mean = core.slicewise(exact_mean, core.flat_top, sums.total, sums.depth)
        return *exact_mass_ends(core, mass, sums, *mean), *mean

    *mean, uncertain = core.slicewise(mean_of, core.top, *core.gathered(core.slicewise(sums, core.x, core.top)))
    (least, number), in_doubt = mass_ends(core, mass, *mean)
    in_doubt = core.slicewise(tf.maximum, in_doubt, uncertain)
    return _settled(core, in_doubt, exact, least, number, *mean)


# --- Cuts by probability -------------------------------------------------------------------------


class Measure(typing.NamedTuple):
    """How an option stands for a probability p.

    minus_log: a function of it to −log p, as a pair.
    has_cut: a function of it, false where there is nothing to cut.
    is_clear: a function of it, false where `minus_log` may be off by more than a pair's error.
    """

    minus_log: Callable[[tf.Tensor], Pair]
    has_cut: Callable[[tf.Tensor], tf.Tensor]
    is_clear: Callable[[tf.Tensor], tf.Tensor]


def _nats(bits: tf.Tensor) -> Pair:
    high = np.float32(math.log(2))
    return float_pairs.times((tf.constant(high), tf.constant(math.log(2) - float(high), tf.float32)), bits)


PROBABILITY = Measure(float_pairs.minus_log, lambda p: p > 0, lambda p: p >= 1e-36)
BITS = Measure(_nats, lambda bits: bits < np.inf, lambda bits: bits < np.inf)  # −log2 p; +inf is no cut


def depth_ends(
    core: CoreRows,
    option: LaidOut,
    depth_of: Callable[..., Pair],
    looks_at: str = "",
    measure: Measure = PROBABILITY,
) -> tuple[LaidOut, ...]:
    """Where a cut lies at a depth below the largest entry, which itself stays.

    Args:
      core: CoreRows.
      option: laid-out float32 [rows, 1]; NaN makes a row invalid.
      depth_of: a function of −log p, and of log total and the mean depth if these are looked at, to a pair.
      looks_at: "", "total" or "mean".
      measure: Measure, of the option.

    Returns:
      (least, last, in_doubt): laid-out float32, one number a row.
    """
    slicewise, option = core.slicewise, core.of_rows(option)

    def border(option: tf.Tensor, top: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        known = []
        if sums:
            total = joined(*sums[:2])
            known.append(float_pairs.log_of(total))
        if len(sums) > 2:
            known.append(float_pairs.quotient(joined(*sums[2:]), total))
        depth = depth_of(measure.minus_log(option), *known)
        minus_depth = tuple(tf.where_v2(depth[0] > 0, -d, 0.0) for d in depth)
        return _border(top, minus_depth)

    def look(x: tf.Tensor, top: tf.Tensor, high: tf.Tensor, low: tf.Tensor, bound: tf.Tensor) -> tuple[tf.Tensor, ...]:
        near = tf.logical_and(tf.abs((x - high) - low) <= bound, tf.not_equal(x, top))
        flags = near, tf.logical_not(x < np.inf), x >= top
        return sums_of([tf.where_v2(flag, 1.0, tf.zeros_like(x)) for flag in flags])

    def finish(
        option: tf.Tensor,
        top: tf.Tensor,
        high: tf.Tensor,
        low: tf.Tensor,
        near: tf.Tensor,
        invalid: tf.Tensor,
        tops: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        least = tf.minimum(_rounded_up(high, low), top)
        has_mass = tf.logical_and(tops > 0, top > core.lowest)
        last, has_cut = tf.fill(tf.shape(least), np.float32(np.inf)), measure.has_cut(option)
        ends = finished(least, last, option, has_cut, invalid > 0, has_mass)
        doubt = tf.logical_or(near > 0, tf.logical_not(measure.is_clear(option)))
        doubt = tf.logical_and(doubt, tf.logical_and(has_cut, tf.logical_and(has_mass, tf.equal(invalid, 0.0))))
        return xla.kept_together(*ends, tf.where_v2(doubt, 1.0, 0.0))

    totals = core.gathered(slicewise(_total_and_depth(looks_at), core.x, core.top)) if looks_at else []
    high, low, bound = slicewise(border, option, core.top, *totals)
    found = core.summed(slicewise(look, core.x, core.top, high, low, bound))
    return slicewise(finish, option, core.top, high, low, *found)


def _total_and_depth(looks_at: str) -> Callable[..., tuple[tf.Tensor, ...]]:
    """A function from x and top to sums, as pairs: of weights, and if the mean is looked at of weights times depths."""

    def sums(x: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, ...]:
        weights, depth = float_pairs.exp_of_minus(top - x), tf.minimum(top - x, FAR)
        return sums_of([], [weights] + ([float_pairs.times(weights, depth)] if looks_at == "mean" else []))

    return sums


def _border(top: tf.Tensor, minus_depth: Pair) -> tuple[tf.Tensor, ...]:
    """(high, low, how far they may be off): what lies at a depth, given as its negative, below the top."""
    high, low = float_pairs.add((top, tf.zeros_like(top)), minus_depth)
    high, low = float_pairs.two_sum(high, low)
    return high, low, 4 * PAIR_ERROR_BOUND * (1.0 + tf.abs(minus_depth[0])) + tf.abs(top) * 2.0**-44


def _rounded_up(high: tf.Tensor, low: tf.Tensor) -> tf.Tensor:
    """The least float32 that is not below a pair."""
    above = tf.bitcast(tf.bitcast(high, tf.int32) + tf.where_v2(high > 0, 1, -1), tf.float32)
    above = tf.where_v2(tf.equal(high, 0.0), np.float32(2.0**-126), above)
    return tf.where_v2(low > 0, above, high)


def probability_ends(
    core: CoreRows,
    option: LaidOut,
    depth_of: Callable[..., Pair],
    looks_at: str,
    exact: Callable[[], LaidOut],
    measure: Measure = PROBABILITY,
) -> tuple[LaidOut, ...]:
    """(least, last) of `depth_ends`; where that is in doubt, those of `exact`, a Cut's ends [rows, 2]."""
    return or_exact(core, depth_ends(core, option, depth_of, looks_at, measure), exact)


def or_exact(core: CoreRows, found: tuple[LaidOut, ...], exact: Callable[[], LaidOut]) -> tuple[LaidOut, ...]:
    """What was found, but for the last, which is 1.0 where a row's numbers are in doubt; there those of `exact`.

    Args:
      core: CoreRows.
      found: laid-out float32, one number a row.
      exact: a function to the same numbers, laid-out float32 [rows, how many].
    """
    *numbers, in_doubt = found

    def choose(exact: tf.Tensor, in_doubt: tf.Tensor, *numbers: tf.Tensor) -> tuple[tf.Tensor, ...]:
        pairs = zip(tf.split(exact, len(numbers), -1), numbers, strict=True)
        return tuple(tf.where_v2(in_doubt > 0, tf.reshape(new, [-1, 1, 1]), old) for new, old in pairs)

    def settle(_: tf.Tensor, *numbers: LaidOut) -> tuple[tf.Tensor | LaidOut, ...]:
        chosen = core.slicewise(choose, exact(), in_doubt, *numbers)
        return tf.constant(0.0), *(chosen if len(numbers) > 1 else [chosen])

    # A loop that runs once or never: XLA takes both branches of a condition, where it thinks that they cost little.
    start = core.any_of(in_doubt), *numbers
    return laid_out_while_loop(core.mesh_impl, lambda doubt, *_: doubt > 0.5, settle, start)[1:]


def xtc_ends(core: CoreRows, threshold: LaidOut, exact: Callable[[], LaidOut]) -> tuple[LaidOut, ...]:
    """Where a cut lies ahead of the least likely entry of at least this probability, and of equal ones of the last.

    Args:
      core: CoreRows.
      threshold: laid-out float32 [rows, 1]; above 0.5 nothing is ahead of the cut, NaN makes a row invalid.
      exact: a function to such a Cut's ends [rows, 2], for where float pairs leave it in doubt.

    Returns:
      (least, last): laid-out float32, one number a row.
    """
    return or_exact(core, xtc_ends_in_doubt(core, threshold), exact)


def xtc_ends_in_doubt(core: CoreRows, threshold: LaidOut) -> tuple[LaidOut, ...]:
    """(least, last, in_doubt) of `xtc_ends`."""
    slicewise, threshold = core.slicewise, core.of_rows(threshold)

    def border(threshold: tf.Tensor, top: tf.Tensor, *total: tf.Tensor) -> tuple[tf.Tensor, ...]:
        log_total, minus_log = float_pairs.log_of(joined(*total)), PROBABILITY.minus_log(threshold)
        return _border(top, float_pairs.add(log_total, float_pairs.negative(minus_log)))

    def look(
        x: tf.Tensor, threshold: tf.Tensor, high: tf.Tensor, low: tf.Tensor, bound: tf.Tensor, *pcoord: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """The smallest entry above the border, its negative; the last that equals it; and flags of the row."""
        least = tf.where_v2(PROBABILITY.has_cut(threshold), _rounded_up(high, low), tf.float32.min)
        near = tf.where_v2(tf.abs((x - high) - low) <= bound, 1.0, tf.zeros_like(x))
        invalid = tf.where_v2(x < np.inf, tf.zeros_like(x), 1.0)
        above = tf.logical_and(tf.logical_and(x >= least, x > core.lowest), x < np.inf)
        at = tf.broadcast_to(core.entry_numbers(*pcoord), x.shape)

        def combine(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor]) -> tuple[tf.Tensor, ...]:
            is_second = tf.logical_or(b[0] > a[0], tf.logical_and(tf.equal(b[0], a[0]), b[1] > a[1]))
            at = tf.where_v2(is_second, b[1], a[1])
            return tf.maximum(a[0], b[0]), at, a[2] + b[2], a[3] + b[3]

        found = xla.reduce_together(
            [tf.where_v2(above, -x, tf.float32.min), tf.where_v2(above, at, -1.0), near, invalid],
            [tf.float32.min, -1.0, 0.0, 0.0], [1, 2], combine,
        )  # fmt: skip
        return tuple(tf.reshape(f, [-1, 1, 1]) for f in found)

    def finish(
        threshold: tf.Tensor, smallest: tf.Tensor, at: tf.Tensor, near: tf.Tensor, invalid: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        least = functools.reduce(tf.maximum, tf.unstack(smallest))
        last = functools.reduce(tf.maximum, tf.unstack(tf.where_v2(tf.equal(smallest, least), at, -1.0)))
        has_cut = tf.logical_and(threshold <= 0.5, last >= 0)
        least, last = tf.where_v2(has_cut, -least, np.inf), tf.where_v2(has_cut, last - 1.0, -1.0)
        is_used = tf.logical_and(threshold <= 0.5, tf.equal(invalid, 0.0))
        least = tf.where_v2(tf.logical_or(is_used, threshold > 0.5), least, np.nan)
        doubt = tf.logical_or(near > 0, tf.logical_not(PROBABILITY.is_clear(threshold)))
        doubt = tf.logical_and(doubt, tf.logical_and(PROBABILITY.has_cut(threshold), is_used))
        return xla.kept_together(least, last, tf.where_v2(doubt, 1.0, 0.0))

    total = core.gathered(slicewise(_total_and_depth("total"), core.x, core.top))
    borders = slicewise(border, threshold, core.top, *total)
    smallest, at, *flags = slicewise(look, core.x, threshold, *borders, *core.rows.pcoords())
    return slicewise(finish, threshold, *core.gathered([smallest, at]), *core.summed(flags))

"""Cutoffs of top-p and related masks for the program of a TPU's core.

A TPU has no float64, sorts slowly, and takes long for any kernel. So a cutoff is searched for by cutting a range of
distances into 16 again and again, and what decides is summed in pairs of float32. Rows that this leaves in doubt, a
few in a thousand, are decided in emulated float64, one bit after another: slow, but seldom, and small to compile.
What is kept is what `cutoffs` keeps.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh import xla
from gpt_neo_sampling.mesh.ops import laid_out_cond, laid_out_while_loop
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows, fast_sum, sum_across
from gpt_neo_sampling.sampling import float_pairs
from gpt_neo_sampling.sampling.float_pairs import PAIR_ERROR_BOUND, Pair

# Of distances: 1/4, 3/8, 1/2, 3/4 … 32. What lies between two of them is a power of two, and so is each part of it that
# is looked at: no border is rounded.
_FIRST_BORDERS = [factor * 2.0**n for n in range(-2, 5) for factor in (1.0, 1.5)] + [32.0]
_FARTHEST_BORDER = 64.0  # beyond which no entry has mass to speak of
_WAYS = 16  # into which a range is cut
_NOTHING = 1e-30  # a mass that the first entry reaches
EXP_ERROR_BOUND = 2e-6  # of float32 weights, and a compensated sum of them
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


class CoreRows:
    """Rows of a core as [rows, a, b], which fill its registers, and numbers of rows as [rows, 1, 1]."""

    def __init__(self, rows: ShardedRows, x: LaidOut, top: LaidOut, lowest: float) -> None:
        """x: laid-out float32 [rows, entries]; top: laid-out float32 [rows, 1], the largest entry, finite; lowest: what
        masked entries may be."""
        self.lowest = lowest
        self.rows, self.mesh_impl, self.flat, self.flat_top = rows, rows.mesh_impl, x, top
        self.slicewise = rows.mesh_impl.slicewise
        self.x, self.top = self.slicewise(_folded, x), self.of_rows(top)

    def of_rows(self, x: LaidOut) -> LaidOut:
        return self.slicewise(lambda x: tf.reshape(x, [-1, 1, 1]), x)

    def summed(self, parts: Sequence[LaidOut]) -> list[LaidOut]:
        return [self.rows.across_shards(p, "SUM") for p in parts]

    def gathered(self, parts: Sequence[LaidOut]) -> list[LaidOut]:
        """Laid-out [rows, 1, 1], finite, as [shards, rows, 1, 1]."""
        axis = self.rows.mesh_axis
        if axis is None:
            return self.slicewise(lambda *parts: tuple(p[tf.newaxis] for p in parts), *parts)
        n_shards = self.mesh_impl.shape[axis].size
        at = np.arange(n_shards, dtype=np.int32)[:, np.newaxis, np.newaxis, np.newaxis]

        def place(pcoord: tf.Tensor, *parts: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return tuple(tf.where_v2(tf.equal(at, pcoord), p[tf.newaxis], 0.0) for p in parts)

        placed = self.slicewise(place, self.mesh_impl.laid_out_pcoord(axis), *parts)
        return self.summed(placed)

    def any_of(self, flags: LaidOut) -> tf.Tensor:
        """A scalar above 0.5 where any of the float32 flags is set, over the whole mesh."""
        flags = self.mesh_impl.slicewise(tf.reduce_sum, flags)
        return self.mesh_impl.allreduce(flags, list(range(self.mesh_impl.ndims)), "SUM").to_laid_out_tensor().one_slice


def _folded(x: tf.Tensor) -> tf.Tensor:
    """[rows, entries] as [rows, a, b]: 128 numbers to a line, where rows are too few to fill a register's 8 lines."""
    n_rows, size = x.shape.as_list()
    if n_rows >= 8 or size % 128:
        return x[:, tf.newaxis]
    return xla.kept_together(tf.reshape(x, [n_rows, -1, 128]))[0]


def _sums(parts: Sequence[tf.Tensor], pairs: Sequence[Pair] = ()) -> tuple[tf.Tensor, ...]:
    """Sums [rows, 1, 1] of several [rows, a, b], then those of pairs of them, high and low, in one kernel."""
    n, flat = len(parts), [part for pair in pairs for part in pair]

    def combine(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor]) -> tuple[tf.Tensor, ...]:
        sums = [float_pairs.add((a[i], a[i + 1]), (b[i], b[i + 1])) for i in range(n, len(a), 2)]
        return *(x + y for x, y in zip(a[:n], b[:n])), *(part for pair in sums for part in pair)

    sums = xla.reduce_together([*parts, *flat], [0] * (n + len(flat)), [1, 2], combine)
    return tuple(tf.reshape(s, [-1, 1, 1]) for s in sums)


def _joined(high: tf.Tensor, low: tf.Tensor) -> Pair:
    """The sum of pairs [shards, …]."""
    return functools.reduce(float_pairs.add, list(zip(tf.unstack(high), tf.unstack(low), strict=True)))


# --- Cuts by mass ----------------------------------------------------------------------------------


def distance_of(x: tf.Tensor, top: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
    """Of an entry from the top, or from the mean: a pair."""
    if not mean:
        return top - x
    high, low = float_pairs.two_sum(tf.maximum(x, tf.float32.min), -mean[0])
    return tf.abs(high + (low - mean[1]))


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
        return _sums([*parts, weights, tf.where_v2(valid, 0.0, 1.0)])

    def first_range(mass: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        *parts, total, invalid = sums
        wanted = tf.maximum(mass * total, _NOTHING)
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
        return _sums([tf.where_v2(steps < float(border), weights, 0.0) for border in borders], pairs)

    # Into 16 equal parts.

    inner = range(1, _WAYS)

    def scale_of(begin: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
        return _WAYS / (end - begin)

    def window(
        wanted: tf.Tensor, begin: tf.Tensor, end: tf.Tensor, low: tf.Tensor, high: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """(origin, scale) of the quarter of the range where an even density has the border, cut into 16."""
        width = end - begin
        at = (wanted - low) / tf.maximum(high - low, _NOTHING)
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
        sums, (total, ahead) = sums[:-4], (_joined(*sums[-4:-2]), _joined(*sums[-2:]))
        wanted = float_pairs.add(float_pairs.times(total, mass), float_pairs.negative(ahead))
        borders = [origin + float(i) / scale for i in outer]
        zero = tf.zeros_like(start)
        begin, end, *_ = _range_reached(
            borders, sums, tf.maximum(wanted[0] + wanted[1], _NOTHING), start, end, zero, zero
        )
        return xla.kept_together(total[0], *wanted, begin, end, scale_of(begin, end))

    sums = slicewise(third_sums, x, top, start, origin, scale, *mean)
    sums, pairs = core.summed(sums[:-4]), core.gathered(sums[-4:])
    total, *wanted, begin, end, scale = slicewise(third, mass, start, end, origin, scale, *sums, *pairs)

    # Twice more into 16 equal parts.

    def later_sums(
        x: tf.Tensor, top: tf.Tensor, start: tf.Tensor, begin: tf.Tensor, scale: tf.Tensor, *mean: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return part_sums(inner, x, top, begin, scale, *mean, start=start)

    def later(
        high: tf.Tensor, low: tf.Tensor, begin: tf.Tensor, end: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        borders = [begin + (end - begin) * (i / _WAYS) for i in inner]
        zero = tf.zeros_like(begin)
        begin, end, *_ = _range_reached(borders, sums, tf.maximum(high + low, _NOTHING), begin, end, zero, zero)
        return xla.kept_together(begin, end, scale_of(begin, end))

    for _ in range(2):
        sums = core.summed(slicewise(later_sums, x, top, start, begin, scale, *mean))
        begin, end, scale = slicewise(later, *wanted, begin, end, *sums)

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
        off = bound / tf.maximum(of_near, _NOTHING) + needed * 2.0**-21
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
        ends = _finished(least, whole, mass, mass < 1, invalid > 0, has_mass)
        return xla.kept_together(*ends, tf.where_v2(tf.logical_or(clear, settled), 0.0, 1.0))

    *sums, largest, smallest = slicewise(few, x, top, start, begin, end, *mean)
    found = *core.summed(sums), *core.gathered([largest, smallest])
    least, number, in_doubt = slicewise(decide, mass, top, invalid, total, *wanted, start, begin, *found, *mean)
    return [least, number], in_doubt


def _index_of_last(core: CoreRows, least: LaidOut, number: LaidOut, *mean: LaidOut) -> LaidOut:
    """The index of the last of so many entries of the key at the cut; +inf where the number is."""
    slicewise, x, mean = core.slicewise, core.slicewise(_folded, core.flat), tuple(core.of_rows(m) for m in mean)

    def is_tie(x: tf.Tensor, least: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(tf.equal(typical_key(x, *mean) if mean else x, least), 1.0, 0.0)

    def body(step: tf.Tensor, begin: LaidOut) -> tuple[tf.Tensor, LaidOut]:
        def counts(ties: tf.Tensor, begin: tf.Tensor, *pcoord: tf.Tensor) -> tuple[tf.Tensor, ...]:
            parts = (tf.cast(_entry_numbers(core.rows, ties, *pcoord), tf.float32) - begin) / step
            return _sums([tf.where_v2(parts < float(i), ties, 0.0) for i in range(1, _WAYS)])

        def narrowed(number: tf.Tensor, begin: tf.Tensor, *counts: tf.Tensor) -> tf.Tensor:
            return begin + step * sum(tf.where_v2(count < number, 1.0, 0.0) for count in counts)

        found = core.summed(slicewise(counts, ties, begin, *core.rows.pcoords()))
        return step / _WAYS, slicewise(narrowed, number, begin, *found)

    ties = slicewise(is_tie, x, least, *mean)
    first_step = _WAYS ** ((core.rows.size - 1).bit_length() // 4)
    start = tf.constant(float(first_step)), slicewise(tf.zeros_like, number)
    _, begin = laid_out_while_loop(core.mesh_impl, lambda step, _: step > 0.5, body, start)
    return slicewise(lambda begin, number: tf.where_v2(number < np.inf, begin, np.inf), begin, number)


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


def _finished(
    least: tf.Tensor, last: tf.Tensor, option: tf.Tensor, has_cut: tf.Tensor, invalid: tf.Tensor, has_mass: tf.Tensor
) -> list[tf.Tensor]:
    """(least, last), of all entries where there is nothing to cut; NaN for an invalid row."""
    keeps_all = tf.logical_not(tf.logical_and(has_cut, has_mass))
    least, last = tf.where_v2(keeps_all, -np.inf, least), tf.where_v2(keeps_all, np.inf, last)
    return [tf.where_v2(tf.logical_or(invalid, tf.is_nan(option)), np.nan, least), last]


# --- What is in doubt, in float64 ------------------------------------------------------


def exact_mass_ends(core: CoreRows, mass: LaidOut, *mean: LaidOut) -> tuple[LaidOut, ...]:
    """(least, last) of a cut, by float64 weights: the key at the cut is found bit by bit, and then the index."""
    slicewise, mass, mean = core.slicewise, core.of_rows(mass), tuple(core.of_rows(m) for m in mean)
    x = core.slicewise(_folded, core.flat)

    def key_of(x: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
        """int32, larger for nearer entries; NaN is that of an invalid row."""
        bits = tf.bitcast(typical_key(x, *mean) if mean else x, tf.int32)
        return tf.where_v2(bits < 0, _LOWEST - bits, bits)

    def mid(low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
        differing = tf.bitwise.right_shift(tf.bitwise.bitwise_xor(low, high), tf.constant(1))
        return tf.bitwise.bitwise_and(low, high) + differing

    def in_float64(high: tf.Tensor, low: tf.Tensor) -> tf.Tensor:
        """[…] from the parts of all shards [shards, …]."""
        return sum(tf.cast(h, tf.float64) + tf.cast(t, tf.float64) for h, t in zip(tf.unstack(high), tf.unstack(low)))

    def wanted_of(mass: tf.Tensor, *sums: tf.Tensor) -> tf.Tensor:
        return tf.maximum(in_float64(*sums) * tf.cast(mass, tf.float64), _NOTHING)

    keys, weights = slicewise(key_of, x, *mean), slicewise(_exact_weights, x, core.top)
    totals = core.gathered(slicewise(lambda *weights: _sums([], [weights]), *weights))
    wanted = slicewise(wanted_of, mass, *totals)

    def trial(
        step: tf.Tensor, low: tf.Tensor, high: tf.Tensor, before: tf.Tensor, last: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """(key, index): all nearer entries are counted, and those of that key up to the index."""
        by_key = step < 32
        return tf.where_v2(by_key, mid(low, high), high), tf.where_v2(by_key, -1, mid(before, last))

    def body(step: tf.Tensor, *found: LaidOut) -> tuple[LaidOut, ...]:
        def part(
            keys: tf.Tensor,
            high_weight: tf.Tensor,
            low_weight: tf.Tensor,
            low: tf.Tensor,
            high: tf.Tensor,
            before: tf.Tensor,
            last: tf.Tensor,
            *pcoord: tf.Tensor,
        ) -> tuple[tf.Tensor, ...]:
            key, index = trial(step, low, high, before, last)
            is_last = tf.logical_and(tf.equal(keys, key), _entry_numbers(core.rows, keys, *pcoord) <= index)
            counted = tf.logical_or(keys > key, is_last)
            return _sums([], [tuple(tf.where_v2(counted, w, 0.0) for w in (high_weight, low_weight))])

        def choose(
            wanted: tf.Tensor,
            sums_high: tf.Tensor,
            sums_low: tf.Tensor,
            low: tf.Tensor,
            high: tf.Tensor,
            before: tf.Tensor,
            last: tf.Tensor,
        ) -> tuple[tf.Tensor, ...]:
            key, index = trial(step, low, high, before, last)
            by_key, short = step < 32, in_float64(sums_high, sums_low) < wanted
            low = tf.where_v2(tf.logical_and(by_key, tf.logical_not(short)), key, low)
            high = tf.where_v2(tf.logical_and(by_key, short), key, high)
            before = tf.where_v2(tf.logical_and(tf.logical_not(by_key), short), index, before)
            last = tf.where_v2(tf.logical_or(by_key, short), last, index)
            return low, high, before, last

        sums = core.gathered(slicewise(part, keys, *weights, *found, *core.rows.pcoords()))
        return step + 1, *slicewise(choose, wanted, *sums, *found)

    def start(top: tf.Tensor) -> tuple[tf.Tensor, ...]:
        whole = tf.zeros_like(top, tf.int32)
        return whole + _LOWEST, whole + _HIGHEST, whole - 1, whole + (core.rows.size - 1)

    n_steps = 32 + (core.rows.size - 1).bit_length()
    loop = (tf.constant(0), *slicewise(start, core.top))
    _, _, key, _, last = laid_out_while_loop(core.mesh_impl, lambda step, *_: step < n_steps, body, loop)

    def finish(
        key: tf.Tensor, last: tf.Tensor, mass: tf.Tensor, top: tf.Tensor, *sums: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        total = in_float64(*sums)
        least, last = tf.bitcast(tf.where_v2(key < 0, _LOWEST - key, key), tf.float32), tf.cast(last, tf.float32)
        has_mass = tf.logical_and(total > 0, top > core.lowest)
        return xla.kept_together(*_finished(least, last, mass, mass < 1, tf.logical_not(total < np.inf), has_mass))

    return slicewise(finish, key, last, mass, core.top, *totals)


def _exact_weights(x: tf.Tensor, top: tf.Tensor) -> Pair:
    weights = tf.exp(tf.cast(x - top, tf.float64))
    high = tf.cast(weights, tf.float32)
    return xla.kept_together(high, tf.cast(weights - tf.cast(high, tf.float64), tf.float32))


def _entry_numbers(rows: ShardedRows, x: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
    """int32 [1, a, b]: the indices of a shard's entries, as `_folded` has them."""
    return tf.reshape(rows.entry_numbers(pcoord), [1, *x.shape.as_list()[1:]])


def nucleus_ends(core: CoreRows, mass: LaidOut) -> tuple[LaidOut, ...]:
    """Of a cut behind the fewest of the likeliest entries whose mass is at least `mass`."""
    (least, number), in_doubt = mass_ends(core, mass)
    return _settled(core, in_doubt, lambda: exact_mass_ends(core, mass), least, number)


def _settled(
    core: CoreRows, in_doubt: LaidOut, exact: Callable[[], Sequence[LaidOut]], least: LaidOut, number: LaidOut,
    *mean: LaidOut,
) -> tuple[LaidOut, ...]:  # fmt: skip
    """(least, last, …): those of `exact` where a row is in doubt; else as found, with the index of the last tie."""

    def with_index() -> tuple[LaidOut, ...]:
        return least, _index_of_last(core, least, number, *mean), *mean

    def unsettled(in_doubt: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        return in_doubt + tf.where_v2(number < np.inf, 1.0, 0.0)

    return laid_out_cond(
        core.mesh_impl,
        core.any_of(core.slicewise(unsettled, in_doubt, number)),
        lambda: laid_out_cond(core.mesh_impl, core.any_of(in_doubt), exact, with_index),
        lambda: (least, number, *mean),
    )


def typical_key(x: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
    """Larger for entries nearer to the mean."""
    return -distance_of(x, x, *mean)


def typical_ends(core: CoreRows, mass: LaidOut) -> tuple[LaidOut, ...]:
    """Of a cut behind the fewest entries, nearest to the mean first; then the mean's two parts, [rows, 1]."""

    def sums(x: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, ...]:
        weights, depth = float_pairs.exp_of_minus(top - x), tf.minimum(top - x, _FAR)
        return _sums([], [weights, float_pairs.times(weights, depth)])

    def mean_of(top: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        depth = float_pairs.quotient(_joined(*sums[2:]), _joined(*sums[:2]))
        near = tf.abs(depth[0] - _NO_DEPTH) < 1e-11
        minus_depth = tuple(tf.where_v2(depth[0] >= _NO_DEPTH, -d, 0.0) for d in depth)
        high, low = float_pairs.add((top, tf.zeros_like(top)), minus_depth)
        high, low = float_pairs.two_sum(high, low)
        return *(tf.reshape(t, [-1, 1]) for t in (high, low)), tf.where_v2(near, 1.0, 0.0)

    def exact() -> tuple[LaidOut, ...]:
        mean = _exact_mean(core)
        return *exact_mass_ends(core, mass, *mean), *mean

    *mean, uncertain = core.slicewise(mean_of, core.top, *core.gathered(core.slicewise(sums, core.x, core.top)))
    (least, number), in_doubt = mass_ends(core, mass, *mean)
    in_doubt = core.slicewise(tf.maximum, in_doubt, uncertain)
    return _settled(core, in_doubt, exact, least, number, *mean)


_NO_DEPTH = 2.0**-20  # a mean less than this below the largest is taken to equal it
_FAR = 1000.0  # a distance at which there is no mass


def _exact_mean(core: CoreRows) -> tuple[LaidOut, ...]:
    """Laid-out float32 [rows, 1]: two parts of the mean, by float64 sums."""

    def sums(x: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        weights = tf.exp(tf.cast(x - top, tf.float64))
        return fast_sum(weights), fast_sum(weights * tf.cast(tf.minimum(top - x, _FAR), tf.float64))

    def mean_of(top: tf.Tensor, total: tf.Tensor, depth: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        depth = tf.math.divide_no_nan(depth, total)
        mean = tf.cast(top, tf.float64) - tf.where_v2(depth < _NO_DEPTH, tf.zeros_like(depth), depth)
        high = tf.cast(mean, tf.float32)
        return high, tf.cast(mean - tf.cast(high, tf.float64), tf.float32)

    total, depth = (sum_across(core.rows, t) for t in core.slicewise(sums, core.flat, core.flat_top))
    return core.slicewise(mean_of, core.flat_top, total, depth)


# --- Cuts by probability -------------------------------------------------------------------------


def depth_ends(
    core: CoreRows, option: LaidOut, depth_of: Callable[..., Pair], looks_at: str = ""
) -> tuple[LaidOut, ...]:
    """Where a cut lies at a depth below the largest entry, which itself stays.

    Args:
      core: CoreRows.
      option: laid-out float32 [rows, 1]; 0 is no cut, NaN makes a row invalid.
      depth_of: a function of −log option, and of log total and the mean depth if these are looked at, to a pair.
      looks_at: "", "total" or "mean".

    Returns:
      (least, last, in_doubt): laid-out float32, one number a row.
    """
    slicewise, option = core.slicewise, core.of_rows(option)

    def sums(x: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, ...]:
        weights, depth = float_pairs.exp_of_minus(top - x), tf.minimum(top - x, _FAR)
        return _sums([], [weights] + ([float_pairs.times(weights, depth)] if looks_at == "mean" else []))

    def border(option: tf.Tensor, top: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        known = []
        if sums:
            total = _joined(*sums[:2])
            known.append(float_pairs.log_of(total))
        if len(sums) > 2:
            known.append(float_pairs.quotient(_joined(*sums[2:]), total))
        depth = depth_of(float_pairs.minus_log(option), *known)
        minus_depth = tuple(tf.where_v2(depth[0] > 0, -d, 0.0) for d in depth)
        high, low = float_pairs.add((top, tf.zeros_like(top)), minus_depth)
        high, low = float_pairs.two_sum(high, low)
        return high, low, 4 * PAIR_ERROR_BOUND * (1.0 + tf.abs(depth[0])) + tf.abs(top) * 2.0**-44

    def look(x: tf.Tensor, top: tf.Tensor, high: tf.Tensor, low: tf.Tensor, bound: tf.Tensor) -> tuple[tf.Tensor, ...]:
        near = tf.logical_and(tf.abs((x - high) - low) <= bound, tf.not_equal(x, top))
        flags = near, tf.logical_not(x < np.inf), x >= top
        return _sums([tf.where_v2(flag, 1.0, tf.zeros_like(x)) for flag in flags])

    def finish(
        option: tf.Tensor,
        top: tf.Tensor,
        high: tf.Tensor,
        low: tf.Tensor,
        near: tf.Tensor,
        invalid: tf.Tensor,
        tops: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        above = tf.bitcast(tf.bitcast(high, tf.int32) + tf.where_v2(high > 0, 1, -1), tf.float32)
        above = tf.where_v2(tf.equal(high, 0.0), np.float32(2.0**-126), above)
        least = tf.minimum(tf.where_v2(low > 0, above, high), top)
        has_mass = tf.logical_and(tops > 0, top > core.lowest)
        ends = _finished(least, tf.fill(tf.shape(least), np.float32(np.inf)), option, option > 0, invalid > 0, has_mass)
        doubt = tf.logical_or(near > 0, option < 1e-36)  # whose logarithm is not a pair's
        doubt = tf.logical_and(doubt, tf.logical_and(option > 0, tf.logical_and(has_mass, tf.equal(invalid, 0.0))))
        return xla.kept_together(*ends, tf.where_v2(doubt, 1.0, 0.0))

    totals = core.gathered(slicewise(sums, core.x, core.top)) if looks_at else []
    high, low, bound = slicewise(border, option, core.top, *totals)
    found = core.summed(slicewise(look, core.x, core.top, high, low, bound))
    return slicewise(finish, option, core.top, high, low, *found)


def probability_ends(
    core: CoreRows, option: LaidOut, depth_of: Callable[..., Pair], looks_at: str, exact: Callable[[], LaidOut]
) -> tuple[LaidOut, ...]:
    """(least, last) of `depth_ends`; where that is in doubt, those of `exact`, a Cut's ends [rows, 2]."""

    def choose(ends: tf.Tensor, least: tf.Tensor, last: tf.Tensor, in_doubt: tf.Tensor) -> tuple[tf.Tensor, ...]:
        found = zip(tf.split(ends, 2, -1), (least, last), strict=True)
        return tuple(tf.where_v2(in_doubt > 0, tf.reshape(end, [-1, 1, 1]), end_found) for end, end_found in found)

    def settle(_: tf.Tensor, least: LaidOut, last: LaidOut) -> tuple[LaidOut, ...]:
        return tf.constant(0.0), *core.slicewise(choose, exact(), least, last, in_doubt)

    least, last, in_doubt = depth_ends(core, option, depth_of, looks_at)
    # A loop that runs once or never: XLA takes both branches of a condition, where it thinks that they cost little.
    start = core.any_of(in_doubt), least, last
    return laid_out_while_loop(core.mesh_impl, lambda doubt, *_: doubt > 0.5, settle, start)[1:]

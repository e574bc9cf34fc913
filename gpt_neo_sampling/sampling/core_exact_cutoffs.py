"""Cutoffs by mass in emulated float64, for rows of a TPU core's program that `core_cutoffs` leaves in doubt.

A key is found one bit after another: slow, but seldom, and small to compile. A TPU's code grows with what a kernel
takes, so float64's exp, the largest part of it, is computed for some entries at a time.
"""

import functools
import typing
from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh import xla
from gpt_neo_sampling.mesh.ops import laid_out_while_loop
from gpt_neo_sampling.mesh.sharded_rows import sum_across
from gpt_neo_sampling.sampling.core_rows import FAR, NO_DEPTH, NOTHING, CoreRows, finished, sums_of, typical_key
from gpt_neo_sampling.sampling.float_pairs import Pair

_AT_ONCE = 2**11  # float64 weights that are computed at once
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
_WAYS = 16  # into which a range of indices is cut
_REGISTER = 8  # lines


class _Lines:
    """Rows of a core as [lines, 1, entries], and numbers of rows as [lines, 1, 1]: several lines where rows are few.

    Of all shapes, a sum over these is the least code on a TPU.
    """

    def __init__(self, core: CoreRows) -> None:
        self.core, self.slicewise = core, core.slicewise
        self.n_rows, n_entries = core.flat.slice_shape
        lines = max(_REGISTER // self.n_rows, 1)
        self.of_a_row = lines if n_entries % lines == 0 else 1
        self.n_lines, self.n_entries = self.n_rows * self.of_a_row, n_entries // self.of_a_row
        self.x = self.slicewise(lambda x: tf.reshape(x, [self.n_lines, 1, self.n_entries]), core.flat)
        self.top = self.of_rows(core.flat_top)

    def of_rows(self, x: LaidOut) -> LaidOut:
        """[lines, 1, 1] of one number a row."""
        return self.slicewise(self.spread, x)

    def spread(self, x: tf.Tensor) -> tf.Tensor:
        x = tf.broadcast_to(tf.reshape(x, [self.n_rows, 1]), [self.n_rows, self.of_a_row])
        return tf.reshape(x, [self.n_lines, 1, 1])

    def in_rows(self, x: tf.Tensor) -> tf.Tensor:
        """[rows, 1] of [lines, 1, 1] that are equal in a row."""
        return tf.reshape(x, [self.n_rows, self.of_a_row])[:, :1]

    def added(self, x: tf.Tensor) -> tf.Tensor:
        """[…, rows, 1]: sums over lines, of […, lines, 1, 1]."""
        before = x.shape.as_list()[:-3]
        return tf.reduce_sum(tf.reshape(x, [*before, self.n_rows, self.of_a_row]), -1, keepdims=True)

    def in_line(self, index: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
        """Where an entry of a row, [lines, 1, 1], stands in each of its lines."""
        first = np.arange(self.n_lines, dtype=np.int32)[:, np.newaxis, np.newaxis] % self.of_a_row * self.n_entries
        return index - tf.cast(first + pcoord * self.core.rows.entries, index.dtype)

    def total_of(self, pairs: Sequence[LaidOut]) -> LaidOut:
        """Float64 [lines, 1, 1]: sums over a row's lines and shards, of high and low parts."""

        def add(high: tf.Tensor, low: tf.Tensor) -> tf.Tensor:
            parts = zip(tf.unstack(high), tf.unstack(low), strict=True)
            return self.spread(self.added(sum(tf.cast(h, tf.float64) + tf.cast(t, tf.float64) for h, t in parts)))

        return self.slicewise(add, *self.core.gathered(pairs))


class ExactSums(typing.NamedTuple):
    """Of weights exp(x − top)."""

    total: LaidOut  # float64 [rows, 1], over all shards
    depth: LaidOut  # likewise of weights times how far an entry is below the top
    weights: Sequence[LaidOut]  # their high and low parts, float32 [lines, 1, entries]; none if not asked for


def exact_sums(core: CoreRows, with_weights: bool = False) -> ExactSums:
    lines = _Lines(core)
    n = min(lines.n_entries, max(_AT_ONCE // lines.n_lines, 128))

    def in_matrix(x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(x, [lines.n_lines, -1])

    def add_some(
        at: tf.Tensor, x: tf.Tensor, top: tf.Tensor, total: tf.Tensor, depth: tf.Tensor, *weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        begin = tf.minimum(at, lines.n_entries - n)
        x = tf.slice(x, tf.stack([0, begin]), [lines.n_lines, n])
        exact = tf.exp(tf.cast(x - top, tf.float64))
        is_new = tf.range(n) >= at - begin  # the last ones may begin among those before
        counted = tf.where_v2(is_new, exact, tf.zeros_like(exact))
        total += tf.reduce_sum(counted, -1, keepdims=True)
        depth += tf.reduce_sum(counted * tf.cast(tf.minimum(top - x, FAR), tf.float64), -1, keepdims=True)
        parts = zip(weights, _halves(exact))
        return total, depth, *(xla.update_slice(w, part, [0, begin]) for w, part in parts)

    def body(at: tf.Tensor, *found: LaidOut) -> tuple[tf.Tensor | LaidOut, ...]:
        return at + n, *slicewise(functools.partial(add_some, at), x, top, *found)

    slicewise = lines.slicewise
    x, top = (slicewise(in_matrix, t) for t in (lines.x, lines.top))
    zero = slicewise(lambda top: tf.zeros_like(top, tf.float64), top)
    start = tf.constant(0), zero, zero, *[slicewise(tf.zeros_like, x)] * (2 * with_weights)
    found = laid_out_while_loop(core.mesh_impl, lambda at, *_: at < lines.n_entries, body, start)
    total, depth = (sum_across(core.rows, slicewise(lambda f: lines.added(f[..., tf.newaxis]), f)) for f in found[1:3])
    weights = [slicewise(lambda w: w[:, tf.newaxis], w) for w in found[3:]]
    return ExactSums(total, depth, weights)


def _halves(x: tf.Tensor) -> Pair:
    """The two float32 parts of float64 numbers."""
    high = tf.cast(x, tf.float32)
    return high, tf.cast(x - tf.cast(high, tf.float64), tf.float32)


def exact_mean(top: tf.Tensor, total: tf.Tensor, depth: tf.Tensor) -> Pair:
    """Two float32 parts of the mean entry, from `ExactSums` and the largest, [rows, 1] all."""
    depth = tf.math.divide_no_nan(depth, total)
    return _halves(tf.cast(top, tf.float64) - tf.where_v2(depth < NO_DEPTH, tf.zeros_like(depth), depth))


def exact_mass_ends(core: CoreRows, mass: LaidOut, sums: ExactSums, *mean: LaidOut) -> tuple[LaidOut, ...]:
    """(least, last) of a cut, one number a row: the key at the cut is found bit by bit, and then the index.

    mass, mean: as for `core_cutoffs.mass_ends`.
    """
    lines, slicewise = _Lines(core), core.slicewise

    def key_of(x: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
        """int32, larger for nearer entries; NaN is that of an invalid row."""
        bits = tf.bitcast(typical_key(x, *mean) if mean else x, tf.int32)
        return tf.where_v2(bits < 0, _LOWEST - bits, bits)

    def mid(low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
        differing = tf.bitwise.right_shift(tf.bitwise.bitwise_xor(low, high), tf.constant(1))
        return tf.bitwise.bitwise_and(low, high) + differing

    def wanted_of(total: tf.Tensor, mass: tf.Tensor) -> tf.Tensor:
        return tf.maximum(total * tf.cast(mass, tf.float64), NOTHING)

    keys = slicewise(key_of, lines.x, *(lines.of_rows(m) for m in mean))
    wanted = lines.of_rows(slicewise(wanted_of, sums.total, mass))

    def trial(
        step: tf.Tensor, low: tf.Tensor, high: tf.Tensor, before: tf.Tensor, last: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(key, index): all nearer entries are counted, and those of that key up to the index."""
        by_key = step < 32
        return tf.where_v2(by_key, mid(low, high), high), tf.where_v2(by_key, -1, mid(before, last))

    def body(step: tf.Tensor, *found: LaidOut) -> tuple[tf.Tensor | LaidOut, ...]:
        def part(
            keys: tf.Tensor, high: tf.Tensor, low: tf.Tensor, key: tf.Tensor, index: tf.Tensor, *pcoord: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            at = tf.range(lines.n_entries)[tf.newaxis, tf.newaxis]
            is_last = tf.logical_and(tf.equal(keys, key), at <= lines.in_line(index, *pcoord))
            counted = tf.logical_or(keys > key, is_last)
            weights = [tf.where_v2(counted, w, 0.0) for w in (high, low)]
            return sums_of([], [tuple(weights)])

        def choose(
            sums: tf.Tensor, wanted: tf.Tensor, key: tf.Tensor, index: tf.Tensor, *found: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            low, high, before, last = found
            by_key, short = step < 32, sums < wanted
            low = tf.where_v2(tf.logical_and(by_key, tf.logical_not(short)), key, low)
            high = tf.where_v2(tf.logical_and(by_key, short), key, high)
            before = tf.where_v2(tf.logical_and(tf.logical_not(by_key), short), index, before)
            last = tf.where_v2(tf.logical_or(by_key, short), last, index)
            return low, high, before, last

        tried = slicewise(lambda *found: trial(step, *found), *found)
        total = lines.total_of(slicewise(part, keys, *sums.weights, *tried, *core.rows.pcoords()))
        return step + 1, *slicewise(choose, total, wanted, *tried, *found)

    def start(top: tf.Tensor) -> tuple[tf.Tensor, ...]:
        whole = tf.zeros_like(top, tf.int32)
        return whole + _LOWEST, whole + _HIGHEST, whole - 1, whole + (core.rows.size - 1)

    n_steps = 32 + (core.rows.size - 1).bit_length()
    loop = (tf.constant(0), *slicewise(start, lines.top))
    _, _, key, _, last = laid_out_while_loop(core.mesh_impl, lambda step, *_: step < n_steps, body, loop)

    def finish(
        key: tf.Tensor, last: tf.Tensor, mass: tf.Tensor, top: tf.Tensor, total: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        key, last = lines.in_rows(key), tf.cast(lines.in_rows(last), tf.float32)
        least = tf.bitcast(tf.where_v2(key < 0, _LOWEST - key, key), tf.float32)
        has_mass = tf.logical_and(total > 0, top > core.lowest)
        ends = finished(least, last, mass, mass < 1, tf.logical_not(total < np.inf), has_mass)
        return xla.kept_together(*(tf.reshape(end, [-1, 1, 1]) for end in ends))

    return slicewise(finish, key, last, mass, core.flat_top, sums.total)


def index_of_last(core: CoreRows, least: LaidOut, number: LaidOut, *mean: LaidOut) -> LaidOut:
    """The index of the last of so many entries of the key at the cut; +inf where the number is. One number a row."""
    lines, slicewise = _Lines(core), core.slicewise

    def is_tie(x: tf.Tensor, least: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
        return tf.where_v2(tf.equal(typical_key(x, *mean) if mean else x, least), 1.0, 0.0)

    def body(step: tf.Tensor, begin: LaidOut) -> tuple[tf.Tensor, LaidOut]:
        def counts(ties: tf.Tensor, begin: tf.Tensor, *pcoord: tf.Tensor) -> tuple[tf.Tensor, ...]:
            at = tf.cast(tf.range(lines.n_entries), tf.float32)[tf.newaxis, tf.newaxis]
            parts = (at - lines.in_line(lines.spread(begin), *pcoord)) / step
            return sums_of([tf.where_v2(parts < float(i), ties, 0.0) for i in range(1, _WAYS)])

        def narrowed(number: tf.Tensor, begin: tf.Tensor, *counts: tf.Tensor) -> tf.Tensor:
            if lines.of_a_row > 1:  # all at once; where there is nothing to add, stacking takes longer
                of_rows = tf.unstack(lines.added(tf.stack(counts)))
            else:
                of_rows = [lines.added(count) for count in counts]
            return begin + step * sum(tf.where_v2(count < number, 1.0, 0.0) for count in of_rows)

        found = core.summed(slicewise(counts, ties, begin, *core.rows.pcoords()))
        return step / _WAYS, slicewise(narrowed, number, begin, *found)

    def finish(begin: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.where_v2(number < np.inf, begin, np.inf), [-1, 1, 1])

    ties = slicewise(is_tie, lines.x, *(lines.of_rows(x) for x in (least, *mean)))
    number = slicewise(lambda x: tf.reshape(x, [-1, 1]), number)
    first_step = _WAYS ** (((core.rows.size - 1).bit_length() - 1) // (_WAYS.bit_length() - 1))
    start = tf.constant(float(first_step)), slicewise(tf.zeros_like, number)
    _, begin = laid_out_while_loop(core.mesh_impl, lambda step, _: step > 0.5, body, start)
    return slicewise(finish, begin, number)

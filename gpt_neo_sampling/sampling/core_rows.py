"""Rows of a TPU core's program, and what the searches for their cutoffs share: sums in one kernel, and distances."""

import functools
from collections.abc import Sequence

import numpy as np

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh import xla
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows
from gpt_neo_sampling.sampling import float_pairs
from gpt_neo_sampling.sampling.float_pairs import Pair

NO_DEPTH = 2.0**-20  # a mean less than this below the largest is taken to equal it
FAR = 1000.0  # a distance at which there is no mass
NOTHING = 1e-30  # a mass that the first entry reaches


class CoreRows:
    """Rows of a core as [rows, a, b], which fill its registers, and numbers of rows as [rows, 1, 1]."""

    def __init__(self, rows: ShardedRows, x: LaidOut, top: LaidOut, lowest: float) -> None:
        """x: laid-out float32 [rows, entries]; top: laid-out float32 [rows, 1], the largest entry, finite; lowest: what
        masked entries may be."""
        self.lowest = lowest
        self.rows, self.mesh_impl, self.flat, self.flat_top = rows, rows.mesh_impl, x, top
        self.slicewise = rows.mesh_impl.slicewise
        self.x, self.top = self.slicewise(folded, x), self.of_rows(top)

    def of_rows(self, x: LaidOut) -> LaidOut:
        return self.slicewise(lambda x: tf.reshape(x, [-1, 1, 1]), x)

    def entry_numbers(self, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
        """float32 [a, b]: the indices in a row of this core's entries."""
        return tf.cast(tf.reshape(self.rows.entry_numbers(pcoord), self.x.slice_shape[1:]), tf.float32)

    def summed(self, parts: Sequence[LaidOut]) -> list[LaidOut]:
        return [self.rows.across_shards(p, "SUM") for p in parts]

    def gathered(self, parts: Sequence[LaidOut]) -> list[LaidOut]:
        """Laid-out finite numbers of rows, as [shards, …]."""
        axis = self.rows.mesh_axis
        if axis is None:
            return self.slicewise(lambda *parts: tuple(p[tf.newaxis] for p in parts), *parts)
        n_shards = self.mesh_impl.shape[axis].size
        at = np.reshape(np.arange(n_shards, dtype=np.int32), [-1] + [1] * len(parts[0].slice_shape))

        def place(pcoord: tf.Tensor, *parts: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return tuple(tf.where_v2(tf.equal(at, pcoord), p[tf.newaxis], 0.0) for p in parts)

        placed = self.slicewise(place, self.mesh_impl.laid_out_pcoord(axis), *parts)
        return self.summed(placed)

    def any_of(self, flags: LaidOut) -> tf.Tensor:
        """A scalar above 0.5 where any of the float32 flags is set, over the whole mesh."""
        flags = self.mesh_impl.slicewise(tf.reduce_sum, flags)
        return self.mesh_impl.allreduce(flags, list(range(self.mesh_impl.ndims)), "SUM").to_laid_out_tensor().one_slice


def folded(x: tf.Tensor) -> tf.Tensor:
    """[rows, entries] as [rows, a, b]: 128 numbers to a line, where rows are too few to fill a register's 8 lines."""
    n_rows, size = x.shape.as_list()
    if n_rows >= 8 or size % 128:
        return x[:, tf.newaxis]
    return xla.kept_together(tf.reshape(x, [n_rows, -1, 128]))[0]


def sums_of(parts: Sequence[tf.Tensor], pairs: Sequence[Pair] = ()) -> tuple[tf.Tensor, ...]:
    """Sums [rows, 1, 1] of several [rows, a, b], then those of pairs of them, high and low, in one kernel."""
    n, flat = len(parts), [part for pair in pairs for part in pair]

    def combine(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor]) -> tuple[tf.Tensor, ...]:
        sums = [float_pairs.add((a[i], a[i + 1]), (b[i], b[i + 1])) for i in range(n, len(a), 2)]
        return *(x + y for x, y in zip(a[:n], b[:n])), *(part for pair in sums for part in pair)

    sums = xla.reduce_together([*parts, *flat], [0] * (n + len(flat)), [1, 2], combine)
    return tuple(tf.reshape(s, [-1, 1, 1]) for s in sums)


def joined(high: tf.Tensor, low: tf.Tensor) -> Pair:
    """The sum of pairs [shards, …]."""
    return functools.reduce(float_pairs.add, list(zip(tf.unstack(high), tf.unstack(low), strict=True)))


def distance_of(x: tf.Tensor, top: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
    """Of an entry from the top, or from the mean: a pair."""
    if not mean:
        return top - x
    high, low = float_pairs.two_sum(tf.maximum(x, tf.float32.min), -mean[0])
    return tf.abs(high + (low - mean[1]))


def typical_key(x: tf.Tensor, *mean: tf.Tensor) -> tf.Tensor:
    """Larger for entries nearer to the mean."""
    return -distance_of(x, x, *mean)


def finished(
    least: tf.Tensor, last: tf.Tensor, option: tf.Tensor, has_cut: tf.Tensor, invalid: tf.Tensor, has_mass: tf.Tensor
) -> list[tf.Tensor]:
    """(least, last), of all entries where there is nothing to cut; NaN for an invalid row."""
    keeps_all = tf.logical_not(tf.logical_and(has_cut, has_mass))
    least, last = tf.where_v2(keeps_all, -np.inf, least), tf.where_v2(keeps_all, np.inf, last)
    return [tf.where_v2(tf.logical_or(invalid, tf.is_nan(option)), np.nan, least), last]

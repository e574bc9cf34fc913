"""The k largest entries of a row in few kernels and without a sort, for a TPU core's program.

    1. The row lies in 128 columns; each keeps its `_DEPTH` largest entries, in order. This alone reads the whole row.
    2. The k-th largest of 128 groups' own largest is a threshold: at least k entries reach it, as a rule few more.
    3. What reaches it is copied into `_slots(k)` places, counted through from the first column on.
    4. Of these the k largest are found by comparing all pairs.

A row is doubtful where more than so many entries reach the threshold, where a column may have more of them than it
keeps, or where fewer than k entries are above the lowest number. Of rows in random order fewer than one in 10,000 is,
for k of 40.
"""

import functools

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh import xla
from gpt_neo_sampling.mesh.ops import pad_last, size_of

MOST = 64  # the largest k
MOST_SHARDS = 16  # 256 numbers travel for each
_COLUMNS = 128  # a TPU's vector has so many lanes
_DEPTH = 8  # a power of two
_LOWEST = float(np.finfo(np.float32).min)
_NOWHERE = 2**20  # more than the number of any line of columns


def selects(mesh_impl: mtf.MeshImpl, size: int, k: int, mesh_axis: int | None) -> bool:
    """Whether `select_largest` is for the k largest of rows of which a shard has `size` entries."""
    n_shards = 1 if mesh_axis is None else mesh_impl.shape[mesh_axis].size
    return xla.is_core_program(mesh_impl) and k <= MOST and n_shards <= MOST_SHARDS and size >= 2 * _COLUMNS * _DEPTH


def _slots(k: int) -> int:
    return 64 if k <= 40 else 128


def select_largest(
    mesh_impl: mtf.MeshImpl, x: LaidOut, k: int, mesh_axis: int | None
) -> tuple[LaidOut, LaidOut, LaidOut]:
    """The k largest entries of each row and their indices, in order.

    Args:
      mesh_impl: mtf.MeshImpl, of one core.
      x: laid-out float32 [rows, entries].
      k: int, see `selects`.
      mesh_axis: the mesh axis that splits the entries, or None.

    Returns:
      (values, indices, doubtful): laid-out [rows, k], float32 and int32, as from `top_k.largest`; and float32
      [rows, slots], above 0 somewhere in a row where they may be wrong.
    """
    slicewise, n_slots = mesh_impl.slicewise, _slots(k)
    n_shards = 1 if mesh_axis is None else mesh_impl.shape[mesh_axis].size
    size = x.slice_shape[1]
    pcoord = [] if mesh_axis is None else [mesh_impl.laid_out_pcoord(mesh_axis)]
    # A broadcast of what was computed makes a kernel, so numbers of a row stand in each of its 128 columns.

    # (A broadcast of numbers computed is a kernel of its own, and XLA computes before it broadcasts where it can.
    # So numbers of a row stand in each of its columns, and comparisons are with literals that differ along the other
    # axis.)

    def over_shards(x: LaidOut) -> LaidOut:
        return x if mesh_axis is None else mesh_impl.allreduce(x, [mesh_axis], "SUM")

    def spread(x: tf.Tensor, n: int) -> tf.Tensor:
        """[rows, m] as [rows, n, m]."""
        return tf.broadcast_to(x[:, tf.newaxis], [size_of(x, 0), n, size_of(x, 1)])

    def number(like: tf.Tensor, dtype: type = np.float32) -> np.ndarray:
        """0, 1, … along the middle axis."""
        shape = like.shape.as_list()
        return np.broadcast_to(np.arange(shape[1], dtype=dtype)[:, np.newaxis], shape)

    def in_place(top: tf.Tensor, pcoord: tf.Tensor) -> tf.Tensor:
        """[rows, shards, columns]: finite, 0 at other shards."""
        top = spread(top, n_shards)
        top = tf.where_v2(tf.equal(number(top, np.int32), pcoord), top, 0.0)
        return tf.clip_by_value(top, _LOWEST, -_LOWEST)

    def reached(*tops: tf.Tensor) -> xla.Values:
        """[rows, groups]: the largest of each group, a column of all shards, and how many groups' reach it."""
        top = functools.reduce(tf.maximum, tops)
        return top, tf.reduce_sum(tf.where_v2(spread(top, _COLUMNS) >= top[:, :, tf.newaxis], 1.0, 0.0), -1)

    def threshold(top: tf.Tensor, reached: tf.Tensor) -> tf.Tensor:
        """[rows, columns]: the largest number that k groups or more reach."""

        def larger(a: xla.Values, b: xla.Values) -> xla.Values:
            return tf.maximum(*(tf.where_v2(n >= k, v, -np.inf) for v, n in (a, b))), tf.constant(float(_COLUMNS))

        return xla.reduce_together([spread(top, _COLUMNS), spread(reached, _COLUMNS)], [-np.inf, 0.0], [2], larger)[0]

    def hits(border: tf.Tensor, *values: tf.Tensor) -> tf.Tensor:
        """float32 [rows, columns]: how many of a column's entries reach the border."""
        return sum(tf.where_v2(v >= border, 1.0, 0.0) for v in values)

    def sums(hits: tf.Tensor) -> xla.Values:
        """[rows, columns] each: the hits in the columns before, and in all; by products, which are exact."""
        ones = np.ones([_COLUMNS, _COLUMNS], np.float32)
        return tf.matmul(hits, np.triu(ones, 1)), tf.matmul(hits, ones)

    def for_later(total: tf.Tensor, pcoord: tf.Tensor) -> tf.Tensor:
        """[rows, shards, columns]: this shard's hits, at the shards after it."""
        total = spread(total, n_shards)
        return tf.where_v2(number(total, np.int32) > pcoord, total, 0.0)

    def copy(border: tf.Tensor, hits: tf.Tensor, before: tf.Tensor, *args: tf.Tensor) -> xla.Values:
        """[rows, slots] each: values, NaN for an invalid one; indices + 1, 0 where nothing is; 1.0 for a doubt."""
        values, lines, args = args[:_DEPTH], args[_DEPTH : 2 * _DEPTH], args[2 * _DEPTH :]
        if args:
            earlier, pcoord = args
            before += sum(tf.where_v2(tf.equal(pcoord, i), earlier[:, i], 0.0) for i in range(n_shards))
        hits, border = spread(hits, n_slots), spread(border, n_slots)
        slot = number(hits)
        depth = slot - spread(before, n_slots)
        value, line = tf.zeros_like(depth), tf.zeros_like(depth, tf.int32)
        for i in range(_DEPTH):
            here = tf.equal(depth, i)
            value = tf.where_v2(here, spread(values[i], n_slots), value)
            line = tf.where_v2(here, spread(lines[i], n_slots), line)
        here = tf.logical_and(depth >= 0, depth < hits)
        index = line * _COLUMNS + np.arange(_COLUMNS, dtype=np.int32) + (1 + pcoord * size if args else 1)
        value = tf.where_v2(here, tf.where_v2(value < np.inf, value, np.nan), 0.0)
        index = tf.where_v2(here, tf.cast(index, tf.float32), 0.0)
        # told at one slot each: a full column, too few numbers above the lowest, more hits than there are slots
        full = hits >= slot + _DEPTH
        few = border <= np.where(slot < 1, _LOWEST, -np.inf)
        many = hits > depth + np.where(slot < n_slots - 1, 2.0**20, 1.0).astype(np.float32)
        doubt = tf.where_v2(tf.logical_or(tf.logical_or(full, few), many), 1.0, 0.0)
        return xla.reduce_together([value, index, doubt], [0.0] * 3, [2], _sums)

    def rank(values: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
        """[rows, slots]: how many come before."""
        w, j = spread(values, n_slots), spread(codes, n_slots)
        v, i = values[:, :, tf.newaxis], codes[:, :, tf.newaxis]
        is_there = j > number(j) / n_slots  # above 0: codes are whole
        ahead = tf.logical_or(w > v, tf.logical_and(tf.equal(w, v), j < i))
        return tf.reduce_sum(tf.where_v2(tf.logical_and(is_there, ahead), 1.0, 0.0), -1)

    def sort(values: tf.Tensor, codes: tf.Tensor, rank: tf.Tensor) -> xla.Values:
        values, codes, rank = (spread(t, k) for t in (values, codes, rank))
        is_there = codes > number(codes) / k
        here = tf.where_v2(tf.logical_and(is_there, tf.equal(rank, number(rank))), 1.0, 0.0)
        index = here * (codes - number(codes)) + here * (number(codes) - 1)
        # (NaN times 0 is NaN; where a branch takes such a reduction's results, libtpu mistakes their layout)
        value, index = xla.kept_together(*xla.reduce_together([here * values, index], [0.0, 0.0], [2], _sums))
        return value, tf.cast(index, tf.int32)

    lists = slicewise(_columns, x)
    if mesh_axis is None:
        tops = lists[:1]
    else:
        placed = over_shards(slicewise(in_place, lists[0], *pcoord))
        tops = slicewise(lambda t: tuple(tf.unstack(t, axis=1)), placed)
    border = slicewise(threshold, *slicewise(reached, *tops))
    found = slicewise(lambda *t: xla.kept_together(hits(*t))[0], border, *lists[:_DEPTH])
    before, total = slicewise(sums, found)
    earlier = [] if mesh_axis is None else [over_shards(slicewise(for_later, total, *pcoord))]
    copied = slicewise(copy, border, found, before, *lists, *earlier, *pcoord)
    values, codes, doubt = (over_shards(c) for c in copied)
    values, indices = slicewise(sort, values, codes, slicewise(rank, values, codes))
    return values, indices, doubt


def _sums(a: xla.Values, b: xla.Values) -> xla.Values:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _columns(x: tf.Tensor) -> xla.Values:
    """The `_DEPTH` largest entries of each column of [rows, entries], and then their lines: [rows, columns] each."""
    rows, size = x.shape.as_list()
    x = tf.reshape(pad_last(x, after=-size % _COLUMNS, value=-np.inf), [rows, -1, _COLUMNS])
    x = tf.where_v2(x < np.inf, x, np.inf)
    line = tf.broadcast_to(tf.range(size_of(x, 1))[:, tf.newaxis], x.shape)
    nothing, nowhere = [tf.fill(x.shape, -np.inf)] * (_DEPTH - 1), [tf.fill(x.shape, _NOWHERE)] * (_DEPTH - 1)
    starts = [-np.inf] * _DEPTH + [_NOWHERE] * _DEPTH
    return xla.reduce_together([x, *nothing, line, *nowhere], starts, [1], _merged)


def _merged(a: xla.Values, b: xla.Values) -> xla.Values:
    """Of two lists in descending order, values and then lines, the `_DEPTH` first of both: a bitonic network."""
    first, second = (list(zip(t[:_DEPTH], t[_DEPTH:], strict=True)) for t in (a, b))
    found = [_in_order(x, y)[0] for x, y in zip(first, reversed(second), strict=True)]
    apart = _DEPTH // 2
    while apart:
        for i in range(_DEPTH):
            if not i & apart:
                found[i], found[i + apart] = _in_order(found[i], found[i + apart])
        apart //= 2
    return *(value for value, _ in found), *(line for _, line in found)


def _in_order(a: xla.Values, b: xla.Values) -> tuple[xla.Values, xla.Values]:
    """Two pairs of a value and its line: the larger value first, of equal ones the lower line."""
    swap = tf.logical_or(b[0] > a[0], tf.logical_and(tf.equal(b[0], a[0]), b[1] < a[1]))
    return (
        tuple(tf.where_v2(swap, y, x) for x, y in zip(a, b)),
        tuple(tf.where_v2(swap, x, y) for x, y in zip(a, b)),
    )

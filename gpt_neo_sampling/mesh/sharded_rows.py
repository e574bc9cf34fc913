"""Slices as rows, whose entries are in groups that are the same on every layout, for operations along one dim."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.ops import align, pad_last, size_of
from gpt_neo_sampling.mesh.xla import update_slice

GROUPS = 64  # a mesh axis of 2, 4 … 64 processors cuts none of them


def group_size(size: int) -> int:
    """Entries in each group of a dimension of `size` (the last may have fewer)."""
    return -(-size // GROUPS)


def padded_size(size: int, shards: int) -> int:
    """The smallest padded size at which each of `shards` holds whole groups."""
    group = group_size(size)
    return shards * group * -(-size // (group * shards))


class ShardedRows:
    """The slices of an mtf tensor as [rows, entries] along one dim, the entries in groups.

    Sums along the dim are taken within groups first and then over groups, so an operation that fixes the order of both
    has the same bits on every layout. A layout that splits the dim moves a few numbers for each group; where it cuts
    through a group, the whole row is gathered first.
    """

    def __init__(
        self,
        mesh_impl: mtf.MeshImpl,
        shape: mtf.Shape,
        dim: mtf.Dimension,
        size: int | None = None,
        whole_groups: bool = True,
    ) -> None:
        """shape: mtf.Shape with `dim`; size: the entries that are not padding;
        whole_groups: False where a shard may hold parts of groups."""
        self.mesh_impl = mesh_impl
        self.size = size or dim.size
        self.group = group_size(self.size)
        self.n_groups = -(-self.size // self.group)
        self._position = shape.dims.index(dim)
        self._slice_shape = mesh_impl.slice_shape(shape)
        self.entries = self._slice_shape[self._position]  # of one shard
        self.mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(dim)
        self.split_axis = self.mesh_axis  # that the slices are split along
        self.gathered_axis = None
        self.ids = None  # all entries are there
        if whole_groups and self.mesh_axis is not None and self.entries % self.group:
            self.mesh_axis, self.gathered_axis = None, self.mesh_axis

    def to_rows(self, x: tf.Tensor) -> tf.Tensor:
        """A slice [...] as [rows, entries]."""
        perm = [i for i in range(x.shape.rank) if i != self._position] + [self._position]
        return tf.reshape(tf.transpose(x, perm) if perm != sorted(perm) else x, [-1, self.entries])

    def from_rows(self, x: tf.Tensor) -> tf.Tensor:
        """[rows, entries] as a slice."""
        rest = [n for i, n in enumerate(self._slice_shape) if i != self._position]
        back = list(range(len(rest)))
        back.insert(self._position, len(rest))
        x = tf.reshape(x, rest + [self.entries])
        return tf.transpose(x, back) if back != sorted(back) else x

    def gather(self, x: LaidOut) -> LaidOut:
        """Laid-out finite rows, whole where the layout cuts through groups."""
        if self.gathered_axis is None:
            return x
        return self.mesh_impl.allconcat(x, self.gathered_axis, 1)

    def grouped(self, x: tf.Tensor, fill: float = 0.0) -> tf.Tensor:
        """A slice's [..., entries] as [..., groups, group]; `fill` stands where there is no entry."""
        x = pad_last(x, after=-size_of(x, -1) % self.group, value=fill)
        return tf.reshape(x, x.shape.as_list()[:-1] + [-1, self.group])

    def in_groups(self, x: LaidOut, fill: float = 0.0) -> LaidOut:
        """Laid-out [rows, entries] as [rows, groups of the shard, places of a group]."""
        return self.mesh_impl.slicewise(lambda x: self.grouped(x, fill), x)

    def across_groups(self, x: LaidOut) -> LaidOut:
        """Laid-out [a, rows, groups of the shard] as [a, rows, all groups]."""
        if self.mesh_axis is not None:
            x = self.mesh_impl.allconcat(x, self.mesh_axis, 2)
        # shards may hold groups of nothing but padding
        return self.mesh_impl.slicewise(lambda x: x[..., : self.n_groups], x)

    def choose_within(
        self, group: LaidOut, choose: Callable[..., Sequence[tf.Tensor]], weights: LaidOut, *others: LaidOut
    ) -> tuple[LaidOut, ...]:
        """Chooses an entry in each of the given groups.

        Args:
          group: laid-out int32 [rows, samples]; −1 for none.
          choose: a function from slices of the weights, of the groups to choose in, numbered within the shard, and of
            `others`, to (int32 [rows, samples], the place in the group, …) and whatever else of that shape.
          weights: laid-out [rows, groups of the shard, places].

        Returns:
          laid-out [rows, samples]: the index along the dim, −1 where the group is −1; and
          what else `choose` returned, 0 where another shard holds the group.
        """

        def on_shard(group: tf.Tensor, weights: tf.Tensor, *others: tf.Tensor) -> tuple[tf.Tensor, ...]:
            args = list(others)
            pcoord = args.pop() if self.mesh_axis is not None else None
            ids = args.pop() if self.ids is not None else None
            local, first_entry, held = group, 0, group >= 0
            if pcoord is not None:
                n_groups = size_of(weights, 1)
                local, first_entry = group - pcoord * n_groups, pcoord * self.entries
                held = tf.logical_and(held, tf.logical_and(local >= 0, local < n_groups))
            place, *rest = choose(weights, tf.where_v2(held, local, 0), *args)
            if ids is None:
                index = group * self.group + place
            else:
                index = tf.gather(ids, tf.maximum(place, 0), batch_dims=1) + first_entry  # −1 where none has mass
            return tf.where_v2(held, index + 1, 0), *(tf.where_v2(held, r, tf.zeros_like(r)) for r in rest)

        args = [weights, *others] + ([] if self.ids is None else [self.ids])
        if self.mesh_axis is not None:
            args.append(self.mesh_impl.laid_out_pcoord(self.mesh_axis))
        index, *rest = self.mesh_impl.slicewise(on_shard, group, *args)
        return self.mesh_impl.slicewise(lambda i: i - 1, self.across_shards(index, "SUM")), *rest

    def across_shards(self, x: LaidOut, reduction: str) -> LaidOut:
        if self.mesh_axis is not None:
            x = self.mesh_impl.allreduce(x, [self.mesh_axis], reduction)
        return x

    def pcoords(self) -> list[LaidOut]:
        """One argument or none for `slicewise`: the number of a slice's shard."""
        return [] if self.mesh_axis is None else [self.mesh_impl.laid_out_pcoord(self.mesh_axis)]

    def entry_numbers(self, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
        """int32 [entries]: the indices along the dim of a shard's entries."""
        return tf.range(self.entries) + pcoord * self.entries


class CandidateRows(ShardedRows):
    """Rows of which only some entries are there, the candidates; the others have no weight.

    Groups are those of the whole rows, so draws from the candidates equal draws from whole rows.
    """

    def __init__(
        self, mesh_impl: mtf.MeshImpl, size: int, ids: LaidOut, mesh_axis: int | None = None, entries: int | None = None
    ) -> None:
        """size: the entries of a whole row; ids: laid-out int32 [rows, candidates], ascending: the indices of the
        candidates, counted within the `entries` of their shard where `mesh_axis` splits a row."""
        self.mesh_impl = mesh_impl
        self.size = size
        self.group = group_size(size)
        self.n_groups = -(-size // self.group)
        self.entries = entries or size
        self.mesh_axis = self.split_axis = mesh_axis
        self.gathered_axis = None
        self.ids = ids

    def in_groups(self, x: LaidOut, fill: float = 0.0) -> LaidOut:
        """Each entry has a place in every group, which holds `fill` in all but its own."""
        groups = tf.range(-(-self.entries // self.group))[:, tf.newaxis]

        def spread(x: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
            return tf.where_v2(tf.equal(ids[:, tf.newaxis] // self.group, groups), x[:, tf.newaxis], fill)

        return self.mesh_impl.slicewise(spread, x, self.ids)


def whole_axis(rows: ShardedRows, x: LaidOut) -> LaidOut:
    """Laid-out float32 [rows, n of a shard] as [rows, n of all shards], in a core program; XLA sends several of
    them together."""
    if rows.mesh_axis is None:
        return x
    n_shards = rows.mesh_impl.shape[rows.mesh_axis].size

    def place(x: tf.Tensor, pcoord: tf.Tensor) -> tf.Tensor:
        n_rows, n = x.shape.as_list()
        return update_slice(tf.zeros([n_rows, n * n_shards]), x, [0, pcoord * n])

    return rows.across_shards(rows.mesh_impl.slicewise(place, x, *rows.pcoords()), "SUM")


def largest_of_cores(rows: ShardedRows, x: LaidOut) -> tf.Tensor:
    """The largest of laid-out finite float32 numbers, a scalar: on all cores that must take the same branches.

    Those are the cores that exchange parts of rows. Where rows are whole, each core goes its own way.
    """
    x = rows.mesh_impl.slicewise(tf.reduce_max, x)
    others = [axis for axis in range(rows.mesh_impl.ndims) if axis != rows.mesh_axis]
    if rows.mesh_axis is not None and others:
        x = rows.mesh_impl.allreduce(x, others, "MAX")
    return x.tensor_list[0]


def spread_rows(lowering: mtf.Lowering, x: mtf.Tensor, shape: mtf.Shape) -> LaidOut:
    """An mtf.Tensor as laid-out [rows, 1]; its dims are among those of `shape`, the dims of the rows."""
    mesh_impl = lowering.mesh_impl(x)
    slice_shape = mesh_impl.slice_shape(shape)
    spread = lambda t: tf.reshape(tf.broadcast_to(align(t, x.shape, shape), slice_shape), [-1, 1])  # noqa: E731
    return mesh_impl.slicewise(spread, lowering.tensors[x])


def fast_sum(x: tf.Tensor) -> tf.Tensor:
    """Sum over the last axis, keeping it, partly in an order of the backend's choice.

    Its error does not grow with the axis, as reduce_sum's may: on CPUs XLA adds entries one by one, which is off by
    3e-5 for 50,257 equal ones.
    """
    size = size_of(x, -1)
    if size > 2**14:
        return fast_sum(tf.reduce_sum(tf.reshape(pad_last(x, after=-size % 32), x.shape.as_list()[:-1] + [-1, 32]), -1))
    part = next((n for n in range(math.isqrt(size), 3, -1) if size % n == 0), None)
    if part is None:
        part = min(16, size)
        x = pad_last(x, after=-size % part)
    parts = tf.reshape(x, x.shape.as_list()[:-1] + [part, -1])
    return tf.reduce_sum(tf.reduce_sum(parts, -1), -1, keepdims=True)


def sum_across(rows: ShardedRows, x: LaidOut) -> LaidOut:
    """Laid-out float64 numbers, none below 0 or above 2²⁴, summed over the shards of a row; NaN for what is not finite.

    They travel as multiples of 2⁻⁵⁴, in four float32 parts that up to 64 shards add without rounding: TPUs send no
    float64, and each mesh adds in an order of its own.
    """
    slicewise = rows.mesh_impl.slicewise
    if rows.mesh_axis is None:
        return slicewise(lambda x: tf.where_v2(x < np.inf, x, tf.constant(np.nan, tf.float64)), x)

    def split(x: tf.Tensor) -> tf.Tensor:
        valid = tf.logical_and(x >= 0, x < np.inf)
        parts, rest = [tf.where_v2(valid, 0.0, 1.0)], tf.where_v2(valid, x, tf.zeros_like(x))
        for _ in range(4):
            whole = tf.floor(rest)
            parts.append(tf.cast(whole, tf.float32))
            rest = (rest - whole) * 2.0**18
        return tf.stack(parts)

    def join(parts: tf.Tensor) -> tf.Tensor:
        invalid, *parts = tf.unstack(tf.cast(parts, tf.float64))
        total = sum(part * 2.0 ** (-18 * i) for i, part in enumerate(parts))
        return tf.where_v2(invalid > 0, tf.constant(np.nan, tf.float64), total)

    return slicewise(join, rows.across_shards(slicewise(split, x), "SUM"))


def any_of(mesh_impl: mtf.MeshImpl, flags: LaidOut) -> tf.Tensor:
    """The largest of laid-out float32 flags, over the whole mesh: a scalar tf.Tensor."""
    flags = mesh_impl.allreduce(mesh_impl.slicewise(tf.reduce_max, flags), list(range(mesh_impl.ndims)), "MAX")
    return flags.tensor_list[0]

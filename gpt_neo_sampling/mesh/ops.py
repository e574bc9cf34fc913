"""Mesh primitives that mesh-tensorflow lacks.

Each is linear in what it reads, right on any layout of its dimensions, and
free of the one-hot matrix products that mtf's `gather` and `cumsum` are made
of. They know nothing of sampling or of the model.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import LazyAllreduceSum, PlacementMeshImpl, is_in_function, mtf, tf
from gpt_neo_sampling._types import LaidOut, RowValue, ShapeLike
from gpt_neo_sampling.mesh import gpu, xla


class MeshOperation(mtf.Operation):
    """An operation all of whose dims a layout may split, or all but some; one without a `gradient` has none."""

    def __init__(
        self,
        inputs: Sequence[mtf.Tensor],
        outputs: Sequence[tuple[ShapeLike, tf.DType]],
        name: str,
        mesh: mtf.Mesh | None = None,
        unsplittable: Iterable[str] = (),
    ) -> None:
        """
        Args:
          inputs: a list of mtf.Tensors.
          outputs: a list of (mtf.Shape, tf.DType).
          name: str.
          mesh: mtf.Mesh, needed where there are no inputs.
          unsplittable: names of dims.
        """
        super().__init__(inputs, mesh=mesh, name=name)
        self._outputs = [mtf.Tensor(self, mtf.Shape(shape), dtype) for shape, dtype in outputs]
        self._splittable_dims, self._unsplittable_dims = self._initialize_splittable_and_unsplittable_dims(
            "splittable", unsplittable
        )

    @property
    def has_gradient(self) -> bool:
        return type(self).gradient is not mtf.Operation.gradient and super().has_gradient


def align(x: tf.Tensor, shape: mtf.Shape, target: mtf.Shape) -> tf.Tensor:
    """Transposes and reshapes a slice so that it broadcasts against `target`.

    Args:
      x: a tf.Tensor, one slice of an mtf tensor of shape `shape`.
      shape: mtf.Shape, whose dims are a subset of `target`'s.
      target: mtf.Shape.

    Returns:
      a tf.Tensor with `target`'s rank; size 1 where `shape` lacks the dim.
    """
    present = [d for d in target.dims if d in shape.dims]
    perm = [shape.dims.index(d) for d in present]
    if perm != list(range(len(perm))):
        x = tf.transpose(x, perm)
    for axis, d in enumerate(target.dims):
        if d not in shape.dims:
            x = tf.expand_dims(x, axis)
    return x


def reshaped(x: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """x in that shape; no operation is added if it has it already."""
    return x if x.shape.as_list() == list(shape) else tf.reshape(x, shape)


def size_of(x: tf.Tensor, axis: int) -> int:
    """An int, also where v2 behaviour is disabled and shapes hold objects."""
    return x.shape.as_list()[axis]


def finite(x: tf.Tensor) -> tf.Tensor:
    """x with ±inf as the largest and the lowest finite number, NaN as 0."""
    return tf.where_v2(tf.is_nan(x), tf.zeros_like(x), tf.clip_by_value(x, x.dtype.min, x.dtype.max))


def pad_last(x: tf.Tensor, before: int = 0, after: int | tf.Tensor = 0, value: float = 0.0) -> tf.Tensor:
    """x with this many more entries before and after, along its last axis."""
    if not before and not after:
        return x
    padding = [[0, 0]] * (x.shape.rank - 1) + [[before, after]]
    return tf.pad(x, padding, constant_values=tf.constant(value, x.dtype))


def check_floating(x: mtf.Tensor, what: str) -> None:
    if not x.dtype.is_floating:
        raise ValueError(f"{what} of dtype {x.dtype.name}; a floating dtype is needed")


def check_tensor(x: object, what: str) -> None:
    """Raises TypeError unless x is an mtf.Tensor."""
    if not isinstance(x, mtf.Tensor):
        shape = f" of shape {x.shape}" if hasattr(x, "shape") else ""
        raise TypeError(f"{what}: {type(x).__name__}{shape}; an mtf.Tensor is needed (mtf.import_tf_tensor)")


def as_dim(dim: Any, what: str) -> mtf.Dimension:
    """An mtf.Dimension, or a pair of its name and its size, as an mtf.Dimension; a TypeError for anything else."""
    try:
        return mtf.Dimension(*mtf.ops.convert_to_dimension(dim))
    except (TypeError, ValueError):
        allowed = "an mtf.Dimension is needed, such as mtf.Dimension('vocab', 50257)"
        raise TypeError(f"{what} is {dim!r}; {allowed}") from None


def dim_of(x: mtf.Tensor, dim: mtf.Dimension | None = None) -> mtf.Dimension:
    """A dimension of x as an mtf.Dimension: the last if `dim` is None; a ValueError if x lacks it."""
    check_tensor(x, "x")
    if dim is None:
        if not x.shape.dims:
            raise ValueError("a tensor without dims has none to work along")
        return x.shape.dims[-1]
    dim = as_dim(dim, "dim")
    if dim not in x.shape.dims:
        raise ValueError(f"dim {dim} is not among the dims {x.shape}")
    return dim


def union_shape(xs: Iterable[mtf.Tensor]) -> mtf.Shape:
    """The dims of all these tensors, in order of first appearance."""
    return mtf.Shape(list(dict.fromkeys(d for x in xs for d in x.shape.dims)))


def cwise_broadcast(
    fn: Callable[..., tf.Tensor],
    xs: Sequence[mtf.Tensor],
    output_shape: ShapeLike | None = None,
    output_dtype: tf.DType | None = None,
    name: str = "cwise_broadcast",
) -> mtf.Tensor:
    """Applies a component-wise TensorFlow function to mtf tensors that broadcast.

    Args:
      fn: a function from as many tf.Tensors as there are in `xs` to one, using
        TensorFlow's broadcasting; together its arguments span `output_shape`.
      xs: mtf tensors, the dims of each a subset of `output_shape`.
      output_shape: mtf.Shape; by default the union of the shapes, in order.
      output_dtype: a tf.DType; by default the first tensor's.

    Returns:
      an mtf.Tensor. No gradient flows through it.
    """
    output_shape = union_shape(xs) if output_shape is None else mtf.Shape(output_shape)
    shapes = [x.shape for x in xs]

    def aligned_fn(*slices: tf.Tensor) -> tf.Tensor:
        return fn(*[align(s, shape, output_shape) for s, shape in zip(slices, shapes)])

    return mtf.slicewise(
        aligned_fn,
        xs,
        output_shape=output_shape,
        output_dtype=output_dtype or xs[0].dtype,
        splittable_dims=output_shape.dims,
        grad_function=0,
        name=name,
    )


def force_allreduce(x: mtf.Tensor) -> mtf.Tensor:
    """The same tensor, with any all-reduce that mtf has postponed carried out.

    mtf's `while_loop` carries a loop variable before its reduction, and inside it a sum
    that was begun outside cannot be reduced. So everything that enters or leaves a loop passes through here.
    """
    return mtf.cwise(tf.identity, [x], name="force_allreduce")


def to_loop(x: mtf.Tensor) -> mtf.Tensor:
    """`force_allreduce` of an int32 tensor that a loop carries, or reads, and takes back by `from_loop`.

    TensorFlow would keep it in the host's memory; a GPU carries its bits as float32.
    """
    return _ToLoopOperation([x], [(x.shape, x.dtype)], "to_loop").outputs[0]


def from_loop(x: mtf.Tensor) -> mtf.Tensor:
    """What `to_loop` was given, where the loop reads it, or behind the loop."""
    return _FromLoopOperation([x], [(x.shape, x.dtype)], "from_loop").outputs[0]


class _ToLoopOperation(MeshOperation):
    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl, x = lowering.mesh_impl(self), lowering.tensors[self.inputs[0]]
        as_carried = (lambda x: tf.bitcast(x, tf.float32)) if gpu.on_gpu(mesh_impl) else tf.identity
        lowering.set_tensor_lowering(self.outputs[0], mesh_impl.slicewise(as_carried, x))


class _FromLoopOperation(MeshOperation):
    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl, x = lowering.mesh_impl(self), lowering.tensors[self.inputs[0]]
        if gpu.on_gpu(mesh_impl):
            x = mesh_impl.slicewise(lambda x: tf.bitcast(x, tf.int32), x)
        lowering.set_tensor_lowering(self.outputs[0], x)


def computed_once(x: mtf.Tensor) -> mtf.Tensor:
    """`force_allreduce` of a tensor that a loop reads: XLA does not compute it anew in each round.

    It does so where a tensor comes of constants by arithmetic alone, as a causal mask of all positions does.
    """
    return _OnceOperation(x).outputs[0]


class _OnceOperation(MeshOperation):
    def __init__(self, x: mtf.Tensor) -> None:
        super().__init__([x], [(x.shape, x.dtype)], "computed_once")

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        x = lowering.tensors[self.inputs[0]].to_laid_out_tensor()
        if xla.is_core_program(mesh_impl):
            x = mesh_impl.slicewise(lambda x: xla.kept_together(x)[0], x)
        lowering.set_tensor_lowering(self.outputs[0], x)


# --- Look-ups ---------------------------------------------------------------


def take(x: mtf.Tensor, indices: mtf.Tensor, dim: mtf.Dimension, name: str = "take") -> mtf.Tensor:
    """Looks up entries of `x` along `dim`; an index outside it gives zeros.

    Like `mtf.gather`, but a look-up on the shard that holds the entry and a sum
    over shards in place of a product with a one-hot matrix, so its cost does not
    grow with `dim` and a NaN elsewhere in `x` does not spread.

    Args:
      x: mtf.Tensor with `dim` among its dims.
      indices: int32 or int64 mtf.Tensor, without `dim`. Dims that it shares
        with `x` are matched (one look-up for each), the others are new.
      dim: mtf.Dimension of `x`.

    Returns:
      mtf.Tensor [shared dims, other dims of indices, other dims of x], the
      dtype of `x`. Its gradient with respect to `x` is a scatter-add. Integers
      beyond 2²⁴ are rounded where `dim` is split on a TPU mesh, which adds in
      float32.

    Raises:
      ValueError: if `dim` is not in `x`, or is in `indices`; and, when it is
        lowered, for a layout that splits `dim` and a dim of `indices` alike.
    """
    dim = as_dim(dim, "take: dim")
    if dim not in x.shape.dims:
        raise ValueError(f"take: dim {dim} is not among the dims of x, {x.shape}")
    if dim in indices.shape.dims:
        raise ValueError(f"take: dim {dim} is looked up, so indices cannot have it: {indices.shape}")
    return _TakeOperation(x, indices, dim, name).outputs[0]


def scatter_add(
    values: mtf.Tensor, indices: mtf.Tensor, shape: ShapeLike, dim: mtf.Dimension, small_whole_numbers: bool = False
) -> mtf.Tensor:
    """Sums values into the entries that their indices name: the transpose of `take`.

    Args:
      values: mtf.Tensor of a floating dtype; its dims are those of indices and
        those of `shape` that are neither `dim` nor in indices.
      indices: int32 or int64 mtf.Tensor, without `dim`; an index outside `dim` is
        ignored. Dims that it shares with `shape` are matched, the others are summed over.
      shape: mtf.Shape with `dim`, for small whole numbers with no other dims than those of indices.
      dim: mtf.Dimension.
      small_whole_numbers: whether all values are whole numbers within ±256, in float32, which a TPU adds much faster.

    Returns:
      mtf.Tensor [shape], the dtype of `values`. Its gradient with respect to
      `values` is a `take`.

    Raises:
      ValueError: for dims that do not fit, and as `take` does when it is lowered.
    """
    shape = mtf.Shape(shape)
    if dim not in shape.dims or dim in indices.shape.dims:
        raise ValueError(f"scatter_add: dim {dim} must be in the shape {shape}, and not in indices {indices.shape}")
    lookup = _Lookup(shape, indices.shape, dim)
    if set(values.shape.dims) != set(lookup.output.dims):
        raise ValueError(f"scatter_add: values of shape {values.shape}; they need the dims {lookup.output}")
    return _ScatterAddOperation(values, indices, lookup, small_whole_numbers).outputs[0]


def scatter_max(values: mtf.Tensor, indices: mtf.Tensor, shape: ShapeLike, dim: mtf.Dimension) -> mtf.Tensor:
    """The largest of the values that indices name for each entry, and 0 where there is none or none above that.

    Args:
      values, indices, shape, dim: as for `scatter_add`; values of float32.

    Returns:
      float32 mtf.Tensor [shape]. No gradient flows through it.

    Raises:
      ValueError: as `scatter_add`.
    """
    shape = mtf.Shape(shape)
    lookup = _Lookup(shape, indices.shape, dim)
    if dim not in shape.dims or dim in indices.shape.dims or set(values.shape.dims) != set(lookup.output.dims):
        raise ValueError(f"scatter_max: values of shape {values.shape}, indices {indices.shape}, shape {shape}")
    # a TPU moves them in products where the table has no other dims than those of the indices
    return _ScatterMaxOperation(values, indices, lookup, small_whole_numbers=not lookup.rest).outputs[0]


class _Lookup:
    """The dims of one look-up, by their roles."""

    def __init__(self, x_shape: mtf.Shape, indices_shape: mtf.Shape, dim: mtf.Dimension) -> None:
        self.dim = dim
        self.x_shape = x_shape
        self.indices_shape = indices_shape
        self.shared = [d for d in indices_shape.dims if d in x_shape.dims]
        self.others = [d for d in indices_shape.dims if d not in x_shape.dims]
        self.rest = [d for d in x_shape.dims if d != dim and d not in self.shared]
        self.output = mtf.Shape(self.shared + self.others + self.rest)
        self.table = mtf.Shape(self.shared + [dim] + self.rest)

    def mesh_axis(self, mesh_impl: mtf.MeshImpl) -> int | None:
        """The mesh axis that `dim` is split along, or None."""
        axis = mesh_impl.tensor_dimension_to_mesh_axis(self.dim)
        if axis is not None:
            for d in self.output.dims:
                if mesh_impl.tensor_dimension_to_mesh_axis(d) == axis:
                    raise ValueError(
                        f"take: the layout splits both {self.dim.name} and {d.name} along mesh axis "
                        f"{mesh_impl.shape[axis].name}; a look-up along {self.dim.name} needs {d.name} elsewhere"
                    )
        return axis

    def local_indices(self, indices: tf.Tensor, size: int, pcoord: tf.Tensor | None, dtype: tf.DType) -> tf.Tensor:
        """Indices within the shard, [shared, others], of a dtype; -1 for those outside it."""
        indices = _transpose(tf.cast(indices, dtype), self.indices_shape, self.shared + self.others)
        if pcoord is not None:
            indices -= tf.cast(pcoord, dtype) * size
        inside = tf.logical_and(indices >= 0, indices < size)
        return tf.where_v2(inside, indices, -1)


def _transpose(x: tf.Tensor, shape: mtf.Shape, dims: Sequence[mtf.Dimension]) -> tf.Tensor:
    perm = [shape.dims.index(d) for d in dims]
    return x if perm == list(range(len(perm))) else tf.transpose(x, perm)


class _TakeOperation(MeshOperation):
    def __init__(self, x: mtf.Tensor, indices: mtf.Tensor, dim: mtf.Dimension, name: str) -> None:
        self._lookup = _Lookup(x.shape, indices.shape, dim)
        super().__init__([x, indices], [(self._lookup.output, x.dtype)], name)

    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor | None]:
        x, indices = self.inputs
        if not x.dtype.is_floating:
            return [None, None]
        return [_ScatterAddOperation(grad_ys[0], indices, self._lookup).outputs[0], None]

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        lookup, dtype = self._lookup, gpu.index_dtype(mesh_impl)
        axis = lookup.mesh_axis(mesh_impl)

        def tf_fn(x: tf.Tensor, indices: tf.Tensor, pcoord: tf.Tensor | None = None) -> tf.Tensor:
            # a gather from a resource variable would make every read of it a copy
            x = tf.convert_to_tensor(x)
            batch_dims = at = len(lookup.shared)
            if lookup.shared or lookup.others:
                x = _transpose(x, lookup.x_shape, lookup.table.dims)
            else:  # a single index leaves the other dims in place
                at = lookup.x_shape.dims.index(lookup.dim)
            local = lookup.local_indices(indices, size_of(x, at), pcoord, dtype)
            found = tf.gather(x, tf.maximum(local, 0), axis=at, batch_dims=batch_dims)
            held = tf.reshape(local >= 0, local.shape.as_list() + [1] * len(lookup.rest))
            return tf.where_v2(held, found, tf.zeros_like(found))

        args = [lowering.tensors[t] for t in self.inputs]
        if axis is None:
            y = mesh_impl.slicewise(tf_fn, *args)
        else:
            y = mesh_impl.slicewise(tf_fn, *args, mesh_impl.laid_out_pcoord(axis))
            y = LazyAllreduceSum(mesh_impl, y, [axis])
        lowering.set_tensor_lowering(self.outputs[0], y)


class _ScatterAddOperation(MeshOperation):
    """Adds rows of dy to the entries that they were, or would be, looked up from."""

    def __init__(self, dy: mtf.Tensor, indices: mtf.Tensor, lookup: _Lookup, small_whole_numbers: bool = False) -> None:
        super().__init__([dy, indices], [(lookup.x_shape, dy.dtype)], "scatter_add")
        self._lookup = lookup
        self._small_whole_numbers = small_whole_numbers

    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor | None]:
        # Linear in dy: its gradient is the look-up itself.
        return [_TakeOperation(grad_ys[0], self.inputs[1], self._lookup.dim, "take").outputs[0], None]

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        lookup, dtype = self._lookup, gpu.index_dtype(mesh_impl)
        axis = lookup.mesh_axis(mesh_impl)
        table_shape = mesh_impl.slice_shape(lookup.table)
        n_shared = len(lookup.shared)
        rows, size = int(np.prod(table_shape[:n_shared])), table_shape[n_shared]

        def tf_fn(dy: tf.Tensor, indices: tf.Tensor, pcoord: tf.Tensor | None = None) -> tf.Tensor:
            local = tf.reshape(lookup.local_indices(indices, size, pcoord, dtype), [rows, -1])
            first = tf.expand_dims(tf.range(rows, dtype=dtype) * size, 1)
            segments = tf.where_v2(local >= 0, local + first, -1)  # -1 is dropped
            dy = tf.reshape(_transpose(dy, dy_shape, lookup.output.dims), [segments.shape.num_elements(), -1])
            dx = self._combined(dy, tf.reshape(segments, [-1]), rows * size)
            return _transpose(tf.reshape(dx, table_shape), lookup.table, lookup.x_shape.dims)

        def by_products(dy: tf.Tensor, indices: tf.Tensor, pcoord: tf.Tensor | None = None) -> tf.Tensor:
            local = tf.reshape(lookup.local_indices(indices, size, pcoord, tf.int32), [rows, -1])
            dy = tf.reshape(_transpose(dy, dy_shape, lookup.output.dims), local.shape)
            sums = tf.reshape(self._by_products(dy, local, size), table_shape)
            return _transpose(sums, lookup.table, lookup.x_shape.dims)

        fast = self._small_whole_numbers and xla.is_core_program(mesh_impl)
        dy_shape = self.inputs[0].shape
        args = [lowering.tensors[t] for t in self.inputs]
        if axis is not None:
            args.append(mesh_impl.laid_out_pcoord(axis))
        y = mesh_impl.slicewise(by_products if fast else tf_fn, *args)
        reduced = [mesh_impl.tensor_dimension_to_mesh_axis(d) for d in lookup.others]
        reduced = [a for a in reduced if a is not None]
        if reduced:
            y = self._combined_across(mesh_impl, y, reduced)
        lowering.set_tensor_lowering(self.outputs[0], y)

    def _combined(self, dy: tf.Tensor, segments: tf.Tensor, size: int) -> tf.Tensor:
        return tf.math.unsorted_segment_sum(dy, segments, size)

    def _by_products(self, dy: tf.Tensor, local: tf.Tensor, size: int) -> tf.Tensor:
        return xla.one_hot_sums(dy, local, size)

    def _combined_across(self, mesh_impl: mtf.MeshImpl, y: LaidOut, axes: list[int]) -> LaidOut:
        return LazyAllreduceSum(mesh_impl, y, axes)


class _ScatterMaxOperation(_ScatterAddOperation):
    def gradient(self, grad_ys: list[mtf.Tensor]) -> list[mtf.Tensor | None]:
        return [None, None]

    def _combined(self, dy: tf.Tensor, segments: tf.Tensor, size: int) -> tf.Tensor:
        return tf.maximum(tf.math.unsorted_segment_max(dy, segments, size), 0.0)  # which is the lowest where none is

    def _by_products(self, dy: tf.Tensor, local: tf.Tensor, size: int) -> tf.Tensor:
        """The largest of an entry's values alone is added; of equal ones the first."""
        at = tf.range(size_of(dy, -1))
        one, other = dy[:, :, tf.newaxis], dy[:, tf.newaxis]
        ahead = (other > one) | (tf.equal(other, one) & (at < at[:, tf.newaxis]))
        beaten = tf.reduce_any(ahead & tf.equal(local[:, :, tf.newaxis], local[:, tf.newaxis]), -1)
        return xla.one_hot_moves(tf.where_v2(beaten, 0.0, tf.maximum(dy, 0.0)), local, size)

    def _combined_across(self, mesh_impl: mtf.MeshImpl, y: LaidOut, axes: list[int]) -> LaidOut:
        return mesh_impl.allreduce(y, axes, "MAX")


def write_at(
    x: mtf.Tensor,
    value: mtf.Tensor,
    position: mtf.Tensor,
    dim: mtf.Dimension,
    *,
    may_overwrite: bool = False,
    is_inside: bool = False,
    name: str = "write_at",
) -> mtf.Tensor:
    """`x` with `value` written at index `position` along `dim`.

    Args:
      x: mtf.Tensor with `dim` among its dims.
      value: mtf.Tensor of x's dtype, its dims among those of `x` without `dim`.
      position: int32 mtf.Tensor, its dims among those of `x` without `dim`; an
        index outside `dim` writes nothing.
      dim: mtf.Dimension of `x`.
      may_overwrite: whether the memory of `x` may be written to, which saves a
        pass over it where the backend can. For an `x` that is computed anew in
        every run (no constant, no variable) and read no more, or only by what
        `value` depends on (in a loop: all that read it in earlier rounds); and
        a position that is inside `dim`.
      is_inside: whether position is known to be inside `dim`.

    Returns:
      mtf.Tensor like `x`. No gradient flows through it.
    """
    return _WriteOperation(x, value, position, dim, may_overwrite, is_inside, name).outputs[0]


class _WriteOperation(MeshOperation):
    def __init__(
        self,
        x: mtf.Tensor,
        value: mtf.Tensor,
        position: mtf.Tensor,
        dim: mtf.Dimension,
        may_overwrite: bool,
        is_inside: bool,
        name: str,
    ) -> None:
        rest = [d for d in x.shape.dims if d != dim]
        for what, t in (("value", value), ("position", position)):
            if dim not in x.shape.dims or any(d not in rest for d in t.shape.dims):
                raise ValueError(
                    f"write_at: {what} {t.shape} along {dim} of {x.shape}; its dims must be among the rest"
                )
        super().__init__([x, value, position], [(x.shape, x.dtype)], name)
        self._dim = dim
        self._may_overwrite = may_overwrite
        self._is_inside = is_inside or may_overwrite

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        x, value, position = self.inputs
        shape, axis = x.shape, x.shape.dims.index(self._dim)
        slice_shape = mesh_impl.slice_shape(shape)
        size, lead, rest = slice_shape[axis], slice_shape[:axis], slice_shape[axis + 1 :]
        columns = mtf.Shape(shape.dims[:axis])  # position may have no dim behind `dim`, to write whole rows
        n_leading = len(self.inputs[2].shape.dims)
        leading = mtf.Shape(columns.dims[:n_leading])

        def select(old: tf.Tensor, new: tf.Tensor, position: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
            at = tf.reshape(tf.range(size) + pcoord * size, [size] + [1] * len(rest))
            here = tf.equal(at, align(position, self.inputs[2].shape, shape))
            return tf.where_v2(here, align(new, value.shape, shape), old)

        def overwrite(
            old: tf.Tensor, new: tf.Tensor, position: tf.Tensor, pcoord: tf.Tensor | None = None
        ) -> tf.Tensor:
            """By rows of what stands behind `dim`."""
            count = int(np.prod(lead))
            position = align(position, self.inputs[2].shape, columns)
            first = np.reshape(np.arange(count, dtype=np.int32) * size, lead)
            flat = tf.reshape(old, [count * size, -1])
            new = tf.broadcast_to(align(new, value.shape, shape - self._dim), lead + rest)
            if pcoord is None:
                row = tf.reshape(first + position, [count])
                new = tf.reshape(new, [count, -1])
            else:  # a shard that does not hold the position writes what is there already
                position -= pcoord * size
                inside = tf.broadcast_to(tf.logical_and(position >= 0, position < size), lead)
                row = tf.reshape(first + tf.clip_by_value(position, 0, size - 1), [count])
                new = tf.where_v2(tf.reshape(inside, [count, 1]), tf.reshape(new, [count, -1]), tf.gather(flat, row))
            return tf.reshape(tf.raw_ops.InplaceUpdate(x=flat, i=row, v=new), slice_shape)

        def update_rows(old: tf.Tensor, new: tf.Tensor, position: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
            """Row by row, which XLA does in place; `select` passes over all of x."""
            within = lead[n_leading:]
            flat = tf.reshape(old, [-1, *within, size, *rest])
            new = tf.reshape(
                tf.broadcast_to(align(new, value.shape, shape - self._dim), lead + rest), [-1, 1, *within, 1, *rest]
            )
            at = tf.reshape(align(position, self.inputs[2].shape, leading), [-1]) - pcoord * size
            zeros = [[0] * len(within), [0] * len(rest)]
            for row in range(size_of(flat, 0)):
                if is_inside:
                    flat = xla.update_slice(flat, new[row], [row, *zeros[0], at[row], *zeros[1]])
                    continue
                held = tf.logical_and(at[row] >= 0, at[row] < size)
                begin = [row, *zeros[0], tf.clip_by_value(at[row], 0, size - 1), *zeros[1]]
                kept = tf.slice(flat, begin, [1, *within, 1, *rest])
                flat = xla.update_slice(flat, tf.where_v2(held, new[row], kept), begin)
            return tf.reshape(flat, slice_shape)

        # XLA, which may compile a tf.function, has no in-place update, and finds out by itself.
        in_place = self._may_overwrite and isinstance(mesh_impl, PlacementMeshImpl) and not is_in_function()
        in_place = in_place and all(d in columns.dims for d in position.shape.dims)
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._dim)
        is_inside = self._is_inside and mesh_axis is None
        parts = [] if mesh_axis is None else [mesh_impl.laid_out_pcoord(mesh_axis)]
        write = overwrite if in_place else select
        by_rows = xla.is_compiled(lowering) or (xla.is_core_program(mesh_impl) and leading == columns)
        if by_rows and set(position.shape.dims) == set(leading.dims):
            write = update_rows
        y = mesh_impl.slicewise(write, *(lowering.tensors[t] for t in self.inputs), *parts)
        lowering.set_tensor_lowering(self.outputs[0], y)


def resize(x: mtf.Tensor, dim: mtf.Dimension, size: int, name: str = "resize") -> mtf.Tensor:
    """The first `size` entries along `dim`, with zeros where it has fewer.

    Args:
      x: mtf.Tensor, finite where a layout splits `dim` (the whole dim then visits
        every processor).
      dim: mtf.Dimension of x.
      size: int.

    Returns:
      mtf.Tensor, `dim` of another size and the same name. No gradient flows through it.
    """
    return x if size == dim.size else _ResizeOperation(x, dim, size, name).outputs[0]


class _ResizeOperation(MeshOperation):
    def __init__(self, x: mtf.Tensor, dim: mtf.Dimension, size: int, name: str) -> None:
        super().__init__([x], [(x.shape.resize_dimension(dim.name, size), x.dtype)], name)
        self._axis = x.shape.dims.index(dim)
        self._dims = dim, mtf.Dimension(dim.name, size)

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        (dim, new_dim), axis = self._dims, self._axis
        x = lowering.tensors[self.inputs[0]].to_laid_out_tensor()
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(dim)
        part = mesh_impl.slice_shape(self.outputs[0].shape)[axis]

        def cut_or_fill(x: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
            missing = new_dim.size - dim.size
            if missing > 0:
                x = tf.pad(x, [[0, missing if i == axis else 0] for i in range(x.shape.rank)])
            begin = [pcoord * part if i == axis else 0 for i in range(x.shape.rank)]
            return tf.slice(x, begin, [part if i == axis else n for i, n in enumerate(x.shape.as_list())])

        move = gpu.moving(mesh_impl, cut_or_fill)
        if mesh_axis is None:
            y = mesh_impl.slicewise(move, x)
        else:
            whole = mesh_impl.allconcat(x, mesh_axis, axis)
            y = mesh_impl.slicewise(move, whole, mesh_impl.laid_out_pcoord(mesh_axis))
        lowering.set_tensor_lowering(self.outputs[0], y)


def repeat(x: mtf.Tensor, dim: mtf.Dimension, times: int, name: str = "repeat") -> mtf.Tensor:
    """Each entry along `dim` repeated `times` times in a row.

    Args:
      x: mtf.Tensor.
      dim: mtf.Dimension; an x without it comes back as it is.
      times: int.

    Returns:
      mtf.Tensor, `dim` of `times` its size and the same name. No gradient flows through it.
    """
    return _RepeatOperation(x, dim, times, name).outputs[0] if dim in x.shape.dims else x


class _RepeatOperation(MeshOperation):
    def __init__(self, x: mtf.Tensor, dim: mtf.Dimension, times: int, name: str) -> None:
        super().__init__([x], [(x.shape.resize_dimension(dim.name, dim.size * times), x.dtype)], name)
        self._axis, self._times = x.shape.dims.index(dim), times

    def lower(self, lowering: mtf.Lowering) -> None:
        repeat = functools.partial(tf.repeat, repeats=self._times, axis=self._axis)
        # a processor that holds some of the entries holds what becomes of them
        mesh_impl, x = lowering.mesh_impl(self), lowering.tensors[self.inputs[0]].to_laid_out_tensor()
        y = mesh_impl.slicewise(gpu.moving(mesh_impl, repeat), x)
        lowering.set_tensor_lowering(self.outputs[0], y)


def host_call(
    fn: Callable[..., np.ndarray], xs: Sequence[mtf.Tensor], name: str = "host_call", shape: ShapeLike | None = None
) -> mtf.Tensor:
    """Calls a Python function with the values of tensors at each run of the graph (in a loop: at each iteration).

    Args:
      fn: a function of as many ndarrays as there are tensors, that returns a float32 one.
      xs: mtf.Tensors.
      name: what asks for it, for the error.
      shape: mtf.Shape of what it returns; by default that of the first tensor.

    Returns:
      float32 mtf.Tensor of that shape.

    Raises:
      ValueError: when it is lowered, unless the mesh is of this process's CPUs and GPUs.
    """
    return _HostCallOperation(fn, xs, name, mtf.Shape(xs[0].shape if shape is None else shape)).outputs[0]


class _HostCallOperation(MeshOperation):
    def __init__(self, fn: Callable[..., np.ndarray], xs: Sequence[mtf.Tensor], name: str, shape: mtf.Shape) -> None:
        super().__init__(xs, [(shape, tf.float32)], name)
        self._fn = fn

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        if not isinstance(mesh_impl, PlacementMeshImpl):
            raise ValueError(f"{self.name}: a mesh of CPUs or GPUs is needed, not a {type(mesh_impl).__name__}")
        (y,) = self.outputs
        values = [mesh_impl.export_to_tf_tensor(x, lowering.tensors[x].to_laid_out_tensor()) for x in self.inputs]
        with tf.device("/cpu:0"):
            result = tf.numpy_function(self._fn, values, tf.float32)
        result = tf.ensure_shape(result, y.shape.to_integer_list)
        lowering.set_tensor_lowering(y, mesh_impl.import_tf_tensor(y, result))


# --- Control flow over laid-out tensors -----------------------------------------


def laid_out_cond(
    mesh_impl: mtf.MeshImpl, flag: tf.Tensor, if_set: Callable[[], Any], if_not: Callable[[], Any]
) -> Any:
    """`tf.cond` whose branches return laid-out tensors.

    Args:
      mesh_impl: mtf.MeshImpl.
      flag: scalar float32 tf.Tensor, 0.0 or 1.0 (see `sharded_rows.any_of`).
      if_set, if_not: functions without arguments, both to a nest of the same structure, of laid-out tensors and
        tf.Tensors.

    Returns:
      such a nest.
    """
    found = []

    def slices_of(branch: Callable[[], Any]) -> list[tf.Tensor]:
        found.append(branch())
        return _slices(mesh_impl, found[-1])

    slices = tf.cond(flag > 0.5, lambda: slices_of(if_set), lambda: slices_of(if_not))
    return _with_slices(mesh_impl, found[-1], tf.nest.flatten(slices))


def laid_out_while_loop(
    mesh_impl: mtf.MeshImpl, condition: Callable[..., tf.Tensor], body: Callable[..., Any], start: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`tf.while_loop` over laid-out tensors.

    Args:
      mesh_impl: mtf.MeshImpl.
      condition: a function of the loop variables to a scalar bool tf.Tensor.
      body: a function of the loop variables to a tuple of their next values.
      start: tuple of the first ones, each a laid-out tensor or a tf.Tensor.

    Returns:
      a tuple of the last ones.
    """
    variables = functools.partial(_with_slices, mesh_impl, start)
    slices = tf.while_loop(
        lambda *slices: condition(*variables(slices)),
        lambda *slices: _slices(mesh_impl, body(*variables(slices))),
        _slices(mesh_impl, start),
    )
    return variables(tf.nest.flatten(slices))


def _slices(mesh_impl: mtf.MeshImpl, nest: Any) -> list[tf.Tensor]:
    """All slices of a nest of laid-out tensors and tf.Tensors."""
    flat = tf.nest.flatten(nest)
    return tf.nest.flatten([x.tensor_list if isinstance(x, mesh_impl.LaidOutTensor) else x for x in flat])


def _with_slices(mesh_impl: mtf.MeshImpl, nest: Any, slices: Iterable[tf.Tensor]) -> Any:
    """The nest with other slices, in the order of `_slices`."""
    remaining = iter(slices)

    def replaced(x: Any) -> Any:
        if not isinstance(x, mesh_impl.LaidOutTensor):
            return next(remaining)
        return mesh_impl.LaidOutTensor.from_tensor_list([next(remaining) for _ in x.tensor_list])

    return tf.nest.map_structure(replaced, nest)


# --- Values that come as Python numbers or as tensors -------------------------


def import_rows(mesh: mtf.Mesh, value: RowValue, dtype: tf.DType, rows: ShapeLike, name: str) -> mtf.Tensor:
    """An option as an mtf tensor: one value for all rows, or one a row.

    Args:
      mesh: mtf.Mesh.
      value: a number; an array, list or tf.Tensor that is scalar or has the
        shape of `rows`; or an mtf.Tensor whose dims are among `rows`.
      dtype: the tf.DType wanted.
      rows: mtf.Shape, the dims of the request.
      name: what the option is called, for the error.

    Returns:
      mtf.Tensor of `dtype`, scalar or with dims among `rows`.

    Raises:
      ValueError: for a shape that is neither, True, False or anything else that is not a number, and for int32 a
        number that is not whole or does not fit.
    """
    rows = mtf.Shape(rows)
    listed = value if isinstance(value, (list, tuple)) else [value]
    if not any(isinstance(v, (mtf.Tensor, tf.Tensor)) for v in listed):
        value = _checked_numbers(np.asarray(value), dtype, name)
    value = value if isinstance(value, mtf.Tensor) else tf.convert_to_tensor(value)
    if not (value.dtype.is_integer or value.dtype.is_bool or value.dtype.is_floating):
        raise ValueError(f"{name} is of dtype {value.dtype.name}; {dtype.name} is needed")
    if isinstance(value, mtf.Tensor):
        if any(d not in rows.dims for d in value.shape.dims):
            raise ValueError(f"{name} has shape {value.shape}; its dims must be among those of the rows, {rows}")
        return value if value.dtype == dtype else mtf.cast(value, dtype)
    value = tf.cast(value, dtype)
    shape = value.shape.as_list()
    if shape == []:
        return mtf.import_tf_tensor(mesh, value, mtf.Shape([]))
    if shape != rows.to_integer_list:
        raise ValueError(f"{name} has shape {shape}; it must be one value, or one a row: {rows}")
    return mtf.import_tf_tensor(mesh, value, rows)


def _checked_numbers(values: np.ndarray, dtype: tf.DType, name: str) -> np.ndarray:
    if values.dtype.kind in "bOSUM":
        raise ValueError(f"{name} holds {(values.ravel().tolist() or [values])[0]!r}; numbers are needed")
    if dtype.is_integer and values.dtype.kind in "iuf":
        wrong = values[~(np.isfinite(values) & (np.floor(values) == values))]
        if wrong.size:
            raise ValueError(f"{name}={wrong[0].item()!r}; whole numbers are needed")
        wrong = values[(values < dtype.min) | (values > dtype.max)]
        if wrong.size:
            raise ValueError(f"{name}={wrong[0].item()!r}; from {dtype.min} to {dtype.max} is allowed")
    return values


def row_index(mesh: mtf.Mesh, rows: ShapeLike) -> mtf.Tensor:
    """int32 [rows]: each row's index in the request, counted in row-major order."""
    rows = mtf.Shape(rows)
    index, stride = mtf.zeros(mesh, rows, tf.int32), 1
    for d in reversed(rows.dims):
        index = cwise_broadcast(
            lambda i, r, stride=stride: i + r * stride, [index, mtf.range(mesh, d, tf.int32)], rows, name="row_index"
        )
        stride *= d.size
    return index

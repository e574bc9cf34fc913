"""The largest entries of a row, and which they are: the same on every backend and layout, ties among them."""

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh import xla
from gpt_neo_sampling.mesh.ops import MeshOperation, finite, laid_out_cond, pad_last, size_of
from gpt_neo_sampling.sampling.top_k_selection import select_largest, selects


def has_invalid(x: tf.Tensor, axis: int = -1, keepdims: bool = False) -> tf.Tensor:
    """float32, 1.0 where a slice along `axis` holds NaN or +inf, else 0.0.

    NaN is found by the sum, as XLA's maximum misses it on CPUs; only where the sum is NaN, which −inf and overflow can
    cause too, are the entries looked at one by one.
    """

    def look() -> tf.Tensor:
        return tf.reduce_max(tf.cast(tf.is_nan(x), tf.float32), axis, keepdims)

    top, total = tf.reduce_max(x, axis, keepdims), tf.reduce_sum(tf.cast(x, tf.float32), axis, keepdims)
    nan = tf.cond(tf.reduce_any(tf.is_nan(total)), look, lambda: tf.zeros_like(total))
    return tf.where_v2(tf.logical_or(nan > 0, top >= np.inf), 1.0, 0.0)


def first_argmax(x: mtf.Tensor, dim: mtf.Dimension) -> mtf.Tensor:
    """Index of the largest entry along `dim`, the first of equal ones.

    Args:
      x: mtf.Tensor of a floating dtype.
      dim: mtf.Dimension of x.

    Returns:
      int32 mtf.Tensor [x.shape − dim]; −1 for a row that holds NaN or +inf, or
      nothing but −inf.
    """
    return _FirstArgmaxOperation(x, dim).outputs[0]


class _FirstArgmaxOperation(MeshOperation):
    def __init__(self, x: mtf.Tensor, dim: mtf.Dimension) -> None:
        super().__init__([x], [(x.shape - dim, tf.int32)], "first_argmax")
        self._dim = dim

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        (x,) = self.inputs
        axis = x.shape.dims.index(self._dim)
        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._dim)
        shards = 1 if mesh_axis is None else mesh_impl.shape[mesh_axis].size
        local_size = self._dim.size // shards
        if xla.is_core_program(mesh_impl):
            found = _first_argmax_on_core(mesh_impl, lowering.tensors[x], axis, mesh_axis)
            lowering.set_tensor_lowering(self.outputs[0], found)
            return

        def local(x: tf.Tensor, pcoord: tf.Tensor | int = 0) -> tf.Tensor:
            """[rows, 1, 4]: the shard's largest, its global index, whether it is wrong, whether it is right.

            Finite, as some meshes' collectives multiply by 0 and 1.
            """
            x = tf.cast(x, tf.float32)
            top, wrong = tf.reduce_max(x, axis), has_invalid(x, axis)
            right = tf.where_v2(top > -np.inf, 1.0, 0.0)
            index = tf.argmax(x, axis, output_type=tf.int32) + pcoord * local_size
            # indices are exact in float32: a dimension has fewer than 2²⁴ entries
            found = [finite(top), index, wrong, right]
            return tf.expand_dims(tf.stack([tf.cast(f, tf.float32) for f in found], -1), -2)

        def choose(found: tf.Tensor) -> tf.Tensor:
            best = tf.argmax(found[..., 0], -1, output_type=tf.int32)
            index = tf.gather(found[..., 1], best, batch_dims=found.shape.rank - 2)
            valid = tf.logical_and(tf.reduce_max(found[..., 2], -1) < 0.5, tf.reduce_max(found[..., 3], -1) > 0.5)
            return tf.where_v2(valid, tf.cast(index, tf.int32), -1)

        if mesh_axis is None:
            found = mesh_impl.slicewise(local, lowering.tensors[x])
        else:
            found = mesh_impl.slicewise(local, lowering.tensors[x], mesh_impl.laid_out_pcoord(mesh_axis))
            found = mesh_impl.allconcat(found, mesh_axis, x.shape.ndims - 1)
        lowering.set_tensor_lowering(self.outputs[0], mesh_impl.slicewise(choose, found))


def _first_argmax_on_core(mesh_impl: mtf.MeshImpl, x: LaidOut, axis: int, mesh_axis: int | None) -> LaidOut:
    """`first_argmax` of laid-out slices along their `axis`, which `mesh_axis` splits, in few kernels."""

    def largest_of(values: tf.Tensor, at: tf.Tensor, axis: int) -> xla.Values:
        """(the largest, +inf for NaN; the first of those that equal it; and that, or −1 if the row is invalid)."""
        values = tf.where_v2(values < np.inf, values, np.inf)
        starts = [-np.inf, np.iinfo(np.int32).max, -1]
        return xla.reduce_together([values, at, _index_if_valid(values, at)], starts, [axis], _larger)

    def local(x: tf.Tensor, pcoord: tf.Tensor | int = 0) -> xla.Values:
        x, size = tf.cast(x, tf.float32), size_of(x, axis)
        at = tf.reshape(tf.range(size) + pcoord * size, [-1] + [1] * (x.shape.rank - 1 - axis))
        return largest_of(x, tf.broadcast_to(at, x.shape), axis)

    def choose(values: tf.Tensor, at: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
        values = tf.where_v2(indices < 0, values * np.inf, values)  # as they were before they travelled
        return largest_of(values, tf.cast(at, tf.int32), values.shape.rank - 1)[2]

    if mesh_axis is None:
        return mesh_impl.slicewise(lambda x: local(x)[2], x)
    found = mesh_impl.slicewise(local, x, mesh_impl.laid_out_pcoord(mesh_axis))
    return mesh_impl.slicewise(choose, *xla.concat_shards(mesh_impl, found, mesh_axis))


def _larger(a: xla.Values, b: xla.Values) -> xla.Values:
    """Of two triples as `_first_argmax_on_core` reduces, the larger; of equal ones, the first.

    −inf counts as the lowest number, but a row of nothing else is told apart.
    """
    first, second = tf.maximum(a[0], tf.float32.min), tf.maximum(b[0], tf.float32.min)
    is_second = tf.logical_or(second > first, tf.logical_and(tf.equal(second, first), b[1] < a[1]))
    value, at = tf.maximum(a[0], b[0]), tf.where_v2(is_second, b[1], a[1])
    return value, at, _index_if_valid(value, at)


def _index_if_valid(value: tf.Tensor, at: tf.Tensor) -> tf.Tensor:
    return tf.where_v2(tf.abs(value) < np.inf, at, -1)


def chunk_size(size: int) -> int:
    """The size of the chunks of a row of `size` entries: a divisor if there is one, which avoids a padded copy."""
    return next((n for n in range(48, 15, -1) if size % n == 0), 32)


def largest(x: tf.Tensor, k: int, in_chunks: bool = True) -> tuple[tf.Tensor, tf.Tensor]:
    """The k largest entries of each row and their indices, in order.

    In two stages: the k largest lie in those k contiguous chunks whose own
    largest entries are the k largest of all chunks' (of equal ones the first),
    so only these are sorted entry by entry.

    Args:
      x: a tf.Tensor [rows, n] of a floating dtype.
      k: int, at most n.
      in_chunks: False for a sort of whole rows at once, which is slower, of less code.

    Returns:
      (values, indices) [rows, k], of x's dtype and int32. Among equal entries the
      lower index comes first; −0.0 counts as 0.0, and −inf as the lowest finite number.
      A row with NaN or +inf has NaN for all its values.
    """

    def sortable(x: tf.Tensor) -> tf.Tensor:
        """−0.0, which XLA's sort puts below 0.0, becomes 0.0, and so does NaN, whose row is invalid."""
        return tf.where_v2(tf.abs(x) > 0, tf.maximum(x, x.dtype.min), tf.zeros_like(x))

    def top_k_of(x: tf.Tensor, k: int) -> tf.Tensor:
        if k == 1:  # TPUs are slow at top_k
            return tf.argmax(x, -1, output_type=tf.int32)[:, tf.newaxis]
        return tf.math.top_k(x, k)[1]

    size = size_of(x, 1)
    chunk = chunk_size(size)
    n_chunks = -(-size // chunk)
    if n_chunks <= 2 * k or not in_chunks:
        candidates = x
        indices = at = top_k_of(sortable(x), k)
    else:
        chunks = tf.reshape(pad_last(x, after=n_chunks * chunk - size, value=-np.inf), [-1, n_chunks, chunk])
        best = top_k_of(sortable(tf.reduce_max(chunks, -1)), k)
        best = -tf.math.top_k(-best, k)[0]  # ascending: of equal entries, the lower index stays the first
        candidates = tf.reshape(tf.gather(chunks, best, batch_dims=1), [-1, k * chunk])
        at = top_k_of(sortable(candidates), k)
        indices = tf.gather(best, at // chunk, batch_dims=1) * chunk + at % chunk
    values = tf.gather(candidates, at, batch_dims=1)
    return tf.where_v2(has_invalid(x, keepdims=True) > 0, tf.constant(np.nan, x.dtype), values), indices


def scatter_rows(values: tf.Tensor, indices: tf.Tensor, size: int) -> tf.Tensor:
    """[rows, size] with values [rows, n] at their indices, no two of a row equal, and 0 elsewhere."""
    n_rows, n = values.shape.as_list()
    at = tf.reshape(indices + tf.range(n_rows)[:, tf.newaxis] * size, [-1, 1])
    return tf.reshape(tf.scatter_nd(at, tf.reshape(values, [-1]), [n_rows * size]), [n_rows, size])


def top_k(x: mtf.Tensor, dim: mtf.Dimension, k_dim: mtf.Dimension) -> tuple[mtf.Tensor, mtf.Tensor]:
    """The k_dim.size largest entries along `dim` and their indices, in order.

    Among equal entries the lower index comes first, on any layout. A layout
    that splits `dim` moves k candidates a row and shard. (mtf's own `top_k` is
    wrong for k of 2 to 4 on rows that hold masked values; this is the operation
    under it, with `largest` in each shard.)

    Args:
      x: mtf.Tensor of a floating dtype.
      dim: mtf.Dimension of x.
      k_dim: mtf.Dimension, no larger than `dim`.

    Returns:
      (values, indices): mtf.Tensors [x.shape − dim + k_dim], x.dtype and int32.
      −inf counts as the lowest finite number; a row that holds NaN or +inf has NaN
      for all its values.
    """
    return tuple(_TopKOperation(x, dim, k_dim).outputs)


class _TopKOperation(mtf.ops.TopKOperation):
    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        (x,) = self.inputs
        k, axis = self._k_dim.size, x.shape.dims.index(self._reduced_dim)
        rest = x.shape - self._reduced_dim

        def in_rows(x: tf.Tensor) -> tf.Tensor:
            x = tf.transpose(x, [i for i in range(x.shape.rank) if i != axis] + [axis])
            return tf.reshape(x, [-1, size_of(x, -1)])

        mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(self._reduced_dim)
        rows = mesh_impl.slicewise(in_rows, lowering.tensors[x])
        found = largest_of_rows(mesh_impl, rows, k, mesh_axis, rest)
        for output, value in zip(self.outputs, found):
            shape = mesh_impl.slice_shape(rest) + [k]
            lowering.set_tensor_lowering(output, mesh_impl.slicewise(lambda v, s=shape: tf.reshape(v, s), value))


def largest_of_rows(
    mesh_impl: mtf.MeshImpl, x: LaidOut, k: int, mesh_axis: int | None, rest: mtf.Shape
) -> tuple[LaidOut, LaidOut]:
    """`largest` of laid-out rows.

    Args:
      mesh_impl: mtf.MeshImpl.
      x: laid-out [rows, entries] of a floating dtype.
      k: int, at most all entries of a row.
      mesh_axis: the mesh axis that splits the entries, or None.
      rest: mtf.Shape, the dims of the rows.

    Returns:
      (values, indices): laid-out [rows, k].
    """
    entries, dtype = x.slice_shape[1], x.tensor_list[0].dtype
    selected = dtype == tf.float32 and selects(mesh_impl, entries, k, mesh_axis)

    def local(x: tf.Tensor, pcoord: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        # a way that is rarely taken has little code
        values, indices = largest(x, min(k, entries), in_chunks=mesh_axis is not None or not selected)
        if pcoord is None:
            return values, indices
        # Finite, to travel: at NaN the index is −1, and at −inf it is taken from −2.
        indices += pcoord * entries
        indices = tf.where_v2(values < x.dtype.min, -2 - indices, tf.where_v2(tf.is_nan(values), -1, indices))
        return finite(values), indices

    def choose(values: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        invalid = tf.reduce_max(tf.cast(tf.equal(indices, -1), tf.int32), -1, keepdims=True) > 0
        values, at = tf.math.top_k(values, k)
        indices = tf.gather(indices, at, batch_dims=1)
        values = tf.where_v2(indices < -1, tf.constant(-np.inf, dtype), values)
        values = tf.where_v2(invalid, tf.constant(np.nan, dtype), values)
        return values, tf.maximum(indices, -2 - indices)

    def by_sorting() -> tuple[LaidOut, LaidOut]:
        if mesh_axis is None:
            return mesh_impl.slicewise(local, x)
        found = mesh_impl.slicewise(local, x, mesh_impl.laid_out_pcoord(mesh_axis))
        return mesh_impl.slicewise(choose, *(mesh_impl.allconcat(f, mesh_axis, 1) for f in found))

    if not selected:
        return by_sorting()
    values, indices, doubt = select_largest(mesh_impl, x, k, mesh_axis)
    doubt = mesh_impl.slicewise(tf.reduce_max, doubt)
    if mesh_axis is not None:  # all cores sort, or none: they send each other what they find
        axes = (mesh_impl.tensor_dimension_to_mesh_axis(d) for d in rest.dims)
        doubt = mesh_impl.allreduce(doubt, sorted(axis for axis in axes if axis is not None), "SUM")
    return laid_out_cond(mesh_impl, doubt.tensor_list[0], by_sorting, lambda: (values, indices))

"""Operations of XLA that TensorFlow has no kernel for: for a TPU core's program, which XLA always compiles.

A TPU takes about as long for a small kernel as for one over a whole row, so samplers are written for few kernels: one
reduction that keeps several numbers, where TensorFlow on a CPU takes several.
"""

import functools
import types
from collections.abc import Callable, Sequence

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, tensorflow, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows

Values = tuple[tf.Tensor, ...]


def is_core_program(mesh_impl: mtf.MeshImpl) -> bool:
    """Whether a mesh is lowered to one core's program, which XLA compiles; else it is placed on CPUs and GPUs."""
    return not isinstance(mesh_impl, PlacementMeshImpl)


@functools.cache
def _ops() -> types.ModuleType:
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops  # only here: most programs need none of them

    return gen_xla_ops


def reduce_together(
    operands: Sequence[tf.Tensor],
    starts: Sequence[float | int],
    axes: Sequence[int],
    combine: Callable[[Values, Values], Values],
) -> Values:
    """Reduces several tensors of one shape in one pass, in an order of the backend's choice.

    Args:
      operands: tf.Tensors of the same shape.
      starts: for each, the number that `combine` starts from; it may be combined more than once.
      axes: that are reduced.
      combine: an associative function of two tuples of scalars to such a tuple.

    Returns:
      a tuple of tf.Tensors without the axes.
    """
    n = len(operands)
    specs = [tensorflow.TensorSpec([], x.dtype) for x in operands] * 2
    reducer = tensorflow.function(lambda *xs: tuple(combine(xs[:n], xs[n:])), autograph=False)
    initial = [tf.constant(start, x.dtype) for start, x in zip(starts, operands, strict=True)]
    return tuple(
        _ops().xla_variadic_reduce_v2(
            operands, initial, dimensions_to_reduce=list(axes), reducer=reducer.get_concrete_function(*specs)
        )
    )


def add_each(a: Values, b: Values) -> Values:
    """To combine with in `reduce_together`."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def kept_together(*xs: tf.Tensor) -> Values:
    """The same tensors, which XLA computes before what depends on them, in one place and once."""
    return tuple(_ops().xla_optimization_barrier(list(xs)))


def prefix_sums(x: tf.Tensor) -> tf.Tensor:
    """Inclusive sums of float32 [rows, n] along the last axis.

    By a product with a triangle, of three parts of 8 bits, which a TPU's matrix unit takes without rounding (bfloat16)
    and adds up in float32.
    """
    from tensorflow.compiler.xla import xla_data_pb2

    def leading(x: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), tf.constant(-(2**16))), tf.float32)

    rows, n = x.shape.as_list()
    up_to = tf.cast(tf.range(n)[:, tf.newaxis] <= tf.range(n), tf.bfloat16)
    first = leading(x)
    second = leading(x - first)
    parts = (tf.pad(p, [[0, -rows % 8], [0, 0]]) for p in (first, second, (x - first) - second))  # to whole tiles
    axes = xla_data_pb2.DotDimensionNumbers(lhs_contracting_dimensions=[1], rhs_contracting_dimensions=[0])
    products = [
        _ops().xla_dot_v2(
            tf.cast(part, tf.bfloat16), up_to, dimension_numbers=axes.SerializeToString(), precision_config="",
            preferred_element_type=tf.float32,
        )
        for part in parts
    ]  # fmt: skip
    return sum(products)[:rows]


def whole_axis(rows: ShardedRows, x: LaidOut) -> LaidOut:
    """Laid-out float32 [rows, n of a shard] as [rows, n of all shards]; XLA sends several of them together."""
    if rows.mesh_axis is None:
        return x
    n_shards = rows.mesh_impl.shape[rows.mesh_axis].size

    def place(x: tf.Tensor, pcoord: tf.Tensor) -> tf.Tensor:
        n_rows, n = x.shape.as_list()
        return _ops().xla_dynamic_update_slice(tf.zeros([n_rows, n * n_shards]), x, tf.stack([0, pcoord * n]))

    return rows.across_shards(rows.mesh_impl.slicewise(place, x, *rows.pcoords()), "SUM")


def largest_of_cores(rows: ShardedRows, x: LaidOut) -> tf.Tensor:
    """The largest of laid-out finite numbers, a scalar: on all cores that must take the same branches.

    Those are the cores that exchange parts of rows. A core whose rows are whole goes by its own.
    """
    x = rows.mesh_impl.slicewise(tf.reduce_max, x)
    others = [axis for axis in range(rows.mesh_impl.ndims) if axis != rows.mesh_axis]
    if rows.mesh_axis is not None and others:
        x = rows.mesh_impl.allreduce(x, others, "MAX")
    return x.tensor_list[0]

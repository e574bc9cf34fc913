"""Operations of XLA that TensorFlow has no kernel for: for a TPU core's program, which XLA always compiles.

A TPU takes about as long for a small kernel as for one over a whole row, so samplers are written for few kernels: one
reduction that keeps several numbers, where TensorFlow on a CPU takes several.
"""

from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import PlacementMeshImpl, matmul_axes, mtf, tensorflow, tf, xla_ops
from gpt_neo_sampling._types import LaidOut

Values = tuple[tf.Tensor, ...]


def is_core_program(mesh_impl: mtf.MeshImpl) -> bool:
    """Whether a mesh is lowered to one core's program, which XLA compiles; else it is placed on CPUs and GPUs."""
    return not isinstance(mesh_impl, PlacementMeshImpl)


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
        xla_ops().xla_variadic_reduce_v2(
            operands, initial, dimensions_to_reduce=list(axes), reducer=reducer.get_concrete_function(*specs)
        )
    )


def add_each(a: Values, b: Values) -> Values:
    """To combine with in `reduce_together`."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def kept_together(*xs: tf.Tensor) -> Values:
    """The same tensors, which XLA computes before what depends on them, in one place and once."""
    return tuple(xla_ops().xla_optimization_barrier(list(xs)))


def prefix_sums(x: tf.Tensor, short_code: bool = False) -> tf.Tensor:
    """Inclusive sums of float32 [rows, n] along the last axis.

    By a product with a triangle, of three parts of 8 bits, which a TPU's matrix unit takes without rounding (bfloat16)
    and adds up in float32. The triangle is in the program, 1.2 MB for 786 entries, or with `short_code` computed anew.
    """

    def leading(x: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), tf.constant(-(2**16))), tf.float32)

    def sums(x: tf.Tensor) -> tf.Tensor:
        return xla_ops().xla_dot_v2(
            tf.cast(x, tf.bfloat16), up_to, dimension_numbers=matmul_axes(), precision_config="",
            preferred_element_type=tf.float32,
        )  # fmt: skip

    rows, n = x.shape.as_list()
    at = tf.range(n)
    (at,) = kept_together(at) if short_code else (at,)  # what XLA knows all of it computes ahead
    up_to = tf.cast(at[:, tf.newaxis] <= at, tf.bfloat16)
    first = leading(x)
    second = leading(x - first)
    parts = [first, second, (x - first) - second]
    if short_code:  # one product, for one triangle
        first, second, third = tf.split(sums(tf.concat(parts, 0)), 3, 0)
        return first + second + third
    return sum(sums(tf.pad(part, [[0, -rows % 8], [0, 0]])) for part in parts)[:rows]  # whole tiles


def update_slice(x: tf.Tensor, values: tf.Tensor, begin: Sequence[tf.Tensor | int]) -> tf.Tensor:
    """x with `values` from the indices `begin` on, int32 scalars, one for each of x's axes; inside x."""
    return xla_ops().xla_dynamic_update_slice(x, values, tf.stack(begin))


def concat_shards(mesh_impl: mtf.MeshImpl, xs: Sequence[LaidOut], mesh_axis: int) -> tuple[LaidOut, ...]:
    """Laid-out [...] of each shard as [..., shards] on all processors, by one sum of all.

    Args:
      mesh_impl: mtf.MeshImpl.
      xs: laid-out tensors of one shape, float32 or int32 within ±2²⁴; no NaN.
      mesh_axis: the mesh axis of the shards.

    Returns:
      a tuple of laid-out float32, with ±inf as the largest and the lowest finite number, which can travel.
    """
    n, n_shards = len(xs), mesh_impl.shape[mesh_axis].size

    def in_place(pcoord: tf.Tensor, *xs: tf.Tensor) -> tf.Tensor:
        shape = xs[0].shape.as_list() + [n * n_shards]
        place = np.broadcast_to(np.arange(n * n_shards, dtype=np.int32), shape)  # of full rank: that makes no kernel
        y = 0.0
        for i, x in enumerate(xs):
            here = tf.where_v2(tf.equal(place - i * n_shards, pcoord), x[..., tf.newaxis], tf.constant(0, x.dtype))
            y += tf.clip_by_value(tf.cast(here, tf.float32), tf.float32.min, tf.float32.max)
        return y

    together = mesh_impl.slicewise(in_place, mesh_impl.laid_out_pcoord(mesh_axis), *xs)
    together = mesh_impl.allreduce(together, [mesh_axis], "SUM")
    return mesh_impl.slicewise(lambda y: tuple(tf.split(y, n, -1)), together)

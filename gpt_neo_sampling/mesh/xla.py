"""Operations of XLA that TensorFlow has no kernel for: for a TPU core's program, which XLA always compiles.

A TPU takes about as long for a small kernel as for one over a whole row, so samplers are written for few kernels: one
reduction that keeps several numbers, where TensorFlow on a CPU takes several.
"""

from collections.abc import Callable, Sequence

import numpy as np

from gpt_neo_sampling._compat import PlacementMeshImpl, dot_axes, mtf, tensorflow, tf, xla_ops
from gpt_neo_sampling._types import LaidOut

Values = tuple[tf.Tensor, ...]

_LANES = 128  # of a TPU's vector


def is_core_program(mesh_impl: mtf.MeshImpl) -> bool:
    """Whether a mesh is lowered to one core's program, which XLA compiles; else it is placed on CPUs and GPUs."""
    return not isinstance(mesh_impl, PlacementMeshImpl)


def is_compiled(lowering: mtf.Lowering) -> bool:
    """Whether what is lowered here is part of a `compiled.compiled`."""
    return getattr(lowering, "is_compiled", False)


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


def prefix_sums(x: tf.Tensor) -> tf.Tensor:
    """Inclusive sums of float32 [rows, n] along the last axis.

    By a product with a triangle, of three parts of 8 bits, which a TPU's matrix unit takes without rounding (bfloat16)
    and adds up in float32.
    """

    def leading(x: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), tf.constant(-(2**16))), tf.float32)

    def sums(x: tf.Tensor) -> tf.Tensor:
        return xla_ops().xla_dot_v2(
            tf.cast(x, tf.bfloat16), up_to, dimension_numbers=dot_axes([1], [0]), precision_config="",
            preferred_element_type=tf.float32,
        )  # fmt: skip

    (at,) = kept_together(
        tf.range(x.shape.as_list()[1])
    )  # or the triangle would be computed ahead, and stand in the code
    up_to = tf.cast(at[:, tf.newaxis] <= at, tf.bfloat16)
    first = leading(x)
    second = leading(x - first)
    parts = [first, second, (x - first) - second]
    first, second, third = tf.split(sums(tf.concat(parts, 0)), 3, 0)
    return first + second + third


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


def one_hot_moves(values: tf.Tensor, indices: tf.Tensor, size: int) -> tf.Tensor:
    """As `one_hot_sums`, of any finite numbers, of which at most one other than 0 goes to an entry; to the bit.

    In three parts of 8 bits, whose sums have no rounding.
    """
    moved, rest = None, values
    for _ in range(3):
        bits = tf.bitwise.bitwise_and(tf.bitcast(rest, tf.int32), tf.constant(-(2**16)))
        part = tf.bitcast(bits, tf.float32)
        rest = rest - part
        sums = one_hot_sums(part, indices, size)
        moved = sums if moved is None else moved + sums
    return moved


def one_hot_sums(values: tf.Tensor, indices: tf.Tensor, size: int) -> tf.Tensor:
    """Sums small whole numbers into the entries that their indices name, without a scatter, which goes one by one.

    As products of one-hot matrices of an index's high and low parts, which a TPU's matrix unit adds without rounding.

    Args:
      values: float32 [rows, n], whole numbers within ±256; sums up to 2²⁴ are exact.
      indices: int32 [rows, n]; one below 0 adds nothing, none may be `size` or more.
      size: int.

    Returns:
      float32 [rows, size].
    """
    rows, n_high = values.shape.as_list()[0], -(-size // _LANES)

    def one_hot(parts: tf.Tensor, n: int, values: tf.Tensor) -> tf.Tensor:
        """[rows, n, entries]: with what is summed over along lanes it is made within the product."""
        hit = tf.equal(parts[:, tf.newaxis], np.arange(n, dtype=np.int32)[:, np.newaxis])
        return tf.cast(tf.where_v2(hit, values[:, tf.newaxis], 0.0), tf.bfloat16)

    high = one_hot(tf.bitwise.right_shift(indices, _LANES.bit_length() - 1), n_high, values)
    low = one_hot(tf.bitwise.bitwise_and(indices, _LANES - 1), _LANES, tf.ones_like(values))
    sums = xla_ops().xla_dot_v2(
        high, low, dimension_numbers=dot_axes([2], [2], [0]), precision_config="", preferred_element_type=tf.float32
    )
    return tf.reshape(sums, [rows, n_high * _LANES])[:, :size]

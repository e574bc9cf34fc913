"""Operations of XLA that TensorFlow has no kernel for: for a TPU core's program, which XLA always compiles.

A TPU takes about as long for a small kernel as for one over a whole row, so samplers are written for few kernels: one
reduction that keeps several numbers, where TensorFlow on a CPU takes several.
"""

import functools
import types
from collections.abc import Callable, Sequence

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, tensorflow, tf

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


def kept_together(*xs: tf.Tensor) -> Values:
    """The same tensors, which XLA computes before what depends on them, in one place and once."""
    return tuple(_ops().xla_optimization_barrier(list(xs)))


def update_slice(x: tf.Tensor, values: tf.Tensor, begin: Sequence[tf.Tensor | int]) -> tf.Tensor:
    """x with `values` from the indices `begin` on, int32 scalars, one for each of x's axes; inside x."""
    return _ops().xla_dynamic_update_slice(x, values, tf.stack(begin))

"""Parts of a graph that XLA compiles as one program, on a mesh of one device."""

import copy
from collections.abc import Callable, Sequence

from gpt_neo_sampling._compat import PlacementMeshImpl, current_device, mtf, tensorflow, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.ops import MeshOperation


def compiled(mesh: mtf.Mesh, build: Callable[[], Sequence[mtf.Tensor]], name: str = "compiled") -> list[mtf.Tensor]:
    """What `build` makes, as one program, which XLA compiles when it first runs.

    Args:
      mesh: mtf.Mesh.
      build: a function without arguments to a sequence of mtf.Tensors. XLA must be able to compile what it adds to the
        graph: no call of a Python function.
      name: str.

    Returns:
      a list of mtf.Tensors like those that `build` returned. No gradient flows through them.

    Raises:
      ValueError: when it is lowered, unless the mesh is of one CPU or GPU.
    """
    operations, made = taken_out(mesh, build, lambda op: isinstance(op, mtf.Variable))
    return _CompiledOperation(operations, made, name, mesh).outputs


def taken_out(
    mesh: mtf.Mesh, build: Callable[[], Sequence[mtf.Tensor]], stays: Callable[[mtf.Operation], bool]
) -> tuple[list[mtf.Operation], Sequence[mtf.Tensor]]:
    """(the operations that `build` adds to the mesh's graph, without those that stay there; what it returns)."""
    operations = mesh.graph.operations
    before = len(operations)
    made = build()
    added = operations[before:]
    operations[before:] = [op for op in added if stays(op)]
    return [op for op in added if not stays(op)], made


class HoldingOperation(MeshOperation):
    """One operation in place of those that make its outputs; its inputs are what these take from outside."""

    def __init__(self, operations: list[mtf.Operation], made: Sequence[mtf.Tensor], name: str, mesh: mtf.Mesh) -> None:
        inside = {t for op in operations for t in op.outputs}
        inputs = dict.fromkeys(t for op in operations for t in op.inputs if t not in inside)  # in order
        super().__init__(list(inputs), [(t.shape, t.dtype) for t in made], name, mesh)
        self._operations, self._made = operations, made

    def _lowered(self, lowering: mtf.Lowering) -> list[LaidOut]:
        """What they make, lowered as they are."""
        for operation in self._operations:
            with tf.name_scope(operation.name):
                operation.lower(lowering)
        return [lowering.tensors[t] for t in self._made]


class _CompiledOperation(HoldingOperation):
    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        if not isinstance(mesh_impl, PlacementMeshImpl):
            raise ValueError(f"{self.name}: a mesh of one CPU or GPU is needed, not a {type(mesh_impl).__name__}")
        if mesh_impl.size > 1:
            raise ValueError(f"{self.name}: the mesh has {mesh_impl.size} processors; a program is compiled for one")
        with tf.device(mesh_impl.devices[0]):
            made = self._call(lowering, current_device())
        for output, value in zip(self.outputs, made, strict=True):
            lowering.set_tensor_lowering(output, mesh_impl.LaidOutTensor([value]))

    def _call(self, lowering: mtf.Lowering, device: str) -> list[tf.Tensor]:
        """device: TensorFlow's name of the one that the program is called on."""

        def program() -> list[tf.Tensor]:
            inner = copy.copy(lowering)
            inner.is_compiled = True
            inner.tensors = dict(lowering.tensors)  # what is outside becomes an input where it is used
            with tf.device(device or None):  # a function does not take it from where it is called
                return [x.to_laid_out_tensor().tensor_list[0] for x in self._lowered(inner)]

        return tensorflow.function(program, jit_compile=True, autograph=False)()

"""Operations on whole rows that XLA compiles on GPUs, as one program for each processor."""

import copy
from collections.abc import Callable, Sequence

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, tensorflow, tf
from gpt_neo_sampling._types import LaidOut
from gpt_neo_sampling.mesh.compiled import HoldingOperation, taken_out
from gpt_neo_sampling.mesh.gpu import compiles_rows


def compiled_rows(
    mesh: mtf.Mesh, rows: mtf.Shape, build: Callable[[], Sequence[mtf.Tensor]], name: str = "compiled_rows"
) -> list[mtf.Tensor]:
    """What `build` makes of rows that need nothing of each other; on GPUs compiled by XLA (see `gpu.compiles_rows`).

    Elsewhere its operations are lowered as they are. Compiled, they get whole rows: what a layout splits along other
    dims than the rows' is gathered.

    Args:
      mesh: mtf.Mesh.
      rows: mtf.Shape, the dims of the rows.
      build: a function without arguments to a sequence of mtf.Tensors of no dims but the rows'. XLA must be able to
        compile what it adds to the graph; a user's functions may hold anything.
      name: str.

    Returns:
      a list of mtf.Tensors like those that `build` returned. No gradient flows through them.
    """

    def makes_input(operation: mtf.Operation) -> bool:
        return not operation.inputs and not _is_same_everywhere(operation, rows)

    operations, made = taken_out(mesh, build, makes_input)
    return _CompiledRowsOperation(rows, operations, made, name, mesh).outputs


def _is_same_everywhere(operation: mtf.Operation, rows: mtf.Shape) -> bool:
    """Whether an operation without inputs gives the same whole tensor on every processor in every run."""
    if isinstance(operation, mtf.ops.RangeOperation):
        return operation.outputs[0].shape[0] not in rows.dims
    return isinstance(operation, mtf.ops.Constant)


class _CompiledRowsOperation(HoldingOperation):
    def __init__(
        self, rows: mtf.Shape, operations: list[mtf.Operation], made: Sequence[mtf.Tensor], name: str, mesh: mtf.Mesh
    ) -> None:
        super().__init__(operations, made, name, mesh)
        self._rows = rows

    def lower(self, lowering: mtf.Lowering) -> None:
        mesh_impl = lowering.mesh_impl(self)
        made = self._compiled(lowering) if compiles_rows(mesh_impl) else self._lowered(lowering)
        for output, value in zip(self.outputs, made, strict=True):
            lowering.set_tensor_lowering(output, value)

    def _compiled(self, lowering: mtf.Lowering) -> Sequence[LaidOut]:
        mesh_impl = lowering.mesh_impl(self)
        one_processor = _OneProcessor(mesh_impl, self._rows)
        inputs = [self._whole_rows(lowering, x) for x in self.inputs]

        def of_slices(*slices: tf.Tensor) -> tuple[tf.Tensor, ...]:
            inner = copy.copy(lowering)
            inner.mesh_to_impl = {self.inputs[0].mesh: one_processor}
            inner.tensors = {x: one_processor.LaidOutTensor([s]) for x, s in zip(self.inputs, slices, strict=True)}
            with tf.device(None):  # the program is the same on all processors
                return tuple(x.to_laid_out_tensor().tensor_list[0] for x in self._lowered(inner))

        function = tensorflow.function(of_slices, jit_compile=True, autograph=False)
        specs = [tf.TensorSpec(x.slice_shape, t.dtype) for x, t in zip(inputs, self.inputs, strict=True)]
        return mesh_impl.slicewise(function.get_concrete_function(*specs), *inputs)

    def _whole_rows(self, lowering: mtf.Lowering, x: mtf.Tensor) -> LaidOut:
        mesh_impl, value = lowering.mesh_impl(self), lowering.tensors[x].to_laid_out_tensor()
        for axis, dim in enumerate(x.shape.dims):
            mesh_axis = mesh_impl.tensor_dimension_to_mesh_axis(dim)
            if mesh_axis is not None and dim not in self._rows.dims:
                value = mesh_impl.allconcat(value, mesh_axis, axis)
        return value


class _OneProcessor(PlacementMeshImpl):
    """Any one of a mesh's processors by itself, with whole rows, of which it has its share."""

    def __init__(self, mesh_impl: mtf.MeshImpl, rows: mtf.Shape) -> None:
        axes = {d.name: mesh_impl.tensor_dimension_to_mesh_axis(d) for d in rows.dims}
        layout = [(dim, mesh_impl.shape[axis].name) for dim, axis in axes.items() if axis is not None]
        super().__init__(mesh_impl.shape, mtf.convert_to_layout_rules(layout), [""])

    def import_tf_tensor(self, x: mtf.Tensor, tf_x: tf.Tensor) -> LaidOut:
        assert self.slice_shape(x.shape) == x.shape.to_integer_list, "it has one of several slices"
        return self.LaidOutTensor([tf_x])

    def allreduce(self, x: LaidOut, mesh_axes: Sequence[int], reduction_fn_string: str) -> LaidOut:
        # Whether any row is ambiguous, say: each processor may take a branch for its own.
        assert reduction_fn_string == "MAX", "rows are not added"
        return x

    def laid_out_pnum(self) -> LaidOut:
        raise AssertionError("it may be any")

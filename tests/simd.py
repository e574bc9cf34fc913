"""Executes a TPU program of mesh-tensorflow on this machine's CPU.

`SimdMeshImpl`, mtf's implementation for TPUs, lowers a graph to one core's
program with collectives. `SimdProgram` compiles that program with XLA and runs
it as one replica a core, so values, bits and what travels between cores can be
held against a single device. Three things differ from a TPU: a core learns its
number from an argument, `cross_replica_sum` is XLA's all-reduce under another
operation's name, and the replicas are threads of one process.

The client is jaxlib's, by private names, as no public ones run replicas; only
`_client` and `_Executable` know them.
"""

import contextlib
import functools
import re
import typing

import hlo_text
import numpy as np

from gpt_neo_sampling._compat import mtf, probe_devices, quiet_logging, quiet_stderr, tensorflow, tf
from gpt_neo_sampling.models import gpt2

MAX_REPLICAS = 8
TENSORFLOW = (2, 21)  # earlier ones cannot compile XlaAllReduce for the CPU
JAXLIB = (0, 10)  # whose private names are used here


def _why_unavailable():
    if tuple(int(n) for n in tensorflow.__version__.split(".")[:2]) < TENSORFLOW:
        return f"needs TensorFlow 2.21, whose XLA compiles all-reduce for the CPU; this is {tensorflow.__version__}"
    try:
        import jaxlib.version
    except ImportError:
        return "needs jaxlib 0.10, to run a program as several XLA replicas: pip install jaxlib==0.10.2 (Python 3.11+)"
    if jaxlib.version.__version_info__[:2] != JAXLIB:
        return f"needs jaxlib 0.10, whose private names it uses; this is {jaxlib.version.__version__}"
    return None


UNAVAILABLE = _why_unavailable()  # why no SimdProgram can be made here, or None


class CoreProgram:
    """An mtf graph as `SimdMeshImpl` lowers it: one core's program, not yet compiled for any processor.

    build, inputs, mesh_shape and layout are those of `SimdProgram`; and an input whose shape is an mtf.Shape is one
    core's slice of it, for which build gets the mtf.Tensor: a model's weights need not be whole on a core.

    Attributes:
      hlo: the serialised HloModuleProto; its first parameter is the core's number.
      cores: how many the mesh has.
      impl: the SimdMeshImpl.
      outputs: what build returned.
    """

    def __init__(self, build, inputs, mesh_shape, layout):
        shape = mtf.convert_to_shape(mesh_shape)
        self.cores = shape.size
        self.inputs = [
            (tf.as_dtype(dtype), shape if isinstance(shape, mtf.Shape) else tuple(shape)) for dtype, shape in inputs
        ]

        def one_core(pnum, *tensors):
            mesh = mtf.Mesh(mtf.Graph(), "mesh")
            self.impl = _mesh_impl(shape, layout, pnum)
            self.outputs = build(mesh, *(_imported(mesh, *x) for x in zip(tensors, self.inputs)))
            lowering = mtf.Lowering(mesh.graph, {mesh: self.impl}, autostack=False)
            flat = tf.nest.flatten(self.outputs)
            return [lowering.tensors[t].to_laid_out_tensor().one_slice for t in flat]

        # specs, as values would be folded into constants
        sizes = _mesh_impl(shape, layout, None)
        specs = [tf.TensorSpec([], tf.int32)]
        for dtype, x in self.inputs:
            specs.append(tf.TensorSpec(sizes.slice_shape(x) if isinstance(x, mtf.Shape) else x, dtype))
        probe_devices()
        with quiet_logging(), _stand_ins():
            function = tensorflow.function(one_core, jit_compile=True, autograph=False)
            self.hlo = function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")


class Replicas:
    """A `CoreProgram` run on this machine, on a replica a core.

    hlo, by default the program's, is one with the same parameters and results, which runs as it is written: float64 in
    a TPU's own types is two float32, of sums that XLA would take for simpler ones here, though not for a TPU.
    """

    def __init__(self, program, hlo=None):
        assert UNAVAILABLE is None, UNAVAILABLE
        assert program.cores <= MAX_REPLICAS
        self._inputs, self._impl, self._outputs = program.inputs, program.impl, program.outputs
        options = _QUICK_TO_COMPILE if hlo is None else _AS_WRITTEN
        self._executable = _Executable(program.hlo if hlo is None else hlo, program.cores, options)

    def __call__(self, *arrays):
        """Values of the tensors that build returned, whole, in its nest.

        Asserts that processors that hold the same part of a tensor hold the same
        bits in it.
        """
        assert len(arrays) == len(self._inputs)
        arrays = [np.asarray(a, dtype.as_numpy_dtype) for a, (dtype, _) in zip(arrays, self._inputs)]
        assert [a.shape for a in arrays] == [shape for _, shape in self._inputs]
        slices = self._executable(*arrays)
        tensors = tf.nest.flatten(self._outputs)
        values = [self._assemble(t, parts) for t, parts in zip(tensors, slices)]
        return tf.nest.pack_sequence_as(self._outputs, values)

    def _assemble(self, tensor, slices):
        whole = np.zeros(tensor.shape.to_integer_list, slices[0].dtype)
        seen = {}
        for pnum, part in enumerate(slices):
            begin = tuple(self._impl.slice_begin(tensor.shape, pnum))
            first = seen.setdefault(begin, pnum)
            assert part.tobytes() == slices[first].tobytes(), (
                f"processors {first} and {pnum} hold different values of the same part of {tensor}"
            )
            whole[tuple(slice(b, b + n) for b, n in zip(begin, part.shape))] = part
        return whole

    @property
    def hlo_text(self):
        """The program as compiled."""
        return self._executable.hlo_text

    def collectives(self):
        """A list of `hlo_text.Collective`: all of the compiled program, in no set order."""
        return list(hlo_text.collectives(self.hlo_text))


class SimdProgram(Replicas):
    """An mtf graph compiled as one core's program and run on a replica a core.

    build(mesh, *tensors) returns mtf tensors, by themselves or in a nest; there
    is a tf.Tensor for each (dtype, shape) in `inputs`, whole on every core.
    mesh_shape and layout are mtf strings such as "x:2,y:2" and "batch:x,vocab:y".
    """

    def __init__(self, build, inputs, mesh_shape, layout):
        super().__init__(CoreProgram(build, inputs, mesh_shape, layout))


def host_calls(text):
    """Instructions that may wait for the host: calls of code outside XLA."""
    found = re.findall(r"\b((?:infeed|outfeed|send|recv|custom-call)(?:-done)?\(.*)", text)
    return [call for call in found if 'custom_call_target="TopK"' not in call]


@contextlib.contextmanager
def constant_weights(weights):
    """The bundled model with weights that are given, in place of variables.

    Args:
      weights: {name less "gpt2/": array, tf.Tensor or mtf.Tensor}.
    """

    def constant(mesh, name, shape, variable_dtype, *_, **__):
        name = f"{tf.get_variable_scope().name}/{name}".removeprefix("gpt2/")
        if isinstance(weights[name], mtf.Tensor):
            return mtf.cast(weights[name], variable_dtype.activation_dtype)
        return mtf.import_tf_tensor(mesh, tf.cast(weights[name], variable_dtype.activation_dtype), mtf.Shape(shape))

    variable = gpt2._variable
    gpt2._variable = constant
    try:
        yield
    finally:
        gpt2._variable = variable


# --- mtf's half ---------------------------------------------------------------------


def _mesh_impl(shape, layout, pnum):
    impl = mtf.simd_mesh_impl.SimdMeshImpl(shape, mtf.convert_to_layout_rules(layout))
    impl._pnum_tensor = pnum
    return impl


class _SliceOperation(mtf.Operation):
    """A tensor of which this core's slice is given."""

    def __init__(self, mesh, one_slice, shape):
        super().__init__([], mesh=mesh, name="slice")
        self._outputs = [mtf.Tensor(self, shape, one_slice.dtype)]
        self._slice = one_slice

    def lower(self, lowering):
        lowering.set_tensor_lowering(self.outputs[0], lowering.mesh_impl(self).LaidOutTensor([self._slice]))


def _imported(mesh, tensor, dtype_and_shape):
    """The slice as an mtf.Tensor; a tf.Tensor that is whole as it is."""
    shape = dtype_and_shape[1]
    return _SliceOperation(mesh, tensor, shape).outputs[0] if isinstance(shape, mtf.Shape) else tensor


class _Collectives:
    """Replaces TensorFlow's tpu_ops, which only lower on a TPU."""

    @staticmethod
    def cross_replica_sum(x, group_assignment, name=None):
        from tensorflow.compiler.tf2xla.ops import gen_xla_ops

        return gen_xla_ops.xla_all_reduce(
            x, tf.constant(group_assignment, tf.int32), reduce_op="Add", mode="CrossReplica", name=name
        )

    def __getattr__(self, name):
        raise NotImplementedError(f"tpu_ops.{name}: a program that runs on the CPU cannot hold it")


@contextlib.contextmanager
def _stand_ins():
    module = mtf.simd_mesh_impl
    saved = module.tpu_ops
    module.tpu_ops = _Collectives()
    try:
        yield
    finally:
        module.tpu_ops = saved


# --- XLA's half ---------------------------------------------------------------------


@functools.cache
def _client():
    with quiet_stderr():
        from jaxlib import xla_client

        return xla_client.make_cpu_client(num_devices=MAX_REPLICAS)


_QUICK_TO_COMPILE = [("xla_backend_optimization_level", 0), ("xla_cpu_use_fusion_emitters", False)]
_AS_WRITTEN = [*_QUICK_TO_COMPILE, ("xla_disable_hlo_passes", "algsimp")]


class _Executable:
    """A serialised HLO module on the client's first `replicas` devices."""

    def __init__(self, hlo, replicas, compiler_options=_QUICK_TO_COMPILE):
        from jaxlib import _hlo, _jax

        self._devices = _client().local_devices()[:replicas]
        devices = _jax.DeviceList(tuple(self._devices))
        options = _jax.CompileOptions()
        options.num_replicas = replicas
        options.env_option_overrides = compiler_options
        options.device_assignment = _jax.DeviceAssignment.create(np.arange(replicas, dtype=np.int32)[:, np.newaxis])
        self._loaded = _client().compile_and_load(_jax.mlir.hlo_to_stablehlo(hlo), devices, options)
        # "manual": what a device holds has no relation to what the others hold
        self._sharding = _jax.GSPMDSharding(devices, _hlo.HloSharding.manual())
        (module,) = self._loaded.hlo_modules()
        self.hlo_text = module.to_string()

    def __call__(self, *arrays):
        """For each output, a list of each replica's array."""
        numbers = [np.array(pnum, np.int32) for pnum in range(len(self._devices))]
        arguments = [self._put(numbers)] + [self._put([a] * len(self._devices)) for a in arrays]
        outputs = self._loaded.execute_sharded(arguments).disassemble_into_single_device_arrays()
        return [[np.array(a._single_device_array_to_np_array_did_copy()[0]) for a in parts] for parts in outputs]

    def _put(self, arrays):
        from jaxlib import _jax

        aval = _Aval(arrays[0].shape, arrays[0].dtype)
        return _jax.batched_device_put(aval, self._sharding, arrays, self._devices, enable_x64=True)


class _Aval(typing.NamedTuple):
    """The parts of JAX's class of this name that jaxlib uses."""

    shape: tuple
    dtype: np.dtype
    weak_type: bool = False

"""Runs mtf graphs on meshes of this machine's CPU devices, in TensorFlow sessions or compiled by XLA.

A graph takes far longer to build than to run, in proportion to its operations times the devices of its mesh. So a test
puts its cases into one graph, on as few devices as it needs, and feeds the values that differ between them.
(Programs for TPU cores: simd.py.)
"""

import numpy as np

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_logging, tensorflow, tf

DEVICES = 8  # of the largest mesh


def dims(**sizes):
    """mtf.Dimensions by name, in order."""
    return [mtf.Dimension(name, size) for name, size in sizes.items()]


class MeshRunner:
    """A mesh of virtual CPU devices, one for each processor.

    mesh_shape and layout are mtf strings such as "x:2,y:2" and "batch:x,vocab:y".
    """

    def __init__(self, mesh_shape="", layout=""):
        self.mesh_shape, self.layout = mesh_shape, layout
        size = mtf.convert_to_shape(mesh_shape).size
        self.impl = PlacementMeshImpl(mesh_shape, layout, [""] if size == 1 else [f"cpu:{i}" for i in range(size)])

    def __call__(self, build, *arrays, times=None):
        """The result of a `Program` of build for these arrays; with `times`, a list of as many results."""
        arrays = [np.asarray(a) for a in arrays]
        program = Program(build, [(tf.as_dtype(a.dtype), a.shape) for a in arrays], runner=self)
        results = [program(*arrays) for _ in range(times or 1)]
        program.close()
        return results if times else results[0]

    def __repr__(self):
        return f"{self.mesh_shape or 'one device'} {self.layout}"


ONE_DEVICE = MeshRunner()


def lowered(build, *tensors, impl=ONE_DEVICE.impl):
    """The result of build(mesh, *tensors) as tf.Tensors, in the current graph or function."""
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    outputs = build(mesh, *tensors)
    lowering = mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False)
    return tf.nest.map_structure(lowering.export_to_tf_tensor, outputs)


class Program:
    """An mtf graph on a mesh, built once and run any number of times.

    build(mesh, *placeholders) returns an mtf tensor or a nest of them; there is a
    placeholder for each (dtype, shape) in `inputs`. `weights` are loaded under their
    names with the prefix "gpt2/", and must be exactly the graph's variables; with None,
    variables keep their initial values. TensorFlow rewrites the graph only if
    `optimized`, as that takes longer than everything else.
    """

    def __init__(self, build, inputs=(), weights=None, runner=ONE_DEVICE, optimized=False):
        self.graph = tf.Graph()
        with self.graph.as_default(), quiet_logging():
            mesh = mtf.Mesh(mtf.Graph(), "mesh")
            self._holders = [tf.placeholder(dtype, shape) for dtype, shape in inputs]
            outputs = build(mesh, *self._holders)
            lowering = mtf.Lowering(mesh.graph, {mesh: runner.impl}, autostack=False)
            self._fetches = tf.nest.map_structure(lowering.export_to_tf_tensor, outputs)
            masters = {v.op.name: v for v in tf.global_variables() if "_slice_" not in v.op.name}
            self.variables = {name: tuple(v.shape.as_list()) for name, v in masters.items()}
            feed = {}
            if weights is not None:
                assert set(masters) == {"gpt2/" + name for name in weights}
                feed = {masters["gpt2/" + name].initial_value: value for name, value in weights.items()}
            options = tf.ConfigProto(device_count={"CPU": DEVICES})
            options.graph_options.rewrite_options.disable_meta_optimizer = not optimized
            self._session = tf.Session(config=options)
            if masters:
                self._session.run(tf.global_variables_initializer(), feed)
                self._session.run(lowering.copy_masters_to_slices())

    def __call__(self, *arrays, key=None):
        """The result of build for these arrays, or its entry `key` if it is a dict."""
        assert len(arrays) == len(self._holders)
        fetches = self._fetches if key is None else self._fetches[key]
        return self._session.run(fetches, dict(zip(self._holders, arrays)))

    def close(self):
        self._session.close()


class XlaProgram:
    """As `Program`, for a graph without variables on one device, compiled by XLA as a whole."""

    def __init__(self, build, inputs):
        self._inputs = [(tf.as_dtype(dtype), tuple(shape)) for dtype, shape in inputs]
        specs = [tf.TensorSpec(shape, dtype) for dtype, shape in self._inputs]
        with quiet_logging():
            self._function = compiled(lambda *tensors: lowered(build, *tensors)).get_concrete_function(*specs)

    def __call__(self, *arrays):
        assert len(arrays) == len(self._inputs)
        tensors = [tf.constant(a, dtype, shape) for a, (dtype, shape) in zip(arrays, self._inputs)]
        return tf.nest.map_structure(lambda t: t.numpy(), self._function(*tensors))


def compiled(fn, jit=True):
    """fn, a function of tensors, as a tf.function, compiled by XLA or run operation by operation."""
    probe_devices()
    return tensorflow.function(fn, jit_compile=jit, autograph=False)

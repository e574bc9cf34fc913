"""Runs mtf graphs: on meshes of this machine's CPU devices, by TensorFlow's sessions or compiled by XLA.

A graph takes far longer to build than to run, by the number of its operations times the devices of its mesh. So a test
puts its cases into one graph, of as few devices as the fact needs, and feeds what differs between them.
(Programs of TPU cores: simd.py.)
"""

import numpy as np

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_logging, tensorflow, tf

DEVICES = 8  # the most that a mesh has


def dims(**sizes):
    """mtf.Dimensions by name, in order."""
    return [mtf.Dimension(name, size) for name, size in sizes.items()]


class MeshRunner:
    """A mesh: mesh_shape and layout are mtf strings such as "x:2,y:2" and "batch:x,vocab:y".

    Every processor is a virtual CPU device of its own.
    """

    def __init__(self, mesh_shape="", layout=""):
        self.mesh_shape, self.layout = mesh_shape, layout
        size = mtf.convert_to_shape(mesh_shape).size
        self.impl = PlacementMeshImpl(mesh_shape, layout, [""] if size == 1 else [f"cpu:{i}" for i in range(size)])

    def __call__(self, build, *arrays, times=None):
        """What a `Program` of build gives for these arrays, and is then dropped.

        With `times`, it is run that often: a list of results.
        """
        arrays = [np.asarray(a) for a in arrays]
        program = Program(build, [(tf.as_dtype(a.dtype), a.shape) for a in arrays], runner=self)
        results = [program(*arrays) for _ in range(times or 1)]
        program.close()
        return results if times else results[0]

    def __repr__(self):
        return f"{self.mesh_shape or 'one device'} {self.layout}"


ONE_DEVICE = MeshRunner()


def lowered(build, *tensors, impl=ONE_DEVICE.impl):
    """tf.Tensors of what build(mesh, *tensors) returns, in the graph or function that is open."""
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    outputs = build(mesh, *tensors)
    lowering = mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False)
    return tf.nest.map_structure(lowering.export_to_tf_tensor, outputs)


class Program:
    """An mtf graph on a mesh, built once and run as often as wanted.

    build(mesh, *placeholders) returns mtf tensors, by themselves or in a nest;
    there is a placeholder for each (dtype, shape) in `inputs`. `weights` are
    loaded under their names with "gpt2/" before; they must be just the variables
    that the graph has. Where they are None, variables start as their initialisers
    say. TensorFlow rewrites the graph only if it is to be `optimized`, which takes
    longer than all else that is run.
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

    def __call__(self, *arrays, only=None):
        """What build returned, or of a dict the entry `only`."""
        assert len(arrays) == len(self._holders)
        fetches = self._fetches if only is None else self._fetches[only]
        return self._session.run(fetches, dict(zip(self._holders, arrays)))

    def close(self):
        self._session.close()


class XlaProgram:
    """An mtf graph without variables on one device, compiled by XLA as a whole; otherwise as `Program`."""

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
    """fn, of tensors, as a tf.function: compiled by XLA, or run operation by operation."""
    probe_devices()
    return tensorflow.function(fn, jit_compile=jit, autograph=False)

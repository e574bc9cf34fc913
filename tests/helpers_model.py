"""The bundled model with weights of the test's own, on a mesh of the test's own."""

import json

import numpy as np
from conftest import DATA, DEVICES, MeshRunner

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.utils import biasmask_attn_weights

FLOAT32 = mtf.VariableDType(tf.float32)


class Program:
    """An mtf graph on a mesh, built once and run as often as wanted.

    build(mesh, *placeholders) returns mtf tensors in a list or a dict; there is
    a placeholder for each (dtype, shape) in `inputs`. `weights` are loaded by
    name less the prefix "gpt2/", and every variable must be among them; where
    it is None, variables start as their initialisers say.
    """

    def __init__(self, build, inputs=(), weights=None, runner=None):
        self.graph = tf.Graph()
        with self.graph.as_default():
            mesh = mtf.Mesh(mtf.Graph(), "mesh")
            self._holders = [tf.placeholder(dtype, shape) for dtype, shape in inputs]
            out = build(mesh, *self._holders)
            lowering = mtf.Lowering(mesh.graph, {mesh: (runner or MeshRunner()).impl}, autostack=False)
            self._fetches = tf.nest.map_structure(
                lowering.export_to_tf_tensor, out, expand_composites=False
            )
            self.variables = {
                v.op.name: v.shape.as_list() for v in tf.global_variables() if "_slice_" not in v.op.name
            }
            self._session = tf.Session(config=tf.ConfigProto(device_count={"CPU": DEVICES}))
            feed = {}
            if weights is not None:
                assert {"gpt2/" + name for name in weights} == set(self.variables)
                for v in tf.global_variables():
                    if v.op.name in self.variables:
                        feed[v.initial_value] = weights[v.op.name.removeprefix("gpt2/")]
            self._session.run(tf.global_variables_initializer(), feed)
            self._session.run(lowering.copy_masters_to_slices())

    def __call__(self, *arrays):
        return self._session.run(self._fetches, dict(zip(self._holders, arrays)))

"""The same tokens on every mesh: the bundled model, cut to two layers, on every layout that GPT-Neo's configs use.

A cell of the table that pytest prints is a mesh implementation, a mesh shape, a
layout and a way of sampling, whose tokens are those of one CPU device.
"""

import functools

import numpy as np
import pytest
from helpers_model import features, two_layers
from programs import MeshRunner, Program, XlaProgram
from simd import UNAVAILABLE, SimdProgram, constant_weights

from gpt_neo_sampling import sample
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import cwise_broadcast

slow = pytest.mark.slow
BATCH, LENGTH, NEW_TOKENS = 4, 24, 10
GPT_NEO_LAYOUTS = [
    ("x:2,y:2", "batch:x,heads:y,vocab:y,intermediate_expanded:y"),
    ("x:2,y:2", "batch:x,heads:y,vocab:y"),
    ("x:2,y:2", "batch:x,memory_length:y,embd:y"),
    ("x:2,y:2", "embd:y,batch:x"),
    ("all:4", "batch:all"),
]
LAYOUTS = GPT_NEO_LAYOUTS + [
    ("x:2", "batch:x"),
    ("x:2", "vocab:x"),
    ("x:8", "vocab:x"),
    ("x:2", "heads:x"),
    ("x:2", "embd:x"),
    ("x:2", "memory_length:x"),
    ("x:2", "intermediate_expanded:x"),
    ("x:2,y:2,z:2", "batch:x,vocab:y,heads:y,intermediate_expanded:y,embd:z,memory_length:z"),
]
SIMD_LAYOUTS = [
    ("x:4", "vocab:x"),
    ("x:2,y:2", "batch:x,heads:y,vocab:y,intermediate_expanded:y"),
    ("x:2,y:4", "batch:x,memory_length:y,embd:y"),
]
WAYS = {  # temperature, top-k, α
    "greedy": (0.0, -1, 1.0),
    "temperature": (0.9, -1, 1.0),
    "top-k": (1.2, 40, 1.0),
    "entmax": (1.0, -1, 1.3),
}


def prompts():
    tokens = np.random.default_rng(1).integers(1, two_layers()[0]["n_vocab"], (BATCH, LENGTH))
    lengths = np.array([1, 5, 14, 3])
    return np.where(np.arange(LENGTH) < lengths[:, np.newaxis], tokens, 0).astype(np.int32)


def loop(mesh, ids, temperature, top_k, alpha, seed, *weights):
    """One decode loop for every way of sampling: entmax at α = 1 is softmax, and a top-k of −1 keeps all."""
    params, names = two_layers()
    shape, other = features(mesh, params, BATCH, LENGTH)
    with constant_weights(dict(zip(names, weights))):
        return sample.sample_autoregressive(
            mtf.import_tf_tensor(mesh, ids, shape),
            other,
            params,
            max_steps=NEW_TOKENS,
            temperature=temperature,
            sampling_keep_top_k=top_k,
            max_top_k=40,
            sampling_use_entmax=True,
            entmax_alpha=alpha,
            seed=seed,
        )


def inputs():
    options = [(tf.float32, ()), (tf.int32, ()), (tf.float32, ()), (tf.int32, ())]
    return [(tf.int32, (BATCH, LENGTH)), *options, *((tf.float32, w.shape) for w in two_layers()[1].values())]


class Cells:
    """The tokens of each way of sampling on one mesh: make(loop, inputs) is its program."""

    def __init__(self, make):
        self._program = make(loop, inputs())

    def __call__(self, way, seed=5):
        return self._program(prompts(), *WAYS[way], seed, *two_layers()[1].values())


def on_placement_mesh(mesh_shape="", layout=""):
    return Cells(functools.partial(Program, runner=MeshRunner(mesh_shape, layout)))


@functools.cache
def single():
    cells = on_placement_mesh()
    return {way: cells(way) for way in WAYS}


def check(cells, record_property, *place):
    """Every way of sampling gives the tokens of one device; each is a row of the table."""
    differ = {}
    for way in WAYS:
        tokens = cells(way)
        differ[way] = int((tokens != single()[way]).sum())
        record_property("cell", (*place, way, "equal" if not differ[way] else f"{differ[way]} of {tokens.size} differ"))
    assert not any(differ.values()), differ


@pytest.mark.parametrize("mesh_shape, layout", LAYOUTS[:1] + [pytest.param(*m, marks=slow) for m in LAYOUTS[1:]])
def test_placement_meshes(mesh_shape, layout, record_property):
    check(on_placement_mesh(mesh_shape, layout), record_property, "placement", mesh_shape, layout)


@slow
@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
@pytest.mark.parametrize("mesh_shape, layout", SIMD_LAYOUTS)
def test_simd_meshes(mesh_shape, layout, record_property):
    on_mesh = functools.partial(SimdProgram, mesh_shape=mesh_shape, layout=layout)
    check(Cells(on_mesh), record_property, "simd", mesh_shape, layout)


@slow
def test_xla(record_property):
    check(Cells(XlaProgram), record_property, "placement, XLA", "one device", "")


@pytest.mark.slow
def test_the_table_tells_samples_apart():
    """Ways of sampling and seeds give different tokens, so that equal cells mean something."""
    ways = list(single().values())
    assert all((a != b).any() for i, a in enumerate(ways) for b in ways[:i])
    cells = on_placement_mesh()
    assert (cells("temperature", seed=6) != single()["temperature"]).mean() > 0.2
    assert (cells("temperature") == single()["temperature"]).all()


@slow
def test_a_seed_derived_from_the_layout_is_caught(monkeypatch):
    """Numbering rows within their shard, not within the request, is right on one device and wrong on two."""

    def row_of_the_shard(mesh, rows):
        zeros = mtf.zeros(mesh, rows, tf.int32)
        return cwise_broadcast(lambda x: x + tf.range(x.shape.as_list()[0]), [zeros], rows)

    monkeypatch.setattr(sample, "row_index", row_of_the_shard)
    assert (on_placement_mesh()("temperature") == single()["temperature"]).all()
    with pytest.raises(AssertionError):
        check(on_placement_mesh("x:2", "batch:x"), lambda *_: None)

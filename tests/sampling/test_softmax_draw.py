"""gpt_neo_sampling.sampling.softmax_draw: a TPU core's draw from scores, against a CPU's."""

import functools

import numpy as np
import pytest
import simd
from programs import MeshRunner, dims
from test_draws import GPT2_VOCAB, hard_rows

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import MeshOperation
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows
from gpt_neo_sampling.sampling.categorical import score_draw
from gpt_neo_sampling.sampling.softmax_draw import softmax_draw

pytestmark = pytest.mark.skipif(simd.UNAVAILABLE is not None, reason=simd.UNAVAILABLE or "")
ROWS = 512
LARGEST = np.finfo(np.float32).max


def drawn(size, mesh, x, factor, u1, u2, kept=None):
    b, v = dims(batch=ROWS, vocab=size)
    x, factor, u1, u2 = (
        mtf.import_tf_tensor(mesh, t, mtf.Shape(s)) for t, s in ((x, [b, v]), (factor, [b]), (u1, [b]), (u2, [b]))
    )
    return score_draw(x, u1, u2, v, size=kept, factor=factor)


@functools.cache
def core_program(size, layout, kept=None):
    inputs = [(tf.float32, (ROWS, size)), (tf.float32, (ROWS,)), (tf.int32, (ROWS,)), (tf.int32, (ROWS,))]
    mesh_shape = "x:2,y:2" if "y" in layout else "x:4"
    return simd.SimdProgram(functools.partial(drawn, size, kept=kept), inputs, mesh_shape, layout)


@pytest.mark.parametrize(
    "size, layout, kept",
    [
        (128, "vocab:x", None),
        (2048, "batch:x,vocab:y", 2000),
        (GPT2_VOCAB, "batch:x", None),
        pytest.param(50304, "vocab:x", GPT2_VOCAB, marks=pytest.mark.slow),
    ],
)
def test_equals_a_cpus_draw(size, layout, kept):
    rng = np.random.default_rng(72)
    x = np.float32(rng.normal(size=(ROWS, size)) * rng.choice([0.1, 1, 2, 8], (ROWS, 1)) - 40)
    x[: ROWS // 4] = hard_rows(rng, ROWS // 4, size)
    x[ROWS // 4 : ROWS // 2] = np.sort(x[ROWS // 4 : ROWS // 2])
    x[0], x[1, 3], x[2, size // 2], x[3], x[4], x[5, 1:] = -np.inf, np.nan, np.inf, 5.0, -LARGEST, -np.inf
    x[6, 7], x[7], x[8, 5] = LARGEST, np.nan, 1e30
    if kept:
        x[:, kept:] = -np.inf
    factor = np.float32(rng.choice([1, 1 / 0.9, 1 / 0.7, 100], ROWS))
    factor[9] = np.nan
    u = rng.integers(-(2**31), 2**31, (2, ROWS)).astype(np.int32)
    u[:, 10:20], u[:, 20:30] = 0, -1
    want = MeshRunner()(functools.partial(drawn, size, kept=kept), x, factor, *u)
    assert (want[[0, 1, 2, 7, 9]] == -1).all() and (want == -1).sum() < 8
    np.testing.assert_array_equal(core_program(size, layout, kept)(x, factor, *u), want)


class _Draw(MeshOperation):
    """Outputs: what `softmax_draw` draws, and which draws are ambiguous."""

    def __init__(self, x, u1, u2, dim):
        super().__init__([x, u1, u2], [(u1.shape, tf.int32), (u1.shape, tf.float32)], "draw")
        self._dim = dim

    def lower(self, lowering):
        impl = lowering.mesh_impl(self)
        x, *us = (lowering.tensors[t] for t in self.inputs)
        rows = ShardedRows(impl, self.inputs[0].shape, self._dim)
        us = [impl.slicewise(lambda u: tf.reshape(u, [-1, 1]), u) for u in us]
        factor = impl.slicewise(lambda u: tf.ones_like(u, tf.float32), us[0])
        for y, value in zip(self.outputs, softmax_draw(rows, x, factor, us)[:2], strict=True):
            lowering.set_tensor_lowering(y, impl.slicewise(lambda x: tf.reshape(x, [-1]), value))


def flagged_draw(size, dtype, layout):
    def build(mesh, x, u1, u2):
        b, v = dims(batch=ROWS, vocab=size)
        x, u1, u2 = (mtf.import_tf_tensor(mesh, t, mtf.Shape(s)) for t, s in ((x, [b, v]), (u1, [b]), (u2, [b])))
        return _Draw(x, u1, u2, v).outputs

    return simd.SimdProgram(build, [(tf.float32, (ROWS, size)), (dtype, (ROWS,)), (dtype, (ROWS,))], "x:2", layout)


@pytest.mark.parametrize("size, layout", [(128, "batch:x"), (50304, "vocab:x")])
def test_what_is_not_flagged_is_right(size, layout):
    rng = np.random.default_rng(73)
    x = np.float32(rng.normal(size=(ROWS, size)) * rng.choice([0.1, 1, 2, 8], (ROWS, 1)) - 40)
    x[: ROWS // 4] = hard_rows(rng, ROWS // 4, size)
    x[ROWS // 8 : ROWS // 4] = np.sort(x[ROWS // 8 : ROWS // 4])
    u = rng.integers(-(2**31), 2**31, (2, ROWS)).astype(np.int32)
    want = MeshRunner()(functools.partial(drawn, size), x, np.ones(ROWS, np.float32), *u)
    token, flag = flagged_draw(size, tf.int32, layout)(x, *u)
    clear = flag == 0
    assert clear.mean() > 0.97
    np.testing.assert_array_equal(token[clear], want[clear])


@pytest.mark.parametrize("layout", ["vocab:x", "batch:x"])
def test_draws_near_a_border_are_flagged(layout):
    """Groups of 2 equal entries: u₁ of a border between groups, or u₂ of one between entries, or beside it."""
    program = flagged_draw(128, tf.float32, layout)
    at = np.repeat(np.resize(np.arange(1, 64) / 64, 64), ROWS // 64)
    off = np.tile([0, 1e-6, -1e-6, 3e-5, -3e-5, 3e-5, -3e-5, 0], ROWS // 8)
    far = np.full(ROWS, 0.3)
    for u in ((at + off, far), (far, 0.5 + off)):
        u = np.float32(u)
        token, flag = program(np.zeros((ROWS, 128)), *u)
        np.testing.assert_array_equal(flag, np.abs(off) < 1e-5)
        clear = flag == 0
        np.testing.assert_array_equal(token[clear], (np.floor(u[0] * 64) * 2 + (u[1] >= 0.5))[clear])

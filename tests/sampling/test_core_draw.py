"""gpt_neo_sampling.sampling.core_draw: a TPU core's draw, against the textbook draw on one device."""

import functools

import numpy as np
import pytest
import simd
from programs import MeshRunner, dims
from test_draws import (
    GPT2_VOCAB,
    hard_rows,
    mixed_alphas,
    mixed_rows,
    near_borders,
    score_build,
    sparse_weights,
    uniforms,
)

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import MeshOperation
from gpt_neo_sampling.mesh.sharded_rows import ShardedRows
from gpt_neo_sampling.sampling import categorical
from gpt_neo_sampling.sampling.categorical import SUM_ERROR_BOUND, grouped_draw
from gpt_neo_sampling.sampling.core_draw import draw_few_kernels

pytestmark = pytest.mark.skipif(simd.UNAVAILABLE is not None, reason=simd.UNAVAILABLE or "")
ROWS = 512


class _CoreDraw(MeshOperation):
    """Outputs: what is drawn and whether it is ambiguous."""

    def __init__(self, weights, u1, u2, dim, with_slope):
        super().__init__([weights, u1, u2], [(u1.shape, tf.int32), (u1.shape, tf.float32)], "core_draw")
        self._dim, self._with_slope = dim, with_slope

    def lower(self, lowering):
        impl = lowering.mesh_impl(self)
        weights, *us = (lowering.tensors[t] for t in self.inputs)
        rows = ShardedRows(impl, self.inputs[0].shape, self._dim)
        us = [impl.slicewise(lambda u: tf.reshape(u, [-1, 1]), u) for u in us]
        weights = rows.in_groups(weights)
        slope = impl.slicewise(lambda w: 2 * w, weights) if self._with_slope else None
        for y, x in zip(self.outputs, draw_few_kernels(rows, weights, us, SUM_ERROR_BOUND, slope)):
            lowering.set_tensor_lowering(y, impl.slicewise(lambda x: tf.reshape(x, [-1]), x))


@functools.cache
def core_draw(size, layout, dtype, with_slope=False):
    def build(mesh, w, u1, u2):
        shape = b, v = dims(batch=ROWS, vocab=size)
        imports = [mtf.import_tf_tensor(mesh, x, mtf.Shape(s)) for x, s in ((w, shape), (u1, [b]), (u2, [b]))]
        return _CoreDraw(*imports, v, with_slope).outputs

    inputs = [(tf.float32, (ROWS, size)), (dtype, (ROWS,)), (dtype, (ROWS,))]
    return simd.SimdProgram(build, inputs, "x:2", layout)


def textbook(w, u1, u2):
    def build(mesh, w, u1, u2):
        b, v, one = dims(batch=ROWS, vocab=w.shape.as_list()[1], samples=1)
        us = (mtf.import_tf_tensor(mesh, u[:, tf.newaxis], mtf.Shape([b, one])) for u in (u1, u2))
        return grouped_draw(mtf.import_tf_tensor(mesh, w, mtf.Shape([b, v])), *us, v, one)

    return MeshRunner()(build, w, u1, u2)[:, 0]


def scaled(rng, w):
    return w * np.float32(2.0 ** rng.integers(-60, 60, (len(w), 1)))


@pytest.mark.parametrize("size, layout", [(128, "vocab:x"), (GPT2_VOCAB, "batch:x"), (2048, "vocab:x")])
@pytest.mark.parametrize("bits", [False, True])
def test_equals_the_textbook_draw_unless_ambiguous(size, layout, bits):
    rng = np.random.default_rng(71)
    w = sparse_weights(rng, ROWS, size)
    w[: ROWS // 2] = np.exp(hard_rows(rng, ROWS // 2, size))
    w = scaled(rng, w)
    w[5], w[6, 3], w[7, size - 1], w[8, :] = 0, np.nan, np.inf, 3.0
    u = uniforms(rng, 2, ROWS)
    if bits:
        u = rng.integers(-(2**31), 2**31, (2, ROWS)).astype(np.int32)
    token, ambiguous = core_draw(size, layout, tf.int32 if bits else tf.float32)(w, *u)
    want = textbook(w, *u)
    clear = ambiguous == 0
    np.testing.assert_array_equal(token[clear], want[clear])
    assert set(ambiguous) <= {0.0, 1.0} and clear.mean() > 0.9
    assert clear[5:8].all() and (token[5:8] == -1).all() and (token >= 0).sum() > ROWS / 2


@pytest.mark.parametrize("layout", ["vocab:x", "batch:x"])
@pytest.mark.parametrize("with_slope", [False, True])
def test_near_a_border_it_is_ambiguous(layout, with_slope):
    """Groups of 2 equal entries: u₁ of a border between groups, u₂ of one between entries, beside it, and far away."""
    bound = SUM_ERROR_BOUND * (2 if with_slope else 1)
    at = np.repeat(np.resize(np.arange(1, 64) / 64, 64), ROWS // 64)
    off = np.tile([0, 0.5 * bound, -0.5 * bound, 2e-5, -2e-5, 2e-5, -2e-5, 0], ROWS // 8)
    far = np.full(ROWS, 0.3)
    for entry in (False, True):
        u = (far, 0.5 + off) if entry else (at + off, far)
        u = np.float32(u)
        token, ambiguous = core_draw(128, layout, tf.float32, with_slope)(np.ones((ROWS, 128)), *u)
        np.testing.assert_array_equal(ambiguous, np.abs(off) < 1e-5)
        clear = ambiguous == 0
        want = np.floor(u[0] * 64) * 2 + (u[1] >= 0.5)
        np.testing.assert_array_equal(token[clear], want[clear])


# --- entmax ---------------------------------------------------------------------------------


class _EntmaxDraw(MeshOperation):
    """Outputs: what is drawn, and whether it is ambiguous."""

    def __init__(self, scores, u1, u2, alpha, dim):
        super().__init__([scores, u1, u2, alpha], [(u1.shape, tf.int32), (u1.shape, tf.float32)], "entmax_draw")
        self._dim = dim

    def lower(self, lowering):
        impl = lowering.mesh_impl(self)
        scores, *others = (lowering.tensors[t] for t in self.inputs)
        rows = ShardedRows(impl, self.inputs[0].shape, self._dim)
        u1, u2, alpha = (impl.slicewise(lambda x: tf.reshape(x, [-1, 1]), x) for x in others)
        epsilon = impl.slicewise(lambda a: a - 1.0, alpha)
        drawn = categorical._core_entmax_draw(rows, scores, None, epsilon, [u1, u2])[:2]
        for y, x in zip(self.outputs, drawn):
            lowering.set_tensor_lowering(y, impl.slicewise(lambda x: tf.reshape(x, [-1]), x))


@functools.cache
def entmax_draw(rows, size, layout):
    def build(mesh, scores, u1, u2, alpha):
        b, v = dims(batch=rows, vocab=size)
        shapes = [b, v], [b], [b], [b]
        imports = [mtf.import_tf_tensor(mesh, x, mtf.Shape(s)) for x, s in zip((scores, u1, u2, alpha), shapes)]
        return [*_EntmaxDraw(*imports, v).outputs, categorical.score_draw(*imports[:3], v, imports[3])]

    inputs = [(tf.float32, (rows, size))] + [(tf.float32, (rows,))] * 3
    return simd.SimdProgram(build, inputs, "x:2", layout)


@pytest.mark.parametrize(
    "rows, size, layout", [(256, 128, "vocab:x"), pytest.param(64, 3001, "batch:x", marks=pytest.mark.slow)]
)
def test_entmax_draws_are_those_of_one_device_or_ambiguous(rows, size, layout):
    """At borders between groups and entries, and anywhere."""
    rng = np.random.default_rng(72)
    z, alpha = mixed_rows(rng, rows, size), mixed_alphas(rng, rows)
    z[7], z[8, 3], z[9, 5] = -np.inf, np.nan, np.inf
    u = np.concatenate([near_borders(rng, z[10:], alpha[10:], passes=2), rng.random((2, 4, rows - 10))], 1)
    u = np.pad(np.float32(u), [(0, 0), (0, 0), (10, 0)], constant_values=0.3)
    shares = []
    for u1, u2 in u.transpose(1, 0, 2):
        fast, ambiguous, token = entmax_draw(rows, size, layout)(z, u1, u2, alpha)
        want = MeshRunner()(score_build(size), z, u1, u2, alpha)
        np.testing.assert_array_equal(token, want)
        np.testing.assert_array_equal(fast[ambiguous == 0], want[ambiguous == 0])
        assert (fast[7:10] == -1).all() and (token[10:] >= 0).all()
        shares.append(ambiguous[7 + rows // 3 :].mean())  # of Gaussian rows; a CPU adds equal entries up one by one
    print("ambiguous:", shares)
    assert min(shares[:2]) > 0.5 and max(shares[2:]) < 0.03

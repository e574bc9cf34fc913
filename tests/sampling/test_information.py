"""A token's surprise and a row's evenness: against their definitions, and the same bits wherever they are computed.

(XLA on one device: the newer masks' case in test_xla.py.)
"""

import functools

import numpy as np
import pytest
import reference
import simd
from helpers_cases import LOWEST
from programs import ONE_DEVICE, MeshRunner, Program, dims
from sampling.test_masks import MESHES, imported, tied_rows

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling import information
from gpt_neo_sampling.sampling.information import evenness, surprise

ROWS, SIZE = 1000, 520
STEP = 2.0**-16


def build(mesh, x, token):
    batch, vocab = dims(batch=x.shape.as_list()[0], vocab=x.shape.as_list()[1])
    x, token = imported(mesh, x, batch, vocab), imported(mesh, token, batch)
    turned = mtf.transpose(x, [vocab, batch])
    return [surprise(x, token), evenness(x), surprise(turned, token, vocab), evenness(turned, vocab)]


def inputs(rows=ROWS, size=SIZE):
    return [(tf.float32, (rows, size)), (tf.int32, (rows,))]


@functools.cache
def on_one_device():
    return Program(build, inputs())


def cases():
    """(rows, a token of each); of ties and extremes, and of a model's kind, peaked ones among them."""
    rng = np.random.default_rng(3)
    gaussian = rng.standard_normal((ROWS, SIZE)) * np.exp2(rng.uniform(-3, 5, (ROWS, 1)))
    for x in (tied_rows(ROWS, SIZE), gaussian.astype(np.float32)):
        yield x, np.where(rng.random(ROWS) < 0.5, x.argmax(-1), rng.integers(0, SIZE, ROWS)).astype(np.int32)


def test_values_are_those_of_the_definitions():
    for x, token in cases():
        bits, part, turned_bits, turned_part = on_one_device()(x, token)
        np.testing.assert_array_equal(turned_bits, bits)
        np.testing.assert_array_equal(turned_part, part)
        masked = np.where(x == LOWEST, -np.inf, x)
        np.testing.assert_allclose(bits, reference.surprise(masked, token), rtol=1e-6, atol=STEP / 2 + 1e-6)
        small = bits < 256
        np.testing.assert_array_equal(bits[small] % STEP, 0)
        n, entropy = np.sum(np.isfinite(masked), -1), reference.entropy(reference.softmax(masked))[:, 0]
        np.testing.assert_allclose(part, entropy / np.log(n), rtol=0, atol=0.5 * 2.0**-20 + 1e-7)
        assert small.mean() > 0.8 and part.min() < 0.01 and part.max() > 0.99


def invalid():
    """Rows and tokens without a number."""
    x = np.zeros((9, 8), np.float32)
    x[0, 3], x[1, 7], x[2], x[3], x[4, 1:], x[5, 2] = np.nan, np.inf, -np.inf, LOWEST, -np.inf, LOWEST
    return x, np.array([0, 0, 0, 0, 0, 2, -1, 8, 7], np.int32)


def test_rows_and_tokens_without_a_number(single):
    bits, part = single(build, *invalid())[:2]
    np.testing.assert_array_equal(bits, [np.nan, np.nan, np.inf, np.inf, 0, np.inf, np.nan, np.nan, 3])
    np.testing.assert_array_equal(part, [np.nan, np.nan, -1, -1, -1, 1, 1, 1, 1])


def test_what_is_no_token():
    with tf.Graph().as_default():
        x = mtf.ones(mtf.Mesh(mtf.Graph(), "mesh"), dims(batch=4, vocab=8))
        with pytest.raises(ValueError, match="token=1; an int32 mtf.Tensor"):
            surprise(x, 1)
        with pytest.raises(ValueError, match="token has shape"):
            surprise(x, mtf.zeros(x.mesh, x.shape, tf.int32))


@pytest.mark.parametrize("mesh", MESHES[1:], ids=lambda mesh: mesh[1])
def test_same_bits_on_meshes(mesh):
    program = Program(build, inputs(), runner=MeshRunner(*mesh))
    for x, token in cases():
        for found, want in zip(program(x, token), on_one_device()(x, token), strict=True):
            np.testing.assert_array_equal(found, want)
    program = MeshRunner(*mesh)
    x, token = (np.concatenate([a, a[:1]]) for a in invalid())  # a number of rows that 2 divides
    np.testing.assert_array_equal(program(build, x, token), ONE_DEVICE(build, x, token))


@pytest.mark.skipif(simd.UNAVAILABLE is not None, reason=simd.UNAVAILABLE or "")
@pytest.mark.parametrize("layout", ["vocab:x", pytest.param("batch:x", marks=pytest.mark.slow)])
def test_same_bits_on_cores(layout, monkeypatch):
    """As they are; where all is in doubt; and where nothing is: then but for a few in a thousand."""
    rounded = information._rounded
    programs = []
    for doubt in (None, 1.0, 0.0):
        if doubt is not None:
            monkeypatch.setattr(
                information, "_rounded", lambda x, *args, d=doubt: (rounded(x, *args)[0], tf.zeros_like(x[0]) + d)
            )
        programs.append(simd.SimdProgram(build, inputs(), "x:4", layout))
    for x, token in cases():
        want = on_one_device()(x, token)
        as_it_is, exact, fast = (program(x, token) for program in programs)
        for i in range(4):
            np.testing.assert_array_equal(as_it_is[i], want[i])
            np.testing.assert_array_equal(exact[i], want[i])
            differs = ~((fast[i] == want[i]) | np.isnan(want[i]) | (want[i] > 64))
            assert differs.mean() < 0.01
    x, token = (np.concatenate([a, a[:3]]) for a in invalid())
    for found, want in zip(
        simd.SimdProgram(build, inputs(*x.shape), "x:4", layout)(x, token), ONE_DEVICE(build, x, token), strict=True
    ):
        np.testing.assert_array_equal(found, want)

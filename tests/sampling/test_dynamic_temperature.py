"""Dynamic temperature against its definition, and at its ends. (The entropy's bits: test_information.py.)"""

import functools

import numpy as np
import pytest
import reference
import simd
from helpers_cases import LOWEST
from programs import MeshRunner, Program, dims
from sampling.test_masks import MESHES, imported, tied_rows

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling.dynamic_temperature import dynamic_temperature
from gpt_neo_sampling.sampling.next_token import inverse_temperature

ROWS, SIZE = 1000, 520
INPUTS = [(tf.float32, (ROWS, SIZE))] + [(tf.float32, (ROWS,))] * 3


def build(mesh, x, *options):
    batch, vocab = dims(batch=x.shape.as_list()[0], vocab=x.shape.as_list()[1])
    x, options = imported(mesh, x, batch, vocab), [imported(mesh, option, batch) for option in options]
    turned = mtf.transpose(x, [vocab, batch])
    return [dynamic_temperature(x, *options), dynamic_temperature(turned, 0.7, options[1], 1.0, vocab)]


@functools.cache
def on_one_device():
    return Program(build, INPUTS)


@functools.cache
def case():
    """Rows, and numbers of each: ends of their ranges among them."""
    rng = np.random.default_rng(4)
    options = [rng.choice(numbers, ROWS).astype(np.float32) for numbers in (
        [0, 0.3, 0.7, 1, 2.5], [0, 0.2, 0.5, 1, 3], [0, 0.3, 1, 1, 2.7, 1e4]
    )]  # fmt: skip
    return tied_rows(ROWS, SIZE), *options


def test_values_are_those_of_the_definition():
    x, temperature, spread, exponent = case()
    own, by_number = on_one_device()(x, temperature, spread, exponent)
    masked = np.where(x == LOWEST, -np.inf, x)
    fixed = (temperature == 0) | (spread == 0)
    np.testing.assert_array_equal(own[fixed], temperature[fixed])
    np.testing.assert_array_equal(by_number[spread == 0], np.float32(0.7))
    # a power of the entropy's rounding: largest for a root of a small one, and for the highest power
    error = {0: 1e-6, 0.3: 1e-3, 1: 3e-6, 2.7: 1e-5, 1e4: 0.03}
    for e, atol in error.items():
        rows = ~fixed & (exponent == np.float32(e))
        options = (np.float64(option[rows]) for option in (temperature, spread, exponent))
        want = reference.dynamic_temperature(masked[rows], *options)
        np.testing.assert_allclose(own[rows], want, rtol=1e-6, atol=atol)
    np.testing.assert_allclose(by_number, reference.dynamic_temperature(masked, 0.7, np.float64(spread), 1), atol=3e-6)
    assert (own[~fixed] >= 2.0**-100).all() and len(np.unique(own)) > 300


def at_the_ends():
    """(rows, options, what comes of them)"""
    nan, inf = np.nan, np.inf
    flat, peaked, alone, none = [0.0] * 4, [0, -1e4, -1e4, -1e4], [2, -inf, LOWEST, -inf], [-inf] * 4
    least, hottest, own = 2.0**-100, np.float32(0.9) + np.float32(0.25), np.float32(0.8)
    rows = [
        (flat, (0.9, 0.25, 3.7), hottest), (peaked, (1.5, 0.5, 1), 1), (peaked, (1.5, 0.5, 0), 2),
        (peaked, (0.5, 0.5, 1), least), (peaked, (0.5, 2, 1e38), least), ([0, -12, -inf, -inf], (1, 1, 40), least),
        (flat, (3e38, 3e38, 1), 2.0**100), (alone, (0.8, 0.5, 1), own), (none, (0.8, 0.5, 1), own),
        (flat, (0, 0.5, 1), 0), ([0, nan, 0, 0], (0.5, 0.5, 1), nan), ([0, inf, 0, 0], (0.5, 0.5, 1), nan),
        ([0, nan, 0, 0], (0.5, 0, 1), 0.5), (flat, (-1, 0.5, 1), nan), (flat, (1, -0.5, 1), nan),
        (flat, (1, 0, -1), nan), (flat, (inf, 0.5, 1), nan), (flat, (1, inf, 1), nan), (flat, (1, 0.5, inf), nan),
        (flat, (nan, 0.5, 1), nan),
    ]  # fmt: skip
    x, options, want = zip(*rows)
    return [np.float32(x), *np.float32(options).T], np.float32(want)


def test_at_the_ends(single):
    arrays, want = at_the_ends()
    np.testing.assert_array_equal(single(build, *arrays)[0], want)


@pytest.mark.parametrize("mesh", MESHES[1:], ids=lambda mesh: mesh[1])
def test_same_bits_on_meshes(mesh):
    program = Program(build, INPUTS, runner=MeshRunner(*mesh))
    for found, want in zip(program(*case()), on_one_device()(*case()), strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.skipif(simd.UNAVAILABLE is not None, reason=simd.UNAVAILABLE or "")
@pytest.mark.parametrize("layout", ["vocab:x", pytest.param("batch:x", marks=pytest.mark.slow)])
def test_same_bits_on_cores(layout):
    program = simd.SimdProgram(build, INPUTS, "x:4", layout)
    for found, want in zip(program(*case()), on_one_device()(*case()), strict=True):
        np.testing.assert_array_equal(found, want)
    arrays, want = at_the_ends()
    inputs = [(tf.float32, a.shape) for a in arrays]
    np.testing.assert_array_equal(simd.SimdProgram(build, inputs, "x:4", layout)(*arrays)[0], want)


def test_the_least_temperature_leaves_the_likeliest_alone(single):
    """Scores that are not the largest are −inf, and those that equal it 0."""
    x = np.float32([[1, 1 - 2**-20, 1, 0]])

    def scores(mesh, x):
        b, v = dims(batch=1, vocab=4)
        x = imported(mesh, x, b, v)
        hottest = inverse_temperature(mesh, mtf.constant(mesh, 2.0**-100, mtf.Shape([b])), mtf.Shape([b]))
        return mtf.softmax((x - mtf.reduce_max(x, reduced_dim=v)) * hottest, v)

    np.testing.assert_array_equal(single(scores, x), [[0.5, 0, 0.5, 0]])


def test_numbers():
    with tf.Graph().as_default():
        x = mtf.ones(mtf.Mesh(mtf.Graph(), "mesh"), dims(batch=4, vocab=8))
        for at, name in enumerate(("temperature", "dynatemp_range", "dynatemp_exponent")):
            for wrong in (-0.1, float("inf"), float("nan")):
                options = [1.0, 0.5, 1.0]
                options[at] = wrong
                with pytest.raises(ValueError, match=f"{name}={wrong}; a finite number of at least 0 is needed"):
                    dynamic_temperature(x, *options)
        with pytest.raises(ValueError, match="dynatemp_range has shape"):
            dynamic_temperature(x, 1.0, [0.5, 0.5], 1.0)

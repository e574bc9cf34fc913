"""gpt_neo_sampling.sampling.dry against NumPy in float64, on 1,000 rows and on any layout; its bits on any backend."""

import numpy as np
import pytest
import reference
import simd
from programs import ONE_DEVICE, MeshRunner, XlaProgram, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling.dry import dry_penalty
from gpt_neo_sampling.sampling.penalties import token_flags

ROWS, VOCAB, LENGTH = 1000, 16, 20
B, V, L = dims(batch=ROWS, vocab=VOCAB, length=LENGTH)
LOW, HIGH = np.finfo(np.float32).min, np.finfo(np.float32).max
BREAKERS = [4, 15]


def imp(mesh, value, *shape):
    return mtf.import_tf_tensor(mesh, value, mtf.Shape(shape))


def rows():
    """(logits, ids of three tokens for the most part and some outside the vocabulary, how many of them count)."""
    rng = np.random.default_rng(0)
    x = np.round(4 * rng.standard_normal((ROWS, VOCAB)), 1).astype(np.float32)
    for value in (-np.inf, LOW, 3e38, -3e38):
        x[rng.random(x.shape) < 0.02] = value
    ids = rng.integers(2, 5, (ROWS, LENGTH))
    ids[::4] = rng.integers(2, 4, (ROWS // 4, LENGTH))  # so that sequences are long
    ids[1::8] = np.resize([2, 3, 7], LENGTH)
    ids = np.where(rng.random(ids.shape) < 0.05, rng.integers(-2, VOCAB + 2, ids.shape), ids).astype(np.int32)
    position = rng.integers(0, LENGTH + 1, ROWS).astype(np.int32)
    position[:4] = [0, 1, 2, LENGTH]
    return x, ids, position


def expected(x, ids, position, **options):
    found = [
        reference.dry_penalty(
            row, i[:n].tolist(), **{k: v[r] if np.ndim(v) and k != "breakers" else v for k, v in options.items()}
        )
        for r, (row, i, n) in enumerate(zip(x.astype(np.float64), ids, position))
    ]
    usual = (x > LOW) & (x < np.inf)
    return np.where(usual, np.clip(found, LOW, HIGH), x)


@pytest.mark.parametrize(
    "runner",
    [
        MeshRunner(),
        MeshRunner("x:4", "vocab:x,length:x"),
        MeshRunner("x:2,y:2", "batch:x,vocab:y"),
        MeshRunner("x:2,y:2", "length:x,vocab:y"),
    ],
    ids=str,
)
def test_against_its_definition(runner):
    """With and without breakers, and with a row's own numbers."""
    x, ids, position = rows()
    rng = np.random.default_rng(1)
    own = {
        "multiplier": rng.choice([0, 0.5, 2], ROWS).astype(np.float32),
        "base": rng.choice([1, 1.75, 3, 1e30], ROWS).astype(np.float32),
        "allowed_length": rng.integers(1, 5, ROWS).astype(np.int32),
    }

    def build(mesh, x, ids, position, *own_numbers):
        y, moved, i = imp(mesh, x, B, V), imp(mesh, tf.transpose(x), V, B), imp(mesh, ids, B, L)
        at, breakers = imp(mesh, position, B), token_flags(mesh, BREAKERS, V, "breakers")
        numbers = [imp(mesh, n, B) for n in own_numbers]
        return [
            dry_penalty(y, i, at, 0.8),
            dry_penalty(moved, i, at, 0.8, 2.5, 1, breakers, V),
            dry_penalty(y, i, at, *numbers, breakers),
        ]

    plain, broken, of_rows = runner(build, x, ids, position, *own.values())
    np.testing.assert_allclose(plain, expected(x, ids, position, multiplier=0.8), rtol=2e-6, atol=2e-6)
    want = expected(x, ids, position, multiplier=0.8, base=2.5, allowed_length=1, breakers=BREAKERS)
    np.testing.assert_allclose(broken.T, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(of_rows, expected(x, ids, position, **own, breakers=BREAKERS), rtol=2e-6, atol=2e-6)


def _on_cores(build, inputs):
    if simd.UNAVAILABLE:
        pytest.skip(simd.UNAVAILABLE)
    return simd.SimdProgram(build, inputs, "x:2,y:2", "batch:x,vocab:y")


@pytest.mark.parametrize("program", [XlaProgram, _on_cores], ids=["XLA", "cores"])
def test_same_bits_as_on_one_device(program):
    """Powers and differences that no backend rounds in its own way."""
    x, ids, position = rows()
    rng = np.random.default_rng(2)
    own = [rng.uniform(low, high, ROWS).astype(np.float32) for low, high in [(0, 3), (1, 3)]]
    inputs = [x, ids, position, *own, rng.integers(1, 4, ROWS).astype(np.int32)]

    def build(mesh, x, ids, position, *own_numbers):
        y, i, at = imp(mesh, x, B, V), imp(mesh, ids, B, L), imp(mesh, position, B)
        numbers = [imp(mesh, n, B) for n in own_numbers]
        of_rows = dry_penalty(y, i, at, *numbers, token_flags(mesh, BREAKERS, V, "breakers"))
        return [of_rows, mtf.cast(dry_penalty(mtf.cast(y, tf.bfloat16), i, at, 0.8, 1.3, 1), tf.float32)]

    want = ONE_DEVICE(build, *inputs)
    found = program(build, [(tf.as_dtype(a.dtype), a.shape) for a in inputs])(*inputs)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.int32), b.view(np.int32))


def test_rows_are_worth_comparing():
    _, ids, position = rows()
    n = np.array([reference.dry_matches(i[:n].tolist(), VOCAB).max() for i, n in zip(ids, position)])
    assert n.max() > 12
    assert np.mean(n >= 2) > 0.5 and (n == 0).sum() > 20


def test_what_is_out_of_range():
    bad = {"multiplier": [-1, np.nan, np.inf], "base": [0.5, np.nan, np.inf], "allowed_length": [0, -1, -5]}
    b, v, length = dims(batch=3, vocab=4, length=5)

    def build(mesh):
        x, ids = mtf.zeros(mesh, mtf.Shape([b, v])), mtf.zeros(mesh, mtf.Shape([b, length]), tf.int32)
        return {
            name: dry_penalty(x, ids, 5, **{"multiplier": 1.0, name: np.array(values, np.float32)})
            if name != "allowed_length"
            else dry_penalty(x, ids, 5, 1.0, allowed_length=np.array(values))
            for name, values in bad.items()
        }

    for name, y in MeshRunner()(build).items():
        assert np.isnan(y).all(), name
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    x, ids = mtf.zeros(mesh, mtf.Shape([b, v])), mtf.zeros(mesh, mtf.Shape([b, length]), tf.int32)
    for name, values in bad.items():
        with pytest.raises(ValueError, match=f"dry_{name}={values[0]}; a .*number of at least"):
            dry_penalty(x, ids, 5, **{"multiplier": 1.0, name: values[0]})


def test_a_row_whose_every_token_repeats_goes_on():
    """However long the repetition is: its penalty does not make a masked entry."""
    b, v, length = dims(batch=1, vocab=4, length=250)

    def build(mesh):
        x = imp(mesh, np.array([[-np.inf, 3.0, -np.inf, -np.inf]], np.float32), b, v)
        return dry_penalty(x, mtf.ones(mesh, mtf.Shape([b, length]), tf.int32), 250, 0.8)

    np.testing.assert_array_equal(MeshRunner()(build), np.array([[-np.inf, -1e30, -np.inf, -np.inf]], np.float32))

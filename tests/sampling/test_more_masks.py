"""What the masks' table in test_masks.py does not show: which rows XTC chooses; a least number of tokens."""

import functools

import numpy as np
import pytest
import reference
from helpers_cases import LOWEST
from programs import MeshRunner, Program, dims
from sampling.test_masks import MASKS, MESHES, assert_kept, imported, tied_rows

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling.masks import (
    epsilon_mask,
    eta_mask,
    min_p_mask,
    top_k_mask,
    top_p_mask,
    typical_p_mask,
    xtc_mask,
)

# --- XTC -----------------------------------------------------------------------------------

CHANCES = np.float32([0, 2**-149, 2**-33, 2**-32, 3 * 2**-33, 0.1, 0.5, 1 - 2**-24, 1])


@pytest.mark.parametrize("mesh", [("", ""), ("x:2", "batch:x")], ids=lambda mesh: mesh[1] or "one device")
def test_xtc_chooses_rows_by_exact_comparison(mesh):
    """u · 2⁻³² < p in whole numbers, at p's own border and beside it, for a tensor and for a number."""
    chances = np.repeat(CHANCES, 6)
    border = [int(p) if p.is_integer() else int(p) + 1 for p in (float(c) * 2.0**32 for c in chances)]
    apart = [-2, -1, 0, 1, -(2**32), 2**32] * len(CHANCES)
    u = np.array([max(0, min(2**32 - 1, b + d)) for b, d in zip(border, apart)], np.uint32)
    want = [int(n) < b for n, b in zip(u, border)]
    assert 0.3 < np.mean(want) < 0.7
    b, v = dims(batch=len(u), vocab=4)

    def build(mesh, bits, chances):
        x = mtf.zeros(mesh, mtf.Shape([b, v]))
        bits = imported(mesh, bits, b)
        by_row = xtc_mask(x, imported(mesh, chances, b), 0.2, bits)
        return by_row, [xtc_mask(x, float(p), 0.2, bits) for p in CHANCES]

    by_row, by_number = MeshRunner(*mesh)(build, u.view(np.int32), chances)
    # of four equal ones the last stays
    np.testing.assert_array_equal(by_row == 0, np.where(np.array(want)[:, np.newaxis], np.arange(4) == 3, True))
    for i, p in enumerate(CHANCES):
        np.testing.assert_array_equal(by_number[i][chances == p], by_row[chances == p])


def test_xtc_leaves_other_rows_as_they_are(single):
    """Invalid ones too, whatever the rows beside them; but not those of a number out of range."""
    b, v = dims(batch=6, vocab=8)
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    x[1, 3], x[2, 5], x[3] = np.nan, np.inf, -np.inf
    bits = np.int32([-1, -1, -1, -1, -1, 0])
    chances = np.float32([0.5, 0.5, 0, 1, 1.5, 0.5])
    thresholds = np.float32([0.01, 0.01, 0.01, 0.01, 0.01, 1.5])

    def build(mesh, x, bits, chances, thresholds):
        return xtc_mask(imported(mesh, x, b, v), *(imported(mesh, t, b) for t in (chances, thresholds, bits)))

    got = single(build, x, bits, chances, thresholds)
    np.testing.assert_array_equal(got[:4], x[:4])
    assert np.isnan(got[4:]).all()


def test_xtc_at_the_threshold(single):
    """An entry of just that probability is at it, up to 0.5."""
    b, v = dims(batch=3, vocab=4)
    x = np.float32([[0, 0, -np.inf, -np.inf], [0, 0, 0, 0], [0, 0, 0, 0]])
    thresholds = np.float32([0.5, 0.25, 0.25 + 2**-25])

    def build(mesh, x, thresholds):
        x, bits = imported(mesh, x, b, v), mtf.zeros(mesh, mtf.Shape([b]), tf.int32)
        return xtc_mask(x, 1, imported(mesh, thresholds, b), bits)

    kept = single(build, x, thresholds) == x
    np.testing.assert_array_equal(kept, [[False, True, True, True], [False] * 3 + [True], [True] * 4])


def test_xtc_numbers():
    """The chance 0 and thresholds above 0.5 build nothing; what is out of range, or no bits, is named."""
    with tf.Graph().as_default():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        b, v = dims(batch=4, vocab=8)
        x, bits = mtf.ones(mesh, mtf.Shape([b, v])), mtf.zeros(mesh, mtf.Shape([b]), tf.int32)
        assert xtc_mask(x, 0, 0.1, bits) is x and xtc_mask(x, 1, 0.51, bits) is x
        with pytest.raises(ValueError, match="xtc_probability=1.5; a number from 0 to 1 is needed"):
            xtc_mask(x, 1.5, 0.1, bits)
        with pytest.raises(ValueError, match="uniform_bits=0.5; an int32 mtf.Tensor"):
            xtc_mask(x, 0.5, 0.1, 0.5)
        with pytest.raises(ValueError, match="uniform_bits has shape"):
            xtc_mask(x, 0.5, 0.1, mtf.zeros(mesh, mtf.Shape([v]), tf.int32))


# --- min_tokens_to_keep ----------------------------------------------------------------------

AT_LEAST = [top_p_mask, typical_p_mask, min_p_mask, epsilon_mask, eta_mask]
by_mask = pytest.mark.parametrize("mask", AT_LEAST, ids=lambda mask: mask.__name__)
ROWS, SIZE = 1000, 520
# numbers that keep less than the least number, and more
OPTIONS = {
    top_p_mask: [0.0, 0.1, 0.9],
    typical_p_mask: [1e-3, 0.1, 0.9],
    min_p_mask: [1.0, 0.5, 0.01],
    epsilon_mask: [0.99, 0.05, 3e-4],
    eta_mask: [0.99, 0.5, 3e-4],
}


@functools.cache
def kept_on(mesh):
    """All these masks in one graph."""
    batch, vocab = dims(batch=ROWS, vocab=SIZE)

    def build(mesh, x, dy, n, *options):
        x, dy, n = imported(mesh, x, batch, vocab), imported(mesh, dy, batch, vocab), imported(mesh, n, batch)
        turned = mtf.transpose(x, [vocab, batch])
        out = {}
        for mask, option in zip(AT_LEAST, options):
            option = imported(mesh, option, batch)
            y = mask(x, option, min_tokens_to_keep=n)
            by_number = mask(turned, option, vocab, min_tokens_to_keep=7)
            gradient = mtf.gradients([mtf.reduce_sum(y * dy)], [x])[0]
            out[mask.__name__] = [y, mtf.transpose(by_number, x.shape), gradient]
        return out

    wide, rows = (tf.float32, (ROWS, SIZE)), (tf.float32, (ROWS,))
    return Program(build, [wide, wide, (tf.int32, (ROWS,)), *[rows] * len(AT_LEAST)], runner=MeshRunner(*mesh))


@by_mask
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: mesh[1] or "one device")
def test_at_least_so_many_are_kept(mesh, mask):
    """Of 1,000 rows, each with its own number: those of the definition. An option that masks nothing still does not."""
    rng, (definition, _, neutral, _) = np.random.default_rng(1), MASKS[mask]
    x, dy = tied_rows(ROWS, SIZE), rng.standard_normal((ROWS, SIZE)).astype(np.float32)
    n, own = rng.choice([1, 2, 3, 7, 40, 100], ROWS).astype(np.int32), rng.choice(OPTIONS[mask], ROWS)
    own = np.where(np.arange(ROWS) % 9 == 0, neutral, own).astype(np.float32)
    options = [own if m is mask else np.full(ROWS, MASKS[m][2], np.float32) for m in AT_LEAST]
    got, by_number, gradient = kept_on(mesh)(x, dy, n, *options, key=mask.__name__)
    np.testing.assert_array_equal(got[::9], x[::9])
    rest = own != neutral
    for found, least in ((got[rest], n[rest, np.newaxis]), (by_number[rest], 7)):
        assert_kept(found, x[rest], lambda x, option, n=least: reference.at_least(definition, x, option, n),
                    own[rest, np.newaxis])  # fmt: skip
    np.testing.assert_array_equal(gradient, np.where(got == x, dy, 0))
    there = np.sum(x > LOWEST, -1)
    assert np.all(np.sum(got > LOWEST, -1) >= np.minimum(n, there))
    assert np.sum(rest & (np.sum(got > LOWEST, -1) == n)) > 200


@by_mask
def test_what_is_masked_or_invalid_stays_so(single, mask):
    """−inf and the lowest number are not kept, rows with NaN and +inf are NaN, and so are those of a wrong number."""
    b, v = dims(batch=9, vocab=8)
    x = np.tile(np.float32([3, LOWEST, -np.inf, 2, 1, 2, LOWEST, 0]), (9, 1))
    x[1, 3], x[2, 7], x[3] = np.nan, np.inf, -np.inf
    n = np.array([100, 3, 3, 3, 0, 101, -1, 5, 1], np.int32)

    def build(mesh, x, n):
        return mask(imported(mesh, x, b, v), OPTIONS[mask][0], masked=-np.inf, min_tokens_to_keep=imported(mesh, n, b))

    got = single(build, x, n)
    assert np.isnan(got[[1, 2, 4, 5, 6]]).all() and np.isneginf(got[3]).all()
    there = x[0] > LOWEST
    np.testing.assert_array_equal(got[[0, 7]], np.where(there, x[[0, 7]], -np.inf))
    assert np.sum(got[8] > -np.inf) == 1


def test_the_number_1_adds_nothing():
    """The same operations as without it; a wrong number is named."""
    b, v = dims(batch=4, vocab=300)

    def operations(**keywords):
        program = Program(
            lambda mesh, x: min_p_mask(imported(mesh, x, b, v), 0.1, **keywords), [(tf.float32, (4, 300))]
        )
        return [op.type for op in program.graph.get_operations()]

    assert operations() == operations(min_tokens_to_keep=1) != operations(min_tokens_to_keep=2)
    with tf.Graph().as_default():
        x = mtf.ones(mtf.Mesh(mtf.Graph(), "mesh"), mtf.Shape([b, v]))
        for n in (0, 101, 2.0, float("nan")):
            with pytest.raises(ValueError, match=f"min_tokens_to_keep={n!r}; a whole number from 1 to 100 is needed"):
                min_p_mask(x, 0, min_tokens_to_keep=n)
        with pytest.raises(ValueError, match="min_tokens_to_keep has shape"):
            min_p_mask(x, 0.1, min_tokens_to_keep=[1, 2])


@pytest.mark.slow
def test_at_least_so_many_in_half_precision(single):
    """Ties by the dozen: as many as top-k keeps, and the same ones."""
    b, v = dims(batch=20, vocab=300)
    x = np.random.default_rng(2).standard_normal((20, 300)).astype(np.float32)

    def build(mesh, x):
        x = mtf.cast(imported(mesh, x, b, v), tf.bfloat16)
        return [mtf.cast(y, tf.float32) for y in (min_p_mask(x, 1, min_tokens_to_keep=30), top_k_mask(x, 30))]

    by_number, top_k = single(build, x)
    np.testing.assert_array_equal(by_number, top_k)

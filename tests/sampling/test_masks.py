"""The masks that keep likelier entries, against their definitions in float64. (top_k_mask: test_utils.py.)"""

import functools

import numpy as np
import pytest
import reference
from helpers_cases import LOWEST
from programs import MeshRunner, Program, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sampling.masks import (
    epsilon_mask,
    eta_mask,
    min_p_mask,
    mirostat_mask,
    top_h_mask,
    top_n_sigma_mask,
    top_p_mask,
    typical_p_mask,
    xtc_mask,
)


def xtc_always(x, threshold, dim=None, *, masked=None):
    """XTC that chooses every row. (Which rows it chooses: test_more_masks.py.)"""
    bits = mtf.zeros(x.mesh, x.shape - (dim or x.shape[-1]), tf.int32)
    return xtc_mask(x, 1, threshold, bits, dim, masked=masked)


# mask: (its definition, numbers to try, the number that masks nothing, numbers out of range)
MASKS = {
    top_p_mask: (reference.top_p_keep, [0.0, 0.3, 0.9, 0.9999], 1, [-0.1, 1.1, float("nan")]),
    typical_p_mask: (reference.typical_p_keep, [0.2, 0.9], 1, [0, -0.1, 1.1, float("nan")]),
    min_p_mask: (reference.min_p_keep, [0.01, 0.3, 1.0], 0, [-0.1, 1.1, float("nan")]),
    epsilon_mask: (reference.epsilon_keep, [3e-4, 0.05], 0, [-0.1, 1, float("nan")]),
    eta_mask: (reference.eta_keep, [3e-4, 0.5], 0, [-0.1, 1, float("nan")]),
    top_n_sigma_mask: (reference.top_n_sigma_keep, [0.5, 1.0, 3.0], 0, [-0.1, float("inf"), float("nan")]),
    top_h_mask: (reference.top_h_keep, [0.1, 0.4, 1.0], 0, [-0.1, 1.1, float("nan")]),
    mirostat_mask: (reference.mirostat_keep, [5.0, 9.5, 2.5, -1.0], float("inf"), [float("nan")]),
    xtc_always: (reference.xtc_keep, [0.1, 0.003, 0.02, 0.45, 0.0, 1e-30], 1, [-0.1, 1.1, float("nan")]),
}
by_mask = pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
ROWS, SIZE = 1000, 520
BATCH, VOCAB = dims(batch=ROWS, vocab=SIZE)


class Masked:
    """All the masks in one graph on a mesh, for the tests to feed with rows of 520 entries."""

    def __init__(self, *mesh):
        inputs = [(tf.float32, (ROWS, SIZE))] * 2 + [(tf.float32, (ROWS,))] * len(MASKS)
        self._program = Program(self._build, inputs, runner=MeshRunner(*mesh))

    @staticmethod
    def _build(mesh, x, dy, *options):
        x, dy = imported(mesh, x, BATCH, VOCAB), imported(mesh, dy, BATCH, VOCAB)
        turned = mtf.transpose(x, [VOCAB, BATCH])
        out = {}
        for mask, option in zip(MASKS, options):
            y = mask(x, imported(mesh, option, BATCH))
            gradient = mtf.gradients([mtf.reduce_sum(y * dy)], [x])[0]
            out[mask.__name__] = [y, mtf.transpose(mask(turned, MASKS[mask][1][1], VOCAB), x.shape), gradient]
        return out

    def __call__(self, mask, x, own, dy=0):
        """What is left of x for a row's own options; the same for the second of the numbers to try in place of the
        tensor, along another order of dims; and x's gradient for dy with the own options."""

        def rows(a, *shape):  # repeated, as many as the graph has
            return np.resize(np.broadcast_to(a, (len(x), *shape)), (ROWS, *shape))

        options = [own if m is mask else neutral for m, (_, _, neutral, _) in MASKS.items()]
        out = self._program(rows(x, SIZE), rows(dy, SIZE), *map(rows, options), key=mask.__name__)
        return [a[: len(x)] for a in out]


@functools.cache
def masked_on(mesh):
    return Masked(*mesh)


MESHES = [("", ""), ("x:2", "vocab:x"), pytest.param(("x:2,y:2", "batch:x,vocab:y"), marks=pytest.mark.slow)]


@pytest.fixture(params=MESHES, ids=lambda mesh: mesh[1] or "one device")
def masked(request):
    return masked_on(request.param)


def imported(mesh, x, *shape):
    return mtf.import_tf_tensor(mesh, x, mtf.Shape(shape))


def tied_rows(n, size):
    """float32 [n, size]: of many spreads and grids; some constant, with masked entries, or far from 0."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal((n, size)) * 2.0 ** rng.integers(-3, 4, (n, 1))
    grid = rng.choice([0, 0.01, 0.5, 4], (n, 1))
    x = np.where(grid > 0, np.round(x / np.where(grid > 0, grid, 1)) * grid, x)
    x[::50] = 1.5
    x[1::50] = np.where(np.arange(size) == size // 2, 30, 0)  # all mass in one entry, and the rest equal
    x[2::50, size // 3 :] = -np.inf
    x[3::50, : -size // 3] = LOWEST
    x[4::50] += 1000
    x[5::50] = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    x[6::50] = -np.exp2(-rng.integers(0, 40, size))  # nearer to the largest, and nearer
    return x.astype(np.float32)


def assert_kept(got, x, definition, option, low=LOWEST):
    """Survivors as they were, the rest masked, wherever the definition is clear in float32."""
    keep, clear = definition(np.where(x == LOWEST, -np.inf, x), np.float64(np.float32(option)))
    np.testing.assert_array_equal(np.where(clear, got, 0), np.where(clear, np.where(keep, x, low), 0))
    assert clear.mean() > 0.95


@by_mask
def test_kept_are_those_of_the_definition(masked, mask):
    """1,000 rows, each with its own number, the neutral one among them; or one number for all, dims in the other
    order."""
    definition, options, neutral, _ = MASKS[mask]
    x = tied_rows(ROWS, SIZE)
    own = np.random.default_rng(0).choice(options, ROWS).astype(np.float32)
    own[::9] = neutral
    by_row, by_number, _ = masked(mask, x, own)
    same = own == np.float32(options[1])
    np.testing.assert_array_equal(by_number[same], by_row[same])
    np.testing.assert_array_equal(by_row[::9], x[::9])
    rest = own != neutral
    assert_kept(by_row[rest], x[rest], definition, own[rest, np.newaxis])
    assert_kept(by_number, x, definition, options[1])


@by_mask
@pytest.mark.parametrize("batch, size", [(1, 2), (3, 40), (2, 50257)])
def test_sizes(mask, batch, size):
    """Every number twice: ties, but so few that none goes by its index alone."""
    definition, options, *_ = MASKS[mask]
    x = np.random.default_rng(1).standard_normal((batch, size)).astype(np.float32) * 3
    x[:, size - size // 2 :] = x[:, : size // 2]
    b, v = dims(batch=batch, vocab=size)
    masked = MeshRunner()(lambda mesh, x: [mask(imported(mesh, x, b, v), option) for option in options], x)
    for got, option in zip(masked, options, strict=True):
        assert_kept(got, x, definition, option)


def test_ties_go_to_the_lower_index(masked):
    """Hundreds of them, across the shards' borders, where rounding leaves no doubt: by counting."""
    x = np.zeros((4, SIZE), np.float32)
    x[1, 260:] = -1e4
    x[2, ::2] = -np.inf
    x[3, 7] = np.log(SIZE - 1)  # half of the mass
    at = np.arange(SIZE)
    for mask in (top_p_mask, typical_p_mask):
        kept = masked(mask, x, 0.75)[0]
        np.testing.assert_array_equal(kept[:3] == 0, [at < 390, at < 195, (at % 2 > 0) & (at < 390)])
        if mask is top_p_mask:
            assert kept[3, 7] == x[3, 7]
            assert abs(np.sum(kept[3] == 0) - (SIZE - 1) / 2) <= 1
            assert np.all(np.diff(np.flatnonzero(kept[3] == 0)) <= 2)


@pytest.mark.slow
@by_mask
@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16], ids=lambda dtype: dtype.name)
def test_half_precision(mask, dtype):
    definition, options, *_ = MASKS[mask]
    x = tied_rows(100, 300)
    x[np.isinf(x) | (x == LOWEST)] = -2e4
    b, v = dims(batch=100, vocab=300)

    def build(mesh, x):
        x = mtf.cast(imported(mesh, x, b, v), dtype)
        return [mtf.cast(t, tf.float32) for t in (x, mask(x, options[1], v), mask(x, options[1], masked=-np.inf))]

    x, got, infinite = MeshRunner()(build, x)
    assert_kept(got, x, definition, options[1], low=float(dtype.min))
    np.testing.assert_array_equal(infinite, np.where(got == float(dtype.min), -np.inf, got))


@by_mask
def test_invalid_rows_stay_invalid(masked, mask):
    """NaN, +inf and options out of range make their own rows NaN; a row of nothing but −inf stays. (A row that XTC
    does not choose stays as it is.)"""
    _, options, neutral, wrong = MASKS[mask]
    x = tied_rows(16, SIZE)
    bad = x.copy()
    bad[0, 3] = bad[1, -1] = np.nan
    bad[2, 0] = bad[3, -1] = np.inf
    bad[4] = -np.inf
    own = np.full(16, options[1], np.float32)
    own[6 : 6 + len(wrong)] = wrong
    own[12] = neutral
    bad[12, 5] = np.nan
    got, by_number, _ = masked(mask, bad, own)
    good = masked(mask, x, own)[1]
    assert np.isnan(by_number[[0, 1, 2, 3, 12]]).all() and not np.isnan(by_number[5:12]).any()
    invalid = [0, 1, 2, 3, *range(6, 6 + len(wrong)), 12]
    assert np.isnan(got[12]).any() if mask is xtc_always else np.isnan(got[12]).all()
    assert np.isnan(got[invalid[:-1]]).all()
    assert np.isneginf(got[4]).all()
    rest = np.setdiff1d(np.arange(16), [4, *invalid])
    np.testing.assert_array_equal(got[rest], good[rest])


def test_a_border_that_float32_has_no_number_for(single):
    """Far from 0: the next one below is masked, also where it is the nearest."""
    x = np.float32([[1e6, 1e6 - 2.25, 1e6 - 2.3125], [-1e6, -1e6 - 2.25, -1e6 - 2.3125]])
    b, v = dims(batch=2, vocab=3)
    got = single(lambda mesh, x: min_p_mask(imported(mesh, x, b, v), 0.1), x)
    np.testing.assert_array_equal(got > LOWEST, [[True, True, False]] * 2)


def test_typical_of_nearly_equal_logits():
    """Where the mean logit is all rounding, layouts agree none the less."""
    x = np.random.default_rng(4).standard_normal((2, SIZE)).astype(np.float32) * np.float32([[1e-25], [1e-15]])
    one, split = (masked_on(mesh)(typical_p_mask, x, 0.25)[0] for mesh in MESHES[:2])
    np.testing.assert_array_equal(split, one)
    np.testing.assert_allclose((one > LOWEST).sum(1), 130, atol=1)


@by_mask
def test_gradient_flows_through_survivors(masked, mask):
    x = np.random.default_rng(2).standard_normal((4, SIZE)).astype(np.float32)
    dy = np.random.default_rng(3).standard_normal(x.shape).astype(np.float32)
    y, _, dx = masked(mask, x, MASKS[mask][1][1], dy)
    assert 0 < np.mean(y == LOWEST) < 1
    np.testing.assert_array_equal(dx, np.where(y == LOWEST, 0, dy))


@by_mask
def test_numbers(mask):
    """The neutral one builds nothing; what is out of range is named."""
    _, _, neutral, wrong = MASKS[mask]
    with tf.Graph().as_default():
        x = mtf.ones(mtf.Mesh(mtf.Graph(), "mesh"), dims(batch=4, vocab=8))
        assert mask(x, neutral) is x
        for number in wrong:
            with pytest.raises(ValueError, match=f"={number}; a (number (from 0 to 1|is)|finite number of at least 0)"):
                mask(x, number)
        with pytest.raises(ValueError, match="has shape"):
            mask(x, [0.5, 0.5])

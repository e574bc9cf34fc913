"""The masks that keep likelier entries, against their definitions in float64. (top_k_mask: test_utils.py.)"""

import numpy as np
import pytest
import reference
from helpers_cases import LOWEST
from programs import MeshRunner, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.models.masks import epsilon_mask, eta_mask, min_p_mask, top_p_mask, typical_p_mask

# mask: (its definition, numbers to try, the number that masks nothing, numbers out of range)
MASKS = {
    top_p_mask: (reference.top_p_keep, [0.0, 0.3, 0.9, 0.9999], 1, [-0.1, 1.1, float("nan")]),
    typical_p_mask: (reference.typical_p_keep, [0.2, 0.9], 1, [0, -0.1, 1.1, float("nan")]),
    min_p_mask: (reference.min_p_keep, [0.01, 0.3, 1.0], 0, [-0.1, 1.1, float("nan")]),
    epsilon_mask: (reference.epsilon_keep, [3e-4, 0.05], 0, [-0.1, 1, float("nan")]),
    eta_mask: (reference.eta_keep, [3e-4, 0.5], 0, [-0.1, 1, float("nan")]),
}
by_mask = pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
MESHES = [("", ""), ("x:4", "vocab:x"), ("x:2,y:2", "batch:x,vocab:y")]


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: mesh[1] or "one device")
def runner(request):
    return MeshRunner(*request.param)


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
def test_kept_are_those_of_the_definition(runner, mask):
    """1,000 rows; one number for all, and a row's own, dims in either order, with the neutral one among them."""
    definition, options, neutral, _ = MASKS[mask]
    x = tied_rows(1000, 520)
    own = np.random.default_rng(0).choice(options, 1000).astype(np.float32)
    own[::9] = neutral
    b, v = dims(batch=1000, vocab=520)

    def build(mesh, x, own):
        x, own = imported(mesh, x, b, v), imported(mesh, own, b)
        if runner.impl.size > 1:  # a split graph takes seconds to build
            return [mask(x, own), mask(mtf.transpose(x, [v, b]), own, v)]
        return [mask(x, own), mask(mtf.transpose(x, [v, b]), own, v), *(mask(x, option, v) for option in options)]

    by_row, moved, *by_number = runner(build, x, own)
    np.testing.assert_array_equal(moved, by_row.T)
    np.testing.assert_array_equal(by_row[::9], x[::9])
    rest = own != neutral
    assert_kept(by_row[rest], x[rest], definition, own[rest, np.newaxis])
    for got, option in zip(by_number, options):
        assert_kept(got, x, definition, option)


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


def test_ties_go_to_the_lower_index(runner):
    """Hundreds of them, across the shards' borders, where rounding leaves no doubt: by counting."""
    size = 1200
    x = np.zeros((4, size), np.float32)
    x[1, 600:] = -1e4
    x[2, ::2] = -np.inf
    x[3, 7] = np.log(size - 1)  # half of the mass
    b, v = dims(batch=4, vocab=size)
    got = runner(lambda mesh, x: [f(imported(mesh, x, b, v), 0.75) for f in (top_p_mask, typical_p_mask)], x)
    at = np.arange(size)
    for kept in got:
        np.testing.assert_array_equal(kept[:3] == 0, [at < 900, at < 450, (at % 2 > 0) & (at < 900)])
    assert kept[3, 7] == LOWEST or got[0][3, 7] == x[3, 7]
    assert abs(np.sum(got[0][3] == 0) - (size - 1) / 2) <= 1 and np.all(np.diff(np.flatnonzero(got[0][3] == 0)) <= 2)


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
def test_invalid_rows_stay_invalid(runner, mask):
    """NaN, +inf and options out of range make their own rows NaN; a row of nothing but −inf stays."""
    _, options, neutral, wrong = MASKS[mask]
    x = tied_rows(16, 520)
    bad = x.copy()
    bad[0, 3] = bad[1, -1] = np.nan
    bad[2, 0] = bad[3, -1] = np.inf
    bad[4] = -np.inf
    own = np.full(16, options[1], np.float32)
    own[6 : 6 + len(wrong)] = wrong
    own[12] = neutral
    bad[12, 5] = np.nan
    b, v = dims(batch=16, vocab=520)

    def build(mesh, bad, x, own):
        own = imported(mesh, own, b)
        bad, x = imported(mesh, bad, b, v), imported(mesh, x, b, v)
        return [mask(bad, own), mask(x, options[1]), mask(bad, options[1])]

    got, good, by_number = runner(build, bad, x, own)
    assert np.isnan(by_number[[0, 1, 2, 3, 12]]).all() and not np.isnan(by_number[5:12]).any()
    invalid = [0, 1, 2, 3, *range(6, 6 + len(wrong)), 12]
    assert np.isnan(got[invalid]).all()
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
    x = np.random.default_rng(4).standard_normal((2, 520)).astype(np.float32) * np.float32([[1e-25], [1e-15]])
    b, v = dims(batch=2, vocab=520)
    one, split = (
        MeshRunner(*mesh)(lambda mesh, x: typical_p_mask(imported(mesh, x, b, v), 0.25), x) for mesh in MESHES[:2]
    )
    np.testing.assert_array_equal(split, one)
    np.testing.assert_allclose((one > LOWEST).sum(1), 130, atol=1)


@by_mask
def test_gradient_flows_through_survivors(runner, mask):
    _, options, *_ = MASKS[mask]
    x = np.random.default_rng(2).standard_normal((4, 300)).astype(np.float32)
    dy = np.random.default_rng(3).standard_normal(x.shape).astype(np.float32)
    b, v = dims(batch=4, vocab=300)

    def build(mesh, x, dy):
        x = imported(mesh, x, b, v)
        y = mask(x, options[1])
        return [y, mtf.gradients([mtf.reduce_sum(y * imported(mesh, dy, b, v))], [x])[0]]

    y, dx = runner(build, x, dy)
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
            with pytest.raises(ValueError, match=f"={number}; a number from 0 to 1"):
                mask(x, number)
        with pytest.raises(ValueError, match="has shape"):
            mask(x, [0.5, 0.5])

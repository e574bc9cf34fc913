"""Properties that hold for whatever rows, on whatever layout: every public operation on hard values.

A graph is built once for each operation and place, and hypothesis draws what is fed to it. With HYPOTHESIS_PROFILE=fuzz
(`make fuzz`) the values are others in every run.
"""

import functools

import hypothesis
import numpy as np
import pytest
import reference
from hypothesis import example, given
from hypothesis import strategies as st
from programs import MeshRunner, Program
from strategies import FURTHER, ONE_DEVICE, SPLIT, Place, Row, Sample, info, rounded, samples, seeds

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh import ops
from gpt_neo_sampling.models import utils
from gpt_neo_sampling.sampling import next_token as chain
from gpt_neo_sampling.sampling.categorical import grouped_draw, score_draw
from gpt_neo_sampling.sampling.masks import (
    epsilon_mask,
    eta_mask,
    min_p_mask,
    top_k_mask,
    top_p_mask,
    typical_p_mask,
)
from gpt_neo_sampling.sampling.random import counter_bits
from gpt_neo_sampling.sampling.top_k import first_argmax, top_k

pytestmark = pytest.mark.any_version

NORMAL = 2.0**-126  # TensorFlow takes what is nearer to 0 for 0


@functools.cache
def _program(ops, place, inputs):
    return Program(functools.partial(ops, place), inputs, runner=place.runner)


def run(ops, place, *arrays):
    """{name: array [rows, …]} of what ops(place, mesh, *tensors) returns, for arrays [rows, …]."""
    arrays = [place.shaped(a) for a in arrays]
    out = _program(ops, place, tuple((a.dtype.name, a.shape) for a in arrays))(*arrays)
    depth = len(place.rows.dims)
    return {name: a.reshape(place.rows.size, *a.shape[depth:]) for name, a in out.items()}


def assert_same_values(got, want):
    """{name: array}, to the last bit but for the sign of 0; one NaN is as good as another."""
    for name in want:
        a, b = got[name], want[name]
        assert a.dtype == b.dtype and a.shape == b.shape
        same = (as_seen(a) == as_seen(b)) | (np.isnan(a) & np.isnan(b))
        assert same.all(), f"{name}: {a[~same]} for {b[~same]} at {np.argwhere(~same)}"


def assert_same_alone_and_on_one_device(out, ops, place, row, *arrays):
    """What a row gets depends neither on the layout nor on the rows beside it."""

    def repeated(a):
        return np.repeat(a[row : row + 1], len(a), 0)

    if place.mesh:
        on_one_device = run(ops, place.on_one_device(), *arrays)
        assert_same_values({name: on_one_device[name] for name in out}, out)
    alone = run(ops, place, *map(repeated, arrays))
    assert_same_values({name: alone[name] for name in out}, {name: repeated(a) for name, a in out.items()})


def is_invalid(x):
    return (np.isnan(x) | (x == np.inf)).any(-1)


def bits(x):
    return x.view(np.int32)


def as_seen(x):
    return np.where(abs(x) < NORMAL, 0, x)


def moved(x, seed, dtype):
    """(x, permuted and where that can be done without rounding shifted; the permutation)."""
    rng = np.random.default_rng(seed)
    order, shift = rng.permutation(x.shape[1]), rng.choice([1, -8, 1024], (len(x), 1))
    y = np.where(np.isfinite(x), x.astype(np.float64) + shift, x)
    with np.errstate(invalid="ignore"):
        exact = ((y - x == shift) & (rounded(y, dtype) == y) | ~np.isfinite(x)).all(-1, keepdims=True)
    return np.where(exact, y, x).astype(np.float32)[:, order], order


def sample_of(place, *recipes):
    """The rows given, and ordinary ones."""
    return Sample(place, recipes + (Row("normal"),) * (place.rows.size - len(recipes)))


def with_planted(*planted, kind="normal"):
    return Row(kind, 0, planted)


# What the properties failed on once.
WIDE_NAN = sample_of(SPLIT[1], *[with_planted(("nan", 0.0))] * 4)
ONE_NAN = sample_of(Place("vocab:1"), with_planted(("nan", 0.0)))
OVERFLOWING = sample_of(Place("batch:4,vocab:1040"), Row("every magnitude"), with_planted(
    ("-inf", 0.0), ("largest", 0.2), ("largest", 0.4)
))  # fmt: skip
LOWEST_BEHIND_INFINITY = sample_of(SPLIT[0], with_planted(("-inf", 0.0), ("lowest", 0.5)))
# sums along a first dim, which TensorFlow adds up one by one, were off by 9e-6 of them
FIRST_DIM = Sample(Place("vocab:1040,batch:4", "x:2", "vocab:x"), (*[Row("normal")] * 3, Row("one-hot")))
HALFS_LOWEST = Sample(
    Place("a:2,vocab:67,b:3", "x:2", "a:x", "float16"),
    (*[Row("normal")] * 5, Row("equal", 197, (("lowest", 0.5),))),
)
TIES = Sample(Place("vocab:130,batch:5"), (*[Row("normal")] * 4, Row("ties", 32758)))
FAR_FROM_0 = sample_of(ONE_DEVICE[2], Row("far from 0"), Row("equal", 1))


# --- Distributions ------------------------------------------------------------------------

ALPHAS = np.array([1, 1 + 2.0**-23, 1.05, 1.3, 1.5, 1.7, 2, 0.99, 2.01, np.nan], np.float32)


def distributions(place, mesh, x, dy, alpha):
    x, dy, alpha = place.whole_in(mesh, x), place.whole_in(mesh, dy), place.rows_in(mesh, alpha)
    out = {"x": x}
    for name, p in {
        "softmax": utils.softmax(x, place.vocab),
        "1.5": utils.entmax(x, 1.5, place.vocab),
        "own": utils.entmax(x, alpha, place.vocab),
    }.items():
        out[name] = p
        out[name + " grad"] = mtf.gradients([mtf.reduce_sum(p * dy)], [x])[0]
    return {name: place.whole_out(t) for name, t in out.items()}


def unit(dtype):
    return {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]


@example(WIDE_NAN, 0)
@example(OVERFLOWING, 0)
@example(TIES, 230)
@example(FIRST_DIM, 1)
@given(samples(), seeds)
def test_softmax_and_entmax(sample, seed):
    place, x = sample.place, sample.x
    rng = np.random.default_rng(seed)
    alpha, dy = rng.choice(ALPHAS, len(x)), rounded(rng.standard_normal(x.shape), place.dtype)
    y, order = moved(x, seed, place.dtype)
    out = run(distributions, place, x, dy, alpha)
    again = run(distributions, place, y, dy, alpha)
    np.testing.assert_array_equal(out["x"], x)
    u, least = unit(place.dtype), info(place.dtype)[2]
    for name, of in (("softmax", np.ones_like(alpha)), ("1.5", np.full_like(alpha, 1.5)), ("own", alpha)):
        p, dx = out[name], out[name + " grad"]
        valid = ~is_invalid(x) & (x > -np.inf).any(-1) & (of >= 1) & (of <= 2)
        assert np.isnan(p[~valid]).all() and np.isfinite(p[valid]).all()
        np.testing.assert_allclose(p[valid].sum(-1), 1, atol=4e-6 + u + x.shape[1] * least)
        assert (p[valid] >= 0).all()
        for row in np.flatnonzero(valid):
            want = reference.entmax_bisect(x[row], np.float64(of[row]))
            np.testing.assert_allclose(p[row], want, rtol=u, atol=4e-6)
            by_x = p[row][np.argsort(x[row], kind="stable")]
            # entmax takes exp of a rounded log p, and a kernel's last entries may round otherwise than those before
            rounding = np.maximum(1e-6, -(2.0**-22) * np.log(np.maximum(by_x[1:], 1e-38)))
            assert (np.diff(by_x) >= -rounding * by_x[1:] - least).all()
            assert np.abs(dx[row].sum(dtype=np.float64)) <= 4 * u * np.abs(dx[row]).sum() + 1e-5
            assert np.isfinite(dx[row]).all() and not dx[row][p[row] == 0].any()
        np.testing.assert_allclose(again[name][valid], p[valid][:, order], rtol=2 * u, atol=4e-6)


def losses(place, mesh, x, target):
    x, target = place.whole_in(mesh, x), place.rows_in(mesh, target)
    out = {}
    for alpha in LOSS_ALPHAS:
        loss = utils.entmax_cross_entropy_with_logits(x, target, place.vocab, alpha=alpha)
        grad = mtf.gradients([mtf.reduce_sum(loss)], [x])[0]
        out.update({f"{alpha}": loss, f"{alpha} grad": place.whole_out(grad)})
    return out


LOSS_ALPHAS = (1, 1.3, 2)


@pytest.mark.slow
@example(FIRST_DIM, 0)
@given(samples(), seeds)
def test_entmax_loss(sample, seed):
    place, x = sample.place, sample.x
    n = place.vocab.size
    target = np.random.default_rng(seed).integers(-1, n + 1, len(x)).astype(np.int32)
    out = run(losses, place, x, target)
    hit = target[:, np.newaxis] == np.arange(n)
    valid = ~is_invalid(x) & (x > -np.inf).any(-1)
    for alpha in LOSS_ALPHAS:
        loss, dx = out[f"{alpha}"], out[f"{alpha} grad"]
        assert np.isnan(loss[~valid]).all()
        outside = valid & ~hit.any(-1)
        assert not loss[outside].any() and not dx[outside].any()
        for row in np.flatnonzero(valid & hit.any(-1)):
            p = reference.entmax_bisect(x[row], alpha)
            np.testing.assert_allclose(dx[row], p - hit[row], rtol=unit(place.dtype), atol=5e-6)
            assert abs(dx[row].sum(dtype=np.float64)) < 1e-5 + n * unit(place.dtype)
            far = x[row].max().astype(np.float64) - x[row, target[row]]  # above float32's largest, it may be infinite
            if far < 1e38:
                want = reference.entmax_loss(x[row] - x[row].max().astype(np.float64), hit[row], alpha)
                np.testing.assert_allclose(loss[row], want, rtol=2e-6, atol=1e-5 + 2e-6 * far)
            assert loss[row] >= -1e-5


# --- Masks --------------------------------------------------------------------------------

K_MAX = 20
WRONG = [-0.1, 1.1, np.nan]
MASKS = {  # mask: values to choose from, the neutral one, those out of range
    top_p_mask: ([0, 1e-6, 0.3, 0.5, 0.9, 0.9999], 1, WRONG),
    typical_p_mask: ([1e-6, 0.2, 0.5, 0.9], 1, [*WRONG, 0]),
    min_p_mask: ([1e-30, 0.01, 0.1, 0.5, 1], 0, WRONG),
    epsilon_mask: ([1e-30, 3e-4, 0.1, 0.9], 0, [*WRONG, 1]),
    eta_mask: ([1e-30, 3e-4, 0.1, 0.9], 0, [*WRONG, 1]),
}
CLEAR = {min_p_mask: reference.min_p_keep, epsilon_mask: reference.epsilon_keep, eta_mask: reference.eta_keep}


def masks(place, mesh, x, dy, k, *options):
    x, dy = place.whole_in(mesh, x), place.whole_in(mesh, dy)
    out = {"top_k_mask": top_k_mask(x, place.rows_in(mesh, k), place.vocab, max_top_k=K_MAX)}
    if place.vocab.size > 3:
        out["top 3"] = top_k_mask(x, 3, place.vocab)
    out.update({m.__name__: m(x, place.rows_in(mesh, o), place.vocab) for m, o in zip(MASKS, options)})
    out |= {name + " grad": mtf.gradients([mtf.reduce_sum(y * dy)], [x])[0] for name, y in out.items()}
    return {name: place.whole_out(t) for name, t in out.items()}


@example(ONE_NAN, 0, 0)
@example(OVERFLOWING, 0, 0)
@given(samples(), seeds, st.integers(0, 5))
def test_masks(sample, seed, row):
    place, x = sample.place, sample.x
    rng, n = np.random.default_rng(seed), place.vocab.size
    dy = rounded(rng.standard_normal(x.shape), place.dtype)
    k = rng.choice([-1, 0, 1, 2, 3, 7, K_MAX, K_MAX + 1, n, n + 5], len(x)).astype(np.int32)
    options = [
        rng.choice([*some, neutral, *wrong], len(x)).astype(np.float32) for some, neutral, wrong in MASKS.values()
    ]
    out = run(masks, place, x, dy, k, *options)
    assert_same_alone_and_on_one_device(out, masks, place, row % len(x), x, dy, k, *options)
    lowest = info(place.dtype)[0]

    def survivors(name, valid):
        """Which entries stay; the others have the mask's value. Gradients flow through survivors alone."""
        y, grad = out[name], out[name + " grad"]
        kept = (y == x) | (abs(x) < NORMAL) & (y == 0)
        assert (kept | (y == lowest))[valid].all()
        told = (x > lowest) & valid[:, np.newaxis]
        np.testing.assert_array_equal(grad[told], np.where(kept, dy, 0)[told])
        return kept

    for name, ks in {"top_k_mask": k, **({"top 3": np.full_like(k, 3)} if n > 3 else {})}.items():
        invalid = is_invalid(x) | (ks > K_MAX) & (ks < n)
        assert (is_invalid(out[name]) == invalid).all()
        survivors(name, ~invalid)
        for r in np.flatnonzero(~invalid):
            keep = reference.top_k_keep(as_seen(x[r]), ks[r]) if 1 <= ks[r] < n else True
            got, want = (np.maximum(t, lowest) for t in (out[name][r], np.where(keep, x[r], lowest)))
            np.testing.assert_allclose(got, want, rtol=0, atol=NORMAL)

    for mask, option in zip(MASKS, options):
        name, neutral = mask.__name__, MASKS[mask][1]
        invalid = is_invalid(x) | np.isin(option, np.float32(MASKS[mask][2])) | np.isnan(option)
        assert np.isnan(out[name][invalid]).all() and not np.isnan(out[name][~invalid]).any()
        kept = survivors(name, ~invalid)
        unchanged = ~invalid & ((option == neutral) | (x <= lowest).all(-1))
        assert kept[unchanged].all()
        for r in np.flatnonzero(~invalid & ~unchanged):
            x_there = np.where(x[r] > lowest, as_seen(x[r]), -np.inf).astype(np.float64)
            apart = x_there.max() - x_there
            if ((apart > 0) & (apart < 1e-12)).any():  # as likely in float64
                continue
            if mask in CLEAR:
                keep, clear = CLEAR[mask](x_there, np.float64(option[r]))
                clear &= x[r] > lowest
                np.testing.assert_array_equal(kept[r][clear], keep[clear])
            else:
                check_mass(x_there, kept[r], option[r], typical=mask is typical_p_mask)


def check_mass(x, kept, mass, typical):
    """Survivors come first in the mask's order, and are as few as have that mass."""
    there = x > -np.inf
    p = reference.softmax(x)
    key, slack = x, 0
    if typical:
        key = -abs(x - np.sum(p[there] * x[there]))
        slack = 1e-6 * abs(key[there]).max() + 2.0**-20
    kept, lost = kept & there, ~kept & there
    assert kept.any()
    assert key[kept].min() >= key[lost].max(initial=-np.inf) - slack
    assert p[kept].sum() >= mass - 4e-6
    at_border = (key == key[kept].min()) & there
    assert p[kept].sum() - p[at_border].max() < mass + 4e-6 or kept.sum() == 1
    if not typical:  # of equal ones the first
        assert not np.diff(kept[at_border].astype(int)).max(initial=0) > 0


# --- Draws --------------------------------------------------------------------------------

UNIFORMS = np.array([0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24], np.float32)


def some_uniforms(rng, n):
    u = np.where(rng.random(n) < 0.5, rng.choice(UNIFORMS, n), rng.integers(0, 2**24, n) * 2.0**-24)
    return u.astype(np.float32)


def check_drawn(drawn, weights, u1, u2, tolerance):
    """An index that the definition gives for uniforms so near to these."""
    w = weights.astype(np.float64)
    assert w[drawn] > 0
    size = -(-len(w) // 64)
    group = drawn // size
    within = w[group * size :][:size]

    def near(w, at, u):
        before, behind = w[:at].sum() / w.sum(), w[: at + 1].sum() / w.sum()
        assert before - tolerance <= u <= behind + tolerance

    near(np.add.reduceat(w, np.arange(0, len(w), size)), group, u1)
    if within.sum() > 1e-3 * w.sum():
        near(within, drawn - group * size, u2)


def draws(place, mesh, w, u1, u2, stream):
    w, v = place.whole_in(mesh, w), place.vocab
    u1, u2, stream = (place.rows_in(mesh, t) for t in (u1, u2, stream))
    many = mtf.Dimension("samples", 5)
    return {
        "one": utils.sample_categorical(w, v, seed=5, stream=stream, step=3),
        "many": mtf.transpose(
            utils.sample_categorical(w, v, seed=5, stream=stream, samples_dim=many), place.rows + many
        ),
        "given": grouped_draw(w, u1, u2, v),
    }


@pytest.mark.slow
@given(samples(positive=True), seeds, st.integers(0, 5))
def test_draws_from_weights(sample, seed, row):
    place, w = sample.place, sample.x
    rng = np.random.default_rng(seed)
    u1, u2 = some_uniforms(rng, len(w)), some_uniforms(rng, len(w))
    stream = rng.integers(-(2**31), 2**31, len(w)).astype(np.int32)
    out = run(draws, place, w, u1, u2, stream)
    assert_same_alone_and_on_one_device(out, draws, place, row % len(w), w, u1, u2, stream)
    with np.errstate(invalid="ignore"):
        invalid = ~(np.isfinite(w) & (w > -NORMAL)).all(-1) | ~(w > 0).any(-1)
    doubtful = ~invalid & (~(w >= NORMAL).any(-1) | (w < 0).any(-1))
    for drawn in out.values():
        assert (drawn[invalid] == -1).all() and (drawn[~invalid & ~doubtful] >= 0).all()
    w = np.where(w >= NORMAL, w, 0)
    for r in np.flatnonzero(~invalid & ~doubtful):
        assert (w[r][out["many"][r]] > 0).all() and w[r][out["one"][r]] > 0
        check_drawn(out["given"][r], w[r], u1[r], u2[r], 2e-6)


def score_draws(place, mesh, x, u1, u2, factor, alpha):
    x, v = mtf.cast(place.whole_in(mesh, x), tf.float32), place.vocab
    u1, u2, factor, alpha = (place.rows_in(mesh, t) for t in (u1, u2, factor, alpha))
    return {
        "softmax": score_draw(x, u1, u2, v),
        "factor": score_draw(x, u1, u2, v, factor=factor),
        "entmax": score_draw(x, u1, u2, v, alpha, factor=factor),
    }


@pytest.mark.slow
@example(ONE_NAN, 0, 0)
@example(LOWEST_BEHIND_INFINITY, 0, 0)
@given(samples(), seeds, st.integers(0, 5))
def test_draws_from_scores(sample, seed, row):
    place, x = sample.place, sample.x
    rng = np.random.default_rng(seed)
    u1, u2 = some_uniforms(rng, len(x)), some_uniforms(rng, len(x))
    factor = rng.choice([1, 0.01, 3, 2.0**-100, 2.0**126, 0, -1, np.nan], len(x)).astype(np.float32)
    alpha = rng.choice(ALPHAS, len(x))
    out = run(score_draws, place, x, u1, u2, factor, alpha)
    assert_same_alone_and_on_one_device(out, score_draws, place, row % len(x), x, u1, u2, factor, alpha)
    invalid = is_invalid(x) | ~(x > -np.inf).any(-1)
    wrong_factor = invalid | ~(factor > 0)
    for name, bad in {
        "softmax": invalid,
        "factor": wrong_factor,
        "entmax": wrong_factor | ~((alpha >= 1) & (alpha <= 2)),
    }.items():
        assert ((out[name] == -1) == bad).all(), name
        for r in np.flatnonzero(~bad):
            with np.errstate(over="ignore"):
                z = as_seen(x[r])
                z = ((z - z.max()) * (1 if name == "softmax" else factor[r])).astype(np.float32)
            p = reference.entmax_bisect(z, np.float64(alpha[r]) if name == "entmax" else 1)
            # at the edge of the support rounding decides
            check_drawn(out[name][r], np.where(z > -np.inf, np.maximum(p, 1e-12), 0), u1[r], u2[r], 1e-5)


# --- Penalties ----------------------------------------------------------------------------

LENGTH = 6


def penalties(place, mesh, x, ids, begin, end, bias, tokens, penalty, presence, frequency):
    x, v = place.whole_in(mesh, x), place.vocab
    ids = place.rows_in(mesh, ids, mtf.Dimension("length", LENGTH))
    bias = place.rows_in(mesh, bias, v)
    begin, end, tokens, *values = (place.rows_in(mesh, t) for t in (begin, end, tokens, penalty, presence, frequency))
    counts = utils.token_counts(ids, v, begin, end)
    out = {
        "counts": counts,
        "repetition": utils.repetition_penalty(x, counts, values[0], v),
        "presence": utils.presence_frequency_penalty(x, counts, *values[1:], v),
        "bias": utils.logit_bias(x, bias, v),
        "tokens": utils.tokens_mask(x, [0, tokens], v),
        "1-grams": utils.no_repeat_ngram_mask(x, ids, end, 1, v),
        "2-grams": utils.no_repeat_ngram_mask(x, ids, end, 2, v),
    }
    return {name: place.whole_out(t) for name, t in out.items()}


@given(samples(), seeds, st.integers(0, 5))
def test_penalties(sample, seed, row):
    place, x = sample.place, sample.x
    rng, n, m = np.random.default_rng(seed), place.vocab.size, len(x)
    lowest, _, smallest = info(place.dtype)
    ids = rng.choice([-1, 0, 1, 2, n - 1, n, 10**9], (m, LENGTH)).astype(np.int32)
    begin, end = (rng.integers(0, LENGTH + 1, m).astype(np.int32) for _ in range(2))
    bias = rng.choice([0, -0.0, 1.5, -1e38, 1e38, -np.inf], x.shape).astype(np.float32)
    bias[rng.random(m) < 0.2, n // 2] = rng.choice([np.nan, np.inf])
    tokens = rng.integers(-1, n + 1, m).astype(np.int32)
    penalty = rng.choice([1, 0.5, 1.3, 1e30, 1e-30, 0, -1, np.inf, np.nan], m).astype(np.float32)
    presence = rng.choice([0, 0.5, -2, 1e38, np.inf, np.nan], m).astype(np.float32)
    frequency = rng.choice([0, 0.25, -2, np.inf, np.nan], m).astype(np.float32)
    inputs = x, ids, begin, end, bias, tokens, penalty, presence, frequency
    out = run(penalties, place, *inputs)
    assert_same_alone_and_on_one_device(out, penalties, place, row % m, *inputs)

    rows = [list(r) for r in ids]
    counts = reference.token_counts([r[b:e] for r, b, e in zip(rows, begin, end)], n)
    np.testing.assert_array_equal(out["counts"], counts)
    changes = (x > lowest) & (x < np.inf)
    column = lambda a: a.astype(np.float64)[:, np.newaxis]  # noqa: E731
    with np.errstate(all="ignore"):
        divided = reference.repetition_penalty(as_seen(x), counts, column(penalty))
        wanted = {
            "repetition": np.where(column((penalty > 0) & (penalty < np.inf)) > 0, divided, np.nan),
            "presence": x - (counts > 0) * column(presence) - counts * column(frequency),
            "bias": x + np.where(bias < np.inf, bias.astype(np.float64), np.nan),
        }
    for name, want in wanted.items():
        got = out[name]
        want = np.where(np.isnan(want), want, np.clip(want, lowest, -lowest))
        near = NORMAL + smallest + (0 if name == "repetition" else 1e-6 * abs(x[changes]).max(initial=0))
        np.testing.assert_allclose(got[changes], want[changes], rtol=1e-6 + unit(place.dtype), atol=near)
        np.testing.assert_array_equal(bits(got)[~changes & ~np.isnan(x)], bits(x)[~changes & ~np.isnan(x)])
        assert np.isnan(got[np.isnan(x)]).all()
    at = np.arange(n)
    kept = {"tokens": (at != 0) & (at != tokens[:, np.newaxis])}
    for size in (1, 2):
        kept[f"{size}-grams"] = reference.no_repeat_ngram_keep([r[:e] for r, e in zip(rows, end)], size, n)
    for name, keep in kept.items():
        np.testing.assert_array_equal(out[name], np.where(keep | np.isnan(x) | (x == np.inf), x, lowest))


# --- The chain ----------------------------------------------------------------------------

NEUTRAL = dict(
    temperature=1, top_k=0, top_p=1, min_p=0, typical_p=1, epsilon_cutoff=0, eta_cutoff=0, repetition_penalty=1
)  # fmt: skip
CHOICES = dict(
    temperature=[0, 1e-30, 0.1, 0.9, 3, 1e6],
    top_k=[1, 2, 7, K_MAX],
    top_p=[0, 0.3, 0.9, 0.9999],
    min_p=[0.01, 0.5, 1],
    typical_p=[0.2, 0.9],
    epsilon_cutoff=[3e-4, 0.1],
    eta_cutoff=[3e-4, 0.1],
    repetition_penalty=[0.5, 1.3],
)
CHAIN_PLACES = [ONE_DEVICE[0], ONE_DEVICE[2], SPLIT[1]]  # a split one is held against one device


def _controlled(place, mesh, x, ids, position, *values):
    """(logits, vocabulary, SamplingOptions of each row's own, History)"""
    x = place.whole_in(mesh, x)
    ids = place.rows_in(mesh, ids, mtf.Dimension("length", LENGTH))
    position, *values = (place.rows_in(mesh, t) for t in (position, *values))
    own = chain.SamplingOptions(**dict(zip(NEUTRAL, values)), max_top_k=K_MAX)
    return x, place.vocab, own, chain.History(ids, position, position)


def tokens_of_the_chain(place, mesh, seed, alpha, *inputs):
    x, v, own, history = _controlled(place, mesh, *inputs)
    seed, alpha = place.rows_in(mesh, seed), place.rows_in(mesh, alpha)

    def draw(options, *more):
        return chain.next_token(x, v, options, seed, seed, history.position, *more)

    token, logprob, draw_logprob = draw(own, history, True)
    fixed = chain.SamplingOptions
    three_or_all = mtf.mod(history.position, 2) * 3
    return {
        "own": token,
        "logprob": logprob,
        "draw_logprob": draw_logprob,
        "plain": draw(fixed(temperature=1)),
        "top 3": draw(fixed(temperature=1, top_k=3)),
        "3 or all": draw(fixed(temperature=1, top_k=three_or_all, max_top_k=3)),
        "greedy": draw(fixed(temperature=0)),
        "entmax": draw(fixed(temperature=0.7, use_entmax=True, entmax_alpha=alpha, min_p=0.01)),
    }


def distributions_of_the_chain(place, mesh, *inputs):
    x, v, own, history = _controlled(place, mesh, *inputs)
    own.temperature = mtf.cwise(lambda t: tf.where_v2(t > 0, t, 1.0), [own.temperature])
    found = chain.chain_distributions(x, v, own, history)
    return {"model": place.whole_out(found[0][1]), "softmax": place.whole_out(found[-1][1])}


@example(FAR_FROM_0, 0, 0, 0)
@example(WIDE_NAN, 0, 0, 0)
@given(samples(st.sampled_from(CHAIN_PLACES)), seeds, st.integers(0, 5), st.sampled_from([0, 0.3, 1]))
def test_next_token(sample, seed, row, busy):
    place, x = sample.place, sample.x
    rng, n, m = np.random.default_rng(seed), place.vocab.size, len(x)
    ids = rng.integers(-1, n, (m, LENGTH)).astype(np.int32)
    position = rng.integers(0, LENGTH + 1, m).astype(np.int32)
    seeds_of_rows = rng.integers(-(2**31), 2**31, m).astype(np.int32)
    alpha = rng.choice(ALPHAS[:7], m)
    own = [np.where(rng.random(m) < busy, rng.choice(CHOICES[o], m), NEUTRAL[o]) for o in NEUTRAL]
    own = [a.astype(np.int32 if o == "top_k" else np.float32) for o, a in zip(NEUTRAL, own)]
    own[0][rng.random(m) < 0.2] = 0
    inputs = seeds_of_rows, alpha, x, ids, position, *own
    out = run(tokens_of_the_chain, place, *inputs)
    drawn = {name: a for name, a in out.items() if a.dtype == np.int32}
    assert_same_alone_and_on_one_device(drawn, tokens_of_the_chain, place, row % m, *inputs)

    nothing, masked = ~(x > -np.inf).any(-1), ~(x > info("float32")[0]).any(-1)
    hypothesis.assume((masked | (x > -1e38).any(-1)).all())  # a penalty might mask all of the others
    for name, token in drawn.items():
        bad = is_invalid(x) | (masked if name == "own" else nothing)
        assert ((token == -1) == bad).all(), name
        assert (x[~bad, token[~bad]] > -np.inf).all(), name
    np.testing.assert_array_equal(out["3 or all"], np.where(position % 2, out["top 3"], out["plain"]))
    valid = ~(is_invalid(x) | masked)
    neutral = valid & np.stack([a == value for a, value in zip(own, NEUTRAL.values())]).all(0)
    np.testing.assert_array_equal(out["own"][neutral], out["plain"][neutral])
    np.testing.assert_array_equal(out["greedy"][valid], as_seen(x)[valid].argmax(-1))

    first = valid & (own[0] == 0) & (own[-1] == 1)
    np.testing.assert_array_equal(out["own"][first], out["greedy"][first])

    p = run(distributions_of_the_chain, place.on_one_device(), *inputs[2:])
    at, greedy = out["own"][valid], own[0][valid] == 0
    np.testing.assert_allclose(np.exp(out["logprob"][valid]), p["model"][valid, at], rtol=1e-4, atol=1e-30)
    p_drawn = np.where(greedy, 1, p["softmax"][valid, at])
    assert (p_drawn > 0).all()
    np.testing.assert_allclose(np.exp(out["draw_logprob"][valid]), p_drawn, rtol=1e-4, atol=1e-30)
    assert np.isnan(out["logprob"][~valid]).all() and np.isnan(out["draw_logprob"][~valid]).all()


# --- Primitives ---------------------------------------------------------------------------


def primitives(place, mesh, x, index, values, *words):
    x, v = place.whole_in(mesh, x), place.vocab
    index, values, *words = (place.rows_in(mesh, t) for t in (index, values, *words))
    bits = counter_bits(*words)
    k_dim = mtf.Dimension("top_k", min(5, v.size))
    best = [mtf.transpose(t, place.rows + k_dim) for t in top_k(x, v, k_dim)]
    best[0] = mtf.cast(best[0], tf.float32)
    found = ops.take(x, index, v)
    value = mtf.cast(values, x.dtype)
    return {
        "bits 0": bits[0],
        "bits 1": bits[1],
        "row": ops.row_index(mesh, place.rows),
        "argmax": first_argmax(x, v),
        "top values": best[0],
        "top": ops.cwise_broadcast(lambda i, x: tf.where_v2(tf.is_nan(x), -1, i), best[::-1], best[1].shape),
        "taken": mtf.cast(found, tf.float32),
        "added": place.whole_out(ops.scatter_add(value, index, x.shape, v)),
        "written": place.whole_out(ops.write_at(x, value, index, v)),
        "gradient": place.whole_out(mtf.gradients([mtf.reduce_sum(found * value)], [x])[0]),
    }


@example(LOWEST_BEHIND_INFINITY, 0, 0)
@example(HALFS_LOWEST, 0, 0)
@example(OVERFLOWING, 0, 0)
@given(samples(), seeds, st.integers(0, 5))
def test_primitives(sample, seed, row):
    place, x = sample.place, sample.x
    rng, n, m = np.random.default_rng(seed), place.vocab.size, len(x)
    index = rng.choice([-1, 0, n - 1, n, n // 2, -(2**31), 2**31 - 1], m).astype(np.int32)
    values = rounded(rng.standard_normal(m), place.dtype)
    words = rng.integers(-(2**31), 2**31, (3, m)).astype(np.int32)
    out = run(primitives, place, x, index, values, *words)
    np.testing.assert_array_equal(out.pop("row"), np.arange(m))
    invalid = is_invalid(x)
    assert_same_alone_and_on_one_device(out, primitives, place, row % m, x, index, values, *words)

    seed, stream, step = words.view(np.uint32)
    drawn = reference.threefry2x32(seed, stream, step, np.zeros_like(step))
    for i in range(2):
        np.testing.assert_array_equal(out[f"bits {i}"].view(np.uint32), drawn[i])

    here = np.arange(n) == index[:, np.newaxis]
    np.testing.assert_array_equal(out["written"], np.where(here, values[:, np.newaxis], x))
    for name in ("added", "gradient"):
        np.testing.assert_array_equal(out[name], np.where(here, values[:, np.newaxis], 0))
    inside = (index >= 0) & (index < n)
    found = np.where(inside, x[np.arange(m), np.where(inside, index, 0)], 0)
    np.testing.assert_array_equal(as_seen(out["taken"]), as_seen(found))
    # −inf is as the lowest number: to top_k of the dtype, to first_argmax of float32
    order = np.argsort(-np.maximum(as_seen(x), info(place.dtype)[0]), -1, kind="stable")
    first = np.maximum(as_seen(x), np.finfo(np.float32).min).argmax(-1)
    empty = ~(x > -np.inf).any(-1)
    np.testing.assert_array_equal(out["argmax"], np.where(invalid | empty, -1, first))
    k = out["top"].shape[1]
    np.testing.assert_array_equal(out["top"][~invalid], order[~invalid, :k])
    best = np.take_along_axis(x, order, -1)[~invalid, :k]
    np.testing.assert_array_equal(as_seen(out["top values"][~invalid]), as_seen(best))
    assert np.isnan(out["top values"][invalid]).all()


@given(st.integers(1, 6), st.integers(0, 4), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_causal_mask(queries, more_keys, dtype):
    nd, ns = mtf.Dimension("queries", queries), mtf.Dimension("keys", queries + more_keys)

    def build(mesh):
        return mtf.cast(utils.biasmask_attn_weights(mesh, nd, ns, mtf.VariableDType(tf.as_dtype(dtype))), tf.float32)

    seen = np.tril(np.ones((nd.size, ns.size), bool), more_keys)
    got = MeshRunner()(build)
    assert not got[seen].any() and (got[~seen] < -6e4).all()


# --- Further places -------------------------------------------------------------------------

ROWS_TOO = (test_masks, test_draws_from_weights, test_draws_from_scores, test_penalties, test_primitives)


@pytest.mark.slow
@pytest.mark.parametrize("test", [test_softmax_and_entmax, test_entmax_loss, *ROWS_TOO], ids=lambda t: t.__name__)
def test_on_further_places(test):
    """The same properties where a graph takes longest to build: on two mesh dims, and in other dtypes and sizes."""
    some = samples(st.sampled_from(FURTHER), positive=test is test_draws_from_weights)
    drawn = [some, seeds] + [st.integers(0, 5)] * (test in ROWS_TOO)
    hypothesis.settings(max_examples=12)(given(*drawn)(test.hypothesis.inner_test))()

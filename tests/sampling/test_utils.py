"""gpt_neo_sampling.models.utils against the float64 reference and statistics.

Building a graph costs more than running it, so a test puts its cases into one.

Statistical tests are of draws at fixed seeds: they always pass or always fail.
Each of the 34 p values below is refused at FALSE_ALARM, and that of the million
draws at 1e-3, so a right sampler fails anywhere at less than one seed in 200.
"""

import functools
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import reference
from programs import ONE_DEVICE, MeshRunner, Program, dims

from gpt_neo_sampling._compat import mtf, tensorflow, tf
from gpt_neo_sampling.models.utils import (
    biasmask_attn_weights,
    entmax,
    entmax_backward,
    entmax_cross_entropy_with_logits,
    entmax_forward,
    parse_inputs,
    sample_categorical,
    softmax,
    top_k_mask,
)

FALSE_ALARM = 1e-4
GPT2_VOCAB = 50257
ALPHAS = (1.0, 1.05, 1.3, 1.5, 1.9, 2.0)

slow = pytest.mark.slow
BOTH_SPLIT = MeshRunner("x:2,y:2", "batch:x,vocab:y")
LAYOUTS = (ONE_DEVICE, MeshRunner("x:2", "vocab:x"), pytest.param(BOTH_SPLIT, marks=slow))


@pytest.fixture(params=LAYOUTS, ids=str)
def runner(request):
    return request.param


def is_split(runner):
    """A split graph takes seconds to build: some cases that concern no layout are for one device."""
    return runner.impl.size > 1


def imp(mesh, value, *shape):
    return mtf.import_tf_tensor(mesh, value, mtf.Shape(shape))


def float64(x):
    return np.asarray(x).astype(np.float64)


# --- The draw: statistics -------------------------------------------------------


def chi_square_p(counts, probabilities):
    """p value of observed counts [n] under probabilities [n]; each cell must expect 5 draws."""
    assert counts.shape == probabilities.shape
    expected = counts.sum() * float64(probabilities) / float64(probabilities).sum()
    assert expected.min() >= 5, "too few draws for a chi-square test"
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(tensorflow.math.igammac(0.5 * (len(counts) - 1), 0.5 * statistic))


def test_chi_square_p():
    """Against the closed forms for 2 and 4 degrees of freedom."""
    for counts in ([100, 120, 95], [100, 120, 95, 100, 130]):
        counts = np.array(counts)
        half = 0.5 * ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        want = np.exp(-half) * (1 if len(counts) == 3 else 1 + half)
        assert chi_square_p(counts, np.full(len(counts), 0.1)) == pytest.approx(want, rel=1e-6)


SMALL = {
    "two": np.array([1.0, 3.0]),
    "seven": np.array([5.0, 0.0, 1.0, 2.0, 4.0, 3.0, 7.0]),
    "one group each": np.arange(1.0, 65.0),
    "pairs": 1 / np.arange(1.0, 101.0),
    "tiny sum": np.array([0.0, 1e-9, 2e-9, 0.0, 3e-9, 0.0]),
    "huge sum": np.array([1e38, 2e38, 0.0, 3e38]),
}


def test_small_vocabularies_exactly():
    """200,000 draws of each, from 4 rows: every entry a cell, the rows together and apart."""
    samples = mtf.Dimension("samples", 50_000)

    def build(mesh):
        outs = []
        for n, weights in enumerate(SMALL.values()):
            b, v = dims(batch=4, vocab=len(weights))
            rows = tf.constant(np.tile(weights, (4, 1)), tf.float32)
            outs.append(sample_categorical(imp(mesh, rows, b, v), seed=n, samples_dim=samples))
        return outs

    for (name, weights), drawn in zip(SMALL.items(), ONE_DEVICE(build), strict=True):
        assert drawn.shape == (4, 50_000) and drawn.dtype == np.int32
        by_row = np.stack([np.bincount(row, minlength=len(weights)) for row in drawn])
        live = weights > 0
        assert not by_row[:, ~live].any(), name
        p_values = [chi_square_p(counts[live], weights[live]) for counts in (by_row.sum(0), *by_row)]
        assert min(p_values) > FALSE_ALARM, (name, p_values)


def test_draws_are_independent():
    """Of each other in a row, of the next row's, of the next step's: pairs fill an 8×8 table evenly."""
    b, v, s = dims(batch=2, vocab=8, samples=100_000)

    def build(mesh):
        flat = mtf.ones(mesh, [b, v])
        return [sample_categorical(flat, seed=3, step=step, samples_dim=s) for step in (0, 1)]

    first, second = ONE_DEVICE(build)
    pairs = {
        "neighbours": (first[0, ::2], first[0, 1::2]),
        "rows": (first[0], first[1]),
        "steps": (first[0], second[0]),
    }
    for name, (a, c) in pairs.items():
        assert chi_square_p(np.bincount(8 * a + c, minlength=64), np.full(64, 1.0)) > FALSE_ALARM, name


# Steep enough for a single 24-bit uniform to be too coarse for its tail: entries
# there have a probability of 3e-8.
ZIPF = np.arange(1.0, GPT2_VOCAB + 1) ** -1.5
ZIPF /= ZIPF.sum()
DRAWS = 1_000_000


def one_level_cdf():
    """The cumulative sum that the original draws from, in float32."""
    return np.cumsum(ZIPF.astype(np.float32), dtype=np.float32)


def zipf_cells():
    """[GPT2_VOCAB] ints: the cell of each entry, 178 in all, of 6 draws and more in a million.

    The likeliest hundred have a cell each, the others share 40, log-spaced; each of
    these is two, of the entries that a one-level draw makes too likely and of those
    that it makes too rare.
    """
    grid = np.ceil(one_level_cdf().astype(np.float64) * 2**24)
    too_likely = np.diff(grid, prepend=0) * 2.0**-24 > ZIPF
    edges = np.unique(np.geomspace(100, GPT2_VOCAB, 41).astype(int))
    cells = np.searchsorted(edges, np.arange(GPT2_VOCAB), side="right") * 2 + too_likely
    cells[:100] = 1000 + np.arange(100)
    return np.unique(cells, return_inverse=True)[1]


def zipf_p(drawn, weights=ZIPF):
    """p value of draws from `weights`, ZIPF or ZIPF with some entries at 0."""
    assert drawn.min() >= 0 and drawn.max() < GPT2_VOCAB
    cells = zipf_cells()
    counts, expected = np.bincount(cells[drawn.ravel()]), np.bincount(cells, weights=weights)
    assert not counts[expected == 0].any()
    return chi_square_p(counts[expected > 0], expected[expected > 0])


MILLION_DRAWS = r"""
    import re, sys
    import numpy as np
    from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, tf
    from gpt_neo_sampling.models.utils import sample_categorical

    weights = np.load(sys.argv[1]).astype(np.float32)
    batch, vocab, samples = (mtf.Dimension(*d) for d in (("batch", 8), ("vocab", len(weights)), ("samples", 125_000)))
    with tf.Graph().as_default():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        x = mtf.import_tf_tensor(mesh, np.tile(weights, (8, 1)), mtf.Shape([batch, vocab]))
        step = tf.placeholder(tf.int32, [])
        draws = [sample_categorical(x, seed=1, samples_dim=samples), sample_categorical(x, seed=2, step=step)]
        lowering = mtf.Lowering(mesh.graph, {mesh: PlacementMeshImpl("", "", [""])}, autostack=False)
        many, single = [lowering.export_to_tf_tensor(d) for d in draws]
        with tf.Session() as session:
            one_by_one = np.stack([session.run(single, {step: n}) for n in range(250)])
            np.savez(sys.argv[2], many=session.run(many, {step: 0}), one_by_one=one_by_one)
    # (ru_maxrss would count what pytest held when it started this process)
    print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@slow
def test_million_draws_from_gpt2s_vocabulary(tmp_path):
    """Zipf's law over 50,257, batch 8: the right law, no entry of weight 0, in 1.5 GB for the process.

    (A V×V matrix would be 10 GB.)
    """
    weights = ZIPF.copy()
    weights[7::1000] = 0
    np.save(tmp_path / "weights.npy", weights)
    script = [sys.executable, "-c", textwrap.dedent(MILLION_DRAWS), tmp_path / "weights.npy", tmp_path / "draws.npz"]
    done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
    peak = int(done.stdout) * 1024
    assert peak < 1.5e9, f"{peak / 1e9:.2f} GB"

    draws = np.load(tmp_path / "draws.npz")
    assert draws["many"].size == DRAWS
    assert zipf_p(draws["many"], weights) > 1e-3  # what the project promises here
    single = draws["one_by_one"]
    assert single.shape == (250, 8)
    coarse = np.searchsorted([1, 2, 4, 8, 16, 100, 1000], np.arange(GPT2_VOCAB), side="right")
    p_value = chi_square_p(np.bincount(coarse[single.ravel()]), np.bincount(coarse, weights=weights))
    assert p_value > FALSE_ALARM, p_value
    for drawn in (draws["many"], single):
        assert drawn.min() >= 0 and np.all(weights[drawn] > 0)


def test_the_zipf_test_catches_what_matters():
    """It rejects the original's way to draw, and a law whose tail is 5% too likely; not a right sampler."""
    rng = np.random.default_rng(0)
    right = rng.choice(GPT2_VOCAB, size=DRAWS, p=ZIPF)
    assert zipf_p(right) > FALSE_ALARM

    u = (rng.integers(0, 2**24, DRAWS) * 2.0**-24).astype(np.float32)
    one_level = np.minimum(np.searchsorted(one_level_cdf(), u, side="right"), GPT2_VOCAB - 1)
    assert zipf_p(one_level) < FALSE_ALARM / 100

    biased = np.where(np.arange(GPT2_VOCAB) >= 100, 1.05, 1.0) * ZIPF
    assert zipf_p(rng.choice(GPT2_VOCAB, size=DRAWS, p=biased / biased.sum())) < FALSE_ALARM / 100


def test_the_small_tests_catch_what_matters():
    """A weight that is 5% off is seen in 200,000 draws of 7 entries."""
    weights = SMALL["seven"][SMALL["seven"] > 0]
    biased = weights * np.array([1, 1, 1, 1.05, 1, 1])
    counts = np.random.default_rng(1).multinomial(200_000, biased / biased.sum())
    assert chi_square_p(counts, weights) < FALSE_ALARM / 100


# --- The draw: what it depends on -------------------------------------------------


def test_same_coordinates_same_draw():
    """(seed, stream, step) decide the draw; each of them matters, and so does its place."""
    b, v, s = dims(batch=4, vocab=1024, samples=16)
    x = np.random.default_rng(2).random((4, 1024)).astype(np.float32)

    def build(mesh, x, seeds):
        x = imp(mesh, x, b, v)

        def draw(seed=5, **options):
            return sample_categorical(x, seed=seed, samples_dim=s, **options)

        stream = mtf.range(mesh, b, tf.int32)
        same = [
            draw(),
            draw(),
            draw(dim=v, step=0, stream=stream),
            draw(seed=[5, 5, 5, 5], stream=[0, 1, 2, 3], step=np.zeros(4)),
            draw(seed=seeds[0], step=tf.constant([0, 0, 0, 0])),
            draw(seed=mtf.constant(mesh, 5, mtf.Shape([]), tf.int32)),
        ]
        wrapped = [draw(seed=-1), draw(seed=2**32 - 1)]
        other = [
            draw(seed=6),
            draw(step=1),
            draw(step=5, seed=0),
            draw(stream=[4, 5, 6, 7]),
            draw(stream=[5, 5, 5, 5], seed=[0, 1, 2, 3]),
            draw(seed=seeds[1]),
        ]
        return same + wrapped + other

    got = ONE_DEVICE(build, x, np.array([5, -7], np.int32))
    for g in got[1:6]:
        np.testing.assert_array_equal(g, got[0])
    np.testing.assert_array_equal(got[6], got[7])
    # Every row of every other set of coordinates: no two alike, nor much alike.
    rows = np.concatenate([got[0], got[6], *got[8:]])
    for a, c in itertools.combinations(rows, 2):
        assert np.mean(a == c) < 0.3
    # One draw is the first of many, and a layout changes nothing, whatever form the options have.
    for layout in (ONE_DEVICE, BOTH_SPLIT):
        options = {"seed": [5] * 4, "stream": np.arange(4), "step": np.zeros(4)}
        single = layout(lambda m, x, o=options: sample_categorical(imp(m, x, b, v), **o), x)
        np.testing.assert_array_equal(single, got[0][:, 0])


def test_draw_does_not_depend_on_the_batch():
    rng = np.random.default_rng(3)
    w = rng.random((6, 512)).astype(np.float32)
    s = mtf.Dimension("samples", 16)
    order = [4, 0, 5, 2]

    def build(mesh, w):
        b, v, four, one = dims(batch=6, vocab=512, four=4, one=1)
        cut = tf.gather(w, order)
        return [
            sample_categorical(imp(mesh, w, b, v), seed=9, samples_dim=s),
            sample_categorical(imp(mesh, cut, four, v), seed=9, stream=order, samples_dim=s),
            sample_categorical(imp(mesh, w[3:4], one, v), seed=9, stream=[3], samples_dim=s),
            sample_categorical(imp(mesh, w[3], v), seed=9, stream=3, samples_dim=s),
            # A row's stream is its index over all of the batch's dims.
            sample_categorical(imp(mesh, tf.reshape(w, [2, 3, 512]), *dims(p=2, q=3), v), seed=9, samples_dim=s),
        ]

    whole, cut, alone, bare, folded = ONE_DEVICE(build, w)
    np.testing.assert_array_equal(cut, whole[order])
    np.testing.assert_array_equal(alone, whole[3:4])
    np.testing.assert_array_equal(bare, whole[3])
    np.testing.assert_array_equal(folded.reshape(whole.shape), whole)


def test_draw_is_the_same_on_every_layout():
    """To the bit, at GPT-2's vocabulary and at 50,304, what its split configurations pad it to."""
    rng = np.random.default_rng(4)
    w = np.exp(2 * rng.normal(size=(4, GPT2_VOCAB))).astype(np.float32)
    padded = np.pad(w, [(0, 0), (0, 47)])

    def build(mesh, w):
        b, v, s = dims(batch=4, vocab=w.shape[1], samples=1000)
        x = imp(mesh, w, b, v)
        return [sample_categorical(x, seed=1), sample_categorical(x, seed=1, samples_dim=s)]

    single, many = ONE_DEVICE(build, w)
    for runner in (ONE_DEVICE, BOTH_SPLIT):
        got = runner(build, padded)
        np.testing.assert_array_equal(got[0], single, err_msg=repr(runner))
        np.testing.assert_array_equal(got[1], many, err_msg=repr(runner))
    # These are the draws of the reference, from the reference's uniforms.
    sample = np.arange(200, dtype=np.uint32)
    for row in range(4):
        u1, u2 = map(reference.bits_to_uniform, reference.threefry2x32(1, row, 0, sample))
        want = [reference.two_level_draw(w[row], a, c) for a, c in zip(u1, u2, strict=True)]
        np.testing.assert_array_equal(many[row, :200], want)


@pytest.mark.parametrize("runner", LAYOUTS[::2], ids=str)
def test_no_seed_is_a_fresh_draw_each_time(runner):
    """Between runs, ops, rows and rounds of a loop. Two of 40 rows alike: p < 1e-40."""
    b, v, s, r = dims(batch=4, vocab=1024, samples=16, rounds=3)

    def build(mesh):
        flat = mtf.ones(mesh, [b, v])

        def body(i, seen):
            drawn = sample_categorical(flat, samples_dim=s)
            here = mtf.one_hot(i, r, dtype=tf.int32)
            return i + 1, seen + drawn * here

        start = [mtf.zeros(mesh, [], tf.int32), mtf.zeros(mesh, [r, b, s], tf.int32)]
        looped = mtf.while_loop(lambda i, _: mtf.less(i, r.size), body, start)[1]
        return [sample_categorical(flat, samples_dim=s), sample_categorical(flat, samples_dim=s), looped]

    runs = runner(build, times=2)
    rows = np.concatenate([row for first, second, looped in runs for row in (first, second, *looped)])
    assert len(np.unique(rows, axis=0)) == len(rows) == 40
    assert rows.min() >= 0 and rows.max() < v.size


def test_draw_along_any_dim_of_any_weights(runner):
    """The last dim is the default; bfloat16 and float16; sums far from 1; one invalid row spoils no other."""
    rng = np.random.default_rng(5)
    b, v, s = dims(batch=4, vocab=256, samples=40)
    w = rng.random((4, 256)).astype(np.float32)
    lone = np.zeros((4, 256), np.float32)
    lone[:, 5] = 0.25  # the original drew index 0 three times in four
    bad = w.copy()
    bad[0, 200], bad[1, 0], bad[3] = np.nan, -1e-3, 0

    def build(mesh, w, lone, bad):
        x, invalid = imp(mesh, w, b, v), imp(mesh, bad, b, v)
        draw = functools.partial(sample_categorical, seed=1, samples_dim=s)
        outs = [draw(mtf.transpose(x, [v, b]), v), draw(invalid), sample_categorical(invalid, seed=1)]
        if not is_split(runner):
            half = [mtf.cast(imp(mesh, tf.round(w * 200), b, v), t) for t in (tf.float32, tf.bfloat16, tf.float16)]
            outs += [draw(x), draw(mtf.transpose(x, [v, b])), draw(imp(mesh, lone, b, v)), *map(draw, half)]
        return outs

    u = [reference.threefry2x32(1, row, 0, np.arange(40)) for row in range(4)]
    draw = np.vectorize(reference.two_level_draw, signature="(v),(),()->()")

    def expected(w):
        return np.stack(
            [draw(row, *map(reference.bits_to_uniform, bits)) for row, bits in zip(float64(w), u, strict=True)]
        )

    moved, invalid, single_invalid, *others = runner(build, w, lone, bad)
    np.testing.assert_array_equal(moved, expected(w))
    np.testing.assert_array_equal(invalid[[0, 1, 3]], -1)
    np.testing.assert_array_equal(invalid[2], moved[2])
    np.testing.assert_array_equal(single_invalid, invalid[:, 0])
    if others:
        last, along_batch, alone, *halves = others
        np.testing.assert_array_equal(last, moved)
        assert along_batch.shape == (256, 40) and along_batch.max() == 3 and along_batch.min() == 0
        np.testing.assert_array_equal(alone, 5)
        for half in halves:
            np.testing.assert_array_equal(half, expected(np.round(w * 200)))


def test_sample_categorical_errors():
    b, v, s = dims(batch=4, vocab=8, samples=2)
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    with tf.Graph().as_default():
        x = mtf.ones(mesh, [b, v])
        with pytest.raises(ValueError, match="int32"):
            sample_categorical(mtf.ones(mesh, [b, v], tf.int32), seed=1)
        with pytest.raises(ValueError, match="samples.*not among"):
            sample_categorical(x, s, seed=1)
        with pytest.raises(ValueError, match="samples_dim.*batch"):
            sample_categorical(x, seed=1, samples_dim=b)
        with pytest.raises(ValueError, match="samples_dim.*vocab"):
            sample_categorical(x, seed=1, samples_dim=v)
        with pytest.raises(ValueError, match="without dims"):
            sample_categorical(mtf.ones(mesh, []), seed=1)
        with pytest.raises(ValueError, match="out of range"):
            sample_categorical(x, seed=2**32)
        for name in ("seed", "stream", "step"):
            with pytest.raises(ValueError, match=f"{name} has shape"):
                sample_categorical(x, **({"seed": 1} | {name: [1, 2, 3]}))


# --- entmax: values ---------------------------------------------------------------


def hard_rows(rng, size):
    """float32 [9, size]: Gaussian, peaked, constant and widely scaled rows."""
    x = rng.normal(size=(9, size))
    x[0] *= 0.1
    x[2] *= 2
    x[3] *= 0.01
    x[3, size // 3] = 20  # peaked
    x[4, size // 5], x[4, size // 2] = 18, 17.3  # two that share the mass
    x[5] = 1.7  # constant
    x[6] *= 1e4
    x[7] = 1e4 * np.sign(x[7])  # two values, far apart
    x[8] -= 1e4
    return x.astype(np.float32)


def test_entmax_at_gpt2s_vocabulary():
    """p within 1e-6 of float64, and summing to 1 in float32, for every alpha and kind of row."""
    x = hard_rows(np.random.default_rng(6), GPT2_VOCAB)
    alphas = (*ALPHAS, 1.001)  # and where α − 1 is small enough to lose digits

    def build(mesh, x):
        x = imp(mesh, x, *dims(batch=9, vocab=GPT2_VOCAB))
        return [entmax(x, alpha) for alpha in alphas]

    for alpha, p in zip(alphas, ONE_DEVICE(build, x), strict=True):
        want = reference.entmax(x, alpha)
        error = np.abs(p - want).max(-1)
        assert error.max() <= 1e-6, (alpha, error)
        assert p.min() >= 0
        # (50,257 equal terms, summed in float32, are all rounded the same way.)
        np.testing.assert_allclose(float64(p).sum(-1), 1, atol=4e-6, err_msg=f"alpha {alpha}")
        np.testing.assert_allclose(float64(np.delete(p, 5, 0)).sum(-1), 1, atol=1.5e-6, err_msg=f"alpha {alpha}")
        # Relative to their size, too, the likelier half of the mass is right.
        likely = want >= 0.5 * want.max(-1, keepdims=True)
        np.testing.assert_allclose(p[likely], want[likely], rtol=1e-4)
        if alpha >= 1.3:  # where the reference has exact zeros, and far from its border, so has entmax
            far = reference.entmax(x + 1e-4 * (want == 0), alpha) == 0
            assert far[1:3].mean() > 0.9 and not p[far].any()


@pytest.mark.parametrize("size", [2, 50, 2000, pytest.param(GPT2_VOCAB, marks=slow)])
def test_entmax_of_rows_of_any_width(size):
    """From nearly flat to far apart: p within 2e-7 of its row's largest, its support, and the gradient."""
    rng = np.random.default_rng(30)
    x = (rng.normal(size=(11, size)) * 10.0 ** np.arange(-6, 5)[:, np.newaxis]).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    b, v = dims(batch=11, vocab=size)

    def build(mesh, x, dy, alphas):
        x, dy = imp(mesh, x, b, v), imp(mesh, dy, b, v)
        p = entmax(x, imp(mesh, alphas, b))
        return p, mtf.gradients([mtf.reduce_sum(p * dy)], [x])[0]

    program = Program(build, [(tf.float32, x.shape), (tf.float32, x.shape), (tf.float32, (11,))])
    for alpha in np.float32([1.01, 1.1, 1.3, 1.5, 1.8, 1.99, 2]):
        p, dx = program(x, dy, np.full(11, alpha))
        want, epsilon = reference.entmax(x, float(alpha)), float64(alpha) - 1
        top = want.max(1, keepdims=True)
        assert (np.abs(p - want) / top).max() < 2e-7, alpha
        base = 1 - epsilon * (x.max(1, keepdims=True) - float64(x)) / top**epsilon  # 0 at the edge of the support
        at_edge = (np.abs(base) < 1e-6) | ((want > 0) & (want < 1e-36))
        assert np.all(((p > 0) == (want > 0)) | at_edge), alpha
        right = closed_form(np.where(p > 0, want, 0), dy, float(alpha))
        error = np.abs(dx - right) / top ** (1 - epsilon)
        # p^(2 − α) is steep at the edge: its error there is that of p, divided by the base.
        assert (error * np.clip(base, 0, 1)).max() < 5e-6, alpha


ALPHAS_BY_ROW = np.array([1.3, 1.5, 2.0, 1.05], np.float32)


@functools.cache
def entmax_of_4096(*mesh):
    """A Program of float32 [4, 4096]: entmax of three alphas, and of one a row."""
    b, v = dims(batch=4, vocab=4096)

    def build(mesh, x):
        x = imp(mesh, x, b, v)
        return [entmax(x, alpha, v) for alpha in (1.3, 1.5, 2.0, imp(mesh, tf.constant(ALPHAS_BY_ROW), b))]

    return Program(build, [(tf.float32, (4, 4096))], runner=MeshRunner(*mesh))


@pytest.mark.parametrize("support", [1, 50, 255, 256, 257, 500, 4096, "mixed"])
@pytest.mark.parametrize("mesh", [(), ("x:2", "vocab:x")], ids=["one device", "x:2 vocab:x"])
def test_entmax_of_every_size_of_support(mesh, support):
    """Solved among few entries, or among all where the support is larger, in one row or in all of them."""
    rng = np.random.default_rng(28)
    supports = [1, 50, 500, 4096] if support == "mixed" else [support] * 4
    x = np.full((4, 4096), -30.0)
    for row, n in zip(x, supports):
        row[rng.permutation(4096)[:n]] = 0.05 * rng.random(n) if n < 4096 else 1e-4 * rng.random(n)
    x = x.astype(np.float32)
    *found, by_row = entmax_of_4096(*mesh)(x)
    for alpha, p in zip((1.3, 1.5, 2.0), found, strict=True):
        want = reference.entmax(x, alpha)
        if alpha == 1.3:  # all that were meant to be in the support are
            np.testing.assert_array_equal((want > 0).sum(1), supports)
        np.testing.assert_allclose(p, want, rtol=0, atol=2.5e-7)
    np.testing.assert_allclose(by_row, entmax_by_row(x, ALPHAS_BY_ROW), rtol=0, atol=2.5e-7)


def test_softmax(runner):
    """Against float64, with its gradient, along any dim; invalid rows are NaN throughout."""
    rng = np.random.default_rng(29)
    x = (3 * rng.normal(size=(8, 64)) + 50).astype(np.float32)
    x[0, 5], x[1, 63], x[2], x[3, :40], x[4] = np.nan, np.inf, -np.inf, -np.inf, 7
    dy = rng.normal(size=(8, 64)).astype(np.float32)
    b, v = dims(batch=8, vocab=64)

    def build(mesh, x, dy):
        x, dy = imp(mesh, x, b, v), imp(mesh, dy, b, v)
        p = softmax(x)
        (dx,) = mtf.gradients([mtf.reduce_sum(p * dy)], [x])
        return p, softmax(mtf.transpose(x, [v, b]), v), entmax(x, 1), dx

    p, moved, as_entmax, dx = runner(build, x, dy)
    with np.errstate(invalid="ignore"):
        z = np.exp(float64(x) - float64(x).max(1, keepdims=True))
        want = z / z.sum(1, keepdims=True)
    want[:3] = np.nan
    for got in (p, moved.T, as_entmax):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-30)
    want_dx = want * (dy - (want * dy).sum(1, keepdims=True))
    np.testing.assert_allclose(dx[3:], want_dx[3:], rtol=0, atol=1e-6)


def by_alpha(x):
    """x's rows for every alpha in one tensor, and the alpha of each row: [6·rows, n], [6·rows]."""
    return np.tile(x, (len(ALPHAS), 1)), np.repeat(np.array(ALPHAS, np.float32), len(x))


def entmax_by_row(x, alphas, entmax=reference.entmax):
    return np.stack([entmax(row, float(np.round(alpha, 4))) for row, alpha in zip(x, alphas, strict=True)])


def test_entmax_on_every_layout(runner):
    """Along any dim, the last by default; on one device and split; an alpha a row, as a tensor of either kind."""
    rng = np.random.default_rng(7)
    x = np.concatenate([hard_rows(rng, 64), 3 * rng.normal(size=(3, 64))]).astype(np.float32)
    rows, alphas = by_alpha(x)
    b, v, one = dims(batch=len(rows), vocab=64, one=1)

    def build(mesh, rows, alphas):
        flat = imp(mesh, rows, b, v)
        moved = mtf.transpose(flat, [v, b])
        outs = [entmax(flat, imp(mesh, alphas, b)), entmax(moved, alphas, v), entmax(moved, 1.9)]
        if not is_split(runner):
            folded = mtf.reshape(flat, [b, one, v])
            outs.append(entmax(mtf.transpose(folded, [b, v, one]), mtf.constant(mesh, 1.5, mtf.Shape([])), v))
            outs.append(entmax(flat))
            outs += [entmax(flat, alpha) for alpha in ALPHAS]
        return outs

    by_row, moved, along_batch, *others = runner(build, rows, alphas)
    want = entmax_by_row(rows, alphas)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    close(by_row, want)
    close(moved, want.T)
    close(along_batch, reference.entmax(rows.T, 1.9))
    if others:
        close(others[0], reference.entmax(rows, 1.5)[..., None])
        for p, alpha in zip(others[1:], (1.3, *ALPHAS), strict=True):
            close(p, reference.entmax(rows, alpha))


def test_entmax_of_infinities_and_nan(runner):
    """−inf has probability 0; NaN, +inf, nothing finite or a bad alpha make a row NaN, and no other."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(12, 16)).astype(np.float32)
    x[1, 3:] = -np.inf
    x[2, :15] = -np.inf
    x[4, 15] = np.nan
    x[6, 2] = np.inf
    x[7] = -np.inf
    x[9, 0], x[9, 9] = -np.inf, np.inf
    x[10, 8:] = np.finfo(np.float32).min
    invalid = np.isin(np.arange(12), [4, 6, 7, 9])
    rows, alphas = by_alpha(x)
    bad_alphas = np.array([1.3, 0.99, 2.01, np.nan, 1, np.inf, 2, 1.5, 1, 2, 1, -1], np.float32)
    rows, alphas = np.concatenate([rows, x]), np.concatenate([alphas, bad_alphas])
    b, v = dims(batch=len(rows), vocab=16)

    def build(mesh, rows, alphas):
        rows = imp(mesh, rows, b, v)
        return [entmax(rows, imp(mesh, alphas, b))] + [entmax(rows, a) for a in (1.0, 1.3) if not is_split(runner)]

    got = runner(build, rows, alphas)
    for p, setting in zip(got, (alphas, np.full(84, 1.0), np.full(84, 1.3)), strict=False):
        bad = np.tile(invalid, 7) | ~((setting >= 1) & (setting <= 2))
        assert np.isnan(p[bad]).all()
        good = ~bad
        np.testing.assert_allclose(p[good], entmax_by_row(rows[good], setting[good]), atol=1e-6)
        assert not p[good][rows[good] < -1e30].any()  # exactly 0


def test_entmax_needs_one_step_where_it_says_so():
    rng = np.random.default_rng(9)
    x = np.stack([rng.normal(size=64), np.full(64, 3.0)]).astype(np.float32)

    def build(mesh, x):
        x = imp(mesh, x, *dims(batch=2, vocab=64))
        return [entmax(x, 1.0, n_iter=1)] + [entmax(x, alpha, n_iter=1) for alpha in (1.3, 2.0)]

    softmax, *others = ONE_DEVICE(build, x)
    np.testing.assert_allclose(softmax, reference.softmax(x), atol=1e-6)
    for p in others:
        np.testing.assert_allclose(p[1], 1 / 64, rtol=1e-6)
        assert np.abs(p[0] - reference.entmax(x[0], 1.3)).max() > 1e-4  # n_iter is a limit


def test_entmax_in_half_precision(runner):
    """Solved in float32 from the rounded scores, then rounded once; its gradient likewise."""
    rng = np.random.default_rng(10)
    x = (2 * rng.normal(size=(4, 64))).astype(np.float32)
    x[1] *= 1000
    rows, alphas = by_alpha(x)
    dy = rng.normal(size=rows.shape).astype(np.float32)
    b, v = dims(batch=len(rows), vocab=64)

    def build(mesh, rows, alphas, dy):
        outs = []
        for dtype in (tf.bfloat16, tf.float16):
            half = mtf.cast(imp(mesh, rows, b, v), dtype)
            p = entmax(half, imp(mesh, alphas, b))
            loss = mtf.reduce_sum(mtf.cast(p, tf.float32) * imp(mesh, dy, b, v))
            outs += [half, p, mtf.gradients([loss], [half])[0]]
        return outs

    got = runner(build, rows, alphas, dy)
    for (half, p, grad), epsilon in ((got[:3], 2**-8), (got[3:], 2**-11)):
        assert half.dtype == p.dtype == grad.dtype != np.float32
        want = entmax_by_row(float64(half), alphas)
        np.testing.assert_allclose(float64(p), want, rtol=epsilon, atol=1e-6)
        np.testing.assert_allclose(float64(grad), closed_form(want, dy, alphas[:, None]), atol=20 * epsilon)


def test_entmax_errors():
    b, v = dims(batch=2, vocab=8)
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    with tf.Graph().as_default():
        x = mtf.ones(mesh, [b, v])
        for alpha in (0.999, 2.001, 0, -1.5, float("nan"), float("inf"), np.float32(2.5), 3):
            for call in (entmax, entmax_forward, lambda x, a: entmax_cross_entropy_with_logits(x, x, v, alpha=a)):
                with pytest.raises(ValueError, match=r"alpha=.*out of range.*1.*2"):
                    call(x, alpha)
        for alpha in ([1.5], [1.5, 1.5, 1.5], mtf.ones(mesh, [v]), mtf.ones(mesh, [b, v])):
            with pytest.raises(ValueError, match="alpha has shape"):
                entmax(x, alpha)
        for n_iter in (0, -1, 2.5, None):
            with pytest.raises(ValueError, match="n_iter="):
                entmax(x, n_iter=n_iter)
        with pytest.raises(ValueError, match="other.*not among"):
            entmax(x, dim=mtf.Dimension("other", 8))
        with pytest.raises(ValueError, match="not among"):
            entmax(x, dim=mtf.Dimension("vocab", 9))
        with pytest.raises(ValueError, match="without dims"):
            entmax(mtf.ones(mesh, []))


# --- entmax: gradient -----------------------------------------------------------------


def closed_form(p, dy, alpha, axis=-1):
    """Peters et al. 2019, proposition 2, in float64: s·(dY − Σ s·dY / Σ s), s = p^(2−α) on the support."""
    s = np.where(p > 0, np.where(p > 0, p, 1.0) ** (2 - alpha), 0.0)
    return s * (dy - (s * dy).sum(axis, keepdims=True) / s.sum(axis, keepdims=True))


def test_entmax_gradient(runner):
    """Against central differences and the closed form; recomputed; for alphas that differ by row; on any dim."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(4, 32)).astype(np.float32)
    x[1] *= 3
    x[2, 20:] = -np.inf
    x[3] = 0.5  # constant
    finite = np.isfinite(x).all(1)
    rows, alphas = by_alpha(x)
    dy = rng.normal(size=rows.shape).astype(np.float32)
    b, v = dims(batch=len(rows), vocab=32)

    def build(mesh, rows, alphas, dy):
        x, alphas, dy = imp(mesh, rows, b, v), imp(mesh, alphas, b), imp(mesh, dy, b, v)
        moved = mtf.transpose(x, [v, b])

        def grad(fn, at=x):
            return mtf.gradients([mtf.reduce_sum(fn(at) * dy)], [at])[0]

        def recomputed(alpha):
            # Recomputing adds 1e-30 of a sum to its input, which −inf survives.
            return lambda x: mtf.recompute_grad(lambda x: entmax(x * 2.0, alpha), [x])

        outs = [grad(lambda x: entmax(x, alphas)), grad(recomputed(1.3))]
        outs += [grad(lambda x: entmax(x, 1.3, v), moved), grad(lambda x: entmax(x, 1.3), moved)]
        if not is_split(runner):
            outs.append(grad(recomputed(2.0)))
            outs += [grad(lambda x, alpha=alpha: entmax(x, alpha)) for alpha in ALPHAS]
        return outs

    by_row, again_13, moved, along_batch, *others = got = runner(build, rows, alphas, dy)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    assert all(np.isfinite(g).all() for g in got)
    close(by_row, closed_form(entmax_by_row(rows, alphas), dy, alphas[:, None]))
    for n, alpha in enumerate(ALPHAS):
        mine = slice(4 * n, 4 * n + 4)
        differences = reference.entmax_grad(x[finite], dy[mine][finite], alpha)
        close(by_row[mine][finite], differences)
        assert np.abs(differences).max() > 0.05
    assert not by_row[np.isinf(rows)].any()
    close(again_13, 2 * closed_form(reference.entmax(2 * rows, 1.3), dy, 1.3))
    close(moved, closed_form(reference.entmax(rows, 1.3), dy, 1.3).T)
    # Along batch, the default dim here: the columns of finite scores.
    columns = np.isfinite(rows).all(0)
    close(along_batch[columns], reference.entmax_grad(rows[:, columns], dy[:, columns], 1.3, axis=0).T)
    if others:
        close(others[0], 2 * closed_form(reference.entmax(2 * rows, 2.0), dy, 2.0))
        for grad, alpha in zip(others[1:], ALPHAS, strict=True):
            close(grad, closed_form(reference.entmax(rows, alpha), dy, alpha))


def test_entmax_gradient_at_gpt2s_vocabulary():
    """Finite where nearly everything has probability 0, and without a 0·∞ at alpha = 2."""
    rng = np.random.default_rng(12)
    x = hard_rows(rng, GPT2_VOCAB)
    dy = rng.normal(size=x.shape).astype(np.float32)

    def build(mesh, x, dy):
        x, dy = (imp(mesh, a, *dims(batch=9, vocab=GPT2_VOCAB)) for a in (x, dy))
        return [mtf.gradients([mtf.reduce_sum(entmax(x, alpha) * dy)], [x])[0] for alpha in (1.3, 2.0)]

    for alpha, grad in zip((1.3, 2.0), ONE_DEVICE(build, x, dy), strict=True):
        p = reference.entmax(x, alpha)
        assert np.isfinite(grad).all()
        # At alpha = 2 the gradient jumps at the support's edge: only rows on whose support float32 can be exact.
        rows = slice(None) if alpha < 2 else slice(2, 8)
        np.testing.assert_allclose(grad[rows], closed_form(p, dy, alpha)[rows], atol=5e-5)


def test_entmax_forward_and_backward_as_a_custom_gradient(runner):
    """As GPT-Neo's scripts put them together."""
    rng = np.random.default_rng(13)
    b, v = dims(batch=4, vocab=32)
    x, dy = rng.normal(size=(2, 4, 32)).astype(np.float32)
    settings = [{"alpha": 1.5, "dim": v, "n_iter": 50}, {"alpha": 1.3, "dim": None, "n_iter": 30}, {"alpha": 2.0}, {}]

    def build(mesh, x, dy):
        x, dy = imp(mesh, x, b, v), imp(mesh, dy, b, v)
        outs = []
        for kwargs in settings:
            forward = functools.partial(entmax_forward, **kwargs)
            y = mtf.custom_gradient(forward, functools.partial(entmax_backward, **kwargs), [x])
            outs += [y, mtf.gradients([mtf.reduce_sum(y * dy)], [x])[0]]
        return outs

    got = runner(build, x, dy)
    for n, kwargs in enumerate(settings):
        alpha = kwargs.get("alpha", 1.3)
        np.testing.assert_allclose(got[2 * n], reference.entmax(x, alpha), atol=1e-6)
        np.testing.assert_allclose(got[2 * n + 1], reference.entmax_grad(x, dy, alpha), atol=2e-5)


# --- entmax: loss -------------------------------------------------------------------------


LOSS_ALPHAS = (1.0, 1.3, 1.5, 2.0)


def test_loss(runner):
    """Value and gradient, hard and soft targets, for logits that drive most loss functions to infinity."""
    rng = np.random.default_rng(14)
    b, v = dims(batch=8, vocab=32)
    x = (2 * rng.normal(size=(8, 32))).astype(np.float32)
    hard = rng.integers(0, 32, 8).astype(np.int32)
    hard[0] = x[0].argmin()  # outside the support
    x[1] = 0
    x[1, 3], hard[1] = 1e4, 4
    x[2] *= 1e4
    x[3, 10:] = -np.inf
    hard[3] = 9
    x[4] = 0
    x[4, 7], hard[4] = 50, 7  # certain, and right
    x[7] += 1e4  # a common offset, which no probability depends on
    soft = rng.dirichlet(np.full(32, 0.3), 8)
    soft[5, 3:] = 0
    soft[3, 10:] = 0
    soft[6] = reference.entmax(x[6], 1.3)  # no loss at this alpha
    soft = (soft / soft.sum(-1, keepdims=True)).astype(np.float32)

    alphas = (1.0, 1.3) if is_split(runner) else LOSS_ALPHAS

    def build(mesh, x, hard, soft):
        x, hard, soft = imp(mesh, x, b, v), imp(mesh, hard, b), imp(mesh, soft, b, v)
        outs = []
        for alpha, targets in itertools.product(alphas, (hard, soft)):
            loss = entmax_cross_entropy_with_logits(x, targets, v, alpha=alpha)
            outs += [loss, mtf.gradients([mtf.reduce_sum(loss)], [x])[0]]
        return outs

    got = runner(build, x, hard, soft)
    one_hot = np.eye(32)[hard]
    # Float32 targets sum to 1 but for 1e-8: the same loss, without 1e4 times that.
    shifted = float64(x) - float64(x).max(-1, keepdims=True)
    for n, (alpha, targets) in enumerate(itertools.product(alphas, (one_hot, soft))):
        loss, grad = got[2 * n : 2 * n + 2]
        assert loss.shape == (8,) and np.isfinite(loss).all() and np.isfinite(grad).all()
        want = reference.entmax_loss(shifted, targets, alpha)
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=2e-6, err_msg=f"alpha {alpha}")
        np.testing.assert_allclose(grad, reference.entmax(x, alpha) - targets, atol=1e-6)
        assert loss.min() > -2e-6
        if targets is one_hot:
            assert grad[0, hard[0]] == pytest.approx(-1, abs=0.01)
            assert loss[4] == pytest.approx(0, abs=1e-6)
        elif alpha == 1.3:
            assert loss[6] == pytest.approx(0, abs=2e-6)
    # At alpha = 1 it is the cross entropy.
    cross_entropy = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(8), hard]
    np.testing.assert_allclose(got[0], cross_entropy, rtol=1e-5, atol=2e-6)


def test_loss_gradient_is_its_slope(runner):
    """p − t is the derivative of this loss: central differences of the reference's value.

    By itself, recomputed, and by microbatches: there, of an offset to the logits of all rows.
    """
    rng = np.random.default_rng(15)
    b, v = dims(batch=4, vocab=8)
    x = rng.normal(size=(4, 8)).astype(np.float32)
    hard = np.array([0, 3, 7, 2], np.int32)
    weight = np.array([1.0, -2.0, 0.5, 3.0], np.float32)  # what comes down from above is passed on
    alphas = (1.3,) if is_split(runner) else LOSS_ALPHAS

    def build(mesh, x, hard, weight):
        features = {"x": imp(mesh, x, b, v), "hard": imp(mesh, hard, b), "weight": imp(mesh, weight, b)}
        outs = []
        for alpha in alphas:

            def loss(x, hard, alpha=alpha):
                return entmax_cross_entropy_with_logits(x, hard, v, alpha=alpha)

            def recomputed(x, hard, loss=loss):
                return mtf.recompute_grad(loss, [x, hard])

            def by_microbatch(part, loss=recomputed):
                offset = mtf.get_variable(mesh, "offset", mtf.Shape([v]), initializer=tf.zeros_initializer())
                return {"loss": mtf.reduce_sum(loss(part["x"] + offset, part["hard"]) * part["weight"])}

            for fn in (loss, recomputed):
                total = mtf.reduce_sum(fn(features["x"], features["hard"]) * features["weight"])
                outs += mtf.gradients([total], [features["x"]])
            outs += mtf.serialize_training_step(features, by_microbatch, b, 2)[0]
        return outs

    got = runner(build, x, hard, weight)
    for n, alpha in enumerate(alphas):
        want, step = np.zeros((4, 8)), 1e-5
        for j in range(8):
            shift = step * np.eye(8)[j]
            up, down = (reference.entmax_loss(float64(x) + d, np.eye(8)[hard], alpha) for d in (shift, -shift))
            want[:, j] = weight * (up - down) / (2 * step)
        plain, recomputed, of_offset = got[3 * n : 3 * n + 3]
        np.testing.assert_allclose(plain, want, atol=1e-5)
        np.testing.assert_allclose(recomputed, want, atol=1e-5)
        np.testing.assert_allclose(of_offset, want.sum(0), atol=1e-5)


def test_loss_with_z_loss(runner):
    """z_loss · log(Σ exp)² is added, with its gradient; −inf among the logits included."""
    rng = np.random.default_rng(16)
    b, v = dims(batch=4, vocab=32)
    x = (5 + 2 * rng.normal(size=(4, 32))).astype(np.float32)
    x[2, 8:20] = -np.inf
    x[3] -= 40
    hard = np.array([0, 31, 3, 2], np.int32)

    def build(mesh, x, hard):
        x, hard = imp(mesh, x, b, v), imp(mesh, hard, b)
        outs = []
        for alpha in (1.0, 1.3):
            loss = entmax_cross_entropy_with_logits(x, hard, v, 0.1, alpha=alpha)
            outs += [loss, mtf.gradients([mtf.reduce_sum(loss)], [x])[0]]
        return outs

    got = runner(build, x, hard)
    targets = np.eye(32)[hard]
    z = np.log(np.exp(float64(x)).sum(-1))
    for n, alpha in enumerate((1.0, 1.3)):
        want = reference.entmax_loss(x, targets, alpha) + 0.1 * z**2
        np.testing.assert_allclose(got[2 * n], want, rtol=1e-5)
        slope = reference.entmax(x, alpha) - targets + 0.2 * z[:, None] * reference.softmax(x)
        np.testing.assert_allclose(got[2 * n + 1], slope, atol=1e-5)


@slow
def test_loss_of_other_shapes_and_dtypes(runner):
    """Dims in any order; half-precision logits are computed in float32."""
    rng = np.random.default_rng(17)
    b, t, v = dims(batch=4, time=2, vocab=16)
    x = (2 * rng.normal(size=(4, 2, 16))).astype(np.float16).astype(np.float32)
    hard = rng.integers(0, 16, (4, 2)).astype(np.int32)
    soft = rng.dirichlet(np.ones(16), (4, 2)).astype(np.float32)
    soft_half = soft.astype(np.float16).astype(np.float64)

    def build(mesh, x, hard, soft):
        x, hard, soft = imp(mesh, x, b, t, v), imp(mesh, hard, b, t), imp(mesh, soft, b, t, v)
        half = mtf.cast(x, tf.float16)
        loss = entmax_cross_entropy_with_logits(half, hard, v)
        return [
            loss,
            mtf.gradients([mtf.reduce_sum(loss)], [half])[0],
            entmax_cross_entropy_with_logits(mtf.transpose(x, [v, b, t]), mtf.transpose(hard, [t, b]), v),
            entmax_cross_entropy_with_logits(mtf.transpose(x, [b, v, t]), soft, v),
            entmax_cross_entropy_with_logits(x, mtf.transpose(mtf.cast(soft, tf.float16), [t, v, b]), v),
        ]

    got = runner(build, x, hard, soft)
    one_hot = np.eye(16)[hard]
    assert got[0].dtype == np.float32 and got[1].dtype == np.float16
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    close(got[0], reference.entmax_loss(x, one_hot, 1.3))
    np.testing.assert_allclose(got[1], reference.entmax(x, 1.3) - one_hot, atol=1e-3)
    close(got[2], reference.entmax_loss(x, one_hot, 1.3))
    close(got[3], reference.entmax_loss(x, soft, 1.3))
    # These do not quite sum to 1, which ⟨p − t, logits⟩ turns into an error of the logits' size.
    np.testing.assert_allclose(got[4], reference.entmax_loss(x, soft_half, 1.3), atol=2e-2)


def test_loss_of_int64_targets(runner):
    x = np.random.default_rng(24).normal(size=(4, 16)).astype(np.float32)
    hard = np.array([0, 15, 7, 3])
    b, v = dims(batch=4, vocab=16)
    got = runner(lambda m, x, t: entmax_cross_entropy_with_logits(imp(m, x, b, v), imp(m, t, b), v), x, hard)
    np.testing.assert_allclose(got, reference.entmax_loss(x, np.eye(16)[hard], 1.3), rtol=1e-5)


def test_loss_errors():
    b, t, v, w = dims(batch=4, time=2, vocab=16, other=3)
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    with tf.Graph().as_default():
        logits = mtf.ones(mesh, [b, t, v])
        for shape in ([b], [b, t, v], [b, w], []):
            with pytest.raises(ValueError, match="integer targets of shape"):
                entmax_cross_entropy_with_logits(logits, mtf.zeros(mesh, shape, tf.int32), v)
        for shape in ([b, t], [b, v], [b, t, w], [b, t, v, w], []):
            with pytest.raises(ValueError, match="soft targets of shape"):
                entmax_cross_entropy_with_logits(logits, mtf.zeros(mesh, shape), v)
        with pytest.raises(ValueError, match="other.*not among"):
            entmax_cross_entropy_with_logits(logits, logits, w)


# --- Masks --------------------------------------------------------------------------------


DTYPES = (tf.float32, tf.bfloat16, tf.float16)


def tied_rows(rng):
    """float32 [8, 16] with many ties, on values that half precision holds."""
    x = rng.integers(-2, 3, (8, 16)).astype(np.float32)
    x[0] = rng.permutation(16)
    x[1] = 1.5  # all equal
    x[2], x[2, 11] = 3, 5  # 15 equal below one larger
    x[3, 4:] = -np.inf
    x[4] *= 8192
    x[5] = np.where(rng.random(16) < 0.5, 0.0, -0.0)
    return x


def test_top_k_keeps_exactly_k(runner):
    """Every k from 1 past the vocabulary's size; ties go to the lower index."""
    x = tied_rows(np.random.default_rng(18))
    b, v = dims(batch=8, vocab=16)
    ks = (1, 3, 4, 5, 16, 17) if is_split(runner) else range(1, 18)

    def build(mesh, x):
        y = imp(mesh, x, b, v)
        outs = [top_k_mask(y, k, v) for k in ks]
        outs += [top_k_mask(mtf.transpose(y, [v, b]), np.int64(4), v), top_k_mask(y, 4), top_k_mask(y, 3, b)]
        return outs

    *by_k, moved, last, other = runner(build, x)
    low = np.finfo(np.float32).min
    for k, got in zip(ks, by_k, strict=True):
        keep = reference.top_k_keep(x, min(k, 16))
        np.testing.assert_array_equal(got, np.where(keep, x, low), err_msg=f"k={k}")
        assert np.all((got != low).sum(1) == min(k, 16))
    of_4 = by_k[list(ks).index(4)]
    np.testing.assert_array_equal(moved, of_4.T)
    np.testing.assert_array_equal(last, of_4)
    np.testing.assert_array_equal(other, np.where(reference.top_k_keep(x, 3, axis=0), x, low))


def test_top_k_of_each_row(runner):
    """k as a tensor: below 1 no mask, at V and above no mask, above max_top_k NaN, and only there."""
    x = tied_rows(np.random.default_rng(19))
    b, v = dims(batch=8, vocab=16)
    per_row = np.array([-1, 0, 4, 6, 7, 15, 16, 40], np.int32)
    low = np.finfo(np.float32).min
    scalars = [2] if is_split(runner) else range(8)

    def build(mesh, x, per_row):
        x, k = imp(mesh, x, b, v), imp(mesh, per_row, b)
        return [
            top_k_mask(x, k, max_top_k=6),
            top_k_mask(mtf.transpose(x, [v, b]), per_row, v, max_top_k=6),
            top_k_mask(x, k, max_top_k=100),
            *[top_k_mask(x, per_row[n], max_top_k=6) for n in scalars],
            top_k_mask(x, mtf.constant(mesh, 3, mtf.Shape([]), tf.int32), max_top_k=3),
            top_k_mask(x, [3] * 8, max_top_k=16),
            top_k_mask(mtf.cast(x, tf.float16), k, max_top_k=6),
        ]

    got = runner(build, x, per_row)

    def masked(x, k, max_top_k):
        if 1 <= k < 16:
            return np.full(x.shape, np.nan) if k > max_top_k else np.where(reference.top_k_keep(x, k), x, low)
        return x

    limited = np.stack([masked(row, k, 6) for row, k in zip(x, per_row, strict=True)])
    free = np.stack([masked(row, k, 16) for row, k in zip(x, per_row, strict=True)])
    np.testing.assert_array_equal(got[0], limited)
    np.testing.assert_array_equal(got[1], limited.T)
    np.testing.assert_array_equal(got[2], free)
    *by_scalar, as_mtf, as_list, half = got[3:]
    for n, g in zip(scalars, by_scalar, strict=True):
        np.testing.assert_array_equal(g, masked(x, per_row[n], 6), err_msg=f"k={per_row[n]}")
    np.testing.assert_array_equal(as_mtf, masked(x, 3, 16))
    np.testing.assert_array_equal(as_list, masked(x, 3, 16))
    half_low = float(np.finfo(np.float16).min)
    np.testing.assert_array_equal(half.astype(np.float32), np.where(limited == low, half_low, limited))


def test_masked_entries_have_probability_0(runner):
    """Exactly, under mtf's softmax and under entmax, in each dtype; survivors keep theirs."""
    x = tied_rows(np.random.default_rng(20))
    x[3] = -3e4  # near float16's lowest, where the margin is smallest
    x[3, 9] = -3.1e4
    x[6] *= -1e4
    b, v = dims(batch=8, vocab=16)
    ks, mask_alphas = ((3,), (1.3,)) if is_split(runner) else ((1, 3, 15), (1.0, 1.3, 2.0))

    def build(mesh, x):
        outs = []
        for dtype, k in itertools.product(DTYPES, ks):
            masked = top_k_mask(mtf.cast(imp(mesh, x, b, v), dtype), k)
            outs += [masked, mtf.softmax(masked, v)] + [entmax(masked, alpha) for alpha in mask_alphas]
        return outs

    got = runner(build, x)
    for n, (tolerance, k) in enumerate(itertools.product((1e-6, 2**-7, 2**-10), ks)):
        width = 2 + len(mask_alphas)
        masked, *probabilities = (float64(g) for g in got[width * n : width * n + width])
        assert np.isfinite(masked).all()
        keep = reference.top_k_keep(x, k)
        scores = np.where(keep, masked, -np.inf)
        for p in probabilities:
            assert not p[~keep].any() and np.all(p[keep & (scores == scores.max(-1, keepdims=True))] > 0)
        # mtf's softmax goes by a logsumexp, which large scores leave few digits.
        moderate = np.abs(x).max(-1) < 100
        np.testing.assert_allclose(probabilities[0][moderate], reference.softmax(scores)[moderate], atol=4 * tolerance)
        for p, alpha in zip(probabilities[1:], mask_alphas, strict=True):
            np.testing.assert_allclose(p, reference.entmax(scores, alpha), atol=tolerance)


def test_top_k_passes_the_gradient_to_survivors_only(runner):
    rng = np.random.default_rng(21)
    x = tied_rows(rng)
    dy = rng.normal(size=x.shape).astype(np.float32)
    b, v = dims(batch=8, vocab=16)
    per_row = np.array([0, 1, 2, 3, 4, 5, 6, 16], np.int32)

    def build(mesh, x, dy, per_row):
        x, dy, k = imp(mesh, x, b, v), imp(mesh, dy, b, v), imp(mesh, per_row, b)
        half = mtf.cast(x, tf.float16)
        masked = ((top_k_mask(x, 3), x), (top_k_mask(x, k, max_top_k=6), x), (top_k_mask(half, 3), half))
        return [mtf.gradients([mtf.reduce_sum(y * mtf.cast(dy, y.dtype))], [x])[0] for y, x in masked]

    got = runner(build, x, dy, per_row)
    keep = reference.top_k_keep(x, 3)
    by_row = np.stack([reference.top_k_keep(row, k or 16) for row, k in zip(x, per_row, strict=True)])
    np.testing.assert_array_equal(got[0], np.where(keep, dy, 0))
    np.testing.assert_array_equal(got[1], np.where(by_row, dy, 0))
    np.testing.assert_array_equal(got[2], np.where(keep, dy.astype(np.float16), 0))


def test_top_k_and_nan(runner):
    """A NaN stays, and spoils no other row."""
    x = tied_rows(np.random.default_rng(22))
    bad = x.copy()
    bad[0, 3] = bad[6, 15] = np.nan
    b, v = dims(batch=8, vocab=16)
    got, clean = runner(lambda m, *xs: [top_k_mask(imp(m, x, b, v), 3) for x in xs], bad, x)
    assert np.isnan(got[0, 3]) and np.isnan(got[6, 15])
    others = [1, 2, 3, 4, 5, 7]
    np.testing.assert_array_equal(got[others], clean[others])
    assert not np.isnan(got[others]).any()


def test_top_k_errors():
    b, v = dims(batch=4, vocab=8)
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    with tf.Graph().as_default():
        x = mtf.ones(mesh, [b, v])
        for k in (0, -1, -2, 2.0, 1.5, float("nan"), "4", None):
            with pytest.raises(ValueError, match="k="):
                top_k_mask(x, k)
        for k in ([1, 2, 3, 4], tf.constant(3), mtf.zeros(mesh, [b], tf.int32)):
            for options in ({}, {"max_top_k": 0}, {"max_top_k": -1}):
                with pytest.raises(ValueError, match="max_top_k"):
                    top_k_mask(x, k, **options)
        with pytest.raises(ValueError, match="top-k has shape"):
            top_k_mask(x, [1, 2, 3], max_top_k=3)
        with pytest.raises(ValueError, match="other.*not among"):
            top_k_mask(x, 2, mtf.Dimension("other", 8))


# --- What GPT-Neo's scripts call ------------------------------------------------------------


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:2,y:2", "sequence:x,memory_length:y")], ids=str)
def test_biasmask_attn_weights(runner):
    n, memory, long, short = dims(sequence=6, memory_length=6, memory_long=10, memory_short=4)
    types = (tf.float32, tf.bfloat16, tf.float16)

    def build(mesh):
        kinds = [mtf.VariableDType(tf.float32, tf.float32, dtype) for dtype in types]
        outs = [biasmask_attn_weights(mesh, n, memory, kind) for kind in kinds]
        outs += [biasmask_attn_weights(mesh, n, ns, kinds[0]) for ns in (long, short)]
        masks = [mtf.softmax(out * 1.0, memory) for out in outs[:3]]
        return outs + masks

    *outs, soft32, soft16b, soft16 = runner(build)
    for got, dtype in zip(outs[:3], types, strict=True):
        assert got.dtype == dtype.as_numpy_dtype and np.isfinite(float64(got)).all()
    seen = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(outs[0], np.where(seen, 0, np.float32(-1e10)))
    np.testing.assert_allclose(float64(outs[1]), np.where(seen, 0, -1e10), rtol=2**-8)
    np.testing.assert_array_equal(outs[2], np.where(seen, 0, np.finfo(np.float16).min))
    # Where there are more keys, the last query sees the last key.
    np.testing.assert_array_equal(outs[3] == 0, np.arange(10) <= np.arange(6)[:, None] + 4)
    np.testing.assert_array_equal(outs[4] == 0, np.arange(4) <= np.arange(6)[:, None] - 2)
    for got in (soft32, soft16b, soft16):
        np.testing.assert_allclose(float64(got), seen / seen.sum(1, keepdims=True), atol=2**-8)
        assert not float64(got)[~seen].any()


def test_parse_inputs():
    b, n, embd, vocab, positions = dims(batch=2, sequence=4, embd=8, vocab=16, embed_sequence=4)
    x = mtf.zeros(mtf.Mesh(mtf.Graph(), "mesh"), [b, n], tf.int32)
    other = {"embd_dim": embd, "vocab_dim": vocab, "embed_sequence_dim": positions, "memory_length_dim": n}
    got = parse_inputs({"inputs": x, "labels": None}, other)
    assert got[0] is x
    assert got[1:] == (b, n, embd, vocab, positions)

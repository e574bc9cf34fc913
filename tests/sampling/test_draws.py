"""gpt_neo_sampling.sampling.categorical and fixed_point: on one device, on split meshes and under XLA, against NumPy.

Statistical tests are of draws at fixed seeds: they always pass or always fail.
Each of their 8 p values is refused at FALSE_ALARM, so right draws would fail
anywhere at less than one choice of seeds in 100,000.
"""

import contextlib
import functools
import itertools

import numpy as np
import pytest
import reference
from programs import DEVICES, ONE_DEVICE, MeshRunner, Program, XlaProgram, compiled, dims, lowered
from test_utils import chi_square_p

from gpt_neo_sampling._compat import mtf, quiet_logging, tf
from gpt_neo_sampling.mesh.sharded_rows import GROUPS, ShardedRows, group_size, padded_size
from gpt_neo_sampling.sampling import categorical, entmax_solver, fixed_point
from gpt_neo_sampling.sampling.categorical import grouped_draw, score_draw

FALSE_ALARM = 1e-6
slow = pytest.mark.slow
GPT2_VOCAB = 50257
LOWEST = np.finfo(np.float32).min


def imp(mesh, value, *shape):
    return mtf.import_tf_tensor(mesh, value, mtf.Shape(shape))


def on_tensors(fn, *arrays, jit=False):
    """Values of what fn gives for tensors of these values, by itself or in a nest."""
    with quiet_logging():
        return tf.nest.map_structure(lambda t: t.numpy(), compiled(fn, jit)(*map(tf.constant, arrays)))


def assert_same_bits(got, want, message=""):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32), err_msg=str(message))


# --- Groups and rows ----------------------------------------------------------------


def test_group_size():
    sizes = np.arange(1, 5000)
    groups = np.array([group_size(int(n)) for n in sizes])
    np.testing.assert_array_equal(groups, np.ceil(sizes / 64))
    assert [group_size(n) for n in (1, 64, 65, 128, 129, GPT2_VOCAB)] == [1, 1, 2, 2, 3, 786]


def test_padded_size():
    """The least multiple of shards and group, both, that holds the size."""
    for size in [*range(1, 300), 1000, 2048, GPT2_VOCAB]:
        for shards in (1, 2, 3, 4, 8, 64):
            unit = shards * group_size(size)
            want = unit * np.ceil(size / unit)
            assert padded_size(size, shards) == want, (size, shards)
    assert padded_size(GPT2_VOCAB, 4) == padded_size(GPT2_VOCAB, 64) == 50304
    assert padded_size(2048, 8) == 2048


def rows_of(mesh_shape, layout, size=None, whole_groups=True, vocab=130):
    batch, v = dims(batch=4, vocab=vocab)
    impl = MeshRunner(mesh_shape, layout).impl
    return ShardedRows(impl, mtf.Shape([v, batch]), v, size, whole_groups)


def test_rows_of_a_layout():
    rows = rows_of("", "")
    assert (rows.group, rows.n_groups, rows.entries, rows.mesh_axis, rows.gathered_axis) == (3, 44, 130, None, None)
    rows = rows_of("x:2,y:2", "batch:x,vocab:y")  # 65 entries cut through groups of 3
    assert (rows.entries, rows.mesh_axis, rows.gathered_axis) == (65, None, 1)
    rows = rows_of("x:2,y:2", "batch:x,vocab:y", whole_groups=False)
    assert (rows.mesh_axis, rows.gathered_axis) == (1, None)
    rows = rows_of("x:2", "vocab:x", vocab=132)
    assert (rows.group, rows.n_groups, rows.entries, rows.mesh_axis, rows.gathered_axis) == (3, 44, 66, 0, None)
    rows = rows_of("x:4", "vocab:x", size=37, vocab=40)  # the last of four shards has 3 entries of padding
    assert (rows.size, rows.group, rows.n_groups, rows.entries) == (37, 1, 37, 10)
    assert rows_of("x:4", "batch:x").mesh_axis is None


def test_rows_and_back():
    rows = rows_of("", "")
    x = np.arange(130 * 4, dtype=np.float32).reshape(130, 4)

    def there_and_back(x):
        flat = rows.to_rows(x)
        return flat, rows.from_rows(flat), rows.grouped(flat)

    flat, back, grouped = on_tensors(there_and_back, x)
    np.testing.assert_array_equal(flat, x.T)
    np.testing.assert_array_equal(back, x)
    assert grouped.shape == (4, 44, 3)
    np.testing.assert_array_equal(grouped.reshape(4, -1), np.pad(x.T, [(0, 0), (0, 2)]))


# --- Draws from weights --------------------------------------------------------------


def uniforms(rng, *shape):
    """Multiples of 2**-24 in [0, 1), as float32, both ends among them."""
    u = rng.integers(0, 2**24, shape)
    u.flat[:2] = 0, 2**24 - 1
    return (u * 2.0**-24).astype(np.float32)


def expected(weights, u1, u2):
    """reference.two_level_draw, row by row; u [rows] or [rows, samples]."""
    draw = np.vectorize(reference.two_level_draw, signature="(v),(),()->()")
    if u1.ndim == 2:
        weights = weights[:, None]
    return draw(weights.astype(np.float64), u1, u2)


def draw_all(cases, runner=None):
    """grouped_draw of each (weights [rows, V], u1, u2), in one graph.

    u is [rows], or [rows, samples] for many draws from a row.
    """
    flat = [array for case in cases for array in case]

    def build(mesh, *holders):
        outs = []
        for w, u1, u2 in zip(holders[::3], holders[1::3], holders[2::3], strict=True):
            b, v = dims(batch=w.shape[0], vocab=w.shape[1])
            s = None if len(u1.shape) == 1 else mtf.Dimension("samples", u1.shape.as_list()[1])
            rows = [b] if s is None else [b, s]
            outs.append(grouped_draw(imp(mesh, w, b, v), imp(mesh, u1, *rows), imp(mesh, u2, *rows), v, s))
        return outs

    return (runner or MeshRunner())(build, *flat)


def sparse_weights(rng, rows, size):
    """Likelihoods of Gaussian logits, small integers and mostly zeros, a third of the rows each."""
    w = np.exp(2 * rng.normal(size=(rows, size)))
    w[1::3] = rng.integers(0, 16, w[1::3].shape)
    w[2::3] *= rng.random(w[2::3].shape) < 0.05
    w[:, -1] = np.maximum(w[:, -1], 0.25)  # no row without mass
    return w.astype(np.float32)


@functools.cache
def layouts_case():
    rng = np.random.default_rng(7)
    case = sparse_weights(rng, 4096, 256), uniforms(rng, 4096), uniforms(rng, 4096)
    want = expected(*case)
    assert np.all(np.take_along_axis(case[0], want[:, None], 1) > 0)
    return case, want


@pytest.mark.parametrize(
    "mesh_shape, layout",
    [
        ("", ""),
        ("x:2", "vocab:x"),
        ("x:2", "batch:x"),
        pytest.param("x:8", "vocab:x", marks=slow),
        pytest.param("x:2,y:4", "batch:x,vocab:y", marks=slow),
    ],
)
def test_draw_is_the_reference_on_every_layout(mesh_shape, layout):
    """4,096 rows, index by index, against float64."""
    case, want = layouts_case()
    (got,) = draw_all([case], MeshRunner(mesh_shape, layout))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)


def test_draw_where_the_layout_cuts_groups():
    """130 entries make groups of 3, and 65 lie on a shard; 68 make groups of 2, and 17 lie on one of 4."""
    rng = np.random.default_rng(8)
    assert group_size(130) == 3 and group_size(68) == 2
    cases = [(sparse_weights(rng, 1024, size), uniforms(rng, 1024), uniforms(rng, 1024)) for size in (130, 68)]
    many = sparse_weights(rng, 8, 130), uniforms(rng, 8, 100), uniforms(rng, 8, 100)
    got = draw_all([cases[0], many], MeshRunner("x:2", "vocab:x")) + draw_all([cases[1]], MeshRunner("x:4", "vocab:x"))
    for g, case in zip(got, (cases[0], many, cases[1]), strict=True):
        np.testing.assert_array_equal(g, expected(*case))


@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 3, 63, 64, 65, 66), pytest.param((*range(4, 18), 31, 32, 33, 48, *range(67, 71)), marks=slow)],
    ids=["at the ends", "between"],
)
def test_draw_from_small_vocabularies(sizes):
    """1 to 70 entries: from one group of one entry to 35 groups of two."""
    rng = np.random.default_rng(9)
    cases = [(sparse_weights(rng, 40, size), uniforms(rng, 40), uniforms(rng, 40)) for size in sizes]
    for case, got in zip(cases, draw_all(cases), strict=True):
        np.testing.assert_array_equal(got, expected(*case), err_msg=f"{case[0].shape[1]} entries")


def test_many_draws_are_the_single_draws():
    """samples_dim takes other code paths for few and for many samples: the same draws."""
    rng = np.random.default_rng(10)
    w = sparse_weights(rng, 8, 256)
    cases = [(w, uniforms(rng, 8, n), uniforms(rng, 8, n)) for n in (1, 2, GROUPS, GROUPS + 1, 300)]
    want = [expected(*case) for case in cases]
    u1, u2 = (np.concatenate([case[i] for case in cases], 1) for i in (1, 2))
    *got, one_by_one = draw_all([*cases, (w.repeat(u1.shape[1], 0), u1.reshape(-1), u2.reshape(-1))])
    for many, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(many, right)
    np.testing.assert_array_equal(one_by_one.reshape(u1.shape), np.concatenate(want, 1))
    got = draw_all([cases[1], cases[-1]], MeshRunner("x:2", "vocab:x"))
    np.testing.assert_array_equal(got[0], want[1])
    np.testing.assert_array_equal(got[1], want[-1])


def test_draw_with_samples_split():
    rng = np.random.default_rng(11)
    case = sparse_weights(rng, 4, 128), uniforms(rng, 4, 8), uniforms(rng, 4, 8)
    (got,) = draw_all([case], MeshRunner("x:2,y:2", "samples:x,vocab:y"))
    np.testing.assert_array_equal(got, expected(*case))
    # Along one mesh axis no processor has all that a draw needs: an error, not another index.
    with pytest.raises(ValueError, match="samples"):
        draw_all([case], MeshRunner("x:2", "samples:x,vocab:x"))


def test_weight_0_is_never_drawn():
    """At both ends of the uniforms' range, and for zeros at the ends of groups and of the row."""
    rng = np.random.default_rng(12)
    w = sparse_weights(rng, 512, 256)
    w[:, :5], w[:, 8:12], w[:, -6:] = 0, 0, 0
    w[::2, rng.permutation(256)[:128]] = 0
    w[np.arange(512), rng.integers(12, 250, 512)] = 1
    lone = np.eye(64, 256, k=100, dtype=np.float32) * 0.25  # one entry, a mass below 1
    ends = np.array([0, 1 - 2.0**-24], np.float32)
    at_ends = np.array([*itertools.product(ends, ends)]).repeat(512, 0)
    cases = [
        (np.tile(w, (4, 1)), *at_ends.T),
        (w, *(uniforms(rng, 512, 200) for _ in range(2))),
        (lone, *(uniforms(rng, 64, 200) for _ in range(2))),
    ]
    for (weights, u1, u2), got in zip(cases, draw_all(cases), strict=True):
        columns = got.reshape(len(weights), -1)
        assert columns.min() >= 0
        assert np.all(np.take_along_axis(weights, columns, 1) > 0)
        if u1.ndim == 1:
            np.testing.assert_array_equal(got, expected(weights, u1, u2))
    np.testing.assert_array_equal(got, np.broadcast_to(100 + np.arange(64)[:, None], got.shape))


@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:2", "vocab:x")], ids=str)
def test_rare_entries_beside_a_likely_one(runner):
    """An entry's share of the 32 bits is its probability's, whatever shares its group with it."""
    rng = np.random.default_rng(17)
    w = np.zeros([200, 6400], np.float32)
    w[:, :100] = rng.uniform(2e-8, 2e-7, 100)  # a group; of 24 bits, one stands for 6e-8
    w[:, 40], w[:, 100:] = 1, 1e-9
    borders = 2.0**32 * np.cumsum(w[0, :100].astype(np.float64))[:-1] / w[0, :100].sum(dtype=np.float64)
    words = np.concatenate([np.floor(borders) - 1, np.floor(borders) + 1])  # two on either side of each
    want = np.concatenate([np.arange(99), np.arange(1, 100)])
    words = np.resize(words, 200).astype(np.uint32).view(np.int32)
    zeros = np.zeros(200, np.int32)
    one, many = draw_all([(w, zeros, words), (w[:1], zeros[np.newaxis], words[np.newaxis])], runner)
    np.testing.assert_array_equal(one, np.resize(want, 200))
    np.testing.assert_array_equal(many[0], np.resize(want, 200))


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=slow)])
def test_draw_from_millions(jit):
    """The fast way and the exact one agree near borders however many entries their sums have."""
    size, group = 2**22, 2**16
    weight = np.float32(0.7234)
    at = np.arange(1, 48) * (group // 48)
    words = np.concatenate([2.0**32 * at / group + 2**32 * e for e in (-1.5e-6, -3e-7, -1e-8, 1e-8, 3e-7, 1.5e-6)])
    words = np.floor(words).astype(np.uint32)
    want = (words * 2.0**-32 * group).astype(int)

    def build(u, weight):  # were it a constant, XLA would compute the sums while it compiles
        b, v, s = dims(batch=1, vocab=size, samples=1)

        def draw(*samples):
            def build(mesh, u, weight):
                u = [imp(mesh, tf.reshape(x, [1] * (1 + len(samples))), b, *samples) for x in (u * 0, u)]
                return grouped_draw(imp(mesh, tf.fill([1, size], weight), b, v), *u, v, *samples)

            return tf.reshape(lowered(build, u, weight), [])

        return tf.stack([draw(), draw(s)])

    function = compiled(build, jit)
    with quiet_logging():
        got = np.array([function(*map(tf.constant, (u, weight))).numpy() for u in words.view(np.int32)[::7]])
    np.testing.assert_array_equal(got, np.stack([want[::7]] * 2, 1))


def test_draw_at_every_scale():
    """From the smallest normal float32 to the largest, where plain sums under- or overflow."""
    rng = np.random.default_rng(13)
    base = rng.integers(0, 16, (600, 130)).astype(np.float32)
    base[:, 70] = 9
    cases = [(base * np.float32(2.0**e), uniforms(rng, 600), uniforms(rng, 600)) for e in (-126, -100, 0, 100, 124)]
    real = 0.1 + 0.9 * rng.random((600, 130))
    for scale in (1.2e-37, 3e-30, 1.0, 3e38):
        cases.append(((real * scale).astype(np.float32), uniforms(rng, 600), uniforms(rng, 600)))
    # All magnitudes in one row. (A group 2**127 below the largest may go unseen by a
    # uniform of exactly 0, which has a use for it once in 2**24.)
    mixed = 10 ** rng.uniform(-37.9, 38.4, (600, 130))
    cases.append((mixed.astype(np.float32), *(np.maximum(uniforms(rng, 600), np.float32(2**-24)) for _ in range(2))))
    b, v = dims(batch=600, vocab=130)

    def build(mesh, w, u1, u2):
        return grouped_draw(imp(mesh, w, b, v), imp(mesh, u1, b), imp(mesh, u2, b), v)

    program = Program(build, [(tf.float32, (600, 130)), *[(tf.float32, (600,))] * 2])
    for case in cases:
        assert np.isfinite(case[0]).all()
        np.testing.assert_array_equal(program(*case), expected(*case))


def test_draw_in_other_dtypes_and_dims():
    """bfloat16 and float16 weights are summed in float32; dim may stand anywhere."""
    rng = np.random.default_rng(14)
    p, q, v = dims(p=4, q=60, vocab=512)
    w = (1000 * rng.random((4, 60, 512))).astype(np.float32)  # half a row is more than float16 holds
    u1, u2 = uniforms(rng, 4, 60), uniforms(rng, 4, 60)

    def build(mesh, w, u1, u2):
        u1, u2 = imp(mesh, u1, p, q), imp(mesh, u2, p, q)
        x = imp(mesh, w, p, q, v)
        orders = [mtf.transpose(x, order) for order in ([p, v, q], [v, p, q])]
        halves = [mtf.cast(x, dtype) for dtype in (tf.bfloat16, tf.float16)]
        rounded = [mtf.cast(half, tf.float32) for half in halves]
        return rounded + [grouped_draw(x, u1, u2, v) for x in orders + halves]

    *rounded, _, _, _, _ = single = MeshRunner()(build, w, u1, u2)
    flat = [expected(x.reshape(240, 512), u1.reshape(-1), u2.reshape(-1)) for x in (w, *rounded)]
    in_float32, in_bfloat16, in_float16 = (x.reshape(4, 60) for x in flat)
    want = [in_float32] * 2 + [in_bfloat16, in_float16]
    for got in (single, MeshRunner("x:2", "vocab:x")(build, w, u1, u2)):
        np.testing.assert_array_equal(got[2:], want)


INVALID = {1: (9, np.nan), 3: (77, -1.0), 4: (0, np.inf), 6: (129, -np.inf)}


def test_invalid_rows():
    """−1, and only for the rows that are."""
    rng = np.random.default_rng(15)
    w = 0.1 + rng.random((10, 130)).astype(np.float32)
    for row, (column, value) in INVALID.items():
        w[row, column] = value
    w[7] = 0  # no mass
    w[8, :64] = -0.0  # no weight, yet not negative
    wide = np.pad(w, [(0, 0), (0, 126)])
    us = [[uniforms(rng, *shape) for _ in range(2)] for shape in ((10,), (10, 3), (10, 90))]
    cases = [(x, *u) for x in (w, wide) for u in us]
    want = [expected(*case) for case in cases]
    bad = sorted([*INVALID, 7])
    for rows in want:
        assert np.all(rows[bad] == -1) and np.all(np.delete(rows, bad, 0) >= 0)
    # Shards cut the groups of w, not those of wide.
    for got, right in zip(draw_all(cases[:3]) + draw_all(cases, MeshRunner("x:2", "vocab:x")), want[:3] + want):
        np.testing.assert_array_equal(got, right)


def test_draw_checks_its_uniforms():
    batch, time, vocab = dims(batch=4, time=2, vocab=16)

    def build(mesh, *shape):
        right = mtf.zeros(mesh, [batch])
        return grouped_draw(mtf.ones(mesh, [batch, vocab]), right, mtf.zeros(mesh, list(shape)), vocab)

    for shape in ([], [time], [batch, time], [vocab]):
        with pytest.raises(ValueError, match="uniforms of shape"):
            MeshRunner()(lambda m, shape=shape: build(m, *shape))


@pytest.mark.parametrize("size", [0, -1, 17])
def test_draw_checks_its_size(size):
    batch, vocab = dims(batch=4, vocab=16)

    def build(mesh, draw, *more):
        u = mtf.zeros(mesh, [batch])
        return draw(mtf.zeros(mesh, [batch, vocab]), u, u, vocab, *more, size=size)

    for draw in (grouped_draw, score_draw):
        with pytest.raises(ValueError, match=f"size={size} of"):
            MeshRunner()(lambda m, draw=draw: build(m, draw))


def test_padding_draws_what_no_padding_draws():
    """37 entries, in groups of 1, over 2 and 3 shards: the weights of padding do not matter, as they are 0."""
    rng = np.random.default_rng(16)
    w, u1, u2 = sparse_weights(rng, 512, 37), uniforms(rng, 512), uniforms(rng, 512)
    many = uniforms(rng, 512, 70), uniforms(rng, 512, 70)

    def draws_of(runner, size):
        def build(mesh, w, *us):
            b, v, s = dims(batch=512, vocab=size, samples=70)
            w = imp(mesh, tf.pad(w, [[0, 0], [0, size - 37]]), b, v)
            one, more = (imp(mesh, u, b) for u in us[:2]), (imp(mesh, u, b, s) for u in us[2:])
            return [grouped_draw(w, *one, v, size=37), grouped_draw(w, *more, v, s, size=37)]

        return runner(build, w, u1, u2, *many)

    want = draws_of(MeshRunner(), 37)
    np.testing.assert_array_equal(want[0], expected(w, u1, u2))
    for runner in (MeshRunner("x:2", "vocab:x"), MeshRunner("x:3", "vocab:x")):
        size = padded_size(37, runner.impl.size)
        assert size > 37
        for got, right in zip(draws_of(runner, size), want):
            np.testing.assert_array_equal(got, right, err_msg=str(runner))
    for got, right in zip(draws_of(MeshRunner(), 111), want):  # whole groups of padding
        np.testing.assert_array_equal(got, right)


# --- Weights in integers ---------------------------------------------------------------


def test_exact_softmax_weights():
    steps = -np.arange(2**13) * 2.0**-24
    z = np.concatenate([-np.linspace(0, 95, 400001), steps, -(10 ** np.linspace(-40, 2, 5001)), [-np.inf, LOWEST]])
    z = -np.sort(-z.astype(np.float32))
    w = on_tensors(fixed_point.softmax_weights, z)
    assert_same_bits(on_tensors(fixed_point.softmax_weights, z, jit=True), w)
    right = np.exp(z.astype(np.float64))
    live = z > -87.3
    assert np.abs(w[live] / right[live] - 1).max() < 2**-22
    assert np.all(w[z < -87.4] == 0) and np.all(w[z == 0] == 1)
    assert np.all(np.diff(w) <= 0)
    assert w[live].min() >= np.finfo(np.float32).tiny  # none that a backend may flush to 0


@functools.cache
def exact_entmax_program(shape, jit, runner, candidates):
    """`candidates` is what fixed_point._CANDIDATES is, to make another program where it is another."""
    assert fixed_point._CANDIDATES == candidates
    impl = runner.impl
    axes = list(range(impl.ndims))

    def weights(z, epsilon):
        like = impl.LaidOutTensor.from_tensor_list
        z, epsilon = like(tf.split(z, impl.size, 1)), like([epsilon] * impl.size)
        w = fixed_point.entmax_weights(impl, z, epsilon, lambda x: impl.allreduce(x, axes, "SUM") if axes else x)
        return tf.concat(w.tensor_list, 1)

    if runner is ONE_DEVICE:
        function = compiled(weights, jit)
        return lambda *arrays: function(*map(tf.constant, arrays)).numpy()
    with tf.Graph().as_default():
        holders = tf.placeholder(tf.float32, shape), tf.placeholder(tf.float32, (shape[0], 1))
        fetch = weights(*holders)
        options = tf.ConfigProto(device_count={"CPU": DEVICES})
        options.graph_options.rewrite_options.disable_meta_optimizer = True  # it takes longer than all else
        session = tf.Session(config=options)
    return lambda *arrays: session.run(fetch, dict(zip(holders, arrays)))


def exact_entmax(z, alpha, jit=False, runner=ONE_DEVICE):
    """fixed_point.entmax_weights of z [rows, V], alpha [rows]; a runner splits V along its mesh."""
    with quiet_logging():
        program = exact_entmax_program(z.shape, jit, runner, fixed_point._CANDIDATES)
        return program(z, (np.float32(alpha) - np.float32(1))[:, np.newaxis])


HALVES = MeshRunner("x:2", "vocab:x")
ALPHAS = np.array([1, 1 + 2**-23, 1.001, 1.05, 1.3, 1.5, 1.9, 2], np.float32)


def from_largest(x):
    x = np.float32(x)
    return x - x.max(-1, keepdims=True)


def gaussians(rng, spreads, size):
    return np.float32([s * rng.normal(size=size) for s in spreads])


def odd_scores(rng, size):
    """[7, size]: ties, all equal, one-hot, two levels, masked, −inf in places, and one that stands out."""
    x = gaussians(rng, [2, 0, 1, 0, 1, 2, 1], size)
    x[0] = np.round(8 * x[0]) / 8
    x[2] = LOWEST
    x[2, size // 3] = 0
    x[3, size // 2 :] = -1e-5
    x[4, 40:] = LOWEST
    x[5, rng.random(size) < 0.5] = -np.inf
    x[6, -1] += 40
    return from_largest(x)


def with_alphas(x, alphas):
    """Each row of x with each α: scores and α, both by rows."""
    return np.repeat(x, len(alphas), 0), np.tile(np.float32(alphas), len(x))


def check_entmax_weights(z, alpha, want_few):
    """Against float64; and the same bits in every way of computing them.

    A weight may be wrong by 2⁻²³ of its argument in units of β = max p^(α − 1), so by that times β·p^(2 − α).
    """
    size = z.shape[1]
    few = (1 - (alpha - 1)[:, np.newaxis] * np.minimum(-z.astype(np.float64), 127) > 0).sum(1).max()
    assert (few < fixed_point._CANDIDATES) == want_few
    w = exact_entmax(z, alpha)
    p = w.astype(np.float64) / w.sum(1, dtype=np.float64, keepdims=True)
    for i in range(len(z)):
        right = reference.entmax(np.maximum(z[i].astype(np.float64), -1e9), float(alpha[i]))
        slope = np.where(right > 0, right, 0) ** (2 - float(alpha[i])) * (right > 0)
        slope *= right.max() ** (float(alpha[i]) - 1)
        assert np.abs(p[i] - right).sum() < 1e-7 + 2**-23 * slope.sum(), (i, alpha[i])
        assert np.all(p[i][np.isneginf(z[i])] == 0)
    assert_same_bits(exact_entmax(z, alpha, jit=True), w)
    order = np.random.default_rng(17).permutation(size)
    assert_same_bits(exact_entmax(z[:, order], alpha), w[:, order])
    padded = np.pad(z, [(0, 0), (0, -size % 2)], constant_values=-np.inf)
    assert_same_bits(exact_entmax(padded, alpha, runner=HALVES)[:, :size], w)
    return w


@slow
def test_exact_entmax_of_a_small_vocabulary():
    """No more than 2·_CANDIDATES entries are all looked at."""
    rng = np.random.default_rng(18)
    z = np.concatenate([from_largest(gaussians(rng, [0.01, 0.3, 1, 3], 500)), odd_scores(rng, 500)])
    z, alpha = with_alphas(z, ALPHAS)
    w = check_entmax_weights(z, alpha, True)
    one_hot = z[:, 500 // 3] - np.sort(z, 1)[:, -2] > 1e9
    assert one_hot.sum() == len(ALPHAS) and np.all(w[one_hot].sum(1) == 1) and np.all(w[one_hot].max(1) == 1)


def test_exact_entmax_of_a_large_vocabulary(monkeypatch):
    """Its threshold is looked for among _CANDIDATES entries, or among all: the same bits."""
    rng = np.random.default_rng(19)
    size = 4201  # so many that half of them are not all candidates
    assert size // 2 > 2 * fixed_point._CANDIDATES
    narrow = with_alphas(from_largest(gaussians(rng, [2, 2.5, 3], size)), [1.3, 1.5, 1.7, 1.9, 2])
    few = check_entmax_weights(*narrow, True)
    spreads = [2, 1, 3, 2, 0.1, 0.05, 0.02, 1e-5]
    wide = np.concatenate([from_largest(gaussians(rng, spreads, size)), odd_scores(rng, size)])
    wide = wide, np.append(ALPHAS, np.float32([1.3, 2, 1.5, 1.9, 1, 1.001, 1.05]))
    assert wide[0].shape == narrow[0].shape  # one program for both
    check_entmax_weights(*wide, False)  # this is among all as it is
    monkeypatch.setattr(fixed_point, "_CANDIDATES", size)
    assert_same_bits(exact_entmax(*narrow), few)


# --- The same weights for a TPU core's program ---------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_quotients_are_exact(jit):
    rng = np.random.default_rng(24)
    y = rng.integers(1, 2 ** rng.integers(1, 32, 200000))
    q = rng.integers(0, 2 ** rng.integers(1, 39, 200000))
    q = np.minimum(q, 2**59 // y)
    x = q * y + rng.choice([0, 1, -1, 2], 200000).clip(-1, 1) * (rng.random(200000) < 0.5)
    x = np.maximum(x, 0)
    large = rng.integers(0, 2**60, 1000), rng.integers(1, 2**20, 1000)
    got = on_tensors(fixed_point._quotient, x, y, jit=jit)
    np.testing.assert_array_equal(got, x // y)
    got = on_tensors(fixed_point._quotient, *large, jit=jit)
    exact = large[0] // large[1]
    np.testing.assert_array_equal(got[exact < 2**38], exact[exact < 2**38])
    np.testing.assert_allclose(got, exact, rtol=2**-16)


def fast_beta(z, alpha):
    """β in float64, by bisection: the sum of p = [β + εz]₊^(1/ε) is 1."""
    eps = np.maximum(np.float64(np.float32(alpha) - np.float32(1)), 1e-9)[:, np.newaxis]
    low, high = np.zeros_like(eps), np.ones_like(eps)
    for _ in range(60):
        middle = (low + high) / 2
        total = (np.maximum(middle + eps * np.maximum(z, -1e9), 0) ** (1 / eps)).sum(1, keepdims=True)
        low, high = np.where(total > 1, low, middle), np.where(total > 1, middle, high)
    return np.float32(high)


@functools.cache
def weights_near_program(shape, jit):
    impl = ONE_DEVICE.impl

    def weights(z, epsilon, beta):
        z, epsilon, beta = (impl.LaidOutTensor.from_tensor_list([x]) for x in (z, epsilon, beta))
        largest = lambda x: tf.reduce_max(x.tensor_list[0])  # noqa: E731
        return fixed_point.entmax_weights_near(impl, z, epsilon, beta, lambda x: x, largest).tensor_list[0]

    function = compiled(weights, jit)
    return lambda *arrays: function(*map(tf.constant, arrays)).numpy()


@pytest.mark.parametrize("off", [0, 1e-7, 1e-4, 0.9], ids=str)
@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=slow)])
def test_exact_entmax_weights_near_a_beta(off, jit):
    """The bits of entmax_weights, however wrong β is."""
    rng = np.random.default_rng(25)
    z, alpha = mixed_rows(rng, 200, 500), mixed_alphas(rng, 200)
    alpha[100:] = 1 + rng.random(100) ** 3
    beta = fast_beta(z, alpha) * np.float32(1 + off * rng.normal(size=(200, 1)))
    with quiet_logging():
        got = weights_near_program(z.shape, jit)(z, (alpha - np.float32(1))[:, np.newaxis], beta)
    assert_same_bits(got, exact_entmax(z, alpha))


# --- Draws from scores: how near the fast weights are to the exact ones --------------------


def score_build(size, padded=None):
    """score_draw of (scores [rows, size], u1, u2, and α for entmax), for Program."""

    def build(mesh, scores, u1, u2, *alpha):
        b, v = dims(batch=scores.shape.as_list()[0], vocab=padded or size)
        scores = tf.pad(scores, [[0, 0], [0, v.size - size]], constant_values=-np.inf)
        alpha = [imp(mesh, a, b) for a in alpha] or [None]
        return score_draw(imp(mesh, scores, b, v), imp(mesh, u1, b), imp(mesh, u2, b), v, *alpha, size=size)

    return build


@contextlib.contextmanager
def error_bounds(value):
    """Programs that are made in here have these error bounds: at 2.0 every draw is ambiguous, at 0.0 none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SOFTMAX_ERROR_BOUND", "ENTMAX_ERROR_BOUND", "UNIFORM_ERROR_BOUND"):
            patch.setattr(categorical, name, value)
        yield


@contextlib.contextmanager
def opened_up(again, few=False, **replacements):
    """score_draw is made with parts replaced, so that it always draws again, or never does; and so
    that it always seeks entmax among a few entries (which must be enough), or never does."""

    def taken(mesh_impl, flag, if_set, if_not):
        return (if_set if {"draw_again": again, "solve_all": not few}[if_set.__name__] else if_not)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(categorical, "laid_out_cond", taken)
        patch.setattr(entmax_solver, "laid_out_cond", taken)
        for name, function in replacements.items():
            patch.setattr(categorical, name, function)
        yield


def cumulative(scores, *alpha, exactly, jit=False, few=False):
    """The cumulative sums that score_draw goes by, of all groups: [rows, groups] and [rows, groups, group].

    Without `exactly`, also the bounds on their errors: [rows] and [rows, groups].
    """
    inverse_cdf, fast_inverse_cdf, sums, bounds = categorical._inverse_cdf, categorical._fast_inverse_cdf, [], []

    def note(weights, which, u):
        sums.append(categorical._scan(categorical._exact_cdf(weights)[0], tf.maximum))
        return inverse_cdf(weights, which, u)

    def note_fast(weights, which, u, error_bound):
        fast = categorical._fast_cdf(weights)[..., : weights.shape[-1]]
        sums.append(fast)
        bounds.append(error_bound * fast[..., -1] if isinstance(error_bound, float) else error_bound)
        return fast_inverse_cdf(weights, which, u, error_bound)

    def fetch(*tensors):
        del sums[:], bounds[:]
        replaced = {"_inverse_cdf": note} if exactly else {"_fast_inverse_cdf": note_fast}
        with opened_up(again=exactly, few=few, **replaced):
            lowered(score_build(scores.shape[1]), *tensors)
        return sums + bounds

    u = np.zeros(len(scores), np.float32)
    groups, entries, *bounds = on_tensors(fetch, scores, u, u, *alpha, jit=jit)
    return groups[:, 0], entries, *([bounds[0][:, 0], bounds[1]] if bounds else [])


def largest_gap(scores, *alpha):
    """How far fast sums are from the exact ones, at the most, as a part of their error bound."""
    right = [x.astype(np.float64) for x in cumulative(scores, *alpha, exactly=True)]
    worst = 0
    for jit in (False, True):
        found = [x.astype(np.float64) for x in cumulative(scores, *alpha, exactly=False, jit=jit)]
        groups, entries, row_bound, group_bound = found
        row, group = groups[:, -1:], entries[..., -1]
        gap = np.abs(groups / row - right[0] / right[0][:, -1:]) * row
        worst = max(worst, (gap.max(1) / row_bound).max())
        # a draw that falls into a group of less mass than that is ambiguous in any case
        live = group > row_bound[:, np.newaxis]
        total = [np.where(live, g, 1)[..., np.newaxis] for g in (group, right[1][..., -1])]
        gap = (np.abs(entries / total[0] - right[1] / total[1]) * total[0]).max(-1)
        worst = max(worst, (gap[live] / group_bound[live]).max())
    return worst


def hard_rows(rng, rows, size):
    """Gaussian of any width, few values in blocks or at random, ramps, ties at entmax's threshold, a value a group."""
    x = np.zeros((rows, size))
    group = group_size(size)
    for i in range(rows):
        width, kind = 10 ** rng.uniform(-7, 1.5), i % 6
        if kind == 0:
            x[i] = width * rng.normal(size=size)
        elif kind == 1:
            x[i] = np.repeat(-width * rng.random(4), -(-size // 4))[:size]
        elif kind == 2:
            x[i] = rng.choice(-width * rng.random(rng.integers(2, 20)), size)
        elif kind == 3:
            x[i] = -width * np.arange(size) / size
        elif kind == 4:
            x[i] = -1 / rng.choice([1, 0.9, 0.5, 0.3]) + rng.integers(-20, 40, size) * 2.0**-24
            x[i, rng.integers(0, size, rng.integers(1, 20))] = 0
        else:
            x[i] = np.repeat(-width * rng.random(-(-size // group)), group)[:size]
    return from_largest(x)


@pytest.mark.parametrize("size, rows", [(37, 600), pytest.param(1000, 600, marks=slow), (GPT2_VOCAB, 24)])
def test_softmax_error_bound(size, rows):
    """Twice what is seen, on rows made to be hard."""
    rng = np.random.default_rng(20)
    spreads = [0.05, 1, 2, 3, 6] if size == GPT2_VOCAB else [0.3] * 20 + [2] * 20 + [5] * 20
    z = [hard_rows(rng, rows, size), from_largest(gaussians(rng, spreads, size)), odd_scores(rng, size)]
    gap = largest_gap(np.concatenate(z))
    print(f"{size}: {gap:.2f} of the bound")
    assert gap < 0.5


@pytest.mark.parametrize("size, rows", [(37, 600), pytest.param(GPT2_VOCAB, 6, marks=slow)])
def test_entmax_error_bound(size, rows):
    rng = np.random.default_rng(21)
    spreads = [0.02, 0.5, 2, 3] if size == GPT2_VOCAB else [0.01] * 20 + [0.3] * 20 + [2] * 20
    z = [hard_rows(rng, rows, size), from_largest(gaussians(rng, spreads, size)), odd_scores(rng, size)]
    z = np.concatenate(z)
    alpha = rng.permutation(np.resize(np.append(ALPHAS, [1.0001, 1.02, 1.1, 1.7, 1.95, 1.99]), len(z)))
    gap = largest_gap(z, np.float32(alpha))
    print(f"{size}: {gap:.2f} of the bound")
    assert gap < 0.5


def at_borders(weights, which):
    """Uniforms [rows] at the end of the `which`-th part of the sum of each row, as far as float32 has them."""
    sums = weights.astype(np.float64).cumsum(-1)
    return np.minimum(sums[np.arange(len(sums)), which] / sums[:, -1], 1 - 2.0**-24).astype(np.float32)


@pytest.mark.parametrize("size", [130, pytest.param(1000, marks=slow), pytest.param(4096, marks=slow)])
def test_fast_draws_from_weights_are_exact_or_ambiguous(size, monkeypatch):
    rng = np.random.default_rng(33)
    rows = 3000
    w = sparse_weights(rng, rows, size)
    w[::4] = w[::4].astype(np.float64) * 10 ** rng.uniform(-36, 34, (len(w[::4]), 1))
    w[::50, rng.integers(0, size)] *= -1  # invalid, unless it is −0.0
    group = group_size(size)
    grouped = np.pad(np.abs(w), [(0, 0), (0, -size % group)]).reshape(rows, -1, group)
    u1, u2 = uniforms(rng, 2, rows)
    u1[: rows // 4] = at_borders(grouped.sum(-1), rng.integers(0, grouped.shape[1], rows))[: rows // 4]
    drawn_from = (grouped.sum(-1).cumsum(-1) <= u1[:, None] * grouped.sum((1, 2))[:, None]).sum(-1)
    drawn_from = np.minimum(drawn_from, grouped.shape[1] - 1)
    with np.errstate(invalid="ignore"):
        border = at_borders(grouped[np.arange(rows), drawn_from], rng.integers(0, group, rows))
    u2[rows // 4 : rows // 2] = np.nan_to_num(border)[rows // 4 : rows // 2]

    flags, any_of = [], categorical.any_of
    monkeypatch.setattr(categorical, "any_of", lambda impl, x: flags.append(x.tensor_list[0]) or any_of(impl, x))

    def build(w, u1, u2):
        del flags[:]
        b, v, one = dims(batch=rows, vocab=size, samples=1)

        def draw(*samples):  # many draws take the exact way at once
            def build(mesh, w, *u):
                u = [imp(mesh, tf.reshape(x, [rows] + [1] * len(samples)), b, *samples) for x in u]
                return grouped_draw(imp(mesh, w, b, v), *u, v, *samples)

            return lowered(build, w, u1, u2)

        with opened_up(again=False):
            fast = draw()
        exact = draw(one)
        return fast, exact[:, 0], flags[0][:, 0]

    fast, exact, ambiguous = on_tensors(build, w, u1, u2)
    assert np.all((fast == exact) | (ambiguous == 1))
    plain = np.arange(rows) % 4 > 0
    plain[: rows // 2], plain[::50] = False, False
    assert (fast != exact).any() and ambiguous[plain].mean() < 0.02


def mixed_rows(rng, rows, size):
    odd = odd_scores(rng, size)
    hard = hard_rows(rng, rows // 3, size)
    return np.concatenate([odd, hard, from_largest(gaussians(rng, rng.uniform(0.05, 4, rows - rows // 3 - 7), size))])


def mixed_alphas(rng, rows):
    return np.float32(rng.choice(np.append(ALPHAS, [1.02, 1.1, 1.3, 1.3, 1.5, 1.7, 1.99]), rows))


def near_borders(rng, scores, *alpha, passes, away=0.0, few=False):
    """Uniforms [2, passes, rows] that decide between neighbours, at one level or the other.

    A border of the exact sums, or as far from one as a normal number times
    `away`, as the nearest float32, the one above or below it, or 2**-24 away.
    """
    groups, entries = cumulative(scores, *alpha, exactly=True, few=few)
    groups, entries = groups.astype(np.float64), entries.astype(np.float64)

    def border(sums, u):
        """Either end of what u draws, as a part of all."""
        sums = np.pad(sums, [(0, 0), (1, 0)])
        drawn = (sums[:, 1:] <= (u * sums[:, -1])[:, np.newaxis]).sum(1)
        ends = drawn + rng.integers(0, 2, len(u))
        u = sums[np.arange(len(u)), ends] / sums[:, -1] + away * rng.normal(size=len(u))
        u = np.float32(np.clip(u, 0, 1))
        grid = np.float32(2**-24)
        beside = [u, np.nextafter(u, np.float32(2)), np.nextafter(u, np.float32(-1)), u + grid, u - grid]
        return np.choose(rng.integers(0, 5, len(u)), beside)

    out = []
    for u1, u2 in rng.random((passes, 2, len(scores))):
        group = (groups <= (u1 * groups[:, -1])[:, np.newaxis]).sum(1)
        ends = np.take_along_axis(np.pad(groups, [(0, 0), (1, 0)]), group[:, np.newaxis] + [0, 1], 1)
        middle = ends.mean(1) / groups[:, -1]
        entry_border = border(entries[np.arange(len(group)), group], u2)
        at_groups = rng.random(len(group)) < 0.3
        out.append(np.where(at_groups, [border(groups, u1), u2], [middle, entry_border]))
    return np.clip(np.stack(out, 1), 0, 1 - 2.0**-24).astype(np.float32)


@pytest.mark.parametrize(
    "size, distinct, copies, passes, entmax",
    [
        (37, 512, 16, 24, False),
        pytest.param(37, 512, 4, 16, True, marks=slow),
        pytest.param(1000, 128, 16, 16, False, marks=slow),
        pytest.param(3001, 24, 4, 10, True, marks=slow),
        pytest.param(GPT2_VOCAB, 16, 2, 10, False, marks=slow),
    ],
)
def test_fast_draws_are_exact_or_ambiguous(size, distinct, copies, passes, entmax):
    """260,000 draws with each backend, all within a few error bounds of a border."""
    rng = np.random.default_rng(22)
    z = mixed_rows(rng, distinct, size)
    alpha = [mixed_alphas(rng, distinct)] if entmax else []
    check_fast_draws(rng, z, alpha, copies, passes)


@slow
def test_fast_draws_among_few_entries_are_exact_or_ambiguous():
    """Rows of which less than 64 entries are in entmax's support."""
    rng = np.random.default_rng(31)
    z = from_largest(gaussians(rng, rng.uniform(2, 4, 16), GPT2_VOCAB))
    check_fast_draws(rng, z, [np.float32(rng.choice([1.5, 1.7, 2], 16))], 8, 10, few=True)


def check_fast_draws(rng, z, alpha, copies, passes, few=False):
    """Near borders between entries: a fast draw that is not ambiguous is right; some are ambiguous."""
    entmax, (distinct, size) = bool(alpha), z.shape
    away = (categorical.ENTMAX_ERROR_BOUND if entmax else categorical.SOFTMAX_ERROR_BOUND) / 2
    u = near_borders(rng, z, *alpha, passes=passes * copies, away=away, few=few)

    def from_weights(mesh, w, u1, u2):
        b, v, s = dims(batch=distinct, vocab=size, samples=passes * copies)
        return grouped_draw(imp(mesh, w, b, v), imp(mesh, u1, b, s), imp(mesh, u2, b, s), v, s)

    weights = exact_entmax(z, *alpha) if entmax else on_tensors(fixed_point.softmax_weights, z)
    want = MeshRunner()(from_weights, weights, *u.transpose(0, 2, 1)).T.reshape(passes, copies * distinct)
    u = u.reshape(2, passes, copies * distinct)
    z, alpha = np.tile(z, (copies, 1)), [np.tile(a, copies) for a in alpha]
    draw, seen = categorical._fast_draw, []

    def note(*args, **kwargs):
        seen.append(draw(*args, **kwargs))
        return seen[-1]

    def tokens_and_flags(*tensors):
        seen.clear()
        token = lowered(score_build(size), *tensors)
        return token, seen[0][1].tensor_list[0][:, 0]

    fast_is_other = 0  # under one of them, at least
    for jit in (False, True):
        share = 0
        with opened_up(again=False, few=few, _fast_draw=note), quiet_logging():
            function = compiled(tokens_and_flags, jit)
            for u1, u2, right in zip(*u, want):
                token, ambiguous = (t.numpy() for t in function(*map(tf.constant, (z, u1, u2, *alpha))))
                np.testing.assert_array_equal(token[ambiguous == 0], right[ambiguous == 0])
                share += (ambiguous > 0).mean() / passes
                fast_is_other += (token != right).mean() / passes
        print(f"{size}, {'XLA' if jit else 'plain'}: {share:.2f} ambiguous, {fast_is_other:.3f} would be wrong")
        assert 0.2 < share < 0.99
    assert fast_is_other > 0


# --- Draws from scores: the same everywhere -----------------------------------------------


@pytest.mark.parametrize(
    "size, rows, at_borders, anywhere, entmax, layouts",
    [
        (37, 1024, 8, 4, False, ["x:2"]),  # padded
        pytest.param(1000, 256, 8, 4, False, ["x:2,y:2"], marks=slow),  # which cuts through groups of 16
        pytest.param(GPT2_VOCAB, 16, 10, 5, False, ["x:4"], marks=slow),  # padded
        pytest.param(3001, 16, 4, 2, True, ["x:2"], marks=slow),  # one device, but no shard, has candidates
    ],
)
def test_score_draw_is_the_same_everywhere(size, rows, at_borders, anywhere, entmax, layouts):
    """The same scores, the same token, at 15,000 draws; most as near to a border as float32 goes.

    On one device, under XLA, on layouts, and in integers always.
    """
    rng = np.random.default_rng(23)
    z = mixed_rows(rng, rows, size)
    alpha = [mixed_alphas(rng, rows)] if entmax else []
    u = near_borders(rng, z, *alpha, passes=at_borders)
    u = np.concatenate([u, uniforms(rng, 2, anywhere, rows)], 1)

    inputs = [(tf.float32, (rows, size))] + [(tf.float32, (rows,))] * (2 + len(alpha))
    programs = {"one device": Program(score_build(size), inputs), "XLA": XlaProgram(score_build(size), inputs)}
    with error_bounds(2.0):
        programs["integers"] = Program(score_build(size), inputs)
    for mesh_shape in layouts:
        runner = MeshRunner(mesh_shape, "batch:x,vocab:y" if "y" in mesh_shape else "vocab:x")
        padded = None if size == 1000 else padded_size(size, runner.impl.shape[-1].size)
        programs[mesh_shape] = Program(score_build(size, padded), inputs, runner=runner)
    tokens = {what: np.array([program(z, u1, u2, *alpha) for u1, u2 in zip(*u)]) for what, program in programs.items()}
    want = tokens["one device"]
    assert want.min() >= 0 and len(np.unique(want)) > min(size, 100) // 2
    for what, got in tokens.items():
        np.testing.assert_array_equal(got, want, err_msg=what)


@slow
def test_without_the_protection_backends_differ():
    """The draws above at error bounds of 0: some of those at borders are other ones under XLA, and on layouts."""
    rng = np.random.default_rng(24)
    z = mixed_rows(rng, 64, 3000)
    u = near_borders(rng, z, passes=10)
    inputs = [(tf.float32, z.shape)] + [(tf.float32, (64,))] * 2
    with error_bounds(0.0):
        plain, xla = Program(score_build(3000), inputs), XlaProgram(score_build(3000), inputs)
    right = Program(score_build(3000), inputs)
    tokens = [np.array([program(z, u1, u2) for u1, u2 in zip(*u)]) for program in (plain, xla, right)]
    differ = [(a != b).mean() for a, b in itertools.combinations(tokens, 2)]
    print("plain and XLA, plain and exact, XLA and exact:", *(f"{d:.3f}" for d in differ))
    assert min(differ) > 0.02


# --- Draws from scores: what they are -----------------------------------------------------


def pooled(counts, probabilities, least=30):
    """Both by cells that expect at least so many draws; those of probability 0 must have none."""
    assert not counts[probabilities == 0].any()
    order = np.argsort(-probabilities, kind="stable")
    expected = counts.sum() * probabilities[order]
    cell = np.floor(np.cumsum(expected) / least).astype(int)
    cell = np.unique(np.minimum(cell, cell.max() - 1), return_inverse=True)[1]  # the last may be short
    return np.bincount(cell, counts[order]), np.bincount(cell, probabilities[order])


@pytest.mark.parametrize(
    "size, copies, passes, spreads, alphas",
    [
        (37, 4096, 10, [0.3, 1, 2], None),
        pytest.param(37, 512, 10, [2, 1, 0.3], [1.0, 1.3, 2.0], marks=slow),
        (GPT2_VOCAB, 32, 100, [2], None),
        (GPT2_VOCAB, 16, 100, [2], [1.3]),
    ],
)
def test_score_draw_follows_the_distribution(size, copies, passes, spreads, alphas):
    """8 p values, of 1,600 to 41,000 draws each."""
    rng = np.random.default_rng(25)
    z = from_largest(gaussians(rng, spreads, size))
    probabilities = [reference.entmax(x, a) for x, a in zip(z.astype(np.float64), alphas or [1] * len(z))]
    arrays = [np.repeat(x, copies, 0) for x in (z, *([np.float32(alphas)] if alphas else []))]
    rows = len(arrays[0])
    inputs = [(tf.float32, (rows, size))] + [(tf.float32, (rows,))] * (3 if alphas else 2)
    program = Program(score_build(size), inputs)
    tokens = [program(arrays[0], u1, u2, *arrays[1:]) for u1, u2 in zip(*uniforms(rng, 2, passes, rows))]
    tokens = np.reshape(tokens, (passes, len(z), copies))
    p_values = [
        chi_square_p(*pooled(np.bincount(tokens[:, i].ravel(), minlength=size), p)) for i, p in enumerate(probabilities)
    ]
    print("p", *(f"{p:.3f}" for p in p_values))
    assert np.all(np.array(p_values) > FALSE_ALARM)


def test_entries_of_no_probability_are_not_drawn():
    """−inf, masked, far below, and outside entmax's support, at both ends of the uniforms' range."""
    rng = np.random.default_rng(26)
    z = gaussians(rng, [2] * 96, 130)
    z[::3, :7], z[::3, -7:] = -np.inf, LOWEST
    z[1::3, rng.permutation(130)[:100]] = -200
    z[2::3, rng.permutation(130)[:128]] = LOWEST
    z = from_largest(z)
    ends = np.array([0, 1 - 2.0**-24], np.float32)
    u = np.concatenate([np.repeat([*itertools.product(ends, ends)], 96, 0).reshape(4, 96, 2).transpose(2, 0, 1),
                        uniforms(rng, 2, 40, 96)], 1)  # fmt: skip
    alpha = np.float32(rng.choice([1.3, 1.5, 2], 96))
    threshold = np.array([reference.entmax(np.maximum(x, -1e9), float(a)) for x, a in zip(np.float64(z), alpha)])
    inputs = [(tf.float32, z.shape)] + [(tf.float32, (96,))] * 3
    programs = {"softmax": Program(score_build(130), inputs[:3]), "entmax": Program(score_build(130), inputs)}
    for u1, u2 in zip(*u):
        token = programs["softmax"](z, u1, u2)
        assert token.min() >= 0 and np.take_along_axis(z, token[:, np.newaxis], 1).min() > -88
        token = programs["entmax"](z, u1, u2, alpha)
        assert token.min() >= 0 and np.take_along_axis(threshold, token[:, np.newaxis], 1).min() > 0


INVALID_SCORES = {1: (0, np.nan), 3: (129, np.nan), 4: (77, np.inf), 8: (slice(None), -np.inf)}
INVALID_ALPHAS = {2: 1 - 2.0**-24, 5: 2 + 2.0**-22, 7: np.nan, 9: -np.inf}


@pytest.mark.parametrize("exactly", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("entmax", [False, True])
def test_invalid_rows_of_scores(entmax, exactly):
    """−1, and only for them, by the exact draw (`exactly`) and the fast one; the others draw as without them."""
    rng = np.random.default_rng(27)
    good = from_largest(gaussians(rng, [2] * 12, 130))
    bad, alphas = good.copy(), np.full((2, 12), 1.3, np.float32)
    for row, (column, value) in INVALID_SCORES.items():
        bad[row, column] = value
    alphas[1, [*INVALID_ALPHAS]] = [*INVALID_ALPHAS.values()]
    u1, u2 = uniforms(rng, 2, 12)
    inputs = [(tf.float32, (12, 130))] + [(tf.float32, (12,))] * (3 if entmax else 2)
    one = Program(score_build(130), inputs)
    want = one(good, u1, u2, *alphas[: int(entmax)])
    assert want.min() >= 0
    want[[*INVALID_SCORES, *(INVALID_ALPHAS if entmax else [])]] = -1
    if exactly:
        with error_bounds(2.0):
            programs = [Program(score_build(130), inputs, runner=HALVES), XlaProgram(score_build(130), inputs)]
    else:  # shards cut groups of 130, those of what it is padded to not
        split = [Program(score_build(130, padded), inputs, runner=HALVES) for padded in (130, padded_size(130, 2))]
        programs = [one, *split]
    for program in programs:
        np.testing.assert_array_equal(program(bad, u1, u2, *alphas[1 : 1 + int(entmax)]), want)


@pytest.mark.parametrize("entmax", [False, pytest.param(True, marks=slow)])
def test_draws_from_candidates_are_those_from_the_masked_row(entmax):
    """The k likeliest by themselves, in any order, and all with the rest masked: the same tokens. At borders the
    former are the same under XLA and in integers."""
    rng = np.random.default_rng(32)
    size, rows, k = 1024, 32, 40
    z = from_largest(gaussians(rng, [0.3, 2] * (rows // 2), size))
    z[::3] = np.round(z[::3])  # ties
    order = np.argsort(-z.astype(np.float64), axis=1, kind="stable")[:, :k].astype(np.int32)
    order = rng.permuted(order, axis=1)
    values = np.take_along_axis(z, order, 1)
    masked = np.full_like(z, LOWEST)
    np.put_along_axis(masked, order, values, 1)
    b, v, c = dims(batch=rows, vocab=size, top_k=k)
    alphas = [np.full(rows, 1.3, np.float32)] if entmax else []

    def few(mesh, values, ids, u1, u2, *alpha):
        alpha = imp(mesh, alpha[0], b) if entmax else None
        return score_draw(imp(mesh, values, b, c), imp(mesh, u1, b), imp(mesh, u2, b), c, alpha, size,
                          ids=imp(mesh, ids, b, c))  # fmt: skip

    per_row = [(tf.float32, (rows,))] * (2 + len(alphas))
    inputs = [(tf.float32, (rows, k)), (tf.int32, (rows, k)), *per_row]
    from_few = Program(few, inputs)
    from_masked = Program(score_build(size), [(tf.float32, (rows, size)), *per_row])
    for u1, u2 in zip(*uniforms(rng, 2, 8, rows)):
        np.testing.assert_array_equal(from_few(values, order, u1, u2, *alphas), from_masked(masked, u1, u2, *alphas))
    others = [XlaProgram(few, inputs)]
    with error_bounds(2.0):
        others.append(Program(few, inputs))
    for u1, u2 in zip(*near_borders(rng, masked, *alphas, passes=6)):
        want = from_few(values, order, u1, u2, *alphas)
        for program in others:
            np.testing.assert_array_equal(program(values, order, u1, u2, *alphas), want)


def test_a_dim_and_rows_split_alike():
    """No processor has all that a draw needs: an error that says so, and which dims."""
    b, v, s = dims(batch=8, vocab=64, samples=8)

    def weights(mesh):
        u = mtf.zeros(mesh, [b, s])
        return grouped_draw(mtf.ones(mesh, [b, v]), u, u, v, s)

    def scores(mesh):
        u = mtf.zeros(mesh, [b])
        return score_draw(mtf.zeros(mesh, [b, v]), u, u, v)

    with pytest.raises(ValueError, match="splits both vocab and samples along mesh axis x"):
        MeshRunner("x:2", "vocab:x,samples:x")(weights)
    with pytest.raises(ValueError, match="batch|vocab"):
        MeshRunner("x:2", "vocab:x,batch:x")(scores)


def test_score_draw_takes_float32_alone():
    b, v = dims(batch=8, vocab=64)

    def build(mesh):
        u = mtf.zeros(mesh, [b])
        return score_draw(mtf.zeros(mesh, [b, v], tf.bfloat16), u, u, v)

    with pytest.raises(ValueError, match="scores of dtype bfloat16; float32 is needed"):
        MeshRunner()(build)

"""gpt_neo_sampling.mesh.ops, on one device and on split meshes, against NumPy.

Building a graph costs more than running it, so a test puts its cases into one.
"""

import numpy as np
import pytest
import reference
from programs import MeshRunner, dims

from gpt_neo_sampling._compat import mtf, tensorflow, tf
from gpt_neo_sampling.mesh.ops import (
    computed_once,
    cwise_broadcast,
    force_allreduce,
    import_rows,
    row_index,
    scatter_add,
    scatter_max,
    take,
    write_at,
)
from gpt_neo_sampling.sampling.random import counter_bits, import_seed, threefry_2x32
from gpt_neo_sampling.sampling.top_k import largest, top_k

B, T, E, V = dims(batch=4, time=2, embd=6, vocab=16)
FULL = MeshRunner("x:2,y:2,z:2", "batch:x,vocab:y,embd:z")
LAYOUTS = (
    MeshRunner(),
    MeshRunner("x:4", "vocab:x"),
    FULL,
    MeshRunner("x:2,y:2,z:2", "time:x,vocab:y,embd:z"),
    MeshRunner("x:2,y:2", "batch:x,time:y"),
)


def imp(mesh, value, *shape):
    return mtf.import_tf_tensor(mesh, value, mtf.Shape(shape))


@pytest.fixture(params=LAYOUTS, ids=str)
def runner(request):
    return request.param


# --- Look-ups -----------------------------------------------------------------


def np_take(x, indices):
    """x [V, …] at indices: zeros for an index outside it."""
    inside = (indices >= 0) & (indices < len(x))
    found = x[np.where(inside, indices, 0)]
    found[~inside] = 0
    return found


def np_scatter(dy, indices, size):
    """The gradient of np_take: rows of dy added where they were looked up."""
    dx = np.zeros((size, *dy.shape[indices.ndim :]))
    for at in np.ndindex(indices.shape):
        if 0 <= indices[at] < size:
            dx[indices[at]] += dy[at]
    return dx


# Inside, repeated, at both ends, and outside on both sides.
INDICES = np.array([[0, 3], [15, 3], [-1, 7], [16, 2**30]], np.int32)


def test_take(runner):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(16, 6)).astype(np.float32)
    stacked = rng.normal(size=(4, 16, 6)).astype(np.float32)
    big = rng.integers(2**24, 2**31, size=(4, 16)).astype(np.int32)
    half = table.astype(np.float16)

    def build(mesh, table, stacked, big, half, indices):
        i = imp(mesh, indices, B, T)
        first = imp(mesh, indices[:, 0], B)
        return [
            take(imp(mesh, table, V, E), i, V),
            take(imp(mesh, tf.transpose(table), E, V), imp(mesh, tf.cast(tf.transpose(indices), tf.int64), T, B), V),
            take(imp(mesh, table, V, E), mtf.constant(mesh, 3, mtf.Shape([]), tf.int32), V),
            # Dims that both have are matched, wherever they stand.
            take(imp(mesh, stacked, B, V, E), i, V),
            take(imp(mesh, tf.transpose(stacked, [2, 1, 0]), E, V, B), i, V),
            take(imp(mesh, stacked, B, V, E), first, V),
            take(imp(mesh, big, B, V), i, V),
            take(imp(mesh, big, B, V), first, V),
            take(imp(mesh, half, V, E), i, V),
        ]

    got = runner(build, table, stacked, big, half, INDICES)
    matched = np.stack([np_take(x, i) for x, i in zip(stacked, INDICES, strict=True)])
    integers = np.stack([np_take(x, i) for x, i in zip(big, INDICES, strict=True)])
    want = [
        np_take(table, INDICES),
        np_take(table, INDICES.T),
        table[3],
        matched,
        matched,
        matched[:, 0],
        integers,
        integers[:, 0],
        np_take(half, INDICES),
    ]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g, w)
    inside = np.clip(INDICES, 0, 15)
    np.testing.assert_array_equal(got[0][:2], np.take(table, inside, axis=0)[:2])


def test_take_reads_only_what_it_looks_up(runner):
    table = np.arange(96, dtype=np.float32).reshape(16, 6)
    table[5], table[6] = np.nan, np.inf
    indices = np.array([[4, 7], [5, 0], [-1, 16], [15, 15]], np.int32)
    got = runner(lambda m, x, i: take(imp(m, x, V, E), imp(m, i, B, T), V), table, indices)
    np.testing.assert_array_equal(got, np_take(table, indices))
    assert np.isnan(got).sum() == E.size


def test_take_gradient(runner):
    rng = np.random.default_rng(1)
    table = rng.normal(size=(16, 6)).astype(np.float32)
    stacked = rng.normal(size=(4, 16, 6)).astype(np.float32)
    dy = rng.normal(size=(4, 2, 6)).astype(np.float32)
    indices = np.array([[0, 3], [15, 15], [-1, 3], [16, 3]], np.int32)

    def build(mesh, table, stacked, dy, indices):
        i, dy = imp(mesh, indices, B, T), imp(mesh, dy, B, T, E)
        outs = []
        for x, v in (
            (imp(mesh, table, V, E), imp(mesh, table, V, E)),
            (imp(mesh, stacked, B, V, E), imp(mesh, stacked, B, V, E)),
            (imp(mesh, tf.transpose(stacked, [2, 1, 0]), E, V, B), imp(mesh, stacked, B, V, E)),
        ):
            dx = mtf.gradients([mtf.reduce_sum(take(x, i, V) * dy)], [x])[0]
            outs += [dx, mtf.gradients([mtf.reduce_sum(dx * v)], [dy])[0]]
        return outs

    got = runner(build, table, stacked, dy, indices)
    shared = np.stack([np_scatter(d, i, 16) for d, i in zip(dy, indices, strict=True)])
    looked_up = np.stack([np_take(x, i) for x, i in zip(stacked, indices, strict=True)])
    want = [
        np_scatter(dy, indices, 16),
        np_take(table, indices),
        shared,
        looked_up,
        shared.transpose(2, 1, 0),
        looked_up,
    ]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-6)


def test_scatter_add(runner):
    """Matched over the dims that the shape has, summed over the others; an index outside adds nothing."""
    values = np.random.default_rng(4).normal(size=(4, 2)).astype(np.float32)

    def build(mesh, values, indices):
        x, turned, i = imp(mesh, values, B, T), imp(mesh, tf.transpose(values), T, B), imp(mesh, indices, B, T)
        return [scatter_add(x, i, [B, V], V), scatter_add(turned, i, [V, B], V), scatter_add(x, i, [V], V)]

    by_row, turned, summed = runner(build, values, INDICES)
    want = np.stack([np_scatter(v, i, 16) for v, i in zip(values, INDICES, strict=True)])
    for got, w in zip((by_row, turned, summed), (want, want.T, want.sum(0)), strict=True):
        np.testing.assert_allclose(got, w, rtol=0, atol=1e-6)


def test_scatter_max(runner):
    """The largest of an entry's values, 0 where all are below; an index outside counts for nothing."""
    rng = np.random.default_rng(5)
    values, indices = rng.normal(size=(4, 2)).astype(np.float32), INDICES.copy()
    indices[1] = indices[1, 0]

    def build(mesh, values, indices):
        x, turned, i = imp(mesh, values, B, T), imp(mesh, tf.transpose(values), T, B), imp(mesh, indices, B, T)
        return [scatter_max(x, i, [B, V], V), scatter_max(turned, i, [V, B], V), scatter_max(x, i, [V], V)]

    by_row, turned, over_all = runner(build, values, indices)
    want = np.zeros((4, 16), np.float32)
    for (row, column), index in np.ndenumerate(indices):
        if 0 <= index < 16:
            want[row, index] = max(want[row, index], values[row, column])
    for got, w in zip((by_row, turned, over_all), (want, want.T, want.max(0)), strict=True):
        np.testing.assert_array_equal(got, w)


def test_scatter_add_errors():
    def build(mesh, values, *shape):
        return scatter_add(mtf.zeros(mesh, values), mtf.zeros(mesh, [B, T], tf.int32), list(shape), V)

    with pytest.raises(ValueError, match="values of shape .*; they need the dims"):
        MeshRunner()(lambda mesh: build(mesh, [B], B, V))
    with pytest.raises(ValueError, match="dim .*vocab.* must be in the shape"):
        MeshRunner()(lambda mesh: build(mesh, [B, T], B, E))
    with pytest.raises(ValueError, match="scatter_max: values of shape"):
        MeshRunner()(lambda mesh: scatter_max(mtf.zeros(mesh, [B]), mtf.zeros(mesh, [B, T], tf.int32), [B, V], V))


def test_take_has_no_gradient_for_integers():
    def build(mesh):
        x = mtf.range(mesh, V, tf.int32)
        y = mtf.cast(take(x, mtf.zeros(mesh, [B], tf.int32), V), tf.float32)
        assert mtf.gradients([mtf.reduce_sum(y)], [x]) == [None]
        return y

    np.testing.assert_array_equal(MeshRunner()(build), np.zeros(4))


def test_take_errors():
    def build(mesh, dim, *shape):
        return take(mtf.zeros(mesh, [V, E]), mtf.zeros(mesh, list(shape), tf.int32), dim)

    with pytest.raises(ValueError, match="batch.*not among.*vocab"):
        MeshRunner()(lambda m: build(m, B, T))
    with pytest.raises(ValueError, match="indices cannot have it"):
        MeshRunner()(lambda m: build(m, V, T, V))
    with pytest.raises(ValueError, match="splits both vocab and time along mesh axis x"):
        MeshRunner("x:2", "vocab:x,time:x")(lambda m: build(m, V, B, T))


def test_write_at(runner):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 16, 6)).astype(np.float32)
    x[0, 3] = np.nan  # is written over; a NaN elsewhere stays where it is
    x[1, 0, 0] = np.nan
    value = rng.normal(size=(4, 6)).astype(np.float32)
    position = np.array([3, 15, -1, 16], np.int32)

    def build(mesh, x, value, position):
        x, p = imp(mesh, x, B, V, E), imp(mesh, position, B)
        return [
            write_at(x, imp(mesh, value, B, E), p, V),
            write_at(x, imp(mesh, value[:, 0], B), mtf.constant(mesh, 2, mtf.Shape([]), tf.int32), V),
            write_at(mtf.cast(x, tf.bfloat16), mtf.constant(mesh, 7, mtf.Shape([]), tf.bfloat16), p, V),
            write_at(mtf.zeros(mesh, [V, B], tf.int32), p + 2**30, p, V),
        ]

    got = runner(build, x, value, position)
    want = [x.copy(), x.copy(), x.astype(got[2].dtype), np.zeros((16, 4), np.int32)]
    want[1][:, 2] = value[:, :1]
    for row, at in ((0, 3), (1, 15)):
        want[0][row, at] = value[row]
        want[2][row, at] = 7
        want[3][at, row] = at + 2**30
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g.astype(np.float64), w.astype(np.float64))


@pytest.mark.parametrize("reduced", [force_allreduce, computed_once])
@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:2,y:2", "batch:x,vocab:y")], ids=str)
def test_force_allreduce_in_a_loop(runner, reduced):
    """A sum that mtf has deferred, carried into, through and out of a loop."""
    x = np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32)

    def build(mesh, x):
        x = imp(mesh, x, B, V)
        total = reduced(mtf.reduce_sum(x, reduced_dim=V))

        def body(i, y):
            return i + 1, force_allreduce(mtf.einsum([x, x, y], output_shape=[B]) * 0.1 + total)

        start = [mtf.zeros(mesh, [], tf.int32), force_allreduce(mtf.reduce_sum(x * x, reduced_dim=V))]
        return mtf.while_loop(lambda i, y: mtf.less(i, 3), body, start)[1]

    want, total = (x.astype(float) ** 2).sum(1), x.astype(float).sum(1)
    for _ in range(3):
        want = (x.astype(float) ** 2).sum(1) * want * 0.1 + total
    np.testing.assert_allclose(runner(build, x), want, rtol=1e-5)


# --- Rows and options ---------------------------------------------------------


@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:2,y:2", "a:x,c:y")], ids=str)
def test_row_index(runner):
    a, b, c = dims(a=2, b=3, c=4)
    got = runner(lambda m: [row_index(m, [a, b, c]), row_index(m, [c]), row_index(m, [])])
    assert all(g.dtype == np.int32 for g in got)
    np.testing.assert_array_equal(got[0], np.arange(24).reshape(2, 3, 4))
    np.testing.assert_array_equal(got[1], np.arange(4))
    np.testing.assert_array_equal(got[2], 0)


def test_import_rows():
    a, b = dims(a=2, b=3)
    rows = [a, b]
    values = np.arange(6.0).reshape(2, 3)

    def build(mesh, held):
        def one(value, dtype=tf.float32):
            return import_rows(mesh, value, dtype, rows, "knob")

        column = mtf.range(mesh, b, tf.int32)
        assert one(column, tf.int32) is column
        return [
            one(0.5),
            one(np.float64(0.5)),
            one(values),
            one(values.tolist()),
            one(held),
            one(column),
            one(mtf.constant(mesh, 2, mtf.Shape([]), tf.int32)),
            one(values, tf.int32),
        ]

    got = MeshRunner("x:2", "a:x")(build, values.astype(np.float32))
    want = [0.5, 0.5, values, values, values, np.arange(3), 2, values]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    assert [g.dtype for g in got] == [np.float32] * 7 + [np.int32]


def test_import_rows_errors():
    a, b, c = dims(a=2, b=3, c=2)
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    with tf.Graph().as_default():
        # One a row means the shape of the rows: nothing is broadcast or transposed.
        for value in (np.zeros(2), np.zeros(3), np.zeros((3, 2)), np.zeros((1, 3)), [[1, 2]], tf.zeros([2, 3, 1])):
            with pytest.raises(ValueError, match=r"knob has shape \[.*one value, or one a row"):
                import_rows(mesh, value, tf.float32, [a, b], "knob")
        for shape in ([c], [a, c], [mtf.Dimension("a", 3)]):
            with pytest.raises(ValueError, match="knob has shape .* among those of the rows"):
                import_rows(mesh, mtf.zeros(mesh, shape), tf.float32, [a, b], "knob")


# --- Random numbers -----------------------------------------------------------


def words(rng, n):
    """n random 32-bit words as int32, including the extremes."""
    out = rng.integers(-(2**31), 2**31, n)
    out[:4] = 0, -1, 2**31 - 1, -(2**31)
    return out.astype(np.int32)


@pytest.mark.parametrize("jit", [False, True])
def test_threefry(jit):
    rng = np.random.default_rng(4)
    vectors = np.array([[*key, *counter] for key, counter, _ in reference.THREEFRY2X32_VECTORS], np.uint32)
    published = np.array([out for *_, out in reference.THREEFRY2X32_VECTORS], np.uint32)
    inputs = np.concatenate([vectors, rng.integers(0, 2**32, (1000, 4), dtype=np.uint32)])

    @tensorflow.function(jit_compile=jit)
    def run(k0, k1, c0, c1):
        return threefry_2x32((k0, k1), (c0, c1))

    got = np.stack([out.numpy() for out in run(*[tensorflow.constant(column) for column in inputs.T])], -1)
    np.testing.assert_array_equal(got[: len(published)], published)
    np.testing.assert_array_equal(got, np.stack(reference.threefry2x32(*inputs.T), -1))


@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:2,y:2", "batch:x,samples:y")], ids=str)
def test_counter_bits(runner):
    b, s = dims(batch=64, samples=6)
    rng = np.random.default_rng(5)
    seed, stream, step, sample = words(rng, 64), words(rng, 64), words(rng, 64), words(rng, 6)

    def build(mesh, seed, stream, step, sample):
        per_row = [imp(mesh, x, b) for x in (seed, stream, step)]
        scalar = [imp(mesh, x[7]) for x in (seed, stream, step)]
        return [
            *counter_bits(*per_row, imp(mesh, sample, s)),
            *counter_bits(*per_row),
            *counter_bits(scalar[0], per_row[1], scalar[2], imp(mesh, sample, s)),
            *counter_bits(*scalar),
        ]

    got = runner(build, seed, stream, step, sample)
    seed, stream, step, sample = (x.view(np.uint32) for x in (seed, stream, step, sample))
    column = (slice(None), None)
    bits = [
        *reference.threefry2x32(seed[column], stream[column], step[column], sample),
        *reference.threefry2x32(seed, stream, step, 0),
        *reference.threefry2x32(seed[7], stream[column], step[7], sample),
        *reference.threefry2x32(seed[7], stream[7], step[7], 0),
    ]
    for g, w in zip(got, bits, strict=True):
        assert g.dtype == np.int32
        np.testing.assert_array_equal(g.view(np.uint32), w)


def test_import_seed_values():
    a = dims(a=2)

    def build(mesh):
        seeds = [0, -1, 2**32 - 1, 2**31, -(2**31), [3, -4]]
        return [import_seed(mesh, s, a) for s in seeds]

    got = MeshRunner()(build)
    assert all(g.dtype == np.int32 for g in got)
    assert [g.tolist() for g in got] == [0, -1, -1, -(2**31), -(2**31), [3, -4]]


def test_import_seed_from_numpy_integers():
    def build(mesh):
        seeds = [np.int64(7), np.int64(2**32 - 1), np.int32(-3), np.uint32(2**32 - 2), np.uint64(5), np.int8(1)]
        return [import_seed(mesh, s) for s in seeds]

    assert [g.tolist() for g in MeshRunner()(build)] == [7, -1, -3, -2, 5, 1]


@pytest.mark.parametrize("seed", [2**32, -(2**31) - 1, 10**30])
def test_import_seed_out_of_range(seed):
    with tf.Graph().as_default(), pytest.raises(ValueError, match=rf"seed={seed} is out of range"):
        import_seed(mtf.Mesh(mtf.Graph(), "mesh"), seed)


def test_import_seed_of_wrong_shape():
    with tf.Graph().as_default(), pytest.raises(ValueError, match="seed has shape"):
        import_seed(mtf.Mesh(mtf.Graph(), "mesh"), [1, 2, 3], dims(a=2))


@pytest.mark.parametrize(
    "runner", [MeshRunner(), MeshRunner("x:4", "shard:x"), MeshRunner("x:2,y:2", "shard:x")], ids=str
)
def test_fresh_seed(runner):
    """None: another seed at each run and each time round a loop, on every processor the same.

    A false alarm, two of the 18 seeds being equal, has probability 153 / 2**32 = 4e-8.
    """
    shard, steps = dims(shard=4, steps=4)

    def build(mesh):
        def body(i, seen):
            fresh = force_allreduce(mtf.broadcast(import_seed(mesh, None), [shard]))
            return i + 1, write_at(seen, fresh, i, steps)

        start = [mtf.zeros(mesh, [], tf.int32), mtf.zeros(mesh, [shard, steps], tf.int32)]
        looped = mtf.while_loop(lambda i, _: mtf.less(i, steps.size), body, start)[1]
        return [mtf.broadcast(import_seed(mesh, None), [shard]) for _ in range(2)] + [looped]

    seen = []
    for first, second, looped in runner(build, times=3):
        by_shard = np.concatenate([first[:, None], second[:, None], looped], 1)
        np.testing.assert_array_equal(by_shard, by_shard[:1].repeat(4, 0))
        seen += by_shard[0].tolist()
    assert len(set(seen)) == len(seen) == 18
    # All 32 bits are in use: some high ones set, and some clear.
    assert np.any(np.abs(np.array(seen, np.int64)) >= 2**28) and len({s & 0xFF for s in seen}) > 6


# --- Largest entries ----------------------------------------------------------


@pytest.mark.parametrize(
    "runner", [MeshRunner(), MeshRunner("x:4", "vocab:x"), MeshRunner("x:2,y:2", "batch:x,vocab:y")], ids=str
)
def test_top_k(runner):
    """Sorted, ties by lower index, on rows of distinct, equal and masked values."""
    rng = np.random.default_rng(6)
    low = np.finfo(np.float32).min
    x = np.stack(
        [
            rng.permutation(16),
            rng.integers(0, 3, 16),
            np.zeros(16),
            np.where(np.arange(16) == 9, 1.0, low),
            np.where(np.arange(16) % 5 == 2, rng.normal(size=16), low),
            np.full(16, low),
            np.where(np.arange(16) == 3, 0.0, -1e10),
            np.where(np.arange(16) % 3 == 0, -np.inf, 1e30),
        ]
    ).astype(np.float32)
    b = mtf.Dimension("batch", len(x))
    sizes = (1, 2, 3, 4, 5, 8, 16)

    def build(mesh, x):
        outs = []
        for k in sizes:
            k_dim = mtf.Dimension("top_k", k)
            outs += top_k(imp(mesh, x, b, V), V, k_dim)
            outs += top_k(imp(mesh, tf.transpose(x), V, b), V, k_dim)
        return outs

    got = runner(build, x)
    order = np.argsort(-x.astype(np.float64), axis=1, kind="stable").astype(np.int32)
    for n, k in enumerate(sizes):
        for values, indices in (got[4 * n : 4 * n + 2], got[4 * n + 2 : 4 * n + 4]):
            np.testing.assert_array_equal(indices, order[:, :k])
            np.testing.assert_array_equal(values, np.take_along_axis(x, order[:, :k], 1))


@pytest.mark.parametrize("size", [2048, 1009, 50257], ids=["whole chunks", "a short one", "GPT-2's"])
def test_largest_at_the_borders_of_chunks(size):
    """Entry by entry against NumPy: many ties, in and across chunks, 0.0 and −0.0, −inf; with and without XLA."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(9, size)).astype(np.float32)
    x[1] = rng.integers(-3, 4, size)
    x[2] = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    x[3] = np.arange(size) // 40 % 2
    x[4] = -np.inf
    x[4, rng.permutation(size)[:30]] = 1
    x[5] = -(np.arange(size) // 7)
    x[6] = np.arange(size)
    x[7], x[8] = np.finfo(np.float32).min, 0
    x[8, -1] = 1
    spoiled = np.tile(x[0], (4, 1))
    spoiled[0, 5], spoiled[1, -1], spoiled[2, size // 2], spoiled[3] = np.nan, np.inf, -np.inf, -np.inf
    order = np.argsort(-x.astype(np.float64), axis=1, kind="stable").astype(np.int32)
    for k, jit in ((1, False), (3, True), (12, False), (40, True)):
        function = tensorflow.function(lambda x, k=k: largest(x, k), jit_compile=jit, autograph=False)
        values, indices = (t.numpy() for t in function(tf.constant(x)))
        np.testing.assert_array_equal(indices, order[:, :k])
        np.testing.assert_array_equal(values, np.take_along_axis(x, order[:, :k], 1))
        values = function(tf.constant(spoiled))[0].numpy()
        assert np.isnan(values[:2]).all() and not np.isnan(values[2:]).any()
        assert np.all(values[3] == -np.inf)


@pytest.mark.parametrize("runner", [MeshRunner(), MeshRunner("x:4", "vocab:x")], ids=str)
def test_top_k_of_invalid_rows(runner):
    """A row with NaN or +inf becomes all NaN; −inf is restored."""
    x = np.tile(np.arange(16, dtype=np.float32), (5, 1))
    x[0, 3], x[1, 15], x[2, :14], x[3] = np.nan, np.inf, -np.inf, -np.inf
    b, k = dims(batch=5, top_k=3)
    values, indices = runner(lambda mesh, x: top_k(imp(mesh, x, b, V), V, k), x)
    assert np.isnan(values[:2]).all()
    np.testing.assert_array_equal(values[2:], [[15, 14, -np.inf], [-np.inf] * 3, [15, 14, 13]])
    np.testing.assert_array_equal(indices[2:], [[15, 14, 0], [0, 1, 2], [15, 14, 13]])


# --- Broadcasting -------------------------------------------------------------


def test_cwise_broadcast_aligns_by_name(runner):
    a, b, c = (np.arange(float(n)).astype(np.float32) for n in (4 * 6, 16, 6 * 16))

    def build(mesh, a, b, c):
        xs = [imp(mesh, a, B, E), imp(mesh, b, V), imp(mesh, c, E, V)]
        return cwise_broadcast(lambda a, b, c: a + 2 * b - c, xs, [V, B, E])

    want = a.reshape(1, 4, 6) + 2 * b.reshape(16, 1, 1) - c.reshape(6, 16).T[:, None]
    np.testing.assert_array_equal(runner(build, a.reshape(4, 6), b, c.reshape(6, 16)), want)

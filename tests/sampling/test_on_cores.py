"""What only a TPU core's program does: its operations against those of one CPU device, on rows of every kind."""

import numpy as np
import pytest
import simd
from programs import ONE_DEVICE, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import MeshOperation
from gpt_neo_sampling.sampling.candidate_draw import draw_candidates
from gpt_neo_sampling.sampling.categorical import score_draw
from gpt_neo_sampling.sampling.masks import min_p_mask
from gpt_neo_sampling.sampling.penalties import token_counts
from gpt_neo_sampling.sampling.top_k import first_argmax, top_k

pytestmark = pytest.mark.skipif(simd.UNAVAILABLE is not None, reason=simd.UNAVAILABLE or "")

SPLITS = [("x:4", "vocab:x"), ("x:4", "batch:x"), ("x:2,y:2", "batch:x,vocab:y")]
split = pytest.mark.parametrize("split", SPLITS, ids=" ".join)
HIGH, LOW = np.finfo(np.float32).max, np.finfo(np.float32).min


def on_cores(build, split, *arrays):
    """The result of build(mesh, *arrays), as XLA replicas of a core's program."""
    return simd.SimdProgram(build, [(tf.as_dtype(a.dtype), a.shape) for a in arrays], *split)(*arrays)


def extreme_rows(size=64):
    """float32 [16, size], of a size that 4 divides: ties within and across quarters, zeros of both signs, rows that
    are invalid, rows without mass, the largest and the lowest numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, size)).astype(np.float32)
    last, half = size - 1, size // 2
    x[1] = rng.integers(0, 3, size)
    x[2] = np.where(np.arange(size) % 2, 0.0, -0.0)
    x[3] = 1.0
    x[4, half] = np.nan
    x[5, last] = np.inf
    x[6] = -np.inf
    x[7] = -np.inf
    x[7, last] = LOW
    x[8, half], x[8, 0] = np.inf, HIGH
    x[9, [half, last]] = HIGH
    x[10] = LOW
    x[11, : half + 1] = -np.inf
    x[12] = np.where(np.arange(size) < half, -np.inf, LOW)
    x[13, 0], x[13, half] = np.nan, np.inf
    x[14, 1:] = -np.inf
    x[15] = -np.arange(size)
    return x


@split
def test_first_argmax(split):
    batch, vocab, other = dims(batch=16, vocab=64, other=1)

    def build(mesh, x):
        def wide(x, *shape):
            return mtf.import_tf_tensor(mesh, x, mtf.Shape(shape))

        columns = wide(tf.transpose(x)[:, tf.newaxis], vocab, other, batch)
        narrow = wide(tf.cast(x, tf.bfloat16), batch, vocab)
        return [first_argmax(t, vocab) for t in (wide(x, batch, vocab), columns, narrow)]

    x = extreme_rows()
    found, want = on_cores(build, split, x), ONE_DEVICE(build, x)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(want[0][2:], [0, 0, -1, -1, -1, 0, -1, 32, 0, 33 + x[11, 33:].argmax(), 0, -1, 0, 0])


def rows_to_select(k, size=8192):
    """float32 [16, size]: most are found by `select_largest`, the others are doubtful, each in its own way."""
    rng = np.random.default_rng(k)
    x = rng.normal(size=(16, size)).astype(np.float32)
    x[1, : size // 4] += 9  # all in the first quarter
    x[2, :k] = 9  # equal ones
    x[3] = np.round(x[3], 1)
    x[4, ::128] += 9  # all in one column
    x[5, size // 2] = np.nan
    x[6, -1] = np.inf
    x[7] = -np.inf
    x[8, : size - k + 1] = -np.inf  # fewer than k, and then what is masked, from the first on
    x[9] = np.where(np.arange(size) < size // 2, np.finfo(np.float32).min, -np.inf)
    x[10] = np.arange(size)
    x[11] = 0.0
    x[12, rng.permutation(size)[:k]] += 20
    x[13, [0, size - 1]] = np.finfo(np.float32).max
    x[14] *= 5e37
    x[15] = np.nan
    return x


@pytest.mark.parametrize("k", [1, 40, 50])
@split
def test_top_k(split, k):
    """Each row by itself, as one that is doubtful has all rows sorted; then all together."""
    batch, vocab, k_dim = dims(batch=16, vocab=8192, top_k=k)

    def build(mesh, x):
        return list(top_k(mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab])), vocab, k_dim))

    x = rows_to_select(k)
    program = simd.SimdProgram(build, [(tf.float32, x.shape)], *split)
    want_values, want_indices = ONE_DEVICE(build, x)
    for rows in [[row] * 16 for row in range(16)] + [list(range(16))]:
        values, indices = program(x[rows])
        np.testing.assert_array_equal(values, want_values[rows], err_msg=str(rows))
        valid = ~np.isnan(want_values[rows, 0])
        np.testing.assert_array_equal(indices[valid], want_indices[rows][valid], err_msg=str(rows))


@split
def test_at_least_so_many_are_kept(split):
    """Also where the largest are found without a sort."""
    batch, vocab = dims(batch=16, vocab=8192)

    def build(mesh, x):
        return min_p_mask(mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab])), 0.5, min_tokens_to_keep=40)

    x = rows_to_select(40)
    program = simd.SimdProgram(build, [(tf.float32, x.shape)], *split)
    want = ONE_DEVICE(build, x)
    for rows in ([0] * 16, list(range(16))):  # none in doubt, and some
        np.testing.assert_array_equal(program(x[rows]), want[rows])


@pytest.mark.parametrize("factor", [None, 1.3])
def test_draws_of_candidates(factor):
    """Also at borders between candidates of equal weight, which are ambiguous, and from rows without a draw."""
    rows_dim, k_dim = dims(batch=2048, top_k=40)
    size, rng = 50257, np.random.default_rng(0)
    x = rng.normal(size=(2048, 40)).astype(np.float32) * 2
    ids = np.stack([rng.permutation(size)[:40] for _ in range(2048)]).astype(np.int32)
    uniforms = rng.integers(-(2**31), 2**31, (2, 2048)).astype(np.int32)
    x[:512], ids[:512] = 1.0, rng.permuted(np.arange(40) * 1200, axis=-1)  # u of n/40 are borders
    uniforms[0, :512] = np.rint(np.arange(512) % 40 * 2.0**32 / 40).astype(np.uint32).view(np.int32)
    ids[512:1024] = rng.permuted(np.arange(40), axis=-1)  # all in one group
    uniforms[1, 512:768] = uniforms[0, :256]
    x[600:768] = 1.0
    uniforms[:, 1024:1028] = [[0, -1, 2**31 - 1, -(2**31)], [-1, 0, 1, -2]]
    x[1100:1200, 1:] = -np.inf
    x[1200:1300, 20:] = -np.inf
    x[1300] = -np.inf
    x[1301, 3], x[1302, 4] = np.nan, np.inf
    x[1303] = np.finfo(np.float32).min
    x[1304, 0] = np.finfo(np.float32).max
    x[1305:1400] *= 1e30
    x[1400:1500] -= 1000 * rng.random((100, 40)).astype(np.float32)

    def build(mesh, x, ids, u, v):
        rows = mtf.Shape([rows_dim])
        x, ids = (mtf.import_tf_tensor(mesh, t, rows + k_dim) for t in (x, ids))
        u, v = (mtf.import_tf_tensor(mesh, t, rows) for t in (u, v))
        scale = None if factor is None else mtf.constant(mesh, factor, mtf.Shape([]))
        return score_draw(x, u, v, k_dim, size=size, factor=scale, ids=ids)

    arrays = [x, ids, *uniforms]
    want = ONE_DEVICE(build, *arrays)
    np.testing.assert_array_equal(on_cores(build, ("x:4", "batch:x"), *arrays), want)

    class Fast(MeshOperation):
        """Without the exact draw of what is ambiguous."""

        def __init__(self, x, ids, *others):
            rows = x.shape - k_dim
            super().__init__([x, ids, *others], [(rows, tf.int32), (rows, tf.float32)], "fast")

        def lower(self, lowering):
            impl = lowering.mesh_impl(self)
            x, ids, *others = (lowering.tensors[t] for t in self.inputs)
            u, v, *scale = impl.slicewise(lambda *ts: tuple(tf.reshape(t, [-1, 1]) for t in ts), *others)
            u, v = impl.slicewise(
                lambda *ts: tuple(tf.cast(tf.bitcast(t, tf.uint32), tf.float32) / 2**32 for t in ts), u, v
            )
            drawn = draw_candidates(impl, size, x, ids, scale[0] if scale else None, [u, v])
            for output, value in zip(self.outputs, drawn, strict=True):
                lowering.set_tensor_lowering(output, impl.slicewise(lambda t: tf.reshape(t, [-1]), value))

    def fast(mesh, x, ids, u, v):
        rows = mtf.Shape([rows_dim])
        x, ids = (mtf.import_tf_tensor(mesh, t, rows + k_dim) for t in (x, ids))
        others = [mtf.import_tf_tensor(mesh, t, rows) for t in (u, v)]
        return Fast(x, ids, *others, *([] if factor is None else [mtf.ones(mesh, rows) * factor])).outputs

    drawn, ambiguous = on_cores(fast, ("x:4", "batch:x"), *arrays)
    np.testing.assert_array_equal(drawn[ambiguous == 0], want[ambiguous == 0])
    assert (ambiguous[:512] > 0).mean() > 0.9 and (ambiguous[1500:] > 0).mean() < 0.02


@split
def test_token_counts(split):
    """Of ids that repeat, at both ends of each shard, and outside the vocabulary; up to all of a row the same."""
    batch, length, vocab = dims(batch=4, length=600, vocab=1200)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1200, (4, 600)).astype(np.int32)
    ids[1] = rng.choice([0, 299, 300, 599, 600, 1199, 1200, -1, 2**31 - 1, -(2**31)], 600)
    ids[2] = 777
    begin, end = np.array([0, 3, 0, 600], np.int32), np.array([600, 590, 600, 600], np.int32)

    def build(mesh, ids, begin, end):
        begin, end = (mtf.import_tf_tensor(mesh, t, mtf.Shape([batch])) for t in (begin, end))
        return token_counts(mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch, length])), vocab, begin, end)

    program = simd.SimdProgram(build, [(tf.int32, ids.shape), (tf.int32, (4,)), (tf.int32, (4,))], *split)
    assert " scatter(" not in program.hlo_text
    found = program(ids, begin, end)
    np.testing.assert_array_equal(found, ONE_DEVICE(build, ids, begin, end))
    assert found[2].tolist() == [600.0 * (i == 777) for i in range(1200)] and not found[3].any()

"""gpt_neo_sampling.models.layers, and what a decode loop writes, against NumPy in float64."""

import numpy as np
import pytest
import reference
from programs import MeshRunner, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import force_allreduce, resize, take, write_at
from gpt_neo_sampling.models import layers
from gpt_neo_sampling.models.config import HUGGING_FACE_ACTIVATIONS
from gpt_neo_sampling.models.layers import (
    ACTIVATIONS,
    HUGGING_FACE_FUNCTIONS,
    ROW_ACTIVATIONS,
    activate,
    attend,
    layer_norm,
    matmul,
    rotary_table,
    rotate,
)

B, S, IN, OUT, P = dims(batch=4, sequence=3, inner=16, outer=8, parts=2)
H, M, D = dims(heads=2, memory=8, depth=5)
RUNNERS = [MeshRunner(), MeshRunner("x:2", "batch:x"), MeshRunner("x:2,y:2", "inner:x,outer:y,heads:y,memory:x")]


@pytest.fixture(params=RUNNERS, ids=str)
def runner(request):
    return request.param


def imp(mesh, value, *shape):
    return mtf.import_tf_tensor(mesh, value, mtf.Shape(shape))


@pytest.mark.parametrize(
    "cores, columns, parts",
    [(1, 768, 1), (2, 768, 2), (2, 50257, 29), (3, 50304, 3), (2, 127, 1), (32, 50257, 29), (100, 768, 64)],
)
def test_parts_of_a_compiled_product(monkeypatch, cores, columns, parts):
    monkeypatch.setattr(layers.os, "sched_getaffinity", lambda pid: range(cores))
    assert layers._parts_of(columns) == parts


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(got, want, tolerance=2e-5):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 4])
def test_matmul(runner, rows):
    """Weights [in, out], [out, in] and [in, parts, out]; one row takes another kernel than several."""
    batch = mtf.Dimension("batch" if rows > 1 else "row", rows)
    x, w, pw = normal(rows, 3, 16), normal(16, 8, seed=1), normal(16, 2, 8, seed=2)

    def build(mesh, x, w, transposed, pw):
        x, one = imp(mesh, x, batch, S, IN), imp(mesh, x[:, 0], batch, IN)
        w = imp(mesh, w, IN, OUT)
        transposed, pw = imp(mesh, transposed, OUT, IN), imp(mesh, pw, IN, P, OUT)
        results = [matmul(x, w), matmul(one, w), matmul(one, transposed), matmul(one, pw)]
        loss = mtf.reduce_sum(mtf.square(results[0]))
        return results + [force_allreduce(g) for g in mtf.gradients([loss], [x, w])]

    y, one, transposed, parts, dx, dw = runner(build, x, w, w.T.copy(), pw)
    x, w, pw = (a.astype(np.float64) for a in (x, w, pw))
    close(y, x @ w)
    close(one, x[:, 0] @ w)
    close(transposed, x[:, 0] @ w)
    close(parts, np.einsum("bi,ipo->bpo", x[:, 0], pw))
    close(dx, 2 * (x @ w) @ w.T, 1e-4)
    close(dw, np.einsum("bsi,bso->io", x, 2 * (x @ w)), 5e-4)


def test_matmul_refuses_weights_that_do_not_fit():
    def build(mesh, x, w):
        return matmul(imp(mesh, x, B, IN), imp(mesh, w, P, IN, OUT))

    with pytest.raises(ValueError, match=r"matmul: .*batch=4.*\[\.\.\., in\] by \[in, out…\]"):
        MeshRunner()(build, normal(4, 16), normal(2, 16, 8))


def test_attend(runner):
    q, k, v = normal(4, 2, 3, 5), normal(4, 2, 8, 5, seed=1), normal(4, 2, 8, 5, seed=2)
    causal = np.where(np.arange(8) > np.arange(3)[:, None] + 2, -1e10, 0).astype(np.float32)
    by_row = np.where(np.arange(8) > np.arange(4)[:, None], -1e10, 0).astype(np.float32)

    def build(mesh, q, k, v, causal, by_row):
        k, v = imp(mesh, k, B, H, M, D), imp(mesh, v, B, H, M, D)
        return [
            attend(imp(mesh, q, B, H, S, D), k, v, imp(mesh, causal, S, M), M),
            attend(imp(mesh, q[:, :, 0], B, H, D), k, v, imp(mesh, by_row, B, M), M),
        ]

    many, one = runner(build, q, k, v, causal, by_row)
    q, k, v = (a.astype(np.float64) for a in (q, k, v))

    def expected(q, bias):
        scores = np.einsum("bhsd,bhmd->bhsm", q, k) + bias
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bhsm,bhmd->bhsd", weights / weights.sum(-1, keepdims=True), v)

    close(many, expected(q, causal))
    close(one, expected(q[:, :, :1], by_row[:, None, None])[:, :, 0])


def test_layer_norm_and_its_gradient(runner):
    x, g, b, dy = normal(4, 3, 16) * 3 + 1, normal(16, seed=1), normal(16, seed=2), normal(4, 3, 16, seed=3)

    def build(mesh, *arrays):
        x, g, b, dy = (imp(mesh, a, *shape) for a, shape in zip(arrays, ([B, S, IN], [IN], [IN], [B, S, IN])))
        y, one = layer_norm(x, g, b, 1e-5), mtf.reduce_sum(g)
        alike = layer_norm(x, one, None, 1e-5)
        wanted = [force_allreduce(grad) for grad in mtf.gradients([mtf.reduce_sum(y * dy)], [x, g, b])]
        return [y, *wanted, alike, *(force_allreduce(d) for d in mtf.gradients([mtf.reduce_sum(alike * dy)], [x, one]))]

    y, dx, dg, db, alike, dx_alike, d_one = runner(build, x, g, b, dy)
    x, g, b, dy = (a.astype(np.float64) for a in (x, g, b, dy))

    def forward(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    close(y, forward(x) * g + b)
    numeric, h = np.zeros_like(x), 1e-5
    for i in range(16):  # central differences
        step = h * (np.arange(16) == i)
        numeric[..., i] = ((forward(x + step) - forward(x - step)) * g * dy).sum(-1) / (2 * h)
    close(dx, numeric)
    close(alike, forward(x) * g.sum(), 1e-4)  # a single scale, and no offset
    numeric = np.stack(
        [((forward(x + h * unit) - forward(x - h * unit)) * g.sum() * dy).sum(-1) / (2 * h) for unit in np.eye(16)], -1
    )
    close(dx_alike, numeric, 1e-4)
    close(d_one, (forward(x) * dy).sum(), 1e-4)
    close(dg, (forward(x) * dy).sum((0, 1)), 1e-4)
    close(db, dy.sum((0, 1)), 1e-4)


def test_layer_norm_with_any_epsilon():
    """Of rows whose variance is far below and far above it; of 0 too."""
    x = normal(4, 3, 16) * np.float32([1e-4, 1e-2, 1, 30])[:, np.newaxis, np.newaxis]
    epsilons = (0.0, 1e-12, 1e-6, 0.1, 10)

    def build(mesh, x):
        x, one, zero = imp(mesh, x, B, S, IN), mtf.ones(mesh, [IN]), mtf.zeros(mesh, [IN])
        return [layer_norm(x, one, zero, epsilon) for epsilon in epsilons]

    for y, epsilon in zip(MeshRunner()(build, x), epsilons, strict=True):
        close(y, reference.layer_norm(x.astype(np.float64), 1, 0, epsilon), 4e-6)


def test_activation_functions_and_their_gradients():
    x = np.linspace(-12, 12, 16 * 4, dtype=np.float32).reshape(4, 16)  # without 0, where some have a corner
    names = [*ACTIVATIONS, *HUGGING_FACE_ACTIVATIONS]
    assert HUGGING_FACE_FUNCTIONS.keys() == set(HUGGING_FACE_ACTIVATIONS)
    assert {*names, *ROW_ACTIVATIONS} == set(reference.ACTIVATIONS)

    def build(mesh, x):
        x = imp(mesh, x, B, IN)
        y = [activate(x, name) for name in names]
        return y + [mtf.gradients([mtf.reduce_sum(each)], [x])[0] for each in y]

    results = MeshRunner()(build, x)
    x = x.astype(np.float64)
    for name, y, dx in zip(names, results, results[len(names) :]):
        expected = reference.ACTIVATIONS[name]
        size = max(1, np.abs(expected(x)).max() / 12)  # more than 1 of those that grow faster than x
        close(y, expected(x), 2e-6 * size)
        slope_tolerance = 2e-5 if name.endswith(("relax", "exp")) else 5e-6
        close(dx, (expected(x + 1e-6) - expected(x - 1e-6)) / 2e-6, slope_tolerance * size)


def test_activation_functions_of_rows(runner):
    """Gradients too, against central differences."""
    x, dy = 3 * normal(4, 16), normal(4, 16, seed=1)

    def build(mesh, x, dy):
        x, dy = imp(mesh, x, B, IN), imp(mesh, dy, B, IN)
        y = [activate(x, name) for name in ROW_ACTIVATIONS]
        return y + [mtf.gradients([mtf.reduce_sum(each * dy)], [x])[0] for each in y]

    results = runner(build, x, dy)
    x = x.astype(np.float64)
    for name, y, dx in zip(ROW_ACTIVATIONS, results, results[2:]):
        expected = reference.ACTIVATIONS[name]
        close(y, np.exp(x) / np.exp(x).sum(-1, keepdims=True) if name == "softmax" else expected(x), 2e-6)
        steps = 1e-6 * np.eye(16)[:, np.newaxis]
        slopes = (dy * (expected(x + steps) - expected(x - steps))).sum(-1) / 2e-6
        close(dx, slopes.T, 5e-6)


def test_rotate(runner):
    """By angles to 2,047, as exact as float32 holds the table; the gradient turns back."""
    x, dy = normal(4, 2, 8, 6), normal(4, 2, 8, 6, seed=1)
    at = np.array([0, 1, 1024, 2047], np.int32)
    depth, position = dims(depth=6, position=2048)

    def build(mesh, x, dy, at):
        x, dy = imp(mesh, x, B, H, M, depth), imp(mesh, dy, B, H, M, depth)
        by_memory = rotate(x, rotary_table(mesh, M, depth))
        by_row = rotate(x, take(rotary_table(mesh, position, depth), imp(mesh, at, B), position))
        return [by_memory, by_row] + [mtf.gradients([mtf.reduce_sum(y * dy)], [x])[0] for y in (by_memory, by_row)]

    def expected(x, at):
        """As complex numbers, the first half real, the second imaginary."""
        z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * at[..., None] * 10000.0 ** -(np.arange(3) / 3))
        return np.concatenate([z.real, z.imag], -1)

    memory, row = np.arange(8.0), at.reshape(4, 1, 1).astype(np.float64)
    turned = [(x, memory), (x, row), (dy, -memory), (dy, -row)]
    for got, (values, by) in zip(runner(build, x, dy, at), turned):
        close(got, expected(values.astype(np.float64), by), 1e-6)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_half_precision_rounds_once(dtype):
    """Layer norm, rotation and activation: the float64 value, rounded, of values that are far from 0 or the like."""
    x = normal(4, 16).astype(dtype.as_numpy_dtype)
    x += 30  # in the dtype itself a variance would be wrong by half

    def build(mesh, x):
        x = imp(mesh, x, B, IN)
        one = mtf.ones(mesh, [IN], dtype)
        return [layer_norm(x, one, 0 * one, 1e-5), rotate(x, rotary_table(mesh, B, IN)), activate(x, "mish")]

    results = MeshRunner()(build, x)
    x = x.astype(np.float64)
    z = (x[:, :8] + 1j * x[:, 8:]) * np.exp(1j * np.arange(4)[:, None] * 10000.0 ** -(np.arange(8) / 8))
    centred = x - x.mean(-1, keepdims=True)
    for got, want in zip(results, (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5),
        np.concatenate([z.real, z.imag], -1),
        reference.ACTIVATIONS["mish"](x),
    )):  # fmt: skip
        assert got.dtype == dtype.as_numpy_dtype
        unit = 2.0 ** (-9 if dtype == tf.bfloat16 else -12)
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=1.1 * unit * 2, atol=1e-4)


def test_gradients_recomputed_in_microbatches(runner):
    """Of all three, one upon the other, against central differences in float64."""
    x, dy = normal(4, 3, 16), normal(4, 3, 8, seed=1)
    start = {"g": normal(16, seed=2), "b": normal(16, seed=3), "w": normal(16, 8, seed=4) / 4}

    def build(mesh, x, dy):
        def by_microbatch(part):
            g, b, w = (
                mtf.get_variable(mesh, name, mtf.Shape(shape), initializer=tf.constant_initializer(start[name]))
                for name, shape in (("g", [IN]), ("b", [IN]), ("w", [IN, OUT]))
            )
            y = mtf.recompute_grad(lambda x: activate(matmul(layer_norm(x, g, b, 1e-5), w), "gelu"), [part["x"]])
            return {"loss": mtf.reduce_sum(y * part["dy"])}

        parts = {"x": imp(mesh, x, B, S, IN), "dy": imp(mesh, dy, B, S, OUT)}
        return mtf.serialize_training_step(parts, by_microbatch, B, 2)[0]

    def loss(g, b, w):
        centred = x - x.mean(-1, keepdims=True, dtype=np.float64)
        h = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * g + b) @ w
        return (dy * reference.ACTIVATIONS["gelu"](h)).sum()

    for name, got in zip(start, runner(build, x, dy)):
        at = {key: value.astype(np.float64) for key, value in start.items()}
        want = np.zeros(got.shape)
        for i in np.ndindex(got.shape):
            value = at[name][i]
            at[name][i] = value + 1e-6
            up = loss(**at)
            at[name][i] = value - 1e-6
            want[i] = (up - loss(**at)) / 2e-6
            at[name][i] = value
        close(got, want)


def test_resize(runner):
    x = normal(4, 8, 5)
    ids = np.arange(32, dtype=np.int32).reshape(4, 8)

    def build(mesh, x, ids):
        x = imp(mesh, x, B, M, D)
        return [resize(x, M, 6), resize(x, M, 8), resize(x, M, 12), resize(imp(mesh, ids, B, M), M, 10)]

    shorter, same, longer, padded_ids = runner(build, x, ids)
    np.testing.assert_array_equal(shorter, x[:, :6])
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(longer, np.pad(x, ((0, 0), (0, 4), (0, 0))))
    np.testing.assert_array_equal(padded_ids, np.pad(ids, ((0, 0), (0, 2))))


@pytest.mark.parametrize("may_overwrite", [True, False])
def test_writing_in_a_loop(runner, may_overwrite):
    """Each of 5 steps writes one row a batch entry; the same session runs it three times."""
    x, value = normal(4, 2, 8, 5), normal(4, 2, 5, seed=1)
    first = np.array([0, 3, 1, 2], np.int32)

    def build(mesh, x, value, first):
        memory = mtf.relu(imp(mesh, x, B, H, M, D))  # computed in every run
        value, first = imp(mesh, value, B, H, D), imp(mesh, first, B)

        def body(i, memory, seen):
            # like a token, what is written depends on all that was read before
            new = value * mtf.to_float(i + 1) + 0.125 * seen
            memory = write_at(memory, new, first + i, M, may_overwrite=may_overwrite)
            return [i + 1, memory, force_allreduce(seen + mtf.reduce_sum(memory, reduced_dim=M))]

        start = [mtf.zeros(mesh, [], tf.int32), memory, mtf.zeros(mesh, [B, H, D])]
        return mtf.while_loop(lambda i, *_: mtf.less(i, 5), body, start)[1:]

    memory, total = np.maximum(x, 0).astype(np.float64), np.zeros((4, 2, 5))
    for i in range(5):
        for row in range(4):
            memory[row, :, first[row] + i] = value[row] * (i + 1.0) + 0.125 * total[row]
        total += memory.sum(2)
    for got in runner(build, x, value, first, times=3):
        close(got[0], memory, 1e-4)
        close(got[1], total, 1e-4)


def test_memory_is_overwritten_where_sessions_run_the_graph():
    """And nowhere else: XLA, which may compile a tf.function, has no such operation."""

    def operations(build_in):
        with tf.Graph().as_default() as graph:
            holder = tf.placeholder(tf.float32, [4, 2, 8, 5])

            def build(x):
                mesh = mtf.Mesh(mtf.Graph(), "mesh")
                x = imp(mesh, x, B, H, M, D)
                at = mtf.constant(mesh, 2, mtf.Shape([B]), tf.int32)
                y = write_at(x, mtf.zeros(mesh, [B, H, D]), at, M, may_overwrite=True)
                lowering = mtf.Lowering(mesh.graph, {mesh: RUNNERS[0].impl}, autostack=False)
                return lowering.export_to_tf_tensor(y)

            build_in(build, holder)
            inside = [op.type for f in graph._functions.values() for op in f.graph.get_operations()] if (
                graph._functions) else []  # fmt: skip
            return {op.type for op in graph.get_operations()} | set(inside)

    assert "InplaceUpdate" in operations(lambda build, x: build(x))
    assert "InplaceUpdate" not in operations(lambda build, x: tf.function(build)(x))

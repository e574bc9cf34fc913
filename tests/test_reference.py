"""Pins the NumPy reference itself to golden data and to published values.

The logits and greedy tokens come from the original code (float32); see
``data/*/golden.npz``.  Everything else is checked against a second, different way
of getting the same number.
"""

import json
import pathlib

import numpy as np
import pytest
import reference

DATA = pathlib.Path(__file__).resolve().parent / "data"
CHECKPOINTS = ("global", "local", "padding_outside", "rotary")
# The golden logits were made in float32 and reach 6 in size.  The float64 reference
# is within 1.7e-5 of them; run in float32 it moves by as much itself (2.5e-5), while
# a wrong epsilon or GELU constant moves it further than this tolerance.
LOGITS_ATOL = 5e-5


def _load_mesh(name):
    """(weights, config for the reference, n_ctx, golden) of a mesh-TF checkpoint."""
    tf = pytest.importorskip("tensorflow")
    folder = DATA / "gpt_neo_checkpoints" / name
    reader = tf.train.load_checkpoint(str(folder))
    weights = {
        full.removeprefix("gpt2/"): reader.get_tensor(full)
        for full in reader.get_variable_to_shape_map()
        if full.startswith("gpt2/")
    }
    params = json.loads((folder / "config.json").read_text())
    config = {
        "n_head": params["n_head"],
        "attention_types": reference.expand_attention_types(params["attention_types"]),
        "local_attention_radius": params.get("local_attention_radius", 256),
        "padding_id": params["padding_id"],
        "rotary_emb": params.get("rotary_emb", False),
    }
    return weights, config, params["n_ctx"], dict(np.load(folder / "golden.npz"))


@pytest.fixture(scope="module", params=CHECKPOINTS)
def mesh(request):
    return _load_mesh(request.param)


@pytest.fixture(scope="module")
def hugging_face():
    numpy_io = pytest.importorskip("safetensors.numpy")
    folder = DATA / "hf_gpt_neo_tiny"
    params = json.loads((folder / "config.json").read_text())
    config = {
        "n_head": params["num_heads"],
        "attention_types": reference.expand_attention_types(params["attention_types"]),
        "local_attention_radius": params["window_size"],
    }
    weights = reference.hf_to_mesh_names(numpy_io.load_file(folder / "model.safetensors"))
    golden = dict(np.load(folder / "golden.npz"))
    return weights, config, params["max_position_embeddings"], golden


# --------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------


def test_mesh_logits(mesh):
    weights, config, _, golden = mesh
    logits = reference.gpt_neo_forward(weights, golden["ids"], **config)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=LOGITS_ATOL)


def test_mesh_greedy(mesh):
    weights, config, n_ctx, golden = mesh
    np.testing.assert_array_equal(golden["greedy_fast"], golden["greedy_slow"])
    prompts = [row[:length] for row, length in zip(golden["prompts"], golden["lengths"], strict=True)]
    rows = reference.greedy_decode(weights, prompts, 20, n_ctx, **config)
    for row, prompt, expected in zip(rows, prompts, golden["greedy_fast"], strict=True):
        assert len(row) == len(prompt) + 20
        np.testing.assert_array_equal(row, expected[: len(row)])
        assert np.all(expected[len(row) :] == config["padding_id"])


def test_hugging_face_logits(hugging_face):
    weights, config, _, golden = hugging_face
    logits = reference.gpt_neo_forward(weights, golden["logits_ids"], **config)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=LOGITS_ATOL)


def test_hugging_face_greedy(hugging_face):
    weights, config, length, golden = hugging_face
    for i in range(3):
        rows = reference.greedy_decode(weights, [golden[f"prompt{i}"]], 30, length, **config)
        np.testing.assert_array_equal(rows[0], golden[f"greedy{i}"])


def test_hf_to_mesh_names():
    out = reference.hf_to_mesh_names(
        {
            "transformer.h.11.mlp.c_fc.weight": np.arange(6.0).reshape(3, 2),
            "transformer.h.0.attn.attention.bias": np.ones((1, 1, 4, 4), bool),
            "transformer.wte.weight": np.zeros((5, 2)),
            "lm_head.weight": np.zeros((5, 2)),
        }
    )
    assert set(out) == {"h11/mlp/conv1d_main/c_fc/kernel", "wte"}
    np.testing.assert_array_equal(out["h11/mlp/conv1d_main/c_fc/kernel"], [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]])
    with pytest.raises(KeyError):
        reference.hf_to_mesh_names({"transformer.h.0.other.weight": np.zeros(2)})


def test_hugging_face_has_the_mesh_names(hugging_face):
    mesh_weights, _, _, _ = _load_mesh("local")
    assert set(hugging_face[0]) == set(mesh_weights)


def test_expand_attention_types():
    assert reference.expand_attention_types([[["global", "local"], 2], [["global"], 1]]) == [
        "global",
        "local",
        "global",
        "local",
        "global",
    ]


def test_id_outside_the_table_is_a_zero_vector(hugging_face):
    weights, config, _, _ = hugging_face
    vocab = weights["wte"].shape[0]
    padded = {**weights, "wte": np.vstack([weights["wte"], np.zeros_like(weights["wte"][:1])])}
    expected = reference.gpt_neo_forward(padded, np.array([[3, vocab, 5]]), **config)[..., :vocab]
    for outside in (vocab, vocab + 9, -1):
        logits = reference.gpt_neo_forward(weights, np.array([[3, outside, 5]]), **config)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)


def test_later_tokens_and_padding_id_do_not_matter(hugging_face):
    weights, config, _, golden = hugging_face
    ids = golden["logits_ids"][:1, :12]
    whole = reference.gpt_neo_forward(weights, ids, **config)
    start = reference.gpt_neo_forward(weights, ids[:, :7], padding_id=int(ids[0, 2]), **config)
    np.testing.assert_allclose(whole[:, :7], start, rtol=0, atol=1e-12)


def test_greedy_decode_limits(hugging_face):
    weights, config, _, golden = hugging_face
    prompt, expected = golden["prompt0"].tolist(), golden["greedy0"].tolist()
    # The length counts the prompt in, and a full prompt is handed back as it is.
    assert reference.greedy_decode(weights, [prompt], 30, 8, **config) == [expected[:8]]
    assert reference.greedy_decode(weights, [prompt], 30, 2, **config) == [prompt]
    # A row stops by itself, on a token that it keeps; the other goes on.
    other, other_expected = golden["prompt1"].tolist(), golden["greedy1"].tolist()
    stop = expected[len(prompt) + 2]
    assert stop not in expected[len(prompt) : len(prompt) + 2]
    assert stop not in other_expected[len(other) : len(other) + 6]
    rows = reference.greedy_decode(weights, [prompt, other], 6, 64, stop_at_token=stop, **config)
    assert rows == [expected[: len(prompt) + 3], other_expected[: len(other) + 6]]
    # One in the prompt does not stop a row.
    assert prompt[0] not in expected[len(prompt) : len(prompt) + 2]
    rows = reference.greedy_decode(weights, [prompt], 2, 64, stop_at_token=prompt[0], **config)
    assert rows == [expected[: len(prompt) + 2]]
    with pytest.raises(ValueError):
        reference.greedy_decode(weights, [[]], 2, 64, **config)


# --------------------------------------------------------------------------
# Softmax and its sparse relatives
# --------------------------------------------------------------------------


def _hard_rows(n, scale, seed=0):
    """[4, n]: plain, with many ties, all equal, and half -inf."""
    x = np.random.default_rng(seed).normal(size=(4, n)) * scale
    x[1] = np.round(x[1])
    x[2] = 7.0
    x[3, 1::2] = -np.inf
    return x


@pytest.mark.parametrize("scale", (0.1, 1.0, 30.0))
@pytest.mark.parametrize("n", (1, 2, 7, 300, 5000))
def test_bisection_agrees_with_sorting(n, scale):
    x = _hard_rows(n, scale)
    for alpha, exact in ((1.5, reference.entmax15_exact), (2.0, reference.sparsemax_exact)):
        p = exact(x)
        np.testing.assert_allclose(p.sum(axis=-1), 1.0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(reference.entmax_bisect(x, alpha), p, rtol=0, atol=1e-14)


def test_hand_worked_values():
    np.testing.assert_allclose(reference.sparsemax_exact([0.6, 0.4, -1.0]), [0.6, 0.4, 0.0])
    # With z = x/2 = (0.8, 0.6) less a tau of 0: 0.64 + 0.36 = 1.
    np.testing.assert_allclose(reference.entmax15_exact([1.6, 1.2, -0.1]), [0.64, 0.36, 0.0])
    np.testing.assert_allclose(reference.softmax(np.log([1.0, 3.0, 4.0])), [0.125, 0.375, 0.5])


@pytest.mark.parametrize("alpha", (1.0001, 1.1, 1.3, 1.5, 1.9, 2.0))
def test_bisection_satisfies_its_equation(alpha):
    """On the support (alpha-1) x - p^(alpha-1) is one number, tau; off it, x is below."""
    x = _hard_rows(200, 2.0, seed=1)
    p = reference.entmax_bisect(x, alpha)
    np.testing.assert_allclose(p.sum(axis=-1), 1.0, rtol=0, atol=1e-13)
    for row, q in zip((alpha - 1) * x, p, strict=True):
        tau = row[q > 0] - q[q > 0] ** (alpha - 1)
        assert np.ptp(tau) < 1e-12
        assert np.all(row[q == 0] <= tau.max() + 1e-12)


def test_alpha_one_is_softmax_and_the_limit():
    x = np.random.default_rng(2).normal(size=(3, 50))
    np.testing.assert_array_equal(reference.entmax_bisect(x, 1), reference.softmax(x))
    np.testing.assert_allclose(reference.entmax_bisect(x, 1 + 1e-6), reference.softmax(x), atol=1e-6)
    for alpha in (0.5, 2.5):
        with pytest.raises(ValueError):
            reference.entmax_bisect(x, alpha)


def test_axis():
    x = np.random.default_rng(3).normal(size=(3, 6, 2))
    for f in (
        reference.softmax,
        reference.entmax15_exact,
        reference.sparsemax_exact,
        lambda a, axis: reference.entmax_bisect(a, 1.3, axis),
        lambda a, axis: reference.entmax_grad(a, np.cos(a), 1.3, axis),
        lambda a, axis: reference.top_k_keep(a, 2, axis),
    ):
        moved = np.moveaxis(f(np.moveaxis(x, 1, -1), -1), -1, 1)
        np.testing.assert_allclose(f(x, 1), moved, rtol=0, atol=1e-13)
    t = reference.softmax(x, 1)
    np.testing.assert_allclose(
        reference.entmax_loss(x, t, 1.3, 1),
        reference.entmax_loss(np.moveaxis(x, 1, -1), np.moveaxis(t, 1, -1), 1.3),
        rtol=0,
        atol=1e-13,
    )


@pytest.mark.parametrize("alpha", (1.0, 1.1, 1.3, 1.5, 1.7, 2.0))
def test_gradient_agrees_with_the_closed_form(alpha):
    """dX = s dY - s (sum s dY) / sum s, with s = p^(2-alpha) on the support."""
    rng = np.random.default_rng(4)
    x, dy = rng.normal(size=(2, 8, 11))
    p = reference.entmax(x, alpha)
    s = np.where(p > 0, np.where(p > 0, p, 1.0) ** (2 - alpha), 0.0)
    closed = s * dy - s * (s * dy).sum(-1, keepdims=True) / s.sum(-1, keepdims=True)
    np.testing.assert_allclose(reference.entmax_grad(x, dy, alpha), closed, rtol=0, atol=1e-7)


@pytest.mark.parametrize("alpha", (1.0, 1.1, 1.3, 1.5, 1.7, 2.0))
def test_loss(alpha):
    rng = np.random.default_rng(5)
    x = 2 * rng.normal(size=(6, 9))
    t = reference.sparsemax_exact(rng.normal(size=(6, 9)))
    p = reference.entmax(x, alpha)
    loss = reference.entmax_loss(x, t, alpha)
    assert loss.shape == (6,) and np.all(loss > 0)
    np.testing.assert_allclose(reference.entmax_loss(x, p, alpha), 0.0, rtol=0, atol=1e-14)
    np.testing.assert_allclose(reference.entmax_loss(x + 100, t, alpha), loss, rtol=0, atol=1e-12)
    # Its gradient is p - t.
    step = 1e-5 * np.eye(9)
    for r in range(6):
        up, down = (reference.entmax_loss(x[r] + sign * step, np.tile(t[r], (9, 1)), alpha) for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2e-5, p[r] - t[r], rtol=0, atol=1e-6)


def test_loss_at_alpha_one_and_two():
    x = np.array([0.3, -1.2, 2.0, -np.inf])
    one_hot = np.array([0.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(reference.entmax_loss(x, one_hot, 1), -np.log(reference.softmax(x)[1]), rtol=1e-14)
    t, q = np.array([0.5, 0.25, 0.25, 0.0]), reference.softmax(x)
    divergence = np.sum(t[:3] * np.log(t[:3] / q[:3]))
    np.testing.assert_allclose(reference.entmax_loss(x, t, 1), divergence, rtol=1e-14)
    # At 2 it is (|x - t|^2 - |x - p|^2) / 2 (Martins & Astudillo 2016 for a one-hot t).
    y, p = x[:3], reference.sparsemax_exact(x[:3])
    squares = 0.5 * (np.sum((y - t[:3]) ** 2) - np.sum((y - p) ** 2))
    np.testing.assert_allclose(reference.entmax_loss(y, t[:3], 2), squares, rtol=1e-14)


def test_top_k_keep():
    np.testing.assert_array_equal(reference.top_k_keep([1.0, 3.0, 3.0, 2.0, 3.0], 2), [False, True, True, False, False])
    np.testing.assert_array_equal(reference.top_k_keep(np.ones(5), 3), [True] * 3 + [False] * 2)
    np.testing.assert_array_equal(reference.top_k_keep([0.0, -0.0], 1), [True, False])
    ties = np.round(np.random.default_rng(6).normal(size=(4, 30)))
    for k in (0, 1, 12, 30):
        keep = reference.top_k_keep(ties, k)
        assert np.all(keep.sum(axis=-1) == k)
        if 0 < k < 30:
            dropped, kept = np.where(keep, -np.inf, ties), np.where(keep, ties, np.inf)
            assert np.all(dropped.max(axis=-1) <= kept.min(axis=-1))
    with pytest.raises(ValueError):
        reference.top_k_keep(ties, 31)


# --------------------------------------------------------------------------
# Random numbers and drawing
# --------------------------------------------------------------------------


def test_threefry_vectors():
    for key, counter, expected in reference.THREEFRY2X32_VECTORS:
        out = reference.threefry2x32(*key, *counter)
        assert tuple(int(word) for word in out) == expected
        assert all(word.dtype == np.uint32 and word.shape == () for word in out)
    # All at once, as arrays.
    keys, counters, expected = (
        np.array(column, dtype=np.uint32).T for column in zip(*reference.THREEFRY2X32_VECTORS, strict=True)
    )
    np.testing.assert_array_equal(reference.threefry2x32(*keys, *counters), expected)


def test_threefry_broadcasts_and_is_one_to_one():
    counters = np.arange(1 << 12, dtype=np.uint32)
    x0, x1 = reference.threefry2x32(1, 2, counters, 3)
    assert x0.shape == x1.shape == counters.shape
    both = (x0.astype(np.uint64) << np.uint64(32)) | x1
    assert len(np.unique(both)) == len(counters)
    assert abs(reference.bits_to_uniform(x0).mean() - 0.5) < 0.02


def test_bits_to_uniform():
    bits = np.array([0, 255, 256, 1 << 31, 0xFFFFFFFF], dtype=np.uint32)
    u = reference.bits_to_uniform(bits)
    np.testing.assert_array_equal(u, [0.0, 2.0**-24 - 2.0**-32, 2.0**-24, 0.5, 1 - 2.0**-32])


def test_two_level_draw_by_hand():
    weights = [0.0, 1.0, 3.0, 0.0, 0.0, 4.0]  # in 3 groups: masses 1, 3, 4
    draw = reference.two_level_draw
    assert [draw(weights, u, 0.0, groups=3) for u in (0.0, 0.124, 0.125, 0.499, 0.5, 0.999)] == [
        1, 1, 2, 2, 5, 5,
    ]  # fmt: skip
    # In 2 groups: masses 4, 4; within the first, 1 and 3.
    assert [draw(weights, 0.0, u, groups=2) for u in (0.0, 0.249, 0.25, 0.999)] == [1, 1, 2, 2]
    assert draw(weights, 0.7, 0.5) == 5  # more groups than entries


def test_two_level_draw_of_a_lone_token():
    """Where rounding leaves the mass short of the draw, the original gives 0; this does not."""
    weights = np.zeros(1000)
    weights[5] = 0.25
    for u in (0.0, 0.3, 1 - 2.0**-24):
        assert reference.two_level_draw(weights, u, u) == 5


@pytest.mark.parametrize("weights", ([0.0, 0.0], [1.0, -1e-30], [1.0, np.nan], [1.0, np.inf], [1.0, -np.inf]))
def test_two_level_draw_refuses(weights):
    assert reference.two_level_draw(weights, 0.5, 0.5) == -1


def test_two_level_draw_arguments():
    for u1, u2 in ((1.0, 0.0), (0.0, 1.0), (-0.1, 0.0), (0.0, np.nan)):
        with pytest.raises(ValueError):
            reference.two_level_draw([1.0], u1, u2)


@pytest.mark.parametrize("vocab", (1, 63, 64, 65, 127, 300))
def test_two_level_draw_has_the_right_frequencies(vocab):
    """Over a grid of (u1, u2) each entry is drawn in proportion to its weight."""
    weights = np.random.default_rng(7).random(vocab) ** 3
    weights[::7] = 0.0
    weights[-1] += 1.0
    steps = 64
    grid = (np.arange(steps) + 0.5) / steps
    drawn = [reference.two_level_draw(weights, u1, u2, groups=8) for u1 in grid for u2 in grid]
    counts = np.bincount(drawn, minlength=vocab)
    assert len(counts) == vocab and not np.any(counts[weights == 0])
    # The grid is off by at most one column a group and one row an entry.
    assert np.max(np.abs(counts / steps**2 - weights / weights.sum())) < 2.0 / steps

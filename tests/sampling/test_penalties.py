"""gpt_neo_sampling.sampling.penalties against NumPy in float64, on 1,000 rows and on any layout."""

import numpy as np
import pytest
import reference
from programs import MeshRunner, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.models.utils import entmax
from gpt_neo_sampling.sampling.penalties import (
    exponential_decay,
    force_tokens,
    logit_bias,
    no_repeat_ngram_mask,
    presence_frequency_penalty,
    repetition_penalty,
    sequence_bias,
    token_counts,
    token_set_mask,
    tokens_mask,
)
from gpt_neo_sampling.sampling.prefix_function import NO_ROW, PrefixFunction, PrefixFunctions, prefix_mask
from gpt_neo_sampling.sampling.token_sequences import TokenSequences, banned, biased

ROWS, VOCAB, LENGTH = 1000, 16, 20
B, V, L = dims(batch=ROWS, vocab=VOCAB, length=LENGTH)
LOW, HIGH = np.finfo(np.float32).min, np.finfo(np.float32).max
LAYOUTS = (
    MeshRunner(),
    MeshRunner("x:4", "vocab:x,length:x"),
    MeshRunner("x:2,y:2", "batch:x,vocab:y"),
    MeshRunner("x:2,y:2", "length:x,vocab:y"),
)


@pytest.fixture(params=LAYOUTS, ids=str)
def runner(request):
    return request.param


def imp(mesh, value, *shape):
    return mtf.import_tf_tensor(mesh, value, mtf.Shape(shape))


def rows_of_logits(rng):
    """float32 [ROWS, VOCAB], with ties; zeros of both signs, masked and very large entries among them."""
    x = np.round(4 * rng.standard_normal((ROWS, VOCAB)), 1).astype(np.float32)
    for value in (0.0, -0.0, -np.inf, LOW, 3e38, -3e38):
        x[rng.random(x.shape) < 0.02] = value
    return x


def rows_of_ids(rng):
    """int32 [ROWS, LENGTH] of four tokens for the most part, so that n-grams repeat; some outside the vocabulary."""
    ids = rng.integers(3, 7, (ROWS, LENGTH))
    odd = rng.random(ids.shape) < 0.1
    return np.where(odd, rng.integers(-2, VOCAB + 2, ids.shape), ids).astype(np.int32)


def adjusted(x, new):
    """What float32 logits x become: `new`, where they are neither masked nor invalid, within float32's range."""
    usual = (x > LOW) & (x < np.inf)
    return np.where(usual, np.clip(new, LOW, HIGH), x)


def test_token_counts(runner):
    rng = np.random.default_rng(0)
    ids = rows_of_ids(rng)
    begin, end = rng.integers(-1, LENGTH + 2, (2, ROWS)).astype(np.int32)

    def build(mesh, ids, begin, end):
        i, b, e = imp(mesh, ids, B, L), imp(mesh, begin, B), imp(mesh, end, B)
        return [token_counts(i, V), token_counts(i, V, b, e), token_counts(i, V, 3, end)]

    got = runner(build, ids, begin, end)
    for counts, begins, ends in zip(got, ([0] * ROWS, begin, [3] * ROWS), ([LENGTH] * ROWS, end, end), strict=True):
        parts = [row[max(b, 0) : max(e, 0)] for row, b, e in zip(ids, begins, ends, strict=True)]
        np.testing.assert_array_equal(counts, reference.token_counts(parts, VOCAB))


def test_penalties(runner):
    """A number, and one a row; another order of dims; masked entries stay so, and nothing overflows."""
    rng = np.random.default_rng(1)
    x = rows_of_logits(rng)
    counts = rng.integers(0, 4, x.shape).astype(np.float32) * (rng.random(x.shape) < 0.5)
    penalty, presence, frequency = np.exp(rng.standard_normal((3, ROWS))).astype(np.float32)
    presence -= 1

    def build(mesh, x, counts, penalty, presence, frequency):
        y, c, moved = imp(mesh, x, B, V), imp(mesh, counts, B, V), imp(mesh, tf.transpose(x), V, B)
        return [
            repetition_penalty(y, c, 1.3),
            repetition_penalty(y, c, 0.5),
            repetition_penalty(moved, c, imp(mesh, penalty, B), V),
            presence_frequency_penalty(y, c, 0.5, -2),
            presence_frequency_penalty(y, c, frequency=1.1e38),
            presence_frequency_penalty(moved, c, imp(mesh, presence, B), frequency, V),
        ]

    got = runner(build, x, counts, penalty, presence, frequency)
    y, seen = x.astype(np.float64), counts > 0
    column = lambda a: a.astype(np.float64)[:, np.newaxis]  # noqa: E731
    want = [
        reference.repetition_penalty(x, counts, 1.3),
        reference.repetition_penalty(x, counts, 0.5),
        reference.repetition_penalty(x, counts, column(penalty)),
        y - 0.5 * seen + 2 * counts,
        y - np.float64(np.float32(1.1e38)) * counts,
        y - column(presence) * seen - column(frequency) * counts,
    ]
    for n, (g, w) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_allclose(g.T if n in (2, 5) else g, adjusted(x, w), rtol=1e-6, atol=1e-5, err_msg=n)


def test_penalties_of_half_precision():
    """Computed in float32, rounded once, within the dtype's range."""
    b, v = dims(batch=1, vocab=6)
    x = np.array([[60000, -60000, 3, np.finfo(np.float16).min, np.inf, 1]], np.float16)

    def build(mesh, x):
        y, ones = imp(mesh, x, b, v), mtf.ones(mesh, mtf.Shape([b, v]))
        return [repetition_penalty(y, ones, 0.1), presence_frequency_penalty(y, ones, frequency=1e4)]

    repetition, frequency = MeshRunner()(build, x)
    low, high = np.finfo(np.float16).min, np.finfo(np.float16).max
    np.testing.assert_array_equal(repetition, np.array([[high, -6000, 30, low, np.inf, 10]], np.float16))
    np.testing.assert_array_equal(frequency, np.array([[50000, low, 3 - 1e4, low, np.inf, 1 - 1e4]], np.float16))


def test_values_out_of_range(single):
    """A number is an error; in a tensor it makes its row NaN throughout, seen tokens or none."""
    b, v = dims(batch=4, vocab=3)
    bad = np.array([1, 0, np.inf, np.nan], np.float32)
    biases = np.zeros((4, 3), np.float32)
    biases[:, 1] = bad

    def build(mesh, bad, biases):
        x, none = mtf.ones(mesh, mtf.Shape([b, v])), mtf.zeros(mesh, mtf.Shape([b, v]))
        for error, make in {
            "repetition_penalty=0;": lambda: repetition_penalty(x, none, 0),
            "repetition_penalty=inf": lambda: repetition_penalty(x, none, np.inf),
            "presence_penalty=nan": lambda: presence_frequency_penalty(x, none, np.nan),
            "frequency_penalty=1e\\+300": lambda: presence_frequency_penalty(x, none, 0, 1e300),
            "counts of shape": lambda: repetition_penalty(x, mtf.ones(mesh, mtf.Shape([v])), 2),
            "no_repeat_ngram_size=0": lambda: no_repeat_ngram_mask(x, mtf.cast(none, tf.int32), 1, 0),
            "ids of shape": lambda: no_repeat_ngram_mask(x, mtf.zeros(mesh, mtf.Shape([v]), tf.int32), 1, 2),
            "logit_bias holds nan": lambda: logit_bias(x, [0, np.nan, -np.inf]),
            "logit_bias holds inf": lambda: logit_bias(x, [0, np.inf, -np.inf]),
            "logit_bias has shape": lambda: logit_bias(x, [0, 1]),
        }.items():
            with pytest.raises(ValueError, match=error):
                make()
        return [
            repetition_penalty(x, none, imp(mesh, bad, b)),
            presence_frequency_penalty(x, none, imp(mesh, bad, b)),
            presence_frequency_penalty(x, none, 0, imp(mesh, bad, b)),
            logit_bias(x, imp(mesh, biases, b, v)),
        ]

    repetition, presence, frequency, biased = single(build, bad, biases)
    np.testing.assert_array_equal(np.isnan(repetition), [[False] * 3, *[[True] * 3] * 3])
    for got in (presence, frequency):
        np.testing.assert_array_equal(np.isnan(got), [[False] * 3] * 2 + [[True] * 3] * 2)
    np.testing.assert_array_equal(np.isnan(biased).any(1), [False, False, True, True])


def test_no_repeat_ngram_mask(runner):
    rng = np.random.default_rng(2)
    x, ids = rows_of_logits(rng), rows_of_ids(rng)
    position = rng.integers(0, LENGTH + 1, ROWS).astype(np.int32)
    position[:4] = [0, 1, 2, LENGTH]
    sizes = [1, 2, 3, 4, LENGTH + 1]

    def build(mesh, x, ids, position):
        y, moved, i = imp(mesh, x, B, V), imp(mesh, tf.transpose(x), V, B), imp(mesh, ids, B, L)
        outs = [no_repeat_ngram_mask(y, i, imp(mesh, position, B), n) for n in sizes]
        return [*outs, no_repeat_ngram_mask(moved, i, LENGTH, 2, V)]

    *got, at_end = runner(build, x, ids, position)
    rows = [row[:n] for row, n in zip(ids, position, strict=True)]
    masked = 0
    for n, g in zip(sizes, got, strict=True):
        keep = reference.no_repeat_ngram_keep(rows, n, VOCAB)
        masked += not keep.all()
        np.testing.assert_array_equal(g, np.where(keep, x, LOW), err_msg=n)
    assert masked == 4
    np.testing.assert_array_equal(at_end.T, np.where(reference.no_repeat_ngram_keep(ids, 2, VOCAB), x, LOW))


def test_tokens_mask(runner):
    """Several entries, the same or others for each row; an id outside the vocabulary masks nothing."""
    rng = np.random.default_rng(23)
    x = rows_of_logits(rng)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    token = rng.integers(-1, VOCAB + 1, ROWS).astype(np.int32)
    when = rng.random(ROWS) < 0.5

    def build(mesh, x, token, when, dy):
        y, moved, dy = imp(mesh, x, B, V), imp(mesh, tf.transpose(x), V, B), imp(mesh, dy, B, V)
        by_row = tokens_mask(y, [imp(mesh, token, B)])
        half = tokens_mask(mtf.cast(mtf.maximum(mtf.minimum(y, 9.0), -9.0), tf.float16), [5])
        outs = [by_row, tokens_mask(moved, [3, token], V), tokens_mask(y, [5, tf.constant(16), -1]), tokens_mask(y, [])]
        outs += [tokens_mask(y, [3, token], when=imp(mesh, w, B)) for w in (when, tf.cast(when, tf.float32))]
        gradient = mtf.gradients([mtf.reduce_sum(by_row * dy)], [y])[0]
        return outs + [gradient, half, mtf.softmax(half, V), entmax(half, 1.3)]

    *got, gradient, half, softmax, sparse = runner(build, x, token, when, dy)
    entry = np.arange(VOCAB)
    kept = entry != token[:, np.newaxis]
    both = kept & (entry != 3)
    when = np.where(both | ~when[:, np.newaxis], x, LOW)
    want = [np.where(kept, x, LOW), np.where(both, x, LOW).T, np.where(entry == 5, LOW, x), x, when, when]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    np.testing.assert_array_equal(gradient, np.where(kept, dy, 0))
    assert half.dtype == np.float16 and np.all(half[:, 5] == np.finfo(np.float16).min)
    assert not softmax[:, 5].any() and not sparse[:, 5].any()


def test_invalid_rows_stay_invalid(single):
    """NaN and +inf are not masked, and no finite number takes their place."""
    b, v = dims(batch=2, vocab=4)
    x = np.array([[1, np.nan, 2, 3], [1, np.inf, 2, 3]], np.float32)
    only = np.array([0, -np.inf, 0, 0], np.float32)

    def build(mesh, x, only):
        y, ones = imp(mesh, x, b, v), mtf.ones(mesh, mtf.Shape([b, v]))
        ids = mtf.cast(ones, tf.int32)
        return [
            tokens_mask(y, [1]),
            no_repeat_ngram_mask(y, ids, 4, 1),
            logit_bias(y, only),
            repetition_penalty(y, ones, 2),
            presence_frequency_penalty(y, ones, 2, 2),
        ]

    for got in single(build, x, only):
        assert np.all(~np.isfinite(got[:, 1]) & (got[:, 1] != -np.inf))


def test_logit_bias(runner):
    """[dim] and one a row, as an array, a tf tensor and an mtf tensor; −inf masks."""
    rng = np.random.default_rng(3)
    x = rows_of_logits(rng)
    bias = rng.standard_normal(x.shape).astype(np.float32)
    bias[rng.random(x.shape) < 0.1] = -np.inf
    bias[rng.random(x.shape) < 0.02] = 3e38

    def build(mesh, x, bias_in):
        y, moved = imp(mesh, x, B, V), imp(mesh, tf.transpose(x), V, B)
        return [
            logit_bias(y, bias[0]),
            logit_bias(y, bias_in[0]),
            logit_bias(moved, bias_in, V),
            logit_bias(y, imp(mesh, tf.transpose(bias_in), V, B)),
            logit_bias(y, list(bias[0])),
        ]

    got = runner(build, x, bias)
    y = x.astype(np.float64)
    by_dim, by_row = adjusted(x, y + bias[0]), adjusted(x, y + bias)
    for g, w in zip(got, [by_dim, by_dim, by_row.T, by_row, by_dim], strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6)
    assert np.all(got[3][np.isneginf(bias)] <= LOW)


# of one to four tokens, of which three to six are frequent in `rows_of_ids`; several with the same last token
BIASES = {
    (4,): 0.5, (9,): -2.0, (3, 4): 1.0, (4, 4): -1.5, (5, 4): 0.25, (3, 3, 4): 3.0, (6, 3, 3, 4): -7.0, (3, 5): 2.0,
    (5, 6, 7): -0.75, (6, 6): -np.inf, (4, 5, 11): 1e38, (5, 11): 1e38,
}  # fmt: skip
BANNED = [[12], [3, 8], [4, 4, 5], [6, 5, 4, 3], [5, 5]]


def test_sequence_bias(runner):
    """As numbers in the graph, fed, and where the row is shorter than a sequence."""
    rng = np.random.default_rng(31)
    x, ids = rows_of_logits(rng), rows_of_ids(rng)
    position = rng.integers(0, LENGTH + 1, ROWS).astype(np.int32)
    position[:4] = [0, 1, 2, LENGTH]
    both = [TokenSequences.of(pairs) for pairs in (biased(BIASES, VOCAB), banned(BANNED, VOCAB))]
    fed = both[0].arrays()

    def build(mesh, x, ids, position, *fed):
        y, moved, i = imp(mesh, x, B, V), imp(mesh, tf.transpose(x), V, B), imp(mesh, ids, B, L)
        at = imp(mesh, position, B)
        outs = [sequence_bias(y, sequences, i, at) for sequences in (*both, TokenSequences(*fed))]
        return [*outs, sequence_bias(moved, both[0], i, LENGTH, V)]

    added, masked, as_fed, at_end = runner(build, x, ids, position, *fed)
    rows = [row[:n].tolist() for row, n in zip(ids, position)]

    def after(rows, biases):
        return adjusted(x, np.array([reference.sequence_bias(*pair, biases) for pair in zip(x, rows)]))

    want = after(rows, BIASES)
    np.testing.assert_allclose(added, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(as_fed, added)
    np.testing.assert_allclose(at_end.T, after(ids.tolist(), BIASES), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(masked, after(rows, {tuple(word): -np.inf for word in BANNED}))
    n_changed = [(after(rows, {sequence: bias}) != x).any(1).sum() for sequence, bias in BIASES.items()]
    assert min(n_changed) >= 3, n_changed
    assert biased([[np.array([3, 4]), np.float32(0.5)]], VOCAB) == [[[3, 4], 0.5]]


def test_biases_of_one_token_are_added_in_one_order():
    """By halving: (((1, 2), …) of powers of two sum up to what float32 rounds at each step."""
    numbers = [1.0, 2.0**-24, 2.0**-24, -1.0, 2.0**-30, 3.0, -3.0]
    sequences = TokenSequences.of(([3] * i + [4], bias) for i, bias in enumerate(numbers))
    added = np.array(numbers + [0], np.float32)
    while len(added) > 1:
        added = added[: len(added) // 2] + added[len(added) // 2 :]
    assert added != np.float32(np.sum(numbers))

    def build(mesh, x, ids):
        return sequence_bias(imp(mesh, x, B, V), sequences, imp(mesh, ids, B, L), LENGTH)

    x, ids = np.zeros((ROWS, VOCAB), np.float32), np.full((ROWS, LENGTH), 3, np.int32)
    for runner in LAYOUTS:
        np.testing.assert_array_equal(runner(build, x, ids)[:, 4], np.repeat(added, ROWS))


def test_sets_of_tokens(runner):
    """As ids, as flags, as a fed tensor; masked, allowed, forced."""
    rng = np.random.default_rng(32)
    x, when = rows_of_logits(rng), (rng.random(ROWS) < 0.5).astype(np.float32)
    x[0, 2], x[1, 2], x[:2, 5] = np.nan, np.inf, 1
    when[:2] = 1
    flags = np.isin(np.arange(VOCAB), [1, 5, 7]).astype(np.float32)

    def build(mesh, x, when, flags):
        y, w, f = imp(mesh, x, B, V), imp(mesh, when, B), imp(mesh, flags, V)
        return {
            "masked": [token_set_mask(y, [1, 5, 7]), token_set_mask(y, f), token_set_mask(y, flags > 0)],
            "allowed": [token_set_mask(y, np.array([1, 5, 7]), allowed=True)],
            "masked when": [token_set_mask(y, f, when=w)],
            "forced": [force_tokens(y, [1, 5, 7], w), force_tokens(imp(mesh, tf.transpose(x), V, B), f, w, V)],
            "one forced": [force_tokens(y, 5, w)],
        }

    got = runner(build, x, when, flags)
    got["forced"][1] = got["forced"][1].T
    inside, valid = flags > 0, x < np.inf
    is_on = (when[:, np.newaxis] > 0) & valid
    one = np.where(np.arange(VOCAB) == 5, 0, LOW)
    want = {
        "masked": np.where(inside & valid, LOW, x),
        "allowed": np.where(~inside & valid, LOW, x),
        "masked when": np.where(inside & is_on, LOW, x),
        "forced": np.where(is_on, np.where(inside, 0, LOW), x),
        "one forced": np.where(is_on, one, x),
    }
    for name, outs in got.items():
        for out in outs:
            np.testing.assert_array_equal(out, want[name], err_msg=name)


def test_exponential_decay(runner):
    rng = np.random.default_rng(33)
    x = rows_of_logits(rng)
    n_late = rng.integers(-5, 40, ROWS).astype(np.int32)
    factor = rng.choice([0.5, 1, 1.01, 1.5, 3, 1e6], ROWS).astype(np.float32)
    bad = np.resize([0, -1, np.nan, np.inf], 8)

    def build(mesh, x, n_late, factor):
        y, n = imp(mesh, x, B, V), imp(mesh, n_late, B)
        one = exponential_decay(y, [3, tf.fill([ROWS], 8), VOCAB], n, 1.5, 40)
        own = exponential_decay(imp(mesh, tf.transpose(x), V, B), [3, 8], n, imp(mesh, factor, B), 40, V)
        wrong = exponential_decay(y, [3], n, tf.concat([tf.constant(bad, tf.float32), factor[8:]], 0), 40)
        return one, own, exponential_decay(y, [], n, 1.5, 40), wrong

    one, own, none, wrong = runner(build, x, n_late, factor)

    def want(factor):
        each = zip(x, n_late, np.broadcast_to(factor, ROWS).astype(np.float64))
        return adjusted(x, np.array([reference.exponential_decay(row, [3, 8], n, 0, f) for row, n, f in each]))

    np.testing.assert_allclose(one, want(1.5), rtol=1e-5)
    np.testing.assert_allclose(own.T, want(factor), rtol=1e-5, atol=1e-12)  # where the reference's sum cancels
    np.testing.assert_array_equal(none, x)
    usual = (x[:8] > LOW) & (x[:8] < np.inf)
    assert np.isnan(wrong[:8][usual]).all() and not np.isnan(wrong[8:]).any()


def test_a_function_of_the_prefix(runner):
    """Asked about each row that is not done and has a number, with the ids that it has."""
    rng = np.random.default_rng(34)
    x, ids = rows_of_logits(rng), rows_of_ids(rng)
    x[0, 2] = np.nan
    position = rng.integers(0, LENGTH + 1, ROWS).astype(np.int32)
    done, numbers = rng.random(ROWS) < 0.2, np.where(np.arange(ROWS) % 9 == 8, NO_ROW, np.arange(ROWS) * 3)
    asked = {}

    def allowed(number, prefix):
        asked[number] = prefix.tolist()
        return {(number + len(prefix)) % VOCAB, 5}

    def build(mesh, x, ids, position, done, numbers):
        fn = PrefixFunctions({0: PrefixFunction(allowed)}, rows=imp(mesh, numbers, B))
        return prefix_mask(imp(mesh, x, B, V), fn, imp(mesh, ids, B, L), imp(mesh, position, B), imp(mesh, done, B))

    got = runner(build, x, ids, position, done, numbers.astype(np.int32))
    want, calls = x.copy(), {}
    for row in np.flatnonzero(~done & (numbers != NO_ROW)):
        keep = np.isin(np.arange(VOCAB), [(numbers[row] + position[row]) % VOCAB, 5])
        want[row] = np.where(keep | np.isnan(x[row]), x[row], LOW)
        calls[int(numbers[row])] = ids[row, : position[row]].tolist()
    np.testing.assert_array_equal(got, want)
    assert asked == calls

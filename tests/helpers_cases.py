"""Graphs that must give the same results on every mesh implementation and backend.

Each `Case` is a graph and its inputs, with its values on one device without XLA or
TensorFlow's optimizer. test_simd.py and test_xla.py compare theirs with those.
"""

import functools

import numpy as np
from helpers_model import features, two_layers
from programs import Program, dims
from simd import constant_weights

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import take
from gpt_neo_sampling.models.utils import entmax, sample_categorical
from gpt_neo_sampling.sample import sample_autoregressive
from gpt_neo_sampling.sampling.categorical import grouped_draw, score_draw
from gpt_neo_sampling.sampling.dry import dry_penalty
from gpt_neo_sampling.sampling.dynamic_temperature import dynamic_temperature
from gpt_neo_sampling.sampling.information import surprise
from gpt_neo_sampling.sampling.masks import (
    epsilon_mask,
    eta_mask,
    min_p_mask,
    mirostat_mask,
    top_k_mask,
    top_p_mask,
    typical_p_mask,
    xtc_mask,
)
from gpt_neo_sampling.sampling.penalties import (
    exponential_decay,
    force_tokens,
    logit_bias,
    no_repeat_ngram_mask,
    presence_frequency_penalty,
    repetition_penalty,
    sequence_bias,
    token_counts,
    token_flags,
    token_set_mask,
    tokens_mask,
)
from gpt_neo_sampling.sampling.random import counter_bits, threefry_2x32
from gpt_neo_sampling.sampling.token_sequences import TokenSequences

BATCH = 8
LOWEST = np.finfo(np.float32).min


class Case:
    """build(mesh, *tensors), with a tensor for each of `arrays`, returns mtf tensors by name.

    `further_arrays`, {prefix: arrays}, are fed to the same graph; their results get the prefix.
    """

    def __init__(self, name, build, arrays, further_arrays=None):
        self.name, self.build = name, build
        all_arrays = {"": arrays, **(further_arrays or {})}
        self._feeds = {prefix: [np.asarray(a) for a in arrays] for prefix, arrays in all_arrays.items()}
        self.arrays = self._feeds[""]
        self.inputs = [(tf.as_dtype(a.dtype), a.shape) for a in self.arrays]

    def __str__(self):
        return self.name

    def values(self, program):
        """The results of a program of this graph for all inputs, by name."""
        return {
            prefix + name: value for prefix, arrays in self._feeds.items() for name, value in program(*arrays).items()
        }

    @functools.cached_property
    def single(self):
        """The results on one device, without XLA."""
        return self.values(Program(self.build, self.inputs))


def assert_same(got, want, atol=0):
    """Asserts that two dicts, {name: values}, are equal; NaN equals NaN."""
    assert got.keys() == want.keys()
    wrong = []
    for name in want:
        try:
            np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol)
        except AssertionError as e:
            wrong.append(f"{name}: {e}")
    assert not wrong, "\n".join(wrong)


# --- Draws ------------------------------------------------------------------------------

SIZES = [512, 200]  # the second has groups of 4, which shards of 50 and 25 cut through
EDGES = np.array([0, 2**-24, 0.25, 0.75, 1 - 2**-23, 0.3, 1 - 2**-24, 0.5], np.float32)
ROWS_ALPHAS = np.array([1, 1.3, 1.5, 2, 1.01, 1.7, 1.3, 1.5], np.float32)


def weights(size):
    """The rows from BATCH on are invalid: by entries in the first shard, in the last, or everywhere."""
    rng = np.random.default_rng(size)
    w = np.exp(2 * rng.standard_normal((BATCH, size)))
    w[1] *= rng.random(size) < 0.3
    w[2] = np.arange(size) == size // 3
    w[3] = np.arange(size) == size - 1
    w[4] = 10 ** rng.uniform(-37, 38, size)
    w[5, size // 8 :] = 0
    w[6, : -size // 8] = 0
    w[7] = 1
    bad = w.copy()
    bad[0, 1] = np.nan
    bad[1, -2] = -1e-20
    bad[2, 0] = np.inf
    bad[3] = 0
    bad[4, -1] = np.nan
    bad[5] = -np.inf
    bad[6, [0, -1]] = np.inf
    bad[7] = -0.0
    return np.concatenate([w, bad]).astype(np.float32)


def good_scores(size):
    """Some rows have shards with only −inf or masked entries; the last row is constant."""
    rng = np.random.default_rng(size + 1)
    x = 2 * rng.standard_normal((BATCH, size))
    x[1] *= 0.05
    x[2, rng.random(size) < 0.5] = -np.inf
    x[3, rng.random(size) < 0.5] = LOWEST
    x[4, size // 8 :] = LOWEST
    x[5, : -size // 8] = -np.inf
    x[6, size // 2 :] = -np.inf
    x[6, : size // 8] = LOWEST
    x[7] = 0
    return x.astype(np.float32)


def scores_from_largest(size):
    x = good_scores(size)
    return x - x.max(1, keepdims=True)


def _draws(mesh, edges, alphas, *arrays):
    batch, pairs, samples = dims(batch=BATCH, pair=BATCH, samples=48)
    rows, grid = mtf.Shape([batch]), mtf.Shape([batch, pairs])
    row, pair = mtf.range(mesh, batch, tf.int32), mtf.range(mesh, pairs, tf.int32)
    edges, alphas = (mtf.import_tf_tensor(mesh, x, rows) for x in (edges, alphas))
    seed = mtf.import_tf_tensor(mesh, tf.constant(-3), mtf.Shape([]))
    out = {}

    def words(row, pair):
        row, pair = tf.bitcast(row * 1000003, tf.uint32)[:, tf.newaxis], tf.bitcast(pair - 4, tf.uint32)
        x0, x1 = threefry_2x32((row, row + pair), (pair, row))
        return tf.bitcast(x0, tf.int32), tf.bitcast(x1, tf.int32)

    out["threefry"] = list(
        mtf.slicewise(words, [row, pair], [grid, grid], [tf.int32, tf.int32], splittable_dims=grid.dims)
    )
    out["bits"] = list(counter_bits(seed, row, row * 7, mtf.range(mesh, samples, tf.int32)))
    for size, weights, scores in zip(SIZES, arrays[0::2], arrays[1::2]):
        batch, vocab = dims(batch=2 * BATCH, vocab=size)
        weights = mtf.import_tf_tensor(mesh, weights, mtf.Shape([batch, vocab]))
        scores = mtf.import_tf_tensor(mesh, scores, rows + vocab)
        stream = mtf.range(mesh, batch, tf.int32) * 5
        out[f"{size} one"] = sample_categorical(weights, vocab, seed=11, step=3)
        # (many of the last size come of bfloat16)
        of = weights if size == SIZES[0] else mtf.cast(weights, tf.bfloat16)
        out[f"{size} many"] = sample_categorical(of, vocab, seed=12, stream=stream, samples_dim=samples)
        # the last row's draw lies on a boundary, so the exact draw runs too
        out[f"{size} scores"] = score_draw(scores, edges, edges, vocab, alphas if size == SIZES[0] else None)
    every_edge = mtf.import_tf_tensor(mesh, np.tile(EDGES, 2), mtf.Shape([batch]))
    out["edges"] = grouped_draw(weights, every_edge, every_edge, vocab)
    return out


DRAWS = Case(
    "draws",
    _draws,
    [EDGES, ROWS_ALPHAS] + [f(size) for size in SIZES for f in (weights, scores_from_largest)],
)

# --- entmax and masks ----------------------------------------------------------------------

VOCAB = 512
ALPHAS = [1.0, 1.3, 1.5, 2.0]


def bad_scores(size):
    """All rows but the last two are invalid."""
    x = good_scores(size)
    x[0, 5] = np.nan
    x[1, -5] = np.nan
    x[2, -1] = np.inf
    x[3, 0] = np.inf
    x[4] = -np.inf
    x[5, 0], x[5, -1] = np.nan, np.inf
    return x


def _entmaxes(mesh, good, bad, alphas):
    batch, vocab = dims(batch=BATCH, vocab=VOCAB)
    good, bad = (mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab])) for x in (good, bad))
    out = {f"alpha {alpha}": entmax(good, alpha, vocab) for alpha in ALPHAS}
    out["a row's own"] = entmax(good, mtf.import_tf_tensor(mesh, alphas, mtf.Shape([batch])), vocab)
    out["invalid rows"] = entmax(bad, 1.3, vocab)
    return out


ENTMAX = Case("entmax", _entmaxes, [good_scores(VOCAB), bad_scores(VOCAB), ROWS_ALPHAS])

KS = [1, 2, 3, 4, 40]


def _masks(mesh, good, bad, ks, tokens):
    batch, vocab = dims(batch=BATCH, vocab=VOCAB)
    good, bad = (mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab])) for x in (good, bad))
    ks, tokens = (mtf.import_tf_tensor(mesh, x, mtf.Shape([batch])) for x in (ks, tokens))
    out = {f"top {k}": top_k_mask(good, k, vocab) for k in KS}
    out["top k, a row's own"] = top_k_mask(good, ks, vocab, max_top_k=40)
    out["ties"] = top_k_mask(mtf.cwise(tf.round, [good]), 40, vocab)  # 0.0 and −0.0 among them
    out["token"] = tokens_mask(good, [5], vocab)
    out["tokens, one a row's own"] = tokens_mask(bad, [5, tokens], vocab)
    return out


ROWS_KS = np.array([1, 2, 3, 0, 40, 39, VOCAB, -1], np.int32)
ROWS_TOKENS = np.arange(BATCH, dtype=np.int32) * 70
MASKS = Case("masks", _masks, [good_scores(VOCAB), bad_scores(VOCAB), ROWS_KS, ROWS_TOKENS])


def _penalties(mesh, good, bad, ids, values):
    batch, vocab, length = dims(batch=BATCH, vocab=VOCAB, length=12)
    good, bad = (mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab])) for x in (good, bad))
    ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch, length]))
    values = mtf.import_tf_tensor(mesh, values, mtf.Shape([batch]))
    bias = np.where(np.arange(VOCAB) % 7, np.linspace(-3, 3, VOCAB), -np.inf)
    breakers = token_flags(mesh, [0, 340], vocab, "breakers")
    out = {"counts": token_counts(ids, vocab, 2, mtf.cast(values * 6, tf.int32))}
    for name, x in (("good", good), ("bad", bad)):
        out[f"repetition, {name}"] = repetition_penalty(x, out["counts"], values, vocab)
        out[f"presence, {name}"] = presence_frequency_penalty(x, out["counts"], values, -0.25, vocab)
        out[f"n-grams, {name}"] = no_repeat_ngram_mask(x, ids, mtf.cast(values * 8, tf.int32), 2, vocab)
        out[f"bias, {name}"] = logit_bias(x, bias, vocab)
        out[f"sequences, {name}"] = sequence_bias(x, SEQUENCES, ids, mtf.cast(values * 8, tf.int32), vocab)
        out[f"set, {name}"] = token_set_mask(x, [5, 170, 340], vocab, allowed=True)
        out[f"forced, {name}"] = force_tokens(x, [5, 170], mtf.cast(mtf.greater(values, 1.2), tf.float32), vocab)
        at = mtf.cast(values * 8, tf.int32)
        out[f"dry, {name}"] = dry_penalty(x, ids, at, values * 0.7, values * 1.3, 1, breakers, vocab)
        late = mtf.cast(values * 9, tf.int32)
        out[f"decay, {name}"] = exponential_decay(x, [5, 300], late, values * 1.1, 30, vocab)
    return out


SEQUENCES = TokenSequences.of(
    {(170, 340): 1.1, (340, 340): -0.3, (0, 340): 0.7, (340,): 1e-7, (0, 170): -np.inf}.items()
)
ROWS_IDS = np.random.default_rng(8).integers(-1, 4, (BATCH, 12)).astype(np.int32) * 170
PENALTIES = Case("penalties", _penalties, [good_scores(VOCAB), bad_scores(VOCAB), ROWS_IDS, ROWS_ALPHAS])
# more entries than a shard looks at one by one; and so many ties that the search continues with their indices
WIDE = 2048
LIKELY = {
    "top-p": (top_p_mask, 0.9),
    "min-p": (min_p_mask, 0.05),
    "typical": (typical_p_mask, 0.8),
    "epsilon": (epsilon_mask, 1e-3),
    "eta": (eta_mask, 1e-3),
}


def _likely_masks(mesh, good, bad, top_ps):
    batch, vocab = dims(batch=BATCH, vocab=WIDE)
    good, bad = (mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab])) for x in (good, bad))
    top_ps = mtf.import_tf_tensor(mesh, top_ps, mtf.Shape([batch]))
    out = {name: mask(good, value, vocab) for name, (mask, value) in LIKELY.items()}
    out["top-p, a row's own"] = top_p_mask(bad, top_ps, vocab)
    out["top-p, ties"] = top_p_mask(mtf.cwise(tf.round, [good]), 0.9, vocab)
    out["typical, ties"] = typical_p_mask(mtf.cwise(tf.round, [good]), 0.9, vocab)
    return out


ROWS_TOP_PS = np.array([0.9, 0.5, 0.1, 0.9, 1, 0.7, 0, 0.99], np.float32)
LIKELY_MASKS = Case("likely masks", _likely_masks, [good_scores(WIDE), bad_scores(WIDE), ROWS_TOP_PS])


def _newer_masks(mesh, good, bad, bits, chances, thresholds, numbers):
    batch, vocab = dims(batch=BATCH, vocab=VOCAB)
    good, bad = (mtf.import_tf_tensor(mesh, x, mtf.Shape([batch, vocab])) for x in (good, bad))
    bits, chances, thresholds, numbers = (
        mtf.import_tf_tensor(mesh, x, mtf.Shape([batch])) for x in (bits, chances, thresholds, numbers)
    )
    out = {}
    for name, x in (("good", good), ("bad", bad)):
        out[f"XTC, {name}"] = xtc_mask(x, chances, thresholds, bits, vocab)
        out[f"mirostat, {name}"] = mirostat_mask(x, mtf.cast(numbers, tf.float32) * 0.1, vocab)
        out[f"surprise, {name}"] = surprise(x, numbers * 5, vocab)
        out[f"temperature, {name}"] = dynamic_temperature(x, chances, 0.3, thresholds * 10, vocab)
    ties = mtf.cwise(tf.round, [good])
    out["XTC, ties"] = xtc_mask(ties, 1, thresholds, bits, vocab)
    out["so many, ties"] = epsilon_mask(ties, 0.02, vocab, min_tokens_to_keep=numbers)
    out["so many, bad"] = typical_p_mask(bad, 0.1, vocab, min_tokens_to_keep=numbers)
    out["ten"] = top_p_mask(good, 0.1, vocab, min_tokens_to_keep=10)
    return out


ROWS_BITS = np.array([0, -1, 2**30, -(2**31), 5, 2**29, -(2**30), 1], np.int32)
ROWS_CHANCES = np.array([0.5, 1, 0.3, 0.5, 0.01, 0.2, 1, 0], np.float32)
ROWS_THRESHOLDS = np.array([0.01, 0.02, 0.05, 0.1, 0.003, 0, 0.01, 0.1], np.float32)
ROWS_NUMBERS = np.array([1, 100, 3, 50, 7, 0, 20, 2], np.int32)
NEWER_MASKS = Case(
    "newer masks",
    _newer_masks,
    [good_scores(VOCAB), bad_scores(VOCAB), ROWS_BITS, ROWS_CHANCES, ROWS_THRESHOLDS, ROWS_NUMBERS],
)

# --- The decode loop ----------------------------------------------------------------------

WORDS, LENGTH = 64, 12  # the table's vocabulary, and the length of a row
PAD, STOP = 0, 1


class TableModel:
    """A model with GPT-Neo's signature; the next token's logits are the table's row for the last token."""

    def __init__(self, table):
        self._table = table  # [row, vocab]

    def __call__(self, mtf_features, other_features, params, mesh, variable_dtype, context=None):
        last = mtf_features["inputs"]
        row_dim, vocab_dim = self._table.shape.dims
        if context is None or context.mode == "first_part":
            return take(self._table, last, row_dim), None, None
        last = take(last, context.position - 1, last.shape[-1])
        logits = take(self._table, last, row_dim)
        return mtf.reshape(logits, last.shape + [mtf.Dimension("sequence", 1), vocab_dim]), None, None


def _tables():
    """A table of logits; and a table with invalid rows, and shards that are all −inf or masked."""
    rng = np.random.default_rng(4)
    table = (2 * rng.standard_normal((WORDS, WORDS))).astype(np.float32)
    table[:, STOP] += 2  # some rows end early
    hard = table.copy()
    hard[20:30, WORDS // 8 :] = -np.inf
    hard[30:40, : -WORDS // 8] = LOWEST
    hard[40:44, 3], hard[44:48, -3], hard[48:52, -1] = np.nan, np.inf, np.nan
    hard[52:56] = -np.inf
    return table, hard


def _prompts():
    tokens = np.random.default_rng(5).integers(2, WORDS, (BATCH, LENGTH))
    lengths = np.array([1, 2, 5, LENGTH, 0, 3, LENGTH - 1, 4])
    # the first logits are looked up by these: each kind of row in the hard table
    tokens[np.arange(BATCH), lengths - 1] = [33, 22, 41, 9, 9, 25, 53, 46]
    return np.where(np.arange(LENGTH) < lengths[:, np.newaxis], tokens, PAD).astype(np.int32)


# for each option one value a row; the second row is greedy
_MIXED = {
    "temperature": np.array([0.9, 0, 0.3, 1, 2, 0.5, 0.7, 1.5], np.float32),
    "sampling_keep_top_k": np.array([-1, 5, 1, 3, 0, 8, 2, WORDS], np.int32),
    "max_top_k": 8,
    "entmax_alpha": np.array([1.3, 1, 1.5, 2, 1.05, 1.7, 1.25, 1.9], np.float32),
    "sampling_use_entmax": True,
    "seed": np.array([1, -5, 2**31 - 1, 0, 77, 1, 77, 3], np.int32),
}
_CONTROLS = {
    "repetition_penalty": np.array([1, 1.2, 0.7, 1, 1.5, 1, 1.1, 1], np.float32),
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": np.array([0, 3, 0, 2, 0, 0, 1, 0], np.int32),
    "top_p": np.array([0.9, 1, 0.5, 0.95, 1, 0.8, 0, 0.99], np.float32),
    "min_p": 0.01,
    "typical_p": np.array([1, 0.5, 1, 0.9, 0.95, 1, 1, 0.8], np.float32),
    "epsilon_cutoff": 1e-3,
    "eta_cutoff": 2e-3,
}
_MORE_CONTROLS = {
    "temperature": np.array([0.9, 0, 0.3, 1, 2, 0.5, 0.7, 1.5], np.float32),
    "seed": np.array([1, -5, 2**31 - 1, 0, 77, 1, 77, 3], np.int32),
    "sequence_bias": {(5, 6): 2.0, (9,): 1.5, (20, 9): -3.0, (33, 22, 9): 1.0},
    "bad_words_ids": [[7], [8, 10], [22, 25]],
    "dry_multiplier": np.array([0, 0.8, 2, 0, 1, 1, 0.5, 1], np.float32),
    "dry_allowed_length": 1,
    "dry_sequence_breakers": [4, 5],
    "min_length": np.array([0, 5, 0, 9, 0, 3, 0, 9], np.int32),
    "allowed_token_ids": list(range(1, WORDS - 3)),
    "forced_eos_token_id": [1, 3],
    "exponential_decay_length_penalty": (2, np.array([1, 1.1, 1.5, 1.2, 1, 2, 1.3, 1.1], np.float32)),
    "suppress_tokens": [11, 12],
    "begin_suppress_tokens": list(range(13, 30)),
    "dynatemp_range": np.array([0, 0.2, 0.3, 0.5, 1, 0, 0.7, 1], np.float32),
    "dynatemp_exponent": 1.3,
    "min_tokens_to_keep": np.array([1, 1, 2, 3, 5, 4, 2, 1], np.int32),
    "top_p": np.array([0.9, 1, 0.2, 0.3, 1, 0.4, 0.1, 0.5], np.float32),
    "typical_p": np.array([1, 0.5, 1, 0.5, 0.3, 1, 1, 0.4], np.float32),
    "xtc_probability": np.array([0.5, 1, 0, 1, 0.7, 0.4, 0.5, 1], np.float32),
    "xtc_threshold": 0.05,
}
_MIROSTAT = {
    "temperature": np.array([0.9, 0, 0.7, 1, 2, 1.5, 0.7, 1.5], np.float32),
    "seed": 5,
    "mirostat": np.array([2, 2, 2, 0, 2, 2, 2, 2], np.int32),
    "mirostat_tau": np.array([3, 2, 1, 2, 2.5, 0.5, 4, 2], np.float32),
    "mirostat_eta": np.array([0.1, 0.2, 0.5, 1, 0.3, 0.1, 1, 0], np.float32),
}
LOOPS = {
    "more controls, mixed rows": dict(_MORE_CONTROLS, return_logprobs=True, top_logprobs=3),
    "mirostat, mixed rows": _MIROSTAT,
    "greedy": dict(temperature=0),
    "top-k, never_end": dict(temperature=0.7, sampling_keep_top_k=5, never_end=True, seed=4),
    "entmax, slow_sampling": dict(sampling_use_entmax=True, params={"slow_sampling": True}, seed=7),
    "mixed rows": _MIXED,
    "controls, mixed rows": dict(_MIXED, **_CONTROLS, remove_partial_sequences=True),
}


def _loops(names, mesh, ids, table):
    batch, length, row, vocab = dims(batch=BATCH, sequence=LENGTH, row=WORDS, vocab=WORDS)
    ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch, length]))
    model = TableModel(mtf.import_tf_tensor(mesh, table, mtf.Shape([row, vocab])))
    found = {}
    for name in names:
        options = LOOPS[name]
        tokens = sample_autoregressive(
            ids,
            {"vocab_dim": vocab},
            {"padding_id": PAD, **options.get("params", {})},
            stop_at_token=STOP,
            bos_id=2,
            model=model,
            **{k: v for k, v in options.items() if k != "params"},
        )
        if isinstance(tokens, tuple):  # with log-probabilities, whose last bits may differ
            tokens, _, _, found[f"{name}: ranks"], found[f"{name}: likeliest"], _ = tokens
        found[name] = tokens
    return found


_TABLE, _HARD = _tables()
MIXED_LOOP = Case(
    "loop of mixed rows",
    functools.partial(_loops, ["mixed rows"]),
    [_prompts(), _TABLE],
    {"hard, ": [_prompts(), _HARD]},
)
_NEWER = ["more controls, mixed rows", "mirostat, mixed rows"]
OTHER_LOOPS = Case(
    "other loops",
    functools.partial(_loops, [name for name in LOOPS if name not in ("mixed rows", *_NEWER)]),
    [_prompts(), _TABLE],
    {"hard, ": [_prompts(), _HARD]},
)
NEWER_LOOPS = Case(
    "newer loops", functools.partial(_loops, _NEWER), [_prompts(), _TABLE], {"hard, ": [_prompts(), _HARD]}
)

# --- The bundled model --------------------------------------------------------------------

NEW_TOKENS = 8
_MODEL_BATCH, _MODEL_LENGTH = 4, 16

# greedy, softmax, entmax and top-k in one loop
_MODEL_OPTIONS = dict(
    temperature=np.array([0.9, 0, 0.5, 1], np.float32),
    sampling_keep_top_k=np.array([-1, 40, 40, -1], np.int32),
    max_top_k=40,
    sampling_use_entmax=True,
    entmax_alpha=np.array([1, 1.3, 1.3, 1.3], np.float32),
    seed=1,
)


def _model_loop(mesh, ids, *weights, use_tpu=False):
    params, names = two_layers()
    params = {**params, "use_tpu": use_tpu}
    shape, other = features(mesh, params, _MODEL_BATCH, _MODEL_LENGTH)
    with constant_weights(dict(zip(names, weights))):
        ids = mtf.import_tf_tensor(mesh, ids, shape)
        return {"tokens": sample_autoregressive(ids, other, params, max_steps=NEW_TOKENS, **_MODEL_OPTIONS)}


def _model_prompts():
    tokens = np.random.default_rng(6).integers(1, 2048, (_MODEL_BATCH, _MODEL_LENGTH))
    lengths = np.array([1, 5, 8, 3])
    return np.where(np.arange(_MODEL_LENGTH) < lengths[:, np.newaxis], tokens, 0).astype(np.int32)


MODEL = Case("bundled model", _model_loop, [_model_prompts(), *two_layers()[1].values()])
TPU_MODEL = Case("bundled model, use_tpu", functools.partial(_model_loop, use_tpu=True), MODEL.arrays)

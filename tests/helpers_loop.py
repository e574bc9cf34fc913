"""Decode loops for tests: a simulation in NumPy float64, and models whose logits come from a table.

`follow` goes through the tokens of a result and computes for each what had to be
drawn there.
"""

import numpy as np
import reference
from helpers_model import features
from programs import ONE_DEVICE, Program, dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.sample import INVALID, sample_autoregressive

VOCAB, BATCH, LENGTH = 192, 8, 24  # 64 groups of 3 entries
PAD, STOP, BOS = 0, 1, 7
DEFAULT_STOP = DEFAULT_BOS = 50256

# --- The simulation ---------------------------------------------------------------


def uniforms(seed, stream, step):
    words = reference.threefry2x32(int(seed) % 2**32, int(stream) % 2**32, step, 0)
    return [float(reference.bits_to_uniform(word)) for word in words]


def weights_of(logits, temperature, top_k, alpha):
    """The documented order: temperature, top-k, then softmax (alpha None) or entmax."""
    z = (logits.astype(np.float64) - logits.max()) / temperature
    if top_k is not None and 1 <= top_k < len(z):
        z = np.where(reference.top_k_keep(z, int(top_k)), z, -np.inf)
    return reference.softmax(z) if alpha is None else reference.entmax(z, float(alpha))


def boundary_distance(weights, u1, u2, groups=64):
    """How far the uniforms are from the nearest values that would draw another index."""
    size = -(-len(weights) // groups)
    totals = np.add.reduceat(weights, range(0, len(weights), size))
    cdf = np.cumsum(totals) / totals.sum()
    group = np.argmax(cdf > u1)
    part = weights[group * size : (group + 1) * size]
    inner = np.cumsum(part) / part.sum()
    return min(np.abs(cdf[:-1] - u1).min(initial=1.0), np.abs(inner[:-1] - u2).min(initial=1.0))


def follow(
    out,
    prompts,
    logits_of,
    *,
    lengths=None,
    padding=PAD,
    bos=DEFAULT_BOS,
    temperature=0.9,
    top_k=None,
    alpha=None,
    seed=0,
    stream=None,
    stop=DEFAULT_STOP,
    max_steps=None,
    never_end=False,
    weights=weights_of,
    margin=1e-5,
):
    """Compares each token with what had to be drawn after the tokens before it.

    out, prompts: int [rows, length]. logits_of(list of tokens): float32 [vocab].
    Options are numbers or have one value a row; a list of stop tokens is for all rows. The draws are float64; within
    `margin` of another index, either is right.

    Asserts that prompts, row ends and padding are right. Returns (the wrong tokens,
    as (row, position, actual, expected); the number of tokens drawn; the number of
    those excused by the margin).
    """
    n_rows, length = prompts.shape
    assert out.shape == prompts.shape and out.dtype == np.int32
    lengths = (prompts != padding).sum(1) if lengths is None else lengths
    stream = np.arange(n_rows) if stream is None else stream
    wrong, drawn, excused = [], 0, 0
    for r in range(n_rows):

        def of_row(option, r=r):
            return None if option is None else np.broadcast_to(option, n_rows)[r]

        stops = stop if isinstance(stop, list) else [of_row(stop)]
        row = [int(t) for t in prompts[r, : lengths[r]]] or [int(of_row(bos))]
        start, limit = len(row), length if max_steps is None else of_row(max_steps)
        while len(row) < length and len(row) - start < limit:
            actual, close = int(out[r, len(row)]), False
            logits = logits_of(row)
            if never_end:
                logits = np.where(np.isin(np.arange(len(logits)), stops), -np.inf, logits)
            if np.isnan(logits).any() or not np.isfinite(logits.max()):
                expected = INVALID
            elif of_row(temperature) == 0:
                expected = np.argmax(logits)
            else:
                w = weights(logits, of_row(temperature), of_row(top_k), of_row(alpha))
                u = uniforms(of_row(seed), of_row(stream), len(row) - start)
                expected = reference.two_level_draw(w, *u)
                close = boundary_distance(w, *u) < margin
            drawn += 1
            if actual != expected:
                excused += close
                wrong += [] if close else [(r, len(row), actual, int(expected))]
            row.append(actual)
            if actual in (*stops, INVALID):
                break
        assert out[r].tolist() == row + [padding] * (length - len(row)), f"row {r}"
    return wrong, drawn, excused


def check(*args, at_least=20, **kwargs):
    wrong, drawn, excused = follow(*args, **kwargs)
    assert wrong == []
    assert drawn >= at_least
    assert excused <= drawn // 100


# --- Small models -----------------------------------------------------------------------

rng = np.random.default_rng(0)
TABLE = (2 * rng.standard_normal((VOCAB, VOCAB))).astype(np.float32)
TABLE[:, STOP] += 4  # some rows end early
TIES = rng.integers(-2, 3, (VOCAB, VOCAB)).astype(np.float32)  # the largest logit occurs many times

# after these tokens the logits are not a distribution (NOTHING: only −inf)
NAN, INFINITE, NOTHING = 100, 101, 102


def spoiled(logits, token):
    """The float32 logits [..., vocab] after `token` [..., vocab], in TensorFlow."""
    third = tf.equal(tf.cast(tf.range(logits.shape[-1]), tf.int32), 3)
    at = lambda t: tf.equal(token, t)  # noqa: E731
    logits = tf.where_v2(tf.logical_and(at(NAN), third), np.nan, logits)
    logits = tf.where_v2(tf.logical_and(at(INFINITE), third), np.inf, logits)
    return tf.where_v2(at(NOTHING), -np.inf, logits)


def spoiled_row(logits, token):
    if token == NOTHING:
        return np.full_like(logits, -np.inf)
    if token in (NAN, INFINITE):
        logits = logits.copy()
        logits[3] = np.nan if token == NAN else np.inf
    return logits


def table_rows(index, vocab_dim, mesh):
    """Rows of the variable gpt2/table; an index outside it gives zeros."""
    row_dim = mtf.Dimension("table_row", vocab_dim.size)
    table = mtf.get_variable(mesh, "table", [row_dim, vocab_dim], initializer=tf.zeros_initializer())
    one_hot = mtf.one_hot(index, row_dim, dtype=tf.float32)
    return mtf.einsum([one_hot, table], output_shape=index.shape + vocab_dim)


def token_at(ids, position):
    """ids [batch…, length] at position [batch…]; 0 outside."""
    here = mtf.one_hot(position, ids.shape[-1], dtype=tf.int32)
    return mtf.reduce_sum(ids * here, reduced_dim=ids.shape[-1])


class Bigram:
    """The next token's logits are the table's row for the last token."""

    def __init__(self):
        self.contexts = []

    def __call__(self, mtf_features, other_features, params, mesh, variable_dtype, context=None):
        self.contexts.append(context)
        last, vocab_dim = mtf_features["inputs"], other_features["vocab_dim"]
        one_token = context is not None and context.mode == "incremental"
        if one_token:
            last = token_at(last, context.position - 1)
        logits = table_rows(last, vocab_dim, mesh)
        if params["spoiled"]:
            logits = mtf.cwise(spoiled, [logits, mtf.broadcast(last, logits.shape)])
        if one_token:
            logits = mtf.reshape(logits, last.shape + [mtf.Dimension("sequence", 1), vocab_dim])
        return logits, None, None


def bigram_logits(table, spoil=False):
    def logits_of(row):
        inside = 0 <= row[-1] < len(table)
        logits = table[row[-1]] if inside else np.zeros(len(table), np.float32)
        return spoiled_row(logits, row[-1]) if spoil else logits

    return logits_of


class History:
    """Logits from all tokens so far, through states; only for the cached path.

    They are the table's row for (sum of the tokens + offset), plus half the row for
    the second last token. The offset is the prompt's first token, as a constant
    state, or the encoder's output. New states are unreduced sums over split dims.
    """

    def __init__(self, constant_state=False, encoder=False):
        self.constant_state, self.encoder = constant_state, encoder

    def __call__(self, mtf_features, other_features, params, mesh, variable_dtype, context=None):
        ids, vocab_dim = mtf_features["inputs"], other_features["vocab_dim"]
        length_dim = context.length_dim
        if context.mode == "first_part":
            assert context.inputs is ids
            before = context.initial_position - 1  # the position that the first step will read
            earlier = mtf.less(mtf.range(mesh, length_dim, tf.int32), mtf.broadcast(before, ids.shape))
            total = mtf.reduce_sum(ids * mtf.cast(earlier, tf.int32), reduced_dim=length_dim)
            second = token_at(ids, before - 1) - mtf.cast(mtf.equal(before, 0), tf.int32)  # −1 where there is none
            context.record_new_states([total])
            context.record_new_states([table_rows(second, vocab_dim, mesh)])
            if self.constant_state:
                context.record_constant_state(token_at(ids, mtf.zeros_like(before)))
            return mtf.zeros(mesh, ids.shape + vocab_dim), None, None
        (total,) = context.get_states(1)
        token = token_at(ids, context.position - 1)
        total += token
        context.record_new_states([total])
        (second,) = context.get_states(1)
        context.record_new_states([table_rows(token, vocab_dim, mesh)])
        index = total
        if self.constant_state:
            index += context.get_constant_state()
        if self.encoder:
            index += context.encoder_output
        index = mtf.mod(index, mtf.constant(mesh, vocab_dim.size, dtype=tf.int32))
        logits = table_rows(index, vocab_dim, mesh) + 0.5 * second
        # (the size 1 is not called "sequence" here: layouts may then split that)
        return mtf.reshape(logits, ids.shape[:-1] + [mtf.Dimension("step", 1), vocab_dim]), None, None


def history_logits(offset=lambda row: 0):
    def logits_of(row):
        logits = TABLE[(sum(row) + offset(row)) % VOCAB]
        return logits + np.float32(0.5) * TABLE[row[-2]] if len(row) > 1 else logits

    return logits_of


class Input(str):
    """The name of a fed tensor, in place of an option's value."""


INPUTS = {
    "temperature": tf.float32,
    "top_k": tf.int32,
    "alpha": tf.float32,
    "seed": tf.int32,
    "stream": tf.int32,
    "stop": tf.int32,
    "max_steps": tf.int32,
    "bos": tf.int32,
    "lengths": tf.int32,
}


FUNCTIONS = ("prefix_allowed_tokens_fn",)  # options that are functions; others that are called give one


def loops(cases, model=None, *, table=TABLE, batch=BATCH, length=LENGTH, runner=ONE_DEVICE, weights=None, **params):
    """One graph with a decode loop for each of `cases`, {name: options}.

    Returns a function of the prompts, int [batch, length], and the Inputs in the
    cases, each [batch] or scalar, that returns {name: tokens}.
    """
    names = sorted({v for options in cases.values() for v in options.values() if isinstance(v, Input)})

    def build(mesh, prompts, *inputs):
        batch_dim, length_dim, vocab_dim = dims(batch=batch, sequence=length, vocab=len(table))
        shape, other = mtf.Shape([batch_dim, length_dim]), {"vocab_dim": vocab_dim}
        if model is None:
            shape, other = features(mesh, params, batch, length)
        prompts = mtf.import_tf_tensor(mesh, prompts, shape)
        tensors = {name: mtf.import_tf_tensor(mesh, x, shape[:1]) for name, x in zip(names, inputs)}
        return {
            name: sample_autoregressive(
                prompts,
                other,
                {"padding_id": PAD, **params, **options.get("params", {})},
                model=options.get("model", model),
                **{
                    k: tensors[v]
                    if isinstance(v, Input)
                    else v(mesh, shape)
                    if callable(v) and k not in FUNCTIONS
                    else v
                    for k, v in options.items()
                    if k not in ("params", "model")
                },
            )
            for name, options in cases.items()
        }

    inputs = [(tf.int32, [batch, length])] + [(INPUTS[name], [batch]) for name in names]
    run = Program(build, inputs, weights or {"table": table}, runner)
    return lambda prompts, **arrays: run(prompts, *[np.broadcast_to(arrays[name], [batch]) for name in names])


def prompts_of(lengths, length=LENGTH, vocab=VOCAB, padding=PAD, seed=1):
    """int32 [rows, length]: random tokens that are not special, then padding."""
    tokens = np.random.default_rng(seed).integers(10, min(vocab, 100), (len(lengths), length))
    return np.where(np.arange(length) < np.array(lengths)[:, None], tokens, padding).astype(np.int32)


PROMPTS = prompts_of([1, 3, 5, LENGTH, 0, 2, 11, LENGTH - 1])  # one fills the length, one is empty
bigram = bigram_logits(TABLE)

"""Each sampler as a loop of steps on a mesh, for the TPU's compiler and for CPU replicas."""

import contextlib

import numpy as np
import simd

from gpt_neo_sampling._compat import mtf, tf, xla_ops
from gpt_neo_sampling.mesh.ops import cwise_broadcast
from gpt_neo_sampling.sampling.controls import History, SamplingOptions
from gpt_neo_sampling.sampling.next_token import next_token

BATCH, VOCAB, LENGTH, STEPS = 8, 50304, 512, 8
LAYOUTS = {"vocab": "vocab:x", "batch": "batch:x"}
SAMPLERS = {
    "softmax": dict(temperature=0.9),
    "top-k": dict(temperature=0.9, top_k=40),
    "top-p": dict(temperature=0.9, top_p=0.9),
    "min-p": dict(temperature=0.9, min_p=0.05),
    "epsilon": dict(temperature=0.9, epsilon_cutoff=3e-4),
    "typical": dict(temperature=0.9, typical_p=0.9),
    "eta": dict(temperature=0.9, eta_cutoff=3e-4),
    "entmax": dict(temperature=1.0, use_entmax=True, entmax_alpha=1.3),
    "greedy": dict(temperature=0),
    "penalties": dict(temperature=0.9, repetition_penalty=1.2, presence_penalty=0.5),
    "mirostat": dict(temperature=0.9, mirostat=2, mirostat_tau=4.0),
}
_BIASES = {(t, t + 1): 1.0 for t in range(64)}
_SOME = list(range(3, 100, 7))
# Each of the other controls, for its cost; "many" has them together, for its tokens too.
FURTHER = {
    "sequence bias": dict(temperature=0.9, sequence_bias=_BIASES),
    "bad words": dict(temperature=0.9, bad_words_ids=[list(pair) for pair in _BIASES]),
    "dry": dict(temperature=0.9, dry_multiplier=0.8),
    "allowed tokens": dict(temperature=0.9, allowed_token_ids=list(range(2, 100))),
    "suppressed tokens": dict(temperature=0.9, suppress_tokens=_SOME),
    "suppressed at first": dict(temperature=0.9, begin_suppress_tokens=_SOME),
    "forced end": dict(temperature=0.9, forced_eos_token_id=5),
    "least length": dict(temperature=0.9, min_length=LENGTH + 9, stop_tokens=(5,)),
    "decay of length": dict(temperature=0.9, exponential_decay_length_penalty=(5, 1.01), stop_tokens=(5,)),
    "dynatemp": dict(temperature=0.9, dynatemp_range=0.4),
    "top-p, 5 to keep": dict(temperature=0.9, top_p=0.9, min_tokens_to_keep=5),
    "typical, 5 to keep": dict(temperature=0.9, typical_p=0.9, min_tokens_to_keep=5),
    "xtc": dict(temperature=0.9, xtc_probability=0.5, xtc_threshold=0.02),
}
SAMPLERS["many"] = {
    **{name: value for options in FURTHER.values() for name, value in options.items()},
    "top_p": 0.9, "allowed_token_ids": list(range(1, 110)), "bad_words_ids": [[5], [7, 8], [9, 9, 2]],
}  # fmt: skip


def _mtf_draw(logits, dim):
    return mtf.sample_with_temperature(logits, dim, 0.9)


def _mtf_top_k(logits, dim):
    """As the original's: what is not above the (k+1)-th largest is masked."""
    border = mtf.ops.nth_largest_element(logits, n=40, reduced_dim=dim)
    return mtf.sample_with_temperature(logits + mtf.cast(mtf.less_equal(logits, border), tf.float32) * -1e6, dim, 0.9)


def _original_draw(logits, dim):
    """The original's sample_categorical."""
    cdf = mtf.cumsum(mtf.softmax(logits, dim), dim)
    uniform = mtf.random_uniform(logits.mesh, logits.shape - dim, dtype=tf.float32)
    return mtf.argmax(mtf.cast(mtf.greater(cdf, uniform), tf.int32), dim)


def _nothing(logits, dim):
    return mtf.zeros(logits.mesh, logits.shape - dim, tf.int32)


EMPTY = "nothing"  # the loop by itself
PEERS = {EMPTY: _nothing, "mtf softmax": _mtf_draw, "mtf top-k": _mtf_top_k, "original": _original_draw}


def sampler(name, batch=BATCH, vocab=VOCAB, steps=STEPS, vocab_size=None, on_cpu=False, count_rounds=False):
    """(build, inputs) of a loop that draws a token a row in each step, for `simd.CoreProgram`.

    With `on_cpu`, for `programs.Program`. With `count_rounds`, a step gives not tokens but how often the loop in it, on
    the path of every step, went round (0 without one).

    The inputs are the logits, [batch, vocab] for all steps, ids [batch, LENGTH] of a history, the seed, and [batch]
    the rows' streams. The result is int32 [batch, steps].
    """

    def build(mesh, logits, ids, seed, stream):
        dims = batch_dim, vocab_dim, length = [
            mtf.Dimension(*d) for d in (("batch", batch), ("vocab", vocab), ("length", LENGTH))
        ]
        steps_dim = mtf.Dimension("steps", steps)
        logits = mtf.import_tf_tensor(mesh, logits, mtf.Shape(dims[:2]))
        ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch_dim, length]))
        seed = mtf.import_tf_tensor(mesh, seed, mtf.Shape([]))
        stream = mtf.import_tf_tensor(mesh, stream, mtf.Shape([batch_dim]))

        def body(step, tokens):
            x = logits if on_cpu else _new_each_step(logits, step)
            if name in PEERS:
                token = PEERS[name](x, vocab_dim)
            else:
                places = (_filled(mesh, batch_dim, n) for n in (LENGTH, LENGTH // 2, LENGTH + 9))
                history = History(_new_each_step(ids, step), *places)
                options = SamplingOptions(vocab_size=vocab_size, **{**SAMPLERS, **FURTHER}[name])
                token = next_token(x, vocab_dim, options, seed, stream, step, history)
            if count_rounds:
                token = _Rounds(token).outputs[0]
            tokens = cwise_broadcast(_with_token, [tokens, token, step], tokens.shape, tf.int32)
            return [step + 1, tokens]

        start = [mtf.constant(mesh, 0, mtf.Shape([]), tf.int32), mtf.zeros(mesh, [batch_dim, steps_dim], tf.int32)]
        _, tokens = mtf.while_loop(lambda step, *_: mtf.less(step, steps), body, start)
        return tokens

    return build, [(tf.float32, (batch, vocab)), (tf.int32, (batch, LENGTH)), (tf.int32, ()), (tf.int32, (batch,))]


def _with_token(tokens, token, step):
    """tokens with this step's in its column: one kernel, as the columns' numbers are a literal of full rank."""
    rows, steps = tokens.shape.as_list()
    columns = tf.constant(np.tile(np.arange(steps, dtype=np.int32), (rows, 1)))
    return tf.where_v2(tf.equal(columns, step), token, tokens)


def core_program(name, layout, **size):
    """A sampler on four cores, as `simd.CoreProgram`."""
    return simd.CoreProgram(*sampler(name, **size), "x:4", LAYOUTS[layout])


def _filled(mesh, dim, value):
    return mtf.constant(mesh, value, mtf.Shape([dim]), tf.int32)


def _new_each_step(x, step):
    """x, which the compiler takes to depend on the step, as a model's logits and the tokens of a row do."""

    def barrier(x, step):
        return xla_ops().xla_optimization_barrier([x, step])[0]

    return mtf.slicewise(barrier, [x, step], output_shape=x.shape, splittable_dims=x.shape.dims, grad_function=0)


class _Rounds(mtf.Operation):
    """int32 of a token's shape: rounds of the loop that was made where this is lowered."""

    def __init__(self, token):
        super().__init__([token], name="rounds")
        self._outputs = [mtf.Tensor(self, token.shape, tf.int32)]

    def lower(self, lowering):
        here = [count for count in _counts if count.graph is tf.get_default_graph()]
        assert len(here) <= 1, "whose rounds?"
        rounds = here[0] if here else tf.constant(0)
        token = lowering.tensors[self.inputs[0]]
        value = lowering.mesh_impl(self).slicewise(lambda token: tf.zeros_like(token) + rounds, token)
        lowering.set_tensor_lowering(self.outputs[0], value)


_counts = []  # of the loops made in `counted_loops`


@contextlib.contextmanager
def counted_loops():
    """`tf.while_loop` counts its rounds, for `sampler(…, count_rounds=True)`."""
    while_loop = tf.while_loop

    def counting(cond, body, loop_vars, **options):
        def and_one_more(count, variables):
            after = tf.nest.pack_sequence_as(loop_vars, tf.nest.flatten(body(*variables)))
            return count + 1, after

        count, results = while_loop(lambda _, vs: cond(*vs), and_one_more, (tf.constant(0), loop_vars), **options)
        _counts.append(count)
        return results

    tf.while_loop = counting
    try:
        yield
    finally:
        tf.while_loop = while_loop
        _counts.clear()


def gaussian(batch=BATCH, vocab=VOCAB, sigma=2.0, seed=0):
    return (sigma * np.random.default_rng(seed).standard_normal((batch, vocab))).astype(np.float32)

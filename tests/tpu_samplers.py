"""Each sampler as a loop of steps on a mesh, for the TPU's compiler and for CPU replicas."""

import numpy as np
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from gpt_neo_sampling._compat import mtf, tf
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
}


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


PEERS = {"mtf softmax": _mtf_draw, "mtf top-k": _mtf_top_k, "original": _original_draw}


def sampler(name, batch=BATCH, vocab=VOCAB, steps=STEPS, seed=1, vocab_size=None):
    """(build, inputs) of a loop that draws a token a row in each step, for `simd.CoreProgram`.

    The inputs are the logits, [batch, vocab] for all steps, and ids [batch, LENGTH] of a history. The result is
    int32 [batch, steps].
    """

    def build(mesh, logits, ids):
        dims = batch_dim, vocab_dim, length = [
            mtf.Dimension(*d) for d in (("batch", batch), ("vocab", vocab), ("length", LENGTH))
        ]
        steps_dim = mtf.Dimension("steps", steps)
        logits = mtf.import_tf_tensor(mesh, logits, mtf.Shape(dims[:2]))
        ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch_dim, length]))
        stream = mtf.range(mesh, batch_dim, tf.int32)

        def body(step, tokens):
            x = _new_each_step(logits, step)
            if name in PEERS:
                token = PEERS[name](x, vocab_dim)
            else:
                history = History(_new_each_step(ids, step), _filled(mesh, batch_dim, LENGTH),
                                  _filled(mesh, batch_dim, LENGTH // 2))  # fmt: skip
                options = SamplingOptions(vocab_size=vocab_size, **SAMPLERS[name])
                token = next_token(x, vocab_dim, options, seed, stream, step, history)
            at = mtf.range(mesh, steps_dim, tf.int32)
            tokens = cwise_broadcast(lambda old, new, at, step: tf.where_v2(tf.equal(at, step), new, old),
                                     [tokens, token, at, step], tokens.shape, tf.int32)  # fmt: skip
            return [step + 1, tokens]

        start = [mtf.constant(mesh, 0, mtf.Shape([]), tf.int32), mtf.zeros(mesh, [batch_dim, steps_dim], tf.int32)]
        _, tokens = mtf.while_loop(lambda step, *_: mtf.less(step, steps), body, start)
        return tokens

    return build, [(tf.float32, (batch, vocab)), (tf.int32, (batch, LENGTH))]


def _filled(mesh, dim, value):
    return mtf.constant(mesh, value, mtf.Shape([dim]), tf.int32)


def _new_each_step(x, step):
    """x, which the compiler takes to depend on the step, as a model's logits and the tokens of a row do."""

    def barrier(x, step):
        return gen_xla_ops.xla_optimization_barrier([x, step])[0]

    return mtf.slicewise(barrier, [x, step], output_shape=x.shape, splittable_dims=x.shape.dims, grad_function=0)


def gaussian(batch=BATCH, vocab=VOCAB, sigma=2.0, seed=0):
    return (sigma * np.random.default_rng(seed).standard_normal((batch, vocab))).astype(np.float32)

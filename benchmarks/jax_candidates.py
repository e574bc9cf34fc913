"""JAX's own ways to draw: functions of (logits [rows, entries], step) to int32 [rows]. Only JAX is needed."""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

TEMPERATURE, TOP_P, K = 0.9, 0.9, 40


def categorical(x, step):
    return jax.random.categorical(jax.random.fold_in(jax.random.key(1), step), x)


def argmax(x, step):
    return jnp.argmax(x, -1).astype(jnp.int32)


def top_k(x, step):
    """The k-th largest's entry: k are found, and nothing is drawn."""
    return lax.top_k(x, K)[1][:, -1]


def bisected_top_p(x, step):
    """The largest threshold above which enough mass lies, bit by bit of its float32; ties are all kept."""
    x = x / TEMPERATURE
    weights = jnp.exp(x - x.max(-1, keepdims=True))  # at most 1, so below 2^30 as bits
    bits, wanted = lax.bitcast_convert_type(weights, jnp.int32), TOP_P * weights.sum(-1, keepdims=True)
    threshold = jnp.zeros_like(wanted, jnp.int32)
    for bit in reversed(range(30)):
        higher = threshold | 1 << bit
        mass = jnp.where(bits >= higher, weights, 0).sum(-1, keepdims=True)
        threshold = jnp.where(mass >= wanted, higher, threshold)
    return categorical(jnp.where(bits >= threshold, x, -jnp.inf), step)


# name: (function, the law that its draws follow, as arguments of `laws.law`, or None)
CANDIDATES = {
    "jax.random.categorical": (categorical, {}),
    "jax.lax.top_k": (top_k, None),
    "JAX, bisected top-p": (bisected_top_p, {"temperature": TEMPERATURE, "top_p": TOP_P}),
    "jax.numpy.argmax": (argmax, {"temperature": 0}),
}


def loop_hlo(draw, rows, vocab, steps):
    """The serialised HLO of a loop that draws a token a row in each step, for a TPU: as tests/tpu_samplers.py's."""
    columns = np.tile(np.arange(steps, dtype=np.int32), (rows, 1))

    def loop(logits):
        def body(step, tokens):
            x, _ = lax.optimization_barrier((logits, step))
            return jnp.where(columns == step, draw(x, step)[:, np.newaxis], tokens)

        return lax.fori_loop(0, steps, body, jnp.zeros_like(columns))

    logits = jax.ShapeDtypeStruct((rows, vocab), np.float32)
    lowered = jax.jit(loop).trace(logits).lower(lowering_platforms=("tpu",))
    return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()

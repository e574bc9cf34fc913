"""Sampling operations on mtf tensors, under the module path that GPT-Neo's scripts import.

`entmax` and its loss, the draw, the masks and the penalties come from
`gpt_neo_sampling.sampling`. All work on any layout, and none builds anything
larger than its input.

A whole script; the examples of these functions use its `run`:

    >>> import mesh_tensorflow as mtf
    >>> import numpy as np
    >>> import tensorflow.compat.v1 as tf
    >>> from gpt_neo_sampling import device_mesh, entmax, sample_categorical
    >>> def run(build, values, name="vocab"):
    ...     # an array: the result of `build` for an mtf tensor [batch, name] of these values
    ...     on = device_mesh()
    ...     with tf.Graph().as_default(), on.place():
    ...         mesh, x = mtf.Mesh(mtf.Graph(), "mesh"), tf.constant(values)
    ...         dims = [mtf.Dimension(d, int(size)) for d, size in zip(("batch", name), x.shape)]
    ...         y = build(mtf.import_tf_tensor(mesh, x, dims))
    ...         lowering = mtf.Lowering(mesh.graph, {mesh: on.impl()})
    ...         with on.session() as session:
    ...             return session.run(lowering.export_to_tf_tensor(y))
    >>> logits = [[2.0, 1.0, 0.0, -1.0], [0.0, 9.0, 0.0, 0.0]]
    >>> run(lambda x: sample_categorical(entmax(x, alpha=1.5), seed=1), logits)
    array([0, 1], dtype=int32)
"""

from typing import Any

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.mesh.ops import as_dim, check_tensor, cwise_broadcast
from gpt_neo_sampling.sampling.categorical import sample_categorical
from gpt_neo_sampling.sampling.dry import dry_penalty
from gpt_neo_sampling.sampling.dynamic_temperature import dynamic_temperature
from gpt_neo_sampling.sampling.entmax import (
    entmax,
    entmax_backward,
    entmax_cross_entropy_with_logits,
    entmax_forward,
    softmax,
)
from gpt_neo_sampling.sampling.information import surprise
from gpt_neo_sampling.sampling.masks import (
    epsilon_mask,
    eta_mask,
    min_p_mask,
    mirostat_mask,
    top_h_mask,
    top_k_mask,
    top_n_sigma_mask,
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
    token_set_mask,
    tokens_mask,
)
from gpt_neo_sampling.sampling.token_sequences import TokenSequences

__all__ = [
    "TokenSequences",
    "biasmask_attn_weights",
    "dry_penalty",
    "dynamic_temperature",
    "entmax",
    "entmax_backward",
    "entmax_cross_entropy_with_logits",
    "entmax_forward",
    "epsilon_mask",
    "eta_mask",
    "exponential_decay",
    "force_tokens",
    "logit_bias",
    "min_p_mask",
    "mirostat_mask",
    "no_repeat_ngram_mask",
    "parse_inputs",
    "presence_frequency_penalty",
    "repetition_penalty",
    "sample_categorical",
    "sequence_bias",
    "softmax",
    "surprise",
    "token_counts",
    "token_set_mask",
    "tokens_mask",
    "top_h_mask",
    "top_k_mask",
    "top_n_sigma_mask",
    "top_p_mask",
    "typical_p_mask",
    "xtc_mask",
]

MASK = -1e10  # GPT-Neo's value, added to the attention score of a key that a query may not see


def biasmask_attn_weights(
    mesh: mtf.Mesh, nd: mtf.Dimension, ns: mtf.Dimension, variable_dtype: mtf.VariableDType
) -> mtf.Tensor:
    """The causal mask that is added to attention scores.

    Args:
      mesh: mtf.Mesh.
      nd: mtf.Dimension of the queries.
      ns: mtf.Dimension of the keys; if it is longer than nd, the ends are aligned.
      variable_dtype: mtf.VariableDType.

    Returns:
      mtf.Tensor [nd, ns] in the activation dtype: −1e10 (in float16 the lowest
      number) where the key comes after the query, else 0.
    """
    nd, ns = as_dim(nd, "nd"), as_dim(ns, "ns")
    dtype = variable_dtype.activation_dtype
    masked = max(MASK, float(dtype.min))

    def mask(query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        unseen = key > query + (ns.size - nd.size)
        return tf.where_v2(unseen, tf.constant(masked, dtype), tf.zeros([], dtype))

    positions = [mtf.range(mesh, d, tf.int32) for d in (nd, ns)]
    return cwise_broadcast(mask, positions, output_dtype=dtype, name="biasmask_attn_weights")


def parse_inputs(
    mtf_features: dict[str, mtf.Tensor], other_features: dict[str, Any]
) -> tuple[mtf.Tensor, mtf.Dimension, mtf.Dimension, mtf.Dimension, mtf.Dimension, mtf.Dimension]:
    """Picks a GPT-Neo model's inputs and dimensions out of its two feature dicts.

    Args:
      mtf_features: a dict with "inputs", the ids, an int32 mtf.Tensor [batch, sequence].
      other_features: a dict with "embd_dim", "vocab_dim" and "embed_sequence_dim".

    Returns:
      (x, batch_dim, sequence_dim, embd_dim, vocab_dim, embed_sequence_dim): the
      inputs, int32 [batch, sequence], and the mtf.Dimensions.

    Raises:
      TypeError: for inputs that are no mtf.Tensor, or a dim that is no mtf.Dimension.
      ValueError: for a feature that is missing, or inputs of other dims.
    """
    x = feature(mtf_features, "inputs", "the features")
    check_tensor(x, "the inputs")
    if len(x.shape.dims) != 2:
        raise ValueError(f"the inputs have the dims {x.shape}; [batch, sequence] is needed")
    names = ("embd_dim", "vocab_dim", "embed_sequence_dim")
    embd_dim, vocab_dim, embed_sequence_dim = (feature_dim(other_features, name) for name in names)
    return (x, *x.shape.dims, embd_dim, vocab_dim, embed_sequence_dim)


def feature(features: dict[str, Any], name: str, what: str = "other_features") -> Any:
    """One of GPT-Neo's features; a ValueError if there is none of that name."""
    if name not in features:
        raise ValueError(f"{what} have no {name!r}; there is {', '.join(map(repr, features)) or 'nothing'}")
    return features[name]


def feature_dim(other_features: dict[str, Any], name: str) -> mtf.Dimension:
    """One of the dims in GPT-Neo's other_features; a ValueError or TypeError if it is none."""
    return as_dim(feature(other_features, name), f"other_features[{name!r}]")

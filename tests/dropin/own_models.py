"""A program's own models, with GPT-Neo's signature and their own states in the decode loop."""

import mesh_tensorflow as mtf
import numpy as np
import tensorflow.compat.v1 as tf

from gpt_neo_sampling.models.utils import entmax_cross_entropy_with_logits, parse_inputs

DECAY = 0.5  # of the averaging model


def attention_model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
    """One layer of attention with one head, whose keys and values are the states."""
    x, batch_dim, sequence_dim, embd_dim, vocab_dim, embed_sequence_dim = parse_inputs(mtf_features, other_features)
    memory_dim, head_dim = other_features["memory_length_dim"], mtf.Dimension("features_per_head", params["n_embd"])
    weights = _weights_of(mesh, variable_dtype)
    wte, wpe = weights("wte", vocab_dim, embd_dim), weights("wpe", embed_sequence_dim, embd_dim)
    bias = other_features["attn_bias"]
    if _is_incremental(context):
        position = context.position - 1
        x = mtf.gather(x, position, sequence_dim)
        bias = mtf.gather(bias, position, sequence_dim)
    else:
        position = mtf.range(mesh, sequence_dim, tf.int32)
    h = mtf.gather(wte, x, vocab_dim) + mtf.gather(wpe, position, embed_sequence_dim)

    q, k, v = (mtf.einsum([h, weights(name, embd_dim, head_dim)], reduced_dims=[embd_dim]) for name in "qkv")
    if _is_incremental(context):
        here = mtf.one_hot(position, memory_dim, dtype=h.dtype)
        k, v = (
            old * (1 - here) + mtf.einsum([here, new], output_shape=old.shape)
            for old, new in zip(context.get_states(2), (k, v))
        )
    else:
        k, v = (mtf.rename_dimension(t, sequence_dim.name, memory_dim.name) for t in (k, v))
    if context is not None:
        context.record_new_states([k, v])
    seen = mtf.softmax(mtf.einsum([q, k], reduced_dims=[head_dim]) + bias, memory_dim)
    mixed = mtf.einsum([seen, v], reduced_dims=[memory_dim])
    h += mtf.einsum([mixed, weights("o", head_dim, embd_dim)], reduced_dims=[head_dim])
    return _outputs(h, wte, mtf_features, params, context, [batch_dim, mtf.Dimension("sequence", 1), vocab_dim])


def averaging_model(mtf_features, other_features, params, mesh, variable_dtype, context=None):
    """A decaying sum of all tokens so far; its only state is that sum, [batch, embd]."""
    x, batch_dim, sequence_dim, embd_dim, vocab_dim, _ = parse_inputs(mtf_features, other_features)
    weights = _weights_of(mesh, variable_dtype)
    wte = weights("wte", vocab_dim, embd_dim)
    if _is_incremental(context):
        (before,) = context.get_states(1)
        total = before * DECAY + mtf.gather(wte, mtf.gather(x, context.position - 1, sequence_dim), vocab_dim)
        context.record_new_states([total])
    else:
        memory_dim = other_features["memory_length_dim"]
        tokens = mtf.rename_dimension(mtf.gather(wte, x, vocab_dim), sequence_dim.name, memory_dim.name)
        age = np.subtract.outer(np.arange(sequence_dim.size), np.arange(memory_dim.size))
        share = mtf.import_tf_tensor(
            mesh, np.where(age < 0, 0.0, DECAY ** np.abs(age)).astype(np.float32), mtf.Shape([sequence_dim, memory_dim])
        )
        total = mtf.einsum([share, tokens], output_shape=[batch_dim, sequence_dim, embd_dim])
        if context is not None:  # the first step reads the prompt's last token: all but that one are in its state
            context.record_new_states([mtf.gather(total, context.initial_position - 2, sequence_dim)])
    hidden_dim = mtf.Dimension("hidden", params["n_embd"])
    h = mtf.tanh(mtf.einsum([total, weights("in", embd_dim, hidden_dim)], reduced_dims=[embd_dim]))
    h = mtf.einsum([h, weights("out", hidden_dim, embd_dim)], reduced_dims=[hidden_dim])
    return _outputs(h, wte, mtf_features, params, context, [batch_dim, mtf.Dimension("sequence", 1), vocab_dim])


def _is_incremental(context):
    return context is not None and context.mode == "incremental"


def _weights_of(mesh, variable_dtype):
    def weights(name, *dims):
        initializer = tf.random_normal_initializer(stddev=0.3)
        return mtf.get_variable(mesh, name, mtf.Shape(dims), initializer=initializer, dtype=variable_dtype)

    return weights


def _outputs(h, wte, mtf_features, params, context, step_dims):
    """(logits, loss, loss_batch)"""
    vocab_dim = wte.shape[0]
    logits = mtf.einsum([h, wte], reduced_dims=[h.shape[-1]])
    if _is_incremental(context):
        return mtf.reshape(logits, step_dims), None, None
    if params["mode"] != "train":
        return logits, None, None
    loss_fn = entmax_cross_entropy_with_logits if params["entmax_loss"] else (
        mtf.layers.softmax_cross_entropy_with_logits)  # fmt: skip
    loss_batch = loss_fn(logits, mtf_features["labels"], vocab_dim, z_loss=1e-4)
    return logits, mtf.reduce_mean(loss_batch) / params["num_microbatches"], loss_batch

"""The GPT-Neo transformer in mesh-tensorflow.

The decoder of Radford et al. 2019 ("Language Models are Unsupervised Multitask
Learners") with GPT-Neo's changes: layers of global and local attention
alternate (a window, as in Child et al. 2019, arXiv 1904.10509), attention
scores are not divided by the square root of the head's width, and the output
is tied to the token embeddings. Positions are embedded by a table or, with
`rotary_emb`, by rotating queries and keys (Su et al. 2021, arXiv 2104.09864).
GPT-Neo's other options are named where they are implemented below. Variables
carry GPT-Neo's names, so that its checkpoints load.

Dimensions: batch, sequence, embd, vocab, heads, features_per_head,
memory_length, embed_sequence, intermediate_expanded. All but sequence and
features_per_head may be split over a mesh axis, as long as no two dims of one
tensor are split over the same axis (see `config.TENSORS`).
"""

import dataclasses
from typing import Any

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import Params
from gpt_neo_sampling.mesh.ops import cwise_broadcast, resize, take, write_at
from gpt_neo_sampling.models.config import (
    HUGGING_FACE_ACTIVATIONS,
    LOCAL_RADIUS,
    OWN_MODEL,
    check_config,
    expand_attention_types,
    has_own_head,
    intermediate_size,
    n_learned_keys,
    norm_epsilon,
)
from gpt_neo_sampling.models.layers import (
    ACTIVATIONS,
    ROW_ACTIVATIONS,
    activate,
    attend,
    attend_joined,
    layer_norm,
    matmul,
    rotary_table,
    rotate,
)
from gpt_neo_sampling.models.utils import MASK, entmax_cross_entropy_with_logits, feature, feature_dim, parse_inputs

RING_MULTIPLE = 128  # so that a layout that splits memory_length can split a ring too


def _activation(params: Params) -> str:
    """The activation function's name. GPT-Neo reads `activation_fn`, though its configs say `activation_function`."""
    return params.get("activation_fn") or "gelu"


def check_params(params: Params) -> None:
    """Checks that this model supports a GPT-Neo config.

    Args:
      params: a dict of GPT-Neo's config keys.

    Raises:
      ValueError: with the option, its value and what is allowed.
    """
    check_config(params)
    activations = sorted((*ACTIVATIONS, *ROW_ACTIVATIONS, *HUGGING_FACE_ACTIVATIONS))
    if _activation(params) not in activations:
        raise ValueError(
            f"config option activation_fn={_activation(params)!r} is not supported; allowed: {', '.join(activations)}; "
            f"or use {OWN_MODEL}"
        )


def model(
    mtf_features: dict[str, mtf.Tensor],
    other_features: dict[str, Any],
    params: Params,
    mesh: mtf.Mesh,
    variable_dtype: mtf.VariableDType,
    context: Any = None,
) -> tuple[mtf.Tensor, mtf.Tensor | None, mtf.Tensor | None]:
    """The network: token ids in; logits and, when training, the loss out.

    Args:
      mtf_features: a dict with "inputs", int32 [batch, sequence]; when training
        or evaluating "labels" too, of the same shape. An id outside the
        vocabulary (a padding id, say) is embedded as zeros.
      other_features: a dict with the dimensions "embd_dim", "vocab_dim",
        "embed_sequence_dim" and "memory_length_dim" (`num_mem_kv` entries longer
        than the sequence), and "attn_bias", a tensor [sequence, memory_length]
        that is added to the scores of global attention, or None.
      params: GPT-Neo's config, a dict. `mode` "train" and "eval" give a loss,
        and "train" applies the dropout rates.
      mesh: mtf.Mesh.
      variable_dtype: mtf.VariableDType.
      context: None for a pass over the whole sequence; in a decode loop the
        context that `sample_autoregressive` makes. Its mode "first_part" is a
        pass over the whole sequence that records each layer's keys and values,
        [batch, heads, memory_length, features_per_head]; "incremental" reads
        the token at `context.position` − 1 and those records. Keys are recorded
        before `rotary_emb` rotates them. In a layer of global attention the
        `num_mem_kv` learned ones come first; a layer of type "none" records nothing.
        With `use_tpu` and without `rotary_emb` they are [batch, memory_length, heads ·
        features_per_head], and those of local attention the last positions alone.

    Returns:
      (logits, loss, loss_batch): logits [batch, sequence, vocab] (sequence of
      size 1 in incremental mode) in the master dtype; the mean loss in nats per
      token, in the slice dtype, and the loss of each token, float32 [batch,
      sequence]; None and None unless training or evaluating.

    Raises:
      ValueError: for an unsupported config option, a feature that is missing, or dimensions that do not fit.
      TypeError: for inputs, a dim or a variable_dtype of another type.
    """
    check_params(params)
    if not isinstance(variable_dtype, mtf.VariableDType):
        allowed = "an mtf.VariableDType is needed, such as mtf.VariableDType(tf.float32)"
        raise TypeError(f"variable_dtype={variable_dtype!r}; {allowed}")
    x, batch_dim, sequence_dim, embd_dim, vocab_dim, embed_sequence_dim = parse_inputs(mtf_features, other_features)
    if sequence_dim.size > embed_sequence_dim.size:
        raise ValueError(f"inputs of {sequence_dim.size} positions; the model has {embed_sequence_dim.size} (n_ctx)")
    incremental = context is not None and context.mode == "incremental"
    if incremental:
        read_position = context.position - 1
        x = take(x, read_position, sequence_dim)
    else:
        read_position = mtf.range(mesh, sequence_dim, tf.int32)

    wte = _variable(mesh, "wte", [vocab_dim, embd_dim], variable_dtype, stddev=0.02)
    with tf.variable_scope("token_embd"):
        h = _dropout(take(wte, x, vocab_dim), "embed_dropout", params)
    if not params.get("rotary_emb"):
        embeddings = _position_embeddings(read_position, embd_dim, embed_sequence_dim, params, variable_dtype)
        h += _dropout(embeddings, "embed_dropout", params)

    types = expand_attention_types(params["attention_types"], params["n_layer"])
    memories = _memories(types, sequence_dim, other_features, params, h, read_position, context)
    is_macaron = bool(params.get("macaron"))  # attention between two MLPs of half weight: arXiv 1906.02762
    for layer in range(params["n_layer"]):

        def block(x: mtf.Tensor, layer: int = layer) -> mtf.Tensor:
            with tf.variable_scope("" if params.get("share_parameters") else f"h{layer}"):
                if is_macaron:
                    x += 0.5 * _mlp(x, "mlp_macaron", params, variable_dtype)
                a = x  # GPT-Neo adds the input, where others add attention
                if types[layer] != "none":
                    normal = _norm(x, "norm_1", params, variable_dtype, context)
                    a = _attention(normal, memories[types[layer]], params, variable_dtype, context)
                x += _rezero(a, "norm_rezero_1", params, variable_dtype)
                m = _mlp(_norm(x, "norm_2", params, variable_dtype, context), "mlp", params, variable_dtype)
                return x + _rezero(0.5 * m if is_macaron else m, "norm_rezero_2", params, variable_dtype)

        if params.get("recompute_grad") and params.get("mode") == "train":
            h = mtf.recompute_grad(block, [h])
        else:
            h = block(h)

    if params.get("no_weight_tie"):
        with tf.variable_scope("wte_final_linear"):
            logits = _linear(h, "linear_out", vocab_dim, params, variable_dtype)
    else:
        h = _layer_norm(h, "ln_f", params, variable_dtype, context)
        head = wte
        if has_own_head(params):
            head = _variable(mesh, "lm_head", [vocab_dim, embd_dim], variable_dtype, stddev=0.02)
        with tf.variable_scope("wte_final_einsum"):
            logits = matmul(h, head)
    if incremental:
        logits = mtf.reshape(logits, [batch_dim, mtf.Dimension("sequence", 1), vocab_dim])

    loss = loss_batch = None
    if params.get("mode") in ("train", "eval"):
        loss, loss_batch = _loss(logits, feature(mtf_features, "labels", "the features"), params, variable_dtype)
    return mtf.cast(logits, variable_dtype.master_dtype), loss, loss_batch


def _loss(
    logits: mtf.Tensor, labels: mtf.Tensor, params: Params, variable_dtype: mtf.VariableDType
) -> tuple[mtf.Tensor, mtf.Tensor]:
    logits = mtf.cast(logits, tf.float32)
    loss_fn = entmax_cross_entropy_with_logits if params.get("entmax_loss") else (
        mtf.layers.softmax_cross_entropy_with_logits)  # fmt: skip
    vocab_dim = logits.shape[-1]
    with tf.variable_scope("xentropy_final"):
        z_loss = params.get("z_loss")
        loss_batch = loss_fn(logits, labels, vocab_dim, z_loss=1e-4 if z_loss is None else z_loss)
    if params.get("causal") is False:  # masked language models do not learn padding
        is_token = mtf.cast(mtf.not_equal(labels, params.get("padding_id") or 0), tf.float32)
        loss_batch *= is_token
    loss = mtf.reduce_mean(loss_batch) / (params.get("num_microbatches") or 1)
    return mtf.cast(loss, variable_dtype.slice_dtype), loss_batch


def _variable(
    mesh: mtf.Mesh,
    name: str,
    shape: list[mtf.Dimension],
    variable_dtype: mtf.VariableDType,
    stddev: float | None = None,
    constant: float = 0.0,
) -> mtf.Tensor:
    initializer = tf.constant_initializer(constant) if stddev is None else tf.random_normal_initializer(stddev=stddev)
    return mtf.get_variable(mesh, name, mtf.Shape(shape), dtype=variable_dtype, initializer=initializer)


def _matrix(
    mesh: mtf.Mesh,
    name: str,
    in_dim: mtf.Dimension,
    out_dim: mtf.Dimension,
    params: Params,
    variable_dtype: mtf.VariableDType,
    stddev: float,
) -> mtf.Tensor:
    """A layer's weights: [in, out], as checkpoints have them, or with `transposed_weights` [out, in]."""
    shape = [out_dim, in_dim] if params.get("transposed_weights") else [in_dim, out_dim]
    return _variable(mesh, name, shape, variable_dtype, stddev=stddev)


def is_matrix(name: str) -> bool:
    """Whether the variable of this name is one that `transposed_weights` transposes."""
    return name.rsplit("/", 1)[-1] in ("q", "k", "v", "o", "kernel")


def _dropout(x: mtf.Tensor, rate_option: str, params: Params) -> mtf.Tensor:
    rate = params.get(rate_option) or 0.0
    if params.get("mode") != "train" or rate == 0.0:
        return x
    # mtf.dropout takes other arguments from one release to the next.
    noise = mtf.random_uniform(x.mesh, x.shape, dtype=tf.float32)  # bfloat16 would round the rate
    return x * mtf.cast(mtf.less(noise, 1.0 - rate), x.dtype) * (1.0 / (1.0 - rate))


def _position_embeddings(
    positions: mtf.Tensor,
    embd_dim: mtf.Dimension,
    embed_sequence_dim: mtf.Dimension,
    params: Params,
    variable_dtype: mtf.VariableDType,
) -> mtf.Tensor:
    """The embeddings of `positions`, from a table or, with `axial_pos_emb`, from a grid.

    A position's embedding in the grid is the mean of its row's and its column's: Ho et al. 2019, "Axial Attention in
    Multidimensional Transformers", arXiv 1912.12180. Positions after the grid's end are embedded as zeros.
    """
    if not params.get("axial_pos_emb"):
        table = _variable(positions.mesh, "wpe", [embed_sequence_dim, embd_dim], variable_dtype, stddev=0.01)
        return take(table, positions, embed_sequence_dim)
    n_rows, n_columns = params["axial_pos_emb"]
    rows_dim, columns_dim = mtf.Dimension("axial_dim_0", n_rows), mtf.Dimension("axial_dim_1", n_columns)
    by_row = _variable(positions.mesh, "axial_wpe_1", [rows_dim, embd_dim], variable_dtype, stddev=0.01)
    by_column = _variable(positions.mesh, "axial_wpe_2", [columns_dim, embd_dim], variable_dtype, stddev=0.01)
    row = cwise_broadcast(lambda at: at // n_columns, [positions])
    column = cwise_broadcast(lambda at: tf.where_v2(at < n_rows * n_columns, at % n_columns, -1), [positions])
    return 0.5 * (take(by_row, row, rows_dim) + take(by_column, column, columns_dim))


def _norm(x: mtf.Tensor, scope: str, params: Params, variable_dtype: mtf.VariableDType, context: Any) -> mtf.Tensor:
    """The input of attention or MLP: x normalised; with `rezero`, x itself."""
    if params.get("rezero"):
        return x
    if not params.get("scalenorm"):
        return _layer_norm(x, scope, params, variable_dtype, context)
    with tf.variable_scope(scope):  # GPT-Neo's: layer norm with one scale for all features, no offset
        return layer_norm(x, _variable(x.mesh, "g", [], variable_dtype, constant=1.0), None, norm_epsilon(params))


def _layer_norm(
    x: mtf.Tensor, scope: str, params: Params, variable_dtype: mtf.VariableDType, context: Any
) -> mtf.Tensor:
    dim = x.shape[-1]
    with tf.variable_scope(scope):
        g = _variable(x.mesh, "g", [dim], variable_dtype, constant=1.0)
        b = _variable(x.mesh, "b", [dim], variable_dtype)
        if params.get("use_tpu") and context is not None and context.constant_states is not None:
            # layer norm needs them in float32, which XLA would compute anew in each step
            if context.mode == "incremental":
                g, b = context.get_constant_state(), context.get_constant_state()
            else:
                g, b = mtf.cast(g, tf.float32), mtf.cast(b, tf.float32)
                context.record_constant_state(g)
                context.record_constant_state(b)
        return layer_norm(x, g, b, float(norm_epsilon(params)))


def _rezero(x: mtf.Tensor, scope: str, params: Params, variable_dtype: mtf.VariableDType) -> mtf.Tensor:
    """What attention or MLP adds: x; with `rezero`, x times a scalar that is 0 before training (arXiv 2003.04887)."""
    if not params.get("rezero"):
        return x
    with tf.variable_scope(scope):
        return x * _variable(x.mesh, "g", [], variable_dtype)


@dataclasses.dataclass
class _Memory:
    """What the layers of one attention type attend to: their learned keys, followed by those of the positions."""

    attention_type: str
    n_learned: int
    dim: mtf.Dimension  # "memory_length", of learned keys and positions together
    states_dim: mtf.Dimension  # the same in the loop's states, which may be longer
    bias: mtf.Tensor | None  # added to the scores: [sequence, dim], or [batch, dim] for one token
    q_table: mtf.Tensor | None = None  # `rotary_table` of the queries, [sequence or batch, features_per_head]
    k_table: mtf.Tensor | None = None  # and of the keys, [dim, features_per_head]
    is_joined: bool = False  # whether the states have the heads side by side, as `attend_joined` reads them
    is_ring: bool = False  # whether they keep the last states_dim.size positions, each at its remainder by that size


def _memories(
    types: list[str],
    sequence_dim: mtf.Dimension,
    other_features: dict[str, Any],
    params: Params,
    h: mtf.Tensor,
    read_position: mtf.Tensor,
    context: Any,
) -> dict[str, _Memory]:
    """The memory of each attention type."""
    incremental = context is not None and context.mode == "incremental"
    whole_dim, n_learned = feature_dim(other_features, "memory_length_dim"), n_learned_keys(params)
    n_positions = whole_dim.size - n_learned
    if n_learned and n_positions < sequence_dim.size:
        raise ValueError(
            f"memory_length_dim has {whole_dim.size} entries; with num_mem_kv={n_learned} and {sequence_dim.size} "
            f"positions {n_learned + sequence_dim.size} are needed"
        )
    n_seen = sequence_dim.size if context is not None and not incremental else n_positions  # a prompt sees only itself
    depth_dim, q_table = _features_per_head(params), None
    if params.get("rotary_emb"):
        position_dim = mtf.Dimension("position", n_seen)  # a name that no layout splits
        q_table = take(rotary_table(h.mesh, position_dim, depth_dim), read_position, position_dim)
    # GPT-Neo's main.py sets use_tpu where it lowers with SimdMeshImpl. It works on any mesh.
    is_joined = bool(params.get("use_tpu")) and context is not None and q_table is None
    memories = {}
    for t in dict.fromkeys(types):
        if t == "none":
            continue
        n = n_learned if t == "global" else 0
        dim, states_dim = (mtf.Dimension(whole_dim.name, n + size) for size in (n_seen, n_positions))
        is_ring = False
        if is_joined and t == "local" and context.initial_position is not None:
            ring_size = -(-_local_radius(params) // RING_MULTIPLE) * RING_MULTIPLE
            is_ring = ring_size < n_positions
            states_dim = mtf.Dimension(whole_dim.name, min(ring_size, n_positions))
            dim = states_dim if incremental else dim
        bias = (
            _global_bias(dim, other_features, read_position, incremental)
            if t == "global"
            else _local_bias(dim, params, h, read_position, is_ring and incremental)
        )
        k_table = None if q_table is None else rotary_table(h.mesh, dim, depth_dim, n)
        memories[t] = _Memory(t, n, dim, states_dim, bias, q_table, k_table, is_joined, is_ring)
    return memories


def _global_bias(
    memory_dim: mtf.Dimension, other_features: dict[str, Any], read_position: mtf.Tensor, incremental: bool
) -> mtf.Tensor | None:
    bias = feature(other_features, "attn_bias")
    if bias is None:
        if incremental:
            raise ValueError("attn_bias is None; decoding needs a causal one (see biasmask_attn_weights)")
        return None
    bias = resize(bias, feature_dim(other_features, "memory_length_dim"), memory_dim.size)
    queries = bias.shape[0]
    return take(bias, read_position, queries) if incremental else resize(bias, queries, read_position.shape[0].size)


def _local_radius(params: Params) -> int:
    return params.get("local_attention_radius") or LOCAL_RADIUS


def _local_bias(
    memory_dim: mtf.Dimension, params: Params, h: mtf.Tensor, read_position: mtf.Tensor, is_ring: bool
) -> mtf.Tensor:
    radius = _local_radius(params)

    def window(query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        if is_ring:  # the newest position up to the query's that has this remainder
            distance = tf.math.floormod(query - key, memory_dim.size)
            seen = tf.logical_and(distance <= query, distance < radius)
        else:
            seen = tf.logical_and(key <= query, key > query - radius)
        return tf.where_v2(seen, tf.zeros((), h.dtype), tf.constant(max(MASK, float(h.dtype.min)), h.dtype))

    return cwise_broadcast(window, [read_position, mtf.range(h.mesh, memory_dim, tf.int32)], output_dtype=h.dtype)


def _rotated(x: mtf.Tensor, table: mtf.Tensor | None) -> mtf.Tensor:
    return x if table is None else rotate(x, table)


def _features_per_head(params: Params) -> mtf.Dimension:
    return mtf.Dimension("features_per_head", params["n_embd"] // params["n_head"])


def _attention(
    x: mtf.Tensor, memory: _Memory, params: Params, variable_dtype: mtf.VariableDType, context: Any
) -> mtf.Tensor:
    *lead, embd_dim = x.shape.dims  # [batch, sequence], or [batch] for one token
    heads_dim = mtf.Dimension("heads", params["n_head"])
    kv_dim = _features_per_head(params)
    # In checkpoints the heads are concatenated in one dim, which a layout splits like heads.
    joined_dim = mtf.Dimension("heads", params["n_embd"])

    with tf.variable_scope("attn"):
        stddev = params["n_embd"] ** -0.5

        def weights(name: str, stddev: float = stddev) -> mtf.Tensor:
            return _matrix(x.mesh, name, embd_dim, joined_dim, params, variable_dtype, stddev)

        # Attention scores are not scaled; the initial query weights are instead.
        projections = [weights("q", stddev * kv_dim.size**-0.5), weights("k"), weights("v")]
        if context is None or context.constant_states is None:
            q, k, v = (matmul(x, w) for w in projections)
        else:
            # One product with all three weights, which are concatenated once, outside the loop.
            if context.mode == "incremental":
                joined = context.get_constant_state()
            else:
                joined = mtf.stack(projections, "projections", axis=projections[0].shape.dims.index(joined_dim))
                context.record_constant_state(joined)
            q, k, v = mtf.unstack(matmul(x, joined), joined.shape.get_dim_by_name("projections"))
        q, k, v = (mtf.reshape(t, lead + [heads_dim, kv_dim]) for t in (q, k, v))
        q = _rotated(q, memory.q_table)
        if context is not None and context.mode == "incremental":
            a = _attention_of_token(q, k, v, memory, context)
        else:
            if memory.n_learned:
                k = _prepend_learned(k, "mem_k", memory, variable_dtype)
                v = _prepend_learned(v, "mem_v", memory, variable_dtype)
            a = (
                _attention_of_sequence(q, k, v, memory, params)
                if context is None
                else _attention_of_prompts(q, k, v, memory, context)
            )

        o = _matrix(x.mesh, "o", joined_dim, embd_dim, params, variable_dtype, stddev)
        a = matmul(mtf.reshape(a, lead + [joined_dim]), o)
        with tf.variable_scope("compute_output_bias"):
            a += _variable(x.mesh, "o_b", [embd_dim], variable_dtype)
    return _dropout(a, "res_dropout", params)


def _prepend_learned(x: mtf.Tensor, name: str, memory: _Memory, variable_dtype: mtf.VariableDType) -> mtf.Tensor:
    """Keys or values [batch, sequence, heads, features_per_head] with the learned ones before them along sequence."""
    batch_dim, sequence_dim, heads_dim, kv_dim = x.shape.dims
    learned_dim = mtf.Dimension("mem_kv_sequence", memory.n_learned)
    stddev = kv_dim.size**-0.5
    with tf.variable_scope("attention"):
        learned = _variable(x.mesh, name, [learned_dim, heads_dim, kv_dim], variable_dtype, stddev=stddev)
    learned = mtf.broadcast(learned, mtf.Shape([batch_dim, learned_dim, heads_dim, kv_dim]))
    return mtf.concat([mtf.rename_dimension(learned, learned_dim.name, sequence_dim.name), x], sequence_dim.name)


def _attention_of_sequence(q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, memory: _Memory, params: Params) -> mtf.Tensor:
    """Attention over the whole sequence, differentiable, with dropout."""
    batch_dim, sequence_dim, heads_dim, _ = q.shape.dims
    k, v = (mtf.replace_dimensions(t, t.shape[1], memory.dim) for t in (k, v))
    # heads before sequence, so that scores and their mask are contiguous
    scores_shape = [batch_dim, heads_dim, sequence_dim, memory.dim]
    scores = mtf.einsum([q, _rotated(k, memory.k_table)], output_shape=scores_shape)
    scores = mtf.cast(scores, tf.float32)
    if memory.bias is not None:
        scores += mtf.cast(memory.bias, tf.float32)
    weights = mtf.cast(mtf.softmax(scores, memory.dim), v.dtype)
    if memory.attention_type == "global":  # as in GPT-Neo, where local attention has none
        weights = _dropout(weights, "attn_dropout", params)
    return mtf.einsum([weights, v], output_shape=q.shape)


def _attention_of_prompts(q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, memory: _Memory, context: Any) -> mtf.Tensor:
    """Attention of prompts to themselves; records keys and values."""

    def heads_first(x: mtf.Tensor) -> mtf.Tensor:
        batch_dim, sequence_dim, heads_dim, kv_dim = x.shape.dims
        return mtf.transpose(x, mtf.Shape([batch_dim, heads_dim, sequence_dim, kv_dim]))

    if memory.is_joined:
        context.record_new_states([_joined_states(t, memory, context.initial_position) for t in (k, v)])
    k, v = (heads_first(t) for t in (k, v))
    k, v = (mtf.replace_dimensions(t, t.shape[2], memory.dim) for t in (k, v))
    if context.initial_position is not None:
        k, v = (_zero_padding(t, context.initial_position, memory) for t in (k, v))
    if not memory.is_joined:
        context.record_new_states([resize(t, memory.dim, memory.states_dim.size) for t in (k, v)])
    bias = mtf.zeros(q.mesh, [memory.dim], q.dtype) if memory.bias is None else memory.bias
    a = attend(heads_first(q), _rotated(k, memory.k_table), v, bias, memory.dim)
    return mtf.transpose(a, q.shape)


def _joined_states(x: mtf.Tensor, memory: _Memory, length: mtf.Tensor | None) -> mtf.Tensor:
    """Keys or values [batch, sequence, heads, features_per_head] of prompts of `length` [batch] as states that
    `attend_joined` reads, [batch, memory_length, heads · features_per_head]."""
    batch_dim, sequence_dim, heads_dim, kv_dim = x.shape.dims
    x = mtf.reshape(x, [batch_dim, sequence_dim, mtf.Dimension(heads_dim.name, heads_dim.size * kv_dim.size)])
    if length is not None:
        x = _zero_padding(x, length, memory)
    size = memory.states_dim.size
    if not memory.is_ring:
        return mtf.replace_dimensions(
            resize(x, sequence_dim, size), mtf.Dimension(sequence_dim.name, size), memory.states_dim
        )
    rounds_dim = mtf.Dimension("ring_rounds", -(-sequence_dim.size // size))
    x = resize(x, sequence_dim, rounds_dim.size * size)
    x = mtf.replace_dimensions(x, x.shape[1], [rounds_dim, memory.states_dim])
    ring, *later = mtf.unstack(x, rounds_dim)
    at = mtf.range(x.mesh, memory.states_dim, tf.int32)
    for i, turn in enumerate(later, 1):

        def overwrite(old: tf.Tensor, new: tf.Tensor, at: tf.Tensor, n: tf.Tensor, begin: int = i * size) -> tf.Tensor:
            return tf.where_v2(begin + at < n, new, old)

        ring = cwise_broadcast(overwrite, [ring, turn, at, length], ring.shape)
    return ring


def _attention_of_token(q: mtf.Tensor, k: mtf.Tensor, v: mtf.Tensor, memory: _Memory, context: Any) -> mtf.Tensor:
    """Attention of one token to the memory, once its own key and value are written there; records both."""
    at = context.position + (memory.n_learned - 1)
    if memory.is_ring:
        at = cwise_broadcast(lambda at: tf.math.floormod(at, memory.dim.size), [at])
    if memory.is_joined:
        batch_dim, heads_dim, kv_dim = k.shape.dims
        joined = [batch_dim, mtf.Dimension(heads_dim.name, heads_dim.size * kv_dim.size)]
        old, own = context.get_states(2), [mtf.reshape(t, joined) for t in (k, v)]
        context.record_new_states([write_at(x, new, at, memory.dim, is_inside=True) for x, new in zip(old, own)])
        return attend_joined(q, old, own, at, memory.bias, memory.dim)
    # True in sample_autoregressive, whose states nobody else reads
    may_overwrite = getattr(context, "may_overwrite_states", False)
    k, v = (
        write_at(old, new, at, memory.dim, may_overwrite=may_overwrite)
        for old, new in zip(context.get_states(2), (k, v))
    )
    context.record_new_states([k, v])
    return attend(q, _rotated(k, memory.k_table), v, memory.bias, memory.dim)


def _zero_padding(x: mtf.Tensor, length: mtf.Tensor, memory: _Memory) -> mtf.Tensor:
    """Keys or values with zeros from position `length` on: padding has a weight of 0, but 0 times NaN would be NaN."""
    (dim,) = [d for d in x.shape.dims if d.name in ("sequence", memory.dim.name)]
    at = mtf.range(x.mesh, dim, tf.int32)
    return cwise_broadcast(
        lambda x, at, n: tf.where_v2(at < n + memory.n_learned, x, tf.zeros_like(x)), [x, at, length], x.shape
    )


def _mlp(x: mtf.Tensor, scope: str, params: Params, variable_dtype: mtf.VariableDType) -> mtf.Tensor:
    embd_dim = x.shape[-1]
    hidden_dim = mtf.Dimension("intermediate_expanded", intermediate_size(params))
    with tf.variable_scope(scope):
        if params.get("mlp_glu"):  # Shazeer 2020, arXiv 2002.05202
            both_dim = mtf.Dimension(hidden_dim.name, 2 * hidden_dim.size)
            h, gate = _halves(_linear(x, "c_fc", both_dim, params, variable_dtype))
            h *= activate(gate, _activation(params))
        else:
            h = activate(_linear(x, "c_fc", hidden_dim, params, variable_dtype), _activation(params))
        h = _linear(h, "c_proj", embd_dim, params, variable_dtype, is_last=True)
    return _dropout(h, "res_dropout", params)


def _linear(
    x: mtf.Tensor,
    scope: str,
    out_dim: mtf.Dimension,
    params: Params,
    variable_dtype: mtf.VariableDType,
    is_last: bool = False,
) -> mtf.Tensor:
    """x · kernel + bias; is_last if its output is added to the residual stream."""
    in_dim, stddev = x.shape[-1], 0.02
    if params.get("scale_by_depth") and is_last:
        stddev *= params["n_layer"] ** -0.5
    if params.get("scale_by_in"):
        stddev *= in_dim.size**-0.5
    with tf.variable_scope(f"conv1d_main/{scope}"):
        kernel = _matrix(x.mesh, "kernel", in_dim, out_dim, params, variable_dtype, stddev)
        return matmul(x, kernel) + _variable(x.mesh, "bias", [out_dim], variable_dtype)


def _halves(x: mtf.Tensor) -> list[mtf.Tensor]:
    """The first and second half of x along the last dim, each with x's layout."""
    dim = x.shape[-1]
    halves_dim, half_dim = mtf.Dimension("halves", 2), mtf.Dimension("half", dim.size // 2)  # no layout splits these
    halves = mtf.unstack(mtf.replace_dimensions(x, dim, [halves_dim, half_dim]), halves_dim)
    return [mtf.rename_dimension(half, half_dim.name, dim.name) for half in halves]

"""The GPT-Neo transformer in mesh-tensorflow.

The decoder of Radford et al. 2019 ("Language Models are Unsupervised Multitask
Learners") as GPT-Neo varies it: layers of global and of local attention in
turn (a window, as in Child et al. 2019, arXiv 1904.10509), attention scores
not divided by the square root of the head's width, output tied to the token
table; positions by a table or, with `rotary_emb`, by turning queries and keys
(Su et al. 2021, arXiv 2104.09864). Variables carry GPT-Neo's names, so that
its checkpoints load.

Dimensions: batch, sequence, embd, vocab, heads, features_per_head,
memory_length, embed_sequence, intermediate_expanded. Any of them may be split
over a mesh axis, apart from sequence and features_per_head, as long as no two
dims of one tensor are split along the same axis (see TENSORS).
"""

from collections.abc import Sequence
from typing import Any

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import Params, is_int, is_real
from gpt_neo_sampling.layers import (
    ACTIVATIONS,
    HUGGING_FACE_ACTIVATIONS,
    activate,
    attend,
    layer_norm,
    matmul,
    rotary_table,
    rotate,
)
from gpt_neo_sampling.models.utils import MASK, entmax_cross_entropy_with_logits, parse_inputs
from gpt_neo_sampling.mtf_ops import cwise_broadcast, resize, take, write_at

NORM_EPSILON = 1e-5
LOCAL_RADIUS = 256  # GPT-Neo's, where the config names none; Hugging Face's too
ATTENTION_TYPES = ("global", "local", "linear", "none")  # what GPT-Neo's configs may name

# The dims that stand together in a tensor of the model or of its decode loop, and so
# cannot be split along one mesh axis.
TENSORS = (
    ("batch", "vocab"),
    ("batch", "embd"),
    ("batch", "embed_sequence"),  # a look-up of positions
    ("batch", "heads", "memory_length"),
    ("batch", "intermediate_expanded"),
    ("vocab", "embd"),
    ("embed_sequence", "embd"),
    ("embd", "heads"),
    ("embd", "intermediate_expanded"),
)

# Config keys that change the model's function in ways that are not built here.
UNSUPPORTED_OPTIONS = (
    "axial_pos_emb",
    "convolution_dimension",
    "fixed_pos_emb",
    "lightweight_conv_attention",
    "macaron",
    "mlp_glu",
    "moe_layers",
    "no_weight_tie",
    "num_mem_kv",
    "rezero",
    "scalenorm",
    "share_parameters",
)


# Keys of Hugging Face's configs that the model follows. GPT-Neo does not read them: its models have one value of each.
HUGGING_FACE_OPTIONS = ("intermediate_size", "layer_norm_epsilon", "tie_word_embeddings")


def expand_attention_types(nested: Any, n_layer: int) -> list[str]:
    """GPT-Neo's `[[[types…], repeats], …]` as a list of one type a layer.

    `[[["global", "local"], 2]]` gives global, local, global, local.

    Args:
      nested: the config's list. One that names a type a layer already, as this
        function returns it, is taken too.
      n_layer: int, the number of layers that it must come to.

    Returns:
      a list of n_layer strings, each "global", "local", "linear" or "none".

    Raises:
      ValueError: for a list of another form, an unknown type, or another
        number of layers.
    """
    groups = [([entry], 1) if isinstance(entry, str) else entry for entry in _as_list(nested)]
    if not groups or not all(len(_as_list(g)) == 2 and _as_list(g[0]) and isinstance(g[1], int) for g in groups):
        shown = repr(nested)[:80]
        raise ValueError(f"attention_types is {shown}; allowed: [[[types…], repeats], …]")
    unknown = [t for types, _ in groups for t in types if t not in ATTENTION_TYPES]
    if unknown:
        raise ValueError(f"attention_types has {unknown[0]!r}; allowed: {', '.join(ATTENTION_TYPES)}")
    count = sum(len(types) * repeats for types, repeats in groups)
    if count != n_layer or any(repeats < 0 for _, repeats in groups):
        raise ValueError(f"attention_types names {count} layers, but n_layer is {n_layer}")
    return [t for types, repeats in groups for _ in range(repeats) for t in types]


def _as_list(value: Any) -> Sequence[Any]:
    """A list or tuple as it is; anything else, a string among it, as []."""
    return value if isinstance(value, (list, tuple)) else []


def check_params(params: Params) -> None:
    """Checks a GPT-Neo config for options that this model does not have.

    Args:
      params: a dict of GPT-Neo's config keys.

    Raises:
      ValueError: naming the option, what it was given and what is allowed.
    """
    get = params.get
    for option in UNSUPPORTED_OPTIONS:
        if get(option):
            raise ValueError(f"config option {option}={get(option)!r} is not supported; leave it out or make it false")
    activations = (*ACTIVATIONS, *HUGGING_FACE_ACTIVATIONS)
    if _activation(params) not in activations:
        raise ValueError(
            f"config option activation_fn={_activation(params)!r} is not supported; allowed: {', '.join(activations)}"
        )
    for option in ("n_layer", "n_head", "n_embd"):
        value = get(option)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config option {option}={value!r}: a whole number of at least 1 is needed")
    if params["n_embd"] % params["n_head"]:
        raise ValueError(f"config option n_embd={params['n_embd']} is not a multiple of n_head={params['n_head']}")
    if get("rotary_emb") and params["n_embd"] // params["n_head"] % 2:
        raise ValueError(
            f"config option rotary_emb turns pairs of a head's features; n_embd={params['n_embd']} over "
            f"n_head={params['n_head']} gives an odd number, {params['n_embd'] // params['n_head']}"
        )
    for t in expand_attention_types(get("attention_types"), params["n_layer"]):
        if t == "linear":
            raise ValueError("config option attention_types: 'linear' is not supported; allowed: global, local, none")
        if t == "local" and get("causal") is False:
            raise ValueError("config option causal=False with a 'local' layer is not supported: its window is causal")
    radius = get("local_attention_radius")
    if radius is not None and radius < 1:
        raise ValueError(f"config option local_attention_radius={radius}: at least 1 is needed")
    hidden, epsilon = intermediate_size(params), norm_epsilon(params)
    if not is_int(hidden) or hidden < 1:
        raise ValueError(f"config option intermediate_size={hidden!r}: a whole number of at least 1 is needed")
    if not is_real(epsilon) or not 0 <= epsilon <= float(tf.float32.max):
        raise ValueError(f"config option layer_norm_epsilon={epsilon!r}: a number of at least 0 is needed")


def _activation(params: Params) -> str:
    """GPT-Neo's code reads `activation_fn`, and not the `activation_function` of its configs."""
    return params.get("activation_fn") or "gelu"


def has_own_head(params: Params) -> bool:
    """Whether the output is a table of its own, "lm_head", as a Hugging Face model may have it, and not the token's."""
    return params.get("tie_word_embeddings") is False


def intermediate_size(params: Params) -> int:
    """How many features a layer has between its two products: 4·n_embd, but in Hugging Face models of another size."""
    size = params.get("intermediate_size")
    return 4 * params["n_embd"] if size is None else size


def norm_epsilon(params: Params) -> float:
    """What layer norm adds to a variance: 1e-5, but in Hugging Face models that have another number."""
    epsilon = params.get("layer_norm_epsilon")
    return NORM_EPSILON if epsilon is None else epsilon


def splittable_dims(params: Params) -> dict[str, int | None]:
    """{name: size} of the model's dims that a layout may split.

    The sizes that the caller of the model chooses, of the batch, of the
    vocabulary (which may be padded) and of the sequence in memory, are None.
    """
    dims = {
        "batch": None,
        "vocab": None,
        "memory_length": None,
        "embd": params["n_embd"],
        "heads": params["n_head"],
        "intermediate_expanded": intermediate_size(params),
    }
    return dims if params.get("rotary_emb") else {**dims, "embed_sequence": params["n_ctx"]}


def model(
    mtf_features: dict[str, mtf.Tensor],
    other_features: dict[str, Any],
    params: Params,
    mesh: mtf.Mesh,
    variable_dtype: mtf.VariableDType,
    context: Any = None,
) -> tuple[mtf.Tensor, mtf.Tensor | None, mtf.Tensor | None]:
    """The network: token ids in, logits and, when training, the loss out.

    Args:
      mtf_features: a dict with "inputs", int32 [batch, sequence]; when training
        or evaluating "labels" too, of the same shape. An id outside the
        vocabulary (a padding id, say) looks up a zero vector.
      other_features: a dict with the dimensions "embd_dim", "vocab_dim",
        "embed_sequence_dim" and "memory_length_dim", and "attn_bias", a tensor
        [sequence, memory_length] that is added to the scores of global
        attention, or None for none.
      params: GPT-Neo's config, a dict. `mode` "train" and "eval" give a loss,
        and "train" applies the dropout rates.
      mesh: mtf.Mesh.
      variable_dtype: mtf.VariableDType.
      context: None for a pass over the whole sequence; in a decode loop the
        context that `sample_autoregressive` makes. Its mode "first_part" is a
        pass over the whole sequence that records each layer's keys and values,
        [batch, heads, memory_length, features_per_head]; "incremental" reads
        the token at `context.position` − 1 and those records. Keys are recorded
        as they are before `rotary_emb` turns them; a layer of type "none"
        records nothing.

    Returns:
      (logits, loss, loss_batch): logits [batch, sequence, vocab] (sequence of
      size 1 in incremental mode) in the master dtype; the mean loss, in nats a
      token, and [batch, sequence] of them, float32, or None and None.

    Raises:
      ValueError: for a config option that is not supported.
    """
    check_params(params)
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
        wpe = _variable(mesh, "wpe", [embed_sequence_dim, embd_dim], variable_dtype, stddev=0.01)
        with tf.variable_scope("pos_embd"):
            h += _dropout(take(wpe, read_position, embed_sequence_dim), "embed_dropout", params)

    types = expand_attention_types(params["attention_types"], params["n_layer"])
    memory_dim = other_features["memory_length_dim"]
    if context is not None and not incremental:  # a prompt sees itself alone, however long the memory
        memory_dim = mtf.Dimension(memory_dim.name, sequence_dim.size)
    biases = {
        t: _attention_bias(t, memory_dim, other_features, params, h, read_position, incremental)
        for t in set(types) - {"none"}
    }
    tables = _rotary_tables(mesh, memory_dim, params, read_position) if params.get("rotary_emb") else None
    for layer in range(params["n_layer"]):

        def block(x: mtf.Tensor, layer: int = layer) -> mtf.Tensor:
            with tf.variable_scope(f"h{layer}"):
                layer_type = types[layer]
                if layer_type == "none":  # GPT-Neo adds the input, where others add attention
                    x += x
                else:
                    x += _attention(
                        _layer_norm(x, "norm_1", params, variable_dtype), layer_type, biases[layer_type], tables,
                        memory_dim, other_features, params, variable_dtype, context,
                    )  # fmt: skip
                return x + _mlp(_layer_norm(x, "norm_2", params, variable_dtype), params, variable_dtype)

        if params.get("recompute_grad") and params.get("mode") == "train":
            h = mtf.recompute_grad(block, [h])
        else:
            h = block(h)

    h = _layer_norm(h, "ln_f", params, variable_dtype)
    head = wte
    if has_own_head(params):
        head = _variable(mesh, "lm_head", [vocab_dim, embd_dim], variable_dtype, stddev=0.02)
    with tf.variable_scope("wte_final_einsum"):
        logits = matmul(h, head)
        if incremental:
            logits = mtf.reshape(logits, [batch_dim, mtf.Dimension("sequence", 1), vocab_dim])

    loss = loss_batch = None
    if params.get("mode") in ("train", "eval"):
        loss, loss_batch = _loss(logits, mtf_features["labels"], params, variable_dtype)
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


def _dropout(x: mtf.Tensor, rate_option: str, params: Params) -> mtf.Tensor:
    rate = params.get(rate_option) or 0.0
    if params.get("mode") != "train" or rate == 0.0:
        return x
    # mtf.dropout takes other arguments from one release to the next.
    noise = mtf.random_uniform(x.mesh, x.shape, dtype=tf.float32)  # bfloat16 would round the rate
    return x * mtf.cast(mtf.less(noise, 1.0 - rate), x.dtype) * (1.0 / (1.0 - rate))


def _layer_norm(x: mtf.Tensor, scope: str, params: Params, variable_dtype: mtf.VariableDType) -> mtf.Tensor:
    dim = x.shape[-1]
    with tf.variable_scope(scope):
        g = _variable(x.mesh, "g", [dim], variable_dtype, constant=1.0)
        b = _variable(x.mesh, "b", [dim], variable_dtype)
        return layer_norm(x, g, b, float(norm_epsilon(params)))


def _attention_bias(
    attention_type: str,
    memory_dim: mtf.Dimension,
    other_features: dict[str, Any],
    params: Params,
    h: mtf.Tensor,
    read_position: mtf.Tensor,
    incremental: bool,
) -> mtf.Tensor | None:
    """What is added to the scores: [sequence, memory_length], or a row a prompt; None for nothing."""
    if attention_type == "global":
        bias = other_features["attn_bias"]
        if bias is None:
            if incremental:
                raise ValueError("attn_bias is None; decoding needs a causal one (see biasmask_attn_weights)")
            return None
        bias = resize(bias, other_features["memory_length_dim"], memory_dim.size)
        queries = bias.shape[0]
        return take(bias, read_position, queries) if incremental else resize(bias, queries, read_position.shape[0].size)
    radius = params.get("local_attention_radius") or LOCAL_RADIUS

    def window(query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        distance = query - key
        seen = tf.logical_and(distance >= 0, distance < radius)
        return tf.where_v2(seen, tf.zeros((), h.dtype), tf.constant(max(MASK, float(h.dtype.min)), h.dtype))

    return cwise_broadcast(window, [read_position, mtf.range(h.mesh, memory_dim, tf.int32)], output_dtype=h.dtype)


def _rotary_tables(
    mesh: mtf.Mesh, memory_dim: mtf.Dimension, params: Params, read_position: mtf.Tensor
) -> tuple[mtf.Tensor, mtf.Tensor]:
    """What queries are turned by, [sequence or batch, features_per_head], and keys, [memory_length, …]."""
    depth_dim = _features_per_head(params)
    position_dim = mtf.Dimension("position", memory_dim.size)  # one that no layout splits
    queries = take(rotary_table(mesh, position_dim, depth_dim), read_position, position_dim)
    return queries, rotary_table(mesh, memory_dim, depth_dim)


def _turned(x: mtf.Tensor, table: mtf.Tensor | None) -> mtf.Tensor:
    return x if table is None else rotate(x, table)


def _features_per_head(params: Params) -> mtf.Dimension:
    return mtf.Dimension("features_per_head", params["n_embd"] // params["n_head"])


def _attention(
    x: mtf.Tensor,
    attention_type: str,
    bias: mtf.Tensor | None,
    tables: tuple[mtf.Tensor, mtf.Tensor] | None,
    memory_dim: mtf.Dimension,
    other_features: dict[str, Any],
    params: Params,
    variable_dtype: mtf.VariableDType,
    context: Any,
) -> mtf.Tensor:
    *lead, embd_dim = x.shape.dims  # [batch, sequence], or [batch] for one token
    heads_dim = mtf.Dimension("heads", params["n_head"])
    kv_dim = _features_per_head(params)
    # Checkpoints hold the heads side by side in one dim, which splits as heads do.
    joined_dim = mtf.Dimension("heads", params["n_embd"])

    with tf.variable_scope("attn"):
        stddev = params["n_embd"] ** -0.5

        def weights(name: str, stddev: float = stddev) -> mtf.Tensor:
            return _variable(x.mesh, name, [embd_dim, joined_dim], variable_dtype, stddev=stddev)

        # The scores are not scaled; the initial queries are, instead.
        projections = [weights("q", stddev * kv_dim.size**-0.5), weights("k"), weights("v")]
        if context is None or context.constant_states is None:
            q, k, v = (matmul(x, w) for w in projections)
        else:
            # One product of all three, of weights put together once, outside of the loop.
            if context.mode == "incremental":
                joined = context.get_constant_state()
            else:
                joined = mtf.stack(projections, "projections", axis=1)
                context.record_constant_state(joined)
            q, k, v = mtf.unstack(matmul(x, joined), joined.shape[1])
        q, k, v = (mtf.reshape(t, lead + [heads_dim, kv_dim]) for t in (q, k, v))
        q_table, k_table = tables or (None, None)
        q = _turned(q, q_table)
        if context is None:
            a = _attention_in_training(q, k, v, k_table, attention_type, bias, memory_dim, params)
        else:
            a = _attention_in_loop(q, k, v, k_table, bias, memory_dim, other_features["memory_length_dim"], context)

        o = _variable(x.mesh, "o", [joined_dim, embd_dim], variable_dtype, stddev=stddev)
        a = matmul(mtf.reshape(a, lead + [joined_dim]), o)
        with tf.variable_scope("compute_output_bias"):
            a += _variable(x.mesh, "o_b", [embd_dim], variable_dtype)
    return _dropout(a, "res_dropout", params)


def _attention_in_training(
    q: mtf.Tensor,
    k: mtf.Tensor,
    v: mtf.Tensor,
    k_table: mtf.Tensor | None,
    attention_type: str,
    bias: mtf.Tensor | None,
    memory_dim: mtf.Dimension,
    params: Params,
) -> mtf.Tensor:
    """Over the whole sequence, differentiable, with dropout."""
    batch_dim, sequence_dim, heads_dim, _ = q.shape.dims
    k, v = (mtf.replace_dimensions(t, sequence_dim, memory_dim) for t in (k, v))
    # heads stand before sequence: scores and their mask are then contiguous
    scores = mtf.einsum([q, _turned(k, k_table)], output_shape=[batch_dim, heads_dim, sequence_dim, memory_dim])
    scores = mtf.cast(scores, tf.float32)
    if bias is not None:
        scores += mtf.cast(bias, tf.float32)
    weights = mtf.cast(mtf.softmax(scores, memory_dim), v.dtype)
    if attention_type == "global":  # as in GPT-Neo, where local attention has none
        weights = _dropout(weights, "attn_dropout", params)
    return mtf.einsum([weights, v], output_shape=q.shape)


def _attention_in_loop(
    q: mtf.Tensor,
    k: mtf.Tensor,
    v: mtf.Tensor,
    k_table: mtf.Tensor | None,
    bias: mtf.Tensor | None,
    memory_dim: mtf.Dimension,
    states_dim: mtf.Dimension,
    context: Any,
) -> mtf.Tensor:
    """Of a prompt to itself, or of one token to what is in memory; records keys and values."""
    if context.mode == "incremental":
        # what sample_autoregressive keeps, nobody else reads
        may_overwrite = getattr(context, "may_overwrite_states", False)
        k, v = (
            write_at(old, new, context.position - 1, memory_dim, may_overwrite=may_overwrite)
            for old, new in zip(context.get_states(2), (k, v))
        )
        context.record_new_states([k, v])
        return attend(q, _turned(k, k_table), v, bias, memory_dim)
    batch_dim, sequence_dim, heads_dim, kv_dim = q.shape.dims
    heads_first = [batch_dim, heads_dim, sequence_dim, kv_dim]
    k, v = (mtf.replace_dimensions(mtf.transpose(t, heads_first), sequence_dim, memory_dim) for t in (k, v))
    if context.initial_position is not None:
        k, v = (_up_to(t, context.initial_position, memory_dim) for t in (k, v))
    context.record_new_states([resize(t, memory_dim, states_dim.size) for t in (k, v)])
    if bias is None:
        bias = mtf.zeros(q.mesh, [memory_dim], q.dtype)
    a = attend(mtf.transpose(q, heads_first), _turned(k, k_table), v, bias, memory_dim)
    return mtf.transpose(a, q.shape)


def _up_to(x: mtf.Tensor, length: mtf.Tensor, dim: mtf.Dimension) -> mtf.Tensor:
    """x with zeros from `length` on: what stands behind a prompt is never read,
    but a NaN there would be, times a weight of 0."""
    at = mtf.range(x.mesh, dim, tf.int32)
    return cwise_broadcast(lambda x, at, n: tf.where_v2(at < n, x, tf.zeros_like(x)), [x, at, length], x.shape)


def _mlp(x: mtf.Tensor, params: Params, variable_dtype: mtf.VariableDType) -> mtf.Tensor:
    embd_dim = x.shape[-1]
    hidden_dim = mtf.Dimension("intermediate_expanded", intermediate_size(params))
    in_stddev = out_stddev = 0.02
    if params.get("scale_by_depth"):
        out_stddev *= params["n_layer"] ** -0.5
    if params.get("scale_by_in"):
        in_stddev *= embd_dim.size**-0.5
        out_stddev *= hidden_dim.size**-0.5

    def linear(x: mtf.Tensor, scope: str, in_dim: mtf.Dimension, out_dim: mtf.Dimension, stddev: float) -> mtf.Tensor:
        with tf.variable_scope(scope):
            kernel = _variable(x.mesh, "kernel", [in_dim, out_dim], variable_dtype, stddev=stddev)
            bias = _variable(x.mesh, "bias", [out_dim], variable_dtype)
            return matmul(x, kernel) + bias

    with tf.variable_scope("mlp/conv1d_main"):
        h = activate(linear(x, "c_fc", embd_dim, hidden_dim, in_stddev), _activation(params))
        h = linear(h, "c_proj", hidden_dim, embd_dim, out_stddev)
    return _dropout(h, "res_dropout", params)

"""The package's transformer on a mesh, with a test's own weights."""

import functools
import json
import re

import numpy as np
from conftest import DATA
from programs import dims

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.checkpoint import open_checkpoint
from gpt_neo_sampling.generation.generator import DEMO_FOLDER
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.decoding_context import DecodeContext
from gpt_neo_sampling.models.utils import biasmask_attn_weights

FLOAT32 = mtf.VariableDType(tf.float32)


def config(attention_types, *, n_head=4, n_embd=16, n_vocab=32, n_ctx=12, **more):
    """A GPT-Neo config for these attention types, one for each layer."""
    return {
        "attention_types": [[list(attention_types), 1]],
        "n_layer": len(attention_types),
        "n_head": n_head,
        "n_embd": n_embd,
        "n_vocab": n_vocab,
        "n_ctx": n_ctx,
        "padding_id": 0,
        "mode": "predict",
        **more,
    }


def variable_shapes(params):
    """The variables of GPT-Neo's checkpoints: {name without "gpt2/": shape}."""
    v, c, e, get = params["n_vocab"], params["n_ctx"], params["n_embd"], params.get
    inner = get("intermediate_size", 4 * e)
    shapes = {"wte": (v, e), "ln_f/g": (e,), "ln_f/b": (e,)}
    if get("no_weight_tie"):
        head = "wte_final_linear/conv1d_main/linear_out/"
        shapes = {"wte": (v, e), head + "kernel": (e, v), head + "bias": (v,)}
    if get("axial_pos_emb") and not get("rotary_emb"):
        rows, columns = params["axial_pos_emb"]
        shapes |= {"axial_wpe_1": (rows, e), "axial_wpe_2": (columns, e)}
    elif not get("rotary_emb"):
        shapes["wpe"] = (c, e)
    types = [t for types, repeats in params["attention_types"] for _ in range(repeats) for t in types]
    mlp = {
        "c_fc/kernel": (e, 2 * inner if get("mlp_glu") else inner),
        "c_fc/bias": (2 * inner if get("mlp_glu") else inner,),
        "c_proj/kernel": (inner, e),
        "c_proj/bias": (e,),
    }
    for layer, kind in enumerate(types):
        found = {
            "norm_1/g": (e,),
            "norm_1/b": (e,),
            "attn/q": (e, e),
            "attn/k": (e, e),
            "attn/v": (e, e),
            "attn/o": (e, e),
            "attn/compute_output_bias/o_b": (e,),
            "norm_2/g": (e,),
            "norm_2/b": (e,),
            **{"mlp/conv1d_main/" + name: shape for name, shape in mlp.items()},
        }
        if get("num_mem_kv") and kind == "global":
            found |= {f"attn/attention/mem_{x}": (params["num_mem_kv"], params["n_head"], e // params["n_head"])
                      for x in "kv"}  # fmt: skip
        if kind == "none":
            found = {n: shape for n, shape in found.items() if not n.startswith(("norm_1", "attn"))}
        if get("scalenorm") or get("rezero"):
            found = {n: () if n.endswith("/g") else s for n, s in found.items() if n not in ("norm_1/b", "norm_2/b")}
        if get("rezero"):
            found = {n: shape for n, shape in found.items() if not n.startswith("norm_")}
            found |= {"norm_rezero_1/g": (), "norm_rezero_2/g": ()}
        if get("macaron"):
            found |= {"mlp_macaron/conv1d_main/" + name: shape for name, shape in mlp.items()}
        shapes |= {("" if get("share_parameters") else f"h{layer}") + "/" + name: s for name, s in found.items()}
    return shapes


def random_weights(params, seed=0):
    """Weights with which every part of the model matters (logits are about 1)."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in variable_shapes(params).items():
        if name.endswith("/g"):
            w = np.asarray(1 + 0.3 * rng.standard_normal(shape))
        elif len(shape) == 1 or "wpe" in name:
            w = 0.3 * rng.standard_normal(shape)
        elif name == "wte":
            w = 0.5 * rng.standard_normal(shape)
        else:
            w = rng.standard_normal(shape) * shape[0] ** -0.5
        weights[name] = w.astype(np.float32)
    return weights


def checkpoint(name):
    """(params, weights, golden) of a checkpoint under tests/data."""
    folder = DATA / "gpt_neo_checkpoints" / name
    params = {**json.loads((folder / "config.json").read_text()), "mode": "predict"}
    reader = tf.train.load_checkpoint(str(folder))
    weights = {
        key.removeprefix("gpt2/"): reader.get_tensor(key)
        for key in reader.get_variable_to_shape_map()
        if key.startswith("gpt2/")
    }
    return params, weights, dict(np.load(folder / "golden.npz"))


@functools.cache
def two_layers():
    """(params, weights) of the bundled model with only its first two layers, one of each kind of attention."""
    with open_checkpoint(DEMO_FOLDER) as opened:
        params = {**opened.params, "mode": "predict", "n_layer": 2, "attention_types": [[["global", "local"], 1]]}
        return params, {n: opened.read(n) for n in opened.names() if not re.match("h([2-9]|[1-9][0-9]+)/", n)}


def reference_config(params):
    """The arguments of reference.gpt_neo_forward."""
    return {
        "n_head": params["n_head"],
        "attention_types": [t for types, repeats in params["attention_types"] for _ in range(repeats) for t in types],
        "local_attention_radius": params.get("local_attention_radius", 256),
        "padding_id": params["padding_id"],
        "rotary_emb": params.get("rotary_emb", False),
        "activation_fn": params.get("activation_fn", "gelu"),
        "layer_norm_epsilon": params.get("layer_norm_epsilon", 1e-5),
    }


def features(mesh, params, batch, length, *, causal=True, variable_dtype=FLOAT32):
    """([batch, sequence], other_features) as GPT-Neo's model_fn makes them."""
    b, s, m, e, v, es = dims(
        batch=batch,
        sequence=length,
        memory_length=length + (params.get("num_mem_kv") or 0),
        embd=params["n_embd"],
        vocab=params["n_vocab"],
        embed_sequence=params["n_ctx"],
    )
    other = {
        "embd_dim": e,
        "vocab_dim": v,
        "embed_sequence_dim": es,
        "memory_length_dim": m,
        "attn_bias": biasmask_attn_weights(mesh, s, m, variable_dtype) if causal else None,
    }
    return mtf.Shape([b, s]), other


def call_model(ids, other, params, context=None, labels=None, variable_dtype=FLOAT32):
    """gpt2.model in its scope; all calls share its variables."""
    with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
        return gpt2.model({"inputs": ids, "labels": labels}, other, params, ids.mesh, variable_dtype, context=context)


def context(ids, mode, position, states=None, variable_dtype=FLOAT32, initial_position=None):
    """The context of a model in a decode loop over ids [batch, sequence]."""
    return DecodeContext(
        mesh=ids.mesh,
        batch_dims=ids.shape.dims[:1],
        length_dim=ids.shape.dims[1],
        variable_dtype=variable_dtype,
        mode=mode,
        position=position,
        position_is_default=mode == "first_part",
        states=states,
        new_states=[],
        inputs=ids,
        initial_position=initial_position,
    )


def incremental_logits(first_ids, ids, lengths, other, params, steps, variable_dtype=FLOAT32, knows_lengths=False):
    """(logits of the first pass, a list of logits [batch, 1, vocab] for each of `steps` tokens).

    The first pass reads first_ids; the steps read ids at lengths − 1, lengths, …
    (int32 mtf tensors: ids and first_ids [batch, sequence], lengths [batch]). With knows_lengths the contexts say the
    lengths, as those of `sample_autoregressive` do.
    """
    initial = lengths if knows_lengths else None
    position = mtf.range(ids.mesh, ids.shape.dims[1], tf.int32)
    ctx = context(ids, "first_part", position, None, variable_dtype, initial)
    first_logits = call_model(first_ids, other, params, ctx, variable_dtype=variable_dtype)[0]
    logits = []
    for i in range(steps):
        ctx = context(ids, "incremental", lengths + i, ctx.new_states, variable_dtype, initial)
        logits.append(call_model(ids, other, params, ctx, variable_dtype=variable_dtype)[0])
    return first_logits, logits

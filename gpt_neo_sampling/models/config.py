"""Facts of a GPT-Neo config, their checks, and the dims that follow from them, without TensorFlow's graph.

The keys are GPT-Neo's. `checkpoint` turns a Hugging Face model's config into them, and adds a few keys of its own.
"""

from collections.abc import Sequence
from typing import Any

from gpt_neo_sampling._types import FLOAT32_MAX, Params, is_int, is_real

NORM_EPSILON = 1e-5
LOCAL_RADIUS = 256  # the default of GPT-Neo and of Hugging Face
ATTENTION_TYPES = ("global", "local", "linear", "none")  # those of GPT-Neo's configs

# The dims that share a tensor of the model or of its decode loop, and so cannot be split
# over the same mesh axis.
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

# Options of GPT-Neo that change the function that the model computes: those not supported here,
UNSUPPORTED_OPTIONS = ("convolution_dimension", "lightweight_conv_attention", "moe_layers")
# those that are on or off, and those with a value.
SWITCHES = ("macaron", "mlp_glu", "no_weight_tie", "rezero", "scalenorm", "share_parameters")
VARIANTS = (*SWITCHES, "axial_pos_emb", "num_mem_kv", "rotary_emb")
OWN_MODEL = "GPT-Neo's own model as sample_autoregressive's model="  # the advice for them

# Activation functions of transformers that GPT-Neo lacks.
HUGGING_FACE_ACTIVATIONS = (
    "gelu_erf",
    "gelu_erf_10",
    "hardswish",
    "laplace",
    "quick_gelu",
    "relu2",
    "relu6",
    "sqrtsoftplus",
)
# Keys of Hugging Face's configs that the model follows. GPT-Neo does not read them: all its models have the same.
HUGGING_FACE_OPTIONS = ("intermediate_size", "layer_norm_epsilon", "tie_word_embeddings")


def expand_attention_types(nested: Any, n_layer: int) -> list[str]:
    """GPT-Neo's `[[[types…], repeats], …]` as a list of one type per layer.

    `[[["global", "local"], 2]]` gives global, local, global, local.

    Args:
      nested: the config's list, or a list of one type per layer, as this function
        returns it.
      n_layer: int, the number of layers that it must describe.

    Returns:
      a list of n_layer strings, each "global", "local", "linear" or "none".

    Raises:
      ValueError: for a list of another form, an unknown type or another number of
        layers.
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
    """A list or tuple itself; [] for anything else, strings included."""
    return value if isinstance(value, (list, tuple)) else []


def check_config(params: Params) -> None:
    """Checks that the model supports a GPT-Neo config, except for its activation function.

    Args:
      params: a dict of GPT-Neo's config keys.

    Raises:
      ValueError: with the option, its value and what is allowed.
    """
    get = params.get
    for option in UNSUPPORTED_OPTIONS:
        if get(option):
            raise ValueError(
                f"config option {option}={get(option)!r} is not supported; leave it out or false, or use {OWN_MODEL}"
            )
    check_variants(params)
    for option in ("n_layer", "n_head", "n_embd"):
        value = get(option)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config option {option}={value!r}: a whole number of at least 1 is needed")
    if params["n_embd"] % params["n_head"]:
        raise ValueError(f"config option n_embd={params['n_embd']} is not a multiple of n_head={params['n_head']}")
    if get("rotary_emb") and params["n_embd"] // params["n_head"] % 2:
        raise ValueError(
            f"config option rotary_emb rotates pairs of a head's features; n_embd={params['n_embd']} over "
            f"n_head={params['n_head']} gives an odd number, {params['n_embd'] // params['n_head']}"
        )
    for t in expand_attention_types(get("attention_types"), params["n_layer"]):
        if t == "linear":
            raise ValueError(
                "config option attention_types: 'linear' is not supported; allowed: global, local, none; "
                f"or use {OWN_MODEL}"
            )
        if t == "local" and get("causal") is False:
            raise ValueError("config option causal=False with a 'local' layer is not supported: its window is causal")
    radius = get("local_attention_radius")
    if radius is not None and not (is_int(radius) and radius >= 1):
        raise ValueError(f"config option local_attention_radius={radius!r}: a whole number of at least 1 is needed")
    hidden, epsilon = intermediate_size(params), norm_epsilon(params)
    if not is_int(hidden) or hidden < 1:
        raise ValueError(f"config option intermediate_size={hidden!r}: a whole number of at least 1 is needed")
    if not is_norm_epsilon(epsilon):
        raise ValueError(f"config option layer_norm_epsilon={epsilon!r}: a number of at least 0 is needed")


def check_variants(params: Params) -> None:
    """Checks the values of `VARIANTS` other than rotary_emb's. Raises ValueError as `check_config` does."""
    for option in SWITCHES:
        if params.get(option) not in (None, False, True):
            raise ValueError(f"config option {option}={params[option]!r}; allowed: true, false")
    grid, n_learned = params.get("axial_pos_emb"), params.get("num_mem_kv")
    if grid and not (len(_as_list(grid)) == 2 and all(is_int(n) and n >= 1 for n in grid)):
        raise ValueError(f"config option axial_pos_emb={grid!r}; allowed: [rows, columns], at least 1 each")
    if n_learned and not (is_int(n_learned) and n_learned >= 0):
        raise ValueError(f"config option num_mem_kv={n_learned!r}; allowed: a whole number of at least 0")


def has_own_head(params: Params) -> bool:
    """Whether the output has its own weights, "lm_head", as in some Hugging Face models, not the token embeddings."""
    return params.get("tie_word_embeddings") is False


def intermediate_size(params: Params) -> int:
    """The width of the MLP's hidden layer: 4·n_embd unless a Hugging Face config says otherwise."""
    size = params.get("intermediate_size")
    return 4 * params["n_embd"] if size is None else size


def is_norm_epsilon(value: object) -> bool:
    """Whether it may be the epsilon of layer norm."""
    return is_real(value) and 0 <= value <= FLOAT32_MAX


def norm_epsilon(params: Params) -> float:
    """What layer norm adds to the variance: 1e-5 unless a Hugging Face config says otherwise."""
    epsilon = params.get("layer_norm_epsilon")
    return NORM_EPSILON if epsilon is None else epsilon


def n_learned_keys(params: Params) -> int:
    """`num_mem_kv`, the number of learned keys and values before the memory of a global attention layer.

    Sukhbaatar et al. 2019, "Augmenting Self-attention with Persistent Memory", arXiv 1907.01470.
    """
    return params.get("num_mem_kv") or 0


def splittable_dims(params: Params) -> dict[str, int | None]:
    """{name: size} of the model's dims that a layout may split.

    A size is None if the caller of the model chooses it: that of the batch, of the
    vocabulary (which may be padded) and of the sequence in memory.
    """
    dims = {
        "batch": None,
        "vocab": None,
        "memory_length": None,
        "embd": params["n_embd"],
        "heads": params["n_head"],
        "intermediate_expanded": intermediate_size(params),
    }
    has_table = not params.get("rotary_emb") and not params.get("axial_pos_emb")
    return {**dims, "embed_sequence": params["n_ctx"]} if has_table else dims

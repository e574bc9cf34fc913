"""Hugging Face's format: config.json, and safetensors or PyTorch files, whole or in shards."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import Params, Shape, is_int
from gpt_neo_sampling.checkpoint.base import (
    ALLOWED,
    STORED_BYTES,
    Checkpoint,
    CheckpointError,
    check_dtypes,
    check_file,
    check_shapes,
    check_sizes,
    in_batches,
    progress_bar,
    read_json,
    some,
    variable_shapes,
    write_json,
)
from gpt_neo_sampling.checkpoint.generation import ID_KEYS, note_old_options, read_generation, token_ids
from gpt_neo_sampling.checkpoint.tensor_files import StoredTensor, TensorFiles, list_pytorch, list_safetensors
from gpt_neo_sampling.models.config import (
    LOCAL_RADIUS,
    NORM_EPSILON,
    UNSUPPORTED_OPTIONS,
    VARIANTS,
    expand_attention_types,
    has_own_head,
    is_norm_epsilon,
    norm_epsilon,
)

log = logging.getLogger(__name__)

# The function that lists the tensors of each kind of file. The first kind that the folder has is read.
FILES = {"model.safetensors": list_safetensors, "pytorch_model.bin": list_pytorch}

_SCOPE = "transformer."
_HEAD = "lm_head.weight"  # outside the scope
# Parts of a tensor's name that come from saving the model inside torch.compile, DataParallel, FSDP, recomputation,
# Lightning or its Fabric.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "_forward_module")
_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)")  # constant masks
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "lm_head": _HEAD,
    "ln_f/g": "ln_f.weight",
    "ln_f/b": "ln_f.bias",
}
_NAMES_IN_LAYER = {
    "norm_1/g": "ln_1.weight",
    "norm_1/b": "ln_1.bias",
    "attn/q": "attn.attention.q_proj.weight",
    "attn/k": "attn.attention.k_proj.weight",
    "attn/v": "attn.attention.v_proj.weight",
    "attn/o": "attn.attention.out_proj.weight",
    "attn/compute_output_bias/o_b": "attn.attention.out_proj.bias",
    "norm_2/g": "ln_2.weight",
    "norm_2/b": "ln_2.bias",
    "mlp/conv1d_main/c_fc/kernel": "mlp.c_fc.weight",
    "mlp/conv1d_main/c_fc/bias": "mlp.c_fc.bias",
    "mlp/conv1d_main/c_proj/kernel": "mlp.c_proj.weight",
    "mlp/conv1d_main/c_proj/bias": "mlp.c_proj.bias",
}
_SIZES = {
    "n_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "n_layer": "num_layers",
}
_OTHER_KEYS = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # transformers prefers these
# transformers' defaults of the keys that are read here
_DEFAULTS = {
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
    "hidden_size": 2048,
    "num_layers": 24,
    "attention_types": [[["global", "local"], 12]],
    "num_heads": 16,
    "window_size": LOCAL_RADIUS,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": NORM_EPSILON,
}
_DEFAULT_IDS = {"bos_token_id": 50256, "eos_token_id": 50256}  # unless the vocabulary is too small
# transformers' activation functions -> activation_fn (without prelu and xielu, which have weights of their own)
_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_accurate": "gelu",
    "gelu_fast": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_10": "gelu_erf_10",
    "hardswish": "hardswish",
    "laplace": "laplace",
    "leaky_relu": "lrelu001",
    "linear": "id",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "sqrtsoftplus": "sqrtsoftplus",
    "swish": "silu",
    "tanh": "tanh",
}
_ACTIVATIONS_OUT = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())} | {"swish": "swish"}


def weights_file(files: Collection[str]) -> str | None:
    """Which of a folder's files has the weights in this format, or for shards is their index; None without any."""
    return next((file for kind in FILES for file in (kind, f"{kind}.index.json") if file in files), None)


def open_hugging_face(folder: Path, files: list[str]) -> Checkpoint:
    """The `Checkpoint` of a folder with these files."""
    config_file = folder / "config.json"
    if "config.json" not in files:
        raise CheckpointError(f"{folder} has weights but no config.json; {ALLOWED}")
    config = _read_config(config_file)
    params = _params(config, config_file)
    generation = read_generation(token_ids(config, config_file), folder, files)
    if "generation_config.json" not in files:
        note_old_options(config, config_file)
    if "adapter_config.json" in files:
        log.warning("%s holds an adapter (adapter_config.json), which is ignored; merge it into the weights", folder)

    store = TensorFiles(_unwrapped(_tensors(folder, files), folder))
    scope = _SCOPE if any(n.startswith(_SCOPE) for n in store.shapes) else ""  # a bare GPTNeoModel has none
    _detect_head(config, config_file, params, store, scope)
    shapes = variable_shapes(params)
    sources = {n: (_stored_name(scope, n), _is_kernel(n, shape)) for n, shape in shapes.items()}
    wte = sources["wte"][0]
    if wte not in store.shapes and _HEAD in store.shapes and config.get("tie_word_embeddings") is not False:
        sources["wte"] = (_HEAD, False)  # of a tensor with two names, safetensors' save_model keeps only this one
    expected = {sources[n][0]: s[::-1] if sources[n][1] else s for n, s in shapes.items()}
    actual = {n: s for n, s in store.shapes.items() if not _BUFFER.fullmatch(n) and (n != _HEAD or n in expected)}
    check_shapes(folder, expected, actual, params)
    check_dtypes(folder, {name: store.dtypes[name] for name in expected})
    return Checkpoint("huggingface", folder, params, generation, store, sources)


def _detect_head(config: dict[str, Any], config_file: Path, params: Params, store: TensorFiles, scope: str) -> None:
    """Sets tie_word_embeddings in params if the output has its own table. The tensors decide, not the config."""
    wte = _stored_name(scope, "wte")
    if _HEAD not in store.shapes:
        if config.get("tie_word_embeddings") is False:
            log.warning(
                "%s: tie_word_embeddings is false, but there is no %s: the output is %s", config_file, _HEAD, wte
            )
    elif wte in store.shapes and not store.are_same(_HEAD, wte):
        check_dtypes(config_file.parent, {name: store.dtypes[name] for name in (_HEAD, wte)})
        same_shape = store.shapes[_HEAD] == store.shapes[wte]
        if not same_shape or not np.array_equal(store.read(_HEAD), store.read(wte), equal_nan=True):
            params["tie_word_embeddings"] = False


def save_hugging_face(
    folder: Path, params: Params, read: Callable[[str], np.ndarray], dtype: str, max_shard_bytes: int
) -> None:
    """Writes config.json and safetensors into a folder, one tensor at a time.

    Args:
      folder: pathlib.Path.
      params: a dict of GPT-Neo's config keys.
      read: a function from a variable's name to its array.
      dtype: "float32", "bfloat16" or "float16".
      max_shard_bytes: int, the most bytes of one file's tensors in float32; a larger
        model gets several files and an index.
    """
    if dtype not in _CODES:
        raise CheckpointError(f"dtype {dtype!r}; allowed: {', '.join(map(repr, _CODES))}")
    write_json(folder / "config.json", {**_config(params), "dtype": dtype, "torch_dtype": dtype})
    shapes = variable_shapes(params)
    shards = list(in_batches(shapes, shapes, max_shard_bytes))
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with progress_bar("writing", shapes.values()) as progress:
        for file, names in zip(files, shards):
            _write_safetensors(folder / file, {n: shapes[n] for n in names}, read, dtype, progress)
    if len(shards) > 1:
        weight_map = {_stored_name(_SCOPE, name): file for file, names in zip(files, shards) for name in names}
        total = sum(math.prod(shape) for shape in shapes.values()) * STORED_BYTES[dtype]
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(
    path: Path, shapes: dict[str, Shape], read: Callable[[str], np.ndarray], dtype: str, progress: tqdm
) -> None:
    """Writes variables, {name: shape}, to one file in the format of `list_safetensors`.

    The safetensors library's own function needs all tensors at once.
    """
    code, numpy_dtype = _CODES[dtype], tf.as_dtype(dtype).as_numpy_dtype
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(numpy_dtype).itemsize
        stored_shape = shape[::-1] if _is_kernel(name, shape) else shape
        header[_stored_name(_SCOPE, name)] = {"dtype": code, "shape": stored_shape, "data_offsets": [begin, end]}
    text = json.dumps(header, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            value = read(name).T if _is_kernel(name, shape) else read(name)
            with np.errstate(over="ignore"):
                stored = value.astype(numpy_dtype, order="C")
            if dtype == "float16" and np.isinf(stored).sum() > np.isinf(value).sum():
                raise CheckpointError(f"{name} holds numbers beyond float16's 65504; allowed: float32, bfloat16")
            stored.tofile(file)
            progress.update(4 * value.size)


def _stored_name(scope: str, name: str) -> str:
    if name in _NAMES:
        return ("" if name == "lm_head" else scope) + _NAMES[name]
    layer, name_in_layer = name.split("/", 1)
    return f"{scope}h.{layer[1:]}.{_NAMES_IN_LAYER[name_in_layer]}"


def _is_kernel(name: str, shape: Shape) -> bool:
    """Whether Hugging Face stores the variable transposed."""
    return len(shape) == 2 and name not in _NAMES


# ----------------------------------------------------------------- configs


def check_model_type(config_file: Path) -> dict[str, Any]:
    """A config.json as it is; raises CheckpointError unless it is a GPT-Neo's."""
    config = read_json(config_file)
    if config.get("model_type") != "gpt_neo":
        raise CheckpointError(f"{config_file}: model_type is {config.get('model_type')!r}; allowed: 'gpt_neo'")
    return config


def _read_config(config_file: Path) -> dict[str, Any]:
    """A GPT-Neo's config.json, with transformers' defaults for missing keys."""
    config = check_model_type(config_file)
    config.update({key: config[other] for other, key in _OTHER_KEYS.items() if other in config})
    absent = {key: value for key, value in _DEFAULTS.items() if key not in config}
    if config.get("attention_layers"):
        absent.pop("attention_types", None)
    vocab_size = config.get("vocab_size", _DEFAULTS["vocab_size"])
    absent |= {k: v for k, v in _DEFAULT_IDS.items() if k not in config and is_int(vocab_size) and v < vocab_size}
    if absent:
        shown = ", ".join(f"{key} {value}" for key, value in absent.items())
        log.warning("%s lacks some keys; transformers' defaults are used: %s", config_file, shown)
    return {**config, **absent}


def _params(config: dict[str, Any], config_file: Path) -> Params:
    """GPT-Neo's config keys for a Hugging Face config, checked."""

    def refuse(key: str, allowed: str) -> NoReturn:
        raise CheckpointError(f"{config_file}: {key} is {config.get(key)!r}; allowed: {allowed}")

    activation, epsilon = config["activation_function"], config["layer_norm_epsilon"]
    if activation not in list(_ACTIVATIONS):
        refuse("activation_function", ", ".join(sorted(_ACTIVATIONS)))
    if not is_norm_epsilon(epsilon):
        refuse("layer_norm_epsilon", "a number, at least 0")

    params: Params = {key: config[hf_key] for key, hf_key in _SIZES.items()}
    params["intermediate_size"] = config.get("intermediate_size")
    params["local_attention_radius"] = LOCAL_RADIUS if config.get("window_size") is None else config["window_size"]
    # Both give each layer's type; transformers builds the model from attention_layers.
    params["attention_types"] = config.get("attention_layers") or config.get("attention_types")
    types = check_sizes(params, config_file, {**_SIZES, "local_attention_radius": "window_size"})
    if config.get("attention_types") is not None:
        try:
            nested = expand_attention_types(config["attention_types"], params["n_layer"])
        except ValueError as e:
            raise CheckpointError(f"{config_file}: {e}") from None
        if nested != types:
            raise CheckpointError(f"{config_file}: attention_types and attention_layers do not agree")
    for t in types:
        if t not in ("global", "local"):
            raise CheckpointError(f"{config_file}: attention type {t!r}; allowed: 'global', 'local'")
    params["attention_types"] = types
    # only where they differ from the value that all of GPT-Neo's own models have
    if params["intermediate_size"] in (None, 4 * params["n_embd"]):
        del params["intermediate_size"]
    if np.float32(epsilon) != np.float32(NORM_EPSILON):
        params["layer_norm_epsilon"] = epsilon
    if _ACTIVATIONS[activation] != "gelu":
        params["activation_fn"] = _ACTIVATIONS[activation]
    for hf_key, value in token_ids(config, config_file).items():
        params[ID_KEYS[hf_key]] = value[0] if isinstance(value, list) else value
    return params


def _config(params: Params) -> dict[str, Any]:
    """A Hugging Face config for GPT-Neo's config keys.

    Raises:
      CheckpointError: for an option that Hugging Face's GPT-Neo does not have.
    """
    types = expand_attention_types(params["attention_types"], params["n_layer"])
    unsupported = [f"{key}={params[key]!r}" for key in (*VARIANTS, *UNSUPPORTED_OPTIONS) if params.get(key)]
    unsupported += [f"attention type {t!r}" for t in dict.fromkeys(types) if t not in ("global", "local")]
    activation = params.get("activation_fn") or "gelu"
    if activation not in list(_ACTIVATIONS_OUT):
        unsupported.append(f"activation_fn={activation!r}")
    if unsupported:
        names = ", ".join(dict.fromkeys(unsupported))
        raise CheckpointError(f"Hugging Face's GPT-Neo has no {names}; allowed: to='mesh-tf'")
    ids = {hf_key: params[key] for hf_key, key in ID_KEYS.items() if params.get(key) is not None}
    if not 0 <= ids.get("pad_token_id", 0) < params["n_vocab"]:
        del ids["pad_token_id"]  # transformers would look it up
    return {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        **{hf_key: params[key] for key, hf_key in _SIZES.items()},
        "attention_types": [[[t], 1] for t in types],
        "attention_layers": types,
        "window_size": params.get("local_attention_radius") or LOCAL_RADIUS,
        "activation_function": _ACTIVATIONS_OUT[activation],
        "layer_norm_epsilon": norm_epsilon(params),
        "intermediate_size": params.get("intermediate_size"),
        "tie_word_embeddings": not has_own_head(params),
        "eos_token_id": None,  # or transformers takes GPT-2's
        "bos_token_id": None,
        **ids,
    }


# ------------------------------------------------------------------- files


def _unwrapped(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The tensors by their names in the model, without the parts that wrappers added."""
    plain: dict[str, StoredTensor] = {}
    wrappers: dict[str, None] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        wrappers.update(dict.fromkeys(part for part in parts if part in _WRAPPERS))
        plain_name = ".".join(part for part in parts if part not in _WRAPPERS)
        if plain.setdefault(plain_name, tensor) != tensor:
            raise CheckpointError(f"{folder} holds {plain_name} twice, under {name} and another name")
    if wrappers:
        log.warning("%s: dropped from tensor names: %s", folder, ", ".join(f"{w}." for w in wrappers))
    return plain


def _tensors(folder: Path, files: list[str]) -> dict[str, StoredTensor]:
    """All tensors of a folder: name -> StoredTensor."""
    weights = weights_file(files)
    assert weights is not None, "as the folder was opened in this format"
    kind = weights.removesuffix(".index.json")

    def list_tensors(path: Path) -> dict[str, StoredTensor]:
        check_file(path)
        return FILES[kind](path)

    if weights == kind:
        return list_tensors(folder / weights)
    index_file = folder / weights
    weight_map = read_weight_map(index_file, files)
    tensors = {}
    for file in sorted(set(weight_map.values())):
        tensors.update({n: t for n, t in list_tensors(folder / file).items() if weight_map.get(n, file) == file})
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{index_file} names {len(absent)} tensors that are not in the file it assigns them to: {some(absent)}"
        )
    return tensors


def read_weight_map(index_file: Path, files: Collection[str]) -> dict[str, str]:
    """The index file's map from tensor to file, checked: name -> file name."""
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map from tensor names to files")
    # names only: a path could lead out of the folder
    refused = [f for f in weight_map.values() if not isinstance(f, str) or f != os.path.basename(f) or not f]
    if refused:
        raise CheckpointError(f"{index_file}: weight_map names {refused[0]!r}; allowed: names of files beside it")
    missing = sorted(set(weight_map.values()) - set(files))
    if missing:
        raise CheckpointError(f"{index_file.parent} lacks {len(missing)} files that its index names: {some(missing)}")
    return weight_map

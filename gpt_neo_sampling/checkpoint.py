"""Models on disk, opened by folder and read one tensor at a time.

Two formats: GPT-Neo's own (a TensorFlow 1 checkpoint of its mesh-tensorflow
variables, beside a JSON config), and a Hugging Face GPT-Neo folder with
safetensors. Either comes out with GPT-Neo's variable names and config keys.
Everything is checked when the folder is opened, so that what is opened can be
built. Nothing in a folder is ever run: no pickle is read.

Every error about a folder is a `CheckpointError` of one line, which says what
was found and what is allowed.
"""

import functools
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path

import numpy as np

from gpt_neo_sampling._compat import quiet_logging, tf
from gpt_neo_sampling.models.gpt2 import LOCAL_RADIUS, UNSUPPORTED_OPTIONS, expand_attention_types

_ALLOWED = (
    "allowed: a GPT-Neo mesh-TF checkpoint (a JSON config, model.ckpt-N.index, model.ckpt-N.data-*) "
    "or a Hugging Face GPT-Neo model (config.json with model_type gpt_neo, model.safetensors)"
)
_MESH_TF_SCOPE = "gpt2/"
_HF_SCOPE = "transformer."
_LISTED = 5  # names that an error shows before it goes over to a count
_STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# A layer's variables: GPT-Neo's name, the shape in multiples of n_embd, Hugging
# Face's name. Hugging Face stores the kernels, all that is 2-D here, transposed.
_NORM_1 = (
    ("norm_1/g", (1,), "ln_1.weight"),
    ("norm_1/b", (1,), "ln_1.bias"),
)
_ATTENTION = (
    ("attn/q", (1, 1), "attn.attention.q_proj.weight"),
    ("attn/k", (1, 1), "attn.attention.k_proj.weight"),
    ("attn/v", (1, 1), "attn.attention.v_proj.weight"),
    ("attn/o", (1, 1), "attn.attention.out_proj.weight"),
    ("attn/compute_output_bias/o_b", (1,), "attn.attention.out_proj.bias"),
)
_NORM_2_AND_MLP = (
    ("norm_2/g", (1,), "ln_2.weight"),
    ("norm_2/b", (1,), "ln_2.bias"),
    ("mlp/conv1d_main/c_fc/kernel", (1, 4), "mlp.c_fc.weight"),
    ("mlp/conv1d_main/c_fc/bias", (4,), "mlp.c_fc.bias"),
    ("mlp/conv1d_main/c_proj/kernel", (4, 1), "mlp.c_proj.weight"),
    ("mlp/conv1d_main/c_proj/bias", (1,), "mlp.c_proj.bias"),
)
_LAYER = _NORM_1 + _ATTENTION + _NORM_2_AND_MLP

# What a checkpoint may hold beside the model: what optimizers keep a variable
# (Adam's and Adafactor's moments), the step, Hugging Face's constant masks.
_OPTIMIZER_STATE = re.compile(r".*(/adam_[mv]|/v[rc]|_slot_(vr|vc|v|m))|(gpt2/)?global_step")
_HF_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)")


class CheckpointError(ValueError):
    """A folder that cannot be read as a model; the message is one line."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))


# ------------------------------------------------------------------ public


def variable_shapes(params):
    """The variables that a model of this config has.

    Args:
      params: a dict of GPT-Neo's config keys: n_vocab, n_ctx, n_embd, n_layer
        and attention_types (nested, or one type a layer); with rotary_emb there
        is no "wpe", and a layer of attention type "none" has neither norm_1 nor
        attention variables.

    Returns:
      a dict from name, without the scope `gpt2/`, to shape, a tuple of ints.

    Raises:
      ValueError: see `models.gpt2.expand_attention_types`.
    """
    n_embd = params["n_embd"]
    shapes = {"wte": (params["n_vocab"], n_embd)}
    if not params.get("rotary_emb"):
        shapes["wpe"] = (params["n_ctx"], n_embd)
    for layer, attention_type in enumerate(expand_attention_types(params["attention_types"], params["n_layer"])):
        for name, multiples, _ in _NORM_2_AND_MLP if attention_type == "none" else _LAYER:
            shapes[f"h{layer}/{name}"] = tuple(m * n_embd for m in multiples)
    return {**shapes, "ln_f/g": (n_embd,), "ln_f/b": (n_embd,)}


def open_checkpoint(folder):
    """Opens the model in a folder, of whichever kind it is, and checks it.

    A GPT-Neo mesh-TF folder holds TensorFlow checkpoints `model.ckpt-N.*`, of
    which the one that the file `checkpoint` names is taken (by its base name,
    so a folder may be moved), or without that file the highest N; and a config,
    `config.json` or else the only *.json file with an `n_embd`. A Hugging Face
    folder holds `config.json` and `model.safetensors`, or its shards with
    `model.safetensors.index.json`. No weights are read yet.

    Args:
      folder: a path.

    Returns:
      a `Checkpoint`.

    Raises:
      CheckpointError: (a ValueError) if there is no such folder, it holds no
        model or more than one kind, a file is damaged, the config asks for what
        GPT-Neo does not have, or the variables are not those of the config; and
        for a Hugging Face folder if safetensors is not installed.
    """
    folder = Path(folder)
    files = _list(folder)
    mesh_tf = "checkpoint" in files or any(re.fullmatch(r"model\.ckpt-\d+\..*", f) for f in files)
    hugging_face = "model.safetensors" in files or "model.safetensors.index.json" in files
    if mesh_tf and hugging_face:
        raise CheckpointError(f"{folder} holds both a TensorFlow checkpoint and safetensors; allowed: one of them")
    if mesh_tf:
        return _open_mesh_tf(folder, files)
    if hugging_face:
        return _open_hugging_face(folder, files)
    if any(f.startswith("pytorch_model") and ".bin" in f for f in files):
        raise CheckpointError(f"{folder} holds pytorch_model.bin, which is not supported yet; {_ALLOWED}")
    raise CheckpointError(f"{folder} holds no model, only {_some(files)}; {_ALLOWED}")


class Checkpoint:
    """A model on disk: its config, and its weights by GPT-Neo's names.

    Made by `open_checkpoint`; usable in a `with` statement, which closes it.

    Attributes:
      kind: "mesh-tf" or "huggingface".
      folder: pathlib.Path, the folder.
      params: dict in GPT-Neo's config keys. Always there: n_vocab, n_ctx,
        n_embd, n_head, n_layer (ints), attention_types (a list of one type a
        layer) and local_attention_radius (int). padding_id, eos_id and bos_id
        (ints) are there if the model names them. The other keys of a mesh-TF
        config are there as they stood.
      generation_defaults: dict of how the model asks to be sampled, with those
        of these keys that it gives: eos_token_id (int, or a list of ints),
        pad_token_id, bos_token_id, do_sample (bool), temperature (number),
        top_k, max_new_tokens. Of the last four only a Hugging Face folder with
        a generation_config.json has any.
      tokenizer_file: pathlib.Path of the folder's tokenizer.json, or None.
      tokenizer_files: (vocab.json, merges.txt) as pathlib.Paths, or None unless
        both are there.
    """

    def __init__(self, kind, folder, files, params, generation_defaults, store, sources):
        # sources: name -> (the store's name, whether it stores the transpose)
        self.kind = kind
        self.folder = folder
        self.params = params
        self.generation_defaults = generation_defaults
        self.tokenizer_file = folder / "tokenizer.json" if "tokenizer.json" in files else None
        pair = ("vocab.json", "merges.txt")
        self.tokenizer_files = tuple(folder / f for f in pair) if all(f in files for f in pair) else None
        self._store = store
        self._sources = sources
        self._shapes = variable_shapes(params)

    def names(self):
        """The variables' names, without the scope `gpt2/`: a sorted list of strings."""
        return sorted(self._shapes)

    def shape(self, name):
        """The shape of a variable as `read` gives it: a tuple of ints.

        Raises:
          CheckpointError: if `names()` does not have the name.
        """
        if name not in self._shapes:
            raise CheckpointError(f"no variable {name!r} in {self.folder}; it has {_some(self.names())}")
        return self._shapes[name]

    def read(self, name):
        """Reads one variable; the others stay on disk.

        Args:
          name: str, one of `names()`.

        Returns:
          a float32 np.ndarray of shape `shape(name)`, kernels as [in, out]. The
          caller owns it.

        Raises:
          CheckpointError: if `names()` does not have the name, the file turns
            out to be damaged, or the checkpoint is closed.
        """
        self.shape(name)
        if self._store is None:
            raise CheckpointError(f"{self.folder} is closed; open it again to read {name!r}")
        stored_name, transposed = self._sources[name]
        value = self._store.read(stored_name)
        return np.ascontiguousarray(value.T if transposed else value)

    def close(self):
        """Lets go of the files. What is not a weight stays readable."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def write_mesh_tf_checkpoint(folder, params, weights, *, dtype="float32", step=0):
    """Writes a model in GPT-Neo's own format, one that `open_checkpoint` reads.

    That is `model.ckpt-{step}.*`, the file `checkpoint`, which names it without
    its folder, and `config.json`. They are made in a temporary folder beside
    `folder` and then moved: a new folder appears whole, and one that is there
    keeps its other files and gets `checkpoint` last, so that until then the
    model that was there is the one that opens (if its step is another).

    Args:
      folder: a path; it and the folders above it are made if need be.
      params: a dict of GPT-Neo's config keys that JSON can hold; see
        `variable_shapes`. attention_types is written nested.
      weights: a mapping from every name of `variable_shapes(params)` to an
        array of that shape, of any float dtype.
      dtype: "float32" or "bfloat16" (rounded to nearest, ties to even).
      step: int, at least 0.

    Raises:
      CheckpointError: (a ValueError) for another dtype or step, params that are
        not a model's or not JSON, weights that are missing, left over or of
        another shape, or a `folder` that is a file.
    """
    folder = Path(folder).resolve()
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"dtype {dtype!r}; allowed: 'float32', 'bfloat16'")
    if not _is_int(step) or step < 0:
        raise CheckpointError(f"step {step!r}; allowed: a whole number of at least 0")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; allowed: a folder, there already or not")
    params = dict(params)
    types = _check_sizes(params, "params")
    params["attention_types"] = [[[t], 1] for t in types]
    try:
        config = json.dumps(params, indent=1)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"params cannot be written as JSON: {e}") from None
    shapes = variable_shapes(params)
    _compare("weights", shapes, {name: np.shape(value) for name, value in weights.items()}, params)

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    staging.mkdir()
    try:
        _save(staging, {name: weights[name] for name in shapes}, dtype, step)
        (staging / "config.json").write_text(config + "\n", encoding="utf-8")
        if folder.exists():
            for name in sorted(os.listdir(staging), key=lambda f: (f == "checkpoint", f)):
                os.replace(staging / name, folder / name)
        else:
            os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ------------------------------------------------------------ GPT-Neo's own


def _open_mesh_tf(folder, files):
    config_file = _mesh_tf_config(folder, files)
    params = _read_json(config_file)
    params["attention_types"] = _check_sizes(params, config_file)
    if params.get("local_attention_radius") is None:
        params["local_attention_radius"] = LOCAL_RADIUS
    defaults = {}
    for key, generation_key in (("eos_id", "eos_token_id"), ("padding_id", "pad_token_id"), ("bos_id", "bos_token_id")):
        if params.get(key) is not None:
            if not _is_int(params[key]):
                raise CheckpointError(f"{config_file}: {key} is {params[key]!r}; allowed: a whole number")
            defaults[generation_key] = params[key]

    store = _TensorFlowStore(folder, _newest(folder, files), files)
    shapes = variable_shapes(params)
    sources = {name: (_MESH_TF_SCOPE + name, False) for name in shapes}
    expected = {_MESH_TF_SCOPE + name: shape for name, shape in shapes.items()}
    found = {name: shape for name, shape in store.shapes.items() if not _OPTIMIZER_STATE.fullmatch(name)}
    _compare(folder, expected, found, params)
    store.check_dtypes(expected)
    return Checkpoint("mesh-tf", folder, files, params, defaults, store, sources)


def _mesh_tf_config(folder, files):
    """The path of the config: config.json, or the only JSON file with n_embd."""
    if "config.json" in files and "n_embd" in _read_json(folder / "config.json"):
        return folder / "config.json"
    json_files = [f for f in files if f.endswith(".json")]
    candidates, error = [], None
    for name in json_files:
        try:
            if "n_embd" in _read_json(folder / name):
                candidates.append(name)
        except CheckpointError as e:
            error = e
    if len(candidates) == 1:
        return folder / candidates[0]
    if candidates:
        raise CheckpointError(
            f"{folder} holds {len(candidates)} configs: {_some(candidates)}; "
            "allowed: config.json, or a single *.json file with n_embd"
        )
    if error and len(json_files) == 1:  # a damaged config, as far as one can tell
        raise error
    found = f"{_some(json_files)}, without n_embd" if json_files else "no *.json file"
    raise CheckpointError(f"{folder} holds {found}; its config is config.json or the only *.json file with n_embd")


def _newest(folder, files):
    """The base name of the newest TensorFlow checkpoint, such as model.ckpt-7."""
    there = [f[: -len(".index")] for f in files if f.endswith(".index")]
    if "checkpoint" in files:
        text = _read_text(folder / "checkpoint")
        named = re.search(r'^\s*model_checkpoint_path\s*:\s*"([^"\n]+)"', text, re.MULTILINE)
        if not named:
            raise CheckpointError(f'{folder / "checkpoint"} has no line model_checkpoint_path: "model.ckpt-N"')
        base = re.split(r"[/\\]", named[1])[-1]
        if base not in there:
            raise CheckpointError(
                f"{folder / 'checkpoint'} names {base}, but {base}.index is not there; "
                f"the folder has {_some([f'{b}.index' for b in there])}"
            )
        return base
    steps = {int(m[1]): b for b in there for m in [re.fullmatch(r"model\.ckpt-(\d+)", b)] if m}
    if not steps:
        parts = [f for f in files if f.startswith("model.ckpt-")]
        raise CheckpointError(f"{folder} has no model.ckpt-N.index, only {_some(parts)}; {_ALLOWED}")
    return steps[max(steps)]


class _TensorFlowStore:
    """The tensors of a TensorFlow checkpoint. shapes: name -> tuple of ints."""

    # What TensorFlow's reader raises for damaged files: some of its C++ errors
    # come out as Python's own types (a short file as an IndexError).
    _ERRORS = (tf.errors.OpError, LookupError, RuntimeError, ValueError, OSError)

    def __init__(self, folder, base, files):
        self._path = folder / base
        self._link_folder = None
        shards = _data_files(self._path, base, files)
        try:
            self._reader = tf.train.NewCheckpointReader(str(self._without_wildcards(folder) / base))
            self.shapes = {n: tuple(s) for n, s in self._reader.get_variable_to_shape_map().items()}
            self._dtypes = {n: tf.as_dtype(d).name for n, d in self._reader.get_variable_to_dtype_map().items()}
        except self._ERRORS as e:
            raise CheckpointError(f"{self._path}.index cannot be read, it is damaged: {e}") from None
        needed = sum(_STORED_BYTES.get(self._dtypes[n], 0) * math.prod(s) for n, s in self.shapes.items())
        there = sum((folder / f).stat().st_size for f in shards)
        if there < needed:
            raise CheckpointError(f"{self._path}.data-* is cut short: {there} bytes of at least {needed}")

    def _without_wildcards(self, folder):
        """The folder, by a link if need be: TensorFlow globs the paths it opens."""
        if not re.search(r"[*?\[\\]", str(folder)) or os.name == "nt":
            return folder
        self._link_folder = tempfile.TemporaryDirectory()  # goes with the reader
        link = Path(self._link_folder.name) / "model"
        link.symlink_to(folder.resolve())
        return link

    def check_dtypes(self, names):
        _check_dtypes(self._path, {n: self._dtypes[n] for n in names})

    def read(self, name):
        try:
            return self._reader.get_tensor(name).astype(np.float32, copy=False)
        except self._ERRORS as e:
            raise CheckpointError(f"{name} in {self._path} cannot be read: {e}") from None

    def close(self):
        self._reader = None
        if self._link_folder is not None:
            self._link_folder.cleanup()


def _data_files(path, base, files):
    """The names of a checkpoint's data files, all of them."""
    shards = [m for f in files for m in [re.fullmatch(re.escape(base) + r"\.data-(\d{5})-of-(\d{5})", f)] if m]
    total = max((int(m[2]) for m in shards), default=1)
    there = {m[0] for m in shards}
    missing = [f for f in (f"{base}.data-{i:05d}-of-{total:05d}" for i in range(total)) if f not in there]
    if missing:
        raise CheckpointError(f"{path.parent} has {base}.index but not {_some(missing)}")
    return sorted(there)


def _save(folder, weights, dtype, step):
    """Writes model.ckpt-{step}.* and `checkpoint`, in a graph of its own."""
    numpy_dtype = np.float32 if dtype == "float32" else tf.bfloat16.as_numpy_dtype
    with quiet_logging(), tf.Graph().as_default() as graph, tf.device("/cpu:0"):
        variables, values = {}, {}
        for name, weight in weights.items():
            # Fed, not constants: those would end in a graph of 2 GB at most.
            value = tf.placeholder(tf.as_dtype(numpy_dtype), np.shape(weight))
            variables[_MESH_TF_SCOPE + name] = tf.Variable(value, trainable=False)
            values[name] = value
        saver = tf.train.Saver(variables, save_relative_paths=True)
        with tf.Session(graph=graph, config=tf.ConfigProto(device_count={"GPU": 0})) as session:
            for name, weight in weights.items():
                value = np.asarray(weight, np.float32).astype(numpy_dtype)
                session.run(variables[_MESH_TF_SCOPE + name].initializer, {values[name]: value})
            saver.save(session, str(folder / "model.ckpt"), global_step=int(step), write_meta_graph=False)


# ------------------------------------------------------------ Hugging Face


def _open_hugging_face(folder, files):
    config_file = folder / "config.json"
    if "config.json" not in files:
        raise CheckpointError(f"{folder} has safetensors but no config.json; {_ALLOWED}")
    config = _read_json(config_file)
    params = _hugging_face_params(config, config_file)
    defaults = _generation_defaults(config, _TOKEN_IDS, config_file)
    if "generation_config.json" in files:
        generation_file = folder / "generation_config.json"
        defaults.update(_generation_defaults(_read_json(generation_file), _GENERATION_KEYS, generation_file))

    store = _SafetensorsStore(folder, files)
    try:
        scope = _HF_SCOPE if any(n.startswith(_HF_SCOPE) for n in store.shapes) else ""  # a bare GPTNeoModel has none
        shapes = variable_shapes(params)
        sources = {name: (scope + _hugging_face_name(name), _is_kernel(name)) for name in shapes}
        expected = {sources[n][0]: s[::-1] if sources[n][1] else s for n, s in shapes.items()}
        found = {n: s for n, s in store.shapes.items() if not _HF_BUFFER.fullmatch(n) and n != "lm_head.weight"}
        _compare(folder, expected, found, params)
        store.check_dtypes(expected)
        if config.get("tie_word_embeddings") is False and "lm_head.weight" in store.shapes:
            store.check_dtypes(["lm_head.weight"])
            wte = sources["wte"][0]
            if not np.array_equal(store.read("lm_head.weight"), store.read(wte)):
                raise CheckpointError(
                    f"{config_file}: tie_word_embeddings is false and lm_head.weight is not {wte}; "
                    "allowed: an output tied to the token table"
                )
    except BaseException:
        store.close()
        raise
    return Checkpoint("huggingface", folder, files, params, defaults, store, sources)


def _hugging_face_name(name):
    if name in ("wte", "wpe"):
        return f"{name}.weight"
    if name.startswith("ln_f/"):
        return "ln_f.weight" if name == "ln_f/g" else "ln_f.bias"
    layer, name_in_layer = name.split("/", 1)
    return f"h.{layer[1:]}.{next(hf for n, _, hf in _LAYER if n == name_in_layer)}"


def _is_kernel(name):
    return any(name.endswith("/" + n) and len(multiples) == 2 for n, multiples, _ in _LAYER)


def _hugging_face_params(config, config_file):
    """GPT-Neo's config keys for a Hugging Face config, checked."""

    def refuse(key, allowed):
        raise CheckpointError(f"{config_file}: {key} is {config.get(key)!r}; allowed: {allowed}")

    if config.get("model_type") != "gpt_neo":
        refuse("model_type", "'gpt_neo'")
    if config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        refuse("activation_function", "'gelu_new', 'gelu_pytorch_tanh'")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, (int, float)) or not abs(epsilon - 1e-5) < 1e-12:
        refuse("layer_norm_epsilon", "1e-05")

    keys = {
        "n_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_head": "num_heads",
        "n_layer": "num_layers",
    }
    params = {key: config.get(hf_key) for key, hf_key in keys.items()}
    params["local_attention_radius"] = LOCAL_RADIUS if config.get("window_size") is None else config["window_size"]
    # Both name a type a layer; the library that wrote them builds attention_layers.
    params["attention_types"] = config.get("attention_layers") or config.get("attention_types")
    types = _check_sizes(params, config_file, {**keys, "local_attention_radius": "window_size"})
    if config.get("attention_types") is not None:
        try:
            nested = expand_attention_types(config["attention_types"], params["n_layer"])
        except ValueError as e:
            raise CheckpointError(f"{config_file}: {e}") from None
        if nested != types:
            raise CheckpointError(f"{config_file}: attention_types and attention_layers do not say the same")
    for t in types:
        if t not in ("global", "local"):
            raise CheckpointError(f"{config_file}: attention type {t!r}; allowed: 'global', 'local'")
    params["attention_types"] = types
    if config.get("intermediate_size") not in (None, 4 * params["n_embd"]):
        refuse("intermediate_size", f"null or 4 * hidden_size = {4 * params['n_embd']}")

    ids = _generation_defaults(config, _TOKEN_IDS, config_file)
    for key, hf_key in (("eos_id", "eos_token_id"), ("padding_id", "pad_token_id"), ("bos_id", "bos_token_id")):
        if hf_key in ids:
            params[key] = ids[hf_key][0] if isinstance(ids[hf_key], list) else ids[hf_key]
    return params


def _is_int(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value):
    return _is_int(value) or isinstance(value, float)


def _is_int_or_ints(value):
    return _is_int(value) or (isinstance(value, list) and len(value) > 0 and all(map(_is_int, value)))


_TOKEN_IDS = {
    "eos_token_id": (_is_int_or_ints, "a whole number, or a list of them"),
    "pad_token_id": (_is_int, "a whole number"),
    "bos_token_id": (_is_int, "a whole number"),
}
_GENERATION_KEYS = {
    **_TOKEN_IDS,
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (_is_number, "a number"),
    "top_k": (_is_int, "a whole number"),
    "max_new_tokens": (_is_int, "a whole number"),
}


def _generation_defaults(config, keys, config_file):
    defaults = {}
    for key, (is_valid, allowed) in keys.items():
        value = config.get(key)
        if value is None:
            continue
        if not is_valid(value):
            raise CheckpointError(f"{config_file}: {key} is {value!r}; allowed: {allowed}")
        defaults[key] = value
    return defaults


class _SafetensorsStore:
    """The tensors of one or more safetensors files. shapes: name -> tuple of ints."""

    def __init__(self, folder, files):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise CheckpointError(f"{folder} needs the package safetensors: pip install gpt_neo_sampling[hf]") from None
        self._error = SafetensorError
        # Opened for each tensor: what was read stays in memory as long as its file is open.
        self._open = functools.partial(safe_open, framework="np")
        self._folder = folder
        self._files = {}  # tensor name -> file name
        self.shapes = {}
        self._dtypes = {}
        weight_map = {} if "model.safetensors" in files else _weight_map(folder, files)
        for file in sorted(set(weight_map.values())) or ["model.safetensors"]:
            self._list(file, weight_map)
        absent = [name for name in weight_map if self._files.get(name) != weight_map[name]]
        if absent:
            raise CheckpointError(
                f"{folder / 'model.safetensors.index.json'} names {len(absent)} tensors "
                f"that are not in the file it gives: {_some(absent)}"
            )

    def _list(self, file, weight_map):
        path = self._folder / file
        try:
            with self._open(str(path)) as handle:
                for name in list(handle.keys()):
                    if weight_map.get(name, file) != file:
                        continue  # the index takes it from another file
                    view = handle.get_slice(name)
                    self._files[name] = file
                    self.shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = _SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
        except (self._error, OSError, ValueError) as e:
            why = "it is a Git LFS pointer, run git lfs pull" if _is_lfs_pointer(path) else f"damaged: {e}"
            raise CheckpointError(f"{path} cannot be read as safetensors, {why}") from None

    def check_dtypes(self, names):
        _check_dtypes(self._folder, {n: self._dtypes[n] for n in names})

    def read(self, name):
        path = self._folder / self._files[name]
        try:
            if self._dtypes[name] == "bfloat16":  # numpy has no such dtype
                return _read_bfloat16(path, name)
            with self._open(str(path)) as handle:
                return handle.get_tensor(name).astype(np.float32, copy=False)
        except (self._error, OSError, ValueError) as e:
            raise CheckpointError(f"{name} in {path} cannot be read: {e}") from None

    def close(self):
        pass  # no file is open between reads


def _weight_map(folder, files):
    """The index file's map from tensor to file, checked: name -> file name."""
    index_file = folder / "model.safetensors.index.json"
    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map from tensor names to files")
    # Names only: a path could lead out of the folder.
    odd = [f for f in weight_map.values() if not isinstance(f, str) or f != os.path.basename(f) or not f]
    if odd:
        raise CheckpointError(f"{index_file}: weight_map names {odd[0]!r}; allowed: files beside it")
    missing = sorted(set(weight_map.values()) - set(files))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} files that its index names: {_some(missing)}")
    return weight_map


def _read_bfloat16(path, name):
    """One bfloat16 tensor of a safetensors file that was checked, as float32.

    The file is a length (8 bytes, little-endian), that many bytes of JSON with
    each tensor's place after them, and the tensors. A bfloat16 is the upper
    half of a float32.
    """
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_size))[name]
        file.seek(8 + header_size + entry["data_offsets"][0])
        upper = np.fromfile(file, "<u2", math.prod(entry["shape"])).astype(np.uint32)
    return (upper << 16).view(np.float32).reshape(entry["shape"])


def _is_lfs_pointer(path):
    try:
        with open(path, "rb") as file:
            return file.read(32).startswith(b"version https://git-lfs")
    except OSError:
        return False


# ------------------------------------------------------------------ checks


def _check_sizes(params, source, names=None):
    """Checks the numbers of a config; returns its attention type a layer.

    source: what the message starts with. names: what its file calls the keys.
    """
    names = names or {}
    required = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
    absent = [names.get(k, k) for k in (*required, "attention_types") if params.get(k) is None]
    if absent:
        raise CheckpointError(f"{source} does not give {', '.join(absent)}")
    for key in (*required, "local_attention_radius"):
        value = params.get(key)
        if value is not None and (not _is_int(value) or value < 1):
            raise CheckpointError(f"{source}: {names.get(key, key)} is {value!r}; allowed: a whole number, at least 1")
    if params["n_embd"] % params["n_head"]:
        n_embd, n_head = names.get("n_embd", "n_embd"), names.get("n_head", "n_head")
        raise CheckpointError(
            f"{source}: {n_embd} is {params['n_embd']}; allowed: a multiple of {n_head}, {params['n_head']}"
        )
    try:
        return expand_attention_types(params["attention_types"], params["n_layer"])
    except ValueError as e:
        raise CheckpointError(f"{source}: {e}") from None


def _compare(source, expected, found, params):
    """Checks that two dicts, name -> shape, are the same."""
    found = {name: tuple(shape) for name, shape in found.items()}
    missing = [n for n in expected if n not in found]
    wrong = [
        f"{n} (is {list(found[n])}, should be {list(s)})"
        for n, s in expected.items()
        if n in found and found[n] != tuple(s)
    ]
    left_over = sorted(n for n in found if n not in expected)
    problems = [
        f"{len(names)} {problem}: {_some(names)}"
        for problem, names in (("missing", missing), ("of wrong shape", wrong), ("left over", left_over))
        if names
    ]
    if not problems:
        return
    options = [f"{option}={params[option]!r}" for option in UNSUPPORTED_OPTIONS if params.get(option)]
    hint = f" (the config sets {', '.join(options)}, which is not supported)" if options else ""
    raise CheckpointError(f"{source}: the variables are not those of the config{hint}: {'; '.join(problems)}")


def _check_dtypes(source, dtypes):
    wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _STORED_BYTES]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} variables of an unsupported dtype: {_some(wrong)}; "
            f"allowed: {', '.join(_STORED_BYTES)}"
        )


# ------------------------------------------------------------------- files


def _list(folder):
    """The sorted names of what is in a folder."""
    try:
        files = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not there; allowed: a folder on this machine") from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder} is a file; allowed: the folder that holds the model") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{folder} cannot be listed: {e}") from None
    if not files:
        raise CheckpointError(f"{folder} is empty; {_ALLOWED}")
    return files


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path} is not UTF-8 text: {e}") from None


def _read_json(path):
    """A JSON file that holds an object, as a dict."""
    try:
        value = json.loads(_read_text(path))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; allowed: an object")
    return value


def _some(names):
    """Names for a message, the first few of them."""
    names = list(names)
    if not names:
        return "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more

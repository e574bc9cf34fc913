"""GPT-Neo's own format: a TensorFlow 1 checkpoint of mesh-tensorflow's variables, and JSON configs."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import probe_devices, quiet_logging, tf
from gpt_neo_sampling._types import Params, StrPath, is_int
from gpt_neo_sampling.checkpoint.base import (
    ALLOWED,
    LONGEST_TEXT,
    STORED_BYTES,
    Checkpoint,
    CheckpointError,
    check_dtypes,
    check_file,
    check_shapes,
    check_sizes,
    in_batches,
    is_int32,
    list_folder,
    progress_bar,
    read_json,
    read_text,
    some,
    staging_folder,
    variable_shapes,
    write_json,
)
from gpt_neo_sampling.checkpoint.generation import ID_KEYS, read_generation
from gpt_neo_sampling.checkpoint.tensorflow_index import check_index
from gpt_neo_sampling.models.config import (
    HUGGING_FACE_ACTIVATIONS,
    HUGGING_FACE_OPTIONS,
    LOCAL_RADIUS,
    NORM_EPSILON,
    has_own_head,
    intermediate_size,
    norm_epsilon,
)

SCOPE = "gpt2/"
SHARD_BYTES = 2**26  # of a data file when writing; one file at a time is in memory

# What a checkpoint may hold besides the model: the moments that Adam and Adafactor
# keep for each variable, and the step.
_OPTIMIZER_STATE = re.compile(r".*(/adam_[mv]|/v[rc]|_slot_(vr|vc|v|m))|(gpt2/)?global_step")


def lists_checkpoints(folder: Path, files: list[str]) -> bool:
    """Whether the folder has TensorFlow's file `checkpoint`; some scripts make a folder of that name."""
    return "checkpoint" in files and not (folder / "checkpoint").is_dir()


def holds_mesh_tf(folder: Path, files: list[str]) -> bool:
    """Whether a folder with these files has TensorFlow checkpoints."""
    return lists_checkpoints(folder, files) or any(re.fullmatch(r"model\.ckpt-\d+\..*", f) for f in files)


def open_mesh_tf(folder: Path, files: list[str], config_file: Path | None = None) -> Checkpoint:
    """The `Checkpoint` of a folder with these files. Its config is one of them, unless `config_file` is given."""
    config_file = _config_file(folder, files) if config_file is None else config_file
    params = {key: value for key, value in read_json(config_file).items() if key not in HUGGING_FACE_OPTIONS}
    dataset, dataset_file = _dataset(params, config_file, folder)
    if dataset_file is not None:  # as in GPT-Neo, the dataset config sets these two, whatever the model's config says
        params.update(eos_id=dataset.get("eos_id", 1), padding_id=dataset.get("padding_id", 0))
        if params.get("n_vocab") is None and dataset.get("n_vocab") is not None:
            params["n_vocab"] = dataset["n_vocab"]
    params["attention_types"] = check_sizes(params, config_file)
    if params.get("local_attention_radius") is None:
        params["local_attention_radius"] = LOCAL_RADIUS
    for key in ID_KEYS.values():
        if params.get(key) is not None and not is_int32(params[key]):
            source = config_file if dataset_file is None or key == "bos_id" else dataset_file
            raise CheckpointError(f"{source}: {key} is {params[key]!r}; allowed: a whole number of 32 bits")
    ids = {hf_key: params[key] for hf_key, key in ID_KEYS.items() if params.get(key) is not None}

    store = _TensorFlowStore(folder, _newest(folder, files), files)
    shapes = variable_shapes(params)
    sources = {name: (SCOPE + name, False) for name in shapes}
    expected = {SCOPE + name: shape for name, shape in shapes.items()}
    actual = {name: shape for name, shape in store.shapes.items() if not _OPTIMIZER_STATE.fullmatch(name)}
    check_shapes(folder, expected, actual, params)
    check_dtypes(folder, {name: store.dtypes[name] for name in expected})
    return Checkpoint(
        "mesh-tf", folder, params, read_generation(ids, folder, files), store, sources,
        **_tokenizer(dataset, dataset_file),
    )  # fmt: skip


def open_mesh_tf_config(config_file: Path) -> Checkpoint:
    """The `Checkpoint` in the folder that a config's model_path names, or without one in the config's own folder."""
    config = read_json(config_file)
    if "n_embd" not in config:
        raise CheckpointError(
            f"{config_file} has no n_embd, so it is not a GPT-Neo config; "
            "allowed: a config with n_embd, or the model's folder"
        )
    model_path = config.get("model_path")
    if model_path is None:
        folder = config_file.parent
    elif not isinstance(model_path, str) or not model_path:
        raise CheckpointError(f"{config_file}: model_path is {model_path!r}; allowed: a folder's path")
    elif re.match(r"\w+://", model_path):
        raise CheckpointError(
            f"{config_file}: model_path is {model_path}, which is not on this machine; "
            "download it and set model_path to its folder, or give the folder itself as the model"
        )
    else:
        candidates = [config_file.parent / model_path, Path(model_path)]
        folders = [c for c in candidates if c.is_dir()]
        if not folders:
            raise CheckpointError(
                f"{config_file}: model_path is {model_path}; there is no such folder "
                f"in {config_file.parent} or in the working directory"
            )
        folder = folders[0]
    return open_mesh_tf(folder, list_folder(folder), config_file)


def write_mesh_tf_checkpoint(
    folder: StrPath, params: Params, weights: Mapping[str, np.ndarray], *, dtype: str = "float32", step: int = 0
) -> None:
    """Writes a model in GPT-Neo's own format, which `open_checkpoint` reads.

    The files are `model.ckpt-{step}.*`, `checkpoint`, which names it without its
    folder, and `config.json`. They are written to a temporary folder beside `folder`
    and then moved. A new folder appears whole. An existing one keeps its other files
    and gets `checkpoint` last, so that until then its old model still opens (if that
    has another step).

    Args:
      folder: a path; it and its parents are created if needed.
      params: a dict of GPT-Neo's config keys that JSON can hold; see
        `variable_shapes`. attention_types is written nested.
      weights: a mapping from every name of `variable_shapes(params)` to an array of
        that shape and of any float dtype.
      dtype: "float32" or "bfloat16" (rounded to nearest, ties to even).
      step: int, at least 0.

    Raises:
      CheckpointError: (a ValueError) for another dtype or step, params that do not
        describe a model or are not JSON, weights that are missing, unexpected or of
        another shape, or a `folder` that is a file.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; allowed: a folder, existing or new")
    check_sizes(params, "params")
    check_shapes("weights", variable_shapes(params), {name: np.shape(value) for name, value in weights.items()}, params)
    with staging_folder(folder) as staging:
        save_mesh_tf(staging, params, weights.__getitem__, dtype, step)
        if folder.exists():
            for name in sorted(os.listdir(staging), key=lambda f: (f == "checkpoint", f)):
                os.replace(staging / name, folder / name)
        else:
            os.rename(staging, folder)


def save_mesh_tf(
    folder: Path, params: Params, read: Callable[[str], np.ndarray], dtype: str = "float32", step: int = 0
) -> None:
    """Writes a checkpoint's files into a folder, a few variables at a time.

    read: a function from a variable's name to its array. The rest as for
    `write_mesh_tf_checkpoint`.
    """
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"dtype {dtype!r}; allowed: 'float32', 'bfloat16'")
    if not is_int(step) or step < 0:
        raise CheckpointError(f"step {step!r}; allowed: a whole number of at least 0")
    types = check_sizes(params, "params")
    unsupported = _beyond_gpt_neo(params)
    if unsupported:
        raise CheckpointError(f"GPT-Neo's checkpoints have no {', '.join(unsupported)}; allowed: to='huggingface'")
    try:
        write_json(folder / "config.json", {**params, "attention_types": [[[t], 1] for t in types]})
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"params cannot be written as JSON: {e}") from None
    shapes = variable_shapes(params)
    numpy_dtype = np.float32 if dtype == "float32" else tf.bfloat16.as_numpy_dtype
    base = f"model.ckpt-{step}"
    parts: list[str] = []
    with quiet_logging(), progress_bar("writing", shapes.values()) as progress:
        for names in in_batches(shapes, shapes, SHARD_BYTES):
            parts.append(str(folder / f"part-{len(parts)}"))
            _save_part(parts[-1], {SCOPE + n: np.asarray(read(n), np.float32).astype(numpy_dtype) for n in names})
            progress.update(sum(4 * math.prod(shapes[n]) for n in names))
        with tf.Graph().as_default(), _cpu_session() as session:
            session.run(tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=parts, destination_prefix=str(folder / base), delete_old_dirs=False
            ))  # fmt: skip
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{base}"\nall_model_checkpoint_paths: "{base}"\n', encoding="utf-8"
    )


def _beyond_gpt_neo(params: Params) -> list[str]:
    """What these params of a Hugging Face model have that no GPT-Neo config can express."""
    features = ["output table of its own (lm_head)"] * has_own_head(params)
    if intermediate_size(params) != 4 * params["n_embd"]:
        features.append(f"intermediate_size={params['intermediate_size']!r} (only 4 * n_embd)")
    if norm_epsilon(params) != NORM_EPSILON:
        features.append(f"layer_norm_epsilon={params['layer_norm_epsilon']!r} (only {NORM_EPSILON})")
    if params.get("activation_fn") in HUGGING_FACE_ACTIVATIONS:
        features.append(f"activation_fn={params['activation_fn']!r}")
    return features


def _save_part(prefix: str, values: dict[str, np.ndarray]) -> None:
    """Writes values, {name: array}, as a TensorFlow checkpoint."""
    with tf.Graph().as_default(), _cpu_session() as session:
        # fed, as constants would be part of the graph, which can have at most 2 GB
        tensors = [tf.placeholder(value.dtype, value.shape) for value in values.values()]
        save = tf.raw_ops.SaveV2(
            prefix=prefix, tensor_names=list(values), shape_and_slices=[""] * len(values), tensors=tensors
        )
        session.run(save, dict(zip(tensors, values.values())))


def _cpu_session() -> tf.Session:
    probe_devices()
    return tf.Session(config=tf.ConfigProto(device_count={"GPU": 0}))


# ----------------------------------------------------------------- configs


def _dataset(params: Params, config_file: Path, folder: Path) -> tuple[dict[str, Any], Path | None]:
    """The last dataset config that a model's config names and that exists, and its path; or {} and None."""
    datasets = params.get("datasets")
    last: tuple[dict[str, Any], Path | None] = {}, None
    for entry in datasets if isinstance(datasets, list) else []:
        name = entry[0] if isinstance(entry, list) and entry else entry
        if not isinstance(name, str):
            raise CheckpointError(f"{config_file}: datasets has {entry!r}; allowed: a name, or [name, …]")
        for place in (folder, config_file.parent):
            dataset_file = place / "dataset_configs" / f"{os.path.basename(name).removesuffix('.json')}.json"
            if dataset_file.is_file():
                last = read_json(dataset_file), dataset_file
    return last


def _tokenizer(dataset: dict[str, Any], dataset_file: Path | None) -> dict[str, Any]:
    """The arguments of `Checkpoint` for the tokenizer that a dataset config names."""
    path = dataset.get("tokenizer_path")
    if path is None or dataset_file is None:
        return {}
    if not isinstance(path, str):
        raise CheckpointError(f"{dataset_file}: tokenizer_path is {path!r}; allowed: a path or a name")
    for local in (dataset_file.parent / path, Path(path)):  # relative to the config or the working directory
        if local.exists():
            return {"tokenizer": local}
    return {"tokenizer_name": path}


def _config_file(folder: Path, files: list[str]) -> Path:
    """The path of the config: config.json, or the only JSON file with n_embd."""
    if "config.json" in files and "n_embd" in read_json(folder / "config.json"):
        return folder / "config.json"
    json_files = [f for f in files if f.endswith(".json")]
    candidates, error = [], None
    for name in json_files:
        try:
            if "n_embd" in read_json(folder / name):
                candidates.append(name)
        except CheckpointError as e:
            error = e
    if len(candidates) == 1:
        return folder / candidates[0]
    if candidates:
        raise CheckpointError(
            f"{folder} holds {len(candidates)} configs: {some(candidates)}; "
            "allowed: config.json, or a single *.json file with n_embd"
        )
    if error and len(json_files) == 1:  # presumably a damaged config
        raise error
    has = f"{some(json_files)}, without n_embd" if json_files else "no *.json file"
    raise CheckpointError(f"{folder} has {has}; allowed: config.json, or a single *.json file with n_embd")


def _newest(folder: Path, files: list[str]) -> str:
    """The base name of the newest TensorFlow checkpoint, such as model.ckpt-7."""
    bases = [f.removesuffix(".index") for f in files if f.endswith(".index")]
    if lists_checkpoints(folder, files):
        text = read_text(folder / "checkpoint")
        named = re.search(r'^[ \t]*model_checkpoint_path[ \t]*:[ \t]*"([^"\n]+)"', text, re.MULTILINE)
        if not named:
            raise CheckpointError(f'{folder / "checkpoint"} has no line model_checkpoint_path: "model.ckpt-N"')
        base = re.split(r"[/\\]", named[1])[-1]
        if base not in bases:
            raise CheckpointError(
                f"{folder / 'checkpoint'} names {base}, but {base}.index does not exist; "
                f"the folder has {some([f'{b}.index' for b in bases])}"
            )
        return base
    steps = {int(m[1]): b for b in bases for m in [re.fullmatch(r"model\.ckpt-(\d+)", b)] if m}
    if not steps:
        parts = [f for f in files if f.startswith("model.ckpt-")]
        raise CheckpointError(f"{folder} has no model.ckpt-N.index, only {some(parts)}; {ALLOWED}")
    return steps[max(steps)]


def _reader_errors() -> tuple[type[Exception], ...]:
    """What TensorFlow's reader raises for damaged files; some of its C++ errors become Python's own, such as IndexError
    for a short file."""
    return tf.errors.OpError, LookupError, RuntimeError, TypeError, ValueError, OSError


class _TensorFlowStore:
    """The `Store` of a TensorFlow checkpoint. Of its files, a fingerprint reads the index, which has checksums."""

    def __init__(self, folder: Path, base: str, files: list[str]) -> None:
        self._path = folder / base
        self._link_folder: tempfile.TemporaryDirectory[str] | None = None
        self.files = [folder / f"{base}.index"]
        shards = _data_files(self._path, base, files)
        check_file(self.files[0], LONGEST_TEXT)
        for name in shards:
            check_file(folder / name)
        try:
            check_index(self.files[0])
            self._prefix = str(self._without_wildcards(folder) / base)
            self._reader = tf.train.NewCheckpointReader(self._prefix)
            self.shapes = {n: tuple(s) for n, s in self._reader.get_variable_to_shape_map().items()}
            self.dtypes = {n: tf.as_dtype(d).name for n, d in self._reader.get_variable_to_dtype_map().items()}
        except _reader_errors() as e:
            raise CheckpointError(f"{self._path}.index cannot be read, it is damaged: {e}") from None
        needed = sum(STORED_BYTES.get(self.dtypes[n], 0) * math.prod(s) for n, s in self.shapes.items())
        size = sum((folder / f).stat().st_size for f in shards)
        if size < needed:
            raise CheckpointError(f"{self._path}.data-* is cut short: {size} bytes of at least {needed}")

    def _without_wildcards(self, folder: Path) -> Path:
        """The folder, or a link to it if its path has wildcards: TensorFlow globs the paths it opens."""
        if not re.search(r"[*?\[\\]", str(folder)) or os.name == "nt":
            return folder
        self._link_folder = tempfile.TemporaryDirectory()  # removed with this store
        link = Path(self._link_folder.name) / "model"
        link.symlink_to(folder.resolve())
        return link

    def read(self, name: str) -> np.ndarray:
        try:
            if self.dtypes[name] == "bfloat16":
                return self._read_bfloat16(name)
            return self._reader.get_tensor(name)
        except _reader_errors() as e:
            raise CheckpointError(f"{name} in {self._path} cannot be read: {e}") from None

    def _read_bfloat16(self, name: str) -> np.ndarray:
        """The tensor as float32, cast by TensorFlow, which reuses the memory of one read for the next."""
        with tf.Graph().as_default(), _cpu_session() as session:
            (stored,) = tf.raw_ops.RestoreV2(
                prefix=self._prefix, tensor_names=[name], shape_and_slices=[""], dtypes=[tf.bfloat16]
            )
            return session.run(tf.cast(stored, tf.float32))

    def close(self) -> None:
        self._reader = None
        if self._link_folder is not None:
            self._link_folder.cleanup()


def _data_files(path: Path, base: str, files: list[str]) -> list[str]:
    """The names of a checkpoint's data files, all of them."""
    shards = [m for f in files for m in [re.fullmatch(re.escape(base) + r"\.data-(\d{5})-of-(\d{5})", f)] if m]
    total = max((int(m[2]) for m in shards), default=1)
    names = {m[0] for m in shards}
    missing = [f for f in (f"{base}.data-{i:05d}-of-{total:05d}" for i in range(total)) if f not in names]
    if missing:
        raise CheckpointError(f"{path.parent} has {base}.index but not {some(missing)}")
    return sorted(names)

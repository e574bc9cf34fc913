"""What both formats share: the open checkpoint, its errors, its checks, its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt_neo_sampling._atomic_files import partial_beside
from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._types import Params, Shape, StrPath, is_int
from gpt_neo_sampling.models.config import (
    UNSUPPORTED_OPTIONS,
    check_variants,
    expand_attention_types,
    has_own_head,
    intermediate_size,
    n_learned_keys,
)

log = logging.getLogger(__name__)

EXAMPLE = "EleutherAI/gpt-neo-125m"  # a name on the Hugging Face hub
ALLOWED = (
    "allowed: a GPT-Neo mesh-TF checkpoint (a JSON config, model.ckpt-N.index, model.ckpt-N.data-*) or a Hugging Face "
    "GPT-Neo model (config.json with model_type gpt_neo, model.safetensors or pytorch_model.bin)"
)
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
PROGRESS_DELAY = 1.5  # seconds after which a progress bar appears
_BLOCK, _BLOCKS = 4096, 1024  # bytes of a block, and blocks of a file of weights, that a fingerprint reads
_LISTED = 5  # names that an error lists before it counts the rest
_ALIGNMENT = 64  # bytes; TensorFlow takes an array with this alignment without a copy
LONGEST_TEXT = 10**8  # bytes of a config or an index
_MOST_LAYERS = 10_000
_LONGEST_MESSAGE = 1000  # characters


class CheckpointError(ValueError):
    """A folder that cannot be read as a model; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def variable_shapes(params: Params) -> dict[str, Shape]:
    """The variables that a model of this config has.

    Args:
      params: a dict of GPT-Neo's config keys: n_vocab, n_ctx, n_embd, n_layer
        and attention_types (nested, or one type a layer), and those options that
        change the variables, `models.config.VARIANTS`; and of Hugging Face's keys tie_word_embeddings
        (with False there is a "lm_head") and intermediate_size, the width of c_fc.

    Returns:
      a dict from name, without the scope `gpt2/`, to shape, a tuple of ints. With
      share_parameters all layers have the same variables, whose names begin with "/".

    Raises:
      ValueError: see `models.config.expand_attention_types`.
    """
    n_vocab, n_embd = params["n_vocab"], params["n_embd"]
    shapes: dict[str, Shape] = {"wte": (n_vocab, n_embd)}
    if params.get("rotary_emb"):
        pass
    elif params.get("axial_pos_emb"):
        shapes.update({f"axial_wpe_{i}": (n, n_embd) for i, n in enumerate(params["axial_pos_emb"], 1)})
    else:
        shapes["wpe"] = (params["n_ctx"], n_embd)
    for layer, attention_type in enumerate(expand_attention_types(params["attention_types"], params["n_layer"])):
        scope = "" if params.get("share_parameters") else f"h{layer}"
        shapes.update({f"{scope}/{name}": shape for name, shape in _layer_shapes(params, attention_type).items()})
    if params.get("no_weight_tie"):
        return {**shapes, **_linear_shapes("wte_final_linear", "linear_out", n_embd, n_vocab)}
    if has_own_head(params):
        shapes["lm_head"] = shapes["wte"]
    return {**shapes, "ln_f/g": (n_embd,), "ln_f/b": (n_embd,)}


def _layer_shapes(params: Params, attention_type: str) -> dict[str, Shape]:
    """The shapes of a layer's variables, by name within the layer's scope."""
    n_embd, n_hidden = params["n_embd"], intermediate_size(params)

    def norm(scope: str) -> dict[str, Shape]:
        if params.get("rezero"):
            return {}
        return {f"{scope}/g": ()} if params.get("scalenorm") else {f"{scope}/g": (n_embd,), f"{scope}/b": (n_embd,)}

    def mlp(scope: str) -> dict[str, Shape]:
        n_in = 2 * n_hidden if params.get("mlp_glu") else n_hidden
        return {**_linear_shapes(scope, "c_fc", n_embd, n_in), **_linear_shapes(scope, "c_proj", n_hidden, n_embd)}

    shapes = mlp("mlp_macaron") if params.get("macaron") else {}
    if attention_type != "none":
        shapes.update(norm("norm_1"))
        shapes.update({f"attn/{name}": (n_embd, n_embd) for name in "qkvo"})
        shapes["attn/compute_output_bias/o_b"] = (n_embd,)
    if attention_type == "global" and n_learned_keys(params):
        learned = (n_learned_keys(params), params["n_head"], n_embd // params["n_head"])
        shapes.update({f"attn/attention/mem_{name}": learned for name in "kv"})
    if params.get("rezero"):
        shapes.update({f"norm_rezero_{i}/g": () for i in (1, 2)})
    return {**shapes, **norm("norm_2"), **mlp("mlp")}


def _linear_shapes(scope: str, name: str, n_in: int, n_out: int) -> dict[str, Shape]:
    return {f"{scope}/conv1d_main/{name}/kernel": (n_in, n_out), f"{scope}/conv1d_main/{name}/bias": (n_out,)}


class Store(Protocol):
    """The stored tensors of a checkpoint."""

    shapes: dict[str, Shape]
    dtypes: dict[str, str]
    files: list[Path]  # those that a fingerprint reads

    def read(self, name: str) -> np.ndarray: ...

    def close(self) -> None: ...


class Checkpoint(contextlib.AbstractContextManager["Checkpoint"]):
    """A model on disk: its config, and its weights by GPT-Neo's names.

    Made by `open_checkpoint`; usable in a `with` statement, which closes it.

    Attributes:
      kind: "mesh-tf" or "huggingface".
      folder: pathlib.Path, the folder.
      params: dict by GPT-Neo's config keys. Always present: n_vocab, n_ctx, n_embd,
        n_head, n_layer (ints), attention_types (a list of one type for each layer)
        and local_attention_radius (int). Present if the model names them:
        padding_id, eos_id and bos_id (ints). Present where a Hugging Face model
        differs from all of GPT-Neo's: intermediate_size (int), layer_norm_epsilon
        (a number), tie_word_embeddings (False), activation_fn (str). The other keys
        of a mesh-TF config are kept as they are, except for the first three of
        these, which GPT-Neo does not read.
      generation_defaults: dict of the model's own sampling options: eos_token_id
        (int, or a list of ints), pad_token_id and bos_token_id, if the model gives
        them; and from a generation_config.json the options that
        `checkpoint.generation` lists. If that file says anything about how tokens
        are drawn, transformers' defaults of do_sample, temperature and top_k are
        included.
      ignored_generation_options: dict of the other options in a
        generation_config.json that would change the samples; they are not supported.
      tokenizer_file: pathlib.Path of the model's tokenizer.json, or None.
      tokenizer_files: (vocab.json, merges.txt) as pathlib.Paths, or None unless
        both exist.
      tokenizer_name: str, the tokenizer that the model's dataset config names if
        it is not on this machine ("gpt2", say), or None.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        params: Params,
        generation: tuple[dict[str, Any], dict[str, Any]],
        store: Store,
        sources: dict[str, tuple[str, bool]],
        tokenizer: Path | None = None,
        tokenizer_name: str | None = None,
    ) -> None:
        # generation: (generation_defaults, ignored_generation_options)
        # sources: name -> (its name in the store, whether the transpose is stored)
        # tokenizer: a tokenizer.json, or a folder that may hold one; by default the model's folder
        self.kind = kind
        self.folder = folder
        self.params = params
        self.generation_defaults, self.ignored_generation_options = generation
        tokenizer = folder if tokenizer is None else tokenizer
        single = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
        pair = (tokenizer / "vocab.json", tokenizer / "merges.txt")
        self.tokenizer_file = single if single.is_file() else None
        self.tokenizer_files = pair if all(f.is_file() for f in pair) else None
        self.tokenizer_name = tokenizer_name
        self._store: Store | None = store
        self._weight_files = store.files
        self._sources = sources
        self._shapes = variable_shapes(params)
        doubles = [name for name, (stored, _) in sources.items() if store.dtypes[stored] == "float64"]
        if doubles:
            log.warning("%s: %d float64 variables are rounded to float32: %s", folder, len(doubles), some(doubles))

    def names(self) -> list[str]:
        """The names of the variables, without the scope `gpt2/`: a sorted list of strings."""
        return sorted(self._shapes)

    def shape(self, name: str) -> Shape:
        """The shape of a variable as `read` gives it.

        Args:
          name: str, one of `names()`.

        Returns:
          a tuple of ints.

        Raises:
          CheckpointError: if `names()` does not have the name.
        """
        if name not in self._shapes:
            raise CheckpointError(f"no variable {name!r} in {self.folder}; it has {some(self.names())}")
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        """Reads one variable.

        Args:
          name: str, one of `names()`.

        Returns:
          a float32 np.ndarray of shape `shape(name)`, kernels as [in, out]. The
          caller owns it.

        Raises:
          CheckpointError: if `names()` does not have the name, the file is damaged,
            a number is beyond float32, or the checkpoint is closed.
        """
        self.shape(name)
        if self._store is None:
            raise CheckpointError(f"{self.folder} is closed; open it again to read {name!r}")
        stored_name, transposed = self._sources[name]
        value = np.asarray(self._store.read(stored_name))  # TensorFlow returns a scalar as a number
        with np.errstate(over="ignore"):
            result = aligned(value.T if transposed else value, np.float32)
        if value.dtype == np.float64 and np.isinf(result).sum() > np.isinf(value).sum():
            raise CheckpointError(f"{self.folder}: {name} holds numbers beyond float32's 3.4e38")
        return result

    def first_not_finite(self) -> str | None:
        """The first variable in `names()` that holds NaN or infinite numbers, or None. Reads them all.

        Raises:
          CheckpointError: as `read`.
        """
        with progress_bar("looking for NaN", self._shapes.values()) as progress:
            for name in self.names():
                value = self.read(name)
                progress.update(value.nbytes)
                if not np.isfinite(value).all():
                    return name
        return None

    def fingerprint(self) -> str:
        """64 hexadecimal digits that tell this model from another, without reading all of it.

        SHA-256 of the config, the generation defaults, the tokenizer, and for each file
        of weights its size and evenly spaced blocks, so that every tensor of more than a
        thousandth of the file is included. (For a TensorFlow checkpoint, of its index,
        which holds each tensor's checksum.) The folder's path does not matter.

        Raises:
          CheckpointError: if a file cannot be read.
        """
        digest = hashlib.sha256(json.dumps([self.params, self.generation_defaults], sort_keys=True).encode())
        tokenizer = [self.tokenizer_file] if self.tokenizer_file else self.tokenizer_files or ()
        for path in (*tokenizer, *self._weight_files):
            try:
                with open(path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(f"{path.name} {size}\n".encode())
                    for begin in range(0, size, max(_BLOCK, size // _BLOCKS)):
                        file.seek(begin)
                        digest.update(file.read(_BLOCK))
            except OSError as e:
                raise CheckpointError(f"{path} cannot be read: {e}") from None
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the files. Everything but the weights stays available."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def one_line(message: object) -> str:
    """A message as one line of bounded length, with control characters escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(message).strip().splitlines()))
    half = _LONGEST_MESSAGE // 2
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:half]} … {line[-half:]}"


# ------------------------------------------------------------------ checks


def is_int32(value: object) -> bool:
    """Whether it is a whole number of 32 bits, as a config's numbers must be for TensorFlow."""
    return is_int(value) and -(2**31) <= value < 2**31


def check_sizes(params: Params, source: object, names: dict[str, str] | None = None) -> list[str]:
    """Checks the numbers of a config; returns its attention types, one for each layer.

    source: the beginning of error messages. names: the keys as the config file spells them.
    """
    names = names or {}
    required = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
    absent = [names.get(k, k) for k in (*required, "attention_types") if params.get(k) is None]
    if absent:
        raise CheckpointError(f"{source} does not give {', '.join(absent)}")
    for key in (*required, "local_attention_radius", "intermediate_size"):
        value = params.get(key)
        most = _MOST_LAYERS if key == "n_layer" else 2**31 - 1
        if value is not None and not (is_int(value) and 1 <= value <= most):
            raise CheckpointError(
                f"{source}: {names.get(key, key)} is {value!r}; allowed: a whole number from 1 to {most}"
            )
    if params["n_embd"] % params["n_head"]:
        n_embd, n_head = names.get("n_embd", "n_embd"), names.get("n_head", "n_head")
        raise CheckpointError(
            f"{source}: {n_embd} is {params['n_embd']}; allowed: a multiple of {n_head}={params['n_head']}"
        )
    try:
        check_variants(params)
        return expand_attention_types(params["attention_types"], params["n_layer"])
    except ValueError as e:
        raise CheckpointError(f"{source}: {e}") from None


def check_shapes(
    source: object, expected: dict[str, Shape], actual: Mapping[str, Sequence[int]], params: Params
) -> None:
    """Checks that two dicts, name -> shape, are the same."""
    actual = {name: tuple(shape) for name, shape in actual.items()}
    names_with = {
        "missing": [n for n in expected if n not in actual],
        "of wrong shape": [
            f"{n} (is {list(actual[n])}, should be {list(s)})"
            for n, s in expected.items() if n in actual and actual[n] != tuple(s)
        ],
        "unexpected": sorted(actual.keys() - expected.keys()),
    }  # fmt: skip
    problems = [f"{len(names)} {problem}: {some(names)}" for problem, names in names_with.items() if names]
    if not problems:
        return
    options = [f"{option}={params[option]!r}" for option in UNSUPPORTED_OPTIONS if params.get(option)]
    hint = f" (the config sets {', '.join(options)}, which is not supported)" if options else ""
    raise CheckpointError(f"{source}: the variables do not match the config{hint}: {'; '.join(problems)}")


def check_dtypes(source: object, dtypes: dict[str, str]) -> None:
    """Checks the dtypes, name -> dtype, of variables that will be read."""
    wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in STORED_BYTES]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} variables of an unsupported dtype: {some(wrong)}; "
            f"allowed: {', '.join(STORED_BYTES)}"
        )


# ------------------------------------------------------------------- files


def list_folder(folder: Path) -> list[str]:
    """The sorted names of a folder's entries."""
    try:
        files = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} does not exist; allowed: a folder on this machine, or a model's name on the "
            f"Hugging Face hub, such as {EXAMPLE}"
        ) from None
    except NotADirectoryError:
        raise CheckpointError(
            f"{folder} is a file; allowed: the model's folder, or its GPT-Neo config (*.json)"
        ) from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{folder} cannot be listed: {e}") from None
    if not files:
        raise CheckpointError(f"{folder} is empty; {ALLOWED}")
    return files


def check_file(path: Path, most_bytes: int | None = None) -> None:
    """Raises CheckpointError for anything but a regular file: a pipe or a device may never end."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "is a link to a file that does not exist"
        raise CheckpointError(f"{path} {what}; allowed: a file, or a link to one")
    size = path.stat().st_size
    if most_bytes is not None and size > most_bytes:
        raise CheckpointError(f"{path} has {size} bytes; allowed: at most {most_bytes}")


def read_text(path: Path) -> str:
    check_file(path, LONGEST_TEXT)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path} is not UTF-8 text: {e}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, as a dict."""
    try:
        value = json.loads(read_text(path))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; allowed: an object")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def check_new_folder(path: StrPath) -> Path:
    """The absolute path of a folder to write; it must be new or empty."""
    folder = Path(path).resolve()
    if folder.exists() and not (folder.is_dir() and not os.listdir(folder)):
        raise CheckpointError(f"{folder} exists already; allowed: a folder that is new or empty")
    return folder


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, to write files in before they are moved."""
    staging = partial_beside(folder)
    try:
        new_parents = [p for p in folder.parents if not p.exists()]
        staging.mkdir(parents=True)
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be written: {e.strerror}") from None
    try:
        yield staging
    except tf.errors.OpError as e:  # how TensorFlow reports a full disk
        raise OSError(f"{folder} cannot be written: {e.message.splitlines()[0]}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # not empty: the folder was written
                parent.rmdir()


def some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = list(names)
    if not names:
        return "nothing"
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


# ----------------------------------------------------------------- tensors


def aligned_empty(shape: Sequence[int], dtype: npt.DTypeLike) -> np.ndarray:
    """np.empty, aligned so that TensorFlow takes it without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % _ALIGNMENT
    return buffer[begin : begin + size].view(dtype).reshape(shape)


def aligned(value: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
    """The array in this dtype and C order, aligned so that TensorFlow takes it without a copy."""
    if value.dtype == dtype and value.flags.c_contiguous and value.ctypes.data % _ALIGNMENT == 0:
        return value
    copy = aligned_empty(value.shape, dtype)
    np.copyto(copy, value, casting="unsafe")
    return copy


def in_batches(names: Iterable[str], shapes: Mapping[str, Shape], size: int) -> Iterator[list[str]]:
    """Splits names, in order, into lists of at most `size` bytes in float32; a larger variable gets its own list."""
    batch: list[str] = []
    batch_bytes = 0
    for name in names:
        n_bytes = 4 * int(np.prod(shapes[name]))
        if batch and batch_bytes + n_bytes > size:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(name)
        batch_bytes += n_bytes
    if batch:
        yield batch


def progress_bar(what: str, shapes: Iterable[Shape]) -> tqdm:
    """A tqdm bar on stderr, where that is a terminal, that counts bytes in float32; it appears only if the work takes
    long."""
    total = sum(4 * int(np.prod(shape)) for shape in shapes)
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, delay=PROGRESS_DELAY, disable=None)

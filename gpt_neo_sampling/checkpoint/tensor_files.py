"""Tensors stored as plain bytes in files: safetensors, and PyTorch's own format without its code.

A PyTorch file (pytorch_model.bin) has one of two layouts: a zip archive with a
pickle and a file for each storage (PyTorch 1.6 and later), or pickles followed by
the storages. Of the pickles, only the tensors' positions are used: see `pickles`.
"""

import dataclasses
import json
import logging
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt_neo_sampling._install import install_line
from gpt_neo_sampling._types import Shape
from gpt_neo_sampling.checkpoint.base import CheckpointError, aligned_empty, one_line, some
from gpt_neo_sampling.checkpoint.pickles import Tensor, read_pickle, span

log = logging.getLogger(__name__)

_STORED_AS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}  # numpy has no bfloat16
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_NESTED = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers store a model's tensors
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The position of a tensor in a file."""

    path: Path
    begin: int  # of its first element, in bytes from the file's start
    dtype: str
    shape: Shape
    strides: tuple[int, ...]  # in elements


class TensorFiles:
    """The `Store` of a checkpoint in safetensors or PyTorch files."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: t.shape for name, t in tensors.items()}
        self.dtypes = {name: t.dtype for name, t in tensors.items()}
        self.files = sorted({t.path for t in tensors.values()})

    def are_same(self, a: str, b: str) -> bool:
        """Whether two names stand for the same bytes."""
        return self._tensors[a] == self._tensors[b]

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, or in float64 if it is stored so."""
        t = self._tensors[name]
        dtype = np.dtype(_STORED_AS[t.dtype])
        size = span(t.shape, t.strides)
        try:
            with open(t.path, "rb") as file:
                file.seek(t.begin)
                stored = np.fromfile(file, dtype, size)
        except OSError as e:
            raise CheckpointError(f"{name} in {t.path} cannot be read: {e}") from None
        if len(stored) < size:
            raise CheckpointError(f"{name} in {t.path} cannot be read: the file is cut short")
        stored = np.lib.stride_tricks.as_strided(stored, t.shape, [s * dtype.itemsize for s in t.strides])
        if t.dtype == "float64":
            return stored
        value = aligned_empty(t.shape, np.float32)
        if t.dtype == "bfloat16":  # the upper half of a float32
            np.left_shift(stored, np.uint32(16), out=value.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(value, stored)
        return value

    def close(self) -> None:
        pass  # no file is open between reads


def list_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: name -> StoredTensor.

    The file has a length (8 bytes, little-endian), that many bytes of JSON, and the
    tensors. The JSON gives each tensor's position after it.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors: {install_line('safetensors')}") from None
    try:
        with safe_open(str(path), framework="np"):  # checks the header and all positions
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(
                path,
                8 + size + entry["data_offsets"][0],
                _SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]),
                tuple(entry["shape"]),
                _contiguous(entry["shape"]),
            )
            for name, entry in header.items()
        }
    # LookupError, TypeError: the library accepts more forms of an entry than the one it writes
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as e:
        raise CheckpointError(f"{path} cannot be read as safetensors, {_reason(path, e)}") from None


def list_pytorch(path: Path) -> dict[str, StoredTensor]:
    """The same for a PyTorch file with a dict of tensors, or with such a dict under a key of `_NESTED`."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        tensors, begins = (_list_zip if is_zip else _list_legacy)(path)
        if not isinstance(tensors, dict):
            raise ValueError(f"it holds a {type(tensors).__name__}, not a dict of tensors")
        nested = [key for key in _NESTED if isinstance(tensors.get(key), dict)]
        if len(nested) == 1:
            beside = some(str(key) for key in tensors if key != nested[0])
            log.warning(one_line(f"{path}: the weights are read from its key {nested[0]!r}; ignored: {beside}"))
            tensors = tensors[nested[0]]
        others = [str(name) for name, t in tensors.items() if not isinstance(name, str) or not isinstance(t, Tensor)]
        if others:
            raise ValueError(
                f"it holds {len(others)} things that are not tensors: {some(others)}; "
                f"allowed: a dict of tensors, alone or under one of the keys {', '.join(_NESTED)}"
            )
        return {
            name: StoredTensor(
                path, begins[t.storage.key] + t.offset * t.storage.itemsize, t.storage.dtype, t.shape, t.strides
            )
            for name, t in tensors.items()
        }
    except CheckpointError:
        raise
    except Exception as e:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} cannot be read as a PyTorch file, {_reason(path, e)}") from None


# ---------------------------------------------------------- PyTorch's format


def _list_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """(the pickle's content, storage's key -> its first byte) of a zip archive."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        members = {m.filename: m for m in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} data.pkl; allowed: one")
        prefix = pickles[0].removesuffix("data.pkl")

        def begin(name: str) -> int:
            member = members[name]
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its {name} is compressed")
            file.seek(member.header_offset)
            header = file.read(30)
            if header[:4] != b"PK\3\4":
                raise ValueError(f"its {name} has no header")
            return member.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))

        def open_member(name: str) -> IO[bytes]:
            begin(name)  # refuses compressed members, which could expand to any size
            return archive.open(name)

        if f"{prefix}byteorder" in members:
            with open_member(f"{prefix}byteorder") as byteorder:
                if byteorder.read(6) != b"little":
                    raise ValueError("its numbers are big-endian; allowed: little-endian")
        with open_member(pickles[0]) as pickle:
            tensors, storages = read_pickle(pickle, path)
        begins = {}
        for storage in storages:
            name = f"{prefix}data/{storage.key}"
            begins[storage.key] = begin(name)
            if members[name].file_size < storage.size * storage.itemsize:
                raise ValueError(f"storage {storage.key} is cut short")
        return tensors, begins


def _list_legacy(path: Path) -> tuple[Any, dict[str, int]]:
    """The same for the older layout: pickles (magic number, protocol, machine, tensors, keys), then the storages."""
    with open(path, "rb") as file:

        def load() -> Any:
            return read_pickle(file, path)[0]

        if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
            raise ValueError("it is not one; a bare pickle is not read")
        if load().get("little_endian") is not True:
            raise ValueError("its numbers are big-endian; allowed: little-endian")
        tensors, named = read_pickle(file, path)
        keys = load()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its storages have no names")
        storages = {storage.key: storage for storage in named}
        end, begins = os.fstat(file.fileno()).st_size, {}
        for key in keys:
            storage = storages[key]
            if struct.unpack("<q", file.read(8)) != (storage.size,):
                raise ValueError(f"storage {key} has the wrong size")
            begins[key] = file.tell()
            if file.seek(storage.size * storage.itemsize, os.SEEK_CUR) > end:
                raise ValueError(f"storage {key} is cut short")
        return tensors, begins


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


def _reason(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            if file.read(32).startswith(b"version https://git-lfs"):
                return "it is a Git LFS pointer, run git lfs pull"
    except OSError:
        pass
    return f"damaged: {error or type(error).__name__}"

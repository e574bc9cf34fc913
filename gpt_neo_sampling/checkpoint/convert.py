"""Conversion from one format to the other."""

import os
import re
import shutil
from pathlib import Path

from gpt_neo_sampling._types import StrPath, is_int
from gpt_neo_sampling.checkpoint.base import Checkpoint, CheckpointError, check_new_folder, staging_folder
from gpt_neo_sampling.checkpoint.hugging_face import save_hugging_face
from gpt_neo_sampling.checkpoint.mesh_tf import save_mesh_tf
from gpt_neo_sampling.checkpoint.opening import open_checkpoint
from gpt_neo_sampling.checkpoint.tokenizer import TOKENIZER_FILES, tokenizer_source

MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert_checkpoint(
    source: StrPath,
    destination: StrPath,
    *,
    revision: str | None = None,
    to: str | None = None,
    dtype: str = "float32",
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a model in another format, a few tensors at a time.

    In float32, weights keep every bit. The tokenizer's files and
    generation_config.json are copied, and both formats' configs get the ids of the
    end, the padding and the beginning (Hugging Face's has no padding id outside the
    vocabulary). The destination appears whole or not at all.

    Args:
      source: as for `open_checkpoint`.
      destination: path of a new or empty folder.
      revision: as for `open_checkpoint`.
      to: "mesh-tf" or "huggingface"; by default the one that the source is not.
      dtype: of the written weights, "float32" or "bfloat16", or for Hugging Face
        also "float16".
      max_shard_size: for Hugging Face, the most that one file may hold, counted in
        float32: bytes, or a str such as "500MB"; by default "5GB". A tensor is never
        split.

    Raises:
      CheckpointError: (a ValueError) if the source cannot be read, the destination
        is not empty, an argument is not allowed, or the format cannot hold the model:
        GPT-Neo's has one layer_norm_epsilon, an intermediate_size of 4·n_embd, no
        `lm_head` and only some of Hugging Face's activation functions; Hugging
        Face's has none of `models.config.VARIANTS`.
      ConnectionError, OSError: as `open_checkpoint`, and if the destination cannot be written.

    Example, with the model that comes with the package:

        >>> import tempfile
        >>> from gpt_neo_sampling.generation.generator import DEMO_FOLDER
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     convert_checkpoint(DEMO_FOLDER, folder, to="huggingface", dtype="bfloat16")
        ...     print(sorted(os.listdir(folder)))
        ['config.json', 'model.safetensors', 'tokenizer.json']
    """
    destination = check_new_folder(destination)
    if to not in (None, "mesh-tf", "huggingface"):
        raise CheckpointError(f"to {to!r}; allowed: 'mesh-tf', 'huggingface'")
    max_shard_bytes = _bytes(MAX_SHARD_SIZE if max_shard_size is None else max_shard_size)
    with open_checkpoint(source, revision) as checkpoint, staging_folder(destination) as staging:
        if to is None:
            to = "mesh-tf" if checkpoint.kind == "huggingface" else "huggingface"
        if to == "mesh-tf":
            if max_shard_size is not None:
                raise CheckpointError(f"max_shard_size {max_shard_size!r}; allowed: only with to='huggingface'")
            save_mesh_tf(staging, checkpoint.params, checkpoint.read, dtype)
        else:
            save_hugging_face(staging, checkpoint.params, checkpoint.read, dtype, max_shard_bytes)
        for file, name in files_beside(checkpoint):
            shutil.copyfile(file, staging / name)
        os.replace(staging, destination)


def files_beside(checkpoint: Checkpoint) -> list[tuple[Path, str]]:
    """(path, name) of the files that are copied with a model: the tokenizer's and generation_config.json."""
    tokenizer = tokenizer_source(checkpoint)
    files = {checkpoint.folder / "generation_config.json": "generation_config.json"}
    if tokenizer is not None:
        files.update({tokenizer.parent / name: name for name in TOKENIZER_FILES})
    if checkpoint.tokenizer_file:
        files[checkpoint.tokenizer_file] = "tokenizer.json"
    return [(file, name) for file, name in files.items() if file.is_file()]


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*([kmg]i?b)?\s*", str(size), re.IGNORECASE)
    if not match or not (is_int(size) or isinstance(size, str)) or int(match[1]) < 1:
        raise CheckpointError(f"max_shard_size {size!r}; allowed: a number of bytes, or a size such as '500MB'")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]

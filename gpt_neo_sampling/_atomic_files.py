"""Files that are written whole or not at all."""

import pathlib
import uuid
from collections.abc import Callable

from gpt_neo_sampling._types import StrPath


def partial_beside(path: pathlib.Path, tag: str | None = None) -> pathlib.Path:
    """A hidden path in the same folder, its name of bounded length and made unique by `tag` or at random."""
    return path.with_name(f".{path.name[:40]}.{tag or uuid.uuid4().hex}.partial")


def write_whole(path: StrPath, write: Callable[[pathlib.Path], object], tag: str | None = None) -> None:
    """Calls `write` with the path of a temporary file beside `path`, and renames that to `path` once it is whole."""
    path = pathlib.Path(path)
    partial = partial_beside(path, tag)
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""Files that are written whole or not at all."""

import pathlib
import uuid
from collections.abc import Callable

from gpt_neo_sampling._types import StrPath


def partial_beside(path: pathlib.Path, tag: str | None = None) -> pathlib.Path:
    """A hidden name in the same folder, of a bounded length, with `tag` or else what nothing else has."""
    return path.with_name(f".{path.name[:40]}.{tag or uuid.uuid4().hex}.partial")


def write_whole(path: StrPath, write: Callable[[pathlib.Path], object], tag: str | None = None) -> None:
    """Has `write` make a file beside `path`, `partial_beside`, and puts it in its place once it is whole."""
    path = pathlib.Path(path)
    partial = partial_beside(path, tag)
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

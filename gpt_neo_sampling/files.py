"""Files that are written whole or not at all."""

import pathlib
import uuid
from collections.abc import Callable

from gpt_neo_sampling._types import StrPath


def write_whole(path: StrPath, write: Callable[[pathlib.Path], object]) -> None:
    """Has `write` make a file beside `path`, and puts it in its place once it is whole."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

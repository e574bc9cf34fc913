"""Names for the types that several modules share."""

import numbers
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from gpt_neo_sampling._compat import mtf, tf

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:
    from typing_extensions import Unpack as Unpack

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:
    Tokenizer = Any  # its package comes with an extra

Params = dict[str, Any]  # GPT-Neo's config, by its keys
Shape = tuple[int, ...]
StrPath = str | os.PathLike[str]
DType = str | tf.DType
Prompt = str | Sequence[int] | np.ndarray  # a text, or token ids
Prompts = Prompt | Sequence[Prompt]
LaidOut = Any  # a MeshImpl's LaidOutTensor: a slice on each processor
ShapeLike = mtf.Shape | Iterable[mtf.Dimension]
Tensor = np.ndarray | tf.Tensor | mtf.Tensor
RowValue = float | Tensor  # one for all rows, or one a row
TensorFunction = Callable[..., tf.Tensor]  # of slices
LogitsProcessor = Callable[[mtf.Tensor, mtf.Tensor, mtf.Tensor], mtf.Tensor]  # (logits, ids, position) to logits
Streamer = Callable[[int, int, str | None, bool], object]  # (index, token, text, is_last)

FLOAT32_MAX = float(np.finfo(np.float32).max)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, of Python's or of NumPy's types; a tensor is none."""
    return isinstance(value, numbers.Real)


def is_whole(value: object) -> TypeGuard[int]:
    """The same for integers."""
    return isinstance(value, numbers.Integral)


def is_real(value: object) -> TypeGuard[float]:
    """`is_number`, but for True and False, which a user who asks for a number does not mean."""
    return is_number(value) and not isinstance(value, bool)


def is_int(value: object) -> TypeGuard[int]:
    """`is_whole`, likewise."""
    return is_whole(value) and not isinstance(value, bool)

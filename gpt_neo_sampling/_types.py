"""Types that several modules share, and the two checks for numbers."""

import numbers
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:
    from typing_extensions import Unpack as Unpack

Params = dict[str, Any]  # GPT-Neo's config, by its keys
Shape = tuple[int, ...]
StrPath = str | os.PathLike[str]
Prompt = str | Sequence[int] | np.ndarray  # a text, or token ids
Prompts = Prompt | Sequence[Prompt]
LaidOut = Any  # a MeshImpl's LaidOutTensor: one slice a processor
Streamer = Callable[[int, int, str | None, bool], object]  # (index, token, text, is_last)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt_neo_sampling._compat import mtf, tf

    DType = str | tf.DType
    ShapeLike = mtf.Shape | Iterable[mtf.Dimension]
    Tensor = np.ndarray | tf.Tensor | mtf.Tensor
    RowValue = float | Tensor  # one for all rows, or one a row
    TokenSet = int | Sequence[int] | Tensor  # ids, or flags [vocab]
    TensorFunction = Callable[..., tf.Tensor]  # applied to slices
    LogitsProcessor = Callable[[mtf.Tensor, mtf.Tensor, mtf.Tensor], mtf.Tensor]  # (logits, ids, position) to logits
else:  # their packages take seconds to import; the tokenizers' comes with an extra
    Tokenizer = DType = ShapeLike = Tensor = RowValue = TokenSet = TensorFunction = LogitsProcessor = Any

FLOAT32_MAX = float(np.finfo(np.float32).max)


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a real number of Python's or NumPy's. True and False are not, nor is a tensor."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer of Python's or NumPy's. True and False are not, nor is a tensor."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)

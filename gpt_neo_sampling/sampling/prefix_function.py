"""A Python function that is asked, at each step, which tokens may come next."""

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import RowValue, is_int
from gpt_neo_sampling.mesh.ops import dim_of, host_call, import_rows, row_index
from gpt_neo_sampling.sampling.penalties import mask_where, rows_so_far

NO_ROW = -1  # the number of one that only fills a batch


@dataclasses.dataclass(eq=False)
class PrefixFunction:
    """A prefix_allowed_tokens_fn.

    Attributes:
      fn: a function of a row's number, an int, and its ids so far, an int32 ndarray [length], to a list of ids.
      error: what it raised, or None. TensorFlow turns it into an error of its own.
    """

    fn: Callable[[int, np.ndarray], Sequence[int]]
    error: BaseException | None = None


@dataclasses.dataclass
class PrefixFunctions:
    """What a graph asks: a function for each run of it.

    Attributes:
      functions: run -> its PrefixFunction.
      run: int32 tensor, scalar, which run it is; None for 0.
      rows: int32 tensor [rows], what a function calls its rows, NO_ROW for rows that it is not asked about; None for
        0, 1, 2, …
    """

    functions: MutableMapping[int, PrefixFunction]
    run: Any = None
    rows: Any = None


def prefix_mask(
    logits: mtf.Tensor,
    fn: PrefixFunctions | Callable[[int, np.ndarray], Sequence[int]],
    ids: mtf.Tensor,
    position: RowValue,
    done: mtf.Tensor | None = None,
    dim: mtf.Dimension | None = None,
    vocab_size: int | None = None,
) -> mtf.Tensor:
    """Masks all tokens but those that a Python function allows, as transformers' PrefixConstrainedLogitsProcessor.

    Args:
      logits: mtf.Tensor, on a mesh of this process's CPUs and GPUs.
      fn: a function, see PrefixFunction, or PrefixFunctions.
      ids: int32 mtf.Tensor [logits.shape − dim, length].
      position: an int, or an int32 tensor, scalar or [logits.shape − dim]: how many of the ids the row has.
      done: bool mtf.Tensor [logits.shape − dim], rows that it is not asked about; None for none.
      dim: mtf.Dimension of logits; the last by default.
      vocab_size: int, where the vocabulary is padded: ids from there on are an error.

    Returns:
      mtf.Tensor like logits.

    Raises:
      ValueError: when it is lowered, on another mesh.
    """
    dim, mesh = dim_of(logits, dim), logits.mesh
    asked = fn if isinstance(fn, PrefixFunctions) else PrefixFunctions({0: PrefixFunction(fn)})
    ids, position, rows = rows_so_far(logits, ids, position, dim)
    numbers = row_index(mesh, rows) if asked.rows is None else import_rows(mesh, asked.rows, tf.int32, rows, "rows")
    size = vocab_size or dim.size

    run = import_rows(mesh, 0 if asked.run is None else asked.run, tf.int32, [], "run")

    def ask(
        ids: np.ndarray, position: np.ndarray, numbers: np.ndarray, run: np.ndarray, *done: np.ndarray
    ) -> np.ndarray:
        function = asked.functions[int(run)]
        allowed = np.ones((numbers.size, dim.size), np.float32)
        skipped = done[0].ravel() if done else np.zeros(numbers.size, bool)
        all_ids = ids.reshape(numbers.size, -1)
        for row, (number, end) in enumerate(zip(numbers.ravel().tolist(), position.ravel().tolist())):
            if number != NO_ROW and not skipped[row]:
                try:
                    found = _checked(function.fn(number, all_ids[row, :end].copy()), number, size)
                except BaseException as e:
                    function.error = e
                    raise
                allowed[row] = 0
                allowed[row, found] = 1
        return allowed.reshape(*numbers.shape, dim.size)

    inputs = [ids, position, numbers, run, *([] if done is None else [done])]
    allowed = host_call(ask, inputs, "prefix_allowed_tokens_fn", rows + dim)
    return mask_where(lambda entry, allowed: allowed < 0.5, logits, dim, allowed)


def _checked(found: Any, row: int, size: int) -> list[int]:
    ids = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(ids, (list, tuple, range, set, frozenset)) or not ids:
        raise ValueError(f"prefix_allowed_tokens_fn gave {found!r} for row {row}; a list of at least one id is needed")
    for token in ids:
        if not is_int(token) or not 0 <= token < size:
            raise ValueError(
                f"prefix_allowed_tokens_fn gave {token!r} for row {row}; token ids from 0 to {size - 1} are needed"
            )
    return list(ids)

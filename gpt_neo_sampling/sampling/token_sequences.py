"""Sequences of tokens, with a number for each, as arrays that a graph can take."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from gpt_neo_sampling._types import FLOAT32_MAX, is_int, is_real


@dataclasses.dataclass(frozen=True)
class TokenSequences:
    """Sequences and their biases, as arrays or tensors. S sequences have T last tokens among them.

    Attributes:
      before: int32 [S, longest], the tokens of each ahead of its last one, the nearest first, then anything.
      lengths: int32 [S], how many those are; −1 for a sequence that never counts.
      biases: float32 [S]; −inf masks.
      last: int32 [T], each last token once; −1 for none.
      members: int32 [T, most], which sequences end with each, in the order in which they are added; S for none.
    """

    before: Any
    lengths: Any
    biases: Any
    last: Any
    members: Any

    dtypes: ClassVar[tuple[str, ...]] = ("int32", "int32", "float32", "int32", "int32")

    @classmethod
    def of(cls, biases: Iterable[tuple[Sequence[int], float]]) -> "TokenSequences":
        """As NumPy arrays, whose sizes are rounded up, so that other sequences find a graph that is built for them.

        Args:
          biases: pairs of a sequence, a list of ids, and its bias, a number; at least one.
        """
        pairs = [(tuple(int(i) for i in ids), bias) for ids, bias in biases]
        by_last: dict[int, list[int]] = {}
        for i, (ids, _) in enumerate(pairs):
            by_last.setdefault(ids[-1], []).append(i)
        size = _round_up_by_4(len(pairs))
        before = np.zeros((size, _round_up(max(len(ids) for ids, _ in pairs) - 1)), np.int32)
        lengths = np.full(size, -1, np.int32)
        for i, (ids, _) in enumerate(pairs):
            before[i, : len(ids) - 1] = ids[-2::-1]
            lengths[i] = len(ids) - 1
        last = np.full(_round_up_by_4(len(by_last)), -1, np.int32)
        members = np.full((len(last), _round_up(max(map(len, by_last.values())))), size, np.int32)
        for row, (token, indices) in enumerate(by_last.items()):
            last[row], members[row, : len(indices)] = token, indices
        biases = np.zeros(size, np.float32)
        biases[: len(pairs)] = [bias for _, bias in pairs]
        return cls(before, lengths, biases, last, members)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of `arrays`."""
        return tuple(np.shape(array) for array in self.arrays())

    def arrays(self) -> list[Any]:
        """The attributes, in their order."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _round_up(size: int) -> int:
    """To a power of two."""
    return 1 << max(0, size - 1).bit_length()


def _round_up_by_4(size: int) -> int:
    """To 16, 64, 256 …"""
    return 4 ** max(2, -(-(size - 1).bit_length() // 2))


def listed(given: Any) -> Any:
    """The same with lists for the NumPy arrays in it."""
    if isinstance(given, np.ndarray):
        return given.tolist()
    return type(given)(map(listed, given)) if type(given) in (list, tuple) else given


def biased(given: Any, n_vocab: int) -> list[tuple[Sequence[int], float]]:
    """Pairs of a sequence and its bias, checked, of what transformers takes as `sequence_bias`.

    Args:
      given: a dict, tuple of ids -> number, or a list of pairs [ids, number].
      n_vocab: int; ids from there on are an error.

    Raises:
      ValueError: for anything else, none at all, an id outside the vocabulary, or NaN or +inf.
    """
    wanted = "a dict {(1, 2): -3.0}, or a list [[[1, 2], -3.0]], of sequences of token ids and numbers"
    if not isinstance(given, (Mapping, list, tuple)) or not given:
        raise ValueError(f"sequence_bias={given!r}; {wanted} is needed")
    pairs = list(given.items()) if isinstance(given, Mapping) else list(listed(given))
    seen = set()
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"sequence_bias: {pair!r}; {wanted} is needed")
        ids, bias = pair
        _check(
            "sequence_bias", ids, "sequences of at least one token id, as in [[[50256], -1.0], [[3, 1], 2.5]],", n_vocab
        )
        if (sequence := tuple(map(int, ids))) in seen:
            raise ValueError(f"sequence_bias has {[*sequence]} twice")
        seen.add(sequence)
        if not is_real(bias) or not (abs(bias) <= FLOAT32_MAX or bias == -np.inf):
            raise ValueError(f"sequence_bias: {bias!r} for {list(ids)}; a finite number of 32 bits, or -inf, is needed")
    return pairs


def banned(given: Any, n_vocab: int) -> list[tuple[Sequence[int], float]]:
    """The same of what transformers takes as `bad_words_ids`, a list of lists of ids; n_vocab as for `biased`."""
    given = listed(given)
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"bad_words_ids={given!r}; a list of lists of token ids is needed, as in [[50256], [3, 1]]")
    for ids in given:
        _check("bad_words_ids", ids, "lists of at least one token id, as in [[50256], [3, 1]],", n_vocab)
    return [(ids, -np.inf) for ids in given]


def _check(name: str, ids: Any, wanted: str, n_vocab: int) -> None:
    """Raises ValueError, which says what is wanted, unless `ids` are a list of at least one token id below n_vocab."""
    if not isinstance(ids, (list, tuple)) or not ids:
        raise ValueError(f"{name}: {ids!r}; {wanted} are needed")
    for token in ids:
        if not is_int(token) or not 0 <= token < n_vocab:
            raise ValueError(f"{name}: token id={token!r}; a whole number from 0 to {n_vocab - 1} is needed")

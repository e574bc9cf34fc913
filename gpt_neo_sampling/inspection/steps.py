"""The distributions of a chain as plain data, and as JSON."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._types import Tokenizer
from gpt_neo_sampling.checkpoint.tokenizer import decoded

DEFAULT_COUNT = 16  # tokens to show
MOST_TOKEN_WIDTH = 18  # characters of a token, in a table and in a picture
_SPACES = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})


@dataclasses.dataclass(frozen=True, eq=False)
class ChainStep:
    """A next-token distribution after one step of the chain.

    Attributes:
      name: "model" for the first step; "softmax", "entmax" or "argmax" for the last;
        in between the option's name, such as "min_p".
      setting: str, the option's value, such as "0.9"; may be empty.
      probabilities: float ndarray [vocab] that adds up to 1.
    """

    name: str
    setting: str
    probabilities: np.ndarray

    @property
    def label(self) -> str:
        """str: "min_p 0.1", say, or "presence_penalty 1, frequency_penalty 0.5" for a step with two options."""
        pairs = itertools.zip_longest(self.name.split(", "), self.setting.split(", "), fillvalue="")
        return ", ".join(" ".join(pair).strip() for pair in pairs)

    @property
    def support(self) -> int:
        """int: the number of tokens with a probability above 0."""
        return int(np.count_nonzero(self.probabilities > 0))

    @property
    def entropy(self) -> float:
        """float: the distribution's entropy in bits."""
        p = self.probabilities[self.probabilities > 0].astype(np.float64)
        return max(0.0, float(-(p * np.log2(p)).sum()))

    @property
    def effective_size(self) -> float:
        """float: 2 to the entropy (perplexity), the number of equally likely tokens that are as hard to guess."""
        return 2.0**self.entropy

    def mass_removed(self, before: "ChainStep") -> float:
        """float: the probability that `before`, a ChainStep, gives to the tokens that have probability 0 here."""
        return float(before.probabilities.astype(np.float64)[self.probabilities == 0].sum())


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    r"""A token's text; bytes of an incomplete character are written \xe2\x80.

    Args:
      tokenizer: a tokenizers.Tokenizer, or None: then token 17 is written <17>.
      token_id: an int.
    """
    token = None if tokenizer is None else tokenizer.id_to_token(token_id)
    if tokenizer is None or token is None:  # a model's vocabulary may be larger than its tokenizer's
        return f"<{token_id}>"
    text = decoded(tokenizer, [token_id], skip_special_tokens=False)
    with contextlib.suppress(KeyError):
        if "\ufffd" in text:
            return bytes(_byte_of()[c] for c in token).decode("utf-8", "backslashreplace")
    return text


@functools.cache
def _byte_of() -> dict[str, int]:
    """{character: byte}: the printable characters that byte-level BPE (Radford et al. 2019) writes bytes as."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def likeliest(steps: Sequence[ChainStep], count: int = DEFAULT_COUNT) -> list[int]:
    """The ids to show: the `count` tokens with the highest probability in the first step or the last.

    They are sorted by their probability in the last step, ties and zeros by that in the first.
    """
    model, drawn = (step.probabilities.astype(np.float64) for step in (steps[0], steps[-1]))
    ids = np.argsort(-np.maximum(model, drawn), kind="stable")[:count]
    return [int(i) for i in sorted(ids, key=lambda i: (-drawn[i], -model[i], i))]


def ranks(probabilities: np.ndarray) -> np.ndarray:
    """int [vocab]: each token's rank, 1 for the likeliest; of equal ones the lower id comes first."""
    result = np.empty(len(probabilities), int)
    result[np.argsort(-probabilities, kind="stable")] = np.arange(1, len(probabilities) + 1)
    return result


def to_json(
    steps: Sequence[ChainStep], text: Callable[[int], str] | None = None, count: int = DEFAULT_COUNT
) -> dict[str, Any]:
    """The chain as a dict for json.dumps.

    Args:
      steps: list of ChainStep.
      text: a function from an id to the token's text, or None without a tokenizer.
      count: the number of tokens to list.

    Returns:
      {"steps": a dict for each step, "tokens": a dict for each token of `likeliest`,
      "others": for each step, the probability of all other tokens together}.
      Entropies are in bits.
    """
    ids = likeliest(steps, count)
    rank = ranks(steps[0].probabilities)
    return {
        "steps": [
            {
                "name": step.name,
                "setting": step.setting,
                "support": step.support,
                "mass_removed": step.mass_removed(before),
                "entropy": step.entropy,
                "effective_size": step.effective_size,
                "likeliest": int(step.probabilities.argmax()),
            }
            for before, step in zip([steps[0], *steps], steps)
        ],
        "tokens": [
            {
                "id": i,
                "text": text and text(i),
                "rank": int(rank[i]),
                "probabilities": [float(step.probabilities[i]) for step in steps],
            }
            for i in ids
        ],
        "others": [mass_of_others(step, ids) for step in steps],
    }


def mass_of_others(step: ChainStep, ids: list[int]) -> float:
    return float(np.delete(step.probabilities.astype(np.float64), ids).sum())


def changing(steps: Sequence[ChainStep]) -> list[tuple[ChainStep, float]]:
    """The first step and all that change something, each with the probability that it moves (1 for the first)."""
    result = [(steps[0], 1.0)]
    for before, step in zip(steps, steps[1:]):
        moved = 0.5 * float(np.abs(step.probabilities.astype(np.float64) - before.probabilities).sum())
        if moved > 1e-6 or step.support != before.support:
            result.append((step, moved))
    return result


def place_of(i: int, steps: Sequence[Any]) -> int:
    """0 for the first step, 2 for the last, 1 for those in between."""
    return 0 if i == 0 else 2 if i == len(steps) - 1 else 1


def visible(text: str) -> str:
    """Text with · for a space, ↵ for a line break, and escapes for characters that cannot be printed."""
    text = text.translate(_SPACES)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def percent(p: float) -> str:
    if p <= 0:
        return "0"
    return f"{p:.0%}" if p > 0.9995 else f"{p:.1%}" if p >= 0.09995 else f"{p:.2%}" if p >= 5e-5 else "<.01%"

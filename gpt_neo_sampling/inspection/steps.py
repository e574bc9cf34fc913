"""A chain's distributions, step by step: plain data, and as JSON."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._types import Tokenizer
from gpt_neo_sampling.checkpoint.tokenizer import decoded

DEFAULT_COUNT = 16  # tokens that are shown
MOST_TOKEN_WIDTH = 18  # characters of a token, in a table and in a picture
_SPACES = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})


@dataclasses.dataclass(frozen=True, eq=False)
class ChainStep:
    """A next-token distribution after one step of the chain.

    Attributes:
      name: "model" for the first; then the option's name, as "min_p"; "softmax",
        "entmax" or "argmax" for the last.
      setting: str, the option's value, as "0.9"; may be empty.
      probabilities: float ndarray [vocab], adds up to 1.
    """

    name: str
    setting: str
    probabilities: np.ndarray

    @property
    def label(self) -> str:
        """str: as "min_p 0.1", or "presence_penalty 1, frequency_penalty 0.5" for a step of several options."""
        pairs = itertools.zip_longest(self.name.split(", "), self.setting.split(", "), fillvalue="")
        return ", ".join(" ".join(pair).strip() for pair in pairs)

    @property
    def support(self) -> int:
        """int: how many tokens have a probability above 0."""
        return int(np.count_nonzero(self.probabilities > 0))

    @property
    def entropy(self) -> float:
        """float: how open the choice is, in bits."""
        p = self.probabilities[self.probabilities > 0].astype(np.float64)
        return max(0.0, float(-(p * np.log2(p)).sum()))

    @property
    def effective_size(self) -> float:
        """float: 2 to the entropy (perplexity): so many equally likely tokens are as hard to guess."""
        return 2.0**self.entropy

    def mass_removed(self, before: "ChainStep") -> float:
        """float: the probability that `before`, a ChainStep, gave to the tokens that have none here."""
        return float(before.probabilities.astype(np.float64)[self.probabilities == 0].sum())


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    r"""What a token stands for; bytes of half a character are written \xe2\x80.

    Args:
      tokenizer: a tokenizers.Tokenizer, or None: <17> stands for token 17.
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
    """{character: byte}: how byte-level BPE (Radford et al. 2019) writes bytes as printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def likeliest(steps: Sequence[ChainStep], count: int = DEFAULT_COUNT) -> list[int]:
    """The ids to show: the `count` likeliest of the first step and the last, in the last one's order.

    Ties, and tokens that the last step has none of, are in the first one's order.
    """
    model, drawn = (step.probabilities.astype(np.float64) for step in (steps[0], steps[-1]))
    chosen = np.argsort(-np.maximum(model, drawn), kind="stable")[:count]
    return [int(i) for i in sorted(chosen, key=lambda i: (-drawn[i], -model[i], i))]


def ranks(probabilities: np.ndarray) -> np.ndarray:
    """int [vocab]: each token's place, 1 for the likeliest; ties to the lower id."""
    places = np.empty(len(probabilities), int)
    places[np.argsort(-probabilities, kind="stable")] = np.arange(1, len(probabilities) + 1)
    return places


def to_json(
    steps: Sequence[ChainStep], text: Callable[[int], str] | None = None, count: int = DEFAULT_COUNT
) -> dict[str, Any]:
    """The chain as a dict for json.dumps.

    Args:
      steps: list of ChainStep.
      text: a function from an id to the token's text; None where there is no tokenizer.
      count: tokens to list.

    Returns:
      {"steps": one dict a step, "tokens": one dict a token of `likeliest`,
      "others": the probability of all other tokens together, a step each}.
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
    """The first step, and those that change something, each with the probability that it moves (1 for the first)."""
    found = [(steps[0], 1.0)]
    for before, step in zip(steps, steps[1:]):
        moved = 0.5 * float(np.abs(step.probabilities.astype(np.float64) - before.probabilities).sum())
        if moved > 1e-6 or step.support != before.support:
            found.append((step, moved))
    return found


def place_of(i: int, steps: Sequence[Any]) -> int:
    """0 for the first step, 2 for the last, 1 for those in between."""
    return 0 if i == 0 else 2 if i == len(steps) - 1 else 1


def visible(text: str) -> str:
    """Text with · for a space, ↵ for the end of a line, and escapes for what cannot be printed."""
    text = text.translate(_SPACES)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def percent(p: float) -> str:
    if p <= 0:
        return "0"
    return f"{p:.0%}" if p > 0.9995 else f"{p:.1%}" if p >= 0.09995 else f"{p:.2%}" if p >= 5e-5 else "<.01%"

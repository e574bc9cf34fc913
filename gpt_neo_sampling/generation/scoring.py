"""How likely a text is under a model: the log-probability of each token given those before it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.generation.decode_graph import Model, padded
from gpt_neo_sampling.sampling.controls import check_int
from gpt_neo_sampling.sampling.entmax import log_softmax_at
from gpt_neo_sampling.sampling.masks import padding_mask

MAX_ROWS = 32  # of one pass
MAX_POSITIONS = 2048  # of all rows of a pass together: its logits are [rows, positions, vocab]


@dataclasses.dataclass
class TextScore:
    """The score of one text. Logarithms are natural.

    Attributes:
      tokens: list of ids.
      logprobs: list, one for each token; None for a first token that nothing precedes.
      sum_logprob: float, in nats.
      perplexity: float, exp(−mean) of the tokens that have a log-probability.
    """

    tokens: list[int]
    logprobs: list[float | None]
    sum_logprob: float
    perplexity: float


@dataclasses.dataclass(frozen=True)
class ScoreKey:
    """What a scoring graph is built for."""

    batch: int
    length: int


class ScoreProgram:
    """One scoring graph: placeholders, and the log-probabilities of the targets, float32 [batch, length]."""

    def __init__(self, key: ScoreKey, model: Model) -> None:
        mesh, shape, other_features = model.inputs(key.batch, key.length)
        self._ids, self._targets = (tf.placeholder(tf.int32, shape.to_integer_list) for _ in range(2))
        ids, targets = (mtf.import_tf_tensor(mesh, t, shape) for t in (self._ids, self._targets))
        vocab_dim = other_features["vocab_dim"]
        logits = mtf.cast(model.logits(ids, other_features), tf.float32)
        logits = padding_mask(logits, model.params["n_vocab"], vocab_dim)
        logprobs = log_softmax_at(logits, targets, vocab_dim)
        self.results = model.lowered(mesh).export_to_tf_tensor(logprobs)

    def feeds(self, key: ScoreKey, rows: list[list[int]]) -> dict[tf.Tensor, np.ndarray]:
        """The feeds for rows of ids; the target of an id is the one after it."""
        ids = padded(rows, [key.batch, key.length + 1])
        return {self._ids: ids[:, :-1], self._targets: ids[:, 1:]}


def score_texts(
    texts: Sequence[Sequence[int]],
    logprobs_of: Callable[[list[list[int]]], list[np.ndarray]],
    context: int,
    start: Sequence[int] = (),
    stride: int | None = None,
) -> list[TextScore]:
    """Scores texts, several in a pass and long ones in windows.

    Args:
      texts: a list of lists of ids.
      logprobs_of: a function of a list of lists of 2 to `context` ids, that returns
        for each an array of the log-probabilities of all ids but the first.
      context: int, the most ids that the model can read at a time.
      start: ids to put before each text.
      stride: int in [1, context), or None: see `windows`.

    Returns:
      a list of `TextScore`.

    Raises:
      ValueError: for a text with nothing to score, or too long without a stride.
    """
    if stride is not None:
        check_int("stride", stride, 1, context - 1)
    rows = [[*start, *text] for text in texts]
    for i, row in enumerate(rows):
        if len(row) < 2 or not texts[i]:
            raise ValueError(f"text {i} has {len(texts[i])} tokens; at least 2 are needed, or 1 with add_start_token")
        if stride is None and len(row) > context:
            raise ValueError(f"text {i} has {len(row)} tokens, more than the context, {context}; give a stride")
    logprobs = [np.zeros(len(row)) for row in rows]
    # longest first, so that windows of similar length share a pass
    spans = sorted(((i, *w) for i, row in enumerate(rows) for w in windows(len(row), context, stride)),
                   key=lambda span: span[1] - span[2])  # fmt: skip
    while spans:
        n = _rows_of(longest=spans[0][2] - spans[0][1])
        batch, spans = spans[:n], spans[n:]
        results = logprobs_of([rows[i][begin:end] for i, begin, end, _ in batch])
        for (i, begin, end, first), result in zip(batch, results):
            logprobs[i][first:end] = result[first - begin - 1 :]
    return [_text_score(text, row[len(start) :], 0 if start else 1) for text, row in zip(texts, logprobs)]


def windows(length: int, context: int, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """The windows that a long text is read in, as is usual with transformers: (begin, end, first) of each.

    They are `context` tokens long and begin `stride` apart. Each scores its tokens
    from `first` on, those that no earlier window scored; after the first window they
    follow at least context − stride tokens.
    """
    first = 1
    for begin in range(0, length, stride or length):
        end = min(begin + context, length)
        yield begin, end, first
        if end == length:
            return
        first = end


def _rows_of(longest: int) -> int:
    """The number of rows in a pass, a power of two."""
    return 1 << min(MAX_ROWS, max(1, MAX_POSITIONS // longest)).bit_length() - 1


def _text_score(tokens: Sequence[int], logprobs: np.ndarray, n_unscored: int) -> TextScore:
    scored = logprobs[n_unscored:].tolist()
    total = math.fsum(scored)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.float64(-total / len(scored))))
    return TextScore(list(tokens), [None] * n_unscored + scored, total, perplexity)

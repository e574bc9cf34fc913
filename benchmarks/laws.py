"""What the candidates of a row are given, and the law that they must follow."""

import time

import common
import numpy as np

SPREAD = 2.5  # of the logits; a language model's are 2 to 3
SMALL_VOCAB, SMALL_BATCH = 96, 512  # of the check that resolves every entry
SMALL_DRAWS, LARGE_DRAWS = 20_000, 2_000
LONGEST_CHECK = 10.0  # seconds; a slow peer draws fewer
HISTORY = np.arange(512, dtype=np.int32) % 300  # tokens that stand before the one that is drawn
KEPT = {  # functions of tests/reference.py
    "top_k": "top_k_keep", "top_p": "top_p_keep", "min_p": "min_p_keep", "epsilon_cutoff": "epsilon_keep",
    "typical_p": "typical_p_keep", "eta_cutoff": "eta_keep",
}  # fmt: skip
FALSE_ALARM = 1e-4  # of one chi-square test of a right sampler
LARGEST_ERROR = 1e-5  # of a probability


def base_logits(vocab, seed=0):
    """float32 [vocab]"""
    return (SPREAD * np.random.default_rng(seed).normal(size=vocab)).astype(np.float32)


def logits(batch, vocab):
    """float32 [batch, vocab], the same in each row: all rows draw from one law."""
    return np.tile(base_logits(vocab), (batch, 1))


def law(base, *, temperature=1.0, alpha=None, **controls):
    """float64 [vocab]: the distribution that these logits have, by the tests' reference.

    controls: those of `KEPT`, and penalties of the tokens in `HISTORY`.
    """
    common.use_tests()
    import reference

    scaled = np.asarray(base, np.float64)
    counts = np.broadcast_to(reference.token_counts([HISTORY], scaled.shape[-1])[0], scaled.shape)
    scaled = reference.repetition_penalty(scaled, counts, controls.pop("repetition_penalty", 1))
    scaled = scaled - controls.pop("presence_penalty", 0) * (counts > 0)
    if temperature == 0:
        return reference.softmax(np.where(reference.top_k_keep(scaled, 1), scaled, -np.inf))
    scaled = scaled / temperature
    for name, value in controls.items():
        keep = getattr(reference, KEPT[name])(np.atleast_2d(scaled), value)
        keep = keep[0] if isinstance(keep, tuple) else keep
        scaled = np.where(keep.reshape(scaled.shape), scaled, -np.inf)
    return reference.softmax(scaled) if alpha is None else reference.entmax(scaled, alpha, -1)


def count_draws(draw, vocab, least, seconds=LONGEST_CHECK):
    """Counts [vocab] in `least` draws, or as many as fit into the time; draw() gives the tokens of a batch."""
    counts = np.zeros(vocab, np.int64)
    began = time.perf_counter()
    while counts.sum() < least and (counts.sum() == 0 or time.perf_counter() - began < seconds):
        tokens = np.asarray(draw()).reshape(-1)
        if (tokens < 0).any():
            raise ArithmeticError("a row was found to have no distribution")
        counts += np.bincount(tokens, minlength=vocab)
    return counts


def count_first_tokens(generate, draws=512, rows=32):
    """Counts [vocabulary] of the one new token of each row; generate(rows) gives lists of new tokens."""
    tokens = [row[0] for _ in range(draws // rows) for row in generate(rows)]
    return np.bincount(tokens, minlength=common.GPT2_VOCAB)


def chi_squares(counts, probabilities):
    """p-values, bins of at least 20 expected draws: of entries of like probability, and of neighbours.

    The first finds a wrong shape, a wrong tail above all; the second a drift along the vocabulary.
    """
    orders = {"by size": np.argsort(-probabilities, kind="stable"), "by place": np.arange(len(probabilities))}
    return {name: common.chi_square(counts[o], probabilities[o], least=20) for name, o in orders.items()}


class Sampler:
    """A candidate at the size that is timed; `check` draws at a small size too.

    program(name, batch, vocab, arguments) has `run()` and `gives_distribution`,
    with `distribution()` if so.
    """

    def __init__(self, program, candidate, vocab, batch, **arguments):
        self._vocab = vocab
        self._make = lambda batch, vocab: program(candidate, batch, vocab, arguments)
        self._program = self._make(batch, vocab)
        self.run = self._program.run

    def check(self):
        """{"distribution"}, or {"draws", "small_draws"}."""
        program = self._program
        if program.gives_distribution:
            return {"distribution": np.asarray(program.distribution())}
        counts = count_draws(program.run, self._vocab, LARGE_DRAWS)
        small = self._make(SMALL_BATCH, SMALL_VOCAB)
        return {"draws": counts, "small_draws": count_draws(small.run, SMALL_VOCAB, SMALL_DRAWS)}

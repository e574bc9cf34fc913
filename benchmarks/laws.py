"""What the candidates of a row are given, and the law that they must follow.

Each row of the logits is a permutation of the same Gaussian ones, so that draws
of all rows are draws from one law once they are put back in order.
"""

import time

import common
import numpy as np

SPREAD = 2.5  # of the logits; a language model's are 2 to 3
SMALL_VOCAB, SMALL_BATCH = 96, 512  # of the check that resolves every entry
SMALL_DRAWS, LARGE_DRAWS = 20_000, 2_000
LONGEST_CHECK = 10.0  # seconds; a slow peer draws fewer
FALSE_ALARM = 1e-4  # of one chi-square test of a right sampler
LARGEST_ERROR = 1e-5  # of a probability


def base_logits(vocab, seed=0):
    """float32 [vocab]"""
    return (SPREAD * np.random.default_rng(seed).normal(size=vocab)).astype(np.float32)


def logits(batch, vocab):
    """(float32 [batch, vocab], int64 [batch, vocab]: the entry of `base_logits` that stands there)."""
    rng = np.random.default_rng(1)
    order = np.argsort(rng.random((batch, vocab), np.float32), axis=1)
    return base_logits(vocab)[order], order


def law(base, *, temperature=1.0, top_k=None, alpha=None):
    """float64 [vocab]: the distribution that these logits have, by the tests' reference."""
    common.use_tests()
    import reference

    scaled = np.asarray(base, np.float64) / temperature
    if top_k:
        scaled = np.where(reference.top_k_keep(scaled, top_k), scaled, -np.inf)
    return reference.softmax(scaled) if alpha is None else reference.entmax(scaled, alpha, -1)


def count_draws(draw, order, least, seconds=LONGEST_CHECK):
    """Counts of each entry of `base_logits` in `least` draws, or as many as fit into the time.

    draw() gives tokens [batch]; order is that of `logits`.
    """
    counts = np.zeros(order.shape[1], np.int64)
    began = time.perf_counter()
    while counts.sum() < least and (counts.sum() == 0 or time.perf_counter() - began < seconds):
        tokens = np.asarray(draw()).reshape(-1)
        if (tokens < 0).any():
            raise ArithmeticError("a row was found to have no distribution")
        np.add.at(counts, order[np.arange(len(tokens)), tokens], 1)
    return counts


def count_first_tokens(generate, draws=512, rows=32):
    """Counts [vocabulary] of the one new token of each row; generate(rows) gives lists of new tokens."""
    tokens = [row[0] for _ in range(draws // rows) for row in generate(rows)]
    return np.bincount(tokens, minlength=common.GPT2_VOCAB)


def chi_square_of(counts, probabilities):
    """p-value; bins of at least 20 expected draws."""
    return common.chi_square(counts, probabilities, least=20)


class Sampler:
    """A candidate at the size that is timed; `check` draws at a small size too.

    program(name, batch, vocab, arguments) has `run()`, `order`, and
    `gives_distribution`, with `distribution()` if so.
    """

    def __init__(self, program, candidate, vocab, batch, **arguments):
        self._make = lambda batch, vocab: program(candidate, batch, vocab, arguments)
        self._program = self._make(batch, vocab)
        self.run = self._program.run

    def check(self):
        """{"distribution"} in the order of the base logits, or {"draws", "small_draws"}."""
        program = self._program
        if program.gives_distribution:
            p = np.asarray(program.distribution())
            in_order = np.empty_like(p)
            np.put_along_axis(in_order, program.order, p, axis=1)
            return {"distribution": in_order}
        counts = count_draws(program.run, program.order, LARGE_DRAWS)
        small = self._make(SMALL_BATCH, SMALL_VOCAB)
        return {"draws": counts, "small_draws": count_draws(small.run, small.order, SMALL_DRAWS)}

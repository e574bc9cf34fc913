"""Whether rare tokens are drawn as often as they should: 10⁸ draws from a Zipf law of exponent 1.5 over 50,257 entries.

    python benchmarks/tail_draws.py [--draws 100000000] [--law softmax] [--out DIR]

The least likely entry has a probability of 3.4e-8. A line each for softmax and entmax (α = 1.05, which keeps the whole
vocabulary, and 1.3, which keeps 7 entries) of float32 and bfloat16 logits, on one device and with the vocabulary
split over 4: the probabilities are computed in float32, as a decode step does it, and each row is drawn from many
times in one pass. The law that draws are held against is the reference's, in float64, of the logits as rounded.
Entries stand in the order of their probability; in the lines "shuffled" in a random one, so that rare entries share a
group with the likeliest. Tests of a line:

    chi-square   of all entries, merged from the likeliest down until a bin expects 5 draws
    tail         the draws, together, of the entries of probability 5e-8 to 2e-7: exact binomial, two-sided
    outside      of these entries, those drawn less or more often than an exact binomial band of each allows

A right sampler fails one in 10,000 lines of each (`outside`: its band shares that among the entries), so a table of 14
less than once in 230. Below, the method of the original, one float32 uniform against one float32 cumulative sum, on
the same law: what it can draw at all is counted on the grid of its uniforms. The exit status is 1 if one of
the library's lines fails.
"""

import argparse
import itertools
import pathlib
import sys
import time

import common
import numpy as np
from laws import FALSE_ALARM
from scipy import stats

common.use_tests()
import reference  # noqa: E402
from programs import MeshRunner, Program, dims  # noqa: E402

from gpt_neo_sampling import entmax, sample_categorical  # noqa: E402
from gpt_neo_sampling._compat import mtf, probe_devices, quiet_logging, quiet_stderr, tf  # noqa: E402
from gpt_neo_sampling.mesh.sharded_rows import padded_size  # noqa: E402

VOCAB, EXPONENT = common.GPT2_VOCAB, 1.5
ROWS, SAMPLES = 4, 2**18  # of a pass
TAIL = (5e-8, 2e-7)
ALPHAS = {"softmax": 1.0, "entmax 1.05": 1.05, "entmax 1.3": 1.3}
DTYPES = ("float32", "bfloat16")
SHARDS = (1, 4)
UNIFORM_BITS = 23  # of tf.random.uniform in float32


def logits(dtype, shuffled=False):
    """float32 [vocab]: the law's logarithms, rounded to a dtype."""
    rank = np.arange(1, VOCAB + 1)
    exact = -EXPONENT * np.log(np.random.default_rng(0).permutation(rank) if shuffled else rank)
    return exact.astype(np.float32).astype(tf.as_dtype(dtype).as_numpy_dtype).astype(np.float32)


def law(dtype, alpha, shuffled=False):
    """float64 [vocab]: the distribution of these logits."""
    x = logits(dtype, shuffled).astype(np.float64)
    return reference.softmax(x) if alpha == 1 else reference.entmax(x, alpha, -1)


class Library:
    """Draws of the library: many of each row in a pass."""

    def __init__(self, dtype, alpha, shards, shuffled=False, samples=SAMPLES):
        size = padded_size(VOCAB, shards) if shards > 1 else VOCAB
        self._x = np.full([ROWS, size], -np.inf, np.float32)
        self._x[:, :VOCAB] = logits(dtype, shuffled)

        def build(mesh, x, step):
            b, v, s = dims(batch=ROWS, vocab=size, samples=samples)
            x = mtf.cast(mtf.import_tf_tensor(mesh, tf.cast(x, dtype), mtf.Shape([b, v])), tf.float32)
            return sample_categorical(entmax(x, alpha, v), v, seed=1, step=step, samples_dim=s, size=VOCAB)

        runner = MeshRunner(f"x:{shards}", "vocab:x") if shards > 1 else MeshRunner()
        self._run = Program(build, [(tf.float32, (ROWS, size)), (tf.int32, ())], runner=runner)
        self._step = itertools.count()

    def __call__(self):
        return self._run(self._x, next(self._step))


class Original:
    """Draws by one float32 cumulative sum: the first entry at which it passes a uniform, or else the first of all."""

    def __init__(self, probabilities):
        self.cdf = np.cumsum(probabilities.astype(np.float32), dtype=np.float32)
        self._rng = np.random.default_rng(0)

    def __call__(self):
        u = self._rng.integers(0, 2**UNIFORM_BITS, ROWS * SAMPLES, np.uint32) * np.float32(2.0**-UNIFORM_BITS)
        return np.searchsorted(self.cdf, u, side="right") % VOCAB

    def reachable(self):
        """bool [vocab]: entries that some uniform leads to."""
        ends = np.ceil(self.cdf.astype(np.float64) * 2**UNIFORM_BITS)
        return np.diff(ends, prepend=0) > 0


def count(draw, n):
    """Counts [vocab] of at least n draws."""
    counts = np.zeros(VOCAB, np.int64)
    while counts.sum() < n:
        tokens = draw().ravel()
        if tokens.min() < 0:
            raise ArithmeticError("a row was found to have no distribution")
        counts += np.bincount(tokens, minlength=VOCAB)
    return counts


def verdict(counts, p):
    """What the tests say of counts of draws from the law p, and how often entries of each decade were drawn."""
    n = int(counts.sum())
    order = np.argsort(-p, kind="stable")
    in_tail = (TAIL[0] <= p) & (p < TAIL[1])
    mass, drawn = p[in_tail].sum(), int(counts[in_tail].sum())
    share = FALSE_ALARM / max(1, in_tail.sum())
    low, high = stats.binom.interval(1 - share, n, p[in_tail])
    decade = np.floor(np.log10(p, where=p > 0, out=np.full(VOCAB, np.nan)))
    found = {
        "draws": n,
        "chi_square_p": common.chi_square(counts[order], p[order], least=5),
        "tail_entries": int(in_tail.sum()),
        "tail_expected": float(n * mass),
        "tail_drawn": drawn,
        "tail_p": float(stats.binomtest(drawn, n, min(1.0, mass)).pvalue),
        "outside": int(((counts[in_tail] < low) | (counts[in_tail] > high)).sum()),
        "never_drawn": int((counts[in_tail] == 0).sum()),
        "decades": {
            f"1e{d:.0f}": [float(n * p[decade == d].sum()), int(counts[decade == d].sum())]
            for d in np.unique(decade[p > 0])[::-1]
        },
    }
    found["right"] = min(found["chi_square_p"], found["tail_p"]) > FALSE_ALARM and not found["outside"]
    return found


LINE = "{:40}{:>13}{:>12}{:>8}{:>12}{:>11}{:>10}{:>9}{:>7}{:>7}  {}"


def table_line(what, draw, p, draws):
    began = time.time()
    found = verdict(count(draw, draws), p)
    print(LINE.format(what, f"{found['draws']:,}", f"{found['chi_square_p']:.3g}", found["tail_entries"],
                      f"{found['tail_expected']:,.0f}", f"{found['tail_drawn']:,}", f"{found['tail_p']:.3g}",
                      found["outside"], found["never_drawn"], f"{time.time() - began:.0f}",
                      "right" if found["right"] else "WRONG"), flush=True)  # fmt: skip
    return {"what": what, **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100_000_000)
    parser.add_argument("--law", choices=ALPHAS, nargs="+", default=list(ALPHAS), help="some of the laws alone")
    parser.add_argument("--out", type=pathlib.Path, default=common.FOLDER / "results", metavar="DIR")
    args = parser.parse_args()
    probe_devices()
    print(LINE.format("", "draws", "chi² p", "tail", "expected", "drawn", "p", "outside", "never", "s", ""))
    lines = []
    with quiet_logging(), quiet_stderr():
        cases = [
            *itertools.product(args.law, DTYPES, SHARDS, [False]),
            *itertools.product(["softmax"] if "softmax" in args.law else [], DTYPES, [1], [True]),
        ]
        for name, dtype, shards, shuffled in cases:
            where = "one device" if shards == 1 else f"{shards} devices"
            what = f"{name}, {dtype}, {where}" + ", shuffled" * shuffled
            draw, p = Library(dtype, ALPHAS[name], shards, shuffled), law(dtype, ALPHAS[name], shuffled)
            lines.append(table_line(what, draw, p, args.draws))
    p = law("float32", 1.0)
    original = Original(p)
    theirs = table_line("original's method, softmax, float32", original, p, args.draws)
    out_of_reach = ~original.reachable()
    theirs.update(out_of_reach=int(out_of_reach.sum()), out_of_reach_mass=float(p[out_of_reach].sum()))
    print(f"\nThe original's method cannot draw {theirs['out_of_reach']:,} entries, of probability "
          f"{theirs['out_of_reach_mass']:.2e} together.\n")  # fmt: skip
    print("{:24}{:>14}{:>14}{:>14}".format("entries of probability", "expected", "library", "original"))
    for decade, (expected, drawn) in lines[0]["decades"].items():
        print(f"{'from ' + decade:24}{expected:14,.0f}{drawn:14,}{theirs['decades'][decade][1]:14,}")
    common.save(args.out, "tail-draws", {"false_alarm": FALSE_ALARM, "lines": lines, "original": theirs})
    return int(not all(line["right"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())

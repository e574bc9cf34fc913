"""Whether a process that serves for long grows: 10,000 calls of one `TextGenerator`, and a file of 100,000 tokens.

    python benchmarks/long_run.py [--rounds 40] [--calls 250] [--tokens 100000] [--out DIR]

A round is that many calls, one in eight of them with an error. Its first half takes 8 graphs that no round before
had, the second 8 that all rounds have; sizes within a graph, prompts, options, seeds change with every call.
After a round, and every few batches of the file, and after a garbage collection: memory (anonymous pages, swapped
out or not, which the kernel cannot drop), the nodes of all TensorFlow graphs that are alive, Python's objects, open
files, threads.

The first fifth of the samples is warm-up. Of the rest, a straight line is laid through the means of 8 blocks,
and what it rises from its begin to its end is held against `ALLOWED`: the upper end of the 99% interval (t, 6
degrees of freedom) must lie below it, so samples too scattered to tell fail too. The exit status is 1 if one does.
(TensorFlow keeps an empty list, an object of 56 bytes, for each thread that has run a session; a streamed call is one.)
"""

import argparse
import gc
import itertools
import json
import os
import pathlib
import random
import sys
import tempfile
import time

import common
import numpy as np

from gpt_neo_sampling import Interrupted, InvalidDistributionError, TextGenerator, generate_file
from gpt_neo_sampling._compat import tf

WARM_UP = 0.2
# what may be added from warm-up to the end: a part of the mean, or a number if that is more
ALLOWED = {"memory": (0.02, 0), "nodes": (0, 50), "objects": (0, 2000), "files": (0, 1), "threads": (0, 1)}
GRAPHS = 8  # of each half of a round: as many as are kept
FRESH = {
    "top_k": lambda rng: rng.randint(1, 60),
    "top_p": lambda rng: rng.uniform(0.5, 0.99),
    "min_p": lambda rng: rng.uniform(0.01, 0.2),
    "typical_p": lambda rng: rng.uniform(0.5, 0.99),
    "epsilon_cutoff": lambda rng: rng.uniform(1e-4, 1e-2),
    "eta_cutoff": lambda rng: rng.uniform(1e-4, 1e-2),
    "entmax_alpha": lambda rng: rng.uniform(1.05, 2),
    "repetition_penalty": lambda rng: rng.uniform(1.05, 1.5),
    "presence_penalty": lambda rng: rng.uniform(-1, 1),
    "frequency_penalty": lambda rng: rng.uniform(-1, 1),
    "min_new_tokens": lambda rng: rng.randint(1, 4),
}


# --- What is measured -----------------------------------------------------------------


def sizes():
    """{what: how much this process has of it now}"""
    gc.collect()
    objects = gc.get_objects()
    graph = tf.Graph  # looked up once: there are a million objects
    graphs = [x for x in objects if issubclass(type(x), graph)]  # isinstance would ask lazy modules for their class
    return {
        "memory": common.anonymous_bytes(),
        "nodes": sum(len(g.get_operations()) for g in graphs),
        "objects": len(objects),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def growth(samples, allowed):
    """{"begin", "end", "rise", "at_most", "allowed", "grows"} of numbers at even distances."""
    kept = np.array(samples[int(WARM_UP * len(samples)) :], float)
    rise, error = common.rise(kept)
    part, number = allowed
    limit = max(part * kept.mean(), number)
    return {
        "begin": samples[0], "end": samples[-1], "rise": rise, "at_most": rise + error, "allowed": float(limit),
        "grows": not rise + error < limit,  # NaN is not either
    }  # fmt: skip


def report(name, samples):
    """Prints a table of samples, dicts of `sizes`; what it found."""
    found = {what: growth([s[what] for s in samples], allowed) for what, allowed in ALLOWED.items()}
    print(f"\n{name:14}{'first':>15}{'last':>15}{'rise':>13}{'99%: below':>13}{'allowed':>13}")
    for what, f in found.items():
        print(f"{what:14}{f['begin']:15,}{f['end']:15,}{f['rise']:13,.1f}{f['at_most']:13,.1f}{f['allowed']:13,.1f}"
              f"   {'GROWS' if f['grows'] else 'no growth'}", flush=True)  # fmt: skip
    return {"samples": samples, "growth": found}


# --- Calls --------------------------------------------------------------------------


class Calls:
    """Calls of a generator: which graph each takes is planned, and the rest is drawn."""

    def __init__(self, generator, seed=0):
        self._generator, self._rng = generator, random.Random(seed)
        options = list(itertools.chain(*(itertools.combinations(FRESH, n) for n in (2, 3, 4))))
        self._rng.shuffle(options)
        self._fresh = iter(options)
        self._lasting = [
            self._streamed, self._suppressed, self._score, self._greedy, self._samples, self._logprobs, self._inspect,
            lambda: self._generate(16, top_k=self._rng.randint(1, 60)),
        ]  # fmt: skip
        self._wrong = [
            (ValueError, lambda: self._generate(1, temperature=-self._rng.random() - 0.1)),
            (ValueError, lambda: generator.generate([[self._rng.randint(10**6, 10**7)]])),
            (ValueError, lambda: generator.score([[]])),
            (TypeError, lambda: self._generate(1, **{f"option_{self._rng.random()}": 1})),
        ]
        self._wrong_of = {  # which need a graph that is there
            self._streamed: [(KeyError, lambda: self._streamed(KeyError())), (Interrupted, self._interrupted)],
            self._suppressed: [(InvalidDistributionError, lambda: self._suppressed(every=True))],
        }

    def round(self, calls, fresh=GRAPHS, lasting=GRAPHS):
        """Makes a number of calls: the first half with `fresh` new kinds, if any, the rest with `lasting` old ones."""
        new = [self._with(names, rows) for rows, names in zip(itertools.islice(POWERS, fresh), self._fresh)]
        first = calls // 2 if new else 0
        for kinds, count in ((new, first), (self._lasting[:lasting], calls - first)):
            wrong = self._wrong + [w for kind in kinds for w in self._wrong_of.get(kind, [])]
            for i in range(count):
                if i < len(kinds):
                    kinds[i]()  # each once, in this order: a round ends with the graphs of the one before
                elif i % 8 == 7:
                    self._fails(*self._rng.choice(wrong))
                else:
                    self._rng.choice(kinds)()

    def _fails(self, error, call):
        try:
            call()
        except error:
            return
        raise AssertionError(f"a call did not end with {error.__name__}")

    def _prompts(self, most):
        """Such that the smallest graph for `most` prompts is that for these."""
        return [self._ids(16) for _ in range(self._rng.randint(most // 2 + 1, most))]

    def _ids(self, most):
        return [self._rng.randrange(2048) for _ in range(self._rng.randint(1, most))]

    def _generate(self, most, **options):
        prompts = self._prompts(most)
        if "temperature" not in options:
            options["temperature"] = [self._rng.uniform(0.5, 1.5) for _ in prompts]
        options["seed"], options["max_new_tokens"] = self._rng.randrange(2**32), self._rng.randint(4, 8)
        samples = self._generator.generate(prompts, **options)
        assert len(samples) == len(prompts) * options.get("num_return_sequences", 1)

    def _with(self, names, most):
        return lambda: self._generate(most, **{name: FRESH[name](self._rng) for name in names})

    def _greedy(self):
        self._generate(4, temperature=0)

    def _samples(self):
        self._generate(2, num_return_sequences=4)

    def _logprobs(self):
        self._generate(8, return_logprobs=True, eos_token_id=[0, self._rng.randrange(1, 2048)])

    def _streamed(self, error=None):
        def streamer(index, token, text, is_last):
            if error is not None:
                raise error

        self._generate(2, streamer=streamer, stop_strings=[self._rng.choice("aeiou")])

    def _interrupted(self):
        self._streamed(KeyboardInterrupt())

    def _suppressed(self, every=False):
        suppressed = range(1, 2048) if every else self._ids(9)  # 0 is the stop token
        self._generate(1, suppress_tokens=list(suppressed), min_new_tokens=1)

    def _score(self):
        self._generator.score([ids + [0, 1] for ids in self._prompts(4)])

    def _inspect(self):
        self._generator.inspect(self._ids(9), top_p=self._rng.random())


POWERS = itertools.cycle((1, 2, 4, 8, 16, 32))


def call_rounds(generator, rounds, calls, seconds, **kinds):
    """Samples of `sizes`, one behind each round; adds to `seconds` how long each took."""
    load, samples = Calls(generator), []
    for n in range(rounds):
        began = time.time()
        load.round(calls, **kinds)
        seconds.append(round(time.time() - began, 1))
        samples.append(sizes())
        print(f"round {n + 1} of {rounds}: {seconds[-1]} s, {samples[-1]}", file=sys.stderr, flush=True)
    return samples


# --- The file -------------------------------------------------------------------------


class Watched(TextGenerator):
    """Which notes the process's sizes after every few of its calls."""

    def note(self, every, samples):
        self._every, self._samples, self._calls = every, samples, 0

    def generate(self, *args, **options):
        out = super().generate(*args, **options)
        self._calls += 1
        if self._calls % self._every == 0:
            self._samples.append(sizes())
        return out


def file_job(tokens, every=2, new_tokens=64):
    """(samples of `sizes`, tokens written) of a job that writes so many tokens."""
    rng, generator, samples = random.Random(1), Watched.from_pretrained(), []
    generator.note(every, samples)
    with tempfile.TemporaryDirectory() as folder:
        source, output = pathlib.Path(folder, "prompts.jsonl"), pathlib.Path(folder, "out.jsonl")
        with open(source, "w") as file:
            for i in range(-(-tokens // new_tokens)):
                record = {"id": i, "prompt_ids": rng.choices(range(2048), k=rng.randint(1, 30)),
                          "temperature": rng.uniform(0.5, 1.2), "top_k": rng.randint(1, 60)}  # fmt: skip
                print(json.dumps(record), file=file)
        generate_file(generator, source, output, seed=1, max_new_tokens=new_tokens, eos_token_id=-1)
        with open(output) as file:
            written = sum(len(sample["tokens"]) for line in file for sample in json.loads(line)["samples"])
    generator.close()
    return samples, written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=250, help="of a round")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the file")
    parser.add_argument("--out", type=pathlib.Path, default=common.FOLDER / "results", metavar="DIR")
    args = parser.parse_args()
    began, seconds = time.time(), []
    generator = TextGenerator.from_pretrained()
    samples = call_rounds(generator, args.rounds, args.calls, seconds)
    calls = report(f"{args.rounds * args.calls:,} calls", samples)
    generator.close()
    samples, written = file_job(args.tokens)
    file = report(f"{written:,} tokens", samples)
    results = {"calls": args.rounds * args.calls, "round_seconds": seconds, **calls}
    common.save(args.out, "long-run", {**results, "file": {"tokens": written, **file}})
    print(f"\n{time.time() - began:.0f} s")
    return int(any(f["grows"] for part in (calls, file) for f in part["growth"].values()))


if __name__ == "__main__":
    sys.exit(main())

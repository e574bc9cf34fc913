"""One TextGenerator and many callers: what each gets is what it gets alone, and what they take together.

    python benchmarks/threads.py [--threads 16] [--calls 100] [--model FOLDER]

A generator that has built nothing is called from all threads at once. Each call has its own prompts, options, number
of new tokens, stop string and seed, and two of three a streamer; they need four graphs between them. Then the same
calls are made one after the other, by another generator, and texts, tokens, reasons and what the streamers heard are
compared. Prints the number of calls that are equal and both times; the exit status is 1 unless all are.
"""

import argparse
import sys
import threading
import time

import common
import numpy as np

from gpt_neo_sampling import TextGenerator

PROMPTS = ("It was the duty of", "The family of Dashwood", "She", "A single man in possession of a good fortune")
STOPS = (None, "the", ",", "e", ".")
OPTIONS = ({"top_k": 50, "temperature": 0.7}, {"top_k": 5, "temperature": 1.1}, {"top_k": 40, "temperature": 0.3})
NEW_TOKENS = (6, 12, 50)  # and any of the prompts: a graph of 32 positions, or of 64


def requests(n):
    """n calls: generate's arguments, and whether a streamer listens."""
    rng = np.random.default_rng(0)
    for i in range(n):
        stop = STOPS[rng.integers(len(STOPS))]
        prompts = [PROMPTS[j] for j in rng.integers(len(PROMPTS), size=rng.integers(1, 3))]
        options = dict(OPTIONS[rng.integers(len(OPTIONS))], seed=i, max_new_tokens=int(rng.choice(NEW_TOKENS)))
        yield dict(options, prompts=prompts, **({} if stop is None else {"stop_strings": [stop]})), i % 3 > 0


def answer(generator, options, has_streamer):
    heard = []

    def streamer(index, token, text, is_last):
        heard.append((index, token, text, is_last))

    samples = generator.generate(streamer=streamer if has_streamer else None, **options)
    return [(s.tokens, s.text, s.finish_reason) for s in samples], sorted(heard, key=lambda h: h[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--calls", type=int, default=100, help="of each thread")
    parser.add_argument("--model", help="a folder; the bundled model without")
    args = parser.parse_args()
    folder = [args.model] if args.model else []
    calls = list(requests(args.threads * args.calls))
    found, start = [None] * len(calls), threading.Barrier(args.threads + 1)
    generator = TextGenerator.from_pretrained(*folder)

    def work(first):
        start.wait()
        for i in range(first, len(calls), args.threads):
            try:
                found[i] = answer(generator, *calls[i])
            except Exception as e:  # is to show in the count
                found[i] = repr(e)

    threads = [threading.Thread(target=work, args=[i]) for i in range(args.threads)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    together = time.perf_counter() - began
    generator.close()

    generator = TextGenerator.from_pretrained(*folder)
    began = time.perf_counter()
    alone = [answer(generator, *call) for call in calls]
    one_by_one = time.perf_counter() - began
    equal = sum(f == a for f, a in zip(found, alone, strict=True))
    tokens = sum(len(sample[0]) for samples, _ in alone for sample in samples)
    print(
        f"{common.machine()['cpu']}: {equal} of {len(calls)} calls from {args.threads} threads as alone "
        f"({tokens} tokens); {together:.1f} s together, {one_by_one:.1f} s one after the other"
    )
    sys.exit(equal != len(calls))


if __name__ == "__main__":
    main()

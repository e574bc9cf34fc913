"""What each control adds to a step of sampling on a CPU, beside softmax's own step.

    .venv/bin/python benchmarks/control_costs.py [NAME …] [--batch 8] [--blocks 9] [--out FILE.json]

A step draws a token for each of 8 rows of 50,257 float32 logits, whose rows have 512 tokens so far. Programs run in
turn, a block each; the times are medians, and the ratios medians of blocks that ran next to each other.
"""

import argparse
import json
import statistics
import sys
import time

import common

common.use_tests()

import numpy as np  # noqa: E402
from programs import Program, dims  # noqa: E402

from gpt_neo_sampling._compat import mtf, tf  # noqa: E402
from gpt_neo_sampling.mesh.ops import cwise_broadcast  # noqa: E402
from gpt_neo_sampling.sampling.controls import History, SamplingOptions  # noqa: E402
from gpt_neo_sampling.sampling.next_token import next_token  # noqa: E402

VOCAB, LENGTH, STEPS = 50257, 512, 10
IDS = list(range(5, 20000, 97))
SEQUENCES = {(t, t + 1): 1.0 for t in range(100)}
CONTROLS = {
    "softmax": {},
    "sequence_bias, 100 pairs": dict(sequence_bias=SEQUENCES),
    "bad_words_ids, 100 pairs": dict(bad_words_ids=[list(pair) for pair in SEQUENCES]),
    "repetition_penalty": dict(repetition_penalty=1.2),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=3),
    "dry_multiplier": dict(dry_multiplier=0.8),
    "dry_multiplier, a match of 50": dict(dry_multiplier=0.8),
    "logit_bias": dict(logit_bias=np.linspace(-1, 1, VOCAB).astype(np.float32)),
    "min_length": dict(min_length=LENGTH + 9),
    "allowed_token_ids": dict(allowed_token_ids=IDS),
    "forced_eos_token_id": dict(forced_eos_token_id=7),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(5, 1.01)),
    "suppress_tokens": dict(suppress_tokens=IDS),
    "begin_suppress_tokens": dict(begin_suppress_tokens=IDS),
    "prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=lambda row, ids: IDS),
    "dynatemp_range": dict(dynatemp_range=0.3),
    "top_k": dict(top_k=40),
    "top_p": dict(top_p=0.9),
    "top_p, min_tokens_to_keep": dict(top_p=0.9, min_tokens_to_keep=5),
    "min_p": dict(min_p=0.05),
    "epsilon_cutoff": dict(epsilon_cutoff=3e-4),
    "typical_p": dict(typical_p=0.9),
    "typical_p, min_tokens_to_keep": dict(typical_p=0.9, min_tokens_to_keep=5),
    "xtc_probability": dict(xtc_probability=0.5, xtc_threshold=0.05),
    "mirostat": dict(mirostat=2),
}


def program(name, batch):
    """A function that runs STEPS steps."""
    options = SamplingOptions(stop_tokens=(50256,), **CONTROLS[name])

    def build(mesh, logits, ids):
        batch_dim, vocab, length = dims(batch=batch, vocab=VOCAB, length=LENGTH + STEPS)
        logits = mtf.import_tf_tensor(mesh, logits, mtf.Shape([batch_dim, vocab]))
        ids = mtf.import_tf_tensor(mesh, ids, mtf.Shape([batch_dim, length]))
        filled = lambda n: mtf.constant(mesh, n, mtf.Shape([batch_dim]), tf.int32)  # noqa: E731
        history = History(ids, filled(LENGTH), filled(LENGTH // 2), filled(LENGTH + 99))

        def body(step, total):
            x = cwise_broadcast(lambda x, step: x + tf.cast(step, tf.float32) * 1e-6, [logits, step], logits.shape)
            token = next_token(x, vocab, options, 1, None, step, history)
            return [step + 1, total + token]

        start = [mtf.constant(mesh, 0, mtf.Shape([]), tf.int32), filled(0)]
        return mtf.while_loop(lambda step, *_: mtf.less(step, STEPS), body, start)[1]

    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal((batch, VOCAB))).astype(np.float32)
    ids = rng.integers(0, 2000, (batch, LENGTH + STEPS)).astype(np.int32)
    if "match" in name:
        ids[:, LENGTH - 50 : LENGTH] = ids[:, 100:150]
    run = Program(build, [(tf.float32, logits.shape), (tf.int32, ids.shape)], optimized=True)
    return lambda: run(logits, ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(CONTROLS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--out", help="a JSON file of all times")
    args = parser.parse_args()
    names = args.names or list(CONTROLS)
    unknown = set(names) - CONTROLS.keys()
    if unknown:
        parser.error(f"no control {', '.join(sorted(unknown))}")
    found = {}
    print(f"{'control':36} {'ms a step':>9} {'of softmax':>10} {'added ms':>9}")
    for name in names:
        runs = [program("softmax", args.batch), program(name, args.batch)]
        times = [[], []]
        for block in range(args.blocks + 1):
            for run, of in zip(runs, times):
                begin = time.perf_counter()
                run()
                if block:  # the first warms up
                    of.append((time.perf_counter() - begin) / STEPS * 1e3)
        ratios = [own / plain for plain, own in zip(*times)]
        added = statistics.median(own - plain for plain, own in zip(*times))
        found[name] = {"softmax": times[0], "ms": times[1]}
        print(
            f"{name:36} {statistics.median(times[1]):9.2f} {statistics.median(ratios):10.2f} {added:9.2f}", flush=True
        )
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

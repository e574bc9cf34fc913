"""Where a decode step's time goes, for a model of GPT-Neo 125M's shape.

    python benchmarks/profile_decode.py [--batch 1] [--new-tokens 64] [--dtype bfloat16] [--jit-compile] [--top 15]
        [--json]

TensorFlow's full trace of one request: each operation's time, summed by type.
Two threads work at once, so the sum may pass the time that went by; tracing
slows the request down, so its time without is given too.
"""

import argparse
import collections
import contextlib
import json
import statistics
import time

import common

common.pin()

from gpt_neo_sampling import TextGenerator  # noqa: E402
from gpt_neo_sampling._compat import tf  # noqa: E402


@contextlib.contextmanager
def traced():
    """Yields a list to which each session.run in the block adds its RunMetadata."""
    found = []
    run = tf.Session.run

    def with_trace(session, fetches, feed_dict=None, options=None, run_metadata=None):
        metadata = tf.RunMetadata()
        trace = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
        values = run(session, fetches, feed_dict, trace, metadata)
        found.append(metadata)
        return values

    tf.Session.run = with_trace
    try:
        yield found
    finally:
        tf.Session.run = run


def by_type(metadatas):
    """{type of operation: [microseconds, how often it ran]}"""
    sums = collections.defaultdict(lambda: [0, 0])
    for metadata in metadatas:
        for device in metadata.step_stats.dev_stats:
            for node in device.node_stats:
                # "name = Type(inputs)"
                label = node.timeline_label.split(" = ")[-1].split("(")[0] or node.node_name.split(":")[-1]
                sums[label][0] += node.op_end_rel_micros - node.op_start_rel_micros
                sums[label][1] += 1
    return sums


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--jit-compile", action="store_true", help="XLA's program then counts as one operation")
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="requests without a trace, of which the median is given")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    generator = TextGenerator.from_pretrained(common.model_folder(), dtype=args.dtype, jit_compile=args.jit_compile)
    prompts = common.prompts(args.batch, args.prompt)

    def request(new_tokens=args.new_tokens):
        began = time.perf_counter()
        generator.generate(prompts, max_new_tokens=new_tokens, top_k=40, seed=1, eos_token_id=-1)
        return 1000 * (time.perf_counter() - began)

    request()  # builds and warms up
    untraced = statistics.median(request() for _ in range(args.repeats))
    with traced() as metadata:
        traced_time = request()
    if not metadata:
        raise SystemExit("profile_decode: no session.run was seen")
    sums = sorted(by_type(metadata).items(), key=lambda item: -item[1][0])
    steps = args.new_tokens
    total, runs = (sum(values[i] for _, values in sums) for i in range(2))
    if args.json:
        print(json.dumps({
            "batch": args.batch, "new_tokens": steps, "milliseconds": untraced, "milliseconds_traced": traced_time,
            "operations": {name: {"milliseconds": t / 1000, "runs": n} for name, (t, n) in sums},
        }))  # fmt: skip
        return
    print(f"batch {args.batch}, prompt {args.prompt}, {steps} new tokens; prompt and steps together, per step")
    print(f"{'operation':36} {'ms a step':>9} {'share':>6} {'runs a step':>11}")
    for name, (t, n) in sums[: args.top]:
        print(f"{name:36} {t / 1000 / steps:9.3f} {t / total:6.1%} {n / steps:11.1f}")
    print(f"{'all ' + str(len(sums)) + ' types':36} {total / 1000 / steps:9.3f} {1:6.1%} {runs / steps:11.1f}")
    print(f"went by: {traced_time / steps:.2f} ms a step with the trace, {untraced / steps:.2f} ms without "
          f"({1000 * args.batch * steps / untraced:.1f} tokens a second)")  # fmt: skip


if __name__ == "__main__":
    main()

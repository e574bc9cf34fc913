"""Peak resident set of a run of the 125M shape beside what it must hold. A section of run.py.

    python benchmarks/memory.py [--batch 1]

As a script: one run in this fresh process, a JSON object. With --batch 0 only
TensorFlow's import and a trivial session, its idle footprint.
"""

import argparse
import json

import common

BATCHES = (1, 8)
LARGEST_RATIO = 1.3  # of weights, caches and TensorFlow's idle footprint


def cache_bytes(batch, length=common.PROMPT + common.NEW_TOKENS):
    """Keys and values of every layer, float32."""
    return 2 * common.GPT_NEO_125M["num_layers"] * batch * length * common.GPT_NEO_125M["hidden_size"] * 4


def section(stem):
    idle = common.child_json("memory.py", "--batch", "0")["peak"]
    weights = sum(common.tensor_bytes(common.model_folder()).values())
    results = {"idle": idle, "weights": weights}
    mega = 2**20
    print(f"{'MiB':10}{'peak':>8}{'weights':>9}{'caches':>8}{'idle':>6}{'ratio':>7}   at most {LARGEST_RATIO}")
    for batch in BATCHES:
        peak, caches = common.child_json("memory.py", "--batch", str(batch))["peak"], cache_bytes(batch)
        ratio = peak / (weights + caches + idle)
        met = ratio <= LARGEST_RATIO
        results[f"batch {batch}"] = {"peak": peak, "caches": caches, "ratio": ratio, "met": met}
        print(f"batch {batch:<4}" + f"{peak / mega:8.0f}{weights / mega:9.0f}{caches / mega:8.1f}{idle / mega:6.0f}"
              f"{ratio:7.2f}   {'met' if met else 'NOT MET'}", flush=True)  # fmt: skip
    return results


def run(batch):
    if batch == 0:
        from gpt_neo_sampling._compat import tf

        with tf.Graph().as_default(), tf.Session() as session:
            session.run(tf.constant(1) + 1)
        return
    from gpt_neo_sampling import TextGenerator

    generator = TextGenerator.from_pretrained(common.model_folder())
    generator.generate(common.prompts(batch), max_new_tokens=common.NEW_TOKENS, top_k=40, seed=1, eos_token_id=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    run(args.batch)
    print(json.dumps({"peak": common.peak_resident_bytes()}))


if __name__ == "__main__":
    main()

"""64 new tokens with the bundled model: time and resident set of a fresh process.

    python benchmarks/bundled_model.py

Prints one JSON object. The first call builds its graph; the later ones, of
which the median is given, run it.
"""

import json
import statistics
import time

began = time.time()

import common  # noqa: E402

from gpt_neo_sampling import TextGenerator  # noqa: E402

NEW_TOKENS, REPEATS = 64, 15


def timed(fn):
    start = time.time()
    fn()
    return time.time() - start


def main():
    imported = time.time() - began
    generator = TextGenerator.from_pretrained()
    figures = {"import_seconds": round(imported, 2)}
    for batch in (1, 8):
        prompts = ["The family of Dashwood"] * batch

        def call(prompts=prompts, seed=1):
            generator.generate(prompts, max_new_tokens=NEW_TOKENS, top_k=40, seed=seed, eos_token_id=-1)

        first = timed(call)
        rest = statistics.median(timed(call) for _ in range(REPEATS))
        figures[f"batch_{batch}"] = {
            "first_call_seconds": round(first, 2),
            "call_seconds": round(rest, 3),
            "tokens_a_second": round(batch * NEW_TOKENS / rest),
        }
    figures["peak_resident_megabytes"] = common.peak_resident_bytes() // 2**20
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

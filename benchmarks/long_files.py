"""Files of prompts of the bundled model, beside transformers' batched `generate` of the same weights.

    python benchmarks/long_files.py [--prompts 400] [--jobs even stops lengths] [--sides ours sorted continuous]

In .venv-bench, which has PyTorch and transformers. Three jobs, temperature 0.9 and top-k 40:

    even     prompts of 16 tokens, 64 new ones each: all rows end alike
    stops    prompts of 16 tokens, up to 200 new ones, and a stop string that ends most rows early
    lengths  prompts of 4 to 200 tokens, 48 new ones each

Each side runs in a process of its own, pinned to two cores: ours is `generate_file` into a file, with the building of
its graphs; transformers' is `generate` in batches of 32, padded left, of prompts sorted by length, and
`generate_batch`, its continuous batching. Loading the weights counts, imports do not. Prints new tokens, seconds, and
tokens a second.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import common

WORDS = "Emma Elinor had been a very the of and to her sister was not Mr. Darcy with , ; it in Norland".split()
STOP = "."
JOBS = {  # (the shortest and the longest prompt, the most new tokens, stop strings)
    "even": (16, 16, 64, []),
    "stops": (16, 16, 200, [STOP]),
    "lengths": (4, 200, 48, []),
}
BATCH = 32
SAMPLING = {"temperature": 0.9, "top_k": 40}


def prompts(job, count, tokenizer):
    """Lists of ids."""
    rng, (shortest, longest, _, _) = random.Random(0), JOBS[job]
    made = []
    for _ in range(count):
        text = " ".join(rng.choices(WORDS, k=longest + 8))
        made.append(tokenizer.encode(text, add_special_tokens=False).ids[: rng.randint(shortest, longest)])
    return made


def ours(job, ids, folder):
    from gpt_neo_sampling import TextGenerator, generate_file

    _, _, new_tokens, stops = JOBS[job]
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in ids))
    generator = TextGenerator.from_pretrained()
    began = time.perf_counter()
    generate_file(
        generator, source, output, seed=1, max_new_tokens=new_tokens, eos_token_id=-1, stop_strings=stops, **SAMPLING
    )
    seconds = time.perf_counter() - began
    with open(output) as lines:
        lengths = [len(json.loads(line)["samples"][0]["tokens"]) for line in lines]
    return seconds, lengths


def transformers_model(folder):
    import torch
    import transformers

    torch.set_num_threads(common.CORES)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return model, tokenizer


def sorted_batches(job, ids, folder):
    import torch

    _, _, new_tokens, stops = JOBS[job]
    began = time.perf_counter()
    model, tokenizer = transformers_model(folder / "model")
    options = {"stop_strings": stops, "tokenizer": tokenizer} if stops else {}
    drawn = []
    ids = sorted(ids, key=len, reverse=True)
    for begin in range(0, len(ids), BATCH):
        rows = ids[begin : begin + BATCH]
        width = max(map(len, rows))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            out = model.generate(
                padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True, pad_token_id=0, **SAMPLING,
                **options,
            )[:, width:].tolist()  # fmt: skip
        drawn += out
    seconds = time.perf_counter() - began

    def length(row):
        """Up to the stop string; what follows is padding."""
        return next((n for n in range(1, len(row)) if any(s in tokenizer.decode(row[:n]) for s in stops)), len(row))

    return seconds, list(map(length, drawn))


def continuous(job, ids, folder):
    from transformers import GenerationConfig

    _, _, new_tokens, stops = JOBS[job]
    began = time.perf_counter()
    model, tokenizer = transformers_model(folder / "model")
    config = GenerationConfig(do_sample=True, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None, **SAMPLING)
    out = model.generate_batch(inputs=ids, generation_config=config)
    return time.perf_counter() - began, [len(one.generated_tokens) for one in out.values()]


SIDES = {"ours": ours, "sorted": sorted_batches, "continuous": continuous}


def run(side, job, count):
    common.pin()
    from tokenizers import Tokenizer

    from gpt_neo_sampling.generation.decode_graph import DEMO_FOLDER

    ids = prompts(job, count, Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json")))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if side != "ours":
            convert = [sys.executable, "-m", "gpt_neo_sampling.cli.main", "convert"]
            subprocess.run([*convert, str(DEMO_FOLDER), str(folder / "model")], check=True, stdout=subprocess.DEVNULL)
            import transformers  # noqa: F401
        seconds, lengths = SIDES[side](job, ids, folder)
    return {"seconds": seconds, "lengths": lengths}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(run(args.sides[0], args.jobs[0], args.prompts)))
        return
    for job in args.jobs:
        for side in args.sides:
            found = common.child_json(
                "long_files.py", "--child", "--prompts", str(args.prompts), "--jobs", job, "--sides", side
            )
            tokens, seconds = sum(found["lengths"]), found["seconds"]
            print(
                f"{job:8} {side:11} {tokens:6} new tokens {seconds:7.2f} s {tokens / seconds:6.0f} tokens/s", flush=True
            )


if __name__ == "__main__":
    main()

"""Random GPT-Neo models of transformers, read here: the same log-probabilities, the same greedy tokens.

    python benchmarks/transformers_configs.py [--models 40] [--seed 0]

Each is a GPTNeoConfig of random layers, heads, widths, attention types, window,
context, vocabulary and layer norm's epsilon, output tied or not, with every
activation function of transformers in turn (but for two that have weights of their own), and
weights that make each part count. transformers saves it, in float32, float16 or
bfloat16, in one file or in shards, reads it again in float32, and says how likely
the tokens of some random texts are, and how some prompts go on. Here the same
folder is read by `TextGenerator`. Needs PyTorch and transformers, which a process
of their own imports.

Right is a model whose log-probabilities all lie within 2e-5 of transformers' and
whose greedy tokens are equal. The exit status is 1 where one is not. How far either
is from transformers in float64 stands beside it. (Models are at least 16 wide: layer
norm of a few entries that are nearly equal leaves no 2e-5 in float32, there as here.)
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
import tempfile

import common
import numpy as np

LARGEST_ERROR = 2e-5
DTYPES = ("float32", "float16", "bfloat16")
EPSILONS = (0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.1, 10.0)
LEARNED = {"prelu", "xielu"}  # activation functions that have weights
TEXTS, NEW_TOKENS = 4, 16
LEAST_HIDDEN = 16


# --- What transformers makes of a model, in a process of its own ------------------------


def random_config(rng, activation):
    heads, layers = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    hidden = heads * int(rng.integers(max(2, -(-LEAST_HIDDEN // heads)), 17))
    return {
        "vocab_size": int(rng.integers(50, 2000)),
        "max_position_embeddings": int(rng.integers(24, 65)),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "attention_types": [[[str(t)], 1] for t in rng.choice(["global", "local"], layers)],
        "window_size": int(rng.integers(1, 33)),
        "intermediate_size": None if rng.random() < 0.25 else int(rng.integers(1, 6 * hidden)),
        "activation_function": activation,
        "layer_norm_epsilon": float(rng.choice(EPSILONS)),
        "tie_word_embeddings": bool(rng.random() < 0.5),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def set_weights(model, rng):
    """Weights at which logits are as far apart as a language model's, and no part is without effect."""
    import torch

    config = model.config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = rng.standard_normal(weight.shape)
            if name.endswith(("wte.weight", "lm_head.weight")):
                value *= 2.5 * config.hidden_size**-0.5
            elif name.endswith("wpe.weight") or value.ndim == 1:
                value *= 0.3
            else:
                value *= weight.shape[1] ** -0.5
            if name.endswith("q_proj.weight"):  # the scores are not divided by its root
                value *= (config.hidden_size / config.num_heads) ** -0.5
            if ".ln_" in name and name.endswith("weight"):
                value += 1
            weight.copy_(torch.from_numpy(value))


def logprobs(model, texts):
    """Of each text's tokens but the first, one after the other."""
    import torch

    with torch.inference_mode():
        rows = [model(torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]
    return [row[i, token].item() for row, text in zip(rows, texts) for i, token in enumerate(text[1:])]


def write_model(folder, index, rng, activation):
    """A folder with a model, and with what transformers says of some texts and prompts."""
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    dtype, is_sharded = DTYPES[index % 3], index // 3 % 2 == 1
    config = random_config(rng, activation)
    model = GPTNeoForCausalLM(GPTNeoConfig(**config))
    set_weights(model, rng)
    size = "20KB" if is_sharded else "1GB"
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size)
    model = GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    n_ctx, vocab = config["max_position_embeddings"], config["vocab_size"]
    texts = [rng.integers(0, vocab, n).tolist() for n in (n_ctx, *rng.integers(2, n_ctx + 1, TEXTS - 1))]
    prompts = [text[: 1 + int(rng.integers(0, n_ctx - NEW_TOKENS))] for text in texts]
    greedy = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                                 pad_token_id=0)  # fmt: skip
            greedy.append(out[0, len(prompt) :].tolist())
    said = {"config": config, "dtype": dtype, "shards": len(list(folder.glob("*.safetensors"))), "texts": texts,
            "prompts": prompts, "greedy": greedy, "logprobs": logprobs(model, texts),
            "exact": logprobs(model.double(), texts)}  # fmt: skip
    (folder / "said.json").write_text(json.dumps(said))


def write_models(folder, n, seed):
    from transformers.activations import ACT2FN

    for index, activation in zip(range(n), itertools.cycle(sorted(set(ACT2FN) - LEARNED))):
        write_model(folder / str(index), index, np.random.default_rng([seed, index]), activation)
    print(json.dumps(common.versions(["torch", "transformers"])))


# --- What the library makes of it ---------------------------------------------------------

LINE = "{:>3} {:9}{:>7}{:>7}{:>6}{:>7}{:>7}{:>7}  {:18}{:>8}{:>7}{:>7}{:>7}{:>9}{:>9}{:>9}{:>8}  {}"
HEADER = LINE.format("", "dtype", "shards", "layers", "heads", "hidden", "inner", "local", "activation", "epsilon",
                     "vocab", "window", "tied", "log p", "ours", "theirs", "greedy", "")  # fmt: skip


def compare(folder):
    """The model's line for the table, and whether it is right."""
    from gpt_neo_sampling import TextGenerator

    said = json.loads((folder / "said.json").read_text())
    with contextlib.closing(TextGenerator.from_pretrained(folder)) as generator:
        scores = generator.score(said["texts"])
        samples = generator.generate(said["prompts"], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    ours, theirs, exact = [p for s in scores for p in s.logprobs[1:]], said["logprobs"], said["exact"]
    pairs = {"log p": (ours, theirs), "ours": (ours, exact), "theirs": (theirs, exact)}
    errors = {name: float(np.abs(np.subtract(*pair)).max()) for name, pair in pairs.items()}
    equal = sum(sample.tokens == want for sample, want in zip(samples, said["greedy"]))
    is_right = bool(errors["log p"] <= LARGEST_ERROR and equal == len(samples))
    c = said["config"]
    types = [t for (t,), _ in c["attention_types"]]
    print(LINE.format(folder.name, said["dtype"], said["shards"], c["num_layers"], c["num_heads"], c["hidden_size"],
                      c["intermediate_size"] or "null", f"{types.count('local')}/{len(types)}",
                      c["activation_function"], f"{c['layer_norm_epsilon']:g}", c["vocab_size"], c["window_size"],
                      "yes" if c["tie_word_embeddings"] else "no", *(f"{error:.1e}" for error in errors.values()),
                      f"{equal}/{len(samples)}", "right" if is_right else "WRONG"), flush=True)  # fmt: skip
    told = {key: said[key] for key in ("config", "dtype", "shards")}
    return {**told, "errors": errors, "greedy": equal, "right": is_right}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=common.FOLDER / "results", metavar="DIR")
    parser.add_argument("--write", type=pathlib.Path, help=argparse.SUPPRESS)  # what the process with PyTorch does
    args = parser.parse_args()
    if args.write:
        return write_models(args.write, args.models, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        peer = common.child_json("transformers_configs.py", "--write", folder, "--models", str(args.models),
                                 "--seed", str(args.seed))  # fmt: skip
        print(", ".join(f"{name} {version}" for name, version in peer.items()))
        print(HEADER)
        lines = [compare(pathlib.Path(folder, str(i))) for i in range(args.models)]
    right = sum(line["right"] for line in lines)
    largest = {name: np.max([line["errors"][name] for line in lines]) for name in lines[0]["errors"]}
    print(f"{right} of {len(lines)} right; log-probabilities differ by at most {largest['log p']:.1e}, "
          f"from float64 by {largest['ours']:.1e} and transformers' by {largest['theirs']:.1e}")  # fmt: skip
    common.save(args.out, "transformers-configs", {"peer": peer, "seed": args.seed, "models": lines})
    return int(right != len(lines))


if __name__ == "__main__":
    sys.exit(main())

"""Trains two small GPT-Neos on one text: one with softmax, one with entmax and its loss.

    pip install -e '.[examples]'
    python examples/train_entmax.py austen.txt --output entmax.png --save models

Both start from the same weights and see the same batches at the same learning
rates; they differ in the loss, the cross entropy or the Fenchel-Young loss of
entmax, and in what makes probabilities of their logits. The first 95% of the
text is trained on, the rest is held out. Writes a picture and, beside it, its
figures as JSON; prints a table. docs/entmax.md says what they mean.
"""

import argparse
import json
import pathlib
import shutil
import time

import matplotlib
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from training import Trainer, random_windows, split_text

from gpt_neo_sampling._atomic_files import write_whole
from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint
from gpt_neo_sampling.generation.generator import DEMO_FOLDER
from gpt_neo_sampling.sampling.entmax import DEFAULT_ALPHA

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

CONFIG = {
    "n_ctx": 128,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 4,
    "attention_types": [[["global", "local"], 2]],
    "local_attention_radius": 32,
    "activation_function": "gelu",
    "padding_id": 0,
    "eos_id": 0,
}
MODELS = {"softmax": {"entmax_loss": False}, "entmax": {"entmax_loss": True}}
EVALUATIONS = 20  # along a run, each on the first so many held-out tokens; the table is of all of them
EVALUATION_TOKENS = 4096
SMOOTHED = 50  # steps, of the training loss in the picture and in the table

# What is measured on held-out text, means over its tokens: (name, what the table calls it)
MEASURES = (
    ("loss", "own loss"),
    ("accuracy", "next token is the likeliest, %"),
    ("sparsemax_score", "sparsemax score, 0 to 1"),
    ("inside", "next token in the support, %"),
    ("support", "size of the support, tokens"),
    ("effective_size", "effective size exp(H), tokens"),
)


def measure(p, targets):
    """{name of MEASURES, the loss apart: [n]} of probabilities [n, vocab] and the tokens [n] that came."""
    p = p.astype(np.float64)
    of_target = p[np.arange(len(p)), targets]
    return {
        "accuracy": 100.0 * (p.argmax(-1) == targets),
        # Martins et al. 2020, "Sparse text generation", arXiv 2004.02644: 1 − ½‖p − t‖²
        "sparsemax_score": of_target + (1 - (p**2).sum(-1)) / 2,
        "inside": 100.0 * (of_target > 0),
        "support": np.count_nonzero(p, axis=-1),
        "effective_size": np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum(-1)),
    }


def held_out(trainer, ids):
    """{name of MEASURES: mean}, and the tokens that these are means of."""
    found = []
    for targets, losses, p in trainer.evaluate(ids, trainer.eval_losses, trainer.probabilities):
        found.append({"loss": losses, **measure(p, targets)})
    means = {name: float(np.concatenate([f[name] for f in found]).mean()) for name, _ in MEASURES}
    return {**means, "tokens": sum(len(f["loss"]) for f in found)}


def train(name, trainer, train_ids, held_ids, n_ctx, args):
    """The figures of one run: what goes into the JSON under the model's name."""
    rng = np.random.default_rng(args.seed)
    marks = {round(m) for m in np.linspace(0, args.steps, EVALUATIONS)}
    losses, curve, seconds = [], [], 0.0
    for step in tqdm(range(args.steps + 1), desc=name, unit="step"):
        if step in marks:
            curve.append({"step": step, **held_out(trainer, held_ids[: EVALUATION_TOKENS + 1])})
        if step < args.steps:
            tokens = random_windows(rng, train_ids, args.batch, n_ctx)
            began = time.perf_counter()
            losses.append(trainer.train(tokens, (step + 1) / args.steps)[0])
            seconds += time.perf_counter() - began
    return {
        "train_loss": losses,
        "held_out": curve,
        "all_held_out": held_out(trainer, held_ids),
        "milliseconds_a_step": 1000 * seconds / args.steps,
    }


def plot(figures, path):
    figure, ((loss, accuracy), (size, inside)) = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True)
    for name, colour in (("softmax", "tab:blue"), ("entmax", "tab:orange")):
        found = figures[name]
        steps = [point["step"] for point in found["held_out"]]
        curve = {key: [point[key] for point in found["held_out"]] for key, _ in MEASURES}
        kind = "cross entropy, nats" if name == "softmax" else "Fenchel-Young loss"
        mean = smoothed(found["train_loss"])
        loss.plot(np.arange(len(found["train_loss"]) - len(mean), len(found["train_loss"])) + 1, mean, color=colour,
                  label=f"{name}: {kind}")  # fmt: skip
        loss.plot(steps, curve["loss"], "o", color=colour, markersize=3)
        accuracy.plot(steps, curve["accuracy"], "o-", color=colour, markersize=3, label=name)
        size.plot(steps, curve["support"], "o-", color=colour, markersize=3, label=f"{name}: support")
        size.plot(steps, curve["effective_size"], ":", color=colour, label=f"{name}: effective size exp(H)")
        if name == "entmax":
            inside.plot(steps, curve["inside"], "o-", color=colour, markersize=3)
    loss.set(title=f"Loss: line, training (mean of {SMOOTHED} steps); dots, held out", ylim=(0, None),
             ylabel="loss a token, each its own")  # fmt: skip
    accuracy.set(title="Held out: the next token is the likeliest", ylabel="% of tokens", ylim=(0, None))
    size.set(title="Held out: size of the distributions", ylabel="tokens, mean", yscale="log", xlabel="steps")
    size.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    size.yaxis.set_major_formatter("{x:,.0f}")
    size.yaxis.set_minor_formatter("")
    inside.set(title="Held out: the next token is in entmax's support", ylabel="% of tokens", xlabel="steps")
    for plane in (loss, accuracy, size):
        plane.legend(fontsize="small")
    for plane in (loss, accuracy, size, inside):
        plane.title.set_fontsize("medium")
        plane.grid(True, alpha=0.2)
    figure.tight_layout()
    write_whole(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    pyplot.close(figure)


def smoothed(losses):
    """Means of so many in a row as SMOOTHED says, or of all."""
    n = min(SMOOTHED, len(losses))
    return np.convolve(losses, np.full(n, 1 / n), "valid")


def table(figures):
    line = "{:32} {:>9} {:>9}".format
    rows = [(f"training loss, last {SMOOTHED} steps", lambda f: smoothed(f["train_loss"])[-1])]
    rows += [(label, lambda f, name=name: f["all_held_out"][name]) for name, label in MEASURES]
    rows.append(("milliseconds a training step", lambda f: f["milliseconds_a_step"]))
    header = line(f"{figures['softmax']['all_held_out']['tokens']:,} held-out tokens", *MODELS)
    return "\n".join([header] + [line(label, *(f"{of(figures[m]):.4g}" for m in MODELS)) for label, of in rows])


def at_least(least):
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: at least {least} is needed")
        return int(text)

    return whole_number


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path, help="a text file in UTF-8; that of docs/entmax.md is Jane Austen's "
                        "novels as the R package janeaustenr holds them, which Project Gutenberg has too")  # fmt: skip
    parser.add_argument("--steps", type=at_least(1), default=800)
    parser.add_argument("--batch", type=at_least(1), default=8, help=f"windows of {CONFIG['n_ctx']} tokens a step")
    parser.add_argument("--seed", type=at_least(0), default=1, help="of the initial weights and of the batches")
    parser.add_argument("--output", type=pathlib.Path, default="train_entmax.png", help="picture; figures go beside it")
    parser.add_argument("--save", type=pathlib.Path, metavar="FOLDER",
                        help="writes softmax/ and entmax/ there, for gpt-neo-sampling generate --model")  # fmt: skip
    args = parser.parse_args(argv)
    if not args.text.is_file():
        parser.error(f"text {args.text}: no such file")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: a .png in a folder that exists is needed")
    if args.save and args.save.exists() and not args.save.is_dir():
        parser.error(f"--save {args.save}: a file; a folder is needed, there already or not")
    return parser, args


def main(argv=None):
    parser, args = arguments(argv)
    tokenizer_path = pathlib.Path(DEMO_FOLDER) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    config = {**CONFIG, "n_vocab": tokenizer.get_vocab_size()}
    train_ids, held_ids = (np.array(tokenizer.encode(part).ids, np.int32) for part in split_text(args.text))
    if len(train_ids) < config["n_ctx"] + 2 or len(held_ids) < 2:
        parser.error(f"text {args.text}: {len(train_ids)} + {len(held_ids)} tokens; at least "
                     f"{config['n_ctx'] + 2} + 2 are needed")  # fmt: skip

    figures = {"settings": {**config, "alpha": DEFAULT_ALPHA, "steps": args.steps, "batch": args.batch,
                            "seed": args.seed}}  # fmt: skip
    initial = None
    for name, options in MODELS.items():
        params = {**config, **options}
        trainer = Trainer(params, args.batch, args.seed)
        initial = initial or trainer.weights()
        trainer.set_weights(initial)
        figures[name] = train(name, trainer, train_ids, held_ids, config["n_ctx"], args)
        if args.save:
            write_mesh_tf_checkpoint(args.save / name, params, trainer.weights(), step=args.steps)
            shutil.copyfile(tokenizer_path, args.save / name / "tokenizer.json")
        trainer.session.close()
    figures_path = args.output.with_suffix(".json")
    write_whole(figures_path, lambda partial: partial.write_text(json.dumps(figures) + "\n"))
    plot(figures, args.output)
    print(table(figures))


if __name__ == "__main__":
    main()

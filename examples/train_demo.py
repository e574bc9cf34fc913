"""Trains the model that the package carries, on the text of Austen's novels.

    python examples/austen.py austen.txt
    python examples/train_demo.py --text austen.txt --work-dir /tmp/demo --minutes 44
    python examples/train_demo.py --text austen.txt --work-dir /tmp/demo --export gpt_neo_sampling/demo

The first line fetches the text. The second makes the tokenizer, trains and saves as it goes (run again, it
goes on where it stopped); the third rounds the weights to bfloat16, measures
the held-out loss of what it has rounded, and writes the checkpoint and its
figures. The last 5% of the text is held out: neither the tokenizer nor the
training sees it.
"""

import argparse
import json
import math
import pathlib
import sys
import time

import numpy as np
from training import Trainer, random_windows, split_text

from gpt_neo_sampling._compat import tf

CONFIG = {
    "n_vocab": 2048,
    "n_ctx": 256,
    "n_embd": 192,
    "n_head": 8,
    "n_layer": 5,
    "attention_types": [[["global", "local"], 2], [["global"], 1]],
    "local_attention_radius": 64,
    "embed_dropout": 0.0,
    "res_dropout": 0.0,
    "attn_dropout": 0.0,
    "activation_function": "gelu",
    "padding_id": 0,
    "eos_id": 0,
}
BATCH = 8


def make_tokenizer(train_text, path):
    """A byte-level byte-pair tokenizer; id 0 is <|endoftext|>.

    As GPT-2's, but a word carries the space or the line break before it: lines
    are short here, and a bare word at the start of one would look like the
    middle of another.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Regex(r"[ \n]?\p{L}+|[ \n]?\p{N}+|[ \n]?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["n_vocab"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([train_text], trainer)
    tokenizer.save(str(path))
    return tokenizer


def held_out_loss(trainer, ids):
    """(mean loss in nats a token, how many tokens)"""
    losses = np.concatenate([losses for _, losses in trainer.evaluate(ids, trainer.eval_losses)])
    return float(losses.mean(dtype=np.float64)), len(losses)


def train(args, trainer, saver, train_ids, held_ids, chars_per_token):
    rng = np.random.default_rng(int(trainer.session.run(trainer.step)))
    end = time.time() + args.minutes * 60
    log = open(pathlib.Path(args.work_dir) / "log.jsonl", "a")
    path = str(pathlib.Path(args.work_dir) / "state")
    losses, began = [], time.time()
    step = -1
    while True:
        progress = max((step + 1) / args.steps, (time.time() - began) / (args.minutes * 60))
        loss, step = trainer.train(random_windows(rng, train_ids, BATCH, CONFIG["n_ctx"]), progress)
        losses.append(loss)
        done = step + 1 >= args.steps or time.time() > end
        if step % 250 == 249 or done:
            record = {"step": step + 1, "train_loss": float(np.mean(losses)),
                      "seconds": round(time.time() - began)}  # fmt: skip
            if step % 500 == 499 or done:
                held, _ = held_out_loss(trainer, held_ids)
                record["held_out_bits_per_char"] = held / math.log(2) / chars_per_token
                with trainer.graph.as_default():
                    saver.save(trainer.session, path)
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), file=sys.stderr, flush=True)
            losses = []
        if done:
            return


def export(args, trainer, held_ids, chars_per_token, held_chars):
    """Rounds to bfloat16, measures what is rounded, writes checkpoint and figures."""
    from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint

    bfloat16 = tf.bfloat16.as_numpy_dtype
    weights = {name: w.astype(bfloat16).astype(np.float32) for name, w in trainer.weights().items()}
    trainer.set_weights(weights)
    loss, tokens = held_out_loss(trainer, held_ids)
    folder = pathlib.Path(args.export)
    step = int(trainer.session.run(trainer.step))
    write_mesh_tf_checkpoint(folder, CONFIG, weights, dtype="bfloat16", step=step)
    (folder / "tokenizer.json").write_bytes((pathlib.Path(args.work_dir) / "tokenizer.json").read_bytes())
    figures = {
        "parameters": int(sum(w.size for w in weights.values())),
        "steps": step,
        "tokens_a_step": BATCH * CONFIG["n_ctx"],
        "held_out_tokens": tokens,
        "held_out_characters": held_chars,
        "held_out_nats_per_token": loss,
        "held_out_bits_per_char": loss / math.log(2) / chars_per_token,
    }
    print(json.dumps(figures, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=8000, help="the run ends with these or with the minutes")
    parser.add_argument("--export", help="folder to write the bfloat16 checkpoint to, in place of training")
    args = parser.parse_args()
    from tokenizers import Tokenizer

    work = pathlib.Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    train_text, held_text = split_text(args.text)
    tokenizer_path = work / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_path)) if tokenizer_path.exists() else (
        make_tokenizer(train_text, tokenizer_path))  # fmt: skip
    train_ids = np.array(tokenizer.encode(train_text).ids, np.int32)
    held_ids = np.array(tokenizer.encode(held_text).ids, np.int32)
    chars_per_token = len(held_text) / (len(held_ids) - 1)  # the first token is not predicted
    trainer = Trainer(CONFIG, BATCH)
    with trainer.graph.as_default():
        saver = tf.train.Saver(max_to_keep=1)
        if tf.train.latest_checkpoint(str(work)):
            saver.restore(trainer.session, tf.train.latest_checkpoint(str(work)))
    if args.export:
        export(args, trainer, held_ids, chars_per_token, len(held_text))
    else:
        train(args, trainer, saver, train_ids, held_ids, chars_per_token)


if __name__ == "__main__":
    main()

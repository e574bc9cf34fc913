"""Trains the model that the package carries, on the text of Austen's novels.

    python examples/train_demo.py --text austen.txt --work-dir /tmp/demo --minutes 44
    python examples/train_demo.py --text austen.txt --work-dir /tmp/demo --export gpt_neo_sampling/demo

The first line makes the tokenizer, trains and saves as it goes (run again, it
goes on where it stopped); the second rounds the weights to bfloat16, measures
the held-out loss of what it has rounded, and writes the checkpoint and its
figures. The last 5% of the text is held out: neither the tokenizer nor the
training sees it. Model, loss and optimizer are built of mesh-tensorflow ops,
the model and the loss being this package's.
"""

import argparse
import collections
import json
import math
import pathlib
import sys
import time

import numpy as np

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, quiet_logging, quiet_stderr, tf
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.utils import biasmask_attn_weights

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
HELD_OUT = 0.05
BATCH = 8
PEAK_RATE = 2e-3
WARM_UP = 200  # steps


def split_text(path):
    text = pathlib.Path(path).read_text(encoding="utf-8")
    border = int(len(text) * (1 - HELD_OUT))
    return text[:border], text[border:]


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


class Trainer:
    """The graph of one training step and of one evaluation, and their session."""

    def __init__(self):
        self.graph = tf.Graph()
        with self.graph.as_default(), quiet_logging():
            self.tokens = tf.placeholder(tf.int32, [BATCH, CONFIG["n_ctx"] + 1])
            self.step = tf.train.get_or_create_global_step()
            self.progress = tf.placeholder_with_default(0.0, [])  # from 0 to 1: the rate falls along a cosine
            warm = tf.minimum(1.0, (tf.cast(self.step, tf.float32) + 1.0) / WARM_UP)
            rate = PEAK_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + tf.cos(math.pi * tf.minimum(self.progress, 1.0))))
            self.loss, self.train_op = self._training_step(rate)
            self.eval_losses = self._evaluation()
            masters = [v for v in tf.global_variables() if v.name.startswith("gpt2/")]
            self.weights = {v.op.name[len("gpt2/") :]: v for v in masters if "/adam_" not in v.name}
            self.saver = tf.train.Saver(max_to_keep=1)
            with quiet_stderr():
                self.session = tf.Session()
            self.session.run(tf.global_variables_initializer())

    def _losses(self, mode):
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        batch = mtf.Dimension("batch", BATCH)
        sequence = mtf.Dimension("sequence", CONFIG["n_ctx"])
        variable_dtype = mtf.VariableDType(tf.float32)
        memory = mtf.Dimension("memory_length", CONFIG["n_ctx"])
        other_features = {
            "embd_dim": mtf.Dimension("embd", CONFIG["n_embd"]),
            "vocab_dim": mtf.Dimension("vocab", CONFIG["n_vocab"]),
            "embed_sequence_dim": mtf.Dimension("embed_sequence", CONFIG["n_ctx"]),
            "memory_length_dim": memory,
            "attn_bias": biasmask_attn_weights(mesh, sequence, memory, variable_dtype),
        }
        features = {
            "inputs": mtf.import_tf_tensor(mesh, self.tokens[:, :-1], [batch, sequence]),
            "labels": mtf.import_tf_tensor(mesh, self.tokens[:, 1:], [batch, sequence]),
        }
        params = collections.defaultdict(lambda: None, CONFIG, mode=mode, z_loss=0.0)
        with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
            _, loss, losses = gpt2.model(features, other_features, params, mesh, variable_dtype)
        return mesh, loss, losses

    def _training_step(self, rate):
        mesh, loss, _ = self._losses("train")
        graph = mesh.graph
        gradients = mtf.gradients([loss], [v.outputs[0] for v in graph.trainable_variables])
        norm = mtf.sqrt(mtf.add_n([mtf.reduce_sum(mtf.square(g)) for g in gradients]))
        clip = mtf.minimum(1.0, 1.0 / (norm + 1e-6))
        optimizer = mtf.optimize.AdamWeightDecayOptimizer(
            mtf.import_tf_tensor(mesh, rate, []), weight_decay_rate=0.1, beta_2=0.98,
            exclude_from_weight_decay=["/g$", "/b$", "bias$", "o_b$", "wpe$"])  # fmt: skip
        updates = optimizer.apply_grads([g * clip for g in gradients], graph.trainable_variables)
        lowering = self._lowering(mesh)
        with tf.control_dependencies([lowering.lowered_operation(op) for op in updates]):
            train_op = tf.assign_add(self.step, 1)
        return lowering.export_to_tf_tensor(loss), train_op

    def _evaluation(self):
        mesh, _, losses = self._losses("eval")
        return self._lowering(mesh).export_to_tf_tensor(losses)

    @staticmethod
    def _lowering(mesh):
        return mtf.Lowering(mesh.graph, {mesh: PlacementMeshImpl([], [], [""])})

    def held_out_loss(self, ids):
        """Mean loss in nats a token over `ids`, each predicted once.

        Windows overlap by half, so that all but the first see at least half a
        context before them.
        """
        length, stride = CONFIG["n_ctx"], CONFIG["n_ctx"] // 2
        windows, masks = [], []
        start = 0
        while start + 1 < len(ids):
            window = ids[start : start + length + 1]
            mask = np.zeros(length)
            mask[(0 if start == 0 else length - stride) : len(window) - 1] = 1
            windows.append(np.pad(window, (0, length + 1 - len(window))))
            masks.append(mask)
            start += stride
        masks = np.array(masks)
        losses = []
        for i in range(0, len(windows), BATCH):
            part = windows[i : i + BATCH]
            part = part + [part[-1]] * (BATCH - len(part))
            losses.append(self.session.run(self.eval_losses, {self.tokens: np.array(part)}))
        losses = np.concatenate(losses)[: len(windows)]
        return float((losses * masks).sum() / masks.sum()), int(masks.sum())


def train(args, trainer, train_ids, held_ids, chars_per_token):
    rng = np.random.default_rng(int(trainer.session.run(trainer.step)))
    end = time.time() + args.minutes * 60
    log = open(pathlib.Path(args.work_dir) / "log.jsonl", "a")
    path = str(pathlib.Path(args.work_dir) / "state")
    losses, began = [], time.time()
    step = -1
    while True:
        progress = max((step + 1) / args.steps, (time.time() - began) / (args.minutes * 60))
        starts = rng.integers(0, len(train_ids) - CONFIG["n_ctx"] - 1, BATCH)
        batch = np.stack([train_ids[s : s + CONFIG["n_ctx"] + 1] for s in starts])
        feed = {trainer.tokens: batch, trainer.progress: progress}
        loss, step, _ = trainer.session.run([trainer.loss, trainer.step, trainer.train_op], feed)
        losses.append(loss)
        done = step + 1 >= args.steps or time.time() > end
        if step % 250 == 249 or done:
            record = {"step": int(step + 1), "train_loss": float(np.mean(losses)),
                      "seconds": round(time.time() - began)}  # fmt: skip
            if step % 500 == 499 or done:
                held, _ = trainer.held_out_loss(held_ids)
                record["held_out_bits_per_char"] = held / math.log(2) / chars_per_token
                with trainer.graph.as_default():
                    trainer.saver.save(trainer.session, path)
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), file=sys.stderr, flush=True)
            losses = []
        if done:
            return


def export(args, trainer, held_ids, chars_per_token, held_chars):
    """Rounds to bfloat16, measures what is rounded, writes checkpoint and figures."""
    from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint

    names = sorted(trainer.weights)
    for name in names:
        v = trainer.weights[name]
        value = trainer.session.run(v).astype(tf.bfloat16.as_numpy_dtype).astype(np.float32)
        trainer.session.run(v.initializer, {v.initializer.inputs[1]: value})
    weights = {name: trainer.session.run(trainer.weights[name]) for name in names}
    loss, tokens = trainer.held_out_loss(held_ids)
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
    trainer = Trainer()
    if tf.train.latest_checkpoint(str(work)):
        with trainer.graph.as_default():
            trainer.saver.restore(trainer.session, tf.train.latest_checkpoint(str(work)))
    if args.export:
        export(args, trainer, held_ids, chars_per_token, len(held_text))
    else:
        train(args, trainer, train_ids, held_ids, chars_per_token)


if __name__ == "__main__":
    main()

"""What the training examples share: a text cut in two, and a GPT-Neo's training step and evaluation as graphs.

Model, losses and optimizer are built of mesh-tensorflow ops, the model and the
entmax loss being this package's.
"""

import collections
import math
import pathlib

import numpy as np

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, quiet_logging, quiet_stderr, tf
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.utils import biasmask_attn_weights, entmax, softmax

HELD_OUT = 0.05
PEAK_RATE = 2e-3
WARM_UP = 200  # steps


def split_text(path):
    """(what is trained on, what is held out), strings."""
    text = pathlib.Path(path).read_text(encoding="utf-8")
    border = int(len(text) * (1 - HELD_OUT))
    return text[:border], text[border:]


def random_windows(rng, ids, batch, length):
    """int32 [batch, length + 1]: runs of `ids` from anywhere; each token but a run's first is a target."""
    starts = rng.integers(0, len(ids) - length - 1, batch)
    return np.stack([ids[s : s + length + 1] for s in starts])


def windows(ids, length, batch):
    """Yields `ids` as ([batch, length + 1] of them, bool [batch, length]: which targets count).

    Every target counts once. Windows overlap by half, so that those that count in
    all but the first see at least half a context before them.
    """
    stride = length // 2
    found = []
    for start in range(0, len(ids) - 1, stride):
        window = ids[start : start + length + 1]
        counts = np.zeros(length, bool)
        counts[(0 if start == 0 else length - stride) : len(window) - 1] = True
        found.append((np.pad(window, (0, length + 1 - len(window))), counts))
    found += [(found[-1][0], np.zeros(length, bool))] * (-len(found) % batch)
    for i in range(0, len(found), batch):
        yield tuple(map(np.stack, zip(*found[i : i + batch])))


class Trainer:
    """The graph of one training step and of one evaluation, and their session.

    Args:
      params: GPT-Neo's config, a dict; with `entmax_loss`, the loss is entmax's and
        so are the probabilities.
      batch: int, windows of n_ctx tokens a step.
      seed: int, of the initial weights; None for fresh ones.

    Attributes:
      eval_losses, probabilities: what `evaluate` may fetch, [batch, n_ctx] and
        [batch, n_ctx, vocab].
    """

    def __init__(self, params, batch, seed=None):
        self._params, self._batch = params, batch
        self.graph = tf.Graph()
        with self.graph.as_default(), quiet_logging():
            tf.set_random_seed(seed)
            self._tokens = tf.placeholder(tf.int32, [batch, params["n_ctx"] + 1])
            self.step = tf.train.get_or_create_global_step()
            self._progress = tf.placeholder(tf.float32, [])  # from 0 to 1: the rate falls along a cosine
            warm = tf.minimum(1.0, (tf.cast(self.step, tf.float32) + 1.0) / WARM_UP)
            rate = PEAK_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + tf.cos(math.pi * tf.minimum(self._progress, 1.0))))
            self._loss, self._train_op = self._training_step(rate)
            self.eval_losses, self.probabilities = self._evaluation()
            masters = [v for v in tf.global_variables() if v.name.startswith("gpt2/")]
            self._weights = {v.op.name[len("gpt2/") :]: v for v in masters if "/adam_" not in v.name}
            with quiet_stderr():
                self.session = tf.Session()
            self.session.run(tf.global_variables_initializer())

    def train(self, tokens, progress):
        """One step on int32 [batch, n_ctx + 1], at `progress` of the run, 0 to 1: (loss, number of the step)."""
        feed = {self._tokens: tokens, self._progress: progress}
        loss, step, _ = self.session.run([self._loss, self.step, self._train_op], feed)
        return float(loss), int(step)

    def evaluate(self, ids, *fetches):
        """Yields, a batch at a time, targets [n] and each of `fetches` at them; every token but the first, once."""
        for tokens, counts in windows(ids, self._params["n_ctx"], self._batch):
            values = self.session.run(fetches, {self._tokens: tokens})
            yield tokens[:, 1:][counts], *(value[counts] for value in values)

    def weights(self):
        """{GPT-Neo's name less "gpt2/": array}"""
        return self.session.run(self._weights)

    def set_weights(self, values):
        """The weights become `values`, as `weights` gives them; the optimizer keeps its own."""
        with self.graph.as_default():  # where nothing is eager, variables tell their initial value
            feed = {v.initial_value: values[name] for name, v in self._weights.items()}
        self.session.run([v.initializer for v in self._weights.values()], feed)

    def _model(self, mode):
        """(logits, loss, losses [batch, sequence]), of a mesh of their own."""
        params = collections.defaultdict(lambda: None, self._params, mode=mode, z_loss=0.0)
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        batch = mtf.Dimension("batch", self._batch)
        sequence = mtf.Dimension("sequence", params["n_ctx"])
        variable_dtype = mtf.VariableDType(tf.float32)
        memory = mtf.Dimension("memory_length", params["n_ctx"])
        other_features = {
            "embd_dim": mtf.Dimension("embd", params["n_embd"]),
            "vocab_dim": mtf.Dimension("vocab", params["n_vocab"]),
            "embed_sequence_dim": mtf.Dimension("embed_sequence", params["n_ctx"]),
            "memory_length_dim": memory,
            "attn_bias": biasmask_attn_weights(mesh, sequence, memory, variable_dtype),
        }
        features = {
            "inputs": mtf.import_tf_tensor(mesh, self._tokens[:, :-1], [batch, sequence]),
            "labels": mtf.import_tf_tensor(mesh, self._tokens[:, 1:], [batch, sequence]),
        }
        with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
            return gpt2.model(features, other_features, params, mesh, variable_dtype)

    def _training_step(self, rate):
        _, loss, _ = self._model("train")
        mesh, graph = loss.mesh, loss.graph
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
        logits, _, losses = self._model("eval")
        probabilities = (entmax if self._params.get("entmax_loss") else softmax)(logits)
        lowering = self._lowering(logits.mesh)
        return lowering.export_to_tf_tensor(losses), lowering.export_to_tf_tensor(probabilities)

    @staticmethod
    def _lowering(mesh):
        return mtf.Lowering(mesh.graph, {mesh: PlacementMeshImpl([], [], [""])})

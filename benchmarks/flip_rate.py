"""How often a draw flips when the logits move by rounding, and when only the backend changes.

    python benchmarks/flip_rate.py [--draws 4000000] [--vocab 50257] [--noise 1e-6] [--json]

Logits are Gaussian (σ = 2). "Moved" logits differ by Gaussian noise, about what
another order of summation in the model does to them. The library's draw is held
against one float32 cumulative sum with one 24-bit uniform, the five-line way.
With unmoved logits the library must not flip at all.
"""

import argparse
import json
import sys

import numpy as np

from gpt_neo_sampling import exact
from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, quiet_logging, tensorflow, tf
from gpt_neo_sampling.draws import grouped_draw, padded_size, score_draw

ROWS, SAMPLES = 8, 4096


def bounds(flips, draws):
    """95% bounds of a rate (Wilson), the upper by the rule of three where none was seen."""
    if flips == 0:
        return 0.0, 3 / draws
    p, z = flips / draws, 1.96
    middle, half = p + z * z / (2 * draws), z * np.sqrt(p * (1 - p) / draws + z * z / (4 * draws**2))
    return (middle - half) / (1 + z * z / draws), (middle + half) / (1 + z * z / draws)


class Library:
    """Many draws from each row of scores: what score_draw's result is defined as, from exact weights."""

    def __init__(self, vocab):
        with tf.Graph().as_default(), quiet_logging():
            mesh = mtf.Mesh(mtf.Graph(), "mesh")
            b, v, s = (mtf.Dimension(*d) for d in (("batch", ROWS), ("vocab", vocab), ("samples", SAMPLES)))
            self._inputs = [tf.placeholder(tf.float32, [ROWS, vocab])]
            self._inputs += [tf.placeholder(tf.float32, [ROWS, SAMPLES]) for _ in range(2)]
            weights = mtf.import_tf_tensor(mesh, exact.softmax_weights(self._inputs[0]), mtf.Shape([b, v]))
            uniforms = [mtf.import_tf_tensor(mesh, u, mtf.Shape([b, s])) for u in self._inputs[1:]]
            out = grouped_draw(weights, *uniforms, v, s)
            impl = PlacementMeshImpl([], [], [""])
            self._out = mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False).export_to_tf_tensor(out)
            self._session = tf.Session()

    def __call__(self, z, u1, u2):
        return self._session.run(self._out, dict(zip(self._inputs, (z, u1, u2))))


def one_level(z, u, blocked=False):
    """One cumulative sum, sequential or in 64 blocks of which the sums are added up first."""
    w = np.exp(z)
    if blocked:
        blocks = np.pad(w, ((0, 0), (0, -w.shape[1] % 64))).reshape(len(w), 64, -1)
        inner = blocks.cumsum(-1, dtype=np.float32)
        before = np.pad(inner[..., -1].cumsum(-1, dtype=np.float32), ((0, 0), (1, 0)))[:, :-1]
        c = (inner + before[..., np.newaxis]).reshape(len(w), -1)[:, : w.shape[1]]
    else:
        c = w.cumsum(-1, dtype=np.float32)
    return np.stack([np.searchsorted(c[i], u[i] * c[i, -1], side="right") for i in range(len(z))])


class Places:
    """score_draw, one draw a row, on other backends and layouts: {name: function}."""

    def __init__(self, vocab, rows):
        self.rows, self.vocab = rows, vocab
        self.runs = {
            "plain TensorFlow": self._graph("", "", [""]),
            "XLA": self._xla(),
            "vocab split over 4 CPUs": self._graph("x:4", "vocab:x", [f"cpu:{i}" for i in range(4)]),
        }

    def _build(self, mesh, z, u1, u2, padded):
        b, v = mtf.Dimension("batch", self.rows), mtf.Dimension("vocab", padded)
        z = tf.pad(z, [[0, 0], [0, padded - self.vocab]], constant_values=-np.inf)
        u1, u2 = (mtf.import_tf_tensor(mesh, u, mtf.Shape([b])) for u in (u1, u2))
        return score_draw(mtf.import_tf_tensor(mesh, z, mtf.Shape([b, v])), u1, u2, v, size=self.vocab)

    def _lower(self, impl, *tensors):
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        out = self._build(mesh, *tensors, padded_size(self.vocab, impl.size))
        return mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False).export_to_tf_tensor(out)

    def _graph(self, shape, layout, devices):
        with tf.Graph().as_default(), quiet_logging():
            inputs = [tf.placeholder(tf.float32, [self.rows, self.vocab])]
            inputs += [tf.placeholder(tf.float32, [self.rows]) for _ in range(2)]
            out = self._lower(PlacementMeshImpl(shape, layout, devices), *inputs)
            session = tf.Session(config=tf.ConfigProto(device_count={"CPU": len(devices)}))
        return lambda *arrays: session.run(out, dict(zip(inputs, arrays)))

    def _xla(self):
        impl = PlacementMeshImpl([], [], [""])
        function = tensorflow.function(
            lambda *tensors: self._lower(impl, *tensors), jit_compile=True, autograph=False, reduce_retracing=False
        )
        return lambda *arrays: function(*map(tf.constant, arrays)).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4_000_000)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--noise", type=float, default=1e-6, help="standard deviation of what moves the logits")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    names = ["library, moved logits", "one level, moved logits", "one level, same logits, other order of summation"]
    flips, count = dict.fromkeys(names, 0), 0
    library = Library(args.vocab)
    while count < args.draws:
        logits = (2.0 * rng.standard_normal((ROWS, args.vocab))).astype(np.float32)
        moved = (logits + args.noise * rng.standard_normal(logits.shape)).astype(np.float32)
        z, z_moved = (x - x.max(-1, keepdims=True) for x in (logits, moved))
        u1, u2 = rng.integers(0, 2**24, (2, ROWS, SAMPLES)).astype(np.float32) * np.float32(2**-24)
        flips[names[0]] += int((library(z, u1, u2) != library(z_moved, u1, u2)).sum())
        plain = one_level(z, u1)
        flips[names[1]] += int((plain != one_level(z_moved, u1)).sum())
        flips[names[2]] += int((plain != one_level(z, u1, blocked=True)).sum())
        count += ROWS * SAMPLES
    results = [(name, flips[name], count) for name in names]

    places, passes = Places(args.vocab, 64), max(1, args.draws // 6400)
    tokens = {name: [] for name in places.runs}
    for _ in range(passes):
        logits = (2.0 * rng.standard_normal((64, args.vocab))).astype(np.float32)
        z = logits - logits.max(-1, keepdims=True)
        u1, u2 = rng.integers(0, 2**24, (2, 64)).astype(np.float32) * np.float32(2**-24)
        with quiet_logging():
            for name, run in places.runs.items():
                tokens[name].append(run(z, u1, u2))
    right = np.stack(tokens.pop("plain TensorFlow"))
    for name, found in tokens.items():
        results.append((f"library, same logits, {name}", int((np.stack(found) != right).sum()), right.size))

    if args.json:
        print(json.dumps([dict(what=w, flips=f, draws=d, bounds=bounds(f, d)) for w, f, d in results], indent=1))
    else:
        for what, found, draws in results:
            low, high = bounds(found, draws)
            print(f"{what:52} {found:8,} of {draws:10,}  {found / draws:.1e} a draw ({low:.1e} to {high:.1e})")
    if any(found for what, found, _ in results if what.startswith("library, same")):
        sys.exit("flip_rate: equal logits gave different draws")


if __name__ == "__main__":
    main()

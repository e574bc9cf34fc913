"""How often a draw becomes another one: where rounding moves the logits, and where it does not.

    python benchmarks/flip_rate.py [--draws 4000000] [--vocab 50257] [--json]

The same uniforms draw twice, and a flip is a draw whose two tokens differ.

Moved logits: Gaussian logits of spread 2 to 3, and the same with normal noise, as
another order of summation in the model leaves them: of 5e-7, and of 5e-7 plus
5e-7 of each logit. Drawn in two levels, as the library does it, and, to compare,
in one: a float32 uniform of 24 bits against one float32 cumulative sum. Or the
logits stay and that one sum is taken in another order.

Equal logits: drawn by plain TensorFlow, and by XLA, with the vocabulary split
over 4 CPU devices, or by the program of a TPU's core, run as 4 XLA replicas
(which needs jaxlib).

--draws is for each line but those of `score_draw`, the loop's draw, of which one
pass gives a draw a row: there it is an 800th. What it gives is defined as
`grouped_draw` from weights computed in integers, of which one pass gives many.
Intervals are Clopper and Pearson's of 95%, for these logits (256 rows by default:
a row's draws have its rate); without a flip, 3 in the number of draws bounds the
rate (one-sided, 95%). Needs scipy.
"""

import argparse
import json
import time

import common
import numpy as np
from scipy import stats

common.use_tests()
import simd  # noqa: E402
from programs import ONE_DEVICE as ON_ONE  # noqa: E402
from programs import MeshRunner, Program, dims  # noqa: E402

from gpt_neo_sampling._compat import (  # noqa: E402
    PlacementMeshImpl,
    mtf,
    probe_devices,
    quiet_logging,
    quiet_stderr,
    tensorflow,
    tf,
)
from gpt_neo_sampling.mesh.sharded_rows import padded_size  # noqa: E402
from gpt_neo_sampling.sampling import fixed_point  # noqa: E402
from gpt_neo_sampling.sampling.categorical import grouped_draw, score_draw  # noqa: E402

ROWS, SAMPLES = 8, 2**14  # of one pass of many draws
SCORE_ROWS, SCORE_PASSES = 32, 16  # passes of each batch of logits
NOISE = 5e-7
ALPHA = 1.3
ONE_DEVICE = PlacementMeshImpl([], [], [""])


# --- Draws --------------------------------------------------------------------------


def integer_weights(z, alpha):
    if alpha is None:
        return fixed_point.softmax_weights(z)
    z, epsilon = (ONE_DEVICE.LaidOutTensor([t]) for t in (z, tf.fill([ROWS, 1], np.float32(alpha) - np.float32(1))))
    return fixed_point.entmax_weights(ONE_DEVICE, z, epsilon, lambda x: x).tensor_list[0]


def many_draws(vocab, alpha=None, shards=1):
    """For (logits [rows, vocab], uniforms [rows, samples] twice): tokens [rows, samples]."""

    def build(mesh, logits, u1, u2):
        size = padded_size(vocab, shards) if shards > 1 else vocab
        b, v, s = dims(batch=ROWS, vocab=size, samples=SAMPLES)
        z = logits - tf.reduce_max(logits, 1, keepdims=True)
        w = tf.pad(integer_weights(z, alpha), [[0, 0], [0, size - vocab]])
        u1, u2 = (mtf.import_tf_tensor(mesh, u, mtf.Shape([b, s])) for u in (u1, u2))
        return grouped_draw(mtf.import_tf_tensor(mesh, w, mtf.Shape([b, v])), u1, u2, v, s, size=vocab)

    return build, [(ROWS, vocab), (ROWS, SAMPLES), (ROWS, SAMPLES)]


def score_draws(vocab, alpha=None, shards=1):
    """For (logits [rows, vocab], uniforms [rows] twice): tokens [rows]."""

    def build(mesh, logits, u1, u2):
        size = padded_size(vocab, shards) if shards > 1 else vocab
        b, v = dims(batch=SCORE_ROWS, vocab=size)
        logits = tf.pad(logits, [[0, 0], [0, size - vocab]], constant_values=tf.float32.min)
        scores = mtf.import_tf_tensor(mesh, logits, mtf.Shape([b, v]))
        u1, u2 = (mtf.import_tf_tensor(mesh, u, mtf.Shape([b])) for u in (u1, u2))
        a = None if alpha is None else mtf.constant(mesh, alpha, mtf.Shape([b]), tf.float32)
        return score_draw(scores, u1, u2, v, a, size=vocab)

    return build, [(SCORE_ROWS, vocab), (SCORE_ROWS,), (SCORE_ROWS,)]


def plain(build, shapes, runner=ON_ONE):
    return Program(build, [(tf.float32, shape) for shape in shapes], runner=runner)


def xla(build, shapes):
    def lowered(*tensors):
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        out = build(mesh, *tensors)
        return mtf.Lowering(mesh.graph, {mesh: ONE_DEVICE}, autostack=False).export_to_tf_tensor(out)

    function = tensorflow.function(lowered, jit_compile=True, autograph=False)
    compiled = function.get_concrete_function(*(tf.TensorSpec(shape, tf.float32) for shape in shapes))
    return lambda *arrays: compiled(*map(tf.constant, arrays)).numpy()


def split(draws, vocab, alpha):
    return plain(*draws(vocab, alpha, shards=4), MeshRunner("x:4", "vocab:x"))


def cores(build, shapes):
    return simd.SimdProgram(build, [(tf.float32, shape) for shape in shapes], "x:4", "vocab:x")


def one_level(logits, u, blocks=None):
    """Tokens [rows, samples], by one cumulative sum; with `blocks`, of blocks first and then over them."""
    tokens = []
    for row, us in zip(np.exp(logits - logits.max(1, keepdims=True)), u):
        sums = np.cumsum(row, dtype=np.float32)
        if blocks:
            parts = np.cumsum(np.pad(row, (0, -len(row) % blocks)).reshape(blocks, -1), 1, dtype=np.float32)
            before = np.cumsum(parts[:, -1], dtype=np.float32) - parts[:, -1]
            sums = np.maximum.accumulate((parts + before[:, np.newaxis]).ravel()[: len(row)])
        target = us * sums[-1]
        tokens.append(np.minimum(np.searchsorted(sums, target, side="right"), len(row) - 1))
    return np.array(tokens)


# --- Lines ----------------------------------------------------------------------------


def gaussian_logits(rng, rows, vocab):
    return (rng.uniform(2, 3, (rows, 1)) * rng.normal(size=(rows, vocab))).astype(np.float32)


def uniforms(rng, *shape):
    return (rng.integers(0, 2**24, shape) * 2.0**-24).astype(np.float32)


def compare(what, draws, one, other, vocab, noise=None, many=True):
    """A line of the table. one and other: functions of (logits, u1, u2); noise: of a logit of 0 and of 1."""
    rng = np.random.default_rng(0)
    rows, shape, passes = (ROWS, (ROWS, SAMPLES), 1) if many else (SCORE_ROWS, (SCORE_ROWS,), SCORE_PASSES)
    flips = total = 0
    began = time.time()
    while total < draws:
        logits = moved = gaussian_logits(rng, rows, vocab)
        if noise:
            scale = noise[0] + (noise[1] - noise[0]) * np.abs(logits)
            moved = (logits + scale * rng.normal(size=logits.shape)).astype(np.float32)
        for _ in range(passes):
            u1, u2 = uniforms(rng, *shape), uniforms(rng, *shape)
            flips += int((one(logits, u1, u2) != other(moved, u1, u2)).sum())
            total += u1.size
    low = stats.beta.ppf(0.025, flips, total - flips + 1) if flips else 0.0
    high = stats.beta.ppf(0.975, flips + 1, total - flips) if flips else 3 / total
    found = {"what": what, "flips": flips, "draws": total, "rate": flips / total}
    return found | {"low": float(low), "high": float(high), "seconds": round(time.time() - began, 1)}


def lines(draws, vocab):
    def in_one(logits, u1, u2):
        return one_level(logits, u1)

    def in_other_order(logits, u1, u2):
        return one_level(logits, u1, blocks=64)

    names = {None: "softmax", ALPHA: f"entmax {ALPHA}"}
    many = {alpha: plain(*many_draws(vocab, alpha)) for alpha in names}
    for moved, noise in (("moved by 5e-7", (NOISE, NOISE)), ("moved by 5e-7 + 5e-7 of each", (NOISE, 2 * NOISE))):
        for alpha, name in names.items():
            yield compare(f"{moved}: two levels, {name}", draws, many[alpha], many[alpha], vocab, noise)
        yield compare(f"{moved}: one level, softmax", draws, in_one, in_one, vocab, noise)
    yield compare("equal: one level, another order of its sum", draws, in_one, in_other_order, vocab)
    for alpha, name in names.items():
        what = f"equal: two levels, {name}"
        yield compare(f"{what}, XLA", draws, many[alpha], xla(*many_draws(vocab, alpha)), vocab)
        yield compare(f"{what}, 4 devices", draws, many[alpha], split(many_draws, vocab, alpha), vocab)
    for alpha, name in names.items():
        what, score = f"equal: score_draw, {name}", plain(*score_draws(vocab, alpha))
        yield compare(f"{what}, XLA", draws // 800, score, xla(*score_draws(vocab, alpha)), vocab, many=False)
        yield compare(f"{what}, 4 devices", draws // 800, score, split(score_draws, vocab, alpha), vocab, many=False)
        if simd.UNAVAILABLE is None:
            on_cores = cores(*score_draws(vocab, alpha, shards=4))
            yield compare(f"{what}, 4 cores of a TPU's program", draws // 800, score, on_cores, vocab, many=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4_000_000)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--json", action="store_true", help="a JSON object a line, in place of the table")
    args = parser.parse_args()
    probe_devices()
    row = "{:52} {:>8} {:>12} {:>8}  {}"
    if not args.json:
        print(row.format(f"logits, V = {args.vocab:,}", "flips", "draws", "rate", "95% interval"), flush=True)
    with quiet_logging(), quiet_stderr():
        for found in lines(args.draws, args.vocab):
            if args.json:
                print(json.dumps(found), flush=True)
                continue
            flips, total, rate, low, high = (found[key] for key in ("flips", "draws", "rate", "low", "high"))
            interval = f"{low:.1e} to {high:.1e}" if flips else f"below {high:.1e}"
            print(row.format(found["what"], f"{flips:,}", f"{total:,}", f"{rate:.1e}", interval), flush=True)


if __name__ == "__main__":
    main()

"""One million draws from a Zipf law over GPT-2's vocabulary: memory, tail, time.

    python benchmarks/million_draws.py [--draws 1000000] [--samples 1]

Eight rows at a time, V = 50,257, every 50th entry of weight 0. Prints one JSON
object: the process's peak resident set, draws of entries of weight 0, and the
p-value of a chi-square test over bins of at least 50 expected draws.
"""

import argparse
import json
import time

import common
import numpy as np

from gpt_neo_sampling import sample_categorical
from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_logging, quiet_stderr, tf

ROWS, VOCAB = 8, 50257


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=1, help="draws from a row in one pass over it")
    args = parser.parse_args()
    weights = 1.0 / np.arange(1, VOCAB + 1)
    weights[::50] = 0.0
    probe_devices()
    with tf.Graph().as_default(), quiet_logging():
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        batch, vocab = mtf.Dimension("batch", ROWS), mtf.Dimension("vocab", VOCAB)
        samples = mtf.Dimension("samples", args.samples)
        step, held = tf.placeholder(tf.int32, []), tf.placeholder(tf.float32, [ROWS, VOCAB])
        drawn = sample_categorical(mtf.import_tf_tensor(mesh, held, [batch, vocab]), seed=1, step=step,
                                   samples_dim=None if args.samples == 1 else samples)  # fmt: skip
        lowering = mtf.Lowering(mesh.graph, {mesh: PlacementMeshImpl([], [], [""])})
        fetch = lowering.export_to_tf_tensor(drawn)
        with quiet_stderr():
            session = tf.Session()
        run = session.make_callable(fetch, [step, held])
        rows = np.tile(weights.astype(np.float32), (ROWS, 1))
        run(0, rows)
        counts = np.zeros(VOCAB, np.int64)
        began = time.time()
        for i in range(-(-args.draws // (ROWS * args.samples))):
            counts += np.bincount(run(i, rows).ravel(), minlength=VOCAB)
        seconds = time.time() - began
    order = np.argsort(-weights)
    print(json.dumps({
        "draws": int(counts.sum()),
        "samples_a_row": args.samples,
        "of_weight_0": int(counts[weights == 0].sum()),
        "chi_square_p": common.chi_square(counts[order], weights[order] / weights.sum()),
        "peak_resident_megabytes": common.peak_resident_bytes() // 2**20,
        "seconds": round(seconds, 1),
        "milliseconds_a_pass": round(1000 * seconds / (i + 1), 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

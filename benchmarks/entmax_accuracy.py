"""Largest error of entmax's probabilities against float64, at GPT-2's vocabulary.

    python benchmarks/entmax_accuracy.py

The float64 solution is `tests/reference.py`'s, an independent one: sorting for
α of 1.5 and 2, bisection elsewhere. Prints one JSON object a line.
"""

import json

import common
import numpy as np

common.use_tests()
import reference  # noqa: E402
from programs import MeshRunner, dims  # noqa: E402

from gpt_neo_sampling import entmax  # noqa: E402
from gpt_neo_sampling._compat import mtf, probe_devices, quiet_stderr  # noqa: E402

VOCAB = 50257


def rows():
    rng = np.random.default_rng(0)
    peaked = rng.normal(size=VOCAB)
    peaked[123] += 20
    return {
        "gaussian 0.1": 0.1 * rng.normal(size=VOCAB),
        "gaussian 1": rng.normal(size=VOCAB),
        "gaussian 2": 2 * rng.normal(size=VOCAB),
        "peaked": peaked,
        "constant": np.full(VOCAB, 3.0),
        "gaussian 1e4": 1e4 * rng.normal(size=VOCAB),
        "gaussian -1e4": -1e4 * rng.normal(size=VOCAB),
    }


def main():
    probe_devices()
    x = np.array(list(rows().values()), np.float32)
    batch, vocab = dims(batch=len(x), vocab=VOCAB)
    for alpha in (1.05, 1.3, 1.5, 1.9, 2.0):
        with quiet_stderr():
            p = MeshRunner()(lambda m, h, a=alpha: entmax(mtf.import_tf_tensor(m, h, [batch, vocab]), a), x)
        errors = np.abs(p - reference.entmax(x.astype(np.float64), alpha, -1)).max(-1)
        print(json.dumps({"alpha": alpha, "largest_error": float(errors.max()),
                          "by_row": dict(zip(rows(), (float(f"{e:.2g}") for e in errors)))}))  # fmt: skip


if __name__ == "__main__":
    main()

"""Errors of entmax against float64, from rows that are nearly flat to rows of one entry.

    python benchmarks/entmax_accuracy.py

A line for each size of vocabulary and α, over Gaussian rows of scales 1e-6 to 1e4: the largest error of p in parts of
its row's largest; how far the farthest entry that is wrongly in or out of the support lies from the threshold, in
parts of the largest score's distance from it (and what p it has); the largest error of the gradient for Gaussian dY, in
parts of the largest p^(2−α). Where PyTorch and deep-spin's entmax are installed (`make bench` has an environment with
both), the same errors of its functions on the same rows, in float32: `sparsemax` for 2, `entmax15` for 1.5,
`entmax_bisect` elsewhere.

The float64 solution is `tests/reference.py`'s, an independent one: sorting for α of 1.5 and 2, bisection elsewhere.
"""

import importlib.util

import common
import numpy as np

common.use_tests()
import reference  # noqa: E402
from programs import Program, dims  # noqa: E402

from gpt_neo_sampling import entmax  # noqa: E402
from gpt_neo_sampling._compat import mtf, probe_devices, quiet_stderr, tf  # noqa: E402

SIZES = (2, 50, 2000, 50257)
ALPHAS = np.float32([1.01, 1.1, 1.3, 1.5, 1.8, 1.99, 2])
SCALES = 10.0 ** np.arange(-6, 5)
HEADINGS = ("V", "α", "p", "support (p)", "gradient")


def ours(size):
    batch, vocab = dims(batch=2 * len(SCALES), vocab=size)

    def build(mesh, x, dy, alphas):
        x, dy = (mtf.import_tf_tensor(mesh, t, mtf.Shape([batch, vocab])) for t in (x, dy))
        p = entmax(x, mtf.import_tf_tensor(mesh, alphas, mtf.Shape([batch])))
        return p, mtf.gradients([mtf.reduce_sum(p * dy)], [x])[0]

    shape = (batch.size, size)
    program = Program(build, [(tf.float32, shape), (tf.float32, shape), (tf.float32, shape[:1])])
    return lambda x, dy, alpha: program(x, dy, np.full(len(x), alpha))


def deep_spins(x, dy, alpha):
    import entmax as peer
    import torch

    x = torch.tensor(x, requires_grad=True)
    functions = {1.5: peer.entmax15, 2.0: peer.sparsemax}
    function = functions.get(float(alpha))
    p = function(x, dim=-1) if function else peer.entmax_bisect(x, alpha=float(alpha), dim=-1)
    (p * torch.tensor(dy)).sum().backward()
    return p.detach().numpy(), x.grad.numpy()


def errors(p, dx, x, dy, alpha):
    """As numbers: of p, of the support (base, p), of the gradient; see above."""
    x, dy, epsilon = x.astype(np.float64), dy.astype(np.float64), float(alpha) - 1
    want = reference.entmax(x, float(alpha))
    top = want.max(1, keepdims=True)
    base = np.abs(1 - epsilon * (x.max(1, keepdims=True) - x) / top**epsilon)
    wrong = (p > 0) != (want > 0)
    weights = np.where((p > 0) & (want > 0), want, 0.0)
    weights = np.where(weights > 0, weights, 1.0) ** (1 - epsilon) * (weights > 0)
    gradient = weights * (dy - (weights * dy).sum(1, keepdims=True) / weights.sum(1, keepdims=True))
    return (
        (np.abs(p - want) / top).max(),
        base[wrong].max() if wrong.any() else 0.0,
        (np.maximum(p, want) / top)[wrong].max() if wrong.any() else 0.0,
        (np.abs(dx - gradient) / top ** (1 - epsilon)).max(),
    )


def main():
    probe_devices()
    has_peer = all(map(importlib.util.find_spec, ("torch", "entmax")))
    columns = list(HEADINGS) + ([f"deep-spin: {h}" for h in HEADINGS[2:]] if has_peer else [])
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rng = np.random.default_rng(0)
    for size in SIZES:
        x = (rng.normal(size=(2 * len(SCALES), size)) * np.repeat(SCALES, 2)[:, np.newaxis]).astype(np.float32)
        dy = rng.normal(size=x.shape).astype(np.float32)
        with quiet_stderr():
            function = ours(size)
        for alpha in ALPHAS:
            cells = [str(size), f"{alpha:g}"]
            for solve in [function, deep_spins][: 1 + has_peer]:
                of_p, base, edge, gradient = errors(*solve(x, dy, alpha), x, dy, alpha)
                cells += [f"{of_p:.1e}", f"{base:.1e} ({edge:.0e})", f"{gradient:.1e}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""The sampler's exported programs under JAX, beside JAX's own sampling.

    python benchmarks/accelerator.py export DIR [--platform cuda]     here: TensorFlow and JAX are needed
    python benchmarks/accelerator.py run DIR [--json]                 there: JAX with its accelerator alone

Exports a pass over the logits (next_token, V = 50,257) for batches of 1, 8 and
64 as StableHLO; `run` draws from them, checks the draws' law, and times them in
turn with jax.random.categorical or what JAX has that is nearer: for top-k
jax.lax.top_k, which only finds the k largest and draws nothing. With --core the
program is that of a TPU's core, of one; without, a GPU's. Bandwidth counts one read of the logits, as a
share of the chip's (--peak-gigabytes where the chip is not known).

On a CPU (--platform cpu) it shows only that the harness works.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time

import common
import jax_candidates
import laws
import numpy as np

BATCHES = (1, 8, 64)
CATEGORICAL = "jax.random.categorical"
WAYS = {
    "softmax": ({}, CATEGORICAL),
    "top-k 40": ({"temperature": 0.9, "top_k": 40}, "jax.lax.top_k"),
    "top-p 0.9": ({"temperature": 0.9, "top_p": 0.9}, "JAX, bisected top-p"),
    "min-p": ({"temperature": 0.9, "min_p": 0.05}, CATEGORICAL),
    "epsilon": ({"temperature": 0.9, "epsilon_cutoff": 3e-4}, CATEGORICAL),
    "typical": ({"temperature": 0.9, "typical_p": 0.9}, CATEGORICAL),
    "eta": ({"temperature": 0.9, "eta_cutoff": 3e-4}, CATEGORICAL),
    "entmax 1.3": ({"alpha": 1.3}, CATEGORICAL),
    "greedy": ({"temperature": 0}, "jax.numpy.argmax"),
    "penalties": ({"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.5}, CATEGORICAL),
}
BLOCKS, BLOCK_SECONDS = 15, 0.1
PEAK_GIGABYTES = {"H200": 4800, "H100": 3350, "A100": 2039, "TPU v4": 1228, "TPU v5 lite": 819, "TPU v5p": 2765}


def path_of(folder, way, batch):
    return pathlib.Path(folder) / f"{way.replace(' ', '-')}-{batch}.bin"


def export(folder, platform, ways, core):
    """Writes a program for each way and batch: (logits, step) -> tokens."""
    import jax
    from jax import export as jax_export
    from jax.experimental.jax2tf import call_tf
    from tensorflow_candidates import ours_next_token

    from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_logging, tensorflow

    probe_devices()
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for way in ways:
        arguments, _ = WAYS[way]
        for batch in BATCHES:

            def lowered(values, step, arguments=arguments):
                mesh = mtf.Mesh(mtf.Graph(), "mesh")
                vocab_dim = mtf.Dimension("vocab", common.GPT2_VOCAB)
                shape = mtf.Shape([mtf.Dimension("batch", values.shape[0]), vocab_dim])
                token = ours_next_token(mtf.import_tf_tensor(mesh, values, shape), vocab_dim, step, **arguments)
                impl = mtf.simd_mesh_impl.SimdMeshImpl([], []) if core else PlacementMeshImpl([], [], [""])
                return mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False).export_to_tf_tensor(token)

            with quiet_logging():
                function = tensorflow.function(lowered, autograph=False, jit_compile=True)
                program = jax_export.export(jax.jit(call_tf(function, has_side_effects=False)), platforms=[platform])(
                    jax.ShapeDtypeStruct((batch, common.GPT2_VOCAB), np.float32), jax.ShapeDtypeStruct((), np.int32)
                )
            path_of(folder, way, batch).write_bytes(program.serialize())
            print(f"{path_of(folder, way, batch)}", file=sys.stderr)


def block(function, logits, calls):
    """Milliseconds of a call, of calls that are all under way before the last is waited for."""
    began = time.perf_counter()
    for step in range(calls):
        out = function(logits, np.int32(step))
    _wait(out)
    return 1000 * (time.perf_counter() - began) / calls


def _wait(out):
    import jax

    return jax.block_until_ready(out)


def checked(function, logits, arguments):
    """The least p-value of the draws; raises where they do not follow the law."""
    steps, vocab = itertools.count(), logits.shape[1]
    counts = laws.count_draws(lambda: function(logits, np.int32(next(steps))), vocab, laws.LARGE_DRAWS)
    p = min(laws.chi_squares(counts, laws.law(laws.base_logits(vocab), **arguments)).values())
    if p <= laws.FALSE_ALARM:
        raise ArithmeticError(f"the draws do not follow the law: p {p:.2g}")
    return p


def run(folder, peak, ways):
    """Rows of the table, dicts."""
    import jax
    from jax import export as jax_export

    device = jax.devices()[0]
    if peak is None:
        peak = next((g for name, g in PEAK_GIGABYTES.items() if name in device.device_kind), None)
    for way in ways:
        arguments, peer_name = WAYS[way]
        draw, peer_law = jax_candidates.CANDIDATES[peer_name]
        for batch in BATCHES:
            values = laws.logits(batch, common.GPT2_VOCAB)
            logits = jax.device_put(values)
            program = jax.jit(jax_export.deserialize(path_of(folder, way, batch).read_bytes()).call)
            sides = {"ours": program, "peer": jax.jit(draw)}
            p = checked(program, logits, arguments)
            if peer_law is not None:
                checked(sides["peer"], logits, peer_law)
            calls = {}
            for side, function in sides.items():
                block(function, logits, 3)
                calls[side] = max(1, int(1000 * BLOCK_SECONDS / block(function, logits, 10)))
            times = {side: [] for side in sides}
            for _ in range(BLOCKS):
                for side, function in sides.items():
                    times[side].append(block(function, logits, calls[side]))
            gigabytes = values.nbytes / 1e6 / common.summary(times["ours"])["median"]
            yield {
                "device": device.device_kind, "way": way, "batch": batch, "peer_name": peer_name, "p": p,
                **{side: common.summary(t) for side, t in times.items()},
                "ratio": common.summary(np.array(times["peer"]) / np.array(times["ours"])),
                "gigabytes_a_second": gigabytes, "share_of_peak": gigabytes / peak if peak else None,
                "samples": times,
            }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("export", "run"))
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--platform", default="cuda", help="to export for: cuda, tpu, rocm or cpu (default: cuda)")
    parser.add_argument("--peak-gigabytes", type=float, help="a second, of the chip's memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=tuple(WAYS), action="append", help="default: all")
    parser.add_argument("--core", action="store_true", help="export the program of a TPU's core")
    args = parser.parse_args()
    ways = args.way or tuple(WAYS)
    if args.do == "export":
        export(args.folder, args.platform, ways, args.core)
        return
    line = "{:11} {:>5}  {:23} {:>9} {:>9} {:>6} {:>8} {:>8}"
    if not args.json:
        print(line.format("way", "batch", "peer", "ours, ms", "peer, ms", "ratio", "GB/s", "of peak"))
    for row in run(args.folder, args.peak_gigabytes, ways):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
        medians = (f"{row[side]['median']:.3f}" for side in ("ours", "peer"))
        print(line.format(row["way"], row["batch"], row["peer_name"], *medians, f"{row['ratio']['median']:.2f}",
                          f"{row['gigabytes_a_second']:.1f}", share), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

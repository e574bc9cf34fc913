"""The sampler's exported programs under JAX, beside JAX's own sampling.

    python benchmarks/accelerator.py export DIR [--platform cuda]     here: TensorFlow and JAX are needed
    python benchmarks/accelerator.py run DIR [--json]                 there: JAX with its accelerator alone

Exports a pass over the logits (next_token, V = 50,257) for batches of 1, 8 and
64 as StableHLO; `run` draws from them, checks the draws' law, and times them in
turn with jax.random.categorical and, for top-k, jax.lax.top_k, which only finds
the k largest and draws nothing. Bandwidth counts one read of the logits, as a
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
import laws
import numpy as np

BATCHES = (1, 8, 64)
WAYS = {
    "softmax": ({}, "jax.random.categorical"),
    "top-k 40": ({"temperature": 0.9, "top_k": 40}, "jax.lax.top_k"),
    "entmax 1.3": ({"alpha": 1.3}, "jax.random.categorical"),
}
BLOCKS, BLOCK_SECONDS = 15, 0.1
PEAK_GIGABYTES = {"H200": 4800, "H100": 3350, "A100": 2039, "TPU v4": 1228, "TPU v5 lite": 819, "TPU v5p": 2765}


def path_of(folder, way, batch):
    return pathlib.Path(folder) / f"{way.replace(' ', '-')}-{batch}.bin"


def export(folder, platform):
    """Writes a program for each way and batch: (logits, step) -> tokens."""
    import jax
    from jax import export as jax_export
    from jax.experimental.jax2tf import call_tf
    from tensorflow_candidates import ours_next_token

    from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_logging, tensorflow

    probe_devices()
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for way, (arguments, _) in WAYS.items():
        for batch in BATCHES:

            def lowered(values, step, arguments=arguments):
                mesh = mtf.Mesh(mtf.Graph(), "mesh")
                vocab_dim = mtf.Dimension("vocab", common.GPT2_VOCAB)
                shape = mtf.Shape([mtf.Dimension("batch", values.shape[0]), vocab_dim])
                token = ours_next_token(mtf.import_tf_tensor(mesh, values, shape), vocab_dim, step, **arguments)
                impl = PlacementMeshImpl([], [], [""])
                return mtf.Lowering(mesh.graph, {mesh: impl}, autostack=False).export_to_tf_tensor(token)

            with quiet_logging():
                function = tensorflow.function(lowered, autograph=False, jit_compile=True)
                program = jax_export.export(jax.jit(call_tf(function, has_side_effects=False)), platforms=[platform])(
                    jax.ShapeDtypeStruct((batch, common.GPT2_VOCAB), np.float32), jax.ShapeDtypeStruct((), np.int32)
                )
            path_of(folder, way, batch).write_bytes(program.serialize())
            print(f"{path_of(folder, way, batch)}", file=sys.stderr)


def peers():
    """{name: jitted function of (logits, step)}"""
    import jax

    return {
        "jax.random.categorical": jax.jit(
            lambda logits, step: jax.random.categorical(jax.random.fold_in(jax.random.key(1), step), logits)
        ),
        "jax.lax.top_k": jax.jit(lambda logits, step: jax.lax.top_k(logits, 40)),
    }


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


def run(folder, peak):
    """Rows of the table, dicts."""
    import jax
    from jax import export as jax_export

    device = jax.devices()[0]
    if peak is None:
        peak = next((g for name, g in PEAK_GIGABYTES.items() if name in device.device_kind), None)
    others = peers()
    for way, (arguments, peer_name) in WAYS.items():
        for batch in BATCHES:
            values = laws.logits(batch, common.GPT2_VOCAB)
            logits = jax.device_put(values)
            program = jax.jit(jax_export.deserialize(path_of(folder, way, batch).read_bytes()).call)
            sides = {"ours": program, "peer": others[peer_name]}
            p = checked(program, logits, arguments)
            if peer_name == "jax.random.categorical":  # always softmax's law
                checked(sides["peer"], logits, {})
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
    args = parser.parse_args()
    if args.do == "export":
        export(args.folder, args.platform)
        return
    line = "{:11} {:>5}  {:23} {:>9} {:>9} {:>6} {:>8} {:>8}"
    if not args.json:
        print(line.format("way", "batch", "peer", "ours, ms", "peer, ms", "ratio", "GB/s", "of peak"))
    for row in run(args.folder, args.peak_gigabytes):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
        medians = (f"{row[side]['median']:.3f}" for side in ("ours", "peer"))
        print(line.format(row["way"], row["batch"], row["peer_name"], *medians, f"{row['ratio']['median']:.2f}",
                          f"{row['gigabytes_a_second']:.1f}", share), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

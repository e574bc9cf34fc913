"""What decoding with GPT-Neo's models costs on a TPU slice, by the estimate of the TPU's own compiler.

In the environment .venv-tpu (make bench-tpu sets it up); no TPU is needed, and nothing is executed:

    python benchmarks/tpu_models.py [--model 125M] [--batch 8] [--topology v5e:2x2] [--layout LAYOUT] [--top 20]
    python benchmarks/tpu_models.py --controls      seconds to build and to compile a loop with every control

For each model, slice, batch and layout: whether a core's memory holds it, the cycles that the compiler gives a step,
how many of them are not the model's, what travels between cores, and the least time that a step can take: that of
reading the core's weights and caches once. Prompts of 512 tokens, a context of 2,048, weights and activations in
bfloat16. Cycles leave out what the compiler gives none: collectives, copies between memories, and updates in place.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import re
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import common  # noqa: E402

common.use_tests()

import simd  # noqa: E402
import tpu_compiler  # noqa: E402
from helpers_model import config, features, variable_shapes  # noqa: E402

from gpt_neo_sampling._compat import mtf, tf  # noqa: E402
from gpt_neo_sampling.sample import sample_autoregressive  # noqa: E402

MODELS = {"125M": (12, 12, 768), "1.3B": (24, 16, 2048), "2.7B": (32, 20, 2560)}  # layers, heads, width
VOCAB, CONTEXT, PROMPT = 50304, 2048, 512
LAYOUTS = (  # of GPT-Neo's configs
    "batch:x,heads:y,vocab:y,intermediate_expanded:y",
    "batch:x,heads:y,vocab:y",
    "batch:x,memory_length:y,embd:y",
    "embd:y,batch:x",
)
MESHES = {"v5e:2x2": "x:2,y:2", "v5e:4x4": "x:4,y:4", "v4:2x2x1": "x:4,y:2", "v6e:2x2": "x:2,y:2",
          "v5e:16x16": "x:64,y:4"}  # fmt: skip
POD = "v5e:16x16"  # for a batch of 64 alone
CASE = "model", "batch", "topology", "layout"

# Of a core, which is a chip, or of v4 half a chip: its memory and its bandwidth in bytes, as published. GHz is an
# assumption: the clock at which a chip's published peak of bfloat16 products (197, 275 and 918 TFLOP/s) is that of 4
# units of 128 × 128, of 8, and of 4 of 256 × 256.
CORES = {"v5e": (16 * 2**30, 819e9, 1.50), "v4": (16 * 2**30, 614e9, 1.05), "v6e": (32 * 2**30, 1640e9, 1.75)}

DIMS = {"wte": ("vocab", "embd"), "wpe": ("embed_sequence", "embd"), "q": ("embd", "heads"), "k": ("embd", "heads"),
        "v": ("embd", "heads"), "o": ("heads", "embd"), "c_fc": ("embd", "intermediate_expanded"),
        "c_proj": ("intermediate_expanded", "embd")}  # fmt: skip


def parameters(model, use_tpu=True):
    layers, heads, width = MODELS[model]
    types = ["global", "local"] * (layers // 2)
    return config(types, n_head=heads, n_embd=width, n_vocab=VOCAB, n_ctx=CONTEXT, use_tpu=use_tpu)


def weight_shapes(params):
    """{name: mtf.Shape}"""
    shapes = {}
    for name, sizes in variable_shapes(params).items():
        parts = name.split("/")
        names = next((DIMS[part] for part in reversed(parts[-2:]) if part in DIMS), ("embd",))
        shapes[name] = mtf.Shape([mtf.Dimension(*d) for d in zip(names[-len(sizes) :], sizes)])
    return shapes


def program(model, batch, mesh_shape, layout, slice_dtype=tf.bfloat16, controls=None, use_tpu=True):
    """The core's program of a script's `sample_autoregressive`, as a `simd.CoreProgram`.

    controls(rows) gives (inputs, a function of their tensors that returns keywords) beyond the default ones.
    """
    params = parameters(model, use_tpu)
    shapes = weight_shapes(params)
    dtypes = mtf.VariableDType(tf.bfloat16, slice_dtype, tf.bfloat16)
    more, keywords = controls(batch) if controls else ([], lambda: dict(temperature=0.9))

    def build(mesh, ids, lengths, *rest):
        shape, other = features(mesh, params, batch, CONTEXT, variable_dtype=dtypes)
        with simd.constant_weights(dict(zip(shapes, rest))):
            return sample_autoregressive(
                mtf.import_tf_tensor(mesh, ids, shape), other, params, seed=1, variable_dtype=dtypes,
                prompt_lengths=lengths, max_prompt_length=PROMPT, **keywords(*rest[len(shapes) :]),
            )  # fmt: skip

    weights = [(slice_dtype, shape) for shape in shapes.values()]
    inputs = [(tf.int32, (batch, CONTEXT)), (tf.int32, (batch,)), *weights, *more]
    return simd.CoreProgram(build, inputs, mesh_shape, layout)


FLOATS = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_n_sigma", "top_h", "top_p",
          "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "entmax_alpha")  # fmt: skip
INTEGERS = ("sampling_keep_top_k", "min_new_tokens", "max_steps", "stop_at_token", "stream")


def all_controls(batch):
    """Every control that a tensor may hold, one value a row, and the others."""
    inputs = [(tf.float32, (batch,))] * len(FLOATS) + [(tf.int32, (batch,))] * len(INTEGERS)
    fixed = dict(max_top_k=40, sampling_use_entmax=True, no_repeat_ngram_size=3, return_logprobs=True)
    return inputs, lambda *tensors: dict(fixed, **dict(zip(FLOATS + INTEGERS, tensors)))


def compile_time(model, batch, topology, layout):
    """Seconds for the graph of a script with all controls and for its compilation, and what the program is made of."""
    began = time.perf_counter()
    core_program = program(model, batch, MESHES[topology], layout, controls=all_controls)
    label = f"{model} {batch} {topology} {layout}, all controls:"
    print(f"{label} graph {time.perf_counter() - began:.0f} s", flush=True)
    compiled = tpu_compiler.TpuProgram(core_program.hlo, core_program.cores, topology)
    print(f"{label} compile {compiled.seconds:.0f} s, "
          f"code {compiled.code_bytes / 1e6:.0f} MB, {len(compiled.kernels)} kernels", flush=True)  # fmt: skip
    for (loops, branches), (cycles, kernels, more) in compiled.costs().items():
        print(f"    loops {loops} branches {branches}: {cycles:10,} cycles in {kernels:4} kernels, {more} without")
    parts = collections.Counter()
    for line in compiled.text.splitlines():
        source = re.search(r'op_name="while_loop/while/([^"/]*)', line)
        parts[source[1] if source else "beside the loop"] += 1
    for part, count in parts.most_common(15):
        print(f"    {count:7,} instructions of {part}")


def bytes_read(model, batch, impl, slice_dtype=tf.bfloat16):
    """(weights, caches) of a core in bytes, caches filled: what a step has to read. The caches are those of the model
    as defined: all positions in a layer of global attention, 256 in one of local attention."""
    params = parameters(model)
    weights = sum(impl.slice_size(shape) for shape in weight_shapes(params).values()) * slice_dtype.size
    positions = (CONTEXT + 256) * params["n_layer"] // 2
    sizes = dict(batch=batch, heads=params["n_head"], memory_length=positions, kv=params["n_embd"] // params["n_head"])
    return weights, 2 * 2 * impl.slice_size(mtf.Shape([mtf.Dimension(*d) for d in sizes.items()]))


def measured(core_program, model, batch, topology, slice_dtype=tf.bfloat16):
    """The figures of one program on one slice, and the compiled program, None where the compiler refuses."""
    memory, bandwidth, clock = CORES[topology.split(":")[0]]
    weights, caches = bytes_read(model, batch, core_program.impl, slice_dtype)
    found = {"limit_ms": 1e3 * (weights + caches) / bandwidth, "weights": weights, "caches": caches, "memory": memory}
    began = time.perf_counter()
    try:
        compiled = tpu_compiler.TpuProgram(core_program.hlo, core_program.cores, topology)
    except Exception as error:
        refused = re.search(r"Used (\S+) of (\S+) hbm\. Exceeded hbm capacity by (\S+?)\.?\s", str(error))
        if not refused:
            raise
        return {**found, "fits": False, "used": refused[1], "of": refused[2], "over": refused[3],
                "compile_seconds": time.perf_counter() - began}, None  # fmt: skip
    step = [k for k in compiled.kernels if k.loops and not k.branches and k.cycles]
    rest = [k for k in step if k.source and "gpt2/" not in k.source]  # copies of weights have no source
    cycles = sum(k.cycles for k in step)
    sent = collections.Counter()
    for c in compiled.collectives:
        if c.loops and not c.branches:
            sent[f"{c.opcode} {c.dtype}"] += c.bytes
            sent["collectives"] += 1
    return {
        **found,
        "fits": True,
        "argument_bytes": compiled.argument_bytes,
        "temporary_bytes": compiled.temporary_bytes,
        "code_bytes": compiled.code_bytes,
        "free_bytes": memory - compiled.argument_bytes - compiled.temporary_bytes,
        "compile_seconds": compiled.seconds,
        "cycles": cycles,
        "kernels": len(step),
        "not_the_models": sum(k.cycles for k in rest),
        "ms": cycles / clock / 1e6,
        "first_pass_cycles": compiled.costs()[0, 0][0],
        "sent": dict(sent),
    }, compiled


def report(label, found, compiled, top):
    if not found["fits"]:
        print(f"{label} does not fit: {found['used']} of {found['of']}, {found['over']} too much", flush=True)
        return
    sent = ", ".join(f"{name} {size:,}" for name, size in found["sent"].items())
    print(f"{label} {found['cycles']:10,} cycles {found['kernels']:4} kernels {found['ms']:6.2f} ms, limit "
          f"{found['limit_ms']:5.2f}; not the model's {found['not_the_models'] / found['cycles']:4.0%}; memory "
          f"{(found['argument_bytes'] + found['temporary_bytes']) / 2**30:5.2f} GiB, free "
          f"{found['free_bytes'] / 2**30:6.2f}; {found['compile_seconds']:.0f} s; {sent}", flush=True)  # fmt: skip
    for kernel in sorted(compiled.kernels, key=lambda k: (-k.loops, k.branches, -(k.cycles or 0)))[:top]:
        print(f"      {kernel.cycles or 0:10,} loops {kernel.loops} branches {kernel.branches} {kernel.opcode:14} "
              f"{kernel.source[-90:]}", flush=True)  # fmt: skip


def table(rows):
    """Prints rows of results as docs/meshes.md has them."""
    columns = "model, batch", "slice, mesh", "a core's memory", "cycles of a step", "ms", "reading once", "sampling"
    print("| " + " | ".join([*columns, "sent", "a token"]) + " |")
    print("| --- " * 9 + "|")
    order = {name: i for i, name in enumerate([*MODELS, *MESHES])}
    for row in sorted(rows, key=lambda r: (order[r["model"]], r["batch"], order[r["topology"]])):
        memory = CORES[row["topology"].split(":")[0]][0]
        begin = f"| {row['model']}, {row['batch']} | {row['topology']}, `{row['mesh']}` |"
        if not row["fits"]:
            print(f"{begin} {row['over']} too much | | | | | | |")
            continue
        used = (row["argument_bytes"] + row["temporary_bytes"]) / 2**30
        sent = sum(size for name, size in row["sent"].items() if name != "collectives")
        token = 1e3 * max(row["ms"], row["limit_ms"]) / row["batch"]
        print(f"{begin} {used:.1f} of {memory // 2**30} GiB | {row['cycles']:,} | {row['ms']:.2f} | "
              f"{row['limit_ms']:.2f} ms | {row['not_the_models'] / row['cycles']:.0%} | "
              f"{sent / 1e3:,.0f} KB in {row['sent']['collectives']} | {token:.0f} µs |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=tuple(MODELS))
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--topology", action="append", choices=tuple(MESHES))
    parser.add_argument("--layout", action="append", choices=LAYOUTS)
    parser.add_argument(
        "--float32", action="store_true", help="weights as float32 slices, as GPT-Neo's configs have it"
    )
    parser.add_argument("--states-of-cpus", action="store_true", help="without use_tpu in the model's params")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="list the N costliest kernels of a step")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--add-to", type=pathlib.Path, metavar="FILE", help="results whose cases are not run again")
    parser.add_argument("--controls", action="store_true", help="what a script with all controls takes to compile")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="print a file's results as docs/ has them")
    args = parser.parse_args()
    if args.table:
        rows = json.loads(args.table.read_text())["rows"]
        for layout in args.layout or LAYOUTS:
            print(f"\n{layout}\n")
            table([row for row in rows if row["layout"] == layout])
        return
    if args.controls:
        compile_time("125M", 8, "v5e:2x2", LAYOUTS[0])
        return
    slice_dtype = tf.float32 if args.float32 else tf.bfloat16
    settings = {"weights": slice_dtype.name, "use_tpu": not args.states_of_cpus}
    rows, path = [], args.add_to
    if path:
        earlier = json.loads(path.read_text())
        rows = earlier["rows"]
        assert settings.items() <= earlier.items(), f"{path} is of other settings than {settings}"
    known = {tuple(row[key] for key in CASE) for row in rows}
    by_mesh = collections.defaultdict(list)
    for topology in args.topology or MESHES:
        by_mesh[MESHES[topology]].append(topology)
    every = itertools.product(args.layout or LAYOUTS, args.batch or (8, 64), args.model or MODELS, by_mesh.items())
    for layout, batch, model, (mesh_shape, topologies) in every:
        wanted = [t for t in topologies if (model, batch, t, layout) not in known and (t != POD or batch == 64)]
        if not wanted:
            continue
        began = time.perf_counter()
        core_program = program(model, batch, mesh_shape, layout, slice_dtype, use_tpu=not args.states_of_cpus)
        seconds = time.perf_counter() - began
        for topology in wanted:
            found, compiled = measured(core_program, model, batch, topology, slice_dtype)
            report(f"{model} {batch:2} {topology:9} {layout:47}", found, compiled, args.top)
            row = dict(model=model, batch=batch, topology=topology, mesh=mesh_shape, layout=layout)
            rows.append({**row, "graph_seconds": seconds, **found})
            if not args.no_save:  # at once, as all of them take hours
                path = common.save(common.FOLDER / "results", "tpu-models", {**settings, "rows": rows}, path)


if __name__ == "__main__":
    main()

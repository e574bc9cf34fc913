"""What a sampling step costs on a TPU, by the estimate of the TPU's own compiler; no TPU is needed.

make bench-tpu                                        or, in the environment .venv-tpu:
python benchmarks/tpu.py [PROGRAM …] [--topology v5e:2x2] [--layout vocab] [--top 20]
python benchmarks/tpu.py --write-table                writes tests/data/tpu_costs.json, which make test-tpu holds

Each program is a loop of steps, each of which draws a token a row: 8 rows of 50,304 float32 logits, on four cores. Each
figure is of one core. Programs of JAX are for a batch that is split over the cores: 2 rows of all entries.
"""

import argparse
import collections
import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import common  # noqa: E402

common.use_tests()

import tpu_compiler  # noqa: E402

if tpu_compiler.UNAVAILABLE:
    sys.exit(tpu_compiler.UNAVAILABLE)

import jax_candidates  # noqa: E402
import numpy as np  # noqa: E402
import simd  # noqa: E402
import tpu_samplers  # noqa: E402

CORES = 4
JAX = jax_candidates.CANDIDATES
TOPOLOGIES = ("v5e:2x2", "v4:2x2x1", "v6e:2x2")
FEW = 64  # gathers, and sorts, of fewer entries are not listed
TABLE = common.TESTS / "data" / "tpu_costs.json"
RESULTS = common.FOLDER / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="; ".join(programs()))
    parser.add_argument("--topology", action="append", help=f"default: {', '.join(TOPOLOGIES)}")
    parser.add_argument("--layout", choices=tuple(tpu_samplers.LAYOUTS), action="append", help="default: both")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="list the N costliest kernels")
    parser.add_argument("--write-table", action="store_true", help="of the samplers on v5e:2x2, and print nothing else")
    args = parser.parse_args()
    unknown = set(args.programs) - set(programs())
    if unknown:
        parser.error(f"no program {', '.join(sorted(unknown))}")
    if args.write_table:
        write_table(args.programs or tpu_samplers.SAMPLERS)
        return
    rows = []
    for name in args.programs or programs():
        for layout in args.layout or tpu_samplers.LAYOUTS:
            if name in JAX and layout != "batch":
                continue
            hlo = jax_hlo(name) if name in JAX else tpu_samplers.core_program(name, layout).hlo
            rounds = None
            for topology in args.topology or TOPOLOGIES:
                program = tpu_compiler.TpuProgram(hlo, CORES, topology)
                if rounds is None and (2, 0) in program.costs():
                    rounds = rounds_of(name, layout)
                rows.append(row(name, layout, topology, program, rounds))
                describe(rows[-1], program, args.top)
    print(*markdown(rows), sep="\n")
    if not args.programs:
        versions = common.versions(["tensorflow", "mesh-tensorflow", "numpy", "jax", "jaxlib", "libtpu"])
        common.save(RESULTS, "tpu", {"versions": versions, "rows": rows})


def programs():
    """The names of all, in the table's order."""
    return [*tpu_samplers.SAMPLERS, *tpu_samplers.FURTHER, *tpu_samplers.PEERS, *JAX]


def jax_hlo(name):
    draw, _ = JAX[name]
    return jax_candidates.loop_hlo(draw, tpu_samplers.BATCH // CORES, tpu_samplers.VOCAB, tpu_samplers.STEPS)


def write_table(names):
    """Writes the rows of these samplers anew."""
    table = json.loads(TABLE.read_text())
    for name in names:
        for layout in tpu_samplers.LAYOUTS:
            program = tpu_compiler.TpuProgram(tpu_samplers.core_program(name, layout).hlo, CORES)
            table[f"{name}, {layout}"] = program.table()
            print(f"{name}, {layout}: {program.table()}", file=sys.stderr)
    keys = [f"{name}, {layout}" for name in tpu_samplers.SAMPLERS for layout in tpu_samplers.LAYOUTS]
    lines = [f"{json.dumps(key)}: {json.dumps(table[key])}" for key in keys if key in table]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def rounds_of(name, layout):
    """What the loop within a step takes, for Gaussian logits of spread 2: the mean of the steps."""
    with tpu_samplers.counted_loops():
        built = tpu_samplers.sampler(name, count_rounds=True)
        program = simd.SimdProgram(*built, f"x:{CORES}", tpu_samplers.LAYOUTS[layout])
    ids = np.zeros((tpu_samplers.BATCH, tpu_samplers.LENGTH), np.int32)
    stream = np.arange(tpu_samplers.BATCH)
    return float(np.mean([program(tpu_samplers.gaussian(seed=seed), ids, seed, stream) for seed in range(4)]))


def row(name, layout, topology, program, rounds):
    """All of a program that results keep, as JSON."""
    costs = program.costs()
    kernels = collections.defaultdict(lambda: np.zeros(3, int))  # cycles, with cycles, without
    for (loops, branches), cost in costs.items():
        place = "before" if not loops else "branches" if branches else "step" if loops == 1 else "round"
        kernels[place] += cost
    one_by_one = collections.Counter(
        (o.opcode, o.entries, bool(o.branches)) for o in program.one_by_one if o.loops and o.entries > FEW
    )
    sent = collections.Counter()
    for c in program.collectives:
        if c.loops:
            sent[c.opcode, bool(c.branches)] += c.bytes
    round_cycles = kernels["round"][0] if "round" in kernels else 0
    return {
        "program": name, "layout": layout, "topology": topology, "seconds": program.seconds,
        "code_bytes": program.code_bytes, "temporary_bytes": program.temporary_bytes,
        **{place: dict(zip(("cycles", "kernels", "without_cycles"), map(int, k))) for place, k in kernels.items()},
        "rounds": rounds, "typical_cycles": int(kernels["step"][0] + round_cycles * (rounds or 0)),
        "one_by_one": [
            {"opcode": opcode, "entries": entries, "in_branches": in_branches, "count": n}
            for (opcode, entries, in_branches), n in sorted(one_by_one.items())
        ],
        "sent": [
            {"opcode": opcode, "in_branches": in_branches, "bytes": size}
            for (opcode, in_branches), size in sorted(sent.items())
        ],
    }  # fmt: skip


def describe(row, program, top):
    print(f"{row['program']:22} {row['layout']:6} {row['topology']:9} {row['typical_cycles']:10,} cycles, "
          f"{row['seconds']:.1f} s to compile", file=sys.stderr, flush=True)  # fmt: skip
    for kernel in sorted(program.kernels, key=lambda k: -(k.cycles or 0))[:top]:
        print(f"  {kernel.cycles or 0:10,}  {kernel.loops} loops, {kernel.branches} branches  {kernel.opcode:14} "
              f"{kernel.source[-90:]}", file=sys.stderr)  # fmt: skip


COLUMNS = ("", "layout", "every step", "a round", "rounds", "in all", "in branches", "entry by entry",
           "bytes between cores", "to compile", "code", "temporaries")  # fmt: skip


def markdown(rows):
    """Lines: for each topology a table."""
    for topology in dict.fromkeys(row["topology"] for row in rows):
        yield f"\n{topology}:\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield f"| {' | '.join(['---'] * len(COLUMNS))} |"
        for row in rows:
            if row["topology"] == topology:
                yield f"| {' | '.join(cells(row))} |"


def cells(row):
    one_by_one = [f"{o['count']} × {o['opcode']} of {o['entries']:,}{_in_branch(o)}" for o in row["one_by_one"]]
    sent = [f"{s['opcode']} {s['bytes']:,}{_in_branch(s)}" for s in row["sent"]]
    return [
        row["program"], row["layout"], _cost(row.get("step")), _cost(row.get("round")),
        "" if row["rounds"] is None else f"{row['rounds']:.3g}", f"{row['typical_cycles']:,}",
        _cost(row.get("branches")), ", ".join(one_by_one), ", ".join(sent), f"{row['seconds']:.1f} s",
        f"{row['code_bytes'] / 1e6:.1f} MB", f"{row['temporary_bytes'] / 1e6:.2f} MB",
    ]  # fmt: skip


def _cost(place):
    """Cycles, kernels that have cycles, and those that the compiler gives none."""
    if place is None:
        return ""
    without = f" + {place['without_cycles']}" * bool(place["without_cycles"])
    return f"{place['cycles']:,} in {place['kernels']}{without}"


def _in_branch(entry):
    return " (in branches)" * entry["in_branches"]


if __name__ == "__main__":
    main()

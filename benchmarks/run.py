"""The benchmark: this library beside its peers. What `make bench` runs.

    python benchmarks/run.py [NAME …] [--blocks 15] [--out benchmarks/results] [--list]

NAMEs are rows of `rows.py` or the sections scaling, startup, nodes, memory; all
by default. Prints tables; writes a JSON file, and for scaling two plots. The
exit status is 1 if a side gave wrong results (it is not timed then) or a row failed.
README.md of this folder says what the rows mean.
"""

import argparse
import datetime
import json
import pathlib
import sys
import time
import traceback

import common
import graph_nodes
import memory
import pairs
import scaling
import startup
from rows import ROWS, TENSORFLOW

PACKAGES = ("tensorflow", "mesh-tensorflow", "numpy", "torch", "transformers", "entmax", "jax", "jaxlib")
SECTIONS = {"scaling": scaling, "startup": startup, "nodes": graph_nodes, "memory": memory}


def note(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def timed_row(row, blocks):
    """{"checks", "ours", "peer", "ratio", "samples", …}; or {"faults"}, without times."""
    with pairs.Worker(TENSORFLOW) as ours, pairs.Worker(row.peer_module) as peer:
        for worker, spec in zip((ours, peer), row.specs()):
            worker.build(spec)
        wrong, found = pairs.faults(row, ours.check(), peer.check())
        if wrong:
            return {"checks": found, "faults": wrong}
        times = pairs.in_turn({"ours": ours, "peer": peer}, blocks)
    ratio = pairs.compared(times)
    return {"checks": found, **ratio, "met": ratio["ratio"]["median"] >= row.target * (1 - row.noise), "samples": times}


LINE = "{:19} {:76} {:>9} {:>9} {:>7} {:>15} {:>6}  {}"


def print_row(row, result):
    if "ratio" not in result:
        (what,) = result.get("faults", [result.get("error", "")])[:1]
        print(LINE.format(row.name, row.what, "", "", "", "", row.target, f"WRONG: {what}"), flush=True)
        return
    ours, peer, ratio = (result[key] for key in ("ours", "peer", "ratio"))
    low, high = ratio["quartiles"]
    verdict = ("met" if result["met"] else "NOT MET") + pairs.disturbance(result["samples"]["others"])
    print(LINE.format(
        row.name, row.what, f"{ours['median']:.3f}", f"{peer['median']:.3f}", f"{ratio['median']:.2f}",
        f"{low:.2f} to {high:.2f}", row.target, verdict,
    ), flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows and sections (default: all)")
    parser.add_argument("--blocks", type=int, default=pairs.BLOCKS, help="of each side of a row (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=common.FOLDER / "results", metavar="DIR")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    args = parser.parse_args()
    known = [row.name for row in ROWS] + list(SECTIONS)
    if args.list:
        print("\n".join(known))
        return 0
    names = [n for given in args.names for n in given.replace(",", " ").split()] or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"no row or section {', '.join(unknown)}; there are: {', '.join(known)}")

    common.pin()
    started = datetime.datetime.now()
    results = {
        "started": started.isoformat(timespec="seconds"),
        "commit": common.commit(),
        "machine": common.machine(),
        "cores_used": common.CORES,
        "versions": common.versions(PACKAGES),
        "rows": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / started.strftime("%Y-%m-%d-%H%M%S")
    failed = False

    def save():
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")

    print(f"{results['machine']['cpu']}, {common.CORES} cores; commit {results['commit']}")
    rows = [row for row in ROWS if row.name in names]
    if rows:
        print(LINE.format("row", "ours / peer", "ours, ms", "peer, ms", "ratio", "quartiles", "target", ""), flush=True)
    for row in rows:
        note(row.name)
        try:
            result = timed_row(row, args.blocks)
        except pairs.WorkerError as e:
            print(e, file=sys.stderr)
            result = {"error": str(e).strip().splitlines()[-1]}
        failed |= "ratio" not in result
        results["rows"][row.name] = {"what": row.what, "target": row.target, **result}
        print_row(row, result)
        save()
    for name in (n for n in SECTIONS if n in names):
        note(name)
        try:
            results[name] = SECTIONS[name].section(stem)
        except Exception:  # one section's failure leaves the others
            traceback.print_exc()
            failed = True
        save()
    note(f"{stem}.json, {(datetime.datetime.now() - started).seconds} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""The benchmark: this library beside its peers. What `make bench` runs.

    python benchmarks/run.py [NAME …] [--blocks 15] [--out benchmarks/results | --add-to FILE] [--list]
    python benchmarks/run.py --table FILE

NAMEs are rows of `rows.py`, `decode` for all of a decode, or the sections scaling, startup, nodes, memory; all
by default. Prints tables; writes a JSON file, and for scaling two plots. The
exit status is 1 if a side gave wrong results (it is not timed then) or a row failed.
README.md of this folder says what the rows mean.
"""

import argparse
import contextlib
import datetime
import json
import pathlib
import sys
import time
import traceback

import common
import graph_nodes
import memory
import numpy as np
import pairs
import scaling
import startup
from rows import ROWS, TENSORFLOW

PACKAGES = ("tensorflow", "mesh-tensorflow", "numpy", "torch", "transformers", "entmax", "jax", "jaxlib")
PEER_PACKAGES = {  # that an environment of `rows.Row.peer_environment` is there for
    "openvino": ("openvino", "optimum-intel", "transformers", "torch"),
    "onnx": ("onnxruntime", "optimum-onnx", "transformers", "torch"),
}
SECTIONS = {"scaling": scaling, "startup": startup, "nodes": graph_nodes, "memory": memory}


def note(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def timed_row(row, blocks):
    """{"checks", "ours", "peer", "ratio", "samples", …}; or {"faults"}, without times."""
    is_decode, result = row.law is None, {}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(pairs.Worker(TENSORFLOW))
        peer = stack.enter_context(pairs.Worker(row.peer_module, row.peer_environment))
        workers = {"ours": ours, "peer": peer}
        for worker, spec in zip(workers.values(), row.specs()):
            worker.build(spec)
        if row.peer_environment:
            result["versions"] = peer.ask("versions", of=PEER_PACKAGES[row.peer_environment])
        wrong, result["checks"] = pairs.faults(row, ours.check(), peer.check())
        if wrong:
            return {**result, "faults": wrong}
        if is_decode:
            workers["reading"] = stack.enter_context(pairs.Worker("reading"))
            size = common.step_bytes(dtype=row.ours_arguments["dtype"])
            workers["reading"].build({"size": size})
        times = pairs.in_turn(workers, blocks)
    result |= pairs.compared(times)
    if is_decode:
        gigabytes_a_second = common.summary(size / 1e6 / np.array(times["reading"]))
        result["reading"] = {"bytes": size, "gb_a_second": gigabytes_a_second, "of": pairs.against_reading(times)}
    return {**result, "met": result["ratio"]["median"] >= row.target * (1 - row.noise), "samples": times}


LINE = "{:22} {:70} {:>9} {:>9} {:>7} {:>15} {:>6}  {}"


def print_row(row, result):
    if "ratio" not in result:
        (what,) = result.get("faults", [result.get("error", "")])[:1]
        print(LINE.format(row.name, row.what, "", "", "", "", row.target, f"WRONG: {what}"), flush=True)
        return
    ours, peer, ratio = (result[key] for key in ("ours", "peer", "ratio"))
    low, high = ratio["quartiles"]
    verdict = ("met" if result["met"] else "NOT MET") + pairs.disturbance(result["samples"]["others"])
    if "reading" in result:
        of = {side: found["median"] for side, found in result["reading"]["of"].items()}
        verdict += (
            f"; reading the weights, at {result['reading']['gb_a_second']['median']:.0f} GB/s, "
            f"takes {of['ours']:.0%} of ours and {of['peer']:.0%} of the peer's"
        )
    print(LINE.format(
        row.name, row.what, f"{ours['median']:.3f}", f"{peer['median']:.3f}", f"{ratio['median']:.2f}",
        f"{low:.2f} to {high:.2f}", row.target, verdict,
    ), flush=True)  # fmt: skip


def decode_table(rows):
    """Markdown: the rows of a decode that were timed and that nothing else disturbed."""
    lines = [
        "| row: ours / peer | ours, ms | peer, ms | ratio (quartiles) | reading, GB/s | of ours | of the peer's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "reading" not in row or pairs.disturbance(row["samples"]["others"]):
            continue
        what, ratio, reading = row["what"].removeprefix("generate, 125M shape, "), row["ratio"], row["reading"]
        low, high = ratio["quartiles"]
        ours, peer = (reading["of"][side]["median"] for side in ("ours", "peer"))
        lines.append(
            f"| {name}: {what} | {row['ours']['median']:,.0f} | {row['peer']['median']:,.0f} "
            f"| {ratio['median']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {reading['gb_a_second']['median']:.0f} | {ours:.0%} | {peer:.0%} |"
        )
    return "\n".join(lines)


def versions_line(versions):
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows and sections (default: all)")
    parser.add_argument("--blocks", type=int, default=pairs.BLOCKS, help="of each side of a row (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=common.FOLDER / "results", metavar="DIR")
    parser.add_argument("--add-to", type=pathlib.Path, metavar="FILE", help="results of this commit to add rows to")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="print decode rows as README.md has them")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    args = parser.parse_args()
    known = [row.name for row in ROWS] + list(SECTIONS)
    if args.list:
        print("\n".join(known))
        return 0
    if args.table:
        print(decode_table(json.loads(args.table.read_text())["rows"]))
        return 0
    names = [n for given in args.names for n in given.replace(",", " ").split()] or known
    decodes = [row.name for row in ROWS if row.law is None]
    names = [n for given in names for n in (decodes if given == "decode" else [given])]
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
    stem = args.out / started.strftime("%Y-%m-%d-%H%M%S")
    if args.add_to:
        stem, new, results = args.add_to.with_suffix(""), results, json.loads(args.add_to.read_text())
        for key in ("commit", "machine", "versions"):
            if results[key] != new[key]:
                parser.error(f"{args.add_to} has {key} {results[key]}; now {new[key]}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    failed = False

    def save():
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")

    machine = results["machine"]
    print(f"{machine['cpu']}, {' '.join(machine['extensions'])}, {common.CORES} cores; commit {results['commit']}")
    print(versions_line(results["versions"]))
    rows = [row for row in ROWS if row.name in names]
    if rows:
        print(LINE.format("row", "ours / peer", "ours, ms", "peer, ms", "ratio", "quartiles", "target", ""), flush=True)
    told = set()
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
        if "versions" in result and row.peer_environment not in told:
            told.add(row.peer_environment)
            print(f"  beside {versions_line(result['versions'])}", flush=True)
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

"""A section of run.py: time of one pass against vocabulary and against batch, ours and a peer's."""

import common
import pairs
from rows import BATCH, BATCHES, LARGEST_SLOPE, TENSORFLOW, TORCH, VOCABULARIES, WAYS

BLOCKS = 7
BLOCK_SECONDS = 0.05
LONGEST = 3000  # milliseconds a call: where a peer takes longer, it is not asked for larger sizes

AXES = {
    "vocab": [{"vocab": size, "batch": BATCH} for size in VOCABULARIES],
    "batch": [{"vocab": common.GPT2_VOCAB, "batch": size} for size in BATCHES],
}


def curve(ours, peer, way, axis):
    """{"sizes", "ours", "peer": medians, None where a peer was left out, "slope": of ours, "samples"}"""
    _, our_name, peer_name, arguments = way
    found = {"sizes": [], "ours": [], "peer": [], "samples": []}
    peer_is_asked = True
    for size in AXES[axis]:
        ours.build({"candidate": our_name, **size, **arguments})
        if peer_is_asked:
            peer.build({"candidate": peer_name, **size, **arguments})
        sides = {"ours": ours} | ({"peer": peer} if peer_is_asked else {})
        times = pairs.in_turn(sides, BLOCKS, seconds=0.2, block_seconds=BLOCK_SECONDS)
        medians = {side: common.summary(times[side])["median"] for side in sides}
        found["sizes"].append(size[axis])
        found["samples"].append(times)
        for side in ("ours", "peer"):
            found[side].append(medians.get(side))
        peer_is_asked = peer_is_asked and medians["peer"] < LONGEST
    found["slope"] = common.log_log_slope(found["sizes"], found["ours"])
    return found


def section(stem):
    line = "{:12} {:7} {:9} {:>7}  {}"
    print(line.format("way", "against", "from, to", "slope", "ms"))
    results = {}
    for way in WAYS:
        name, _, peer_name, _ = way
        module = TORCH if peer_name.startswith(("torch", "transformers")) else TENSORFLOW
        results[name] = {"peer": peer_name}
        with pairs.Worker(TENSORFLOW) as ours, pairs.Worker(module) as peer:
            for axis in AXES:
                found = results[name][axis] = curve(ours, peer, way, axis)
                others = pairs.disturbance(max(sample["others"] for sample in found["samples"]))
                met = "met" if found["slope"] <= LARGEST_SLOPE else f"NOT MET, at most {LARGEST_SLOPE}"
                sizes = f"{found['sizes'][0]:,} {found['sizes'][-1]:,}"
                for side, label in (("ours", name), ("peer", "")):
                    times = " ".join("-" if t is None else f"{t:.3g}" for t in found[side])
                    slope = f"{found['slope']:.2f}" if side == "ours" else "peer"
                    behind = f"  {met}{others}" if side == "ours" else f"  {peer_name}"
                    print(line.format(label, axis, sizes, slope, times + behind), flush=True)
    for axis in AXES:
        plot(results, axis, f"{stem}-{axis}.png")
    return results


def plot(results, axis, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plane = pyplot.subplots(figsize=(7, 5))
    for (name, found), colour in zip(results.items(), ("tab:blue", "tab:orange", "tab:green")):
        curve = found[axis]
        plane.loglog(curve["sizes"], curve["ours"], "o-", color=colour, label=f"{name} (slope {curve['slope']:.2f})")
        timed = [(size, t) for size, t in zip(curve["sizes"], curve["peer"]) if t is not None]
        plane.loglog(*zip(*timed), "x--", color=colour, alpha=0.6, label=found["peer"])
    fixed = f"batch {BATCH}" if axis == "vocab" else f"vocabulary {common.GPT2_VOCAB:,}"
    plane.set(xlabel="vocabulary" if axis == "vocab" else "batch", ylabel="milliseconds a draw of all rows",
              title=f"Sampling, {fixed}, float32, {common.CORES} cores")  # fmt: skip
    plane.grid(True, which="both", alpha=0.2)
    plane.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

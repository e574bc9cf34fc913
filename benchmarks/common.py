"""What the benchmarks share: the machine, memory, statistics, and the model that is timed."""

import datetime
import json
import os
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent
REPOSITORY = FOLDER.parent
TESTS = REPOSITORY / "tests"
CORES = 2  # both sides of a row are pinned to the same

GPT2_VOCAB = 50257
GPT_NEO_125M = dict(
    vocab_size=GPT2_VOCAB,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    attention_types=[[["global", "local"], 6]],
    window_size=256,
)


def use_tests():
    """Makes the tests' helpers importable: meshes, programs, the float64 reference."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))


# --- The machine ----------------------------------------------------------------------


def pin(cores=CORES):
    """Keeps this process, and those that it starts, to the first cores that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def peak_resident_bytes(pid="self"):
    """VmHWM of a process; ru_maxrss would give a parent's, where that was larger."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def anonymous_bytes():
    """What this process has written to and not given back, in memory or swapped out; not the pages of its files."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * sum(int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) for key in ("RssAnon", "VmSwap"))


EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that decide how fast a CPU multiplies matrices


def machine():
    """{"cpu": …, "extensions": those of `EXTENSIONS` that it has, "cores": …, "memory_gib": …}"""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    fields = dict(re.findall(r"^([^\t\n]+)\t*: (.*)$", text, re.M))
    cpu = fields.get("model name", "unknown")
    if "cpu family" in fields:  # a virtual machine's name says little
        cpu += f" (family {fields['cpu family']}, model {fields['model']})"
    return {
        "cpu": cpu,
        "extensions": [name for name in EXTENSIONS if name in fields.get("flags", "").split()],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def versions(packages):
    """{package: its version, or None where it is not installed}; nothing is imported."""
    import importlib.metadata as metadata

    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit():
    """The repository's commit, with "+" behind it where files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + "+" * bool(dirty)


def busy_seconds(pid=None):
    """CPU time that a process, or the whole machine with what its host took, has used so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    if pid is None:
        user, nice, system, _, _, irq, softirq, steal = pathlib.Path("/proc/stat").read_text().split()[1:9]
        return sum(map(int, (user, nice, system, irq, softirq, steal))) / ticks
    user, system = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / ticks


def save(folder, name, results, path=None):
    """Writes a benchmark's results, with the machine and the commit, to `path`, by default DATE-name.json in a folder.

    Returns the path, to write to it again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now()
    results = {
        "finished": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(["tensorflow", "mesh-tensorflow", "numpy"]),
        **results,
    }
    path = path or folder / f"{now:%Y-%m-%d-%H%M%S}-{name}.json"
    path.write_text(json.dumps(results) + "\n")
    print(path, file=sys.stderr)
    return path


def child_json(script, *arguments):
    """What a script of this folder prints, an object, in a fresh process."""
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), TF_CPP_MIN_LOG_LEVEL="2")
    command = [sys.executable, str(FOLDER / script), *arguments]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)}: {child.stderr[-2000:]}")
    return json.loads(child.stdout)


# --- Statistics -----------------------------------------------------------------------


def summary(values):
    """{"median": …, "quartiles": [lower, upper]}"""
    lower, median, upper = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "quartiles": [float(lower), float(upper)]}


def log_log_slope(sizes, times):
    """The exponent of growth: the slope of a straight line through log time against log size."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def rise(values, blocks=8, confidence=0.99):
    """(what a straight line through values at even distances rises from the first to the last, half of the interval).

    The line is that of the means of blocks, which scatter more independently of each other than values do.
    """
    from scipy import stats

    means = np.array([part.mean() for part in np.array_split(np.asarray(values, float), blocks)])
    x = (np.arange(blocks) - (blocks - 1) / 2) / blocks
    slope = x @ means / (x @ x)
    left_over = means - means.mean() - slope * x
    error = np.sqrt(left_over @ left_over / (blocks - 2) / (x @ x))  # 0 where nothing changes
    return float(slope), float(error * stats.t.ppf(0.5 + confidence / 2, blocks - 2))


def chi_square(counts, probabilities, least=50):
    """p-value of counts; neighbouring entries are pooled until they have `least` expected draws.

    0 where an entry of probability 0 was drawn. What bins of few draws add to the statistic's variance is counted
    (Haldane 1937), by a chi-square distribution of the same mean and variance.
    """
    from scipy import stats

    counts, probabilities = np.asarray(counts), np.asarray(probabilities)
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    counts, expected = counts[expected > 0], expected[expected > 0]
    begins, held = [0], 0.0
    for at, entry in enumerate(expected.tolist()):
        if held >= least:
            begins.append(at)
            held = 0.0
        held += entry
    if held < least and len(begins) > 1:  # the last have too few: they go with those before them
        begins.pop()
    observed, expected = np.add.reduceat(counts, begins), np.add.reduceat(expected, begins)
    k, n = len(begins), expected.sum()
    if k == 1:
        return 1.0
    variance = 2 * (k - 1) + (1 / expected).sum() - (k * k + 2 * k - 2) / n
    scale = variance / (2 * (k - 1))
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum() / scale, (k - 1) / scale))


# --- The model that is timed ------------------------------------------------------------

PROMPT, NEW_TOKENS = 32, 64  # of a row of a decode


def model_folder(n_ctx=2048):
    """A Hugging Face GPT-Neo of 125M's shape with random weights, made once, outside the repository."""
    cache = os.environ.get("GPT_NEO_BENCH_CACHE")
    if not cache:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gpt-neo-bench")
    folder = pathlib.Path(cache) / f"gpt-neo-125m-{n_ctx}"
    if not (folder / "model.safetensors").exists():
        print(f"making a model of random weights in {folder}", file=sys.stderr)
        # in a process of its own: PyTorch stays out of this one
        code = """
import json, sys, torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM
shape, n_ctx, folder = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def model(n_ctx):
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(**shape, max_position_embeddings=n_ctx))
longest, made = model(2048), model(n_ctx)
with torch.no_grad():  # the same weights for any context: models of two contexts give the same tokens
    for ours, theirs in zip(made.parameters(), longest.parameters()):
        ours.copy_(theirs[: len(ours)])
made.save_pretrained(folder)
"""
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(GPT_NEO_125M), str(n_ctx), str(folder)],
            check=True,
            stdout=sys.stderr,
        )
    return folder


def tensor_bytes(folder):
    """{tensor: bytes} of a folder's safetensors file, by its header."""
    with open(folder / "model.safetensors", "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return {name: end - begin for name, (begin, end) in offsets.items()}


def step_bytes(n_ctx=2048, dtype="float32"):
    """What a decode step has to read of the weights: all but the table of positions, of which it takes a row."""
    held = tensor_bytes(model_folder(n_ctx))
    return sum(size for name, size in held.items() if "wpe" not in name) * {"float32": 4, "bfloat16": 2}[dtype] // 4


def prompts(batch, length=PROMPT, seed=0):
    """`batch` prompts of `length` random ids."""
    ids = np.random.default_rng(seed).integers(0, GPT2_VOCAB - 1, (batch, length))
    return [[int(i) for i in row] for row in ids]

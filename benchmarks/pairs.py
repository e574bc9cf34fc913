"""Two processes, timed in turn: A B A B."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import common
import laws
import numpy as np

BLOCKS = 15  # of each side, after warm-up
BLOCK_SECONDS = 0.15  # a block is at least as long, of as many calls as that takes
WARM_UP_SECONDS = 1.0
DISTURBING = 0.05  # share of the cores that others take


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message is its traceback."""


def python_of(environment):
    """The Python of `.venv-bench-ENVIRONMENT`, which `make` brings about where it is missing; "": this one."""
    if not environment:
        return sys.executable
    folder = f".venv-bench-{environment}"
    made = subprocess.run(["make", "-s", f"{folder}/peer.installed"], cwd=common.REPOSITORY, stdout=sys.stderr)
    if made.returncode:
        raise WorkerError(f"{folder} could not be made")
    return str(common.REPOSITORY / folder / "bin" / "python")


class Worker:
    """A process of `worker.py`, a context manager; `environment` as `python_of` takes it."""

    def __init__(self, module, environment=""):
        threads = {name: str(common.CORES) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join(filter(None, [str(common.REPOSITORY), os.environ.get("PYTHONPATH")]))
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [python_of(environment), str(common.FOLDER / "worker.py"), module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, **threads, **quiet, "PYTHONPATH": path},
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    @property
    def pid(self):
        return self._process.pid

    def ask(self, do, **request):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise WorkerError(f"the process ended: …{self._log.read()[-2000:].decode(errors='replace')}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def build(self, spec):
        self.ask("build", spec=spec)

    def check(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "check.npz")
            self.ask("check", file=path)
            with np.load(path) as arrays:
                return dict(arrays)

    def time(self, calls=1):
        """Milliseconds of one call."""
        return self.ask("time", calls=calls)["milliseconds"]

    def warm_up(self, seconds=WARM_UP_SECONDS, block_seconds=BLOCK_SECONDS):
        """Calls of a block, once the time of one has settled."""
        self.time()  # the first one is slow
        one = self.time()
        if one < 1000 * seconds:
            one = self.time(min(math.ceil(1000 * seconds / one), 10_000))
        return max(1, math.ceil(1000 * block_seconds / one))


def in_turn(workers, blocks=BLOCKS, **warm_up):
    """Milliseconds of each block of workers {side: Worker}.

    Returns:
      {side: list}, and "calls": {side: calls of a block}, and "others": the share
      of the cores that processes other than the one being timed took, idle sides
      whose threads spin among them.
    """
    calls = {side: worker.warm_up(**warm_up) for side, worker in workers.items()}
    times = {side: [] for side in workers}
    began, others = time.time(), 0.0
    for _ in range(blocks):
        for side, worker in workers.items():
            others -= _others(worker)
            times[side].append(worker.time(calls[side]))
            others += _others(worker)
    others /= (time.time() - began) * os.cpu_count()
    return {**times, "calls": calls, "others": max(0.0, others)}


def _others(worker):
    """CPU seconds of all processes but this one so far."""
    return common.busy_seconds() - common.busy_seconds(worker.pid)


def disturbance(others):
    """A remark where other processes used enough of the cores to spoil the times."""
    return f" (others took {others:.0%} of the CPU)" if others > DISTURBING else ""


def against_reading(times):
    """What reading all weights once for each token takes, of each side's time; times has a side "reading" too."""
    reading = common.NEW_TOKENS * np.array(times["reading"])
    return {side: common.summary(reading / np.array(times[side])) for side in ("ours", "peer")}


def compared(times):
    """The summaries of both sides' times and of the ratios of the pairs, peer's over ours."""
    ratios = np.array(times["peer"]) / np.array(times["ours"])
    return {
        "ours": common.summary(times["ours"]),
        "peer": common.summary(times["peer"]),
        "ratio": common.summary(ratios),
    }


# --- Checks before timing ---------------------------------------------------------------


# Of a decode row, of logits of spread 0.5: between two sides in float32, and between a side's bfloat16 and its float32.
LARGEST_LOGIT_ERROR, LARGEST_ROUNDING = 1e-4, 0.1


def faults(row, ours, peer):
    """Whether the two sides' checks agree with the row's law, or with each other.

    Returns:
      a list of sentences, empty if they do, and a dict of what was found: p-values, errors.
    """
    wrong, found = [], {}

    def expect(is_right, name, value, sentence):
        found[name] = float(value)
        if not is_right:
            wrong.append(f"{sentence} ({name} {value:.2g})")

    def expect_draws(side, name, counts, p):
        for binned, value in laws.chi_squares(counts, p).items():
            expect(value > laws.FALSE_ALARM, f"{side}, {name}: p {binned}", value, f"{side} is not drawn from the law")

    sides = (("ours", ours), ("peer", peer))
    if row.law is None:
        error = np.abs(ours["float32_logits"] - peer["float32_logits"]).max()
        expect(error <= LARGEST_LOGIT_ERROR, "logits: largest difference", error, "the logits differ")
        rounds = any((check["logits"] != check["float32_logits"]).any() for _, check in sides)
        differing = (ours["greedy"] != peer["greedy"]).sum()
        expect(rounds or differing == 0, "greedy: differing tokens", differing, "the greedy tokens differ")
        for side, check in sides:
            if rounds:
                error = np.abs(check["logits"] - check["float32_logits"]).max()
                name = f"{side}, logits: largest difference from its float32"
                expect(error <= LARGEST_ROUNDING, name, error, f"{side}'s logits are not its float32's")
            p = laws.law(check["logits"], **{**row.drawn, "top_k": int(check["kept"])})
            expect_draws(side, "first tokens", check["draws"], p)
        return wrong, found
    small, large = (laws.law(laws.base_logits(n), **row.law) for n in (laws.SMALL_VOCAB, row.vocab))
    for side, check in sides:
        if "distribution" in check:
            error = np.abs(check["distribution"] - large).max()
            expect(error <= laws.LARGEST_ERROR, f"{side}: largest error", error, f"{side} is not the distribution")
            continue
        expect_draws(side, f"V={laws.SMALL_VOCAB}", check["small_draws"], small)
        expect_draws(side, f"V={row.vocab}", check["draws"], large)
    return wrong, found

"""The benchmarks' harness: its processes, its checks and its statistics, on rows of this file's own."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import common
import pairs
from rows import ROWS, Row

CANDIDATES = """
import time, laws, numpy as np

class Program:
    gives_distribution = False

    def __init__(self, name, batch, vocab, arguments):
        p = laws.law(laws.logits(batch, vocab), **arguments)
        p[:] = {"right": p, "wrong shape": p**0.95, "drift": p * np.linspace(0.9, 1.1, vocab)}[name]
        self._sums, self._rng = (p / p.sum(1, keepdims=True)).cumsum(1), np.random.default_rng(0)

    def run(self):
        print("what a library prints is no answer")
        u = self._rng.random((len(self._sums), 1))
        return np.minimum((self._sums < u).sum(1), self._sums.shape[1] - 1)

class Sleeper:
    def __init__(self, milliseconds):
        self.run = lambda: time.sleep(milliseconds / 1000)

def make(spec):
    if spec["candidate"] == "fails":
        raise ValueError("no such thing")
    return Sleeper(spec["milliseconds"]) if spec["candidate"] == "sleeper" else laws.Sampler(Program, **spec)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "trivial_candidates.py").write_text(CANDIDATES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "trivial_candidates"


@pytest.mark.parametrize("peer, is_right", [("right", True), ("wrong shape", False), ("drift", False)])
def test_a_wrong_peer_is_found_before_it_is_timed(module, peer, is_right):
    law = {"temperature": 0.9, "top_k": 40}
    row = Row("trivial", "", "right", peer, 1.0, law, vocab=200, law=law)
    with pairs.Worker(module) as ours, pairs.Worker(module) as theirs:
        for worker, spec in zip((ours, theirs), row.specs()):
            worker.build(spec)
        wrong, found = pairs.faults(row, ours.check(), theirs.check())
    assert (wrong == []) == is_right
    assert len(found) == 8 and all("peer" in sentence for sentence in wrong)


def test_ratio_of_two_that_sleep(module):
    with pairs.Worker(module) as ours, pairs.Worker(module) as peer:
        for worker, milliseconds in ((ours, 2), (peer, 8)):
            worker.build({"candidate": "sleeper", "milliseconds": milliseconds})
        times = pairs.in_turn({"ours": ours, "peer": peer}, 5, seconds=0.02, block_seconds=0.01)
    assert len(times["ours"]) == len(times["peer"]) == 5
    assert 2 < pairs.compared(times)["ratio"]["median"] < 5
    assert times["calls"]["ours"] >= times["calls"]["peer"]


def test_a_worker_that_fails_says_why_and_lives(module):
    with pairs.Worker(module) as worker:
        with pytest.raises(pairs.WorkerError, match="no such thing"):
            worker.build({"candidate": "fails"})
        worker.build({"candidate": "sleeper", "milliseconds": 1})
        assert worker.time(3) >= 1
    with pairs.Worker("no_such_module") as worker, pytest.raises(pairs.WorkerError, match="no_such_module"):
        worker.build({})


def test_statistics():
    sizes = np.array([1024, 4096, 16384])
    assert common.log_log_slope(sizes, 3e-6 * sizes**1.5) == pytest.approx(1.5)
    assert common.summary([1, 2, 3, 4, 5]) == {"median": 3, "quartiles": [2, 4]}
    assert common.peak_resident_bytes() > 2**20
    p = np.array([0.5, 0.25, 0.25, 0])
    assert common.chi_square([500, 250, 250, 0], p) > 0.9
    assert common.chi_square([300, 350, 350, 0], p) < 1e-9
    assert common.chi_square([500, 250, 249, 1], p) == 0


def test_every_row_has_a_name_of_its_own():
    assert len({row.name for row in ROWS}) == len(ROWS)

"""The benchmarks' harness: its processes, checks and statistics, on rows defined here."""

import multiprocessing
import pathlib
import sys

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import common
import laws
import long_run
import pairs
import support_table
import tail_draws
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


def test_a_decode_that_rounds_is_compared_with_its_own_float32():
    row = next(row for row in ROWS if row.name == "decode-1")
    rng = np.random.default_rng(0)
    logits = laws.base_logits(common.GPT2_VOCAB) / 5

    def is_right(error=0.0, token=0, float32_error=0.0):
        sides = []
        for own, first in ((logits, 0), (logits + np.float32(error) * np.sign(rng.normal(size=logits.shape)), token)):
            draws = rng.multinomial(512, laws.law(own, **row.drawn))
            side = {"logits": own, "float32_logits": logits, "draws": draws, "kept": 40, "greedy": np.array([[first]])}
            sides.append(side)
        sides[1]["float32_logits"] = sides[1]["float32_logits"] + np.float32(float32_error)
        return pairs.faults(row, *sides)[0] == []

    assert is_right() and is_right(error=0.05, token=1)
    assert not is_right(token=1) and not is_right(error=0.2) and not is_right(error=0.05, float32_error=1e-3)


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
    assert common.chi_square([999, 1], [1 - 1e-9, 1e-9]) == 1  # too rare for a bin of its own
    rng, p = np.random.default_rng(1), np.array([0.5] + [0.5 / 4000] * 4000)
    found = [common.chi_square(rng.multinomial(44_000, p), p, least=5) for _ in range(200)]
    assert stats.kstest(found, "uniform").pvalue > 1e-4


def test_rise():
    rng = np.random.default_rng(0)
    assert common.rise([7] * 40) == pytest.approx((0, 0), abs=1e-12)
    rise, error = common.rise(np.arange(40))
    assert rise == pytest.approx(40) and error < 1e-6
    found = [common.rise(np.linspace(0, 5, 80) + rng.normal(size=80)) for _ in range(300)]
    assert 0.95 < np.mean([abs(rise - 5) < error for rise, error in found]) < 1
    allowed = long_run.ALLOWED["objects"]
    wobble = 500_000 + rng.integers(0, 50, 40)
    assert not long_run.growth([900_000] * 8 + [*wobble[8:]], allowed)["grows"]
    assert long_run.growth([*(wobble + 100 * np.arange(40))], allowed)["grows"]  # an object in two calls, say
    assert long_run.growth([*(500_000 + rng.integers(0, 50_000, 40))], allowed)["grows"]  # cannot tell


def rounds():
    generator = long_run.TextGenerator.from_pretrained()
    return long_run.call_rounds(generator, 10, 10, [], fresh=0, lasting=3)


@pytest.mark.slow
def test_nothing_grows_in_100_calls():
    """A tenth of them end with errors, in a graph and before it; then a file."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # where there are no other tests' objects
        samples = pool.apply(rounds)
    for what, allowed in long_run.ALLOWED.items():
        found = long_run.growth([s[what] for s in samples], (0.1, 0) if what == "memory" else allowed)
        assert not found["grows"], (what, found)
    samples, written = long_run.file_job(1300, every=1)
    assert (len(samples), written) == (1, 1344)


def test_tail_draws():
    """Counts of a right sampler pass; those of one whose tail is 5% too likely and of a one-level draw do not."""
    p, rng = tail_draws.law("float32", 1.0), np.random.default_rng(0)
    assert tail_draws.verdict(rng.multinomial(10**8, p), p)["right"]
    for biased in (np.where(p < 2e-7, 1.05 * p, p), np.where(np.arange(len(p)) % 20000 == 19999, 9 * p, p)):
        found = tail_draws.verdict(rng.multinomial(10**8, biased / biased.sum()), p)
        assert not found["right"]
    assert found["outside"] and found["tail_p"] > 1e-3
    original = tail_draws.Original(p)
    found = tail_draws.verdict(tail_draws.count(original, 10**7), p)
    assert not found["right"] and found["chi_square_p"] < 1e-9
    assert 10_000 < (~original.reachable()).sum() < len(p)


TAIL = [("float32", 1.0, 1), pytest.param("bfloat16", 1.0, 4, marks=pytest.mark.slow), ("bfloat16", 1.05, 1)]


@pytest.mark.parametrize("dtype, alpha, shards", TAIL)
def test_the_tail_is_drawn_as_often_as_it_should(dtype, alpha, shards):
    draw = tail_draws.Library(dtype, alpha, shards, samples=2**17)
    found = tail_draws.verdict(tail_draws.count(draw, 3_000_000), tail_draws.law(dtype, alpha))
    assert found["right"] and found["tail_expected"] > (2000 if alpha == 1 else 50), found


def test_every_row_has_a_name_of_its_own():
    assert len({row.name for row in ROWS}) == len(ROWS)


# --- The support table ------------------------------------------------------------------------


def test_the_support_tables_tests_are_there():
    tests = pathlib.Path(__file__).parent
    for name in support_table.TESTS:
        file, _, function = name.partition("::")
        text = (tests.parent / file).read_text(encoding="utf-8")
        assert not function or f"\ndef {function.partition('[')[0]}(" in text, name


def test_a_cell_of_the_support_table(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "@pytest.mark.skip(reason='no Estimator')\n"
        "def test_left_out(): pass\n"
        "def test_wrong(): raise TypeError('got an unexpected keyword')\n"
    )
    monkeypatch.setattr(support_table, "TESTS", ["test_some.py"])
    cell = support_table.tested(sys.executable, tmp_path, tmp_path, "cell", [])
    counts = {name: cell[name] for name in ("passed", "failed", "skipped")}
    assert counts == {"passed": 1, "failed": 1, "skipped": 1} and cell["why_skipped"] == ["no Estimator"]
    assert cell["error"] == "test_wrong: TypeError: got an unexpected keyword"
    assert "1 failed, 1 passed, 1 skipped" in (tmp_path / "cell.log").read_text()
    monkeypatch.setattr(support_table, "TESTS", ["no_such_test.py"])
    assert "no_such_test.py" in support_table.tested(sys.executable, tmp_path, tmp_path, "none", [])["error"]


def test_the_support_table():
    versions = {"python": "3.11.7", "tensorflow": "2.12.1", "numpy": "1.24.3", "protobuf": "4.25.9"}
    right = {"versions": versions, "passed": 9, "failed": 0, "skipped": 1, "seconds": 70}
    wrong = {**right, "failed": 1, "skipped": 0, "error": "test_x: TypeError"}
    no_such = {"not_installed": "ERROR: No such thing (from versions: 2.16)"}
    places = [("3.11", "0.1.21", wrong), ("3.11", "0.1.18", right), ("3.9", "0.1.18", no_such)]
    cells = [{"python": p, "tensorflow": "2.12", "mesh-tensorflow": m, **cell} for p, m, cell in places]
    assert [line.strip("| ").split(" | ") for line in support_table.table(cells).splitlines()] == [
        ["Python", "TensorFlow", "NumPy", "protobuf", "mesh-tensorflow 0.1.18", "mesh-tensorflow 0.1.21"],
        ["---"] * 6,
        ["3.9", "2.12", "", "", "pip: No such thing", "not run"],
        [*versions.values(), "9 passed, 1 skipped (70 s)", "9 passed, 1 failed: **test_x: TypeError**"],
    ]

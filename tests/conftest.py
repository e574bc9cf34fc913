"""pytest's configuration: paths, hypothesis' profiles, faster graph building, the tables after a run."""

import gc
import os
import pathlib
import signal
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
# on a slow machine progress bars would appear in compared output; the environment also reaches child processes
os.environ["TQDM_DISABLE"] = "1"

from programs import ONE_DEVICE

# a shell's background jobs ignore Ctrl-C, and so would their children
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = pathlib.Path(__file__).parent
DATA = TESTS / "data"
# some tests import helpers from another room's tests
sys.path += sorted({str(test.parent) for test in TESTS.glob("*/test_*.py")})


@pytest.fixture
def single():
    return ONE_DEVICE


def pytest_configure():
    build_graphs_faster()
    set_profiles_of_hypothesis()


def build_graphs_faster():
    """Most of the suite's time goes into making the nodes of TensorFlow's graphs. Collecting garbage among so many
    objects, and recording where each node was made, would take another tenth each."""
    from tensorflow.python.util import tf_stack

    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    one_place = tf_stack.extract_stack()
    tf_stack.extract_stack = lambda stacklevel=1: one_place


def set_profiles_of_hypothesis():
    """The same examples in every run; with HYPOTHESIS_PROFILE=fuzz, new ones each time."""
    from hypothesis import HealthCheck, Phase, settings  # here, as benchmarks use this file without hypothesis

    shared = dict(
        deadline=None,
        phases=set(Phase) - {Phase.explain},
        suppress_health_check=[HealthCheck.too_slow],  # the first example builds a graph
    )
    examples = int(os.environ.get("FUZZ_EXAMPLES", "500"))
    settings.register_profile("ci", derandomize=True, max_examples=30, **shared)
    settings.register_profile("fuzz", print_blob=True, max_examples=examples, **shared)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_terminal_summary(terminalreporter):
    """Prints the largest error of golden logits, and the table of test_matrix.py, which has a line for each mesh
    implementation, mesh shape, layout and way of sampling."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    errors, cells = (
        [value for r in reports for name, value in r.user_properties if name == wanted]
        for wanted in ("golden logits", "cell")
    )
    if errors:
        terminalreporter.section("logits against the golden checkpoints'")
        terminalreporter.write_line(f"{len(errors)} checkpoints, largest error {max(errors):.1e}")
    if cells:
        terminalreporter.section("tokens against one CPU device")
        rows = [("mesh", "shape", "layout", "sampling", "tokens"), *sorted(map(tuple, cells))]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for row in rows:
            terminalreporter.write_line("  ".join(text.ljust(w) for text, w in zip(row, widths)).rstrip())
        terminalreporter.write_line(f"{len(cells)} cells, {sum(c[-1] == 'equal' for c in cells)} equal")

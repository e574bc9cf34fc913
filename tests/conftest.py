"""What the tests share: running mtf graphs on CPU meshes, and the data folder."""

import os
import pathlib
import signal
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
# On a slow machine a bar would stand among what is compared, in the processes that tests start too.
os.environ["TQDM_DISABLE"] = "1"

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, tf

# A shell has what it runs in the background ignore Ctrl-C, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = pathlib.Path(__file__).parent / "data"
DEVICES = 8


class MeshRunner:
    """Builds an mtf graph on a mesh and runs it.

    mesh_shape and layout are mtf strings such as "x:2,y:2" and "batch:x,vocab:y";
    every processor is a virtual CPU device of its own.
    """

    def __init__(self, mesh_shape="", layout=""):
        self.mesh_shape, self.layout = mesh_shape, layout
        self.impl = PlacementMeshImpl(mesh_shape, layout, self.devices())

    def devices(self):
        size = mtf.convert_to_shape(self.mesh_shape).size
        return [""] if size == 1 else [f"cpu:{i}" for i in range(size)]

    def __call__(self, build, *arrays, times=None):
        """Values of the mtf tensors that build(mesh, *placeholders) returns.

        With `times`, the same session runs the graph that often: a list of results.
        """
        with tf.Graph().as_default():
            mesh = mtf.Mesh(mtf.Graph(), "mesh")
            holders = [tf.placeholder(tf.as_dtype(a.dtype), a.shape) for a in map(np.asarray, arrays)]
            out = build(mesh, *holders)
            single = isinstance(out, mtf.Tensor)
            outs = [out] if single else list(out)
            lowering = mtf.Lowering(mesh.graph, {mesh: self.impl}, autostack=False)
            fetches = [lowering.export_to_tf_tensor(o) for o in outs]
            config = tf.ConfigProto(device_count={"CPU": DEVICES}, inter_op_parallelism_threads=2)
            with tf.Session(config=config) as session:
                session.run(tf.global_variables_initializer())
                session.run(lowering.copy_masters_to_slices())
                feed = dict(zip(holders, arrays))
                results = [session.run(fetches, feed) for _ in range(times or 1)]
        results = [r[0] if single else r for r in results]
        return results if times else results[0]

    def __repr__(self):
        return f"{self.mesh_shape or 'one device'} {self.layout}"


def dims(**sizes):
    """mtf.Dimensions by name, in order."""
    return [mtf.Dimension(name, size) for name, size in sizes.items()]


@pytest.fixture
def single():
    return MeshRunner()


def pytest_configure():
    """Profiles of hypothesis: the same examples in every run; others each time with HYPOTHESIS_PROFILE=fuzz."""
    from hypothesis import HealthCheck, Phase, settings  # which the benchmarks, that use this file too, do without

    shared = dict(
        deadline=None,
        phases=set(Phase) - {Phase.explain},
        suppress_health_check=[HealthCheck.too_slow],  # the first example builds a graph
    )
    examples = int(os.environ.get("FUZZ_EXAMPLES", "500"))
    settings.register_profile("ci", derandomize=True, max_examples=40, **shared)
    settings.register_profile("fuzz", print_blob=True, max_examples=examples, **shared)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_terminal_summary(terminalreporter):
    """What README.md gives figures of: the largest error of golden logits, and the table of test_matrix.py.

    The table has a line for each mesh implementation, mesh shape, layout and way of sampling.
    """
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

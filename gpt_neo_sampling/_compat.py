"""TensorFlow and mesh-tensorflow, imported so that they work together.

The one file that knows their private names. Everything else takes `tf` (the
`tensorflow.compat.v1` API, used only to build graphs) and `mtf` from here.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import tempfile
import threading
import types
from collections.abc import Iterator

import numpy as np

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keeps TensorFlow's C++ start-up lines off file descriptor 2.

    They are written below Python, some before any log level is read. What was
    held back is shown after all if the body raises. One thread at a time: the
    descriptor is the whole process's.
    """
    with _stderr_lock:
        yield from _quiet_stderr()


_stderr_lock = threading.RLock()


def _quiet_stderr() -> Iterator[None]:
    try:
        sys.stderr.flush()
        held = tempfile.TemporaryFile()
    except (OSError, AttributeError, ValueError):  # no stderr to speak of, or no place to hold it
        yield
        return
    with held:
        try:
            saved = os.dup(2)
        except OSError:
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _import_tensorflow() -> types.ModuleType:
    if "tensorflow" in sys.modules:  # its chatter, if any, is history
        import tensorflow

        return tensorflow
    # The level is read while TensorFlow loads; the caller's own setting wins,
    # and the environment is left as it was found.
    level = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "2")
    try:
        with quiet_stderr() if level is None else contextlib.nullcontext():
            import tensorflow
    finally:
        if level is None:
            del os.environ[_LOG_LEVEL]
    return tensorflow


@contextlib.contextmanager
def _names_that_mtf_imports() -> Iterator[None]:
    """Puts back, for the time of one import, what mesh-tensorflow looks for.

    `tensorflow.compat.v1.estimator` is gone since TensorFlow 2.16, and
    `ops.register_tensor_conversion_function` has moved since 2.13. And gin takes
    names again that a bare import registered before it failed.
    """
    import tensorflow.compat.v1 as tf1
    from gin import config as gin
    from tensorflow.python.framework import ops
    from tensorflow.python.training import basic_session_run_hooks

    added = []
    if not hasattr(tf1, "estimator"):
        tf1.estimator = types.SimpleNamespace(
            SessionRunHook=tf1.train.SessionRunHook,
            CheckpointSaverListener=basic_session_run_hooks.CheckpointSaverListener,
        )
        added.append((tf1, "estimator"))
    if not hasattr(ops, "register_tensor_conversion_function"):
        from tensorflow.python.framework import tensor_conversion_registry as registry

        ops.register_tensor_conversion_function = registry.register_tensor_conversion_function
        added.append((ops, "register_tensor_conversion_function"))
    mode, gin._INTERACTIVE_MODE = gin._INTERACTIVE_MODE, True
    try:
        yield
    finally:
        gin._INTERACTIVE_MODE = mode
        for module, name in added:
            delattr(module, name)


def _import_mesh_tensorflow() -> None:
    if "mesh_tensorflow" in sys.modules:
        return
    if importlib.util.find_spec("mesh_tensorflow") is None:
        raise ImportError("gpt_neo_sampling needs mesh-tensorflow: pip install mesh-tensorflow")
    # modules that a failed import has left would not become attributes of the package
    for name in [name for name in sys.modules if name.startswith("mesh_tensorflow.")]:
        del sys.modules[name]
    with _names_that_mtf_imports():
        import mesh_tensorflow  # noqa: F401


tensorflow = _import_tensorflow()
_import_mesh_tensorflow()

import mesh_tensorflow as mtf  # noqa: E402
import tensorflow.compat.v1 as tf  # noqa: E402
from tensorflow.python.framework.func_graph import FuncGraph  # noqa: E402
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph  # noqa: E402

# mesh-tensorflow's private names that the library stands on.
LazyAllreduceSum = mtf.ops.LazyAllreduceSum
PlacementMeshImpl = mtf.placement_mesh_impl.PlacementMeshImpl


def layout_pairs(layout: mtf.LayoutRules) -> list[tuple[str, str]]:
    """(dim, mesh axis) of each rule."""
    return sorted(layout._pairs)


def static_value(x: mtf.Tensor) -> np.ndarray | None:
    """What a tensor holds, an ndarray of its shape, where it is a constant that was made or imported; else None."""
    value = None
    if isinstance(x.operation, mtf.ops.Constant):
        value = x.operation._value
    elif isinstance(x.operation, mtf.ops.ImportOperation):
        value = tensorflow.get_static_value(x.operation._tf_tensor)
    return None if value is None else np.broadcast_to(value, x.shape.to_integer_list)


def is_in_function() -> bool:
    """Whether the graph that is being built is a tf.function's, or lies in one."""
    graph = tf.get_default_graph()
    while isinstance(graph, FuncGraph):
        if not isinstance(graph, ControlFlowFuncGraph):  # a loop's body, or a branch
            return True
        graph = graph.outer_graph
    return False


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Holds back TensorFlow's Python warnings (deprecations that mtf causes), in any number of threads at once."""
    global _n_quiet, _level
    logger = tf.get_logger()
    with _logging_lock:
        if _n_quiet == 0:
            _level = logger.level
            logger.setLevel("ERROR")
        _n_quiet += 1
    try:
        yield
    finally:
        with _logging_lock:
            _n_quiet -= 1
            if _n_quiet == 0:
                logger.setLevel(_level)


_logging_lock, _n_quiet, _level = threading.Lock(), 0, 0


def extend_when_told(session: tf.Session) -> None:
    """Has a session see new nodes of its graph at `extend_session` alone, not at each run: by then another thread may
    have made half of a loop, and a node that a session has seen cannot be changed any more."""
    session._extend_graph = lambda: None


def extend_session(session: tf.Session) -> None:
    """Has a session see all of its graph."""
    type(session)._extend_graph(session)


def probe_devices() -> None:
    """Has TensorFlow look for its devices, once; raises RuntimeError as `check_not_forked`."""
    check_not_forked()
    _probe_once()


@functools.cache
def _probe_once() -> None:
    """Has TensorFlow look for its devices and run a first graph, which it does once and not in silence."""
    os.register_at_fork(after_in_child=_note_fork)
    with quiet_stderr(), tf.Graph().as_default():
        tensorflow.config.list_physical_devices()
        with tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as session:
            session.run(tf.no_op())  # 2.18 reports a pass that is off, at any log level


_is_fork = False


def _note_fork() -> None:
    global _is_fork
    _is_fork = True


def check_not_forked() -> None:
    """Raises RuntimeError in a process that was forked from one that had used TensorFlow, which would hang in it."""
    if _is_fork:
        raise RuntimeError(
            "this process was forked from one that had used TensorFlow, which hangs in such a process; start it with "
            'multiprocessing.get_context("spawn"), or use the library in the new processes alone'
        )

"""TensorFlow and mesh-tensorflow, imported so that they work together, and not before they are needed.

This is the only file that uses their private names. Everything else imports `tf`
(the `tensorflow.compat.v1` API, used only to build graphs) and `mtf` from here. Both are imported when a name of
theirs is first used, as TensorFlow takes seconds: a module that a wrong argument is found with does without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpt_neo_sampling._install import install_line

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keeps TensorFlow's C++ start-up lines off file descriptor 2.

    They are written below Python, some before any log level is read. They are
    shown after all if the body raises anything but KeyboardInterrupt. Only one thread can be inside at a time,
    as the descriptor belongs to the whole process.
    """
    with _stderr_lock, contextlib.ExitStack() as stack:
        try:
            sys.stderr.flush()
            held = stack.enter_context(tempfile.TemporaryFile())
            saved = os.dup(2)
        except (OSError, AttributeError, ValueError):  # no stderr, or no room for a temporary file
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


_stderr_lock = threading.RLock()


def _import_tensorflow() -> types.ModuleType:
    if "tensorflow" in sys.modules:  # it has printed its lines already
        import tensorflow

        return tensorflow
    # TensorFlow reads the level while it loads. The caller's own setting wins,
    # and the environment is restored.
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
    """Restores, during one import, the names that mesh-tensorflow needs.

    `tensorflow.compat.v1.estimator` was removed in TensorFlow 2.16, and
    `ops.register_tensor_conversion_function` moved in 2.13. gin is told to accept
    names that an earlier, failed import registered already.
    """
    import tensorflow.compat.v1 as tf1
    from gin import config as gin
    from tensorflow.python.framework import ops
    from tensorflow.python.training import basic_session_run_hooks

    with contextlib.ExitStack() as restored:
        if not hasattr(tf1, "estimator"):
            tf1.estimator = types.SimpleNamespace(
                SessionRunHook=tf1.train.SessionRunHook,
                CheckpointSaverListener=basic_session_run_hooks.CheckpointSaverListener,
            )
            restored.callback(delattr, tf1, "estimator")
        if not hasattr(ops, "register_tensor_conversion_function"):
            from tensorflow.python.framework import tensor_conversion_registry as registry

            ops.register_tensor_conversion_function = registry.register_tensor_conversion_function
            restored.callback(delattr, ops, "register_tensor_conversion_function")
        restored.callback(setattr, gin, "_INTERACTIVE_MODE", gin._INTERACTIVE_MODE)
        gin._INTERACTIVE_MODE = True
        yield


class _MeshTensorflowFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports mesh-tensorflow, whoever asks for it, with the names that it needs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "mesh_tensorflow":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        assert self._loader is not None and module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader  # which has more methods
        _import_tensorflow()
        # modules left by a failed import would not become attributes of the package
        for name in [name for name in sys.modules if name.startswith("mesh_tensorflow.")]:
            del sys.modules[name]
        with _names_that_mtf_imports():
            self._loader.exec_module(module)


def _import_mesh_tensorflow() -> types.ModuleType:
    try:
        import mesh_tensorflow
    except ModuleNotFoundError as e:
        if e.name != "mesh_tensorflow":
            raise
        raise ImportError(f"gpt_neo_sampling needs mesh-tensorflow: {install_line('mesh-tensorflow')}") from None
    return mesh_tensorflow


sys.meta_path.insert(0, _MeshTensorflowFinder())


class LazyModule(types.ModuleType):
    """A module that is imported when one of its names is first used."""

    def __init__(self, name: str, load: Callable[[], types.ModuleType] | None = None) -> None:
        """load: a function that imports and returns it."""
        super().__init__(name)
        self.__dict__["_loaded"] = functools.cache(load or (lambda: importlib.import_module(name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded(), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._loaded(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._loaded(), name)


def _import_tensorflow_v1() -> types.ModuleType:
    _import_tensorflow()
    import tensorflow.compat.v1

    return tensorflow.compat.v1


if TYPE_CHECKING:
    import mesh_tensorflow as mtf
    import numpy as np
    import tensorflow
    import tensorflow.compat.v1 as tf

    PlacementMeshImpl = mtf.placement_mesh_impl.PlacementMeshImpl
    LazyAllreduceSum = mtf.ops.LazyAllreduceSum
else:
    tensorflow = LazyModule("tensorflow", _import_tensorflow)
    tf = LazyModule("tensorflow.compat.v1", _import_tensorflow_v1)
    mtf = LazyModule("mesh_tensorflow", _import_mesh_tensorflow)


def __getattr__(name: str) -> Any:
    """mesh-tensorflow's private names that the library uses."""
    if name == "PlacementMeshImpl":
        return mtf.placement_mesh_impl.PlacementMeshImpl
    if name == "LazyAllreduceSum":
        return mtf.ops.LazyAllreduceSum
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def xla_ops() -> types.ModuleType:
    """XLA's own operations, as TensorFlow's functions; most programs need none of them."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    return gen_xla_ops


def dot_axes(contracted_of_x: Sequence[int], contracted_of_y: Sequence[int], batch: Sequence[int] = ()) -> bytes:
    """The axes of XLA's product of two tensors: those summed over, and those that both begin with."""
    from tensorflow.compiler.xla import xla_data_pb2

    return xla_data_pb2.DotDimensionNumbers(
        lhs_contracting_dimensions=contracted_of_x,
        rhs_contracting_dimensions=contracted_of_y,
        lhs_batch_dimensions=batch,
        rhs_batch_dimensions=batch,
    ).SerializeToString()


def layout_pairs(layout: mtf.LayoutRules) -> list[tuple[str, str]]:
    """The rules as a sorted list of (dim, mesh axis)."""
    return sorted(layout._pairs)


def static_value(x: mtf.Tensor) -> np.ndarray | None:
    """The value of a tensor that is a constant or an imported constant, as an ndarray of its shape; else None."""
    import numpy as np

    value = None
    if isinstance(x.operation, mtf.ops.Constant):
        value = x.operation._value
    elif isinstance(x.operation, mtf.ops.ImportOperation):
        value = tensorflow.get_static_value(x.operation._tf_tensor)
    return None if value is None else np.broadcast_to(value, x.shape.to_integer_list)


def is_in_function() -> bool:
    """Whether the graph being built belongs to a tf.function, or lies inside one."""
    from tensorflow.python.framework.func_graph import FuncGraph
    from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph

    graph = tf.get_default_graph()
    while isinstance(graph, FuncGraph):
        if not isinstance(graph, ControlFlowFuncGraph):  # those are loop bodies and branches
            return True
        graph = graph.outer_graph
    return False


def current_device() -> str:
    """TensorFlow's name of the device that an operation made here is given; "" if it is TensorFlow's choice."""
    operation = types.SimpleNamespace(device="")
    operation._set_device_from_string = lambda name: setattr(operation, "device", name)
    tf.get_default_graph()._apply_device_functions(operation)
    return operation.device


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Silences TensorFlow's Python warnings (deprecations that mtf causes). Any number of threads may be inside."""

    def is_error(record: logging.LogRecord) -> bool:  # another function, and so another filter, for each that is inside
        return record.levelno >= logging.ERROR

    logger = tf.get_logger()
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def extend_when_told(session: tf.Session) -> None:
    """Makes a session pick up new nodes of its graph only at `extend_session`, not at each run: another thread may be
    halfway through building a loop then, and a node that a session has seen can no longer be changed."""
    session._extend_graph = lambda: None


def extend_session(session: tf.Session) -> None:
    """Makes a session pick up all nodes of its graph."""
    type(session)._extend_graph(session)


def probe_devices() -> None:
    """Makes TensorFlow look for its devices, once. Raises RuntimeError as `check_not_forked` does."""
    check_not_forked()
    _probe_once()


@functools.cache
def _probe_once() -> None:
    """Makes TensorFlow look for its devices and run a first graph; both print lines the first time."""
    global _user
    _user = os.getpid()
    with quiet_stderr(), tf.Graph().as_default():
        tensorflow.config.list_physical_devices()
        with tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as session:
            session.run(tf.no_op())  # at any log level 2.18 reports a graph pass that is off


_user: int | None = None  # the process that has used TensorFlow


def check_not_forked() -> None:
    """Raises RuntimeError in a process forked from one that had used TensorFlow, where it would hang."""
    if _user not in (None, os.getpid()):
        raise RuntimeError(
            "this process was forked from one that had used TensorFlow, which hangs in such a process; start it with "
            'multiprocessing.get_context("spawn"), or use the library only in the new processes'
        )

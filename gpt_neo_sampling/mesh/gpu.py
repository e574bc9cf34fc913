"""Whether a mesh is made of GPUs, and what changes there.

TensorFlow launches a graph's operations one by one, and on a GPU computes with int32 in the host's memory, but for
selections and look-ups: it waits for the GPU and copies. A draw is hundreds of operations, many of these. So XLA
compiles it there (`compiled_rows`), and outside of it int32 tensors that grow with a row's length take another type.
"""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator

from gpt_neo_sampling._compat import PlacementMeshImpl, current_device, mtf, tensorflow, tf

COMPILE = "GPT_NEO_SAMPLING_XLA"  # environment variable: 0 compiles no draw, 1 all, on CPUs too; by default GPUs' alone
_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """For a graph that is to run anywhere, also where TensorFlow has no XLA: it is built as for CPUs."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def on_gpu(mesh_impl: mtf.MeshImpl) -> bool:
    """Whether the operations of a mesh, if they are made here, are placed on GPUs."""
    if not isinstance(mesh_impl, PlacementMeshImpl) or _portable.get():
        return False
    return all(map(_is_gpu, mesh_impl.devices))


def may_be_gpu(mesh_impl: mtf.MeshImpl) -> bool:
    """Whether any operation of a mesh may be placed on a GPU."""
    return isinstance(mesh_impl, PlacementMeshImpl) and not _portable.get() and any(map(_is_gpu, mesh_impl.devices))


def _is_gpu(device: str) -> bool:
    with tf.device(device):
        kind = tf.DeviceSpec.from_string(current_device()).device_type
    if kind is None:  # TensorFlow's choice
        return bool(tensorflow.config.get_visible_devices("GPU"))
    return kind.upper() == "GPU"


def compiles_rows(mesh_impl: mtf.MeshImpl) -> bool:
    """Whether XLA is to compile what `compiled_rows` holds, if it is lowered here.

    Raises:
      ValueError: for a value of the environment variable that is neither 0 nor 1, or 1 where there is no XLA.
    """
    if not isinstance(mesh_impl, PlacementMeshImpl) or _portable.get():
        return False
    wanted = os.environ.get(COMPILE) or None
    if wanted not in (None, "0", "1"):
        raise ValueError(f"{COMPILE}={wanted}; allowed: 0 (compile no draw) or 1 (all, on CPUs too)")
    if wanted == "1" and not tf.test.is_built_with_xla():
        raise ValueError(f"{COMPILE}=1, but this TensorFlow is built without XLA")
    if wanted is None and not on_gpu(mesh_impl):
        return False
    return wanted != "0" and tf.test.is_built_with_xla()


def index_dtype(mesh_impl: mtf.MeshImpl) -> tf.DType:
    """Of integers that are computed with: int64 stays in a GPU's memory."""
    return tf.int64 if on_gpu(mesh_impl) else tf.int32


def moving(mesh_impl: mtf.MeshImpl, fn: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """A function of slices that only moves the first, and does not compute with it: int32 stays in a GPU's memory."""
    if not on_gpu(mesh_impl):
        return fn

    def as_float32(x: tf.Tensor, *others: tf.Tensor) -> tf.Tensor:
        if x.dtype != tf.int32:
            return fn(x, *others)
        return tf.bitcast(fn(tf.bitcast(x, tf.float32), *others), tf.int32)

    return as_float32

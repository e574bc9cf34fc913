"""From a checkpoint into the variables of a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.checkpoint.base import Checkpoint, CheckpointError, aligned, aligned_empty, progress_bar, some

LOAD_BYTES = 2**25  # weights read before they are handed to TensorFlow

Key = TypeVar("Key", bound=Hashable)


def load_weights(
    checkpoint: Checkpoint, lowering: mtf.Lowering, session: tf.Session, *, scope: str = "gpt2", strict: bool = True
) -> list[str]:
    """Fills the variables of a graph from a checkpoint.

    For scripts that lower a graph themselves: a loop of `sample_autoregressive`, or any graph of `models.gpt2.model`.
    Each device gets its slices straight from the file, a few megabytes at a time; mtf's own way, by master variables
    that are copied to slices, holds all weights twice. So no `copy_masters_to_slices` is needed after this, and before
    a Saver writes the masters, `copy_slices_to_masters`.

    Variables of your own that the checkpoint lacks are set before this, as `copy_masters_to_slices` sets all: run
    `tf.global_variables_initializer()`, then `lowering.copy_masters_to_slices()`, then this, with strict=False if they
    are in the scope. A graph with such variables is lowered with `mtf.Lowering(…, autostack=False)`, as mtf may else
    stack them with the model's.

    Args:
      checkpoint: a `Checkpoint`, open; of either format.
      lowering: mtf.Lowering of the graph, on a PlacementMeshImpl, as `DeviceMesh.impl` makes.
      session: tf.Session of the TensorFlow graph.
      scope: str, the variable scope of the model; `sample_autoregressive` calls its model in "gpt2".
      strict: whether each variable in the scope has to be in the checkpoint. With False those that are not (an
        optimizer's, a head of your own) are left as they are.

    Returns:
      a sorted list of the names that were left, without the scope; empty if strict.

    Raises:
      CheckpointError: if the graph lacks variables of the checkpoint or, if strict, the other way round; if one has
        another shape (a vocabulary may be padded); and as `Checkpoint.read`.
      ValueError: for another kind of mesh.
    """
    checkpoint_names = set(checkpoint.names())
    weights: dict[tuple[str, ...], tuple[mtf.Shape, Any]] = {}
    left: list[str] = []
    for variable in lowering.variables:
        # mtf stacks variables of one shape into one, on several devices and unless autostack=False
        all_names = getattr(variable, "original_names", [variable.name])
        names = tuple(name.removeprefix(f"{scope}/") for name in all_names if name.startswith(f"{scope}/"))
        found = checkpoint_names.intersection(names)
        if found and len(found) < len(all_names):
            raise CheckpointError(f"{checkpoint.folder} has {some(found)} alone of a stack; lower with autostack=False")
        if found:
            weights[names] = variable.shape, lowering.variables[variable]
            mesh_impl = lowering.mesh_impl(variable)
        else:
            left += names
    missing = checkpoint_names.difference(*weights)
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: the graph has no {some(sorted(missing))} in the scope {scope!r}")
    if left and strict:
        raise CheckpointError(f"{checkpoint.folder} lacks {some(sorted(left))}; strict=False leaves these as they are")
    dims = {name: shape.dims[len(names) > 1 :] for names, (shape, _) in weights.items() for name in names}
    for name in dims:
        _check_shape(checkpoint, name, dims[name], dims["wte"][0].name)
    from gpt_neo_sampling._compat import PlacementMeshImpl  # a class of mtf's: importing it imports TensorFlow

    if not isinstance(mesh_impl, PlacementMeshImpl):
        raise ValueError(f"{type(mesh_impl).__name__}; load_weights needs a PlacementMeshImpl")

    def read(names: tuple[str, ...]) -> np.ndarray:
        values = [checkpoint.read(name) for name in names]
        return np.stack(values) if len(values) > 1 else values[0]

    fill_slices(weights, read, mesh_impl, session.run)
    return sorted(left)


def _check_shape(checkpoint: Checkpoint, name: str, dims: list[mtf.Dimension], vocab: str) -> None:
    """Raises CheckpointError unless a weight has these dims; that of the name `vocab` may be padded."""
    stored, wanted = checkpoint.shape(name), [dim.size for dim in dims]
    fits = len(stored) == len(dims) and all(n == d.size or d.name == vocab and n < d.size for n, d in zip(stored, dims))
    if not fits:
        raise CheckpointError(f"{checkpoint.folder}: {name} has the shape {list(stored)}, and {wanted} in the graph")


def fill_slices(
    weights: Mapping[Key, tuple[mtf.Shape, Any]],
    read: Callable[[Key], np.ndarray],
    mesh_impl: mtf.MeshImpl,
    run: Callable[..., Any],
) -> None:
    """Fills the slices of variables, a few megabytes at a time.

    Args:
      weights: a dict, key -> (mtf.Shape, mtf's laid-out variable).
      read: a function of a key that returns the variable's value, an ndarray; shorter ones are followed by zeros.
      mesh_impl: a PlacementMeshImpl.
      run: a function of (operations, feeds): a session's.
    """
    feed: dict[tf.Operation, np.ndarray] = {}
    size = 0  # each run of another set of variables costs some 50 ms

    def fill() -> None:
        # the initial values are fed, so none are computed
        run(list(feed), {initializer.inputs[1]: value for initializer, value in feed.items()})
        feed.clear()

    # The largest first, while the least memory is in use: a weight is held twice while it is read.
    keys = sorted(weights, key=lambda key: -weights[key][0].size)
    with progress_bar("loading", [weights[key][0].to_integer_list for key in keys]) as progress:
        for key in keys:
            shape, slices = weights[key]
            value = read(key)
            progress.update(4 * shape.size)
            for processor, variable in enumerate(slices.laid_out_tensor.tensor_list):
                begin, dtype = mesh_impl.slice_begin(shape, processor), variable.dtype.base_dtype.as_numpy_dtype
                part = _slice(value, begin, variable.shape.as_list(), dtype)
                feed[variable.initializer] = part
                size += part.nbytes
                if size >= LOAD_BYTES:
                    fill()
                    size = 0
        if feed:
            fill()


def _slice(value: np.ndarray, begin: Sequence[int], shape: list[int], dtype: npt.DTypeLike) -> np.ndarray:
    """A slice of an array, with zeros past its end (the entries of a padded vocabulary).

    TensorFlow keeps what it is fed, so a slice is no view, which would keep the whole.
    """
    if list(value.shape) == shape:
        return aligned(value, dtype)
    part = value[tuple(slice(b, b + n) for b, n in zip(begin, shape))]
    copy = aligned_empty(shape, dtype)
    copy.fill(0)
    copy[tuple(map(slice, part.shape))] = part
    return copy

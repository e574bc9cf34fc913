"""Meshes: which dimensions are split over which processors, on which devices and machines.

A mesh is an array of processors with named axes, such as `x:2,y:2`; a layout
says which dimension of the model is split along which axis, such as
`batch:x,vocab:y`; and each processor is a TensorFlow device.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpt_neo_sampling._compat import (
    extend_session,
    layout_pairs,
    mtf,
    probe_devices,
    quiet_stderr,
    tensorflow,
    tf,
)
from gpt_neo_sampling._types import is_int
from gpt_neo_sampling.mesh.cluster import MOST_CPUS, Cluster, parse_cluster, short_name

AUTO = "auto"
NAME = r"[A-Za-z_]\w*"  # of an axis or a dimension
SIZE = r"[1-9][0-9]{0,9}"


class MeshError(ValueError):
    """A mesh, layout or device that is not possible or not there; the message is one line."""


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """Processors, their devices, and the dimensions that are split over them.

    Made by `device_mesh`.

    Attributes:
      shape: mtf.Shape of the axes.
      layout: dict, name of a dimension -> name of an axis.
      devices: tuple of TensorFlow's device names, one for each processor, the last
        axis varying fastest; ("",) lets TensorFlow choose.
      cluster: a `cluster.Cluster` if the devices belong to other processes, or None.
    """

    shape: mtf.Shape
    layout: dict[str, str]
    devices: tuple[str, ...]
    cluster: Cluster | None = None

    def impl(self) -> mtf.MeshImpl:
        """The mesh implementation for a lowering, which should run under `place`."""
        # with an unnamed device, mtf keeps a single copy of the weights
        names = [""] if self.size == 1 else list(self.devices)
        # mtf refuses two dimensions of a tensor on one axis even if its size is 1
        rules = {(dim, axis) for dim, axis in self.layout.items() if self.parts(dim) > 1}
        from gpt_neo_sampling._compat import PlacementMeshImpl

        return PlacementMeshImpl(self.shape, mtf.convert_to_layout_rules(rules), names)

    def place(self) -> contextlib.AbstractContextManager[Any]:
        """A context to build the graph in; it places operations if the mesh has only one device."""
        probe_devices()  # in silence; some operations would make TensorFlow do it while they are built
        return tf.device(self.devices[0]) if self.size == 1 else contextlib.nullcontext()

    @property
    def size(self) -> int:
        """int: the number of processors."""
        return self.shape.size

    def is_one_cpu(self) -> bool:
        """Whether all is computed in this process's own memory. Makes TensorFlow look for its devices."""
        if self.size > 1 or self.cluster is not None:
            return False
        (device,) = self.devices
        return "CPU" in device or not (device or _gpu_count())

    def parts(self, dim: str) -> int:
        """int: the number of parts that the dimension named `dim` is split into."""
        axis = self.layout.get(dim)
        return 1 if axis is None else self.shape.get_dim_by_name(axis).size

    def check(self, sizes: dict[str, int | None], tensors: Iterable[tuple[str, ...]]) -> None:
        """Checks that the layout fits a model.

        Args:
          sizes: {dimension's name: its size} of every dimension that may be split;
            None as the size of one that is padded to fit.
          tensors: tuples of names of dimensions that occur in one tensor, and so need
            different axes.

        Raises:
          MeshError: (a ValueError) if it does not.
        """
        for dim, axis in self.layout.items():
            if dim not in sizes:
                raise MeshError(f"layout {self._rule(dim)}: the model has no dimension {dim} to split; it has "
                                f"{', '.join(sizes)}")  # fmt: skip
            size, parts = sizes[dim], self.parts(dim)
            if size is not None and size % parts:
                fitting = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
                raise MeshError(
                    f"layout {self._rule(dim)} splits {dim}={size} over {axis}:{parts}, which does not divide it; "
                    f"allowed sizes of {axis}: {', '.join(map(str, fitting))}"
                )
        for dims in tensors:
            along = collections.defaultdict(list)
            for dim in dims:
                if dim in self.layout:
                    along[self.layout[dim]].append(dim)
            for axis, together in along.items():
                if len(together) > 1 and self.shape.get_dim_by_name(axis).size > 1:
                    raise MeshError(
                        f"layout {','.join(map(self._rule, together))} splits {' and '.join(together)} along the same "
                        f"axis {axis}, but a tensor [{', '.join(dims)}] has both; split them along different axes, "
                        "or only one of them"
                    )

    def _rule(self, dim: str) -> str:
        return f"{dim}:{self.layout[dim]}"

    def session(self, graph: tf.Graph | None = None) -> tf.Session:
        """A tf.Session with the mesh's devices.

        Args:
          graph: a tf.Graph, or None for the default graph.

        Returns:
          a tf.Session.

        Raises:
          ClusterError: if a machine of the cluster cannot be reached.
        """
        if self.cluster:
            return self.cluster.session(graph, self.devices)
        cpus = [int(m[1]) for m in (re.fullmatch(r"/device:CPU:(\d+)", d) for d in self.devices) if m]
        config = tf.ConfigProto(allow_soft_placement=True, device_count={"CPU": max(cpus, default=0) + 1})
        if self.size > 1:  # on graphs for several devices the optimizer takes longer than it saves
            config.graph_options.rewrite_options.disable_meta_optimizer = True
        else:  # a second pass takes 0.3 s for each graph, and leaves steps as fast
            config.graph_options.rewrite_options.meta_optimizer_iterations = 1
        with quiet_stderr():
            return tf.Session(graph=graph, config=config)

    def run(self, session: tf.Session, fetches: Any, feed: dict[Any, Any] | None = None) -> Any:
        """session.run, while watching the cluster, if there is one.

        Args:
          session: one that `session` returned.
          fetches, feed: as for tf.Session.run.

        Returns:
          as tf.Session.run.

        Raises:
          ClusterError: within seconds of losing a machine.
        """
        return self._watched(lambda: session.run(fetches, feed))

    def extend(self, session: tf.Session) -> None:
        """Makes a session pick up all nodes of its graph, while watching the cluster as `run` does.

        Args:
          session: one that `session` returned.

        Raises:
          ClusterError: within seconds of losing a machine.
        """
        self._watched(lambda: extend_session(session))

    def _watched(self, call: Callable[[], Any]) -> Any:
        return self.cluster.watched(call) if self.cluster else call()


def device_mesh(
    mesh_shape: Any = None,
    layout: Any = None,
    devices: str | Sequence[str] | None = None,
    cluster: str | Cluster | None = None,
) -> DeviceMesh:
    """A mesh from its description; by default one device of TensorFlow's choice.

    Args:
      mesh_shape: a str such as "x:2,y:2", an mtf.Shape, a dict, or a list of pairs
        or of strings. None means one processor, or with devices="auto" one for each
        GPU, on an axis "all".
      layout: a str such as "batch:x,vocab:y", an mtf.LayoutRules, a dict, or a list
        of pairs or of strings. None splits nothing, or with devices="auto" and no
        mesh_shape means "batch:all".
      devices: a list, or a str with commas, of different devices, one for each
        processor, the last axis varying fastest. A device is "cpu:0" or "gpu:1", in a
        cluster "worker:1/cpu:0", or TensorFlow's full name. "auto" means all GPUs of
        this machine. None means TensorFlow's choice (a GPU if there is one), in a
        cluster the first CPU of each machine.
      cluster: a str such as "host:2222,host:2223", a `cluster.Cluster`, or None.

    Returns:
      a DeviceMesh.

    Raises:
      MeshError: (a ValueError) for a description of another form, a layout along an
        axis that the mesh does not have, or devices that do not exist, are not all
        different, or are not as many as the mesh has processors.
      ValueError: for a cluster with invalid addresses.

    Example:

        >>> mesh = device_mesh("x:2,y:2", "batch:x,vocab:y", "cpu:0,cpu:1,cpu:2,cpu:3")
        >>> mesh.size, mesh.parts("vocab"), mesh.devices[3]
        (4, 2, '/device:CPU:3')
        >>> device_mesh("x:2", "batch:y", "cpu:0,cpu:1")
        Traceback (most recent call last):
        gpt_neo_sampling.mesh.devices.MeshError: layout batch:y splits along y, but the axes of the mesh are x
    """
    if devices == AUTO and not cluster:
        n_gpus = _gpu_count()
        if not n_gpus:
            raise MeshError("devices auto: TensorFlow sees no GPU here; name CPUs, as in cpu:0,cpu:1")
        devices = [f"gpu:{i}" for i in range(n_gpus)]
        if mesh_shape is None and n_gpus > 1:
            mesh_shape = f"all:{n_gpus}"
            layout = "batch:all" if layout is None else layout
    axes, rules, names, cluster = _described(mesh_shape, layout, devices, cluster)
    gpus = [int(m[1]) for m in (re.fullmatch(r"/device:GPU:(\d+)", n) for n in names) if m]
    if gpus and max(gpus) >= _gpu_count():
        raise MeshError(f"devices: there is no gpu:{max(gpus)}; TensorFlow sees {_count(_gpu_count(), 'GPU')}")
    return DeviceMesh(mtf.Shape([mtf.Dimension(*axis) for axis in axes.items()]), rules, names, cluster)


def check_description(
    mesh_shape: str | None, layout: str | None, devices: str | None, cluster: str | Cluster | None
) -> None:
    """Raises MeshError or ValueError for what `device_mesh` would refuse on any machine. TensorFlow is not needed."""
    if devices != AUTO or cluster:
        _described(mesh_shape, layout, devices, cluster)
        return
    axes = _parse_mesh_shape(mesh_shape)
    if mesh_shape is not None:
        _parse_layout(layout, axes)


def _described(
    mesh_shape: Any, layout: Any, devices: str | Sequence[str] | None, cluster: str | Cluster | None
) -> tuple[dict[str, int], dict[str, str], tuple[str, ...], Cluster | None]:
    """(axes and their sizes, layout, devices, cluster) of a DeviceMesh; whether a GPU is there is not looked at."""
    if isinstance(cluster, str):
        cluster = parse_cluster(cluster)
    elif not (cluster is None or isinstance(cluster, Cluster)):
        raise MeshError(f"cluster {cluster!r}; allowed: addresses such as host:2222,host:2223")
    if devices == AUTO:
        raise MeshError("devices auto sees only this machine; in a cluster name each device, as in worker:1/gpu:0")
    if devices is None:
        names = cluster.first_cpus() if cluster else ("",)
        if cluster and mesh_shape is None and len(names) > 1:
            raise MeshError(f"a cluster of {len(names)} machines needs a mesh shape, such as x:{len(names)}")
    else:
        names = _parse_devices(devices, cluster)
    axes = _parse_mesh_shape(mesh_shape)
    rules = _parse_layout(layout, axes)
    size = math.prod(axes.values())
    written = ",".join(f"{axis}:{n}" for axis, n in axes.items()) or "(none)"
    if names == ("",) and size != 1:
        raise MeshError(
            f"mesh shape {written} has {size} processors, but no devices are named; "
            f"name {size}, such as cpu:0{',' if size == 2 else ',…,'}cpu:{size - 1}"
        )
    if size != len(names):
        raise MeshError(
            f"mesh shape {written} has {_count(size, 'processor')}, but {_count(len(names), 'device')} "
            f"{'is' if len(names) == 1 else 'are'} named ({', '.join(map(short_name, names))}); "
            f"name {size}, or give a mesh shape for {len(names)}, such as x:{len(names)}"
        )
    return axes, rules, names, cluster


def _parse_mesh_shape(mesh_shape: Any) -> dict[str, int]:
    axes: dict[str, int] = {}
    for axis, size in _pairs(mesh_shape, "mesh shape", "an axis and its size; allowed: such as x:2,y:2", SIZE):
        if axis in axes:
            raise MeshError(f"mesh shape {mesh_shape!r} has the axis {axis} more than once")
        axes[axis] = int(size)
    return axes


def _parse_layout(layout: Any, axes: dict[str, int]) -> dict[str, str]:
    rules: dict[str, str] = {}
    for dim, axis in _pairs(layout, "layout", "a dimension and its axis; allowed: such as batch:x,vocab:y", NAME):
        if axis not in axes:
            has = f"the axes of the mesh are {', '.join(axes)}" if axes else (
                "the mesh has no axes (give a mesh shape, such as x:2)")  # fmt: skip
            raise MeshError(f"layout {dim}:{axis} splits along {axis}, but {has}")
        if dim in rules:
            raise MeshError(f"layout {layout!r} names {dim} twice; a dimension is split along at most one axis")
        rules[dim] = axis
    return rules


def _pairs(value: Any, what: str, form: str, second: str) -> list[list[str]]:
    """Pairs of strings from any of the forms of a mesh shape or a layout. `second` is the pattern of the second one."""
    if value is None:
        return []
    parts = value
    if isinstance(value, str):
        parts = [p for p in value.split(",") if p.strip()]
    elif isinstance(value, mtf.Shape):
        parts = value.dims
    elif isinstance(value, mtf.LayoutRules):
        parts = layout_pairs(value)
    elif isinstance(value, dict):
        parts = value.items()
    elif not isinstance(value, (list, tuple, set, frozenset)):
        raise MeshError(f"{what} {value!r} is not {form}")
    pairs = []
    for part in parts:
        words = part.split(":") if isinstance(part, str) else part if isinstance(part, (list, tuple)) else []
        words = [str(word).strip() if isinstance(word, str) or is_int(word) else "" for word in words]
        if len(words) != 2 or not re.fullmatch(NAME, words[0]) or not re.fullmatch(second, words[1]):
            raise MeshError(f"{what} {value!r}: {part!r} is not {form}")
        pairs.append(words)
    return pairs


def _parse_devices(devices: str | Sequence[str], cluster: Cluster | None) -> tuple[str, ...]:
    names = devices.split(",") if isinstance(devices, str) else devices
    if not isinstance(names, (list, tuple)) or not names:
        raise MeshError(f"devices {devices!r}; allowed: a list such as cpu:0,cpu:1")
    names = tuple(_parse_device(name, cluster) for name in names)
    twice = [n for n, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise MeshError(f"devices: {short_name(twice[0])} is named more than once; each processor needs its own device")
    return names


def _parse_device(name: Any, cluster: Cluster | None) -> str:
    m = isinstance(name, str) and re.fullmatch(
        r"(?:(?:/job:)?(\w+)(?:/replica:0)?(?:/task)?:([0-9]+)/|/?)(?:device:)?([cCgG][pP][uU]):([0-9]+)",
        name.strip().removeprefix("/job:localhost/replica:0/task:0"),
    )
    if not m:
        raise MeshError(f"devices: {name!r} is not a device; allowed: cpu:0, gpu:1, in a cluster worker:1/cpu:0")
    job, task, kind, number = m.groups()
    if len(number) > 4 or int(number) >= MOST_CPUS:
        raise MeshError(f"devices: {name!r}; allowed: numbers from 0 to {MOST_CPUS - 1}")
    local = f"/device:{kind.upper()}:{int(number)}"
    if (job is not None) != (cluster is not None):
        wanted = "it needs a machine, as in worker:1/cpu:0" if cluster else "there is no cluster (see --cluster)"
        raise MeshError(f"devices: {name!r}: {wanted}")
    if job is None or cluster is None:  # then both are None
        return local
    if f"{job}:{task}" not in cluster.addresses:
        raise MeshError(f"devices: {name!r} is on {job}:{task}; the cluster has {', '.join(cluster.addresses)}")
    return f"/job:{job}/replica:0/task:{task}{local}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _gpu_count() -> int:
    probe_devices()
    return len(tensorflow.config.get_visible_devices("GPU"))


def round_up(size: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `size`."""
    return math.ceil(size / parts) * parts

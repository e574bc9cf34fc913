"""Meshes: what is split over which processors, on which devices and machines.

A mesh is an array of processors with named axes, such as `x:2,y:2`; a layout
says which dimension of the model is split along which axis, such as
`batch:x,vocab:y`; and each processor is a TensorFlow device.
"""

import collections
import contextlib
import dataclasses
import math
import re

from gpt_neo_sampling._compat import PlacementMeshImpl, mtf, probe_devices, quiet_stderr, tensorflow, tf
from gpt_neo_sampling.cluster import Cluster, parse_cluster

AUTO = "auto"


class MeshError(ValueError):
    """A mesh, layout or device that cannot be had; the message is one line."""


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """Processors, their devices, and the dimensions that are split over them.

    Made by `device_mesh`.
    """

    shape: mtf.Shape  # of the axes
    layout: dict  # name of a dimension -> name of an axis
    devices: tuple  # of TensorFlow's device names, one a processor, the last axis fastest; ("",) for its choice
    cluster: Cluster | None = None  # where the devices lie in other processes

    def impl(self):
        """The mesh implementation that a lowering takes; lower it under `place`."""
        # without a name of its own for the device, mtf keeps a single copy of the weights
        names = [""] if self.size == 1 else list(self.devices)
        return PlacementMeshImpl(self.shape, mtf.convert_to_layout_rules(set(self.layout.items())), names)

    def place(self):
        """A context for building the graph: on the one device, where there is one."""
        return tf.device(self.devices[0]) if self.size == 1 else contextlib.nullcontext()

    @property
    def size(self):
        return self.shape.size

    def parts(self, dim):
        """int: in how many parts the dimension of this name is cut."""
        axis = self.layout.get(dim)
        return 1 if axis is None else self.shape.get_dim_by_name(axis).size

    def check(self, sizes, tensors):
        """Raises MeshError unless the layout fits a model.

        Args:
          sizes: {dimension's name: its size}, every dimension that may be split;
            None for one that is padded to fit.
          tensors: tuples of names of dimensions: those that stand together in a
            tensor, and so need different axes.
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
                    f"sizes of {axis} that fit: {', '.join(map(str, fitting))}"
                )
        for dims in tensors:
            along = collections.defaultdict(list)
            for dim in dims:
                if dim in self.layout:
                    along[self.layout[dim]].append(dim)
            for axis, together in along.items():
                if len(together) > 1 and self.shape.get_dim_by_name(axis).size > 1:
                    raise MeshError(
                        f"layout {','.join(map(self._rule, together))} splits {' and '.join(together)} along the one "
                        f"axis {axis}, but they stand together in a tensor [{', '.join(dims)}]; split them along "
                        "different axes, or one of them"
                    )

    def _rule(self, dim):
        return f"{dim}:{self.layout[dim]}"

    def session(self, graph=None):
        """A tf.Session that has the mesh's devices.

        Raises:
          ClusterError: if a machine of the cluster cannot be reached.
        """
        if self.cluster:
            return self.cluster.session(graph, self.devices)
        cpus = [int(m[1]) for m in (re.fullmatch(r"/device:CPU:(\d+)", d) for d in self.devices) if m]
        config = tf.ConfigProto(allow_soft_placement=True, device_count={"CPU": max(cpus, default=0) + 1})
        if self.size > 1:  # on graphs of many devices it takes longer than it saves
            config.graph_options.rewrite_options.disable_meta_optimizer = True
        with quiet_stderr():
            return tf.Session(graph=graph, config=config)

    def run(self, session, fetches, feed=None):
        """session.run; where machines are lost on the way, a ClusterError.

        Raises:
          ClusterError: within seconds of a machine's loss.
        """
        if self.cluster:
            return self.cluster.run(session, fetches, feed)
        return session.run(fetches, feed)


def device_mesh(mesh_shape=None, layout=None, devices=None, cluster=None):
    """A mesh from its description; by default one device, the one that TensorFlow chooses.

    Args:
      mesh_shape: a str such as "x:2,y:2", an mtf.Shape, or None for one
        processor (with devices="auto", for as many as there are GPUs, on an
        axis "all").
      layout: a str such as "batch:x,vocab:y", a dict, or None for nothing split
        (with devices="auto" and no mesh_shape, for "batch:all").
      devices: as many devices as the mesh has processors, all different, the
        last axis fastest: a list, or a str with commas. A device is "cpu:0",
        "gpu:1", or in a cluster "worker:1/cpu:0" or TensorFlow's whole name.
        "auto" for the GPUs that are there. None for TensorFlow's choice (a GPU
        if there is one), and in a cluster for the first CPU of each machine.
      cluster: a str such as "host:2222,host:2223", a `cluster.Cluster`, or None.

    Returns:
      a DeviceMesh.

    Raises:
      MeshError: for a description of another form, a layout along an axis that
        the mesh has not, devices that are not there, not all different, or not
        as many as the mesh has processors.
    """
    if isinstance(cluster, str):
        cluster = parse_cluster(cluster)
    if devices == AUTO:
        if cluster:
            raise MeshError("devices auto looks at this machine alone; in a cluster name each, as in worker:1/gpu:0")
        devices = tuple(f"/device:GPU:{i}" for i in range(_gpu_count()))
        if not devices:
            raise MeshError("devices auto: TensorFlow sees no GPU here; name CPUs, as in cpu:0,cpu:1")
        if mesh_shape is None and len(devices) > 1:
            mesh_shape = f"all:{len(devices)}"
            layout = "batch:all" if layout is None else layout
    elif devices is None:
        devices = cluster.first_cpus() if cluster else ("",)
        if cluster and mesh_shape is None and len(devices) > 1:
            raise MeshError(f"a cluster of {len(devices)} machines needs a mesh shape, such as x:{len(devices)}")
    else:
        devices = _parse_devices(devices, cluster)
    shape = _parse_mesh_shape(mesh_shape)
    layout = _parse_layout(layout, shape)
    if devices == ("",) and shape.size != 1:
        named = ",".join(f"cpu:{i}" for i in range(shape.size))
        raise MeshError(f"mesh shape {_written(shape)} has {shape.size} processors, but no devices are named; name "
                        f"{shape.size}, such as {named}")  # fmt: skip
    if shape.size != len(devices):
        raise MeshError(
            f"mesh shape {_written(shape)} has {_count(shape.size, 'processor')}, but {_count(len(devices), 'device')} "
            f"{'is' if len(devices) == 1 else 'are'} named ({_shortened(devices)}); "
            f"name {shape.size}, or shape the mesh for {len(devices)}, such as x:{len(devices)}"
        )
    return DeviceMesh(shape, layout, devices, cluster)


def _parse_mesh_shape(text):
    if text is None or text == "":
        return mtf.Shape([])
    if isinstance(text, mtf.Shape):
        return text
    pairs = []
    for part in _parts(text):
        m = re.fullmatch(r"([A-Za-z_]\w*):(\d+)", part)
        if not m or int(m[2]) < 1:
            raise MeshError(f"mesh shape {text!r}: {part!r} is not an axis and its size; allowed: such as x:2,y:2")
        pairs.append((m[1], int(m[2])))
    _check_distinct([name for name, _ in pairs], f"mesh shape {text!r} has the axis")
    return mtf.Shape([mtf.Dimension(name, size) for name, size in pairs])


def _parse_layout(layout, shape):
    if isinstance(layout, mtf.LayoutRules):
        layout = ",".join(":".join(pair) for pair in layout._pairs)
    if isinstance(layout, dict):
        layout = ",".join(f"{dim}:{axis}" for dim, axis in layout.items())
    rules = {}
    for part in _parts(layout or ""):
        m = re.fullmatch(r"([A-Za-z_]\w*):([A-Za-z_]\w*)", part)
        if not m:
            raise MeshError(
                f"layout {layout!r}: {part!r} is not a dimension and its axis; allowed: such as batch:x,vocab:y"
            )
        dim, axis = m.groups()
        if axis not in shape.dimension_names:
            has = f"the axes of the mesh are {', '.join(shape.dimension_names)}" if shape.ndims else (
                "the mesh has no axes (give a mesh shape, such as x:2)")  # fmt: skip
            raise MeshError(f"layout {part} splits along {axis}, but {has}")
        if dim in rules:
            raise MeshError(f"layout {layout!r} names {dim} twice; a dimension is split along one axis")
        rules[dim] = axis
    return rules


def _parse_devices(devices, cluster):
    names = tuple(_parse_device(d.strip(), cluster) for d in (
        devices.split(",") if isinstance(devices, str) else devices))  # fmt: skip
    _check_distinct(names, "devices: each processor needs one of its own, but there is")
    gpus = [int(m[1]) for m in (re.fullmatch(r"/device:GPU:(\d+)", n) for n in names) if m]
    if gpus and max(gpus) >= _gpu_count():
        raise MeshError(f"devices: gpu:{max(gpus)} is not there; TensorFlow sees {_count(_gpu_count(), 'GPU')}")
    return names


def _parse_device(name, cluster):
    m = re.fullmatch(r"(?:/job:)?(?:(\w+)(?:/(?:replica:0/)?task)?:(\d+))?/?(?:device:)?([cCgG][pP][uU]):(\d+)", name)
    if not m:
        raise MeshError(f"devices: {name!r} is not a device; allowed: cpu:0, gpu:1, in a cluster worker:1/cpu:0")
    job, task, kind, number = m.groups()
    local = f"/device:{kind.upper()}:{number}"
    if (job is not None) != (cluster is not None):
        wanted = "it needs a machine, as in worker:1/cpu:0" if cluster else "there is no cluster (see --cluster)"
        raise MeshError(f"devices: {name!r}: {wanted}")
    if job is None:
        return local
    if f"{job}:{task}" not in cluster.addresses:
        raise MeshError(f"devices: {name!r} is on {job}:{task}; the cluster has {', '.join(cluster.addresses)}")
    return f"/job:{job}/replica:0/task:{task}{local}"


def _parts(text):
    if not isinstance(text, str):
        raise MeshError(f"{text!r}: text is needed, such as x:2,y:2")
    return [p.strip() for p in text.split(",") if p.strip()] if text.strip() else []


def _check_distinct(names, what):
    twice = [n for n, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise MeshError(f"{what} {_shortened(twice[:1])} more than once")


def _written(shape):
    return ",".join(f"{d.name}:{d.size}" for d in shape.dims) or "(none)"


def _shortened(devices):
    return ", ".join(re.sub("/device:|/replica:0|/task|/job:", lambda m: {"/device:": "", "/task": ""}.get(m[0], ""), d)
                     for d in devices)  # fmt: skip


def _count(n, what):
    return f"{n} {what}{'' if n == 1 else 's'}"


def _gpu_count():
    probe_devices()
    return len(tensorflow.config.list_physical_devices("GPU"))


def round_up(size, parts):
    """The least multiple of `parts` that is at least `size`."""
    return math.ceil(size / parts) * parts

"""Compiles a mesh's program for a TPU, without one, and says what it costs there.

libtpu holds the compiler that TPUs run, and the description of a slice ("v5e:2x2") is all that it needs. It gives each
kernel a number of cycles by its own model of the chip. Nothing is executed: these are a compiler's estimates.
"""

import collections
import importlib.util
import os
import pathlib
import re
import tempfile
import time
import typing

import numpy as np

# libtpu reads these when it is loaded; without them it asks Google's cloud what machine this is
os.environ.update(
    TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_ID="0", TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

UNAVAILABLE = None if importlib.util.find_spec("libtpu") else "needs libtpu, jax and jaxlib: pip install '.[tpu]'"
ONE_BY_ONE = ("scatter", "sort", "gather", "dynamic-slice", "dynamic-update-slice", "custom-call")


class Kernel(typing.NamedTuple):
    """An instruction that the compiler gives cycles."""

    cycles: int
    opcode: str
    loops: int  # how many while bodies it stands in
    branches: int  # how many branches, of which not all are taken, it stands in
    source: str  # the operation that it was made from


class TpuProgram:
    """A serialised HLO module compiled for so many cores of a slice.

    Attributes:
      seconds: what compiling it took.
      code_bytes, temporary_bytes, argument_bytes: of one core.
      kernels: a list of Kernel.
      text: the program as compiled.
      in_own_types: the module after the compiler has replaced 64-bit types, as a serialised HloModuleProto (None unless
        `keep_own_types`).
    """

    def __init__(self, hlo, cores, topology="v5e:2x2", keep_own_types=False):
        from jax._src.interpreters import mlir
        from jax.experimental import topologies
        from jaxlib import _jax
        from jaxlib.mlir import ir

        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        options = _jax.CompileOptions()
        options.num_replicas, options.num_partitions = cores, 1
        options.device_assignment = _jax.DeviceAssignment.create(np.arange(cores, dtype=np.int32)[:, np.newaxis])
        with mlir.make_ir_context():
            module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        devices = _jax.DeviceList(tuple(described.devices[:cores]))
        with tempfile.TemporaryDirectory() as folder:
            if keep_own_types:
                debug = options.executable_build_options.debug_options
                debug.xla_dump_to, debug.xla_dump_hlo_as_proto = folder, True
                debug.xla_dump_hlo_pass_re = "xprecision-rewriter|X64"
            began = time.perf_counter()
            executable = described.devices[0].client.compile(module, devices, options)
            self.seconds = time.perf_counter() - began
            self.in_own_types = _in_own_types(pathlib.Path(folder)) if keep_own_types else None
        self.text = executable.hlo_modules()[0].to_string()
        memory = executable.get_compiled_memory_stats()
        self.code_bytes, self.temporary_bytes = memory.generated_code_size_in_bytes, memory.temp_size_in_bytes
        self.argument_bytes = memory.argument_size_in_bytes
        self.kernels = list(_kernels(self.text))

    def cost(self, loops, branches=0):
        """(cycles, kernels) at this depth."""
        found = [k.cycles for k in self.kernels if (k.loops, k.branches) == (loops, branches)]
        return sum(found), len(found)

    def costs(self):
        """{(loops, branches): (cycles, kernels)}"""
        places = sorted({(k.loops, k.branches) for k in self.kernels})
        return {place: self.cost(*place) for place in places}


def _in_own_types(folder):
    (path,) = folder.glob("*X64_elimination.after_xprecision-rewriter*.hlo.pb")
    return _first_field(path.read_bytes())


def _first_field(proto):
    """The bytes of field 1 of a serialised message: an HloProto's module."""
    at = 1
    assert proto[0] == 10, "an HloProto begins with its module"
    size = shift = 0
    while True:
        byte = proto[at]
        at += 1
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return proto[at : at + size]


# --- Reading a compiled program --------------------------------------------------------

_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)


def computations(text):
    """({computation: lines of its instructions}, the name of the entry)."""
    found, entry, lines = {}, None, None
    for line in text.splitlines():
        begin = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if begin:
            lines = found.setdefault(begin.group(2), [])
            entry = begin.group(2) if begin.group(1) else entry
        elif lines is not None:
            lines.append(line)
    return found, entry


def nesting(text):
    """{computation that is reached outside of kernels: (loops, branches)}"""
    found, entry = computations(text)
    depth, waiting = {entry: (0, 0)}, collections.deque([entry])
    while waiting:
        name = waiting.popleft()
        loops, branches = depth[name]
        for line in found.get(name, []):
            if " fusion(" in line:
                continue  # what a fusion calls is one kernel
            for role, called in _CALLED.findall(line):
                inner = loops + (role in ("body", "condition")), branches + ("computation" in role)
                for callee in re.findall(r"[\w.-]+", called):
                    known = depth.get(callee, (-1, -1))
                    deepest = max(known[0], inner[0]), max(known[1], inner[1])
                    if deepest != known:
                        depth[callee] = deepest
                        waiting.append(callee)
    return found, depth


def _kernels(text):
    found, depth = nesting(text)
    for name, (loops, branches) in depth.items():
        for line in found.get(name, []):
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            if cycles:
                opcode = re.search(r"[\])}] ?([a-z-]+)\(", line)
                source = re.search(r'op_name="([^"]*)"', line)
                yield Kernel(int(cycles.group(1)), opcode.group(1) if opcode else "?", loops, branches,
                             source.group(1) if source else "")  # fmt: skip

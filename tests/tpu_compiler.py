"""Compiles a mesh's program for a TPU, without one, and says what it costs there.

libtpu holds the compiler that TPUs run, and the description of a slice ("v5e:2x2") is all that it needs. It gives each
kernel a number of cycles by its own model of the chip. Nothing is executed: these are a compiler's estimates.
"""

import importlib.util
import os
import pathlib
import re
import tempfile
import time

import hlo_text
import numpy as np

# libtpu reads these when it is loaded; without them it asks Google's cloud what machine this is
os.environ.update(
    TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_ID="0", TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # or a second process is refused, as if it wanted the chip
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

UNAVAILABLE = None if importlib.util.find_spec("libtpu") else "needs libtpu, jax and jaxlib: pip install '.[tpu]'"


class TpuProgram:
    """A serialised HLO module compiled for so many cores of a slice.

    Attributes:
      seconds: what compiling it took.
      code_bytes, temporary_bytes, argument_bytes: of one core.
      kernels, collectives, one_by_one: lists of hlo_text.Kernel, Collective and OneByOne.
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
            debug = options.executable_build_options.debug_options
            debug.xla_dump_to, debug.xla_dump_hlo_as_text = folder, True
            if keep_own_types:
                debug.xla_dump_hlo_as_proto, debug.xla_dump_hlo_pass_re = True, "xprecision-rewriter|X64"
            began = time.perf_counter()
            executable = described.devices[0].client.compile(module, devices, options)
            self.seconds = time.perf_counter() - began
            self.in_own_types = _in_own_types(pathlib.Path(folder)) if keep_own_types else None
            # not executable.hlo_modules(): of v6e jaxlib 0.10.2 cannot read back what this libtpu has compiled
            (path,) = pathlib.Path(folder).glob("*.after_codegen.txt")
            self.text = path.read_text()
        memory = executable.get_compiled_memory_stats()
        self.code_bytes, self.temporary_bytes = memory.generated_code_size_in_bytes, memory.temp_size_in_bytes
        self.argument_bytes = memory.argument_size_in_bytes
        self.kernels = list(hlo_text.kernels(self.text))
        self.collectives = list(hlo_text.collectives(self.text))
        self.one_by_one = list(hlo_text.one_by_one(self.text))

    def costs(self):
        """{(loops, branches): (cycles, kernels that have cycles, kernels that have none)}"""
        found = {}
        for kernel in self.kernels:
            cycles, with_cycles, without = found.get((kernel.loops, kernel.branches), (0, 0, 0))
            known = kernel.cycles is not None
            found[kernel.loops, kernel.branches] = (
                cycles + (kernel.cycles or 0), with_cycles + known, without + (not known)
            )  # fmt: skip
        return dict(sorted(found.items()))

    def table(self):
        """`costs` of what is in loops, as tests/data/tpu_costs.json has it."""
        costs = self.costs().items()
        return {f"{loops} loops, {branches} branches": cost for (loops, branches), cost in costs if loops}


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


def runnable_on_cpu(own_types):
    """A serialised module in a TPU's own types, for CPU replicas: XLA has no `mulhi` there.

    (The high half of a product of two 32-bit integers.)
    """
    from jaxlib import _hlo

    options = _hlo.HloPrintOptions.short_parsable()
    options.print_large_constants = True
    text = _hlo.HloModule.from_serialized_hlo_module_proto(own_types).to_string(options)
    text = _MULHI.sub(_as_wide_product, text)
    return _hlo.hlo_module_from_text(text).as_serialized_hlo_module_proto()


_MULHI = re.compile(r"^( *)(ROOT )?(%?[\w.-]+) = u32(\S*) mulhi\(([^,()]*), ([^,()]*)\)", re.MULTILINE)


def _as_wide_product(found):
    indent, root, name, shape, left, right = found.groups()
    wide = [
        f"{name}.left = u64{shape} convert({left})",
        f"{name}.right = u64{shape} convert({right})",
        f"{name}.product = u64{shape} multiply({name}.left, {name}.right)",
        f"{name}.half = u64[] constant(32)",
        f"{name}.halves = u64{shape} broadcast({name}.half), dimensions={{}}",
        f"{name}.high = u64{shape} shift-right-logical({name}.product, {name}.halves)",
        f"{root or ''}{name} = u32{shape} convert({name}.high)",
    ]
    return "\n".join(indent + line for line in wide)

"""What a sampling step costs on a TPU, by the estimate of the TPU's own compiler; no TPU is needed.

make bench-tpu                                        or, in the environment .venv-tpu:
python benchmarks/tpu.py [SAMPLER …] [--topology v5e:2x2] [--layout vocab] [--top 20] [--json]
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import common  # noqa: E402

common.use_tests()

import tpu_compiler  # noqa: E402
import tpu_samplers  # noqa: E402
from simd import CoreProgram  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samplers", nargs="*", metavar="SAMPLER")
    parser.add_argument("--topology", action="append")
    parser.add_argument("--layout", choices=tuple(tpu_samplers.LAYOUTS), action="append")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="list the N costliest kernels")
    args = parser.parse_args()
    for name in args.samplers or [*tpu_samplers.SAMPLERS, *tpu_samplers.PEERS]:
        for layout in args.layout or tpu_samplers.LAYOUTS:
            program = CoreProgram(*tpu_samplers.sampler(name), "x:4", tpu_samplers.LAYOUTS[layout])
            for topology in args.topology or ["v5e:2x2"]:
                report(name, layout, topology, program, args.top)


def report(name, layout, topology, program, top):
    compiled = tpu_compiler.TpuProgram(program.hlo, program.cores, topology)
    print(f"{name:12} {layout:6} {topology:10} {compiled.seconds:6.1f} s, code {compiled.code_bytes / 1e6:.1f} MB, "
          f"temporaries {compiled.temporary_bytes / 1e6:.2f} MB", flush=True)  # fmt: skip
    for (loops, branches), (cycles, kernels) in compiled.costs().items():
        print(f"    loops {loops} branches {branches}: {cycles:10,} cycles in {kernels:4} kernels")
    for kernel in sorted(compiled.kernels, key=lambda k: -k.cycles)[:top]:
        print(f"      {kernel.cycles:10,} loops {kernel.loops} branches {kernel.branches} {kernel.opcode:14} "
              f"{kernel.source[-90:]}")  # fmt: skip
    sys.stdout.flush()


if __name__ == "__main__":
    main()

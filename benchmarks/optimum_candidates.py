"""What is timed in an environment of its own: transformers' `generate` with a model that optimum runs elsewhere.

Each model is exported once, by the environment that runs it, next to the folder that it is made of.
"""

import importlib.metadata
import subprocess
import sys

import common
import torch
import torch_candidates

OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}


def exported(distribution, model_class, n_ctx):
    """The folder with a model as this distribution's class exports it, in float32; made once for each version."""
    source = common.model_folder(n_ctx)
    folder = source.with_name(f"{source.name}-{distribution}-{importlib.metadata.version(distribution)}")
    if not (folder / "config.json").exists():
        print(f"exporting {source} to {folder}", file=sys.stderr)
        partial = folder.with_name(folder.name + ".partial")
        # in a process of its own, whose memory and threads end with it
        code = f"""
import sys
from {model_class[0]} import {model_class[1]}
{model_class[1]}.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""
        subprocess.run([sys.executable, "-c", code, str(source), str(partial)], check=True, stdout=sys.stderr)
        partial.rename(folder)
    return folder


class OpenVINO(torch_candidates.Decoder):
    """optimum-intel: a stateful model, which keeps its caches, with attention as one operation."""

    def load(self, n_ctx, dtype):
        folder = exported("optimum-intel", ("optimum.intel", "OVModelForCausalLM"), n_ctx)
        from optimum.intel import OVModelForCausalLM

        settings = {
            "INFERENCE_NUM_THREADS": common.CORES,
            "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[dtype],
            "KV_CACHE_PRECISION": OPENVINO_TYPES[dtype],  # 8 bits by default
        }
        return OVModelForCausalLM.from_pretrained(folder, ov_config=settings)


class ONNXRuntime(torch_candidates.Decoder):
    """optimum-onnx. Its caches go in and out of each step."""

    def load(self, n_ctx, dtype):
        folder = exported("optimum-onnx", ("optimum.onnxruntime", "ORTModelForCausalLM"), n_ctx)
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        if dtype != "float32":
            raise ValueError(f"dtype {dtype!r}; ONNX Runtime's CPU kernels have float32 alone")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = common.CORES, 1
        return ORTModelForCausalLM.from_pretrained(folder, session_options=options)


DECODERS = {"OpenVINO: generate": OpenVINO, "ONNX Runtime: generate": ONNXRuntime}


def make(spec):
    """A candidate: {"candidate": its name, …: its arguments}."""
    torch.set_num_threads(common.CORES)
    torch.manual_seed(torch_candidates.SEED)
    spec = dict(spec)
    return DECODERS[spec.pop("candidate")](**spec)

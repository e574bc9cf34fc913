"""GPT-Neo's sampling in mesh-tensorflow: faithful, linear, repeatable."""

from gpt_neo_sampling import _compat  # noqa: F401  (first: makes mesh-tensorflow importable)
from gpt_neo_sampling.checkpoint import CheckpointError, convert_checkpoint, open_checkpoint
from gpt_neo_sampling.cluster import ClusterError
from gpt_neo_sampling.export import export_saved_model
from gpt_neo_sampling.generate import InvalidDistributionError, Sample, TextGenerator
from gpt_neo_sampling.mesh import DeviceMesh, MeshError, device_mesh
from gpt_neo_sampling.models.utils import (
    biasmask_attn_weights,
    entmax,
    entmax_cross_entropy_with_logits,
    parse_inputs,
    sample_categorical,
    top_k_mask,
)
from gpt_neo_sampling.prompts_file import generate_file
from gpt_neo_sampling.sample import sample_autoregressive
from gpt_neo_sampling.score import TextScore

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ClusterError",
    "DeviceMesh",
    "InvalidDistributionError",
    "MeshError",
    "Sample",
    "TextGenerator",
    "TextScore",
    "biasmask_attn_weights",
    "convert_checkpoint",
    "device_mesh",
    "entmax",
    "entmax_cross_entropy_with_logits",
    "export_saved_model",
    "generate_file",
    "open_checkpoint",
    "parse_inputs",
    "sample_autoregressive",
    "sample_categorical",
    "top_k_mask",
]

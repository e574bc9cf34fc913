"""GPT-Neo's sampling in mesh-tensorflow: faithful, linear, repeatable."""

from gpt_neo_sampling import _compat  # noqa: F401  (first: makes mesh-tensorflow importable)
from gpt_neo_sampling._version import VERSION
from gpt_neo_sampling.checkpoint import CheckpointError, convert_checkpoint, open_checkpoint
from gpt_neo_sampling.generation.export import export_saved_model
from gpt_neo_sampling.generation.generator import Interrupted, InvalidDistributionError, Sample, TextGenerator
from gpt_neo_sampling.generation.options import GenerationOptions
from gpt_neo_sampling.generation.prompts_file import generate_file
from gpt_neo_sampling.generation.scoring import TextScore
from gpt_neo_sampling.inspection import ChainStep
from gpt_neo_sampling.mesh.cluster import ClusterError
from gpt_neo_sampling.mesh.devices import DeviceMesh, MeshError, device_mesh
from gpt_neo_sampling.models.utils import (
    biasmask_attn_weights,
    entmax,
    entmax_cross_entropy_with_logits,
    epsilon_mask,
    eta_mask,
    logit_bias,
    min_p_mask,
    no_repeat_ngram_mask,
    parse_inputs,
    presence_frequency_penalty,
    repetition_penalty,
    sample_categorical,
    token_counts,
    tokens_mask,
    top_h_mask,
    top_k_mask,
    top_n_sigma_mask,
    top_p_mask,
    typical_p_mask,
)
from gpt_neo_sampling.sample import sample_autoregressive

__version__ = VERSION

__all__ = [
    "ChainStep",
    "CheckpointError",
    "ClusterError",
    "DeviceMesh",
    "GenerationOptions",
    "Interrupted",
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
    "epsilon_mask",
    "eta_mask",
    "export_saved_model",
    "generate_file",
    "logit_bias",
    "min_p_mask",
    "no_repeat_ngram_mask",
    "open_checkpoint",
    "parse_inputs",
    "presence_frequency_penalty",
    "repetition_penalty",
    "sample_autoregressive",
    "sample_categorical",
    "token_counts",
    "tokens_mask",
    "top_h_mask",
    "top_k_mask",
    "top_n_sigma_mask",
    "top_p_mask",
    "typical_p_mask",
]

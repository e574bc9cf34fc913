"""The package's public names."""

from gpt_neo_sampling.checkpoint import CheckpointError, convert_checkpoint, load_weights, open_checkpoint
from gpt_neo_sampling.generation.export import export_saved_model
from gpt_neo_sampling.generation.generator import Interrupted, InvalidDistributionError, Sample, TextGenerator
from gpt_neo_sampling.generation.options import GenerationOptions
from gpt_neo_sampling.generation.prompts_file import generate_file
from gpt_neo_sampling.generation.scoring import TextScore
from gpt_neo_sampling.inspection import ChainStep
from gpt_neo_sampling.mesh.cluster import ClusterError
from gpt_neo_sampling.mesh.devices import DeviceMesh, MeshError, device_mesh
from gpt_neo_sampling.models import utils as _operations
from gpt_neo_sampling.models.utils import *  # noqa: F403
from gpt_neo_sampling.sample import sample_autoregressive

__all__ = [
    *_operations.__all__,
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
    "convert_checkpoint",
    "device_mesh",
    "export_saved_model",
    "generate_file",
    "load_weights",
    "open_checkpoint",
    "sample_autoregressive",
]

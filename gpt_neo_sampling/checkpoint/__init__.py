"""Models on disk, opened by folder and read one tensor at a time.

Two formats: GPT-Neo's own (a TensorFlow 1 checkpoint of its mesh-tensorflow
variables, beside a JSON config), and a Hugging Face GPT-Neo folder. Both are read
under GPT-Neo's variable names and config keys. Everything is checked when the
folder is opened, so that an open checkpoint can always be built. Nothing in a
folder is ever run: a pickle may use only the names that tensors need.

Every error about a folder is a `CheckpointError` of one line, which says what
was found and what is allowed.
"""

from gpt_neo_sampling.checkpoint.base import Checkpoint, CheckpointError, variable_shapes
from gpt_neo_sampling.checkpoint.convert import convert_checkpoint
from gpt_neo_sampling.checkpoint.mesh_tf import write_mesh_tf_checkpoint
from gpt_neo_sampling.checkpoint.opening import open_checkpoint
from gpt_neo_sampling.checkpoint.tokenizer import load_tokenizer
from gpt_neo_sampling.checkpoint.variables import load_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "convert_checkpoint",
    "load_tokenizer",
    "load_weights",
    "open_checkpoint",
    "variable_shapes",
    "write_mesh_tf_checkpoint",
]

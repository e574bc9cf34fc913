"""Opening a model, of whichever kind it is."""

import re
from pathlib import Path

from gpt_neo_sampling._types import StrPath
from gpt_neo_sampling.checkpoint.base import ALLOWED, Checkpoint, CheckpointError, list_folder, some
from gpt_neo_sampling.checkpoint.hugging_face import holds_hugging_face, open_hugging_face
from gpt_neo_sampling.checkpoint.mesh_tf import lists_checkpoints, open_mesh_tf, open_mesh_tf_config


def open_checkpoint(path: StrPath) -> Checkpoint:
    """Opens the model in a folder, of whichever kind it is, and checks it.

    A GPT-Neo mesh-TF folder holds TensorFlow checkpoints `model.ckpt-N.*`, of
    which the one that the file `checkpoint` names is taken (by its base name,
    so a folder may be moved), or without that file the highest N; and a config,
    `config.json` or else the only *.json file with an `n_embd`. Where the config
    names `datasets`, and `dataset_configs/NAME.json` of one is beside it or in the
    folder, the last of them says, as in GPT-Neo, what eos_id and padding_id are
    (1 and 0 if it does not), and n_vocab if the config does not, and the tokenizer,
    if its tokenizer_path is on this machine.

    A Hugging Face folder holds `config.json` and `model.safetensors`, or else
    `pytorch_model.bin`, either of them whole or as shards with an index
    (`model.safetensors.index.json`); a pytorch_model.bin of a training loop may have
    the weights under `state_dict`, `model_state_dict`, `model` or `module`. What a
    wrapper (torch.compile, DataParallel, …) put into tensors' names is passed over, and
    a key that the config leaves out has transformers' default; either is logged. No
    weights are read yet, but for the token table and an output table where a model
    stores both.

    Args:
      path: of a folder, or of a mesh-TF model's JSON config; the folder is then
        the config's `model_path` (relative to the config or to the working
        directory), or without one the folder that the config is in.

    Returns:
      a `Checkpoint`.

    Raises:
      CheckpointError: (a ValueError) if there is no such folder, it holds no
        model or more than one kind, a file is damaged, the config asks for what
        GPT-Neo does not have, the variables are not those of the config, or
        their file is a pickle that asks for more than tensors; and for
        safetensors if that package is not installed.

    Example, with the model that comes with the package:

        >>> from gpt_neo_sampling.generation.generator import DEMO_FOLDER
        >>> with open_checkpoint(DEMO_FOLDER) as checkpoint:
        ...     print(checkpoint.kind, checkpoint.params["n_layer"], checkpoint.shape("wte"))
        ...     print(checkpoint.names()[:3], checkpoint.read("ln_f/g").dtype)
        mesh-tf 5 (2048, 192)
        ['h0/attn/compute_output_bias/o_b', 'h0/attn/k', 'h0/attn/o'] float32
    """
    try:
        return _opened(Path(path))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None


def _opened(path: Path) -> Checkpoint:
    if path.suffix == ".json" and path.is_file():
        return open_mesh_tf_config(path)
    files = list_folder(path)
    mesh_tf = lists_checkpoints(path, files) or any(re.fullmatch(r"model\.ckpt-\d+\..*", f) for f in files)
    hugging_face = holds_hugging_face(files)
    if mesh_tf and hugging_face:
        raise CheckpointError(
            f"{path} holds both a TensorFlow checkpoint and Hugging Face's weights; allowed: one of them"
        )
    if mesh_tf:
        return open_mesh_tf(path, files)
    if hugging_face:
        return open_hugging_face(path, files)
    raise CheckpointError(f"{path} holds no model, only {some(files)}; {ALLOWED}")

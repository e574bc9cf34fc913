"""Opening a model of either format."""

from pathlib import Path

from gpt_neo_sampling._types import StrPath
from gpt_neo_sampling.checkpoint.base import ALLOWED, Checkpoint, CheckpointError, list_folder, some
from gpt_neo_sampling.checkpoint.hub import check_revision, fetched, is_name, snapshot_of
from gpt_neo_sampling.checkpoint.hugging_face import open_hugging_face, weights_file
from gpt_neo_sampling.checkpoint.mesh_tf import holds_mesh_tf, open_mesh_tf, open_mesh_tf_config


def open_checkpoint(path: StrPath, revision: str | None = None) -> Checkpoint:
    """Opens the model in a folder, or of a name on the Hugging Face hub, whatever its format, and checks it.

    A GPT-Neo mesh-TF folder holds TensorFlow checkpoints `model.ckpt-N.*` and a
    config. The checkpoint is the one that the file `checkpoint` names (by its base
    name, so a folder may be moved), or without that file the one with the highest N.
    The config is `config.json`, or else the only *.json file with an `n_embd`. If it
    names `datasets`, and `dataset_configs/NAME.json` of some is beside it or in the
    folder, the last of them sets, as in GPT-Neo, eos_id and padding_id (by default 1
    and 0), n_vocab if the config does not, and the tokenizer, if its tokenizer_path
    is on this machine.

    A Hugging Face folder holds `config.json` and `model.safetensors`, or else
    `pytorch_model.bin`, as one file or as shards with an index
    (`model.safetensors.index.json`). A pytorch_model.bin from a training loop may
    have the weights under `state_dict`, `model_state_dict`, `model` or `module`.
    Prefixes that a wrapper (torch.compile, DataParallel, …) added to tensor names are
    dropped, and a key missing from the config has transformers' default; both are
    logged. No weights are read yet, except the token table and the output table where
    a model stores both.

    Args:
      path: of a folder, or of a mesh-TF model's JSON config; the folder is then
        the config's `model_path` (relative to the config or to the working
        directory), or without one the folder that the config is in. A str
        "owner/name" that is no path on this machine is a model of the hub: the files
        that are read, config, tokenizer and one format of weights, are fetched into
        the hub's cache, unless they are there. The cache's own folder of a model,
        `models--owner--name`, stands for the snapshot of its main branch, or for the
        newest with weights if main's has none.
      revision: a branch, a tag or a commit of a model by name; None for its main
        branch.

    Returns:
      a `Checkpoint`.

    Raises:
      CheckpointError: (a ValueError) if there is no such folder or name, it holds no model
        or both formats, a file is damaged, the config asks for something that
        GPT-Neo does not have, the variables do not match the config, or a pickle
        asks for more than tensors; and if the package safetensors or
        huggingface_hub is needed and not installed.
      ConnectionError, OSError: if the hub cannot be reached and its cache does not have
        the model, or the cache cannot be written.

    Example, with the model that comes with the package:

        >>> from gpt_neo_sampling.generation.generator import DEMO_FOLDER
        >>> with open_checkpoint(DEMO_FOLDER) as checkpoint:
        ...     print(checkpoint.kind, checkpoint.params["n_layer"], checkpoint.shape("wte"))
        ...     print(checkpoint.names()[:3], checkpoint.read("ln_f/g").dtype)
        mesh-tf 5 (2048, 192)
        ['h0/attn/compute_output_bias/o_b', 'h0/attn/k', 'h0/attn/o'] float32
    """
    check_revision(path, revision)
    if is_name(path):
        path = fetched(path, revision)
    try:
        return _opened(snapshot_of(Path(path)))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None


def _opened(path: Path) -> Checkpoint:
    if path.suffix == ".json" and path.is_file():
        return open_mesh_tf_config(path)
    files = list_folder(path)
    mesh_tf, hugging_face = holds_mesh_tf(path, files), weights_file(files) is not None
    if mesh_tf and hugging_face:
        raise CheckpointError(
            f"{path} holds both a TensorFlow checkpoint and Hugging Face weights; allowed: one of them"
        )
    if mesh_tf:
        return open_mesh_tf(path, files)
    if hugging_face:
        return open_hugging_face(path, files)
    raise CheckpointError(f"{path} holds no model, only {some(files)}; {ALLOWED}")

"""Models by name: from the Hugging Face hub into its cache, by huggingface_hub.

`huggingface_hub` brings the cache, the token, the offline switch and the progress bar. Here is which files are needed,
and what is said where they cannot be had. Small files come first and weights last, so a snapshot that has its weights
has the rest.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from gpt_neo_sampling._install import install_line
from gpt_neo_sampling._types import StrPath
from gpt_neo_sampling._version import VERSION
from gpt_neo_sampling.checkpoint.base import ALLOWED, EXAMPLE, CheckpointError, one_line, some
from gpt_neo_sampling.checkpoint.hugging_face import check_model_type, read_weight_map, weights_file
from gpt_neo_sampling.checkpoint.mesh_tf import holds_mesh_tf
from gpt_neo_sampling.checkpoint.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

_NAME = re.compile(r"\b[\w.-]+\b/\b[\w.-]{1,96}\b", re.ASCII)
_NO_NAME = re.compile(r"--|\.\.|\.(git|json)$")  # the hub has no such names; a config's path may look like one
# beside config.json and the weights; an adapter is only named
_SMALL_FILES = ("generation_config.json", *TOKENIZER_FILES, "adapter_config.json")
_NEEDED = "'*.json' '*.txt' '*.safetensors'"


def is_name(path: StrPath | None) -> TypeGuard[str]:
    """Whether this is a model's name on the hub: a str owner/name, unless there is a file or folder of that path."""
    return (
        isinstance(path, str)
        and _NAME.fullmatch(path) is not None
        and _NO_NAME.search(path) is None
        and not os.path.exists(path)
    )


def check_revision(path: StrPath | None, revision: str | None) -> None:
    """Raises CheckpointError for a revision of what has none; path: None for the bundled model."""
    if revision is None:
        return
    if not isinstance(revision, str) or not revision:
        raise CheckpointError(f"revision {revision!r}; allowed: a branch, tag or commit, as a str")
    if not is_name(path):
        where = "is on this machine" if path is None or os.path.exists(path) else "is no such name"
        raise CheckpointError(
            f"revision {revision!r} is allowed only with a model's name on the Hugging Face hub, such as {EXAMPLE}; "
            f"{'the bundled model' if path is None else path} {where}"
        )


def snapshot_of(folder: Path) -> Path:
    """Where the model is in the hub cache's own folder of one, models--OWNER--NAME; any other folder as it is.

    That is main's snapshot, or the newest; those without weights, of a config that was fetched alone, come last.
    """
    snapshots = folder / "snapshots"
    if not (snapshots.is_dir() and (folder / "blobs").is_dir()):
        return folder
    commits = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    if not commits:
        raise CheckpointError(f"{folder} is a folder of the Hugging Face hub's cache with no snapshot in it; {ALLOWED}")
    whole = [commit for commit in commits if _holds_weights(snapshots / commit)]
    main = _read_ref(folder, "main")
    if main in (whole or commits):
        return snapshots / main
    newest = max(whole or commits, key=lambda commit: (snapshots / commit).stat().st_mtime)
    if len(commits) > 1:
        lacks = "no weights in that of main" if main in commits else "none of main"
        chosen = "the newest with weights" if 0 < len(whole) < len(commits) else "the newest"
        others = some(str(snapshots / commit) for commit in commits if commit != newest)
        log.warning("%s has %d snapshots and %s: %s, %s, is used; the path of one is taken too (%s)",
                    folder, len(commits), lacks, newest, chosen, others)  # fmt: skip
    return snapshots / newest


def _read_ref(folder: Path, revision: str) -> str:
    """The commit that a branch or tag was at when it was fetched last, or ""."""
    try:
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def fetched(name: str, revision: str | None = None) -> Path:
    """The folder, in the hub's cache, of a model by name; what is not there yet is fetched.

    Args:
      name: owner/name.
      revision: a branch, a tag or a commit; None for the main branch.

    Raises:
      CheckpointError: if the hub has no such model or revision, or no weights in it that are read here; if it wants a
        token; if the hub may not be asked and the cache does not have it; or if huggingface_hub is not installed.
      ConnectionError: if the hub cannot be reached, and the cache does not have the model.
      OSError: if the cache cannot be written.
    """
    try:
        from huggingface_hub import HfApi, constants, errors
    except ImportError:
        raise CheckpointError(
            f"there is no folder {name}; a model's name on the Hugging Face hub needs the package huggingface_hub: "
            f"{install_line('huggingface-hub')}"
        ) from None
    api = HfApi(library_name="gpt_neo_sampling", library_version=VERSION)
    try:
        info = api.model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as e:  # of the library's HTTP package, which changes from release to release
        problem = _problem(name, revision, e)
        folder = None if isinstance(e, errors.RevisionNotFoundError) else _cached(name, revision)
        if folder is None:
            raise problem from e
        if not isinstance(e, errors.OfflineModeIsEnabled):
            log.warning("%s is read from the hub's cache: %s", name, problem)
        return folder
    assert info.sha is not None and info.siblings is not None, "of a model's page always"
    return _fetch(api, name, revision, info.sha, [file.rfilename for file in info.siblings])


def _fetch(api: HfApi, name: str, revision: str | None, commit: str, files: list[str]) -> Path:
    """Fetches what is needed of a commit's files and is not in the cache; returns the snapshot's folder."""

    def fetch(file: str, at: str = commit) -> Path:
        try:
            return Path(api.hf_hub_download(name, file, revision=at))
        except Exception as e:  # as above
            raise _problem(name, revision, e) from e

    weights = weights_file(files)
    if weights is None or "config.json" not in files:
        raise CheckpointError(
            f"{name} on the Hugging Face hub holds no model that is read, only {some(sorted(files))}; "
            "allowed: config.json with model.safetensors or pytorch_model.bin"
        )
    config_file = fetch("config.json")
    check_model_type(config_file)  # before gigabytes of another model come
    for file in _SMALL_FILES:
        if file in files:
            fetch(file)
    weights_path = fetch(weights)
    if weights.endswith(".index.json"):
        for shard in sorted(set(read_weight_map(weights_path, files).values())):
            fetch(shard)
    branch = revision or "main"
    if branch != commit and _read_ref(config_file.parents[2], branch) != commit:
        fetch("config.json", branch)  # so that the branch leads to the snapshot, and only now that it is whole
    return config_file.parent


def _holds_weights(folder: Path) -> bool:
    """Whether a snapshot has a model's weights, in either format."""
    files = os.listdir(folder)
    return _holds_hugging_face(folder, files) or holds_mesh_tf(folder, files)


def _holds_hugging_face(folder: Path, files: list[str]) -> bool:
    """Whether a folder with these files has weights of Hugging Face's format; of shards, all."""
    weights = weights_file(files)
    if weights is None or not weights.endswith(".index.json"):
        return weights is not None
    try:
        read_weight_map(folder / weights, files)
    except CheckpointError:
        return False
    return True


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a model whose weights are all in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    config_file = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config_file, str):
        return None
    folder = Path(config_file).parent
    files = os.listdir(folder)
    if not _holds_hugging_face(folder, files):
        return None
    if not ("tokenizer.json" in files or {"vocab.json", "merges.txt"} <= set(files)):
        log.warning("%s: the hub's cache has no tokenizer of it; if there is one, this fetches it: %s",
                    name, _command(name, revision))  # fmt: skip
    return folder


def _command(name: str, revision: str | None) -> str:
    """What fetches a model into the cache elsewhere, and a remark."""
    of_revision = f" --revision {shlex.quote(revision)}" if revision else ""
    return f"`hf download {name}{of_revision} {_NEEDED}`, with '*.bin' in place of '*.safetensors' if it has none"


def _problem(name: str, revision: str | None, error: Any) -> Exception:
    """The error of one line for what huggingface_hub raised."""
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    asked = f"{name} at revision {revision!r}" if revision else name
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"there is no folder {name}, the Hugging Face hub's cache, {cache}, does not have all of {asked}, and "
            f"HF_HUB_OFFLINE is set; where there is a network, this fetches it: {_command(name, revision)}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{name} on {hub} has no revision {revision or 'main'!r}; allowed: a branch, tag or commit"
        )
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name} is gated: {hub}/{name} says how to get access; then `hf auth login` or HF_TOKEN gives the token"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"there is no folder {name}, and {hub} has no such model, or a private one: "
            "`hf auth login` or HF_TOKEN gives the token for that"
        )
    if status in (401, 403):
        return CheckpointError(
            f"{asked}: {hub} does not accept the token (status {status}); "
            "`hf auth login` or HF_TOKEN gives another, `hf auth logout` none"
        )
    is_of_disk = isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError))
    if is_of_disk and error.strerror:
        where = f"the Hugging Face hub's cache, {cache}"
        return OSError(f"{asked} cannot be written to {where}: {error.strerror}; HF_HUB_CACHE names another folder")
    reason = f"it answers with status {status}" if status else error.__cause__ or error
    again = "run the same command when it can be: what came whole is kept"
    return ConnectionError(one_line(f"{asked} cannot be fetched from {hub}: {reason}; {again}"))

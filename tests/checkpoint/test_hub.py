"""Models by name, from a hub on loopback (tests/hub_server.py), by commands of their own process.

huggingface_hub reads its variables when it is imported, which a command does in the process that was forked for it.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import processes
import pytest
from helpers_checkpoint import (
    HUGGING_FACE,
    TINY,
    as_hugging_face,
    make_hugging_face,
    make_sharded,
    random_weights,
    write_json,
)
from hub_server import TOKEN, Hub, commit_of
from test_pytorch_files import write_pytorch

from gpt_neo_sampling.checkpoint import CheckpointError, hub, open_checkpoint

pytestmark = pytest.mark.any_version

pytest.importorskip("huggingface_hub", reason="models by name need huggingface_hub, which [test] installs")

NAME = "Owner/gpt-neo_tiny.1"
UNNEEDED = {"README.md": b"#", "flax_model.msgpack": b"x", "tf_model.h5": b"x", "rust_model.ot": b"x", "a.onnx": b"x"}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The files of a model: the config, a tokenizer, and weights in both formats, the .bin's others."""
    folder = make_hugging_face(tmp_path_factory.mktemp("models") / "plain")
    write_pytorch(folder / "pytorch_model.bin", as_hugging_face(random_weights(TINY, seed=1)))
    write_json(folder / "generation_config.json", {"do_sample": True})
    vocab = {letter: i for i, letter in enumerate("abcdefghijk")}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
    write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": model})
    return files(folder)


@pytest.fixture
def server(plain):
    with Hub() as server:
        server.models[NAME] = {"main": {**plain, **UNNEEDED}}
        yield server


@pytest.fixture
def command(server, tmp_path):
    """A function that runs a command with the hub, or with variables of its own: a CompletedProcess."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TQDM_", "HUGGING"))}

    def run(*args, **variables):
        return processes.run(*args, env={**clean, **server.environment(tmp_path / "home"), **variables})

    return run


@pytest.fixture
def convert(command, tmp_path):
    """A function that converts a model by name to this format, and returns (the process, the files written)."""

    def run(*args, **variables):
        destination = tmp_path / f"converted-{len(list(tmp_path.iterdir()))}"
        done = command("convert", args[0], destination, "--to", "huggingface", *args[1:], **variables)
        return done, files(destination) if destination.exists() else None

    return run


def folder_of(tmp_path, model):
    """A folder of these files, but for the ones that are not needed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    unneeded = {*UNNEEDED, "pytorch_model.bin"} if "model.safetensors" in model else UNNEEDED
    for name in model.keys() - unneeded:
        (folder / name).write_bytes(model[name])
    return folder


def converted(tmp_path, model):
    """The files that `convert` makes of these ones."""
    folder = folder_of(tmp_path, model)
    done = processes.run("convert", folder, tmp_path / "expected", "--to", "huggingface")
    assert done.returncode == 0, done.stderr
    return files(tmp_path / "expected")


def cache(tmp_path):
    return tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}"


def error(done):
    """What a command that failed says: one line."""
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr.removeprefix("gpt-neo-sampling: error: ").rstrip("\n")


def test_a_model_by_name(command, server, plain, tmp_path):
    """Only what is needed comes, once; stderr, which is no terminal, gets no bar."""
    generate = ["generate", "--model", NAME, "--prompt", "c", "--seed", "1", "--max-new-tokens", "4", "--json"]
    first = command(*generate)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    (sample,) = json.loads(first.stdout)["samples"]
    assert sample["prompt_tokens"] == [2] and sample["text"]
    wanted = ["config.json", "generation_config.json", "tokenizer.json"]
    assert server.fetched() == wanted and [file for file, *_ in server.sent] == ["model.safetensors"]

    again = command(*generate)
    assert again.stdout == first.stdout and again.stderr == ""
    assert server.asked == [("GET", f"/api/models/{NAME}")]

    # its cache's folder is the same model, also for a prompts file that goes on where it stopped
    with open_checkpoint(cache(tmp_path)) as of_cache, open_checkpoint(folder_of(tmp_path, plain)) as of_folder:
        assert of_cache.fingerprint() == of_folder.fingerprint()
        assert of_cache.folder == cache(tmp_path) / "snapshots" / commit_of(server.models[NAME]["main"])


@pytest.mark.parametrize("kind", ["sharded", "pytorch_model.bin"])
def test_weights_in_other_files(convert, server, plain, tmp_path, kind):
    """Shards, with none that the index does not name; and PyTorch's format where there is no other."""
    if kind == "sharded":
        made = files(make_sharded(tmp_path / "made", as_hugging_face(random_weights(TINY))))
        beside = {"model-00004-of-00004.safetensors": b"x", "pytorch_model.bin": b"x"}
    else:
        made = {name: content for name, content in plain.items() if name != "model.safetensors"}
        beside = {}
    server.models[NAME] = {"main": {**made, **beside, **UNNEEDED}}
    expected = converted(tmp_path, made)
    done, written = convert(NAME)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert written == expected
    weights = sorted(name for name in made if name.endswith((".safetensors", ".bin")))
    assert sorted(file for file, *_ in server.sent) == weights


def test_another_revision(convert, server, plain, tmp_path):
    """A tag, a branch with a slash in its name and a commit; each is found again without the hub."""
    other = dict(plain, **files(make_hugging_face(tmp_path / "made", tensors=as_hugging_face(random_weights(TINY, 2)))))
    server.models[NAME] |= {"v2": other, "refs/pr/1": {**other, "README.md": b""}}
    expected = converted(tmp_path, other)
    for revision in ("v2", "refs/pr/1", commit_of(other)):
        for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
            done, written = convert(NAME, "--revision", revision, **variables)
            assert done.returncode == 0 and done.stderr == "", done.stderr
            assert written == expected
    assert convert(NAME)[1] != expected


def test_a_branch_that_moves(convert, server, plain):
    """What is fetched is what the branch has now, and that the cache leads to."""
    first = convert(NAME)[1]
    moved = {**plain, "generation_config.json": b'{"temperature": 0.5}'}
    server.models[NAME] = {"main": moved}
    server.sent.clear()
    second = convert(NAME)[1]
    assert second["generation_config.json"] == moved["generation_config.json"] != first["generation_config.json"]
    assert server.sent == []  # the weights are the same
    assert convert(NAME, HF_HUB_OFFLINE="1")[1] == second


def test_gated(convert, server):
    """With the token, which the storage does not get."""
    server.gated.add(NAME)
    message = f"{NAME} is gated: {server.address}/{NAME} says how to get access"
    for token in ({}, {"HF_TOKEN": "hf_other"}):
        status, line = error(convert(NAME, **token)[0])
        assert status == 2 and message in line and "`hf auth login` or HF_TOKEN" in line
    assert server.sent == []
    done, written = convert(NAME, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and written
    assert server.sent == [("model.safetensors", 0, None)]


WRONG = {
    "missing": (
        ["Owner/other"], {}, 2,
        ["there is no folder Owner/other, and <HUB> has no such model, or a private one: `hf auth login` or HF_TOKEN"],
    ),
    "revision": ([NAME, "--revision", "v9"], {}, 2, [f"{NAME} on <HUB> has no revision 'v9'; allowed: a branch, tag"]),
    "no such name": (["no--name/x"], {}, 2, ["no--name/x does not exist; allowed: a folder on this machine, or a"]),
    "no weights": (["Owner/adapter"], {}, 2, ["holds no model that is read, only adapter_model.safetensors, config"]),
    "another architecture": (["Owner/llama"], {}, 2, ["config.json: model_type is 'llama'; allowed: 'gpt_neo'"]),
    "a shard is missing": (["Owner/shards"], {}, 2, ["lacks 1 files that its index names: model-00002-of-00003"]),
    "no network": (
        [NAME], {"HF_ENDPOINT": "http://127.0.0.1:1"}, 1,
        [f"{NAME} cannot be fetched from http://127.0.0.1:1: ", "refused", "; run the same command when it can be"],
    ),
    "offline": (
        [NAME, "--revision", "a b"], {"HF_HUB_OFFLINE": "1"}, 2,
        [f"cache, <HOME>/hub, does not have all of {NAME} at revision 'a b', and HF_HUB_OFFLINE is set; ",
         f"where there is a network, this fetches it: `hf download {NAME} --revision 'a b' '*.json' '*.txt' "],
    ),
    "no room for the cache": (
        [NAME], {"HF_HUB_CACHE": "/proc/no"}, 1,
        [f"{NAME} cannot be written to the Hugging Face hub's cache, /proc/no: ", "HF_HUB_CACHE names another folder"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_fetched_is_one_line(convert, server, plain, tmp_path, what):
    shards = files(make_sharded(tmp_path / "made", as_hugging_face(random_weights(TINY))))
    del shards["model-00002-of-00003.safetensors"]
    server.models |= {
        "Owner/adapter": {"main": {"config.json": b"{}", "adapter_model.safetensors": b"x"}},
        "Owner/llama": {"main": {**plain, "config.json": b'{"model_type": "llama"}'}},
        "Owner/shards": {"main": shards},
    }
    args, variables, status, parts = WRONG[what]
    done, written = convert(*args, **variables)
    found, line = error(done)
    assert found == status and written is None
    for part in parts:
        assert part.replace("<HUB>", server.address).replace("<HOME>", str(tmp_path / "home")) in line
    assert server.sent == []  # not a byte of weights


def test_the_command_that_fetches_is_one_of_a_shell(convert):
    _, line = error(convert(NAME, "--revision", "a b", HF_HUB_OFFLINE="1")[0])
    (command,) = re.findall("`(hf download .*?)`", line)
    printed = subprocess.run(
        ["bash", "-c", f"hf() {{ printf '%s\\n' \"$@\"; }}; {command}"], capture_output=True, text=True
    )
    wanted = ["download", NAME, "--revision", "a b", "*.json", "*.txt", "*.safetensors"]
    assert printed.stdout.splitlines() == wanted == shlex.split(command)[1:] and printed.stderr == ""


def test_a_token_that_is_not_accepted(convert, server):
    server.status = 403
    status, line = error(convert(NAME, HF_TOKEN="hf_old")[0])
    assert status == 2 and f"{server.address} does not accept the token (status 403)" in line


def test_without_the_hub_the_cache_has_it(convert, server):
    """In silence where that is asked for, and else with a note."""
    expected = convert(NAME)[1]
    server.asked.clear()
    done, written = convert(NAME, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stderr == "" and written == expected and server.asked == []
    server.status = 503
    done, written = convert(NAME)
    assert done.returncode == 0 and written == expected
    why = f"{NAME} cannot be fetched from {server.address}: it answers with status 503"
    assert done.stderr.startswith(f"note: {NAME} is read from the hub's cache: {why}") and done.stderr.count("\n") == 1


def test_a_cache_without_the_tokenizer(convert, server):
    """As other programs leave one."""
    tokenizer = server.models[NAME]["main"].pop("tokenizer.json")
    assert convert(NAME)[0].stderr == ""
    done, _ = convert(NAME, HF_HUB_OFFLINE="1")
    assert f"note: {NAME}: the hub's cache has no tokenizer of it; if there is one, this fetches it: `hf" in done.stderr
    assert done.returncode == 0 and tokenizer


def test_a_download_that_is_cut(convert, server, tmp_path):
    """What came is kept, from whole parts of 10 MiB on, and the same command completes it."""
    mask = {"transformer.h.0.attn.attention.bias": ("U8", np.zeros(11 * 2**20, np.uint8))}  # which is not read
    made = make_hugging_face(tmp_path / "made", tensors={**as_hugging_face(random_weights(TINY)), **mask})
    server.models[NAME] = {"main": files(made)}
    server.cut["model.safetensors"] = 10 * 2**20 + 1000
    for _ in range(2):  # the newest huggingface_hub goes on by itself
        done, written = convert(NAME)
        if done.returncode == 0:
            break
        assert "cannot be fetched from" in error(done)[1] and written is None
    assert [begin for _, begin, _ in server.sent] == [0, 10 * 2**20]
    assert written == converted(tmp_path, server.models[NAME]["main"])


def test_a_hub_that_goes_away_midway(convert, server, tmp_path):
    class Cuts(dict):
        def pop(self, file, default=None):
            server.status = 503
            return 1000

    server.cut = Cuts()
    done, written = convert(NAME)
    assert done.returncode == 1 and written is None and "cannot be fetched from" in done.stderr.splitlines()[-1]
    snapshots = [path.name for path in (cache(tmp_path) / "snapshots").rglob("*.*")]
    assert sorted(snapshots) == ["config.json", "generation_config.json", "tokenizer.json"]
    assert "does not have all of" in error(convert(NAME, HF_HUB_OFFLINE="1")[0])[1]
    server.status, server.cut = None, {}
    done, written = convert(NAME)
    assert done.returncode == 0 and written


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name(NAME)
    (tmp_path / "Owner").mkdir()
    make_hugging_face(tmp_path / NAME)
    assert not hub.is_name(NAME)
    assert open_checkpoint(NAME).folder == tmp_path.__class__(NAME)
    with pytest.raises(CheckpointError, match="revision 'v2' is allowed only with a model's name .* on this machine"):
        open_checkpoint(NAME, revision="v2")


@pytest.mark.parametrize(
    "path",
    ["gpt2", "a/b/c", "/a/b", "./a/b", "../a", "~/a", "a/", "a/b/", "a/.b", "a-/b", "a--b/c", "a/b..c", "a/b.json",
     "a/b.git", "a b/c", "a/" + "b" * 97, "a\\b/c", "a/b\0", "é/b", os.fspath(HUGGING_FACE), HUGGING_FACE / "a", None],
)  # fmt: skip
def test_what_is_no_name(path):
    assert not hub.is_name(path)


def test_the_caches_own_folder(tmp_path, caplog):
    """refs/main, else the only snapshot, else the newest, with a note."""
    folder = tmp_path / "models--owner--name"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "blobs").mkdir()
    with pytest.raises(CheckpointError, match="models--owner--name is a folder of .* cache with no snapshot in it"):
        open_checkpoint(folder)
    for i, commit in enumerate("ab"):
        made = make_hugging_face(folder / "snapshots" / commit)
        os.utime(made, (i, i))
        assert open_checkpoint(folder).folder == made
        assert len(caplog.records) == i  # from the second on
    assert "has 2 snapshots and none of main: b, the newest, is used; the path of one is taken too" in caplog.text
    assert str(folder / "snapshots" / "a") in caplog.text
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a")
    assert open_checkpoint(str(folder)).folder == folder / "snapshots" / "a"
    assert len(caplog.records) == 1
    (folder / "snapshots" / "c").mkdir()  # the newest, and then main's, and it has no weights
    write_json(folder / "snapshots" / "c" / "config.json", {"model_type": "gpt_neo"})
    assert open_checkpoint(folder).folder == folder / "snapshots" / "a"
    (folder / "refs" / "main").write_text("c")
    assert open_checkpoint(folder).folder == folder / "snapshots" / "b"
    assert "has 3 snapshots and no weights in that of main: b, the newest with weights, is used" in caplog.text


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        (NAME, 5, "revision 5; allowed: a branch, tag or commit, as a str"),
        (NAME, "", "revision ''; allowed: a branch"),
        ("nowhere", "v2", "revision 'v2' is allowed only with a model's name on the Hugging Face hub, such as Ele"),
        (HUGGING_FACE, "v2", "hf_gpt_neo_tiny is on this machine"),
    ],
)
def test_revisions_of_nothing(path, revision, message):
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path, revision)
    assert message in str(e.value)


def test_huggingface_hub_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs the package huggingface_hub: .*pip install .?huggingface-hub"):
        open_checkpoint(NAME)

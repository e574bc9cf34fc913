"""What is wrong, the call, and the one line that it gets: the command's, Python's, and files made to do harm.

What belongs to one module alone (a layout that does not fit, a damaged index) is in its tests.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import DATA
from helpers_checkpoint import (
    DATA_FILE,
    HUGGING_FACE,
    INDEX_FILE,
    TINY,
    TINY_HF,
    as_hugging_face,
    config_with,
    edit_json,
    in_index,
    make_hugging_face,
    make_mesh_tf,
    make_sharded,
    put,
    random_weights,
    table,
    write_json,
)
from programs import dims
from test_cli import generator
from test_pytorch_files import Storage, pickled, tensor, write_zip

import gpt_neo_sampling as g
from gpt_neo_sampling import (
    CheckpointError,
    MeshError,
    TextGenerator,
    convert_checkpoint,
    device_mesh,
    export_saved_model,
    generate_file,
    open_checkpoint,
)
from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.checkpoint import tensorflow_index
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.generation.generator import DEMO_FOLDER
from gpt_neo_sampling.mesh import ops
from gpt_neo_sampling.models import gpt2, layers
from gpt_neo_sampling.sampling.controls import SamplingOptions
from gpt_neo_sampling.sampling.next_token import next_token

GLOBAL = str(DATA / "gpt_neo_checkpoints" / "global")
DEVICES = "cpu:0,cpu:1"


def files(root):
    """Everything below a folder: path -> bytes, or None if it is not a file."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def is_one_line(text):
    return text.isprintable() and 0 < len(text) < 1300


# ------------------------------------------------------------ the command
# TMP is a folder with the files of `folder`. Nothing in it may change, and nothing may go to stdout.


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Emma"}\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "Zo\xeb"}\n')
    (tmp_path / "huge.jsonl").write_text('{"prompt": "Emma", "id": 1e400}\n')
    (tmp_path / "latin.txt").write_bytes(b"Zo\xeb")
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "mine.run").write_text("[1]")
    (tmp_path / "gone.run").write_text("[1]")
    (tmp_path / "begun.jsonl").write_text('{"index": 0}\n')
    (tmp_path / "begun.jsonl.run").write_text('{"seed": 1}')
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "kept").write_text("kept")
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    return tmp_path


GENERATE = ["generate", "--prompt", "a"]
IDS = ["generate", "--model", GLOBAL, "--prompt-ids", "5"]
FILE = ["generate", "--prompts-file", "TMP/in.jsonl", "--output"]
INSPECT = ["inspect", "--prompt", "Emma"]
EXPORT = ["export", "--output", "TMP/new/model", "--batch", "1", "--length", "8"]
CONVERT = ["convert", GLOBAL]
LONG = "x" * 300

COMMANDS = {
    "no command": ([], "the following arguments are required: COMMAND"),
    "another command": (["sing"], "invalid choice: 'sing'"),
    # -- prompts
    "no prompt": (["generate"], "a prompt is needed: as a plain argument, - for stdin, or by one of --prompt, "),
    "a control character": ([*GENERATE, "--foo\x1b[31m"], "unrecognized arguments: --foo\\x1b[31m"),
    "top-k of 6,000 digits": ([*GENERATE, "--top-k", "1" * 6000], "11111 … 11111"),
    "two kinds of prompt": ([*GENERATE, "--prompt-ids", "1"], "--prompt-ids: not allowed with argument --prompt"),
    "two kinds of prompt, one plain": (["generate", "a", "--prompt-ids", "1"], "'a': not allowed with --prompt-ids"),
    "stdin twice": (["generate", "-", "-"], "- is given more than once, but stdin can be read once"),
    "no prompt to inspect": (["inspect"], "a prompt is needed: as a plain argument, - for stdin, or by one of --"),
    "two prompts to inspect": (["inspect", "a", "b"], "unrecognized arguments: b"),
    "too long": (["generate", "--prompt", "word " * 400], "is longer than the context; at most 256 are allowed"),
    "id outside": (["generate", "--prompt-ids", "5 2048"], "2048 is outside the vocabulary; 0 to 2047 are allowed"),
    "id below 0": (["generate", "--prompt-ids=-5"], "token id -5 is outside the vocabulary; 0 to 2047 are allowed"),
    "id is a word": (["generate", "--prompt-ids", "5 x"], "'5 x': whole numbers separated by spaces are needed"),
    "id with an underline": (["generate", "--prompt-ids", "1_0"], "'1_0': whole numbers separated by spaces are"),
    "id of 5,000 digits": (["generate", "--prompt-ids", "1" * 5000], "whole numbers separated by spaces"),
    "not Unicode": (["generate", "--prompt", "a\udcff"], "a text is not Unicode"),
    "text without a tokenizer": ([*GENERATE, "--model", GLOBAL], "no tokenizer.json, nor vocab.json and merges.txt"),
    # -- options
    "temperature in words": ([*GENERATE, "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
    "temperature below 0": ([*GENERATE, "--temperature=-1"], "=-1.0; a finite number of at least 0 is needed"),
    "temperature inf": ([*GENERATE, "--temperature", "inf"], "=inf; a finite number of at least 0 is needed"),
    "temperature NaN": ([*GENERATE, "--temperature", "nan"], "=nan; a finite number of at least 0 is needed"),
    "top-k below 0": ([*GENERATE, "--top-k=-1"], "top_k=-1; a whole number from 0 to 2147483647 is needed"),
    "top-k too large": ([*GENERATE, "--top-k", "9" * 40], "; a whole number from 0 to 2147483647 is needed"),
    "top-p above 1": ([*GENERATE, "--top-p", "2"], "top_p=2.0; a number from 0 to 1 is needed"),
    "alpha above 2": ([*GENERATE, "--entmax", "2.5"], "entmax_alpha=2.5; a number from 1 to 2 is needed"),
    "alpha below 1": ([*GENERATE, "--entmax", "0.5"], "entmax_alpha=0.5; a number from 1 to 2 is needed"),
    "no new tokens": ([*GENERATE, "--max-new-tokens", "0"], "max_new_tokens=0; a whole number from 1 to 2147483647"),
    "samples below 1": ([*GENERATE, "--num-samples=-3"], "num_return_sequences=-3; a whole number from 1"),
    "samples too many": ([*GENERATE, "--num-samples", "9999999999"], "=9999999999; a whole number from 1 to 214748364"),
    "seed too large": ([*GENERATE, "--seed", "99999999999"], "seed=99999999999; a whole number from -2147483648 to"),
    "n-grams too long": ([*GENERATE, "--no-repeat-ngram-size", "9" * 20], "; a whole number from 0 to 2147483647"),
    "stop token too large": ([*GENERATE, "--eos-token-id", "9999999999"], "a whole number from -1 to 2047 is needed"),
    "stop tokens too many": (
        [*GENERATE, "--eos-token-id", *map(str, range(300))],
        "eos_token_id has 300 tokens; at most 256 are allowed",
    ),
    "bias without a number": ([*GENERATE, "--logit-bias", "5"], "'5': a token's id and a number are needed, as in 13="),
    "sequence bias without ids": (
        [*GENERATE, "--sequence-bias", "=5"],
        "'=5': ids and a number are needed, as in \"12 1",
    ),
    "sequence bias twice": ([*GENERATE, "--sequence-bias", "5 6=1", "5,6=2"], "--sequence-bias has '5,6' twice"),
    "decay of one number": (
        [*GENERATE, "--exponential-decay-length-penalty", "5"],
        "'5': a number of tokens and a fac",
    ),
    "bad word of no ids": ([*GENERATE, "--bad-words-ids", ""], "bad_words_ids: []; lists of at least one token id"),
    "bad word of letters": ([*GENERATE, "--bad-words-ids", "a"], "--bad-words-ids 'a': whole numbers separated by sp"),
    "a number of a control that is off": ([*GENERATE, "--xtc-threshold", "0.2"], "xtc_threshold=0.2 without xtc_pro"),
    "mirostat with a mask": ([*GENERATE, "--mirostat", "2", "--top-p", "0.9"], "mirostat=2 with top_p=0.9; mirostat t"),
    "two least lengths": ([*GENERATE, "--min-length", "9", "--min-new-tokens", "3"], "min_length=9 with min_new_token"),
    "bias with an underline": ([*GENERATE, "--logit-bias", "1_0=1"], "'1_0=1': a token's id and a number are needed"),
    "bias twice": ([*GENERATE, "--logit-bias", "5=1", "5=2"], "--logit-bias has token 5 twice"),
    "bias NaN": ([*GENERATE, "--logit-bias", "5=nan"], "{5: nan}; a finite number of 32 bits, or -inf, is ne"),
    "bias of 1e39": ([*GENERATE, "--logit-bias", "5=-1e39"], "{5: -1e+39}; a finite number of 32 bits, or -inf, is"),
    "stop string of a token": ([*GENERATE, "--stop-strings", "<|endoftext|>"], "which no text does; give eos_token_id"),
    "greedy and top-k": (
        [*GENERATE, "--greedy", "--top-k", "3"],
        "top_k=3 with do_sample=False, which is greedy; leav",
    ),
    "dtype": ([*GENERATE, "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    "log-probabilities of text": ([*GENERATE, "--logprobs"], "--logprobs needs --json or --output"),
    # -- models
    "no model": ([*GENERATE, "--model", "nowhere"], "nowhere does not exist; allowed: a folder on this machine"),
    "model's name too long": ([*GENERATE, "--model", f"{LONG}.json"], ".json cannot be read: [Errno 36] File name too"),
    "model is a device": ([*GENERATE, "--model", "/dev/null"], "/dev/null is a file; allowed: the model's folder"),
    # -- meshes and clusters
    "mesh shape": (
        [*IDS, "--mesh-shape", "x"],
        "mesh shape 'x': 'x' is not an axis and its size; allowed: such as x:2",
    ),
    "mesh size": ([*IDS, "--mesh-shape", "x:0"], "'x:0' is not an axis and its size; allowed: such as x:2,y:2"),
    "mesh size of 5,000 digits": (
        [*IDS, "--mesh-shape", "x:" + "1" * 5000],
        "is not an axis and its size; allowed: su",
    ),
    "layout": ([*IDS, "--layout", "batch"], "layout 'batch': 'batch' is not a dimension and its axis; allowed: such"),
    "layout without a mesh": (
        [*IDS, "--layout", "batch:x"],
        "but the mesh has no axes (give a mesh shape, such as x:2)",
    ),
    "layout of another axis": (
        [*IDS, "--devices", DEVICES, "--mesh-shape", "x:2", "--layout", "batch:y"],
        "layout batch:y splits along y, but the axes of the mesh are x",
    ),
    "one axis for two": (
        [*IDS, "--devices", DEVICES, "--mesh-shape", "x:2", "--layout", "batch:x,vocab:x"],
        "along the same axis x, but a tensor",
    ),
    "heads do not divide": (
        [*IDS, "--devices", "cpu:0,cpu:1,cpu:2", "--mesh-shape", "x:3", "--layout", "heads:x"],
        "splits heads=4 over x:3, which does not divide it; allowed sizes of x: 1, 2, 4",
    ),
    "no devices": (
        [*IDS, "--mesh-shape", "x:2"],
        "x:2 has 2 processors, but no devices are named; name 2, such as cpu",
    ),
    "devices too many": (
        [*IDS, "--devices", DEVICES],
        "(none) has 1 processor, but 2 devices are named (cpu:0, cpu:1)",
    ),
    "a device twice": ([*IDS, "--devices", "cpu:0,cpu:0", "--mesh-shape", "x:2"], "cpu:0 is named more than once"),
    "a device twice, once with 00": (
        [*IDS, "--devices", "cpu:0,cpu:00", "--mesh-shape", "x:2", "--layout", "batch:x"],
        "cpu:0 is named more than once",
    ),
    "a device in full-width digits": ([*IDS, "--devices", "cpu:１"], "is not a device; allowed: cpu:0, gpu:1"),
    "no device": ([*IDS, "--devices", "disk:0"], "'disk:0' is not a device; allowed: cpu:0, gpu:1, in a cluster"),
    "a device's number": (
        [*IDS, "--devices", "cpu:99999999"],
        "devices: 'cpu:99999999'; allowed: numbers from 0 to 1023",
    ),
    "a device without a cluster": ([*IDS, "--devices", "worker:0/cpu:0"], "there is no cluster (see --cluster)"),
    "cluster": ([*IDS, "--cluster", "nowhere"], "cluster 'nowhere': 'nowhere' is not an address; allowed: host:port"),
    "cluster's port": ([*IDS, "--cluster", "host:99999"], "'host:99999' is not an address; allowed: host:port"),
    "cluster's port of 5,000 digits": ([*IDS, "--cluster", "a:" + "1" * 5000], "is not an address; allowed: host:port"),
    "cluster of nobody": ([*IDS, "--cluster", ","], "cluster ',' names no address; allowed: host:port,host:port"),
    "serve's CPUs": (
        ["serve", "--cluster", "localhost:1", "--task", "worker:0", "--cpus", "99999"],
        "--cpus=99999; a whole number from 1 to 1024 is needed",
    ),
    # -- prompts files and their output
    "output alone": ([*GENERATE, "--output", "TMP/o"], "--prompts-file and --output need each other"),
    "prompts file alone": (FILE[:3], "--prompts-file and --output need each other"),
    "prompts file and prompt": (
        [*FILE, "TMP/o", "--prompt", "a"],
        "--prompt: not allowed with argument --prompts-file",
    ),
    "output and --json": ([*FILE, "TMP/o", "--json"], "--json is for stdout; --output is always JSON"),
    "no prompts file": (
        ["generate", "--prompts-file", "TMP/no", "--output", "TMP/o"],
        "no cannot be read: No such file",
    ),
    "prompts as plain text": (
        ["generate", "--prompts-file", "TMP/mine", "--output", "TMP/o"],
        'mine, line 1: not JSON; a line should look like {"prompt": "kept"}',
    ),
    "prompts file and stream": ([*FILE, "TMP/o", "--stream", "1"], "--stream is not for --prompts-file"),
    "prompts folder": (["generate", "--prompts-file", "TMP", "--output", "TMP/o"], "cannot be read: Is a directory"),
    "prompts in Latin-1": (
        ["generate", "--prompts-file", "TMP/latin.jsonl", "--output", "TMP/o"],
        "latin.jsonl, line 1: not UTF-8: 'utf-8' codec can't decode byte 0xeb in position 14",
    ),
    "prompts with inf": (
        ["generate", "--prompts-file", "TMP/huge.jsonl", "--output", "TMP/o"],
        "huge.jsonl, line 1: 1e400 is too large for a number of 64 bits",
    ),
    "file's option": ([*FILE, "TMP/o", "--top-p", "2"], "error: top_p=2.0; a number from 0 to 1 is needed"),
    "output is no run's": ([*FILE, "TMP/mine"], "mine.run holds a JSON list; allowed: an object"),
    "output is another run's": ([*FILE, "TMP/begun.jsonl"], "begun.jsonl was begun with another"),
    "output is a folder": ([*FILE, "TMP"], "cannot be written: Is a directory"),
    "output in a file": ([*FILE, "TMP/mine/o"], "mine/o cannot be written: Not a directory"),
    "output in no folder": ([*FILE, "TMP/no/o"], "no/o cannot be written: No such file or directory"),
    "output is a device": ([*FILE, "/dev/full"], "/dev/full is not a regular file; one is needed"),
    "output is the prompts": ([*FILE, "TMP/link.jsonl"], "in.jsonl is the prompts file; give another output"),
    "new output of a run": ([*FILE, "TMP/gone"], "gone.run holds a JSON list; allowed: an object"),
    "output's name, with .run, too long": ([*FILE, f"TMP/{LONG[:253]}"], ".run cannot be written: File name too long"),
    "output's name too long": ([*FILE, f"TMP/{LONG}"], "cannot be written: File name too long"),
    # -- score, inspect
    "no text": (["score"], "a text is needed: as a plain argument, - for stdin, or by one of --text, --text-ids, --f"),
    "two kinds of text": (
        ["score", "--text", "a b", "--text-ids", "1"],
        "--text-ids: not allowed with argument --text",
    ),
    "empty text": (["score", "--text", ""], "text 0 has 0 tokens; at least 2 are needed, or 1 with add_start_token"),
    "long text": (["score", "--text", "word " * 400], "tokens, more than the context, 256; give a stride"),
    "stride": (["score", "--text", "a b", "--stride", "256"], "stride=256; a whole number from 1 to 255 is needed"),
    "text's ids": (["score", "--text-ids", "5 x"], "--text-ids '5 x': whole numbers separated by spaces"),
    "no text file": (["score", "--file", "TMP/no"], "no: [Errno 2] No such file or directory"),
    "text in Latin-1": (["score", "--file", "TMP/latin.txt"], "latin.txt: 'utf-8' codec can't decode byte 0xeb"),
    "text folder": (["score", "--file", "TMP"], "[Errno 21] Is a directory"),
    "show": ([*INSPECT, "--show", "0"], "--show=0; a whole number of at least 1 is needed"),
    "inspect's top-p": ([*INSPECT, "--top-p", "2"], "top_p=2.0; a number from 0 to 1 is needed"),
    "plot's format": (
        [*INSPECT, "--plot", "TMP/chain.xyz"],
        "chain.xyz: the suffix chooses the format" if find_spec("matplotlib") else "plot needs the package matplotlib",
    ),
    "plot is a folder": (
        [*INSPECT, "--plot", "TMP/folder.png"],
        "folder.png is a folder; a file is needed" if find_spec("matplotlib") else "plot needs the package matplotlib",
    ),
    "plot in no folder": (
        [*INSPECT, "--plot", "TMP/no/chain.png"],
        "there is no folder" if find_spec("matplotlib") else "plot needs the package matplotlib",
    ),
    # -- export, convert
    "batch": ([*EXPORT, "--batch", "0"], "batch=0; a whole number from 1 to 65536 is needed"),
    "batch too large": ([*EXPORT, "--batch", "2147483647"], "batch=2147483647; a whole number from 1 to 65536"),
    "length": ([*EXPORT, "--length", "257"], "length=257; a whole number from 2 to 256 is needed"),
    "prompt length": ([*EXPORT, "--prompt-length", "9"], "prompt_length=9; a whole number from 1 to 8 is needed"),
    "largest top-k": ([*EXPORT, "--max-top-k", "0"], "max_top_k=0; a whole number from 1 to 2048 is needed"),
    "controls": ([*EXPORT, "--controls", "warmth"], "argument --controls: invalid choice: 'warmth'"),
    "exported model": ([*EXPORT, "--model", "TMP/no"], "no does not exist; allowed: a folder on this machine"),
    "export over a folder": ([*EXPORT, "--output", "TMP"], "exists already; allowed: a folder that is new or empty"),
    "export into a file": ([*EXPORT, "--output", "TMP/mine/m"], "mine/m cannot be written: Not a directory"),
    "export to nowhere": ([*EXPORT, "--output", "/proc/no"], "/proc/no cannot be written: No such file or directory"),
    "convert over a folder": ([*CONVERT, "TMP"], "exists already; allowed: a folder that is new or empty"),
    "convert over itself": ([*CONVERT, GLOBAL], "global exists already; allowed: a folder that is new or empty"),
    "convert into a file": ([*CONVERT, "TMP/mine/m"], "mine/m cannot be written: Not a directory"),
    "convert to float16": (
        ["convert", str(HUGGING_FACE), "TMP/a/b", "--dtype", "float16"],
        "dtype 'float16'; allowed: 'float32', 'bfloat16'",
    ),
    "shards": (
        [*CONVERT, "TMP/m", "--max-shard-size", "0GB"],
        "max_shard_size '0GB'; allowed: a number of bytes, or a size such as '500MB",
    ),
    "shards of 5,000 digits": (
        [*CONVERT, "TMP/m", "--max-shard-size", "1" * 5000],
        "; allowed: a number of bytes, or a size such as",
    ),
    "shards of mesh-TF": (
        ["convert", str(HUGGING_FACE), "TMP/m", "--max-shard-size", "1KB"],
        "max_shard_size '1KB'; allowed: only with to='huggingface'",
    ),
    "convert's source": (
        ["convert", "TMP/in.jsonl", "TMP/m"],
        "in.jsonl is a file; allowed: the model's folder",
    ),
}


def run(capfd, args):
    """(status, stdout, stderr) of the command, run in this process."""
    status = cli.main(list(map(str, args)))
    return status, *capfd.readouterr()


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(capfd, folder, case):
    args, message = COMMANDS[case]
    before = files(folder)
    status, out, err = run(capfd, [a.replace("TMP", str(folder)) for a in args])
    assert (status, out) == (2, "")
    assert err.startswith("gpt-neo-sampling: error: ") and err.count("\n") == 1 and is_one_line(err[:-1])
    assert message in err
    assert files(folder) == before


# ------------------------------------------------- standard files, and full disks


@pytest.fixture
def standard_file(monkeypatch):
    """A function that replaces sys.stdout or sys.stderr."""
    with contextlib.ExitStack() as stack:

        def put_in(name, file):
            monkeypatch.setattr(sys, name, file)
            if file is not None:
                stack.callback(file.close)

        yield put_in


@pytest.fixture
def shared(monkeypatch):
    """Commands with the same model share one generator, whose graphs are built once."""
    monkeypatch.setattr(TextGenerator, "from_pretrained", generator)


def full():
    return open("/dev/full", "w")


def broken():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


BAD, GOOD = ["generate", "--prompt-ids", "x"], [*IDS, "--seed", "1", "--max-new-tokens", "2"]
STANDARD_FILES = {
    # what is run, which standard file is replaced by what, the exit status, the line on stderr
    "stdout is full": (GOOD, "stdout", full, 1, "stdout cannot be written: No space left on device"),
    "stdout is full, JSON": ([*GOOD, "--json"], "stdout", full, 1, "stdout cannot be written: No space left on device"),
    "stdout is full, scores": (
        ["score", "--model", GLOBAL, "--text-ids", "5 6"],
        "stdout",
        full,
        1,
        "stdout cannot be written: No space left",
    ),
    "stdout is full, a table": (
        ["inspect", "--model", GLOBAL, "--prompt-ids", "5"],
        "stdout",
        full,
        1,
        "stdout cannot be written: No space left",
    ),
    "stdout is full, help": (["--help"], "stdout", full, 1, None),
    "stdout has no reader": (GOOD, "stdout", broken, 1, None),
    "stdout has no reader, help": (["--help"], "stdout", broken, 1, None),
    "stdout is closed": (GOOD, "stdout", None, 1, "stdout is closed, but the result goes there"),
    "stderr is closed": (GOOD, "stderr", None, 0, None),
    "stderr is closed, bad": (BAD, "stderr", None, 2, None),
    "stderr is full, bad": (BAD, "stderr", full, 2, None),
    "stderr has no reader": (BAD, "stderr", broken, 2, None),
}


@pytest.mark.parametrize("case", STANDARD_FILES)
def test_standard_files(capfd, shared, standard_file, case):
    """The exit status reports it, Python prints nothing of its own, and no error goes to stdout."""
    args, name, make, wanted, message = STANDARD_FILES[case]
    standard_file(name, make and make())
    status = cli.main(args)
    for file in (sys.stdout, sys.stderr):
        if file is not None:
            file.flush()  # as at the end of a process
    out, err = capfd.readouterr()
    assert status == wanted
    assert (out != "") == (wanted == 0)
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == (message is not None) and message in "".join(errors) if message else not errors
    assert "Traceback" not in err


@contextlib.contextmanager
def room_for(size):
    """Limits the size of every file that is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS = {
    "convert to Hugging Face": ["convert", GLOBAL, "TMP/a/b"],
    "convert to mesh-TF": ["convert", str(HUGGING_FACE), "TMP/a/b"],
    "export": ["export", "--model", GLOBAL, "--output", "TMP/a/b", "--batch", "1", "--length", "4"],
    "plot": ["inspect", "--model", GLOBAL, "--prompt-ids", "5", "--plot", "TMP/plot.png"],
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "export")) for c in WRITERS])
def test_full_disks(capfd, tmp_path, case):
    """There is one line of error, existing files are unchanged, and no others are left."""
    if case == "plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "plot.png").write_bytes(b"old")
    before = files(tmp_path)
    with room_for(10_000):
        status, _, err = run(capfd, [a.replace("TMP", str(tmp_path)) for a in WRITERS[case]])
    assert status == 1 and is_one_line(err.splitlines()[-1]) and "Traceback" not in err
    assert err.splitlines()[-1].startswith("gpt-neo-sampling: error: ")
    assert files(tmp_path) == before


# --------------------------------------------------------- hostile models


def pickle_file(pickle, members=(), compression=zipfile.ZIP_STORED, name="archive/data.pkl"):
    """A function that puts a PyTorch file with this pickle into a Hugging Face folder."""

    def make(folder):
        folder.mkdir()
        write_json(folder / "config.json", TINY_HF)
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
            archive.writestr(name, pickle)
            for member, content in members:
                archive.writestr(member, content, compression)

    return make


def pytorch_model(content):
    def make(folder):
        pickle_file(b"")(folder)
        (folder / "pytorch_model.bin").write_bytes(content)

    return make


def tensor_file(*args, key="0"):
    def make(folder):
        pickle_file(b"")(folder)
        storage = {"0": np.zeros(4, np.float32)}
        write_zip(folder / "pytorch_model.bin", {"wte": tensor(Storage("FloatStorage", key, 4), *args)}, storage)

    return make


def hugging_face(change=lambda folder: None, **config):
    def make(folder):
        make_hugging_face(folder, config)
        change(folder)

    return make


def mesh_tf(change):
    def make(folder):
        make_mesh_tf(folder)
        change(folder)

    return make


def in_header(change):
    """A function that changes a safetensors header, a dict, or replaces it by the bytes that `change` returns."""

    def edit(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        text = change(header) or json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return hugging_face(edit)


def header_size(size):
    def edit(folder):
        path = folder / "model.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])

    return hugging_face(edit)


def entry(**changes):
    return in_header(lambda header: header[WTE].update(changes))


def twice(header):
    text = json.dumps(header)
    return f'{text[:-1]}, "{WTE}": {json.dumps({**header[WTE], "shape": [8, 11]})}}}'.encode()


def instead(name, make):
    """A function that replaces a file by something else."""

    def edit(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return edit


def sparse(path):
    path.touch()
    os.truncate(path, 2**40)


def sharded(**weight_map):
    def make(folder):
        make_sharded(folder, as_hugging_face(random_weights(TINY)))
        edit_json("model.safetensors.index.json", lambda index: index["weight_map"].update(weight_map))(folder)

    return make


def sizes(*sizes):
    def change(proto):
        del proto.shape.dim[:]
        for size in sizes:
            proto.shape.dim.add(size=size)

    return mesh_tf(in_index(b"gpt2/wte", change))


def index_entry(**fields):
    def change(proto):
        for name, value in fields.items():
            setattr(proto, name, value)

    return mesh_tf(in_index(b"gpt2/wte", change))


def written_index(change=lambda entries: None, **how):
    """A function that rewrites the index: see `table`."""

    def edit(folder):
        entries = dict(tensorflow_index.entries((folder / INDEX_FILE).read_bytes()))
        change(entries)
        (folder / INDEX_FILE).write_bytes(table(entries, **how))

    return mesh_tf(edit)


def endless_number(folder):
    data = (folder / INDEX_FILE).read_bytes()
    (folder / INDEX_FILE).write_bytes(data[:-48] + b"\x80" * 40 + data[-8:])


def legacy_tensor(size):
    """A file of the layout before zip archives, whose storage claims another size than its 4 numbers."""
    value = {"wte": tensor(Storage("FloatStorage", "0", 4), 0, (4,), (1,))}
    return pytorch_model(LEGACY + pickled(value) + pickled(["0"]) + struct.pack("<q4f", size, 0, 0, 0, 0))


def without_header(folder):
    """A zip archive whose list of members points to something that is not a storage."""
    tensor_file(0, (4,), (1,))(folder)
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    begin = data.rfind(b"PK\3\4", 0, data.index(b"archive/data/0"))
    path.write_bytes(data[:begin] + b"XXXX" + data[begin + 4 :])


def dataset(**config):
    def edit(folder):
        config_with(datasets=["austen"])(folder)
        (folder / "dataset_configs").mkdir()
        write_json(folder / "dataset_configs" / "austen.json", config)

    return mesh_tf(edit)


WTE = "transformer.wte.weight"
CANARY = "touch canary"
NOT_RUN = "which tensors do not need, and is not run; allowed: a dict of tensors"
NO_SAFETENSORS = "model.safetensors cannot be read as safetensors, damaged: "
NESTED = b"\x80\x02})" + b"\x85" * 200_000 + b"Ns."  # {((((…),),),): None}
DOUBLED = b"\x80\x02})" + b"2\x86" * 60 + b"Ns."  # a key of 2⁶⁰ empty tuples
BIG = 10**30
LEGACY = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))

MODELS = {
    # -- pickles that call something, each in another way
    "REDUCE": (pickle_file(b"cos\nsystem\n(V" + CANARY.encode() + b"\ntR."), f"asks for os.system, {NOT_RUN}"),
    "INST": (
        pickle_file(b"(V" + CANARY.encode() + b"\nios\nsystem\n."),
        "the instruction INST, which tensors do not",
    ),
    "OBJ": (pickle_file(b"(cos\nsystem\nV" + CANARY.encode() + b"\no."), f"asks for os.system, {NOT_RUN}"),
    "NEWOBJ": (
        pickle_file(b"csubprocess\nPopen\n(V" + CANARY.encode() + b"\nt\x81."),
        f"asks for subprocess.Popen, {NOT_RUN}",
    ),
    "STACK_GLOBAL": (pickle_file(b"\x80\x04\x8c\x02os\x8c\x06system\x93."), f"asks for os.system, {NOT_RUN}"),
    "EXT1": (pickle_file(b"\x80\x02\x82\x01."), "the instruction EXT1, which tensors do not need"),
    "a text is called": (pickle_file(b"Vos\n)R."), "it calls something that is not a function"),
    # -- pickles that take memory or time
    "memo of 2^28": (pickle_file(b"\x80\x02Nr\xff\xff\xff\x0f."), "it holds a NoneType, not a dict of tensors"),
    "tuples within each other": (pickle_file(NESTED), "a tuple in place of a tensor's name"),
    "a name of tuples": (
        pickle_file(b"\x80\x04)" + b"\x85" * 500_000 + b"\x8c\x01a\x93."),
        "a name that is not text",
    ),
    "legacy, a key of tuples": (
        pytorch_model(LEGACY + b"\x80\x02}." + b"\x80\x02])" + b"\x85" * 500_000 + b"a."),
        "cannot be read as a PyTorch file, damaged: its storages have no names",
    ),
    "100,000 dims": (
        tensor_file(0, (2**62,) * 100_000, (0,) * 100_000),
        "a tensor without a storage, offset, shape and strides",
    ),
    "a key of 2^60": (pickle_file(DOUBLED), "the instruction DUP, which tensors do not need"),
    "a text of 2^40": (
        pickle_file(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"."),
        "cannot be read as a PyTorch file",
    ),
    "zip bomb": (
        pickle_file(b"}.", [("archive/byteorder", bytes(2**24))], zipfile.ZIP_DEFLATED),
        "its archive/byteorder is compressed",
    ),
    "zip slip": (
        pickle_file(b"}.", name="../../../evil/data.pkl"),
        "the variables do not match the config: 30 missing",
    ),
    "storage slips": (
        tensor_file(0, (4,), (1,), key="../../../etc/passwd"),
        "damaged: 'archive/data/../../../etc/passwd'",
    ),
    "zip of no pickle": (pickle_file(b"}.", name="archive/other"), "a zip archive with 0 data.pkl; allowed: one"),
    "big-endian zip": (
        pickle_file(b"}.", [("archive/byteorder", b"big")]),
        "its numbers are big-endian; allowed: little-endian",
    ),
    "big-endian legacy": (
        pytorch_model(LEGACY.replace(pickle.dumps(True, 2)[2:-1], pickle.dumps(False, 2)[2:-1])),
        "its numbers are big-endian; allowed: little-endian",
    ),
    "legacy, a storage of another size": (legacy_tensor(5), "storage 0 has the wrong size"),
    "zip member without a header": (without_header, "its archive/data/0 has no header"),
    "storage's key is a number": (tensor_file(0, (4,), (1,), key=0), "an unknown kind of storage"),
    "strides of 0": (tensor_file(0, (10**12,), (0,)), "a tensor that is larger than its storage 0"),
    # -- safetensors
    "header of 2^63": (header_size(2**63), NO_SAFETENSORS),
    "header behind the end": (header_size(90_000_000), NO_SAFETENSORS),
    "header is a list": (in_header(lambda header: b"[1]"), NO_SAFETENSORS),
    "header of lists": (in_header(lambda header: b'{"a":' + b"[" * 50_000), NO_SAFETENSORS),
    "overlap": (entry(data_offsets=[0, 400]), NO_SAFETENSORS),
    "offsets below 0": (entry(data_offsets=[-4, 348]), NO_SAFETENSORS),
    "offsets backwards": (entry(data_offsets=[352, 0]), NO_SAFETENSORS),
    "shape too large": (entry(shape=[2**62, 2**62]), NO_SAFETENSORS),
    "a hole": (in_header(lambda header: header.pop(WTE) and None), NO_SAFETENSORS),
    "a name twice": (in_header(twice), f"1 of wrong shape: {WTE} (is [8, 11], should be [11, 8])"),
    "name is not UTF-8": (in_header(lambda h: json.dumps(h).encode().replace(b"wte", b"\xff\xfe")), NO_SAFETENSORS),
    "name for a terminal": (
        in_header(lambda header: header.update({"\x1b[31m\n" * 500: header.pop(WTE)})),
        "1 unexpected: \\x1b[31m \\x1b[31m",
    ),
    "entry is a list": (in_header(lambda h: h.update({WTE: list(h[WTE].values())})), NO_SAFETENSORS),
    "dtype is an object": (entry(dtype={"F32": None}), NO_SAFETENSORS),
    # -- other than files
    "weights are a folder": (
        hugging_face(instead("model.safetensors", os.mkdir)),
        "safetensors is not a file; allowed",
    ),
    "weights are a pipe": (hugging_face(instead("model.safetensors", os.mkfifo)), "safetensors is not a file; allowed"),
    "weights are nowhere": (
        hugging_face(instead("model.safetensors", lambda path: path.symlink_to("blob"))),
        "model.safetensors is a link to a file that does not exist; allowed: a file, or a link to one",
    ),
    "config is a pipe": (hugging_face(instead("config.json", os.mkfifo)), "config.json is not a file; allowed"),
    "config has no end": (
        hugging_face(instead("config.json", lambda path: path.symlink_to("/dev/zero"))),
        "config.json is not a file; allowed: a file, or a link to one",
    ),
    "config of a terabyte": (
        hugging_face(instead("config.json", sparse)),
        "1099511627776 bytes; allowed: at most 100000000",
    ),
    "defaults are a folder": (
        hugging_face(instead("generation_config.json", os.mkdir)),
        "generation_config.json is not a f",
    ),
    "checkpoint is a pipe": (mesh_tf(instead("checkpoint", os.mkfifo)), "checkpoint is not a file; allowed"),
    "index is a pipe": (mesh_tf(instead(INDEX_FILE, os.mkfifo)), f"{INDEX_FILE} is not a file; allowed"),
    "index of a terabyte": (
        mesh_tf(instead(INDEX_FILE, sparse)),
        f"{INDEX_FILE} has 1099511627776 bytes; allowed: at most 100000000",
    ),
    "data are a folder": (mesh_tf(instead(DATA_FILE, os.mkdir)), f"{DATA_FILE} is not a file; allowed"),
    # -- paths
    "index to /etc/passwd": (
        sharded(x="../../../etc/passwd"),
        "weight_map names '../../../etc/passwd'; allowed: names of files beside",
    ),
    "index to the root": (
        sharded(x="/etc/passwd"),
        "weight_map names '/etc/passwd'; allowed: names of files",
    ),
    "index to itself": (sharded(x="."), "lacks 1 files that its index names: ."),
    "dataset's name too long": (
        mesh_tf(config_with(n_vocab=None, datasets=[[LONG * 20]])),
        "cannot be read: [Errno 36] File name",
    ),
    # -- configs
    "config of lists": (
        hugging_face(put("config.json", b"[" * 200_000)),
        "config.json is not JSON: maximum recursion depth",
    ),
    "config of 5,000 digits": (
        hugging_face(put("config.json", b'{"a": ' + b"1" * 5000 + b"}")),
        "config.json is not JSON",
    ),
    "config is null": (
        hugging_face(put("config.json", b"null")),
        "config.json holds a JSON NoneType; allowed: an object",
    ),
    "config in UTF-16": (hugging_face(put("config.json", "{}".encode("utf-16"))), "config.json is not UTF-8 text"),
    "vocabulary of 10^30": (
        hugging_face(vocab_size=BIG),
        "vocab_size is 1000000000000000000000000000000; allowed: a whole",
    ),
    "vocabulary below 0": (hugging_face(vocab_size=-11), "vocab_size is -11; allowed: a whole number from 1 to"),
    "vocabulary of NaN": (
        hugging_face(vocab_size=float("nan")),
        "vocab_size is nan; allowed: a whole number from 1 to",
    ),
    "window of 10^30": (
        hugging_face(window_size=BIG),
        "window_size is 1000000000000000000000000000000; allowed: a whole",
    ),
    "layers of 10^9": (
        hugging_face(num_layers=10**9, attention_layers=None, attention_types=[[["global"], 10**9]]),
        "num_layers is 1000000000; allowed: a whole number from 1 to 10000",
    ),
    "epsilon of 10^400": (hugging_face(layer_norm_epsilon=10**400), "allowed: a number, at least 0"),
    "padding of 10^30": (
        hugging_face(pad_token_id=BIG),
        "pad_token_id is 1000000000000000000000000000000; allowed: a whole",
    ),
    "mesh-TF padding of 10^30": (mesh_tf(config_with(padding_id=BIG)), "0; allowed: a whole number of 32 bits"),
    "mesh-TF radius of 10^30": (mesh_tf(config_with(local_attention_radius=BIG)), "from 1 to 2147483647"),
    "a long value": (hugging_face(model_type="x" * 10**6), "xxxx … xxxx"),
    "attention types that are none": (
        hugging_face(attention_types=[["global"]]),
        "config.json: attention_types is [['global']]; allowed: [[[types…], repeats], …]",
    ),
    "defaults of NaN": (
        hugging_face(put("generation_config.json", b'{"top_k": NaN}')),
        "generation_config.json: top_k is nan; allowed: a whole number of 32 bits",
    ),
    # -- TensorFlow's index, which TensorFlow 2.21 ends the process over
    "size below 0": (sizes(-1, 8), "it is damaged: the shape of gpt2/wte is [-1, 8]"),
    "sizes that overflow": (
        sizes(2**40, 2**40),
        "it is damaged: the shape of gpt2/wte is [1099511627776, 1099511627776]",
    ),
    "sizes that overflow beside a 0": (
        sizes(2**40, 2**40, 0),
        "it is damaged: the shape of gpt2/wte is [1099511627776, ",
    ),
    "hidden entries": (
        written_index(first_restart=7),
        "damaged: one of its blocks has a restart inside an entry",
    ),
    "one block 100,000 times": (written_index(handles=100_000), "it is damaged: its blocks overlap"),
    "a name of 5,000 bytes": (
        written_index(lambda entries: entries.update({b"x" * 5000: entries[b"gpt2/wte"]})),
        "it is damaged: one of its names has 5000 bytes",
    ),
    "an entry that is none": (
        written_index(lambda entries: entries.update({b"gpt2/wte": b"\xff\xff"})),
        f"{INDEX_FILE} cannot be read, it is damaged: ",
    ),
    "a compressed block": (written_index(compression=1), "it is damaged: one of its blocks is cut short or compressed"),
    "a million restarts": (written_index(n_restarts=10**6), "it is damaged: one of its blocks is cut short"),
    "a number without end": (mesh_tf(endless_number), "it is damaged: one of its numbers has no end"),
    "a tokenizer's path is a number": (dataset(n_vocab=11, tokenizer_path=5), "tokenizer_path is 5; allowed: a path"),
    "a million empty lines": (
        mesh_tf(lambda folder: (folder / "checkpoint").write_bytes(b"\n" * 10**6)),
        'has no line model_checkpoint_path: "model.ckpt-N"',
    ),
    "300 dims": (sizes(*[1] * 300), "it is damaged: the shape of gpt2/wte is [1, 1, 1"),
    "another shape": (sizes(8, 11), "1 of wrong shape: gpt2/wte (is [8, 11], should be [11, 8])"),
    "no dtype": (index_entry(dtype=0), f"{INDEX_FILE} cannot be read, it is damaged: "),
    "strings": (index_entry(dtype=7), "1 variables of an unsupported dtype: gpt2/wte (string)"),
    "another place": (index_entry(offset=2**62), "gpt2/wte in "),
    "place below 0": (index_entry(offset=-5), "gpt2/wte in "),
    "another checksum": (index_entry(crc32c=1), "gpt2/wte in "),
    "another file": (index_entry(shard_id=5), "gpt2/wte in "),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(tmp_path, monkeypatch, case):
    """There is one line of error, and nothing in the folder was run."""
    make, message = MODELS[case]
    make(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error, open_checkpoint(tmp_path / "model") as checkpoint:
        checkpoint.read("wte")
    assert message in str(error.value) and is_one_line(str(error.value))
    assert os.listdir(tmp_path) == ["model"]


# ------------------------------------------------------------- tokenizers


def word_level(unknown):
    def change(tokenizer):
        tokenizer.update(
            model={"type": "WordLevel", "vocab": {"Emma": 5, "<unk>": 6}, "unk_token": unknown},
            added_tokens=[], normalizer=None, pre_tokenizer={"type": "Whitespace"}, post_processor=None, decoder=None,
        )  # fmt: skip

    return change


def with_token(id_):
    return lambda tokenizer: tokenizer["model"]["vocab"].update({"<new>": id_})


def moved(token):
    """A path that leads out of the folder, as a token."""
    return lambda tokenizer: tokenizer["model"]["vocab"].update({token: 5000})


TOKENIZERS = {
    "a token outside": (moved("E"), "token id 5000 is outside the vocabulary; 0 to 2047 are allowed"),
    "id below 0": (with_token(-1), "tokenizer.json cannot be read as a tokenizer: "),
    "id of 2^33": (with_token(2**33), "tokenizer.json cannot be read as a tokenizer: "),
    "pattern": (
        lambda tokenizer: tokenizer.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}
        ),
        "tokenizer.json cannot be read as a tokenizer: ",
    ),
    "the library panics": (
        lambda tokenizer: tokenizer.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "tokenizer.json cannot be read as a tokenizer: ",
    ),
    "no unknown token": (word_level("<no>"), "the model's tokenizer cannot encode 'Emma Ω': "),
    "empty": (lambda tokenizer: b"", "tokenizer.json cannot be read as a tokenizer: "),
    "of lists": (lambda tokenizer: b"[" * 100_000, "tokenizer.json cannot be read as a tokenizer: "),
    "not UTF-8": (lambda tokenizer: b"\xff", "tokenizer.json cannot be read as a tokenizer: "),
}


def with_tokenizer(folder, change):
    shutil.copytree(DEMO_FOLDER, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    content = change(tokenizer)
    content = json.dumps(tokenizer).encode() if content is None else content
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_bytes(content)
    return TextGenerator.from_pretrained(folder)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(tmp_path, case):
    change, message = TOKENIZERS[case]
    with pytest.raises(ValueError) as error:
        with_tokenizer(tmp_path / "m", change).encode("Emma Ω")
    assert message in str(error.value) and is_one_line(str(error.value))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_tokenizer_of_a_terabyte(tmp_path, name):
    shutil.copytree(DEMO_FOLDER, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "merges.txt").write_text("")
    sparse(tmp_path / "m" / name)
    with pytest.raises(CheckpointError, match=f"{name} has 1099511627776 bytes; allowed: at most 100000000"):
        TextGenerator.from_pretrained(tmp_path / "m")


def test_a_name_of_generation_config_for_a_terminal(tmp_path, caplog):
    shutil.copytree(HUGGING_FACE, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"x\x1b[31m\n" + "y" * 10**6: 1}))
    TextGenerator.from_pretrained(tmp_path / "m")
    (record,) = caplog.records
    assert "are ignored: x\\x1b[31m" in record.getMessage() and is_one_line(record.getMessage())


def test_a_tokenizer_that_cannot_decode(tmp_path):
    """The tokenizers library panics on a token shorter than the part to strip."""
    generator = with_tokenizer(
        tmp_path / "m", lambda t: t.update(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 5})
    )
    (a,) = generator.tokenizer.encode("a").ids
    with pytest.raises(ValueError, match=f"the model's tokenizer cannot decode .*{a}.*: ") as error:
        generator.generate("Emma", max_new_tokens=2, logit_bias={a: 100})
    assert is_one_line(str(error.value))


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path):
    """tokenizer.json may ask for either, for training."""
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
           "pad_token": "x"}  # fmt: skip
    generator = with_tokenizer(tmp_path / "m", lambda tokenizer: tokenizer.update(truncation=cut, padding=pad))
    assert generator.encode("Emma Woodhouse") == TextGenerator.from_pretrained().encode("Emma Woodhouse")
    assert len(generator.encode("Emma Woodhouse")) > 2


# ------------------------------------------------------- Python: operations


def ids_of(x, **sizes):
    return mtf.zeros(x.mesh, mtf.Shape(dims(**sizes)), tf.int32)


NO_SUCH_DIM = "is not among the dims Shape[batch=2, vocab=5]"
ARRAY = np.zeros((2, 5), np.float32)
OPERATIONS = {
    "entmax of an array": (lambda x: g.entmax(ARRAY), "x: ndarray of shape (2, 5); an mtf.Tensor is needed"),
    "top_k_mask of an array": (lambda x: g.top_k_mask(ARRAY, 2), "x: ndarray of shape (2, 5); an mtf.Tensor is needed"),
    "entmax of integers": (lambda x: g.entmax(mtf.cast(x, tf.int32)), "int32; a floating dtype is needed"),
    "draws of integers": (lambda x: g.sample_categorical(mtf.cast(x, tf.int32)), "int32; a floating dtype is needed"),
    "another dim": (lambda x: g.entmax(x, 1.5, mtf.Dimension("vocabulary", 5)), NO_SUCH_DIM),
    "a dim of another size": (lambda x: g.top_p_mask(x, 0.5, mtf.Dimension("vocab", 6)), NO_SUCH_DIM),
    "a missing dim": (lambda x: g.entmax(mtf.reduce_sum(x)), "a tensor without dims has none to work along"),
    "a dim by name": (lambda x: g.entmax(x, 1.5, "vocab"), "dim is 'vocab'; an mtf.Dimension is needed, such as"),
    "a vocab_dim by name": (
        lambda x: next_token(x, "vocab", SamplingOptions(), 1, None, 0),
        "dim is 'vocab'; an mtf.Dimension is needed",
    ),
    "a samples_dim by name": (
        lambda x: g.sample_categorical(x, samples_dim="samples"),
        "samples_dim is 'samples'; an mtf.Dimension is needed",
    ),
    "counts by name": (
        lambda x: g.token_counts(ids_of(x, batch=2, length=4), "vocab"),
        "dim is 'vocab'; an mtf.Dimension is needed",
    ),
    "counts of an array": (lambda x: g.token_counts(ARRAY, x.shape[-1]), "ids: ndarray of shape (2, 5); an mtf.Tensor"),
    "a mask's dims by name": (
        lambda x: g.biasmask_attn_weights(x.mesh, "sequence", "memory", mtf.VariableDType(tf.float32)),
        "nd is 'sequence'; an mtf.Dimension is needed",
    ),
    "a look-up by name": (lambda x: ops.take(x, ids_of(x, batch=2), "vocab"), "take: dim is 'vocab'; an mtf.Dimension"),
    "alpha in words": (lambda x: g.entmax(x, "1.5"), "alpha holds '1.5'; numbers are needed"),
    "a bool for alpha": (lambda x: g.entmax(x, True), "alpha holds True; numbers are needed"),
    "a bool for steps": (lambda x: g.entmax(x, n_iter=True), "n_iter=True: a whole number of at least 1 is needed"),
    "a bool for k": (lambda x: g.top_k_mask(x, True), "top-k: k=True; a whole number of at least 1 is needed"),
    "a bool for top_p": (lambda x: g.top_p_mask(x, True), "top_p holds True; numbers are needed"),
    "bools for seeds": (lambda x: g.sample_categorical(x, seed=[True, False]), "seed holds True; numbers are needed"),
    "n-grams of a bool": (
        lambda x: g.no_repeat_ngram_mask(x, ids_of(x, batch=2, length=4), 4, True),
        "no_repeat_ngram_size=True; a whole number",
    ),
    "alpha above 2": (lambda x: g.entmax(x, 2.5), "alpha=2.5 is out of range: from 1 (softmax) to 2 (sparsemax)"),
    "alpha of other rows": (
        lambda x: g.entmax(x, [1.5] * 3),
        "alpha has shape [3]; it must be one value, or one a row",
    ),
    "steps": (lambda x: g.entmax(x, n_iter=1.5), "n_iter=1.5: a whole number of at least 1 is needed"),
    "complex top_p": (lambda x: g.top_p_mask(x, 0.5j), "top_p is of dtype complex128; float32 is needed"),
    "NaN for top_p": (lambda x: g.top_p_mask(x, float("nan")), "top_p=nan; a number from 0 to 1 is needed"),
    "seeds of halves": (lambda x: g.sample_categorical(x, seed=[0.5, 1]), "seed=0.5; whole numbers are needed"),
    "a step of 2^32": (
        lambda x: g.sample_categorical(x, step=2**32),
        "step=4294967296; from -2147483648 to 2147483647",
    ),
    "a step of 2^70": (lambda x: g.sample_categorical(x, step=2**70), "step holds 1180591620717411303424; numbers are"),
    "half a k": (
        lambda x: g.top_k_mask(x, np.array([2, 2.5]), max_top_k=3),
        "top-k=2.5; whole numbers are needed",
    ),
    "half a seed": (lambda x: g.sample_categorical(x, seed=0.5), "seed=0.5; whole numbers are needed"),
    "a seed of NaN": (
        lambda x: g.sample_categorical(x, seed=float("nan")),
        "seed=nan; whole numbers are needed",
    ),
    "a seed too large": (lambda x: g.sample_categorical(x, seed=2**32), "is out of range: from -2**31 to 2**32 - 1"),
    "half a token": (lambda x: g.tokens_mask(x, [0.5]), "token=0.5; whole numbers are needed"),
    "n-grams of half": (
        lambda x: g.no_repeat_ngram_mask(x, ids_of(x, batch=2, length=4), 4, 1.5),
        "a whole number of at least 1 is needed",
    ),
    "a bias of another dim": (
        lambda x: g.logit_bias(x, mtf.zeros(x.mesh, mtf.Shape(dims(words=5)))),
        "logit_bias has shape Shape[words=5]; its dims must be among those of logits, Shape[batch=2, vocab=5]",
    ),
    "a value of other rows": (
        lambda x: ops.write_at(x, x, ids_of(x, batch=2), x.shape[-1]),
        "write_at: value Shape[batch=2, vocab=5] along Dimension(name='vocab', size=5) of Shape[batch=2, vocab=5]",
    ),
    "memory of another size": (
        lambda x: layers.attend(x, x, x, x, x.shape[-1]),
        "attend: q Shape[batch=2, vocab=5], k Shape[batch=2, vocab=5]",
    ),
    "samples of no batch": (
        lambda x: g.sample_autoregressive(
            mtf.zeros(x.mesh, mtf.Shape(dims(length=4)), tf.int32), {}, {}, num_return_sequences=2
        ),
        "num_return_sequences=2: the prompts need a batch dim",
    ),
    "a bias of another length": (lambda x: g.logit_bias(x, np.zeros(6, np.float32)), "logit_bias has shape [6]"),
}


# ------------------------------------------ Python: a loop, and a model of one's own


VOCAB = mtf.Dimension("vocab", 10)
SLOW = {"slow_sampling": True}


def counting(features, other_features, params, mesh, variable_dtype, context=None):
    """The model by which t + 1 follows t. It keeps no states."""
    return mtf.one_hot(features["inputs"] + 1, VOCAB), None, None


def returning(change):
    """A model that returns what `change` makes of the logits of `counting`."""
    return lambda *args, **kwargs: change(counting(*args, **kwargs)[0])


def giving(change):
    """A model that gives what `change` makes of the logits of `counting`."""
    return returning(lambda logits: (change(logits), None, None))


def keeping(first, then=None, n_read=0):
    """A model with states: `first` and `then`, of a context, make those of the first call and of the others."""

    def model(features, other_features, params, mesh, variable_dtype, context=None):
        if n_read:
            context.get_states(n_read)
        context.record_new_states((first if then is None or context.mode == "first_part" else then)(context))
        return mtf.zeros(mesh, [*context.batch_dims, VOCAB]), None, None

    return model


def states(*sizes):
    return lambda context: [mtf.zeros(context.mesh, mtf.Shape(dims(batch=2, state=n))) for n in sizes]


def gpt_neo(without, **features):
    """GPT-Neo's own model with a feature less, or another."""

    def call(ids):
        sizes = dims(embd=8, vocab=11, embed_sequence=6, memory_length=4)
        names = ("embd_dim", "vocab_dim", "embed_sequence_dim", "memory_length_dim")
        given = {**dict(zip(names, sizes)), "attn_bias": None, **features}
        given.pop(without, None)
        gpt2.model({"inputs": ids}, given, {**TINY, "mode": "train"}, ids.mesh, mtf.VariableDType(tf.float32))

    return call


def loop(model=counting, params=SLOW, features={"vocab_dim": VOCAB}, change=lambda ids: ids, **given):  # noqa: B006
    return lambda ids: g.sample_autoregressive(
        change(ids), features, params, stop_at_token=None, bos_id=0, model=model, **given
    )


LOOPS = {
    # -- what is given
    "ids are an array": (
        loop(change=lambda ids: np.zeros((2, 4), int)),
        "partial_sequences: ndarray of shape (2, 4); an",
    ),
    "ids are a list": (
        loop(change=lambda ids: [[1]]),
        "partial_sequences: list; an mtf.Tensor is needed (mtf.import_tf",
    ),
    "ids are floats": (loop(change=mtf.to_float), "partial_sequences of dtype float32; int32 is needed (mtf.to_int32)"),
    "ids of 64 bits": (loop(change=lambda ids: mtf.cast(ids, tf.int64)), "of dtype int64; int32 is needed"),
    "one id": (loop(change=mtf.reduce_sum), "partial_sequences have no dims; [batch…, length] is needed"),
    "no vocab_dim": (
        loop(features={"embd_dim": 1, "vocab": 2}),
        "other_features have no 'vocab_dim'; there is 'embd_dim', 'vocab'",
    ),
    "vocab_dim by name": (
        loop(features={"vocab_dim": "vocab"}),
        "other_features['vocab_dim'] is 'vocab'; an mtf.Dimension is needed, such as mtf.Dimension('vocab', 50257)",
    ),
    "vocab_dim by size": (loop(features={"vocab_dim": 10}), "other_features['vocab_dim'] is 10; an mtf.Dimension is"),
    "memory by name": (
        loop(features={"vocab_dim": VOCAB, "memory_length_dim": "memory"}),
        "other_features['memory_length_dim'] is 'memory'; an mtf.Dimension is needed",
    ),
    "features are a dim": (loop(features=VOCAB), "other_features: Dimension; GPT-Neo's dict of that name is needed"),
    "no params": (loop(params=None), "params: NoneType; GPT-Neo's dict of that name is needed"),
    "n_vocab in words": (
        loop(params={**SLOW, "n_vocab": "ten"}),
        "n_vocab='ten', but the vocabulary's dimension has 10",
    ),
    "a model by name": (loop("gpt2"), "model='gpt2': 'gpt2' is not a callable object; a function of (mtf_features, "),
    "a model without a context": (
        loop(lambda features, other_features, params, mesh, variable_dtype: None),
        "model=<lambda>: got an unexpected keyword argument 'context'; a function of (mtf_features, ",
    ),
    "generate's name": (loop(max_new_tokens=3), "unknown keyword max_new_tokens; here it is max_steps"),
    "a name mistyped": (loop(max_step=3), "unknown keyword max_step; did you mean max_steps?"),
    "Hugging Face's beams": (loop(num_beams=4), "unknown keyword num_beams; beam search is not built"),
    # -- what the model returns
    "no states and no slow_sampling": (
        loop(params={}),
        "the model gave logits of all positions, [batch=2, length=4, vocab=10], in a step that asks for one token a "
        "row: a model that keeps no states needs params['slow_sampling'] = True, and one that keeps them looks at",
    ),
    "logits alone": (
        loop(returning(lambda logits: logits)),
        "the model returned logits alone; (logits, loss, loss_batc",
    ),
    "logits and a loss": (
        loop(returning(lambda logits: (logits, None))),
        "the model returned 2 values; (logits, loss,",
    ),
    "nothing": (loop(returning(lambda logits: None)), "the model returned a NoneType; (logits, loss, loss_batch) is"),
    "logits are an array": (
        loop(giving(lambda logits: ARRAY)),
        "the model's logits: ndarray of shape (2, 5); an mtf.T",
    ),
    "a vocabulary of another size": (
        loop(features={"vocab_dim": mtf.Dimension("vocab", 12)}),
        "the model's logits, [batch=2, length=4, vocab=10], lack other_features['vocab_dim'], [vocab=12]",
    ),
    "a vocabulary of another name": (
        loop(features={"vocab_dim": mtf.Dimension("tokens", 10)}),
        "the model's logits, [batch=2, length=4, vocab=10], lack other_features['vocab_dim'], [tokens=10]",
    ),
    "a vocabulary of another size, with states": (
        loop(keeping(states(3)), {}, {"vocab_dim": mtf.Dimension("vocab", 12)}),
        "the model's logits, [batch=2, vocab=10], lack other_features['vocab_dim'], [vocab=12]",
    ),
    "no batch": (
        loop(giving(lambda logits: mtf.reduce_sum(logits, reduced_dim=logits.shape[0]))),
        "the model's logits are [length=4, vocab=10]; [batch=2, length=4, vocab=10] is needed",
    ),
    "no positions": (
        loop(giving(lambda logits: mtf.reduce_sum(logits, reduced_dim=logits.shape[1]))),
        "the model's logits are [batch=2, vocab=10]; [batch=2, length=4, vocab=10] is needed",
    ),
    # -- what the model keeps
    "no states in a step": (
        loop(keeping(states(3), states()), {}),
        "the model recorded no states in a step, and 1 states (float32 [batch=2, state=3]) in the pass over the",
    ),
    "states of another shape": (
        loop(keeping(states(3), states(5)), {}),
        "recorded 1 states (float32 [batch=2, state=5]) in a step, and 1 states (float32 [batch=2, state=3]) in the",
    ),
    "states of the first call": (
        loop(keeping(states(3), n_read=1), {}),
        "get_states(1) with mode='first_part': there are states with mode='incremental' alone",
    ),
    "one state": (
        loop(keeping(lambda context: states(3)(context)[0]), {}),
        "record_new_states: one mtf.Tensor; a list of them is needed",
    ),
    "a number as state": (
        loop(keeping(lambda context: [1.0]), {}),
        "record_new_states: float; an mtf.Tensor is needed",
    ),
    # -- GPT-Neo's model
    "no embd_dim": (
        gpt_neo("embd_dim"),
        "other_features have no 'embd_dim'; there is 'vocab_dim', 'embed_sequence_dim', 'memory_length_dim',",
    ),
    "embd_dim by name": (
        gpt_neo("", embd_dim="embd"),
        "other_features['embd_dim'] is 'embd'; an mtf.Dimension is needed",
    ),
    "no memory": (gpt_neo("memory_length_dim"), "other_features have no 'memory_length_dim'; there is "),
    "no mask": (gpt_neo("attn_bias"), "other_features have no 'attn_bias'; there is "),
    "a dtype": (
        lambda ids: gpt2.model({"inputs": ids}, {}, TINY, ids.mesh, tf.float32),
        "variable_dtype=tf.float32; an mtf.VariableDType is needed, such as mtf.VariableDType(tf.float32)",
    ),
    "no labels": (gpt_neo(""), "the features have no 'labels'; there is 'inputs'"),
}


# ----------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def tiny():
    generator = TextGenerator.from_pretrained(GLOBAL)
    yield generator
    generator.close()


def options(**given):
    return lambda tiny: tiny.generate([[5]], max_new_tokens=2, **given)


NOTHING = object()
CALLS = {
    "top_p is an object": (options(top_p=NOTHING), ValueError, "a number is needed"),
    "top_p is complex": (options(top_p=0.5j), ValueError, "top_p=0.5j; a number is needed"),
    "top_p is a table": (options(top_p=np.ones((1, 1))), ValueError, "top_p=[1.0]; a number is needed"),
    "top_p has no values": (
        options(top_p=[]),
        ValueError,
        "top_p has 0 values for 1 prompt; one, or one each, is needed",
    ),
    "temperature of 10^400": (options(temperature=10**400), ValueError, "; a finite number of at least 0 is needed"),
    "seed is bytes": (options(seed=b"1"), ValueError, "seed=b'1'; a number is needed"),
    "samples is a bool": (
        options(num_return_sequences=True),
        ValueError,
        "=True; a whole number from 1 to 2147483647 is n",
    ),
    "stop token is a float": (options(eos_token_id=1.0), ValueError, "eos_token_id=1.0; a whole number from -1 to 126"),
    "logit_bias by text": (
        options(logit_bias={"5": 1}),
        ValueError,
        "token id='5'; a whole number from 0 to 126 is needed",
    ),
    "stop_strings of numbers": (options(stop_strings=[5]), ValueError, "stop_strings=[5]; a text or a list of texts"),
    "an option that is none": (
        options(temprature=1),
        TypeError,
        "generate has no argument temprature; did you mean temper",
    ),
    "an option of nobody": (
        options(warmth=1),
        TypeError,
        "generate has no argument warmth; allowed: prompts, streamer,",
    ),
    "Hugging Face's beams": (
        options(num_beams=4),
        TypeError,
        "TextGenerator.generate has no argument num_beams; beam ",
    ),
    "Hugging Face's inputs": (
        lambda tiny: tiny.generate(input_ids=[5], attention_mask=[1]),
        TypeError,
        "generate has no argument input_ids; prompts are the first argument: texts, or lists of token ids",
    ),
    "Hugging Face's devices": (
        lambda tiny: TextGenerator.from_pretrained(GLOBAL, device_map="auto"),
        TypeError,
        "TextGenerator.from_pretrained has no argument device_map; devices says where the work is done",
    ),
    "Hugging Face's options": (
        lambda tiny: g.GenerationOptions(top_k=5, max_length=20),
        TypeError,
        "GenerationOptions has no argument max_length; max_new_tokens counts the new tokens alone",
    ),
    "a generator of a folder": (
        lambda tiny: TextGenerator(GLOBAL),
        TypeError,
        f"a model is opened by TextGenerator.from_pretrained({GLOBAL!r})",
    ),
    "a generator of a model": (
        lambda tiny: TextGenerator(options),
        TypeError,
        "checkpoint: function; a Checkpoint is needed, see open_checkpoint; a model of your own runs in sample_autoreg",
    ),
    "a generator's tokenizer": (
        lambda tiny: TextGenerator(tiny.checkpoint, GLOBAL),
        TypeError,
        "tokenizer: str; a tokenizers.Tokenizer is needed, see load_tokenizer",
    ),
    "a generator's mesh": (
        lambda tiny: TextGenerator(tiny.checkpoint, mesh="x:2"),
        TypeError,
        "mesh: str; a DeviceMesh is needed, see device_mesh",
    ),
    "n-grams": (options(no_repeat_ngram_size=2**31), ValueError, "; a whole number from 0 to 2147483647 is needed"),
    "a processor of nothing": (
        options(logits_processors=[lambda logits, ids, position: None]),
        ValueError,
        "logits_processors: <lambda> gave None; logits of shape ",
    ),
    "a processor of ids": (
        options(logits_processors=[lambda logits, ids, position: ids]),
        ValueError,
        "; logits of shape ",
    ),
    "prompts are a set": (
        lambda tiny: tiny.generate({5}),
        ValueError,
        "prompts or texts: {5}; a str, a list of token ids",
    ),
    "prompts are floats": (
        lambda tiny: tiny.generate(np.array([1.5])),
        ValueError,
        "a prompt or text: 1.5; a str or a list",
    ),
    "prompts are deep": (
        lambda tiny: tiny.generate(np.ones((1, 1, 1), int)),
        ValueError,
        "token id [1] is outside the voc",
    ),
    "continuation outside": (lambda tiny: tiny.inspect([5], [-1]), ValueError, "token id -1 is outside the vocabulary"),
    "continuation is a number": (lambda tiny: tiny.inspect([5], 5), ValueError, "a prompt or text: 5; a str or a list"),
    "inspect's samples": (
        lambda tiny: tiny.inspect([5], num_return_sequences=7, seed=3),
        TypeError,
        "not an option for drawing a token: num_return_sequences, seed; allowed: logits_processors, ",
    ),
    "inspect's beams": (
        lambda tiny: tiny.inspect([5], num_beams=4),
        TypeError,
        "not an option for drawing a token: num_beams; beam search is not built",
    ),
    "streamer is a number": (options(streamer=5), TypeError, "streamer=5; a function of (index, token, text, is_last)"),
    "stop tokens in a table": (
        options(eos_token_id=np.zeros((2, 2), int)),
        ValueError,
        "a whole number from -1 to 126",
    ),
    "logit_bias of -10^400": (options(logit_bias={5: -(10**400)}), ValueError, "; a finite number of 32 bits, or -inf"),
    "stride is a bool": (
        lambda tiny: tiny.score([[5, 6]], stride=True),
        ValueError,
        "stride=True; a whole number from 1 to",
    ),
    "start token is a text": (
        lambda tiny: tiny.score([[5, 6]], add_start_token="no"),
        ValueError,
        "add_start_token='no'; True or False is needed",
    ),
    "dtype is NumPy's": (
        lambda tiny: TextGenerator.from_pretrained(GLOBAL, dtype=np.float64),
        ValueError,
        "allowed: float32, bfloat16",
    ),
    "a path of zeros": (
        lambda tiny: open_checkpoint("a\0b"),
        CheckpointError,
        "a\\x00b cannot be listed: embedded null byte",
    ),
    "cluster is a list": (
        lambda tiny: device_mesh(cluster=["a:1"]),
        MeshError,
        "cluster ['a:1']; allowed: addresses such as host:2222",
    ),
    "mesh of NaN": (
        lambda tiny: device_mesh({"x": float("nan")}),
        MeshError,
        "('x', nan) is not an axis and its size; allow",
    ),
    "shards are a float": (
        lambda tiny: convert_checkpoint(GLOBAL, "new", max_shard_size=1.5),
        CheckpointError,
        "max_shard_size 1.5; allowed: a number of bytes, or a size such as '500MB'",
    ),
    "batch is a text": (
        lambda tiny: export_saved_model("new", GLOBAL, batch="1", length=8),
        ValueError,
        "batch='1'; a whole number from 1 to 65536 is needed",
    ),
    "controls": (
        lambda tiny: export_saved_model("new", GLOBAL, batch=1, length=8, controls=["warmth"]),
        ValueError,
        "controls: 'warmth'; allowed: repetition_penalty, presence_penalty",
    ),
    "a file's options": (
        lambda tiny: generate_file(tiny, "in", "out", streams=1),
        TypeError,
        "not an option for a file: streams; allowed: sequence_bias",
    ),
    "a file's beams": (
        lambda tiny: generate_file(tiny, "in", "out", num_beams=4),
        TypeError,
        "not an option for a file: num_beams; beam search is not built",
    ),
    "a file's seed": (
        lambda tiny: generate_file(tiny, "in", "out", seed=float("nan")),
        ValueError,
        "seed=nan; a whole number",
    ),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_operations(case):
    call, message = OPERATIONS[case]
    with tf.Graph().as_default(), pytest.raises((TypeError, ValueError)) as error:
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        call(mtf.import_tf_tensor(mesh, tf.zeros([2, 5]), mtf.Shape(dims(batch=2, vocab=5))))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", LOOPS)
def test_loops(case):
    call, message = LOOPS[case]
    with tf.Graph().as_default(), pytest.raises((TypeError, ValueError)) as error:
        call(mtf.import_tf_tensor(mtf.Mesh(mtf.Graph(), "mesh"), np.ones([2, 4], np.int32), dims(batch=2, length=4)))
    assert message in str(error.value) and is_one_line(str(error.value))


@pytest.mark.parametrize("case", CALLS)
def test_calls(tiny, tmp_path, monkeypatch, case):
    call, kind, message = CALLS[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as error:
        call(tiny)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "ids, named", [({}, "none"), ({"bos_token_id": 50256}, "50256"), ({"eos_token_id": [-1]}, "-1")]
)
def test_a_model_without_a_first_token(tmp_path, capfd, ids, named):
    make_hugging_face(tmp_path / "m", {"bos_token_id": None, "eos_token_id": None, **ids})
    message = f"the model's first token is needed, and it names {named} (bos_id, or else eos_id); 0 to 10 are allowed"
    generator = TextGenerator.from_pretrained(tmp_path / "m")
    for call in (lambda: generator.generate([[5], []]), lambda: generator.score([[5]], add_start_token=True)):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
    status, out, err = run(capfd, ["generate", "--model", tmp_path / "m", "--prompt-ids", ""])
    assert (status, out, err) == (2, "", f"gpt-neo-sampling: error: {message}\n")
    if named == "50256":  # where no prompt is empty it is not needed
        assert len(generator.generate([[5]], max_new_tokens=1)[0].tokens) == 1

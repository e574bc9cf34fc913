"""Loading a model of half GPT-Neo-125M's shape: peak memory, progress bar, and the slices of a mesh."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import DATA
from helpers_checkpoint import as_hugging_face, write_safetensors
from test_pytorch_files import write_pytorch

from gpt_neo_sampling import TextGenerator, convert_checkpoint
from gpt_neo_sampling.checkpoint import base, variable_shapes
from gpt_neo_sampling.checkpoint.mesh_tf import save_mesh_tf

SHAPE = {
    "n_vocab": 25129,
    "n_ctx": 2048,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 6,
    "attention_types": [[["global", "local"], 3]],
    "eos_id": 25128,
}

LOAD = r"""
import json, os, re, sys, time
from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling.generation import session as graphs

def memory(key):
    return int(re.search(key + r":\s+(\d+)", open("/proc/self/status").read())[1]) * 1024

load = graphs.fill_variables
def measured(*args):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    before, begin = memory("VmRSS"), time.monotonic()
    load(*args)
    print(json.dumps({"seconds": time.monotonic() - begin, "peak": memory("VmHWM") - before}), flush=True)
    sys.stderr.write("\0")
    sys.stderr.flush()
    os._exit(0)
graphs.fill_variables = measured
loads = json.loads(sys.argv[1])
for folder, mesh in loads:  # of several each in a process of its own, which need not import all anew
    if len(loads) == 1 or os.fork() == 0:
        TextGenerator.from_pretrained(folder, **mesh).generate([[1]], max_new_tokens=1)
    assert os.wait()[1] == 0
"""
VOCAB_SPLIT = {
    "mesh_shape": "x:2",
    "layout": "vocab:x,heads:x,intermediate_expanded:x",
    "devices": ["cpu:0", "cpu:1"],
}


@pytest.fixture(scope="module")
def weights():
    block = np.random.default_rng(0).standard_normal(2**20, np.float32) * np.float32(0.02)
    return {name: np.resize(block, shape) for name, shape in variable_shapes(SHAPE).items()}


FORMS = ["mesh-tf", "mesh-tf bfloat16", "pytorch_model.bin"]


@pytest.mark.parametrize(
    "forms, meshes",
    [(["safetensors"], [{}]), pytest.param(FORMS, [{}], marks=pytest.mark.slow),
     pytest.param(["safetensors"], [VOCAB_SPLIT], marks=pytest.mark.slow)],
)  # fmt: skip
def test_peak_memory(tmp_path, weights, forms, meshes):
    size = sum(w.nbytes for w in weights.values())
    loads = [(str(written(tmp_path / form, weights, form)), mesh) for form in forms for mesh in meshes]
    try:
        # one thread, as a fork takes along no other; and arrays that are freed go back to the system at once
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
        del environment["TQDM_DISABLE"]
        command = [sys.executable, "-c", LOAD, json.dumps(loads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    finally:
        shutil.rmtree(tmp_path)
    found = [json.loads(line) for line in done.stdout.splitlines()]  # and nothing else
    *bars, rest = done.stderr.split("\0")
    assert len(found) == len(bars) == len(loads) and not rest
    for (folder, mesh), figures, bar in zip(loads, found, bars):
        print(f"{folder}, {mesh.get('layout', 'one device')}: peak {figures['peak'] / size:.2f} times "
              f"{size / 1e6:.0f} MB, {figures['seconds']:.1f} s")  # fmt: skip
        assert figures["peak"] <= 1.2 * size
        assert "loading" not in bar  # stderr is no terminal


def written(folder, weights, form):
    """A folder with the weights in that format."""
    folder.mkdir()
    if form.startswith("mesh-tf"):
        save_mesh_tf(folder, SHAPE, weights.__getitem__, "bfloat16" if "bfloat16" in form else "float32")
        return folder
    base.write_json(folder / "config.json", {
        "model_type": "gpt_neo", "vocab_size": SHAPE["n_vocab"], "max_position_embeddings": SHAPE["n_ctx"],
        "hidden_size": SHAPE["n_embd"], "num_heads": SHAPE["n_head"], "num_layers": SHAPE["n_layer"],
        "attention_types": SHAPE["attention_types"],
    })  # fmt: skip
    if form == "safetensors":
        write_safetensors(folder / "model.safetensors", as_hugging_face(weights))
    else:
        write_pytorch(folder / "pytorch_model.bin", as_hugging_face(weights))
    return folder


def test_the_bar_is_on_a_terminal_and_only_for_what_takes_long(tmp_path, monkeypatch, capfd):
    def load():
        TextGenerator.from_pretrained(DATA / "hf_gpt_neo_tiny").generate([[1]], max_new_tokens=1)
        return capfd.readouterr()

    monkeypatch.setattr(base, "PROGRESS_DELAY", 0)
    assert load() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(base, "PROGRESS_DELAY", 60)
    assert "loading" not in load().err
    monkeypatch.setattr(base, "PROGRESS_DELAY", 0)
    out, err = load()
    assert "loading" in err and "100%" in err and out == ""
    convert_checkpoint(DATA / "hf_gpt_neo_tiny", tmp_path / "m")
    out, err = capfd.readouterr()
    assert "writing" in err and out == ""

"""Loading a model of GPT-Neo-125M's shape: peak memory, progress bar, and the slices of a mesh."""

import functools
import json
import os
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

SHAPE_125M = {
    "n_vocab": 50257,
    "n_ctx": 2048,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "attention_types": [[["global", "local"], 6]],
    "eos_id": 50256,
}

LOAD = r"""
import json, re, sys, time
from gpt_neo_sampling import TextGenerator, graphs

def memory(key):
    return int(re.search(key + r":\s+(\d+)", open("/proc/self/status").read())[1]) * 1024

load = graphs.load_weights
def measured(*args):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    before, begin = memory("VmRSS"), time.monotonic()
    load(*args)
    print(json.dumps({"seconds": time.monotonic() - begin, "peak": memory("VmHWM") - before}))
    sys.exit()
graphs.load_weights = measured
TextGenerator.from_pretrained(sys.argv[1], **json.loads(sys.argv[2])).generate([[1]], max_new_tokens=1)
"""
VOCAB_SPLIT = {
    "mesh_shape": "x:2",
    "layout": "vocab:x,heads:x,intermediate_expanded:x",
    "devices": ["cpu:0", "cpu:1"],
}


@pytest.fixture(scope="module")
def weights():
    block = np.random.default_rng(0).standard_normal(2**20, np.float32) * np.float32(0.02)
    return {name: np.resize(block, shape) for name, shape in variable_shapes(SHAPE_125M).items()}


@pytest.mark.parametrize("form", ["mesh-tf", "mesh-tf bfloat16", "safetensors", "pytorch_model.bin"])
def test_loading_125m(tmp_path, weights, form):
    folder = tmp_path / "model"
    folder.mkdir()
    if form.startswith("mesh-tf"):
        save_mesh_tf(folder, SHAPE_125M, weights.__getitem__, "bfloat16" if "bfloat16" in form else "float32")
    else:
        base.write_json(folder / "config.json", {
            "model_type": "gpt_neo", "vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 768,
            "num_heads": 12, "num_layers": 12, "attention_types": SHAPE_125M["attention_types"],
        })  # fmt: skip
        if form == "safetensors":
            write_safetensors(folder / "model.safetensors", as_hugging_face(weights))
        else:
            write_pytorch(folder / "pytorch_model.bin", as_hugging_face(weights))
    size = sum(w.nbytes for w in weights.values())
    try:
        for mesh in ({}, VOCAB_SPLIT) if form == "safetensors" else ({},):
            done = subprocess.run(
                [sys.executable, "-c", LOAD, str(folder), json.dumps(mesh)], capture_output=True, text=True, check=True,
                env={name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"},
            )  # fmt: skip
            figures = json.loads(done.stdout)  # and nothing else
            times = figures["peak"] / size
            print(f"{form}, {mesh.get('layout', 'one device')}: peak {times:.2f} times {size / 1e6:.0f} MB, "
                  f"{figures['seconds']:.1f} s, bar: {'loading' in done.stderr}")  # fmt: skip
            assert figures["peak"] <= 1.2 * size
            if abs(figures["seconds"] - base.PROGRESS_DELAY) > 1:
                assert ("loading" in done.stderr) == (figures["seconds"] > base.PROGRESS_DELAY)
    finally:
        for file in folder.iterdir():
            file.unlink()


def test_the_bar_is_on_stderr_and_only_for_what_takes_long(tmp_path, monkeypatch, capfd):
    def load():
        TextGenerator.from_pretrained(DATA / "hf_gpt_neo_tiny").generate([[1]], max_new_tokens=1)
        return capfd.readouterr()

    monkeypatch.setattr(base, "tqdm", functools.partial(base.tqdm, disable=False))
    monkeypatch.setattr(base, "PROGRESS_DELAY", 60)
    assert "loading" not in load().err
    monkeypatch.setattr(base, "PROGRESS_DELAY", 0)
    out, err = load()
    assert "loading" in err and "100%" in err and out == ""
    convert_checkpoint(DATA / "hf_gpt_neo_tiny", tmp_path / "m")
    out, err = capfd.readouterr()
    assert "writing" in err and out == ""

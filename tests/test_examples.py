"""examples/: a few steps of the training scripts, and the script that draws the docs' pictures."""

import json
import pathlib
import sys

import numpy as np
import pytest
import reference

from gpt_neo_sampling import TextGenerator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

pytest.importorskip("matplotlib", reason="examples/train_entmax.py draws with matplotlib, which [test] installs")

import gpu_check
import plot_settings
import train_entmax
import training
from PIL import Image


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.mark.slow
def test_train_entmax(text, tmp_path, monkeypatch, capsys):
    """After two steps: the first losses, the same start, the files, and models that can be sampled."""
    small = {"n_ctx": 16, "n_embd": 16, "n_layer": 2, "attention_types": [[["global", "local"], 1]]}
    monkeypatch.setattr(train_entmax, "CONFIG", {**train_entmax.CONFIG, **small})
    output = tmp_path / "out.png"
    argv = [str(text), "--steps", "2", "--batch", "4", "--output", str(output), "--save", str(tmp_path / "models")]
    train_entmax.main(argv)
    table = capsys.readouterr().out.splitlines()
    figures = json.loads(output.with_suffix(".json").read_text())
    softmax, entmax = figures["softmax"], figures["entmax"]

    flat = reference.entmax_loss(np.zeros(2048), np.eye(2048)[0], 1.3)  # the initial logits are nearly equal
    assert softmax["train_loss"][0] == pytest.approx(np.log(2048), rel=0.01)
    assert entmax["train_loss"][0] == pytest.approx(flat, rel=0.03)
    assert (
        [point["step"] for point in softmax["held_out"]] == [point["step"] for point in entmax["held_out"]] == [0, 1, 2]
    )
    assert softmax["held_out"][0]["accuracy"] == entmax["held_out"][0]["accuracy"]  # the same initial weights
    assert softmax["all_held_out"]["support"] == 2048
    for found in (softmax, entmax):
        assert [point["step"] for point in found["held_out"]] == [0, 1, 2]
        assert found["held_out"][2]["loss"] < found["held_out"][0]["loss"]
        assert set(found["all_held_out"]) == {name for name, _ in train_entmax.MEASURES} | {"tokens"}

    assert output.read_bytes()[:4] == b"\x89PNG"
    assert len(table) == 1 + len(train_entmax.MEASURES) + 2
    assert table[0].split()[-2:] == ["softmax", "entmax"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models", "out.json", "out.png", "text.txt"]
    for name in ("softmax", "entmax"):
        generator = TextGenerator.from_pretrained(tmp_path / "models" / name)
        (sample,) = generator.generate("The model", max_new_tokens=2, seed=1)
        assert len(sample.tokens) == 2 and sample.text


def test_measures():
    p = np.array([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]], np.float32)
    found = train_entmax.measure(p, np.array([1, 3]))
    assert found["accuracy"].tolist() == [0, 0]
    assert found["inside"].tolist() == [100, 0]
    assert found["support"].tolist() == [3, 1]
    np.testing.assert_allclose(found["effective_size"], [2**1.5, 1])
    targets = np.eye(4)[[1, 3]]
    np.testing.assert_allclose(found["sparsemax_score"], 1 - ((p - targets) ** 2).sum(-1) / 2)


@pytest.mark.parametrize("size", [2, 8, 9, 10, 40])
def test_windows_give_each_target_once(size):
    ids = np.arange(size)
    found = [(tokens, counts) for tokens, counts in training.windows(ids, 8, 3)]
    assert all(tokens.shape == (3, 9) and counts.shape == (3, 8) for tokens, counts in found)
    targets = np.concatenate([tokens[:, 1:][counts] for tokens, counts in found])
    assert targets.tolist() == list(range(1, size))
    for tokens, counts in found:
        for row, row_counts in zip(tokens, counts):
            # but for the text's beginning, four tokens or more stand before a target in its window
            assert row[0] == 0 or not row_counts[:4].any()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["no.txt"], "text no.txt: no such file"),
        (["TEXT", "--steps", "0"], "argument --steps: 0: at least 1 is needed"),
        (["TEXT", "--seed", "-1"], "argument --seed: -1: at least 0 is needed"),
        (["TEXT", "--save", "SHORT"], "short.txt: a file; a folder is needed"),
        (["TEXT", "--output", "a.pdf"], "--output a.pdf: a .png in a folder that exists is needed"),
        (["TEXT", "--output", "no/a.png"], "--output no/a.png: a .png in a folder that exists is needed"),
        (["SHORT"], "11 + 2 tokens; at least 130 + 2 are needed"),
    ],
)
def test_train_entmax_refuses(text, tmp_path, argv, message, capsys):
    short = tmp_path / "short.txt"
    short.write_text("It was a truth universally acknowledged.")
    with pytest.raises(SystemExit) as exit:
        train_entmax.main([{"TEXT": str(text), "SHORT": str(short)}.get(a, a) for a in argv])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_plot_settings(tmp_path, monkeypatch):
    """All four pictures, for few settings and a short text, are small PNGs of the right sizes, and not blank."""
    monkeypatch.setattr(plot_settings, "TOKENS", 4)
    monkeypatch.setattr(plot_settings, "OPTIONS", {"top_k": (5,), "entmax_alpha": (1.3,)})
    plot_settings.main([str(tmp_path / "new"), "--prompt", "Emma"])
    sizes = {"options": (1300, 650), "adapts": (800, 450), "chain": (1100, 800), "entmax": (1100, 800)}
    assert {path.stem for path in (tmp_path / "new").iterdir()} == set(sizes)
    for name, size in sizes.items():
        path = tmp_path / "new" / f"{name}.png"
        assert path.stat().st_size < 100_000
        picture = Image.open(path)
        assert picture.format == "PNG"
        assert picture.size == size
        assert len(picture.convert("RGB").getcolors()) > 20


def test_gpu_check(capsys, monkeypatch):
    """Without a GPU it says so; on a CPU, what it would report, where all tokens are equal."""
    assert gpu_check.main([]) == 2
    assert capsys.readouterr() == ("", "gpu_check: devices: there is no gpu:0; TensorFlow sees 0 GPUs\n")
    monkeypatch.setattr(gpu_check, "BATCHES", (1,))
    monkeypatch.setattr(gpu_check, "WAYS", {"greedy": {"temperature": 0}, "softmax": {}})
    assert gpu_check.main(["--device", "cpu:0", "--tokens", "3"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("gpt_neo_sampling ") and head.endswith("/device:CPU:0")
    equal = [line for line in lines if line.endswith("8 of 8 rows equal to the CPU's")]
    assert [line[:12].rstrip() for line in equal] == list(gpu_check.WAYS)
    assert [line.split(":")[0] for line in lines if "tokens/s" in line] == ["batch  1"]


def test_gpu_check_names_the_first_token_that_differs(capsys):
    class Fixed:
        def __init__(self, tokens):
            self.tokens = tokens

        def generate(self, prompts, **_):
            return [type("Sample", (), {"tokens": self.tokens}) for _ in prompts[:1]]

    assert gpu_check.compare(Fixed([1, 2, 3]), Fixed([1, 2, 4]), 3) == len(gpu_check.WAYS)
    assert capsys.readouterr().out.splitlines()[0].endswith("rows equal to the CPU's; row 0 from token 2 on")

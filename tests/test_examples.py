"""examples/: a few steps of the training scripts and of the others, the text that they fetch, and the notebook."""

import bz2
import hashlib
import http.server
import json
import pathlib
import sys
import threading

import numpy as np
import pytest
import reference
from helpers_checkpoint import HUGGING_FACE, make_hugging_face, write_json

from gpt_neo_sampling import TextGenerator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

pytest.importorskip("matplotlib", reason="examples/train_entmax.py draws with matplotlib, which [test] installs")

import austen
import gpu_check
import plot_settings
import sample_on_mesh
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
    assert len(table) == 1 + len(train_entmax.MEASURES) + 3
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


# --- The text --------------------------------------------------------------------------------------------


def as_r_saves(lines):
    """A file of janeaustenr's form, written by R's description of its format ("R Internals", 1.8)."""

    def text(line):
        return (0x00040009).to_bytes(4, "big") + len(line).to_bytes(4, "big") + line

    head = b"RDX2\nX\n" + bytes.fromhex("00000002 00030202 00020300 00000402 00000001")
    vector = bytes.fromhex("00000010") + len(lines).to_bytes(4, "big") + b"".join(map(text, lines))
    return bz2.compress(head + text(b"emma") + vector + bytes.fromhex("000000fe"))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """(a server's URL, its folder): two books, and their checksums in place of the six."""
    books = {"emma": [b"EMMA", b"", "Zoë".encode()], "persuasion": [b"PERSUASION"]}
    folder = tmp_path / "library"
    folder.mkdir()
    for name, lines in books.items():
        (folder / f"{name}.rda").write_bytes(as_r_saves(lines))
    checksums = {name: hashlib.sha256((folder / f"{name}.rda").read_bytes()).hexdigest() for name in books}
    monkeypatch.setattr(austen, "BOOKS", checksums)
    monkeypatch.setattr(austen, "WHOLE", hashlib.sha256("EMMA\n\nZoë\n\nPERSUASION\n".encode()).hexdigest())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def test_austen(library, tmp_path, capsys):
    url, _ = library
    austen.main([str(tmp_path / "austen.txt"), "--source", url])
    assert (tmp_path / "austen.txt").read_text(encoding="utf-8") == "EMMA\n\nZoë\n\nPERSUASION\n"
    assert capsys.readouterr().err.splitlines()[:2] == ["fetching emma", "fetching persuasion"]


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda folder: (folder / "persuasion.rda").unlink(), "persuasion.rda: HTTP Error 404: File not found"),
        (lambda folder: (folder / "emma.rda").write_bytes(b"other"), "emma.rda: 5 bytes with the SHA-256 "),
    ],
)
def test_a_text_that_cannot_be_had(library, tmp_path, capsys, harm, message):
    url, folder = library
    harm(folder)
    with pytest.raises(SystemExit) as exit:
        austen.main([str(tmp_path / "austen.txt"), "--source", url])
    assert exit.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["library"]


def test_a_text_that_is_there_stays(library, tmp_path, capsys):
    (tmp_path / "austen.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit:
        austen.main([str(tmp_path / "austen.txt"), "--source", library[0]])
    assert exit.value.code == 2 and "austen.txt is there already" in capsys.readouterr().err
    assert (tmp_path / "austen.txt").read_text() == "mine"


# --- A mesh, and the notebook ------------------------------------------------------------------------------


@pytest.mark.slow
def test_sample_on_mesh(capfd):
    """The text is TextGenerator's; what is being done is said in time, on stderr."""
    prompts, length = ["The family of Dashwood", "Emma"], 12
    sample_on_mesh.main(["--length", str(length), "--prompt", *prompts])
    out, err = capfd.readouterr()
    generator = TextGenerator.from_pretrained()
    options = dict(
        temperature=0.9, top_k=40, seed=1, max_new_tokens=[length - len(generator.encode(p)) for p in prompts]
    )
    texts = [prompt + sample.text for prompt, sample in zip(prompts, generator.generate(prompts, **options))]
    assert out == "".join(f"{text}\n\n" for text in texts)
    said = [line.split("s  ")[1] for line in err.splitlines()]
    assert said[0] == "building the loop for 4 devices, x:2,y:2 with batch:x,vocab:y,heads:y"
    assert [line.split()[0] for line in said] == ["building", "loading", "sampling", "done"]


def test_sample_on_mesh_refuses_a_length(capsys):
    with pytest.raises(SystemExit):
        sample_on_mesh.main(["--length", "3"])
    assert "--length 3: from 5 to 256 is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", str(HUGGING_FACE)], "has no tokenizer.json, nor vocab.json and merges.txt"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--prompt", "Emma"], "layout batch:x splits batch=1 over x:2, which does not divide it"),
    ],
)
def test_sample_on_mesh_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        sample_on_mesh.main(argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_sample_on_mesh_pads_the_vocabulary(tmp_path, capsys):
    """One that the mesh does not divide."""
    folder = make_hugging_face(tmp_path / "model")  # of 11 tokens
    vocab = {letter: i for i, letter in enumerate("abcdefghijk")}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
    write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": model})
    sample_on_mesh.main(["--model", str(folder), "--mesh-shape", "x:2", "--layout", "vocab:x", "--length", "4",
                         "--prompt", "c"])  # fmt: skip
    (sample,) = TextGenerator.from_pretrained(folder).generate(
        ["c"], temperature=0.9, top_k=40, seed=1, max_new_tokens=3
    )
    assert capsys.readouterr().out.strip().split() == ["c", *sample.text.split()]


def test_the_notebook_is_that_of_its_source():
    make_tour = pytest.importorskip("make_tour", reason="jupytext, nbclient and ipykernel, which [test] installs")
    import nbformat

    notebook, source = nbformat.read(make_tour.NOTEBOOK, as_version=4), make_tour.read()
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]
    assert make_tour.NOTEBOOK.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds == {"stream", "display_data"} and not any(o.get("name") == "stderr" for c in code for o in c.outputs)


@pytest.mark.slow
def test_the_notebook_runs():
    """And prints what is in it; the pictures are not compared."""
    make_tour = pytest.importorskip("make_tour", reason="jupytext, nbclient and ipykernel, which [test] installs")
    import nbformat

    def printed(notebook):
        return ["".join(o.text for o in c.outputs if o.output_type == "stream")
                for c in notebook.cells if c.cell_type == "code"]  # fmt: skip

    assert printed(make_tour.run(make_tour.read())) == printed(nbformat.read(make_tour.NOTEBOOK, as_version=4))

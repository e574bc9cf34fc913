"""The next-token distribution step by step: its numbers, table and picture."""

import json
import re
import sys

import numpy as np
import pytest
import reference
from conftest import DATA
from helpers_model import checkpoint, reference_config
from tokenizers import Tokenizer

from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling._atomic_files import write_whole
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.generation.decode_graph import DEMO_FOLDER
from gpt_neo_sampling.inspection import (
    ChainStep,
    likeliest,
    plot,
    table,
    terminal_style,
    to_json,
    token_text,
)
from gpt_neo_sampling.inspection.steps import changing

V = 2048


def chain(*more):
    """A chain over V entries: the model, temperature 0.5, top-k 5, top-k 9 (which changes nothing), entmax."""
    x = 2 * np.random.default_rng(5).standard_normal(V)
    masked = np.where(reference.top_k_keep(x, 5), 2 * x, -np.inf)
    top_5 = reference.softmax(masked)
    return [
        ChainStep("model", "", reference.softmax(x)),
        ChainStep("temperature", "0.5", reference.softmax(2 * x)),
        ChainStep("top_k", "5", top_5),
        ChainStep("top_k", "9", top_5),
        *more,
        ChainStep("entmax", "1.1", reference.entmax(masked, 1.1)),
    ]


def name(i):
    return f" w{i}"


def test_sizes_of_a_step():
    before = ChainStep("model", "", np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    after = ChainStep("top_k", "2", np.array([0.5, 0.5, 0, 0], np.float32))
    assert (before.support, before.entropy, before.effective_size) == (4, 1.75, 2**1.75)
    assert (after.support, after.entropy, after.effective_size) == (2, 1, 2)
    assert after.mass_removed(before) == 0.25
    assert before.mass_removed(before) == 0
    certain = ChainStep("argmax", "", np.array([0, 1.0]))
    assert (certain.support, certain.entropy, certain.effective_size) == (1, 0, 1)


def test_likeliest_tokens_are_those_of_the_first_step_and_of_the_last():
    model = ChainStep("model", "", np.array([0.1, 0.4, 0.3, 0.15, 0.05]))
    drawn = ChainStep("logit_bias", "", np.array([0.4, 0.0, 0.0, 0.1, 0.5]))
    assert likeliest([model, drawn], 3) == [4, 0, 1]
    assert likeliest([model, drawn], 9) == [4, 0, 3, 1, 2]


def test_steps_that_change_something():
    steps = chain()
    assert [step for step, _ in changing(steps)] == [steps[0], steps[1], steps[2], steps[4]]
    _, _, (_, moved), _ = changing(steps)  # a mask moves what it cuts
    assert moved == pytest.approx(steps[2].mass_removed(steps[1]), rel=1e-6)


def test_json():
    steps = chain()
    found = json.loads(json.dumps(to_json(steps, name, count=7)))
    assert [(s["name"], s["setting"]) for s in found["steps"]] == [(s.name, s.setting) for s in steps]
    for i, (before, step) in enumerate(zip([steps[0], *steps], found["steps"])):
        p = steps[i].probabilities
        assert step["support"] == (p > 0).sum()
        assert step["mass_removed"] == pytest.approx(before.probabilities[p == 0].sum())
        assert step["entropy"] == pytest.approx(-sum(q * np.log2(q) for q in p if q > 0))
        assert step["effective_size"] == pytest.approx(2 ** step["entropy"])
        assert step["likeliest"] == p.argmax()
        listed = sum(token["probabilities"][i] for token in found["tokens"])
        assert listed + found["others"][i] == pytest.approx(1)
    for place, token in enumerate(found["tokens"], 1):
        assert token["text"] == name(token["id"])
        assert token["rank"] == place  # none of these steps changes the order
        assert token["probabilities"] == [float(s.probabilities[token["id"]]) for s in steps]
    assert to_json(steps)["tokens"][0]["text"] is None


def test_table_says_what_each_step_does():
    steps = chain()
    lines = table(steps, name, count=7, width=120).splitlines()
    for step, line in zip(steps, lines[1:]):
        assert line.startswith(step.label)
        assert f" {step.support:,} " in line
        assert f"{step.entropy:.2f} bits" in line
        assert f" {step.effective_size:,.1f} " in line
        assert line.endswith(f"·w{step.probabilities.argmax()}")
    heading = lines[len(steps) + 2]
    labels = ["model", "temperature 0.5", "top_k 5", "entmax 1.1"]
    assert re.split(r" {2,}", heading.strip()) == ["rank", "token", "id", *labels]
    rows = lines[len(steps) + 3 :]
    order = np.argsort(-steps[0].probabilities)
    for rank, (i, row) in enumerate(zip(order[:7], rows), 1):
        cells = row.split()
        assert cells[:3] == [str(rank), f"·w{i}", str(i)]
        figures = [c for c in cells[3:] if c == "cut" or "%" in c]
        expected = [step.probabilities[i] for step, _ in changing(steps)]
        if rank > 5:
            assert figures[2:] == ["cut"]  # once, where it is cut
            figures, expected = figures[:2], expected[:2]
        assert [float(f.rstrip("%")) for f in figures] == pytest.approx([100 * p for p in expected], rel=6e-3)
    cells = rows[7].split()
    assert cells[:2] == ["2,041", "others"]
    assert float(cells[2].rstrip("%")) == pytest.approx(100 * steps[0].probabilities[order[7:]].sum(), rel=6e-3)
    assert cells[-1] == "0"


def test_bars_are_as_long_as_the_probabilities():
    p = np.array([0.4, 0.2, 0.1, 0.3 - 1e-3, 1e-3])
    lines = table([ChainStep("model", "", p)], name, width=60).splitlines()[-5:]
    bars = [re.search(r"%\s?([█▉▊▋▌▍▎▏]*)$", line).group(1) for line in lines]
    eighths = [8 * bar.count("█") + (0 if bar.endswith("█") or not bar else " ▏▎▍▌▋▊▉".index(bar[-1])) for bar in bars]
    assert eighths[0] == 24 * 8
    np.testing.assert_allclose(np.array(eighths[:4]) / eighths[0], np.sort(p)[::-1][:4] / 0.4, atol=0.5 / eighths[0])
    assert eighths[4] == 1  # nothing that can be drawn is without a bar


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("unicode", [True, False])
def test_table_keeps_to_its_width(width, unicode):
    p = chain()[0].probabilities
    more = [ChainStep(n, "0.05", np.roll(p, i)) for i, n in enumerate(("typical_p", "eta_cutoff", "min_p"), 1)]
    text = table(chain(*more), lambda i: " \n日本語é" * (i % 6), width=width, unicode=unicode)
    lines = text.splitlines()
    columns = [sum(2 if c in "日本語" else 1 for c in line) for line in lines]
    assert max(columns) <= width
    assert text.isascii() != unicode
    assert "\x1b" not in text
    coloured = table(chain(*more), lambda i: " \n日本語é" * (i % 6), width=width, unicode=unicode, colour=True)
    plain = re.sub(r"\x1b\[\d*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == lines


def test_style_is_the_terminals(monkeypatch):
    class Terminal:
        def __init__(self, encoding, is_terminal):
            self.encoding, self.isatty = encoding, lambda: is_terminal

    monkeypatch.setenv("COLUMNS", "77")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal_style(Terminal("UTF-8", True)) == {"width": 77, "unicode": True, "colour": True}
    assert terminal_style(Terminal("latin-1", False)) == {"width": 77, "unicode": False, "colour": False}
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal_style(Terminal("utf8", True))["colour"]


def test_tokens_that_are_bytes_spaces_or_unknown():
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    curly = tokenizer.encode("“").ids
    assert len(curly) > 1  # a quotation mark in pieces
    assert "".join(token_text(tokenizer, i) for i in curly) == r"\xe2\x80\x9c"
    assert token_text(tokenizer, tokenizer.token_to_id("Ġknow")) == " know"
    assert token_text(tokenizer, 0) == "<|endoftext|>"
    assert token_text(tokenizer, 10**6) == "<1000000>"
    assert token_text(None, 7) == "<7>"
    texts = [" know", "\n\t", "\x1b[31m", "日本"]
    lines = table([ChainStep("model", "", np.full(4, 0.25))], texts.__getitem__).splitlines()
    assert [line.split()[1] for line in lines[-4:]] == ["·know", "↵⇥", r"\x1b[31m", "日本"]


# --- the picture


@pytest.fixture
def matplotlib():
    matplotlib = pytest.importorskip("matplotlib", reason="the picture needs matplotlib, which [test] installs")
    before = dict(matplotlib.rcParams)
    yield matplotlib
    assert dict(matplotlib.rcParams) == before  # a caller's settings stay as they are
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning:matplotlib")  # of an old one, with a new pyparsing
def test_picture(matplotlib, tmp_path):
    from matplotlib import image

    path = tmp_path / "chain.png"
    plot(chain(), lambda i: ("$1_2", " 日本", "\n", "🙂")[i % 4], path, title="after “日 $_$”")
    pixels = image.imread(path)
    assert pixels.shape[:2] == (800, 1100)
    flat = pixels[..., :3].reshape(-1, 3)
    assert (flat == 1).all(1).mean() > 0.5  # white paper
    for colour in ("4d4d4d", "d55e00", "0072b2", "009e73"):  # the model, what is drawn from, the steps in between
        rgb = np.frombuffer(bytes.fromhex(colour), np.uint8) / 255
        assert (np.abs(flat - rgb).max(1) < 2e-3).sum() > 1000, colour
    assert [p.name for p in tmp_path.iterdir()] == ["chain.png"]


def drawn(monkeypatch, tmp_path, steps, **options):
    """The figure of a picture, after it was drawn, and its pixels."""
    from matplotlib import figure, image

    figures = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    plot(steps, name, tmp_path / "chain.png", **options)
    return figures[0], image.imread(tmp_path / "chain.png")[..., :3]


def test_lines_that_lie_on_each_other(matplotlib, tmp_path, monkeypatch):
    """Each step gives the probabilities to other tokens, so that by rank all are one curve; each colour shows."""
    p = chain()[0].probabilities
    steps = [ChainStep("model", "", p), *(ChainStep("logit_bias", str(n), np.roll(p, n)) for n in range(1, 5))]
    figure, pixels = drawn(monkeypatch, tmp_path, steps)
    (plane,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith("Probability by rank"))
    left, low, right, high = plane.get_window_extent().extents.astype(int)
    curve = pixels[pixels.shape[0] - high : pixels.shape[0] - low, left:right].reshape(-1, 3)
    for colour in ("4d4d4d", "0072b2", "009e73", "56b4e9", "d55e00"):
        rgb = np.frombuffer(bytes.fromhex(colour), np.uint8) / 255
        assert (np.abs(curve - rgb).max(1) < 2e-3).sum() > 300, colour


NAMES = ("presence_penalty, frequency_penalty", "no_repeat_ngram_size", "repetition_penalty", "epsilon_cutoff")


@pytest.mark.parametrize("n_steps", [1, 4, 12])
def test_nothing_is_cut_or_covered(matplotlib, tmp_path, monkeypatch, n_steps):
    """Texts lie within the picture, and in nobody's way; lines and bars of each step have a name in the key."""
    p = chain()[0].probabilities
    steps = [
        ChainStep(NAMES[n % 4], "-1.234567, 0.987654", np.roll(p, n)) if n else ChainStep("model", "", p)
        for n in range(n_steps)
    ]
    figure, _ = drawn(monkeypatch, tmp_path, steps, title="Next token after “" + "words and words " * 12 + "”")
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
    drawn_on, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # of all texts, lines and bars
    assert 0 <= drawn_on.x0 < drawn_on.x1 <= width and 0 <= drawn_on.y0 < drawn_on.y1 <= height
    planes = [axes for axes in figure.axes if axes is not legend.axes]
    assert len(planes) == 4
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in planes)
    assert not any(a.get_tightbbox().overlaps(b.get_tightbbox()) for a in planes for b in planes if a is not b)
    key = [text.get_text() for text in legend.get_texts()]
    assert key[0] == "model" and len(key) == max(n_steps, 2) and key[-1].startswith("drawn from: ")


@pytest.mark.parametrize("suffix", ["svg", "PDF"])
def test_other_formats(matplotlib, tmp_path, suffix):
    path = tmp_path / f"chain.{suffix}"
    plot(chain()[:1], name, path)
    assert path.read_bytes()[:5] == {"svg": b"<?xml", "PDF": b"%PDF-"}[suffix]


def test_a_picture_that_cannot_be_made(matplotlib, tmp_path, monkeypatch):
    for wrong in ("chain.txt", "chain"):
        with pytest.raises(ValueError, match=r"chain.*: the suffix chooses the format; allowed: .*\.png"):
            plot(chain(), name, tmp_path / wrong)
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        plot(chain(), name, tmp_path / "nowhere" / "chain.png")
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ValueError, match="needs the package matplotlib: .*pip install .?matplotlib"):
        plot(chain(), name, tmp_path / "chain.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "chain.png"
    path.write_bytes(b"old")

    def write(partial):
        partial.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ["chain.png"]
    assert path.read_bytes() == b"old"


# --- of a model


PROMPT, NEW = [5, 17, 9, 17], [3, 17, 3]


@pytest.fixture(scope="module")
def model():
    generator = TextGenerator.from_pretrained(DATA / "gpt_neo_checkpoints" / "global")
    yield generator
    generator.close()


def reference_logits(ids):
    params, weights, _ = checkpoint("global")
    return reference.gpt_neo_forward(weights, np.array([ids]), **reference_config(params))[0, -1]


def test_chain_of_a_model_is_the_references(model):
    steps = model.inspect(PROMPT, temperature=0.7, top_k=9, min_p=0.2, entmax_alpha=1.5)
    x = reference_logits(PROMPT)
    cold = x / 0.7
    top = np.where(reference.top_k_keep(cold, 9), cold, -np.inf)
    p = reference.softmax(top)
    likely = np.where(p >= 0.2 * p.max(), top, -np.inf)
    expected = {
        "model": reference.softmax(x),
        "temperature 0.7": reference.softmax(cold),
        "top_k 9": p,
        "min_p 0.2": reference.softmax(likely),
        "entmax 1.5": reference.entmax(likely, 1.5),
    }
    assert [step.label for step in steps] == list(expected)
    for step, p in zip(steps, expected.values()):
        assert step.support == (p > 0).sum()
        np.testing.assert_allclose(step.probabilities, p, atol=2e-6)
    assert steps[3].support < 9


def test_penalties_of_new_tokens_count_the_continuation_alone(model):
    steps = model.inspect(PROMPT, NEW, temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    x = reference_logits(PROMPT + NEW)
    x[3] -= 0.5 + 2 * 0.25
    x[17] -= 0.5 + 0.25
    assert steps[1].label == "presence_penalty 0.5, frequency_penalty 0.25"
    np.testing.assert_allclose(steps[1].probabilities, reference.softmax(x), atol=2e-6)
    held, free = (model.inspect(PROMPT, new, min_new_tokens=3, eos_token_id=7)[1] for new in (NEW[:2], NEW))
    assert held.label == "min_new_tokens 3"
    assert held.probabilities[7] == 0 < free.probabilities[7]


def test_n_grams_that_stand_there_are_not_repeated(model):
    (step,) = (s for s in model.inspect(PROMPT, no_repeat_ngram_size=2) if s.name == "no_repeat_ngram_size")
    x = reference_logits(PROMPT)
    x[9] = -np.inf  # 17 9 stands there, and 17 is the last token
    assert step.label == "no_repeat_ngram_size 2"
    np.testing.assert_allclose(step.probabilities, reference.softmax(x), atol=2e-6)


def test_greedy_decoding_takes_the_likeliest(model):
    banned = int(reference_logits(PROMPT).argmax())
    steps = model.inspect(PROMPT, do_sample=False, bad_words_ids=[[banned]])
    assert [step.name for step in steps] == ["model", "bad_words_ids", "argmax"]
    taken = np.flatnonzero(steps[-1].probabilities)
    assert taken == model.generate([PROMPT], do_sample=False, bad_words_ids=[[banned]], max_new_tokens=1)[0].tokens
    assert taken != banned


@pytest.mark.slow
def test_a_split_vocabulary_gives_the_same_chain(model):
    options = dict(temperature=0.7, top_p=0.8, repetition_penalty=1.3, entmax_alpha=1.2)
    split = TextGenerator.from_pretrained(
        model.checkpoint.folder, mesh_shape="x:2", layout="vocab:x", devices="cpu:0,cpu:1"
    )
    for one, other in zip(model.inspect(PROMPT, **options), split.inspect(PROMPT, **options)):
        assert one.label == other.label
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)
    split.close()


def test_command_prints_json(capfd):
    folder = str(DATA / "gpt_neo_checkpoints" / "global")
    args = ["inspect", "--model", folder, "--prompt-ids", "5 17 9 17", "--temperature", "0.5", "--show", "3", "--json"]
    assert cli.main(args) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert found["prompt_tokens"] == PROMPT
    p = reference.softmax(reference_logits(PROMPT) / 0.5)
    assert [token["id"] for token in found["tokens"]] == np.argsort(-p)[:3].tolist()
    assert [token["probabilities"][-1] for token in found["tokens"]] == pytest.approx(-np.sort(-p)[:3], abs=1e-6)
    assert found["tokens"][0]["text"] is None

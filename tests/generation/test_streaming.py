"""Text while it is drawn: whole characters, stop strings, one sample after another, Ctrl-C."""

import json
import signal
import threading
import time

import numpy as np
import processes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import main
from test_docs import terminal

from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.generation.generator import Interrupted
from gpt_neo_sampling.generation.streaming import IncrementalDetokenizer, Watcher


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


@pytest.fixture(scope="module")
def tokenizer(demo):
    return demo.tokenizer


def pieces(tokenizer, prompt, tokens, stop_strings=()):
    detokenizer, out = IncrementalDetokenizer(tokenizer, prompt, stop_strings), []
    for at, token in enumerate(tokens):
        out.append(detokenizer.push(token, is_last=at + 1 == len(tokens)))
        if detokenizer.stopped:
            break
    return out


# --- One row's text -------------------------------------------------------------------


CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd")


@settings(max_examples=300)
@given(st.text(CHARACTERS, max_size=12), st.text(CHARACTERS, min_size=1, max_size=40), st.integers(0, 3))
def test_pieces_are_whole_characters_and_add_up(tokenizer, prompt, text, cut):
    """A prompt may end in the middle of a character; the whole character then counts as new."""
    ids = tokenizer.encode(prompt + text).ids
    begin = max(0, len(tokenizer.encode(prompt).ids) - cut)
    out = pieces(tokenizer, ids[:begin], ids[begin:])
    assert "".join(out) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:begin]).rstrip("\ufffd")) :]
    assert "\ufffd" not in "".join(out)


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("a\U0001f600b").ids
    out = pieces(tokenizer, [], ids)
    assert "".join(out) == "a\U0001f600b" and "" in out and len(ids) > 3
    assert "".join(pieces(tokenizer, [], ids[:-2])).startswith("a\ufffd")  # at the end there is no more to come


@settings(max_examples=300)
@given(st.text("ab\n", min_size=1, max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1))
def test_stop_strings(tokenizer, text, stop_strings):
    out = pieces(tokenizer, [], tokenizer.encode(text).ids, stop_strings)
    so_far = [tokenizer.decode(tokenizer.encode(text).ids[:n]) for n in range(1, len(tokenizer.encode(text).ids) + 1)]
    first = next((t for t in so_far if any(s in t for s in stop_strings)), None)  # the row ends with this token
    assert "".join(out) == (text if first is None else text[: min(first.find(s) for s in stop_strings if s in first)])
    shown = ""
    for piece in out:  # nothing was shown that a stop string takes back
        shown += piece
        assert text.startswith(shown)


def test_a_prompts_own_replacement_character_is_not_new(tokenizer):
    prompt, new = tokenizer.encode("a \ufffd").ids, tokenizer.encode(" bc").ids
    assert "".join(pieces(tokenizer, prompt, new)) == " bc"


def test_special_tokens_are_not_text(tokenizer):
    end = tokenizer.token_to_id("<|endoftext|>")
    assert "".join(pieces(tokenizer, [], [end, *tokenizer.encode("ab").ids, end, end])) == "ab"


# --- Requests --------------------------------------------------------------------------

PROMPTS = ["It was the duty of", "She was", "Mr. Darcy"]


def ignored(*token):
    """A streamer. Requests of one size with a streamer share a graph."""


def test_streamed_tokens_and_text_are_the_samples(demo):
    seen = {}

    def streamer(index, token, text, is_last):
        tokens, texts, ends = seen.setdefault(index, ([], [], []))
        tokens.append(token), texts.append(text), ends.append(is_last)

    options = dict(seed=4, max_new_tokens=[20, 3, 9], num_return_sequences=2, eos_token_id=[6, 12])
    samples = demo.generate(PROMPTS, streamer=streamer, **options)
    assert samples == demo.generate(PROMPTS, **options)
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for index, sample in enumerate(samples):
        tokens, texts, ends = seen[index]
        assert tokens == sample.tokens and "".join(texts) == sample.text
        assert ends == [False] * (len(tokens) - 1) + [True]


def test_tokens_come_while_others_are_drawn(demo):
    class Enough(Exception):
        pass

    seen = []

    def streamer(*token):
        seen.append(token)
        if len(seen) == 10:
            raise Enough

    with pytest.raises(Enough):
        demo.generate(PROMPTS, max_new_tokens=40, seed=1, streamer=streamer)
    assert len(seen) == 10


STOPPED = dict(seed=2, max_new_tokens=40, stop_strings=["the", ","])


def test_a_stop_string_ends_its_row(demo):
    samples = demo.generate(PROMPTS, **STOPPED)
    plain = demo.generate(PROMPTS, seed=2, max_new_tokens=40, streamer=ignored)
    assert any(s.finish_reason == "stop" for s in samples)
    for sample, whole in zip(samples, plain):
        assert whole.tokens[: len(sample.tokens)] == sample.tokens and whole.text.startswith(sample.text)
        ends = [whole.text.find(s) for s in STOPPED["stop_strings"] if s in whole.text]
        assert sample.text == (whole.text[: min(ends)] if ends else whole.text)
        assert (sample.finish_reason == "stop") == bool(ends)


@pytest.mark.slow
def test_stop_strings_on_a_mesh(demo):
    split = TextGenerator.from_pretrained(mesh_shape="x:2", layout="vocab:x", devices="cpu:0,cpu:1")
    assert split.generate(PROMPTS, **STOPPED) == demo.generate(PROMPTS, **STOPPED)


def test_what_a_streamer_raises_is_raised(demo):
    def streamer(index, token, text, is_last):
        raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space left"):
        demo.generate(PROMPTS, max_new_tokens=40, streamer=streamer)
    assert all(s.tokens for s in demo.generate(PROMPTS, max_new_tokens=40, seed=1, streamer=ignored))


def test_a_watcher_that_is_interrupted_ends_all_rows():
    watcher = Watcher([(None, 9, [])] * 2)

    def run():
        assert watcher(np.array([5, 6]), np.array([1, 1])).tolist() == [0, 0]
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        deadline = time.monotonic() + 20
        while not watcher(np.array([5, 6]), np.array([1, 1])).all():
            assert time.monotonic() < deadline
        return "ended"

    assert watcher.run(run) == "ended" and watcher.interrupted


def test_ctrl_c_within_a_call_loses_no_token():
    watcher, shown = None, []

    def on_token(row, token, text, is_last):
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)
        shown.append(token)

    def run():
        for n in range(1, 6):
            watcher(np.array([n]), np.array([n]))
        return "ended"

    watcher = Watcher([(None, 9, [])], on_token)
    assert watcher.run(run) == "ended" and watcher.interrupted
    assert shown == list(range(1, len(shown) + 1)) and len(shown) > 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_ctrl_c_keeps_finished_samples(demo):
    """The first row is done early; Ctrl-C comes with the 30th token of the second."""

    def streamer(index, token, text, is_last):
        count[index] += 1
        if count[1] == 30:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    options = dict(seed=4, max_new_tokens=[5, 230])
    want = demo.generate(PROMPTS[:2], streamer=ignored, **options)
    count = np.zeros(2, int)
    with pytest.raises(Interrupted) as e:
        demo.generate(PROMPTS[:2], streamer=streamer, **options)
    assert e.value.samples == [want[0], None]
    assert count[0] == 5 and 30 <= count[1] < 230
    assert demo.generate(PROMPTS[:2], streamer=ignored, **options) == want


# --- The command --------------------------------------------------------------------------


@pytest.fixture
def here(demo, monkeypatch):
    """Commands in this process share one generator."""
    monkeypatch.setattr(TextGenerator, "from_pretrained", lambda *_, **__: demo)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(capfd, here):
    args = ["generate", "--prompt", "It was the duty of", "--max-new-tokens", "230", "--seed", "3"]
    with processes.Command(*args) as process:
        first = process.stdout.read(1)  # it has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    out = first + out
    assert process.returncode == 130 and err == "It was the duty of\ngpt-neo-sampling: interrupted\n"
    assert out.endswith("\n")
    _, whole, _ = main(capfd, *args)
    assert len(out) < len(whole) and whole.startswith(out[:-1])


@pytest.mark.parametrize("where", ["here", pytest.param("a process", marks=pytest.mark.slow)])
def test_samples_are_printed_in_turn_as_they_come(capfd, here, where):
    args = ["generate", "--prompt", *PROMPTS, "--num-samples", "2", "--max-new-tokens", "20", "--seed", "5"]
    if where == "here":
        with terminal() as text:
            assert cli.main(args) == 0
        shown = text()
    else:  # where what is not flushed comes late
        shown = processes.run(*args, stderr=processes.STDOUT).stdout
    _, as_json, _ = main(capfd, *args, "--json")
    texts = [s["text"] for s in json.loads(as_json)["samples"]]
    assert shown == "".join(PROMPTS[i // 2] + text + "\n" for i, text in enumerate(texts))

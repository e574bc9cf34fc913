"""`generate` on a terminal without a prompt: what is typed, and what appears."""

import argparse
import dataclasses
import os
import re
import signal
import sys
import time

import processes
import pytest

from gpt_neo_sampling import GenerationOptions, TextGenerator
from gpt_neo_sampling.cli import repl
from gpt_neo_sampling.cli.parser import parser
from gpt_neo_sampling.cli.settings import COMMANDS, NOT_SET, Settings, is_unfinished, read, words
from gpt_neo_sampling.generation.options import OPTIONS
from gpt_neo_sampling.sampling.controls import CONTROLS


def arguments(*line):
    return parser().parse_args(["generate", *line])


# --- /set and the others ------------------------------------------------------------------


def test_every_option_of_the_list_can_be_set():
    fields = {field.name for field in dataclasses.fields(GenerationOptions)} - {"return_logprobs"}
    assert set(NOT_SET) <= fields >= set(CONTROLS) | set(OPTIONS)
    assert fields - set(NOT_SET) <= set(Settings().names)


@pytest.mark.parametrize(
    "typed, as_given",
    [
        ("top_p 0.9", ["--top-p", "0.9"]),
        ("--top-p 0.9", ["--top-p", "0.9"]),
        ("top-p=0.9", ["--top-p", "0.9"]),
        ("presence_penalty -1e-3", ["--presence-penalty", "-1e-3"]),
        ("num_samples 2", ["--num-samples", "2"]),
        ("entmax", ["--entmax"]),
        ("entmax_alpha 1.5", ["--entmax", "1.5"]),
        ("greedy", ["--greedy"]),
        ("do_sample true", ["--do-sample", "true"]),
        (r'stop_strings "\n" "a b" --- --seed', ["--stop-strings=\n", "--stop-strings", "a b", "---",
                                                 "--stop-strings=--seed"]),
        ("stop_strings", ["--stop-strings"]),
        ("logit_bias 13=-2.5 14=1", ["--logit-bias", "13=-2.5", "14=1"]),
        ("bad_words_ids 5 '6 7'", ["--bad-words-ids", "5", "6 7"]),
        ("sequence_bias '5 6=-1' 7=2", ["--sequence-bias", "5 6=-1", "7=2"]),
        ("suppress_tokens 5 6", ["--suppress-tokens", "5", "6"]),
        ("exponential_decay_length_penalty 5,1.1", ["--exponential-decay-length-penalty", "5,1.1"]),
        ("stream -3", ["--stream", "-3"]),
    ],
)  # fmt: skip
def test_set_is_as_on_the_command_line(typed, as_given):
    settings, before = Settings(), arguments("--seed", "4")
    after = settings.changed(before, typed)
    assert after == arguments("--seed", "4", *as_given)
    assert before == arguments("--seed", "4")
    name = re.split("[ =]", typed)[0]
    assert settings.changed(after, f"{name} default") == before
    # what is shown is what may be typed
    again = arguments()
    for line in settings.shown(after).splitlines():
        again = settings.changed(again, line)
    assert again == after


def test_what_is_set_is_shown():
    settings = Settings()
    assert settings.shown(arguments()).startswith("nothing is set")
    args = settings.changed(arguments("--top-k", "5"), r"""stop_strings "\n" "it's" "a\\b" \x""")
    assert settings.shown(args) == 'stop_strings \\n "it\'s" a\\\\b \\\\x\ntop_k 5'


@pytest.mark.parametrize(
    "typed, message",
    [
        ("top_kk 3", "there is no option top_kk; did you mean top_k? (/help lists them)"),
        ("max_length 3", "there is no option max_length; max_new_tokens counts the new tokens alone"),
        ("logits_processors f", "there is no option logits_processors; functions of your own are for Python"),
        ("pad_token_id 1", "there is no option pad_token_id; it changes nothing"),
        ("json", "there is no option json"),
        ("top_p", "argument --top-p: expected one argument"),
        ("top_p warm", "argument --top-p: invalid float value: 'warm'"),
        ("top_p 0.9 0.8", "top_p takes one value, but 2 are given: 0.9 0.8"),
        ("greedy 1", "greedy takes no value; /set greedy alone switches it on"),
        ("device cpu", "there is no option device; --devices says where the work is done, --mesh-shape and --layout "),
        ("do_sample tru", "argument --do-sample: invalid choice: 'tru'; did you mean true? (choose from true, false)"),
        ("stop_strings 'a", "/set stop_strings 'a: a quotation mark is not closed"),
    ],
)
def test_what_cannot_be_set(typed, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Settings().changed(arguments(), typed)


def test_commands_and_prompts():
    assert read("Emma was") == (None, "Emma was")
    assert read("/set top_p  0.9 ") == ("set", "top_p  0.9")
    assert read("/inspect  a ") == ("inspect", " a ")
    assert read("/quit") == ("quit", "")
    assert read("//etc/passwd") == (None, "/etc/passwd")
    with pytest.raises(ValueError, match=r"^there is no command /hlep; did you mean help\? \(/help lists them"):
        read("/hlep me")
    assert [is_unfinished(line) for line in ("a", "a\\", "a\\\\", "a\\\\\\", "")] == [False, True, False, True, False]
    assert words(r"""a "b c" 'd "e' \n """) == ["a", "b c", 'd "e', r"\n"]


def test_completions():
    completions = Settings().completions
    assert completions("Emma") == []
    assert completions("/") == ["/" + name for name in COMMANDS]
    assert completions("/se") == ["/set", "/seed"]
    assert completions("/set top_") == ["top_h", "top_k", "top_n_sigma", "top_p"]
    assert completions("/help min_p") == ["min_p"]
    assert completions("/set do_sample ") == ["true", "false", "default"]
    assert completions("/set top_p d") == ["default"]
    assert completions("/set a b c") == completions("/seed 1") == []


# --- The conversation ---------------------------------------------------------------------


class Model:
    """Notes what it is asked; `answer` fails as its prompt says."""

    def __init__(self):
        self.asked, self.last_seed = [], None

    def check(self, args):
        if args.top_p is not None and args.top_p > 1:
            raise ValueError("top_p is too large")

    def answer(self, prompt, args):
        self.last_seed = 7
        if prompt == "stop":
            raise KeyboardInterrupt
        if prompt == "fail":
            raise ValueError("it\nfailed")
        self.asked.append((prompt, args.top_p, args.seed))

    def inspect(self, prompt, args):
        self.asked.append(("inspect", prompt, args.top_p))

    def error(self, action):
        try:
            action()
        except ValueError as e:
            return e


def conversation(monkeypatch, capsys, *lines, args=()):
    """(what the model was asked, the lines on stderr)."""
    model = Model()
    monkeypatch.setattr(repl, "_lines", lambda completions: iter(lines))
    repl.converse(arguments(*args), model)
    out, err = capsys.readouterr()
    assert out == ""
    return model.asked, err.splitlines()


def test_a_conversation(monkeypatch, capsys):
    lines = [
        "/inspect",
        "/seed",
        "a",
        "",
        "  ",
        "/set top_p 0.5",
        "//b",
        "/inspect",
        "/inspect c",
        "/set top_p 2",
        "d",
        "stop",
        "fail",
        "/seed",
        "/seed 3",
        "e",
        "/set",
        "/set top_p default",
        "f",
        "/nothing",
        "/quit",
        "g",
    ]
    asked, err = conversation(monkeypatch, capsys, *lines, args=["--top-p", "0.9"])
    assert asked == [("a", 0.9, None), ("/b", 0.5, None), ("inspect", "/b", 0.5), ("inspect", "c", 0.5),
                     ("d", 0.5, None), ("e", 0.5, 3), ("f", None, 3)]  # fmt: skip
    assert err == [
        "error: there is no prompt yet; /inspect TEXT takes one", "there is no answer yet", "error: top_p is too large",
        "interrupted", "error: it failed", "seed 7", "seed 3", "top_p 0.5",
        "error: there is no command /nothing (/help lists them; // begins a prompt with /)",
    ]  # fmt: skip


def test_what_is_asked_again(monkeypatch, capsys):
    """After a second Ctrl-C, and after what is not UTF-8, which some terminals' input has as surrogates."""
    typed = [KeyboardInterrupt(), "Zo\udcff", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), "a", EOFError()]

    def ask():
        line = typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(repl, "_editor", lambda completions: ask)
    assert list(repl._lines(list)) == ["a"]
    assert capsys.readouterr().err == "Ctrl-D ends\n" + "error: what was typed is not UTF-8\n" * 2


def test_help(monkeypatch, capsys):
    _, err = conversation(monkeypatch, capsys, "/help", "/help top_p", "/help nothing")
    text = "\n".join(err)
    assert all(f"\n/{name}" in text for name in COMMANDS) and all(name in text for name in Settings().names)
    assert err[-2] == f"top_p: {CONTROLS['top_p'].help}"
    assert err[-1].startswith("error: there is no option nothing")


def test_prompts_have_escapes_if_asked_for(monkeypatch, capsys):
    asked, _ = conversation(monkeypatch, capsys, r"a\nb", r"/inspect c\n ", "/inspect ", args=["-e"])
    assert asked == [("a\nb", None, None), ("inspect", "c\n ", None), ("inspect", "a\nb", None)]
    assert conversation(monkeypatch, capsys, r"a\nb")[0] == [(r"a\nb", None, None)]


def test_where_what_was_typed_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv(repl.HISTORY, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert repl._history_file() == tmp_path / "state" / "gpt-neo-sampling" / "history"
    monkeypatch.setenv(repl.HISTORY, str(tmp_path / "mine"))
    assert repl._history_file() == tmp_path / "mine"
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0
    for nowhere in ("", str(tmp_path), "/proc/no/history"):
        monkeypatch.setenv(repl.HISTORY, nowhere)
        assert repl._history_file() is None


def test_a_question_is_asked_only_on_a_terminal(monkeypatch):
    from gpt_neo_sampling.cli.arguments import asks_for_prompts

    def terminals(*names):
        for name in ("stdin", "stderr"):
            monkeypatch.setattr(sys, name, argparse.Namespace(isatty=lambda name=name: name in names))

    terminals("stdin", "stderr")
    assert asks_for_prompts(arguments())
    for given in (["a"], ["--prompt", "a"], ["--prompt-ids", "5"], ["--prompts-file", "a"], ["--output", "a"]):
        assert not asks_for_prompts(arguments(*given))
    for some in (["stdin"], ["stderr"], []):
        terminals(*some)
        assert not asks_for_prompts(arguments())


# --- On a terminal -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


def plain(text):
    """Without what is erased, moves the cursor or colours."""
    text = re.sub(r"[^\n]*\r\x1b\[K", "", text)
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", text).replace("\r", "")


@pytest.mark.parametrize("with_editor", [True, False], ids=["prompt_toolkit", "plain"])
def test_on_a_terminal(demo, tmp_path, with_editor):
    """Asked, answered, set; Ctrl-C while it answers, while something is typed and while nothing is."""
    if with_editor:
        pytest.importorskip("prompt_toolkit")
    history = tmp_path / "history"
    env = {**os.environ, "TERM": "xterm" if with_editor else "dumb", "PROMPT_TOOLKIT_NO_CPR": "1",
           repl.HISTORY: str(history)}  # fmt: skip
    is_asked = "\x1b[?2004h" if with_editor else repl.MARK  # the editor asks the terminal to mark what is pasted
    with processes.Terminal("generate", "--max-new-tokens", "6", "--seed", "3", env=env) as terminal:

        def ask(*lines):
            """What appears after the last of the lines, until the next question."""
            for line in lines:
                terminal.type(line + "\r")
                terminal.expect(line[-3:].rstrip("\\"))
                terminal.expect("\n")
            return plain(terminal.expect(is_asked)).removesuffix(repl.MARK)

        def text(prompt, **options):
            samples = demo.generate(prompt, max_new_tokens=6, seed=3, streamer=lambda *_: None, **options)
            return [sample.text + "\n" for sample in samples]

        assert "the bundled model continues prompts" in plain(terminal.expect(is_asked))
        assert ask("Emma") == text("Emma")[0]
        assert ask("/set top_p 2") == "error: top_p=2.0; a number from 0 to 1 is needed\n"
        assert "eos_token_id=9999; a whole number from -1 to 2047 is needed\n" in ask("/set eos_token_id 9999")
        assert ask("/set num_samples 2") == ""
        assert ask("/set") == "max_new_tokens 6\nseed 3\nnum_return_sequences 2\n"
        if with_editor:  # (plain input has the rest in common)
            several = text("It was\nthe", num_return_sequences=2)
            assert ask("It was\\", "the") == "".join(f"--- sample {i} of 2 ---\n{s}" for i, s in enumerate(several, 1))
            assert ask("/set top_p 0.5") == ""
            assert "top_p 0.5" in ask("/inspect Emma")
        ask("/set num_samples 999")
        terminal.type("She\r")
        terminal.expect("sample 1 of 999")
        terminal.type("\x03")
        assert plain(terminal.expect(is_asked)).endswith("\ninterrupted\n" + repl.MARK * (not with_editor))
        terminal.type("abc")
        terminal.expect("abc")
        time.sleep(0.3)  # Python notices a signal that comes just before it waits for a key only at the next key
        terminal.type("\x03")
        if not with_editor:
            terminal.expect(is_asked)
        assert ask("/seed") == "seed 3\n"
        terminal.type("Zo\udcff\r")
        assert "not UTF-8\n" in plain(terminal.expect(is_asked))
        if with_editor:
            terminal.send_signal(signal.SIGINT)
            assert "Ctrl-D ends\n" in plain(terminal.expect(is_asked))
        terminal.type("\x04")
        terminal.rest()
        assert terminal.returncode == 0
    assert history.exists() == with_editor
    if with_editor:
        assert "+It was\n+the\n" in history.read_text() and "+abc" not in history.read_text()

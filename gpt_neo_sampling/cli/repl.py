"""`generate` without a prompt on a terminal: asks for prompts and answers them until it is told to end."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from gpt_neo_sampling.checkpoint.base import one_line
from gpt_neo_sampling.cli.argument_parser import unescaped
from gpt_neo_sampling.cli.settings import Settings, help_text, is_unfinished, read

HISTORY = "GPT_NEO_SAMPLING_HISTORY"  # in the environment: the file that keeps what was typed; empty for none
MARK, NEXT_MARK = "> ", ". "


class Model(Protocol):
    """What answers; each takes the arguments of the command as they are set at the time."""

    last_seed: int | None  # of the last answer

    def check(self, args: argparse.Namespace) -> None:
        """Raises ValueError for what no prompt could be answered with."""

    def answer(self, prompt: str, args: argparse.Namespace) -> None:
        """Prints what follows the prompt."""

    def inspect(self, prompt: str, args: argparse.Namespace) -> None:
        """Prints what each option does to the next token."""

    def error(self, action: Callable[[], None]) -> object:
        """Does something; returns what went wrong, or None."""


def converse(args: argparse.Namespace, model: Model) -> None:
    """Asks and answers. An error is one line, and Ctrl-C ends an answer; both ask again."""
    conversation = _Conversation(args, model)
    for line in _lines(conversation.settings.completions):
        try:
            error = model.error(functools.partial(conversation.take, line))
            if error is not None:
                _say(f"error: {one_line(error)}")
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):  # a second one
                _say("interrupted")
        if conversation.is_over:
            return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Conversation:
    """What is set, and what was said last."""

    def __init__(self, args: argparse.Namespace, model: Model) -> None:
        self.settings = Settings()
        self.is_over = False
        self._args, self._model = args, model
        self._prompt: str | None = None  # the last one
        self._commands = {
            "set": self._set,
            "seed": self._show_seed,
            "inspect": self._inspect,
            "help": self._help,
            "quit": self._quit,
        }

    def take(self, line: str) -> None:
        """Does what was typed. Raises ValueError and what the model raises."""
        command, rest = read(line)
        if command is not None:
            self._commands[command](rest)
        elif rest.strip():
            self._prompt = self._text(rest)
            self._model.answer(self._prompt, self._args)

    def _text(self, typed: str) -> str:
        return unescaped(typed) if self._args.escape else typed

    def _set(self, rest: str) -> None:
        if not rest:
            _say(self.settings.shown(self._args))
            return
        args = self.settings.changed(self._args, rest)
        self._model.check(args)
        self._args = args

    def _show_seed(self, rest: str) -> None:
        if rest:
            self._set(f"seed {rest}")
        else:
            seed = self._model.last_seed
            _say("there is no answer yet" if seed is None else f"seed {seed}")

    def _inspect(self, rest: str) -> None:
        prompt = self._text(rest) if rest.strip() else self._prompt
        if prompt is None:
            raise ValueError("there is no prompt yet; /inspect TEXT takes one")
        self._model.inspect(prompt, self._args)

    def _help(self, rest: str) -> None:
        _say(self.settings.help(rest) if rest else help_text(self.settings.names))

    def _quit(self, rest: str) -> None:
        self.is_over = True


# --- What is typed ---------------------------------------------------------------------


def _lines(completions: Callable[[str], list[str]]) -> Iterator[str]:
    """What is typed, a prompt or a command at a time, until Ctrl-D."""
    ask = _editor(completions) or _plain_input(completions)
    while True:
        try:
            line = ask()
            line.encode()  # some terminals' bytes that are no UTF-8 are read as surrogates
        except EOFError:
            return
        except KeyboardInterrupt:  # where nothing is typed; it may be late, meant for an answer
            _say("Ctrl-D ends")
            continue
        except UnicodeError:
            _say("error: what was typed is not UTF-8")
            continue
        yield line


def _editor(completions: Callable[[str], list[str]]) -> Callable[[], str] | None:
    """A function that asks with prompt_toolkit; None where that is not installed, or the terminal can do nothing."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.enums import DEFAULT_BUFFER
        from prompt_toolkit.filters import has_focus
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output
    except ImportError:
        return None

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError, UnicodeError):  # a full disk, what is not Unicode
                super().store_string(string)

    class Words(Completer):
        def get_completions(self, document, complete_event):  # type: ignore[no-untyped-def]
            text = document.text_before_cursor
            for word in completions(text):
                yield Completion(word, start_position=-len(text.split(" ")[-1]))

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def accept(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_unfinished(buffer.document.current_line) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("<sigint>", filter=has_focus(DEFAULT_BUFFER))  # what another process sends
    def discard(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    file = _history_file()
    session: PromptSession[str] = PromptSession(
        MARK,
        multiline=True,
        prompt_continuation=NEXT_MARK,
        history=History(str(file)) if file else InMemoryHistory(),
        completer=Words(),
        complete_while_typing=False,
        key_bindings=keys,
        output=create_output(sys.stderr),
    )
    return lambda: session.prompt()


def _history_file() -> Path | None:
    """Where what was typed is kept; None for nowhere."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(os.environ.get(HISTORY, os.path.join(state, "gpt-neo-sampling", "history")))
    if not path.name:
        return None
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600))
        return path
    return None


def _plain_input(completions: Callable[[str], list[str]]) -> Callable[[], str]:
    """A function that asks with Python's input, and with readline if Python has it."""
    typed: Callable[[], str] = str
    try:
        import readline
    except ImportError:
        pass
    else:
        typed = readline.get_line_buffer
        readline.set_completer_delims(" ")
        readline.set_completer(lambda word, i: dict(enumerate(completions(typed()))).get(i))
        readline.parse_and_bind("tab: complete")

    def ask() -> str:
        lines: list[str] = []
        while True:
            try:
                lines.append(_input(NEXT_MARK if lines else MARK))
            except EOFError:
                _say("")
                raise
            except KeyboardInterrupt:
                _say("")
                if not lines and not typed():
                    raise
                lines = []
                continue
            if not is_unfinished(lines[-1]):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]

    return ask


def _input(mark: str) -> str:
    if sys.stdout is not None and sys.stdout.isatty():
        return input(mark)
    sys.stderr.write(mark)  # input() would write it to stdout, which is a file
    sys.stderr.flush()
    line = sys.stdin.buffer.readline()  # bytes: after an error, text streams keep what was not decoded
    if not line:
        raise EOFError
    return line.decode(sys.stdin.encoding).removesuffix("\n")

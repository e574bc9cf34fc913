"""argparse's parser, with values that begin with "-", and with errors of one line that say what was meant."""

import argparse
import collections
import difflib
import os
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from gpt_neo_sampling.checkpoint.base import one_line
from gpt_neo_sampling.cli import PROGRAM
from gpt_neo_sampling.sampling.other_names import advice

COMPLETION = "_ARGCOMPLETE"  # in the environment where a shell asks what may come next
_OPTION = re.compile(r"--?[A-Za-z][^\s=]*(=.*)?", re.DOTALL)  # what looks like one
_NEGATIVE_NUMBER = re.compile(r"-(\.?[0-9]|inf|nan)", re.IGNORECASE)
# other libraries' names, where the command has something else than Python; {…} is an option
OTHER_NAMES = {
    **dict.fromkeys(("inputs", "text_inputs"), "prompts are texts; {prompt_ids} takes token ids"),
    "input_ids": "{prompt_ids} takes token ids",
    "pretrained_model_name_or_path": "{model} takes it",
    "streamer": "streamers are for Python: TextGenerator.generate(streamer=f)",
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""A text with \n, \t, \r and \\ read as newline, tab, carriage return and backslash; other backslashes stay."""
    return re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The end of an error about a name: those that begin with it, or have it within, or else the nearest, if any."""
    given, allowed = given.lower(), sorted(allowed, key=len)
    short = given.strip("-")
    near = [name for name in allowed if name.strip("-").startswith(short)]
    near = near or [name for name in allowed if short in name]
    if len(short) < 3 or not near:  # a letter or two are in many
        near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.75)
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; argparse would print its usage before it."""
        self.exit(2, f"{PROGRAM}: error: {one_line(message)} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse calls it; the message says what was meant, and is the same in all versions of Python."""
        if action.choices is not None and value not in action.choices:
            allowed = ", ".join(map(str, action.choices))
            meant = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{meant} (choose from {allowed})")


class CommandParser(Parser):
    """The parser of one command.

    argparse takes many a value that begins with "-" for an option. Here only what an option is called is one, and
    `--name=value` is how argparse is told the rest. Options that take several values have the action "extend".
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which calls it for the arguments behind the command's name."""
        if COMPLETION not in os.environ:  # which looks at the arguments as they are
            args = self._unambiguous(args or ())
        return super().parse_known_args(args, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse calls it; before Python 3.13 it drops a value "--"."""
        if action.option_strings and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value if action.nargs in (None, "?") else [value]
        return super()._get_values(action, arg_strings)

    def _unambiguous(self, args: Iterable[str]) -> list[str]:
        """The same with each value joined to its option, and plain arguments at the end, behind "--"."""
        options: list[str] = []
        plain: list[str] = []
        rest = collections.deque(args)
        while rest:
            arg = rest.popleft()
            action = self._option_string_actions.get(arg)
            if arg == "--":
                plain += rest
                break
            if action is not None:
                options += [f"{arg}={value}" for value in self._values(action, rest)] or [arg]
            elif self._is_option(arg):
                name = arg.partition("=")[0]
                if self._option_string_actions[name].nargs == 0:
                    self.error(f"argument {name}: it takes no value, but is given as {arg}")
                options.append(arg)
            elif _OPTION.fullmatch(arg):
                self.error(f"unrecognized arguments: {arg}{self._meant(arg) or self._as_text(arg)}")
            else:
                plain.append(arg)
        if plain and all(action.option_strings for action in self._actions):
            self.error(f"unrecognized arguments: {' '.join(plain)}")
        return [*options, "--", *plain] if plain else options

    def _values(self, action: argparse.Action, rest: collections.deque[str]) -> list[str]:
        """Takes an option's values from what follows it."""
        most = {None: 1, "?": 1, 0: 0}.get(action.nargs, len(rest))
        values: list[str] = []
        while rest and len(values) < most and self._is_value(rest[0], action, is_first=not values):
            values.append(rest.popleft())
        return values

    def _is_value(self, arg: str, action: argparse.Action, is_first: bool) -> bool:
        if self._is_option(arg):
            return False
        if not arg.startswith("-"):
            return True
        if action.type in (int, float):
            return _NEGATIVE_NUMBER.match(arg) is not None
        if arg == "--":
            return is_first
        # behind an option that needs a text, a mistyped option cannot be told from the text
        if is_first and action.nargs in (None, "+") or not _OPTION.fullmatch(arg):
            return True
        return not (arg.startswith("--") or self._meant(arg))

    def _is_option(self, arg: str) -> bool:
        name, _, _ = arg.partition("=")
        return arg in self._option_string_actions or name != arg and name in self._option_string_actions

    def _meant(self, arg: str) -> str:
        """The end of an error about an option that there is not."""
        name = arg.partition("=")[0].replace("_", "-")
        try:
            known = advice(name.strip("-").replace("-", "_"), self._spelled, OTHER_NAMES)
        except LookupError:  # it is about options of other commands
            known = None
        return f"; {known}" if known else did_you_mean(name, self._option_string_actions)

    def _as_text(self, arg: str) -> str:
        """The end of an error about what may be a text."""
        takes_texts = any(action.dest == "plain" for action in self._actions)
        return f"; as a text: -- {arg}" if takes_texts and not arg.startswith("--") else ""

    def _spelled(self, name: str) -> str:
        """How one of the options of `generate` is written on the command line; raises LookupError for others."""
        option = "--" + name.replace("_", "-")
        if option in self._option_string_actions:
            return option
        for action in self._actions:
            if action.dest == name:
                return action.option_strings[0]
        raise LookupError(name)

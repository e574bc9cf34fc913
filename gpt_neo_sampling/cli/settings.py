"""What may be typed where `generate` asks for prompts, beside prompts: /set and the other commands. No TensorFlow."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from gpt_neo_sampling.cli.argument_parser import OTHER_NAMES, did_you_mean
from gpt_neo_sampling.cli.parser import setting_parser
from gpt_neo_sampling.sampling.other_names import advice

COMMANDS = {  # name -> (what follows it, what it does)
    "set": ("NAME VALUE", "sets an option as the command line does, as in /set top_p 0.9 or /set stop_strings \"\\n\"; "
            "/set NAME default takes it back, and /set alone shows what is set"),
    "seed": ("[N]", "the seed of the last answer; with N, the seed of all that follow (the same as /set seed N)"),
    "inspect": ("[TEXT]", "what each option does to the token behind TEXT, or behind the last prompt"),
    "help": ("[NAME]", "this list, or what an option does"),
    "quit": ("", "the end, as Ctrl-D"),
}  # fmt: skip
NOT_SET = {  # of the list of options
    "logits_processors": "functions of your own are for Python: TextGenerator.generate(logits_processors=[f])",
    "prefix_allowed_tokens_fn": "a function is for Python: TextGenerator.generate(prefix_allowed_tokens_fn=f)",
    "top_logprobs": "the text has no place for them; generate --json has",
    "return_prompt_logprobs": "the text has no place for them; generate --json has",
    "pad_token_id": "it changes nothing, as what is returned has no padding",
    "renormalize_logits": "it changes nothing, as what is left is always renormalized",
    "remove_invalid_values": "it changes nothing, as a row whose logits are NaN or +inf is an error",
}
DEFAULT = "default"


def read(line: str) -> tuple[str | None, str]:
    """(a command's name, what follows it), or (None, the prompt), for what was typed.

    Raises:
      ValueError: for a command that there is not.
    """
    if not line.startswith("/"):
        return None, line
    if line.startswith("//"):  # a prompt that begins with one
        return None, line[1:]
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS)
        raise ValueError(f"there is no command /{name}{meant} (/help lists them; // begins a prompt with /)")
    return name, rest if name == "inspect" else rest.strip()  # whose rest is a text


def is_unfinished(line: str) -> bool:
    r"""Whether the prompt goes on in the next line: this one ends with a backslash that no other stands before."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


class Settings:
    """The options of `generate` that `/set` takes, by the names of Python and of the command line."""

    def __init__(self) -> None:
        self._parser = setting_parser()
        self._actions: dict[str, tuple[str, argparse.Action]] = {}  # name -> (option, argparse's)
        for action in self._parser._actions:
            for option in action.option_strings:
                self._actions[option.strip("-").replace("-", "_")] = (option, action)
        self.names = sorted(self._actions)

    def changed(self, args: argparse.Namespace, text: str) -> argparse.Namespace:
        """The arguments after `/set text`; `args` stays as it is.

        Raises:
          ValueError: for a name or value that the command line would not take either.
        """
        name, *values = words(text)
        name, is_joined, value = name.partition("=")
        option, action = self._named(name)
        if is_joined:
            values = [value, *values]
        if values == [DEFAULT]:
            return argparse.Namespace(**{**vars(args), action.dest: None})
        if values and action.nargs == 0:
            raise ValueError(f"{name} takes no value; /set {name} alone switches it on")
        if len(values) > 1 and action.nargs not in ("+", "*"):
            raise ValueError(f"{name} takes one value, but {len(values)} are given: {' '.join(values)}")
        parsed = self._parser.parse_args([f"{option}={value}" for value in values] or [option])
        return argparse.Namespace(**{**vars(args), action.dest: getattr(parsed, action.dest)})

    def shown(self, args: argparse.Namespace) -> str:
        """What is set, a line each, as /set takes it."""
        values = {a.dest: getattr(args, a.dest) for a in self._parser._actions}
        lines = [f"{name} {_typed(value)}".rstrip() for name, value in values.items() if value is not None]
        return "\n".join(lines or ["nothing is set: the model's own values hold, or else the library's"])

    def help(self, name: str) -> str:
        """What an option does. Raises ValueError for a name that there is not."""
        option, action = self._named(name)
        return f"{option[2:].replace('-', '_')}: {action.help}"

    def completions(self, text: str) -> list[str]:
        """What may stand in place of the last word of `text`, which is all ahead of the cursor."""
        *before, word = text.split(" ")
        if not text.startswith("/"):
            return []
        if not before:
            found = ["/" + name for name in COMMANDS]
        elif before in (["/set"], ["/help"]):
            found = self.names
        elif len(before) == 2 and before[0] == "/set" and before[1] in self._actions:
            found = [*(self._actions[before[1]][1].choices or ()), DEFAULT]
        else:
            found = []
        return [f for f in found if f.startswith(word)]

    def _named(self, name: str) -> tuple[str, argparse.Action]:
        plain = name.strip("-").replace("-", "_")
        if plain in self._actions:
            return self._actions[plain]
        known = NOT_SET.get(plain) or advice(plain, self._spelled, OTHER_NAMES)
        if known:
            raise ValueError(f"there is no option {name}; {known}")
        raise ValueError(f"there is no option {name}{did_you_mean(plain, self.names)} (/help lists them)")

    def _spelled(self, name: str) -> str:
        """How an option is written here, or else on the command line."""
        return name if name in self._actions else "--" + name.replace("_", "-")


def words(text: str) -> list[str]:
    """The words of what follows /set. Quotation marks join words, and a backslash is only a backslash.

    Raises:
      ValueError: for a quotation mark without a second one.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        return list(lexer)
    except ValueError:
        raise ValueError(f"/set {text}: a quotation mark is not closed") from None


def help_text(names: Sequence[str]) -> str:
    """What /help says."""
    lines = ["A line is a prompt, which is continued. One that ends with \\ goes on in the next line.", ""]
    lines += [f"/{name} {rest}".ljust(18) + what for name, (rest, what) in COMMANDS.items()]
    return "\n".join([*lines, "", "Options: " + ", ".join(names)])


def _typed(value: object) -> str:
    """A value as /set takes it."""
    if isinstance(value, list):
        return " ".join(map(_typed, value))
    if not isinstance(value, str):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    mark = "'" if '"' in escaped else '"'
    return f"{mark}{escaped}{mark}" if not escaped or set(escaped) & set(" \"'") else escaped

"""The prompt on a terminal, at once, and behind it what is being done until the text takes its place."""

import shutil
from typing import TextIO

from gpt_neo_sampling.inspection.terminal import text_width

_CLEAR = "\r\x1b[K"  # to the line's begin, and empty it


class Echo:
    """A prompt that is printed to a terminal before there is anything to say about it.

    A progress bar may write over the terminal's last line: the prompt's last line is printed again.
    """

    def __init__(self, prompt: str, terminal: TextIO) -> None:
        self._terminal, self._waits = terminal, True
        columns = shutil.get_terminal_size().columns
        lines = [""]
        for c in prompt:
            if c == "\n" or text_width(lines[-1] + c) > columns:
                lines.append("")
            lines[-1] += c.strip("\n")
        self._last_line, self._room = lines[-1], columns - text_width(lines[-1]) - 1
        self._write(prompt)

    def status(self, text: str) -> None:
        """Shows what is being done, if there is room for it."""
        self._write(_CLEAR + self._last_line + (f"\x1b[2m {text}\x1b[0m" if len(text) < self._room else ""))

    def ready(self) -> None:
        """Leaves the prompt alone: its text comes next."""
        self._write(_CLEAR + self._last_line)
        self._waits = False

    def end(self) -> None:
        """Ends the line, if no text has come."""
        if self._waits:
            self.ready()
            self._write("\n" if self._last_line else "")

    def _write(self, text: str) -> None:
        self._terminal.write(text)
        self._terminal.flush()

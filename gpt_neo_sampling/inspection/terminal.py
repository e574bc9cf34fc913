"""A chain as a table for a terminal."""

import dataclasses
import itertools
import os
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from gpt_neo_sampling.inspection.steps import (
    DEFAULT_COUNT,
    MOST_TOKEN_WIDTH,
    ChainStep,
    changing,
    likeliest,
    mass_of_others,
    percent,
    place_of,
    ranks,
    visible,
)

_LEAST_BAR, _MOST_BAR = 4, 24  # characters
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR_COLOURS = ("34", "36", "33")  # ANSI: bars of the first step, of those in between, of the last


def table(
    steps: Sequence[ChainStep],
    text: Callable[[int], str],
    *,
    count: int = DEFAULT_COUNT,
    width: int = 100,
    unicode: bool = True,
    colour: bool = False,
) -> str:
    """The chain for a terminal: a line for each step, then a line for each token.

    Args:
      steps: list of ChainStep.
      text: a function from an id to the token's text; see `token_text`.
      count: the number of tokens to show.
      width: of the terminal, in characters. If it is too small for all steps, those
        in between lose first their bars and then their columns.
      unicode: False for ASCII only.
      colour: True for ANSI colours.

    Returns:
      a str of whole lines.
    """
    page = _Page(unicode, colour)
    lines = [*_step_lines(page, steps, text, width), "", *_token_lines(page, steps, text, count, width)]
    return "".join(line.rstrip() + "\n" for line in lines)


def terminal_style(file: TextIO) -> dict[str, Any]:
    """{width, unicode, colour} for a `table` that is written to a text file, such as sys.stdout."""
    return {
        "width": shutil.get_terminal_size((100, 24)).columns,
        "unicode": (file.encoding or "").lower().replace("-", "") == "utf8",
        "colour": file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
    }


@dataclasses.dataclass(frozen=True)
class _Page:
    """How to write text, tokens and bars."""

    unicode: bool
    colour: bool

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text.strip() else text

    def token(self, text: str, width: int = MOST_TOKEN_WIDTH) -> str:
        """A token, with spaces and line breaks made visible."""
        return self.fit(visible(text) if self.unicode else ascii(text), width)

    def fit(self, text: str, width: int) -> str:
        """The text, shortened to `width` columns if it is longer."""
        if text_width(text) <= width:
            return text
        widths = itertools.accumulate(map(text_width, text))
        fitting = sum(1 for _ in itertools.takewhile(lambda w: w < width, widths))
        return text[:fitting] + ("…" if self.unicode else "~")

    def bar(self, fraction: float, width: int, code: str) -> str:
        """A bar over `fraction` of `width` characters; never empty if that is above 0."""
        fraction = min(fraction, 1.0) if width else 0.0
        if self.unicode:
            eighths = max(round(fraction * width * 8), 1 if fraction > 0 else 0)
            bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        else:
            bar = "#" * round(fraction * width) or ("." if fraction > 0 else "")
        return self.paint(bar, code) + " " * (width - len(bar))

    def bold(self, text: str) -> str:
        return self.paint(text, "1")

    def dim(self, text: str) -> str:
        return self.paint(text, "2")


def text_width(text: str) -> int:
    """The columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _step_lines(page: _Page, steps: Sequence[ChainStep], text: Callable[[int], str], width: int) -> Iterator[str]:
    name_width = min(max(len("step"), *(len(step.label) for step in steps)), max(width - 42, 16))
    widths = {"tokens": 7, "cut": 5, "entropy": 10, "effective": 9, "likeliest": len("99.9% ") + 6}

    def room() -> int:
        return width - name_width - sum(2 + size for size in widths.values())

    for column in ("effective", "cut"):  # the least important first
        if room() < 0:
            del widths[column]
    bar_width = min(room() - 2, _MOST_BAR) if room() - 2 >= _LEAST_BAR else 0
    token_width = min(6 + max(room() - 2 - bar_width, 0), MOST_TOKEN_WIDTH)

    def line(name: str, bar: str, **cells: str) -> str:
        shown = [f"{cells[name]:>{size}}" for name, size in widths.items() if name != "likeliest"]
        if bar_width:
            shown.insert(list(widths).index("entropy") + 1, bar)
        return "  ".join([f"{name:<{name_width}}", *shown, cells["likeliest"]])

    yield page.bold(line("step", " " * bar_width, **{name: name for name in widths}))
    most = max(step.entropy for step in steps) or 1.0
    shown = [step for step, _ in changing(steps)]
    for i, step in enumerate(steps):
        best = int(step.probabilities.argmax())
        changes = step in shown
        colour = _BAR_COLOURS[place_of(shown.index(step), shown)] if changes else ""
        cells = line(
            page.fit(step.label, name_width),
            page.bar(step.entropy / most, bar_width, colour),
            tokens=f"{step.support:,}",
            cut=percent(step.mass_removed(steps[i - 1])) if i else "",
            entropy=f"{step.entropy:.2f} bits",
            effective=f"{step.effective_size:,.1f}",
            likeliest=f"{percent(step.probabilities[best]):>5} {page.token(text(best), token_width)}",
        )
        yield cells if changes else page.dim(cells)


@dataclasses.dataclass(frozen=True)
class _Column:
    """A step's column of the table."""

    step: ChainStep
    bar_width: int  # 0 for no bar
    colour: str

    @property
    def width(self) -> int:
        figures = len("99.9%") + 1 + self.bar_width if self.bar_width else len("99.9%")
        return max(figures, *map(len, _pieces(self.step.label)))

    def cell(self, page: _Page, token_id: int, scale: float, was_cut: bool) -> str:
        """scale: the probability that a full bar stands for."""
        p = float(self.step.probabilities[token_id])
        if p <= 0:
            return page.dim(("" if was_cut else "  cut").ljust(self.width))
        bar = " " + page.bar(p / scale, self.bar_width, self.colour) if self.bar_width else ""
        return f"{percent(p):>5}{bar}" + " " * (self.width - len("99.9%") - bool(bar) - self.bar_width)


def _pieces(label: str) -> list[str]:
    """A label, split after _ and spaces, where a line may break."""
    return re.findall(r"[^_ ]+[_ ]?", label)


def _broken(label: str, width: int) -> list[str]:
    """A label in lines of at most `width` characters."""
    lines = [""]
    for piece in _pieces(label):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip().ljust(width) for line in lines]


def _columns(steps: Sequence[ChainStep], room: int) -> tuple[list[_Column], list[ChainStep]]:
    """([_Column] that fit in `room` characters, the steps left out, which are those that change the least)."""
    shown = changing(steps)
    left_out: list[ChainStep] = []
    while True:
        for bars_for in ({0, 1, 2}, {0, 2}):
            for bar_width in range(_MOST_BAR, _LEAST_BAR - 1, -1):
                places = [place_of(i, shown) for i in range(len(shown))]
                columns = [
                    _Column(step, bar_width if place in bars_for else 0, _BAR_COLOURS[place])
                    for (step, _), place in zip(shown, places)
                ]
                if sum(column.width + 2 for column in columns) <= room:
                    return columns, left_out
        if len(shown) <= 2:
            return columns, left_out
        least = min(shown[1:-1], key=lambda pair: pair[1])
        shown.remove(least)
        left_out.append(least[0])


def _token_lines(
    page: _Page, steps: Sequence[ChainStep], text: Callable[[int], str], count: int, width: int
) -> Iterator[str]:
    ids = likeliest(steps, count)
    rank = ranks(steps[0].probabilities)
    tokens = {i: page.token(text(i)) for i in ids}
    token_width = max(len("token"), *map(text_width, tokens.values()))
    id_width = max(4, len(str(len(rank))))
    start = f"{{:>{id_width}}}  {{}}  {{:>{id_width}}}".format
    left = len(start("", " " * token_width, ""))
    columns, left_out = _columns(steps, width - left)
    scale = max(float(column.step.probabilities[ids].max()) for column in columns)

    headings = [_broken(column.step.label, column.width) for column in columns]
    height = max(map(len, headings))
    for i in range(-height, 0):
        first = start("rank", "token".ljust(token_width), "id") if i == -1 else " " * left
        cells = [h[i] if -i <= len(h) else " " * c.width for h, c in zip(headings, columns)]
        yield page.bold("  ".join([first, *cells]))
    for i in ids:
        had = [column.step.probabilities[i] > 0 for column in columns]
        cells = [column.cell(page, i, scale, n > 0 and not had[n - 1]) for n, column in enumerate(columns)]
        first = start(rank[i], tokens[i] + " " * (token_width - text_width(tokens[i])), i)
        yield "  ".join([first if had[-1] else page.dim(first), *cells])
    if len(rank) > len(ids):
        cells = [f"{percent(mass_of_others(column.step, ids)):>5}".ljust(column.width) for column in columns]
        others = f"{len(rank) - len(ids):,} others"
        yield "  ".join([(" " * (id_width + 2) + others).ljust(left), *cells])
    if left_out:
        note = "not shown, too little room: " + "; ".join(step.label for step in left_out)
        yield from map(page.dim, textwrap.wrap(note, width))

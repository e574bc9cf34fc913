"""The next-token distribution, step by step: as a table, as JSON, as a picture.

Plain data in, text and files out. A chain is a list of `ChainStep`: the model's
own distribution, what each step of sampling makes of it, and what is drawn from.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import shutil
import textwrap
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from gpt_neo_sampling._types import StrPath, Tokenizer

DEFAULT_COUNT = 16  # tokens that are shown
_MOST_TOKEN_WIDTH = 18  # characters of a token in a table
_LEAST_BAR, _MOST_BAR = 4, 24  # characters
_SPACES = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR_COLOURS = ("34", "36", "33")  # ANSI: the model's bars, those in between, what is drawn from

# Of the picture: Okabe and Ito's colours, which colour-blind readers can tell apart.
_MODEL_COLOUR, _DRAWN_COLOUR = "#4d4d4d", "#d55e00"
_STEP_COLOURS = ("#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#e69f00", "#f0e442")


@dataclasses.dataclass(frozen=True, eq=False)
class ChainStep:
    """A next-token distribution after one step of the chain."""

    name: str  # "model" for the first; then the option's name, as "top_p"; "softmax" or "entmax" for the last
    setting: str  # the option's value, as "0.9"; may be empty
    probabilities: np.ndarray  # float [vocab], adds up to 1

    @property
    def label(self) -> str:
        """As "top_p 0.9", or "presence_penalty 1, frequency_penalty 0.5" for a step of several options."""
        pairs = itertools.zip_longest(self.name.split(", "), self.setting.split(", "), fillvalue="")
        return ", ".join(" ".join(pair).strip() for pair in pairs)

    @property
    def support(self) -> int:
        """How many tokens have a probability above 0."""
        return int(np.count_nonzero(self.probabilities > 0))

    @property
    def entropy(self) -> float:
        """In bits."""
        p = self.probabilities[self.probabilities > 0].astype(np.float64)
        return max(0.0, float(-(p * np.log2(p)).sum()))

    @property
    def effective_size(self) -> float:
        """2 to the entropy (perplexity): so many equally likely tokens are as hard to guess."""
        return 2.0**self.entropy

    def mass_removed(self, before: "ChainStep") -> float:
        """The probability that `before`, a ChainStep, gave to the tokens that have none here."""
        return float(before.probabilities.astype(np.float64)[self.probabilities == 0].sum())


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    r"""What a token stands for; bytes of half a character are written \xe2\x80.

    Args:
      tokenizer: a tokenizers.Tokenizer, or None: <17> stands for token 17.
      token_id: an int.
    """
    token = None if tokenizer is None else tokenizer.id_to_token(token_id)
    if tokenizer is None or token is None:  # a model's vocabulary may be larger than its tokenizer's
        return f"<{token_id}>"
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    with contextlib.suppress(KeyError):
        if "\ufffd" in text:
            return bytes(_byte_of()[c] for c in token).decode("utf-8", "backslashreplace")
    return text


@functools.cache
def _byte_of() -> dict[str, int]:
    """{character: byte}: how byte-level BPE (Radford et al. 2019) writes bytes as printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def likeliest(steps: Sequence[ChainStep], count: int = DEFAULT_COUNT) -> list[int]:
    """The ids to show: the `count` likeliest of the first step and the last, in the last one's order.

    Ties, and tokens that the last step has none of, are in the first one's order.
    """
    model, drawn = (step.probabilities.astype(np.float64) for step in (steps[0], steps[-1]))
    chosen = np.argsort(-np.maximum(model, drawn), kind="stable")[:count]
    return [int(i) for i in sorted(chosen, key=lambda i: (-drawn[i], -model[i], i))]


def ranks(probabilities: np.ndarray) -> np.ndarray:
    """int [vocab]: each token's place, 1 for the likeliest; ties to the lower id."""
    places = np.empty(len(probabilities), int)
    places[np.argsort(-probabilities, kind="stable")] = np.arange(1, len(probabilities) + 1)
    return places


def to_json(
    steps: Sequence[ChainStep], text: Callable[[int], str] | None = None, count: int = DEFAULT_COUNT
) -> dict[str, Any]:
    """The chain as a dict for json.dumps.

    Args:
      steps: list of ChainStep.
      text: a function from an id to the token's text; None where there is no tokenizer.
      count: tokens to list.

    Returns:
      {"steps": one dict a step, "tokens": one dict a token of `likeliest`,
      "others": the probability of all other tokens together, a step each}.
      Entropies are in bits.
    """
    ids = likeliest(steps, count)
    rank = ranks(steps[0].probabilities)
    return {
        "steps": [
            {
                "name": step.name,
                "setting": step.setting,
                "support": step.support,
                "mass_removed": step.mass_removed(before),
                "entropy": step.entropy,
                "effective_size": step.effective_size,
                "likeliest": int(step.probabilities.argmax()),
            }
            for before, step in zip([steps[0], *steps], steps)
        ],
        "tokens": [
            {
                "id": i,
                "text": text and text(i),
                "rank": int(rank[i]),
                "probabilities": [float(step.probabilities[i]) for step in steps],
            }
            for i in ids
        ],
        "others": [_others(step, ids) for step in steps],
    }


def _others(step: ChainStep, ids: list[int]) -> float:
    return float(np.delete(step.probabilities.astype(np.float64), ids).sum())


# --- the table


def table(
    steps: Sequence[ChainStep],
    text: Callable[[int], str],
    *,
    count: int = DEFAULT_COUNT,
    width: int = 100,
    unicode: bool = True,
    colour: bool = False,
) -> str:
    """The chain for a terminal: a line a step, and under it a line a token.

    Args:
      steps: list of ChainStep.
      text: a function from an id to the token's text; see `token_text`.
      count: tokens to show.
      width: of the terminal, in characters. Where it is too small for every step
        there are no bars for those in between, and then no columns.
      unicode: False for ASCII alone.
      colour: True for ANSI's colours.

    Returns:
      a str of whole lines.
    """
    page = _Page(unicode, colour)
    lines = [*_step_lines(page, steps, text, width), "", *_token_lines(page, steps, text, count, width)]
    return "".join(line.rstrip() + "\n" for line in lines)


def terminal_style(stream: TextIO) -> dict[str, Any]:
    """{width, unicode, colour} for a `table` that is written to a text stream."""
    return {
        "width": shutil.get_terminal_size((100, 24)).columns,
        "unicode": (stream.encoding or "").lower().replace("-", "") == "utf8",
        "colour": stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
    }


@dataclasses.dataclass(frozen=True)
class _Page:
    """How things are written."""

    unicode: bool
    colour: bool

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text.strip() else text

    def token(self, text: str, width: int = _MOST_TOKEN_WIDTH) -> str:
        """A token with its spaces and ends of lines to be seen."""
        return self.fit(visible(text) if self.unicode else ascii(text), width)

    def fit(self, text: str, width: int) -> str:
        """As much of a text as there is room for."""
        if _text_width(text) <= width:
            return text
        widths = itertools.accumulate(map(_text_width, text))
        fitting = sum(1 for _ in itertools.takewhile(lambda w: w < width, widths))
        return text[:fitting] + ("…" if self.unicode else "~")

    def bar(self, part: float, width: int, code: str) -> str:
        """`part` of a bar of `width` characters; anything above 0 is seen."""
        part = min(part, 1.0) if width else 0.0
        if self.unicode:
            eighths = max(round(part * width * 8), 1 if part > 0 else 0)
            bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        else:
            bar = "#" * round(part * width) or ("." if part > 0 else "")
        return self.paint(bar, code) + " " * (width - len(bar))

    def bold(self, text: str) -> str:
        return self.paint(text, "1")

    def dim(self, text: str) -> str:
        return self.paint(text, "2")


def visible(text: str) -> str:
    """Text with · for a space, ↵ for the end of a line, and escapes for what cannot be printed."""
    text = text.translate(_SPACES)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text_width(text: str) -> int:
    """The columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _percent(p: float) -> str:
    if p <= 0:
        return "0"
    return f"{p:.0%}" if p > 0.9995 else f"{p:.1%}" if p >= 0.09995 else f"{p:.2%}" if p >= 5e-5 else "<.01%"


def _step_lines(page: _Page, steps: Sequence[ChainStep], text: Callable[[int], str], width: int) -> Iterator[str]:
    name_width = min(max(len("step"), *(len(step.label) for step in steps)), max(width - 42, 16))
    widths = {"tokens": 7, "cut": 5, "entropy": 10, "effective": 9, "likeliest": len("99.9% ") + 6}

    def room() -> int:
        return width - name_width - sum(2 + size for size in widths.values())

    for least_needed in ("effective", "cut"):
        if room() < 0:
            del widths[least_needed]
    bar_width = min(room() - 2, _MOST_BAR) if room() - 2 >= _LEAST_BAR else 0
    token_width = min(6 + max(room() - 2 - bar_width, 0), _MOST_TOKEN_WIDTH)

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
        colour = _BAR_COLOURS[_place(shown.index(step), shown)] if changes else ""
        cells = line(
            page.fit(step.label, name_width),
            page.bar(step.entropy / most, bar_width, colour),
            tokens=f"{step.support:,}",
            cut=_percent(step.mass_removed(steps[i - 1])) if i else "",
            entropy=f"{step.entropy:.2f} bits",
            effective=f"{step.effective_size:,.1f}",
            likeliest=f"{_percent(step.probabilities[best]):>5} {page.token(text(best), token_width)}",
        )
        yield cells if changes else page.dim(cells)


def _place(i: int, steps: Sequence[Any]) -> int:
    """0 for the first step, 2 for the last, 1 for those in between."""
    return 0 if i == 0 else 2 if i == len(steps) - 1 else 1


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
        """scale: the probability of a whole bar."""
        p = float(self.step.probabilities[token_id])
        if p <= 0:
            return page.dim(("" if was_cut else "  cut").ljust(self.width))
        bar = " " + page.bar(p / scale, self.bar_width, self.colour) if self.bar_width else ""
        return f"{_percent(p):>5}{bar}" + " " * (self.width - len("99.9%") - bool(bar) - self.bar_width)


def _pieces(label: str) -> list[str]:
    """Where a label may be broken: behind _ and spaces."""
    return re.findall(r"[^_ ]+[_ ]?", label)


def _broken(label: str, width: int) -> list[str]:
    """A label in lines of at most `width` characters."""
    lines = [""]
    for piece in _pieces(label):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip().ljust(width) for line in lines]


def changing(steps: Sequence[ChainStep]) -> list[tuple[ChainStep, float]]:
    """The first step, and those that change something, each with the probability that it moves (1 for the first)."""
    found = [(steps[0], 1.0)]
    for before, step in zip(steps, steps[1:]):
        moved = 0.5 * float(np.abs(step.probabilities.astype(np.float64) - before.probabilities).sum())
        if moved > 1e-6 or step.support != before.support:
            found.append((step, moved))
    return found


def _columns(steps: Sequence[ChainStep], room: int) -> tuple[list[_Column], list[ChainStep]]:
    """([_Column] that fit in `room` characters, the steps left out: those that change the least)."""
    shown = changing(steps)
    left_out: list[ChainStep] = []
    while True:
        for bars_for in ({0, 1, 2}, {0, 2}):
            for bar_width in range(_MOST_BAR, _LEAST_BAR - 1, -1):
                places = [_place(i, shown) for i in range(len(shown))]
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
    token_width = max(len("token"), *map(_text_width, tokens.values()))
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
        first = start(rank[i], tokens[i] + " " * (token_width - _text_width(tokens[i])), i)
        yield "  ".join([first if had[-1] else page.dim(first), *cells])
    if len(rank) > len(ids):
        cells = [f"{_percent(_others(column.step, ids)):>5}".ljust(column.width) for column in columns]
        others = f"{len(rank) - len(ids):,} others"
        yield "  ".join([(" " * (id_width + 2) + others).ljust(left), *cells])
    if left_out:
        note = "not shown, for want of room: " + "; ".join(step.label for step in left_out)
        yield from map(page.dim, textwrap.wrap(note, width))


# --- the picture


def plot_format(path: StrPath) -> str:
    """The format that a picture's suffix names, as "png".

    Raises:
      ValueError: if matplotlib is not installed, or does not write that format.
      OSError: if the folder is not there.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("a plot needs the package matplotlib: pip install 'gpt_neo_sampling[plot]'") from None
    path = pathlib.Path(path)
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{path}: the suffix says the format; allowed are .{', .'.join(formats)}")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.resolve().parent}")
    return path.suffix[1:].lower()


def plot(
    steps: Sequence[ChainStep],
    text: Callable[[int], str],
    path: StrPath,
    *,
    title: str = "",
    count: int = DEFAULT_COUNT,
) -> None:
    """Draws the chain: probability against rank, the likeliest tokens, support and entropy of each step.

    Args:
      steps: list of ChainStep.
      text: a function from an id to the token's text; see `token_text`.
      path: the file, replaced if it is there; its suffix says the format.
      title: a line above.
      count: tokens to show.

    Raises:
      ValueError, OSError: see `plot_format`.
    """
    file_format = plot_format(path)
    from matplotlib import style
    from matplotlib.figure import Figure  # no pyplot: its backend and its figures are the caller's

    with style.context(["default", _PLOT_STYLE]):
        figure = Figure(figsize=(11, 8), layout="constrained")
        planes = figure.subplot_mosaic(
            [["curves", "tokens"], ["support", "entropy"]], height_ratios=[3, 0.3 + 0.17 * len(steps)],
            width_ratios=[3, 2],
        )  # fmt: skip
        colours = _plot_colours(steps)
        figure.suptitle(_drawable(title), fontsize="large")
        _draw_curves(planes["curves"], steps, colours)
        _draw_tokens(planes["tokens"], steps, text, count)
        _draw_sizes(planes["support"], planes["entropy"], steps, colours)
        write_whole(path, lambda partial: figure.savefig(partial, dpi=100, format=file_format))


_PLOT_STYLE = {
    "text.parse_math": False,  # a token may be a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.edgecolor": "none",
    "legend.framealpha": 1.0,
}


def _plot_colours(steps: Sequence[ChainStep]) -> list[str]:
    """A colour for each step; one that changes nothing has that of the step before it."""
    shown = [step for step, _ in changing(steps)]
    between = itertools.cycle(_STEP_COLOURS)
    colours = []
    for step in steps:
        if step in shown:
            place = _place(shown.index(step), shown)
            colour = _MODEL_COLOUR if place == 0 else _DRAWN_COLOUR if place == 2 else next(between)
        colours.append(colour)
    return colours


def _drawable(text: str) -> str:
    """Text with escapes for what the font lacks."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)


def _draw_curves(plane: Any, steps: Sequence[ChainStep], colours: list[str]) -> None:
    shown = [step for step, _ in changing(steps)]
    size = len(steps[0].probabilities)
    for step, colour in zip(steps, colours):
        if step not in shown:
            continue
        p = -np.sort(-step.probabilities.astype(np.float64))[: step.support]
        line_width = (3.5, 1.6, 2.2)[_place(shown.index(step), shown)]
        plane.plot(np.arange(1, len(p) + 1), p, color=colour, linewidth=line_width, label=step.label)
        if len(p) < size:
            plane.plot(len(p), p[-1], "o", color=colour, markersize=6)
            plane.plot([len(p)] * 2, [p[-1], 1e-12], ":", color=colour, linewidth=1)
    lowest = np.float64(steps[0].probabilities[steps[0].probabilities > 0]).min()
    plane.set(xscale="log", yscale="log", xlim=(0.8, 2.5 * size), ylim=(max(lowest, 1e-6) / 1.5, 1.3))
    plane.set(xlabel="rank of the token in that step", title="Probability by rank; a dot: the last that can be drawn")
    plane.xaxis.set_major_formatter("{x:,.0f}")
    plane.yaxis.set_major_formatter(lambda p, _: f"{100 * p:.6f}".rstrip("0").rstrip(".") + "%")
    plane.legend(loc="lower left")


def _draw_tokens(plane: Any, steps: Sequence[ChainStep], text: Callable[[int], str], count: int) -> None:
    ids = likeliest(steps, count)
    places = np.arange(len(ids))
    model, drawn = (100 * step.probabilities[ids].astype(np.float64) for step in (steps[0], steps[-1]))
    plane.barh(places - 0.2, model, 0.38, color=_MODEL_COLOUR, label=steps[0].label)
    plane.barh(places + 0.2, drawn, 0.38, color=_DRAWN_COLOUR, label="drawn from")
    for place, before, now in zip(places, model, drawn):
        plane.annotate(_percent(now / 100) if now else "cut", (max(before, now), place), (4, 0),
                       textcoords="offset points", va="center", fontsize="small",
                       color="black" if now else "#808080")  # fmt: skip
    plane.set_yticks(places, [_drawable(visible(text(i)))[:_MOST_TOKEN_WIDTH] for i in ids])
    plane.invert_yaxis()
    plane.margins(x=0.15, y=0.01)
    plane.grid(False, axis="y")
    plane.locator_params(axis="x", nbins=6)
    plane.xaxis.set_major_formatter("{x:g}%")
    plane.set_title("The likeliest tokens")
    plane.legend(loc="lower right")


def _draw_sizes(support: Any, entropy: Any, steps: Sequence[ChainStep], colours: list[str]) -> None:
    places = np.arange(len(steps))
    supports, entropies = [step.support for step in steps], [step.entropy for step in steps]
    for plane, values, labels in (
        (support, supports, [f"{n:,}" for n in supports]),
        (entropy, entropies, [f"{step.entropy:.2f} ({step.effective_size:,.1f})" for step in steps]),
    ):
        plane.barh(places, values, 0.7, color=colours)
        for place, value, label in zip(places, values, labels):
            plane.annotate(label, (value, place), (4, 0), textcoords="offset points", va="center", fontsize="small")
        plane.invert_yaxis()
        plane.grid(False, axis="y")
    # The axis of the curves above, so that their dotted lines lead to the bars.
    support.set(xscale="log", xlim=(0.8, 2.5 * len(steps[0].probabilities)), title="Tokens that can be drawn")
    support.set_yticks(places, [step.label for step in steps])
    support.xaxis.set_major_formatter("{x:,.0f}")
    entropy.set(xlim=(0, 1.4 * max(entropies) or 1), title="Entropy, bits (effective size, tokens)")
    entropy.set_yticks(places, [""] * len(steps))


def write_whole(path: StrPath, write: Callable[[pathlib.Path], object]) -> None:
    """Has `write` make a file beside `path`, and puts it in its place once it is whole."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""A chain as a picture."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._atomic_files import write_whole
from gpt_neo_sampling._install import install_line
from gpt_neo_sampling._types import StrPath
from gpt_neo_sampling.inspection.steps import (
    DEFAULT_COUNT,
    MOST_TOKEN_WIDTH,
    ChainStep,
    changing,
    likeliest,
    percent,
    place_of,
    visible,
)

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_MODEL_COLOUR, _DRAWN_COLOUR = "#4d4d4d", "#d55e00"
_STEP_COLOURS = ("#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#e69f00", "#f0e442")
_THINNEST, _WIDER, _WIDEST = 2.0, 2.0, 10.0  # lines, points: by themselves, for each that lies on them, at most
_SAME = 0.06  # powers of ten between two lines that are one to the eye
_WIDTH = 11.0  # of a picture, inches
_KEY_FONT, _KEY_WIDTH, _LETTER_WIDTH = 9.0, 0.8, 0.075  # points; inches: of an entry without its text, and of a letter
_TITLE_WIDTH = 110  # letters


def plot_format(path: StrPath) -> str:
    """The format that a path's suffix names, such as "png".

    Raises:
      ValueError: if matplotlib is not installed or cannot write the format, the path is a folder, or its folder does
        not exist.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError(f"a plot needs the package matplotlib: {install_line('matplotlib')}") from None
    path = pathlib.Path(path)
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{path}: the suffix chooses the format; allowed: .{', .'.join(formats)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is needed")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.resolve().parent}")
    return path.suffix[1:].lower()


def plot(
    steps: Sequence[ChainStep],
    text: Callable[[int], str],
    path: StrPath,
    *,
    title: str = "",
    count: int = DEFAULT_COUNT,
) -> None:
    """Plots the chain: probability by rank, the likeliest tokens, and each step's support and entropy.

    Args:
      steps: list of ChainStep.
      text: a function from an id to the token's text; see `token_text`.
      path: the file to write or replace; its suffix chooses the format.
      title: a line above the plots.
      count: the number of tokens to show.

    Raises:
      ValueError: as `plot_format`.
      OSError: if the file cannot be written.
    """
    file_format = plot_format(path)
    from matplotlib import style
    from matplotlib.figure import Figure  # not pyplot, whose backend and figures belong to the caller

    lines = _lines(steps)
    shown = list(dict.fromkeys(lines))
    n_columns = max(1, int(_WIDTH / (_KEY_WIDTH + _LETTER_WIDTH * max(len(line.label) for line in shown))))
    heights = [3, 0.16 * -(-len(shown) // n_columns), 0.3 + 0.17 * len(steps)]
    with style.context(["default", _PLOT_STYLE]):
        figure = Figure(figsize=(_WIDTH, 8 + 0.3 * max(0, len(steps) - 6)), layout="constrained")
        planes = figure.subplot_mosaic(
            [["curves", "tokens"], ["key", "key"], ["support", "entropy"]], height_ratios=heights, width_ratios=[3, 2]
        )
        figure.suptitle("\n".join(textwrap.wrap(_drawable(title), _TITLE_WIDTH)), fontsize="large")
        _draw_curves(planes["curves"], shown, len(steps[0].probabilities))
        _draw_tokens(planes["tokens"], steps, text, count)
        _draw_key(planes["key"], shown, n_columns)
        _draw_sizes(planes["support"], planes["entropy"], steps, lines)
        write_whole(path, lambda partial: figure.savefig(partial, dpi=100, format=file_format))


_PLOT_STYLE = {
    "text.parse_math": False,  # a token may be a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "hatch.color": "white",
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Line:
    """How a step that changes something is drawn.

    Lines that lie on each other are told apart by their widths: the wider is drawn first, and shows at both sides of
    those over it.
    """

    step: ChainStep
    label: str
    colour: str
    width: float  # points
    is_repeated: bool  # whether an earlier line has its colour: then it is dashed, and its bar hatched

    @property
    def dashes(self) -> Any:
        return (0, (4, 1)) if self.is_repeated else "-"

    @property
    def hatch(self) -> str | None:
        return "//" if self.is_repeated else None


def _lines(steps: Sequence[ChainStep]) -> list[_Line]:
    """A line for each step; a step that changes nothing has that of the one before."""
    shown = [step for step, _ in changing(steps)]
    # each is drawn over the lines before it, so what counts is how many that lie on it follow
    depths = [0] * len(shown)
    for i in reversed(range(len(shown))):
        depths[i] = max(
            (1 + depths[j] for j in range(i + 1, len(shown)) if _on_each_other(shown[i], shown[j])), default=0
        )
    wider = min(_WIDER, (_WIDEST - _THINNEST) / max(1, *depths))
    of_step: dict[int, _Line] = {}
    for i, step in enumerate(shown):
        place, cycle = place_of(i, shown), (i - 1) // len(_STEP_COLOURS)
        between = _STEP_COLOURS[(i - 1) % len(_STEP_COLOURS)]
        colour = (_MODEL_COLOUR, between, _DRAWN_COLOUR)[place]
        label = f"drawn from: {step.label}" if place == 2 else step.label
        of_step[id(step)] = _Line(
            step, label, colour, _THINNEST + wider * depths[i], is_repeated=place == 1 and cycle > 0
        )
    lines: list[_Line] = []
    for step in steps:
        lines.append(of_step.get(id(step)) or lines[-1])
    return lines


def _on_each_other(a: ChainStep, b: ChainStep) -> bool:
    """Whether two curves of probability by rank are one line to the eye, for a fifth of the shorter one's length."""
    n = min(a.support, b.support)
    ranks = np.unique(np.geomspace(1, n, 200).astype(int)) - 1
    p, q = (np.log10(-np.sort(-step.probabilities.astype(np.float64))[ranks]) for step in (a, b))
    return float(np.mean(np.abs(p - q) < _SAME)) >= 0.2


def _drawable(text: str) -> str:
    """Text with escapes for characters that the font lacks."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)


def _draw_curves(plane: Any, lines: Sequence[_Line], size: int) -> None:
    """size: of the vocabulary."""
    supports = [line.step.support for line in lines]
    for i, line in enumerate(lines):
        p = -np.sort(-line.step.probabilities.astype(np.float64))[: supports[i]]
        plane.plot(np.arange(1, len(p) + 1), p, color=line.colour, linewidth=line.width, linestyle=line.dashes)
        if len(p) < size:
            plane.plot(len(p), p[-1], "o", color=line.colour, markersize=4 + line.width)
            # of several that end at one rank each has its own dots
            n_before, n = supports[:i].count(len(p)), supports.count(len(p))
            dots = (2.5 * n_before, (1, 1.5 + 2.5 * (n - 1)))
            plane.plot([len(p)] * 2, [p[-1], 1e-12], linestyle=dots, color=line.colour, linewidth=1)
    model = lines[0].step.probabilities
    lowest = np.float64(model[model > 0]).min()
    plane.set(xscale="log", yscale="log", xlim=(0.8, 2.5 * size), ylim=(max(lowest, 1e-6) / 1.5, 1.3))
    plane.set(xlabel="rank of the token in that step", title="Probability by rank (dot: last that can be drawn)")
    plane.xaxis.set_major_formatter("{x:,.0f}")
    plane.yaxis.set_major_formatter(lambda p, _: f"{100 * p:.6f}".rstrip("0").rstrip(".") + "%")


def _draw_tokens(plane: Any, steps: Sequence[ChainStep], text: Callable[[int], str], count: int) -> None:
    ids = likeliest(steps, count)
    places = np.arange(len(ids))
    model, drawn = (100 * step.probabilities[ids].astype(np.float64) for step in (steps[0], steps[-1]))
    plane.barh(places - 0.2, model, 0.38, color=_MODEL_COLOUR)
    plane.barh(places + 0.2, drawn, 0.38, color=_DRAWN_COLOUR)
    for place, before, now in zip(places, model, drawn):
        plane.annotate(percent(now / 100) if now else "cut", (max(before, now), place), (4, 0),
                       textcoords="offset points", va="center", fontsize="small",
                       color="black" if now else "#808080")  # fmt: skip
    plane.set_yticks(places, [_drawable(visible(text(i)))[:MOST_TOKEN_WIDTH] for i in ids])
    plane.invert_yaxis()
    plane.margins(x=0.15, y=0.01)
    plane.grid(False, axis="y")
    plane.locator_params(axis="x", nbins=6)
    plane.xaxis.set_major_formatter("{x:g}%")
    plane.set_title("The likeliest tokens")


def _draw_key(plane: Any, lines: Sequence[_Line], n_columns: int) -> None:
    """What each colour stands for, in a place of its own, where it covers nothing."""
    plane.axis("off")
    for line in lines:
        plane.plot([], [], color=line.colour, linewidth=line.width, linestyle=line.dashes, label=line.label)
    if len(lines) == 1:  # nothing changes it, and the bars of the tokens have two colours all the same
        plane.plot([], [], color=_DRAWN_COLOUR, linewidth=_THINNEST, label="drawn from: the same")
    plane.legend(loc="center", ncols=n_columns, fontsize=_KEY_FONT, handlelength=3)


def _draw_sizes(support: Any, entropy: Any, steps: Sequence[ChainStep], lines: Sequence[_Line]) -> None:
    places = np.arange(len(steps))
    supports, entropies = [step.support for step in steps], [step.entropy for step in steps]
    for plane, values, labels in (
        (support, supports, [f"{n:,}" for n in supports]),
        (entropy, entropies, [f"{step.entropy:.2f} ({step.effective_size:,.1f})" for step in steps]),
    ):
        plane.barh(places, values, 0.7, color=[line.colour for line in lines], hatch=[line.hatch for line in lines])
        for place, value, label in zip(places, values, labels):
            plane.annotate(label, (value, place), (4, 0), textcoords="offset points", va="center", fontsize="small")
        plane.invert_yaxis()
        plane.grid(False, axis="y")
    # the same axis as the curves above, so that their dotted lines lead to the bars
    support.set(xscale="log", xlim=(0.8, 2.5 * len(steps[0].probabilities)), title="Tokens that can be drawn")
    support.set_yticks(places, [step.label.replace(", ", ",\n") for step in steps], fontsize="small")
    support.xaxis.set_major_formatter("{x:,.0f}")
    entropy.set(xlim=(0, 1.4 * max(entropies) or 1), title="Entropy, bits (effective size, tokens)")
    entropy.set_yticks(places, [""] * len(steps))

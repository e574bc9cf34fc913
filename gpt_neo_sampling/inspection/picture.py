"""A chain as a picture."""

import itertools
import pathlib
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
    """A colour for each step; a step that changes nothing has the colour of the one before."""
    shown = [step for step, _ in changing(steps)]
    between = itertools.cycle(_STEP_COLOURS)
    colours = []
    for step in steps:
        if step in shown:
            place = place_of(shown.index(step), shown)
            colour = _MODEL_COLOUR if place == 0 else _DRAWN_COLOUR if place == 2 else next(between)
        colours.append(colour)
    return colours


def _drawable(text: str) -> str:
    """Text with escapes for characters that the font lacks."""
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
        line_width = (3.5, 1.6, 2.2)[place_of(shown.index(step), shown)]
        plane.plot(np.arange(1, len(p) + 1), p, color=colour, linewidth=line_width, label=step.label)
        if len(p) < size:
            plane.plot(len(p), p[-1], "o", color=colour, markersize=6)
            plane.plot([len(p)] * 2, [p[-1], 1e-12], ":", color=colour, linewidth=1)
    lowest = np.float64(steps[0].probabilities[steps[0].probabilities > 0]).min()
    plane.set(xscale="log", yscale="log", xlim=(0.8, 2.5 * size), ylim=(max(lowest, 1e-6) / 1.5, 1.3))
    plane.set(xlabel="rank of the token in that step", title="Probability by rank (dot: last that can be drawn)")
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
    # the same axis as the curves above, so that their dotted lines lead to the bars
    support.set(xscale="log", xlim=(0.8, 2.5 * len(steps[0].probabilities)), title="Tokens that can be drawn")
    support.set_yticks(places, [step.label for step in steps])
    support.xaxis.set_major_formatter("{x:,.0f}")
    entropy.set(xlim=(0, 1.4 * max(entropies) or 1), title="Entropy, bits (effective size, tokens)")
    entropy.set_yticks(places, [""] * len(steps))

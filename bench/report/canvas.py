"""Paper to draw on: figures of one look, and how they become files.

Places are inches from the upper left corner, so that a picture with more peers grows and nothing in it shrinks.
matplotlib's global state is what it was when all is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.report.palette import FAINT, INK, PAPER, SOFT
from bench.report.words import duration

WIDTH: Final = 8.6
EDGE: Final = 0.18
HEAD: Final = 0.78
"""Taken by title and subtitle."""
LABEL: Final = 9.5
"""Points."""
TITLE: Final = 13.0
MADE_BY: Final = "python -m bench"
"""In every file's metadata."""


def one_look() -> AbstractContextManager[None]:
    """Within, all that is drawn and saved looks alike, and no name of a peer is taken for a formula."""
    return matplotlib.rc_context(
        {
            "font.family": ["sans-serif"],
            "font.sans-serif": ["DejaVu Sans", "Verdana"],
            "font.size": LABEL,
            "text.color": INK.light,
            "text.parse_math": False,
            "svg.fonttype": "none",
            "svg.hashsalt": MADE_BY,
            "path.simplify": False,
        }
    )


class Sheet:
    """A figure with a title."""

    def __init__(self, title: str, subtitle: str, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), facecolor=PAPER.light)
        self.text(EDGE, 0.34, title, size=TITLE, weight="bold")
        self.text(EDGE, 0.58, subtitle, colour=SOFT.light)

    def text(
        self,
        left: float,
        top: float,
        words: str,
        *,
        size: float = LABEL,
        colour: str = INK.light,
        weight: str = "normal",
        align: str = "left",
    ) -> None:
        """Words whose baseline is at `top`."""
        self.figure.text(
            left / WIDTH, 1 - top / self.height, words, fontsize=size, color=colour, weight=weight, ha=align
        )

    def stroke(self, left: float, top: float, length: float, colour: str, width: float, dashes: object) -> None:
        """A line to show what another line looks like."""
        axes = self.axes(left, top - 0.05, length, 0.1)
        axes.set_axis_off()
        axes.plot([0, 1], [0, 0], color=colour, linewidth=width, linestyle=dashes, solid_capstyle="butt")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Empty ones, with nothing but a baseline."""
        axes = self.figure.add_axes(
            (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        )
        axes.set_facecolor("none")
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(SOFT.light)
        axes.tick_params(colors=SOFT.light, labelcolor=SOFT.light, labelsize=9, length=0, which="both")
        axes.set_axisbelow(True)
        return axes

    def files(self) -> tuple[str, bytes]:
        """As SVG and as PNG. The same drawing makes the same bytes."""
        svg, png = io.BytesIO(), io.BytesIO()
        self.figure.savefig(svg, format="svg", metadata={"Creator": MADE_BY, "Date": None})
        self.figure.savefig(png, format="png", dpi=160, metadata={"Software": MADE_BY})
        return svg.getvalue().decode(), png.getvalue()


@cache
def width_of(words: str, *, size: float = LABEL, weight: str = "normal") -> float:
    """Inches that words take."""
    if not words.strip():
        return 0.0
    font = FontProperties(family="DejaVu Sans", weight=weight)
    return float(TextPath((0, 0), words, size=size, prop=font).get_extents().width) / 72


def milliseconds_tick(value: float, _: int) -> str:
    return duration(value).replace(".00 ", " ").replace("0.0 ", "0 ") if value > 0 else "0"


def plain_tick(value: float, _: int) -> str:
    return f"{value:,.10g}"


Tick = Callable[[float, int], str]


def log_scale(axes: Axes, which: str, low: float, high: float, tick: Tick = milliseconds_tick) -> None:
    """A logarithmic axis from `low` to `high`, with a mark at each power of ten, and more of them where there is
    less than two decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick))
    axes.grid(True, axis="x" if which == "x" else "y", color=FAINT.light, linewidth=0.8)


def linear_scale(axes: Axes, which: str, high: float, tick: Tick = plain_tick) -> None:
    """A linear axis from nothing to `high`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xlim if which == "x" else axes.set_ylim)(0, high)
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(tick))
    axes.grid(True, axis="x" if which == "x" else "y", color=FAINT.light, linewidth=0.8)


def marks_at(axes: Axes, which: str, values: Sequence[float], tick: Tick = plain_tick) -> None:
    """Marks at these values alone."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick))


def around(values: Sequence[float], share: float = 0.06, least: float = 1.0) -> tuple[float, float]:
    """The ends of a logarithmic axis that holds positive values, with some of its length free at both ends.

    Args:
        least: how many times as much as the one end the other is, so that what hardly differs looks as if.
    """
    low, high = min(values), max(values)
    room = max((high / low) ** share, 1.15, (least * low / high) ** 0.5)
    return low / room, high * room


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places as near as can be to those wanted, in the same order, that leave a gap between any two."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[list[int]] = []

    def first(block: Sequence[int]) -> float:
        return sum(wanted[index] - place * gap for place, index in enumerate(block)) / len(block)

    for index in order:
        block = [index]
        while blocks and first(blocks[-1]) + len(blocks[-1]) * gap > first(block):
            block = blocks.pop() + block
        blocks.append(block)
    placed = list(wanted)
    for block in blocks:
        for place, index in enumerate(block):
            placed[index] = first(block) + place * gap
    return placed

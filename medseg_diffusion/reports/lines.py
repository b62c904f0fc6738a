"""Line plots as SVG elements that follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from .page import ACCENT, INK, LINE, SOFT, svg
from .slices import plain, shortened

COLOURS = (ACCENT, "#D55E00", "#009E73", "#CC79A7", "#8976FF")
"""Of lines: neither a class nor reference or prediction, and strong enough on a white and on a dark page."""

Values = Sequence[float] | NDArray[np.float64]

_STYLES = ("-", (0, (4, 1.6)), (0, (1, 1.4)), (0, (5, 1.4, 1, 1.4)))
_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        name: What the legend calls it; empty leaves it out there.
        x: Where its points are.
        y: Their values; NaN leaves a gap.
        low: Lower ends of their intervals, or empty.
        high: Upper ends.
        colour: Its place in `COLOURS`, and among the shapes of points.
        style: 0 for a solid line, 1 to 3 for dashes.
        points: Draw the points, with their intervals as bars; otherwise only the line, with a band.
    """

    name: str
    x: Values
    y: Values
    low: Values = ()
    high: Values = ()
    colour: int = 0
    style: int = 0
    points: bool = True


def line_plot(
    lines: Sequence[Line],
    across: str,
    up: str,
    description: str,
    *,
    logarithmic: str = "",
    mark: tuple[float, str] | None = None,
    size: tuple[float, float] = (6.4, 3.0),
) -> Markup:
    """Lines over a common axis, with a legend below where there are several.

    Args:
        lines: Drawn in this order.
        across: Name of the horizontal axis, with its unit.
        up: Name of the vertical axis, with its unit.
        description: What the plot shows, for screen readers.
        logarithmic: "x", "y", "xy", or empty for linear axes. An axis across is linear for steps, from 0 on, and
            logarithmic for costs, with ticks at the points.
        mark: A place on the horizontal axis to mark, and its name.
        size: Width and height in inches: text is the larger, the smaller they are.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        _draw(axes, line)
    if "y" in logarithmic:
        axes.set_yscale("log")
    if "x" in logarithmic:
        axes.set_xscale("log")
        _tick_at_points(axes, sorted({x for line in lines for x in line.x}))
    else:
        axes.set_xlim(0, 1.02 * max((float(np.max(line.x)) for line in lines if len(line.x)), default=1.0))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if mark is not None:
        place, name = mark
        axes.axvline(place, color=SOFT, linewidth=1, linestyle=_STYLES[2], zorder=1)
        right = place > np.mean(axes.get_xlim())
        axes.annotate(
            plain(name), (place, 1), xycoords=("data", "axes fraction"), xytext=(-4 if right else 4, -2),
            textcoords="offset points", ha="right" if right else "left", va="top", fontsize=9, color=SOFT,
        )  # fmt: skip
    finish(axes, across, up)
    named = [line for line in lines if line.name]
    if len(named) > 1:
        columns = max(1, min(3, round(14 * size[0]) // max(len(shortened(line.name)) for line in named)))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, description)


def finish(axes: Axes, across: str, up: str, grid: Literal["x", "y", "both"] = "both") -> None:
    """Name the axes, and draw text and grid in the theme's colours, without a frame."""
    axes.set_xlabel(plain(across), color=INK)
    axes.set_ylabel(plain(up), color=INK)
    axes.grid(axis=grid, color=LINE)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.spines[:].set_visible(False)


def _draw(axes: Axes, line: Line) -> None:
    colour, style = COLOURS[line.colour % len(COLOURS)], _STYLES[line.style % len(_STYLES)]
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    # A name that begins with an underscore would be left out of the legend.
    label = plain(shortened(f" {line.name}" if line.name.startswith("_") else line.name)) if line.name else "_"
    marker = _MARKERS[line.colour % len(_MARKERS)] if line.points or len(x) == 1 else ""
    axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1.6, label=label, zorder=3)
    if len(line.low):
        low, high = np.asarray(line.low, float), np.asarray(line.high, float)
        if line.points:
            axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.7)
        else:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _tick_at_points(axes: Axes, places: Sequence[float]) -> None:
    """Name the points of a logarithmic axis, without those whose names would overlap."""
    if not places or places[0] <= 0:
        return
    apart = math.log(places[-1] / places[0]) / 7
    shown: list[float] = []
    for place in places:
        if not shown or math.log(place / shown[-1]) >= apart:
            shown.append(place)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(shown, [f"{place:,.0f}" if place >= 100 else f"{place:.2g}" for place in shown])

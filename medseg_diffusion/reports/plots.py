"""Plots of an evaluation as SVG elements that follow the page's theme."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from .detection_text import OPTIMISTIC
from .lines import finish
from .page import ACCENT, INK, SOFT, svg
from .slices import plain, shortened
from .theme import label_colour

BOX_FROM = 5
"""Fewest values of which a box of quartiles is drawn; fewer are points with their median."""

_DASHES = (0, (3, 1.6))
_DOTS = (0, (1, 2))
# Neither a class nor reference or prediction (Okabe and Ito).
_MASKS, _BEST = "#D55E00", "#F0E442"


def distributions(
    scores: Sequence[tuple[str, Sequence[float]]],
    axis_label: str,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    zero: bool = False,
    colours: Sequence[str] | None = None,
) -> Markup:
    """The values of every case, one row per class with one point per case.

    Boxes span the quartiles with a line at the median, whiskers reach the last point within 1.5 times the box's width
    (Tukey). Fewer than `BOX_FROM` values have no box. NaN values are left out. It is drawn from bars and lines because
    `Axes.boxplot` renamed its orientation argument between versions of matplotlib.

    Args:
        scores: Class name and its values, one per case, for each row from the top.
        axis_label: Name of the values, with their unit.
        bounds: Ends of the axis; None fits it to the values.
        zero: Draw a line at 0, for differences.
        colours: The colour of each row; None takes those of rows that are no classes.
    """
    figure = Figure(figsize=(7.2, 0.75 + 0.42 * max(len(scores), 1)), layout="constrained")
    axes = figure.add_subplot()
    if zero:
        axes.axvline(0, color=SOFT, linewidth=1.2, linestyle=_DOTS)
    for row, (_, values) in enumerate(scores):
        present = np.asarray([value for value in values if np.isfinite(value)])
        if present.size == 0:
            continue
        colour = label_colour(row) if colours is None else colours[row]
        if present.size >= BOX_FROM:
            _box(axes, row, present, colour)
        else:
            axes.vlines(np.median(present), row - 0.22, row + 0.22, color=INK, linewidth=2)
        # The scatter across the row is fixed, so that the same numbers give the same report.
        offset = ((np.arange(present.size) * 0.618034) % 1.0 - 0.5) * (0.4 if present.size > 1 else 0)
        axes.scatter(present, row + offset, s=14, color=to_rgba(colour, 0.9), edgecolors=INK, linewidths=0.5, zorder=3)
    axes.set_yticks(range(len(scores)), [plain(shortened(name)) for name, _ in scores])
    axes.set_ylim(len(scores) - 0.4, -0.6)
    if bounds is not None:
        margin = 0.015 * (bounds[1] - bounds[0])
        axes.set_xlim(bounds[0] - margin, bounds[1] + margin)
    finish(axes, axis_label, "", grid="x")
    return svg(figure, f"{axis_label} of every case, one row per class")


def _box(axes: Axes, row: int, values: NDArray[np.float64], colour: str) -> None:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    reach = 1.5 * (q3 - q1)
    low, high = values[values >= q1 - reach].min(), values[values <= q3 + reach].max()
    axes.hlines([row, row], [low, q3], [q1, high], color=INK, linewidth=1)
    axes.vlines([low, high], row - 0.12, row + 0.12, color=INK, linewidth=1)
    axes.barh(row, q3 - q1, left=q1, height=0.56, facecolor=to_rgba(colour, 0.25), edgecolor=INK, linewidth=1)
    axes.vlines(median, row - 0.28, row + 0.28, color=INK, linewidth=2)


def volume_agreement(name: str, reference_ml: Sequence[float], prediction_ml: Sequence[float], colour: str) -> Markup:
    """Difference of two volumes against their mean, with bias and limits of agreement (Bland and Altman, Lancet 1986).

    The limits are the mean difference plus and minus 1.96 standard deviations (divided by n - 1); they are drawn from
    three cases on.

    Args:
        name: Name of the class.
        reference_ml: Volume of the reference of every case; NaN is left out.
        prediction_ml: Volume of the prediction.
        colour: Colour of the points.
    """
    reference, prediction = np.asarray(reference_ml, float), np.asarray(prediction_ml, float)
    known = np.isfinite(reference) & np.isfinite(prediction)
    reference, prediction = reference[known], prediction[known]
    difference, mean = prediction - reference, (prediction + reference) / 2
    figure = Figure(figsize=(4.4, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=SOFT, linewidth=1, linestyle=_DOTS)
    axes.scatter(mean, difference, s=18, color=to_rgba(colour, 0.9), edgecolors=INK, linewidths=0.5, zorder=3)
    if difference.size >= 3:
        bias, spread = float(difference.mean()), 1.96 * float(difference.std(ddof=1))
        lines = ((bias, "mean", "-"), (bias - spread, "\u22121.96 SD", _DASHES), (bias + spread, "+1.96 SD", _DASHES))
        for level, label, style in lines:
            axes.axhline(level, color=INK, linewidth=1.2, linestyle=style)
            axes.annotate(
                f"{label} {level:+.3g}", (1, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", ha="right", fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_title(plain(shortened(name)), fontsize=10, loc="left", color=INK)
    axes.margins(x=0.08, y=0.18)
    finish(axes, "mean of both volumes, ml", "prediction \u2212 reference, ml")
    return svg(figure, f"Difference of the volumes of {name} against their mean")


def reliability_diagram(
    confidence: NDArray[np.floating], accuracy: NDArray[np.floating], share: NDArray[np.floating]
) -> Markup:
    """Accuracy against confidence with one bar per bin, and below it the share of voxels in each bin.

    Args:
        confidence: (bins,) mean confidence; NaN in empty bins.
        accuracy: (bins,) share of correct voxels; NaN in empty bins.
        share: (bins,) share of all voxels.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.linspace(0, 1, len(share) + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] * 0.92
    bar: dict[str, Any] = {"facecolor": to_rgba(ACCENT, 0.35), "edgecolor": ACCENT, "linewidth": 0.8}
    above.bar(middle, np.nan_to_num(accuracy), width, **bar)
    above.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=_DASHES)
    above.plot(confidence, accuracy, "o", color=ACCENT, markeredgecolor=INK, markersize=5, clip_on=False)
    below.bar(middle, share, width, **bar)
    below.set_ylim(0, 1)
    below.set_yticks([0.5, 1.0])
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    finish(above, "", "accuracy")
    finish(below, "confidence", "voxels")
    return svg(figure, "Reliability diagram: accuracy against confidence")


def detection_curves(
    roc: NDArray[np.floating],
    precision_recall: NDArray[np.floating],
    dice: NDArray[np.floating],
    *,
    masks: tuple[float, float, float, float],
    best: tuple[float, float],
    prevalence: float,
) -> Markup:
    """ROC, precision-recall and Dice against threshold side by side, with the predicted masks marked.

    Args:
        roc: (m, 2) false positive rate and recall.
        precision_recall: (m, 2) recall and precision; each precision holds from the previous recall to its own.
        dice: (m, 3) threshold, pooled Dice and mean Dice over cases.
        masks: false positive rate, recall, precision and pooled Dice of the predicted masks; NaN is not drawn.
        best: the threshold of the largest pooled Dice, and that Dice.
        prevalence: share of positive voxels, which is the precision of random scores.
    """
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rate, recall, precision, mask_dice = masks
    line: dict[str, Any] = {"color": ACCENT, "linewidth": 1.8}
    dashed: dict[str, Any] = {"linewidth": 1.5, "linestyle": _DASHES}
    chance: dict[str, Any] = {"color": SOFT, "linewidth": 1, "linestyle": _DOTS}
    mark: dict[str, Any] = {"marker": "D", "color": _MASKS, "markeredgecolor": INK, "markersize": 7}
    star: dict[str, Any] = {"marker": "*", "color": _BEST, "markeredgecolor": INK, "markersize": 14}
    left.plot([0, 1], [0, 1], **chance)
    left.plot(*roc.T, **line)
    left.plot(rate, recall, **mark, clip_on=False, zorder=4)
    middle.axhline(prevalence, **chance)
    middle.plot(*precision_recall.T, drawstyle="steps-pre", **line)
    middle.plot(recall, precision, **mark, clip_on=False, zorder=4)
    right.axhline(mask_dice, color=_MASKS, **dashed)
    right.plot(dice[:, 0], dice[:, 2], color=SOFT, **dashed)
    right.plot(dice[:, 0], dice[:, 1], **line)
    right.plot(*best, **star, clip_on=False, zorder=4)
    titles = ("ROC", "false positive rate", "recall"), ("Precision-recall", "recall", "precision")
    for axes, (title, across, up) in zip((left, middle, right), (*titles, ("Dice", "threshold", "Dice")), strict=True):
        axes.set_title(title, fontsize=11, fontweight="bold", loc="left", color=INK)
        axes.set_ylim(-0.015, 1.015)
        finish(axes, across, up)
    for axes in (left, middle):
        axes.set_xlim(-0.015, 1.015)
    right.locator_params(axis="x", nbins=6)
    handles = [
        Line2D([], [], label="all voxels of all cases pooled", **line),
        Line2D([], [], label="mean Dice over cases with lesions", color=SOFT, **dashed),
        Line2D([], [], label="random scores", **chance),
        Line2D([], [], label="predicted masks", **dashed, **mark),
        Line2D([], [], label=f"best pooled Dice (optimistic: {OPTIMISTIC})", linestyle="", **star),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, "ROC curve, precision-recall curve, and Dice against threshold")

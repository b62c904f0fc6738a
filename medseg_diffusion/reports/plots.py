"""Plots of an evaluation as PNG bytes: box plot, curves, reliability diagram, and masks outlined on slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from .detection_text import OPTIMISTIC
from .slices import (
    PALETTE,
    Slice,
    display_range,
    draw_contours,
    drawable_axes,
    label_colour,
    panel_grid,
    plain,
    plane,
    shortened,
    show,
    to_png,
)

REFERENCE_COLOUR, PREDICTION_COLOUR = PALETTE[0], PALETTE[1]
_INK, _GRID = "#1f2933", "#e3e7eb"
_DASHES = (0, (3, 1.6))


def box_plot(scores: Sequence[tuple[str, Sequence[float]]], *, axis_label: str = "Dice") -> bytes:
    """Horizontal box plot of a score in [0, 1], one row per class with one point per case.

    Boxes span the quartiles with a line at the median, whiskers reach the last point within 1.5 times the box's width
    (Tukey). NaN values are left out. It is drawn from bars and lines because `Axes.boxplot` renamed its orientation
    argument between versions of matplotlib.

    Args:
        scores: Class name and its values, one per case, for each row from the top.
        axis_label: Name of the score.

    Returns:
        A PNG on white, 7.2 inches wide at 150 dots per inch.
    """
    figure = Figure(figsize=(7.2, 0.85 + 0.42 * max(len(scores), 1)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for row, (_, values) in enumerate(scores):
        present = np.asarray([value for value in values if not np.isnan(value)])
        if present.size == 0:
            continue
        q1, median, q3 = np.quantile(present, [0.25, 0.5, 0.75])
        reach = 1.5 * (q3 - q1)
        low, high = present[present >= q1 - reach].min(), present[present <= q3 + reach].max()
        colour = label_colour(row)
        axes.hlines([row, row], [low, q3], [q1, high], color=_INK, linewidth=1)
        axes.vlines([low, high], row - 0.12, row + 0.12, color=_INK, linewidth=1)
        axes.barh(row, q3 - q1, left=q1, height=0.56, facecolor=to_rgba(colour, 0.25), edgecolor=_INK, linewidth=1)
        axes.vlines(median, row - 0.28, row + 0.28, color=_INK, linewidth=2)
        # The scatter across the row is fixed, so that the same numbers give the same report.
        offset = ((np.arange(present.size) * 0.618034) % 1.0 - 0.5) * 0.4
        axes.scatter(present, row + offset, s=14, color=to_rgba(colour, 0.9), edgecolors=_INK, linewidths=0.5, zorder=3)
    axes.set_yticks(range(len(scores)), [plain(shortened(name)) for name, _ in scores])
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_xlim(-0.015, 1.015)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel(axis_label, color=_INK)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    return to_png(figure)


def quality_plot(
    lines: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
    levels: Mapping[str, float],
    *,
    axis_label: str = "Dice",
) -> bytes:
    """A score against the number of network evaluations (logarithmic axis); PNG on white.

    Args:
        lines: (model, varied factor) -> points (evaluations, score). Each model has a colour, and each factor a dash
            pattern.
        levels: Name -> score of a model whose number of evaluations is fixed, drawn as a horizontal line.
        axis_label: Name of the score.
    """
    figure = Figure(figsize=(8.4, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    models = list(dict.fromkeys(model for model, _ in lines))
    factors = list(dict.fromkeys(factor for _, factor in lines))
    for (model, factor), points in lines.items():
        evaluations, scores = zip(*sorted(points), strict=True)
        style = ("-", _DASHES, ":", "-.")[factors.index(factor) % 4]
        colour, name = label_colour(models.index(model)), f"{model}, {factor}"
        axes.plot(evaluations, scores, color=colour, linestyle=style, marker="o", markersize=4, label=name)
    for i, (name, score) in enumerate(levels.items()):
        axes.axhline(score, color=_INK, linestyle=("-", _DASHES, ":", "-.")[i % 4], linewidth=1, label=name)
    axes.set_xscale("log")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per case and window", color=_INK)
    axes.set_ylabel(axis_label, color=_INK)
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=_INK)
    return to_png(figure)


def reliability_diagram(
    confidence: NDArray[np.floating], accuracy: NDArray[np.floating], share: NDArray[np.floating]
) -> bytes:
    """Accuracy against confidence with one bar per bin, and below it the share of voxels in each bin; PNG on white.

    Args:
        confidence: (bins,) mean confidence; NaN in empty bins.
        accuracy: (bins,) share of correct voxels; NaN in empty bins.
        share: (bins,) share of all voxels.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.linspace(0, 1, len(share) + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] * 0.92
    above.bar(middle, np.nan_to_num(accuracy), width, facecolor=to_rgba(PALETTE[1], 0.5), edgecolor=_INK, linewidth=0.6)
    above.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=_DASHES)
    above.plot(confidence, accuracy, "o", color=PALETTE[0], markeredgecolor=_INK, markersize=5, clip_on=False)
    below.bar(middle, share, width, facecolor=to_rgba(PALETTE[1], 0.5), edgecolor=_INK, linewidth=0.6)
    above.set_ylabel("accuracy", color=_INK)
    below.set_ylabel("voxels", color=_INK)
    below.set_ylim(0, 1)
    below.set_yticks([0.5, 1.0])
    below.set_xlabel("confidence", color=_INK)
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    for axes in (above, below):
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=_INK)
        axes.spines[:].set_visible(False)
    return to_png(figure)


def detection_curves(
    roc: NDArray[np.floating],
    precision_recall: NDArray[np.floating],
    dice: NDArray[np.floating],
    *,
    masks: tuple[float, float, float, float],
    best: tuple[float, float],
    prevalence: float,
) -> bytes:
    """ROC, precision-recall and Dice against threshold side by side, with the predicted masks marked; PNG on white.

    Args:
        roc: (m, 2) false positive rate and recall.
        precision_recall: (m, 2) recall and precision; each precision holds from the previous recall to its own.
        dice: (m, 3) threshold, pooled Dice and mean Dice over cases.
        masks: false positive rate, recall, precision and pooled Dice of the predicted masks; NaN is not drawn.
        best: the threshold of the largest pooled Dice, and that Dice.
        prevalence: share of positive voxels, which is the precision of random scores.
    """
    figure = Figure(figsize=(10.4, 4.0), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    rate, recall, precision, mask_dice = masks
    line: dict[str, Any] = {"color": PALETTE[6], "linewidth": 1.8}
    dashed: dict[str, Any] = {"linewidth": 1.5, "linestyle": _DASHES}
    chance: dict[str, Any] = {"color": _INK, "linewidth": 1, "linestyle": (0, (1, 2))}
    mark: dict[str, Any] = {"marker": "D", "color": PALETTE[5], "markeredgecolor": _INK, "markersize": 7}
    star: dict[str, Any] = {"marker": "*", "color": PALETTE[3], "markeredgecolor": _INK, "markersize": 14}
    left.plot([0, 1], [0, 1], **chance)
    left.plot(*roc.T, **line)
    left.plot(rate, recall, **mark, clip_on=False, zorder=4)
    middle.axhline(prevalence, **chance)
    middle.plot(*precision_recall.T, drawstyle="steps-pre", **line)
    middle.plot(recall, precision, **mark, clip_on=False, zorder=4)
    right.axhline(mask_dice, color=PALETTE[5], **dashed)
    right.plot(dice[:, 0], dice[:, 2], color=PALETTE[1], **dashed)
    right.plot(dice[:, 0], dice[:, 1], **line)
    right.plot(*best, **star, clip_on=False, zorder=4)
    titles = ("ROC", "false positive rate", "recall"), ("Precision-recall", "recall", "precision")
    for axes, (title, across, up) in zip((left, middle, right), (*titles, ("Dice", "threshold", "Dice")), strict=True):
        axes.set_title(title, color=_INK, fontsize=11, fontweight="bold", loc="left")
        axes.set_xlabel(across, color=_INK)
        axes.set_ylabel(up, color=_INK)
        axes.set_ylim(-0.015, 1.015)
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=_INK)
        axes.spines[:].set_visible(False)
    for axes in (left, middle):
        axes.set_xlim(-0.015, 1.015)
    right.locator_params(axis="x", nbins=6)
    handles = [
        Line2D([], [], label="all voxels of all cases pooled", **line),
        Line2D([], [], label="mean Dice over cases with lesions", color=PALETTE[1], **dashed),
        Line2D([], [], label="random scores", **chance),
        Line2D([], [], label="predicted masks", **dashed, **mark),
        Line2D([], [], label=f"best pooled Dice (optimistic: {OPTIMISTIC})", linestyle="", **star),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=_INK)
    return to_png(figure)


def overlay(
    reference: NDArray[Any],
    prediction: NDArray[Any],
    spacing_mm: Sequence[float],
    image: NDArray[Any] | None = None,
) -> bytes:
    """Outlines of reference (solid orange) and prediction (dashed blue) on up to three orthogonal slices.

    Along each axis the slice with the most reference voxels is drawn. Without reference voxels it is the slice with the
    most predicted voxels, and without predicted voxels the middle slice. Planes that are one voxel wide are not drawn,
    so that a 2D image gives a single panel.

    Args:
        reference: Labels, `(I, J, K)`, RAS+; 0 is background.
        prediction: Labels, same shape.
        spacing_mm: Voxel size along I, J, K.
        image: Background, same shape; without it the reference is shown filled on black.

    Returns:
        A PNG on black in which a millimetre has the same length along every axis and in every panel.
    """
    slices = _densest_slices(reference if reference.any() or not prediction.any() else prediction, spacing_mm)
    figure, panels = panel_grid([slices], header_in=0.3)
    backdrop = (reference > 0).astype(np.float32) * 0.3 if image is None else image
    low, high = (0.0, 1.0) if image is None else display_range(backdrop)
    for where, axes in zip(slices, panels[0], strict=True):
        show(axes, where, backdrop, cmap="gray", vmin=low, vmax=high)
        draw_contours(axes, where, reference, REFERENCE_COLOUR, "-")
        draw_contours(axes, where, prediction, PREDICTION_COLOUR, _DASHES)
    handles = [
        Line2D([], [], color=REFERENCE_COLOUR, linewidth=2, label="reference"),
        Line2D([], [], color=PREDICTION_COLOUR, linewidth=2, linestyle=_DASHES, label="prediction"),
    ]
    figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False, labelcolor="white", fontsize=9)
    return to_png(figure)


def _densest_slices(labels: NDArray[Any], spacing_mm: Sequence[float]) -> list[Slice]:
    slices = []
    for axis in drawable_axes(labels.shape):
        counts = np.count_nonzero(labels, axis=tuple(a for a in range(3) if a != axis))
        index = int(counts.argmax()) if counts.any() else labels.shape[axis] // 2
        slices.append(plane(axis, index, labels.shape, spacing_mm))
    return slices

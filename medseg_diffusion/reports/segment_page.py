"""The page of `medseg segment --report`: all scans first, their volumes, pictures of some, and the details of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from markupsafe import Markup

from .batch import AREA, FENCE, OUTLIERS_FROM, ScanOfBatch, common_remarks, common_size, outliers, overview, rank
from .page import INK, LINE, Cell, Row, Table, number, render, rules_table, svg
from .viewer import Viewer

MOST_CLASSES = 8
"""Classes with a column in the table of scans and a row in the plot; further ones stand in the details alone."""


@dataclass(frozen=True)
class SegmentedScan(ScanOfBatch):
    """A segmented scan on the page.

    Attributes:
        volumes_ml: Class -> volume.
        intervals_ml: Class -> ends of the interval that was calibrated on validation cases.
        members_ml: Class -> smallest and largest volume of the sampled masks.
        level: Share of scans whose interval contains the reference's volume; None without intervals.
        quality: "usual", "check", or None if the model was not calibrated.
    """

    volumes_ml: Mapping[str, float] = field(default_factory=dict)
    intervals_ml: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    members_ml: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    level: float | None = None
    quality: str | None = None


def with_outliers(scans: Sequence[SegmentedScan], classes: Sequence[str]) -> list[SegmentedScan]:
    """The scans in the order of the page, with a flag for those whose volume of a class is unlike the others'."""
    unlike: dict[str, list[str]] = {scan.name: [] for scan in scans}
    for name in classes:
        values = [scan.volumes_ml.get(name, math.nan) for scan in scans]
        for scan, is_unlike in zip(scans, outliers(values), strict=True):
            if is_unlike:
                unlike[scan.name].append(name)
    flagged = [
        replace(scan, flags=(*scan.flags, f"outlier: {_some(unlike[scan.name])}")) if unlike[scan.name] else scan
        for scan in scans
    ]
    return sorted(flagged, key=lambda scan: rank(scan.flags))


def segment_page(
    scans: Sequence[SegmentedScan],
    classes: Mapping[str, str],
    viewer: Viewer | None = None,
    *,
    made: Mapping[str, str] | None = None,
    stopped: str = "",
    command: str = "",
    date: str | None = None,
) -> str:
    """The text of the page.

    Args:
        scans: All scans of the call, in the order of the page (`with_outliers`).
        classes: Name of each class -> its colour, in the order of their values.
        viewer: Shows some of the scans; None leaves it out.
        made: How the masks were made: name -> value.
        stopped: A sentence about what ended the call before all scans were processed; empty if nothing did.
        command: The command line; empty shows none.
        date: Date and time; None takes the present.
    """
    common = common_remarks(scans)
    size = common_size(scans)
    cards = [replace(scan, remarks=[text for text in scan.remarks if text not in common]) for scan in scans]
    return render(
        "segment_report.html.j2",
        command=command,
        date=date,
        made=made,
        rules=rules_table(_rules(scans)),
        facts=_facts(scans) if len(scans) > 1 else {},
        warnings=[*([stopped] if stopped else []), *common],
        scans=[_details(scan, i, classes) for i, scan in enumerate(cards, 1)],
        overview=_overview(cards, list(classes), viewer) if len(scans) > 1 else None,
        left_out=max(0, len(classes) - MOST_CLASSES),
        most=MOST_CLASSES,
        plot=_plot(scans, classes),
        sizes=f"{size.quantity}s".capitalize(),
        unlike=_unlike(scans, list(classes)),
        outliers_from=OUTLIERS_FROM,
        viewer=viewer,
    )


def _facts(scans: Sequence[SegmentedScan]) -> dict[str, str]:
    seconds = [scan.seconds for scan in scans if scan.status == "done"]
    facts = {
        "Scans": str(len(scans)),
        "To check": str(sum(bool(scan.flags) for scan in scans)),
        "Failed": str(sum(scan.status == "failed" for scan in scans)),
    }
    if earlier := sum(scan.status == "skipped" for scan in scans):
        facts["Finished earlier"] = str(earlier)
    if seconds:
        facts["Seconds per scan"] = f"{np.median(seconds):.1f}"
    return facts


def _overview(scans: Sequence[SegmentedScan], classes: Sequence[str], viewer: Viewer | None) -> Table:
    shown = classes[:MOST_CLASSES]
    has_quality = any(scan.quality for scan in scans)
    columns = [
        *(f"{name}, {common_size(scans).unit}" for name in shown),
        *(["Quality"] if has_quality else []),
        "Seconds",
    ]
    cells = [
        [
            *(_volume(scan, name) for name in shown),
            *([Cell(scan.quality or "\u2013")] if has_quality else []),
            number(scan.seconds or None, 1),
        ]
        for scan in scans
    ]
    return overview(columns, scans, cells, viewer, "mask")


def _volume(scan: SegmentedScan, name: str) -> Cell:
    volume = scan.volumes_ml.get(name)
    if volume is None:
        return number(None)
    return Cell(scan.size.text(volume), volume, _range(scan, scan.intervals_ml.get(name)))


def _details(scan: SegmentedScan, place: int, classes: Mapping[str, str]) -> dict[str, object]:
    """What the template shows of one scan."""
    level = "" if scan.level is None else f"{100 * scan.level:.0f} % interval"
    heading = f"{scan.size.quantity.capitalize()}, {scan.size.unit}"
    columns = ["Class", heading, *([level] if level else []), *(["Sampled masks"] if scan.members_ml else [])]
    rows = [
        Row(
            [
                Cell(name, colour=colour),
                Cell(scan.size.text(scan.volumes_ml[name]), scan.volumes_ml[name]),
                *([Cell(_range(scan, scan.intervals_ml.get(name)) or "\u2013")] if level else []),
                *([Cell(_range(scan, scan.members_ml.get(name)) or "\u2013")] if scan.members_ml else []),
            ]
        )
        for name, colour in classes.items()
        if name in scan.volumes_ml
    ]
    numbers = {"quality": scan.quality or "", "model": scan.model}
    numbers["time"] = f"{scan.seconds:.1f} s" if scan.seconds else ""
    return {
        "scan": scan,
        "id": f"scan-{place}",
        "table": Table(f"{scan.size.quantity.capitalize()}s of {scan.name}", columns, rows) if rows else None,
        "numbers": {name: value for name, value in numbers.items() if value},
    }


def _unlike(scans: Sequence[SegmentedScan], classes: Sequence[str]) -> list[str]:
    """A sentence about every volume that is unlike the others."""
    sentences = []
    for name in classes:
        values = [scan.volumes_ml.get(name, math.nan) for scan in scans]
        size = common_size(scans)
        median = size.text(float(np.nanmedian(values))) if np.isfinite(values).any() else ""
        sentences += [
            f"{scan.name}: {name} {size.text(value)} {size.unit} (median of the scans {median} {size.unit})"
            for scan, value, is_unlike in zip(scans, values, outliers(values), strict=True)
            if is_unlike
        ]
    return sentences


def _plot(scans: Sequence[SegmentedScan], classes: Mapping[str, str]) -> Markup | None:
    """The volumes of every class, each on its own axis: points, median, quartiles and the names of outliers.

    None with fewer than `OUTLIERS_FROM` scans.
    """
    volumes = {
        name: [(scan.name, scan.volumes_ml[name]) for scan in scans if name in scan.volumes_ml]
        for name in list(classes)[:MOST_CLASSES]
    }
    rows = [(classes[name], name, points) for name, points in volumes.items() if len(points) >= OUTLIERS_FROM]
    if not rows:
        return None
    # Imported where used: a page of few scans does not need matplotlib.
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure

    from .slices import plain, shortened

    size = common_size(scans)
    figure = Figure(figsize=(7.2, 0.95 * len(rows) + 0.25), layout="constrained")
    for axes, (colour, name, points) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        values = size.per_ml * np.array([value for _, value in points])
        q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
        axes.barh(0, q3 - q1, left=q1, height=0.9, color=to_rgba(colour, 0.22))
        axes.vlines(median, -0.45, 0.45, color=INK, linewidth=2)
        # The scatter across the row is fixed, so that the same numbers give the same page.
        across = ((np.arange(len(values)) * 0.618034) % 1.0 - 0.5) * 0.6
        axes.scatter(values, across, s=18, color=to_rgba(colour, 0.9), edgecolors=INK, linewidths=0.5, zorder=3)
        for (scan, _), value, y, is_unlike in zip(points, values, across, outliers(values.tolist()), strict=True):
            if is_unlike:
                left = value < median
                axes.annotate(
                    plain(shortened(scan, 24)), (value, y), xytext=(6 if left else -6, 0), textcoords="offset points",
                    ha="left" if left else "right", va="center", fontsize=8, color=INK,
                )  # fmt: skip
        axes.set_ylim(-0.62, 0.62)
        axes.margins(x=0.04)
        axes.set_yticks([0], [plain(shortened(name, 24))])
        axes.grid(axis="x", color=LINE)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
    axes.set_xlabel(f"{size.quantity}, {size.unit}", color=INK)
    return svg(figure, f"{size.quantity.capitalize()}s of every scan, one row per class")


def _rules(scans: Sequence[SegmentedScan]) -> dict[str, str]:
    size = common_size(scans)
    if size is AREA:
        rules = {"Area": "Number of the pixels of the class in the mask. Image files have no pixel size."}
    else:
        rules = {"Volume": "Number of the voxels of the class in the mask, times the size of a voxel."}
    levels = sorted({scan.level for scan in scans if scan.level is not None})
    if levels:
        level = " or ".join(f"{100 * level:.0f} %" for level in levels)
        rules["Interval"] = (
            f"From the errors on the model's calibration cases: in {level} of patients like these it contains the "
            f"{size.quantity} of the reference."
        )
    if any(scan.members_ml for scan in scans):
        rules["Sampled masks"] = (
            f"Smallest and largest {size.quantity} in the ensemble. They show the model's own spread, not its error."
        )
    if any(scan.quality for scan in scans):
        rules["Quality"] = (
            "\u201ccheck\u201d if the scan or the mask is unlike those that the model was trained on, which leaves no "
            "interval, or if the sampled masks agree less than on 95 of 100 calibration scans of the model; otherwise "
            "\u201cusual\u201d. The flags and remarks tell which."
        )
    if len(scans) >= OUTLIERS_FROM:
        article = "An" if size is AREA else "A"
        rules["Outlier"] = (
            f"{article} {size.quantity} more than {FENCE:g} times the quartiles' distance below the first or above the "
            f"third quartile of the scans on this page (Tukey's outer fences); from {OUTLIERS_FROM} scans on."
        )
    if any(scan.status == "skipped" for scan in scans):
        rules["Finished earlier"] = (
            f"{size.quantity.capitalize()}s are counted in the mask that an earlier call has written. Interval, "
            "quality and time are from the scan's statistics or from the earlier table, if these are of the same sizes."
        )
    return rules


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def _range(scan: SegmentedScan, ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{scan.size.text(ends[0])} to {scan.size.text(ends[1])}"

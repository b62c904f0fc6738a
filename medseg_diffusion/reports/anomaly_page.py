"""The page of `medseg anomaly --report`: all scans first, their scores beside those of healthy scans, and pictures."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from .batch import ScanOfBatch, common_remarks, millilitres, overview, percent, rank
from .page import ACCENT, INK, LINE, SOFT, Cell, Row, Table, number, render, rules_table, svg
from .summary import format_number
from .viewer import Viewer


@dataclass(frozen=True)
class ScoredScan(ScanOfBatch):
    """A scored scan on the page. None stands for what is not known.

    Attributes:
        score: Score of the whole scan.
        percentile: Percentage of healthy scans with a lower score.
        healthy_scans: Number of these.
        compared: The place among healthy scans in words.
        volume_ml: Volume of the mask.
        share: Share of the foreground that the mask holds, 0 to 1.
        threshold: Threshold of the mask.
        expected_share: Share of healthy tissue above the threshold, 0 to 1.
        method: Name of the detector.
    """

    score: float | None = None
    percentile: float | None = None
    healthy_scans: int | None = None
    compared: str = ""
    volume_ml: float | None = None
    share: float | None = None
    threshold: float | None = None
    expected_share: float | None = None
    method: str = ""


@dataclass(frozen=True)
class WorstSlices:
    """A picture of the slices with the most anomalous voxels: name of the scan, and a JPEG."""

    name: str
    jpeg: bytes


def worst_first(scans: Sequence[ScoredScan]) -> list[ScoredScan]:
    """The scans in the order of the page: by their flags, then the highest score first."""
    return sorted(scans, key=lambda scan: (rank(scan.flags), math.inf if scan.score is None else -scan.score))


def anomaly_page(
    scans: Sequence[ScoredScan],
    pictures: Sequence[WorstSlices] = (),
    viewer: Viewer | None = None,
    *,
    healthy: Sequence[float] = (),
    made: Mapping[str, str] | None = None,
    stopped: str = "",
    command: str = "",
    date: str | None = None,
) -> str:
    """The text of the page.

    Args:
        scans: All scans of the call, in the order of the page (`worst_first`).
        pictures: The worst slices of some of them.
        viewer: Shows some of the scans; None leaves it out.
        healthy: Scores of the healthy scans of the calibration; empty if they are not known.
        made: How the maps were made: name -> value.
        stopped: A sentence about what ended the call before all scans were processed; empty if nothing did.
        command: The command line; empty shows none.
        date: Date and time; None takes the present.
    """
    common = common_remarks(scans)
    cards = [replace(scan, remarks=[text for text in scan.remarks if text not in common]) for scan in scans]
    return render(
        "anomaly_report.html.j2",
        command=command,
        date=date,
        made=made,
        rules=rules_table(_rules(scans)),
        facts=_facts(scans),
        warnings=[*([stopped] if stopped else []), *common],
        scans=[_details(scan, i) for i, scan in enumerate(cards, 1)],
        overview=_overview(cards, viewer) if len(scans) > 1 else None,
        plot=_plot(scans, healthy),
        known=bool(healthy),
        pictures=[{"name": one.name, "jpeg": b64encode(one.jpeg).decode("ascii")} for one in pictures],
        viewer=viewer,
    )


def _facts(scans: Sequence[ScoredScan]) -> dict[str, str]:
    facts = {}
    if len(scans) > 1:
        facts = {
            "Scans": str(len(scans)),
            "Above healthy": str(sum("above healthy" in scan.flags for scan in scans)),
            "Failed": str(sum(scan.status == "failed" for scan in scans)),
        }
    if (threshold := _only(scan.threshold for scan in scans)) is not None:
        facts["Threshold"] = format_number(threshold, 3)
    if (share := _only(scan.expected_share for scan in scans)) is not None:
        facts["Healthy tissue above it"] = _percent(share)
    return facts


def _only(values: Iterable[float | None]) -> float | None:
    """The value that all have in common, if they have one; None does not count."""
    known = {value for value in values if value is not None}
    return known.pop() if len(known) == 1 else None


def _percent(share: float | None) -> str:
    return "\u2013" if share is None else percent(share)


def _overview(scans: Sequence[ScoredScan], viewer: Viewer | None) -> Table:
    several = len({scan.threshold for scan in scans if scan.threshold is not None}) > 1
    columns = ["Score", "Healthy scans below, %", "Anomalous, ml", "of foreground, %"]
    columns += ["Threshold"] if several else []
    cells = [
        [
            number(scan.score),
            number(scan.percentile, 0),
            _size(scan),
            number(None if scan.share is None else 100 * scan.share, 2),
            *([number(scan.threshold)] if several else []),
            number(scan.seconds or None, 1),
        ]
        for scan in scans
    ]
    return overview([*columns, "Seconds"], scans, cells, viewer, "mask")


def _size(scan: ScoredScan) -> Cell:
    return number(None) if scan.volume_ml is None else Cell(millilitres(scan.volume_ml), scan.volume_ml)


def _details(scan: ScoredScan, place: int) -> dict[str, object]:
    """What the template shows of one scan."""
    threshold = format_number(math.nan if scan.threshold is None else scan.threshold, 3)
    numbers = {
        "Score": (format_number(scan.score, 3), scan.compared) if scan.score is not None else None,
        "Anomalous volume": (
            f"{millilitres(scan.volume_ml)} ml",
            f"{_percent(scan.share)} of the foreground",
        )
        if scan.volume_ml is not None
        else None,
        "Threshold": (threshold, f"{_percent(scan.expected_share)} of healthy tissue is expected above it")
        if scan.threshold is not None
        else None,
    }
    rows = [Row([Cell(name), Cell(both[0]), Cell(both[1])]) for name, both in numbers.items() if both is not None]
    about = {"method": scan.method, "model": scan.model, "time": f"{scan.seconds:.1f} s" if scan.seconds else ""}
    return {
        "scan": scan,
        "id": f"scan-{place}",
        "table": Table(f"Numbers of {scan.name}", ["", "Value", ""], rows, text_columns=(2,)) if rows else None,
        "numbers": {name: value for name, value in about.items() if value},
    }


def _plot(scans: Sequence[ScoredScan], healthy: Sequence[float]) -> Markup | None:
    """The score of every scan, beside those of the healthy scans of the calibration; None for a single row of few."""
    scored = [(scan.name, scan.score, "above healthy" in scan.flags) for scan in scans if scan.score is not None]
    rows = [("healthy scans", [(name, value, False) for name, value in (("", one) for one in healthy)], SOFT)]
    rows = [*(rows if healthy else []), ("these scans" if len(scored) > 1 else "this scan", scored, ACCENT)]
    if not scored or (len(scored) < 3 and not healthy):
        return None
    # Imported where used: a page without a plot does not need matplotlib.
    from matplotlib.figure import Figure

    from .slices import plain, shortened

    figure = Figure(figsize=(7.2, 0.55 + 0.75 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    named = 0
    for row, (_, points, colour) in enumerate(rows):
        across = row + ((np.arange(len(points)) * 0.618034) % 1.0 - 0.5) * (0.6 if len(points) > 1 else 0)
        axes.scatter([value for _, value, _ in points], across, s=22, color=colour, edgecolors=INK, linewidths=0.5)
        for (name, value, flagged), y in zip(points, across, strict=True):
            if flagged and named < 6:  # further names would cover each other
                named += 1
                axes.annotate(
                    plain(shortened(name, 24)), (value, y), xytext=(-6, 0), textcoords="offset points", ha="right",
                    va="center", fontsize=8, color=INK,
                )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{name} ({len(points)})" for name, points, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.04)
    axes.set_xlabel("score of the scan", color=INK)
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    return svg(figure, "Scores of the scans beside those of healthy scans")


def _rules(scans: Sequence[ScoredScan]) -> dict[str, str]:
    rules = {
        "Score": "Of a scan: mean of the largest hundredth of its anomaly map within the foreground.",
        "Healthy scans below": "Percentage of the healthy scans of the model's calibration with a lower score; equal "
        "scores count one half. The fewer healthy scans there are, the coarser it is. From 95 % on, a scan has the "
        "flag \u201cabove healthy\u201d.",
        "Anomalous": "Volume of the mask: what lies above the threshold, without parts below the smallest volume that "
        "is asked for.",
        "Healthy tissue above": "Share of the healthy scans' foreground above the threshold. In the mask of a healthy "
        "scan so much is expected, too, before small parts are dropped.",
        "Healthy counterpart": "What the method made of the scan as if it were healthy, in the scan's unit: an "
        "estimate of the model, not an image of the patient.",
    }
    if any(scan.healthy_scans is None for scan in scans if scan.status != "failed"):
        rules["Dash"] = (
            "Not known: the model has no calibration for these options, or the numbers of a finished scan are of "
            "another mask."
        )
    return rules

"""Reports as HTML pages. Each is one file that contains its styles, scripts and pictures and loads nothing else."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from medseg_diffusion.metrics.calibration import Reliability
from medseg_diffusion.metrics.evaluation_summary import Evaluation
from medseg_diffusion.metrics.overlap import EMPTY_RULE
from medseg_diffusion.metrics.statistics import Interval

from .slices import label_colour
from .summary import CALIBRATION_REGION, format_number, versions


@dataclass(frozen=True)
class CasePicture:
    """A picture of one evaluated case.

    Attributes:
        title: Why it is shown, such as "Worst case".
        name: The case's name.
        dice: Its mean Dice over classes.
        png: The picture.
    """

    title: str
    name: str
    dice: float
    png: bytes


@dataclass(frozen=True)
class SegmentedCase:
    """The content of the report on one segmented scan.

    Attributes:
        name: Name of the scan.
        preview: PNG; empty without a preview.
        volumes_ml: Class name -> volume in millilitres.
        members_ml: Class name -> smallest and largest volume of the sampled masks.
        intervals_ml: Class name -> ends of the interval that was calibrated on validation cases.
        level: Share of cases whose interval contains the reference's volume.
        seconds: Time that the segmentation took.
        model: Name of the model, with its version if it has one.
        options: Options of the segmentation, such as sampler and steps: name -> value.
        files: The files that were written.
        warnings: Facts that the reader should know, one sentence each.
    """

    name: str
    preview: bytes = b""
    volumes_ml: Mapping[str, float] = field(default_factory=dict)
    members_ml: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    intervals_ml: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    level: float | None = None
    seconds: float = 0.0
    model: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    warnings: Sequence[str] = ()


def evaluation_report(
    evaluation: Evaluation, pictures: Sequence[CasePicture] = (), *, command: str = "", date: str | None = None
) -> str:
    """The page on an evaluation: means with intervals, box plot, pictures, and every case, worst first.

    Args:
        evaluation: The numbers.
        pictures: Cases to show, in this order.
        command: The command line, for the footer; empty shows none.
        date: Date and time for the footer; None takes the present.

    Returns:
        HTML; names are escaped, so that a file name cannot become markup.
    """
    # Imported where used: segmenting needs neither matplotlib nor, without a report, Jinja.
    from matplotlib.colors import to_hex

    from .detection_page import detection_page
    from .plots import box_plot

    classes = [
        {
            "name": name,
            "colour": to_hex(label_colour(row)),
            "dice": evaluation.dice[label],
            "iou": evaluation.iou[label],
            "hd95": evaluation.hd95[label],
        }
        for row, (label, name) in enumerate(evaluation.labels.items())
    ]
    cases = [
        {"name": case.name, "mean": case.mean_dice, "dice": [case.overlap[label].dice for label in evaluation.labels]}
        for case in evaluation.worst_first()
    ]
    # Two classes may share a name; a mapping would lose one of them.
    scores = [
        (name, [case.overlap[label].dice for case in evaluation.cases]) for label, name in evaluation.labels.items()
    ]
    return _render(
        "report.html.j2",
        command=command,
        date=date,
        classes=classes,
        cases=cases,
        unit=evaluation.unit,
        n_patients=len(set(evaluation.patients.values())),
        mean_dice=evaluation.mean_dice,
        mean_iou=evaluation.mean_iou,
        warnings=evaluation.warnings,
        seed=evaluation.seed,
        empty_rule=EMPTY_RULE,
        calibration=_calibration(evaluation.reliability),
        calibration_region=CALIBRATION_REGION,
        readers=evaluation.readers,
        detection=detection_page(evaluation.detection) if evaluation.detection is not None else None,
        box_plot=_base64(box_plot(scores)),
        pictures=[{"title": p.title, "name": p.name, "dice": p.dice, "png": _base64(p.png)} for p in pictures],
        number=format_number,
        limits=_limits,
    )


def _calibration(reliability: Reliability | None) -> dict[str, Any] | None:
    if reliability is None or not reliability.count.any():
        return None
    from .plots import reliability_diagram

    diagram = _base64(reliability_diagram(*reliability.diagram()))
    return {"ece": reliability.ece, "brier": reliability.brier_score, "diagram": diagram}


def segment_report(cases: Sequence[SegmentedCase], *, command: str = "", date: str | None = None) -> str:
    """The page on segmented scans, one card per scan.

    Args:
        cases: The scans, in this order.
        command: The command line, for the footer; empty shows none.
        date: Date and time for the footer; None takes the present.
    """
    content = [
        {
            "name": case.name,
            "preview": _base64(case.preview),
            "volumes": [
                {
                    "name": name,
                    "volume": volume,
                    "interval": case.intervals_ml.get(name),
                    "members": case.members_ml.get(name),
                }
                for name, volume in case.volumes_ml.items()
            ],
            "level": f"{100 * case.level:.0f} %" if case.level is not None else "",
            "has_members": bool(case.members_ml),
            "seconds": case.seconds,
            "model": case.model,
            "options": case.options,
            "files": case.files,
            "warnings": case.warnings,
        }
        for case in cases
    ]
    return _render("segment_report.html.j2", command=command, date=date, cases=content, ml=_millilitres)


def _render(template: str, *, date: str | None, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # autoescape=True, not select_autoescape: which decides by the suffix and would leave *.j2 unescaped.
    environment = Environment(
        loader=PackageLoader("medseg_diffusion.reports"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    when = date if date is not None else datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(date=when, version=versions()["medseg-diffusion"], **values)


def _base64(png: bytes) -> str:
    return b64encode(png).decode("ascii")


def _limits(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "\u2013"
    return f"{format_number(interval.low)} to {format_number(interval.high)}"


def _millilitres(volume: float) -> str:
    """Three decimals for small structures, fewer for large ones: about four significant digits."""
    return format_number(volume, 3 if abs(volume) < 10 else 2 if abs(volume) < 100 else 1)

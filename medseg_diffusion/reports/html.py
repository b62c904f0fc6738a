"""Reports as HTML pages. Each is one file that contains its styles, scripts and pictures and loads nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .page import render
from .summary import format_number


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
    return render("segment_report.html.j2", command=command, date=date, cases=content, ml=_millilitres)


def _base64(png: bytes) -> str:
    return b64encode(png).decode("ascii")


def _millilitres(volume: float) -> str:
    """Three decimals for small structures, fewer for large ones: about four significant digits."""
    return format_number(volume, 3 if abs(volume) < 10 else 2 if abs(volume) < 100 else 1)

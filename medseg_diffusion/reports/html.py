"""Self-contained HTML pages: no file beside them, nothing from the network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medseg_diffusion.metrics.overlap import EMPTY_RULE
from medseg_diffusion.reports.plots import box_plot
from medseg_diffusion.reports.summary import CaseResult, Evaluation, format_interval, format_number, versions


@dataclass(frozen=True)
class SegmentedCase:
    """One card of the page on segmented scans.

    Attributes:
        name: the scan's file name.
        preview: PNG.
        volumes_ml: class name to volume.
        intervals_ml: class name to the ensemble's 95 % interval; empty for a single sample.
        seconds: wall time of the scan.
        model: name of the model.
        options: option to value, as used.
        files: files written.
        warnings: sentences for the reader.
    """

    name: str
    preview: bytes
    volumes_ml: Mapping[str, float]
    intervals_ml: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0
    model: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    warnings: Sequence[str] = ()


def evaluation_report(evaluation: Evaluation, pictures: Mapping[str, tuple[CaseResult, bytes]]) -> str:
    """The page of `medseg evaluate`.

    Args:
        evaluation: the numbers.
        pictures: title ("Best case", ...) to the case and its overlay as PNG.
    """
    scores = {
        name: [case.overlap[label].dice for case in evaluation.cases] for label, name in evaluation.labels.items()
    }
    worst_first = sorted(evaluation.cases, key=lambda case: (case.mean_dice != case.mean_dice, case.mean_dice))
    return _render(
        "report.html.j2",
        evaluation=evaluation,
        rows=worst_first,
        rule=EMPTY_RULE,
        plot=_data_uri(box_plot(scores)) if evaluation.labels else "",
        pictures={title: (case, _data_uri(png)) for title, (case, png) in pictures.items()},
    )


def segment_report(cases: Sequence[SegmentedCase]) -> str:
    """The page of `medseg segment --report`: one card per scan."""
    return _render("segment_report.html.j2", cases=[(case, _data_uri(case.preview)) for case in cases])


def _render(template: str, **content: object) -> str:
    environment = Environment(
        loader=PackageLoader("medseg_diffusion.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, interval=format_interval)
    return environment.get_template(template).render(versions=versions(), today=date.today().isoformat(), **content)


def _data_uri(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode()

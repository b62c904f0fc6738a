"""The page of `medseg evaluate`: cases first, then means per class, distributions, volumes, and how it was made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from medseg_diffusion.metrics.calibration import Reliability
from medseg_diffusion.metrics.evaluation_summary import EvaluatedCase, Evaluation
from medseg_diffusion.metrics.registry import METRICS, Metric

from .detection_page import detection_page
from .page import Cell, Row, Table, interval_with_missing, limits, missing, number, plural, render
from .plots import BOX_FROM, distributions, reliability_diagram, volume_agreement
from .summary import CALIBRATION_REGION
from .theme import class_colours

if TYPE_CHECKING:
    from .viewer import Viewer

MAX_CLASSES_IN_OVERVIEW = 6
"""With more classes, the table of cases has the mean and the worst class instead of a column for each."""

MAX_AGREEMENT_PLOTS = 12
"""Classes whose volumes are plotted: those with the largest bias, if there are more."""


def evaluation_page(
    evaluation: Evaluation,
    viewer: Viewer | None = None,
    *,
    links: Mapping[str, str] | None = None,
    command: str = "",
    date: str | None = None,
) -> str:
    """The text of the page.

    Args:
        evaluation: The numbers.
        viewer: Shows some of the cases; None leaves it out.
        links: Case -> address of its prediction, relative to the page.
        command: The command line; empty shows none.
        date: Date and time; None takes the present.
    """
    shown = [metric for metric in evaluation.metrics if _exists(evaluation, metric)]
    flags = {case.name: case_flags(case, evaluation) for case in evaluation.cases}
    return render(
        "evaluation.html.j2",
        command=command,
        date=date,
        made=_made(evaluation),
        rules=metric_rules(evaluation, shown),
        title=_title(evaluation),
        lead=_lead(evaluation),
        facts=_facts(evaluation, flags),
        warnings=evaluation.warnings,
        cases=_cases_table(evaluation, flags, viewer, links or {}),
        classes=_classes_tables(evaluation, shown),
        strata=_strata_table(evaluation),
        distributions=_distributions(evaluation),
        box_from=BOX_FROM,
        agreement=_agreement(evaluation),
        n_classes=len(evaluation.labels),
        calibration=_calibration(evaluation.reliability),
        calibration_region=CALIBRATION_REGION,
        readers=evaluation.readers,
        limits=limits,
        unit=evaluation.unit,
        detection=detection_page(evaluation.detection) if evaluation.detection is not None else None,
        viewer=viewer,
    )


def case_flags(case: EvaluatedCase, evaluation: Evaluation) -> list[str]:
    """Reasons to look at a case, in a few words each: classes missed or invented, and a Dice far below the others'."""
    flags = []
    overlaps = case.overlap
    missed = [evaluation.labels[label] for label, one in overlaps.items() if one.n_ref and not one.n_pred]
    invented = [evaluation.labels[label] for label, one in overlaps.items() if one.n_pred and not one.n_ref]
    disjoint = [evaluation.labels[k] for k, one in overlaps.items() if one.n_pred and one.n_ref and not one.tp]
    for names, what in ((missed, "not predicted"), (invented, "not in the reference"), (disjoint, "elsewhere")):
        if names:
            flags.append(f"{_some(names)} {what}")
    if not flags and case.mean_dice < _low_dice(evaluation):
        flags.append("low Dice")
    return flags


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def _low_dice(evaluation: Evaluation) -> float:
    """The mean Dice below which a case is an outlier by Tukey's rule; minus infinity below `BOX_FROM` cases."""
    values = [case.mean_dice for case in evaluation.cases if not math.isnan(case.mean_dice)]
    if len(values) < BOX_FROM:
        return -math.inf
    q1, q3 = np.quantile(values, [0.25, 0.75])
    return float(q1 - 1.5 * (q3 - q1))


def _exists(evaluation: Evaluation, metric: Metric) -> bool:
    return any(mean.n for mean in evaluation.means[metric.name].values())


# ---- beginning ---------------------------------------------------------------------------------------------------


def _title(evaluation: Evaluation) -> str:
    return "Evaluation of segmentations" if evaluation.detection is None else "Evaluation of anomaly maps and masks"


def _lead(evaluation: Evaluation) -> str:
    count = plural(len(evaluation.cases), "case")
    if evaluation.patients:
        count += f" of {plural(len(set(evaluation.patients.values())), 'patient')}"
    return f"{count} with {plural(len(evaluation.labels), 'class', 'classes')}, compared with references."


def _facts(evaluation: Evaluation, flags: Mapping[str, Sequence[str]]) -> dict[str, str]:
    facts = {}
    for name in ("dice", "nsd", "hd95_mm"):
        means = [mean for mean in evaluation.means[name].values() if mean.n]
        if means:
            metric, lacking = METRICS[name], sum(mean.n_missing for mean in means)
            title = f"Mean {metric.heading}" + (f" ({lacking} without)" if lacking else "")
            facts[title] = number(float(np.mean([mean.mean for mean in means])), metric.digits).text
    facts["Cases"] = str(len(evaluation.cases))
    if evaluation.patients:
        facts["Patients"] = str(len(set(evaluation.patients.values())))
    facts["Flagged"] = str(sum(bool(reasons) for reasons in flags.values()))
    return facts


def _cases_table(
    evaluation: Evaluation, flags: Mapping[str, Sequence[str]], viewer: Viewer | None, links: Mapping[str, str]
) -> Table:
    """One row a case, worst first."""
    many = len(evaluation.labels) > MAX_CLASSES_IN_OVERVIEW
    single = len(evaluation.labels) == 1
    headings = ["Case", "Dice" if single else "Mean Dice"]
    headings += ["Worst class", "its Dice"] if many else [] if single else list(evaluation.labels.values())
    headings += ["HD95 mm" if single else "Largest HD95 mm", "Volume error %" if single else "Largest volume error %"]
    rows = []
    for case in evaluation.worst_first():
        dice = {label: case.metrics[label]["dice"] for label in evaluation.labels}
        cells = [Cell(case.name, link=links.get(case.name, "")), number(case.mean_dice)]
        if many:
            known = {label: value for label, value in dice.items() if not math.isnan(value)}
            worst = min(known, key=lambda label: known[label]) if known else None
            cells += (
                [Cell("\u2013"), number(None)]
                if worst is None
                else [Cell(evaluation.labels[worst]), number(known[worst])]
            )
        elif not single:
            cells += [number(value) for value in dice.values()]
        cells += [
            number(_largest(case.metrics[label]["hd95_mm"] for label in evaluation.labels), 2),
            number(_largest(case.metrics[label]["volume_error_percent"] for label in evaluation.labels), 1),
        ]
        in_viewer = viewer is not None and case.name in viewer.names
        rows.append(Row(cells, flags[case.name], case.name if in_viewer else ""))
    return Table("Cases", headings, rows, sortable=True, sorted_by=1, text_columns=(2,) if many else ())


def _largest(values: Iterable[float]) -> float:
    """The value furthest from 0, with its sign; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return max(known, key=abs) if known else math.nan


# ---- numbers -----------------------------------------------------------------------------------------------------

_GROUPS: Mapping[str, Sequence[str]] = {
    "Overlap": ("dice", "iou", "precision", "recall", "cldice"),
    "Surfaces": ("nsd", "hd95_mm", "assd_mm"),
    "Volumes": (
        "reference_volume_ml", "volume_ml", "volume_error_ml", "absolute_volume_error_ml", "volume_error_percent",
    ),
    "Lesions (connected components)": (
        "reference_lesions", "predicted_lesions", "lesion_recall", "lesion_precision", "lesion_f1",
    ),
    "Panoptic quality of lesions": ("pq", "sq", "rq"),
}  # fmt: skip


def _classes_tables(evaluation: Evaluation, shown: Sequence[Metric]) -> dict[str, Table]:
    """Group of metrics -> a table with one row a class."""
    grouped = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, "Further": tuple(metric.name for metric in shown if metric.name not in grouped)}
    tables, colours = {}, class_colours(evaluation.labels)
    for title, names in groups.items():
        metrics = [metric for metric in shown if metric.name in names]
        if not metrics:
            continue
        rows = [
            Row(
                [
                    Cell(name, colour=colours[label]),
                    *(_mean(evaluation, metric, label) for metric in metrics),
                ]
            )
            for label, name in evaluation.labels.items()
        ]
        tables[title] = Table(
            f"{title} per class", ["Class", *(metric.heading for metric in metrics)], rows, stacked=True
        )
    return tables


def _mean(evaluation: Evaluation, metric: Metric, label: int) -> Cell:
    """Mean; below it the ends of its interval, the median, and the number of cases without a value."""
    mean = evaluation.means[metric.name][label]
    notes = [limits(mean, metric.digits)]
    if mean.n > 2:
        notes.append(f"median {number(mean.median, metric.digits).text}")
    notes.append(missing(mean))
    return number(mean.mean, metric.digits, "\n".join(note for note in notes if note))


def _strata_table(evaluation: Evaluation) -> Table | None:
    """The means of every stratum by the metrics that comparisons use; None without strata."""
    if evaluation.strata is None:
        return None
    metrics = [metric for metric in evaluation.metrics if metric.compared]
    colours = class_colours(evaluation.labels)
    rows = [
        Row(
            [
                Cell(stratum),
                Cell(title, colour=colours[label]),
                *(interval_with_missing(means[metric.name][label], metric.digits) for metric in metrics),
                number(means["dice"][label].n, 0),
            ]
        )
        for stratum, means in evaluation.strata.means.items()
        for label, title in evaluation.labels.items()
    ]
    headings = ["Stratum", "Class", *(metric.heading for metric in metrics), evaluation.unit.capitalize()]
    name = f"Means by {evaluation.strata.column}"
    return Table(name, headings, rows, sortable=True, text_columns=(1,), stacked=True)


def _distributions(evaluation: Evaluation) -> dict[str, Markup]:
    """Dice and surface distance of every case; empty for fewer than two cases."""
    if len(evaluation.cases) < 2:
        return {}
    plots, colours = {}, class_colours(evaluation.labels)
    for name in ("dice", "nsd"):
        # Two classes may share a name; a mapping would lose one of them.
        scores = [
            (title, [case.metrics[label][name] for case in evaluation.cases])
            for label, title in evaluation.labels.items()
        ]
        title = METRICS[name].title
        plots[title] = distributions(scores, title, colours=[colours[label] for label in evaluation.labels])
    return plots


def _agreement(evaluation: Evaluation) -> list[Markup]:
    """A plot of volumes for each class with at least three cases; those with the largest bias if there are many."""
    # Cases without the class agree on nothing: many of them would draw the limits of agreement together.
    volumes = {
        label: [case.metrics[label] for case in evaluation.cases if not math.isnan(case.overlap[label].dice)]
        for label in evaluation.labels
    }
    labels = [label for label, values in volumes.items() if len(values) >= 3]
    bias = {label: abs(evaluation.means["volume_error_percent"][label].mean) for label in labels}
    chosen = sorted(labels, key=lambda label: -bias[label] if bias[label] == bias[label] else 0)[:MAX_AGREEMENT_PLOTS]
    plots, colours = [], class_colours(evaluation.labels)
    for label, name in evaluation.labels.items():
        if label in chosen:
            reference = [values["reference_volume_ml"] for values in volumes[label]]
            prediction = [values["volume_ml"] for values in volumes[label]]
            plots.append(volume_agreement(name, reference, prediction, colours[label]))
    return plots


def _calibration(reliability: Reliability | None) -> dict[str, Any] | None:
    if reliability is None or not reliability.count.any():
        return None
    diagram = reliability_diagram(*reliability.diagram())
    return {
        "facts": {"ECE": f"{reliability.ece:.4f}", "Brier score": f"{reliability.brier_score:.4f}"},
        "diagram": diagram,
    }


# ---- end ---------------------------------------------------------------------------------------------------------


def _made(evaluation: Evaluation) -> dict[str, str]:
    unit = "Each file counts as one case."
    if evaluation.patients:
        unit = "The cases of a patient are averaged first."
    return {
        "intervals": f"95 % bootstrap intervals over {evaluation.unit} (BCa), seed {evaluation.seed}. {unit}",
        "missing": "A value that does not exist is left out of the mean, and counted as \u201cwithout\u201d.",
    }


def metric_rules(evaluation: Evaluation, metrics: Sequence[Metric]) -> Table:
    """The definition of every metric, and its value for empty masks."""

    def value(rule: float | str) -> Cell:
        return Cell(rule) if isinstance(rule, str) else number(rule, 0)

    rows = [
        Row(
            [
                Cell(metric.heading),
                Cell(_with_settings(metric, evaluation)),
                *map(value, (metric.both_empty, metric.prediction_empty, metric.reference_empty)),
            ]
        )
        for metric in metrics
    ]
    columns = ["Metric", "Definition", "Both empty", "Only prediction empty", "Only reference empty"]
    return Table("Metrics, and their values for empty masks", columns, rows, text_columns=(1,))


def _with_settings(metric: Metric, evaluation: Evaluation) -> str:
    """The definition of a metric, with the tolerances or the overlap that were in force."""
    if metric.name == "nsd":
        tolerances = {evaluation.labels[label]: mm for label, mm in evaluation.tolerances_mm.items()}
        if len(set(tolerances.values())) == 1:
            return f"{metric.definition} Tolerance {next(iter(tolerances.values())):g} mm."
        each = ", ".join(f"{name} {mm:g} mm" for name, mm in tolerances.items())
        return f"{metric.definition} Tolerances: {each}."
    if metric.name == "lesion_recall":
        return f"{metric.definition} Enough is {100 * evaluation.lesion_overlap:g} %."
    return metric.definition

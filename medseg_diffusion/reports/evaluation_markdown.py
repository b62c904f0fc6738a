"""Markdown summaries of `medseg evaluate`: one set of predictions, or several that are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from medseg_diffusion.metrics.comparison import Comparison
from medseg_diffusion.metrics.evaluation_summary import Evaluation
from medseg_diffusion.metrics.registry import Metric

from .markdown import markdown_page, markdown_table
from .page import Cell, Row, Table, interval_with_missing, number, plural
from .summary import format_number

MAX_CLASSES = 6
"""With more classes, the worst cases have their mean Dice alone."""
WORST = 5
"""Cases with the lowest Dice that are listed."""


def evaluation_markdown(evaluation: Evaluation, command: str = "") -> str:
    """A summary of an evaluation for a pull request, in GitHub-flavoured Markdown."""
    tables = [_classes_table({"": evaluation}, evaluation.key_metrics)]
    if evaluation.strata is not None:
        tables.append(_strata_table(evaluation))
    tables.append(_worst_table(evaluation))
    said = [_counted(evaluation)]
    if not math.isnan(evaluation.mean_dice):
        said.append(f"The mean Dice over the classes is {evaluation.mean_dice:.3f}.")
    if evaluation.detection is not None:
        auroc, auprc = (format_number(evaluation.detection.means[name].mean) for name in ("AUROC", "AUPRC"))
        said.append(f"Score maps have a mean AUROC {auroc} and AUPRC {auprc} over the {evaluation.unit} with lesions.")
    title = "Evaluation of segmentations" if evaluation.detection is None else "Evaluation of anomaly maps and masks"
    return markdown_page(title, said, [markdown_table(table) for table in tables], evaluation.warnings, command)


def comparison_markdown(comparison: Comparison, command: str = "") -> str:
    """A summary of a comparison of several sets of predictions."""
    said = [_counted(comparison.first), *comparison.conclusions]
    table = markdown_table(_classes_table(comparison.evaluations, comparison.key_metrics))
    return markdown_page("Comparison of segmentations", said, [table], comparison.warnings, command)


def _counted(evaluation: Evaluation) -> str:
    count = plural(len(evaluation.cases), "case")
    if evaluation.patients:
        count += f" of {plural(len(set(evaluation.patients.values())), 'patient')}"
    return f"{count}; means are over {evaluation.unit}, with 95 % intervals."


def _classes_table(evaluations: Mapping[str, Evaluation], metrics: Sequence[Metric]) -> Table:
    """One row for each set and class; the column of sets is left out for a single one without a name."""
    sets = list(evaluations.items())
    first = sets[0][1]
    named = ["Predictions"] if len(sets) > 1 else []
    rows = [
        Row(
            [
                *([Cell(title)] if named else []),
                Cell(class_name),
                *(interval_with_missing(evaluation.means[metric.name][label], metric.digits) for metric in metrics),
                number(evaluation.dice[label].n, 0),
                number(evaluation.dice[label].n_missing, 0),
            ]
        )
        for title, evaluation in sets
        for label, class_name in evaluation.labels.items()
    ]
    headings = [*named, "Class", *(metric.heading for metric in metrics), first.unit.capitalize(), "without Dice"]
    return Table("Classes", headings, rows, text_columns=(1,) if named else ())


def _strata_table(evaluation: Evaluation) -> Table:
    assert evaluation.strata is not None
    rows = [
        Row(
            [
                Cell(stratum),
                Cell(class_name),
                interval_with_missing(means["dice"][label]),
                number(means["dice"][label].n, 0),
            ]
        )
        for stratum, means in evaluation.strata.means.items()
        for label, class_name in evaluation.labels.items()
    ]
    headings = [evaluation.strata.column, "Class", "Dice", evaluation.unit.capitalize()]
    return Table("Strata", headings, rows, text_columns=(1,))


def _worst_table(evaluation: Evaluation) -> Table:
    """The mean Dice of the worst cases, and that of each class unless there are too many for a table."""
    count = len(evaluation.labels)
    labels = evaluation.labels if 1 < count <= MAX_CLASSES else {}
    rows = [
        Row([Cell(case.name), number(case.mean_dice), *(number(case.overlap[label].dice) for label in labels)])
        for case in evaluation.worst_first()[:WORST]
    ]
    mean = "Dice" if count == 1 else "Mean Dice"
    return Table("Worst cases", ["Worst cases", mean, *(f"Dice {name}" for name in labels.values())], rows)

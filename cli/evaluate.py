"""`medseg evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import STDOUT, AsJson, Markdown, Quiet, Seed, existing, require_one_on_stdout
from ._shared import fail, print_json, print_table, progress, write_markdown

if TYPE_CHECKING:
    from medseg_diffusion.metrics.comparison import Comparison
    from medseg_diffusion.metrics.evaluation_summary import Evaluation, Means
    from medseg_diffusion.metrics.registry import Metric
    from medseg_diffusion.metrics.statistics import Interval


def _parse_labels(values: list[str] | None) -> dict[int, str] | None:
    if not values:
        return None
    labels = {}
    for text in values:
        number, _, name = text.partition("=")
        if not number.isdecimal() or int(number) == 0:
            raise typer.BadParameter(f"{text!r} is not VALUE or VALUE=NAME with a value above 0", param_hint="--label")
        labels[int(number)] = name
    return labels


def _parse_tolerances(values: list[str] | None) -> tuple[float | None, dict[str, float]]:
    """The tolerance of all classes, if one is given, and those of single classes."""
    common, own = None, {}
    for text in values or ():
        name, _, number = text.rpartition("=")
        try:
            tolerance = float(number)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not MM or CLASS=MM", param_hint="--tolerance") from None
        if name:
            own[name] = tolerance
        else:
            common = tolerance
    return common, own


def _parse_strata(text: str | None) -> tuple[Path, str] | None:
    if text is None:
        return None
    file, _, column = text.rpartition(":")
    if not file or not column:
        raise typer.BadParameter(f"{text!r} is not FILE.csv:COLUMN", param_hint="--strata")
    return Path(file), column


def _existing_masks(context: typer.Context, paths: list[Path]) -> list[Path]:
    for path in paths:
        existing("a label map or a folder of them")(context, path)
    return paths


# many, long: one parameter, with its help, for each option of the command
def evaluate(
    masks: Annotated[
        list[Path],
        typer.Argument(
            metavar="PRED... [REF]",
            help="Predicted masks: a file or a folder; several are compared with each other. Without --reference, the "
            "last one is the reference.",
            callback=_existing_masks,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for summary.json, cases.csv, report.html.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="REF",
            help="Reference mask, or a folder of them.",
            callback=existing("a label map or a folder of them"),
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="VALUE[=NAME]", help="Label to evaluate; repeatable; default: all labels in the masks."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Scan, or folder of scans, for the viewer in the report.")
    ] = None,
    raters: Annotated[
        list[Path] | None, typer.Option("--rater", metavar="REF", help="References by a further rater; repeatable.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", metavar="MAPS", help="Anomaly score maps, for AUROC, AUPRC and lesion detection."),
    ] = None,
    foreground: Annotated[
        Path | None,
        typer.Option(
            "--foreground",
            metavar="MASKS",
            help="Masks of the voxels whose scores count; default: those beside the maps, else all voxels.",
        ),
    ] = None,
    lesion_overlap: Annotated[
        float, typer.Option("--lesion-overlap", help="Share of a lesion that must be predicted to count as detected.")
    ] = 0.1,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            metavar="[CLASS=]MM",
            help="Tolerance of the normalised surface distance, of all classes or of one; repeatable; default: 1 mm.",
        ),
    ] = None,
    cldice: Annotated[bool, typer.Option("--cldice", help="Compute clDice, too, for tubes such as vessels.")] = False,
    merge_labels: Annotated[
        bool, typer.Option("--merge-labels", help="Read all labels above 0 as 1, for instance 255 in a reference.")
    ] = False,
    patients: Annotated[
        Path | None,
        typer.Option(
            "--patients",
            metavar="CSV",
            help="Table of case and patient, for cases that belong together: means and intervals are over patients.",
        ),
    ] = None,
    strata: Annotated[
        str | None,
        typer.Option(
            "--strata",
            metavar="CSV:COLUMN",
            help="Group the cases by a column of a table with a column case, or patient: means of each group, too.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Number of processes; default: one for each CPU, up to 8, if there is enough to do."
        ),
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option("--view", metavar="CASE", help="Case that the page always shows; repeatable."),
    ] = None,
    seed: Seed = 0,
    markdown: Markdown = None,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Compare predicted masks and anomaly score maps with reference masks, and write a report.

    Several predictions of the same cases are also compared with each other: paired differences with tests.
    """
    require_one_on_stdout(markdown, as_json)
    names, strata_column = _parse_labels(labels), _parse_strata(strata)
    common, own = _parse_tolerances(tolerance)
    if reference is None and len(masks) < 2:
        raise typer.BadParameter("name a prediction and its reference", param_hint="PRED... [REF]")
    *predictions, last = masks if reference is None else [*masks, reference]
    from medseg_diffusion.metrics.case_metrics import TOLERANCE_MM
    from medseg_diffusion.reports.evaluation_markdown import comparison_markdown, evaluation_markdown
    from medseg_diffusion.workflows.evaluate import EvaluateOptions, compare_predictions
    from medseg_diffusion.workflows.evaluate import evaluate as run

    options = EvaluateOptions(
        labels=names,
        images=images,
        raters=raters or (),
        scores=scores,
        foreground=foreground,
        lesion_overlap=lesion_overlap,
        tolerance_mm=TOLERANCE_MM if common is None else common,
        tolerances_mm=own,
        cldice=cldice,
        merge_labels=merge_labels,
        patients=patients,
        strata=strata_column,
        view=view or (),
        seed=seed,
        jobs=jobs,
        command=shlex.join(["medseg", *sys.argv[1:]]),
    )
    with progress(quiet) as show:
        if len(predictions) > 1:
            comparison = compare_predictions(predictions, last, output, options, show)
        else:
            evaluation = run(predictions[0], last, output, options, show)
    if len(predictions) > 1:
        write_markdown(markdown, lambda: comparison_markdown(comparison, options.command))
    else:
        write_markdown(markdown, lambda: evaluation_markdown(evaluation, options.command))
    if as_json:
        print_json(_comparison_json(comparison) if len(predictions) > 1 else _evaluation_json(evaluation))
    elif not quiet and markdown != STDOUT:
        if len(predictions) > 1:
            _print_comparison(comparison)
        else:
            _print(evaluation)
        typer.echo(f"report: {output / 'report.html'}")
    for warning in () if quiet else (comparison if len(predictions) > 1 else evaluation).warnings:
        fail(warning, kind="warning")


def _evaluation_json(result: Evaluation) -> dict[str, object]:
    from medseg_diffusion.reports.summary import optional_sections

    return {"rows": result.table(), **optional_sections(result), "warnings": result.warnings}


def _comparison_json(comparison: Comparison) -> dict[str, object]:
    return {
        "predictions": {name: evaluation.table() for name, evaluation in comparison.evaluations.items()},
        "comparisons": [asdict(one) for one in comparison.differences],
        "warnings": comparison.warnings,
    }


def _print(result: Evaluation) -> None:
    from medseg_diffusion.reports.detection_text import detection_lines
    from medseg_diffusion.reports.summary import format_number

    print_table(_rows(result.means, result, result.key_metrics, {}))
    if (strata := result.strata) is not None:
        typer.echo()
        rows = [
            row
            for name, means in strata.means.items()
            for row in _rows(means, result, result.key_metrics, {"stratum": name})
        ]
        print_table(rows)
    if result.reliability is not None:
        typer.echo(f"ECE {result.reliability.ece:.4f}, Brier score {result.reliability.brier_score:.4f}")
    if (readers := result.readers) is not None:
        typer.echo(
            f"generalised energy distance (GED^2) {readers.energy_distance}, matched IoU {readers.matched_iou}, "
            f"frequency ECE {format_number(readers.frequency_ece)}"
        )
    if result.detection is not None:
        for line in detection_lines(result.detection):
            typer.echo(line)


def _print_comparison(comparison: Comparison) -> None:
    print_table(
        [
            row
            for name, evaluation in comparison.evaluations.items()
            for row in _rows(evaluation.means, evaluation, comparison.key_metrics, {"predictions": name})
        ]
    )
    typer.echo()
    for sentence in comparison.conclusions:
        typer.echo(sentence)
    if further := len(comparison.differences) - len(comparison.conclusions):
        typer.echo(f"in comparison.json: {further} more, of other metrics, by which no difference is shown")


def _rows(
    means: Means, evaluation: Evaluation, metrics: Sequence[Metric], first: dict[str, str]
) -> list[dict[str, str | int]]:
    """One row per class of these metrics, after the cells of ``first``."""
    return [
        {
            **first,
            "class": class_name,
            "Dice": _with_missing(str(means["dice"][label]), means["dice"][label]),
            **{
                metric.heading: _with_missing(
                    f"{means[metric.name][label].mean:.{metric.digits}f}", means[metric.name][label]
                )
                for metric in metrics
                if metric.name != "dice"
            },
            evaluation.unit: means["dice"][label].n + means["dice"][label].n_missing,
        }
        for label, class_name in evaluation.labels.items()
    ]


def _with_missing(text: str, interval: Interval) -> str:
    """A mean, and how many values it lacks; a dash without any value."""
    text = text if interval.n else "-"
    return f"{text} ({interval.n_missing} missing)" if interval.n_missing else text

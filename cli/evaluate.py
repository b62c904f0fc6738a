"""`medseg evaluate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AsJson, Quiet, Seed, existing
from ._shared import print_json, print_table

if TYPE_CHECKING:
    from medseg_diffusion.metrics.evaluation_summary import Evaluation


def _parse_labels(values: list[str] | None) -> dict[int, str] | None:
    if not values:
        return None
    labels = {}
    for text in values:
        number, _, name = text.partition("=")
        if not number.isdecimal() or int(number) == 0:
            raise typer.BadParameter(f"{text!r} is not VALUE or VALUE=NAME with a value above 0", param_hint="--label")
        labels[int(number)] = name or f"label {number}"
    return labels


# many, long: one parameter, with its help, for each option of the command
def evaluate(
    prediction: Annotated[
        Path,
        typer.Argument(
            metavar="PRED",
            help="Predicted mask, or a folder of them.",
            callback=existing("a label map or a folder of them"),
        ),
    ],
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="REF",
            help="Reference mask, or a folder of them.",
            callback=existing("a label map or a folder of them"),
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for summary.json, cases.csv, report.html.")],
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
    view: Annotated[
        list[str] | None,
        typer.Option("--view", metavar="CASE", help="Case that the page shows in any case; repeatable."),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Compare predicted masks and anomaly score maps with reference masks, and write a report."""
    names = _parse_labels(labels)
    from medseg_diffusion.workflows.evaluate import EvaluateOptions
    from medseg_diffusion.workflows.evaluate import evaluate as run

    options = EvaluateOptions(
        labels=names,
        images=images,
        raters=raters or (),
        scores=scores,
        foreground=foreground,
        lesion_overlap=lesion_overlap,
        merge_labels=merge_labels,
        patients=patients,
        view=view or (),
        seed=seed,
        command=shlex.join(["medseg", *sys.argv[1:]]),
    )
    result = run(prediction, reference, output, options)
    if as_json:
        print_json(result.table())
    elif not quiet:
        _print(result)
        typer.echo(f"report: {output / 'report.html'}")


def _print(result: Evaluation) -> None:
    from medseg_diffusion.reports.detection_text import detection_lines

    print_table(
        [
            {
                "class": name,
                "Dice": str(result.dice[label]),
                "IoU": str(result.iou[label]),
                "HD95 mm": result.hd95[label].mean,
                result.unit: result.dice[label].n,
            }
            for label, name in result.labels.items()
        ]
    )
    if result.reliability is not None:
        typer.echo(f"ECE {result.reliability.ece:.4f}, Brier score {result.reliability.brier_score:.4f}")
    if (readers := result.readers) is not None:
        typer.echo(
            f"generalised energy distance {readers.energy_distance}, matched IoU {readers.matched_iou}, "
            f"frequency ECE {readers.frequency_ece:.3f}"
        )
    if result.detection is not None:
        for line in detection_lines(result.detection):
            typer.echo(line)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)

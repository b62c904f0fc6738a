"""The section of an evaluation's page on detection by score maps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from medseg_diffusion.metrics.detection import SIZE_BOUNDS_ML, SizeGroup
from medseg_diffusion.metrics.detection_summary import CaseDetection, Detection
from medseg_diffusion.metrics.statistics import Interval

from .detection_text import OPTIMISTIC, lesion_rule
from .page import Cell, Row, Table, number
from .plots import detection_curves
from .summary import format_number

_SIZES = (
    f"below {SIZE_BOUNDS_ML[0]:g} ml",
    *(f"{low:g} to below {high:g} ml" for low, high in pairwise(SIZE_BOUNDS_ML)),
    f"{SIZE_BOUNDS_ML[-1]:g} ml and more",
)


_HEADINGS = (
    "Case", "AUROC", "AUPRC", "Dice", "Optimistic Dice *", "Optimistic best Dice *", "Lesions", "Detected",
    "False positives",
)  # fmt: skip


def detection_page(detection: Detection) -> dict[str, Any]:
    """The values of `detection.html.j2`: numbers as text, and values to sort by."""
    means, pooled, lesions, healthy = detection.means, detection.pooled, detection.lesions, detection.healthy
    sizes = [*zip(_SIZES, lesions.by_size(), strict=True), ("all", SizeGroup(lesions.n, lesions.n_detected))]
    return {
        "facts": {
            "Mean AUROC": format_number(means["AUROC"].mean),
            "Mean AUPRC": format_number(means["AUPRC"].mean),
            "Lesions detected": f"{lesions.n_detected} of {lesions.n}",
            "Cases with lesions": str(detection.n_with_lesions),
            "Cases without lesions": str(detection.n_without_lesions),
        },
        "optimistic": OPTIMISTIC,
        "voxels": [
            _row("AUROC", means["AUROC"], pooled=pooled["AUROC"]),
            _row("AUPRC", means["AUPRC"], pooled=pooled["AUPRC"]),
            _row("Dice of the predicted masks", means["Dice"], pooled=pooled["Dice"]),
            _row("Best Dice, one threshold", means["shared_Dice"], pooled=pooled["shared_Dice"], optimistic=True),
            _row("Best Dice, a threshold per case", means["best_Dice"], optimistic=True),
        ],
        "region": detection.region,
        "n_counted": f"{detection.n_counted:,}",
        "n_left_out": f"{detection.n_left_out:,}" if detection.n_left_out else "",
        "prevalence": _significant(pooled["prevalence"]),
        "threshold": "" if math.isnan(detection.shared_threshold) else f"{detection.shared_threshold:.4g}",
        "masks": [_significant(pooled[key]) for key in ("recall", "precision", "false_positive_rate")],
        "curves": _curves(detection),
        "scan_auroc": format_number(detection.scan_auroc),
        "n_scan_scores": detection.n_scan_scores if not math.isnan(detection.scan_auroc) else None,
        "rule": lesion_rule(detection),
        "sizes": [
            {"name": name, **group._asdict(), "sensitivity": format_number(group.sensitivity)} for name, group in sizes
        ],
        "lesions": [
            _row("Sensitivity", detection.lesion_means["sensitivity"]),
            _row("Precision", detection.lesion_means["precision"]),
            _row("False positives", detection.lesion_means["false_positives"], digits=2),
        ],
        "n_components": lesions.n_predicted,
        "n_false": lesions.n_false,
        "precision": format_number(lesions.precision),
        "healthy": [
            _row("Connected components", healthy["components"], digits=2),
            _row("Voxels", healthy["voxels"], digits=1),
            _row("Volume, ml", healthy["ml"]),
            _row("Share of the voxels that count, %", healthy["share"], digits=4, scale=100),
        ],
        "n_healthy": detection.n_without_lesions,
        "n_true_negatives": detection.n_true_negatives,
        "cases": Table(
            "Score maps, case by case",
            _HEADINGS,
            [Row([Cell(name), *_cells(case)]) for name, case in detection.cases.items()],
            sortable=True,
            sorted_by=0,
        ),
    }


def _row(
    name: str,
    mean: Interval,
    *,
    pooled: float = math.nan,
    digits: int = 3,
    scale: float = 1.0,
    optimistic: bool = False,
) -> dict[str, Any]:
    """A mean over cases as a row of a table."""
    low, high = (format_number(end * scale, digits) for end in (mean.low, mean.high))
    return {
        "name": name,
        "mean": format_number(mean.mean * scale, digits),
        "limits": low if math.isnan(mean.low) else f"{low} to {high}",
        "n": mean.n,
        "n_missing": mean.n_missing,
        "pooled": format_number(pooled, digits),
        "optimistic": optimistic,
    }


def _cells(case: CaseDetection) -> list[Cell]:
    """A case's cells under `_HEADINGS`, after its name."""
    scores = (case.auroc, case.auprc, case.overlap.dice, case.shared_dice, case.best_dice)
    counts = (case.lesions.n, case.lesions.n_detected, case.lesions.n_false)
    return [*map(number, scores), *(number(count, 0) for count in counts)]


def _curves(detection: Detection) -> Markup:
    """The plot of the curves; empty if a curve does not exist."""
    roc, precision_recall, dice = detection.roc, detection.precision_recall, detection.dice_curve
    if roc is None or precision_recall is None or dice is None:
        return Markup()
    pooled = detection.pooled
    return detection_curves(
        roc,
        precision_recall,
        dice,
        masks=(pooled["false_positive_rate"], pooled["recall"], pooled["precision"], pooled["Dice"]),
        best=(detection.shared_threshold, pooled["shared_Dice"]),
        prevalence=pooled["prevalence"],
    )


def _significant(value: float) -> str:
    """A number of any magnitude with three significant digits, or a dash where there is none."""
    return f"{value:.3g}" if math.isfinite(value) else "\u2013"

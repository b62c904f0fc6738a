"""Detection by score maps as text: for `summary.json`, `cases.csv` and the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from medseg_diffusion.metrics.detection import SIZE_BOUNDS_ML
from medseg_diffusion.metrics.detection_summary import CaseDetection, Detection

OPTIMISTIC = "chosen on the same cases"
"""Follows every Dice at a threshold that was chosen with the references, wherever it is printed."""

CASE_NUMBERS: Mapping[str, Callable[[CaseDetection], float | int]] = {
    "auroc": lambda case: case.auroc,
    "auprc": lambda case: case.auprc,
    "optimistic_dice_shared_threshold": lambda case: case.shared_dice,
    "optimistic_dice_own_threshold": lambda case: case.best_dice,
    "optimistic_own_threshold": lambda case: case.best_threshold,
    "false_positive_rate": lambda case: case.false_positive_rate,
    "n_counted": lambda case: case.n_counted,
    "n_positive": lambda case: case.n_positive,
    "n_lesions": lambda case: case.lesions.n,
    "n_lesions_detected": lambda case: case.lesions.n_detected,
    "n_predicted_components": lambda case: case.lesions.n_predicted,
    "n_false_components": lambda case: case.lesions.n_false,
    "scan_score": lambda case: case.scan_score,
}
"""Name of a number -> its value in a case: further columns of `cases.csv`, and keys of a case in `summary.json`."""


def case_numbers(case: CaseDetection) -> dict[str, float | int]:
    """The numbers of `CASE_NUMBERS`; a number that does not exist is NaN."""
    return {key: value(case) for key, value in CASE_NUMBERS.items()}


def lesion_rule(detection: Detection) -> str:
    """When a lesion counts as detected, and what a false positive is, in words."""
    return (
        "A lesion is a connected component of the reference, where voxels that touch at a corner are connected. It is "
        f"detected if at least {100 * detection.min_overlap:g} % of its voxels are predicted. A connected component of "
        "the prediction without any voxel of a lesion is a false positive."
    )


def detection_json(detection: Detection) -> dict[str, Any]:
    """The content of `summary.json` under ``detection``.

    Keys: ``voxels`` (which count, and how many), ``mean_over_cases_with_lesions`` (intervals), ``pooled``,
    ``optimistic`` (Dice at thresholds that were chosen on the same cases: means, pooled value and threshold),
    ``lesions`` (rule, pooled counts, by size, means over cases), ``scans_without_lesions`` (false positives per scan,
    intervals) and ``scans`` (the scores of whole scans). Numbers that do not exist are NaN here.
    """
    means, pooled, lesions = detection.means, detection.pooled, detection.lesions
    bounds = (0.0, *SIZE_BOUNDS_ML, math.nan)
    not_optimistic = ("AUROC", "AUPRC", "Dice")
    return {
        "voxels": {
            "counted": detection.region,
            "n_counted": detection.n_counted,
            "n_left_out": detection.n_left_out,
            "prevalence": pooled["prevalence"],
        },
        "mean_over_cases_with_lesions": {key: asdict(means[key]) for key in not_optimistic},
        "pooled": {key: pooled[key] for key in (*not_optimistic, "recall", "precision", "false_positive_rate")},
        "optimistic": {
            "why": f"thresholds {OPTIMISTIC}",
            "shared_threshold": detection.shared_threshold,
            "pooled_Dice_shared_threshold": pooled["shared_Dice"],
            "mean_Dice_shared_threshold": asdict(means["shared_Dice"]),
            "mean_Dice_own_threshold": asdict(means["best_Dice"]),
        },
        "lesions": {
            "rule": lesion_rule(detection),
            "min_overlap": detection.min_overlap,
            "n": lesions.n,
            "n_detected": lesions.n_detected,
            "sensitivity": lesions.sensitivity,
            "n_predicted_components": lesions.n_predicted,
            "n_false_components": lesions.n_false,
            "precision": lesions.precision,
            "by_size": [
                {"from_ml": low, "below_ml": high, **group._asdict(), "sensitivity": group.sensitivity}
                for (low, high), group in zip(pairwise(bounds), lesions.by_size(), strict=True)
            ],
            "mean_over_cases": {key: asdict(interval) for key, interval in detection.lesion_means.items()},
        },
        "scans_without_lesions": {
            "n": detection.n_without_lesions,
            "per_scan": {key: asdict(interval) for key, interval in detection.healthy.items()},
        },
        "scans": {
            "AUROC": detection.scan_auroc,
            "n_with_lesions": detection.n_scan_scores[0],
            "n_without_lesions": detection.n_scan_scores[1],
        },
    }


def detection_lines(detection: Detection) -> list[str]:
    """The most important numbers as lines of text."""
    means, pooled, lesions = detection.means, detection.pooled, detection.lesions
    lines = [
        f"AUROC {means['AUROC']}, AUPRC {means['AUPRC']} over cases; pooled {_text(pooled['AUROC'])} and "
        f"{_text(pooled['AUPRC'])} ({detection.n_counted:,} voxels: {detection.region})",
        f"best Dice, optimistic ({OPTIMISTIC}): {means['shared_Dice']} at one threshold, {means['best_Dice']} at a "
        f"threshold per case; Dice of the predicted masks: {means['Dice']}",
        f"lesions detected: {lesions.n_detected} of {lesions.n} (precision {_text(lesions.precision)}), "
        f"false positives per scan: {detection.lesion_means['false_positives']}",
    ]
    if count := detection.n_without_lesions:
        components, share = detection.healthy["components"], detection.healthy["share"]
        lines.append(
            f"{count} {'scan' if count == 1 else 'scans'} without lesions: {components} false positives per scan, "
            f"{share.mean:.3%} of the voxels"
        )
    if not math.isnan(detection.scan_auroc):
        positive, negative = detection.n_scan_scores
        lines.append(
            f"scores of whole scans: AUROC {_text(detection.scan_auroc)} ({positive} with lesions, {negative} without)"
        )
    return [line.replace("nan", "-") for line in lines]  # numbers that do not exist, also inside an `Interval`


def _text(value: float) -> str:
    return f"{value:.3f}"

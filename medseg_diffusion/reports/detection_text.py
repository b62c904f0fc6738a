"""How well score maps find lesions as text: for `summary.json`, `cases.csv` and the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from medseg_diffusion.metrics.detection import SIZE_BOUNDS_ML

from medseg_diffusion.metrics.detection_summary import OPTIMISTIC, CaseDetection, Detection, ratio

CASE_KEYS: Mapping[str, Callable[[CaseDetection], float | int]] = {
    "auroc": lambda case: case.auroc,
    "auprc": lambda case: case.auprc,
    "optimistic_dice_shared_threshold": lambda case: case.shared_dice,
    "optimistic_dice_own_threshold": lambda case: case.best_dice,
    "optimistic_own_threshold": lambda case: case.best_threshold,
    "false_positive_rate": lambda case: case.false_positive_rate,
    "n_counted": lambda case: case.n_counted,
    "n_positive": lambda case: case.n_positive,
    "n_lesions": lambda case: case.lesions.size_ml.size,
    "n_lesions_detected": lambda case: int(case.lesions.detected.sum()),
    "n_predicted_components": lambda case: case.lesions.n_predicted,
    "n_false_components": lambda case: case.lesions.n_false,
    "scan_score": lambda case: case.scan_score,
}
"""Further columns of `cases.csv`, the same in every row of a case, and keys of a case in `summary.json`."""


def case_numbers(case: CaseDetection) -> dict[str, float | int]:
    """The numbers of `CASE_KEYS`; what does not exist is NaN."""
    return {key: value(case) for key, value in CASE_KEYS.items()}


def table_numbers(detection: Detection) -> dict[str, float | int]:
    """The most important numbers in one flat mapping; what does not exist is NaN."""
    means = {
        "auroc": detection.means["AUROC"],
        "auprc": detection.means["AUPRC"],
        "optimistic_dice_shared_threshold": detection.means["shared_Dice"],
        "optimistic_dice_own_threshold": detection.means["best_Dice"],
        "false_positives_per_scan": detection.lesion_means["false_positives"],
        "false_positives_per_healthy_scan": detection.healthy["components"],
    }
    ends = {f"{key}{end}": getattr(i, name) for key, i in means.items() for end, name in _ENDS}
    return {
        **ends,
        "pooled_auroc": detection.pooled["AUROC"],
        "pooled_auprc": detection.pooled["AUPRC"],
        "lesion_sensitivity": detection.lesions.sensitivity,
        "lesion_precision": detection.lesions.precision,
        "scan_auroc": detection.scan_auroc,
    }


_ENDS = (("", "mean"), ("_low", "low"), ("_high", "high"))


def detection_json(detection: Detection) -> dict[str, Any]:
    """What `summary.json` holds under ``detection``.

    Keys: ``voxels`` (which count, and how many), ``mean_over_cases_with_lesions`` (intervals), ``pooled``,
    ``optimistic`` (what is chosen on the same cases: its means, its pooled value and threshold), ``lesions`` (rule,
    pooled counts, by size, means over cases), ``scans_without_lesions`` (false positives per scan, intervals) and
    ``scans`` (the scores of whole scans). Numbers that do not exist are NaN here.
    """
    means, pooled, lesions = detection.means, detection.pooled, detection.lesions
    bounds = (0.0, *SIZE_BOUNDS_ML, math.nan)
    honest = ("AUROC", "AUPRC", "Dice")
    return {
        "voxels": {
            "counted": detection.region,
            "n_counted": detection.n_counted,
            "n_left_out": detection.n_left_out,
            "prevalence": pooled["prevalence"],
        },
        "mean_over_cases_with_lesions": {key: asdict(means[key]) for key in honest},
        "pooled": {key: pooled[key] for key in (*honest, "recall", "precision", "false_positive_rate")},
        "optimistic": {
            "why": f"thresholds {OPTIMISTIC}",
            "shared_threshold": detection.shared_threshold,
            "pooled_Dice_shared_threshold": pooled["shared_Dice"],
            "mean_Dice_shared_threshold": asdict(means["shared_Dice"]),
            "mean_Dice_own_threshold": asdict(means["best_Dice"]),
        },
        "lesions": {
            "rule": detection.rule,
            "min_overlap": detection.min_overlap,
            "n": int(lesions.size_ml.size),
            "n_detected": int(lesions.detected.sum()),
            "sensitivity": lesions.sensitivity,
            "n_predicted_components": lesions.n_predicted,
            "n_false_components": lesions.n_false,
            "precision": lesions.precision,
            "by_size": [
                {"from_ml": low, "below_ml": high, "n": n, "n_detected": found, "sensitivity": ratio(found, n)}
                for (low, high), (n, found) in zip(pairwise(bounds), lesions.by_size(), strict=True)
            ],
            "mean_over_cases": {key: asdict(interval) for key, interval in detection.lesion_means.items()},
        },
        "scans_without_lesions": {
            "n": sum(not case.has_lesion for case in detection.cases.values()),
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
    healthy = [case for case in detection.cases.values() if not case.has_lesion]
    lines = [
        f"AUROC {means['AUROC']}, AUPRC {means['AUPRC']} over cases; pooled {_text(pooled['AUROC'])} and "
        f"{_text(pooled['AUPRC'])} ({detection.n_counted:,} voxels: {detection.region})",
        f"best Dice, optimistic ({OPTIMISTIC}): {means['shared_Dice']} at one threshold, {means['best_Dice']} at a "
        f"threshold per case; {means['Dice']} is that of the masks",
        f"lesions detected: {int(lesions.detected.sum())} of {lesions.size_ml.size} (precision "
        f"{_text(lesions.precision)}), false positives per scan: {detection.lesion_means['false_positives']}",
    ]
    if healthy:
        parts, share = detection.healthy["components"], detection.healthy["share"]
        lines.append(
            f"{len(healthy)} scans without lesions: {parts} false positives per scan, {share.mean:.3%} of the voxels"
        )
    if not math.isnan(detection.scan_auroc):
        ill, well = detection.n_scan_scores
        lines.append(f"scores of whole scans: AUROC {_text(detection.scan_auroc)} ({ill} with lesions, {well} without)")
    return [line.replace("nan", "-") for line in lines]  # what does not exist, also in an `Interval`


def _text(value: float) -> str:
    return f"{value:.3f}"

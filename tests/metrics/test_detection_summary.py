"""Detection by score maps summarised over cases: who counts in which mean, and what is pooled."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg_diffusion.metrics.detection import Curve, Lesions, ScoredVoxels
from medseg_diffusion.metrics.detection_summary import CaseDetection, Detection, summarise_detection
from medseg_diffusion.metrics.overlap import label_overlap


def measured(scores: list[float], reference: list[int], scan_score: float) -> tuple[CaseDetection, ScoredVoxels]:
    """One row of voxels of 1 ml, predicted above 0.5."""
    values, truth = np.array([scores], np.float32), np.array([reference], bool)
    predicted = values > 0.5
    voxels = ScoredVoxels.of(values, truth)
    curve = Curve.of(voxels)
    best_dice, best_threshold = curve.best_dice()
    case = CaseDetection(
        n_counted=values.size,
        n_left_out=0,
        n_positive=curve.n_positive,
        voxel_ml=1.0,
        auroc=curve.auroc,
        auprc=curve.average_precision,
        best_dice=best_dice,
        best_threshold=best_threshold,
        overlap=label_overlap(predicted, truth, [1])[1],
        tp=int((predicted & truth).sum()),
        fp=int((predicted & ~truth).sum()),
        lesions=Lesions.of(predicted, truth, (10, 100)),
        scan_score=scan_score,
    )
    return case, voxels


@pytest.fixture
def detection() -> Detection:
    """a: the lesion is detected. b: no lesion, a false positive. c: no lesion, nothing predicted, no scan score."""
    cases = {
        "c": measured([0.1, 0.1, 0.1, 0.2], [0, 0, 0, 0], math.nan),
        "a": measured([0.9, 0.8, 0.1, 0.1], [1, 1, 0, 0], 0.9),
        "b": measured([0.1, 0.1, 0.1, 0.7], [0, 0, 0, 0], 0.7),
    }
    return summarise_detection(cases, region="all", min_overlap=0.1)


def test_cases_are_sorted_and_grouped_by_lesions(detection: Detection) -> None:
    assert list(detection.cases) == ["a", "b", "c"]
    assert (detection.n_with_lesions, detection.n_without_lesions, detection.n_true_negatives) == (1, 2, 1)
    assert (detection.means["AUROC"].mean, detection.means["AUROC"].n) == (1, 1), "over the cases with lesions"
    assert (detection.healthy["ml"].mean, detection.healthy["ml"].n) == (0.5, 2), "over the cases without"
    assert detection.lesion_means["false_positives"].mean == pytest.approx(1 / 3), "over all cases"
    assert (detection.scan_auroc, detection.n_scan_scores) == (1, (1, 1)), "of the scans with a score"


def test_pooled_numbers_are_over_all_voxels(detection: Detection) -> None:
    assert detection.pooled["prevalence"] == pytest.approx(2 / 12)
    assert detection.pooled["precision"] == pytest.approx(2 / 3) and detection.pooled["recall"] == 1
    assert detection.pooled["false_positive_rate"] == pytest.approx(1 / 10)
    assert detection.pooled["Dice"] == pytest.approx(2 * 2 / (3 + 2))
    assert detection.pooled["shared_Dice"] == 1 and 0.7 <= detection.shared_threshold < 0.8


def test_key_numbers_are_flat_with_the_ends_of_intervals(detection: Detection) -> None:
    numbers = detection.key_numbers()
    assert (numbers["auroc"], numbers["pooled_auroc"], numbers["lesion_sensitivity"]) == (1, 1, 1)
    assert math.isnan(numbers["auroc_low"]), "one case has no interval"
    assert numbers["false_positives_per_healthy_scan"] == 0.5

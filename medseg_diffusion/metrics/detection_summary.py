"""How well score maps find lesions, over cases: what a report says about them, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg_diffusion.metrics.detection import Curve, Lesions, ScoredVoxels
from medseg_diffusion.metrics.overlap import ClassOverlap
from medseg_diffusion.metrics.statistics import Interval, mean_interval

OPTIMISTIC = "chosen on the same cases"
"""Follows every Dice at a threshold that was chosen with the references, wherever it is printed."""
_GRID = 400


@dataclass(frozen=True, eq=False)
class CaseDetection:
    """One case. What does not exist, such as the AUROC of a case without lesion, is NaN.

    Attributes:
        n_counted: voxels whose scores count.
        n_left_out: voxels that do not.
        n_positive: voxels of the reference that count.
        voxel_ml: volume of a voxel in ml.
        auroc: area under the ROC curve of the scores.
        auprc: area under their precision-recall curve (average precision).
        best_dice: the largest Dice that any threshold reaches on this case; optimistic.
        best_threshold: that threshold.
        overlap: the predicted mask against the reference, over all voxels.
        tp: predicted voxels of the reference that count.
        fp: predicted other voxels that count.
        lesions: connected parts of the reference and the prediction, over all voxels.
        scan_score: the score of the whole scan; NaN where none is known.
        shared_dice: Dice at the one threshold that is best for all cases together; optimistic.
    """

    n_counted: int
    n_left_out: int
    n_positive: int
    voxel_ml: float
    auroc: float
    auprc: float
    best_dice: float
    best_threshold: float
    overlap: ClassOverlap
    tp: int
    fp: int
    lesions: Lesions
    scan_score: float = math.nan
    shared_dice: float = math.nan

    @property
    def has_lesion(self) -> bool:
        """Whether the reference has a voxel."""
        return self.overlap.n_ref > 0

    @property
    def false_positive_rate(self) -> float:
        """Share of the voxels outside the reference that are predicted; NaN without such voxels."""
        n_negative = self.n_counted - self.n_positive
        return self.fp / n_negative if n_negative else math.nan


@dataclass(frozen=True, eq=False)
class Detection:
    """All cases. Means are over cases, each counting once; what is pooled is over voxels or lesions of all cases.

    Attributes:
        cases: case name -> its numbers, by name.
        region: which voxels count, as the end of a sentence.
        min_overlap: share of a lesion's voxels that must be predicted for it to be detected.
        means: AUROC, AUPRC, Dice, shared_Dice and best_Dice over the cases with lesions.
        pooled: AUROC, AUPRC, Dice, shared_Dice, and prevalence, recall, precision and false_positive_rate of the
            predicted masks on the voxels that count.
        shared_threshold: the one threshold of the largest pooled Dice; optimistic.
        lesions: all lesions.
        lesion_means: sensitivity over cases with lesions, precision over cases with predictions, and
            false_positives over all cases.
        healthy: what is predicted in a case without lesions: components, voxels, ml, and the share of the voxels that
            count.
        scan_auroc: of the scores of whole scans, with against without lesions; NaN if it does not exist.
        n_scan_scores: scans with a score, with and without lesions.
        roc: (m, 2) pooled false positive rate and recall; None where there is no curve.
        precision_recall: (m, 2) pooled recall and precision; None where there is no curve.
        dice_curve: (m, 3) threshold, pooled Dice and mean Dice over the cases with lesions; None without lesions.
    """

    cases: Mapping[str, CaseDetection]
    region: str
    min_overlap: float
    means: Mapping[str, Interval]
    pooled: Mapping[str, float]
    shared_threshold: float
    lesions: Lesions
    lesion_means: Mapping[str, Interval]
    healthy: Mapping[str, Interval]
    scan_auroc: float
    n_scan_scores: tuple[int, int]
    roc: NDArray[np.float64] | None
    precision_recall: NDArray[np.float64] | None
    dice_curve: NDArray[np.float64] | None

    @property
    def n_counted(self) -> int:
        """Voxels of all cases that count."""
        return sum(case.n_counted for case in self.cases.values())

    @property
    def n_left_out(self) -> int:
        """Voxels of all cases that do not count."""
        return sum(case.n_left_out for case in self.cases.values())

    @property
    def rule(self) -> str:
        """When a lesion counts as detected, in words."""
        return (
            f"A lesion is a connected part of the reference (voxels that touch at a corner are connected); it is "
            f"detected if at least {100 * self.min_overlap:g} % of its voxels are predicted. A connected part of the "
            f"prediction without any voxel of a lesion is a false positive."
        )


def summarise_detection(
    measured: Mapping[str, tuple[CaseDetection, ScoredVoxels]], *, region: str, min_overlap: float, seed: int = 0
) -> Detection:
    """Pool and average the cases.

    Args:
        measured: case name -> its numbers and scores, at least one; the scores are not kept.
        region: which voxels count, as the end of a sentence.
        min_overlap: the share that `Lesions.of` was given.
        seed: seed of the bootstrap.
    """
    voxels = ScoredVoxels.pooled([scored for _, scored in measured.values()])
    curve = Curve.of(voxels)
    shared_dice, threshold = curve.best_dice()
    cases = {
        # Without a threshold no voxel of any lesion counts, and 0 is the best for all.
        name: replace(case, shared_dice=case.best_dice if math.isnan(threshold) else float(scored.dice(threshold)))
        for name, (case, scored) in sorted(measured.items())
    }
    every = list(cases.values())
    ill, healthy = [case for case in every if case.has_lesion], [case for case in every if not case.has_lesion]

    def means(
        of: Mapping[str, Callable[[CaseDetection], float]], where: Sequence[CaseDetection]
    ) -> dict[str, Interval]:
        return {name: mean_interval([value(case) for case in where], seed=seed) for name, value in of.items()}

    voxel_means = {
        "AUROC": lambda case: case.auroc,
        "AUPRC": lambda case: case.auprc,
        "Dice": lambda case: case.overlap.dice,
        "shared_Dice": lambda case: case.shared_dice,
        "best_Dice": lambda case: case.best_dice,
    }
    scan_scores = [
        np.sort([case.scan_score for case in group if not math.isnan(case.scan_score)]) for group in (ill, healthy)
    ]
    return Detection(
        cases=cases,
        region=region,
        min_overlap=min_overlap,
        means=means(voxel_means, ill),
        pooled={
            "AUROC": curve.auroc,
            "AUPRC": curve.average_precision,
            "Dice": ratio(2 * sum(c.overlap.tp for c in every), sum(c.overlap.n_pred + c.overlap.n_ref for c in every)),
            "shared_Dice": shared_dice,
            "prevalence": ratio(curve.n_positive, curve.n_positive + curve.n_negative),
            "recall": ratio(sum(c.tp for c in every), curve.n_positive),
            "precision": ratio(sum(c.tp for c in every), sum(c.tp + c.fp for c in every)),
            "false_positive_rate": ratio(sum(c.fp for c in every), curve.n_negative),
        },
        shared_threshold=threshold,
        lesions=Lesions.pooled([case.lesions for case in every]),
        lesion_means={
            **means({"sensitivity": lambda case: case.lesions.sensitivity}, ill),
            **means({"precision": lambda case: case.lesions.precision}, every),
            **means({"false_positives": lambda case: float(case.lesions.n_false)}, every),
        },
        healthy=means(
            {
                "components": lambda case: float(case.lesions.n_predicted),
                "voxels": lambda case: float(case.overlap.n_pred),
                "ml": lambda case: case.overlap.n_pred * case.voxel_ml,
                "share": lambda case: case.false_positive_rate,
            },
            healthy,
        ),
        scan_auroc=Curve.of(ScoredVoxels(scan_scores[0], scan_scores[1])).auroc,
        n_scan_scores=(scan_scores[0].size, scan_scores[1].size),
        roc=curve.roc_points() if curve.n_positive and curve.n_negative else None,
        precision_recall=curve.precision_recall_points() if curve.n_positive else None,
        dice_curve=_dice_curve(
            voxels, [measured[name][1] for name, case in cases.items() if case.has_lesion], threshold
        ),
    )


def _dice_curve(voxels: ScoredVoxels, cases: Sequence[ScoredVoxels], threshold: float) -> NDArray[np.float64] | None:
    """Dice at thresholds from below every score to the highest score of a lesion, above which it is 0."""
    if not voxels.positive.size:
        return None
    low = min(float(array[0]) for array in (voxels.positive, voxels.negative) if array.size)
    high = float(voxels.positive[-1])
    margin = 0.01 * (high - low or 1.0)
    grid = np.sort(np.append(np.linspace(low - margin, high + margin, _GRID), threshold))
    return np.stack([grid, voxels.dice(grid), np.mean([case.dice(grid) for case in cases], axis=0)], axis=1)


def ratio(part: float, whole: float) -> float:
    """A share; NaN of nothing."""
    return part / whole if whole else math.nan

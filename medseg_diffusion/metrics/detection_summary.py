"""Detection of lesions by score maps, summarised over cases: means with intervals, pooled numbers and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .detection import Curve, Lesions, ScoredVoxels, ratio
from .overlap import ClassOverlap
from .statistics import Interval, mean_interval

_THRESHOLDS = 400


@dataclass(frozen=True, eq=False)
class CaseDetection:
    """The detection numbers of one case. A number that does not exist is NaN, such as the AUROC without a lesion.

    Attributes:
        n_counted: voxels whose scores count.
        n_left_out: voxels whose scores do not count.
        n_positive: voxels of the reference that count.
        voxel_ml: volume of a voxel in ml.
        auroc: area under the ROC curve of the scores.
        auprc: area under their precision-recall curve (average precision).
        best_dice: the largest Dice that any threshold reaches on this case; optimistic.
        best_threshold: the threshold that reaches it.
        overlap: the predicted mask against the reference, over all voxels.
        tp: predicted voxels of the reference that count.
        fp: predicted voxels outside the reference that count.
        lesions: connected components of the reference and of the prediction, over all voxels.
        scan_score: the score of the whole scan; NaN where there is none.
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
        return ratio(self.fp, self.n_counted - self.n_positive)


@dataclass(frozen=True, eq=False)
class Detection:
    """The detection numbers of all cases.

    Means are over cases, and each case counts once. Pooled numbers are over the voxels or lesions of all cases.

    Attributes:
        cases: case name -> its numbers, by name.
        region: which voxels count, as the end of a sentence.
        min_overlap: share of a lesion's voxels that must be predicted for it to be detected.
        means: AUROC, AUPRC, Dice, shared_Dice and best_Dice over the cases with lesions.
        pooled: AUROC, AUPRC, Dice and shared_Dice; also prevalence, recall, precision and false_positive_rate of the
            predicted masks on the voxels that count.
        shared_threshold: the one threshold of the largest pooled Dice; optimistic.
        lesions: the lesions of all cases.
        lesion_means: sensitivity over the cases with lesions, precision over the cases with predictions, and
            false_positives over all cases.
        healthy: what is predicted in a case without lesions: components, voxels, ml, and the share of the voxels that
            count.
        scan_auroc: AUROC of the scores of whole scans, with lesions against without; NaN where it does not exist.
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
    def n_with_lesions(self) -> int:
        """Cases whose reference has a lesion."""
        return sum(case.has_lesion for case in self.cases.values())

    @property
    def n_without_lesions(self) -> int:
        """Cases whose reference is empty."""
        return len(self.cases) - self.n_with_lesions

    @property
    def n_true_negatives(self) -> int:
        """Cases without lesions in which nothing is predicted."""
        return sum(not case.has_lesion and not case.overlap.n_pred for case in self.cases.values())

    def key_numbers(self) -> dict[str, float]:
        """The most important numbers under flat names, means with the ends of their intervals; NaN if missing."""
        intervals = {
            "auroc": self.means["AUROC"],
            "auprc": self.means["AUPRC"],
            "optimistic_dice_shared_threshold": self.means["shared_Dice"],
            "optimistic_dice_own_threshold": self.means["best_Dice"],
            "false_positives_per_scan": self.lesion_means["false_positives"],
            "false_positives_per_healthy_scan": self.healthy["components"],
        }
        numbers = {
            name: value
            for key, interval in intervals.items()
            for name, value in ((key, interval.mean), (f"{key}_low", interval.low), (f"{key}_high", interval.high))
        }
        return {
            **numbers,
            "pooled_auroc": self.pooled["AUROC"],
            "pooled_auprc": self.pooled["AUPRC"],
            "lesion_sensitivity": self.lesions.sensitivity,
            "lesion_precision": self.lesions.precision,
            "scan_auroc": self.scan_auroc,
        }


_Measures = Mapping[str, Callable[[CaseDetection], float]]

_VOXEL_MEASURES: _Measures = {
    "AUROC": lambda case: case.auroc,
    "AUPRC": lambda case: case.auprc,
    "Dice": lambda case: case.overlap.dice,
    "shared_Dice": lambda case: case.shared_dice,
    "best_Dice": lambda case: case.best_dice,
}
_HEALTHY_MEASURES: _Measures = {
    "components": lambda case: float(case.lesions.n_predicted),
    "voxels": lambda case: float(case.overlap.n_pred),
    "ml": lambda case: case.overlap.n_pred * case.voxel_ml,
    "share": lambda case: case.false_positive_rate,
}


def summarise_detection(
    measured: Mapping[str, tuple[CaseDetection, ScoredVoxels]],
    *,
    region: str,
    min_overlap: float,
    patients: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Detection:
    """Pool and average the cases.

    Args:
        measured: case name -> its numbers and its scores, at least one case. The scores are not stored in the result.
        region: which voxels count, as the end of a sentence.
        min_overlap: the share that `Lesions.of` was given.
        patients: case name -> patient of every case; None takes every case as a patient of its own.
        seed: seed of the bootstrap.
    """
    voxels = ScoredVoxels.pooled([scores for _, scores in measured.values()])
    curve = Curve.of(voxels)
    shared_dice, threshold = curve.best_dice()
    cases = {
        # Without a threshold no voxel of any lesion counts, and the best Dice is 0 in every case.
        name: replace(case, shared_dice=case.best_dice if math.isnan(threshold) else float(scores.dice(threshold)))
        for name, (case, scores) in sorted(measured.items())
    }
    every = list(cases.values())
    with_lesions = {name: case for name, case in cases.items() if case.has_lesion}
    without_lesions = {name: case for name, case in cases.items() if not case.has_lesion}

    def means(measures: _Measures, of: Mapping[str, CaseDetection]) -> dict[str, Interval]:
        groups = [patients[name] for name in of] if patients else None
        return {
            key: mean_interval([measure(case) for case in of.values()], patients=groups, seed=seed)
            for key, measure in measures.items()
        }

    scan_auroc, n_scan_scores = _scan_auroc(with_lesions.values(), without_lesions.values())
    return Detection(
        cases=cases,
        region=region,
        min_overlap=min_overlap,
        means=means(_VOXEL_MEASURES, with_lesions),
        pooled=_pooled(every, curve, shared_dice),
        shared_threshold=threshold,
        lesions=Lesions.pooled([case.lesions for case in every]),
        lesion_means={
            **means({"sensitivity": lambda case: case.lesions.sensitivity}, with_lesions),
            **means({"precision": lambda case: case.lesions.precision}, cases),
            **means({"false_positives": lambda case: float(case.lesions.n_false)}, cases),
        },
        healthy=means(_HEALTHY_MEASURES, without_lesions),
        scan_auroc=scan_auroc,
        n_scan_scores=n_scan_scores,
        roc=curve.roc_points() if curve.n_positive and curve.n_negative else None,
        precision_recall=curve.precision_recall_points() if curve.n_positive else None,
        dice_curve=_dice_curve(
            voxels, [measured[name][1] for name, case in cases.items() if case.has_lesion], threshold
        ),
    )


def _pooled(cases: Sequence[CaseDetection], curve: Curve, shared_dice: float) -> dict[str, float]:
    """Numbers over the voxels of all cases together."""
    tp, fp = sum(case.tp for case in cases), sum(case.fp for case in cases)
    overlaps = [case.overlap for case in cases]
    return {
        "AUROC": curve.auroc,
        "AUPRC": curve.average_precision,
        "Dice": ratio(2 * sum(one.tp for one in overlaps), sum(one.n_pred + one.n_ref for one in overlaps)),
        "shared_Dice": shared_dice,
        "prevalence": ratio(curve.n_positive, curve.n_positive + curve.n_negative),
        "recall": ratio(tp, curve.n_positive),
        "precision": ratio(tp, tp + fp),
        "false_positive_rate": ratio(fp, curve.n_negative),
    }


def _scan_auroc(
    with_lesions: Iterable[CaseDetection], without_lesions: Iterable[CaseDetection]
) -> tuple[float, tuple[int, int]]:
    """AUROC of the scores of whole scans, and how many scans of each group have a score."""
    positive, negative = (
        np.sort([case.scan_score for case in group if not math.isnan(case.scan_score)])
        for group in (with_lesions, without_lesions)
    )
    return Curve.of(ScoredVoxels(positive, negative)).auroc, (positive.size, negative.size)


def _dice_curve(
    voxels: ScoredVoxels, cases_with_lesions: Sequence[ScoredVoxels], threshold: float
) -> NDArray[np.float64] | None:
    """Dice at thresholds from below every score to the highest score of a lesion, above which it is 0."""
    if not voxels.positive.size:
        return None
    low = min(float(array[0]) for array in (voxels.positive, voxels.negative) if array.size)
    high = float(voxels.positive[-1])
    margin = 0.01 * (high - low or 1.0)
    thresholds = np.sort(np.append(np.linspace(low - margin, high + margin, _THRESHOLDS), threshold))
    mean_dice = np.mean([case.dice(thresholds) for case in cases_with_lesions], axis=0)
    return np.stack([thresholds, voxels.dice(thresholds), mean_dice], axis=1)

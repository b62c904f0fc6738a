"""Detection by scores and masks: exact ROC and precision-recall numbers, the best Dice, and detection of lesions.

A voxel is predicted if its score is strictly above the threshold. All numbers of scores follow from two sorted arrays,
without binning: the scores of the reference's voxels, and the scores of all other voxels. As the threshold falls, Dice
and precision rise only where it reaches another voxel of the reference. The distinct scores of the reference's voxels
are therefore the only thresholds that have to be tried.

torchmetrics has the areas under the two curves, and the tests compare them. It is not used here: on a scan of 9 million
voxels it takes 40 times as long and 6 times the memory, it has no best Dice, and it sends scores outside of [0, 1]
through a sigmoid, in which high scores become equal (average precision 0.34 instead of 0.38).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE_BOUNDS_ML = (0.1, 1.0, 10.0)
"""Bounds between the size groups of lesions, in ml; a lesion of exactly this size belongs to the larger group."""
MIN_OVERLAP = 0.1
"""A lesion counts as detected if at least this share of its voxels is predicted."""


def ratio(part: float, whole: float) -> float:
    """``part`` / ``whole``; NaN if ``whole`` is 0."""
    return part / whole if whole else math.nan


@dataclass(frozen=True, eq=False)
class ScoredVoxels:
    """The scores of the voxels that count, of one case or of several pooled; 4 bytes a voxel in float32.

    Attributes:
        positive: (P,) scores of the voxels of the reference, ascending.
        negative: (N,) scores of all other voxels, ascending.
        n_outside: voxels of the reference that do not count. No threshold finds them, so they are false negatives of
            the Dice. They enter no other number.
    """

    positive: NDArray[np.floating]
    negative: NDArray[np.floating]
    n_outside: int = 0

    @classmethod
    def of(
        cls, scores: NDArray[np.floating], reference: NDArray[np.bool_], counted: NDArray[np.bool_] | None = None
    ) -> ScoredVoxels:
        """Sort the scores (*S) by a reference mask (*S).

        Args:
            scores: finite, or NaN where a voxel does not count.
            reference: the mask to be detected.
            counted: (*S) the voxels that count, by default all.

        Raises:
            ValueError: shapes that differ, or an infinite score.
        """
        shapes = [array.shape for array in (scores, reference, counted) if array is not None]
        if len(set(shapes)) > 1:
            raise ValueError(f"scores, reference and counted voxels have shapes {shapes}; they must be the same grid")
        if np.isinf(scores).any():
            raise ValueError("scores hold an infinity; expected finite numbers, or NaN where a voxel does not count")
        counts = ~np.isnan(scores)
        if counted is not None:
            counts &= counted
        positive = np.sort(scores[counts & reference])
        return cls(positive, np.sort(scores[counts & ~reference]), int(np.count_nonzero(reference)) - positive.size)

    @classmethod
    def pooled(cls, cases: Sequence[ScoredVoxels]) -> ScoredVoxels:
        """The voxels of all cases together; at least one case."""
        positive = np.concatenate([case.positive for case in cases])
        negative = np.concatenate([case.negative for case in cases])
        # Sorted in place: at 100 million voxels a copy would take too much memory.
        positive.sort()
        negative.sort()
        return cls(positive, negative, sum(case.n_outside for case in cases))

    def dice(self, thresholds: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """Dice of the mask score > threshold, for an array of thresholds of any shape; NaN without reference voxels.

        Thresholds are rounded to the precision of the scores.
        """
        tp, fp = (
            # Thresholds of another type than the array would make numpy convert the whole array.
            array.size - np.searchsorted(array, np.asarray(thresholds, dtype=array.dtype), side="right")
            for array in (self.positive, self.negative)
        )
        total = self.positive.size + self.n_outside
        return 2 * tp / (total + tp + fp) if total else np.full(np.shape(thresholds), math.nan)


@dataclass(frozen=True, eq=False)
class Curve:
    """Counts of voxels at each distinct score of the reference's voxels, from the highest score down.

    Attributes:
        scores: (k,) the scores, descending.
        tp: (k,) voxels of the reference with at least this score.
        fp: (k,) other voxels with at least this score.
        ties: (k,) other voxels with exactly this score.
        n_positive: voxels of the reference that count.
        n_negative: other voxels that count.
        n_outside: voxels of the reference that do not count.
    """

    scores: NDArray[np.floating]
    tp: NDArray[np.int64]
    fp: NDArray[np.int64]
    ties: NDArray[np.int64]
    n_positive: int
    n_negative: int
    n_outside: int

    @classmethod
    def of(cls, voxels: ScoredVoxels) -> Curve:
        """Count the voxels at each threshold."""
        positive, negative = voxels.positive, voxels.negative
        scores, counts = np.unique(positive, return_counts=True)
        lower, upper = (np.asarray(np.searchsorted(negative, scores, side=side)) for side in ("left", "right"))
        return cls(
            scores[::-1],
            np.cumsum(counts[::-1]),
            negative.size - lower[::-1],
            (upper - lower)[::-1],
            positive.size,
            negative.size,
            voxels.n_outside,
        )

    @property
    def auroc(self) -> float:
        """Area under the ROC curve (Hanley and McNeil, Radiology 1982).

        This is the probability that a voxel of the reference has a higher score than another voxel, where equal scores
        count half: 0.5 for a constant score. NaN if there are no voxels of the reference, or no others.
        """
        if not (self.n_positive and self.n_negative):
            return math.nan
        # Integers up to the division: twice the number of pairs in the right order.
        ordered_pairs = int(self._gained @ (2 * (self.n_negative - self.fp) + self.ties))
        return ordered_pairs / (2 * self.n_positive * self.n_negative)

    @property
    def average_precision(self) -> float:
        """Area under the precision-recall curve as steps: sum of (recall_k - recall_(k-1)) precision_k.

        For a constant score it is the share of reference voxels; without reference voxels it is NaN. The points are not
        interpolated linearly, which would overestimate the area (Davis and Goadrich, ICML 2006).
        """
        if not self.n_positive:
            return math.nan
        return float(self._gained @ (self.tp / (self.tp + self.fp)) / self.n_positive)

    def best_dice(self) -> tuple[float, float]:
        """The largest Dice that any threshold reaches, and the highest threshold that reaches it.

        This is optimistic, because the threshold is chosen with the reference. Without reference voxels both are NaN.
        If none of the reference voxels counts, the Dice is 0 and the threshold NaN.
        """
        if not self.n_positive:
            return (0.0 if self.n_outside else math.nan), math.nan
        dice = 2 * self.tp / (self.n_positive + self.n_outside + self.tp + self.fp)
        best = int(dice.argmax())
        # The threshold lies just below this score, so that the voxels with this score are predicted.
        return float(dice[best]), float(np.nextafter(self.scores[best], -np.inf, dtype=self.scores.dtype))

    def roc_points(self, count: int = 500) -> NDArray[np.float64]:
        """Points of the ROC curve for a plot: (m, 2) false positive rate and recall, from (0, 0) to (1, 1).

        There are at most ``4 * count + 2`` points.

        Raises:
            ValueError: there are no voxels of the reference, or no others.
        """
        if not (self.n_positive and self.n_negative):
            raise ValueError(f"no ROC curve of {self.n_positive} positive and {self.n_negative} negative voxels")
        chosen = self._chosen(count)
        # Where scores tie, the curve is a straight slope, which also needs the point before the tie.
        before = np.stack([self.fp - self.ties, self.tp - self._gained], axis=1)[chosen]
        after = np.stack([self.fp, self.tp], axis=1)[chosen]
        points = np.stack([before, after], axis=1).reshape(-1, 2)
        ends = [[0, 0]], [[self.n_negative, self.n_positive]]
        return np.concatenate([ends[0], points, ends[1]]) / [self.n_negative, self.n_positive]

    def precision_recall_points(self, count: int = 500) -> NDArray[np.float64]:
        """Points of the precision-recall curve for a plot of steps: (m, 2) recall, ascending from 0, and precision.

        There are at most ``2 * count + 1`` points. Each precision holds from the previous recall to its own, as in
        `average_precision`.

        Raises:
            ValueError: no reference voxel counts.
        """
        if not self.n_positive:
            raise ValueError("no precision-recall curve without a positive voxel")
        chosen = self._chosen(count)
        tp, fp = self.tp[chosen], self.fp[chosen]
        recall, precision = tp / self.n_positive, tp / (tp + fp)
        return np.stack([np.insert(recall, 0, 0), np.insert(precision, 0, precision[0])], axis=1)

    @property
    def _gained(self) -> NDArray[np.int64]:
        """(k,) reference voxels with exactly this score."""
        return np.diff(self.tp, prepend=0)

    def _chosen(self, count: int) -> NDArray[np.intp]:
        """Indices of the points to draw, evenly spread over the true and over the false positives."""
        steps = np.linspace(0, 1, count)
        rows = [np.searchsorted(counts, steps * counts[-1]) for counts in (self.tp, self.fp)]
        return np.unique(np.concatenate(rows))


class SizeGroup(NamedTuple):
    """The lesions of one range of sizes: how many there are, and how many are detected."""

    n: int
    n_detected: int

    @property
    def sensitivity(self) -> float:
        """Share of the lesions that are detected; NaN without any."""
        return ratio(self.n_detected, self.n)


@dataclass(frozen=True, eq=False)
class Lesions:
    """Connected components of a reference, the lesions, and of a prediction. Voxels connect across corners.

    Attributes:
        size_ml: (n,) volume of each lesion, in the order of their first voxels.
        detected: (n,) whether the lesion was detected.
        n_predicted: components of the prediction.
        n_false: components of the prediction without any voxel of the reference.
        matched_iou: (k,) IoU of each pair of a lesion and a component of the prediction with an IoU above 0.5. No
            lesion and no component is in two such pairs (Kirillov et al., "Panoptic segmentation", CVPR 2019).
    """

    size_ml: NDArray[np.float64]
    detected: NDArray[np.bool_]
    n_predicted: int
    n_false: int
    matched_iou: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        prediction: NDArray[np.bool_],
        reference: NDArray[np.bool_],
        spacing_mm: Sequence[float],
        min_overlap: float = MIN_OVERLAP,
    ) -> Lesions:
        """Compare two masks (*S). Components are 26-connected in 3D and 8-connected in 2D.

        Args:
            prediction: the predicted mask.
            reference: the mask to be detected.
            spacing_mm: voxel size along each axis.
            min_overlap: share of a lesion's voxels in (0, 1] that must be predicted for it to be detected.

        Raises:
            ValueError: shapes that differ, or a share outside (0, 1].
        """
        if prediction.shape != reference.shape:
            raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} are not of one grid")
        if not 0 < min_overlap <= 1:
            raise ValueError(f"min_overlap is {min_overlap}; it must lie above 0 and not above 1")
        # Imported where used: reports on segmented scans load this module for its types alone.
        from scipy import ndimage

        structure = np.ones((3,) * reference.ndim, bool)
        lesions, count = ndimage.label(reference, structure)
        components, n_predicted = ndimage.label(prediction, structure)
        both = prediction & reference
        # Labels from 0 on.
        size = np.bincount(lesions[reference] - 1, minlength=count)
        size_of_component = np.bincount(components[prediction] - 1, minlength=n_predicted)
        pairs, shared = np.unique(
            (lesions[both] - 1).astype(np.int64) * n_predicted + components[both] - 1, return_counts=True
        )
        lesion, component = np.divmod(pairs, max(n_predicted, 1))
        iou = shared / (size[lesion] + size_of_component[component] - shared)
        return cls(
            size * math.prod(spacing_mm) / 1000,
            # A division, because 0.07 * 100 is more than 7 in floating point.
            np.bincount(lesion, shared, minlength=count) / size >= min_overlap,
            n_predicted,
            n_predicted - np.unique(component).size,
            iou[iou > 0.5],
        )

    @property
    def n(self) -> int:
        """Number of lesions."""
        return self.size_ml.size

    @property
    def n_detected(self) -> int:
        """Number of detected lesions."""
        return int(self.detected.sum())

    @property
    def sensitivity(self) -> float:
        """Share of the lesions that are detected; NaN without any."""
        return float(self.detected.mean()) if self.detected.size else math.nan

    @property
    def precision(self) -> float:
        """Share of predicted components that have a voxel of the reference; NaN without any predicted component."""
        return 1 - self.n_false / self.n_predicted if self.n_predicted else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and sensitivity; 0 if one of them is 0 or missing, NaN if both are missing."""
        if not (self.n or self.n_predicted):
            return math.nan
        total = self.precision + self.sensitivity
        return 2 * self.precision * self.sensitivity / total if total > 0 else 0.0

    @property
    def recognition_quality(self) -> float:
        """F1 of the pairs of `matched_iou`; NaN without any lesion and component."""
        return ratio(2 * self.matched_iou.size, self.n + self.n_predicted)

    @property
    def segmentation_quality(self) -> float:
        """Mean of `matched_iou`; NaN without any pair."""
        return float(self.matched_iou.mean()) if self.matched_iou.size else math.nan

    @property
    def panoptic_quality(self) -> float:
        """Recognition quality times segmentation quality; NaN without any lesion and component."""
        return ratio(2 * float(self.matched_iou.sum()), self.n + self.n_predicted)

    @classmethod
    def pooled(cls, cases: Sequence[Lesions]) -> Lesions:
        """The lesions of all cases; at least one case."""
        return cls(
            np.concatenate([case.size_ml for case in cases]),
            np.concatenate([case.detected for case in cases]),
            sum(case.n_predicted for case in cases),
            sum(case.n_false for case in cases),
            np.concatenate([case.matched_iou for case in cases]),
        )

    def by_size(self, bounds_ml: Sequence[float] = SIZE_BOUNDS_ML) -> list[SizeGroup]:
        """The lesions below the first bound, between the bounds, and from the last bound up."""
        # Files hold voxel sizes in float32, so that a volume on a bound may be rounded to just below it.
        group = np.digitize(self.size_ml * (1 + 1e-6), bounds_ml)
        members = [group == i for i in range(len(bounds_ml) + 1)]
        return [SizeGroup(int(inside.sum()), int((self.detected & inside).sum())) for inside in members]

"""How well scores and masks find something: exact ROC and precision-recall numbers, the best Dice, lesions one by one.

A voxel is predicted where its score is above the threshold, strictly. All numbers of scores follow, without binning,
from two sorted arrays: the scores of the reference's voxels and those of the other voxels. Going down from the highest
score, a Dice or a precision can be largest only where another voxel of the reference is found, so that the distinct
scores of the reference's voxels are the only thresholds to be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE_BOUNDS_ML = (0.1, 1.0, 10.0)
"""Where one size of lesions ends and the next begins, in ml; a lesion of exactly this size belongs to the larger."""
MIN_OVERLAP = 0.1
"""A lesion counts as detected if at least this share of its voxels is predicted."""


@dataclass(frozen=True, eq=False)
class ScoredVoxels:
    """The scores of the voxels that count, in one case or in several together; 4 bytes a voxel in float32.

    Attributes:
        positive: (P,) scores of the voxels of the reference, ascending.
        negative: (N,) scores of all other voxels, ascending.
        n_outside: voxels of the reference that do not count. No threshold finds them: they lower the Dice, as they do
            that of a mask, and enter nothing else.
    """

    positive: NDArray[np.floating]
    negative: NDArray[np.floating]
    n_outside: int = 0

    @classmethod
    def of(
        cls, scores: NDArray[np.floating], reference: NDArray[np.bool_], counted: NDArray[np.bool_] | None = None
    ) -> ScoredVoxels:
        """Of scores (*S) and a reference mask (*S).

        Args:
            scores: finite, or NaN where a voxel does not count.
            reference: the mask that should be found.
            counted: the voxels that count, by default all.

        Raises:
            ValueError: shapes that differ, or an infinite score.
        """
        shapes = [array.shape for array in (scores, reference, counted) if array is not None]
        if len(set(shapes)) > 1:
            raise ValueError(f"scores, reference and counted voxels have shapes {shapes}; they must be the same grid")
        if np.isinf(scores).any():
            raise ValueError("scores hold an infinity; expected finite numbers, or NaN where a voxel does not count")
        known = ~np.isnan(scores)
        if counted is not None:
            known &= counted
        positive = np.sort(scores[known & reference])
        return cls(positive, np.sort(scores[known & ~reference]), int(np.count_nonzero(reference)) - positive.size)

    @classmethod
    def pooled(cls, cases: Sequence[ScoredVoxels]) -> ScoredVoxels:
        """All voxels of all cases, of which there must be one."""
        positive = np.concatenate([case.positive for case in cases])
        negative = np.concatenate([case.negative for case in cases])
        # In place: 100 million voxels are sorted in seconds, but another copy of them is not free.
        positive.sort()
        negative.sort()
        return cls(positive, negative, sum(case.n_outside for case in cases))

    def dice(self, thresholds: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """The Dice of score > threshold for each threshold, of the same shape; NaN without any reference voxel.

        Thresholds are rounded to the precision of the scores.
        """
        tp, fp = (
            # Of another type than the array, they would have numpy convert all of the array.
            array.size - np.searchsorted(array, np.asarray(thresholds, dtype=array.dtype), side="right")
            for array in (self.positive, self.negative)
        )
        total = self.positive.size + self.n_outside
        return 2 * tp / (total + tp + fp) if total else np.full(np.shape(thresholds), math.nan)


@dataclass(frozen=True, eq=False)
class Curve:
    """Counts at each distinct score of the reference's voxels, from the highest down.

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
        """Of the voxels that count."""
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
        """Chance that a voxel of the reference has a higher score than another voxel, equal scores counting half.

        The area under the ROC curve (Hanley and McNeil, Radiology 1982); 0.5 for a constant score, NaN where either
        kind of voxel is missing.
        """
        if not (self.n_positive and self.n_negative):
            return math.nan
        # Whole numbers up to the division: twice the pairs that are in the right order.
        won = int(self._gained @ (2 * (self.n_negative - self.fp) + self.ties))
        return won / (2 * self.n_positive * self.n_negative)

    @property
    def average_precision(self) -> float:
        """Area under the precision-recall curve as steps: sum of (recall_k - recall_(k-1)) precision_k.

        The share of reference voxels for a constant score; NaN without any. Not interpolated: straight lines between
        the points would be too good (Davis and Goadrich, ICML 2006).
        """
        if not self.n_positive:
            return math.nan
        return float(self._gained @ (self.tp / (self.tp + self.fp)) / self.n_positive)

    def best_dice(self) -> tuple[float, float]:
        """The largest Dice that any threshold reaches, and that threshold (the highest such).

        Optimistic: it is chosen with the reference. The Dice is NaN without any reference voxel, and 0 with the
        threshold NaN where none of them counts.
        """
        if not self.n_positive:
            return (0.0 if self.n_outside else math.nan), math.nan
        dice = 2 * self.tp / (self.n_positive + self.n_outside + self.tp + self.fp)
        best = int(dice.argmax())
        # The voxels with this score must be above the threshold.
        return float(dice[best]), float(np.nextafter(self.scores[best], -np.inf, dtype=self.scores.dtype))

    def roc_points(self, count: int = 500) -> NDArray[np.float64]:
        """(m, 2) false positive rate and recall from (0, 0) to (1, 1), at most ``4 * count + 2`` points, to be drawn.

        Raises:
            ValueError: one of the kinds of voxels is missing.
        """
        if not (self.n_positive and self.n_negative):
            raise ValueError(f"no ROC curve of {self.n_positive} positive and {self.n_negative} negative voxels")
        chosen = self._chosen(count)
        # Where scores tie, the curve is a straight slope: it needs the point before the tie, too.
        before = np.stack([self.fp - self.ties, self.tp - self._gained], axis=1)[chosen]
        after = np.stack([self.fp, self.tp], axis=1)[chosen]
        points = np.stack([before, after], axis=1).reshape(-1, 2)
        ends = [[0, 0]], [[self.n_negative, self.n_positive]]
        return np.concatenate([ends[0], points, ends[1]]) / [self.n_negative, self.n_positive]

    def precision_recall_points(self, count: int = 500) -> NDArray[np.float64]:
        """(m, 2) recall from 0 up and precision, at most ``2 * count + 1`` points, to be drawn as steps.

        A precision holds from the point before up to its own recall, as in `average_precision`.

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
        """Rows that outline the curves: evenly spread over the true and over the false positives."""
        steps = np.linspace(0, 1, count)
        rows = [np.searchsorted(found, steps * found[-1]) for found in (self.tp, self.fp)]
        return np.unique(np.concatenate(rows))


@dataclass(frozen=True, eq=False)
class Lesions:
    """The connected parts of a reference and of a prediction; voxels that touch at a corner are connected.

    Attributes:
        size_ml: (n,) volume of each part of the reference, in the order of their first voxels.
        detected: (n,) whether it was found.
        n_predicted: connected parts of the prediction.
        n_false: those among them without any voxel of the reference.
    """

    size_ml: NDArray[np.float64]
    detected: NDArray[np.bool_]
    n_predicted: int
    n_false: int

    @classmethod
    def of(
        cls,
        prediction: NDArray[np.bool_],
        reference: NDArray[np.bool_],
        spacing_mm: Sequence[float],
        min_overlap: float = MIN_OVERLAP,
    ) -> Lesions:
        """Of two masks (*S): in 3D voxels have 26 neighbours, in 2D 8.

        Args:
            prediction: the predicted mask.
            reference: the mask that should be found.
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
        parts, n_predicted = ndimage.label(prediction, structure)
        both = prediction & reference
        size = np.bincount(lesions[reference], minlength=count + 1)[1:]
        found = np.bincount(lesions[both], minlength=count + 1)[1:]
        return cls(
            size * math.prod(spacing_mm) / 1000,
            # Divided, not multiplied: 0.07 * 100 is more than 7.
            found / size >= min_overlap,
            n_predicted,
            n_predicted - np.unique(parts[both]).size,
        )

    @property
    def sensitivity(self) -> float:
        """Share of lesions that were detected; NaN without any."""
        return float(self.detected.mean()) if self.detected.size else math.nan

    @property
    def precision(self) -> float:
        """Share of predicted parts that have a voxel of the reference; NaN without any predicted part."""
        return 1 - self.n_false / self.n_predicted if self.n_predicted else math.nan

    @classmethod
    def pooled(cls, cases: Sequence[Lesions]) -> Lesions:
        """The lesions of all cases, of which there must be one."""
        return cls(
            np.concatenate([case.size_ml for case in cases]),
            np.concatenate([case.detected for case in cases]),
            sum(case.n_predicted for case in cases),
            sum(case.n_false for case in cases),
        )

    def by_size(self, bounds_ml: Sequence[float] = SIZE_BOUNDS_ML) -> list[tuple[int, int]]:
        """(lesions, detected lesions) below the first bound, between the bounds, and from the last bound up."""
        # Files hold voxel sizes in float32: what should lie on a bound may lie a rounding below it.
        place = np.digitize(self.size_ml * (1 + 1e-6), bounds_ml)
        return [(int((place == i).sum()), int((self.detected & (place == i)).sum())) for i in range(len(bounds_ml) + 1)]

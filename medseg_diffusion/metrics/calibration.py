"""Whether probabilities mean what they say: reliability, expected calibration error, Brier score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15
REGION_VOXELS = 3
"""How far around the reference the region reaches in which calibration is judged."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against accuracy of voxels, in bins of equal width; cases add up.

    A voxel's confidence is the probability of its largest class, and it is correct if that is the reference's class
    (Guo et al. 2017, "On calibration of modern neural networks").

    Attributes:
        count: (BINS,) voxels in each bin; the bins divide (0, 1].
        confidence: (BINS,) sum of their confidences.
        correct: (BINS,) how many are correct.
        brier: sum over voxels of sum_k (p_k - [reference = k])^2.
    """

    count: NDArray[np.float64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.float64]
    brier: float

    @classmethod
    def of(
        cls, probabilities: NDArray[np.floating], labels: NDArray[np.integer], region: NDArray[np.bool_] | None = None
    ) -> Reliability:
        """Of probabilities (K, *S) and reference labels (*S) in 0..K-1, in ``region`` (*S), by default everywhere.

        Raises:
            ValueError: shapes that do not fit, or a label without a probability.
        """
        if probabilities.shape[1:] != labels.shape:
            raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape} are not of one grid")
        inside = np.ones(labels.shape, bool) if region is None else region
        p, truth = probabilities[:, inside].astype(np.float64), labels[inside].astype(np.int64)
        if truth.size and not 0 <= truth.min() <= truth.max() < len(p):
            raise ValueError(f"labels from {truth.min()} to {truth.max()}, but probabilities of {len(p)} classes")
        confidence, guess = p.max(0, initial=0), p.argmax(0)
        # Bins are open below and closed above, as in the definition.
        place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        true_p = np.take_along_axis(p, truth[None], 0)[0]
        return cls(
            np.bincount(place, minlength=BINS).astype(np.float64),
            np.bincount(place, confidence, BINS).astype(np.float64),
            np.bincount(place, guess == truth, BINS).astype(np.float64),
            float(((p**2).sum(0) - 2 * true_p + 1).sum()),
        )

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.count + other.count,
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.brier + other.brier,
        )

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over voxels of |accuracy - confidence| of their bin; NaN without voxels."""
        total = float(self.count.sum())
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else math.nan

    @property
    def brier_score(self) -> float:
        """Mean Brier score, 0 (certain and right) to 2; NaN without voxels."""
        total = float(self.count.sum())
        return self.brier / total if total else math.nan


def region(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Where calibration is judged: the reference's foreground and `REGION_VOXELS` around it (in steps over faces).

    Everywhere else certain background is easy and would drown the rest. It depends on the reference alone, so that
    models are compared on the same voxels.
    """
    # Imported where used: reports on segmented scans load this module for its types alone.
    from scipy import ndimage

    foreground = labels > 0
    return ndimage.binary_dilation(foreground, iterations=REGION_VOXELS) if foreground.any() else foreground

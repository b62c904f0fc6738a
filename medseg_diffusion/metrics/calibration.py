"""Calibration of class probabilities: reliability diagram, expected calibration error and Brier score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15
REGION_VOXELS = 3
"""Width of the margin around the reference's foreground in which calibration is measured."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Sums of confidence and accuracy over voxels, in bins of equal width. The sums of several cases can be added.

    A voxel's confidence is the probability of its most likely class. The voxel is correct if that is its class in the
    reference (Guo et al. 2017, "On calibration of modern neural networks").

    Attributes:
        count: (BINS,) voxels in each bin; the bins divide (0, 1].
        confidence: (BINS,) sum of their confidences.
        correct: (BINS,) number of correct voxels among them.
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
        """Compare probabilities (K, *S) with reference labels (*S).

        Args:
            probabilities: in [0, 1], with a sum of 1 over the classes.
            labels: in 0..K-1.
            region: (*S) the voxels that count, by default all.

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
        bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        true_p = np.take_along_axis(p, truth[None], 0)[0]
        return cls(
            np.bincount(bins, minlength=BINS).astype(np.float64),
            np.bincount(bins, confidence, BINS).astype(np.float64),
            np.bincount(bins, guess == truth, BINS).astype(np.float64),
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
        """Mean Brier score over voxels, from 0 (certain and right) to 2; NaN without voxels."""
        total = float(self.count.sum())
        return self.brier / total if total else math.nan

    def diagram(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Mean confidence, accuracy and share of the voxels of each bin, (BINS,) each.

        Confidence and accuracy are NaN in an empty bin; the share is NaN without any voxel.
        """
        with np.errstate(invalid="ignore"):
            return self.confidence / self.count, self.correct / self.count, self.count / self.count.sum()


def region(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """The voxels (*S) in which calibration is measured: the reference's foreground and a margin of `REGION_VOXELS`.

    The margin is counted in steps across faces. Background further away is easy and certain, and would dominate the
    result. The region depends on the reference alone, so that models are compared on the same voxels.
    """
    # Imported where used: reports on segmented scans load this module for its types alone.
    from scipy import ndimage

    foreground = labels > 0
    return ndimage.binary_dilation(foreground, iterations=REGION_VOXELS) if foreground.any() else foreground

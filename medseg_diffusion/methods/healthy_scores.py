"""Statistics of the final maps of healthy scans: thresholds with a known rate of false positives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 4001
"""Number of stored quantiles, evenly spaced from 0 to 1."""
LARGEST_SHARE = 0.01
"""A scan's score is the mean of this share of its foreground voxels, those with the largest values."""
MOST_VALUES = 100_000
"""Largest number of a scan's values that a calibration uses (`subsampled`)."""


@dataclass(frozen=True, eq=False)
class HealthyScores:
    """Statistics of a method's final maps in the foreground of held-out healthy scans.

    All patients have the same weight, whatever their number of voxels: a share of voxels is a mean over patients.

    Attributes:
        quantile: the nominal quantile, for example 0.975 for 2.5 % false positives.
        automatic: threshold at that quantile. If more than 1 - quantile of the voxels have this value, it is the next
            larger value.
        rate: share of healthy voxels above ``automatic``: the actual rate of false positives.
        quantiles: (`LEVELS`,) float32, values at evenly spaced quantiles.
        scan_scores: (M,) float32, the `scan_score` of each healthy scan, ascending.
        patients: number of patients.
    """

    quantile: float
    automatic: float
    rate: float
    quantiles: Tensor
    scan_scores: Tensor
    patients: int

    def threshold(self, quantile: float) -> float:
        """The threshold at another quantile, from the table."""
        values = self.quantiles
        value = values[min(int(np.ceil(quantile * (LEVELS - 1))), LEVELS - 1)]
        return float(_beyond_ties(value, values, float((values == value).float().mean()), quantile))

    def share_above(self, threshold: float) -> float:
        """The share of healthy voxels above a threshold: the expected rate of false positives, to 1 / `LEVELS`."""
        if threshold == self.automatic:
            return self.rate
        return float((self.quantiles > threshold).float().mean())

    def percentile(self, score: float) -> float:
        """The percentage of healthy scans with a lower score. Scans with the same score count one half."""
        below = float((self.scan_scores < score).float().mean())
        return 100 * (below + 0.5 * float((self.scan_scores == score).float().mean()))


def fit_scores(values: Sequence[NDArray[np.float32]], scan_scores: Sequence[float], quantile: float) -> HealthyScores:
    """Fit `HealthyScores` to final maps.

    Args:
        values: foreground values, one array for each patient.
        scan_scores: the `scan_score` of each scan.
        quantile: the nominal quantile.

    Raises:
        ValueError: no patient with any foreground.
    """
    patients = [value.ravel() for value in values if value.size]
    if not patients:
        raise ValueError("no healthy foreground to fit to")
    joined = np.concatenate(patients)
    weights = np.concatenate([np.full(len(value), 1 / (len(value) * len(patients))) for value in patients])
    order = np.argsort(joined, kind="stable")
    ordered, share = joined[order], np.cumsum(weights[order])
    levels = np.linspace(0, 1, LEVELS)
    ranks = np.minimum(np.searchsorted(share, levels - 1e-9), len(ordered) - 1)
    value = ordered[min(int(np.searchsorted(share, quantile - 1e-9)), len(ordered) - 1)]
    tied = float(weights[joined == value].sum())
    automatic = float(_beyond_ties(torch.tensor(value), torch.from_numpy(ordered), tied, quantile))
    rate = float(weights[joined > automatic].sum())
    scores = torch.tensor(sorted(scan_scores), dtype=torch.float32)
    return HealthyScores(quantile, automatic, rate, torch.from_numpy(ordered[ranks]), scores, len(patients))


def subsampled(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most `MOST_VALUES` of the values (n,), evenly spaced in ascending order.

    All quantiles, and the shares of equal values, are preserved to 1e-5. All voxels of a hundred heads would take
    gigabytes.
    """
    if values.size <= MOST_VALUES:
        return values
    ranks = (np.arange(MOST_VALUES) + 0.5) * values.size / MOST_VALUES
    sample: NDArray[np.float32] = np.sort(values, axis=None)[ranks.astype(np.int64)]
    return sample


def _beyond_ties(value: Tensor, ordered: Tensor, tied: float, quantile: float) -> Tensor:
    """``value``, or the next larger one in ``ordered`` if the share ``tied`` of this value is above 1 - quantile."""
    larger = ordered[ordered > value]
    return larger[0] if tied > 1 - quantile and len(larger) else value


def scan_score(values: NDArray[np.float32]) -> float:
    """The anomaly score of a scan: the mean of the largest hundredth of its foreground values; 0 without foreground."""
    if not values.size:
        return 0.0
    count = max(1, round(LARGEST_SHARE * values.size))
    return float(np.partition(values.ravel(), values.size - count)[-count:].mean(dtype=np.float64))

"""What the final maps of healthy scans are like: thresholds with a known rate of false positives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 4001
"""Quantiles that are kept, evenly spaced from 0 to 1."""
LARGEST_SHARE = 0.01
"""A scan's score is the mean over this share of its foreground, the voxels of largest value."""


MOST_VALUES = 100_000
"""Of a scan's healthy values so many are kept for a calibration (`kept_values`)."""


@dataclass(frozen=True, eq=False)
class HealthyScores:
    """Values of a method's final maps in the foreground of held-out healthy scans.

    Every patient weighs the same, however many voxels there are of it: a share of voxels is the mean over patients.

    Attributes:
        quantile: the nominal one, 0.975 for 2.5 % false positives.
        automatic: threshold of that quantile; where more than 1 - quantile of the voxels have that very value, the
            next larger one.
        rate: share of healthy voxels above ``automatic``: the false positives that there really were.
        quantiles: (`LEVELS`,) float32, for other quantiles.
        scan_scores: (M,) float32 of the healthy scans, ascending (`scan_score`).
        patients: number of them.
    """

    quantile: float
    automatic: float
    rate: float
    quantiles: Tensor
    scan_scores: Tensor
    patients: int

    def threshold(self, quantile: float) -> float:
        """The threshold of another quantile, from the table."""
        values = self.quantiles
        value = values[min(int(np.ceil(quantile * (LEVELS - 1))), LEVELS - 1)]
        return float(_beyond_ties(value, values, float((values == value).float().mean()), quantile))

    def percentile(self, score: float) -> float:
        """How many of 100 healthy scans have a lower score; half of those with the same one count."""
        below = float((self.scan_scores < score).float().mean())
        return 100 * (below + 0.5 * float((self.scan_scores == score).float().mean()))


def fit_scores(values: Sequence[NDArray[np.float32]], scan_scores: Sequence[float], quantile: float) -> HealthyScores:
    """Fits `HealthyScores` to the foreground values of the final maps, one array a patient.

    Raises:
        ValueError: no patient with any foreground.
    """
    known = [value.ravel() for value in values if value.size]
    if not known:
        raise ValueError("no healthy foreground to fit to")
    joined = np.concatenate(known)
    weights = np.concatenate([np.full(len(value), 1 / (len(value) * len(known))) for value in known])
    order = np.argsort(joined, kind="stable")
    ordered, share = joined[order], np.cumsum(weights[order])
    levels = np.linspace(0, 1, LEVELS)
    places = np.minimum(np.searchsorted(share, levels - 1e-9), len(ordered) - 1)
    value = ordered[min(int(np.searchsorted(share, quantile - 1e-9)), len(ordered) - 1)]
    tied = float(weights[joined == value].sum())
    automatic = float(_beyond_ties(torch.tensor(value), torch.from_numpy(ordered), tied, quantile))
    rate = float(weights[joined > automatic].sum())
    scores = torch.tensor(sorted(scan_scores), dtype=torch.float32)
    return HealthyScores(quantile, automatic, rate, torch.from_numpy(ordered[places]), scores, len(known))


def kept_values(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most `MOST_VALUES` of the values (n,), evenly spaced in their order: all quantiles to 1e-5, ties included.

    All voxels of a hundred heads would take gigabytes.
    """
    if values.size <= MOST_VALUES:
        return values
    places = (np.arange(MOST_VALUES) + 0.5) * values.size / MOST_VALUES
    found: NDArray[np.float32] = np.sort(values, axis=None)[places.astype(np.int64)]
    return found


def _beyond_ties(value: Tensor, ordered: Tensor, tied: float, quantile: float) -> Tensor:
    """``value``, or the next larger one in ``ordered`` where a share of more than 1 - quantile has this value."""
    larger = ordered[ordered > value]
    return larger[0] if tied > 1 - quantile and len(larger) else value


def scan_score(values: NDArray[np.float32]) -> float:
    """The anomaly score of a scan: the mean of the largest hundredth of its foreground values; 0 without any."""
    if not values.size:
        return 0.0
    count = max(1, round(LARGEST_SHARE * values.size))
    return float(np.partition(values.ravel(), values.size - count)[-count:].mean(dtype=np.float64))

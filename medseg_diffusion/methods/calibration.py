"""Calibration of an ensemble on validation cases: temperatures of its mean, its typical agreement, its volume errors.

A temperature T turns probabilities p into p^(1/T), normalised (Guo et al. 2017). It changes the confidence, but no
label. Voxels near the reference and all other voxels have half of the weight each. Without weights, the many distant
voxels would dominate. Without distant voxels, a temperature that calibrates borders would leave a few per cent of every
class in empty background.

The spread of the members' volumes does not show the error of a volume: members share the model's mistakes. The interval
of a volume comes from the errors on validation cases instead, by split conformal prediction (Vovk et al. 2005; Lei et
al. 2018, arXiv 1604.04173). It contains the reference's volume in 95 of 100 similar cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg_diffusion.metrics.calibration import Reliability, region

from .ensemble import FAINTEST, Ensemble, temperature_scaled

LEVEL = 0.95
"""Level of the volume intervals."""
MEMBERS = 5
"""Ensembles of 1 to 5 members have a temperature each. Larger ensembles use the last one."""
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.1, 20.0
_VOXELS = 50_000  # per case, near the reference and far from it
_Voxels = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Calibration:
    """The calibration of a model, valid for one sampler and number of steps. It is stored with the model.

    Attributes:
        sampler: name of the sampler.
        steps: denoiser calls per sample.
        temperatures: temperatures of the mean of 1, 2, ... members.
        ece: expected calibration error of the largest ensemble, before and after temperature scaling, in voxels near
            the references of the fit; None if no case has a reference.
        agreement: 5th percentile over cases of the members' mean pairwise Dice; None for a model without samples.
        cases: number of validation cases.
        volume_errors: for labels 1, 2, ..., the bound that a share ``level`` of cases does not exceed. The error is
            the absolute log ratio of the reference's volume to the volume of the ensemble mean, with one position added
            to each. Empty for a model of an older version.
        level: 0.95, or n / (n + 1) for n cases if that is lower.
    """

    sampler: str
    steps: int
    temperatures: Sequence[float]
    ece: Sequence[float | None]
    agreement: float | None
    cases: int
    volume_errors: Sequence[float] = ()
    level: float = 0.0

    def temperature(self, members: int) -> float:
        """The temperature of the mean of ``members`` members."""
        return self.temperatures[min(members, len(self.temperatures)) - 1]

    def volume_interval(self, label: int, volume: float, position: float) -> tuple[float, float]:
        """The interval that contains the reference's volume in a share ``level`` of cases similar to those of the fit.

        Args:
            label: 1 or above.
            volume: the predicted volume, in any unit.
            position: volume of one position of the model's grid, in the same unit.

        Returns:
            The ends of the interval, in the same unit.
        """
        factor = math.exp(self.volume_errors[label - 1])
        return max(0.0, (volume + position) / factor - position), (volume + position) * factor - position


class TemperatureFit:
    """Collects validation cases one after another and fits a `Calibration` to them."""

    def __init__(self, sampler: str, steps: int) -> None:
        self.sampler, self.steps = sampler, steps
        self.near: list[list[_Voxels]] = [[] for _ in range(MEMBERS)]
        self.far: list[list[_Voxels]] = [[] for _ in range(MEMBERS)]
        self.agreement: list[float] = []
        self.volumes: list[NDArray[np.float64]] = []

    def add(self, members: Tensor, labels: Tensor) -> None:
        """Add a case: probabilities (N, K, *S) of N <= `MEMBERS` members, and its reference labels (*S).

        About `_VOXELS` evenly spaced voxels are used of those near the reference (`metrics.calibration.region`), and
        about as many of the others.
        """
        truth = labels.cpu().numpy().astype(np.int64)
        inside = region(truth)
        for rows, mask in ((self.near, inside), (self.far, ~inside)):
            indices = np.flatnonzero(mask)
            indices = indices[:: max(1, len(indices) // _VOXELS)]
            for count in range(1, len(members) + 1):
                mean = members[:count].mean(0).flatten(1).cpu().numpy()[:, indices]
                rows[count - 1].append((mean.astype(np.float32), truth.ravel()[indices]))
        classes = members.shape[1]
        predicted = members.mean(0).argmax(0).cpu().numpy()
        counts = [np.bincount(one.ravel(), minlength=classes)[1:classes] + 1.0 for one in (predicted, truth)]
        self.volumes.append(np.abs(np.log(counts[1] / counts[0])))
        agreement = float(Ensemble.of(members).pairwise_dice().nanmean())
        if agreement == agreement:
            self.agreement.append(agreement)

    def result(self) -> Calibration:
        """The calibration of all cases so far; at least one is needed."""
        sizes = [rows for rows in self.near if rows]
        temperatures = [
            fit_temperature(_joined(near), _joined(far)) for near, far in zip(sizes, self.far, strict=False)
        ]
        p, truth = _joined(sizes[-1])
        ece = [Reliability.of(p, truth).ece]
        ece.append(Reliability.of(temperature_scaled(torch.from_numpy(p), temperatures[-1]).numpy(), truth).ece)
        errors, level = not_exceeded(np.stack(self.volumes), LEVEL)
        return Calibration(
            self.sampler,
            self.steps,
            [round(t, 4) for t in temperatures],
            [round(e, 5) if math.isfinite(e) else None for e in ece],
            round(float(np.percentile(self.agreement, 5)), 4) if self.agreement else None,
            len(sizes[0]),
            [round(float(error), 5) for error in errors],
            round(level, 4),
        )


def not_exceeded(errors: NDArray[np.float64], level: float) -> tuple[NDArray[np.float64], float]:
    """Bounds that a further error does not exceed with probability ``level``, if it is exchangeable with ``errors``.

    Args:
        errors: (n, ...).
        level: probability from 0 to 1. n errors allow at most n / (n + 1), the level of their maximum.

    Returns:
        The bounds (...), and the level that they have.
    """
    n = len(errors)
    rank = min(n, math.ceil(level * (n + 1)))
    return np.sort(errors, axis=0)[rank - 1], min(level, n / (n + 1))


def fit_temperature(*groups: _Voxels) -> float:
    """The temperature, from 0.1 to 20, with the lowest cross-entropy; 1 without any voxel.

    Args:
        groups: groups of voxels with the same total weight. Each has probabilities (K, V) and labels (V,).
    """
    # Imported here, because segmenting applies a calibration without fitting one.
    from scipy.optimize import minimize_scalar

    filled = [
        (torch.from_numpy(p).clamp(min=FAINTEST).log().T, torch.from_numpy(labels))
        for p, labels in groups
        if labels.size
    ]
    if not filled:
        return 1.0

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        return sum(float(torch.nn.functional.cross_entropy(logits / temperature, truth)) for logits, truth in filled)

    bounds = (np.log(_LOWEST_TEMPERATURE), np.log(_HIGHEST_TEMPERATURE))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def _joined(rows: Sequence[_Voxels]) -> _Voxels:
    return np.concatenate([p for p, _ in rows], axis=1), np.concatenate([labels for _, labels in rows])

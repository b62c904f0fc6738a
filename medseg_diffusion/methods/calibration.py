"""What an ensemble is worth, fitted on validation cases: temperatures of its mean, its usual agreement and its errors.

A temperature T turns probabilities p into p^(1/T), normalised (Guo et al. 2017): it changes no label, only how sure the
model says it is. Voxels near the reference and the rest count for one half each: the many far ones would drown the
others, and without them a T that makes borders honest would leave a few per cent of every class in empty background.

How far a volume may be off is not told by the members, which know what the model doubts but not what it does not know.
It is told by the errors on validation cases: the interval of split conformal prediction (Vovk et al. 2005; Lei et al.
2018, arXiv 1604.04173), which holds the reference's volume in 95 of 100 cases like those.
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
"""Of intervals of volumes."""
MEMBERS = 5
"""Ensembles of 1 to so many members get a temperature each; larger ones take the last."""
_FEWEST, _LARGEST = 0.1, 20.0
_VOXELS = 50_000
_Voxels = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Calibration:
    """What a model stores of its calibration, which holds for one sampler with so many steps.

    Attributes:
        sampler: its name.
        steps: denoiser calls per sample.
        temperatures: of the mean of 1, 2, ... members.
        ece: expected calibration error of the largest ensemble before and after, near the references of the fit; None
            where no case has a reference.
        agreement: 5th percentile over cases of the members' mean pairwise Dice; None for a model without samples.
        cases: number of validation cases.
        volume_errors: of labels 1, 2, ...: |log| of the ratio of the reference's volume to the mean's, one position
            added to each, which a share ``level`` of cases does not exceed; empty for a model of an older version.
        level: 0.95, or n / (n + 1) of n cases where that is less.
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
        """The temperature of the mean of so many members."""
        return self.temperatures[min(members, len(self.temperatures)) - 1]

    def volume_interval(self, label: int, volume: float, position: float) -> tuple[float, float]:
        """Between what a reference's volume lies in a share ``level`` of cases like those of the fit.

        Args:
            label: 1 or above.
            volume: that was found.
            position: volume of one position of the model's grid.
        """
        factor = math.exp(self.volume_errors[label - 1])
        return max(0.0, (volume + position) / factor - position), (volume + position) * factor - position


class TemperatureFit:
    """Validation cases, one after another, to a `Calibration`."""

    def __init__(self, sampler: str, steps: int) -> None:
        self.sampler, self.steps = sampler, steps
        self.near: list[list[_Voxels]] = [[] for _ in range(MEMBERS)]
        self.far: list[list[_Voxels]] = [[] for _ in range(MEMBERS)]
        self.agreement: list[float] = []
        self.volumes: list[NDArray[np.float64]] = []

    def add(self, members: Tensor, labels: Tensor) -> None:
        """One case: probabilities (N, K, *S) of N <= `MEMBERS` members and its reference labels (*S).

        At most `_VOXELS` of `metrics.calibration.region` and as many of the rest take part, evenly spaced.
        """
        truth = labels.cpu().numpy().astype(np.int64)
        inside = region(truth)
        for found, mask in ((self.near, inside), (self.far, ~inside)):
            chosen = np.flatnonzero(mask)
            chosen = chosen[:: max(1, len(chosen) // _VOXELS)]
            for count in range(1, len(members) + 1):
                mean = members[:count].mean(0).flatten(1).cpu().numpy()[:, chosen]
                found[count - 1].append((mean.astype(np.float32), truth.ravel()[chosen]))
        classes = members.shape[1]
        found_labels = members.mean(0).argmax(0).cpu().numpy()
        counts = [np.bincount(one.ravel(), minlength=classes)[1:classes] + 1.0 for one in (found_labels, truth)]
        self.volumes.append(np.abs(np.log(counts[1] / counts[0])))
        agreement = float(Ensemble.of(members).pairwise_dice().nanmean())
        if agreement == agreement:
            self.agreement.append(agreement)

    def result(self) -> Calibration:
        """The calibration of all cases so far, of which there must be one."""
        known = [rows for rows in self.near if rows]
        temperatures = [
            fit_temperature(_joined(near), _joined(far)) for near, far in zip(known, self.far, strict=False)
        ]
        p, truth = _joined(known[-1])
        ece = [Reliability.of(p, truth).ece]
        ece.append(Reliability.of(temperature_scaled(torch.from_numpy(p), temperatures[-1]).numpy(), truth).ece)
        errors, level = not_exceeded(np.stack(self.volumes), LEVEL)
        return Calibration(
            self.sampler,
            self.steps,
            [round(t, 4) for t in temperatures],
            [round(e, 5) if math.isfinite(e) else None for e in ece],
            round(float(np.percentile(self.agreement, 5)), 4) if self.agreement else None,
            len(known[0]),
            [round(float(error), 5) for error in errors],
            round(level, 4),
        )


def not_exceeded(errors: NDArray[np.float64], level: float) -> tuple[NDArray[np.float64], float]:
    """What a further error does not exceed with probability ``level``, if it is exchangeable with the n known ones.

    Args:
        errors: (n, ...).
        level: wanted. The largest of n errors holds for n / (n + 1), which is as much as n errors can tell.

    Returns:
        The (...) bounds, and the level that they hold for.
    """
    n = len(errors)
    rank = min(n, math.ceil(level * (n + 1)))
    return np.sort(errors, axis=0)[rank - 1], min(level, n / (n + 1))


def fit_temperature(*groups: _Voxels) -> float:
    """The temperature, 0.1 to 20, of least cross-entropy, the mean over groups of voxels; 1 without any.

    Args:
        groups: probabilities (K, V) and labels (V,) each.
    """
    # Imported where used: segmenting applies a calibration and fits none.
    from scipy.optimize import minimize_scalar

    known = [
        (torch.from_numpy(p).clamp(min=FAINTEST).log().T, torch.from_numpy(labels))
        for p, labels in groups
        if labels.size
    ]
    if not known:
        return 1.0

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        return sum(float(torch.nn.functional.cross_entropy(logits / temperature, truth)) for logits, truth in known)

    found = minimize_scalar(loss, bounds=(np.log(_FEWEST), np.log(_LARGEST)), method="bounded")
    return float(np.exp(found.x))


def _joined(rows: Sequence[_Voxels]) -> _Voxels:
    return np.concatenate([p for p, _ in rows], axis=1), np.concatenate([labels for _, labels in rows])

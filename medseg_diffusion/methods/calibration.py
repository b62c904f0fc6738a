"""Temperatures of an ensemble's mean, and how far its members usually agree: fitted on validation cases.

A temperature T turns probabilities p into p^(1/T), normalised (Guo et al. 2017): it changes no label, only how sure the
model says it is. Voxels near the reference and the rest count for one half each: the many far ones would drown the
others, and without them a T that makes borders honest would leave a few per cent of every class in empty background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from medseg_diffusion.metrics.calibration import Reliability, region

from .ensemble import FAINTEST, Ensemble, tempered

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
        ece: expected calibration error of the largest ensemble before and after, near the references of the fit.
        agreement: 5th percentile over cases of the members' mean pairwise Dice; None for a model without samples.
        cases: number of validation cases.
    """

    sampler: str
    steps: int
    temperatures: Sequence[float]
    ece: Sequence[float]
    agreement: float | None
    cases: int

    def temperature(self, members: int) -> float:
        """The temperature of the mean of so many members."""
        return self.temperatures[min(members, len(self.temperatures)) - 1]


class TemperatureFit:
    """Validation cases, one after another, to a `Calibration`."""

    def __init__(self, sampler: str, steps: int) -> None:
        self.sampler, self.steps = sampler, steps
        self.near: list[list[_Voxels]] = [[] for _ in range(MEMBERS)]
        self.far: list[list[_Voxels]] = [[] for _ in range(MEMBERS)]
        self.agreement: list[float] = []

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
        ece.append(Reliability.of(tempered(torch.from_numpy(p), temperatures[-1]).numpy(), truth).ece)
        return Calibration(
            self.sampler,
            self.steps,
            [round(t, 4) for t in temperatures],
            [round(e, 5) for e in ece],
            round(float(np.percentile(self.agreement, 5)), 4) if self.agreement else None,
            len(known[0]),
        )


def fit_temperature(*groups: _Voxels) -> float:
    """The temperature, 0.1 to 20, of least cross-entropy, the mean over groups of voxels; 1 without any.

    Args:
        groups: probabilities (K, V) and labels (V,) each.
    """
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

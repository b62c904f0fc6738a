"""Calibration of a segmenter: the temperature of its ensemble, its usual agreement, the errors of its volumes.

It is fitted to patients that chose neither weights nor settings, after the same post-processing as in use, and holds
for one sampler, number of steps, size of the ensemble and fusion.

A temperature T turns probabilities p into p^(1/T), normalised (Guo et al. 2017). It changes the confidence, but no
label. Voxels near the reference and all other voxels have half of the weight each. Without weights, the many distant
voxels would dominate. Without distant voxels, a temperature that calibrates borders would leave a few per cent of every
class in empty background.

The spread of the members' volumes does not show the error of a volume: members share the model's mistakes. The interval
of a volume comes from the errors on the calibration patients instead, by split conformal prediction (Vovk et al. 2005;
Lei et al. 2018, arXiv 1604.04173). A patient's error is the largest of the patient's scans, so that the interval
contains the references' volumes of 95 of 100 similar patients.
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

from .ensemble import FAINTEST, temperature_scaled

LEVEL = 0.95
"""Level of the volume intervals."""
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.1, 20.0
_VOXELS = 50_000  # per case, near the reference and far from it
_Voxels = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Sampling:
    """How an ensemble is made; a calibration holds for one of these.

    Attributes:
        sampler: name of the sampler; empty for a model that takes no steps.
        steps: steps of the sampler.
        ensemble: number of members.
        fusion: how they become one mask.
    """

    sampler: str
    steps: int
    ensemble: int
    fusion: str

    def __str__(self) -> str:
        def several(count: int, what: str) -> str:
            return f"{count} {what}{'s' if count != 1 else ''}"

        steps = f"{self.sampler} with {several(self.steps, 'step')}, " if self.sampler else ""
        return f"{steps}{several(self.ensemble, 'member')}, fusion {self.fusion}"


@dataclass(frozen=True)
class Calibration:
    """The calibration of a model, which is stored with it.

    Attributes:
        sampler, steps, ensemble, fusion: the `Sampling` that it holds for.
        temperature: temperature of the ensemble's mean.
        ece: expected calibration error before and after temperature scaling, in voxels near the references of the fit;
            None if no case has a reference.
        agreement: 5th percentile over cases of the members' mean pairwise Dice; None for one member.
        cases: number of scans.
        patients: number of patients.
        volume_errors: for labels 1, 2, ..., the bound that a share ``level`` of patients does not exceed. The error is
            the absolute log ratio of the reference's volume to the predicted one, with one voxel added to each.
        level: 0.95, or n / (n + 1) for n patients if that is lower.
    """

    sampler: str
    steps: int
    ensemble: int
    fusion: str
    temperature: float
    ece: Sequence[float | None]
    agreement: float | None
    cases: int
    patients: int
    volume_errors: Sequence[float]
    level: float

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.sampler, self.steps, self.ensemble, self.fusion)

    def volume_interval(self, label: int, volume: float, voxel: float) -> tuple[float, float]:
        """The interval that contains the reference's volume in a share ``level`` of patients like those of the fit.

        Args:
            label: 1 or above.
            volume: the predicted volume, in any unit.
            voxel: volume of one voxel, in the same unit.

        Returns:
            The ends of the interval, in the same unit.
        """
        factor = math.exp(self.volume_errors[label - 1])
        return max(0.0, (volume + voxel) / factor - voxel), (volume + voxel) * factor - voxel


class CalibrationFit:
    """Collects calibration cases one after another and fits a `Calibration` to them."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.near: list[_Voxels] = []
        self.far: list[_Voxels] = []
        self.agreement: list[float] = []
        self.errors: dict[str, list[NDArray[np.float64]]] = {}

    def add(
        self, patient: str, probabilities: Tensor, predicted: Tensor, reference: Tensor, agreement: float | None
    ) -> None:
        """Add a scan.

        About `_VOXELS` evenly spaced voxels are used of those near the reference (`metrics.calibration.region`), and
        about as many of the others.

        Args:
            patient: whose scan it is.
            probabilities: (K, *S) of the ensemble, before any temperature.
            predicted: (*S) final labels.
            reference: (*S) labels of the reference.
            agreement: the members' mean pairwise Dice; None or NaN if there is none.
        """
        truth = reference.cpu().numpy().astype(np.int64)
        inside = region(truth)
        for rows, mask in ((self.near, inside), (self.far, ~inside)):
            indices = np.flatnonzero(mask)
            indices = indices[:: max(1, len(indices) // _VOXELS)]
            p = probabilities.flatten(1).cpu().numpy()[:, indices]
            rows.append((p.astype(np.float32), truth.ravel()[indices]))
        classes = len(probabilities)
        counts = [np.bincount(one.ravel(), minlength=classes)[1:classes] + 1.0 for one in (predicted.numpy(), truth)]
        self.errors.setdefault(patient, []).append(np.abs(np.log(counts[1] / counts[0])))
        if agreement is not None and agreement == agreement:
            self.agreement.append(agreement)

    def result(self) -> Calibration:
        """The calibration of all scans so far; at least one is needed."""
        near, far = _joined(self.near), _joined(self.far)
        temperature = fit_temperature(near, far)
        p, truth = near
        ece = [Reliability.of(p, truth).ece]
        ece.append(Reliability.of(temperature_scaled(torch.from_numpy(p), temperature).numpy(), truth).ece)
        errors, level = not_exceeded(np.stack([np.max(scans, axis=0) for scans in self.errors.values()]), LEVEL)
        return Calibration(
            self.sampling.sampler,
            self.sampling.steps,
            self.sampling.ensemble,
            self.sampling.fusion,
            round(temperature, 4),
            [round(e, 5) if math.isfinite(e) else None for e in ece],
            round(float(np.percentile(self.agreement, 5)), 4) if self.agreement else None,
            len(self.near),
            len(self.errors),
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

"""Calibration of anomaly detectors on healthy scans, for `medseg train-anomaly` and `medseg calibrate-anomaly`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg_diffusion.build import make_detector
from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.data.healthy import HealthyScan, healthy_slices, lesion_map
from medseg_diffusion.device import autocast
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError
from medseg_diffusion.methods.healthy_scores import HealthyScores, fit_scores, scan_score, subsampled
from medseg_diffusion.methods.latent_healing import HealthyLatents, LatentHealing
from medseg_diffusion.models.anomaly_map import OnGrid, on_grid, scored
from medseg_diffusion.models.generator import Generator
from medseg_diffusion.volumes.io import read_volume

MOST_IMAGES = 2000
"""Largest number of healthy slices whose KL maps are in memory for the statistics: some hundred megabytes."""


@dataclass(frozen=True)
class CalibratedAnomaly:
    """The model directory, and the calibration of each of its detectors."""

    model: Path
    calibration: dict[str, HealthyScores]


@dataclass(frozen=True, eq=False)
class AnomalyCalibration:
    """Fits the detectors of a trained model to healthy scans.

    Attributes:
        config: Configuration of the model.
        generator: The trained generator.
        classifier: The noisy classifier, if the model has one.
        scans: Healthy scans that were not used in training.
        exclude_labelled: Slices closer than this to a labelled one are left out.
        on_prepare: Called with (what is done, scans done, all scans).
    """

    config: AnomalyConfig
    generator: Generator
    classifier: nn.Module | None
    scans: Sequence[HealthyScan]
    exclude_labelled: int | None
    on_prepare: Callable[[str, int, int], None]

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def fit(self) -> tuple[HealthyLatents | None, dict[str, HealthyScores]]:
        """Fit the thresholds of every detector, and the statistics of healthy latents if a detector needs them.

        Raises:
            InputError: An unusable scan, or no healthy slice in any scan.
        """
        config, generator = self.config, self.generator
        latents = self._healthy_latents() if "latent-healing" in config.detectors else None
        detectors = {
            method: make_detector(config, generator.task, generator.codec, self.classifier, method, latents)
            for method in config.detectors
        }
        values: dict[str, dict[str, list[NDArray[np.float32]]]] = {method: {} for method in detectors}
        scan_scores: dict[str, list[float]] = {method: [] for method in detectors}
        for done, (scan, grid, healthy) in enumerate(self._grids(), 1):
            if healthy is not None:
                where = healthy_voxels(grid, healthy)
                for method, detector in detectors.items():
                    result = scored(detector, config, grid, derive_seed(0, scan.name), self.device, only=healthy)
                    inside = result.score[where].numpy()
                    if inside.size:
                        values[method].setdefault(scan.patient, []).append(subsampled(inside))
                        scan_scores[method].append(scan_score(inside))
            self.on_prepare("calibration", done, len(self.scans))
        if not any(scan_scores.values()):
            raise _nothing_healthy(self.scans)
        return latents, {
            method: fit_scores([np.concatenate(own) for own in patients.values()], scan_scores[method], config.quantile)
            for method, patients in values.items()
        }

    def _grids(self) -> Iterator[tuple[HealthyScan, OnGrid, Tensor | None]]:
        """Every scan on the generator's grid, and which of its images (N,) are healthy; None if none of them is."""
        dims = len(self.config.generator.data.shape)
        for scan in self.scans:
            grid = on_grid(self.config, read_volume(scan.image))
            lesions = lesion_map(scan, grid.placement)
            if dims == 3:  # a volume with any lesion is left out
                healthy = torch.tensor([lesions is None or not bool(lesions.any())])
            else:
                healthy = healthy_slices(lesions, grid.placement.shape[2], self.exclude_labelled)
            healthy &= grid.inside.flatten(1).any(1)
            yield scan, grid, healthy if bool(healthy.any()) else None

    def _healthy_latents(self) -> HealthyLatents:
        """KL map statistics of at most `MOST_IMAGES` healthy slices or volumes, the same number from each scan."""
        generator = self.generator
        detector = make_detector(self.config, generator.task, generator.codec, None, "latent-healing", None)
        assert isinstance(detector, LatentHealing)
        most = max(1, MOST_IMAGES // max(1, len(self.scans)))
        maps, inside = [], []
        for done, (scan, grid, healthy) in enumerate(self._grids(), 1):
            chosen = torch.zeros(0, dtype=torch.int64) if healthy is None else healthy.nonzero().flatten()
            if len(chosen) > most:
                chosen = chosen[torch.linspace(0, len(chosen) - 1, most).round().long()]
            for k in chosen.split(16) if len(chosen) else ():
                seeds = [derive_seed(0, scan.name, "slice", i) for i in k.tolist()]
                with autocast(self.device, self.config.generator.training.precision):
                    latent = detector.codec.encode(grid.images[k].to(self.device))
                    maps.append(detector.divergence(latent, seeds).float().cpu())
                inside.append(grid.inside[k])
            self.on_prepare("divergence of healthy scans", done, len(self.scans))
        if not maps:
            raise _nothing_healthy(self.scans)
        return detector.fit(torch.cat(maps), torch.cat(inside))


def healthy_voxels(grid: OnGrid, healthy: Tensor) -> Tensor:
    """Foreground voxels of the healthy images, bool (I, J, K) on the scan's own grid."""
    slices = healthy.float().expand(1, *grid.placement.shape).contiguous()
    # A voxel between a healthy slice and one that was not scored is interpolated from the zeros of the latter.
    return grid.native & (grid.placement.restore(slices)[0] > 1 - 1e-4)


def _nothing_healthy(scans: Sequence[HealthyScan]) -> InputError:
    return InputError(
        scans[0].image.parent if scans else None,
        "no healthy slice in the held-out scans",
        "at least one to calibrate on",
        "lower --exclude-labelled, or hold more scans out (generator.data.validation_images)",
    )

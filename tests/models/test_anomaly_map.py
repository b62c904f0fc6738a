"""Scans on the grid of an anomaly model: proportions and borders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.errors import InputError
from medseg_diffusion.methods.detector import Detection, Detector
from medseg_diffusion.models import anomaly_map
from medseg_diffusion.models.anomaly_map import on_grid, scored
from medseg_diffusion.volumes.volume import Volume
from tests.helpers.anomaly import head, small_config


def test_slices_have_the_heads_proportions_whatever_the_voxels() -> None:
    """Sagittal slices of 4 mm: axial ones have pixels of 4 x 1 mm, and are no picture of square pixels as they are."""
    config = small_config("pixel", size=32)
    image = torch.from_numpy(head(0, shape=(40, 48, 12))[0])[None]
    cubic = on_grid(config, Volume(image, np.eye(4)))
    thick = image.unflatten(1, (10, 4)).mean(2)
    affine = np.diag([4.0, 1, 1, 1])
    affine[0, 3] = 1.5
    coarse = on_grid(config, Volume(thick, affine))
    assert coarse.images.shape == cubic.images.shape and coarse.native.shape == (10, 48, 12)
    assert float((coarse.images - cubic.images).abs().mean()) < 0.1
    assert float((coarse.inside - cubic.inside).abs().mean()) < 0.1
    for single in (image[:, 20:21], image[:, :, 24:25]):  # a sagittal and a coronal slice
        with pytest.raises(InputError, match="give the whole volume, not a single sagittal or coronal slice"):
            on_grid(config, Volume(single, np.eye(4)))


def test_erosion_leaves_the_border_of_a_crop() -> None:
    crop = torch.rand(20, 24, 12, generator=torch.Generator().manual_seed(0)) + 1
    config = small_config("pixel", postprocessing={"erosion": 2})
    assert bool(on_grid(config, Volume(crop[None], np.eye(4))).native.all())


class Calling(Detector):
    """A detector that calls a network ``calls`` times and counts ``evaluations`` of them for each image."""

    def __init__(self, network: nn.Module, calls: int, evaluations: int) -> None:
        self.network, self.calls, self._evaluations = network, calls, evaluations
        self.seeds: set[int] = set()

    @property
    def evaluations(self) -> int:
        return self._evaluations

    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        self.seeds |= set(seeds)
        for _ in range(self.calls):
            self.network(images)
        return Detection(images[:, :1].abs(), images)


@pytest.mark.parametrize(("calls", "evaluations"), [(3, 3), (5, 3), (1, 3), (0, 0)])
def test_progress_moves_within_a_batch_and_never_back(calls: int, evaluations: int, monkeypatch) -> None:
    """Some detectors call the classifier, too, which their evaluations leave out."""
    monkeypatch.setattr(anomaly_map, "BATCH", 5)
    config, network = small_config("pixel"), nn.Identity()
    image = torch.from_numpy(head(0)[0])[None]
    grid, shown = on_grid(config, Volume(image, np.eye(4))), []
    detector = Calling(network, calls, evaluations)
    result = scored(detector, config, grid, 7, torch.device("cpu"), [network], on_progress=shown.append)
    assert shown == sorted(shown) and shown[-1] == 1 and max(shown[:-1]) <= 1
    assert len(set(shown)) >= (8 if calls == evaluations == 3 else 3)
    assert detector.seeds == {7}, "all slices of a scan share their noise"
    assert result.evaluations == calls * 12

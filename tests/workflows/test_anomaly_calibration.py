"""Calibration of a detector uses only the slices that were scored."""

from __future__ import annotations

import numpy as np
import torch

from medseg_diffusion.methods.detector import Detection, Detector
from medseg_diffusion.models.anomaly_map import on_grid, scored
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows.anomaly_calibration import healthy_voxels
from tests.helpers.anomaly import head, small_config


def test_calibration_sees_no_voxel_of_a_slice_that_was_not_scored() -> None:
    """Slices of 1 mm on a grid of 3 mm: between a scored slice and another one lie mixtures with its zeros."""
    config = small_config("pixel")
    section = config.generator.preprocessing.model_copy(update={"spacing_mm": (1.0, 1.0, 3.0)})
    config = config.model_copy(update={"generator": config.generator.model_copy(update={"preprocessing": section})})
    image, _ = head(0, shape=(20, 24, 36))
    grid = on_grid(config, Volume(torch.from_numpy(image)[None], np.eye(4)))
    healthy = torch.ones(len(grid.images), dtype=torch.bool)
    healthy[4:7] = False

    class Ones(Detector):
        evaluations = 0

        def detect(self, images: torch.Tensor, seeds: object) -> Detection:
            return Detection(torch.ones_like(images), images)

    config = config.model_copy(update={"postprocessing": config.postprocessing.model_copy(update={"median": 1})})
    found = scored(Ones(), config, grid, 0, torch.device("cpu"), only=healthy)
    inside = found.score[healthy_voxels(grid, healthy)]
    assert len(inside) > 4000 and float(inside.min()) > 0.999

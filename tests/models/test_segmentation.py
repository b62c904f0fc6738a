"""Members of an ensemble become one calibrated segmentation on the scan's grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.methods.ensemble import Ensemble, temperature_scaled
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.volume import Volume
from tests.helpers.segmenters import calibrated, save


def test_only_the_largest_part_counts_in_labels_and_volumes() -> None:
    model = load_segmenter("brain-tissue-t1", "cpu", ensemble=2)
    assert model.config.inference.largest_part
    volume = Volume(torch.rand(1, 40, 40, 40, generator=torch.Generator().manual_seed(0)), np.eye(4))
    image, placement = model.preprocessing.apply(volume)
    members = torch.zeros(2, 4, *image.shape[1:])
    members[:, 0] = 1.0
    for block in (slice(0, 5), slice(8, 11)):
        members[:, 0, block, block, block] = 0.0
        members[:, 2, block, block, block] = 1.0
    result = model.aggregation.combine(Ensemble.of(members), placement)
    assert int((result.labels > 0).sum()) == 125
    assert result.volumes_ml["grey matter"] == pytest.approx(0.125)
    assert result.members_ml["grey matter"] == pytest.approx((0.125, 0.125))


def test_a_calibrated_model_is_less_sure_of_the_same_labels(tmp_path: Path, tiny_model: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    other = calibrated(tiny_model, tmp_path / "calibrated")
    for ensemble, temperature in ((3, 2.0), (2, 1.0)):
        raw = load_segmenter(tiny_model, "cpu", ensemble=ensemble).segment(
            volume, maps=["probabilities", "uncertainty"]
        )
        soft = load_segmenter(other, "cpu", ensemble=ensemble).segment(volume, maps=["probabilities", "uncertainty"])
        assert torch.equal(raw.labels, soft.labels)
        torch.testing.assert_close(soft.probabilities, temperature_scaled(raw.probabilities, temperature))
        assert (float(soft.uncertainty.mean()) > float(raw.uncertainty.mean())) == (temperature > 1)


def test_members_that_all_find_nothing_are_to_be_checked(tmp_path: Path, tiny_model: Path) -> None:
    whole = load_segmenter(calibrated(tiny_model, tmp_path / "calibrated", agreement=0.9), "cpu", ensemble=3)
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    _, placement = whole.sample(volume, 0)
    empty = torch.zeros(3, len(whole.labels), *placement.shape)
    empty[:, 0] = 1
    assert whole.aggregation.combine(Ensemble.of(empty), placement).quality == "check"

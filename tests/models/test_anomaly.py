"""A trained anomaly model gives reproducible score maps and keeps its promised error rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.methods.detector import Detection, Detector
from medseg_diffusion.models.anomaly import AnomalyModel, DetectionOptions
from medseg_diffusion.models.anomaly_map import on_grid, scored
from medseg_diffusion.volumes.foreground import scan_foreground
from medseg_diffusion.volumes.io import read_volume
from tests.helpers.anomaly import small_config


def test_the_threshold_has_the_rate_that_is_promised_on_the_scans_it_was_fitted_to(
    anomaly_scans, anomaly_models
) -> None:
    model = AnomalyModel(anomaly_models["pixel"], device="cpu")
    healthy = model.healthy_scores()
    assert healthy is not None and 0.015 < healthy.rate <= 0.025 + 1e-9
    split = json.loads((anomaly_models["pixel"].parent / "split.json").read_text())
    rates = []
    for name in [name for name, side in split.items() if side == "validation"]:
        volume = read_volume(anomaly_scans / "images" / f"{name}.nii.gz")
        # The seed of the calibration is that of the name.
        from medseg_diffusion.diffusion.noise import derive_seed

        found = model.score(volume, derive_seed(0, name))
        keep = torch.zeros(12, dtype=torch.bool)
        keep[[0, 1, 2, 8, 9, 10, 11]] = True
        inside = found.score[found.foreground & keep]
        rates.append(float((inside > healthy.automatic).float().mean()))
    assert float(np.mean(rates)) == pytest.approx(healthy.rate, abs=1e-6)


def test_the_map_depends_on_name_and_seed_and_on_nothing_else(anomaly_scans, anomaly_models) -> None:
    volume = read_volume(anomaly_scans / "images" / "s1.nii.gz")
    model = AnomalyModel(anomaly_models["pixel"], device="cpu")
    one, same, other = (model.score(volume, seed).score for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("name", ["latent", "pixel"])
def test_scores_count_where_the_scan_shows_something_whatever_the_model(name, anomaly_scans, anomaly_models) -> None:
    volume = read_volume(anomaly_scans / "images" / "s1.nii.gz")
    found = AnomalyModel(anomaly_models[name], device="cpu").score(volume)
    assert torch.equal(found.foreground, scan_foreground(volume))
    smaller = AnomalyModel(anomaly_models[name], DetectionOptions(erosion=2), "cpu").score(volume).foreground
    assert 0 < int(smaller.sum()) < int(found.foreground.sum()) and not bool((smaller & ~found.foreground).any())


@pytest.mark.parametrize(("name", "method"), [("pixel", "partial-noise"), ("classes", "counterfactual")])
def test_evaluations_are_those_that_were_made(name, method, anomaly_scans, anomaly_models) -> None:
    model = AnomalyModel(anomaly_models[name], DetectionOptions(method), "cpu")
    found = model.score(read_volume(anomaly_scans / "images" / "s1.nii.gz"))
    assert found.evaluations == 12 * model.detector.evaluations  # twelve slices, all with foreground


def test_divergences_hardly_depend_on_the_precision_of_the_networks(anomaly_models) -> None:
    detector = AnomalyModel(anomaly_models["latent"], device="cpu").detector
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = detector.divergence(detector.codec.encode(images), range(4))  # type: ignore[attr-defined]
    with torch.autocast("cpu", torch.bfloat16):
        half = detector.divergence(detector.codec.encode(images), range(4))  # type: ignore[attr-defined]
    assert half.dtype == torch.float32
    assert float((half - exact).abs().mean() / exact.abs().mean()) < 0.02


def test_what_the_model_cannot_do_is_said(anomaly_scans, anomaly_models) -> None:
    with pytest.raises(UsageError, match="--method patched: this model has partial-noise"):
        AnomalyModel(anomaly_models["pixel"], DetectionOptions("patched"), "cpu")
    with pytest.raises(ModelError, match="not an anomaly model"):
        AnomalyModel("brain-tissue-t1", device="cpu")


@pytest.mark.parametrize("name", ["latent", "pixel", "patched", "classes"])
def test_the_counterpart_is_in_the_unit_of_the_scan_and_costs_nothing_unasked(
    name: str, anomaly_scans: Path, anomaly_models: dict[str, Path]
) -> None:
    volume = read_volume(anomaly_scans / "images" / "s1.nii.gz")
    model = AnomalyModel(anomaly_models[name], device="cpu")
    without, found = model.score(volume, 1), model.score(volume, 1, counterpart=True)
    assert without.counterpart is None and found.counterpart is not None
    torch.testing.assert_close(without.score, found.score, rtol=0, atol=0)
    assert without.evaluations == found.evaluations
    scan = volume.data[0]
    torch.testing.assert_close(found.counterpart[~found.foreground], scan[~found.foreground])
    assert not torch.equal(found.counterpart, scan)


def test_a_method_that_changes_nothing_gives_the_scan_back_as_its_counterpart(anomaly_scans: Path) -> None:
    """The way to the model's grid and scale, and back to the unit of the scan."""
    config = small_config("pixel", size=24)
    volume = read_volume(anomaly_scans / "images" / "s1.nii.gz")
    volume = volume.like(7 * volume.data - 300)

    class Nothing(Detector):
        evaluations = 0

        def detect(self, images: torch.Tensor, seeds: object) -> Detection:
            return Detection(torch.zeros_like(images), images)

    grid = on_grid(config, volume)
    found = scored(Nothing(), config, grid, 0, torch.device("cpu"), counterpart=True).counterpart
    assert found is not None
    inside = grid.native & (grid.placement.restore(grid.image)[0].abs() < 0.9)  # values beyond are bent
    assert int(inside.sum()) > 1000
    torch.testing.assert_close(found[inside], volume.data[0][inside], rtol=0, atol=0.01 * float(volume.data.std()))

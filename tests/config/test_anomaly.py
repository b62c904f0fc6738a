"""Configurations of anomaly models: presets, and settings that no detector can follow."""

from __future__ import annotations

import pytest

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.load import load_config
from medseg_diffusion.errors import UsageError
from tests.helpers.anomaly import PRESETS, small_config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_detects_with(name) -> None:
    config = load_config(name)
    assert isinstance(config, AnomalyConfig) and config.detectors
    if config.generator.method == "latent":
        stage = load_config(str(config.generator.autoencoder))
        assert (stage.data.shape, stage.preprocessing) == (config.generator.data.shape, config.generator.preprocessing)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("latent", {"latent_healing": {"steps": 600}}, "latent_healing: needs steps <= start <= 1000"),
        ("latent", {"latent_healing": {"latest": 1001}}, "latent_healing: needs earliest <= latest <= 1000"),
        ("pixel", {"partial_noise": {"start": 1500}}, "partial_noise: needs steps <= start <= 1000"),
        ("patched", {"patched": {"time": 1001}}, "patched: needs time <= 1000"),
        ("classes", {"counterfactual": {"start": 100, "steps": 100}}, "counterfactual: needs steps < start <= 1000"),
        ("pixel", {"postprocessing": {"median": 4}}, "take an odd one"),
        ("classes", {"noise": "simplex"}, "classifier-guided is defined for gaussian noise"),
        ("latent", {"noise": "simplex"}, "latent-healing is defined for gaussian noise"),
        ("classes", {"test_images": 1}, "classifier: its data, preprocessing and schedule must be the generator's"),
    ],
)
def test_settings_that_no_detector_can_follow_are_refused_before_the_training(method, changes, message) -> None:
    extra = {"autoencoder": "autoencoder-slices-small"} if method == "latent" else {}
    with pytest.raises(UsageError, match=message):
        small_config(method, **extra, **changes)

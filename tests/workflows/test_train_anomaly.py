"""`medseg train-anomaly`: what is trained, refused and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.load import load_config, parse_config
from medseg_diffusion.data.healthy import (
    find_healthy,
    require_usable,
)
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.models.anomaly import AnomalyModel
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows.train_anomaly import train_anomaly
from tests.helpers.anomaly import PRESETS, head, small_config, write


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_for_a_step_and_finds_something(name, monkeypatch, tmp_path: Path) -> None:
    """At full size, with one step and the fewest calls in detection."""
    monkeypatch.setattr("medseg_diffusion.workflows.train_generator.PICTURES", 1)
    config = load_config(name)
    assert isinstance(config, AnomalyConfig)
    shape = (40, 44, 4) if config.generator.network.dims == 2 else (40, 44, 40)
    for i in range(5):
        image, label = head(i, slice(2, 3), shape)
        write(tmp_path / "scans" / "images" / f"s{i}.nii.gz", image)
        write(tmp_path / "scans" / "labels" / f"s{i}.nii.gz", label)
    data = ["test_images=0", "validation_images=1"]
    few = ["latent_healing.times=2", "latent_healing.steps=2", "partial_noise.steps=2", "counterfactual.steps=2"]
    changes = [f"generator.data.{key}" for key in data] + ["generator.training.batch_size=1", *few]
    if config.classifier is not None:
        changes += [f"classifier.data.{key}" for key in data] + ["classifier.training.batch_size=1"]
    if config.generator.autoencoder is not None:
        short = ["training.batch_size=1", "training.max_steps=1"]
        stage = load_config(config.generator.autoencoder, [*short, *(f"data.{key}" for key in data)])
        (tmp_path / "codec.yaml").write_text(json.dumps(stage.model_dump(mode="json")))
        changes.append(f"generator.autoencoder={tmp_path / 'codec.yaml'}")
    config = load_config(name, changes)
    assert isinstance(config, AnomalyConfig)
    # Volumes with a lesion are no healthy ones: for those the images stand alone.
    healthy = tmp_path / "scans" / ("images" if config.generator.network.dims == 3 else ".")
    others = tmp_path / "scans" if config.needs_unhealthy else None
    exclude = None if config.generator.network.dims == 3 else 1
    found = train_anomaly(
        config, healthy, tmp_path / "run", exclude_labelled=exclude, unhealthy=others, max_steps=1, device="cpu"
    )
    score = AnomalyModel(found.model, device="cpu").score(read_volume(tmp_path / "scans" / "images" / "s0.nii.gz"))
    assert score.score.shape == shape and bool(score.score.isfinite().all())


def test_lesions_among_healthy_scans_are_refused_unless_told_what_to_do(anomaly_scans, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels/s\d\.nii\.gz: found 90 labelled voxels; .* --exclude-labelled 1"):
        train_anomaly(small_config("pixel"), anomaly_scans, tmp_path / "run", device="cpu")
    # What was refused can be corrected and started in the same folder.
    trained = train_anomaly(
        small_config("pixel"), anomaly_scans, tmp_path / "run", exclude_labelled=1, max_steps=1, device="cpu"
    )
    data = load_model_files(trained.model).card["training"]["data"]
    # Four of eight patients are trained on, two hold out; 3 of 12 slices have a lesion.
    assert (data["slices for train"], data["slices left out of train"]) == (36, 12)
    assert (data["slices for validation"], data["slices left out of validation"]) == (18, 6)
    found = find_healthy(anomaly_scans / "images")  # without their labels these are scans like any others
    assert len(found) == 8 and found[0].label is None


def test_what_cannot_be_scored_is_refused_before_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for i in range(6):
        write(folder / f"v{i}.nii.gz", head(i, shape=(12, 14, 10))[0])
    write(folder / "v6.nii.gz", head(6, shape=(18, 14, 10))[0])
    with pytest.raises(InputError, match=r"v6\.nii\.gz: found 18 x 14 x 10 voxels on the model's grid"):
        train_anomaly(small_config("pixel", size=[16, 16, 12]), folder, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    scan = read_volume(folder / "v0.nii.gz")
    computed = replace(scan, header=replace(scan.header, modality="CT"))
    with pytest.raises(InputError, match="found modality CT; expected MR"):
        require_usable(computed, scan.shape, (16, 16), "MR")
    require_usable(computed, scan.shape, (16, 16), None)


@pytest.mark.parametrize(
    ("part", "changes"), [("generator", {"num_res_blocks": [1]}), ("classifier", {"head_channels": 3})]
)
def test_what_cannot_be_trained_leaves_no_run_behind(part: str, changes, anomaly_scans, tmp_path: Path) -> None:
    content = small_config("classes").model_dump(mode="json")
    content[part]["network"] |= changes
    config = parse_config(content, "test")
    assert isinstance(config, AnomalyConfig)
    with pytest.raises(UsageError, match="network"):
        train_anomaly(
            config, anomaly_scans, tmp_path / "run", exclude_labelled=1, unhealthy=anomaly_scans, device="cpu"
        )
    assert not (tmp_path / "run").exists()


def test_detectors_that_need_unhealthy_scans_say_so(anomaly_scans, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scans with lesions too, for classifier-guided and .* --unhealthy"):
        train_anomaly(small_config("classes"), anomaly_scans, tmp_path / "run", exclude_labelled=1, device="cpu")
    with pytest.raises(UsageError, match="uses only healthy scans"):
        train_anomaly(
            small_config("pixel"),
            anomaly_scans,
            tmp_path / "run",
            exclude_labelled=1,
            unhealthy=anomaly_scans,
            device="cpu",
        )


def test_a_time_that_is_too_short_for_all_networks_says_so(anomaly_scans, anomaly_autoencoder, tmp_path: Path) -> None:
    config = small_config("latent", autoencoder=anomaly_autoencoder)
    options: dict[str, Any] = {"exclude_labelled": 2, "device": "cpu"}
    with pytest.raises(
        UsageError, match=r"ended in the training of the autoencoder in .*generator; continue with --resume"
    ):
        train_anomaly(config, anomaly_scans, tmp_path / "run", time_limit_min=1e-5, **options)
    assert train_anomaly(config, anomaly_scans, tmp_path / "run", resume=True, **options).model.is_dir()


def test_an_interrupted_run_is_resumed_to_the_same_model(anomaly_scans, anomaly_models, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_anomaly(small_config("pixel"), anomaly_scans, run, exclude_labelled=2, max_steps=3, device="cpu")
    with pytest.raises(UsageError, match="add --resume"):
        train_anomaly(small_config("pixel"), anomaly_scans, run, exclude_labelled=2, device="cpu")
    again = train_anomaly(small_config("pixel"), anomaly_scans, run, exclude_labelled=2, resume=True, device="cpu")
    one, other = load_model_files(again.model), load_model_files(anomaly_models["pixel"])
    for name, value in other.weights.items():
        torch.testing.assert_close(one.weights[name], value, rtol=1e-4, atol=1e-5)

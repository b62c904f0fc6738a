"""The first stage of a latent generator: trained first, kept, standardised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.generator import restore_autoencoder
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.training.autoencoder import GradientSSIM
from medseg_diffusion.workflows.train_generator import train_generator
from tests.helpers.generators import QUIET, small_config
from tests.helpers.training import resume_file

pytestmark = QUIET


def test_a_latent_generator_trains_its_autoencoder_first(pictures, tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text(json.dumps(small_config("autoencoder").model_dump(mode="json")))
    config = small_config("latent", autoencoder=str(first))
    run = tmp_path / "run"
    stage = train_generator(config, pictures, run, stage="autoencoder", device="cpu")
    assert stage == run / "autoencoder" / "model"
    assert not (run / "model").exists()
    path = train_generator(config, pictures, run, resume=True, device="cpu")
    weights = load_model_files(path).weights
    kept = restore_autoencoder(load_model_files(stage))[0].state_dict()
    assert all(torch.equal(weights[f"codec.{name}"], value) for name, value in kept.items())


def test_max_steps_shortens_the_generator_but_not_its_autoencoder(pictures, tmp_path: Path) -> None:
    """A second stage cannot go on if its autoencoder is trained further."""
    first = tmp_path / "first.yaml"
    first.write_text(json.dumps(small_config("autoencoder").model_dump(mode="json")))
    config = small_config("latent", autoencoder=str(first))
    whole = train_generator(config, pictures, tmp_path / "whole", device="cpu")
    parts = tmp_path / "parts"
    train_generator(config, pictures, parts, stage="autoencoder", max_steps=1, device="cpu")
    assert resume_file(parts / "autoencoder")["state"]["step"] == 1
    train_generator(config, pictures, parts, max_steps=1, resume=True, device="cpu")
    assert resume_file(parts / "autoencoder")["state"]["step"] == 2 and resume_file(parts)["state"]["step"] == 1
    resumed = train_generator(config, pictures, parts, resume=True, device="cpu")
    weights, expected = load_model_files(resumed).weights, load_model_files(whole).weights
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_latents_have_zero_mean_and_unit_variance(pictures, image_models) -> None:
    """Shift and scale are stored with the autoencoder; a mean of two deviations once spoiled a latent generator."""
    codec, _ = restore_autoencoder(load_model_files(image_models["autoencoder"]))
    images = [torch.from_numpy(np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BOX)).copy())
              for path in sorted(pictures.rglob("*.png"))]  # fmt: skip
    image = torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    latent = codec.encode(image)
    assert torch.allclose(latent.transpose(0, 1).flatten(1).std(1), torch.ones(2), atol=0.1)
    assert torch.allclose(latent.mean((0, 2, 3)), torch.zeros(2), atol=0.1)
    assert codec.shift.abs().min() > 1e-4, "a shift of nothing would prove nothing"
    unscaled, _ = codec.moments(image)
    torch.testing.assert_close(codec.unstandardised(latent), unscaled, rtol=1e-4, atol=1e-5)


def test_an_autoencoder_without_an_adversary_keeps_its_last_weights(pictures, tmp_path: Path) -> None:
    training = {"batch_size": 2, "max_steps": 4, "validate_every": 2, "warmup_steps": 1, "ema_decay": 0.5}
    loss = {"adversarial_weight": 0.0, "discriminator_channels": 8, "discriminator_layers": 1}
    model = train_generator(
        small_config("autoencoder", loss=loss, training=training), pictures, tmp_path / "run", device="cpu"
    )
    assert load_model_files(model).card["training"]["step"] == 4


def test_a_resumed_autoencoder_keeps_its_perceptual_loss(pictures, tmp_path: Path, monkeypatch) -> None:
    """Whatever "auto" would choose by now. A run of an earlier version did not note its loss, and goes on."""
    asked: list[str] = []

    def chosen(kind: str, *arguments: Any, **options: Any) -> tuple[GradientSSIM, str, list[str]]:
        asked.append(kind)
        return GradientSSIM(), "gradient-ssim", []

    monkeypatch.setattr("medseg_diffusion.workflows.autoencoder_stage.perceptual_loss", chosen)
    config, run = small_config("autoencoder"), tmp_path / "run"
    train_generator(config, pictures, run, max_steps=1, device="cpu")
    train_generator(config, pictures, run, max_steps=1, resume=True, device="cpu")
    content = yaml.safe_load((run / "config.yaml").read_text())
    assert content.pop("perceptual_loss") == "gradient-ssim"
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    train_generator(run / "config.yaml", pictures, run, resume=True, device="cpu")
    assert asked == ["auto", "gradient-ssim", "auto"]


def test_a_latent_run_goes_on_with_the_autoencoder_it_was_given(pictures, image_models, tmp_path: Path) -> None:
    given = {"autoencoder": image_models["autoencoder"], "device": "cpu"}
    train_generator(small_config("latent"), pictures, tmp_path / "run", max_steps=1, **given)
    with pytest.raises(UsageError, match="was started with --autoencoder; give the same one to --resume"):
        train_generator(small_config("latent"), pictures, tmp_path / "run", resume=True, device="cpu")
    assert not (tmp_path / "run" / "autoencoder").exists()
    train_generator(small_config("latent"), pictures, tmp_path / "run", resume=True, **given)


def test_resuming_a_latent_run_that_was_never_started_is_refused(pictures, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run: holds no run; drop --resume to start it"):
        train_generator(
            small_config("latent"),
            pictures,
            tmp_path / "run",
            resume=True,
            max_steps=1,
            device="cpu",
            stage="autoencoder",
        )
    assert not (tmp_path / "run").exists()


def test_both_stages_hold_out_the_same_images(pictures, image_models, tmp_path: Path) -> None:
    data = {"size": 16, "validation_images": 4, "test_images": 5}
    with pytest.raises(ModelError, match=r"made for images with .*'test_images': 0.* this configuration has .*: 5"):
        train_generator(
            small_config("latent", data=data),
            pictures,
            tmp_path / "a",
            autoencoder=image_models["autoencoder"],
            device="cpu",
        )
    training = {"batch_size": 2, "max_steps": 1, "validate_every": 1, "warmup_steps": 1, "ema_decay": 0.5}
    stage = small_config("autoencoder", training=training)
    (tmp_path / "codec.yaml").write_text(json.dumps(stage.model_dump(mode="json")))
    config = small_config("latent", data=data, autoencoder=str(tmp_path / "codec.yaml"), training=training)
    train_generator(config, pictures, tmp_path / "b", device="cpu")
    found = load_model_files(tmp_path / "b" / "autoencoder").card
    assert found["config"]["data"]["test_images"] == 5 and found["training"]["data"]["images"] == 24 - 9

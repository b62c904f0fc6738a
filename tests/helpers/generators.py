"""Images of two classes or with masks, and the smallest generators of them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.workflows.train_generator import train_generator

from .onnx_networks import save_network
from .trained import TrainedOnUse

QUIET = pytest.mark.filterwarnings("ignore:LPIPS has no weights here")
"""For tests that train an autoencoder of images, or score images."""

OTHERS = SegmenterConfig | PixelClassifierConfig | AnomalyConfig


def save_pictures(folder: Path) -> None:
    """Two classes of 64 x 64 images: dark on the left, dark on the right."""
    generator = np.random.default_rng(0)
    for i in range(24):
        pixels = generator.integers(100, 256, (64, 64, 3), dtype=np.uint8)
        pixels[:, :32] //= 1 + 3 * (i % 2)
        pixels[:, 32:] //= 4 - 3 * (i % 2)
        path = folder / ("left" if i % 2 else "right") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)


def save_balls(folder: Path) -> None:
    """Twelve scans of a bright ball at varying places, 12 x 12 x 12."""
    grid = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"), -1)
    for i in range(12):
        rng = np.random.default_rng(i)
        ball = np.linalg.norm(grid - rng.uniform(4, 8, 3), axis=-1) < 3
        image = rng.normal(100, 5, (12, 12, 12)) + 100 * ball
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"s{i:02d}.nii.gz")


def train_ball_generator(scans: Path, run: Path) -> Path:
    """The smallest generator of volumes."""
    network = {"dims": 3, "channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 4}
    data = {"size": [12, 12, 12], "channels": 1, "validation_images": 1}
    return train_generator(small_config("pixel", data=data, network=network), scans, run, device="cpu")


def small_config(method: str, **changes: object) -> GeneratorConfig | ImageAutoencoderConfig | NoisyClassifierConfig:
    """The smallest configuration of a method, on 16 x 16 images."""
    network: dict[str, object] = {
        "autoencoder": {"latent_channels": 2, "channels": [32, 32], "num_res_blocks": 1},
        "classifier": {
            "channels": 32,
            "channel_mult": [1, 1],
            "num_res_blocks": 1,
            "attention_factors": [2],
            "head_channels": 32,
        },
    }.get(method, {"dims": 2, "channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1})  # type: ignore[assignment]
    content = {
        "method": method,
        "data": {"size": 16, "validation_images": 4},
        "network": network,
        "training": {"batch_size": 2, "max_steps": 2, "validate_every": 2, "warmup_steps": 1, "ema_decay": 0.5},
        **({"sampling": {"sampler": "ddim", "steps": 4}} if method in ("pixel", "latent", "upsampler") else {}),
        **({"autoencoder": "autoencoder-tiny-imagenet-small"} if method == "latent" else {}),
        **({"loss": {"discriminator_channels": 8, "discriminator_layers": 1}} if method == "autoencoder" else {}),
        **changes,
    }
    found = parse_config(content, "test")
    assert not isinstance(found, OTHERS)
    return found


def train_models(pictures: Path, root: Path) -> dict[str, Path]:
    """One trained model of each kind; two steps each."""
    by_class = {"condition": {"classes": "embedding"}}
    attention = {"dims": 2, "channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "attention_factors": [2]}
    by_token = {"condition": {"classes": "cross-attention", "context_channels": 8}, "network": attention}
    half = {"data": {"size": 8, "validation_images": 4}}
    configs = {
        "autoencoder": small_config("autoencoder"),
        "pixel": small_config("pixel", diffusion={"learned_variance": True, "objective": "hybrid"}),
        "class": small_config("pixel", **by_class),
        "half": small_config("pixel", **half),
        "upsampler": small_config("upsampler"),
        "class-upsampler": small_config("upsampler", **by_class),
        "latent-upsampler": small_config("upsampler", autoencoder="autoencoder-tiny-imagenet-small"),
        "classifier": small_config("classifier"),
        "latent": small_config("latent"),
        "token": small_config("latent", **by_token),
    }

    def train(name: str) -> Path:
        codec = models["autoencoder"] if getattr(configs[name], "autoencoder", None) is not None else None
        return train_generator(configs[name], pictures, root / name, autoencoder=codec, device="cpu")

    models = TrainedOnUse(train)
    return models


def save_labelled_pictures(folder: Path, count: int = 12) -> None:
    """Grey 16 x 16 images and their masks: a bright square of class 1 on a dark background."""
    generator = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros((16, 16), np.uint8)
        top, left = generator.integers(1, 9, 2)
        mask[top : top + 6, left : left + 6] = 1
        image = np.where(mask, 220, 40).astype(np.uint8) + generator.integers(0, 10, mask.shape, dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")


def save_labelled_volumes(folder: Path, shape: tuple[int, int, int] = (12, 10, 9), classes: int = 1) -> None:
    """Six volumes of 1 x 1 x 2 mm, stored as LPS, with a bright block of each class, and their label maps."""
    generator = np.random.default_rng(0)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for i in range(6):
        label = np.zeros(shape, np.uint8)
        for value in range(1, classes + 1):
            label[3 * value - 1 : 3 * value + 1, 2 : 5 + i % 3, 2:6] = value
        image = (label + 0.2 * generator.random(shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), folder / "images" / f"case{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labels" / f"case{i}.nii.gz")


def mask_config(method: str = "pixel", drop: float = 0.2, **changes: object) -> GeneratorConfig:
    """The smallest generator of 16 x 16 images that obey masks of a square."""
    content: dict[str, object] = {
        "data": {"size": 16, "channels": 1, "validation_images": 2, "labels": ["square"]},
        "condition": {"mask": True, "drop": drop},
        "network": {"dims": 2, "channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
        "diffusion": {"target": "v"},
    }
    found = small_config(method, **{**content, **changes})
    assert isinstance(found, GeneratorConfig)
    return found


def save_scoring_network(path: Path) -> None:
    """A small network of random weights in the place of Inception, with its three outputs."""
    save_network(path, np.random.default_rng(0).normal(0, 0.1, (8, 3, 5, 5)), stride=4)

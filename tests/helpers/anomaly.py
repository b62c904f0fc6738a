"""Scans with and without lesions, and the smallest anomaly models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.load import load_config, parse_config, presets
from medseg_diffusion.workflows.train_anomaly import train_anomaly

from .trained import TrainedOnUse

PRESETS = [name for name in presets() if isinstance(load_config(name), AnomalyConfig)]
AUTOENCODER = """
method: autoencoder
data: {size: 16, channels: 1, test_images: 2, validation_images: 2}
network: {latent_channels: 2, channels: [8, 8], num_res_blocks: 1, norm_groups: 4}
loss: {perceptual: gradient-ssim, adversarial_weight: 0.0, discriminator_channels: 4, discriminator_layers: 1}
training: {batch_size: 4, max_steps: 60, validate_every: 60, warmup_steps: 1, ema_decay: 0.5, learning_rate: 3.0e-3}
"""


def head(seed: int, lesion: slice | None = None, shape: tuple[int, int, int] = (20, 24, 12)) -> tuple[Any, Any]:
    """A bright ellipsoid in noisy air, with a very bright block in some slices, and the block's mask."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = axes[0] ** 2 + axes[1] ** 2 < 0.8
    image = rng.normal(5, 1, shape) + inside * rng.normal(100, 4, shape)
    label = np.zeros(shape, np.uint8)
    if lesion is not None:
        label[8:13, 9:15, lesion] = 1
        image[label > 0] += 80
    return image.astype(np.float32), label


def write(path: Path, array: np.ndarray, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1])), path)
    return path


def write_scans(folder: Path) -> None:
    """Eight scans with a lesion in slices 4 to 6, labelled."""
    for i in range(8):
        image, label = head(i, slice(4, 7))
        write(folder / "images" / f"s{i}.nii.gz", image)
        write(folder / "labels" / f"s{i}.nii.gz", label)


def small_config(method: str, size: object = 16, **changes: object) -> AnomalyConfig:
    """The smallest configuration for a kind of generator."""
    dims = 2 if isinstance(size, int) else 3
    data = {"size": size, "channels": 1, "test_images": 2, "validation_images": 2}
    network = {"dims": dims, "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    training = {"batch_size": 4, "max_steps": 6, "validate_every": 6, "warmup_steps": 1, "ema_decay": 0.5}
    generator: dict[str, Any] = {"data": data, "network": network, "training": training, "method": method}
    generator["diffusion"] = {"target": "x0" if method == "patched" else "v", "noise": "simplex"}
    generator["sampling"] = {"steps": 2}
    content: dict[str, Any] = {"method": "anomaly", "generator": generator}
    if method == "latent":
        generator["autoencoder"] = changes.pop("autoencoder")
        generator["diffusion"] = {"target": "v"}
        content["latent_healing"] = {"times": 3, "steps": 4}
    if method == "classes":
        generator |= {"method": "pixel", "condition": {"classes": "embedding", "drop": 0.5}}
        generator["diffusion"] = {"target": "v"}
        content["classifier"] = {
            "method": "classifier",
            "data": data,
            "network": {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_factors": [2],
                        "head_channels": 8, "norm_groups": 4},
            "training": training,
        }  # fmt: skip
        content["counterfactual"] = {"start": 100, "steps": 3, "scale": 1.0}
    if "noise" in changes:
        generator["diffusion"]["noise"] = changes.pop("noise")
    generator["data"] = {**data, "test_images": changes.pop("test_images", data["test_images"])}
    content |= {"partial_noise": {"start": 100, "steps": 2}} | changes
    found = parse_config(content, "test")
    assert isinstance(found, AnomalyConfig)
    return found


def train_models(scans: Path, autoencoder: str, root: Path) -> dict[str, Path]:
    """One model of each kind of generator; ``autoencoder`` is the configuration of the first stage."""
    configs = {
        "latent": small_config("latent", autoencoder=autoencoder),
        "pixel": small_config("pixel"),
        "patched": small_config("patched"),
        "classes": small_config("classes"),
    }

    def train(name: str) -> Path:
        others = scans if configs[name].needs_unhealthy else None
        options = {"exclude_labelled": 2, "unhealthy": others, "device": "cpu"}
        return train_anomaly(configs[name], scans, root / name, **options).model

    return TrainedOnUse(train)

"""Scans of a bright box, and the smallest generators and pixel classifiers of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from medseg_diffusion.config.generator import GeneratorConfig
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.models.generator import Generator, restore_generator
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.workflows.train_generator import train_generator

HALVES = ["dark", "bright"]


def activations(dims: int = 2, blocks: tuple[str, ...] = ("decoder.0", "decoder.2"), side: int = 16) -> Activations:
    torch.manual_seed(0)
    network = UNet(dims, 1, 1, channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    task = ImageDiffusion(NetworkDenoiser(network, linear(1000)), Simple()).requires_grad_(False).eval()
    return Activations(task, None, (1, *[side] * dims), (50, 250), blocks)


def two_halves(dims: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright and a dark half, labelled."""
    label = torch.zeros([side] * dims, dtype=torch.int64)
    label[side // 2 :] = 1
    noise = 0.1 * torch.randn([side] * dims, generator=torch.Generator().manual_seed(1))
    return ((label * 1.2 - 0.6) + noise)[None], label


def write_scans(folder: Path) -> None:
    """Eight scans of a bright box in a darker body, at varying places."""
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for i in range(8):
        rng = np.random.default_rng(i)
        image = rng.normal(100, 5, (16, 14, 6)).astype(np.float32)
        label = np.zeros((16, 14, 6), np.uint8)
        x, y = rng.integers(2, 7, 2)
        label[x : x + 6, y : y + 5, 1:5] = 1
        image[label > 0] += 80
        for part, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / part / f"s{i}.nii.gz")


def generator_config(size: object, dims: int) -> GeneratorConfig:
    found = parse_config(
        {
            "method": "pixel",
            "data": {"size": size, "channels": 1, "test_images": 2, "validation_images": 1},
            "network": {"dims": dims, "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
            "diffusion": {"target": "v"},
            "training": {"batch_size": 2, "max_steps": 20, "validate_every": 20, "warmup_steps": 1, "ema_decay": 0.5},
            "sampling": {"steps": 2},
        },
        "test",
    )
    assert isinstance(found, GeneratorConfig)
    return found


def train_generators(scans: Path, root: Path) -> dict[int, Path]:
    """A generator of slices (2) and one of volumes (3)."""
    return {
        2: train_generator(generator_config(16, 2), scans, root / "slices", device="cpu"),
        3: train_generator(generator_config([16, 16, 8], 3), scans, root / "volumes", device="cpu"),
    }


def quick(**data: object) -> PixelClassifierConfig:
    found = parse_config(
        {
            "method": "label-efficient",
            "data": {"labels": ["box"], "pixels_per_class": 200, **data},
            "classifier": {"members": 3, "hidden": [16, 8], "min_steps": 0},
        },
        "test",
    )
    assert isinstance(found, PixelClassifierConfig)
    return found


def in_memory(path: Path) -> Generator:
    return restore_generator(load_model_files(path))


def with_labels(scans: Path, folder: Path, edit: Callable[[str, np.ndarray], None] = lambda name, label: None) -> Path:
    """A copy of the scans whose labels are edited, by name."""
    shutil.copytree(scans, folder)
    for file in (folder / "labels").iterdir():
        image = nib.load(file)
        label = np.asarray(image.dataobj).copy()
        edit(file.name.removesuffix(".nii.gz"), label)
        nib.save(nib.Nifti1Image(label, image.affine), file)
    return folder

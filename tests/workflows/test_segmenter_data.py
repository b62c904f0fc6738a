"""Training data that does not fit the configuration is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.errors import InputError
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.segmenters import FLAT, save_image, tiny_config


def labelled_images(folder: Path, value: int = 1) -> Path:
    for i in range(4):
        image = save_image(folder / "images" / f"cell{'x' * i}.png")
        mask = value * (np.asarray(Image.open(image).convert("L")) > 120).astype(np.uint8)
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / image.name)
    return folder


def test_3d_training_on_images_and_masks_of_255_are_refused(tmp_path: Path) -> None:
    counts = {"test_cases": 1, "validation_cases": 1, "labels": ["bright"], "channels": 3}
    solid = tiny_config(data={**counts, "window": [8, 8, 8]}, training={"max_steps": 1})
    with pytest.raises(InputError, match=r"found a 2D image \(13 x 11\); expected volumes for a 3D model; .*dims to 2"):
        train_segmenter(solid, labelled_images(tmp_path / "a"), tmp_path / "run1", device="cpu")
    flat = tiny_config(**{**FLAT, "data": {**counts, "window": [8, 8]}})
    with pytest.raises(InputError, match=r"masks/cellx*\.png: found the values 0 and 255; .*divide the mask by 255"):
        train_segmenter(flat, labelled_images(tmp_path / "b", 255), tmp_path / "run2", device="cpu")

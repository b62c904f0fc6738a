"""Label maps on a generator's grid, and images back on the grid of the label map."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from medseg_diffusion.errors import InputError
from medseg_diffusion.models.generator import Generator
from medseg_diffusion.models.placed_mask import place_mask
from medseg_diffusion.volumes.volume import Volume
from tests.helpers.generators import mask_config


def generator(**changes: Any) -> Generator:
    """What `place_mask` asks of a generator: its configuration and its classes."""
    config = mask_config(**changes)
    names = ("background", *config.data.labels)
    return cast(Generator, SimpleNamespace(config=config, mask_classes=dict(enumerate(names))))


def volume(shape: tuple[int, int, int], affine: list[float], source: Path | None = None, values: int = 2) -> Volume:
    labels = torch.randint(values, (1, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Volume(labels, np.diag([*affine, 1.0]), source)


VOLUMES = {
    "data": {"size": [12, 12, 12], "channels": 1, "validation_images": 1, "labels": ["square"]},
    "network": {"dims": 3, "channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 4},
}


@pytest.mark.parametrize(
    ("mask", "changes"),
    [
        (volume((12, 9, 7), [-1, -1, 2]), VOLUMES),
        (volume((16, 16, 3), [-1, -1, 2]), {}),
        (volume((16, 12, 1), [-1, -1, 1], Path("mask.png")), {}),
    ],
    ids=["volume", "slices", "picture"],
)
def test_what_a_mask_brings_to_the_models_grid_comes_back_to_its_own(mask: Volume, changes: dict[str, Any]) -> None:
    """Images that are the masks themselves lie on the mask voxel by voxel, however its axes point."""
    placed = place_mask(mask, generator(**changes))
    images = (placed.labels * 255).to(torch.uint8)[..., None]
    assert torch.equal(placed.restored(images), mask.data.float() * 255)


def test_a_picture_is_drawn_as_it_is_in_its_file() -> None:
    mask = volume((16, 16, 1), [-1, -1, 1], Path("mask.png"))
    assert torch.equal(place_mask(mask, generator()).labels[0], mask.data[0, ..., 0].T.long())


def test_labels_are_merged_as_in_the_training() -> None:
    merged = {"size": 16, "channels": 1, "validation_images": 2, "labels": ["any"], "merge_labels": True}
    mask = volume((16, 16, 1), [1, 1, 1], values=3)
    placed = place_mask(mask, generator(data=merged))
    assert torch.equal(placed.volume.data, mask.data.clamp(max=1)) and int(placed.labels.max()) == 1
    with pytest.raises(InputError, match="label 2; expected labels 0 to 1"):
        place_mask(mask, generator())


def test_a_voxel_size_of_the_model_is_kept() -> None:
    """A mask of 2 mm for a model of 1 mm has twice the voxels there, and its image the voxels of the mask."""
    placed = place_mask(volume((6, 5, 4), [2, 2, 2]), generator(**VOLUMES, preprocessing={"spacing_mm": [1, 1, 1]}))
    assert placed.placement.shape == (12, 10, 8) and placed.labels.shape == (1, 12, 12, 12)
    assert placed.restored(torch.zeros(1, 12, 12, 12, 3, dtype=torch.uint8)).shape == (3, 6, 5, 4)
    with pytest.raises(InputError, match="14 x 10 x 8 voxels on the model's grid; expected 3 x 3 x 3 to 12 x 12 x 12"):
        place_mask(volume((7, 5, 4), [2, 2, 2]), generator(**VOLUMES, preprocessing={"spacing_mm": [1, 1, 1]}))

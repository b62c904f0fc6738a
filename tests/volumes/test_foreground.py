"""Where a scan shows something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_diffusion.volumes.foreground import foreground
from medseg_diffusion.volumes.io import read_volume


def ball(size: int = 40, radius: float = 14.0) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 3, indexing="ij")
    return sum(axis**2 for axis in axes) < radius**2


def noise(seed: int, *size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_a_head_in_noisy_air_is_found_with_its_dark_inside_and_without_what_lies_beside_it() -> None:
    head = ball()
    image = 10 * noise(0, 40, 40, 40) + 90 * head
    image[15:25, 15:25, 15:25] = 3.0  # as dark as air, inside
    image[2:5, 2:5, 2:5] = 95.0  # dirt
    found = foreground(image)
    assert overlap(found, head) > 0.9 and bool(found[18:22, 18:22, 18:22].all()) and not bool(found[:6, :6, :6].any())


def test_a_scan_of_three_or_four_slices_is_no_colour_image() -> None:
    """Where an image library would take the last axis for colours."""
    image = (10 * noise(4, 40, 40, 40) + 90 * ball())[..., 18:22]
    assert overlap(foreground(image), ball()[..., 18:22]) > 0.9 and bool(foreground(image[..., :3]).any())


def test_what_was_stripped_counts_to_its_rim() -> None:
    brain = ball()
    image = torch.where(brain, 40 + 60 * noise(1, 40, 40, 40), torch.tensor(0.0))
    assert torch.equal(foreground(image), brain)
    assert torch.equal(foreground(1e-6 * image - 5), brain)  # neither unit nor offset matter


def test_zeros_between_noise_in_air_are_no_stripped_background() -> None:
    head = ball()
    air = (noise(2, 40, 40, 40) - 0.6).clamp(min=0) * 10
    assert overlap(foreground(air + 90 * head), head) > 0.9


def test_all_of_a_crop_from_inside_counts_and_nothing_of_a_constant() -> None:
    crop = 50 + 50 * noise(3, 20, 24, 18)
    crop[5:9, 5:9, 5:9] = 5.0
    assert bool(foreground(crop).all())
    assert not bool(foreground(torch.full((6, 6, 6), 3.0)).any())


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "pattern", "low", "high"),
    [
        ("lgg_flair/imagesTr", "TCGA_[CF]*.nii.gz", 0.15, 0.65),
        ("ms_lesions", "*/flair.nii.gz", 0.13, 0.17),
        ("Task04_Hippocampus/imagesTr", "hippocampus_00[1-6].nii.gz", 0.99, 1.0),
    ],
)
def test_real_scans_have_a_sensible_share(data_folder: Path, folder, pattern, low, high) -> None:
    files = sorted((data_folder / folder).glob(pattern))[:6]
    if not files:
        pytest.skip(f"no {folder} in {data_folder}")
    shares = [float(foreground(read_volume(file).data[0]).float().mean()) for file in files]
    assert all(low <= share <= high for share in shares), np.round(shares, 3)


@pytest.mark.data
def test_a_stripped_brain_is_kept_whole(data_folder: Path) -> None:
    files = sorted((data_folder / "ms_lesions").glob("*/flair.nii.gz"))
    if not files:
        pytest.skip(f"no ms_lesions in {data_folder}")
    image = read_volume(files[0]).data[0]
    brain = image != image.mode(-1).values.mode().values.mode().values  # 0, but for what interpolation overshot
    assert float((foreground(image) & brain).sum() / brain.sum()) > 0.98


def test_a_head_that_the_image_cuts_is_found_up_to_the_border() -> None:
    """Closing without room around the image takes three pixels from whatever reaches its border."""
    whole = 10 * noise(5, 40, 40, 40) + 90 * ball(radius=16.0)
    found, cut = foreground(whole)[12:], foreground(whole[12:])
    assert not bool((found & ~cut).any()) and bool(cut[0, 20, 12:28].all())
    assert overlap(found, cut) > 0.97  # the border is no outline: no scalp is taken off there


def test_pixels_need_not_be_square() -> None:
    fine = 10 * noise(6, 80, 40, 40) + 90 * ball().repeat_interleave(2, 0)
    square = foreground(fine, (1.0, 2.0))
    coarse = foreground(fine[::2], (2.0, 2.0))
    assert overlap(square[::2], coarse) > 0.97

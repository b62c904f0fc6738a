"""Packed images: every image in its place, examples exact."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion.data.image_cache import ImageExamples, packed, to_levels, to_unit
from medseg_diffusion.errors import InputError
from tests.helpers.tiny_imagenet import jpeg, tiny_imagenet


def test_the_cache_holds_every_image_in_its_place(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path)
    images = packed(folder, tmp_path / "store", 64)
    assert images.images.shape == (15, 64, 64, 3)
    assert {part: len(found) for part, found in images.parts.items()} == {"train": 6, "validation": 4, "test": 5}
    for part in ("train", "validation", "test"):
        for position in images.part(part):
            with Image.open(folder / images.names[position].removeprefix("tiny-imagenet-200/")) as image:
                assert np.array_equal(images.images[position], np.asarray(image.convert("RGB")))


def test_the_cache_is_made_once_and_again_when_the_source_changes(tmp_path: Path) -> None:
    folder, store, calls = tiny_imagenet(tmp_path), tmp_path / "store", []
    for _ in range(2):
        packed(folder, store, 64, on_file=lambda done, total: calls.append(done))
    assert calls == list(range(1, 16))
    (folder / "test" / "images" / "test_9.JPEG").write_bytes(jpeg(9))
    assert len(packed(folder, store, 64).part("test")) == 6
    assert len(packed(folder, store, 32).images[0]) == 32


def test_examples_are_exact_and_mirrored_half_of_the_time(tmp_path: Path) -> None:
    images = packed(tiny_imagenet(tmp_path), tmp_path / "store", 64)
    plain = ImageExamples(images, images.part("train"), flip=False)
    example = plain.example(1, torch.Generator())
    assert torch.equal(to_levels(example["image"]).permute(1, 2, 0), torch.from_numpy(images.images[1].copy()))
    assert int(example["label"]) == images.labels[1]
    mirrored = ImageExamples(images, images.part("train"))
    draws = [mirrored.example(1, torch.Generator().manual_seed(i))["image"] for i in range(40)]
    kept = sum(torch.equal(draw, example["image"]) for draw in draws)
    flipped = sum(torch.equal(draw, example["image"].flip(-1)) for draw in draws)
    assert kept + flipped == 40 and 8 < flipped < 32


def test_levels_survive_the_way_to_the_unit_range_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_levels(to_unit(levels)), levels)
    assert float(to_unit(levels).min()) == -1 and float(to_unit(levels).max()) == 1


def test_scans_as_whole_volumes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    whole = np.random.default_rng(0).integers(1, 200, (5, 6, 7)).astype(np.float32)
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(whole, np.eye(4)), tmp_path / "data" / f"{name}.nii.gz")
    images = packed(tmp_path / "data", tmp_path / "store", (8, 8, 8), 1, held_out=(0, 1))
    assert images.images.shape == (2, 8, 8, 8, 1)
    inside = images.images[0, 1:6, 1:7, 0:7, 0].astype(float)
    assert np.corrcoef(inside.ravel(), whole.ravel())[0, 1] > 0.99
    assert int(images.images[0, 0].max()) == 0  # what was added is air
    pair = [ImageExamples(images, images.part("train"), flip).example(0, generator)["image"]
            for flip, generator in ((False, one_that_draws(0.1)), (True, one_that_draws(0.1)))]  # fmt: skip
    assert pair[0].shape == (1, 8, 8, 8) and torch.equal(pair[0].flip(1), pair[1])  # left and right change places
    with pytest.raises(InputError, match=r"scans, for data\.size of three sides"):
        packed(tiny_imagenet(tmp_path), tmp_path / "store", (8, 8, 8))


def one_that_draws(value: float) -> torch.Generator:
    """A generator whose first uniform number is below ``value``."""
    for seed in range(1000):
        if float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < value:
            return torch.Generator().manual_seed(seed)
    raise AssertionError

"""Cached latents belong to their images, also when mirrored or opened by a worker."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medseg_diffusion.data.image_cache import packed
from medseg_diffusion.data.latent_cache import LatentExamples, cached_latents
from medseg_diffusion.tasks.image import reduced


def test_the_low_resolution_image_is_that_of_the_latent_be_it_mirrored_or_not(pictures, tmp_path: Path) -> None:
    """Latents that are the images themselves show which of both sides an example took."""
    images = packed(pictures, tmp_path, 16, 3, held_out=(0, 4))
    codec = SimpleNamespace(encode=lambda image: image)
    latents = cached_latents(images, codec, "same", torch.device("cpu"))
    examples = LatentExamples(latents, images, images.part("train"), True, partial(reduced, factor=2))
    seen = set()
    for seed in range(8):
        found = examples.example(0, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found["low"], reduced(found["image"][None], 2)[0], atol=2e-3, rtol=0)
        seen.add(tuple(found["low"].flatten().tolist()))
    assert len(seen) == 2


def test_workers_open_packed_images_and_latents_again(pictures, tmp_path: Path) -> None:
    images = packed(pictures, tmp_path, 16, held_out=(2, 4))
    assert len(pickle.dumps(images)) < 2000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images)).images, images.images)

    class Halved:
        def encode(self, image: torch.Tensor) -> torch.Tensor:
            return image[:, :, ::2, ::2]

    latents = cached_latents(images, Halved(), "key", torch.device("cpu"))
    assert not latents[images.part("test")].any() and latents[images.part("validation")].any()
    examples = LatentExamples(latents, images, images.part("train"), flip=False)
    copy = pickle.loads(pickle.dumps(examples))
    assert len(pickle.dumps(examples)) < 4000
    torch.testing.assert_close(
        copy.example(3, torch.Generator())["image"], examples.example(3, torch.Generator())["image"]
    )


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(pictures, small_disk: Path) -> None:
    """Written through a memory map, it would end the process with a bus error."""
    images = packed(pictures, small_disk, 32, 3, held_out=(0, 4))
    before = sorted(images.folder.iterdir())
    with pytest.raises(OSError, match="No space left"):
        cached_latents(images, SimpleNamespace(encode=lambda image: image), "key", torch.device("cpu"))
    assert sorted(images.folder.iterdir()) == before

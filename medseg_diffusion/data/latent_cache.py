"""Latents of packed images, computed once: training a latent generator never touches the autoencoder again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.files import whole_file

from .image_cache import PackedImages, mirrored_axis, to_unit

BATCH = 64


class Encoder(Protocol):
    """The half of a codec that is needed here: images (B, C, H, W) to latents."""

    def encode(self, image: Tensor) -> Tensor: ...


@torch.no_grad()
def cached_latents(
    images: PackedImages,
    codec: Encoder,
    key: str,
    device: torch.device,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> np.memmap[Any, np.dtype[np.float16]]:
    """Latents (N, 2, C', *s) float16 of the images of the training and validation sides, and of their mirror images.

    Memory-mapped; those of the test side are zeros that take no space.

    The latent of a mirror image is not the mirror image of the latent, so both are kept. Latents are the mean of the
    encoder: the noise of its variance is far below what the diffusion adds.

    Args:
        images: the packed images.
        codec: the trained autoencoder, on ``device``.
        key: what tells this autoencoder's latents from another's, e.g. the SHA-256 of its weights.
        device: where to compute.
        on_image: called with (images done, all).
    """
    count, *size, channels = images.images.shape
    shape = tuple(codec.encode(torch.zeros(1, channels, *size, device=device)).shape[1:])
    mirror = mirrored_axis(len(size))
    file = images.folder / f"latents-{key[:16]}.f16"
    if not file.is_file():
        with whole_file(file) as temporary:
            made = np.memmap(temporary, np.float16, "w+", shape=(count, 2, *shape))
            wanted = np.sort(np.concatenate([images.part("train"), images.part("validation")]))
            for first in range(0, len(wanted), BATCH):
                chosen = wanted[first : first + BATCH]
                batch = to_unit(torch.from_numpy(np.array(images.images[chosen])).movedim(-1, 1)).to(device)
                for side, image in enumerate((batch, batch.flip(mirror))):
                    made[chosen, side] = codec.encode(image).float().cpu().numpy()
                on_image(min(first + BATCH, len(wanted)), len(wanted))
            made.flush()
    return np.memmap(file, np.float16, "r", shape=(count, 2, *shape))


class LatentExamples:
    """Latents as training examples, with probability 1/2 those of the mirror image if ``flip``.

    ``low`` makes the low-resolution image (1, C, *s) that conditions an upsampler from the image (1, C, *S) in [-1, 1].
    """

    def __init__(
        self,
        latents: np.memmap[Any, np.dtype[np.float16]],
        images: PackedImages,
        positions: npt.NDArray[np.int64],
        flip: bool = True,
        low: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.latents = latents
        self.images = images
        self.positions = positions
        self.flip = flip
        self.low = low

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: a memory map would travel as a copy of the whole file."""
        return {**self.__dict__, "latents": (self.latents.filename, self.latents.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file, shape = state["latents"]
        self.__dict__.update(state, latents=np.memmap(file, np.float16, "r", shape=shape))

    def __len__(self) -> int:
        return len(self.positions)

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The "image" (C', *s) float32, a standardised latent, "label" () int64, and "low" where it is wanted."""
        position = self.positions[index]
        side = int(self.flip and float(torch.rand((), generator=generator)) < 0.5)
        latent = torch.from_numpy(self.latents[position, side].astype(np.float32))
        found = {"image": latent, "label": torch.tensor(int(self.images.labels[position]))}
        if self.low is not None:
            image = to_unit(torch.from_numpy(np.array(self.images.images[position])).movedim(-1, 0))[None]
            found["low"] = self.low(image.flip(mirrored_axis(image.ndim - 2)) if side else image)[0]
        return found

"""Latents of packed images, computed once, so that training a latent generator does not need the autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg_diffusion.files import whole_file

from .image_cache import PackedImages, images_at_once, mask_of, mirrored_axis, to_unit

BATCH = 64


class Encoder(Protocol):
    """The encoder of a codec: images (B, C, *S) to latents (B, C', *s)."""

    def encode(self, image: Tensor) -> Tensor: ...


@torch.no_grad()
def cached_latents(
    images: PackedImages,
    codec: Encoder,
    key: str,
    device: torch.device,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> np.memmap[Any, np.dtype[np.float16]]:
    """Latents (N, 2, C', *s) float16 of the training and validation images and of their mirror images.

    They are memory-mapped. Latents of test images are zeros, which take no space on disk. Both latents are stored
    because the latent of a mirror image is not the mirror image of the latent. Latents are the encoder's mean: the
    noise of its variance is far smaller than the noise of the diffusion.

    Args:
        images: the packed images.
        codec: the trained autoencoder, on ``device``.
        key: identifies the autoencoder, for example the SHA-256 of its weights.
        device: device of the computation.
        on_image: called with (images done, all).

    Raises:
        OSError: they cannot be written, as on a full disk; half of them are not left behind.
    """
    count, *size, channels = images.images.shape
    shape = tuple(codec.encode(torch.zeros(1, channels, *size, device=device)).shape[1:])
    mirror = mirrored_axis(len(size))
    file = images.folder / f"latents-{key[:16]}.f16"
    if not file.is_file():
        each = 2 * math.prod(shape) * np.dtype(np.float16).itemsize
        # Written as a file, not through a memory map, which a full disk would end with a bus error.
        with whole_file(file) as temporary, temporary.open("wb") as written:
            written.truncate(count * each)
            positions = np.sort(np.concatenate([images.part("train"), images.part("validation")]))
            at_once = images_at_once(size, BATCH)
            for first in range(0, len(positions), at_once):
                part = positions[first : first + at_once]
                batch = to_unit(torch.from_numpy(np.array(images.images[part])).movedim(-1, 1)).to(device)
                both = torch.stack([codec.encode(image) for image in (batch, batch.flip(mirror))], 1)
                for position, latents in zip(part, both.half().cpu().numpy(), strict=True):
                    written.seek(position * each)
                    written.write(latents.tobytes())
                on_image(min(first + at_once, len(positions)), len(positions))
    return np.memmap(file, np.float16, "r", shape=(count, 2, *shape))


class LatentExamples:
    """Latents as training examples.

    Args:
        latents: from `cached_latents`.
        images: the packed images.
        positions: positions of the examples among the images.
        flip: use the latent of the mirror image with probability 1/2.
        low: for an upsampler, makes its condition: the image (1, C, *S) in [-1, 1] to the low-resolution image
            (1, C, *s).
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
        """Pickles the file's name alone. A memory map would be sent to worker processes as a copy of the file."""
        return {**self.__dict__, "latents": (self.latents.filename, self.latents.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file, shape = state["latents"]
        self.__dict__.update(state, latents=np.memmap(file, np.float16, "r", shape=shape))

    def __len__(self) -> int:
        return len(self.positions)

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The "image" (C', *s) float32, which is a standardised latent, the "label" () int64, and "low" for upsamplers.

        Images with masks have "mask" (*S) uint8 at the resolution of the image.

        The draw of the mirror image comes from ``generator``.
        """
        position = self.positions[index]
        mirrored = int(self.flip and float(torch.rand((), generator=generator)) < 0.5)
        latent = torch.from_numpy(self.latents[position, mirrored].astype(np.float32))
        example = {"image": latent, "label": torch.tensor(int(self.images.labels[position]))}
        if self.low is not None:
            image = to_unit(torch.from_numpy(np.array(self.images.images[position])).movedim(-1, 0))[None]
            example["low"] = self.low(image.flip(mirrored_axis(image.ndim - 2)) if mirrored else image)[0]
        return {**example, **mask_of(self.images, position, bool(mirrored))}

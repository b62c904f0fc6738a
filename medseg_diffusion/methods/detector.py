"""The interface of anomaly detectors: images to maps of how much they differ from healthy images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from medseg_diffusion.diffusion.noise import NoiseSource, generators


class Detection(NamedTuple):
    """What a detector makes of images.

    Attributes:
        score: Anomaly maps (B, 1, *S), 0 or above.
        healthy: The healthy counterparts that the method produced, (B, C, *S), about [-1, 1].
    """

    score: Tensor
    healthy: Tensor


class Detector(Protocol):
    """A method with its trained parts, ready to score images. Methods inherit from it."""

    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        """Anomaly maps and healthy counterparts of images (B, C, *S) in [-1, 1].

        Those of an image depend only on the image and its seed, not on the other images of the batch.
        """
        ...

    def score(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The anomaly maps alone, (B, 1, *S)."""
        return self.detect(images, seeds).score

    @property
    def evaluations(self) -> int:
        """Denoiser calls per image."""
        ...


Residual = Literal["absolute", "bright"]


def residual(image: Tensor, healthy: Tensor, kind: Residual = "absolute") -> Tensor:
    """The difference (B, 1, *S) between images and their healthy versions (B, C, *S), averaged over the channels.

    "absolute" is |image - healthy|, as published. "bright" is max(image - healthy, 0), for lesions that are known to be
    bright, such as tumours and white-matter lesions on FLAIR.
    """
    difference = image - healthy
    return (difference.abs() if kind == "absolute" else difference.clamp(min=0)).mean(dim=1, keepdim=True)


def noise_by_seed(noise: NoiseSource, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Noise (B, C, *S) for images of that shape. Images with the same seed have the same noise, which is drawn once.

    The slices of a scan share their noise, because simplex noise takes longer than the network.
    """
    place = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
    drawn = noise(images.shape[1:], generators(list(place)), images)
    return drawn[torch.tensor([place[seed] for seed in seeds], device=drawn.device)]

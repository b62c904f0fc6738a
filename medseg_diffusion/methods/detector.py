"""What all methods of anomaly detection are: images to maps of how unlike healthy ones they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor


class Detector(Protocol):
    """A method with its trained parts, ready to score images."""

    def score(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Anomaly maps (B, 1, *S), 0 or above, of images (B, C, *S) in [-1, 1].

        The map of an image depends on the image and its own seed alone, never on what shares its batch.
        """
        ...

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser for each image."""
        ...


Residual = Literal["absolute", "bright"]


def residual(image: Tensor, healthy: Tensor, kind: Residual = "absolute") -> Tensor:
    """How an image differs from its healthy one, (B, 1, *S), the mean over the channels of (B, C, *S).

    "absolute" is |image - healthy|, as published; "bright" is 0 where the image is darker: for lesions of which it is
    known that they are bright, such as tumours and white-matter lesions on FLAIR.
    """
    difference = image - healthy
    return (difference.abs() if kind == "absolute" else difference.clamp(min=0)).mean(dim=1, keepdim=True)

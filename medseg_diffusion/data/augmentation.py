"""Random changes of training examples that keep their labels valid.

A draw's changes depend only on its seed, not on where they are computed. The workers change slices. Volumes wait
until they are on a GPU: one core takes 0.2 s for 96^3 voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the augmentation, for images in about [-1, 1].

    Attributes:
        probability: probability of each kind of change; 0 switches augmentation off.
        rotate_degrees: rotation about every axis, uniform in +- this value.
        scale: zoom, uniform in 1 +- this value.
        flip_axes: spatial axes that may be mirrored. The anatomy must be symmetric along them.
        noise_std: largest standard deviation of the added noise.
        blur_sigma: largest standard deviation of the Gaussian smoothing, in voxels.
        gamma: range of the exponent of the intensities.
        intensity: intensities are scaled by 1 +- this value and shifted by +- this value.
    """

    probability: float = 0.3
    rotate_degrees: float = 15.0
    scale: float = 0.15
    flip_axes: Sequence[int] = ()
    noise_std: float = 0.1
    blur_sigma: float = 0.8
    gamma: tuple[float, float] = (0.7, 1.5)
    intensity: float = 0.15


class Augmenter:
    """Applies an `Augmentation` to an image (C, *S) and its labels (*S), in 2D or 3D."""

    def __init__(self, config: Augmentation, dims: int) -> None:
        # Imported here: importing MONAI takes seconds, and segmenting does not need it.
        from monai.transforms import (
            Compose,
            RandAdjustContrastd,
            RandAffined,
            RandFlipd,
            RandGaussianNoised,
            RandGaussianSmoothd,
            RandScaleIntensityd,
            RandShiftIntensityd,
        )

        p, both, image = config.probability, ["image", "label"], ["image"]
        angles = [np.deg2rad(config.rotate_degrees)] * (1 if dims == 2 else 3)
        self.transform = Compose(
            [
                *(RandFlipd(both, prob=0.5 if p > 0 else 0.0, spatial_axis=axis) for axis in config.flip_axes),
                RandAffined(
                    both,
                    prob=min(1.0, 2 * p),
                    rotate_range=angles,
                    scale_range=[config.scale] * dims,
                    mode=["bilinear", "nearest"],
                    padding_mode="border",
                ),
                RandGaussianSmoothd(image, prob=p, **{f"sigma_{axis}": (0.0, config.blur_sigma) for axis in "xyz"}),
                RandAdjustContrastd(image, prob=p, gamma=config.gamma),
                RandScaleIntensityd(image, prob=p, factors=config.intensity),
                RandShiftIntensityd(image, prob=p, offsets=config.intensity),
                RandGaussianNoised(image, prob=p, std=config.noise_std),
            ]
        )

    def __call__(self, image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`changed` by a seed that is drawn from ``generator``."""
        return self.changed(image, label, self.draw_seed(generator))

    def changed(self, image: Tensor, label: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The changed (image, label), of the same shapes and types and on the same device.

        Args:
            image: (C, *S) float.
            label: (*S) integer.
            seed: below 2**31; all draws come from it.
        """
        self.transform.set_random_state(seed=seed)
        out = self.transform({"image": image, "label": label[None]})
        # Plain tensors, because MONAI's MetaTensor slows down every operation of the network.
        return out["image"].as_tensor().float(), out["label"].as_tensor()[0].to(label.dtype)

    @staticmethod
    def draw_seed(generator: torch.Generator) -> int:
        return int(torch.randint(2**31, (), generator=generator))

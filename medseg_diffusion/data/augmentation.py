"""Random changes of a training example that leave its labels true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the augmentation; images are expected in about [-1, 1].

    Attributes:
        probability: of each kind of change, 0 switches augmentation off.
        rotate_degrees: rotations about every axis, uniform in +- this.
        scale: zoom, uniform in 1 +- this.
        flip_axes: spatial axes that may be mirrored; only those along which anatomy is symmetric.
        noise_std: largest standard deviation of added noise.
        blur_sigma: largest sigma of Gaussian smoothing, in voxels.
        gamma: range of the exponent of the intensities.
        intensity: intensities are scaled by 1 +- this and shifted by +- this.
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
    """Applies an `Augmentation` to an image (C, *S) and its labels (*S), 2D or 3D, from an explicit generator."""

    def __init__(self, config: Augmentation, dims: int) -> None:
        # Imported where used: MONAI takes seconds, which segmenting does not need.
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
        """Returns the changed (image, label), same shapes and dtypes."""
        self.transform.set_random_state(seed=int(torch.randint(2**31, (), generator=generator)))
        out = self.transform({"image": image, "label": label[None]})
        # Plain tensors: MONAI's MetaTensor would slow every operation of the network that follows.
        return out["image"].as_tensor().float(), out["label"].as_tensor()[0].to(label.dtype)

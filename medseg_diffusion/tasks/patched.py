"""Patched diffusion (pDDPM, Behrendt et al. 2023, arXiv 2303.03758): one patch of an image is noised.

The network sees the rest of the image without noise and restores the patch from it, so that the restored anatomy
matches that of the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import NoiseSource, draw_noised, generators, uniform_times

Box = tuple[slice, ...]
"""A patch: its extent along each spatial axis."""


class PatchedDiffusion(nn.Module):
    """A restorer of patches: batch -> training loss.

    Args:
        denoiser: of images (B, C, *S) in [-1, 1]; its network predicts x0.
        noise: Gaussian or simplex (published).
        patch: side of the patches of the grid (`boxes`), None for half of each side of the image.

    Raises:
        ValueError: the network predicts something else; in training, a patch is larger than the image.
    """

    def __init__(self, denoiser: NetworkDenoiser, noise: NoiseSource, patch: int | None = None) -> None:
        super().__init__()
        if denoiser.target != "x0":
            raise ValueError(f"a restorer of patches predicts x0, not {denoiser.target}")
        self.denoiser = denoiser
        self.noise = noise
        self.patch = patch

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of "image" (B, C, *S) and "seed" (B,) int64: mean |x0 - prediction| in the patches.

        Time and patch, both uniform, and the noise come from the examples' own seeds.
        """
        x0, schedule = batch["image"], self.denoiser.schedule
        own = generators(batch["seed"].tolist())
        # The order of the draws is part of what a seed means: time, patch, noise.
        t = uniform_times(schedule.num_steps, own)
        grid = boxes(x0.shape[2:], self.patch)
        chosen = [grid[i] for i in torch.stack([torch.randint(len(grid), (), generator=g) for g in own]).tolist()]
        noised = draw_noised(schedule, x0, own, self.noise, t)
        within = inside(chosen, x0)
        error = (self.denoiser(torch.where(within, noised.x_t, x0), noised.t).x0 - x0).abs()
        # All patches have the same size. Picking their positions out would wait for the device to count them.
        share = math.prod(part.stop - part.start for part in chosen[0]) / math.prod(x0.shape[2:])
        return (error * within).mean() / share


def boxes(size: Sequence[int], patch: int | None = None) -> list[Box]:
    """The patches of a grid that covers an image of spatial ``size``; all have the same size.

    Args:
        size: of the image.
        patch: side of the patches; None for half of each side of the image, rounded up. Where it does not divide a
            side, the last patch ends at the border and overlaps the one before it.

    Raises:
        ValueError: the patch is larger than the image, or empty.
    """
    sides = [(n + 1) // 2 if patch is None else patch for n in size]
    if any(not 1 <= side <= n for side, n in zip(sides, size, strict=True)):
        raise ValueError(f"a patch of an image of {tuple(size)} must have a side of 1 to {min(size)}, got {patch}")
    axes = [
        [slice(first, first + side) for first in (min(i, n - side) for i in range(0, n, side))]
        for n, side in zip(size, sides, strict=True)
    ]
    return list(product(*axes))


def inside(patches: Sequence[Box], like: Tensor) -> Tensor:
    """Bool masks (N, 1, *S), each true inside one of N patches, for images of the shape of ``like`` (B, C, *S)."""
    masks = torch.zeros((len(patches), 1, *like.shape[2:]), dtype=torch.bool, device=like.device)
    for mask, box in zip(masks, patches, strict=True):
        mask[(slice(None), *box)] = True
    return masks

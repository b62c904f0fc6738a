"""Small networks that classify pixels by their features (Baranchuk et al. 2022, arXiv 2112.03126, sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelClassifier(nn.Module):
    """Features (P, features) of P pixels to logits (P, num_classes): two hidden layers, ReLU before batch norm.

    Args:
        features: of a pixel.
        num_classes: background included.
        hidden: widths; None takes the published ones, 128 and 32 below 30 classes, else 256 and 128.
    """

    def __init__(self, features: int, num_classes: int, hidden: tuple[int, int] | None = None) -> None:
        super().__init__()
        wide, narrow = hidden or ((128, 32) if num_classes < 30 else (256, 128))
        self.first = nn.Linear(features, wide)
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm1d(wide),
            nn.Linear(wide, narrow),
            nn.ReLU(),
            nn.BatchNorm1d(narrow),
            nn.Linear(narrow, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.rest(self.first(features))
        return logits


class PixelClassifiers(nn.Module):
    """An ensemble of pixel classifiers on standardised features.

    The features' means and deviations, ``mean`` and ``std`` (features,), are buffers: activations of different blocks
    differ in size by orders of magnitude, and one learning rate has to suit them all.

    Args:
        members: number of classifiers.
        features: of a pixel, over all blocks.
        num_classes: background included.
        hidden: see `PixelClassifier`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, members: int, features: int, num_classes: int, hidden: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.members = nn.ModuleList(PixelClassifier(features, num_classes, hidden) for _ in range(members))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (members, P, K) of the features (P, features) of P pixels."""
        standard = (features - self.mean) / self.std
        return torch.stack([member(standard) for member in self.members])

    def maps(self, blocks: Sequence[Tensor], size: Sequence[int], members: int | None = None) -> Tensor:
        """Logits (B, members, K, *size) of whole images, from the activations of blocks, each (B, C_b, *S_b).

        The same as `forward` of all activations upsampled linearly to ``size``, to rounding, without ever holding
        them there: a layer that acts on each pixel alone commutes with the upsampling, whose weights sum to 1. So
        the first layer is applied at the resolution of each block, and only its few channels are upsampled.

        Args:
            blocks: activations, in the order of the features.
            size: of the images.
            members: as many of the first ones; None takes all.
        """
        channels = [block.shape[1] for block in blocks]
        grouped: dict[torch.Size, list[int]] = {}
        for i, block in enumerate(blocks):
            grouped.setdefault(block.shape[2:], []).append(i)
        together = {shape: torch.cat([blocks[i] for i in which], 1) for shape, which in grouped.items()}
        found = []
        for member in list(self.members)[:members]:
            first: nn.Linear = member.first  # type: ignore[assignment]
            weight = first.weight / self.std
            parts = weight.split(channels, dim=1)
            hidden = (first.bias - weight @ self.mean).reshape(1, -1, *[1] * len(size))
            for shape, which in grouped.items():
                columns = torch.cat([parts[i] for i in which], 1)
                coarse = torch.einsum("hc,bcn->bhn", columns, together[shape].flatten(2)).unflatten(2, shape)
                hidden = hidden + upsampled(coarse, size)
            pixels = hidden.movedim(1, -1).flatten(0, -2)
            logits: Tensor = member.rest(pixels)  # type: ignore[operator]
            found.append(logits.unflatten(0, (len(blocks[0]), *size)).movedim(-1, 1))
        return torch.stack(found, 1)


def upsampled(block: Tensor, size: Sequence[int]) -> Tensor:
    """Activations (B, C, *S) linearly at ``size``, as whole images lie on one another (corners not aligned)."""
    if tuple(block.shape[2:]) == tuple(size):
        return block
    mode = "bilinear" if block.ndim == 4 else "trilinear"
    return F.interpolate(block, tuple(size), mode=mode, align_corners=False)


def gathered(block: Tensor, positions: Tensor, size: Sequence[int]) -> Tensor:
    """Rows (P, C) of what `upsampled` would give at P pixels of an image, without upsampling the rest.

    Args:
        block: activations (C, *S) of one image.
        positions: (P, dims) int64 indices of pixels in an image of ``size``.
        size: of the image.
    """
    # grid_sample wants the last axis first, in units where the image reaches from -1 to 1.
    sides = torch.tensor(list(size), device=positions.device, dtype=torch.float32)
    where = ((2 * positions.float() + 1) / sides - 1).flip(-1)
    grid = where.reshape(1, 1, *[1] * (len(size) - 2), -1, len(size)).to(block.dtype)
    rows = F.grid_sample(block[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return rows.flatten(2)[0].T

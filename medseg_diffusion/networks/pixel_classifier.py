"""Small networks that classify pixels by their features (Baranchuk et al. 2022, arXiv 2112.03126, sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelClassifier(nn.Module):
    """Features (P, features) of P pixels to logits (P, num_classes): two hidden layers, ReLU before batch norm.

    Args:
        features: number of features of a pixel.
        num_classes: number of classes, background included.
        hidden: widths of the hidden layers. None is the published choice: 128 and 32 below 30 classes, else 256 and
            128.
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

    The features' means and standard deviations, ``mean`` and ``std`` (features,), are buffers. Activations of different
    blocks differ by orders of magnitude; standardised, they can be trained with one learning rate.

    Args:
        members: number of classifiers.
        features: number of features of a pixel, over all blocks.
        num_classes: number of classes, background included.
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
        """Logits (members, P, K) from the features (P, features) of P pixels."""
        standard = (features - self.mean) / self.std
        return torch.stack([member(standard) for member in self.members])

    def maps(self, blocks: Sequence[Tensor], size: Sequence[int], members: int | None = None) -> Tensor:
        """Logits (B, members, K, *size) of whole images, from the activations (B, C_b, *S_b) of each block.

        Up to rounding, this equals `forward` in evaluation mode on all activations, upsampled linearly to ``size``. It
        needs much less memory: a linear layer on each pixel commutes with the upsampling, whose weights sum to 1, so
        the first layer is applied at the resolution of each block and only its few output channels are upsampled. The
        computation is in float32, even under autocast.

        Args:
            blocks: activations, in the order of the features.
            size: size of the images.
            members: number of members, from the first on; None for all.
        """
        batch, channels = len(blocks[0]), [block.shape[1] for block in blocks]
        with torch.autocast(blocks[0].device.type, enabled=False):
            # (C_b, B * N), standardised before the multiplication, because means are far larger than deviations.
            standard = [
                (block.float().movedim(1, 0).flatten(1) - mean[:, None]) / std[:, None]
                for block, mean, std in zip(blocks, self.mean.split(channels), self.std.split(channels), strict=True)
            ]
            return torch.stack(
                [
                    self._map(member, standard, [block.shape[2:] for block in blocks], batch, size)  # type: ignore[arg-type]
                    for member in list(self.members)[:members]
                ],
                1,
            )

    def _map(
        self,
        member: PixelClassifier,
        standard: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        batch: int,
        size: Sequence[int],
    ) -> Tensor:
        """Logits (B, K, *size) of one member."""
        coarse: dict[torch.Size, Tensor] = {}
        for weight, block, shape in zip(
            member.first.weight.split([len(block) for block in standard], 1), standard, shapes, strict=True
        ):
            coarse[shape] = coarse[shape].addmm_(weight, block) if shape in coarse else weight @ block
        # Added in place, one block after another, because these are the largest tensors.
        hidden = member.first.bias.new_zeros(batch, len(member.first.bias), *size)
        for shape, part in coarse.items():
            hidden += upsampled(part.unflatten(1, (batch, *shape)).movedim(1, 0), size)
        hidden = (hidden.flatten(2) + member.first.bias[:, None]).relu_()
        _, norm, second, _, last_norm, last = member.rest
        weight, bias = _folded(norm, second)  # type: ignore[arg-type]
        hidden = (weight @ hidden + bias[:, None]).relu_()
        weight, bias = _folded(last_norm, last)  # type: ignore[arg-type]
        return (weight @ hidden + bias[:, None]).unflatten(2, tuple(size))


def _folded(norm: nn.BatchNorm1d, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer that includes the batch normalisation (running statistics) before it."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return linear.weight * scale, linear.bias + linear.weight @ (norm.bias - norm.running_mean * scale)


def upsampled(block: Tensor, size: Sequence[int]) -> Tensor:
    """Activations (B, C, *S) interpolated linearly to ``size``; the image's borders, not the corner pixels, align."""
    if tuple(block.shape[2:]) == tuple(size):
        return block
    mode = "bilinear" if block.ndim == 4 else "trilinear"
    return F.interpolate(block, tuple(size), mode=mode, align_corners=False)


def gathered(block: Tensor, positions: Tensor, size: Sequence[int]) -> Tensor:
    """The values (P, C) of `upsampled` at P pixels of an image, without upsampling the other pixels.

    Args:
        block: activations (C, *S) of one image.
        positions: (P, dims) int64, indices of the pixels, on the CPU.
        size: size of the image.
    """
    rows = block.new_zeros(len(positions), len(block))
    lower, upper, share = [], [], []
    for axis, side in enumerate(size):
        # The same rounding as in `interpolate`: the scale to float32, then the sum once. Otherwise weights would differ
        # by 1e-5 at index 100.
        coarse = block.shape[1 + axis]
        scale = float(torch.tensor(coarse) / side)
        x = ((positions[:, axis].double() + 0.5) * scale - 0.5).float().clamp(min=0)
        x = x.to(block.device)
        lower.append(x.long().clamp(max=coarse - 1))
        upper.append((lower[-1] + 1).clamp(max=coarse - 1))
        share.append((x - lower[-1]).to(block.dtype))
    pixels = block.movedim(0, -1)
    for corner in product((False, True), repeat=len(size)):
        index = tuple(high if far else low for far, low, high in zip(corner, lower, upper, strict=True))
        weight = [part if far else 1 - part for far, part in zip(corner, share, strict=True)]
        rows += pixels[index] * torch.stack(weight, 1).prod(1, keepdim=True)
    return rows

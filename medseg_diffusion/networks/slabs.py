"""An autoencoder's encoder or decoder on a volume whose feature maps do not fit into memory several times.

It is computed layer by layer, each over slabs of the first axis that overlap by what its convolution reads. A group
normalisation needs the statistics of the whole volume, which are gathered in a pass of their own. The result is that of
the undivided volume up to rounding. Two feature maps exist at a time, and there is no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.schedule import precise

LARGE = 2**21
"""Voxels from which an image is computed by slabs."""
SLAB = 2**19
"""Voxels of a slab, about."""

Layer = Callable[[Tensor], Tensor]


@torch.no_grad()
def by_slabs(blocks: Iterable[nn.Module], x: Tensor, voxels: int = SLAB) -> Tensor:
    """The blocks of MONAI's `Encoder` or `Decoder`, one after the other, on ``x`` (B, C, D, H, W).

    Args:
        blocks: convolutions, residual blocks, normalisations, activations and resampling. Any other block, such as
            attention, is computed undivided.
        x: is not changed. Its sides must be even wherever they are halved.
        voxels: of a slab, about; it has at least two planes.
    """
    from monai.networks.blocks import Convolution, UpSample
    from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock

    image = x
    for block in blocks:
        if isinstance(block, AEKLResBlock):
            x = _residual(block, x.clone() if x is image else x, voxels)
        elif isinstance(block, nn.GroupNorm):
            x = _divided(_normalisation(block, x, voxels), x, voxels)
        elif isinstance(block, Convolution | nn.SiLU):
            x = _divided(block, x, voxels)
        elif isinstance(block, AEKLDownsample):
            x = _divided(block, x, voxels, halved=2)
        elif isinstance(block, UpSample):
            x = _divided(block, x, voxels, doubled=2)
        elif isinstance(block, nn.Sequential):
            x = by_slabs(block, x, voxels)
        else:
            x = block(x)
    return x


def _residual(block: Any, x: Tensor, voxels: int) -> Tensor:
    """A residual block of MONAI. Its result takes the place of ``x`` where the channels suffice."""
    normalise = _normalisation(block.norm1, x, voxels)
    h = _divided(lambda part: block.conv1(F.silu(normalise(part), inplace=True)), x, voxels)
    normalise = _normalisation(block.norm2, h, voxels)
    channels = h.shape[1]
    out = x[:, :channels] if channels <= x.shape[1] and x.dtype == h.dtype else torch.empty_like(h)
    for first, last in _slabs(x, voxels):
        low, high = max(first - 1, 0), min(last + 1, x.shape[2])
        branch = block.conv2(F.silu(normalise(h[:, :, low:high]), inplace=True))
        out[:, :, first:last] = block.nin_shortcut(x[:, :, first:last]) + branch[:, :, first - low : last - low]
    return out


def _normalisation(norm: nn.GroupNorm, x: Tensor, voxels: int) -> Layer:
    """The normalisation with the statistics of the whole of ``x``, for its parts."""
    shares, means, variances = [], [], []
    for first, last in _slabs(x, voxels):
        part = x[:, :, first:last].float().reshape(len(x), norm.num_groups, -1)
        variance, mean = torch.var_mean(part, dim=2, correction=0)
        shares.append((last - first) / x.shape[2])
        means.append(mean)
        variances.append(variance)
    share = torch.tensor(shares, dtype=precise(x.device), device=x.device)[:, None, None]
    each = torch.stack(means).to(share.dtype)
    mean = (share * each).sum(0)
    factor = ((share * (torch.stack(variances) + (each - mean).square())).sum(0) + norm.eps).rsqrt()

    def per_channel(values: Tensor) -> Tensor:
        return values.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)

    scale = per_channel(factor) * norm.weight
    shift = norm.bias - per_channel(mean) * scale
    scale, shift = (value.float()[:, :, None, None, None] for value in (scale, shift))
    return lambda part: torch.addcmul(shift, part.float(), scale)


def _divided(layer: Layer, x: Tensor, voxels: int, halved: int = 1, doubled: int = 1) -> Tensor:
    """A layer that reads one plane to each side of its own and halves, keeps or doubles the number of planes."""
    out, margin = None, halved  # halving begins at an even plane
    for first, last in _slabs(x, voxels // doubled**3):
        low, high = max(first - margin, 0), min(last + margin, x.shape[2])
        part = layer(x[:, :, low:high])
        if out is None:
            out = part.new_empty(*part.shape[:2], x.shape[2] * doubled // halved, *part.shape[3:])
        begin, end, offset = (plane * doubled // halved for plane in (first, last, first - low))
        out[:, :, begin:end] = part[:, :, offset : offset + end - begin]
    assert out is not None
    return out


def _slabs(x: Tensor, voxels: int) -> Iterator[tuple[int, int]]:
    """First and last plane of each slab, at even planes."""
    planes = max(2, 2 * (voxels // (2 * x[0, 0, 0].numel())))
    return ((first, min(first + planes, x.shape[2])) for first in range(0, x.shape[2], planes))

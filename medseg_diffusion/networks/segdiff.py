"""SegDiff's backbone (Amit et al. 2021, arXiv 2112.00390): eps(x_t, I, t) = D(E(F(x_t) + G(I), t), t).

F is the U-Net's first convolution, and E and D are its encoder and decoder. G is an encoder of residual-in-residual
dense blocks (RRDB; Wang et al. 2018, arXiv 1809.00219). It does not depend on x_t and t, so it runs once per image.

Here G(I) is normalised, unlike in the published code. Nothing else bounds its scale: E begins with a normalisation, to
which only the ratio of G to F matters. In a training of 1,452 steps at a learning rate of 1e-3, G grew to a standard
deviation of 3e7, so that F(x_t) was lost in it and all samples were equal.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Condition

from .blocks import conv
from .unet import UNet, fold, recomputed


class DenseBlock(nn.Module):
    """Five densely connected convolutions as a residual of scale 0.2 (Wang et al. 2018, fig. 4)."""

    def __init__(self, dims: int, channels: int, growth: int) -> None:
        super().__init__()
        outs = [growth] * 4 + [channels]
        self.convs = nn.ModuleList(conv(dims, channels + i * growth, out) for i, out in enumerate(outs))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.convs:
            h = layer(torch.cat(features, dim=1))
            features.append(F.leaky_relu(h, 0.2))
        return x + 0.2 * h


class RRDB(nn.Module):
    """Three dense blocks inside another residual of scale 0.2."""

    def __init__(self, dims: int, channels: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DenseBlock(dims, channels, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * cast(Tensor, self.blocks(x))


class ImageEncoder(nn.Module):
    """G: image (B, C, *S) to features (B, out_channels, *S), of mean 0 and variance 1 before a learned gain."""

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        channels: int = 64,
        blocks: int = 12,
        growth: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.first = conv(dims, in_channels, channels)
        self.trunk = nn.Sequential(
            *(RRDB(dims, channels, growth) for _ in range(blocks)), conv(dims, channels, channels)
        )
        self.high_resolution = conv(dims, channels, channels)
        self.last = conv(dims, channels, out_channels)
        self.norm = nn.GroupNorm(1, out_channels)

    def forward(self, image: Tensor) -> Tensor:
        first = h = self.first(image)
        for block in self.trunk:
            h = recomputed(self.checkpointing, block, h)
        h = first + h
        return cast(Tensor, self.norm(self.last(F.leaky_relu(self.high_resolution(h), 0.2))))


class SegDiff(nn.Module):
    """A U-Net over x_t whose first features are summed with those of the image.

    Args:
        unet: the U-Net of the mask; its ``in_channels`` are those of the mask.
        image_channels: channels of the image.
        encoder_channels: width of the image encoder's trunk.
        encoder_blocks: number of RRDBs (6 to 15 in the paper).
        encoder_growth: growth of the dense blocks.
    """

    def __init__(
        self,
        unet: UNet,
        image_channels: int,
        encoder_channels: int = 64,
        encoder_blocks: int = 12,
        encoder_growth: int = 32,
    ) -> None:
        super().__init__()
        self.unet = unet
        folded = image_channels * unet.patch_size**unet.dims
        self.image_encoder = ImageEncoder(
            unet.dims, folded, unet.channels, encoder_channels, encoder_blocks, encoder_growth, unet.checkpointing
        )

    def encode_condition(self, image: Tensor) -> Condition:
        """G(I) of the padded image (B, C, *S), {"stem": (B, channels, *S / patch_size)}. It runs once per image."""
        return {"stem": self.image_encoder(fold(self.unet.padded(image), self.unet.patch_size))}

    def forward(self, x: Tensor, timesteps: Tensor, cond: Condition | None = None) -> Tensor:
        return cast(Tensor, self.unet(x, timesteps, cond))

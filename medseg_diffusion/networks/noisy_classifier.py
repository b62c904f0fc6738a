"""The classifier of noisy images that guides sampling (Dhariwal & Nichol 2021, arXiv 2105.05233, sec. 4).

It is the encoder of the U-Net with attention at its lowest level, followed by attention pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Parts, ResamplingKind, attend, conv, heads_of, normalisation, timestep_embedding


class AttentionPool(nn.Module):
    """Attention from the mean of all positions to all positions (the pooling of CLIP): (B, C, *S) -> (B, K).

    The positions have learned embeddings, so the input must have one fixed size.
    """

    def __init__(self, channels: int, positions: int, head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = heads_of(channels, head_channels)
        self.positional = nn.Parameter(torch.randn(channels, positions + 1) / math.sqrt(channels))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if tokens.shape[2] + 1 != self.positional.shape[1]:
            raise ValueError(f"made for {self.positional.shape[1] - 1} positions, got {tokens.shape[2]}")
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + self.positional.to(x.dtype)
        q, k, v = self.qkv(tokens.transpose(1, 2)).chunk(3, dim=2)
        return cast(Tensor, self.proj(attend(q[:, :1], k, v, self.num_heads)[:, 0]))


class NoisyClassifier(nn.Module):
    """(x_t (B, C, *S), timesteps (B,) in 0..T-1) -> logits (B, num_classes).

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        num_classes: number of classes.
        size: the image's spatial size, a multiple of 2^(levels - 1) along each axis.
        channels: width of the first level.
        channel_mult: width of each level as a multiple of ``channels``.
        num_res_blocks: residual blocks of each level.
        attention_factors: downsampling factors at which residual blocks are followed by attention.
        head_channels: channels of each attention head.
        dropout: probability in the residual blocks.
        resampling: see `medseg_diffusion.networks.unet.UNet`.
        scale_shift: see `UNet`.
        norm_eps: see `UNet`.
        norm_groups: see `UNet`.

    Raises:
        ValueError: a size that the levels cannot divide.
    """

    # many: mirrors NoisyClassifierSection and ClassifierNetworkSection
    def __init__(
        self,
        dims: int,
        in_channels: int,
        num_classes: int,
        size: Sequence[int],
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 4,
        attention_factors: Sequence[int] = (2, 4, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        resampling: ResamplingKind = "resblock",
        scale_shift: bool = True,
        norm_eps: float = 1e-5,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(channel_mult) - 1)
        if len(size) != dims or any(n % factor for n in size):
            raise ValueError(f"the size must be {dims} multiples of {factor}, got {tuple(size)}")
        self.channels = channels
        emb = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        parts = Parts(
            dims=dims,
            emb_channels=emb,
            attention_factors=tuple(attention_factors),
            head_channels=head_channels,
            dropout=dropout,
            resampling=resampling,
            scale_shift=scale_shift,
            norm_eps=norm_eps,
            norm_groups=norm_groups,
        )
        widths = [mult * channels for mult in channel_mult]
        self.stem = conv(dims, in_channels, channels)
        self.encoder, _ = parts.encoder(channels, widths, [num_res_blocks] * len(widths))
        self.middle = parts.middle(widths[-1], attention=True)
        self.norm = normalisation(widths[-1], norm_eps, norm_groups)
        self.pool = AttentionPool(widths[-1], math.prod(n // factor for n in size), head_channels, num_classes)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.channels).to(x.dtype))
        h = self.stem(x)
        for block in (*self.encoder, *self.middle):
            h = block(h, emb)
        return cast(Tensor, self.pool(F.silu(self.norm(h))))

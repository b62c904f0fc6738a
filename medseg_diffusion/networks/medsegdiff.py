"""MedSegDiff (Wu et al. 2022, arXiv 2211.00611): dynamic conditional encoding and the FF-Parser.

Two encoders of the same stages, one of the image and one of x_t. At the two middle stages the image's features are
multiplied by what they share with the mask's, which a learnt filter of spatial frequencies has cleaned; the result goes
on through the image encoder. Both embeddings are summed for the decoder.

Accounts differ in three places. (1) Which embeddings are summed: the paper says "the two"; a U-Net's decoder reads one
a block, so all of them are summed here, not the last alone, without which nothing finer than the bottleneck would know
the image (the published code concatenates the image to x_t instead). (2) The published code keeps the filter as random
complex numbers of one image size; here it is the paper's real attention, 1 at the start, over frequencies in cycles per
position, so that it means the same at any size. (3) The image encoder sees no time: its stages before the first mixing
run once per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Condition

from .blocks import Parts, conv
from .unet import UNet, fold, recomputed


class FFParser(nn.Module):
    """m' = F^-1[A F[m]] with a learnable attention A for every channel and frequency (eq. 5 and 6).

    Args:
        dims: 2 or 3.
        channels: C.
        bands: A is learnt at so many frequencies an axis, from -0.5 to 0.5 cycles per position, and linear between.
    """

    def __init__(self, dims: int, channels: int, bands: int = 33) -> None:
        super().__init__()
        # The transform of a real signal is known from its non-negative frequencies along the last axis.
        self.attention = nn.Parameter(torch.ones(channels, *[bands] * (dims - 1), bands // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) of any size to the same shape, in float32."""
        axes = tuple(range(2, x.ndim))
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfftn(x.float(), dim=axes, norm="ortho")
            filtered = spectrum * self.response(x.shape[2:])
            return torch.fft.irfftn(filtered, s=x.shape[2:], dim=axes, norm="ortho")

    def response(self, size: Sequence[int]) -> Tensor:
        """A at the frequencies of a signal of ``size``, in the order of `torch.fft.rfftn`: (C, *S)."""
        found = self.attention
        for axis, n in enumerate(size):
            nodes = found.shape[1 + axis]
            last = axis == len(size) - 1
            frequency = torch.fft.rfftfreq(n) if last else torch.fft.fftfreq(n)
            weights = hat_weights(frequency, 0.0 if last else -0.5, 0.5, nodes).to(found)
            found = torch.tensordot(found, weights, dims=([1 + axis], [1])).movedim(-1, 1 + axis)
        return found


def hat_weights(places: Tensor, low: float, high: float, nodes: int) -> Tensor:
    """Weights (N, nodes) of linear interpolation at ``places`` (N,) between equidistant nodes from low to high."""
    at = (places - low) / (high - low) * (nodes - 1)
    return (1 - (at[:, None] - torch.arange(nodes)).abs()).clamp(min=0)


class DynamicEncoding(nn.Module):
    """A(m_I, m_x) = (LN(m_I) * LN(m_x')) * m_I with m_x' = FF-Parser(m_x); LN over channels (eq. 3)."""

    def __init__(self, dims: int, channels: int, bands: int) -> None:
        super().__init__()
        self.parser = FFParser(dims, channels, bands)
        self.norm_image = nn.LayerNorm(channels)
        self.norm_mask = nn.LayerNorm(channels)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Features of the image and of the mask, (B, C, *S) each, to new ones of the image."""
        shared = _over_channels(self.norm_image, image) * _over_channels(self.norm_mask, self.parser(mask))
        return shared * image


def _over_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return cast(Tensor, norm(x.movedim(1, -1)).movedim(-1, 1))


class MedSegDiff(nn.Module):
    """A U-Net over x_t with an image encoder beside its own.

    The two middle stages of L are (L - 1) // 2 and the next, counted from 0.

    Args:
        unet: the U-Net of the mask alone (``in_channels`` are the mask's).
        image_channels: channels of the image.
        bands: of the FF-Parser.
    """

    def __init__(self, unet: UNet, image_channels: int, bands: int = 33) -> None:
        super().__init__()
        self.unet = unet
        levels = len(unet.widths)
        middle = (levels - 1) // 2
        self.image_stem = conv(unet.dims, image_channels * unet.patch_size**unet.dims, unet.channels)
        self.image_encoder, _ = timeless(unet.parts).encoder(unet.channels, list(unet.widths), list(unet.depths))
        ends = stage_ends(unet.depths)
        self.mixed_after = tuple(ends[level] for level in range(middle, min(middle + 2, levels)))
        self.mixing = nn.ModuleList(
            DynamicEncoding(unet.dims, unet.widths[level], bands) for level in range(middle, min(middle + 2, levels))
        )

    def encode_condition(self, image: Tensor) -> Condition:
        """The image's features up to the first mixing, once per image: {"image.i": (B, C_i, *S_i)}."""
        features = [self.image_stem(fold(self.unet.padded(image), self.unet.patch_size))]
        for block in self.image_encoder[: self.mixed_after[0]]:
            features.append(recomputed(self.unet.checkpointing, block, features[-1]))
        return {f"image.{i}": feature for i, feature in enumerate(features)}

    def forward(self, x: Tensor, timesteps: Tensor, cond: Condition | None = None) -> Tensor:
        cond = cond or {}
        unet = self.unet
        emb = unet.embedding(timesteps, cond, x.dtype)
        mask = unet.encode(unet.stem(fold(unet.padded(x), unet.patch_size)), emb)
        image = [cond[f"image.{i}"] for i in range(self.mixed_after[0] + 1)]
        mixing = dict(zip(self.mixed_after, self.mixing, strict=True))
        for i in range(self.mixed_after[0], len(mask)):
            if i in mixing:
                image[i] = mixing[i](image[i], mask[i])
            if i < len(self.image_encoder):
                image.append(recomputed(unet.checkpointing, self.image_encoder[i], image[i]))
        summed = [a + b for a, b in zip(mask, image, strict=True)]
        return unet.decode(summed[-1], summed, emb, x.shape[2:])


def timeless(parts: Parts) -> Parts:
    """The same blocks without a time embedding and without attention: an image encoder's."""
    return Parts(
        dims=parts.dims,
        emb_channels=0,
        dropout=parts.dropout,
        resampling=parts.resampling,
        norm_eps=parts.norm_eps,
        norm_groups=parts.norm_groups,
    )


def stage_ends(depths: Sequence[int]) -> list[int]:
    """Index among an encoder's outputs (the stem's is 0) of the last residual block of every level."""
    ends, at = [], 0
    for depth in depths:
        at += depth
        ends.append(at)
        at += 1  # the block that halves the size
    return ends

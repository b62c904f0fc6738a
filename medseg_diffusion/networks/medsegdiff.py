"""MedSegDiff (Wu et al. 2022, arXiv 2211.00611): dynamic conditional encoding and the FF-Parser.

There are two encoders with the same stages, one for the image and one for x_t. At the two middle stages, the mask's
features pass a learned filter of spatial frequencies, and the image's features are multiplied by what they have in
common with them. The result continues through the image encoder. The decoder reads the sum of both encoders' features.

Paper and published code differ in three points, or leave them open:

1. The paper sums "the two" embeddings, the published code concatenates the image to x_t. Here the features are summed
   at every block: a sum at the last block alone would hide the image from all levels but the bottleneck.
2. In the published code, the filter is a set of random complex numbers for one image size. Here it is the paper's real
   attention, initially 1, over frequencies in cycles per position, so that it has the same meaning at any size.
3. The image encoder has no time embedding. Its stages before the first mixing run once per image.
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
    """m' = F^-1[A F[m]] with a learned attention A for every channel and frequency (eq. 5 and 6).

    Args:
        dims: 2 or 3.
        channels: C.
        bands: number of frequencies along each axis at which A is learned, from -0.5 to 0.5 cycles per position. A is
            linear between them.
    """

    def __init__(self, dims: int, channels: int, bands: int = 33) -> None:
        super().__init__()
        # The transform of a real signal is determined by its non-negative frequencies along the last axis.
        self.attention = nn.Parameter(torch.ones(channels, *[bands] * (dims - 1), bands // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Filter features (B, C, *S) of any size; the result is float32."""
        axes = tuple(range(2, x.ndim))
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfftn(x.float(), dim=axes, norm="ortho")
            filtered = spectrum * self.response(x.shape[2:])
            return torch.fft.irfftn(filtered, s=x.shape[2:], dim=axes, norm="ortho")

    def response(self, size: Sequence[int]) -> Tensor:
        """A at the frequencies of a signal of ``size``, in the order of `torch.fft.rfftn`: (C, *S)."""
        response = self.attention
        for axis, n in enumerate(size):
            nodes = response.shape[1 + axis]
            last = axis == len(size) - 1
            frequency = (torch.fft.rfftfreq if last else torch.fft.fftfreq)(n, device=response.device)
            weights = hat_weights(frequency, 0.0 if last else -0.5, 0.5, nodes).to(response)
            response = torch.tensordot(response, weights, dims=([1 + axis], [1])).movedim(-1, 1 + axis)
        return response


def hat_weights(x: Tensor, low: float, high: float, nodes: int) -> Tensor:
    """Weights (N, nodes) of linear interpolation at ``x`` (N,) between equidistant nodes from ``low`` to ``high``."""
    position = (x - low) / (high - low) * (nodes - 1)
    return (1 - (position[:, None] - torch.arange(nodes, device=x.device)).abs()).clamp(min=0)


class DynamicEncoding(nn.Module):
    """A(m_I, m_x) = (LN(m_I) * LN(m_x')) * m_I, where m_x' = FF-Parser(m_x) and LN is over channels (eq. 3)."""

    def __init__(self, dims: int, channels: int, bands: int) -> None:
        super().__init__()
        self.parser = FFParser(dims, channels, bands)
        self.norm_image = nn.LayerNorm(channels)
        self.norm_mask = nn.LayerNorm(channels)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """The new features of the image, from the features of image and mask, each (B, C, *S)."""
        shared = _over_channels(self.norm_image, image) * _over_channels(self.norm_mask, self.parser(mask))
        return shared * image


def _over_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return cast(Tensor, norm(x.movedim(1, -1)).movedim(-1, 1))


class MedSegDiff(nn.Module):
    """A U-Net over x_t with a second encoder for the image.

    The two middle stages of L are (L - 1) // 2 and the next one, counted from 0.

    Args:
        unet: the U-Net of the mask; its ``in_channels`` are those of the mask.
        image_channels: channels of the image.
        bands: see `FFParser`.
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
        """The image's features up to the first mixing, {"image.i": (B, C_i, *S_i)}. It runs once per image."""
        features = [self.image_stem(fold(self.unet.padded(image), self.unet.patch_size))]
        for block in self.image_encoder[: self.mixed_after[0]]:
            features.append(recomputed(self.unet.checkpointing, block, features[-1]))
        return {f"image.{i}": feature for i, feature in enumerate(features)}

    def forward(self, x: Tensor, timesteps: Tensor, cond: Condition | None = None) -> Tensor:
        cond = cond or {}
        unet = self.unet
        emb = unet.embedding(timesteps, cond, x.dtype)
        patches = fold(unet.padded(x), unet.patch_size)
        mask = unet.encode(unet.stem(patches), emb)
        image = [cond[f"image.{i}"] for i in range(self.mixed_after[0] + 1)]
        mixing = dict(zip(self.mixed_after, self.mixing, strict=True))
        for i in range(self.mixed_after[0], len(mask)):
            if i in mixing:
                image[i] = mixing[i](image[i], mask[i])
            if i < len(self.image_encoder):
                image.append(recomputed(unet.checkpointing, self.image_encoder[i], image[i]))
        summed = [a + b for a, b in zip(mask, image, strict=True)]
        return unet.decode(summed[-1], summed, emb, patches, x.shape[2:])


def timeless(parts: Parts) -> Parts:
    """The options of an image encoder: the same blocks without time embedding and attention."""
    return Parts(
        dims=parts.dims,
        emb_channels=0,
        dropout=parts.dropout,
        resampling=parts.resampling,
        norm_eps=parts.norm_eps,
        norm_groups=parts.norm_groups,
    )


def stage_ends(depths: Sequence[int]) -> list[int]:
    """The index of each level's last residual block among an encoder's outputs, where 0 is the stem's output."""
    ends, index = [], 0
    for depth in depths:
        index += depth
        ends.append(index)
        index += 1  # the block that halves the size
    return ends

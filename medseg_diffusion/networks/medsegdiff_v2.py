"""MedSegDiff-V2 (Wu et al. 2023, arXiv 2301.11798): anchor and semantic conditions from a condition U-Net.

The condition U-Net sees the image alone and runs once per image. Its decoded features, smoothed by a learned Gaussian,
gate the diffusion U-Net's first features (anchor condition, U-SA). A transformer that works on spectra combines the
bottlenecks of both U-Nets (semantic condition, SS-Former). The condition U-Net also predicts the mask, trained by the
anchor loss.

The code of the transformer was never published, and descriptions of it differ. The choices here:

* The gate acts on the output of the first convolution, so it reaches every later stage and every skip connection.
* The affinity of query and key in the Fourier domain, M = F(Q) F(K)^*, is filtered by a band pass over the frequencies
  of both: g(f_q, t) M g(f_k, t). By Parseval's theorem, its inverse transform F^-1 M F equals the affinity of filtered
  queries and keys. Ordinary attention computes it, without a complex matrix of all pairs of frequencies. With g = 1 the
  block is ordinary cross-attention. Some descriptions have a gate for each pair of frequencies, at the square of the
  cost.
* The first cross-attention of a block updates the condition (condition as query). The second one updates the diffusion
  features, with the updated condition as key and value.
* Positions are embedded by a small network of coordinates in [-1, 1], which works for any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Condition

from .blocks import attend, conv, heads_of, normalisation, zeroed
from .medsegdiff import timeless
from .unet import UNet, fold, recomputed, unfold


class GaussianSmoothing(nn.Module):
    """Convolution with a normalised Gaussian with learned mean (in positions) and width, the same for all channels."""

    def __init__(self, dims: int, radius: int = 3, width: float = 1.0) -> None:
        super().__init__()
        self.radius = radius
        self.mean = nn.Parameter(torch.zeros(dims))
        self.log_width = nn.Parameter(torch.full((dims,), math.log(width)))

    def forward(self, x: Tensor) -> Tensor:
        """Smooth features (B, C, *S); the result is float32. Positions outside have the value of the nearest inside."""
        with torch.autocast(x.device.type, enabled=False):
            return self._smoothed(x.float())

    def _smoothed(self, x: Tensor) -> Tensor:
        offsets = torch.arange(-self.radius, self.radius + 1, device=x.device, dtype=torch.float32)
        kernels = (-0.5 * ((offsets - self.mean[:, None]) / self.log_width.exp()[:, None]).square()).softmax(dim=1)
        convolve = F.conv2d if x.ndim == 4 else F.conv3d
        h = x.flatten(0, 1)[:, None]
        for axis, kernel in enumerate(kernels):
            shape = [1] * len(kernels)
            shape[axis] = -1
            pad = [0] * (2 * len(kernels))
            pad[2 * (len(kernels) - 1 - axis)] = pad[2 * (len(kernels) - 1 - axis) + 1] = self.radius
            h = convolve(F.pad(h, pad, mode="replicate"), kernel.reshape(1, 1, *shape))
        return h[:, 0].unflatten(0, x.shape[:2])


class AnchorCondition(nn.Module):
    """The gate of U-SA: sigmoid(conv_1x1(max(f * k_Gauss, f))), (B, C, *S) to (B, 1, *S). It is 0.5 before training."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.smoothing = GaussianSmoothing(dims)
        self.to_gate = zeroed(conv(dims, channels, 1, kernel=1))

    def forward(self, features: Tensor) -> Tensor:
        return torch.sigmoid(self.to_gate(torch.maximum(self.smoothing(features), features)))


class BandPass(nn.Module):
    """The NBP filter: a time-dependent gate in (0, 1) for every frequency and channel.

    A small residual network computes it from the absolute values of the frequencies, so that the filtered signal stays
    real. The time embedding modulates every layer (FiLM).
    """

    def __init__(self, dims: int, channels: int, emb_channels: int, hidden: int = 64, layers: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(dims, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, elementwise_affine=False) for _ in range(layers))
        self.films = nn.ModuleList(nn.Linear(emb_channels, 2 * hidden) for _ in range(layers))
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.last = nn.Linear(hidden, channels)
        nn.init.constant_(self.last.bias, 2.0)  # nearly open at the start

    def forward(self, size: Sequence[int], emb: Tensor) -> Tensor:
        """Gates (B, channels, *F) in the order of `torch.fft.rfftn`, of a signal of ``size``; emb (B, emb_channels)."""
        axes = [torch.fft.fftfreq(n, device=emb.device).abs() for n in size[:-1]]
        axes.append(torch.fft.rfftfreq(size[-1], device=emb.device))
        frequency = 4 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) - 1
        h = self.first(frequency.flatten(0, -2).to(emb.dtype))[None].expand(len(emb), -1, -1)
        for norm, film, layer in zip(self.norms, self.films, self.layers, strict=True):
            scale, shift = film(F.silu(emb))[:, None].chunk(2, dim=-1)
            h = h + layer(F.silu(torch.addcmul(shift, norm(h), 1 + scale)))
        return torch.sigmoid(self.last(h)).transpose(1, 2).unflatten(2, frequency.shape[:-1])


class SpectralAttention(nn.Module):
    """Cross-attention whose affinities are filtered by a time-dependent band pass."""

    def __init__(self, dims: int, channels: int, heads: int, emb_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.band_pass = BandPass(dims, heads, emb_channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, query: Tensor, key: Tensor, size: Sequence[int], emb: Tensor) -> Tensor:
        """Attention (B, L, C) of query tokens to key tokens, each (B, L, C) on the L positions of a ``size`` grid."""
        gate = self.band_pass(size, emb).repeat_interleave(query.shape[2] // self.heads, dim=1)
        q, k = (filtered(tokens, gate, size) for tokens in (self.q(query), self.k(key)))
        return cast(Tensor, self.proj(attend(q, k, self.v(key), self.heads)))


def filtered(tokens: Tensor, gate: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens (B, L, C) on a grid of ``size`` whose spectra are multiplied by ``gate`` (B, C, *F)."""
    axes = tuple(range(2, 2 + len(size)))
    with torch.autocast(tokens.device.type, enabled=False):
        spectrum = torch.fft.rfftn(tokens.float().transpose(1, 2).unflatten(2, tuple(size)), dim=axes)
        gated = torch.fft.irfftn(spectrum * gate.float(), s=tuple(size), dim=axes)
    return gated.flatten(2).transpose(1, 2).to(tokens.dtype)


class TimedNorm(nn.Module):
    """Layer normalisation with scale and shift from the time embedding (as in AdaIN)."""

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.film = nn.Linear(emb_channels, 2 * channels)

    def forward(self, tokens: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(F.silu(emb))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(tokens), 1 + scale)


class SSBlock(nn.Module):
    """The condition attends to the diffusion features, then they attend to it. All layers are residual.

    Each attention is followed by a feed-forward layer.
    """

    def __init__(self, dims: int, channels: int, heads: int, emb_channels: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(TimedNorm(channels, emb_channels) for _ in range(6))
        self.to_condition = SpectralAttention(dims, channels, heads, emb_channels)
        self.to_diffusion = SpectralAttention(dims, channels, heads, emb_channels)
        self.feed_condition, self.feed_diffusion = (
            nn.Sequential(
                nn.Linear(channels, 4 * channels), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * channels, channels)
            )
            for _ in range(2)
        )

    def forward(self, d: Tensor, c: Tensor, size: Sequence[int], emb: Tensor) -> tuple[Tensor, Tensor]:
        """The new tokens (B, L, C) of the diffusion U-Net and of the condition."""
        norms = self.norms
        c = c + self.to_condition(norms[0](c, emb), norms[1](d, emb), size, emb)
        c = c + self.feed_condition(norms[2](c, emb))
        d = d + self.to_diffusion(norms[3](d, emb), norms[4](c, emb), size, emb)
        return d + self.feed_diffusion(norms[5](d, emb)), c


class SSFormer(nn.Module):
    """The semantic condition: combines the bottleneck features (B, C, *S) of the diffusion and the condition U-Net.

    Args:
        dims: 2 or 3.
        channels: C.
        emb_channels: length of the time embedding.
        depth: number of blocks.
        head_channels: channels of each attention head.
        dropout: in the feed-forward layers.
    """

    def __init__(
        self, dims: int, channels: int, emb_channels: int, depth: int = 4, head_channels: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        heads = heads_of(channels, head_channels)
        self.position = nn.Sequential(nn.Linear(dims, 64), nn.SiLU(), nn.Linear(64, channels))
        self.blocks = nn.ModuleList(SSBlock(dims, channels, heads, emb_channels, dropout) for _ in range(depth))
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, diffusion: Tensor, condition: Tensor, emb: Tensor) -> Tensor:
        size = diffusion.shape[2:]
        grid = [
            torch.linspace(-1, 1, n, device=diffusion.device) if n > 1 else torch.zeros(1, device=diffusion.device)
            for n in size
        ]
        coordinates = torch.stack(torch.meshgrid(*grid, indexing="ij"), dim=-1).flatten(0, -2)
        position = self.position(coordinates.to(diffusion.dtype))
        d, c = (x.flatten(2).transpose(1, 2) + position for x in (diffusion, condition))
        for block in self.blocks:
            d, c = block(d, c, size, emb)
        return diffusion + self.proj(d).transpose(1, 2).unflatten(2, size)


class ConditionUNet(nn.Module):
    """A U-Net of the image, with the stages of the diffusion U-Net but without time embedding."""

    def __init__(self, unet: UNet, image_channels: int, out_channels: int) -> None:
        super().__init__()
        self.checkpointing = unet.checkpointing
        parts, widths, depths = timeless(unet.parts), list(unet.widths), list(unet.depths)
        self.stem = conv(unet.dims, image_channels * unet.patch_size**unet.dims, unet.channels)
        self.encoder, skips = parts.encoder(unet.channels, widths, depths)
        self.middle = parts.middle(widths[-1], attention=False)
        self.decoder = parts.decoder(widths[-1], skips, widths, depths)
        self.norm = normalisation(widths[0], parts.norm_eps, parts.norm_groups)
        self.to_mask = conv(unet.dims, widths[0], out_channels * unet.patch_size**unet.dims, kernel=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The bottleneck, the decoded features and the folded mask logits of a folded image."""
        skips = [self.stem(image)]
        for block in self.encoder:
            skips.append(recomputed(self.checkpointing, block, skips[-1]))
        h = skips[-1]
        for block in self.middle:
            h = recomputed(self.checkpointing, block, h)
        bottleneck = h
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            h = recomputed(self.checkpointing, block, torch.cat([h, skip], dim=1))
        features = F.silu(self.norm(h))
        return bottleneck, features, self.to_mask(features)


class MedSegDiffV2(nn.Module):
    """A U-Net over x_t, conditioned by a second U-Net of the image.

    Args:
        unet: the U-Net of the mask; its ``in_channels`` are those of the mask.
        image_channels: channels of the image.
        mask_channels: channels of the anchor, equal to those of the mask's logits.
        depth: number of blocks of the SS-Former.
        head_channels: channels of each attention head in the SS-Former.
        dropout: dropout probability in the SS-Former.
    """

    def __init__(
        self,
        unet: UNet,
        image_channels: int,
        mask_channels: int,
        depth: int = 4,
        head_channels: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.condition = ConditionUNet(unet, image_channels, mask_channels)
        self.anchor = AnchorCondition(unet.dims, unet.widths[0])
        self.semantic = SSFormer(unet.dims, unet.widths[-1], 4 * unet.channels, depth, head_channels, dropout)

    def encode_condition(self, image: Tensor) -> Condition:
        """The condition of images (B, C, *S), computed once per image.

        It has the entries "gate" and "semantic", which every step uses, and the logits "anchor" (B, mask_channels, *S)
        for the anchor loss.
        """
        folded = fold(self.unet.padded(image), self.unet.patch_size)
        bottleneck, features, logits = self.condition(folded)
        whole = (slice(None), slice(None), *(slice(0, n) for n in image.shape[2:]))
        return {
            "gate": self.anchor(features),
            "semantic": bottleneck,
            "anchor": unfold(logits, self.unet.patch_size)[whole],
        }

    def forward(self, x: Tensor, timesteps: Tensor, cond: Condition | None = None) -> Tensor:
        cond = cond or {}
        unet = self.unet
        emb = unet.embedding(timesteps, cond, x.dtype)
        patches = fold(unet.padded(x), unet.patch_size)
        skips = unet.encode(unet.stem(patches) * (1 + cond["gate"]), emb)
        return unet.decode(self.semantic(skips[-1], cond["semantic"], emb), skips, emb, patches, x.shape[2:])

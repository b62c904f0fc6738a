"""KL autoencoders: images to latents and back (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1), from MONAI's blocks.

Two layouts exist. MONAI's `AutoencoderKL` has separate convolutions for the latent's mean and log-variance. The
published latent-diffusion network emits both from one, activates before its last convolutions, and has one residual
block more in each level of the decoder. Both are the same class here, behind the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from monai.networks.nets.autoencoderkl import Decoder, Encoder
from torch import Tensor, nn

from medseg_diffusion.diffusion.noise import gaussian

from .blocks import conv

Layout = Literal["monai", "latent-diffusion"]


class KLAutoencoder(nn.Module):
    """Image (B, in_channels, *S) <-> latent (B, latent_channels, *S / 2^(levels - 1)).

    Latents are multiplied by ``scale`` when encoded and divided by it when decoded, so that a diffusion model sees
    about unit variance. ``scale`` is a buffer (latent_channels,), stored with the weights.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the reconstruction.
        latent_channels: channels of the latent.
        channels: width of each level, multiples of 32.
        num_res_blocks: residual blocks of each encoder level.
        attention_levels: whether a level has attention after each residual block.
        layout: "monai" or "latent-diffusion".
        norm_eps: of the group normalisations.
    """

    scale: Tensor

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        channels: Sequence[int] = (64, 128, 128),
        num_res_blocks: int = 1,
        attention_levels: Sequence[bool] = (False, False, False),
        layout: Layout = "monai",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if len(channels) != len(attention_levels) or any(width % 32 for width in channels):
            raise ValueError(
                f"channels must be multiples of 32, with one attention_levels each: got {channels}, {attention_levels}"
            )
        self.layout: Layout = layout
        joint = layout == "latent-diffusion"
        shared = {"norm_num_groups": 32, "norm_eps": norm_eps, "attention_levels": list(attention_levels)}
        self.encoder = Encoder(
            spatial_dims=dims,
            in_channels=in_channels,
            channels=list(channels),
            out_channels=(1 + joint) * latent_channels,
            num_res_blocks=[num_res_blocks] * len(channels),
            **shared,
        )
        self.decoder = Decoder(
            spatial_dims=dims,
            channels=list(channels),
            in_channels=latent_channels,
            out_channels=out_channels,
            num_res_blocks=[num_res_blocks + joint] * len(channels),
            **shared,
        )
        if joint:
            for part in (self.encoder, self.decoder):
                part.blocks[-2] = nn.Sequential(part.blocks[-2], nn.SiLU())
            self.quant_conv = conv(dims, 2 * latent_channels, 2 * latent_channels, kernel=1)
        else:
            self.quant_conv_mu = conv(dims, latent_channels, latent_channels, kernel=1)
            self.quant_conv_log_sigma = conv(dims, latent_channels, latent_channels, kernel=1)
        self.post_quant_conv = conv(dims, latent_channels, latent_channels, kernel=1)
        self.register_buffer("scale", torch.ones(latent_channels))

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latent, each (B, latent_channels, *s)."""
        h = self.encoder(image)
        if self.layout == "latent-diffusion":
            mean, log_variance = self.quant_conv(h).chunk(2, dim=1)
        else:
            mean, log_variance = self.quant_conv_mu(h), self.quant_conv_log_sigma(h)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, image: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """The scaled latent: its mean, or with one generator an element a sample."""
        mean, log_variance = self.moments(image)
        if generators:
            mean = mean + (0.5 * log_variance).exp() * gaussian(mean.shape[1:], generators, like=mean)
        return mean * self._per_channel(mean)

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a scaled latent."""
        return cast(Tensor, self.decoder(self.post_quant_conv(latent / self._per_channel(latent))))

    def _per_channel(self, latent: Tensor) -> Tensor:
        return self.scale.to(latent.dtype).reshape(-1, *[1] * (latent.ndim - 2))

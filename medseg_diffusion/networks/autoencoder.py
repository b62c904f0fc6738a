"""Autoencoders: images to latents and back (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1), from MONAI's blocks.

"KL" latents are regularised by a small KL penalty towards a standard normal distribution. "VQ" latents are replaced by
their nearest codebook entries before decoding.

The KL autoencoder has two layouts. MONAI's `AutoencoderKL` has separate convolutions for the latent's mean and
log-variance. The published latent-diffusion network computes both with one convolution, has an activation before its
last convolutions, and has one more residual block in each level of the decoder. One class implements both layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from medseg_diffusion.diffusion.noise import gaussian
from medseg_diffusion.diffusion.posterior import gaussian_kl

from .blocks import conv, speed_up_lone_volumes
from .slabs import LARGE, by_slabs

Layout = Literal["monai", "latent-diffusion"]


class Codec(Protocol):
    """Images (B, C, *S) to latents (B, C', *s) of about zero mean and unit variance, and back."""

    def encode(self, image: Tensor) -> Tensor: ...

    def decode(self, latent: Tensor) -> Tensor: ...


class _Standardised(nn.Module):
    """Standardises latents for a diffusion model: (z - shift) * scale, per channel.

    Noise schedules assume data of zero mean and unit variance. The published code has a scale only, but an autoencoder
    of this package was trained to means of two standard deviations. ``shift`` and ``scale`` are buffers
    (latent_channels,) that are stored with the weights. Under autocast, latents and images are of the type float32,
    with values that were rounded on their way.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(latent_channels))
        self.register_buffer("scale", torch.ones(latent_channels))

    def standardised(self, latent: Tensor) -> Tensor:
        """The latent of the autoencoder, standardised for the diffusion model."""
        latent = latent.float()
        return (latent - _per_channel(self.shift, latent)) * _per_channel(self.scale, latent)

    def unstandardised(self, latent: Tensor) -> Tensor:
        """The inverse of `standardised`."""
        return latent / _per_channel(self.scale, latent) + _per_channel(self.shift, latent)


class KLAutoencoder(_Standardised):
    """Image (B, in_channels, *S) <-> latent (B, latent_channels, *S / 2^(levels - 1)), standardised.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the reconstruction.
        latent_channels: channels of the latent.
        channels: width of each level, multiples of ``norm_groups``.
        num_res_blocks: residual blocks of each encoder level.
        attention_levels: whether a level has attention after each residual block.
        layout: "monai" or "latent-diffusion".
        norm_eps: epsilon of the group normalisations.
        norm_groups: groups of the group normalisations; fewer for narrow networks
            (`medseg_diffusion.networks.blocks.normalisation`).
        middle_attention: attention between the two blocks at the latent's resolution. Its cost is quadratic in the
            number of positions.
    """

    # many: mirrors AutoencoderNetworkSection and AutoencoderSection
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
        norm_groups: int = 32,
        middle_attention: bool = True,
    ) -> None:
        # Imported here: importing MONAI takes seconds, and models without its blocks do not need it.
        from monai.networks.nets.autoencoderkl import Decoder, Encoder

        super().__init__(latent_channels)
        _check(channels, attention_levels, norm_groups)
        self.layout: Layout = layout
        joint = layout == "latent-diffusion"
        shared = {
            "norm_num_groups": norm_groups,
            "norm_eps": norm_eps,
            "attention_levels": list(attention_levels),
            "with_nonlocal_attn": middle_attention,
            "use_flash_attention": True,  # without it, the memory is quadratic in the number of positions
        }
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
        speed_up_lone_volumes(self)
        if joint:
            for part in (self.encoder, self.decoder):
                part.blocks[-2] = nn.Sequential(part.blocks[-2], nn.SiLU())
            self.quant_conv = conv(dims, 2 * latent_channels, 2 * latent_channels, kernel=1)
        else:
            self.quant_conv_mu = conv(dims, latent_channels, latent_channels, kernel=1)
            self.quant_conv_log_sigma = conv(dims, latent_channels, latent_channels, kernel=1)
        self.post_quant_conv = conv(dims, latent_channels, latent_channels, kernel=1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent before standardisation, each (B, latent_channels, *s)."""
        h = _computed(self.encoder, image)
        if self.layout == "latent-diffusion":
            mean, log_variance = self.quant_conv(h).chunk(2, dim=1)
        else:
            mean, log_variance = self.quant_conv_mu(h), self.quant_conv_log_sigma(h)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, image: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """The standardised latent: its mean, or a sample if there is a generator for each image."""
        mean, log_variance = self.moments(image)
        if generators:
            mean = mean + (0.5 * log_variance).exp() * gaussian(mean.shape[1:], generators, like=mean)
        return self.standardised(mean)

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a standardised latent."""
        return _computed(self.decoder, self.post_quant_conv(self.unstandardised(latent))).float()

    def reconstruct(self, image: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, out_channels, *S) from a sampled latent, and the latent's KL divergence from N(0, I).

        The divergence (B,) is in nats per image.
        """
        mean, log_variance = self.moments(image)
        noise = gaussian(mean.shape[1:], generators, like=mean)
        standard = mean.new_zeros(())  # mean and log-variance of N(0, I)
        kl = gaussian_kl(mean, log_variance, standard, standard).flatten(1).sum(1)
        return self.decoder(self.post_quant_conv(mean + (0.5 * log_variance).exp() * noise)), kl

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution, where the adversarial loss is balanced."""
        return _last_weight(self.decoder)


class VQAutoencoder(_Standardised):
    """Image (B, in_channels, *S) <-> latent (B, latent_channels, *S / 2^(levels - 1)) with a codebook.

    The diffusion model works on latents before quantisation; `decode` quantises them. The codebook follows the latents
    by moving averages (van den Oord et al. 2017, arXiv 1711.00937, appendix). The other arguments are those of
    `KLAutoencoder`.

    Args:
        codebook_size: number of codebook entries.
    """

    # many: mirrors AutoencoderNetworkSection
    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        channels: Sequence[int] = (64, 128, 128),
        num_res_blocks: int = 1,
        attention_levels: Sequence[bool] = (False, False, False),
        codebook_size: int = 1024,
        norm_groups: int = 32,
        middle_attention: bool = True,
    ) -> None:
        from monai.networks.layers.vector_quantizer import EMAQuantizer
        from monai.networks.nets.autoencoderkl import Decoder, Encoder

        super().__init__(latent_channels)
        _check(channels, attention_levels, norm_groups)
        shared = {
            "spatial_dims": dims,
            "channels": list(channels),
            "num_res_blocks": [num_res_blocks] * len(channels),
            "norm_num_groups": norm_groups,
            "norm_eps": 1e-6,
            "attention_levels": list(attention_levels),
            "with_nonlocal_attn": middle_attention,
            "use_flash_attention": True,
        }
        self.encoder = Encoder(in_channels=in_channels, out_channels=latent_channels, **shared)
        self.decoder = Decoder(in_channels=latent_channels, out_channels=out_channels, **shared)
        self.quant_conv = conv(dims, latent_channels, latent_channels, kernel=1)
        self.post_quant_conv = conv(dims, latent_channels, latent_channels, kernel=1)
        speed_up_lone_volumes(self)
        self.quantizer = EMAQuantizer(dims, codebook_size, latent_channels)

    def encode(self, image: Tensor) -> Tensor:
        """The standardised latent before quantisation."""
        return self.standardised(self.quant_conv(_computed(self.encoder, image)))

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a standardised latent, which is quantised first."""
        quantised, _ = self._quantised(self.unstandardised(latent))
        return _computed(self.decoder, self.post_quant_conv(quantised)).float()

    def reconstruct(self, image: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, out_channels, *S) and the commitment loss (B,), the same for all images.

        In training mode this updates the codebook. ``generators`` are not used.
        """
        quantised, commitment = self._quantised(self.quant_conv(self.encoder(image)))
        return self.decoder(self.post_quant_conv(quantised)), commitment.expand(len(image))

    def _quantised(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        # MONAI disables autocast only on CUDA. In bfloat16, similar codebook entries cannot be distinguished.
        with torch.autocast(latent.device.type, enabled=False):
            quantised, commitment, _ = self.quantizer(latent.float())
        return quantised, commitment

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution, where the adversarial loss is balanced."""
        return _last_weight(self.decoder)


def _check(channels: Sequence[int], attention_levels: Sequence[bool], norm_groups: int) -> None:
    if len(channels) != len(attention_levels) or any(width % norm_groups for width in channels):
        raise ValueError(
            f"channels must be multiples of norm_groups ({norm_groups}), with one attention_levels each: "
            f"got {channels}, {attention_levels}"
        )


def _computed(chain: nn.Module, x: Tensor) -> Tensor:
    """The encoder or decoder on ``x``; a large volume without gradients by slabs, to save memory."""
    blocks = cast(nn.ModuleList, chain.blocks)
    enlarged = 2 ** sum(type(block).__name__ == "UpSample" for block in blocks)
    if x.ndim == 5 and not torch.is_grad_enabled() and x[0, 0].numel() * enlarged**3 >= LARGE:
        return by_slabs(blocks, x)
    return cast(Tensor, chain(x))


def _per_channel(values: Tensor, latent: Tensor) -> Tensor:
    return values.to(latent.dtype).reshape(-1, *[1] * (latent.ndim - 2))


def _last_weight(decoder: nn.Module) -> nn.Parameter:
    return [parameter for name, parameter in decoder.named_parameters() if name.endswith("weight")][-1]

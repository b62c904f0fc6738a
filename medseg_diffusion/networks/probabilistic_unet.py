"""The Probabilistic U-Net (Kohl et al. 2018, arXiv 1806.05034): one latent vector chooses one of the plausible masks.

Here with the residual U-Net of this package, so that it is compared with diffusion models of the same backbone. A prior
encoder sees the image, a posterior encoder the image and a mask; both are the contracting path of the U-Net with a
global average. The latent joins the last features of the U-Net, and 1x1 convolutions make logits of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.posterior import gaussian_kl

from .blocks import Parts, conv, normalisation, padded_to
from .unet import UNet

LOWEST_LOG_SCALE, HIGHEST_LOG_SCALE = -6.0, 3.0
"""Bounds of the logarithm of a standard deviation: below, the divergence overflows in the first steps of training."""


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """Independent Gaussians (..., Z): ``mean`` and the logarithm ``log_scale`` of the standard deviation."""

    mean: Tensor
    log_scale: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """The sample of standard normal noise ``eps`` (..., Z)."""
        return self.mean + self.log_scale.exp() * eps

    def divergence(self, other: DiagonalGaussian) -> Tensor:
        """KL(self || other) in nats, (...)."""
        return gaussian_kl(self.mean, 2 * self.log_scale, other.mean, 2 * other.log_scale).sum(-1)


class GaussianEncoder(nn.Module):
    """(B, C, *S) -> `DiagonalGaussian` of ``latent_channels`` entries.

    Args:
        unet: whose contracting path is repeated, with weights of its own.
        in_channels: C.
        latent_channels: length of the latent.
        norm_groups: of the last normalisation.
    """

    def __init__(self, unet: UNet, in_channels: int, latent_channels: int, norm_groups: int) -> None:
        super().__init__()
        parts = Parts(
            dims=unet.dims,
            emb_channels=0,  # no time
            resampling=unet.parts.resampling,
            scale_shift=False,
            norm_groups=norm_groups,
        )
        self.factor = unet.factor // unet.patch_size
        self.stem = conv(unet.dims, in_channels, unet.channels)
        self.encoder, _ = parts.encoder(unet.channels, list(unet.widths), list(unet.depths))
        self.norm = normalisation(unet.widths[-1], groups=norm_groups)
        self.out = nn.Linear(unet.widths[-1], 2 * latent_channels)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        h = self.stem(padded_to(x, self.factor))
        for block in self.encoder:
            h = block(h, None)
        mean, log_scale = self.out(F.silu(self.norm(h)).flatten(2).mean(2)).float().chunk(2, dim=1)
        return DiagonalGaussian(mean, log_scale.clamp(LOWEST_LOG_SCALE, HIGHEST_LOG_SCALE))


class ProbabilisticUNet(nn.Module):
    """The three networks; `medseg_diffusion.tasks.probabilistic_unet` trains and samples them.

    Args:
        unet: image to features (B, F, *S); its timestep is always 0.
        features: F.
        image_channels: channels of the image.
        mask_channels: channels of the mask that the posterior sees.
        out_channels: channels of the logits.
        latent_channels: length of the latent (published for LIDC: 6).
        layers: 1x1 convolutions that combine features and latent (published: 3).
        norm_groups: of the encoders.
    """

    def __init__(
        self,
        unet: UNet,
        features: int,
        image_channels: int,
        mask_channels: int,
        out_channels: int,
        latent_channels: int = 6,
        layers: int = 3,
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.latent_channels = latent_channels
        self.prior = GaussianEncoder(unet, image_channels, latent_channels, norm_groups)
        self.posterior = GaussianEncoder(unet, image_channels + mask_channels, latent_channels, norm_groups)
        widths = [features + latent_channels, *[features] * (layers - 1)]
        hidden = [
            module for inside in widths[:-1] for module in (conv(unet.dims, inside, features, kernel=1), nn.SiLU())
        ]
        self.head = nn.Sequential(*hidden, conv(unet.dims, widths[-1], out_channels, kernel=1))

    def features(self, image: Tensor) -> Tensor:
        """What does not depend on the latent, (B, F, *S): computed once for all samples of an image."""
        out: Tensor = self.unet(image, torch.zeros(len(image), dtype=torch.int64, device=image.device), None)
        return out

    def logits(self, features: Tensor, latent: Tensor) -> Tensor:
        """Logits (B, out_channels, *S) of features (B, F, *S) and latents (B, Z)."""
        spread = latent.to(features).reshape(*latent.shape, *[1] * (features.ndim - 2))
        out: Tensor = self.head(torch.cat([features, spread.expand(-1, -1, *features.shape[2:])], dim=1))
        return out


def posterior_input(image: Tensor, mask: Tensor) -> Tensor:
    """Image (B, C, *S) and encoded mask (B, C', *S) as the posterior encoder sees them."""
    return torch.cat([image, mask.to(image)], dim=1)

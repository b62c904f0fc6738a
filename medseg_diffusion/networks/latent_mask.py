"""The network of latent mask diffusion (Lin et al. 2024, arXiv 2401.13466): a U-Net on latents of mask and image.

The image has its own encoder with the autoencoder's layout, trained with the denoiser. Its features are concatenated to
the noisy latent. It does not depend on z_t and t, so it runs once per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Condition

from .blocks import speed_up_lone_volumes
from .unet import UNet


class LatentMask(nn.Module):
    """Latents (B, C, *s), times and the encoded image to the U-Net's output (B, C', *s).

    Args:
        dims: 2 or 3.
        unet: a U-Net with C + ``features`` input channels.
        image_channels: channels of the image (B, image_channels, *S), where s = S / 2^(levels - 1).
        features: channels of the encoded image.
        channels: width of each level of the image encoder, multiples of ``norm_groups``.
        num_res_blocks: residual blocks of each level of the image encoder.
        norm_groups: groups of its group normalisations.
    """

    def __init__(
        self,
        dims: int,
        unet: UNet,
        image_channels: int,
        features: int,
        channels: Sequence[int],
        num_res_blocks: int = 1,
        norm_groups: int = 8,
    ) -> None:
        # Imported here: importing MONAI takes seconds, and models without its blocks do not need it.
        from monai.networks.nets.autoencoderkl import Encoder

        super().__init__()
        self.unet = unet
        self.image_encoder = Encoder(
            spatial_dims=dims,
            in_channels=image_channels,
            channels=list(channels),
            out_channels=features,
            num_res_blocks=[num_res_blocks] * len(channels),
            norm_num_groups=norm_groups,
            norm_eps=1e-6,
            attention_levels=[False] * len(channels),
            with_nonlocal_attn=False,  # it would cost more than the rest of the network
        )
        speed_up_lone_volumes(self.image_encoder)

    def encode_condition(self, image: Tensor) -> dict[str, Tensor]:
        """The image (B, image_channels, *S) as "concat" (B, features, *s)."""
        return {"concat": self.image_encoder(image)}

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        return cast(Tensor, self.unet(x, t, cond))

"""How the autoencoder of latent diffusion is trained (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1; Esser 2021).

L1 + perceptual + regularisation, and from some step on an adversarial loss of image patches whose weight balances the
gradients at the decoder's last layer (Esser et al. 2021, arXiv 2012.09841, eq. 7). All are means over pixels, where the
published code sums them: the weights are the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from medseg_diffusion.diffusion.noise import generators
from medseg_diffusion.networks.autoencoder import KLAutoencoder, VQAutoencoder

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, image), both (B, C, *S) in [-1, 1] -> a distance, a scalar."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the autoencoder's losses; L1 has 1.

    Attributes:
        perceptual: of the perceptual distance.
        regularisation: of the KL divergence in nats (KL) or the commitment loss (VQ).
        adversarial: of the adversarial loss, on top of its balance.
        adversarial_start: step at which the discriminator comes in; before, it only learns.
    """

    perceptual: float = 1.0
    regularisation: float = 1e-6
    adversarial: float = 0.5
    adversarial_start: int = 50_001


class AutoencoderTraining(nn.Module):
    """Autoencoder and discriminator in one training step: batch -> the sum of both losses, whose gradients never meet.

    The discriminator sees the reconstruction detached, the autoencoder a discriminator with constant weights, so that
    one backward pass and one optimiser serve both.

    Args:
        autoencoder: KL or VQ.
        perceptual: the perceptual distance; its own parameters, if any, are not trained.
        weights: of the losses.
        discriminator_channels: width of the discriminator's first layer.
        discriminator_layers: its number of halvings.
    """

    step: Tensor

    def __init__(
        self,
        autoencoder: KLAutoencoder | VQAutoencoder,
        perceptual: Perceptual,
        weights: LossWeights = LossWeights(),
        discriminator_channels: int = 64,
        discriminator_layers: int = 3,
    ) -> None:
        # Imported where used: MONAI takes seconds, which the rest of training does not need.
        from monai.networks.nets import PatchDiscriminator

        super().__init__()
        self.autoencoder = autoencoder
        # In a list: the perceptual network is neither trained, nor averaged, nor stored.
        self._perceptual = [perceptual]
        self.weights = weights
        first = next(autoencoder.encoder.parameters())
        self.discriminator = PatchDiscriminator(
            spatial_dims=first.ndim - 2,
            channels=discriminator_channels,
            in_channels=first.shape[1],
            num_layers_d=discriminator_layers,
            norm="INSTANCE",
        )
        # What gets no gradient must not ask for one: several processes would wait for it.
        self.discriminator.requires_grad_(weights.adversarial > 0)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of "image" (B, C, *S) in [-1, 1] and "seed" (B,) int64.

        In evaluation mode the loss without its adversarial part: how well images are kept.
        """
        image = batch["image"]
        found, penalty = self.autoencoder.reconstruct(image, generators(batch["seed"].tolist()))
        # In float32: autocast would run the convolutions of SSIM in bfloat16, where the difference of two nearly equal
        # moments that its variance is comes out as noise of either sign.
        with torch.autocast(image.device.type, enabled=False):
            found, penalty = found.float(), penalty.float()
            kept = F.l1_loss(found, image) + self.weights.perceptual * self._perceptual[0](found, image)
        pixels = image[0].numel() if isinstance(self.autoencoder, KLAutoencoder) else 1
        loss = kept + self.weights.regularisation * penalty.mean() / pixels
        if not self.training:
            return loss
        step = int(self.step)
        self.step += 1
        if self.weights.adversarial == 0:
            return loss
        if step >= self.weights.adversarial_start:
            constant = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            fooled = -functional_call(self.discriminator, constant, (found,))[-1].mean()
            loss = loss + self.weights.adversarial * balance(kept, fooled, self.autoencoder.last_layer) * fooled
        real, fake = self.discriminator(image)[-1], self.discriminator(found.detach())[-1]
        return loss + 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def balance(kept: Tensor, fooled: Tensor, last_layer: nn.Parameter) -> Tensor:
    """|gradient of kept| / |gradient of fooled| at the last layer, at most 1e4; a constant."""
    (wanted,) = torch.autograd.grad(kept, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(fooled, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-6)).clamp(max=1e4).detach()


class GradientSSIM:
    """1 - SSIM, plus L1 of the differences of neighbours at 3 scales: the fallback where LPIPS has no weights."""

    def __init__(self, dims: int = 2) -> None:
        from monai.losses import SSIMLoss

        self.ssim = SSIMLoss(spatial_dims=dims, data_range=2.0, win_size=7)

    def __call__(self, found: Tensor, image: Tensor) -> Tensor:
        pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
        loss = self.ssim(found.float(), image.float())
        for _ in range(3):
            for axis in range(2, image.ndim):
                loss = loss + F.l1_loss(found.diff(dim=axis), image.diff(dim=axis))
            found, image = pool(found, 2), pool(image, 2)
        return loss


@torch.no_grad()
def standardise(autoencoder: KLAutoencoder | VQAutoencoder, batches: list[Tensor]) -> None:
    """Sets ``shift`` and ``scale`` from the mean and deviation of each latent channel over ``batches`` of images."""
    autoencoder.shift.fill_(0)
    autoencoder.scale.fill_(1)
    total = square = torch.zeros(())
    count = 0
    for batch in batches:
        latent = autoencoder.encode(batch).double().transpose(0, 1).flatten(1).cpu()
        total, square, count = total + latent.sum(1), square + latent.square().sum(1), count + latent.shape[1]
    mean = total / count
    autoencoder.shift.copy_(mean)
    autoencoder.scale.copy_((square / count - mean**2).clamp(min=1e-12).rsqrt())

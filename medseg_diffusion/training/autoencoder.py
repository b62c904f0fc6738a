"""Training of the autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1).

The loss is L1 + perceptual + regularisation. From some step on, a patch-based adversarial loss is added, whose weight
balances the gradients at the decoder's last layer (Esser et al. 2021, arXiv 2012.09841, eq. 7). All terms are means
over pixels, while the published code takes sums; the weights are the published ones.

The perceptual and the adversarial loss of a volume are those of some of its slices in three planes, because their
networks are made for images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from medseg_diffusion.diffusion.noise import generators
from medseg_diffusion.diffusion.schedule import sent
from medseg_diffusion.networks.autoencoder import KLAutoencoder, VQAutoencoder

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, image), both (B, C, H, W) in [-1, 1] -> a distance, a scalar."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the autoencoder's losses; that of L1 is 1.

    Attributes:
        perceptual: of the perceptual distance.
        regularisation: of the KL divergence in nats (KL) or the commitment loss (VQ).
        adversarial: of the adversarial loss, which is multiplied by `balance` as well; 0 leaves it out.
        adversarial_start: step from which the discriminator learns and the autoencoder sees the adversarial loss.
    """

    perceptual: float = 1.0
    regularisation: float = 1e-6
    adversarial: float = 0.5
    adversarial_start: int = 50_001


class AutoencoderTraining(nn.Module):
    """Autoencoder and discriminator in one training step: batch -> the sum of both losses.

    The discriminator sees the reconstruction detached, and the autoencoder sees the discriminator with constant
    weights. Each loss thus trains its own network only, and one backward pass serves both. Each network has its own
    optimiser and gradient clip (`training.trainer.SeveralParts`).

    Args:
        autoencoder: KL or VQ.
        perceptual: the perceptual distance; its own parameters, if any, are not trained.
        weights: of the losses.
        discriminator_channels: width of the discriminator's first layer.
        discriminator_layers: how often the discriminator halves the resolution.
        slices: of each plane of a volume that the perceptual distance and the discriminator see.
    """

    step: Tensor
    """Number of the steps that were begun, in the resume file and in the averaged model."""

    def __init__(
        self,
        autoencoder: KLAutoencoder | VQAutoencoder,
        perceptual: Perceptual,
        weights: LossWeights = LossWeights(),
        discriminator_channels: int = 64,
        discriminator_layers: int = 3,
        slices: int = 8,
    ) -> None:
        # Imported where used: MONAI takes seconds, which the rest of training does not need.
        from monai.networks.nets import PatchDiscriminator

        super().__init__()
        self.autoencoder = autoencoder
        # In a list, which hides it from torch: the perceptual network is neither trained, nor averaged, nor stored.
        self._perceptual = [perceptual]
        self.weights = weights
        self.slices = slices
        self.discriminator = PatchDiscriminator(
            spatial_dims=2,
            channels=discriminator_channels,
            in_channels=next(autoencoder.encoder.parameters()).shape[1],
            num_layers_d=discriminator_layers,
            norm="INSTANCE",
        )
        # A parameter that never gets a gradient must not require one: several processes would wait for it.
        self.discriminator.requires_grad_(weights.adversarial > 0)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._is_adversarial = weights.adversarial > 0 and weights.adversarial_start <= 0

    def optimised_parts(self) -> list[list[nn.Parameter]]:
        """The parameters of the autoencoder and, with an adversarial loss, those of the discriminator."""
        parts = [list(self.autoencoder.parameters())]
        return parts + ([list(self.discriminator.parameters())] if self.weights.adversarial > 0 else [])

    def begin_step(self, step: int) -> None:
        """Says which step is trained from now on (`training.trainer.KnowsStep`), 0 for the first.

        Until then it is the first one.
        """
        self._is_adversarial = self.weights.adversarial > 0 and step >= self.weights.adversarial_start
        self.step.fill_(step + 1)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss, a scalar, of "image" (B, C, *S) in [-1, 1] and "seed" (B,) int64.

        In evaluation mode the adversarial part is left out: the loss then measures the reconstruction.
        """
        image, seeds = batch["image"], batch["seed"].tolist()
        reconstruction, penalty = self.autoencoder.reconstruct(image, generators(seeds))
        # In float32: autocast would run the convolutions of SSIM in bfloat16. SSIM's variance is a difference of two
        # nearly equal moments, which would be rounded to noise of either sign.
        with torch.autocast(image.device.type, enabled=False):
            reconstruction, penalty = reconstruction.float(), penalty.float()
            fakes, reals = (as_images(value, self.slices, seeds[0]) for value in (reconstruction, image))
            perceptual = _mean(map(self._perceptual[0], fakes, reals))
            reconstruction_loss = F.l1_loss(reconstruction, image) + self.weights.perceptual * perceptual
        pixels = image[0].numel() if isinstance(self.autoencoder, KLAutoencoder) else 1
        loss = reconstruction_loss + self.weights.regularisation * penalty.mean() / pixels
        if not self.training or self.weights.adversarial == 0:
            return loss
        if not self._is_adversarial:
            # A gradient of zero: several processes would wait for parameters that have none.
            return loss + 0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        constant = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        adversarial_loss = -_mean(functional_call(self.discriminator, constant, (fake,))[-1].mean() for fake in fakes)
        ratio = balance(reconstruction_loss, adversarial_loss, self.autoencoder.last_layer)
        loss = loss + self.weights.adversarial * ratio * adversarial_loss
        on_reals = _mean(F.relu(1 - self.discriminator(real)[-1]).mean() for real in reals)
        on_fakes = _mean(F.relu(1 + self.discriminator(fake.detach())[-1]).mean() for fake in fakes)
        return loss + 0.5 * (on_reals + on_fakes)


def as_images(image: Tensor, count: int, seed: int) -> list[Tensor]:
    """Images (B, C, H, W) as they are; volumes (B, C, D, H, W) as ``count`` slices across each of the three axes.

    The slices of an axis are (B * count, C, *s), at random positions that are the same for all volumes of a size and
    seed. A short axis gives all slices that it has.
    """
    if image.ndim == 4:
        return [image]
    (generator,) = generators([seed])
    slices = []
    for axis in (2, 3, 4):
        positions = torch.randperm(image.shape[axis], generator=generator, device="cpu")[:count]
        part = image.index_select(axis, sent(positions, image.device))
        slices.append(part.movedim(axis, 1).flatten(0, 1))
    return slices


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def balance(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Ratio of the two losses' gradient norms at ``last_layer``, at most 1e4; a scalar without gradient."""
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-6)).clamp(max=1e4).detach()


class GradientSSIM:
    """1 - SSIM, plus L1 of the differences between neighbours at 3 scales: the fallback where LPIPS has no weights."""

    def __init__(self) -> None:
        from monai.losses import SSIMLoss

        self.ssim = SSIMLoss(spatial_dims=2, data_range=2.0, win_size=7)

    def __call__(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        with image.device:  # MONAI would make its kernel on the CPU, and wait for the device to copy it there
            loss = self.ssim(reconstruction.float(), image.float())
        for _ in range(3):
            for axis in (2, 3):
                loss = loss + F.l1_loss(reconstruction.diff(dim=axis), image.diff(dim=axis))
            reconstruction, image = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(image, 2)
        return loss


@torch.no_grad()
def standardise(autoencoder: KLAutoencoder | VQAutoencoder, batches: Iterable[Tensor]) -> None:
    """Sets the autoencoder's ``shift`` and ``scale`` from ``batches`` of images (B, C, *S).

    They come from the mean and standard deviation of each latent channel.
    """
    autoencoder.shift.fill_(0)
    autoencoder.scale.fill_(1)
    total = square = torch.zeros(())
    count = 0
    for batch in batches:
        latent = autoencoder.encode(batch).cpu().double().transpose(0, 1).flatten(1)
        total, square, count = total + latent.sum(1), square + latent.square().sum(1), count + latent.shape[1]
    mean = total / count
    autoencoder.shift.copy_(mean)
    autoencoder.scale.copy_((square / count - mean**2).clamp(min=1e-12).rsqrt())

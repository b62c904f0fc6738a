"""Masks diffused in the latent space of an autoencoder of masks (after SDSeg, Lin et al. 2024, arXiv 2401.13466).

SDSeg reuses an autoencoder of photographs. Here a small one is trained on the training masks themselves, with Dice and
cross-entropy, which works for any number of classes and in 3D. Its reconstruction limits the segmenter: the Dice of
masks against their own reconstructions is measured on the validation cases and stored as the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg_diffusion.device import at_once
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import TimeSource, draw_noised, generators
from medseg_diffusion.diffusion.objective import Objective
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.blocks import padded_to
from medseg_diffusion.sampling.loop import Sampler

from .mask import Batch, MaskEncoding, dice_ce, sample_all


class MaskAutoencoder(nn.Module):
    """Encodes labels (B, *S) as latents (B, C', *s), s = ceil(S / factor), and decodes them: batch -> training loss.

    Args:
        codec: its input and output have the channels of ``encoding``; its output is read as logits.
        encoding: how labels become channels.
        factor: the codec's downsampling factor. Labels are padded with background to multiples of it.
        kl_weight: weight of the KL divergence in nats per voxel.
    """

    def __init__(self, codec: KLAutoencoder, encoding: MaskEncoding, factor: int, kl_weight: float = 1e-6) -> None:
        super().__init__()
        self.codec = codec
        self.encoding = encoding
        self.factor = factor
        self.kl_weight = kl_weight

    def encode(self, labels: Tensor) -> Tensor:
        """Encodes labels (B, *S) as standardised latents (B, C', *s)."""
        return self.codec.encode(self.channels_of(labels))

    def channels_of(self, labels: Tensor) -> Tensor:
        """The codec's input for labels (B, *S), padded to multiples of ``factor``."""
        return self.encoding.encode(padded_to(labels[:, None], self.factor)[:, 0])

    def decode(self, latent: Tensor, shape: Sequence[int]) -> Tensor:
        """Decodes latents (B, C', *s) to class probabilities (B, K, *S), S being ``shape``."""
        return self._cut(self.codec.decode(latent), shape).softmax(1)

    def forward(self, batch: Batch) -> Tensor:
        """Training loss, a scalar: Dice and cross-entropy of the reconstruction, and the KL divergence."""
        labels = batch["label"]
        logits, kl = self.codec.reconstruct(self.channels_of(labels), generators(batch["seed"].tolist()))
        voxels = labels[0].numel()
        return dice_ce(self._cut(logits, labels.shape[1:]), labels) + self.kl_weight * kl.mean() / voxels

    def _cut(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        return self.encoding.class_logits(logits.float())[(slice(None), slice(None), *[slice(size) for size in shape])]


class LatentMaskDiffusion(nn.Module):
    """A conditional diffusion model of mask latents, used like `MaskDiffusion`.

    Args:
        denoiser: its network has ``encode_condition(image)``; its ``scale`` multiplies the standardised latents.
        autoencoder: already trained; it is frozen.
        objective: the diffusion loss. With target x0 the model can predict a mask in one step from pure noise; SDSeg
            predicts eps and adds an L1 loss of x0 for this purpose.
        times: draws the training times; None for uniform ones.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        autoencoder: MaskAutoencoder,
        objective: Objective,
        times: TimeSource | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.autoencoder = autoencoder.requires_grad_(False)
        self.objective = objective
        self.times = times

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def forward(self, batch: Batch) -> Tensor:
        """Training loss, a scalar. Times and noise come from the examples' own seeds."""
        schedule = self.denoiser.schedule
        with torch.no_grad():
            z0 = self.denoiser.scale * self.autoencoder.encode(batch["label"]).to(batch["image"].dtype)
        own = generators(batch["seed"].tolist())
        noised = draw_noised(schedule, z0, own, t=None if self.times is None else self.times(own))
        prediction = self.denoiser(noised.x_t, noised.t, self._condition(batch["image"]))
        return self.objective(schedule, self.denoiser.target, prediction, noised).mean()

    @torch.no_grad()
    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        """Samples masks of ``image`` (B, C, *S): probabilities (B, N, K, *S), see `MaskDiffusion.probabilities`."""
        cond = self._condition(image)
        shape = (len(self.autoencoder.codec.scale), *cond["concat"].shape[2:])
        z0 = sample_all(self.denoiser, sampler, times, cond, seeds, shape, image, self.denoiser.scale)
        batch = at_once(math.prod(image.shape[2:]), image.device)
        latents = z0 / self.denoiser.scale
        decoded = [self.autoencoder.decode(part, image.shape[2:]) for part in latents.split(batch)]
        return torch.cat(decoded).unflatten(0, (len(image), -1))

    def _condition(self, image: Tensor) -> dict[str, Tensor]:
        cond: dict[str, Tensor] = self.network.encode_condition(padded_to(image, self.autoencoder.factor))  # type: ignore[operator]
        return cond

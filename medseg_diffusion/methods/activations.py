"""Features of an image from a trained generator: activations of its network on the noisy image.

Baranchuk et al. 2022 (arXiv 2112.03126, sec. 3) show that the middle blocks of the decoder, at low noise, distinguish
objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from medseg_diffusion.device import Precision, autocast
from medseg_diffusion.diffusion.noise import generators
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks.autoencoder import Codec
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.tasks.image import ImageDiffusion

PUBLISHED_TIMES = (50, 150, 250)
PUBLISHED_BLOCKS = tuple(f"decoder.{i}" for i in (5, 6, 7, 8, 12))


class Activations(nn.Module):
    """Images (B, C, *S) in [-1, 1] to activations of some blocks at some times, a list of (B, C_b, *S_b).

    All images get the same noise, of the kind of the generator's training, so that equal pixels have equal features
    (published: "share_noise"). Each block must cover the whole image, so S must be a multiple of the network's factor
    (and of the codec's).

    Args:
        task: the trained generator.
        codec: autoencoder of a latent generator, else None.
        shape: shape (C, *S) of x0: that of the image or the latent.
        times: 0-based as published: x0 is noised to time ``t + 1``.
        blocks: names of blocks (`UNet.block_names`).
        seed: seed of the noise.
        precision: precision of the network and the codec.

    Raises:
        UsageError: a block or a time that the generator does not have.
        ModelError: an unsuitable generator: of patches or higher resolutions, without unconditional training, or with a
            side that the network cannot divide.
    """

    noise: Tensor

    def __init__(
        self,
        task: ImageDiffusion,
        codec: Codec | None,
        shape: Sequence[int],
        times: Sequence[int] = PUBLISHED_TIMES,
        blocks: Sequence[str] = PUBLISHED_BLOCKS,
        seed: int = 0,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        network = task.denoiser.network
        if not isinstance(network, UNet) or not isinstance(task, ImageDiffusion) or task.factor is not None:
            raise ModelError("activations are taken from generators of whole images, not of patches or enlarged ones")
        names = network.block_names()
        if (task.num_classes or task.mask_classes) and not task.drop:
            kind = "classes" if task.num_classes else "masks"
            raise ModelError(f"the generator is conditioned by {kind} and never saw an image without one")
        if unknown := [name for name in blocks if name not in names]:
            raise UsageError(f"the generator has no block {unknown[0]}; it has {names[0]} to {names[-1]}")
        if wrong := [t for t in times if not 0 <= t < task.denoiser.schedule.num_steps]:
            raise UsageError(f"time {wrong[0]} is beyond the generator's 0 to {task.denoiser.schedule.num_steps - 1}")
        if odd := [n for n in shape[1:] if n % network.factor]:
            raise ModelError(
                f"the generator's side of {odd[0]} is no multiple of {network.factor}, by which its network divides it"
            )
        self.task = task
        self.codec = codec
        self.shape, self.seed = tuple(shape), seed
        self.times, self.blocks = tuple(times), tuple(blocks)
        self.precision: Precision = precision
        self.register_buffer("noise", task.noise(shape, generators([seed])), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        with autocast(images.device, self.precision):
            return self._activations(images if self.codec is None else self.codec.encode(images))

    def _activations(self, x0: Tensor) -> list[Tensor]:
        task = self.task
        activations: list[Tensor] = []
        label = torch.full((len(x0),), task.num_classes, device=x0.device) if task.num_classes else None
        cond = task.condition(label, size=x0.shape[2:], mask=task.no_mask(x0))
        for t in self.times:
            x_t = task.denoiser.schedule.add_noise(x0, self.noise.to(x0.dtype).expand_as(x0), t + 1)
            steps = torch.full((len(x0),), t, device=x0.device)
            by_name = self._network().activations(x_t, steps, cond, self.blocks)
            activations += [by_name[name] for name in self.blocks]
        return activations

    def decoder_blocks(self) -> list[str]:
        """Names of all blocks of the decoder."""
        return [name for name in self._network().block_names() if name.startswith("decoder.")]

    def with_blocks(self, blocks: Sequence[str]) -> Activations:
        """The same generator, image shape, times and noise with other blocks."""
        other = Activations(self.task, self.codec, self.shape, self.times, blocks, self.seed, self.precision)
        return other.to(self.noise.device)

    def _network(self) -> UNet:
        return cast(UNet, self.task.denoiser.network)

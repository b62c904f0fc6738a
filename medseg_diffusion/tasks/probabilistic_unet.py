"""Training and sampling of the Probabilistic U-Net (Kohl et al. 2018, arXiv 1806.05034), a rival of mask diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.device import at_once
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.networks.probabilistic_unet import DiagonalGaussian, ProbabilisticUNet, posterior_input
from medseg_diffusion.sampling.loop import Sampler

from .mask import Batch, MaskEncoding


class ProbabilisticSegmentation(nn.Module):
    """A Probabilistic U-Net: batch -> training loss; `probabilities` samples masks.

    Args:
        network: the networks.
        encoding: how labels are shown to the posterior encoder.
        beta: weight of the divergence between posterior and prior (published: 1).
    """

    def __init__(self, network: ProbabilisticUNet, encoding: MaskEncoding, beta: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.encoding = encoding
        self.beta = beta

    def forward(self, batch: Batch) -> Tensor:
        """Training loss, a scalar: the cross-entropy and the divergence, per pixel. Noise is from the examples' seeds.

        Published is their sum over the pixels; the ratio of the two is the same.
        """
        image, labels = batch["image"], batch["label"]
        posterior = self.network.posterior(posterior_input(image, self.encoding.encode(labels)))
        divergence = posterior.divergence(self.network.prior(image))
        eps = gaussian((self.network.latent_channels,), generators(batch["seed"].tolist()), like=divergence)
        logits = self._logits(self.network.features(image), posterior.sample(eps))
        entropy = F.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1)
        return (entropy + self.beta * divergence / labels[0].numel()).mean()

    @torch.no_grad()
    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        """Class probabilities (B, N, K, *S) of N latents from the prior of each image (B, C, *S), one for each seed.

        ``sampler`` and ``times`` are those of other segmenters: a sample is one evaluation.
        """
        count = len(seeds[0])
        prior, features = self.network.prior(image), self.network.features(image)
        own = generators([seed for members in seeds for seed in members])
        eps = gaussian((self.network.latent_channels,), own, like=prior.mean).unflatten(0, (len(image), count))
        latents = DiagonalGaussian(prior.mean[:, None], prior.log_scale[:, None]).sample(eps)
        batch = at_once(math.prod(image.shape[2:]), image.device)
        which = torch.arange(len(image), device=image.device).repeat_interleave(count)
        parts = zip(which.split(batch), latents.flatten(0, 1).split(batch), strict=True)
        samples = [self._logits(features[index], latent).softmax(1) for index, latent in parts]
        return torch.cat(samples).unflatten(0, (len(image), count))

    def _logits(self, features: Tensor, latent: Tensor) -> Tensor:
        return self.encoding.class_logits(self.network.logits(features, latent).float())

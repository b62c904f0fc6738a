"""Anomalies as what a latent diffusion model of healthy images finds unlikely, and replaces (Pinaya et al. 2022).

(arXiv 2206.03461; no code was published.) The KL divergence between the true and the model's denoising step is large
where a latent is unlike the healthy ones. Those positions are sampled anew while the others follow the forward process
of the image itself; what changes in the decoded image is the anomaly.

Two things are not published. Several healings may be averaged (``draws``): what differs between them by chance is no
anomaly. Since the mean of healings is what a single step from the start predicts, few steps are enough then. And the
healed image is compared with the image as the autoencoder gives it back, not with the image itself:
what the autoencoder loses is no anomaly either. On FLAIR both find more tumour (docs/results/anomaly.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Denoiser
from medseg_diffusion.diffusion.likelihood import kl_maps
from medseg_diffusion.diffusion.noise import derive_seed, gaussian, generators
from medseg_diffusion.networks.autoencoder import Codec
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import spaced

from .detector import Residual, residual

LEVELS = 1001
"""Quantiles of the healthy maps that are kept, evenly spaced from 0 to 1."""


@dataclass(frozen=True, eq=False)
class HealthyLatents:
    """What the KL maps of healthy images are like.

    Attributes:
        mean: (N,) of each time, over positions and images.
        std: (N,) likewise.
        quantiles: (`LEVELS`,) of the standardised maps' mean over times.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor

    def threshold(self, quantile: float) -> float:
        """The value below which so large a share of healthy positions lies."""
        levels = torch.linspace(0, 1, len(self.quantiles), dtype=torch.float64)
        low = int((levels <= quantile).sum()) - 1
        high = min(low + 1, len(levels) - 1)
        part = (quantile - float(levels[low])) * (len(levels) - 1)
        return float(self.quantiles[low] + part * (self.quantiles[high] - self.quantiles[low]))


class LatentHealing:
    """The detector. Needs `HealthyLatents` of held-out healthy images before it can score.

    Args:
        denoiser: of latents, neither clipped nor guided.
        codec: between images and latents.
        times: at which the KL is taken, in 2..T (published: evenly spaced in [400, 600]).
        start: time from which anomalous positions are sampled anew.
        steps: denoiser calls for that.
        quantile: share of healthy positions that stay as they are (published: 0.975); 0 heals everything and takes no
            KL.
        draws: healings, of whose latents the mean is compared (published: 1).
        smoothing: standard deviation, in latent positions, of the smoothing of the mask.
        healthy: see `fit`.
        batch_size: calls of the denoiser at once.
        residual: see `methods.detector.residual`.

    Raises:
        ValueError: times or start beyond the schedule, or another number of times than ``healthy`` was fitted with.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: Codec,
        times: Sequence[int],
        start: int = 500,
        steps: int = 25,
        quantile: float = 0.975,
        smoothing: float = 1.0,
        healthy: HealthyLatents | None = None,
        batch_size: int = 64,
        residual: Residual = "absolute",
        draws: int = 1,
    ) -> None:
        last = denoiser.schedule.num_steps
        if not 1 <= steps <= start <= last:
            raise ValueError(f"needs 1 <= steps <= start <= {last}, got {steps} steps from {start}")
        if draws < 1:
            raise ValueError(f"at least one healing is needed, got {draws}")
        if not all(2 <= t <= last for t in times):
            raise ValueError(f"needs times in 2..{last}, got {list(times)}")
        if healthy is not None and len(healthy.mean) != len(times):
            raise ValueError(f"fitted with {len(healthy.mean)} times, used with {len(times)}")
        self.denoiser, self.codec = denoiser, codec
        self.times = list(times)
        self.walk = spaced(denoiser.schedule, steps, "trailing", start)
        self.quantile, self.smoothing = quantile, smoothing
        self.healthy = healthy
        self.batch_size, self.residual, self.draws = batch_size, residual, draws

    @property
    def evaluations(self) -> int:
        return (len(self.times) if self.quantile > 0 else 0) + self.draws * (len(self.walk) - 1)

    @torch.no_grad()
    def divergence(self, latent: Tensor, seeds: Sequence[int]) -> Tensor:
        """KL maps (B, N, *s) of latents (B, C, *s) at the N times, in nats; all of them in batches."""
        own = generators([derive_seed(seed, "divergence") for seed in seeds])
        return kl_maps(self.denoiser, latent, own, self.times, batch_size=self.batch_size)

    def fit(self, maps: Tensor, inside: Tensor) -> HealthyLatents:
        """What is healthy, from the KL maps (B, N, *s) of healthy images.

        The weight of the KL changes a lot within the published range of times: each is standardised, so that no one
        outweighs the others.

        Args:
            maps: from `divergence`.
            inside: (B, 1, *S) foreground of the images; positions that are mostly outside do not count.
        """
        there = self._on_latents(inside, maps.shape[2:])[:, 0] > 0.5
        average = torch.zeros(int(there.sum()), dtype=torch.float64)
        mean, std = torch.zeros(maps.shape[1]), torch.zeros(maps.shape[1])
        for i in range(maps.shape[1]):  # one time after another: all at once in float64 may be gigabytes
            values = maps[:, i][there].double().cpu()
            mean[i], std[i] = values.mean(), values.std().clamp(min=1e-12)
            average += (values - mean[i]) / std[i] / maps.shape[1]
        levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
        # In numpy, for torch.quantile refuses more than 16 million values.
        quantiles = torch.from_numpy(np.quantile(average.numpy(), levels.numpy()))
        return HealthyLatents(mean, std, quantiles.float())

    @torch.no_grad()
    def unlikely(self, latent: Tensor, seeds: Sequence[int]) -> Tensor:
        """The mean over times of the standardised KL, (B, 1, *s)."""
        if self.healthy is None:
            raise ValueError("fit the detector to healthy images first")
        maps = self.divergence(latent, seeds)
        shape = (1, -1, *[1] * (maps.ndim - 2))
        mean, std = (value.to(maps).reshape(shape) for value in (self.healthy.mean, self.healthy.std))
        return ((maps - mean) / std).mean(1, keepdim=True)

    @torch.no_grad()
    def heal(self, latent: Tensor, mask: Tensor, seeds: Sequence[int], draw: int = 0) -> Tensor:
        """Latents (B, C, *s) with the masked positions (B, 1, *s) sampled anew.

        The noise of the forward process is one draw for the whole walk, so that what is kept and what is sampled see
        one and the same trajectory; steps are deterministic (DDIM).
        """
        schedule, step = self.denoiser.schedule, DDIM()
        own = generators([derive_seed(seed, "healing", draw) for seed in seeds])
        eps = gaussian(latent.shape[1:], own, like=latent)
        keep = 1 - mask.to(latent.dtype)
        z = schedule.add_noise(latent, eps, self.walk[0])
        for t, s in pairwise(self.walk):
            at = torch.full((len(z),), t, device=z.device)
            sampled = step(schedule, self.denoiser(z, at), z, t, s, _no_noise)
            known = schedule.add_noise(latent, eps, s) if s else latent
            z = keep * known + (1 - keep) * sampled
        return z

    @torch.no_grad()
    def healthy_images(self, latent: Tensor, mask: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, *S) of latents (B, C, *s) as the autoencoder gives them back, and healed (the mean decoded)."""
        healed = torch.zeros_like(latent)
        for draw in range(self.draws):
            healed += self.heal(latent, mask, seeds, draw) / self.draws
        return self.codec.decode(latent).clamp(-1, 1), self.codec.decode(healed).clamp(-1, 1)

    @torch.no_grad()
    def score(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        latent = self.codec.encode(images)
        if self.quantile == 0:
            mask = torch.ones_like(latent[:, :1])
        else:
            assert self.healthy is not None
            mask = (self.unlikely(latent, seeds) > self.healthy.threshold(self.quantile)).to(images.dtype)
        # Where nothing is unlikely nothing changes: such images are not walked.
        touched = mask.flatten(1).any(1)
        score = torch.zeros_like(images[:, :1])
        if not touched.any():
            return score
        chosen = [seed for seed, wanted in zip(seeds, touched.tolist(), strict=True) if wanted]
        kept, healed = self.healthy_images(latent[touched], mask[touched], chosen)
        mode = "bilinear" if images.ndim == 4 else "trilinear"
        with torch.autocast(images.device.type, enabled=False):
            soft = smoothed(mask[touched], self.smoothing)
            soft = F.interpolate(soft, images.shape[2:], mode=mode, align_corners=False)
        score[touched] = residual(kept, healed, self.residual) * soft
        return score

    @staticmethod
    def _on_latents(inside: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(inside.float(), tuple(size), mode="area")  # means over what a position covers


def _no_noise() -> Tensor:
    raise RuntimeError("a deterministic step asked for noise")


def smoothed(mask: Tensor, sigma: float) -> Tensor:
    """Maps (B, 1, *S) smoothed by a Gaussian of ``sigma`` positions; the border is repeated."""
    if sigma <= 0:
        return mask
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=mask.dtype, device=mask.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    conv = F.conv2d if mask.ndim == 4 else F.conv3d
    for axis in range(2, mask.ndim):
        pad = [0, 0] * (mask.ndim - 1 - axis) + [radius, radius] + [0, 0] * (axis - 2)
        shape = [1, 1, *[1] * (mask.ndim - 2)]
        shape[axis] = -1
        mask = conv(F.pad(mask, pad, mode="replicate"), kernel.reshape(shape))
    return mask


class Reconstruction:
    """The honest baseline: what the autoencoder does not give back, without any diffusion."""

    evaluations = 0

    def __init__(self, codec: Codec, residual: Residual = "absolute") -> None:
        self.codec, self.residual = codec, residual

    @torch.no_grad()
    def score(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return residual(images, self.codec.decode(self.codec.encode(images)).clamp(-1, 1), self.residual)

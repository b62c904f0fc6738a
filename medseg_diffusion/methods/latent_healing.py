"""Anomaly detection by a latent diffusion model of healthy images that replaces unlikely latents (Pinaya et al. 2022).

See arXiv 2206.03461; no code was published. The KL divergence between the true and the model's denoising step is large
at positions where a latent differs from those of healthy images. These positions are resampled, while the others follow
the forward process of the image. The change of the decoded image is the anomaly map.

Two additions are not published; both find more tumour on FLAIR (docs/results/anomaly.md):

* Several healings may be averaged (``draws``), because their random differences are no anomaly. Few steps are enough
  then: a single step from the start predicts the mean of all healings.
* The healed image is compared with the autoencoder's reconstruction, not with the image, because the autoencoder's
  errors are no anomaly.
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

from .detector import Detection, Detector, Residual, residual

LEVELS = 1001
"""Number of stored quantiles of the healthy maps, evenly spaced from 0 to 1."""


@dataclass(frozen=True, eq=False)
class HealthyLatents:
    """Statistics of the KL maps of healthy images.

    Attributes:
        mean: (N,) mean at each time, over positions and images.
        std: (N,) standard deviation at each time, over positions and images.
        quantiles: (`LEVELS`,) quantiles of the mean over times of the standardised maps.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor

    def threshold(self, quantile: float) -> float:
        """The value below which the share ``quantile`` of the healthy positions lies."""
        levels = torch.linspace(0, 1, len(self.quantiles), dtype=torch.float64)
        low = int((levels <= quantile).sum()) - 1
        high = min(low + 1, len(levels) - 1)
        part = (quantile - float(levels[low])) * (len(levels) - 1)
        return float(self.quantiles[low] + part * (self.quantiles[high] - self.quantiles[low]))


class LatentHealing(Detector):
    """The detector. Unless ``quantile`` is 0, it needs `HealthyLatents` of held-out healthy images before it can score.

    Args:
        denoiser: denoiser of latents, neither clipped nor guided.
        codec: autoencoder between images and latents.
        times: times of the KL divergence, in 2..T (published: evenly spaced in [400, 600]).
        start: time from which anomalous positions are resampled.
        steps: denoiser calls of the resampling.
        quantile: share of healthy positions that are not resampled (published: 0.975). With 0, all positions are
            resampled and no KL divergence is computed.
        smoothing: standard deviation, in latent positions, of the smoothing of the mask.
        healthy: statistics from `fit`.
        batch_size: latents in a batch of the denoiser.
        residual: see `methods.detector.residual`.
        draws: number of healings, whose latents are averaged (published: 1).

    Raises:
        ValueError: times or start beyond the schedule, or another number of times than ``healthy`` was fitted with.
    """

    # many: mirrors LatentHealingSection
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
        self.trajectory = spaced(denoiser.schedule, steps, "trailing", start)
        self.quantile, self.smoothing = quantile, smoothing
        self.healthy = healthy
        self.batch_size, self.residual, self.draws = batch_size, residual, draws

    @property
    def evaluations(self) -> int:
        return (len(self.times) if self.quantile > 0 else 0) + self.draws * (len(self.trajectory) - 1)

    @torch.no_grad()
    def divergence(self, latent: Tensor, seeds: Sequence[int]) -> Tensor:
        """KL maps (B, N, *s) of latents (B, C, *s) at the N times, in nats."""
        noise = generators([derive_seed(seed, "divergence") for seed in seeds])
        return kl_maps(self.denoiser, latent, noise, self.times, batch_size=self.batch_size)

    def fit(self, maps: Tensor, inside: Tensor) -> HealthyLatents:
        """Statistics of the KL maps (B, N, *s) of healthy images.

        The scale of the KL divergence changes a lot within the published range of times. The maps are standardised at
        each time, so that no time dominates.

        Args:
            maps: KL maps from `divergence`.
            inside: (B, 1, *S) foreground of the images. Positions that are mostly background are ignored.
        """
        foreground = self._on_latents(inside, maps.shape[2:])[:, 0] > 0.5
        average = torch.zeros(int(foreground.sum()), dtype=torch.float64)
        mean, std = torch.zeros(maps.shape[1]), torch.zeros(maps.shape[1])
        for i in range(maps.shape[1]):  # one time after another, because all maps in float64 may take gigabytes
            values = maps[:, i][foreground].double().cpu()
            mean[i], std[i] = values.mean(), values.std().clamp(min=1e-12)
            average += (values - mean[i]) / std[i] / maps.shape[1]
        levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
        # In numpy, because torch.quantile refuses more than 16 million values.
        quantiles = torch.from_numpy(np.quantile(average.numpy(), levels.numpy()))
        return HealthyLatents(mean, std, quantiles.float())

    @torch.no_grad()
    def unlikely(self, latent: Tensor, seeds: Sequence[int]) -> Tensor:
        """The mean over times of the standardised KL divergence, (B, 1, *s).

        Raises:
            ValueError: no statistics of healthy images.
        """
        if self.healthy is None:
            raise ValueError("fit the detector to healthy images first")
        maps = self.divergence(latent, seeds)
        shape = (1, -1, *[1] * (maps.ndim - 2))
        mean, std = (value.to(maps).reshape(shape) for value in (self.healthy.mean, self.healthy.std))
        return ((maps - mean) / std).mean(1, keepdim=True)

    @torch.no_grad()
    def heal(self, latent: Tensor, mask: Tensor, seeds: Sequence[int], draw: int = 0) -> Tensor:
        """Resample the masked positions (B, 1, *s) of latents (B, C, *s).

        The forward process uses one draw of noise for all times, so that resampled and other positions follow one
        trajectory. Steps are deterministic (DDIM). ``draw`` is the number of the healing.
        """
        schedule, step = self.denoiser.schedule, DDIM()
        eps = gaussian(
            latent.shape[1:], generators([derive_seed(seed, "healing", draw) for seed in seeds]), like=latent
        )
        keep = 1 - mask.to(latent.dtype)
        z = schedule.add_noise(latent, eps, self.trajectory[0])
        for t, s in pairwise(self.trajectory):
            times = torch.full((len(z),), t, device=z.device)
            sampled = step(schedule, self.denoiser(z, times), z, t, s, _no_noise)
            original = schedule.add_noise(latent, eps, s) if s else latent
            z = keep * original + (1 - keep) * sampled
        return z

    @torch.no_grad()
    def healthy_images(self, latent: Tensor, mask: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The reconstruction and the healed images, each (B, C, *S), of latents (B, C, *s).

        The healed image is decoded from the mean of all healings.
        """
        healed = torch.zeros_like(latent)
        for draw in range(self.draws):
            healed += self.heal(latent, mask, seeds, draw) / self.draws
        return self.codec.decode(latent).clamp(-1, 1), self.codec.decode(healed).clamp(-1, 1)

    @torch.no_grad()
    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        """Anomaly maps, and the healed images; images without an unlikely position are their own counterparts."""
        latent = self.codec.encode(images)
        if self.quantile == 0:
            mask = torch.ones_like(latent[:, :1])
        else:
            assert self.healthy is not None
            mask = (self.unlikely(latent, seeds) > self.healthy.threshold(self.quantile)).to(images.dtype)
        # Images without an unlikely position would not change, so they are not resampled.
        touched = mask.flatten(1).any(1)
        score, healthy = torch.zeros_like(images[:, :1]), images.clone()
        if not touched.any():
            return Detection(score, healthy)
        seeds = [seed for seed, unlikely in zip(seeds, touched.tolist(), strict=True) if unlikely]
        reconstructed, healed = self.healthy_images(latent[touched], mask[touched], seeds)
        mode = "bilinear" if images.ndim == 4 else "trilinear"
        with torch.autocast(images.device.type, enabled=False):
            soft = smoothed(mask[touched], self.smoothing)
            soft = F.interpolate(soft, images.shape[2:], mode=mode, align_corners=False)
        score[touched] = residual(reconstructed, healed, self.residual) * soft
        healthy[touched] = healed
        return Detection(score, healthy)

    @staticmethod
    def _on_latents(inside: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(inside.float(), tuple(size), mode="area")  # the mean over the pixels of a position


def _no_noise() -> Tensor:
    raise RuntimeError("a deterministic step asked for noise")


def smoothed(mask: Tensor, sigma: float) -> Tensor:
    """Maps (B, 1, *S) smoothed by a Gaussian with a standard deviation of ``sigma`` positions; borders are repeated."""
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


class Reconstruction(Detector):
    """The baseline without diffusion: the reconstruction error of the autoencoder."""

    evaluations = 0

    def __init__(self, codec: Codec, residual: Residual = "absolute") -> None:
        self.codec, self.residual = codec, residual

    @torch.no_grad()
    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        healthy = self.codec.decode(self.codec.encode(images)).clamp(-1, 1)
        return Detection(residual(images, healthy, self.residual), healthy)

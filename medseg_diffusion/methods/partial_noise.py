"""Anomaly detection by partial noising and denoising: AnoDDPM (Wyatt et al. 2022, CVPR workshops).

Noise up to a moderate time hides the anomaly but not the anatomy. A model of healthy images denoises to a healthy
image, and the difference is the anomaly map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Clipped, Denoiser
from medseg_diffusion.diffusion.noise import NoiseSource, derive_seed
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import sample, spread

from .detector import Detection, Detector, Residual, noise_by_seed, residual


class PartialNoise(Detector):
    """The detector.

    The published method uses `start` steps of ancestral sampling with simplex noise. Here the steps are deterministic
    (DDIM) and fewer. The published score is the squared residual above 0.5; the absolute residual is a monotone
    function of it. A single step from a low start, averaged over draws, is similar to a denoising autoencoder (Kascenas
    et al. 2022, MIDL). It finds the most tumour on FLAIR (docs/results/anomaly.md).

    Args:
        denoiser: denoiser of images, trained on healthy images with the same noise. Its predictions are clipped to
            [-1, 1].
        noise: Gaussian or simplex (published).
        start: time to which images are noised, 1..T (published: 250).
        steps: denoiser calls from ``start`` to the clean image.
        draws: number of draws of noise, every second one the opposite of the one before. Their healthy images are
            averaged, because random differences are no anomaly.
        residual: see `methods.detector.residual`.

    Raises:
        ValueError: a start beyond the schedule, fewer steps than 1 or more than ``start``, no draw.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        start: int = 250,
        steps: int = 25,
        draws: int = 1,
        residual: Residual = "absolute",
    ) -> None:
        last = denoiser.schedule.num_steps
        if not 1 <= steps <= start <= last:
            raise ValueError(f"needs 1 <= steps <= start <= {last}, got {steps} steps from {start}")
        if draws < 1:
            raise ValueError(f"at least one draw of noise is needed, got {draws}")
        self.denoiser, self.noise = denoiser, noise
        self.draws, self.residual = draws, residual
        self.times = [*spread(denoiser.schedule, steps, start), 0]

    @property
    def evaluations(self) -> int:
        return self.draws * (len(self.times) - 1)

    @torch.no_grad()
    def healthy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The healthy versions (B, C, *S) of images (B, C, *S), one draw of all images after the other.

        Draws 2k and 2k + 1 have opposite noise, so that its odd effects cancel.
        """
        mean, eps = torch.zeros_like(images), torch.zeros_like(images)
        for draw in range(self.draws):
            opposite = draw % 2 == 1
            eps = -eps if opposite else noise_by_seed(self.noise, images, [derive_seed(s, draw // 2) for s in seeds])
            x_t = self.denoiser.schedule.add_noise(images, eps, self.times[0])
            mean += sample(Clipped(self.denoiser), DDIM(), x_t, self.times) / self.draws
        return mean

    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        healthy = self.healthy(images, seeds)
        return Detection(residual(images, healthy, self.residual), healthy)

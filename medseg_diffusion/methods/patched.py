"""Anomaly detection by restoring patches from their surroundings: pDDPM (Behrendt et al. 2023, arXiv 2303.03758).

Each patch of a grid is noised and restored by a single network call. The network sees the rest of the image without
noise. The difference between the image and its restored patches is the anomaly map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Clipped, Denoiser
from medseg_diffusion.diffusion.noise import NoiseSource, derive_seed
from medseg_diffusion.tasks.patched import boxes, inside

from .detector import Detection, Detector, Residual, noise_by_seed, residual


class Patched(Detector):
    """The detector.

    Args:
        denoiser: denoiser of `medseg_diffusion.tasks.patched.PatchedDiffusion`. Its predictions are clipped to [-1, 1].
        noise: the noise of the training.
        size: spatial size (*S) of the images.
        time: time to which a patch is noised, 1..T (published: 500).
        patch: side of the patches, as in training; None for half of each side. If the last patches of the grid overlap
            those before them, the last ones are used.
        draws: number of draws of noise, whose restored images are averaged (published: 1).
        residual: see `methods.detector.residual`.

    Raises:
        ValueError: a time beyond the schedule, no draw, a patch that does not fit the images, or images of another
            size.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        size: Sequence[int],
        time: int = 500,
        patch: int | None = None,
        draws: int = 1,
        residual: Residual = "absolute",
    ) -> None:
        last = denoiser.schedule.num_steps
        if not 1 <= time <= last:
            raise ValueError(f"the time must lie in 1..{last}, got {time}")
        if draws < 1:
            raise ValueError(f"at least one draw of noise is needed, got {draws}")
        self.denoiser, self.noise, self.residual = denoiser, noise, residual
        self.size, self.time, self.draws = tuple(size), time, draws
        self.boxes = boxes(size, patch)

    @property
    def evaluations(self) -> int:
        """Denoiser calls per image: one for each patch and draw. With half sides there are 4 patches in 2D, 8 in 3D."""
        return self.draws * len(self.boxes)

    @torch.no_grad()
    def healthy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The images (B, C, *S) assembled from their restored patches. All patches of a draw are one batch.

        Each draw has one noise image, from which every patch takes its part.
        """
        if images.shape[2:] != self.size:
            raise ValueError(f"made for images of {self.size}, got {tuple(images.shape[2:])}")
        in_patch = inside(self.boxes, images)[:, None]
        t = torch.full((len(self.boxes) * len(images),), self.time, device=images.device)
        mean = torch.zeros_like(images)
        for draw in range(self.draws):
            eps = noise_by_seed(self.noise, images, [derive_seed(seed, draw) for seed in seeds])
            noised = self.denoiser.schedule.add_noise(images, eps, self.time)
            inputs = torch.where(in_patch, noised, images)  # (patches, B, C, *S)
            restored = Clipped(self.denoiser)(inputs.flatten(0, 1), t).x0.unflatten(0, inputs.shape[:2])
            whole = torch.empty_like(images)
            for box, x0 in zip(self.boxes, restored, strict=True):
                patch = (slice(None), slice(None), *box)
                whole[patch] = x0[patch]
            mean += whole / self.draws
        return mean

    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        healthy = self.healthy(images, seeds)
        return Detection(residual(images, healthy, self.residual), healthy)

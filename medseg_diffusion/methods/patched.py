"""Anomalies as what patches, restored from their healthy-looking surroundings, do not show (Behrendt et al. 2023).

(pDDPM, arXiv 2303.03758.) Each patch of a grid is noised and restored by a single call of the network, which sees the
rest of the image as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Clipped, Denoiser
from medseg_diffusion.diffusion.noise import NoiseSource, derive_seed, generators
from medseg_diffusion.tasks.patched import boxes, inside

from .detector import Residual, residual


class Patched:
    """The detector.

    Args:
        denoiser: of `medseg_diffusion.tasks.patched.PatchedDiffusion`; its predictions are clipped to [-1, 1].
        noise: that of the training.
        size: spatial size (*S) of the images.
        time: to which a patch is noised, 1..T (published: 500).
        patch: that of the training, None for half of each side. Where the last patch of the grid overlaps the one
            before it, the last one is shown.
        draws: of noise, the mean of whose restored images is compared (published: 1).
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
        """One for each patch and draw: patches of half a side are 4 in 2D and 8 in 3D."""
        return self.draws * len(self.boxes)

    @torch.no_grad()
    def healthy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The images (B, C, *S) put together from restored patches; all patches of a draw are restored in one batch.

        A draw has one noise for the whole image, of which each patch shows its part.
        """
        if images.shape[2:] != self.size:
            raise ValueError(f"made for images of {self.size}, got {tuple(images.shape[2:])}")
        shown = inside(self.boxes, images)[:, None]
        t = torch.full((len(self.boxes) * len(images),), self.time, device=images.device)
        found = torch.zeros_like(images)
        for draw in range(self.draws):
            eps = self.noise(images.shape[1:], generators([derive_seed(seed, draw) for seed in seeds]), images)
            noised = self.denoiser.schedule.add_noise(images, eps, self.time)
            seen = torch.where(shown, noised, images)  # (patches, B, C, *S)
            restored = Clipped(self.denoiser)(seen.flatten(0, 1), t).x0.unflatten(0, seen.shape[:2])
            whole = torch.empty_like(images)
            for box, x0 in zip(self.boxes, restored, strict=True):
                place = (slice(None), slice(None), *box)
                whole[place] = x0[place]
            found += whole / self.draws
        return found

    def score(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return residual(images, self.healthy(images, seeds), self.residual)

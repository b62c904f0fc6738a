"""Anomalies as what would be different if the image were healthy: encoded without guidance, decoded towards "healthy".

The image is walked up to some time by deterministic steps (inverted DDIM) and down again with guidance. Nothing is
random: what guidance leaves alone comes back, up to the error of finite steps, which shrinks as they become more and is
larger the less likely the image is.

Both ways visit one list of times, whose last is 1: a model knows no noise at time 0, so the image is taken for x_1.
Predictions are not clipped, for that could not be inverted; only the result is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Condition, Denoiser
from medseg_diffusion.diffusion.guidance import Classifier, ClassifierFreeGuided, ClassifierGradient, ClassifierGuided
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import sample, spread

from .detector import Residual, residual


class ClassifierCounterfactual:
    """Guided by the gradient of a classifier (Wolleb et al. 2022, arXiv 2203.04306).

    Published are all times up to ``start`` instead of some of them.

    Args:
        denoiser: of images, trained on healthy and other ones.
        classifier: of noisy images, trained with the denoiser's schedule.
        healthy_class: its class of healthy images.
        start: time up to which images are encoded, 2..T (published: 500).
        steps: of the way up, and as many down.
        scale: of the gradient; 0 gives back the image (published: 100).
        residual: see `methods.detector.residual`.

    Raises:
        ValueError: a start beyond the schedule, no step or more than there are times below the start.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Classifier,
        healthy_class: int = 0,
        start: int = 500,
        steps: int = 50,
        scale: float = 100.0,
        residual: Residual = "absolute",
    ) -> None:
        self.residual: Residual = residual
        self.denoiser, self.classifier = denoiser, classifier
        self.healthy_class, self.scale = healthy_class, scale
        self.times = _times(denoiser, steps, start)

    @property
    def evaluations(self) -> int:
        """Calls of the denoiser; half as many of the classifier, with its gradient, are not counted."""
        return 2 * (len(self.times) - 1)

    @torch.no_grad()
    def healthy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The healthy images (B, C, *S) in [-1, 1] of images (B, C, *S); the seeds change nothing."""
        labels = torch.full((len(images),), self.healthy_class, device=images.device)
        guided = ClassifierGuided(self.denoiser, ClassifierGradient(self.classifier, labels, self.scale))
        noise = sample(self.denoiser, DDIM(), images, self.times[::-1])
        return sample(guided, DDIM(), noise, self.times).clamp(-1, 1)

    def score(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return residual(images, self.healthy(images, seeds), self.residual)


class FreeCounterfactual:
    """Guided by the difference that the class makes to the model itself (Sanchez et al. 2022, arXiv 2207.12268).

    MONAI's tutorial of it walks up a quarter of T, and down with a strength of 3.

    Args:
        denoiser: of images, conditioned by their class, which was dropped now and then.
        condition: of healthy images, each entry (1, ...).
        null: what stands for "no class", by the same names
            (`medseg_diffusion.diffusion.guidance.ClassifierFreeGuided`). Images are encoded with it.
        start: time up to which images are encoded, 2..T.
        steps: of the way up, and as many down.
        guidance: strength; 0 gives back the image, 1 decodes with the condition alone.
        residual: see `methods.detector.residual`.

    Raises:
        ValueError: a start beyond the schedule, no step or more than there are times below the start.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        null: Condition,
        start: int = 500,
        steps: int = 50,
        guidance: float = 3.0,
        residual: Residual = "absolute",
    ) -> None:
        self.residual: Residual = residual
        self.denoiser, self.condition, self.null = denoiser, condition, null
        self.guidance = guidance
        self.times = _times(denoiser, steps, start)

    @property
    def evaluations(self) -> int:
        """A guided step is two calls for each image, batched into one; with strength 1 it is one."""
        return (2 if self.guidance == 1 else 3) * (len(self.times) - 1)

    @torch.no_grad()
    def healthy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The healthy images (B, C, *S) in [-1, 1] of images (B, C, *S); the seeds change nothing."""
        null, condition = (_expanded(cond, images) for cond in (self.null, self.condition))
        noise = sample(self.denoiser, DDIM(), images, self.times[::-1], null)
        guided = ClassifierFreeGuided(self.denoiser, self.null, self.guidance)
        return sample(guided, DDIM(), noise, self.times, condition).clamp(-1, 1)

    def score(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return residual(images, self.healthy(images, seeds), self.residual)


def _times(denoiser: Denoiser, steps: int, start: int) -> list[int]:
    last = denoiser.schedule.num_steps
    if not 1 <= steps < start <= last:
        raise ValueError(f"needs 1 <= steps < start <= {last}, got {steps} steps up to {start}")
    return spread(denoiser.schedule, steps + 1, start)


def _expanded(cond: Condition, images: Tensor) -> Condition:
    """Entries (1, ...) as (B, ...) on the images' device."""
    return {name: value.to(images.device).expand(len(images), *value.shape[1:]) for name, value in cond.items()}

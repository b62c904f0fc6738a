"""Anomaly detection by counterfactuals: the difference between an image and the same image if it were healthy.

Deterministic steps (inverted DDIM) encode the image up to some time without guidance. Guided steps towards "healthy"
decode it again. Nothing is random: without guidance the image is restored, up to the error of finite steps. This error
becomes smaller with more steps, and is larger for less likely images.

Encoding and decoding visit the same times, of which the last is 1. A model predicts no noise at time 0, so the image is
used as x_1. Predictions are not clipped, because clipping cannot be inverted. Only the result is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Condition, Denoiser
from medseg_diffusion.diffusion.guidance import Classifier, ClassifierFreeGuided, ClassifierGradient, ClassifierGuided
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import sample, spread

from .detector import Detection, Detector, Residual, residual


class ClassifierCounterfactual(Detector):
    """A counterfactual guided by the gradient of a classifier (Wolleb et al. 2022, arXiv 2203.04306).

    The published method visits every time up to ``start``.

    Args:
        denoiser: denoiser of images, trained on healthy and unhealthy images.
        classifier: classifier of noisy images, trained with the denoiser's schedule.
        healthy_class: the classifier's class of healthy images.
        start: time up to which images are encoded, 2..T (published: 500).
        steps: number of encoding steps, and of decoding steps.
        scale: factor on the gradient; 0 restores the image (published: 100).
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
        """Denoiser calls per image. The classifier's calls, half as many and with gradients, are not counted."""
        return 2 * (len(self.times) - 1)

    @torch.no_grad()
    def healthy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The healthy images (B, C, *S) in [-1, 1] of images (B, C, *S); the seeds change nothing."""
        labels = torch.full((len(images),), self.healthy_class, device=images.device)
        guided = ClassifierGuided(self.denoiser, ClassifierGradient(self.classifier, labels, self.scale))
        noise = sample(self.denoiser, DDIM(), images, self.times[::-1])
        return sample(guided, DDIM(), noise, self.times).clamp(-1, 1)

    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        healthy = self.healthy(images, seeds)
        return Detection(residual(images, healthy, self.residual), healthy)


class FreeCounterfactual(Detector):
    """A counterfactual by classifier-free guidance (Sanchez et al. 2022, arXiv 2207.12268).

    MONAI's tutorial of the method encodes up to T / 4 and decodes with a strength of 3.

    Args:
        denoiser: denoiser of images, conditioned by their class, which was dropped at random in training.
        condition: condition of healthy images, each entry (1, ...).
        null: condition for "no class", with the same entries
            (`medseg_diffusion.diffusion.guidance.ClassifierFreeGuided`). Images are encoded with it.
        start: time up to which images are encoded, 2..T.
        steps: number of encoding steps, and of decoding steps.
        guidance: strength; 0 restores the image, 1 decodes with the condition alone.
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
        """Denoiser calls per image. A guided step counts as two, which share a batch; with strength 1, as one."""
        return (2 if self.guidance == 1 else 3) * (len(self.times) - 1)

    @torch.no_grad()
    def healthy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The healthy images (B, C, *S) in [-1, 1] of images (B, C, *S); the seeds change nothing."""
        null, condition = (_expanded(cond, images) for cond in (self.null, self.condition))
        noise = sample(self.denoiser, DDIM(), images, self.times[::-1], null)
        guided = ClassifierFreeGuided(self.denoiser, self.null, self.guidance)
        return sample(guided, DDIM(), noise, self.times, condition).clamp(-1, 1)

    def detect(self, images: Tensor, seeds: Sequence[int]) -> Detection:
        healthy = self.healthy(images, seeds)
        return Detection(residual(images, healthy, self.residual), healthy)


def _times(denoiser: Denoiser, steps: int, start: int) -> list[int]:
    last = denoiser.schedule.num_steps
    if not 1 <= steps < start <= last:
        raise ValueError(f"needs 1 <= steps < start <= {last}, got {steps} steps up to {start}")
    return spread(denoiser.schedule, steps + 1, start)


def _expanded(cond: Condition, images: Tensor) -> Condition:
    """Entries (1, ...) as (B, ...) on the images' device."""
    return {name: value.to(images.device).expand(len(images), *value.shape[1:]) for name, value in cond.items()}

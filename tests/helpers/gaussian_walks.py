"""Gaussian data, for which every walk of a detector is an affine map in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Denoiser, GaussianDenoiser
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule
from tests.helpers.diffusion import LINEAR

MEAN, STD = 0.1, 0.2
HEALTHY, LESION = -0.4, 0.4
"""Means of two classes, both of standard deviation `STD`."""
SHAPES = [(1, 6, 8), (2, 4, 6, 4)]
NORMAL = GaussianDenoiser(LINEAR, MEAN, STD)
LABEL, NULL = {"label": torch.tensor([0])}, {"label": torch.tensor([2])}


def no_noise(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
    return torch.zeros((len(generators), *shape)).to(like)


class Spy:
    """Notes the inputs of a denoiser."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.inputs: list[Tensor] = []
        self.times: list[int] = []

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
        assert 1 <= int(t.min()) == int(t.max()) <= self.schedule.num_steps
        self.inputs.append(x_t.clone())
        self.times.append(int(t[0]))
        return self.denoiser(x_t, t, cond)


class Classes:
    """The exact denoiser of healthy images (label 0), of lesions (1) and of Gaussian data between them (2)."""

    schedule = LINEAR
    means = torch.tensor([HEALTHY, LESION, MEAN], dtype=torch.float64)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
        assert cond is not None
        mean = self.means[cond["label"]].reshape(-1, *[1] * (x_t.ndim - 1))
        return GaussianDenoiser(LINEAR, mean, STD)(x_t, t)


def classifier(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """log p(x_t | class) of the two classes, up to a constant: the difference of the logits is linear in x_t."""
    alpha, sigma = LINEAR.scales(timesteps + 1, x_t)
    variance = (alpha * STD) ** 2 + sigma**2
    return torch.stack([-((x_t - alpha * m) ** 2 / (2 * variance)).flatten(1).sum(1) for m in (HEALTHY, LESION)], dim=1)


def walked(times: Sequence[int], mean: float, std: float) -> tuple[float, float]:
    """Slope and offset of deterministic DDIM steps over ``times`` with the exact denoiser of N(mean, std^2)."""
    slope, offset = 1.0, 0.0
    for t, s in pairwise(times):
        ab_t, ab_s = float(LINEAR.alpha_bar[t]), float(LINEAR.alpha_bar[s])
        total = ab_t * std**2 + 1 - ab_t
        a = (math.sqrt(ab_s * ab_t) * std**2 + math.sqrt((1 - ab_s) * (1 - ab_t))) / total
        b = mean * (math.sqrt(ab_s) * (1 - ab_t) - math.sqrt((1 - ab_s) * (1 - ab_t) * ab_t)) / total
        slope, offset = a * slope, a * offset + b
    return slope, offset


def kept_share(start: int, std: float) -> float:
    """What a walk of infinitely many steps from ``start`` keeps of the distance to the mean, without any noise."""
    ab = float(LINEAR.alpha_bar[start])
    return std * math.sqrt(ab) / math.sqrt(ab * std**2 + 1 - ab)

"""Every Gaussian sampler with the exact denoiser of two masks, against the shares that it must give.

16 pixels, two masks that differ in 8, with chances of 0.3 and 0.7. The denoiser is the posterior mean over the two. Few
steps favour the likelier mask, and one step always returns it; how much is known for every number of steps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule, cosine, rectified_flow
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.heun import Heun
from medseg_diffusion.sampling.loop import Sampler, sample, spaced

CHANCE, SAMPLES, STEPS = 0.3, 8000, (1, 5, 10, 20, 50)
MASKS = -torch.ones(2, 16)
MASKS[0, :4], MASKS[1, 8:12] = 1, 1
# Shares of the first mask after 1, 5, 10, 20 and 50 steps that are uniform in log-SNR, T = 1000.
ORACLE: list[tuple[Sampler, float, list[float]]] = [
    (DPMSolver(), 1.0, [0.0, 0.206, 0.288, 0.298, 0.299]),
    (DPMSolver(), 0.05, [0.0, 0.243, 0.288, 0.298, 0.299]),
    (DDIM(), 1.0, [0.0, 0.190, 0.267, 0.286, 0.294]),
    (DDPM(), 1.0, [0.0, 0.133, 0.241, 0.258, 0.287]),
]
# The same with rectified flow and steps of equal lengths. Heun's steps are two evaluations, and its order shows.
STRAIGHT: list[tuple[Sampler, list[float]]] = [
    (DDIM(), [0.0, 0.252, 0.278, 0.289, 0.295]),
    (Heun(), [0.0, 0.285, 0.296, 0.298, 0.299]),
    (DPMSolver(), [0.0, 0.255, 0.285, 0.295, 0.298]),
    (DDPM(), [0.0, 0.235, 0.269, 0.284, 0.293]),
]


class TwoMasks:
    """The exact denoiser E[x0 | x_t], (B, 1, 16), of two masks with values -scale and scale."""

    def __init__(self, scale: float, schedule: NoiseSchedule | None = None) -> None:
        self.schedule = schedule or cosine(1000)
        self.masks = scale * MASKS

    def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
        alpha, sigma = self.schedule.scales(t, x_t)
        distances = (x_t - alpha * self.masks).square().sum(2) / (2 * sigma[:, 0] ** 2)
        posterior = (torch.tensor([CHANCE, 1 - CHANCE]).log() - distances).softmax(1)
        x0 = (posterior @ self.masks)[:, None]
        return Prediction(x0, (x_t - alpha * x0) / sigma)


@pytest.mark.filterwarnings("ignore:50 steps asked for")
@pytest.mark.parametrize("column", range(5), ids=["1", "5", "10", "20", "50"])
@pytest.mark.parametrize(("sampler", "scale", "shares"), ORACLE, ids=["dpm++", "dpm++-0.05", "ddim", "ddpm"])
def test_the_shares_of_two_masks(sampler: Sampler, scale: float, shares: list[float], column: int) -> None:
    denoiser = TwoMasks(scale)
    assert share(denoiser, sampler, spaced(denoiser.schedule, STEPS[column])) == pytest.approx(shares[column], abs=0.02)


@pytest.mark.parametrize("column", range(5), ids=["1", "5", "10", "20", "50"])
@pytest.mark.parametrize(("sampler", "shares"), STRAIGHT, ids=["euler", "heun", "dpm++", "ddpm"])
def test_the_shares_of_two_masks_under_rectified_flow(sampler: Sampler, shares: list[float], column: int) -> None:
    denoiser = TwoMasks(1.0, rectified_flow(1000))
    times = spaced(denoiser.schedule, STEPS[column], "trailing")
    assert share(denoiser, sampler, times) == pytest.approx(shares[column], abs=0.02)


def share(denoiser: TwoMasks, sampler: Sampler, times: list[int]) -> float:
    """The share of the first mask; nearly every sample is one of the two."""
    own = generators(range(SAMPLES))
    marked = sample(denoiser, sampler, gaussian((1, 16), own), times, generators=own)[:, 0] > 0
    first, second = ((marked == (mask > 0)).all(1).float().mean() for mask in MASKS)
    assert float(first + second) > 0.99
    return float(first)

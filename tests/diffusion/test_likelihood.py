"""The variational bound is the sum of its closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from medseg_diffusion.diffusion.denoiser import GaussianDenoiser
from medseg_diffusion.diffusion.likelihood import kl_maps, variational_bound
from medseg_diffusion.diffusion.noise import generators
from medseg_diffusion.diffusion.posterior import posterior
from medseg_diffusion.diffusion.schedule import cosine, rectified_flow
from tests.helpers.diffusion import FLOW, LINEAR, levels, normal


@pytest.mark.parametrize("spatial", [(60, 60), (15, 16, 15)], ids=["2D", "3D"])
@pytest.mark.parametrize("t", [2, 100, 600, 1000])
def test_the_divergence_of_the_exact_denoiser_is_the_closed_form(t, spatial) -> None:
    """E KL = c^2 Var(x0 | x_t) / (2 posterior variance), c the weight of x0 in the posterior's mean."""
    std = 0.4
    x0 = 0.3 + std * normal(16, 2, 1, *spatial)
    maps = kl_maps(GaussianDenoiser(LINEAR, 0.3, std), x0, generators([1, 2]), [t])
    ab, before = LINEAR.alpha_bar[t], LINEAR.alpha_bar[t - 1]
    beta = 1 - ab / before
    c = before.sqrt() * beta / (1 - ab)
    left = std**2 * (1 - ab) / (ab * std**2 + 1 - ab)
    expected = c**2 * left / (2 * beta * (1 - before) / (1 - ab))
    assert maps.shape == (2, 1, *spatial)
    assert float(maps.mean()) == pytest.approx(float(expected), rel=0.06)


@pytest.mark.parametrize("schedule", [cosine(50), rectified_flow(50)], ids=["cosine", "rectified-flow"])
@pytest.mark.parametrize("walk", [list(range(50, -1, -1)), [50, 30, 29, 11, 3, 0]], ids=["all times", "some"])
def test_the_whole_bound_is_the_sum_of_closed_forms(walk, schedule) -> None:
    """Also where x_T is noise alone: the prior's term is then 0."""
    std = 0.5
    x0 = std * normal(17, 3, 2, 40, 40)
    denoiser = GaussianDenoiser(schedule, 0.0, std)
    found = variational_bound(denoiser, x0, generators([1, 2, 3]), "continuous", times=walk)
    ab = schedule.alpha_bar
    expected = 0.0
    for t, s in pairwise(walk[:-1]):
        beta = 1 - ab[t] / ab[s]
        c = ab[s].sqrt() * beta / (1 - ab[t])
        left = std**2 * (1 - ab[t]) / (ab[t] * std**2 + 1 - ab[t])
        expected += float(c**2 * left / (2 * beta * (1 - ab[s]) / (1 - ab[t])))
    assert found.unit == "nats/position without decoder term" and found.decoder is None
    assert found.kl.shape == (3, len(walk) - 2) and found.times == walk[:-2]
    assert float(found.kl.sum(1).mean()) == pytest.approx(2 * expected, rel=0.05), "two channels a position"
    prior = 0.5 * (ab[-1] * std**2 - ab[-1] - (1 - ab[-1]).log())
    assert float(found.prior.mean()) == pytest.approx(2 * float(prior), abs=1e-4)
    torch.testing.assert_close(found.total, found.prior + found.kl.sum(1))


def test_a_model_that_knows_the_image_pays_for_the_width_of_its_last_step_alone() -> None:
    grey = torch.full((1, 1, 8, 8), 100 / 127.5 - 1, dtype=torch.float64)
    found = variational_bound(GaussianDenoiser(LINEAR, float(grey[0, 0, 0, 0]), 1e-5), grey, generators([0]), "8-bit")
    assert found.unit == "bits/dim" and found.decoder is not None
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    std = float(posterior(LINEAR, x, x, 2, 1).variance) ** 0.5
    price = -math.log2(2 * stats.norm.cdf(1 / 255 / std) - 1)
    assert float(found.total) == pytest.approx(price, abs=1e-3)


def test_no_model_has_less_than_eight_bits_on_uniform_levels() -> None:
    noise = levels(18, 2, 1, 24, 24)
    spread = math.sqrt(1 / 3)  # of a uniform distribution over [-1, 1]
    total = variational_bound(GaussianDenoiser(LINEAR, 0.0, spread), noise, generators([0, 1]), "8-bit").total
    # A Gaussian of the right variance is 0.25 bits worse than the truth, the fixed variances cost another bit.
    assert bool((total > 8.2).all()) and bool((total < 9.6).all())


def test_maps_and_bits_exist_up_to_pure_noise() -> None:
    """No term may divide by alpha_bar[T] = 0. Even steps in u are few near the clean image, which costs some bits."""
    x0 = levels(19, 2, 1, 12, 12)
    denoiser = GaussianDenoiser(FLOW, 0.0, math.sqrt(1 / 3))
    maps = kl_maps(denoiser, x0, generators([0, 1]), [1000, 999, 2])
    assert bool(maps.isfinite().all()) and bool((maps >= 0).all())
    found = variational_bound(denoiser, x0, generators([0, 1]), "8-bit")
    assert bool((found.total > 8.2).all()) and bool((found.total < 12).all())
    assert float(found.prior.abs().max()) == 0


@pytest.mark.parametrize("value", [0.123, 1.5])
def test_bits_of_what_is_not_eight_bit_are_refused(value) -> None:
    x0 = torch.full((1, 1, 4, 4), value)
    with pytest.raises(ValueError, match='data="continuous"'):
        variational_bound(GaussianDenoiser(LINEAR), x0, generators([0]), "8-bit")


def test_a_term_does_not_depend_on_the_batch() -> None:
    x0, denoiser = normal(20, 3, 2, 6, 5, 4), GaussianDenoiser(LINEAR, 0.1, 0.3)
    together = kl_maps(denoiser, x0, generators([5, 6, 7]), [600, 500, 400], batch_size=4)
    alone = kl_maps(denoiser, x0[1:2], generators([6]), [600, 500, 400], batch_size=1)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0)
    assert bool((together >= 0).all())


@pytest.mark.parametrize("times", [[], [1], [1001]])
def test_maps_of_impossible_times_are_refused(times) -> None:
    with pytest.raises(ValueError, match=r"2\.\.1000"):
        kl_maps(GaussianDenoiser(LINEAR), normal(0, 1, 1, 2, 2), generators([0]), times)


@pytest.mark.parametrize("times", [[1000, 0], [900, 500, 0], [1000, 500], [1000, 500, 600, 0]])
def test_a_walk_that_is_none_is_refused(times) -> None:
    with pytest.raises(ValueError, match="times must decrease from 1000 to 0"):
        variational_bound(GaussianDenoiser(LINEAR), normal(0, 1, 1, 2, 2), generators([0]), "continuous", times=times)

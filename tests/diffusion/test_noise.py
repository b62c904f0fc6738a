"""Draws of the forward process: times and noise from the examples' own seeds, and what they make of the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.noise import NoiseSource, draw_noised, gaussian, generators, uniform_times
from medseg_diffusion.diffusion.schedule import cosine
from medseg_diffusion.diffusion.simplex import simplex

SCHEDULE = cosine(200)
SEEDS = [11, 5, 8]


def clean(*spatial: int) -> Tensor:
    return torch.randn(3, 2, *spatial, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spatial", [(5, 6), (4, 3, 5)], ids=["2D", "3D"])
@pytest.mark.parametrize("source", [gaussian, simplex])
def test_the_noised_tensor_is_the_weighted_sum_of_data_and_noise(source: NoiseSource, spatial) -> None:
    x0 = clean(*spatial)
    noised = draw_noised(SCHEDULE, x0, generators(SEEDS), source)
    assert torch.equal(noised.x0, x0)
    for i, t in enumerate(noised.t.tolist()):
        alpha_bar = float(SCHEDULE.alpha_bar[t])
        expected = alpha_bar**0.5 * x0[i] + (1 - alpha_bar) ** 0.5 * noised.eps[i]
        torch.testing.assert_close(noised.x_t[i], expected)


def test_the_time_is_drawn_before_the_noise() -> None:
    """The order is part of what a seed means: another one would change every training."""
    noised = draw_noised(SCHEDULE, clean(5, 6), generators(SEEDS))
    for i, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        assert int(noised.t[i]) == int(torch.randint(1, 201, (), generator=generator))
        assert torch.equal(noised.eps[i], torch.randn(2, 5, 6, dtype=torch.float64, generator=generator))


def test_an_element_has_the_same_draws_in_any_batch() -> None:
    x0 = clean(5, 6)
    together = draw_noised(SCHEDULE, x0, generators(SEEDS))
    alone = draw_noised(SCHEDULE, x0[2:], generators(SEEDS[2:]))
    for name in ("x0", "eps", "t", "x_t"):
        assert torch.equal(getattr(together, name)[2:], getattr(alone, name)), name


def test_times_that_are_drawn_already_are_kept() -> None:
    own = generators(SEEDS)
    t = uniform_times(SCHEDULE.num_steps, own)
    given = draw_noised(SCHEDULE, clean(5, 6), own, t=t)
    drawn = draw_noised(SCHEDULE, clean(5, 6), generators(SEEDS))
    assert torch.equal(given.t, t)
    assert torch.equal(given.x_t, drawn.x_t)

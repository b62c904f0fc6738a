"""Noise and times from the examples' own seeds, and what they make of the data."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.noise import (
    LogitNormalTimes,
    NoiseSource,
    derive_seed,
    draw_noised,
    gaussian,
    generators,
    uniform_times,
)
from medseg_diffusion.diffusion.schedule import cosine, rectified_flow
from medseg_diffusion.diffusion.simplex import simplex


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    assert derive_seed(0, "case", 1) == derive_seed(0, "case", 1)
    parts: list[tuple[int | str, ...]] = [
        (0, "case", 1),
        (1, "case", 1),
        (0, "case", 2),
        (0, "case1"),
        (0, "case", "1"),
        ("0", "case", 1),
    ]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derive_seed(*p) < 2**63 for p in parts)
    # The value is a contract: another one would change every result that was ever published with a seed.
    text = "int:0\x1fstr:case\x1fint:1"
    assert derive_seed(0, "case", 1) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


def test_noise_is_standard_normal_and_belongs_to_its_element() -> None:
    noise = gaussian((3, 100, 100), generators([5, 6]))
    assert noise.shape == (2, 3, 100, 100) and noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(gaussian((3, 100, 100), generators([6]))[0], noise[1])
    assert gaussian((2, 2), generators([0]), like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


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


def test_training_times_cover_all_noise_levels_evenly_and_depend_on_their_own_seed() -> None:
    own = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    t = uniform_times(10, own)
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=11)
    assert counts[0] == 0
    assert counts[1:].min() > 300 and counts[1:].max() < 500  # 400 expected, 5 standard deviations are 95
    again = uniform_times(10, [torch.Generator().manual_seed(seed) for seed in (7, 3)])
    assert again.tolist() == [int(t[7]), int(t[3])]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.5), (1.0, 2.0)])
def test_logit_normal_times_are_a_sigmoid_of_normal_numbers(mean, std) -> None:
    """Esser et al. 2024: u = sigmoid(N(mean, std^2)); t is the first time whose u is not below it."""
    t = LogitNormalTimes(rectified_flow(1000), mean, std)(generators(range(20000)))
    assert t.dtype == torch.int64 and int(t.min()) >= 1 and int(t.max()) <= 1000
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    quantiles = torch.quantile(t.double() / 1000, levels)
    expected = (mean + std * torch.special.ndtri(levels)).sigmoid()
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.02)


def test_logit_normal_times_are_log_normal_noise_levels_on_any_schedule() -> None:
    """Karras et al. 2022: log(sigma / alpha) ~ N(mean, std^2), here with their mean of -1.2 and their spread of 1.2."""
    t = LogitNormalTimes(SCHEDULE, -1.2, 1.2)(generators(range(20000)))
    level = -SCHEDULE.half_log_snr()[t]
    assert float(level.mean()) == pytest.approx(-1.2, abs=0.05) and float(level.std()) == pytest.approx(1.2, abs=0.05)


def test_logit_normal_times_stay_within_their_bounds_in_proportion() -> None:
    schedule = rectified_flow(10)
    within = torch.bincount(LogitNormalTimes(schedule, 0.0, 1.0, 3, 5)(generators(range(8000))), minlength=11)
    assert int(within[3:6].sum()) == 8000
    logits = [-float(schedule.half_log_snr()[t]) for t in (2, 3, 4, 5)]
    below = torch.special.ndtr(torch.tensor(logits, dtype=torch.float64))
    expected = below.diff() / (below[-1] - below[0])
    torch.testing.assert_close(within[3:6] / 8000, expected.float(), rtol=0, atol=0.03)


def test_a_logit_normal_time_belongs_to_its_own_seed_and_comes_before_the_noise() -> None:
    times, own = LogitNormalTimes(SCHEDULE), generators(SEEDS)
    t = times(own)
    assert times(generators([5])).tolist() == [int(t[1])]
    noise = gaussian((3, 3), own)
    for i, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        torch.rand((), generator=generator, dtype=torch.float64)
        assert torch.equal(noise[i], torch.randn(3, 3, generator=generator))


def test_times_that_can_hardly_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        LogitNormalTimes(SCHEDULE, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"mean 10 and standard deviation 0\.1 miss the times 1 to 20, where log"):
        LogitNormalTimes(SCHEDULE, 10.0, 0.1, 1, 20)

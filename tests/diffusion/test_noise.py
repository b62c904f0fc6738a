"""Noise and times from the examples' own seeds, and what they make of the data."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.noise import (
    NoiseSource,
    derive_seed,
    draw_noised,
    gaussian,
    generators,
    uniform_times,
)
from medseg_diffusion.diffusion.schedule import cosine
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

"""Partial noise against the closed form of its walk on Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.noise import gaussian
from medseg_diffusion.methods.partial_noise import PartialNoise
from tests.helpers.diffusion import LINEAR, normal
from tests.helpers.gaussian_walks import MEAN, NORMAL, STD, kept_share, no_noise, walked


@pytest.mark.parametrize("start", [100, 250, 500])
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 2, 2, 2)])
def test_an_outlier_comes_back_by_the_product_of_the_affine_steps(start, shape) -> None:
    x = (MEAN + 0.6 * normal(1, 4, *shape)).clamp(-1, 1)
    detector = PartialNoise(NORMAL, no_noise, start)
    assert detector.times[0] == start and detector.times[-2:] == [1, 0] and len(detector.times) == 26
    slope, offset = walked(detector.times, MEAN, STD)
    expected = slope * math.sqrt(float(LINEAR.alpha_bar[start])) * x + offset
    torch.testing.assert_close(detector.healthy(x, range(4)), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(detector.score(x, range(4)), (x - expected).abs(), rtol=0, atol=1e-9)


def test_less_of_an_outlier_is_kept_the_later_the_start_and_what_is_kept_nears_the_exact_share() -> None:
    x, kept = torch.tensor([MEAN, MEAN + 0.8], dtype=torch.float64).reshape(2, 1, 1, 1), []
    for start in (100, 250, 500):
        errors = []
        for steps in (10, 25, 100):
            mean, outlier = PartialNoise(NORMAL, no_noise, start, steps).healthy(x, [0, 0]).flatten().tolist()
            assert mean == pytest.approx(MEAN, abs=1e-9), "what is as expected stays"
            kept.append((outlier - MEAN) / 0.8)
            errors.append(abs(kept[-1] / kept_share(start, STD) - 1))
        assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert kept[2] > kept[5] > kept[8] > 0


def test_the_expected_healthy_image_is_that_without_noise() -> None:
    """Noise is added with the standard deviation of its time: the spread around the mean follows from the slope."""
    count, value = 4000, MEAN + 0.4
    found = PartialNoise(NORMAL, gaussian).healthy(torch.full((count, 1, 1, 1), value).double(), range(count))
    slope, offset = walked(PartialNoise(NORMAL, gaussian).times, MEAN, STD)
    ab = float(LINEAR.alpha_bar[250])
    std = slope * math.sqrt(1 - ab)
    assert float(found.mean()) == pytest.approx(slope * math.sqrt(ab) * value + offset, abs=5 * std / math.sqrt(count))
    assert float(found.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * count))


def test_every_second_draw_is_the_opposite_of_the_one_before() -> None:
    """In an affine walk a pair of draws cancels, and of three draws one is left, with a third of its effect."""
    x = MEAN + 0.1 * normal(2, 3, 1, 2, 2)
    without = PartialNoise(NORMAL, no_noise).healthy(x, range(3))
    one, two, three = (PartialNoise(NORMAL, gaussian, draws=n).healthy(x, range(3)) for n in (1, 2, 3))
    torch.testing.assert_close(two, without)
    assert float((one - without).abs().min()) > 0
    assert not torch.allclose(3 * (three - without), one - without), "the third draw has noise of its own"
    wide = MEAN + torch.zeros(500, 1, 1, 1).double()
    spread = [float(PartialNoise(NORMAL, gaussian, draws=n).healthy(wide, range(500)).std()) for n in (1, 3)]
    assert spread[0] / spread[1] == pytest.approx(3, abs=0.4)


def test_images_with_one_seed_share_their_noise() -> None:
    drawn = []

    def counting(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
        drawn.append(len(generators))
        return gaussian(shape, generators, like)

    x = torch.full((4, 1, 3, 3), MEAN).double()
    healthy = PartialNoise(NORMAL, counting, draws=3).healthy(x, [5, 6, 5, 5])
    assert drawn == [2, 2], "one field for each seed and pair of draws"
    assert torch.equal(healthy[0], healthy[2]) and torch.equal(healthy[0], healthy[3])
    assert not torch.allclose(healthy[0], healthy[1])

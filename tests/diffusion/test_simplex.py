"""Simplex noise: against a scalar computation, and what AnoDDPM needs of it."""

from __future__ import annotations

import math

import pytest
import torch

from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.simplex import simplex


def scalar(lattice: list[int], x: float, y: float, z: float) -> float:
    """One octave at one point, written from the definition without any vectorisation."""
    edges = [(a, b, 0) for a in (1, -1) for b in (1, -1)]
    edges += [(a, 0, b) for a in (1, -1) for b in (1, -1)] + [(0, a, b) for a in (1, -1) for b in (1, -1)]
    skew = (x + y + z) / 3
    cell = [math.floor(value + skew) for value in (x, y, z)]
    unskew = sum(cell) / 6
    inside = [value - c + unskew for value, c in zip((x, y, z), cell, strict=True)]
    order = sorted(range(3), key=lambda axis: -inside[axis])
    total = 0.0
    for corner in range(4):
        step = [int(axis in order[:corner]) for axis in range(3)]
        away = [value - s + corner / 6 for value, s in zip(inside, step, strict=True)]
        reach = 0.5 - sum(value**2 for value in away)
        if reach > 0:
            i, j, k = ((c + s) % 256 for c, s in zip(cell, step, strict=True))
            edge = edges[lattice[(lattice[(lattice[k] + j) % 256] + i) % 256] % 12]
            total += reach**4 * sum(e * a for e, a in zip(edge, away, strict=True))
    return total


@pytest.mark.parametrize("size", [(9, 11), (5, 6, 7)])
def test_it_is_what_the_definition_says_point_by_point(size) -> None:
    found = simplex((2, *size), generators([4]), octaves=3, persistence=0.7, wavelength=5.0)[0]
    g = generators([4])[0]
    for channel in range(2):
        lattice = torch.randperm(256, generator=g).tolist()
        start = (256 * torch.rand(3, generator=g)).tolist()
        for place in torch.cartesian_prod(*[torch.arange(n) for n in size])[::17].tolist():
            at = [*place, 0][:3]
            values = [
                0.7**o * scalar(lattice, *(p * 2**o / 5.0 + s * 2**o % 256 for p, s in zip(at, start, strict=True)))
                for o in range(3)
            ]
            expected = sum(values) / math.sqrt(sum(0.49**o for o in range(3)) * 2.608e-5)
            assert float(found[(channel, *place)]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("size", [(64, 64), pytest.param((24, 24, 24), marks=pytest.mark.slow)])
def test_over_many_draws_it_has_mean_0_and_variance_1(size) -> None:
    """The forward process needs unit variance; a draw has a mean of its own, so many draws are needed."""
    x = simplex((1, *size), generators(range(200)), wavelength=16.0).flatten(1)
    assert abs(float(x.mean())) < 0.1
    assert float(x.square().mean()) == pytest.approx(1, abs=0.08)


def test_the_variance_is_1_in_the_first_corner_too() -> None:
    """Octaves that begin at the same point of the lattice agree there: the variance is then 5."""
    corner = simplex((1, 4, 4), generators(range(400)), wavelength=64.0)
    assert float(corner.square().mean()) == pytest.approx(1, abs=0.25)


def test_a_draw_depends_on_its_own_generator_alone() -> None:
    alone = simplex((1, 20, 24), generators([7]))
    together = simplex((1, 20, 24), generators([3, 7, 8]))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    two = simplex((2, 20, 24), generators([7]))[0]
    assert torch.equal(two[0], alone[0, 0]) and not torch.equal(two[0], two[1])


def test_it_is_smooth_and_largest_at_low_frequencies() -> None:
    x = simplex((1, 128, 128), generators(range(8)))
    white = gaussian((1, 128, 128), generators(range(8)))
    assert float(x.diff(dim=-1).square().mean()) < 0.35 * float(white.diff(dim=-1).square().mean())
    power = torch.fft.rfft2(x).abs().square().mean((0, 1))
    low, high = power[1:5, 1:5].mean(), power[40:60, 40:60].mean()
    assert float(low) > 30 * float(high)
    fine = simplex((1, 2000, 1), generators([0]), octaves=1, wavelength=500.0)
    assert float(fine.diff(dim=-2).abs().max()) < 0.02  # no jumps between cells


def test_type_and_shape_follow_what_it_is_for() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    found = simplex((3, 8, 6), generators([1, 2]), like)
    assert found.shape == (2, 3, 8, 6) and found.dtype == torch.float64


@pytest.mark.cuda
def test_a_device_changes_nothing_but_rounding() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there = simplex((1, 64, 64), generators([1, 2]), torch.zeros(1, device="cuda")).cpu()
    torch.testing.assert_close(there, simplex((1, 64, 64), generators([1, 2])), rtol=0, atol=1e-2)

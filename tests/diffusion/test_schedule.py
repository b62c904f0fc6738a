"""Noise schedules: published end points, monotony, and one place where time meets space."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.diffusion import schedule as schedules
from medseg_diffusion.diffusion.posterior import posterior
from medseg_diffusion.diffusion.schedule import NoiseSchedule, from_betas

ALL = {
    "linear": schedules.linear,
    "scaled-linear": schedules.scaled_linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "rectified-flow": schedules.rectified_flow,
}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (schedules.linear(1000), 4.04e-5),
        (schedules.linear(100), 2.04e-5),
        (schedules.linear(50), 7.7e-6),
        (schedules.scaled_linear(1000), 1.42e-4),
        (schedules.scaled_linear(1000, beta_end=1.55e-2), 6.69e-4),
    ],
    ids=["linear-1000", "linear-100", "linear-50", "latent-0.0195", "latent-0.0155"],
)
def test_the_last_noise_level_is_the_published_one(schedule, expected) -> None:
    assert float(schedule.alpha_bar[-1]) == pytest.approx(expected, rel=7e-3)  # two to three printed digits


@pytest.mark.parametrize("num_steps", [1, 20, 1000])
def test_cosine_ends_in_pure_noise(num_steps) -> None:
    assert 0 < float(schedules.cosine(num_steps).alpha_bar[-1]) <= 1.0001e-3
    if num_steps == 1000:
        assert float(schedules.cosine(num_steps).alpha_bar[-1]) < 1e-8


def test_cosine_follows_its_formula_before_the_clipped_end() -> None:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = schedules.cosine(1000).alpha_bar
    for t in (1, 250, 500, 999):
        assert float(alpha_bar[t]) == pytest.approx(f(t / 1000) / f(0), rel=1e-9)


def test_linear_betas_are_those_of_ho_et_al() -> None:
    alpha_bar = schedules.linear(1000).alpha_bar
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([1e-4, 2e-2], dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(betas.diff(), torch.full((999,), (2e-2 - 1e-4) / 999, dtype=torch.float64))


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(ALL)), num_steps=st.integers(21, 3000))
def test_every_schedule_starts_clean_and_loses_signal_at_every_step(name, num_steps) -> None:
    schedule = ALL[name](num_steps)
    assert schedule.num_steps == num_steps
    assert schedule.alpha_bar.dtype == torch.float64
    assert float(schedule.alpha_bar[0]) == 1.0
    assert bool((schedule.alpha_bar.diff() < 0).all())
    assert schedule.ends_in_noise == (name == "rectified-flow") == (float(schedule.alpha_bar[-1]) == 0)
    assert bool((schedule.half_log_snr()[1:].diff() < 0).all())


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(["cosine", "sigmoid"]), num_steps=st.integers(1, 20))
def test_cosine_and_sigmoid_work_for_very_few_steps(name, num_steps) -> None:
    assert bool((ALL[name](num_steps).alpha_bar.diff() < 0).all())


@pytest.mark.parametrize("num_steps", [2, 10, 20])
def test_linear_with_a_beta_of_one_is_refused_with_a_remedy(num_steps) -> None:
    with pytest.raises(ValueError, match=r"every beta must lie in \(0, 1\).*use more steps.*cosine"):
        schedules.linear(num_steps)
    schedules.linear(21)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([1.0, 0.5]), "float64"),
        (torch.tensor([[1.0, 0.5]], dtype=torch.float64), "shape"),
        (torch.tensor([0.9, 0.5], dtype=torch.float64), "must be 1"),
        (torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64), "decrease strictly"),
        (torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64), "decrease strictly"),
        (torch.tensor([1.0, 0.5, -0.1], dtype=torch.float64), "to 0 or above"),
    ],
    ids=["float32", "matrix", "noisy-start", "plateau", "two-zeros", "negative-end"],
)
def test_a_table_that_is_no_schedule_is_refused(table, message) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(table)


@pytest.mark.parametrize("spatial", [(5, 7), (3, 5, 7)], ids=["2D", "3D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scales_broadcast_with_images_and_volumes(spatial, dtype) -> None:
    schedule = schedules.linear(100)
    like = torch.zeros(3, 2, *spatial, dtype=dtype)
    t = torch.tensor([1, 50, 100])
    by_hand = (schedule.at(t).sqrt(), (1 - schedule.at(t)).sqrt())
    for scale, expected in zip(schedule.scales(t, like), by_hand, strict=True):
        assert scale.dtype == dtype
        assert scale.shape == (3, 1, *[1] * len(spatial))
        torch.testing.assert_close(scale.flatten(), expected.to(dtype), rtol=0, atol=0)
    for scale in schedule.scales(7, like):
        assert scale.shape == (1, 1, *[1] * len(spatial))


def test_noise_is_added_with_unit_total_variance() -> None:
    schedule = schedules.cosine(200)
    x0 = torch.randn(4, 1, 200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 50, 120, 200])
    x_t = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(x_t.flatten(1).std(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.02)
    correlation = (x_t * x0).flatten(1).mean(1)
    torch.testing.assert_close(correlation, schedule.at(t).sqrt(), rtol=0, atol=0.03)
    torch.testing.assert_close(schedule.snr(t), schedule.at(t) / (1 - schedule.at(t)))


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(ALL)), kept=st.sets(st.integers(1, 400), min_size=1, max_size=30))
def test_betas_of_kept_times_multiply_to_the_original_signal(name, kept) -> None:
    """Skipping times must not change the noise level of those that are visited."""
    schedule = ALL[name](400)
    one = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    product, s = 1.0, 0
    for t in sorted(kept):
        product *= 1 - float(posterior(schedule, one, one, t, s).max_variance)
        assert product == pytest.approx(float(schedule.alpha_bar[t]), rel=1e-6, abs=1e-15)
        s = t


def test_from_betas_multiplies_signal_kept() -> None:
    alpha_bar = from_betas(torch.tensor([0.5, 0.5, 0.2])).alpha_bar
    expected = torch.tensor([1, 0.5, 0.25, 0.2], dtype=torch.float64)
    torch.testing.assert_close(alpha_bar, expected, rtol=1e-7, atol=0)


BY_HAND = re.compile(
    r"\[:(, None){3,}\]|\[\.\.\.(, None){2,}\]|\.view\(-1(, 1){2,}|\.reshape\(-1(, 1){3,}|(\.unsqueeze\(-1\)){2,}"
)


@pytest.mark.parametrize(
    "line",
    [
        "x = a[:, None, None, None] * x",
        "b = s.view(-1, 1, 1, 1)",
        "s.reshape(-1, 1, 1, 1)",
        "a[..., None, None]",
        "a.unsqueeze(-1).unsqueeze(-1)",
    ],
)
def test_the_search_for_broadcasts_by_hand_finds_them(line) -> None:
    assert BY_HAND.search(line)


def test_time_is_broadcast_in_the_schedule_alone() -> None:
    """Broadcasts by hand are written for one number of axes and break in the other."""
    package = Path(schedules.__file__).parents[1]
    files = [path for path in package.rglob("*.py") if path.relative_to(package).as_posix() != "diffusion/schedule.py"]
    assert len(files) > 20
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BY_HAND.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_the_times_between_two_log_snr_are_all_of_them(scale) -> None:
    schedule = schedules.cosine(1000)
    first, last = schedule.times_between(-5.0, 2.0, scale)
    inside = [t for t in range(1, 1001) if -5 <= math.log(scale**2 * float(schedule.snr(t))) <= 2]
    assert inside == list(range(first, last + 1)) and 1 < first < last < 1000


def test_bounds_without_a_time_are_refused() -> None:
    with pytest.raises(ValueError, match="no time has a log-SNR between 50 and 60"):
        schedules.cosine(1000).times_between(50, 60)


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_rectified_flow_is_the_straight_path_divided_by_its_norm(num_steps) -> None:
    """x_t n = (1 - u) x0 + u eps with n = 1 / (alpha + sigma), at every u = t / T, u = 1 included."""
    schedule = schedules.rectified_flow(num_steps)
    x0, eps = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), torch.full((1, 1, 1, 1), -1.3, dtype=torch.float64)
    for t in range(num_steps + 1):
        u = t / num_steps
        alpha, sigma = schedule.scales(t, x0)
        assert float(alpha**2 + sigma**2) == pytest.approx(1, abs=1e-12)
        assert float(sigma / (alpha + sigma)) == pytest.approx(u, abs=1e-9)
        z = schedule.add_noise(x0, eps, t) / (alpha + sigma)
        torch.testing.assert_close(z, (1 - u) * x0 + u * eps, rtol=0, atol=1e-9)
    assert schedule.ends_in_noise and torch.equal(schedule.add_noise(x0, eps, num_steps), eps)


def test_log_snr_times_of_rectified_flow_are_those_of_logits_of_u() -> None:
    """log(alpha^2 / sigma^2) = 2 log((1 - u) / u); minus infinity at u = 1 belongs to no bounded interval."""
    schedule = schedules.rectified_flow(1000)
    assert schedule.times_between(2 * math.log(1 / 3), 2 * math.log(3)) == (250, 750)
    assert schedule.times_between(-math.inf, 0) == (500, 1000)
    assert float(schedule.half_log_snr()[-1]) == -math.inf and float(schedule.snr(1000)) == 0

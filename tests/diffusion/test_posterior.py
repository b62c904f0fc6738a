"""The posterior of the forward process, and densities of Gaussians and of 8-bit levels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medseg_diffusion.diffusion.posterior import (
    discretised_nll,
    gaussian_kl,
    gaussian_nll,
    log_variance,
    posterior,
)
from tests.helpers.diffusion import LINEAR, SCHEDULES, normal


@settings(deadline=None, max_examples=50)
@given(st.floats(-2, 2), st.floats(-4, 2), st.floats(-2, 2), st.floats(-4, 2))
def test_the_gaussian_divergence_is_torchs(mean_q, log_var_q, mean_p, log_var_p) -> None:
    q, lq, p, lp = (torch.tensor(value, dtype=torch.float64) for value in (mean_q, log_var_q, mean_p, log_var_p))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(q, (0.5 * lq).exp()), torch.distributions.Normal(p, (0.5 * lp).exp())
    )
    torch.testing.assert_close(gaussian_kl(q, lq, p, lp), expected, rtol=1e-9, atol=1e-9)


def test_the_gaussian_density_is_torchs() -> None:
    x, mean, log_var = normal(1, 50), normal(2, 50), normal(3, 50)
    expected = -torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(x)
    torch.testing.assert_close(gaussian_nll(x, mean, log_var), expected)


@settings(deadline=None, max_examples=50)
@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(-5, 1))
def test_the_probabilities_of_all_levels_sum_to_one(mean, log_std) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nll = discretised_nll(x, torch.tensor(mean, dtype=torch.float64), torch.tensor(2 * log_std, dtype=torch.float64))
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_the_probability_of_a_level_is_that_of_its_bin() -> None:
    x, mean, std = torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64), 0.1, 0.05
    x = ((x + 1) * 127.5).round() / 127.5 - 1
    edges = [(-math.inf, float(x[0]) + 1 / 255), (float(x[1]) - 1 / 255, float(x[1]) + 1 / 255)]
    edges.append((float(x[2]) - 1 / 255, math.inf))
    normal_ = stats.norm(mean, std)
    expected = [-math.log(normal_.cdf(b) - normal_.cdf(a)) if b < 1 else -normal_.logsf(a) for a, b in edges]
    found = discretised_nll(x, torch.tensor(mean).double(), torch.tensor(2 * math.log(std)).double())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_level_far_from_the_mean_has_a_finite_probability_and_a_gradient() -> None:
    mean = torch.zeros(3, requires_grad=True)
    nll = discretised_nll(torch.tensor([-0.9, 0.9, 0.5]), mean, torch.tensor(2 * math.log(0.004)))
    nll.sum().backward()
    assert bool(nll.isfinite().all()) and float(nll.detach().min()) > 1000
    assert mean.grad is not None and bool((mean.grad.abs() > 0).all())


@pytest.mark.parametrize(("v", "largest"), [(-1.0, False), (1.0, True)])
def test_the_ends_of_the_learned_range_are_the_two_variances(v, largest) -> None:
    x0, x_t = normal(4, 2, 1, 4, 4), normal(5, 2, 1, 4, 4)
    q = posterior(LINEAR, x0, x_t, 500, 499)
    weight = torch.full_like(x0, (v + 1) / 2)
    beta = 1 - LINEAR.alpha_bar[500] / LINEAR.alpha_bar[499]
    tilde = beta * (1 - LINEAR.alpha_bar[499]) / (1 - LINEAR.alpha_bar[500])
    expected = beta if largest else tilde
    torch.testing.assert_close(log_variance(q, weight).exp(), expected.expand_as(x0))


def test_the_smallest_variance_of_the_last_step_is_that_of_the_step_before() -> None:
    x = normal(6, 1, 1, 2, 2)
    q = posterior(LINEAR, x, x, 1, 0, later=2)
    before = posterior(LINEAR, x, x, 2, 1)
    torch.testing.assert_close(q.variance, before.variance)
    assert float(posterior(LINEAR, x, x, 1, 0).variance) == 0


@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(sorted(SCHEDULES)), t=st.integers(2, 1000))
def test_adjacent_posteriors_are_those_of_ho_et_al(name, t) -> None:
    """Equations 6 and 7, from alpha_bar and beta as the paper writes them."""
    schedule = SCHEDULES[name]
    x0, x_t = normal(17, 2, 1, 3, 3), normal(18, 2, 1, 3, 3)
    ab = schedule.alpha_bar
    beta = 1 - ab[t] / ab[t - 1]
    mean = ab[t - 1].sqrt() * beta / (1 - ab[t]) * x0 + (1 - beta).sqrt() * (1 - ab[t - 1]) / (1 - ab[t]) * x_t
    q = posterior(schedule, x0, x_t, t, t - 1)
    torch.testing.assert_close(q.mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(q.variance.flatten(), beta[None] * (1 - ab[t - 1]) / (1 - ab[t]), rtol=0, atol=1e-10)
    torch.testing.assert_close(q.max_variance.flatten(), beta[None], rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(sorted(SCHEDULES)), times=st.sets(st.integers(0, 1000), min_size=3, max_size=3))
def test_posteriors_compose(name, times) -> None:
    """From t to s and on to r is the same as from t to r."""
    r, s, t = sorted(times)
    schedule = SCHEDULES[name]
    x0, x_t = normal(19, 1, 1, 4, 4), normal(20, 1, 1, 4, 4)
    direct, first = posterior(schedule, x0, x_t, t, r), posterior(schedule, x0, x_t, t, s)
    second = posterior(schedule, x0, first.mean, s, r)
    torch.testing.assert_close(second.mean, direct.mean, rtol=0, atol=1e-10)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    gain = posterior(schedule, zero, one, s, r).mean.mean()
    torch.testing.assert_close(second.variance + gain**2 * first.variance, direct.variance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_the_posterior_of_the_clean_time_is_the_image(t) -> None:
    x0, x_t = normal(21, 2, 1, 3, 3), normal(22, 2, 1, 3, 3)
    q = posterior(SCHEDULES["linear"], x0, x_t, torch.tensor([t, 1000]), 0)
    torch.testing.assert_close(q.mean, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.variance, torch.zeros_like(q.variance), rtol=0, atol=0)


@pytest.mark.parametrize(("t", "s"), [(5, 5), (5, 6)])
def test_a_posterior_to_a_later_time_is_refused(t, s) -> None:
    with pytest.raises(ValueError, match=f"earlier time: got t = {t}, s = {s}"):
        posterior(SCHEDULES["linear"], normal(0, 1, 1, 2, 2), normal(0, 1, 1, 2, 2), t, s)

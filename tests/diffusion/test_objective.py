"""Objectives: the simple loss, the bound, their sum, and times drawn by importance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import Noised, generators
from medseg_diffusion.diffusion.objective import Bound, Hybrid, ImportanceTimes, Simple
from medseg_diffusion.diffusion.posterior import (
    bound_term,
    discretised_nll,
    posterior,
)
from medseg_diffusion.diffusion.prediction import Prediction, read_output, target_of
from tests.helpers.diffusion import LINEAR, SCHEDULES, TARGETS, Constant, Emits, levels, normal


def gradients(objective: Hybrid | Bound, t: int) -> tuple[Tensor, Tensor]:
    """Gradients of the objective with respect to the mean channels and the variance channels."""
    x0, eps = levels(7, 2, 3, 4, 4), normal(8, 2, 3, 4, 4)
    network = Emits(torch.cat([normal(9, 2, 3, 4, 4), 0.3 * normal(10, 2, 3, 4, 4)], dim=1))
    denoiser = NetworkDenoiser(network, LINEAR, "eps", learned_variance=True)
    noised = Noised.from_noise(LINEAR, x0, eps, torch.tensor([t, t]))
    prediction = denoiser(noised.x_t, noised.t)
    objective(LINEAR, "eps", prediction, noised).sum().backward()
    assert network.out.grad is not None
    mean, variance = network.out.grad.chunk(2, dim=1)
    return mean, variance


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_in_the_hybrid_the_bound_leaves_the_mean_alone(t) -> None:
    only_bound = gradients(Hybrid(Simple(), weight=1.0), t)
    simple_alone = gradients(Hybrid(Simple(), weight=0.0), t)
    assert bool((only_bound[0] == simple_alone[0]).all()), "exactly nothing is added to the mean's gradient"
    assert bool((simple_alone[1] == 0).all())
    assert float(only_bound[1].abs().max()) > 0


@pytest.mark.parametrize("t", [1, 2, 500])
def test_the_pure_bound_trains_the_mean(t) -> None:
    mean, variance = gradients(Bound(), t)
    assert float(mean.abs().max()) > 0 and float(variance.abs().max()) > 0


def test_the_hybrid_is_the_weighted_sum() -> None:
    x0, eps, t = levels(11, 3, 1, 4, 4), normal(12, 3, 1, 4, 4), torch.tensor([1, 10, 900])
    noised = Noised.from_noise(LINEAR, x0, eps, t)
    prediction = Prediction(0.5 * x0, eps + 0.1, torch.full_like(x0, 0.4))
    parts = (part(LINEAR, "eps", prediction, noised) for part in (Simple(), Bound()))
    simple, bound = parts
    torch.testing.assert_close(Hybrid()(LINEAR, "eps", prediction, noised), simple + 0.001 * bound)


def test_the_hybrid_needs_a_learned_variance() -> None:
    x = normal(13, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="does not learn one"):
        Hybrid()(LINEAR, "eps", Prediction(x, x), Noised(x, x, torch.tensor([5]), x))


def test_the_bound_is_t_times_its_term_in_bits() -> None:
    x0, eps, t = levels(14, 2, 2, 3, 3), normal(15, 2, 2, 3, 3), torch.tensor([1, 700])
    noised = Noised.from_noise(LINEAR, x0, eps, t)
    prediction = Prediction(0.9 * x0, eps, torch.full_like(x0, 0.2))
    terms = bound_term(LINEAR, prediction, noised, t - 1, t + 1, "discretised")
    expected = 1000 / math.log(2) * terms.mean(dim=(1, 2, 3))
    torch.testing.assert_close(Bound()(LINEAR, "eps", prediction, noised), expected)
    w, beta = 0.2, 1 - LINEAR.alpha_bar[1]
    tilde = posterior(LINEAR, x0, noised.x_t, 2, 1).variance[0].squeeze()
    log_var = (w * beta.log() + (1 - w) * tilde.log()).expand_as(x0[0])
    torch.testing.assert_close(terms[0], discretised_nll(x0[0], 0.9 * x0[0], log_var))


def test_times_are_uniform_until_every_one_has_its_history() -> None:
    times = ImportanceTimes(4, history=2)
    times.update(torch.tensor([1, 1, 2, 2, 3, 3, 4]), torch.ones(7) * 9)
    torch.testing.assert_close(times.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    t, weights = times.draw(generators(range(400)))
    assert t.min() == 1 and t.max() == 4
    torch.testing.assert_close(weights, torch.ones(400, dtype=torch.float64))


def test_times_of_large_losses_are_drawn_more_often_with_weights_that_keep_the_mean() -> None:
    times = ImportanceTimes(3, history=2, uniform=0.001)
    sizes = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    for _ in range(3):  # the oldest loss is forgotten
        times.update(torch.tensor([1, 2, 3]), sizes)
    p = times.probabilities()
    torch.testing.assert_close(p, 0.999 * sizes / 8 + 0.001 / 3)
    t, weights = times.draw(generators(range(3000)))
    share = torch.bincount(t, minlength=4)[1:] / 3000
    torch.testing.assert_close(share.double(), p, atol=0.03, rtol=0)
    estimate = float((weights * sizes[t - 1]).mean())
    assert estimate == pytest.approx(float(sizes.mean()), abs=0.02)


def test_only_the_last_losses_count_and_resuming_keeps_them() -> None:
    times = ImportanceTimes(2, history=3)
    for loss in (100.0, 3.0, 4.0, 5.0):
        times.update(torch.tensor([1, 2]), torch.tensor([loss, 1.0]))
    root = math.sqrt((9 + 16 + 25) / 3)
    assert float(times.probabilities()[0]) == pytest.approx(0.999 * root / (root + 1) + 0.0005)
    resumed = ImportanceTimes(2, history=3)
    resumed.load_state_dict(times.state_dict())
    torch.testing.assert_close(resumed.probabilities(), times.probabilities(), rtol=0, atol=0)
    assert resumed.draw(generators(range(9)))[0].tolist() == times.draw(generators(range(9)))[0].tolist()


@settings(deadline=None, max_examples=40)
@given(t=st.lists(st.integers(1, 980), min_size=3, max_size=3), gamma=st.floats(0.5, 20))
def test_min_snr_weighs_the_error_of_the_image_alike_for_all_targets(t, gamma) -> None:
    """Hang et al. 2023, eq. 8: min(SNR, gamma) times the squared error of x0, whatever the network predicts."""
    schedule, times = SCHEDULES["linear"], torch.tensor(t)
    x0, eps, guess = normal(23, 3, 2, 4, 4), normal(24, 3, 2, 4, 4), normal(25, 3, 2, 4, 4)
    x_t = schedule.add_noise(x0, eps, times)
    prediction = Prediction(*read_output("x0", guess, x_t, *schedule.scales(times, x_t)))
    snr = schedule.alpha_bar[times] / (1 - schedule.alpha_bar[times])
    expected = snr.clamp(max=gamma) * (guess - x0).square().mean(dim=(1, 2, 3))
    for target in TARGETS:
        loss = Simple("min-snr", gamma)(schedule, target, prediction, Noised(x0, eps, times, x_t))
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_the_simple_loss_is_the_mean_square_of_what_the_network_gets_wrong(target) -> None:
    schedule, t = SCHEDULES["linear"], torch.tensor([10, 800])
    x0, eps = normal(26, 2, 1, 4, 4, 4), normal(27, 2, 1, 4, 4, 4)
    x_t = schedule.add_noise(x0, eps, t)
    truth = target_of(target, x0, eps, *schedule.scales(t, x0))
    prediction = NetworkDenoiser(Constant(truth + 0.5), schedule, target)(x_t, t)
    loss = Simple()(schedule, target, prediction, Noised(x0, eps, t, x_t))
    torch.testing.assert_close(loss, torch.full((2,), 0.25, dtype=torch.float64), rtol=1e-9, atol=0)

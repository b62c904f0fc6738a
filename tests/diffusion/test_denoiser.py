"""A network as a denoiser: scaling, heads, learned variance and clipping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Clipped, GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.posterior import posterior
from medseg_diffusion.diffusion.prediction import read_output, target_of
from medseg_diffusion.sampling.ddpm import DDPM
from tests.helpers.diffusion import FLOW, SCHEDULES, TARGETS, Constant, normal
from tests.helpers.samplers import predict_once


@pytest.mark.parametrize("spatial", [(6, 5), (4, 6, 5)], ids=["2D", "3D"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_network_that_emits_the_target_recovers_image_and_noise(target, spatial) -> None:
    schedule = SCHEDULES["linear"]
    x0, eps = normal(5, 3, 2, *spatial), normal(6, 3, 2, *spatial)
    t = torch.tensor([1, 400, 900])
    truth = target_of(target, x0, eps, *schedule.scales(t, x0))
    network = Constant(truth)
    prediction = NetworkDenoiser(network, schedule, target)(schedule.add_noise(x0, eps, t), t, {"label": t})
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-9, atol=1e-9)
    assert prediction.var_weight is None and prediction.logits is None
    [(given_times, given_cond)] = network.calls
    assert given_times.tolist() == [0, 399, 899], "public weights count from 0"
    assert given_cond == {"label": t}


def test_a_half_precision_network_does_not_lower_the_precision_of_the_algebra() -> None:
    x_t, t = normal(7, 1, 1, 4, 4, dtype=torch.float32), torch.tensor([500])
    network = Constant(torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16))
    prediction = NetworkDenoiser(network, SCHEDULES["linear"], "eps")(x_t, t)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    torch.testing.assert_close(prediction.x0, x_t / SCHEDULES["linear"].scales(t, x_t)[0])


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 1.5])
def test_learned_variance_is_split_from_the_prediction(value) -> None:
    """-1 and 1 are the smallest and the largest variance of the step, and nothing is clamped."""
    schedule, t, s = SCHEDULES["linear"], 500, 400
    mean_part, x_t = normal(8, 2, 3, 4, 4), normal(9, 2, 3, 4, 4)
    network = Constant(torch.cat([mean_part, torch.full_like(mean_part, value)], dim=1))
    prediction = NetworkDenoiser(network, schedule, "x0", learned_variance=True)(x_t, torch.full((2,), t))
    torch.testing.assert_close(prediction.x0, mean_part)
    assert prediction.var_weight is not None
    torch.testing.assert_close(prediction.var_weight, torch.full_like(mean_part, (value + 1) / 2))
    one = torch.ones_like(x_t)
    step = DDPM(variance="beta").begin(predict_once)
    std = step(schedule, prediction, x_t, t, s, lambda: one) - step(schedule, prediction, x_t, t, s, lambda: 0 * one)
    q = posterior(schedule, prediction.x0, x_t, t, s)
    expected = q.variance ** ((1 - value) / 4) * q.max_variance ** ((1 + value) / 4)
    torch.testing.assert_close(std, expected.expand_as(std))


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_a_classifying_head_reads_probabilities_as_the_image(head, scale) -> None:
    schedule, t = SCHEDULES["cosine"], torch.tensor([300, 700])
    logits, x_t = normal(10, 2, 4, 5, 5), normal(11, 2, 4, 5, 5)
    denoiser = NetworkDenoiser(Constant(logits), schedule, "x0", head=head, scale=scale)
    prediction = denoiser(x_t, t)
    p = logits.exp() / logits.exp().sum(1, keepdim=True) if head == "softmax" else 1 / (1 + (-logits).exp())
    torch.testing.assert_close(prediction.x0, scale * (2 * p - 1))
    alpha, sigma = schedule.scales(t, x_t)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t)
    torch.testing.assert_close(prediction.logits, logits)


@pytest.mark.parametrize(("target", "unit"), [("x0", 0.05), ("eps", 1.0), ("v", 1.0)])
def test_the_scale_is_the_unit_of_a_predicted_image_alone(target, unit) -> None:
    schedule, t = SCHEDULES["cosine"], torch.tensor([300, 700])
    out, x_t = normal(10, 2, 4, 5, 5), normal(11, 2, 4, 5, 5)
    prediction = NetworkDenoiser(Constant(out), schedule, target, scale=0.05)(x_t, t)
    x0, eps = read_output(target, unit * out, x_t, *schedule.scales(t, x_t))
    torch.testing.assert_close((prediction.x0, prediction.eps), (x0, eps))


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0])
def test_a_network_sees_unit_variance_at_every_time_however_small_the_mask(scale) -> None:
    schedule, t = SCHEDULES["cosine"], torch.tensor([1, 40, 500, 1000])
    x0, eps = scale * normal(12, 4, 1, 80, 80).sign(), normal(13, 4, 1, 80, 80)
    x_t = schedule.add_noise(x0, eps, t)
    network = Constant(torch.zeros_like(x_t))
    NetworkDenoiser(network, schedule, "x0", scale=scale)(x_t, t)
    NetworkDenoiser(network, schedule, "x0", scale=scale, normalised=False)(x_t, t)
    normalised, raw = network.seen
    torch.testing.assert_close(normalised.flatten(1).std(1), torch.ones(4).double(), rtol=0.03, atol=0)
    assert torch.equal(raw, x_t)


@settings(deadline=None, max_examples=30)
@given(t=st.integers(1, 1000), scale=st.floats(0.02, 2.0))
def test_what_the_network_sees_is_enough_for_the_exact_denoiser(t, scale) -> None:
    """Of N(0, scale^2): E[x0 | x_t] is what the network sees times alpha scale^2 over the standard deviation of x_t."""
    schedule, times = SCHEDULES["cosine"], torch.full((2,), t)
    x_t = normal(14, 2, 1, 3, 3)
    alpha, sigma = schedule.scales(times, x_t)
    deviation = (alpha**2 * scale**2 + sigma**2).sqrt()

    class Exact(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            return x * alpha * scale / deviation  # in units of the scale

    found = NetworkDenoiser(Exact(), schedule, "x0", scale=scale)(x_t, times)
    torch.testing.assert_close(found.x0, GaussianDenoiser(schedule, 0.0, scale)(x_t, times).x0)


@pytest.mark.parametrize(("target", "learned"), [("eps", False), ("v", False), ("x0", True)])
def test_a_classifying_head_needs_the_image_as_target(target, learned) -> None:
    with pytest.raises(ValueError, match="target 'x0' and no learned variance"):
        NetworkDenoiser(nn.Identity(), SCHEDULES["linear"], target, learned_variance=learned, head="softmax")


@settings(deadline=None, max_examples=30)
@given(t=st.integers(1, 1000), low=st.floats(-1, 0, allow_subnormal=False), width=st.floats(0.1, 2))
def test_clipping_keeps_image_and_noise_consistent(t, low, width) -> None:
    schedule = SCHEDULES["linear"]
    x_t = 3 * normal(12, 2, 1, 8, 8)
    network = Constant(torch.cat([normal(13, 2, 1, 8, 8), normal(14, 2, 1, 8, 8)], dim=1))
    inner = NetworkDenoiser(network, schedule, "eps", learned_variance=True)
    clipped = Clipped(inner, low, low + width)
    times = torch.full((2,), t)
    free, prediction = inner(x_t, times), clipped(x_t, times)
    assert clipped.schedule is schedule
    assert bool((prediction.x0 >= low).all() and (prediction.x0 <= low + width).all())
    alpha, sigma = schedule.scales(times, x_t)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.var_weight, free.var_weight)
    inside = (free.x0 > low) & (free.x0 < low + width)
    torch.testing.assert_close(prediction.eps[inside], free.eps[inside], rtol=1e-6, atol=1e-6)


def test_the_gaussian_denoiser_is_the_regression_of_the_image_on_its_noisy_version() -> None:
    """Compared with least squares on samples: its slope and intercept are those of the best predictor."""
    schedule, mean, std, t = SCHEDULES["linear"], 0.3, 0.7, 350
    x0 = mean + std * normal(15, 1, 1, 500, 400)
    x_t = schedule.add_noise(x0, normal(16, 1, 1, 500, 400), t)
    covariance = torch.cov(torch.stack([x_t.flatten(), x0.flatten()]))
    slope = covariance[0, 1] / covariance[0, 0]
    fitted = x0.mean() + slope * (x_t - x_t.mean())
    prediction = GaussianDenoiser(schedule, mean, std)(x_t, torch.tensor([t]))
    torch.testing.assert_close(prediction.x0, fitted, rtol=0, atol=0.02)
    alpha, sigma = schedule.scales(t, x_t)
    torch.testing.assert_close(prediction.eps, (x_t - alpha * prediction.x0) / sigma)


def test_noise_as_a_target_is_refused_where_a_time_is_noise_alone() -> None:
    """eps would be x_T itself there, and x0 a division by zero."""
    with pytest.raises(ValueError, match="'eps' gives no x0 at the last time of this schedule"):
        NetworkDenoiser(nn.Identity(), FLOW, "eps")


@pytest.mark.parametrize("target", ["x0", "v", "flow"])
def test_at_pure_noise_eps_is_x_t_and_the_network_says_x0(target) -> None:
    x_t, out, last = normal(31, 2, 1, 4, 4), normal(32, 2, 1, 4, 4), torch.full((2,), 1000)
    prediction = NetworkDenoiser(Constant(out), FLOW, target)(x_t, last)
    torch.testing.assert_close(prediction.x0, {"x0": out, "v": -out, "flow": x_t - out}[target], rtol=0, atol=0)
    torch.testing.assert_close(prediction.eps, x_t, rtol=0, atol=0)
    clipped = Clipped(NetworkDenoiser(Constant(out), FLOW, target), -0.1, 0.1)(x_t, last)
    torch.testing.assert_close(clipped.x0, prediction.x0.clamp(-0.1, 0.1), rtol=0, atol=0)
    torch.testing.assert_close(clipped.eps, x_t, rtol=0, atol=0)

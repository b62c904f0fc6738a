"""What a network predicts and how it is read: epsilon, x0, v, variances, classifying heads, posteriors and losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Clipped, GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.noise import Noised, uniform_times
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.posterior import posterior
from medseg_diffusion.diffusion.prediction import Prediction, Target, read_output, target_of
from medseg_diffusion.diffusion.schedule import cosine, linear, scaled_linear, sigmoid
from medseg_diffusion.sampling.ddpm import DDPM

SCHEDULES = {"linear": linear(1000), "cosine": cosine(1000), "scaled": scaled_linear(1000), "sigmoid": sigmoid(1000)}
TARGETS: list[Target] = ["eps", "x0", "v"]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Constant(nn.Module):
    """A network that answers with a fixed tensor and remembers how it was called."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[Tensor, object]] = []
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        self.calls.append((timesteps, cond))
        self.seen.append(x)
        return self.answer


# The table of cosine has alpha = 5e-5 at its very end, where eps is an ill-conditioned target: stay clear of it.
@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from(sorted(SCHEDULES)), t=st.integers(1, 980), target=st.sampled_from(TARGETS))
def test_read_out_inverts_the_target_at_any_time(name, t, target) -> None:
    schedule = SCHEDULES[name]
    x0, eps = normal(1, 2, 3, 4, 5), normal(2, 2, 3, 4, 5)
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = schedule.scales(t, x_t)
    found_x0, found_eps = read_output(target, target_of(target, x0, eps, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close(found_x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_eps, eps, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(t=st.integers(1, 980), target=st.sampled_from(TARGETS))
def test_both_read_outs_of_any_output_describe_the_same_point(t, target) -> None:
    schedule = SCHEDULES["linear"]
    x_t, out = normal(3, 1, 2, 6, 6), normal(4, 1, 2, 6, 6)
    alpha, sigma = schedule.scales(t, x_t)
    x0, eps = read_output(target, out, x_t, alpha, sigma)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target_of(target, x0, eps, alpha, sigma), out, rtol=1e-9, atol=1e-9)


def test_v_is_the_published_combination() -> None:
    schedule = SCHEDULES["linear"]
    x0, eps = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = schedule.scales(300, x0)
    torch.testing.assert_close(target_of("v", x0, eps, alpha, sigma), -sigma)
    torch.testing.assert_close(target_of("v", eps, x0, alpha, sigma), alpha)


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
    step = DDPM(variance="beta").begin()
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


def test_training_times_cover_all_noise_levels_evenly_and_depend_on_their_own_seed() -> None:
    own = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    t = uniform_times(10, own)
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=11)
    assert counts[0] == 0
    assert counts[1:].min() > 300 and counts[1:].max() < 500  # 400 expected, 5 standard deviations are 95
    again = uniform_times(10, [torch.Generator().manual_seed(seed) for seed in (7, 3)])
    assert again.tolist() == [int(t[7]), int(t[3])]

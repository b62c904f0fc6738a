"""The variational bound: its terms, the objectives that train a variance with it, and likelihoods."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.likelihood import kl_maps, variational_bound
from medseg_diffusion.diffusion.noise import Noised, generators
from medseg_diffusion.diffusion.objective import Bound, Hybrid, ImportanceTimes, Simple
from medseg_diffusion.diffusion.posterior import (
    bound_term,
    discretised_nll,
    gaussian_kl,
    gaussian_nll,
    log_variance,
    posterior,
)
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import cosine, linear

LINEAR = linear(1000)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels(seed: int, *shape: int) -> Tensor:
    """8-bit levels mapped to [-1, 1]."""
    whole = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return whole.double() / 127.5 - 1


class Emits(nn.Module):
    """A network with one free output."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        return self.out


# ---- distributions ---------------------------------------------------------------------------------------------------


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


# ---- learned variance ------------------------------------------------------------------------------------------------


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


# ---- objectives ------------------------------------------------------------------------------------------------------


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


# ---- importance sampling ---------------------------------------------------------------------------------------------


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


# ---- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(60, 60), (15, 16, 15)], ids=["2D", "3D"])
@pytest.mark.parametrize("t", [2, 100, 600, 1000])
def test_the_divergence_of_the_exact_denoiser_is_the_closed_form(t, spatial) -> None:
    """E KL = c^2 Var(x0 | x_t) / (2 posterior variance), c the weight of x0 in the posterior's mean."""
    std = 0.4
    x0 = 0.3 + std * normal(16, 2, 1, *spatial)
    maps = kl_maps(GaussianDenoiser(LINEAR, 0.3, std), x0, generators([1, 2]), [t])
    ab, before = LINEAR.alpha_bar[t], LINEAR.alpha_bar[t - 1]
    beta = 1 - ab / before
    c = before.sqrt() * beta / (1 - ab)
    left = std**2 * (1 - ab) / (ab * std**2 + 1 - ab)
    expected = c**2 * left / (2 * beta * (1 - before) / (1 - ab))
    assert maps.shape == (2, 1, *spatial)
    assert float(maps.mean()) == pytest.approx(float(expected), rel=0.06)


@pytest.mark.parametrize("walk", [list(range(50, -1, -1)), [50, 30, 29, 11, 3, 0]], ids=["all times", "some"])
def test_the_whole_bound_is_the_sum_of_closed_forms(walk) -> None:
    schedule, std = cosine(50), 0.5
    x0 = std * normal(17, 3, 2, 40, 40)
    denoiser = GaussianDenoiser(schedule, 0.0, std)
    found = variational_bound(denoiser, x0, generators([1, 2, 3]), "continuous", times=walk)
    ab = schedule.alpha_bar
    expected = 0.0
    for t, s in pairwise(walk[:-1]):
        beta = 1 - ab[t] / ab[s]
        c = ab[s].sqrt() * beta / (1 - ab[t])
        left = std**2 * (1 - ab[t]) / (ab[t] * std**2 + 1 - ab[t])
        expected += float(c**2 * left / (2 * beta * (1 - ab[s]) / (1 - ab[t])))
    assert found.unit == "nats/position without decoder term" and found.decoder is None
    assert found.kl.shape == (3, len(walk) - 2) and found.times == walk[:-2]
    assert float(found.kl.sum(1).mean()) == pytest.approx(2 * expected, rel=0.05), "two channels a position"
    prior = 0.5 * (ab[-1] * std**2 - ab[-1] - (1 - ab[-1]).log())
    assert float(found.prior.mean()) == pytest.approx(2 * float(prior), abs=1e-4)
    torch.testing.assert_close(found.total, found.prior + found.kl.sum(1))


def test_a_model_that_knows_the_image_pays_for_the_width_of_its_last_step_alone() -> None:
    grey = torch.full((1, 1, 8, 8), 100 / 127.5 - 1, dtype=torch.float64)
    found = variational_bound(GaussianDenoiser(LINEAR, float(grey[0, 0, 0, 0]), 1e-5), grey, generators([0]), "8-bit")
    assert found.unit == "bits/dim" and found.decoder is not None
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    std = float(posterior(LINEAR, x, x, 2, 1).variance) ** 0.5
    price = -math.log2(2 * stats.norm.cdf(1 / 255 / std) - 1)
    assert float(found.total) == pytest.approx(price, abs=1e-3)


def test_no_model_has_less_than_eight_bits_on_uniform_levels() -> None:
    noise = levels(18, 2, 1, 24, 24)
    spread = math.sqrt(1 / 3)  # of a uniform distribution over [-1, 1]
    total = variational_bound(GaussianDenoiser(LINEAR, 0.0, spread), noise, generators([0, 1]), "8-bit").total
    # A Gaussian of the right variance is 0.25 bits worse than the truth, the fixed variances cost another bit.
    assert bool((total > 8.2).all()) and bool((total < 9.6).all())


@pytest.mark.parametrize("value", [0.123, 1.5])
def test_bits_of_what_is_not_eight_bit_are_refused(value) -> None:
    x0 = torch.full((1, 1, 4, 4), value)
    with pytest.raises(ValueError, match='data="continuous"'):
        variational_bound(GaussianDenoiser(LINEAR), x0, generators([0]), "8-bit")


def test_a_term_does_not_depend_on_the_batch() -> None:
    x0, denoiser = normal(20, 3, 2, 6, 5, 4), GaussianDenoiser(LINEAR, 0.1, 0.3)
    together = kl_maps(denoiser, x0, generators([5, 6, 7]), [600, 500, 400], batch_size=4)
    alone = kl_maps(denoiser, x0[1:2], generators([6]), [600, 500, 400], batch_size=1)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0)
    assert bool((together >= 0).all())


@pytest.mark.parametrize("times", [[], [1], [1001]])
def test_maps_of_impossible_times_are_refused(times) -> None:
    with pytest.raises(ValueError, match=r"2\.\.1000"):
        kl_maps(GaussianDenoiser(LINEAR), normal(0, 1, 1, 2, 2), generators([0]), times)


@pytest.mark.parametrize("times", [[1000, 0], [900, 500, 0], [1000, 500], [1000, 500, 600, 0]])
def test_a_walk_that_is_none_is_refused(times) -> None:
    with pytest.raises(ValueError, match="times must decrease from 1000 to 0"):
        variational_bound(GaussianDenoiser(LINEAR), normal(0, 1, 1, 2, 2), generators([0]), "continuous", times=times)

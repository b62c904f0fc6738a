"""Categorical diffusion against enumerated posteriors, and sampling against an exact denoiser of two masks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.categorical import (
    NoisedLabels,
    bound_loss,
    draw,
    draw_noised_labels,
    label_noise,
    noised_probabilities,
    one_hot,
    posterior,
    uniform_labels,
)
from medseg_diffusion.diffusion.noise import generators
from medseg_diffusion.diffusion.schedule import NoiseSchedule, cosine
from medseg_diffusion.sampling.categorical import sample_categorical
from medseg_diffusion.sampling.loop import spaced

SCHEDULE = cosine(1000)
PAIRS = [(1, 0), (2, 1), (300, 299), (700, 250), (1000, 999), (1000, 1)]


def transition(schedule: NoiseSchedule, count: int, t: int, s: int) -> Tensor:
    """q(x_t = j | x_s = i) as a matrix (i, j), from the definition."""
    kept = schedule.value(t) / schedule.value(s)
    return kept * torch.eye(count, dtype=torch.float64) + (1 - kept) / count


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_posterior_of_a_known_label_is_bayes_rule(count: int, t: int, s: int) -> None:
    to_s, s_to_t = transition(SCHEDULE, count, s, 0), transition(SCHEDULE, count, t, s)
    for x0, x_t in product(range(count), repeat=2):
        expected = to_s[x0] * s_to_t[:, x_t]
        expected = expected / expected.sum()
        known = one_hot(torch.tensor([[x0]]), count).double()
        found = posterior(SCHEDULE, known, torch.tensor([[x_t]]), t, s)[0, :, 0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_step_is_the_posterior_summed_over_the_clean_label(count: int, t: int, s: int) -> None:
    p = torch.tensor([0.7, 0.1, 0.2][:count], dtype=torch.float64)
    p = p / p.sum()
    for x_t in range(count):
        now = torch.tensor([[x_t]])
        each = [
            posterior(SCHEDULE, one_hot(torch.tensor([[i]]), count).double(), now, t, s)[0, :, 0] for i in range(count)
        ]
        expected = sum(weight * q for weight, q in zip(p, each, strict=True))
        found = posterior(SCHEDULE, p[None, :, None], now, t, s)[0, :, 0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_two_steps_forward_are_one(count: int) -> None:
    direct, detour = transition(SCHEDULE, count, 700, 0), transition(SCHEDULE, count, 300, 0)
    torch.testing.assert_close(detour @ transition(SCHEDULE, count, 700, 300), direct)
    x0 = torch.eye(count, dtype=torch.float64)[:, :, None]
    torch.testing.assert_close(noised_probabilities(SCHEDULE, x0, 700)[..., 0], direct)


def test_draws_have_the_shares_of_their_probabilities_in_any_batch() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])[None, :, None].expand(2, -1, 40_000)
    together = draw(p, generators([1, 2]))
    shares = torch.bincount(together[0], minlength=3) / 40_000
    torch.testing.assert_close(shares, p[0, :, 0], atol=0.01, rtol=0)
    assert torch.equal(draw(p[1:], generators([2]))[0], together[1])
    ends = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])[..., None].expand(-1, -1, 1000)
    assert draw(ends, generators([3, 4])).unique(dim=1).tolist() == [[2], [0]]


def test_noised_labels_follow_their_times() -> None:
    labels = torch.zeros(3, 30_000, dtype=torch.int64)
    noised = draw_noised_labels(SCHEDULE, labels, 3, generators([0, 1, 2]), torch.tensor([1, 500, 1000]))
    for t, x_t in zip(noised.t.tolist(), noised.x_t, strict=True):
        expected = SCHEDULE.value(t) + (1 - SCHEDULE.value(t)) / 3
        assert float((x_t == 0).float().mean()) == pytest.approx(expected, abs=0.01)
    alone = draw_noised_labels(SCHEDULE, labels[:1], 3, generators([0]))
    again = draw_noised_labels(SCHEDULE, labels[:2], 3, generators([0, 5]))
    assert torch.equal(alone.x_t[0], again.x_t[0]) and alone.t[0] == again.t[0]


def test_the_loss_is_the_divergence_and_at_the_first_time_the_likelihood() -> None:
    labels, x_t = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, 1]])
    logits = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0))
    for t in (1, 2, 400, 1000):
        noised = NoisedLabels(labels, torch.tensor([t]), x_t)
        q = posterior(SCHEDULE, one_hot(labels, 3).double(), x_t, t, t - 1)
        p = posterior(SCHEDULE, logits.double().softmax(1), x_t, t, t - 1)
        expected = 1000 * (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(1).mean()
        torch.testing.assert_close(bound_loss(SCHEDULE, logits, noised).double()[0], expected, rtol=1e-5, atol=1e-6)
    first = bound_loss(SCHEDULE, logits, NoisedLabels(labels, torch.tensor([1]), x_t))
    likelihood = 1000 * torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(first[0], likelihood, rtol=1e-4, atol=1e-4)
    perfect = 50 * one_hot(labels, 3)
    assert float(bound_loss(SCHEDULE, perfect, NoisedLabels(labels, torch.tensor([400]), x_t))) < 1e-4


# Two masks of 16 pixels that differ in 8, with chances 0.3 and 0.7.
MASKS = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4 + [1] * 4, [0] * 4 + [1] * 4 + [1] * 4 + [0] * 4])
CHANCES = torch.tensor([0.3, 0.7])


def exact(x: Tensor, t: Tensor) -> Tensor:
    """Probabilities of x_0 (B, 2, 16) given x_t, where it is one of the two masks."""
    kept = SCHEDULE.value(int(t[0]))
    same = kept + (1 - kept) / 2
    agree = (x[:, None] == MASKS[None]).sum(2).double()
    logs = agree * torch.tensor(same, dtype=torch.float64).log() + (16 - agree) * torch.tensor(1 - same).double().log()
    weights = (logs + CHANCES.double().log()).softmax(1)
    return torch.einsum("bm,mkp->bkp", weights, one_hot(MASKS, 2).double())


@pytest.mark.parametrize(("steps", "share", "tolerance"), [(5, 0.229, 0.02), (20, 0.283, 0.02), (50, 0.291, 0.02)])
def test_samples_of_an_exact_denoiser_are_the_masks_in_their_shares(steps: int, share: float, tolerance: float) -> None:
    """Shares of mask 1 as they were computed independently; a few steps favour the likelier mask."""
    count = 4000
    own = generators(range(count))
    x = uniform_labels(2, (16,), own)
    samples = sample_categorical(exact, SCHEDULE, x, spaced(SCHEDULE, steps, "trailing"), own).argmax(1)
    first, second = ((samples == mask).all(1).double().mean().item() for mask in MASKS)
    assert first == pytest.approx(share, abs=tolerance)
    assert first + second > (0.95 if steps == 5 else 0.999)


def test_one_step_gives_the_likelier_mask_alone() -> None:
    own = generators(range(50))
    samples = sample_categorical(exact, SCHEDULE, uniform_labels(2, (16,), own), [1000, 0], own).argmax(1)
    assert (samples == MASKS[1]).all()


def test_times_that_do_not_decrease_to_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="decrease to 0"):
        sample_categorical(exact, SCHEDULE, torch.zeros(1, 16, dtype=torch.int64), [500, 700, 0], generators([0]))


def test_the_gaussian_noise_of_labels_has_their_mean_and_variance() -> None:
    labels = torch.ones(2, 40_000, dtype=torch.int64)
    noised = draw_noised_labels(SCHEDULE, labels, 2, generators([0, 1]), torch.tensor([500, 500])).x_t
    signed = 2 * noised.double() - 1
    snr = float(label_noise(SCHEDULE).snr(500))
    assert float(signed.mean() ** 2 / signed.var()) == pytest.approx(snr, rel=0.05)

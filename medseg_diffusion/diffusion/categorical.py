"""Categorical diffusion: labels that are resampled uniformly, more and more of them (Hoogeboom et al. 2021).

(arXiv 2102.05379, "multinomial diffusion"; for segmentation Zbinden et al. 2023, arXiv 2303.08888.) K classes, x_0 one
of them at every position. For any s < t, with a = alpha_bar_t / alpha_bar_s:

    q(x_t | x_0) = Cat(alpha_bar_t x_0 + (1 - alpha_bar_t) / K)
    q(x_t | x_s) = Cat(a x_s + (1 - a) / K)

A model predicts the probabilities p of the classes of x_0. The step to s sums the posterior over x_0 (Austin et al.
2021, arXiv 2107.03006, eq. 4); with Z_i = q(x_t | x_0 = i):

    p(x_s = k | x_t) ~ [a x_t + (1 - a) / K]_k  {alpha_bar_s p_k / Z_k + (1 - alpha_bar_s) / K  sum_i p_i / Z_i}

Putting p in place of x_0 in the posterior instead, as Hoogeboom et al. do, leaves one sample in a hundred that is no
mask of the data, however many steps are taken (`tests/diffusion/test_categorical.py`).

Labels are (B, *S) int64, probabilities (B, K, *S). ``alpha_bar`` is that of a `NoiseSchedule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import uniform_times
from .schedule import NoiseSchedule, expand, precise, sent


@dataclass(frozen=True, eq=False)
class NoisedLabels:
    """Labels and their noised versions.

    Attributes:
        x0: (B, *S) int64 labels.
        t: (B,) int64, the time of each element, 1..T.
        x_t: (B, *S) int64 noised labels.
    """

    x0: Tensor
    t: Tensor
    x_t: Tensor


def label_noise(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule of Gaussian noise that hides a mask of two values as much as ``schedule`` hides two classes.

    As -1 and 1, noised labels have the mean alpha_bar x_0 and the variance 1 - alpha_bar^2.
    """
    return NoiseSchedule(schedule.alpha_bar.square())


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B, *S) as float32 one-hot (B, K, *S)."""
    # Not torch's one_hot: on the CPU it reads the largest label first.
    classes = torch.arange(num_classes, device=labels.device).reshape(-1, *[1] * (labels.ndim - 1))
    return (labels[:, None] == classes).float()


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Labels (B, *S) drawn from probabilities (B, K, *S), each element by its own CPU generator."""
    shape = probabilities.shape[2:]
    uniform = sent(torch.stack([torch.rand(*shape, generator=g) for g in generators]), probabilities.device)
    # By the inverse of the distribution function. Rounding may leave its last value below a draw.
    above = uniform[:, None] >= probabilities.float().cumsum(1)
    return above.sum(1).clamp(max=probabilities.shape[1] - 1)


def uniform_labels(num_classes: int, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Labels (B, *shape) of pure noise, each element from its own CPU generator."""
    return torch.stack([torch.randint(num_classes, tuple(shape), generator=g) for g in generators])


def noised_probabilities(schedule: NoiseSchedule, x0: Tensor, t: Tensor | int) -> Tensor:
    """q(x_t | x_0), (B, K, *S), of one-hot labels or probabilities ``x0`` (B, K, *S)."""
    alpha_bar = expand(schedule.at(t), x0)
    return alpha_bar * x0 + (1 - alpha_bar) / x0.shape[1]


def draw_noised_labels(
    schedule: NoiseSchedule,
    labels: Tensor,
    num_classes: int,
    generators: Sequence[torch.Generator],
    t: Tensor | None = None,
) -> NoisedLabels:
    """Noises labels (B, *S), each element with draws from its own generator: first its time, then its labels.

    ``t`` (B,) are times that were drawn before; None draws them uniformly in 1..T.
    """
    if t is None:
        t = uniform_times(schedule.num_steps, generators)
    t = sent(t, labels.device)
    x_t = draw(noised_probabilities(schedule, one_hot(labels, num_classes), t), generators)
    return NoisedLabels(labels, t, x_t)


def posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
    """p(x_s | x_t), (B, K, *S), where x_0 has the probabilities ``x0`` (B, K, *S) given x_t; s < t.

    With one-hot ``x0`` this is q(x_s | x_t, x_0).

    Args:
        schedule: the schedule.
        x0: probabilities of the classes of x_0.
        x_t: (B, *S) labels at time t.
        t: (B,) or one int.
        s: (B,) or one int, below t; 0 gives ``x0`` back.
    """
    count = x0.shape[1]
    at_t, at_s = schedule.at(t), schedule.at(s)
    step, late, early = (expand(value, x0) for value in (at_t / at_s, at_t, at_s))
    now = one_hot(x_t, count).to(x0)
    evidence = late * now + (1 - late) / count  # Z: symmetric in x_t and x_0
    weighted = x0 / evidence
    mixed = early * weighted + (1 - early) / count * weighted.sum(1, keepdim=True)
    unnormalised = (step * now + (1 - step) / count) * mixed
    return unnormalised / unnormalised.sum(1, keepdim=True)


def bound_loss(schedule: NoiseSchedule, logits: Tensor, noised: NoisedLabels) -> Tensor:
    """T times the term at t of the variational bound, in nats per position, (B,): the mean over t is the whole bound.

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) with s = t - 1. At t = 1 it is the negative log-likelihood of x_0.

    Args:
        schedule: the schedule.
        logits: (B, K, *S) of the classes of x_0, predicted from ``noised.x_t``.
        noised: the labels.
    """
    # In float64: from t to t - 1 both posteriors are nearly the same, and float32 leaves noise of their difference.
    dtype = precise(logits.device)
    true = one_hot(noised.x0, logits.shape[1]).to(dtype)
    before = noised.t - 1
    target = posterior(schedule, true, noised.x_t, noised.t, before)
    predicted = posterior(schedule, logits.to(dtype).softmax(1), noised.x_t, noised.t, before)
    smallest = torch.finfo(predicted.dtype).tiny
    divergence: Tensor = torch.special.xlogy(target, target) - target * predicted.clamp(min=smallest).log()
    return schedule.num_steps * divergence.sum(1).flatten(1).mean(1).to(logits.dtype)

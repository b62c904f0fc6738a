"""Guidance towards a condition, as wrappers around a denoiser.

A wrapper changes only the prediction, so that a guided denoiser works with every sampler. Guidance works on unclipped
predictions: `Clipped` goes around it, not inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .denoiser import Condition, Denoiser
from .prediction import Prediction, read_output
from .schedule import NoiseSchedule, sent

Classifier = Callable[[Tensor, Tensor], Tensor]
"""A classifier of noisy inputs: (x_t (B, C, *S), timesteps (B,) in 0..T-1) -> logits (B, K)."""


@dataclass(frozen=True, eq=False)
class ClassifierGradient:
    """The gradient of log p(label | x_t) with respect to x_t, times ``scale``: (B, C, *S).

    Attributes:
        classifier: trained on noisy inputs of the same schedule.
        labels: (B,) int64, the class towards which each element is guided.
        scale: s of Dhariwal & Nichol 2021; 0 means no guidance.
    """

    classifier: Classifier
    labels: Tensor
    scale: float = 1.0

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            log_p = self.classifier(x, t - 1).float().log_softmax(dim=1)
            log_likelihood = log_p.gather(1, self.labels.to(log_p.device)[:, None]).sum()
            (gradient,) = torch.autograd.grad(log_likelihood, x)
        return self.scale * gradient


@dataclass(frozen=True, eq=False)
class FixedCondition:
    """A denoiser that always uses ``cond``, each entry (1, ...), and ignores the condition that it is called with."""

    denoiser: Denoiser
    cond: Condition

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        own = {name: value.to(x_t.device).expand(len(x_t), *value.shape[1:]) for name, value in self.cond.items()}
        return self.denoiser(x_t, t, own)


@dataclass(frozen=True, eq=False)
class ClassifierGuided:
    """eps - sigma_t g, with x0 recomputed to match (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2).

    It shifts the score, so it works with every sampler. Algorithm 1 shifts the mean of ancestral sampling instead; it
    is an option of `medseg_diffusion.sampling.ddpm.DDPM`. The two agree as steps become small.

    Raises:
        ValueError: the schedule ends in pure noise: x_T then has no x0 for its eps (`NoiseSchedule.ends_in_noise`).
    """

    denoiser: Denoiser
    gradient: ClassifierGradient

    def __post_init__(self) -> None:
        if self.schedule.ends_in_noise:
            raise ValueError("classifier guidance changes eps, which gives no x0 where this schedule is pure noise")

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        prediction = self.denoiser(x_t, t, cond)
        if self.gradient.scale == 0:
            return prediction
        alpha, sigma = self.schedule.scales(t, x_t)
        x0, eps = read_output("eps", prediction.eps - sigma * self.gradient(x_t, t), x_t, alpha, sigma)
        return replace(prediction, x0=x0, eps=eps, logits=None)


@dataclass(frozen=True, eq=False)
class ClassifierFreeGuided:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    prediction_null + scale (prediction_cond - prediction_null), both from one batched call. The learned variance is
    that of the conditional model.

    Attributes:
        denoiser: trained with its condition dropped at random (`dropped`).
        null: entries that mean "no condition", each (1, ...) or (B, ...), by the names of those that they replace. The
            other entries of the condition stay.
        scale: 1 is the plain conditional model, 0 the unconditional one.
    """

    denoiser: Denoiser
    null: Mapping[str, Tensor]
    scale: float = 1.0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        if self.scale == 1:
            return self.denoiser(x_t, t, cond)
        cond = dict(cond or {})
        if unknown := sorted(set(self.null) - set(cond)):
            raise ValueError(f"the condition has no {unknown} to be dropped, only {sorted(cond)}")
        without = {
            name: self.null[name].to(value).expand_as(value) for name, value in cond.items() if name in self.null
        }
        both = {name: torch.cat([value, without.get(name, value)]) for name, value in cond.items()}
        prediction = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        x0, eps = (null + self.scale * (own - null) for own, null in (prediction.x0.chunk(2), prediction.eps.chunk(2)))
        var_weight = None if prediction.var_weight is None else prediction.var_weight.chunk(2)[0]
        return Prediction(x0, eps, var_weight)


def dropped(
    cond: Condition, null: Mapping[str, Tensor], probability: float, generators: Sequence[torch.Generator]
) -> Condition:
    """Drops the condition of each element of a training batch with ``probability``.

    Entries named in ``null`` (see `ClassifierFreeGuided`) are replaced by it, all of an element's or none. Each element
    draws from its own generator.
    """
    lost = torch.stack([torch.rand((), generator=g) < probability for g in generators])
    result = dict(cond)
    for name, nothing in null.items():
        value = cond[name]
        mask = sent(lost, value.device).reshape(-1, *[1] * (value.ndim - 1))
        result[name] = torch.where(mask, nothing.to(value).expand_as(value), value)
    return result

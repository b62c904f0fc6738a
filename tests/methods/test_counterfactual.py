"""Counterfactuals against closed forms: for Gaussian data every walk is an affine map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Denoiser, GaussianDenoiser
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.methods.counterfactual import ClassifierCounterfactual, FreeCounterfactual
from tests.helpers.diffusion import LINEAR, normal
from tests.helpers.gaussian_walks import (
    HEALTHY,
    LABEL,
    LESION,
    MEAN,
    NORMAL,
    NULL,
    STD,
    Classes,
    Spy,
    classifier,
    kept_share,
    walked,
)


class Mixture:
    """The exact denoiser of images of one voxel, half of which are healthy."""

    schedule = LINEAR

    def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
        shares = classifier(x_t, t - 1).softmax(1).reshape(len(x_t), 2, *[1] * (x_t.ndim - 1)).unbind(1)
        parts = [GaussianDenoiser(LINEAR, mean, STD)(x_t, t) for mean in (HEALTHY, LESION)]
        x0 = sum((share * part.x0 for share, part in zip(shares, parts, strict=True)), torch.zeros_like(x_t))
        eps = sum((share * part.eps for share, part in zip(shares, parts, strict=True)), torch.zeros_like(x_t))
        return Prediction(x0, eps)


def unguided(denoiser: Denoiser, **options: int) -> list[ClassifierCounterfactual | FreeCounterfactual]:
    return [
        ClassifierCounterfactual(denoiser, classifier, scale=0.0, **options),
        FreeCounterfactual(denoiser, LABEL, NULL, guidance=0.0, **options),
    ]


class Null:
    """The exact denoiser of N(MEAN, STD^2) where no condition is given, and of the classes where one is."""

    schedule = LINEAR

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
        return NORMAL(x_t, t) if cond is None else Classes()(x_t, t, cond)


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 2, 2, 2)])
def test_without_guidance_the_way_back_visits_the_times_of_the_way_there(shape) -> None:
    x = MEAN + STD * normal(8, 2, *shape)
    for detector in unguided(Spy(Null()), start=400, steps=20):
        times = detector.times
        assert times[0] == 400 and times[-1] == 1 and len(times) == 21
        spy = detector.denoiser
        assert isinstance(spy, Spy)
        spy.times.clear()
        found = detector.healthy(x, [0, 0])
        assert spy.times == [*times[:0:-1], *times[:-1]]
        slope, offset = walked([*times[::-1], *times[1:]], MEAN, STD)
        torch.testing.assert_close(found, slope * x + offset, rtol=0, atol=1e-9)


def test_without_guidance_the_error_is_the_computed_one_and_halves_when_steps_double() -> None:
    """For an image two standard deviations away: below 3 % of that distance with 100 steps, and nothing at the mean."""
    x = torch.tensor([MEAN, MEAN + 2 * STD], dtype=torch.float64).reshape(2, 1, 1, 1)
    errors: list[float] = []
    for steps in (25, 50, 100):
        for detector in unguided(Null(), start=250, steps=steps):
            at_mean, error = (detector.healthy(x, [0, 0]) - x).abs().flatten().tolist()
            assert at_mean < 1e-6
        errors.append(error / (2 * STD))
        slope, offset = walked([*detector.times[::-1], *detector.times[1:]], MEAN, STD)
        far = MEAN + 2 * STD
        assert errors[-1] == pytest.approx((far - slope * far - offset) / (2 * STD), abs=1e-9)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3) and errors[1] / errors[2] == pytest.approx(2, abs=0.3)
    assert errors[2] < 0.03


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_free_guidance_moves_towards_the_healthy_mean_by_the_closed_form(guidance) -> None:
    """Predictions are affine in the mean: strength w decodes with the mean null + w (healthy - null).

    With infinitely many steps every image moves by w (1 - kept share) (healthy - null).
    """
    x = MEAN + 0.5 * STD * normal(9, 5, 1, 1, 1)
    decoded_mean = MEAN + guidance * (HEALTHY - MEAN)
    wanted = x + (1 - kept_share(250, STD)) * (decoded_mean - MEAN)
    errors = []
    for steps in (25, 100):
        detector = FreeCounterfactual(Classes(), LABEL, NULL, start=250, steps=steps, guidance=guidance)
        up, up_offset = walked(detector.times[::-1], MEAN, STD)
        down, down_offset = walked(detector.times, decoded_mean, STD)
        found = detector.healthy(x, range(5))
        exact = (down * (up * x + up_offset) + down_offset).clamp(-1, 1)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
        errors.append(float((found - wanted.clamp(-1, 1)).abs().max()))
    assert errors[1] < 0.5 * errors[0] + 1e-9 and errors[1] < 0.03


def mixture_up(x: float, times: Sequence[int]) -> float:
    """Deterministic DDIM steps with E[x0 | x_t] of the two classes, by Bayes."""
    for t, s in pairwise(times):
        ab_t, ab_s = float(LINEAR.alpha_bar[t]), float(LINEAR.alpha_bar[s])
        variance = ab_t * STD**2 + 1 - ab_t
        density = [math.exp(-((x - math.sqrt(ab_t) * m) ** 2) / (2 * variance)) for m in (HEALTHY, LESION)]
        means = [m + math.sqrt(ab_t) * STD**2 / variance * (x - math.sqrt(ab_t) * m) for m in (HEALTHY, LESION)]
        x0 = sum(d * m for d, m in zip(density, means, strict=True)) / sum(density)
        x = math.sqrt(ab_s) * x0 + math.sqrt(1 - ab_s) * (x - math.sqrt(ab_t) * x0) / math.sqrt(1 - ab_t)
    return x


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 1, 1)])
def test_the_exact_classifiers_gradient_decodes_with_the_healthy_class(shape) -> None:
    """Scale 1 turns the mixture's score into that of the healthy class: up by the mixture, down by the class."""
    x = torch.linspace(-0.8, 0.8, 9, dtype=torch.float64).reshape(-1, *shape)
    detector = ClassifierCounterfactual(Mixture(), classifier, healthy_class=0, start=500, steps=20, scale=1.0)
    slope, offset = walked(detector.times, HEALTHY, STD)
    wanted = [slope * mixture_up(float(value), detector.times[::-1]) + offset for value in x.flatten()]
    torch.testing.assert_close(detector.healthy(x, range(9)).flatten(), torch.tensor(wanted).double())


def test_the_classifier_leaves_healthy_images_and_moves_lesions_to_the_healthy_mean() -> None:
    drawn = STD * normal(10, 400, 1, 1, 1)
    detector = ClassifierCounterfactual(Mixture(), classifier, start=700, steps=100, scale=1.0)
    healthy, lesions = (detector.healthy((m + drawn).clamp(-1, 1), range(400)) for m in (HEALTHY, LESION))
    assert float(lesions.mean()) == pytest.approx(HEALTHY, abs=STD)
    assert float((lesions < 0).double().mean()) > 0.95
    scores = [detector.score((m + drawn).clamp(-1, 1), range(400)).mean() for m in (HEALTHY, LESION)]
    assert float(scores[1]) > 4 * float(scores[0])
    other = ClassifierCounterfactual(Mixture(), classifier, healthy_class=1, start=700, steps=100, scale=1.0)
    assert float(other.healthy((HEALTHY + drawn).clamp(-1, 1), range(400)).mean()) > 0.2
    assert float(healthy.mean()) < HEALTHY + STD


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_gradient_is_scaled(scale) -> None:
    """One step down by hand: eps - sigma scale (gradient of log p(healthy))."""
    x = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    detector = ClassifierCounterfactual(NORMAL, classifier, start=60, steps=1, scale=scale)
    assert detector.times == [60, 1]
    slope, offset = walked([1, 60], MEAN, STD)
    x_t = slope * 0.3 + offset
    ab_t, ab_s = float(LINEAR.alpha_bar[60]), float(LINEAR.alpha_bar[1])
    variance = ab_t * STD**2 + 1 - ab_t
    logit = math.sqrt(ab_t) * (HEALTHY - LESION) / variance * x_t  # the means lie symmetrically around 0
    gradient = (1 - 1 / (1 + math.exp(-logit))) * math.sqrt(ab_t) * (HEALTHY - LESION) / variance
    eps = math.sqrt(1 - ab_t) * (x_t - math.sqrt(ab_t) * MEAN) / variance - math.sqrt(1 - ab_t) * scale * gradient
    x0 = (x_t - math.sqrt(1 - ab_t) * eps) / math.sqrt(ab_t)
    wanted = max(-1.0, math.sqrt(ab_s) * x0 + math.sqrt(1 - ab_s) * eps)
    assert float(detector.healthy(x, [0])) == pytest.approx(wanted, abs=1e-6)


def test_the_result_stays_in_the_range_of_images() -> None:
    x = MEAN + STD * normal(11, 3, 1, 2, 2)
    strong: list[ClassifierCounterfactual | FreeCounterfactual] = [
        ClassifierCounterfactual(NORMAL, classifier, scale=500.0, steps=10),
        FreeCounterfactual(Classes(), LABEL, NULL, guidance=9.0, steps=10),
    ]
    for detector in strong:
        found = detector.healthy(x, range(3))
        assert float(found.min()) == -1 and float(found.max()) <= 1

"""Guidance by a classifier and without one, dropping of conditions, and starts in between."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Clipped, GaussianDenoiser
from medseg_diffusion.diffusion.guidance import ClassifierFreeGuided, ClassifierGradient, ClassifierGuided, dropped
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.heun import Heun
from medseg_diffusion.sampling.loop import sample, spaced
from tests.helpers.diffusion import FLOW, LINEAR, normal
from tests.helpers.samplers import predict_once

MEANS = torch.tensor([-0.6, 0.4], dtype=torch.float64)
STD = 0.3
SAMPLERS = {"ddpm": DDPM(), "ddim": DDIM(), "ddim eta 1": DDIM(1.0), "dpm++": DPMSolver(), "heun": Heun()}


class TwoClasses:
    """The exact denoiser of two Gaussian classes; the label 2 stands for "either", whose mean is ``either``."""

    def __init__(self, either: float = 0.0) -> None:
        self.means = torch.cat([MEANS, torch.tensor([either], dtype=torch.float64)])
        self.calls = 0

    @property
    def schedule(self) -> NoiseSchedule:
        return LINEAR

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
        self.calls += 1
        assert cond is not None
        mean = self.means[cond["label"]].reshape(-1, *[1] * (x_t.ndim - 1))
        return GaussianDenoiser(LINEAR, mean, STD)(x_t, t)


def classifier(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """log p(y | x_t) of the mean of two classes of one pixel, exactly, up to a constant of x_t."""
    alpha, sigma = LINEAR.scales(timesteps + 1, x_t)
    variance = (alpha * STD) ** 2 + sigma**2
    return torch.cat([-((x_t - alpha * mean) ** 2) / (2 * variance) for mean in MEANS], dim=1).flatten(1)


# ---- classifier guidance ---------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_log_probability() -> None:
    x_t, labels = normal(1, 4, 1, 1, 1), torch.tensor([0, 1, 1, 0])
    gradient = ClassifierGradient(classifier, labels, scale=2.5)(x_t, torch.tensor([100, 400, 800, 1000]))
    small = 1e-5
    for i, t in enumerate((100, 400, 800, 1000)):
        ends = [
            classifier(x_t[i : i + 1] + step, torch.tensor([t - 1])).log_softmax(1)[0, labels[i]]
            for step in (small, -small)
        ]
        assert float(gradient[i]) == pytest.approx(2.5 * float(ends[0] - ends[1]) / (2 * small), rel=1e-5, abs=1e-7)
    assert not gradient.requires_grad


def test_the_guided_mixture_is_the_wanted_class() -> None:
    """score(x | y) = score(x) + grad log p(y | x): with scale 1 the exact mixture's denoiser becomes the class's."""

    class Mixture:
        schedule = LINEAR

        def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
            weights = classifier(x_t, t - 1).softmax(1)
            parts = [GaussianDenoiser(LINEAR, float(mean), STD)(x_t, t) for mean in MEANS]
            weighted = [
                sum(w.reshape(-1, 1, 1, 1) * getattr(part, name) for w, part in zip(weights.T, parts, strict=True))
                for name in ("x0", "eps")
            ]
            return Prediction(*weighted)

    x_t, t = normal(2, 50, 1, 1, 1), torch.full((50,), 300)
    guided = ClassifierGuided(Mixture(), ClassifierGradient(classifier, torch.ones(50, dtype=torch.int64)))
    expected = GaussianDenoiser(LINEAR, float(MEANS[1]), STD)(x_t, t)
    found = guided(x_t, t)
    torch.testing.assert_close(found.eps, expected.eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_scale_0_is_no_guidance_for_any_sampler(name) -> None:
    plain = GaussianDenoiser(LINEAR, 0.1, 0.5)
    guided = ClassifierGuided(plain, ClassifierGradient(classifier, torch.ones(3, dtype=torch.int64), scale=0.0))
    x, times = normal(3, 3, 1, 1, 1), spaced(LINEAR, 10)
    a, b = (sample(d, SAMPLERS[name], x, times, generators=generators([1, 2, 3])) for d in (plain, guided))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_guidance_pulls_towards_the_class_with_any_sampler(name) -> None:
    plain = GaussianDenoiser(LINEAR, -0.1, 0.6)
    x, times, count = normal(4, 64, 1, 1, 1), spaced(LINEAR, 30), 64
    means = []
    for label in (0, 1):
        labels = torch.full((count,), label)
        guided = ClassifierGuided(plain, ClassifierGradient(classifier, labels, 2.0))
        means.append(float(sample(guided, SAMPLERS[name], x, times, generators=generators(range(count))).mean()))
    assert means[0] < -0.3 and means[1] > 0.2


def test_ancestral_guidance_shifts_the_mean_by_the_variance_times_the_gradient() -> None:
    """Dhariwal & Nichol 2021, algorithm 1."""
    x_t, labels = normal(5, 2, 1, 1, 1), torch.tensor([0, 1])
    prediction = GaussianDenoiser(LINEAR, 0.0, 1.0)(x_t, torch.tensor([500, 500]))
    gradient = ClassifierGradient(classifier, labels, 3.0)
    zero = lambda: torch.zeros_like(x_t)  # noqa: E731
    plain = DDPM().begin(predict_once)(LINEAR, prediction, x_t, 500, 480, zero)
    guided = DDPM(gradient=gradient).begin(predict_once)(LINEAR, prediction, x_t, 500, 480, zero)
    ab_t, ab_s = LINEAR.alpha_bar[500], LINEAR.alpha_bar[480]
    variance = (1 - ab_s) * (1 - ab_t / ab_s) / (1 - ab_t)
    torch.testing.assert_close(guided - plain, variance * gradient(x_t, torch.tensor([500, 500])))


def test_both_algorithms_of_classifier_guidance_agree_for_small_steps() -> None:
    denoiser, labels = GaussianDenoiser(LINEAR, -0.1, 0.6), torch.ones(200, dtype=torch.int64)
    x, times = normal(6, 200, 1, 1, 1), spaced(LINEAR, 1000, "trailing")
    gradient = ClassifierGradient(classifier, labels)
    seeds = range(200)
    shifted_mean = sample(denoiser, DDPM("beta", gradient), x, times, generators=generators(seeds))
    shifted_score = sample(ClassifierGuided(denoiser, gradient), DDPM("beta"), x, times, generators=generators(seeds))
    torch.testing.assert_close(shifted_mean, shifted_score, rtol=0, atol=0.02)
    assert float(shifted_mean.mean()) > 0.2


# ---- classifier-free guidance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_scale_1_is_the_conditional_model_for_any_sampler(name) -> None:
    denoiser, cond = TwoClasses(), {"label": torch.tensor([0, 1, 0])}
    x, times = normal(7, 3, 1, 2, 2), spaced(LINEAR, 10)
    free = ClassifierFreeGuided(denoiser, {"label": torch.tensor([2])}, 1.0)
    a, b = (sample(d, SAMPLERS[name], x, times, cond, generators=generators([1, 2, 3])) for d in (denoiser, free))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_free_guidance_extrapolates_from_the_unconditional_prediction_in_one_call(scale) -> None:
    denoiser, x_t, t = TwoClasses(), normal(8, 2, 1, 3, 3, 3), torch.tensor([300, 700])
    cond, null = {"label": torch.tensor([1, 0])}, {"label": torch.tensor([2])}
    own, without = denoiser(x_t, t, cond), denoiser(x_t, t, {"label": torch.tensor([2, 2])})
    denoiser.calls = 0
    found = ClassifierFreeGuided(denoiser, null, scale)(x_t, t, cond)
    assert denoiser.calls == 1
    torch.testing.assert_close(found.eps, without.eps + scale * (own.eps - without.eps))
    alpha, sigma = LINEAR.scales(t, x_t)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x_t)


def test_entries_without_a_null_stay_in_both_halves() -> None:
    seen: list[Mapping[str, Tensor]] = []

    class Spy(TwoClasses):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
            assert cond is not None
            seen.append(cond)
            return super().__call__(x_t, t, cond)

    image = normal(9, 2, 3, 4, 4)
    cond = {"label": torch.tensor([0, 1]), "concat": image}
    ClassifierFreeGuided(Spy(), {"label": torch.tensor([2])}, 2.0)(normal(10, 2, 1, 4, 4), torch.tensor([5, 6]), cond)
    assert seen[0]["label"].tolist() == [0, 1, 2, 2]
    torch.testing.assert_close(seen[0]["concat"], torch.cat([image, image]))


def test_a_null_for_something_that_conditions_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no \['context'\] to be dropped, only \['label'\]"):
        ClassifierFreeGuided(TwoClasses(), {"context": torch.zeros(1)}, 2.0)(
            normal(0, 1, 1, 2, 2), torch.tensor([5]), {"label": torch.tensor([0])}
        )


def test_guidance_works_on_the_unclipped_prediction() -> None:
    free = ClassifierFreeGuided(TwoClasses(), {"label": torch.tensor([2])}, 9.0)
    x_t, t, cond = normal(11, 4, 1, 3, 3), torch.full((4,), 200), {"label": torch.ones(4, dtype=torch.int64)}
    assert float(free(x_t, t, cond).x0.abs().max()) > 1
    assert float(Clipped(free)(x_t, t, cond).x0.abs().max()) <= 1


def test_conditions_are_dropped_element_by_element_and_together() -> None:
    count = 2000
    cond = {"label": torch.arange(count), "context": torch.ones(count, 2, 3), "concat": torch.ones(count, 1)}
    null = {"label": torch.tensor([-1]), "context": torch.zeros(1, 2, 3)}
    found = dropped(cond, null, 0.2, generators(range(count)))
    lost = found["label"] == -1
    assert 0.16 < float(lost.double().mean()) < 0.24
    assert bool((found["context"][lost] == 0).all()) and bool((found["context"][~lost] == 1).all())
    assert bool((found["label"][~lost] == torch.arange(count)[~lost]).all())
    assert found["concat"] is cond["concat"]
    again = dropped({k: v[7:9] for k, v in cond.items()}, null, 0.2, generators([7, 8]))
    assert (again["label"] == -1).tolist() == lost[7:9].tolist(), "an element's fate is its own generator's"


# ---- inversion and starts in between ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [100, 400])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_start_in_between_keeps_more_of_the_image_the_earlier_it_is(name, start) -> None:
    """SDEdit: noised to ``start`` and sampled from there; the exact denoiser's samples follow the image's posterior."""
    x0 = torch.full((256, 1, 1, 1), 1.5, dtype=torch.float64)
    eps = gaussian(x0.shape[1:], generators(range(256)), like=x0)
    x = LINEAR.add_noise(x0, eps, start)
    times = spaced(LINEAR, 20, "trailing", start)
    assert times[0] == start
    found = sample(GaussianDenoiser(LINEAR, 0.0, 1.0), SAMPLERS[name], x, times, generators=generators(range(500, 756)))
    kept = float(LINEAR.alpha_bar[start].sqrt())
    stochastic = "ddpm" in name or "eta" in name  # fresh noise forgets the image a second time, on the way down
    wanted = 1.5 * (kept**2 if stochastic else kept)
    assert float(found.mean()) == pytest.approx(wanted, abs=0.2)


def test_a_classifier_does_not_guide_where_a_time_is_noise_alone() -> None:
    """A change of eps has no x0 there. Classifier-free guidance combines predictions of x0, which it has."""
    denoiser, gradient = (
        GaussianDenoiser(FLOW, 0.2, 0.5),
        ClassifierGradient(classifier, torch.zeros(2, dtype=torch.int64)),
    )
    with pytest.raises(ValueError, match="classifier guidance changes eps"):
        ClassifierGuided(denoiser, gradient)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_classifier_free_guidance_starts_at_pure_noise(name) -> None:
    """Two classes without spread: with strength s the walk ends at the guided mean, whatever the steps."""

    class Points:
        schedule = FLOW

        def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
            assert cond is not None
            mean = torch.tensor([-0.6, 0.4], dtype=x_t.dtype)[cond["label"]].reshape(-1, 1, 1, 1)
            return GaussianDenoiser(FLOW, mean, 0.0)(x_t, t)

    guided = ClassifierFreeGuided(Points(), {"label": torch.tensor([0])}, 3.0)
    x = gaussian((1, 4, 4), generators([0, 1])).double()
    cond = {"label": torch.tensor([1, 1])}
    out = sample(guided, SAMPLERS[name], x, [1000, 700, 300, 0], cond, generators=generators([2, 3]))
    torch.testing.assert_close(out, torch.full_like(out, -0.6 + 3.0 * 1.0), rtol=0, atol=1e-9)

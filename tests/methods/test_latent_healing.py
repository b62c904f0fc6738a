"""Latent healing against closed forms: what it finds, heals and leaves alone."""

from __future__ import annotations

import pytest
import torch

from medseg_diffusion.diffusion.denoiser import GaussianDenoiser
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.methods.latent_healing import LatentHealing, Reconstruction, smoothed


class Half:
    """A codec of half the resolution: means of blocks, and back by repetition."""

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        pool = torch.nn.functional.avg_pool2d if image.ndim == 4 else torch.nn.functional.avg_pool3d
        return pool(image, 2)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latent, scale_factor=2, mode="nearest")


def healthy(count: int, dims: int = 2, side: int = 16) -> torch.Tensor:
    """Latents of 0.1 +- 0.2, as the denoiser expects them."""
    g = torch.Generator().manual_seed(0)
    latent = 0.1 + 0.2 * torch.randn(count, 1, *[side // 2] * dims, generator=g)
    return Half().decode(latent)


def fitted(dims: int = 2, **changes: object) -> LatentHealing:
    denoiser = GaussianDenoiser(linear(1000), 0.1, 0.2)
    options: dict[str, object] = {"times": [400, 500, 600], "steps": 10, **changes}
    detector = LatentHealing(denoiser, Half(), **options)  # type: ignore[arg-type]
    images = healthy(40, dims)
    maps = detector.divergence(detector.codec.encode(images), range(40))
    detector.healthy = detector.fit(maps, torch.ones_like(images))
    return detector


@pytest.mark.parametrize("dims", [2, 3])
def test_an_outlier_is_found_and_healed_and_the_rest_is_left_alone(dims) -> None:
    detector = fitted(dims, quantile=0.999)
    image = healthy(41, dims)[40:]
    sick = image.clone()
    sick[(slice(None), slice(None), *[slice(2, 10)] * dims)] = 0.98
    score = detector.score(sick, [5])
    assert score.shape == (1, 1, *[16] * dims)
    lesion = score[(0, 0, *[slice(4, 8)] * dims)]  # its middle: the mask is smoothed
    assert float(lesion.mean()) > 0.3  # 0.98 goes back to where healthy latents are
    far = score[(0, 0, *[slice(12, 16)] * dims)]
    assert float(far.max()) < 0.05
    assert float(detector.score(image, [5]).mean()) < 0.02


def test_divergences_are_standardised_time_by_time() -> None:
    detector = fitted()
    images = healthy(40)
    maps = detector.divergence(detector.codec.encode(images), range(40))
    ratio = maps.mean((0, 2, 3))
    assert float(ratio.max() / ratio.min()) > 1.3  # the KL's own weight changes with time
    z = detector.unlikely(detector.codec.encode(images), range(40))
    assert abs(float(z.mean())) < 1e-3 and 0.3 < float(z.std()) < 1
    assert detector.healthy is not None
    threshold = detector.healthy.threshold(0.975)
    assert float((z > threshold).float().mean()) == pytest.approx(0.025, abs=0.003)


def test_what_is_outside_does_not_count_as_healthy() -> None:
    detector = fitted()
    images = healthy(40)
    images[..., 8:] = 0.9
    inside = torch.zeros_like(images)
    inside[..., :8] = 1
    maps = detector.divergence(detector.codec.encode(images), range(40))
    assert detector.healthy is not None
    half = detector.fit(maps, inside)
    torch.testing.assert_close(half.mean, detector.healthy.mean, rtol=0.2, atol=0)
    assert float(detector.fit(maps, torch.ones_like(images)).mean.mean()) > 1.5 * float(half.mean.mean())


def test_healing_keeps_unmasked_positions_and_depends_on_its_own_seed_alone() -> None:
    detector = fitted()
    images = healthy(3)
    mask = torch.zeros(3, 1, 8, 8)
    mask[:, :, :4] = 1
    latents = Half().encode(images)
    healed = detector.heal(latents, mask, [1, 2, 3])
    torch.testing.assert_close(healed[:, :, 4:], latents[:, :, 4:])
    assert not torch.allclose(healed[:, :, :4], latents[:, :, :4])
    torch.testing.assert_close(detector.heal(latents[1:2], mask[:1], [2]), healed[1:2])
    sampled = detector.heal(Half().encode(healthy(200)), torch.ones(200, 1, 8, 8), range(200))
    # All of it sampled anew from time 500: the denoiser's distribution, a little narrow for few steps of DDIM.
    assert float(sampled.mean()) == pytest.approx(0.1, abs=0.02) and 0.1 < float(sampled.std()) < 0.22


@pytest.mark.parametrize("dims", [2, 3])
def test_a_map_depends_on_its_image_and_seed_alone(dims) -> None:
    detector = fitted(dims)
    images = healthy(5, dims)
    images[1:4, (slice(None), *[slice(2, 8)] * dims)[0]] *= 2  # some are healed and some are not walked at all
    together = detector.score(images, [1, 2, 3, 4, 5])
    touched = together.flatten(1).any(1)
    assert bool(touched.any())
    for i in (4, 1, 0, 3):
        torch.testing.assert_close(detector.score(images[i : i + 1], [i + 1])[0], together[i])
    other = detector.divergence(detector.codec.encode(images[:1]), [9])
    assert not torch.allclose(other, detector.divergence(detector.codec.encode(images[:1]), [1]))


def test_evaluations_are_the_calls_for_each_image() -> None:
    calls = []

    class Counted(GaussianDenoiser):
        def __call__(self, x_t, t, cond=None):
            calls.append(len(x_t))
            return super().__call__(x_t, t, cond)

    detector = LatentHealing(Counted(linear(1000), 0.1, 0.2), Half(), [400, 500, 600], steps=10)
    detector.healthy = fitted().healthy
    image = healthy(1)
    image[..., :4] = 0.98
    detector.score(image, [1])
    assert sum(calls) == detector.evaluations == 13


def test_the_mean_of_several_healings_is_compared_and_none_of_them_is_the_same() -> None:
    """What is left of an outlier's residual by chance falls with the square root of the number of draws."""
    images, spread = healthy(60), {}
    for draws in (1, 4):
        detector = fitted(draws=draws, quantile=0.0)
        kept, healed = detector.healthy_images(detector.codec.encode(images), torch.ones(60, 1, 8, 8), range(60))
        torch.testing.assert_close(kept, images.clamp(-1, 1))
        others = detector.healthy_images(detector.codec.encode(images), torch.ones(60, 1, 8, 8), range(100, 160))[1]
        spread[draws] = float((healed - others).std())
        score = detector.score(images, range(60))
        torch.testing.assert_close(score, (kept - healed).abs())  # nothing is masked out
    assert spread[4] == pytest.approx(spread[1] / 2, rel=0.1)


def test_healing_everything_takes_no_divergence() -> None:
    detector = LatentHealing(
        GaussianDenoiser(linear(1000), 0.1, 0.2), Half(), [400, 500], steps=10, quantile=0.0, draws=3
    )
    assert detector.evaluations == 30
    assert detector.score(healthy(2), [1, 2]).shape == (2, 1, 16, 16)  # without statistics of healthy latents


def test_bad_settings_are_refused() -> None:
    denoiser = GaussianDenoiser(linear(1000))
    with pytest.raises(ValueError, match="at least one healing is needed"):
        LatentHealing(denoiser, Half(), [400], draws=0)
    for changes in ({"steps": 0}, {"start": 1001}, {"start": 5, "steps": 6}):
        with pytest.raises(ValueError, match="needs 1 <= steps <= start <= 1000"):
            LatentHealing(denoiser, Half(), [400], **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fitted with 3 times, used with 1"):
        LatentHealing(denoiser, Half(), [400], healthy=fitted().healthy)


def test_smoothing_keeps_the_sum_inside_and_flat_maps_flat() -> None:
    flat = torch.ones(2, 1, 6, 7)
    torch.testing.assert_close(smoothed(flat, 1.3), flat)
    dot = torch.zeros(1, 1, 15, 15, 15)
    dot[0, 0, 7, 7, 7] = 1
    soft = smoothed(dot, 1.0)
    assert float(soft.sum()) == pytest.approx(1, abs=1e-5) and float(soft.max()) == pytest.approx(0.0640, abs=2e-3)
    assert torch.equal(smoothed(dot, 0.0), dot)


def test_the_baseline_is_what_the_codec_loses() -> None:
    image = healthy(2)
    assert float(Reconstruction(Half()).score(image.clamp(-1, 1), [0, 1]).max()) < 1e-6
    image[0, 0, 3, 3] += 0.4
    assert float(Reconstruction(Half()).score(image, [0, 1])[0, 0, 3, 3]) == pytest.approx(0.3, abs=1e-4)

"""The rival methods of anomaly detection against closed forms: for Gaussian data every walk is an affine map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import Denoiser, GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule, cosine, linear
from medseg_diffusion.methods.counterfactual import ClassifierCounterfactual, FreeCounterfactual
from medseg_diffusion.methods.detector import Detector, residual
from medseg_diffusion.methods.partial_noise import PartialNoise
from medseg_diffusion.methods.patched import Patched
from medseg_diffusion.sampling.loop import spaced, spread
from medseg_diffusion.tasks.patched import Box, PatchedDiffusion, boxes

LINEAR = linear(1000)
MEAN, STD = 0.1, 0.2
HEALTHY, LESION = -0.4, 0.4
"""Means of two classes, both of standard deviation `STD`."""
SHAPES = [(1, 6, 8), (2, 4, 6, 4)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def no_noise(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
    return torch.zeros((len(generators), *shape)).to(like)


class Spy:
    """Notes the inputs of a denoiser."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.inputs: list[Tensor] = []
        self.times: list[int] = []

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
        assert 1 <= int(t.min()) == int(t.max()) <= self.schedule.num_steps
        self.inputs.append(x_t.clone())
        self.times.append(int(t[0]))
        return self.denoiser(x_t, t, cond)


class Classes:
    """The exact denoiser of healthy images (label 0), of lesions (1) and of Gaussian data between them (2)."""

    schedule = LINEAR
    means = torch.tensor([HEALTHY, LESION, MEAN], dtype=torch.float64)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
        assert cond is not None
        mean = self.means[cond["label"]].reshape(-1, *[1] * (x_t.ndim - 1))
        return GaussianDenoiser(LINEAR, mean, STD)(x_t, t)


def classifier(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """log p(x_t | class) of the two classes, up to a constant: the difference of the logits is linear in x_t."""
    alpha, sigma = LINEAR.scales(timesteps + 1, x_t)
    variance = (alpha * STD) ** 2 + sigma**2
    return torch.stack([-((x_t - alpha * m) ** 2 / (2 * variance)).flatten(1).sum(1) for m in (HEALTHY, LESION)], dim=1)


class Mixture:
    """The exact denoiser of images of one voxel, half of which are healthy."""

    schedule = LINEAR

    def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
        shares = classifier(x_t, t - 1).softmax(1).reshape(len(x_t), 2, *[1] * (x_t.ndim - 1)).unbind(1)
        parts = [GaussianDenoiser(LINEAR, mean, STD)(x_t, t) for mean in (HEALTHY, LESION)]
        x0 = sum((share * part.x0 for share, part in zip(shares, parts, strict=True)), torch.zeros_like(x_t))
        eps = sum((share * part.eps for share, part in zip(shares, parts, strict=True)), torch.zeros_like(x_t))
        return Prediction(x0, eps)


class Small(nn.Module):
    """A convolution that knows the time and the class; the same for 2D and 3D."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv = kind(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        shift = timesteps / 1000 + (cond["label"] if cond else 0)
        return torch.sin(self.conv(x) + shift.reshape(-1, *[1] * (x.ndim - 1)))


def small_classifier(x_t: Tensor, timesteps: Tensor) -> Tensor:
    value = (x_t.flatten(1).tanh().mean(1) + timesteps / 1000)[:, None]
    return torch.cat([value, value.square()], dim=1)


def test_a_bright_residual_is_the_positive_part_of_the_difference() -> None:
    image, healthy = normal(1, 2, 3, 5, 5), normal(2, 2, 3, 5, 5)
    bright, dark = residual(image, healthy, "bright"), residual(-image, -healthy, "bright")
    torch.testing.assert_close(bright - dark, (image - healthy).mean(1, keepdim=True))
    torch.testing.assert_close(bright + dark, residual(image, healthy))


LABEL, NULL = {"label": torch.tensor([0])}, {"label": torch.tensor([2])}
MAKERS: dict[str, Callable[[Denoiser, tuple[int, ...]], Detector]] = {
    "partial noise": lambda denoiser, size: PartialNoise(denoiser, gaussian, start=300, steps=6),
    "partial noise, 3 draws": lambda denoiser, size: PartialNoise(denoiser, gaussian, start=300, steps=4, draws=3),
    "patched": lambda denoiser, size: Patched(denoiser, gaussian, size),
    "patched, overlapping": lambda denoiser, size: Patched(denoiser, gaussian, size, time=200, patch=3),
    "patched, 3 draws": lambda denoiser, size: Patched(denoiser, gaussian, size, draws=3),
    "classifier": lambda denoiser, size: ClassifierCounterfactual(denoiser, small_classifier, steps=5, scale=9.0),
    "classifier, scale 0": lambda denoiser, size: ClassifierCounterfactual(
        denoiser, small_classifier, steps=5, scale=0
    ),
    "free": lambda denoiser, size: FreeCounterfactual(denoiser, LABEL, NULL, steps=5),
    "free, strength 1": lambda denoiser, size: FreeCounterfactual(denoiser, LABEL, NULL, steps=5, guidance=1.0),
    "free, strength 0": lambda denoiser, size: FreeCounterfactual(denoiser, LABEL, NULL, steps=5, guidance=0.0),
}
RANDOM = {name for name in MAKERS if name.startswith("pa")}
CALLS = {
    "partial noise": lambda dims: 6,
    "partial noise, 3 draws": lambda dims: 12,
    "patched": lambda dims: 2**dims,
    "patched, overlapping": lambda dims: {2: 2 * 3, 3: 2 * 2 * 2}[dims],
    "patched, 3 draws": lambda dims: 3 * 2**dims,
    "classifier": lambda dims: 10,
    "classifier, scale 0": lambda dims: 10,
    "free": lambda dims: 15,
    "free, strength 1": lambda dims: 10,
    "free, strength 0": lambda dims: 15,
}


def walked(times: Sequence[int], mean: float, std: float) -> tuple[float, float]:
    """Slope and offset of deterministic DDIM steps over ``times`` with the exact denoiser of N(mean, std^2)."""
    slope, offset = 1.0, 0.0
    for t, s in pairwise(times):
        ab_t, ab_s = float(LINEAR.alpha_bar[t]), float(LINEAR.alpha_bar[s])
        total = ab_t * std**2 + 1 - ab_t
        a = (math.sqrt(ab_s * ab_t) * std**2 + math.sqrt((1 - ab_s) * (1 - ab_t))) / total
        b = mean * (math.sqrt(ab_s) * (1 - ab_t) - math.sqrt((1 - ab_s) * (1 - ab_t) * ab_t)) / total
        slope, offset = a * slope, a * offset + b
    return slope, offset


def kept_share(start: int, std: float) -> float:
    """What a walk of infinitely many steps from ``start`` keeps of the distance to the mean, without any noise."""
    ab = float(LINEAR.alpha_bar[start])
    return std * math.sqrt(ab) / math.sqrt(ab * std**2 + 1 - ab)


# ---- what all detectors promise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAKERS)
def test_a_map_depends_on_its_image_and_seed_alone(name, shape) -> None:
    images = 0.5 * normal(0, 3, *shape).float().clamp(-2, 2)
    denoiser = NetworkDenoiser(Small(shape[0], len(shape) - 1), LINEAR, "v")
    detector = MAKERS[name](denoiser, shape[1:])
    maps = detector.score(images, [7, 8, 9])
    assert maps.shape == (3, 1, *shape[1:]) and float(maps.min()) >= 0 and float(maps.std()) > 0
    assert not maps.requires_grad
    for i in (2, 0, 1):
        torch.testing.assert_close(detector.score(images[i : i + 1], [7 + i])[0], maps[i], rtol=0, atol=1e-5)
    torch.testing.assert_close(detector.score(images, [7, 8, 9]), maps, rtol=0, atol=0)
    other = (detector.score(images, [7, 18, 9]) - maps).abs().amax(dim=tuple(range(1, maps.ndim)))
    assert (other > 1e-3).tolist() == [False, name in RANDOM, False], "a seed is that of its image"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAKERS)
def test_evaluations_are_the_calls_for_each_image(name, shape) -> None:
    spy = Spy(NetworkDenoiser(Small(shape[0], len(shape) - 1), LINEAR, "v"))
    detector = MAKERS[name](spy, shape[1:])
    detector.score(torch.zeros(2, *shape), [1, 2])
    assert sum(len(x) for x in spy.inputs) == 2 * detector.evaluations
    assert detector.evaluations == CALLS[name](len(shape) - 1)


NORMAL = GaussianDenoiser(LINEAR, MEAN, STD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PartialNoise(NORMAL, gaussian, start=1001), "steps <= start <= 1000, got 25 steps from 1001"),
        (lambda: PartialNoise(NORMAL, gaussian, start=0), "got 25 steps from 0"),
        (lambda: PartialNoise(NORMAL, gaussian, steps=0), "got 0 steps from 250"),
        (lambda: PartialNoise(NORMAL, gaussian, draws=0), "at least one draw of noise is needed, got 0"),
        (lambda: Patched(NORMAL, gaussian, (8, 8), time=0), r"the time must lie in 1\.\.1000, got 0"),
        (lambda: Patched(NORMAL, gaussian, (8, 8), time=1001), r"the time must lie in 1\.\.1000, got 1001"),
        (lambda: Patched(NORMAL, gaussian, (8, 8), draws=0), "at least one draw of noise is needed, got 0"),
        (lambda: Patched(NORMAL, gaussian, (8, 6), patch=7), r"image of \(8, 6\) must have a side of 1 to 6, got 7"),
        (lambda: Patched(NORMAL, gaussian, (8, 6), patch=0), "must have a side of 1 to 6, got 0"),
        (
            lambda: Patched(NORMAL, gaussian, (8, 6)).score(torch.zeros(1, 1, 6, 8), [0]),
            r"made for images of \(8, 6\), got \(6, 8\)",
        ),
        (
            lambda: ClassifierCounterfactual(NORMAL, classifier, start=1001),
            "steps < start <= 1000, got 50 steps up to 1001",
        ),
        (lambda: ClassifierCounterfactual(NORMAL, classifier, steps=0), "got 0 steps up to 500"),
        (lambda: FreeCounterfactual(NORMAL, LABEL, NULL, start=-1), "got 50 steps up to -1"),
        (lambda: FreeCounterfactual(NORMAL, LABEL, NULL, start=9, steps=9), "got 9 steps up to 9"),
        (lambda: spread(LINEAR, 3, 2), "count <= start <= 1000, got 3 times from 2"),
        (
            lambda: PatchedDiffusion(NetworkDenoiser(nn.Identity(), LINEAR, "eps"), gaussian),
            "a restorer of patches predicts x0, not eps",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# ---- the times -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(start=st.integers(1, 1000), share=st.floats(0, 1), make=st.sampled_from([linear, cosine]))
def test_spread_times_are_as_many_as_asked_for(start, share, make) -> None:
    count = max(1, round(share * start))
    times = spread(make(1000), count, start)
    assert len(times) == count and times[0] == start and times[-1] == (1 if count > 1 else start)
    assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize(("start", "count"), [(1000, 12), (500, 12), (250, 10)])
def test_spread_times_are_the_log_snr_spacing_where_none_coincide(start, count) -> None:
    assert [*spread(LINEAR, count, start), 0] == spaced(LINEAR, count, "log-snr", start)


def test_spread_times_fill_the_clean_end_before_they_leave_the_spacing() -> None:
    times = spread(LINEAR, 51, 250)
    assert times[-6:] == [6, 5, 4, 3, 2, 1]
    lam = LINEAR.half_log_snr()[times[:20]]
    even = (lam[-1] - lam[0]) / 19
    torch.testing.assert_close(lam.diff(), even.expand(19), rtol=0.15, atol=0)


# ---- partial noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [100, 250, 500])
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 2, 2, 2)])
def test_an_outlier_comes_back_by_the_product_of_the_affine_steps(start, shape) -> None:
    x = (MEAN + 0.6 * normal(1, 4, *shape)).clamp(-1, 1)
    detector = PartialNoise(NORMAL, no_noise, start)
    assert detector.times[0] == start and detector.times[-2:] == [1, 0] and len(detector.times) == 26
    slope, offset = walked(detector.times, MEAN, STD)
    expected = slope * math.sqrt(float(LINEAR.alpha_bar[start])) * x + offset
    torch.testing.assert_close(detector.healthy(x, range(4)), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(detector.score(x, range(4)), (x - expected).abs(), rtol=0, atol=1e-9)


def test_less_of_an_outlier_is_kept_the_later_the_start_and_what_is_kept_nears_the_exact_share() -> None:
    x, kept = torch.tensor([MEAN, MEAN + 0.8], dtype=torch.float64).reshape(2, 1, 1, 1), []
    for start in (100, 250, 500):
        errors = []
        for steps in (10, 25, 100):
            mean, outlier = PartialNoise(NORMAL, no_noise, start, steps).healthy(x, [0, 0]).flatten().tolist()
            assert mean == pytest.approx(MEAN, abs=1e-9), "what is as expected stays"
            kept.append((outlier - MEAN) / 0.8)
            errors.append(abs(kept[-1] / kept_share(start, STD) - 1))
        assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert kept[2] > kept[5] > kept[8] > 0


def test_the_expected_healthy_image_is_that_without_noise() -> None:
    """Noise is added with the standard deviation of its time: the spread around the mean follows from the slope."""
    count, value = 4000, MEAN + 0.4
    found = PartialNoise(NORMAL, gaussian).healthy(torch.full((count, 1, 1, 1), value).double(), range(count))
    slope, offset = walked(PartialNoise(NORMAL, gaussian).times, MEAN, STD)
    ab = float(LINEAR.alpha_bar[250])
    std = slope * math.sqrt(1 - ab)
    assert float(found.mean()) == pytest.approx(slope * math.sqrt(ab) * value + offset, abs=5 * std / math.sqrt(count))
    assert float(found.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * count))


def test_the_mean_is_over_the_draws_of_one_image() -> None:
    """Two draws of opposite noise cancel in an affine walk; those of two images would not."""

    def opposite(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
        size = torch.tensor([(-1) ** i * (1 + i // 2) / 10 for i in range(len(generators))])
        return size.reshape(-1, *[1] * len(shape)).expand(-1, *shape).to(like)

    x = MEAN + 0.1 * normal(2, 3, 1, 2, 2)
    wanted = PartialNoise(NORMAL, no_noise).healthy(x, range(3))
    torch.testing.assert_close(PartialNoise(NORMAL, opposite, draws=2).healthy(x, range(3)), wanted)


def test_draws_are_different() -> None:
    x = torch.full((500, 1, 1, 1), MEAN).double()
    for make in (PartialNoise, lambda *given, **more: Patched(*given, (1, 1), **more)):
        one, four = (make(NORMAL, gaussian, draws=n).healthy(x, range(500)).std() for n in (1, 4))
        assert float(one / four) == pytest.approx(2, abs=0.3)


def test_predictions_of_partial_noise_and_patches_are_clipped() -> None:
    far, x = GaussianDenoiser(LINEAR, 3.0, STD), torch.full((1, 1, 4, 4), 0.9).double()
    for detector in (PartialNoise(far, no_noise), Patched(far, no_noise, (4, 4))):
        torch.testing.assert_close(detector.healthy(x, [0]), torch.ones_like(x), rtol=0, atol=0)


# ---- patches ---------------------------------------------------------------------------------------------------------


def extent(box: Box) -> list[tuple[int, int]]:
    return [(axis.start, axis.stop) for axis in box]


def test_half_of_each_side_gives_4_patches_in_2d_and_8_in_3d() -> None:
    assert [extent(box) for box in boxes((4, 6))] == [
        [(0, 2), (0, 3)],
        [(0, 2), (3, 6)],
        [(2, 4), (0, 3)],
        [(2, 4), (3, 6)],
    ]
    assert len(boxes((4, 4, 4))) == 8
    assert [extent(box) for box in boxes((5, 1))] == [[(0, 3), (0, 1)], [(2, 5), (0, 1)]]
    assert [extent(box)[0] for box in boxes((10, 4), 4)] == [(0, 4), (4, 8), (6, 10)]


@settings(deadline=None, max_examples=80)
@given(size=st.lists(st.integers(1, 9), min_size=2, max_size=3), patch=st.none() | st.integers(1, 9))
def test_patches_are_of_one_size_and_cover_the_image(size, patch) -> None:
    if patch is not None and patch > min(size):
        return
    grid = boxes(size, patch)
    count = torch.zeros(size)
    for box in grid:
        assert list(count[box].shape) == [(n + 1) // 2 if patch is None else patch for n in size]
        count[box] += 1
    assert float(count.min()) == 1
    if all(n % 2 == 0 if patch is None else n % patch == 0 for n in size):
        assert float(count.max()) == 1


@settings(deadline=None, max_examples=40)
@given(size=st.lists(st.integers(2, 7), min_size=2, max_size=3), patch=st.sampled_from([None, 1, 2]))
def test_every_voxel_is_taken_from_one_patch_that_holds_it(size, patch) -> None:
    """A denoiser that answers with the number of the patch; where patches overlap, the last one is shown."""

    class Numbers:
        schedule = LINEAR

        def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
            number = torch.arange(len(x_t)) // 2  # 2 images
            x0 = number.reshape(-1, *[1] * len(size), 1).expand_as(x_t).to(x_t) / 1000
            return Prediction(x0, x0)

    found = Patched(Numbers(), no_noise, size, patch=patch).healthy(torch.full((2, 2, *size), torch.nan), [0, 0])
    wanted = torch.empty(size)
    for i, box in enumerate(boxes(size, patch)):
        wanted[box] = i / 1000
    torch.testing.assert_close(found, wanted.expand_as(found))


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_patch_is_noised_when_it_is_restored(shape) -> None:
    images, spy = 0.3 * normal(3, 2, *shape), Spy(NORMAL)
    eps = normal(4, 2, *shape)
    detector = Patched(spy, lambda size, own, like=None: eps, shape[1:], time=400)
    found = detector.healthy(images, [0, 1])
    alpha, sigma = (float(value) for value in LINEAR.scales(400, images))
    (seen,) = spy.inputs
    for x, box in zip(seen.unflatten(0, (-1, 2)), boxes(shape[1:]), strict=True):
        place = (slice(None), slice(None), *box)
        torch.testing.assert_close(x[place], (alpha * images + sigma * eps)[place])
        x[place] = images[place]
        assert torch.equal(x, images)
    # The exact denoiser looks at no neighbour: regression of x0 on x_t, voxel by voxel.
    x_t = alpha * images + sigma * eps
    wanted = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
    torch.testing.assert_close(found, wanted)


class Given(nn.Module):
    """Answers with its parameter whatever it sees, and notes what that is."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        self.seen, self.timesteps = x, timesteps
        return self.answer


@pytest.mark.parametrize(("shape", "patch"), [((1, 6, 8), None), ((1, 4, 6, 4), None), ((2, 5, 7), 3)])
def test_training_looks_at_the_noised_patch_alone(shape, patch) -> None:
    images, network = 0.3 * normal(5, 6, *shape), Given(normal(6, 6, *shape))
    task = PatchedDiffusion(
        NetworkDenoiser(network, LINEAR, "x0"), lambda size, own, like=None: torch.full_like(like, 2.0), patch
    )
    assert task.network is network
    loss = task({"image": images, "seed": torch.arange(6)})
    loss.backward()

    changed = network.seen != images
    for mask in changed.all(dim=1):
        where = mask.nonzero()
        box = tuple(slice(int(a), int(b) + 1) for a, b in zip(where.amin(0), where.amax(0), strict=True))
        assert box in boxes(shape[1:], patch) and bool(mask[box].all()), "a patch of the grid, all of it"
    assert torch.equal(changed.all(dim=1), changed.any(dim=1)), "all channels"
    alpha, sigma = LINEAR.scales(network.timesteps + 1, images)
    torch.testing.assert_close(network.seen[changed], (alpha * images + 2 * sigma)[changed])
    torch.testing.assert_close(loss, (network.answer - images).abs()[changed].mean())
    grad = network.answer.grad
    assert grad is not None and torch.equal(grad != 0, changed)


def test_patch_time_and_noise_are_those_of_the_examples_seed() -> None:
    images = 0.3 * normal(7, 40, 1, 4, 4)
    network = Given(torch.zeros(1, 1, 4, 4).double())
    task = PatchedDiffusion(NetworkDenoiser(network, LINEAR, "x0"), gaussian)
    seeds = torch.arange(40)
    loss, seen, times = task({"image": images, "seed": seeds}), network.seen, network.timesteps
    singles = []
    for i in (39, 3, 12):
        singles.append(task({"image": images[i : i + 1], "seed": seeds[i : i + 1]}))
        torch.testing.assert_close(network.seen[0], seen[i], rtol=0, atol=0)
        assert int(network.timesteps) == int(times[i])
    assert len({value.item() for value in singles}) == 3
    assert task({"image": images, "seed": seeds}).item() == loss.item()
    changed = (seen != images).flatten(1)
    patterns, counts = torch.unique(changed, dim=0, return_counts=True)
    assert len(patterns) == 4 and int(counts.min()) >= 3, "all patches have their turn"
    assert int(times.min()) < 200 and int(times.max()) > 800


# ---- counterfactuals -------------------------------------------------------------------------------------------------


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

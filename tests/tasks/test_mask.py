"""Masks as the diffused tensor: encoding, training loss, and samples of a model that knows its mask by heart."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion import build, device
from medseg_diffusion.config.segmenter import SegmenterConfig, SegmenterMethod
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import draw_noised, generators, uniform_times
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import cosine, linear
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.tasks.mask import (
    AnchorLoss,
    Auxiliary,
    Batch,
    FeedForward,
    MaskDiffusion,
    MaskEncoding,
    dice_ce,
    sample_all,
)

BOTH = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


def labels_of(seed: int, num_classes: int, *shape: int) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("start", [1000, 400])
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_samples_start_as_wide_as_x_t_of_the_training(scale: float, start: int) -> None:
    """Also at a first time before T, where a scaled mask and its noise have less than unit variance."""
    mask = scale * (2.0 * labels_of(0, 2, 1, 1, 64, 64) - 1)
    schedule, shown = cosine(1000), list[Tensor]()

    class Spy:
        def __init__(self) -> None:
            self.schedule = schedule

        def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
            shown.append(x_t)
            return Prediction(mask, x_t)

    sample_all(Spy(), DDIM(), [start, 0], {}, [[0]], mask.shape[1:], mask, scale)
    x_t = draw_noised(schedule, mask, generators([1]), t=torch.tensor([start])).x_t
    assert float(shown[0].std()) == pytest.approx(float(x_t.std()), rel=0.05)


# ---- encoding --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_labels_survive_encoding(dims, num_classes, scale) -> None:
    encoding, labels = MaskEncoding(num_classes, scale), labels_of(0, num_classes, 2, *[5] * dims)
    x0 = encoding.encode(labels)
    assert x0.shape == (2, encoding.channels, *labels.shape[1:]) and x0.dtype == torch.float32
    assert encoding.channels == (1 if num_classes == 2 else num_classes)
    assert set(x0.unique().tolist()) == {torch.tensor(v).item() for v in (-scale, scale)}
    probabilities = encoding.decode(x0)
    assert probabilities.shape == (2, num_classes, *labels.shape[1:])
    assert torch.equal(probabilities.argmax(1), labels)
    true = probabilities.gather(1, labels[:, None])
    torch.testing.assert_close(true, torch.ones_like(true), rtol=0, atol=1e-5)


def test_the_channels_by_hand() -> None:
    labels = torch.tensor([[[0, 1], [2, 1]]])
    assert MaskEncoding(3, 0.5).encode(labels)[0].tolist() == [
        [[0.5, -0.5], [-0.5, -0.5]],
        [[-0.5, 0.5], [-0.5, 0.5]],
        [[-0.5, -0.5], [0.5, -0.5]],
    ]
    assert MaskEncoding(2).encode(labels.clamp(max=1))[0].tolist() == [[[-1, 1], [1, 1]]]


@settings(deadline=None, max_examples=40)
@given(
    num_classes=st.integers(2, 6),
    scale=st.floats(0.1, 2),
    spread=st.floats(0, 10, allow_subnormal=False),
    seed=st.integers(0, 99),
)
def test_probabilities_are_a_distribution_whatever_is_decoded(num_classes, scale, spread, seed) -> None:
    encoding = MaskEncoding(num_classes, scale)
    x0 = spread * torch.randn(2, encoding.channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    p = encoding.decode(x0)
    assert p.min() >= 0 and p.max() <= 1
    torch.testing.assert_close(p.sum(1), torch.ones(2, 4, 4))


def test_a_position_that_no_class_claims_is_undecided() -> None:
    p = MaskEncoding(4).decode(torch.full((1, 4, 2, 2), -1.0))
    torch.testing.assert_close(p, torch.full((1, 4, 2, 2), 0.25))
    half = MaskEncoding(2, 0.5).decode(torch.zeros(1, 1, 2, 2))
    torch.testing.assert_close(half, torch.full((1, 2, 2, 2), 0.5))


@pytest.mark.parametrize(("num_classes", "scale"), [(1, 1.0), (0, 1.0), (3, 0.0), (3, -1.0)])
def test_an_impossible_encoding_is_refused(num_classes, scale) -> None:
    with pytest.raises(ValueError, match="at least 2 classes and a positive scale"):
        MaskEncoding(num_classes, scale)


def test_logits_of_one_channel_are_those_of_foreground_against_background() -> None:
    logit = torch.tensor([[[[0.7, -2.0]]]])
    both = MaskEncoding(2).class_logits(logit)
    torch.testing.assert_close(both.softmax(1)[:, 1:], logit.sigmoid())
    three = torch.zeros(1, 3, 1, 2)
    assert MaskEncoding(3).class_logits(three) is three


# ---- training --------------------------------------------------------------------------------------------------------


def problem(dims: int, num_classes: int = 2) -> Batch:
    """Two images of a ball (and a box), bright where the label is."""
    axes = torch.meshgrid(*[torch.arange(12.0)] * dims, indexing="ij")
    labels = []
    for centre in (4.0, 7.0):
        label = (torch.stack([(axis - centre) ** 2 for axis in axes]).sum(0) < 10).long()
        if num_classes > 2:
            label[(slice(8, 12),) * dims] = 2
        labels.append(label)
    label = torch.stack(labels)
    noise = torch.randn(2, 1, *label.shape[1:], generator=torch.Generator().manual_seed(0))
    image = label[:, None].float() - 0.5 + 0.1 * noise
    return {"image": image, "label": label, "seed": torch.tensor([0, 1])}


def tiny(method: str, dims: int, **diffusion: object) -> SegmenterConfig:
    return SegmenterConfig.model_validate(
        {
            "method": method,
            "data": {"window": [12] * dims},
            "network": {
                "dims": dims,
                "channels": 16,
                "channel_mult": [1, 2],
                "num_res_blocks": 1,
                "patch_size": 1 if method == "latent-mask" else 2,
            },
            "image_encoder": {"encoder_channels": 8, "encoder_blocks": 1, "encoder_growth": 4},
            "dynamic_encoding": {"bands": 5},
            "semantic_condition": {"depth": 1, "head_channels": 16, "dropout": 0.0},
            "mask_autoencoder": {"latent_channels": 2, "channels": [8, 8], "features": 4},
            "probabilistic_unet": {"features": 8, "latent_channels": 2},
            "diffusion": {"schedule": {"name": "cosine", "num_steps": 100}, **diffusion},
            "inference": {"sampler": "ddpm"},
        }
    )


@torch.enable_grad()
def overfit(config: SegmenterConfig, num_classes: int, steps: int) -> tuple[nn.Module, list[float], Batch]:
    """The model after so many steps on one batch, and its loss with fixed times and noise before and after."""
    torch.manual_seed(0)
    model, batch = build.segmenter(config, num_classes), problem(config.network.dims, num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)

    def loss_at(seed: int) -> Tensor:
        return model({**batch, "seed": torch.tensor([2 * seed, 2 * seed + 1])})

    with torch.no_grad():
        before = sum(float(loss_at(10_000 + i)) for i in range(8)) / 8
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        after = sum(float(loss_at(10_000 + i)) for i in range(8)) / 8
    return model.eval(), [before, after], batch


CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("ensemdiff", 2, 2, {"target": "x0"}),
    ("ensemdiff", 2, 3, {"target": "v", "weighting": "min-snr"}),
    ("ensemdiff", 3, 2, {"target": "eps"}),
    ("ensemdiff", 3, 3, {"target": "x0", "head": "logits", "dice_ce_weight": 1.0, "scale": 0.5}),
    ("segdiff", 2, 2, {"target": "eps"}),
    ("segdiff", 3, 2, {"target": "v"}),
    ("baseline", 2, 3, {}),
    ("baseline", 3, 2, {}),
]


@pytest.mark.parametrize(
    ("method", "dims", "num_classes", "diffusion"),
    CASES,
    ids=[f"{m}-{d}D-{k}-{o.get('target', 'direct')}" for m, d, k, o in CASES],
)
def test_the_loss_falls(method, dims, num_classes, diffusion) -> None:
    model, (before, after), batch = overfit(tiny(method, dims, **diffusion), num_classes, 30)
    assert before == before and before < 100
    assert after < 0.75 * before
    assert model(batch).shape == ()


@functools.cache
def trained(dims: int, num_classes: int) -> tuple[MaskDiffusion, Batch]:
    """An x0 model that knows two images by heart; shared by the tests, which must not change it."""
    model, _, batch = overfit(tiny("ensemdiff", dims, target="x0"), num_classes, 80)
    assert isinstance(model, MaskDiffusion)
    return model, batch


def dice(a: Tensor, b: Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", [DDIM(), DDPM(), DPMSolver()], ids=["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize(("dims", "num_classes"), [(2, 3), (3, 2)], ids=["2D", "3D"])
def test_samples_reproduce_a_mask_learnt_by_heart(dims, num_classes, sampler, steps) -> None:
    model, batch = trained(dims, num_classes)
    times = spaced(model.denoiser.schedule, steps, "trailing")
    found = model.probabilities(batch["image"], [[1], [2]], sampler, times)[:, 0].argmax(1)
    for value in range(1, num_classes):
        assert dice(found == value, batch["label"] == value) > 0.9, value


@BOTH
def test_many_samples_at_once_are_those_drawn_one_by_one(dims) -> None:
    model, batch = trained(dims, 5 - dims)
    times = spaced(model.denoiser.schedule, 3, "trailing")
    for sampler in (DDPM(), DPMSolver()):
        together = model.probabilities(batch["image"], [[1, 2, 3], [4, 5, 6]], sampler, times)
        assert together.shape[:2] == (2, 3)
        for i, seeds in enumerate(([1, 2, 3], [4, 5, 6])):
            for j, seed in enumerate(seeds):
                alone = model.probabilities(batch["image"][i : i + 1], [[seed]], sampler, times)
                torch.testing.assert_close(alone[0, 0], together[i, j], rtol=0, atol=1e-4)
        assert not torch.allclose(together[0, 0], together[0, 1], atol=1e-4), "other seeds, other samples"


@torch.no_grad()
def test_the_loss_depends_on_the_examples_own_seeds_alone() -> None:
    """Times and noise come from the seeds: the global generator has no say, and each example brings its own."""
    model, batch = trained(2, 3)
    torch.manual_seed(1)
    first = model(batch)
    torch.manual_seed(2)
    torch.testing.assert_close(model(batch), first, rtol=0, atol=0)
    assert float(model({**batch, "seed": torch.tensor([5, 6])})) != float(first)
    halves = [model({key: value[i : i + 1] for key, value in batch.items()}) for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2, first)


def test_the_loss_of_a_perfect_model_is_zero() -> None:
    batch = problem(2)
    encoding = MaskEncoding(2, 0.7)

    class Knowing(nn.Module):
        def encode_condition(self, image: Tensor) -> dict[str, Tensor]:
            return {"concat": image}

        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            return encoding.encode(batch["label"])

    model = MaskDiffusion(NetworkDenoiser(Knowing(), linear(100), "x0"), encoding, Simple())
    assert float(model(batch)) == 0


@pytest.mark.parametrize(("t", "counted"), [([5, 10], [1, 1]), ([5, 7], [1, 0]), ([3, 9], [0, 0])])
def test_the_anchor_loss_by_hand(t, counted) -> None:
    """Dice and ten times the cross-entropy of every case at a multiple of five, the mean over the batch."""
    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = labels_of(2, 3, 2, 6, 6)
    p, truth = logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1).float()
    overlap = (2 * (p * truth).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1e-5)
    entropy = -(truth * p.log()).sum(1).mean((1, 2))
    by_case = (1 - overlap[:, 1:]).mean(1) + 10 * entropy
    expected = (torch.tensor(counted) * by_case).mean()
    torch.testing.assert_close(AnchorLoss()(logits, labels, torch.tensor(t)), expected, rtol=1e-5, atol=1e-6)


# ---- every method ----------------------------------------------------------------------------------------------------

METHODS = get_args(SegmenterMethod)


def scrambled(method: str, dims: int = 2) -> Any:
    """An untrained model of 3 classes with random weights everywhere, also where training starts from zeros."""
    torch.manual_seed(0)
    model = build.segmenter(tiny(method, dims, target="x0"), 3)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_parameter(method, dims) -> None:
    model = scrambled(method, dims)
    model(problem(dims, 3) | {"seed": torch.tensor([0, 7])}).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_depends_on_its_image_and_seed_alone(method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on what shares its batch, its place in it, or how many samples a batch holds."""
    model, image, sampler = scrambled(method), problem(2)["image"], DDPM()
    times = [100, 60, 20, 0]
    together = model.probabilities(image, [[1, 2, 3], [4, 5, 6]], sampler, times)
    assert together.shape == (2, 3, 3, 12, 12)
    swapped = model.probabilities(image.flip(0), [[6, 4, 5], [3, 1, 2]], sampler, times)
    torch.testing.assert_close(swapped.flip(0)[:, [1, 2, 0]], together, rtol=0, atol=1e-4)
    monkeypatch.setitem(device.POSITIONS_AT_ONCE, "cpu", 2 * 12 * 12)
    torch.testing.assert_close(
        model.probabilities(image, [[1, 2, 3], [4, 5, 6]], sampler, times), together, rtol=0, atol=1e-4
    )


def first_of_the_condition(method: str) -> Callable[[Any], nn.Module]:
    return {
        "segdiff": lambda network: network.image_encoder,
        "medsegdiff": lambda network: network.image_stem,
        "medsegdiff-v2": lambda network: network.condition,
        "latent-mask": lambda network: network.image_encoder,
    }[method]


@pytest.mark.parametrize("method", ["segdiff", "medsegdiff", "medsegdiff-v2", "latent-mask"])
def test_the_image_is_encoded_once_for_all_steps_and_samples(method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the samples walk in several batches."""
    model, calls = scrambled(method), {"image": 0, "mask": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*arguments: object) -> None:
            calls[name] += 1

        return hook

    first_of_the_condition(method)(model.network).register_forward_pre_hook(count("image"))
    model.network.unet.stem.register_forward_pre_hook(count("mask"))
    if method == "medsegdiff":  # the stages before the first mixing
        for block in model.network.image_encoder[: model.network.mixed_after[0]]:
            block.register_forward_pre_hook(count(f"{id(block)}"))
            calls[f"{id(block)}"] = 0
    positions = 36 if method == "latent-mask" else 144
    monkeypatch.setitem(device.POSITIONS_AT_ONCE, "cpu", 4 * positions)
    model.probabilities(problem(2)["image"], [[1, 2, 3], [4, 5, 6]], DDIM(), [100, 50, 20, 0])
    assert calls.pop("mask") == 2 * 3
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("method", METHODS)
def test_training_and_sampling_in_bfloat16(method) -> None:
    """For MedSegDiff-V2 of an image whose bottleneck has a single position along one of its axes."""
    model, width = scrambled(method), 4 if method == "medsegdiff-v2" else 12
    batch = {key: value[..., :width] if value.ndim > 1 else value for key, value in problem(2, 3).items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
        found = model.probabilities(batch["image"], [[1], [2]], DPMSolver(), [100, 50, 0])
    loss.backward()
    assert bool(loss.isfinite()) and bool(found.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


class Wild(nn.Module):
    """Predicts what no mask can be, and remembers what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []

    def encode_condition(self, image: Tensor) -> dict[str, Tensor]:
        return {"concat": image}

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        self.largest.append(float(x.abs().max()))
        return torch.full_like(x, 50.0)


def test_a_linear_head_cannot_leave_the_range_of_a_mask() -> None:
    network = Wild()
    model = MaskDiffusion(NetworkDenoiser(network, linear(100), "x0"), MaskEncoding(2, 0.5), Simple())
    found = model.probabilities(torch.zeros(1, 1, 8, 8), [[1]], DDIM(), [100, 50, 20, 0])
    assert max(network.largest) < 5
    torch.testing.assert_close(found[0, 0, 1], torch.ones(8, 8))


# ---- the feed-forward baseline and the segmentation loss -------------------------------------------------------------


def test_the_baseline_is_the_same_backbone_without_diffusion() -> None:
    config = tiny("baseline", 2)
    model, _, batch = overfit(config, 2, 60)
    assert isinstance(model, FeedForward)
    found = model.probabilities(batch["image"], [[1, 2], [3, 4]], DDIM(), [100, 0])
    assert found.shape == (2, 2, 2, 12, 12)
    torch.testing.assert_close(found.sum(2), torch.ones(2, 2, 12, 12))
    torch.testing.assert_close(found[:, 0], found[:, 1], rtol=0, atol=0)
    assert dice(found[:, 0].argmax(1) == 1, batch["label"] == 1) > 0.9
    other = build.segmenter(tiny("ensemdiff", 2), 2)
    names = [name.removeprefix("denoiser.") for name, _ in other.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names


def test_the_segmentation_loss_by_hand() -> None:
    """Cross-entropy plus one minus the Dice of the foreground over the whole batch."""
    labels = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 1]]])
    logits = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    truth = (labels == 1).float()
    overlap = (2 * (p[:, 1] * truth).sum() + 1e-5) / (p[:, 1].sum() + truth.sum() + 1e-5)
    entropy = -p.gather(1, labels[:, None]).log().mean()
    torch.testing.assert_close(dice_ce(logits, labels), 1 - overlap + entropy)
    certain = 50 * torch.stack([1 - truth, truth], dim=1)
    torch.testing.assert_close(dice_ce(certain, labels), torch.tensor(0.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("shape", "classes"), [((2, 7, 5), 3), ((1, 12, 11, 10), 6)])
def test_the_segmentation_loss_is_that_of_monai(shape: tuple[int, ...], classes: int) -> None:
    """Values and gradients, also with a class that is neither there nor likely."""
    from monai.losses import DiceCELoss

    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes - 1, shape, generator=generator)
    logits = 3 * torch.randn(shape[0], classes, *shape[1:], generator=generator)
    logits[:, -1] -= 200
    logits.requires_grad_()
    other = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)(logits, labels[:, None])
    own = dice_ce(logits, labels)
    torch.testing.assert_close(own, other)
    expected, found = (torch.autograd.grad(loss, logits)[0] for loss in (other, own))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert expected.abs().max() > 1e-4


def test_a_segmentation_loss_needs_a_classifying_head() -> None:
    denoiser = NetworkDenoiser(nn.Identity(), linear(100), "x0")
    for auxiliary in (Auxiliary(dice_ce=1.0), Auxiliary(cross_entropy=1.0)):
        with pytest.raises(ValueError, match="need logits: use a classifying head or weights of 0"):
            MaskDiffusion(denoiser, MaskEncoding(2), Simple(), auxiliary)


def test_the_auxiliary_losses_by_hand() -> None:
    logits = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    labels, log_snr = labels_of(1, 2, 2, 6, 6), torch.tensor([-9.0, 1.0], dtype=torch.float64)
    entropy = F.cross_entropy(logits, labels)
    torch.testing.assert_close(Auxiliary(cross_entropy=2.0)(logits, labels, log_snr), 2 * entropy)
    torch.testing.assert_close(Auxiliary(0.5)(logits, labels, log_snr), 0.5 * dice_ce(logits, labels))
    halves = [dice_ce(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    weights = [1 / (1 + 50 * math.exp(value)) for value in log_snr.tolist()]
    expected = (weights[0] * halves[0] + weights[1] * halves[1]) / 2
    torch.testing.assert_close(Auxiliary(1.0, -math.log(50))(logits, labels, log_snr), expected)


def test_the_drawn_times_lie_between_the_bounds() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[int] = []

        def encode_condition(self, image: Tensor) -> dict[str, Tensor]:
            return {"concat": image}

        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            self.times += (timesteps + 1).tolist()
            return x

    network, batch = Noting(), problem(2)
    model = MaskDiffusion(
        NetworkDenoiser(network, linear(100), "x0"),
        MaskEncoding(2),
        Simple(),
        times=functools.partial(uniform_times, 44, first=40),
    )
    for seed in range(40):
        model(batch | {"seed": torch.tensor([2 * seed, 2 * seed + 1])})
    assert set(network.times) == {40, 41, 42, 43, 44}


@pytest.mark.parametrize("num_classes", [2, 3])
def test_pixels_are_drawn_from_their_own_probabilities(num_classes) -> None:
    """Independent of each other and of the batch, with the network's shares; the honest loss has no Dice."""
    bias = torch.tensor([0.5, -1.0, 0.2][: num_classes if num_classes > 2 else 1])

    class Constant(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            return bias[None, :, None, None].expand(len(x), -1, *x.shape[2:])

    model, image = (
        FeedForward(Constant(), MaskEncoding(num_classes), dice=False, pixels=True),
        torch.zeros(2, 1, 40, 40),
    )
    members = model.probabilities(image, [[1, 2, 3], [4, 5, 6]], DDIM(), [1, 0])
    assert members.shape == (2, 3, num_classes, 40, 40) and set(members.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(model.probabilities(image[1:], [[6]], DDIM(), [1, 0])[0, 0], members[1, 2])
    p = model.logits(image)[0, :, 0, 0].softmax(0)
    torch.testing.assert_close(members.mean((0, 1, 3, 4)), p, atol=0.02, rtol=0)
    shifted = members[..., 1:] * members[..., :-1]  # of neighbours, both of the class: the product of the shares
    torch.testing.assert_close(shifted.mean((0, 1, 3, 4)), p.square(), atol=0.02, rtol=0)
    labels = labels_of(0, num_classes, 2, 40, 40)
    loss = model({"image": image, "label": labels, "seed": torch.tensor([0, 1])})
    torch.testing.assert_close(loss, F.cross_entropy(model.logits(image), labels))


def test_sampling_changes_neither_model_nor_image() -> None:
    model, batch = trained(2, 3)
    before, image = copy.deepcopy(model.state_dict()), batch["image"].clone()
    model.probabilities(batch["image"], [[1], [2]], DDPM(), [100, 10, 0])
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(batch["image"], image, rtol=0, atol=0)

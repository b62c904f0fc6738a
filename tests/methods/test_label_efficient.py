"""Label-efficient segmentation: sampled pixels, classifiers, and the choice of blocks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.errors import MedsegError, UsageError
from medseg_diffusion.methods import label_efficient
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.label_efficient import (
    ClassifierOptions,
    PixelSegmentation,
    choose_blocks,
    fit_classifiers,
)
from medseg_diffusion.methods.labelled_pixels import LabelledPixels, PixelSampling, labelled_pixels
from medseg_diffusion.networks.pixel_classifier import upsampled
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.volumes.fitting import labels_to_generator_grid, to_generator_grid
from tests.helpers.pixel_classifiers import HALVES, activations, two_halves

FAST = ClassifierOptions(members=2, hidden=(16, 8), max_epochs=4, min_epochs=2, min_steps=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_sampled_features_are_those_of_the_upsampled_blocks(dims, tmp_path: Path) -> None:
    net, (image, label) = activations(dims), two_halves(dims)
    pixels = labelled_pixels(net, [image[None]], [label[None]], HALVES, PixelSampling(30, 0), tmp_path / "features.npy")
    assert isinstance(pixels.features, np.memmap) and pixels.features.shape == (60, sum(pixels.channels))
    assert torch.bincount(pixels.labels).tolist() == [30, 30]
    whole = torch.cat([upsampled(block, label.shape) for block in net(image[None])], 1)[0].flatten(1).T.half()
    near = torch.cdist(torch.from_numpy(np.array(pixels.features)).float(), whole.float()).min(1)
    assert float(near.values.max()) < 0.05
    assert torch.equal(label.flatten()[near.indices], pixels.labels)


class Places:
    """Activations that tell where a pixel is: its indices, and the image's first value."""

    noise = torch.zeros(1)

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        axes = torch.meshgrid(*[torch.arange(n).float() for n in images.shape[2:]], indexing="ij")
        return [torch.stack([*axes, torch.full_like(axes[0], float(images.flatten()[0]))])[None]]


@pytest.mark.parametrize("dims", [2, 3])
def test_features_and_labels_are_of_the_same_pixels_of_the_same_slices(dims, monkeypatch) -> None:
    monkeypatch.setattr("medseg_diffusion.methods.labelled_pixels._ROWS", 7)  # gathered in several parts
    random = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 3, (n, *[9] * dims), generator=random, dtype=torch.uint8) for n in (4, 1)]
    images = [
        torch.arange(first, first + len(label)).float().reshape(-1, *[1] * (1 + dims)).expand(-1, 1, *label.shape[1:])
        for first, label in zip((0, 10), labels, strict=True)
    ]
    pixels = labelled_pixels(Places(), images, labels, ["a", "b", "c"], PixelSampling(25, 0))  # type: ignore[arg-type]
    # As many of a labelled image, however many slices it has.
    assert torch.bincount(3 * pixels.image + pixels.labels).tolist() == [25] * 6
    rows = [tuple(int(n) for n in row) for row in pixels.features]
    assert len(set(rows)) == len(rows)
    assert len({row[-1] for row in rows}) == 5  # of all slices
    for (*place, k), label, image in zip(rows, pixels.labels.tolist(), pixels.image.tolist(), strict=True):
        assert int(labels[image][(k % 10, *place)]) == label and image == k // 10


def test_a_disk_without_room_for_the_features_is_told(tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    image, label = two_halves(2)
    with pytest.raises(
        MedsegError, match=r"0\.0 GB free, but the features of the sampled pixels are 0.0 GB; free the disk"
    ):
        labelled_pixels(
            activations(2), [image[None]], [label[None]], HALVES, PixelSampling(200, 0), tmp_path / "features.npy"
        )
    assert not list(tmp_path.iterdir())


class Itself:
    """Activations that are the image."""

    noise = torch.zeros(1)

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.images.append(images)
        return [images]


def test_copies_share_the_pixels_and_the_slices() -> None:
    """Features are the image here, and the image is its labels, so they must agree also where a copy changed both."""
    shown = Itself()
    seen = shown.images

    def change(image: torch.Tensor, label: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        order = torch.randperm(16, generator=generator)
        return image[:, order], label[order]

    random = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 2, (n, 16, 16), generator=random) for n in (7, 1)]
    images = [label[:, None].float() for label in labels]

    def sampled(seed: int) -> LabelledPixels:
        seen.clear()
        return labelled_pixels(shown, images, labels, HALVES, PixelSampling(40, seed, copies=3, change=change))  # type: ignore[arg-type]

    pixels = sampled(0)
    assert torch.equal(torch.from_numpy(pixels.features[:, 0]).long(), pixels.labels)
    assert torch.bincount(2 * pixels.image + pixels.labels).tolist() == [40] * 4
    # One more shows the number of channels.
    assert len(seen) == 1 + 7 + 7 + 1 + 3, "each slice is changed once, or a single one in every copy"
    assert len({image.numpy().tobytes() for image in seen}) == len(seen) - 1, "no copy shows what is there already"
    together = torch.cat([label.flatten() for label in labels])
    torch.testing.assert_close(pixels.share, torch.bincount(together).double() / len(together))
    first = torch.cat([image.flatten() for image in seen])
    sampled(0)
    assert torch.equal(torch.cat([image.flatten() for image in seen]), first)
    sampled(1)
    assert not torch.equal(torch.cat([image.flatten() for image in seen]), first)


def test_a_class_of_few_slices_of_a_stack_gets_its_pixels() -> None:
    """Copies show parts of a stack, most of which lack the class."""
    label = torch.zeros(30, 12, 12, dtype=torch.int64)
    label[7:9, 3:6, 3:9] = 1  # 36 pixels, and as many in the copies
    turned = lambda image, label, generator: (image.flip(1), label.flip(0))  # noqa: E731
    image = label[:, None].float()
    for wanted, found in ((30, 30), (72, 72), (1000, 72)):
        pixels = labelled_pixels(Itself(), [image], [label], HALVES, PixelSampling(wanted, 0, copies=16, change=turned))  # type: ignore[arg-type]
        assert torch.bincount(pixels.labels).tolist() == [wanted, found]
        assert torch.equal(torch.from_numpy(pixels.features[:, 0]).long(), pixels.labels)


def test_large_features_are_clipped_and_a_loss_that_is_not_finite_is_refused() -> None:
    class Large(Places):
        def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [1e6 * block for block in super().__call__(images)]

    image, label = two_halves(2)
    pixels = labelled_pixels(Large(), [image[None]], [label[None]], HALVES, PixelSampling(30, 0))  # type: ignore[arg-type]
    assert np.isfinite(pixels.features).all()
    broken = np.full_like(pixels.features, np.nan)
    with pytest.raises(MedsegError, match="loss of the classifiers became nan"):
        fit_classifiers(LabelledPixels(broken, pixels.labels, pixels.image, pixels.share, pixels.channels), FAST)


def test_what_is_but_rounding_is_not_blown_up() -> None:
    features = np.full((60, 2), 1000, np.float16)
    features[::2, 0] += np.float16(0.5)  # the spacing of float16 there
    features[:, 1] = np.arange(60)
    label = torch.arange(60) % 2
    pixels = LabelledPixels(features, label, torch.zeros_like(label), torch.tensor([0.5, 0.5]).double(), (2,))
    model = fit_classifiers(pixels, FAST)
    assert float(model.std[0]) == 1 and float(model.std[1]) == pytest.approx(np.std(np.arange(60)), rel=1e-4)


def test_the_probabilities_are_those_of_the_images_not_of_the_balanced_sample() -> None:
    """Features that say nothing: what remains is how frequent the classes are."""
    net = activations()
    label = torch.zeros(16, 16, dtype=torch.int64)
    label[:2, :12] = 1  # 24 of 256
    noise = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 1e-4
    pixels = labelled_pixels(net, [noise[None]], [label[None]], HALVES, PixelSampling(1000, 0))
    assert pixels.share.tolist() == pytest.approx([232 / 256, 24 / 256])
    blank = type(pixels)(np.zeros_like(pixels.features), pixels.labels, pixels.image, pixels.share, pixels.channels)
    few = labelled_pixels(net, [noise[None]], [label[None]], HALVES, PixelSampling(24, 0))
    balanced = type(blank)(np.zeros_like(few.features), few.labels, few.image, few.share, few.channels)
    for sample in (blank, balanced):
        options = ClassifierOptions(
            members=3, hidden=(8, 8), learning_rate=0.02, max_epochs=100, min_epochs=90, min_steps=0
        )
        model = fit_classifiers(sample, options)
        with torch.no_grad():
            share = model(torch.zeros(4, sum(sample.channels))).softmax(-1)[..., 1].mean()
        assert float(share) == pytest.approx(24 / 256, abs=0.05)


def test_the_same_seed_gives_the_same_classifiers() -> None:
    image, label = two_halves(2)
    pixels = labelled_pixels(activations(), [image[None]], [label[None]], HALVES, PixelSampling(30, 0))
    one, same, other = (fit_classifiers(pixels, FAST, seed) for seed in (1, 1, 2))
    probe = torch.from_numpy(np.array(pixels.features)).float()
    with torch.no_grad():
        assert torch.equal(one(probe), same(probe)) and not torch.equal(one(probe), other(probe))
        assert not torch.equal(one(probe)[0], one(probe)[1])  # members differ


def test_a_classifier_of_few_pixels_is_trained_for_as_many_steps_as_asked(monkeypatch) -> None:
    image, label = two_halves(2)
    pixels = labelled_pixels(activations(), [image[None]], [label[None]], HALVES, PixelSampling(32, 0))
    steps: list[int] = []
    entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args: (steps.append(0), entropy(*args))[1])
    for fewest in (0, 150):
        steps.clear()
        options = ClassifierOptions(
            members=1, hidden=(8, 8), learning_rate=1e-12, min_epochs=1, min_steps=fewest, max_epochs=400, patience=1
        )
        fit_classifiers(pixels, options)
        assert fewest < len(steps) < fewest + 10


def test_a_large_network_is_used_as_published_and_of_others_the_finer_half_or_a_search(monkeypatch) -> None:
    image, label = (part[None] for part in two_halves(2))
    # Of two resolutions, of which a block's upsampling leads into the next.
    assert choose_blocks(activations(), [image], [label], HALVES, 0) == tuple(f"decoder.{i}" for i in (1, 2, 3))
    torch.manual_seed(0)
    deep = UNet(2, 1, 1, channels=8, channel_mult=(1, 1, 1, 1, 1, 1), num_res_blocks=2, norm_groups=4)
    task = ImageDiffusion(NetworkDenoiser(deep, linear(1000)), Simple()).eval()
    published = Activations(task, None, (1, 32, 32))
    assert choose_blocks(published, [image], [label], HALVES, 0) == tuple(f"decoder.{i}" for i in (5, 6, 7, 8, 12))
    middling = UNet(2, 1, 1, channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4)
    task = ImageDiffusion(NetworkDenoiser(middling, linear(1000)), Simple()).requires_grad_(False).eval()
    small = Activations(task, None, (1, 16, 16), blocks=[])
    blocks = small.decoder_blocks()
    whole = choose_blocks(small, [image, image], [label, label], HALVES, 0)
    sides = {name: block.shape[2] for name, block in zip(blocks, small.with_blocks(blocks)(image), strict=False)}
    assert set(sides.values()) == {4, 8, 16}
    assert whole == tuple(name for name in blocks if sides[name] >= 8) and len(whole) == 5
    monkeypatch.setattr(label_efficient, "SEARCHED_BLOCKS", 4)
    monkeypatch.setattr(label_efficient, "PUBLISHED_FEATURES", 8 * len(whole) - 1)
    searched = choose_blocks(small, [image, image], [label, label], HALVES, 0)
    assert len(searched) == 4 and list(searched) == sorted(searched) and set(searched) < set(whole)


class Telling:
    """Activations at two times of seven blocks of four channels, of which blocks 1, 2, 4, 5 and 6 show the label."""

    noise = torch.zeros(1)
    times = (50, 150)
    names = tuple(f"decoder.{i}" for i in range(7))

    def decoder_blocks(self) -> list[str]:
        return list(self.names)

    def with_blocks(self, blocks: object) -> Telling:
        return self

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        shape = (len(images), 4, *images.shape[2:])
        return [
            torch.randn(shape, generator=draw) + (0 if i in (0, 3) else images.sign())
            for _ in range(2)
            for i in range(7)
        ]


def test_the_search_finds_the_blocks_that_show_the_label(monkeypatch) -> None:
    image, label = (part[None] for part in two_halves(2))
    monkeypatch.setattr(label_efficient, "PUBLISHED_FEATURES", 1)
    for count in (1, 2):
        found = choose_blocks(Telling(), [image] * count, [label] * count, HALVES, 0)  # type: ignore[arg-type]
        assert found == tuple(f"decoder.{i}" for i in (1, 2, 4, 5, 6))


@pytest.mark.parametrize("dims", [2, 3])
def test_an_easy_image_is_learned_and_its_members_agree(dims) -> None:
    net, (image, label) = activations(dims), two_halves(dims)
    there, known = to_generator_grid(image[None], label.shape), labels_to_generator_grid(label[None], label.shape)
    pixels = labelled_pixels(net, [there], [known], HALVES, PixelSampling(128, 0))
    options = ClassifierOptions(members=3, hidden=(16, 8), min_epochs=20, min_steps=0)
    model = PixelSegmentation(net, fit_classifiers(pixels, options), label.shape)
    with torch.no_grad():
        found = model.probabilities(image[None], [[0, 1, 2]], DDIM(), [1, 0])
        two = model.probabilities(image[None], [[0, 1]], DDIM(), [1, 0])
    assert found.shape == (1, 3, 2, *label.shape) and torch.equal(two, found[:, :2])
    assert float((found[0].mean(0).argmax(0) == label).float().mean()) > 0.97
    with pytest.raises(UsageError, match="ensemble of 4 was asked for, but the model has 3"):
        model.probabilities(image[None], [[0, 1, 2, 3]], DDIM(), [1, 0])


def test_the_search_of_blocks_takes_fewer_pixels_of_more_images(monkeypatch) -> None:
    taken: list[LabelledPixels] = []

    def spy(*args: object) -> LabelledPixels:
        taken.append(labelled_pixels(*args))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(label_efficient, "labelled_pixels", spy)
    monkeypatch.setattr(label_efficient, "SEARCHED_PIXELS", 120)
    monkeypatch.setattr(label_efficient, "PUBLISHED_FEATURES", 1)
    middling = UNet(2, 1, 1, channels=8, channel_mult=(1, 1, 1), num_res_blocks=2, norm_groups=4)
    task = ImageDiffusion(NetworkDenoiser(middling, linear(1000)), Simple()).requires_grad_(False).eval()
    image, label = (part[None] for part in two_halves(2))
    choose_blocks(Activations(task, None, (1, 16, 16), blocks=[]), [image] * 3, [label] * 3, HALVES, 0)
    assert torch.bincount(taken[0].labels).tolist() == [60, 60]


def test_bfloat16_is_for_the_network_alone() -> None:
    """Features of a large mean: the classifiers' first layer would lose them to cancellation."""
    image, label = two_halves(2)
    half, full = (
        Activations((net := activations()).task, None, net.shape, net.times, net.blocks, precision=precision)
        for precision in ("bf16", "fp32")
    )
    assert half(image[None])[0].dtype == torch.bfloat16
    pixels = labelled_pixels(full, [image[None]], [label[None]], HALVES, PixelSampling(30, 0))
    model = fit_classifiers(pixels, FAST)
    blocks = full(image[None])
    with torch.no_grad():
        expected = model.maps(blocks, label.shape)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.maps(blocks, label.shape), expected)

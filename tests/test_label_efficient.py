"""Label-efficient segmentation, from pixels to `medseg train-pixel-classifier` and `medseg segment`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import torch.nn.functional as F
import yaml
from medseg_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion.config.generator import GeneratorConfig
from medseg_diffusion.config.load import load_config, parse_config
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.data.images import find_images
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import generators as random_generators
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.diffusion.simplex import simplex
from medseg_diffusion.errors import InputError, MedsegError, ModelError, UsageError
from medseg_diffusion.methods import label_efficient
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.ensemble import Ensemble
from medseg_diffusion.methods.label_efficient import (
    ClassifierOptions,
    PixelSegmentation,
    choose_blocks,
    fit_classifiers,
)
from medseg_diffusion.methods.labelled_pixels import LabelledPixels, PixelSampling, labelled_pixels
from medseg_diffusion.models import pixel_segmenter
from medseg_diffusion.models.generator import Generator, restore_generator
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.pixel_segmenter import pixel_activations, pixel_preprocessing
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.networks.pixel_classifier import upsampled
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.volumes.fitting import labels_to_generator_grid, to_generator_grid
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows import train_pixel_classifier as train_module
from medseg_diffusion.workflows.labelled_units import Labelling, _diverse, labelled_units
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier

HALVES = ["dark", "bright"]
FAST = ClassifierOptions(members=2, hidden=(16, 8), max_epochs=4, min_epochs=2, min_steps=0)


@pytest.fixture(autouse=True, scope="module")
def own_home(tmp_path_factory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSEG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def activations(dims: int = 2, blocks: tuple[str, ...] = ("decoder.0", "decoder.2"), side: int = 16) -> Activations:
    torch.manual_seed(0)
    network = UNet(dims, 1, 1, channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    task = ImageDiffusion(NetworkDenoiser(network, linear(1000)), Simple()).requires_grad_(False).eval()
    return Activations(task, None, (1, *[side] * dims), (50, 250), blocks)


def two_halves(dims: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright and a dark half, labelled."""
    label = torch.zeros([side] * dims, dtype=torch.int64)
    label[side // 2 :] = 1
    noise = 0.1 * torch.randn([side] * dims, generator=torch.Generator().manual_seed(1))
    return ((label * 1.2 - 0.6) + noise)[None], label


# ---- the method ------------------------------------------------------------------------------------------------------


def test_equal_images_have_equal_activations_in_any_batch() -> None:
    image, _ = two_halves(2)
    alone = activations()(image[None])
    together = activations()(torch.stack([torch.zeros_like(image), image]))
    assert len(alone) == 4  # two times, two blocks
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(both[1], one[0], rtol=1e-4, atol=1e-5)


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
    assert len(seen) == 7 + 7 + 1 + 3, "each slice is changed once, or a single one in every copy"
    assert len({image.numpy().tobytes() for image in seen}) == len(seen), "no copy shows what is there already"
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


def test_no_block_is_computed_after_the_last_wanted_one() -> None:
    net = activations(blocks=("decoder.0", "decoder.1"))
    called: list[int] = []
    for i, block in enumerate(net.task.denoiser.network.decoder):
        block.register_forward_hook(lambda *args, i=i: called.append(i))
    net(two_halves(2)[0][None])
    assert called == [0, 1, 0, 1]  # two times


def test_members_that_agree_have_no_disagreement() -> None:
    member = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    same = Ensemble.of(member.expand(4, -1, -1, -1))
    assert float(same.uncertainty("mutual-information").max()) < 1e-6 and same.disagreement < 1e-6
    torn = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, :, None, None].expand(2, 2, 8, 8).clone()
    assert Ensemble.of(torn).disagreement == pytest.approx(1)  # log 2 / log 2
    torn[:, :, 2:] = torch.tensor([1.0, 0.0])[:, None, None]
    assert Ensemble.of(torn).disagreement == pytest.approx(1)  # 16 of 64 positions: more than the tenth that counts
    torn[:, :, :, 1:] = torch.tensor([1.0, 0.0])[:, None, None]
    assert Ensemble.of(torn).disagreement == pytest.approx(2 / 6)  # 2 of the 6 that count


def test_generators_without_such_activations_are_refused() -> None:
    task = activations().task
    with pytest.raises(UsageError, match=r"no block decoder\.9; it has encoder\.0 to decoder\.3"):
        Activations(task, None, (1, 16, 16), blocks=["decoder.9"])
    with pytest.raises(UsageError, match="time 1000 is beyond"):
        Activations(task, None, (1, 16, 16), times=[1000], blocks=[])
    with pytest.raises(ModelError, match="side of 15 is no multiple of 2"):
        Activations(task, None, (1, 16, 15), blocks=[])
    upsampler = ImageDiffusion(task.denoiser, Simple(), factor=2)
    with pytest.raises(ModelError, match="generators of whole images"):
        Activations(upsampler, None, (1, 16, 16), blocks=[])


def test_the_noise_is_that_of_the_generators_training() -> None:
    task = ImageDiffusion(activations().task.denoiser, Simple(), noise=simplex)
    found = Activations(task, None, (1, 16, 16), blocks=[], seed=3).noise
    torch.testing.assert_close(found, simplex((1, 16, 16), random_generators([3])))


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


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Eight scans of a bright box in a darker body, at varying places."""
    folder = tmp_path_factory.mktemp("scans")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for i in range(8):
        rng = np.random.default_rng(i)
        image = rng.normal(100, 5, (16, 14, 6)).astype(np.float32)
        label = np.zeros((16, 14, 6), np.uint8)
        x, y = rng.integers(2, 7, 2)
        label[x : x + 6, y : y + 5, 1:5] = 1
        image[label > 0] += 80
        for part, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / part / f"s{i}.nii.gz")
    return folder


def generator_config(size: object, dims: int) -> GeneratorConfig:
    found = parse_config(
        {
            "method": "pixel",
            "data": {"size": size, "channels": 1, "test_images": 2, "validation_images": 1},
            "network": {"dims": dims, "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
            "diffusion": {"target": "v"},
            "training": {"batch_size": 2, "max_steps": 20, "validate_every": 20, "warmup_steps": 1, "ema_decay": 0.5},
            "sampling": {"steps": 2},
        },
        "test",
    )
    assert isinstance(found, GeneratorConfig)
    return found


@pytest.fixture(scope="module")
def generators(scans, tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("generators")
    return {
        2: train_generator(generator_config(16, 2), scans, root / "slices", device="cpu"),
        3: train_generator(generator_config([16, 16, 8], 3), scans, root / "volumes", device="cpu"),
    }


def quick(**data: object) -> PixelClassifierConfig:
    found = parse_config(
        {
            "method": "label-efficient",
            "data": {"labels": ["box"], "pixels_per_class": 200, **data},
            "classifier": {"members": 3, "hidden": [16, 8], "min_steps": 0},
        },
        "test",
    )
    assert isinstance(found, PixelClassifierConfig)
    return found


CUDA = pytest.param(2, "case", "cuda", marks=pytest.mark.cuda)


@pytest.mark.parametrize(
    ("dims", "unit", "device"), [(2, "case", "cpu"), (2, "slice", "cpu"), (3, "case", "cpu"), CUDA]
)
def test_from_a_generator_to_scored_masks(dims, unit, device, scans, generators, tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    steps: dict[str, tuple[int, int]] = {}
    found = train_pixel_classifier(
        quick(copies=2), generators[dims], scans, 2, tmp_path / "run", unit=unit, device=device,
        on_progress=lambda what, done, total: steps.update({what: (done, total)}),
    )  # fmt: skip
    assert steps["features of labelled images"] == (6, 6)
    assert found.test is not None and found.test.dice[1].n == 2 and found.test.dice[1].mean > 0.7
    assert len(found.labelled) == 2 and json.loads((tmp_path / "run" / "labelled.json").read_text())["unit"] == unit
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "labelled.json", "model", "test"}
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert card["metrics"]["test"]["dice box"] == pytest.approx(found.test.dice[1].mean)
    assert set(card["training"]["data"]) == {"labelled", "pixels"}  # names of cases could tell the patient
    references = list((tmp_path / "run" / "test" / "references").iterdir())
    assert len(references) == 2
    for reference in references:
        original = nib.load(scans / "labels" / reference.name)
        assert np.array_equal(nib.load(reference).get_fdata(), original.get_fdata())
    # The model is one like any other.
    scan = scans / "images" / "s0.nii.gz"
    command = ["segment", str(scan), "-m", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    more = ["--save-uncertainty", "--uncertainty", "mutual-information", "--save-members", "--preview"]
    result = CliRunner().invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    mask = nib.load(tmp_path / "out" / "s0_seg.nii.gz")
    assert mask.shape == (16, 14, 6) and set(np.unique(mask.get_fdata())) == {0, 1}
    assert nib.load(tmp_path / "out" / "s0_members.nii.gz").shape == (16, 14, 6, 3)
    pseudo = CliRunner().invoke(app, [*command, "--save-pseudo-labels", "--max-disagreement", "0.01", "--statistics"])
    assert pseudo.exit_code == 0, pseudo.output
    kept = np.asarray(nib.load(tmp_path / "out" / "s0_pseudo.nii.gz").dataobj)
    assert set(np.unique(kept)) <= {0, 1, 255} and np.array_equal(kept[kept < 255], mask.get_fdata()[kept < 255])
    assert 0 <= json.loads((tmp_path / "out" / "s0_statistics.json").read_text())["disagreement"] <= 1
    more_members = CliRunner().invoke(app, [*command, "--ensemble", "30"])
    assert more_members.exit_code == 2 and "ensemble of 30 was asked for" in more_members.stderr
    one_member = [*command[:5], str(tmp_path / "alone"), *command[6:], "--save-pseudo-labels", "--ensemble", "1"]
    alone = CliRunner().invoke(app, [*one_member, "--save-probabilities"])
    assert not (tmp_path / "alone").exists()
    assert alone.exit_code == 2 and "members that can disagree" in alone.stderr
    result = CliRunner().invoke(app, [*command, "--steps", "5"])
    assert result.exit_code == 2 and "samples nothing: leave --steps and --sampler out" in result.stderr


def test_whole_batches_and_slabs_do_not_matter(scans, generators, tmp_path: Path, monkeypatch) -> None:
    run = train_pixel_classifier(quick(), generators[2], scans, 1, tmp_path / "run", test=False, device="cpu").model
    volume = read_volume(scans / "images" / "s1.nii.gz")
    one, other = (load_segmenter(run, "cpu").segment(volume, seed) for seed in (0, 1))
    assert torch.equal(one.probabilities, other.probabilities)  # nothing is drawn
    # Of a volume larger than memory a slab is classified at a time; this one holds two of the six slices.
    monkeypatch.setattr(pixel_segmenter, "PROBABILITIES_AT_ONCE", 2 * 3 * 2 * one.labels[..., 0].numel())
    model = load_segmenter(run, "cpu")
    assert [slab.shape[-1] for slab in model._slabs(volume.data)] == [2, 2, 2]
    slabs = model.segment(volume)
    torch.testing.assert_close(slabs.probabilities, one.probabilities)
    torch.testing.assert_close(slabs.uncertainty, one.uncertainty)
    assert torch.equal(slabs.members, one.members)


def test_diverse_selection_spreads_and_the_hash_is_nested(scans, generators, tmp_path: Path) -> None:
    def labelled(count: int, name: str, **options: str) -> tuple[str, ...]:
        run = tmp_path / f"{name}{count}"
        return train_pixel_classifier(
            quick(), generators[2], scans, count, run, test=False, device="cpu", **options
        ).labelled  # type: ignore[arg-type]

    one, three = labelled(1, "hash"), labelled(3, "hash")
    assert three[:1] == one and len(set(three)) == 3
    diverse = labelled(3, "diverse", select="diverse")
    assert len(set(diverse)) == 3


def test_diverse_units_are_one_of_each_cluster() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    points = [centres[i % 3] + 0.1 * torch.randn(2, generator=draw, dtype=torch.float64) for i in range(12)]
    for seed in range(5):
        assert {i % 3 for i in _diverse(points, 3, seed)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"labelled": 9}, InputError, "found 5 labelled cases to choose from; expected at least the 9 asked for"),
        (
            {"labels": ["box", "nothing"]},
            {},
            InputError,
            r"fewer than 20 pixels of label 2 \(nothing\) in each of the 1",
        ),
        (
            {"labels": ["box", "nothing"]},
            {"unit": "slice"},
            InputError,
            "found 0 labelled slices that show every class",
        ),
        ({"test_cases": 3}, {}, UsageError, "data.test_cases=3: of the 8 patients in"),
        ({}, {"flip_axes": [2]}, UsageError, "augmentation.flip_axes: no axis 2 in the generator's 2D"),
        ({}, {"unit": "slice", "generator": 3}, UsageError, "the generator makes volumes, so cases are labelled"),
    ],
)
def test_what_cannot_be_learned_is_refused(changes, options, error, message, scans, generators, tmp_path) -> None:
    labelled, unit = options.get("labelled", 1), options.get("unit", "case")
    source, config = generators[options.get("generator", 2)], quick(**changes)
    augmentation = config.augmentation.model_copy(update={"flip_axes": options.get("flip_axes", ())})
    config = config.model_copy(update={"augmentation": augmentation})
    with pytest.raises(error, match=message):
        train_pixel_classifier(config, source, scans, labelled, tmp_path / "run", unit=unit, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_generator_of_other_channels_is_refused(scans, generators, tmp_path: Path) -> None:
    folder = tmp_path / "colour"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for i in range(5):
        rng = np.random.default_rng(i)
        nib.save(
            nib.Nifti1Image(rng.random((8, 8, 8, 3)).astype(np.float32), np.eye(4)), folder / "images" / f"{i}.nii"
        )
        nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), np.eye(4)), folder / "labels" / f"{i}.nii")
    with pytest.raises(InputError, match=r"0\.nii: found 3 channels; expected a single one, as the generator's images"):
        train_pixel_classifier(quick(), generators[2], folder, 1, tmp_path / "run", device="cpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_pictures_go_to_the_generator_as_it_saw_them(channels, tmp_path: Path) -> None:
    """A dark and a bright rectangle in pictures without any other contrast, for a generator of grey or of colour."""
    data = tmp_path / "data"
    for part in ("images", "labels"):
        (data / part).mkdir(parents=True)
    for i in range(8):
        rng = np.random.default_rng(i)
        image, label = rng.normal(110, 4, (20, 16)), np.zeros((20, 16), np.uint8)
        x, y = int(rng.integers(0, 3)), int(rng.integers(6, 9))  # to the left and to the right
        for value, (row, column), level in ((1, (1, x), 60), (2, (12, y), 160)):
            place = slice(row, row + 7), slice(column, column + 7)
            label[place], image[place] = value, level
        Image.fromarray(image.astype(np.uint8)).save(data / "images" / f"p{i}.png")
        Image.fromarray(label).save(data / "labels" / f"p{i}.png")
    config = generator_config(16, 2)
    config = config.model_copy(update={"data": config.data.model_copy(update={"channels": channels})})
    generator = train_generator(config, data, tmp_path / "generator", device="cpu")
    found = labelled_units(
        quick(labels=["dark", "bright"]), in_memory(generator), data, Labelling(1), tmp_path / "cache"
    )
    cached = find_images(data)
    entry = next(e for e in cached.entries if Path(e.name).stem == found.units[0].name)
    picture = np.asarray(Image.open(data / entry.name)).astype(float) / 127.5 - 1
    # Two columns are padded on either side of what was 20 x 16, and all is resized by 16 / 20.
    assert found.units[0].images.shape == (1, channels, 16, 16)
    assert float(found.units[0].images[0, 0, :, 2:-2].mean()) == pytest.approx(picture.mean(), abs=0.02)
    square = np.asarray(Image.fromarray(picture.astype(np.float32)).resize((13, 16), Image.Resampling.BILINEAR))
    shown = found.units[0].images[0, 0, :, 3:-3].numpy()
    assert abs(shown - square[:, 1:-2]).mean() < 0.3 * abs(shown - square[:, ::-1][:, 1:-2]).mean()  # not mirrored
    classes = quick(labels=["dark", "bright"])
    trained = train_pixel_classifier(classes, generator, data, 3, tmp_path / "run", device="cpu")
    assert trained.test is not None and min(trained.test.dice[k].mean for k in (1, 2)) > 0.7
    command = ["segment", str(data / "images" / "p0.png"), "-m", str(tmp_path / "run"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    mask, reference = (
        np.asarray(Image.open(file)) for file in (tmp_path / "out" / "p0_seg.png", data / "labels" / "p0.png")
    )
    assert (mask == reference).mean() > 0.9


def in_memory(path: Path) -> Generator:
    return restore_generator(load_model_files(path))


def test_grey_images_stay_grey_when_they_are_changed(scans, generators, tmp_path: Path, monkeypatch) -> None:
    """Noise of its own in every channel is what such a generator never saw."""
    seen = []

    def spy(*args: Any, **options: Any) -> LabelledPixels:
        colour = torch.linspace(-1, 1, 256).reshape(1, 16, 16).expand(3, -1, -1)
        for i in range(5):
            changed, _ = args[4].change(colour, torch.zeros(16, 16), torch.Generator().manual_seed(i))
            assert changed.shape == (3, 16, 16) and torch.equal(changed[0], changed[2])
            seen.append(changed)
        return labelled_pixels(*args, **options)

    monkeypatch.setattr(train_module, "labelled_pixels", spy)
    config = quick(copies=2)
    config = config.model_copy(update={"augmentation": config.augmentation.model_copy(update={"probability": 1.0})})
    train_pixel_classifier(config, generators[2], scans, 1, tmp_path / "run", test=False, device="cpu")
    assert len(seen) == 5 and not torch.equal(seen[0], seen[1])


def test_what_the_generator_has_seen_is_not_scored(scans, generators, tmp_path: Path) -> None:
    """The preset holds out what the generator did; of an imported one nothing is known."""
    preset = load_config("label-efficient", ["data.labels=[box]"])
    generator = in_memory(generators[2])
    assert len(labelled_units(preset, generator, scans, Labelling(1), tmp_path / "cache").split.test) == 2
    few = quick(test_cases=1)
    assert len(labelled_units(few, generator, scans, Labelling(1), tmp_path / "cache").split.test) == 1
    section = generator.config.data
    unknown = type(section)(size=section.size, channels=section.channels)
    imported = replace(generator, config=generator.config.model_copy(update={"data": unknown}), held_out=None)
    more = quick(test_cases=4, validation_cases=1)
    assert len(labelled_units(more, imported, scans, Labelling(1), tmp_path / "cache").split.test) == 4


def test_a_part_of_the_generators_scans_and_others_are_split_as_it_was(scans, generators, tmp_path: Path) -> None:
    """The smallest hashes of a part are not the smallest of all: ranked anew, scans of training would be tested on."""
    generator = in_memory(generators[2])
    every = labelled_units(quick(), generator, scans, Labelling(1), tmp_path / "cache").split
    assert len(every.test) == 2
    part = tmp_path / "part"
    shutil.copytree(scans, part)
    for kind in ("images", "labels"):
        (part / kind / f"{every.test[0]}.nii.gz").unlink()
        shutil.copy(scans / kind / f"{every.train[0]}.nii.gz", part / kind / "another.nii.gz")
    found = labelled_units(quick(), generator, part, Labelling(1), tmp_path / "cache2").split
    assert set(found.test) - {"another"} == set(every.test[1:])
    assert set(found.train) - {"another"} == set(every.train)
    with pytest.raises(UsageError, match=r"data.test_cases=3: of the 8 patients in .*part \d are on the side"):
        labelled_units(quick(test_cases=3), generator, part, Labelling(1), tmp_path / "cache3")


@pytest.mark.parametrize(("mode", "white"), [("L", 255), ("I;16", 65535), ("1", 1)])
def test_pictures_of_any_depth_are_what_the_generator_saw(mode, white, generators, tmp_path: Path) -> None:
    levels = np.linspace(0, white, 16 * 16).round().reshape(16, 16)
    array = levels.astype(bool) if mode == "1" else levels.astype(np.uint16 if mode == "I;16" else np.uint8)
    Image.fromarray(array).save(tmp_path / "ramp.png")
    generator = in_memory(generators[2])
    image, _ = pixel_preprocessing(generator).apply(read_volume(tmp_path / "ramp.png"))
    found = find_images(tmp_path)
    seen = found.pixels(found.entries[0], (16, 16), 1)[0, ..., 0].astype(np.float32) / 127.5 - 1
    given = to_generator_grid(image[..., 0][None], (16, 16))[0, 0].numpy()
    np.testing.assert_allclose(given, seen, atol=1e-6)
    assert given.min() == -1 and given.max() == 1


def test_pictures_that_no_generator_saw_are_refused(generators, tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "real.tif")
    with pytest.raises(InputError, match="levels from 0 to 1; expected whole levels of 8 or 16 bits"):
        pixel_preprocessing(in_memory(generators[2])).apply(read_volume(tmp_path / "real.tif"))


def test_a_generator_of_volumes_refuses_pictures(generators, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(5):
            picture = np.random.default_rng(i).integers(0, 255 if kind == "images" else 2, (14, 12), np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / kind / f"p{i}.png")
    with pytest.raises(InputError, match=r"found a 2D image \(12 x 14\); expected volumes"):
        labelled_units(quick(), in_memory(generators[3]), tmp_path / "data", Labelling(1), tmp_path / "cache")


def with_labels(scans: Path, folder: Path, edit: Callable[[str, np.ndarray], None] = lambda name, label: None) -> Path:
    """A copy of the scans whose labels are edited, by name."""
    shutil.copytree(scans, folder)
    for file in (folder / "labels").iterdir():
        image = nib.load(file)
        label = np.asarray(image.dataobj).copy()
        edit(file.name.removesuffix(".nii.gz"), label)
        nib.save(nib.Nifti1Image(label, image.affine), file)
    return folder


def test_slices_that_show_too_little_are_not_labelled(scans, generators, tmp_path: Path) -> None:
    """On the grid of 16 x 16 a slice shows its 30 positions; all but slice 2 are cut down to 12."""

    def edit(name: str, label: np.ndarray) -> None:
        x, y, _ = (axis.min() for axis in np.nonzero(label))
        label[..., [1, 3, 4]] = 0
        label[x : x + 4, y : y + 3, [1, 3, 4]] = 1

    data, generator = with_labels(scans, tmp_path / "data", edit), in_memory(generators[2])
    for select in ("hash", "diverse"):
        found = labelled_units(quick(), generator, data, Labelling(5, "slice", select), tmp_path / "cache")
        assert {one.name.partition(", ")[2] for one in found.units} == {"slice 2"}
    with pytest.raises(InputError, match="found 5 labelled slices that show a class to choose from; expected at least"):
        labelled_units(quick(), generator, data, Labelling(6, "slice"), tmp_path / "cache")


def test_a_volume_beyond_the_generators_is_refused(scans, generators, tmp_path: Path) -> None:
    generator = in_memory(generators[3])
    section = generator.config.data.model_copy(update={"size": (16, 12, 8)})
    config = generator.config.model_copy(update={"data": section})
    narrow = replace(generator, config=config, shape=(1, 16, 12, 8))
    with pytest.raises(
        InputError, match="found 16 x 14 x 6 voxels on the generator's grid; expected at most 16 x 12 x 8"
    ):
        labelled_units(quick(), narrow, scans, Labelling(1), tmp_path / "cache")


def test_a_class_that_no_held_out_case_shows_has_no_score(scans, generators, tmp_path: Path) -> None:
    test = labelled_units(quick(), in_memory(generators[2]), scans, Labelling(1), tmp_path / "cache").split.test

    def edit(name: str, label: np.ndarray) -> None:
        if name not in test:  # rare and anywhere, so it is found nowhere
            label.flat[np.random.default_rng(int(name[1:])).choice(label.size, 24, replace=False)] = 2

    data = with_labels(scans, tmp_path / "data", edit)
    config = quick(labels=["box", "specks"])
    found = train_pixel_classifier(config, generators[2], data, 2, tmp_path / "run", device="cpu")
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert found.test is not None and found.test.dice[2].n == 0
    assert card["metrics"]["test"] == {"dice box": pytest.approx(found.test.dice[1].mean)}


def test_an_unusable_held_out_case_leaves_the_model(scans, generators, tmp_path: Path) -> None:
    data = with_labels(scans, tmp_path / "data")
    name = labelled_units(quick(), in_memory(generators[2]), scans, Labelling(1), tmp_path / "cache").split.test[0]
    (data / "images" / f"{name}.nii.gz").write_bytes(b"broken")
    with pytest.raises(InputError, match=name):
        train_pixel_classifier(quick(), generators[2], data, 1, tmp_path / "run", device="cpu")
    load_segmenter(tmp_path / "run", "cpu").segment(read_volume(scans / "images" / "s1.nii.gz"), 0)
    with pytest.raises(UsageError, match="run: is not an empty folder; choose another one"):
        train_pixel_classifier(quick(), generators[2], data, 1, tmp_path / "run", device="cpu")


def test_an_interrupted_call_can_be_given_again(scans, generators, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "classifiers":
            raise KeyboardInterrupt

    for _ in range(2):  # a folder that was there stays
        with pytest.raises(KeyboardInterrupt):
            train_pixel_classifier(
                quick(), generators[2], scans, 1, tmp_path / "run", device="cpu", on_progress=interrupt
            )
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
        (tmp_path / "run").mkdir(exist_ok=True)


def test_activations_are_taken_where_the_generator_is(generators) -> None:
    """On "meta" in place of a GPU: noise that stays on the CPU would not meet the network, or draw it there."""
    generator = in_memory(generators[2])
    generator.task.to("meta")
    net = pixel_activations(generator, quick(), ["decoder.0"])
    blocks = net.with_blocks(["decoder.1"])(torch.zeros(1, *generator.shape, device="meta"))
    assert {block.device.type for block in blocks} == {generator.device.type} == {"meta"}


def test_without_a_held_out_case_there_are_no_scores_and_it_says_so(scans, generators, tmp_path: Path) -> None:
    split = labelled_units(quick(), in_memory(generators[2]), scans, Labelling(1), tmp_path / "cache").split
    data = with_labels(scans, tmp_path / "data")
    for name in (*split.test, *split.validation):
        for kind in ("images", "labels"):
            (data / kind / f"{name}.nii.gz").unlink()
    config = tmp_path / "quick.yaml"
    config.write_text(yaml.safe_dump(quick().model_dump(mode="json")))
    command = ["train-pixel-classifier", str(config), "--generator", str(generators[2]), "--data", str(data)]
    result = CliRunner().invoke(app, [*command, "--labelled", "1", "-o", str(tmp_path / "run"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "no scores: no case is on the side that the generator held out" in result.output


def test_held_out_references_of_two_files_are_scored(scans, generators, tmp_path: Path) -> None:
    data = with_labels(scans, tmp_path / "data")
    for name in labelled_units(quick(), in_memory(generators[2]), scans, Labelling(1), tmp_path / "cache").split.test:
        file = data / "labels" / f"{name}.nii.gz"
        SimpleITK.WriteImage(SimpleITK.ReadImage(file), data / "labels" / f"{name}.mhd")
        file.unlink()
    found = train_pixel_classifier(quick(), generators[2], data, 1, tmp_path / "run", device="cpu")
    assert found.test is not None and found.test.dice[1].n == 2


@pytest.mark.parametrize(("names", "message"), [([], "classes are 0 to 2"), (["box"], "data.labels 0 to 1")])
def test_labels_with_gaps_are_refused(names, message, scans, generators, tmp_path: Path) -> None:
    """Numbered anew, label 3 would be none of the classes."""
    cases = [{"image": f"images/s{i}.nii.gz", "label": f"labels/s{i}.nii.gz"} for i in range(8)]
    known = {"labels": {"0": "background", "1": "box", "3": "other"}, "training": cases}
    data = with_labels(scans, tmp_path / "data")
    (data / "dataset.json").write_text(json.dumps(known))
    with pytest.raises(UsageError, match=f"dataset.json names labels 0, 1, 3, but {message}; number them without gaps"):
        labelled_units(quick(labels=names), in_memory(generators[2]), data, Labelling(1), tmp_path / "cache")


def test_members_beyond_ten_are_further_members(scans, generators, tmp_path: Path) -> None:
    config = quick()
    many = config.model_copy(
        update={"classifier": config.classifier.model_copy(update={"members": 12, "max_epochs": 1})}
    )
    run = train_pixel_classifier(many, generators[2], scans, 1, tmp_path / "run", test=False, device="cpu").model
    model = load_segmenter(run, "cpu")
    volume = read_volume(scans / "images" / "s1.nii.gz")
    ensemble, _ = model.sample(volume, 0)
    image = model.preprocessing.apply(volume)[0].movedim(-1, 0)
    with torch.no_grad():
        members = model.model.probabilities(image, [[0] * 12] * len(image), model.way.sampler, model.way.times)
    assert len(ensemble) == 12
    torch.testing.assert_close(ensemble.mean, members.mean(1).movedim(0, -1).float(), rtol=1e-4, atol=1e-4)


def test_an_unfit_generator_is_refused_before_the_data_is_read(generators, tmp_path: Path) -> None:
    config = quick()
    features = config.features.model_copy(update={"times": (50, 1000)})
    late = config.model_copy(update={"features": features})
    with pytest.raises(UsageError, match="time 1000 is beyond"):
        train_pixel_classifier(late, generators[2], tmp_path / "no folder", 1, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()

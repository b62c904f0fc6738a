"""Label-efficient segmentation, from pixels to `medseg train-pixel-classifier` and `medseg segment`."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from medseg_cli.main import app
from typer.testing import CliRunner

from medseg_diffusion.config import GeneratorConfig, PixelClassifierConfig, parse_config
from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.errors import InputError, MedsegError, UsageError
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.methods.ensemble import Ensemble
from medseg_diffusion.methods.label_efficient import (
    ClassifierOptions,
    PixelSegmentation,
    choose_blocks,
    fit_classifiers,
    labelled_pixels,
)
from medseg_diffusion.networks.pixel_classifier import upsampled
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.pipeline import SegmentationModel
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.tasks.image import ImageDiffusion
from medseg_diffusion.train_generator import train_generator
from medseg_diffusion.train_pixel_classifier import train_pixel_classifier
from medseg_diffusion.volumes.fitting import fitted, fitted_labels
from medseg_diffusion.volumes.io import read_volume

FAST = ClassifierOptions(members=2, hidden=(16, 8), max_epochs=4, min_epochs=2)


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
    pixels = labelled_pixels(net, [image], [label], 2, 30, 0, tmp_path / "features.npy")
    assert isinstance(pixels.features, np.memmap) and pixels.features.shape == (60, sum(pixels.channels))
    assert torch.bincount(pixels.labels).tolist() == [30, 30]
    whole = torch.cat([upsampled(block, label.shape) for block in net(image[None])], 1)[0].flatten(1).T.half()
    rows = {tuple(row.tolist()): int(label.flatten()[i]) for i, row in enumerate(whole)}
    near = torch.cdist(torch.from_numpy(np.array(pixels.features)).float(), whole.float()).min(1)
    assert float(near.values.max()) < 0.05
    assert torch.equal(label.flatten()[near.indices], pixels.labels) and len(rows) > 30


def test_the_probabilities_are_those_of_the_images_not_of_the_balanced_sample() -> None:
    """Features that say nothing: what remains is how frequent the classes are."""
    net = activations()
    label = torch.zeros(16, 16, dtype=torch.int64)
    label[:2, :12] = 1  # 24 of 256
    noise = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 1e-4
    pixels = labelled_pixels(net, [noise], [label], 2, 1000, 0)
    assert pixels.share.tolist() == pytest.approx([232 / 256, 24 / 256])
    blank = type(pixels)(np.zeros_like(pixels.features), pixels.labels, pixels.image, pixels.share, pixels.channels)
    few = labelled_pixels(net, [noise], [label], 2, 24, 0)
    balanced = type(blank)(np.zeros_like(few.features), few.labels, few.image, few.share, few.channels)
    for sample in (blank, balanced):
        options = ClassifierOptions(members=3, hidden=(8, 8), learning_rate=0.02, max_epochs=100, min_epochs=90)
        model = fit_classifiers(sample, options)
        with torch.no_grad():
            share = model(torch.zeros(4, sum(sample.channels))).softmax(-1)[..., 1].mean()
        assert float(share) == pytest.approx(24 / 256, abs=0.05)


def test_the_same_seed_gives_the_same_classifiers() -> None:
    image, label = two_halves(2)
    pixels = labelled_pixels(activations(), [image], [label], 2, 30, 0)
    one, same, other = (fit_classifiers(pixels, FAST, seed) for seed in (1, 1, 2))
    probe = torch.from_numpy(np.array(pixels.features)).float()
    with torch.no_grad():
        assert torch.equal(one(probe), same(probe)) and not torch.equal(one(probe), other(probe))
        assert not torch.equal(one(probe)[0], one(probe)[1])  # members differ


def test_a_small_network_has_its_blocks_searched_and_a_large_one_the_published() -> None:
    image, label = two_halves(2)
    assert choose_blocks(activations(), [image], [label], 2, 0) == tuple(f"decoder.{i}" for i in range(4))
    torch.manual_seed(0)
    deep = UNet(2, 1, 1, channels=8, channel_mult=(1, 1, 1, 1, 1, 1), num_res_blocks=2, norm_groups=4)
    task = ImageDiffusion(NetworkDenoiser(deep, linear(1000)), Simple()).eval()
    published = Activations(task, None, (1, 32, 32))
    assert choose_blocks(published, [image], [label], 2, 0) == tuple(f"decoder.{i}" for i in (5, 6, 7, 8, 12))
    middling = UNet(2, 1, 1, channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4)
    task = ImageDiffusion(NetworkDenoiser(middling, linear(1000)), Simple()).requires_grad_(False).eval()
    searched = choose_blocks(Activations(task, None, (1, 16, 16), blocks=[]), [image, image], [label, label], 2, 0)
    assert len(searched) == 5 and list(searched) == sorted(searched)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_easy_image_is_learned_and_its_members_agree(dims) -> None:
    net, (image, label) = activations(dims), two_halves(dims)
    there, known = fitted(image[None], label.shape)[0], fitted_labels(label[None], label.shape)[0]
    pixels = labelled_pixels(net, [there], [known], 2, 128, 0)
    options = ClassifierOptions(members=3, hidden=(16, 8), min_epochs=20)
    model = PixelSegmentation(net, fit_classifiers(pixels, options), label.shape)
    with torch.no_grad():
        found = model.probabilities(image[None], [[0, 1, 2]], DDIM(), [1, 0])
        two = model.probabilities(image[None], [[0, 1]], DDIM(), [1, 0])
    assert found.shape == (1, 3, 2, *label.shape) and torch.equal(two, found[:, :2])
    assert float((found[0].mean(0).argmax(0) == label).float().mean()) > 0.97
    with pytest.raises(UsageError, match="ensemble of 4 was asked for, but the model has 3"):
        model.probabilities(image[None], [[0, 1, 2, 3]], DDIM(), [1, 0])


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
    with pytest.raises(UsageError, match="side of 15 is no multiple of 2"):
        Activations(task, None, (1, 16, 15), blocks=[])


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
            "data": {"labels": ["box"], "test_cases": 2, "validation_cases": 1, "pixels_per_class": 200, **data},
            "classifier": {"members": 3, "hidden": [16, 8]},
        },
        "test",
    )
    assert isinstance(found, PixelClassifierConfig)
    return found


@pytest.mark.parametrize(("dims", "unit"), [(2, "case"), (2, "slice"), (3, "case")])
def test_from_a_generator_to_scored_masks(dims, unit, scans, generators, tmp_path: Path) -> None:
    found = train_pixel_classifier(quick(), generators[dims], scans, 2, tmp_path / "run", unit=unit, device="cpu")
    assert found.test is not None and found.test.dice[1].n == 2 and found.test.dice[1].mean > 0.7
    assert len(found.labelled) == 2 and json.loads((tmp_path / "run" / "labelled.json").read_text())["unit"] == unit
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "labelled.json", "model", "test"}
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert card["metrics"]["test"]["dice box"] == pytest.approx(found.test.dice[1].mean)
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
    alone = CliRunner().invoke(app, [*command, "--save-pseudo-labels", "--ensemble", "1"])
    assert alone.exit_code == 2 and "members that can disagree" in alone.stderr
    result = CliRunner().invoke(app, [*command, "--steps", "5"])
    assert result.exit_code == 2 and "samples nothing: leave --steps and --sampler out" in result.stderr


def test_whole_batches_and_windows_do_not_matter(scans, generators, tmp_path: Path) -> None:
    run = train_pixel_classifier(quick(), generators[2], scans, 1, tmp_path / "run", test=False, device="cpu").model
    volume = read_volume(scans / "images" / "s1.nii.gz")
    one, other = (SegmentationModel(run, "cpu").segment(volume, seed) for seed in (0, 1))
    assert torch.equal(one.probabilities, other.probabilities)  # nothing is drawn


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


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"labelled": 9}, InputError, "found 5 labelled cases to choose from; expected at least the 9 asked for"),
        ({"labels": ["box", "nothing"]}, {}, UsageError, "class 2 has fewer than 20 pixels in each of the"),
        ({}, {"unit": "slice", "generator": 3}, UsageError, "the generator makes volumes, so cases are labelled"),
    ],
)
def test_what_cannot_be_learned_is_refused(changes, options, error, message, scans, generators, tmp_path) -> None:
    labelled, unit = options.get("labelled", 1), options.get("unit", "case")
    source = generators[options.get("generator", 2)]
    with pytest.raises(error, match=message):
        train_pixel_classifier(quick(**changes), source, scans, labelled, tmp_path / "run", unit=unit, device="cpu")
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
    with pytest.raises(MedsegError, match="expected a 3D volume"):
        train_pixel_classifier(quick(), generators[2], folder, 1, tmp_path / "run", device="cpu")

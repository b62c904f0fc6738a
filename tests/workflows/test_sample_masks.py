"""`medseg sample --masks`: images that obey masks, in a folder that trains a segmenter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion import load_model
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.volumes.io import stored_labels
from medseg_diffusion.workflows.evaluate_generator import GeneratorEvaluationOptions, evaluate_generator
from medseg_diffusion.workflows.real_images import images_of_training
from medseg_diffusion.workflows.sample import read_png, sample
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.cli import error_lines, medseg
from tests.helpers.generators import (
    QUIET,
    mask_config,
    save_labelled_pictures,
    save_labelled_volumes,
    small_config,
)

pytestmark = QUIET
STEPS = {"batch_size": 2, "max_steps": 1, "validate_every": 1, "warmup_steps": 1, "ema_decay": 0.5}
VOLUMES = {
    "data": {"size": [12, 12, 12], "channels": 1, "validation_images": 1, "labels": ["block"]},
    "network": {"dims": 3, "channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 4},
    "training": STEPS,
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    save_labelled_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    save_labelled_volumes(folder)
    return folder


@pytest.fixture(scope="module")
def obedient(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that has learned: bright where the mask is."""
    training = {
        "batch_size": 8, "max_steps": 120, "validate_every": 120, "warmup_steps": 10, "ema_decay": 0.9,
        "learning_rate": 3.0e-3,
    }  # fmt: skip
    config = mask_config(training=training, sampling={"sampler": "ddim", "steps": 8})
    return train_generator(config, squares, tmp_path_factory.mktemp("obedient") / "run", device="cpu")


@pytest.fixture(scope="module")
def of_volumes(blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator of volumes."""
    return train_generator(mask_config(**VOLUMES), blocks, tmp_path_factory.mktemp("v") / "run", device="cpu")


def drawn(count: int = 1, **options: object) -> SampleOptions:
    return SampleOptions(**{"count": count, "device": "cpu", **options})  # type: ignore[arg-type]


def dice(image: np.ndarray, mask: np.ndarray) -> float:
    return float(2 * (image & mask).sum() / (image.sum() + mask.sum()))


def test_images_obey_their_masks_and_are_a_labelled_folder(obedient: Path, squares: Path, tmp_path: Path) -> None:
    images = sample(obedient, tmp_path / "out", drawn(2), masks=squares / "masks")
    assert len(images) == 24
    cases = {case.name: case for case in find_cases(tmp_path / "out").cases}
    for name, case in cases.items():
        mask = read_png(case.label)[..., 0]
        original = squares / "masks" / f"{name.split('_')[0]}.png"
        assert np.array_equal(mask, read_png(original)[..., 0]), "the mask itself, not one of the model's grid"
        assert dice(read_png(case.image)[..., 0] > 128, mask > 0) > 0.9
        assert case.patient == name.split("_")[0], "all images of a mask are of one patient"
    one, other = (read_png(cases[name].image).astype(int) for name in ("3_s001", "3_s002"))
    assert not np.array_equal(one, other)


def test_the_folder_trains_a_segmenter(obedient: Path, squares: Path, tmp_path: Path) -> None:
    sample(obedient, tmp_path / "out", drawn(2, steps=1), masks=squares)
    config = SegmenterConfig.model_validate(
        {
            "method": "baseline",
            "data": {"window": [16, 16], "test_cases": 1, "validation_cases": 1},
            "network": {"dims": 2, "channels": 8, "channel_mult": [1, 2], "norm_groups": 4},
            "training": {**STEPS, "max_steps": 2, "validate_every": 2},
        }
    )
    model = train_segmenter(config, tmp_path / "out", tmp_path / "run", device="cpu")
    card = load_model_files(model).card
    assert card["labels"] == {"0": "background", "1": "square"}, "names come with the folder"
    assert card["training"]["data"]["patients"] == 10 and card["training"]["data"]["cases"] == 20


def test_images_are_the_same_in_any_batch_and_a_call_can_be_finished(
    obedient: Path, squares: Path, tmp_path: Path
) -> None:
    whole = sample(obedient, tmp_path / "a", drawn(2, batch_size=24, sampler="ddpm", steps=4), masks=squares / "masks")
    parts = sample(obedient, tmp_path / "b", drawn(1, batch_size=5, sampler="ddpm", steps=4), masks=squares / "masks")
    stamp = parts[0].stat().st_mtime_ns
    parts[3].unlink()
    parts = sample(obedient, tmp_path / "b", drawn(2, batch_size=7, sampler="ddpm", steps=4), masks=squares / "masks")
    assert parts[0].stat().st_mtime_ns == stamp
    for one, two in zip(whole, parts, strict=True):
        assert np.abs(read_png(one).astype(int) - read_png(two).astype(int)).max() <= 1
    rows = (tmp_path / "b" / "patients.csv").read_text().splitlines()
    assert len(rows) == 25 and rows[1] == "0_s001,0"
    sample(obedient, tmp_path / "b", drawn(1, sampler="ddpm", steps=4), masks=squares / "masks")
    assert len(find_cases(tmp_path / "b").cases) == 24, "fewer images take none out, and all have their patient"
    some = tmp_path / "some"
    shutil.copytree(squares / "masks", some)
    (some / "0.png").unlink()
    with pytest.raises(UsageError, match="of other options"):
        sample(obedient, tmp_path / "b", drawn(2, sampler="ddpm", steps=4), masks=some)


def test_without_a_number_one_image_of_each_mask_is_drawn(obedient: Path, squares: Path, tmp_path: Path) -> None:
    """In Python as by the command; 16 of each would be the default without masks."""
    images = sample(obedient, tmp_path / "out", SampleOptions(steps=1, device="cpu"), masks=squares / "masks")
    assert len(images) == 12
    assert len(sample(obedient, tmp_path / "plain", SampleOptions(steps=1, device="cpu"))) == 16


def test_one_model_draws_with_and_without_masks(obedient: Path, squares: Path, tmp_path: Path) -> None:
    """Guidance 0 is the model without mask, whatever the mask; guidance 2 is not 1."""
    plain = sample(obedient, tmp_path / "plain", drawn(2))
    assert [path.name for path in plain] == ["00000.png", "00001.png"]
    source = ImageSource(obedient, drawn(guidance=0.0), masked=True)
    masks = torch.zeros(2, 16, 16, dtype=torch.long)
    masks[1, 2:8, 2:8] = 1
    without = source.draw_masks(masks, [5, 5]).int()
    assert int((without[0] - without[1]).abs().max()) <= 1
    plainly, strongly = (
        ImageSource(obedient, drawn(guidance=g), masked=True).draw_masks(masks, [5, 5]).int() for g in (1.0, 2.0)
    )
    assert int((plainly[0] - plainly[1]).abs().max()) > 50 and not torch.equal(plainly, strongly)


def test_a_generator_of_masks_is_scored_against_images_as_it_was_trained_on(
    obedient: Path, squares: Path, scoring_network: Path, tmp_path: Path
) -> None:
    """Without masks, and with real images read as in the training: scaled by percentiles, not as they are stored."""
    options = GeneratorEvaluationOptions(
        [("ddim", 8)], SampleOptions(count=6, device="cpu"), extractor=str(scoring_network)
    )
    result = evaluate_generator(obedient, squares, tmp_path / "scores", options)
    assert result.reference_count == 12 and [row.sampler for row in result.rows] == ["", "ddim"]
    real = images_of_training(ImageSource(obedient, drawn()), squares)
    assert int(real.images.min()) == 0 and int(real.images.max()) == 255, "stored are levels 40 to 229"


def test_python_draws_images_of_masks(obedient: Path) -> None:
    model = load_model(obedient, "cpu")
    mask = np.zeros((20, 16, 1), np.uint8)
    mask[6:13, 5:11] = 1
    drawn_images = model.sample(2, masks=[mask, np.roll(mask, 3, 1)], spacing_mm=(1, 1, 1))
    assert drawn_images.images.shape == (4, 16, 16, 1) and drawn_images.masks.shape == (4, 16, 16)
    for image, label in zip(drawn_images.images, drawn_images.masks, strict=True):
        assert dice(image[..., 0] > 128, label > 0) > 0.85
    assert np.array_equal(drawn_images.masks[0], drawn_images.masks[2])
    assert model.mask_classes == {0: "background", 1: "square"} and model.sample(1).masks is None
    with pytest.raises(UsageError, match="a list of label maps"):
        model.sample(1, masks="mask.nii.gz")


def test_the_sheet_outlines_the_masks_and_real_images_stand_beside(
    obedient: Path, of_volumes: Path, squares: Path, blocks: Path, scoring_network: Path, tmp_path: Path
) -> None:
    """Beside each image stands the same one, with the border of its mask in the colour of its class."""
    for model, data, name in ((obedient, squares, "squares"), (of_volumes, blocks, "blocks")):
        sample(model, tmp_path / name, drawn(steps=1), masks=data, reference=data, extractor=str(scoring_network))
        found = json.loads((tmp_path / name / "reference.json").read_text())
        assert found["samples"] == len(list((tmp_path / name / "imagesTr").iterdir()))
        assert found["training_images"] + found["unseen_images"] == len(list((data / "images").iterdir()))
    picture = np.asarray(Image.open(tmp_path / "squares" / "grid.png"))
    plain, marked = picture[:160, :160], picture[:160, 162:322]
    changed = (plain != marked).any(-1)
    inside = read_png(squares / "masks" / "0.png")[..., 0].repeat(10, 0).repeat(10, 1) > 0
    assert changed[inside].any() and not changed[~inside].any() and not changed.all()
    assert len(np.unique(marked[changed], axis=0)) == 1


def test_volumes_have_the_grid_and_the_names_of_their_masks(of_volumes: Path, blocks: Path, tmp_path: Path) -> None:
    images = sample(of_volumes, tmp_path / "out", drawn(steps=1), masks=blocks / "labels")
    for path in images:
        image = nib.load(path)
        case = path.name.removesuffix("_0000.nii.gz")
        label = nib.load(tmp_path / "out" / "labelsTr" / f"{case}.nii.gz")
        original = nib.load(blocks / "labels" / f"{case.removesuffix('_s001')}.nii.gz")
        assert image.shape == label.shape == original.shape
        assert np.allclose(image.affine, original.affine) and np.allclose(label.affine, original.affine)
        assert np.array_equal(np.asarray(label.dataobj), np.asarray(original.dataobj))
        assert stored_labels(tmp_path / "out" / "labelsTr" / f"{case}.nii.gz") == {1: "block"}
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] == {"background": 0, "block": 1}


def test_a_model_of_slices_draws_a_volume_slice_by_slice(blocks: Path, tmp_path: Path) -> None:
    slices = {"data": {"size": 16, "channels": 1, "validation_images": 1, "labels": ["block"]}, "training": STEPS}
    model = train_generator(mask_config(**slices), blocks, tmp_path / "run", device="cpu")
    (image,) = sample(model, tmp_path / "out", drawn(steps=1, batch_size=4), masks=blocks / "labels" / "case1.nii.gz")
    levels = nib.load(image).get_fdata()
    assert levels.shape == (12, 10, 9)
    assert not np.array_equal(levels[..., 3], levels[..., 4]), "every slice has noise of its own"


def test_a_latent_generator_obeys_masks_too(squares: Path, tmp_path: Path) -> None:
    """Both stages read the labelled images; the mask reaches the latent's grid."""
    autoencoder = small_config(
        "autoencoder",
        data={"size": 16, "channels": 1, "validation_images": 2},
        loss={"discriminator_channels": 8, "discriminator_layers": 1, "perceptual": "gradient-ssim"},
    )
    codec = train_generator(autoencoder, squares, tmp_path / "codec", device="cpu")
    model = train_generator(mask_config("latent"), squares, tmp_path / "run", autoencoder=codec, device="cpu")
    source = ImageSource(model, drawn(steps=2), masked=True)
    assert source.generator.shape == (2, 8, 8)
    for i, parameter in enumerate(source.generator.task.parameters()):  # two steps leave layers at zero
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    masks = torch.zeros(2, 16, 16, dtype=torch.long)
    masks[1, 2:9, 2:9] = 1
    images = source.draw_masks(masks, [1, 1])
    assert images.shape == (2, 16, 16, 1) and not torch.equal(images[0], images[1])


def test_masks_that_do_not_fit_are_refused_in_one_line(
    obedient: Path, of_volumes: Path, squares: Path, blocks: Path, image_models: dict[str, Path], tmp_path: Path
) -> None:
    def refused(code: int, said: str, *arguments: object) -> None:
        result = medseg("sample", *arguments, "-o", tmp_path / "out", "--device", "cpu")
        assert result.exit_code == code, result.stderr
        (line,) = error_lines(result)
        assert said in line
        assert not (tmp_path / "out").exists()

    def saved(name: str, data: np.ndarray) -> Path:
        nib.save(nib.Nifti1Image(data.astype(np.uint8), np.eye(4)), tmp_path / name)
        return tmp_path / name

    other = tmp_path / "other.png"
    Image.fromarray(np.full((16, 16), 3, np.uint8)).save(other)
    grey = tmp_path / "grey.png"
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(grey)
    refused(3, "label 3; expected labels 0 to 1", obedient, "--masks", other)
    refused(3, "a colour image", obedient, "--masks", grey)
    refused(3, "no such file or folder", obedient, "--masks", tmp_path / "nowhere")
    refused(
        3,
        "13 x 9 x 9 voxels on the model's grid; expected",
        of_volumes,
        "--masks",
        saved("large.nii.gz", np.ones((13, 9, 9))),
    )
    refused(3, "a 2D mask (16 x 16); expected volumes", of_volumes, "--masks", squares / "masks")
    refused(3, "a single slice across another axis", obedient, "--masks", saved("thin.nii.gz", np.ones((16, 1, 16))))
    refused(2, "is not conditioned by masks", image_models["pixel"], "--masks", squares / "masks")
    refused(2, "this model has no classes; leave --class out", obedient, "--class", 0, "--masks", squares / "masks")
    refused(2, "--guidance strengthens the mask, and there is none", obedient, "--guidance", 2)
    always = train_generator(mask_config(drop=0.0, training=STEPS), squares, tmp_path / "always", device="cpu")
    refused(2, "it draws images of masks only: give --masks", always)
    full = tmp_path / "full"
    full.mkdir()
    (full / "dataset.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds dataset\.json, but no samples"):
        sample(obedient, full, drawn(), masks=squares / "masks")
    assert (full / "dataset.json").read_text() == "{}"


def test_masks_whose_names_contradict_the_model_are_refused(of_volumes: Path, blocks: Path, tmp_path: Path) -> None:
    """Two models of two classes, in another order: the values alone would fit."""
    two = tmp_path / "two"
    save_labelled_volumes(two, classes=2)
    data = {**VOLUMES["data"], "labels": ["anterior block", "posterior block"]}
    model = train_generator(mask_config(**{**VOLUMES, "data": data}), two, tmp_path / "run", device="cpu")
    (two / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "Posterior", "2": "Anterior"}}))
    with pytest.raises(InputError, match="label 1 named 'Posterior'; expected 'anterior block'"):
        sample(model, tmp_path / "out", drawn(steps=1), masks=two / "labels")

"""`medseg train-pixel-classifier` from a generator to scored masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import yaml
from medseg_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion.data.images import find_images
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.methods.label_efficient import (
    LabelledPixels,
    labelled_pixels,
)
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows import train_pixel_classifier as train_module
from medseg_diffusion.workflows.labelled_units import Labelling, labelled_units
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier
from tests.helpers.pixel_classifiers import generator_config, in_memory, quick, with_labels

CUDA = pytest.param(2, "case", "cuda", marks=pytest.mark.cuda)


@pytest.mark.parametrize(
    ("dims", "unit", "device"), [(2, "case", "cpu"), (2, "slice", "cpu"), (3, "case", "cpu"), CUDA]
)
def test_from_a_generator_to_scored_masks(dims, unit, device, box_scans, box_generators, tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    told: list[tuple[str, float]] = []
    found = train_pixel_classifier(
        quick(copies=2), box_generators[dims], box_scans, 2, tmp_path / "run", unit=unit, device=device,
        on_progress=lambda *one: told.append(one),
    )  # fmt: skip
    assert ("features of labelled images: 6 of 6", 1.0) in told
    assert found.test is not None and found.test.dice[1].n == 2 and found.test.dice[1].mean > 0.7
    assert len(found.labelled) == 2 and json.loads((tmp_path / "run" / "labelled.json").read_text())["unit"] == unit
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "labelled.json", "model", "test"}
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert card["metrics"]["test"]["dice box"] == pytest.approx(found.test.dice[1].mean)
    assert set(card["training"]["data"]) == {"labelled", "pixels"}  # names of cases could tell the patient
    references = list((tmp_path / "run" / "test" / "references").iterdir())
    assert len(references) == 2
    for reference in references:
        original = nib.load(box_scans / "labels" / reference.name)
        assert np.array_equal(nib.load(reference).get_fdata(), original.get_fdata())
    # The model is one like any other.
    scan = box_scans / "images" / "s0.nii.gz"
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
        ({"test_cases": 3}, {}, UsageError, "data.test_cases=3: the generator held out only"),
        ({}, {"flip_axes": [2]}, UsageError, "augmentation.flip_axes: no axis 2 in the generator's 2D"),
        ({}, {"unit": "slice", "generator": 3}, UsageError, "the generator makes volumes, so cases are labelled"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    changes, options, error, message, box_scans, box_generators, tmp_path
) -> None:
    labelled, unit = options.get("labelled", 1), options.get("unit", "case")
    source, config = box_generators[options.get("generator", 2)], quick(**changes)
    augmentation = config.augmentation.model_copy(update={"flip_axes": options.get("flip_axes", ())})
    config = config.model_copy(update={"augmentation": augmentation})
    with pytest.raises(error, match=message):
        train_pixel_classifier(config, source, box_scans, labelled, tmp_path / "run", unit=unit, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_generator_of_other_channels_is_refused(box_scans, box_generators, tmp_path: Path) -> None:
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
        train_pixel_classifier(quick(), box_generators[2], folder, 1, tmp_path / "run", device="cpu")


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


def test_grey_images_stay_grey_when_they_are_changed(box_scans, box_generators, tmp_path: Path, monkeypatch) -> None:
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
    train_pixel_classifier(config, box_generators[2], box_scans, 1, tmp_path / "run", test=False, device="cpu")
    assert len(seen) == 5 and not torch.equal(seen[0], seen[1])


def test_a_class_that_no_held_out_case_shows_has_no_score(box_scans, box_generators, tmp_path: Path) -> None:
    test = labelled_units(quick(), in_memory(box_generators[2]), box_scans, Labelling(1), tmp_path / "cache").split.test

    def edit(name: str, label: np.ndarray) -> None:
        if name not in test:  # rare and anywhere, so it is found nowhere
            label.flat[np.random.default_rng(int(name[1:])).choice(label.size, 24, replace=False)] = 2

    data = with_labels(box_scans, tmp_path / "data", edit)
    config = quick(labels=["box", "specks"])
    found = train_pixel_classifier(config, box_generators[2], data, 2, tmp_path / "run", device="cpu")
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert found.test is not None and found.test.dice[2].n == 0
    assert card["metrics"]["test"] == {"dice box": pytest.approx(found.test.dice[1].mean)}


def test_an_unusable_held_out_case_leaves_the_model(box_scans, box_generators, tmp_path: Path) -> None:
    data = with_labels(box_scans, tmp_path / "data")
    name = labelled_units(
        quick(), in_memory(box_generators[2]), box_scans, Labelling(1), tmp_path / "cache"
    ).split.test[0]
    (data / "images" / f"{name}.nii.gz").write_bytes(b"broken")
    with pytest.raises(InputError, match=name):
        train_pixel_classifier(quick(), box_generators[2], data, 1, tmp_path / "run", device="cpu")
    load_segmenter(tmp_path / "run", "cpu").segment(read_volume(box_scans / "images" / "s1.nii.gz"), 0)
    with pytest.raises(UsageError, match="run: is not an empty folder; choose another one"):
        train_pixel_classifier(quick(), box_generators[2], data, 1, tmp_path / "run", device="cpu")


def test_an_interrupted_call_can_be_given_again(box_scans, box_generators, tmp_path: Path) -> None:
    def interrupt(what: str, share: float) -> None:
        if what.startswith("classifiers"):
            raise KeyboardInterrupt

    for _ in range(2):  # a folder that was there stays
        with pytest.raises(KeyboardInterrupt):
            train_pixel_classifier(
                quick(), box_generators[2], box_scans, 1, tmp_path / "run", device="cpu", on_progress=interrupt
            )
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
        (tmp_path / "run").mkdir(exist_ok=True)


def test_without_a_held_out_case_there_are_no_scores_and_it_says_so(box_scans, box_generators, tmp_path: Path) -> None:
    split = labelled_units(quick(), in_memory(box_generators[2]), box_scans, Labelling(1), tmp_path / "cache").split
    data = with_labels(box_scans, tmp_path / "data")
    for name in (*split.test, *split.validation):
        for kind in ("images", "labels"):
            (data / kind / f"{name}.nii.gz").unlink()
    config = tmp_path / "quick.yaml"
    config.write_text(yaml.safe_dump(quick().model_dump(mode="json")))
    command = ["train-pixel-classifier", str(config), "--generator", str(box_generators[2]), "--data", str(data)]
    result = CliRunner().invoke(app, [*command, "--labelled", "1", "-o", str(tmp_path / "run"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "no scores: the generator held out none of these cases" in result.output


def test_held_out_references_of_two_files_are_scored(box_scans, box_generators, tmp_path: Path) -> None:
    data = with_labels(box_scans, tmp_path / "data")
    for name in labelled_units(
        quick(), in_memory(box_generators[2]), box_scans, Labelling(1), tmp_path / "cache"
    ).split.test:
        file = data / "labels" / f"{name}.nii.gz"
        SimpleITK.WriteImage(SimpleITK.ReadImage(file), data / "labels" / f"{name}.mhd")
        file.unlink()
    found = train_pixel_classifier(quick(), box_generators[2], data, 1, tmp_path / "run", device="cpu")
    assert found.test is not None and found.test.dice[1].n == 2


def test_scores_are_by_patient_whatever_their_names(box_scans, box_generators, tmp_path: Path) -> None:
    """Names with commas would merge in a careless table: two held-out people would be one."""
    data = with_labels(box_scans, tmp_path / "data")
    rows = "".join(
        f'{path.name.removesuffix(".nii.gz")},"Doe, {path.name[:2]}"\n' for path in (data / "images").iterdir()
    )
    (data / "patients.csv").write_text(f"case,patient\n{rows}")
    scores = train_pixel_classifier(quick(), box_generators[2], data, 1, tmp_path / "run", device="cpu").test
    assert scores is not None and scores.dice[1].n == len(scores.cases) > 1
    assert '"Doe, s' in (tmp_path / "run" / "test" / "patients.csv").read_text()


def test_an_unfit_generator_is_refused_before_the_data_is_read(box_generators, tmp_path: Path) -> None:
    config = quick()
    features = config.features.model_copy(update={"times": (50, 1000)})
    late = config.model_copy(update={"features": features})
    with pytest.raises(UsageError, match="time 1000 is beyond"):
        train_pixel_classifier(late, box_generators[2], tmp_path / "no folder", 1, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()

"""`medseg calibrate-segmenter`: a trained model is calibrated on patients that it has not seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.data.cases import digest
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows.calibrate_segmenter import calibrate_segmenter
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.cli import medseg
from tests.helpers.training import config


@pytest.fixture(scope="module")
def trained(block_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_segmenter(config(), block_scans, tmp_path_factory.mktemp("run") / "run", device="cpu")


@pytest.fixture
def elsewhere(block_scans: Path, tmp_path: Path) -> Path:
    """Six scans of patients that the model has not seen."""
    for part in ("images", "labels"):
        (tmp_path / "elsewhere" / part).mkdir(parents=True)
        for file in (block_scans / part).iterdir():
            shutil.copy(file, tmp_path / "elsewhere" / part / f"other-{file.name}")
    return tmp_path / "elsewhere"


def test_the_training_calibrates_on_a_side_of_its_own(block_scans: Path, tmp_path: Path) -> None:
    settings = config(calibration_cases=2)
    settings = settings.model_copy(update={"inference": settings.inference.model_copy(update={"ensemble": 2})})
    model = train_segmenter(settings, block_scans, tmp_path / "run", device="cpu")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert {name: len(cases) for name, cases in split.items()} == {
        "train": 2, "validation": 1, "test": 1, "calibration": 2,
    }  # fmt: skip
    card = load_model_files(model).card
    assert card["calibration"]["patients"] == card["calibration"]["ensemble"] == 2
    assert len(card["training"]["held_out"]["calibration"]) == 2
    assert card["training"]["data"]["calibration_patients"] == 2
    # It is what the final masks of exactly these scans say.
    own, ratios = load_segmenter(model, "cpu"), []
    for name in split["calibration"]:
        found = own.segment(read_volume(block_scans / "images" / f"{name}.nii.gz"), derive_seed(0, name))
        assert found.intervals_ml and found.level == pytest.approx(2 / 3, abs=1e-4)
        reference = (np.asarray(nib.load(block_scans / "labels" / f"{name}.nii.gz").dataobj) > 0).sum()
        ratios.append(abs(np.log((reference + 1) / (int((found.labels > 0).sum()) + 1))))
    assert card["calibration"]["volume_errors"] == [pytest.approx(max(ratios), abs=1e-5)]


@pytest.mark.parametrize("side", ["calibration", "test"])
def test_masks_for_later_are_checked_before_the_training(side: str, block_scans: Path, tmp_path: Path) -> None:
    """A wrong one must not come to light when all steps are done."""
    train_segmenter(config(calibration_cases=2), block_scans, tmp_path / "good", device="cpu", max_steps=1)
    name = json.loads((tmp_path / "good" / "split.json").read_text())[side][0]
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(block_scans, data)
    file = data / "labels" / f"{name}.nii.gz"
    label = nib.load(file)
    nib.save(nib.Nifti1Image(7 * np.asarray(label.dataobj), label.affine), file)
    with pytest.raises(InputError, match=rf"{name}\.nii\.gz: found the values 0 and 7; .*divide the mask by 7"):
        train_segmenter(config(calibration_cases=2), data, run, device="cpu", max_steps=1)
    assert not (run / "config.yaml").exists()
    shutil.copy(block_scans / "labels" / f"{name}.nii.gz", file)
    assert train_segmenter(config(calibration_cases=2), data, run, device="cpu", max_steps=1).is_dir()


def test_calibration_merges_the_labels_that_the_training_merges(block_scans: Path, tmp_path: Path) -> None:
    """Labels that dataset.json names are no greyscale values, however large they are."""
    data = tmp_path / "Task99"
    shutil.copytree(block_scans / "images", data / "imagesTr")
    (data / "labelsTr").mkdir()
    for file in (block_scans / "labels").iterdir():
        label = nib.load(file)
        voxels = np.asarray(label.dataobj).copy()
        voxels[4:][voxels[4:] == 1] = 20
        nib.save(nib.Nifti1Image(voxels, label.affine), data / "labelsTr" / file.name)
    names = sorted(file.name for file in (data / "labelsTr").iterdir())
    content = {
        "modality": {"0": "MR"},
        "labels": {"0": "background", **{str(value): f"part {value}" for value in range(1, 21)}},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
    }
    (data / "dataset.json").write_text(json.dumps(content))
    settings = config(calibration_cases=2)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"merge_labels": True})})
    model = train_segmenter(settings, data, tmp_path / "run", device="cpu")
    assert load_model_files(model).card["calibration"]["patients"] == 2


def test_without_calibration_patients_nothing_is_claimed(trained: Path) -> None:
    assert "calibration" not in load_model_files(trained).card


def test_the_command_writes_a_new_model(trained: Path, elsewhere: Path, tmp_path: Path) -> None:
    before = load_model_files(trained)
    result = medseg(
        "calibrate-segmenter", str(trained), "--data", str(elsewhere), "-o", str(tmp_path / "new"), "--json"
    )
    assert result.exit_code == 0, result.output
    calibration = json.loads(result.stdout)["calibration"]
    assert calibration["patients"] == calibration["cases"] == 6
    after = load_model_files(tmp_path / "new")
    digests = sorted(digest(path.name.removesuffix(".nii.gz")) for path in (elsewhere / "images").iterdir())
    known = {"scans": 6, "patients": 6, "digests": digests}
    assert after.card["calibration"] == calibration and after.card["calibrated_on"] == known
    assert before.card == {k: v for k, v in after.card.items() if k not in ("calibration", "calibrated_on")}
    assert load_segmenter(tmp_path / "new", "cpu").aggregation.calibration is not None
    with pytest.raises(UsageError, match="exists; choose a new folder"):
        calibrate_segmenter(trained, elsewhere, tmp_path / "new", device="cpu")


def test_scans_that_trained_or_chose_the_weights_are_not_used(trained: Path, block_scans: Path, tmp_path: Path) -> None:
    """Of six in the folder of the training, four trained, one chose the weights, and one was held out for testing."""
    assert calibrate_segmenter(trained, block_scans, tmp_path / "new", device="cpu").cases == 1
    data = shutil.copytree(block_scans, tmp_path / "data")
    [test] = json.loads((trained.parent / "split.json").read_text())["test"]
    for part in ("images", "labels"):
        (data / part / f"{test}.nii.gz").unlink()
    with pytest.raises(InputError, match="only scans that the model was trained or chosen on"):
        calibrate_segmenter(trained, data, tmp_path / "newer", device="cpu")


def test_patients_of_a_file_are_counted_once(trained: Path, elsewhere: Path, tmp_path: Path) -> None:
    data = elsewhere
    names = sorted(path.name.removesuffix(".nii.gz") for path in (data / "images").iterdir())
    rows = "\n".join(f"{name},{'one' if i < 3 else 'two'}" for i, name in enumerate(names))
    (data / "patients.csv").write_text(f"case,patient\n{rows}\n")
    result = calibrate_segmenter(trained, data, tmp_path / "new", device="cpu")
    assert (result.patients, result.cases) == (2, 6) and result.level == pytest.approx(2 / 3, abs=1e-4)


def test_unusable_scans_are_refused(trained: Path, elsewhere: Path, tmp_path: Path) -> None:
    data = elsewhere
    (data / "labels").rename(data / "raters")
    shutil.copytree(data / "raters", tmp_path / "masks")
    for reader in ("1", "2"):
        shutil.copytree(tmp_path / "masks", data / "raters" / reader)
    with pytest.raises(InputError, match="found several readers"):
        calibrate_segmenter(trained, data, tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()

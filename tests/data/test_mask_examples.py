"""Bad labels are found before training starts, and the file is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.case_store import CaseStore
from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.mask_examples import CaseFormat, prepare
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.preprocessing import Preprocessing
from medseg_diffusion.workflows.train_segmenter import train_segmenter


def config(labels: list[str]) -> SegmenterConfig:
    return SegmenterConfig.model_validate(
        {
            "method": "baseline",
            "data": {"window": [8, 8, 8], "labels": labels, "test_cases": 1, "validation_cases": 1},
            "network": {"channels": 8, "channel_mult": [1, 2]},
            "training": {"batch_size": 2, "max_steps": 1},
        }
    )


def folder(root: Path, change: object = None, affine: np.ndarray | None = None) -> Path:
    """Five scans with a block of label 1; ``change`` spoils the mask array of every case."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i in range(5):
        label = np.zeros((8, 8, 8), np.uint8)
        label[2:5, 2:6, 3:7] = 1
        if callable(change):
            label = change(label)
        nib.save(nib.Nifti1Image(np.random.default_rng(i).random((8, 8, 8)), np.eye(4)), root / "images" / f"{i}.nii")
        nib.save(nib.Nifti1Image(label, np.eye(4) if affine is None else affine), root / "labels" / f"{i}.nii")
    return root


def smooth(label: np.ndarray) -> np.ndarray:
    return np.linspace(0, 255, label.size).reshape(label.shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "labels", "message"),
    [
        (lambda label: label * 7, ["block"], r"labels/\d\.nii: found the values 0 and 7; .*divide the mask by 7"),
        (lambda label: label + 3, ["block", "rim"], r"labels/\d\.nii: found label 4; expected labels 0 to 2"),
        (smooth, ["block"], r"labels/\d\.nii: found 256 different values up to 255, as of a greyscale mask that was"),
        (lambda label: label * 0.5, ["block"], r"labels/\d\.nii: found the label 0\.5; expected whole numbers"),
        (None, ["block", "rim", "core"], r"data: found no voxel of label 2 \(rim\), 3 \(core\) in the 3 training"),
        (
            lambda label: label[:7],
            ["block"],
            r"labels/\d\.nii: found 7 x 8 x 8 voxels; expected 8 x 8 x 8 as in",
        ),
    ],
    ids=["0 and 7", "unnamed", "greyscale", "halves", "empty class", "other size"],
)
def test_a_bad_mask_is_refused_before_training(tmp_path: Path, change, labels, message) -> None:
    data = folder(tmp_path / "data", change)
    with pytest.raises(InputError, match=message):
        train_segmenter(config(labels), data, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "model").exists()


def test_a_mask_at_another_place_is_refused(tmp_path: Path) -> None:
    moved = np.eye(4)
    moved[0, 3] = 1.0
    with pytest.raises(InputError, match="found a grid up to 1 mm away"):
        train_segmenter(config(["block"]), folder(tmp_path / "data", affine=moved), tmp_path / "run", device="cpu")


def test_a_good_folder_trains(tmp_path: Path) -> None:
    assert train_segmenter(config(["block"]), folder(tmp_path / "data"), tmp_path / "run", device="cpu").is_dir()


def decathlon(data: Path, *labels: str) -> Path:
    pairs = [{"image": f"images/{i}.nii", "label": f"labels/{i}.nii"} for i in range(5)]
    info = {"training": pairs, "labels": dict(enumerate(("background", *labels))), "modality": {"0": "T1"}}
    (data / "dataset.json").write_text(json.dumps(info))
    return data


def test_names_of_labels_that_dataset_json_does_not_have_are_refused(tmp_path: Path) -> None:
    data = decathlon(folder(tmp_path / "data"), "rim", "core")
    with pytest.raises(UsageError, match=r"dataset\.json names labels 0, 1, 2, but data\.labels .* 0 to 1; name all"):
        train_segmenter(config(["block"]), data, tmp_path / "run", device="cpu")


def test_labels_can_be_merged_into_one_class(tmp_path: Path) -> None:
    """As whole tumour of the labels 1, 2 and 4 of BraTS; without names in dataset.json, too."""

    def parts(label: np.ndarray) -> np.ndarray:
        label[3:5] *= 4
        return label

    data = decathlon(folder(tmp_path / "data", parts), "rim", "oedema", "", "core")
    section = config(["tumour"]).data.model_copy(update={"merge_labels": True})
    merged = config(["tumour"]).model_copy(update={"data": section})
    model = train_segmenter(merged, data, tmp_path / "run", device="cpu")
    assert json.loads((model / "model.json").read_text())["labels"] == {"0": "background", "1": "tumour"}
    store = CaseStore(tmp_path / "run" / "cache")
    cached = [store.tensors(name)[1] for name, entry in store.entries.items() if entry["arrays"]]
    assert cached and all(set(label.unique().tolist()) == {0, 1} and int(label.sum()) == 48 for label in cached)
    train_segmenter(merged, folder(tmp_path / "unnamed", parts), tmp_path / "again", device="cpu")
    train_segmenter(merged, folder(tmp_path / "white", lambda label: 255 * label), tmp_path / "third", device="cpu")


def soft(label: np.ndarray) -> np.ndarray:
    """A mask of 0 and 255 with an interpolated rim."""
    label[3] *= 40
    label[4] *= 255
    return label


@pytest.mark.parametrize(
    ("change", "named", "message"),
    [
        (smooth, False, r"labels/\d\.nii: found 256 different values up to 255, as of a greyscale mask that was"),
        (soft, False, r"labels/\d\.nii: found 4 different values up to 255, .* expected labels below 16, or one value"),
        (soft, True, r"labels/\d\.nii: found label 40; expected one of 0, 1, 2; correct the label file or the names"),
    ],
    ids=["greyscale", "soft rim", "unnamed"],
)
def test_what_is_no_mask_is_not_merged(tmp_path: Path, change, named, message) -> None:
    data = folder(tmp_path / "data", change)
    section = config(["tumour"]).data.model_copy(update={"merge_labels": True})
    merged = config(["tumour"]).model_copy(update={"data": section})
    with pytest.raises(InputError, match=message):
        train_segmenter(merged, decathlon(data, "rim", "core") if named else data, tmp_path / "run", device="cpu")


def test_what_was_corrected_is_read_again(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", lambda label: label * 0)
    with pytest.raises(InputError, match=r"no voxel of label 1 \(block\)"):
        train_segmenter(config(["block"]), data, tmp_path / "run", device="cpu")
    for i in range(5):
        label = np.zeros((8, 8, 8), np.uint8)
        label[2:5, 2:6, 3:7] = 1
        nib.save(nib.Nifti1Image(label, np.eye(4)), data / "labels" / f"{i}.nii")
    train_segmenter(config(["block"]), data, tmp_path / "run", device="cpu")


def test_what_is_to_be_read_in_another_way_is_read_again(tmp_path: Path) -> None:
    data = find_cases(folder(tmp_path / "data", lambda label: 2 * label))

    def shown(preprocessing: Preprocessing, num_classes: int, merge: bool) -> tuple[set[int], int]:
        case = prepare(data.cases[:1], preprocessing, CaseFormat(1, num_classes, merge), tmp_path / "cache")[0]
        return set(case.label.unique().tolist()), case.image.shape[1]

    assert shown(Preprocessing(), 3, False) == ({0, 2}, 8)
    assert shown(Preprocessing(), 2, True) == ({0, 1}, 8)
    assert shown(Preprocessing(spacing_mm=(2.0, 2.0, 2.0)), 2, True) == ({0, 1}, 4)


def test_a_2d_model_is_not_trained_on_lines(tmp_path: Path) -> None:
    for i in range(5):
        for part, array in (("images", np.random.default_rng(i).random((1, 12, 10))), ("labels", np.ones((1, 12, 10)))):
            (tmp_path / "data" / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / "data" / part / f"{i}.nii")
    flat = config(["block"]).model_dump(mode="json")
    flat["data"]["window"], flat["network"]["dims"] = [8, 8], 2
    with pytest.raises(
        InputError, match=r"\d\.nii: found a single slice across another axis \(1 x 12 x 10 voxels, RAS\)"
    ):
        train_segmenter(SegmenterConfig.model_validate(flat), tmp_path / "data", tmp_path / "run", device="cpu")


def test_labels_beyond_the_middle_that_the_model_sees_are_told(tmp_path: Path) -> None:
    """Else a model trains without them, and its validation, which sees the middle as well, praises it."""
    for number, first in enumerate((4, 4, 0)):
        label = np.zeros((10, 10), np.uint8)
        label[first : first + 3, 4:6] = 1
        for kind, array in (("images", np.arange(100, dtype=np.uint8).reshape(10, 10)), ("labels", label)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / kind / f"c{number}.png")
    cases, expected = find_cases(tmp_path).cases, CaseFormat(1, 2)
    with pytest.warns(UserWarning, match=r"1 of 3 cases have labels beyond the middle 6 x 6 voxels.*\(c2\)"):
        prepared = prepare(cases, Preprocessing(None, crop_centre=(6, 6)), expected, tmp_path / "cropped")
    assert [int(case.label.sum()) for case in prepared] == [6, 6, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(cases, Preprocessing(None, crop_centre=(10, 10)), expected, tmp_path / "whole")
        prepare(cases, Preprocessing(None), expected, tmp_path / "plain")

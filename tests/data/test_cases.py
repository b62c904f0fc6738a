"""Folders to labelled cases, and their split by patient."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_diffusion.data.cases import Case, find_cases, split_by_hash
from medseg_diffusion.errors import InputError


def scan(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.arange(8, dtype=np.float32).reshape(2, 2, 2), np.eye(4)), path)
    return path


def decathlon(folder: Path, names: list[str], **entries: object) -> Path:
    for name in names:
        scan(folder / "imagesTr" / f"{name}.nii.gz")
        scan(folder / "labelsTr" / f"{name}.nii.gz")
    content = {
        "modality": {"0": "T1"},
        "labels": {"0": "background", "1": "anterior", "2": "posterior"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        **entries,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def nnunet(folder: Path, images: list[str], masks: list[str], **entries: object) -> Path:
    """A raw folder of nnU-Net, version 2."""
    for name in images:
        scan(folder / "imagesTr" / f"{name}.nii.gz")
    for name in masks:
        scan(folder / "labelsTr" / f"{name}.nii.gz")
    content = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "lesion": 1}, **entries}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_nnunets_files_are_channels_of_a_case(version: int, tmp_path: Path) -> None:
    images = ["p_1_0000", "p_1_0001", "p_2_0000", "p_2_0001"]
    entries: dict[str, object] = {}
    if version == 1:
        listed = [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in ("p_1", "p_2")
        ]
        labels = {"0": "background", "1": "lesion"}
        entries = {"training": listed, "modality": {"0": "T1", "1": "FLAIR"}, "labels": labels}
    found = find_cases(nnunet(tmp_path, images, ["p_1", "p_2"], **entries))
    assert found.channels == ("T1", "FLAIR") and found.labels == {0: "background", 1: "lesion"}
    assert [case.name for case in found.cases] == ["p_1", "p_2"]
    assert [path.name for path in found.cases[1].images] == ["p_2_0000.nii.gz", "p_2_0001.nii.gz"]


def test_a_case_with_a_gap_in_its_channels_is_refused(tmp_path: Path) -> None:
    """Read by order alone, the third channel would pass for the second."""
    folder = nnunet(tmp_path, ["p_0000", "p_0002"], ["p"])
    with pytest.raises(
        InputError, match=r"p_0000.nii.gz: found the further channels p_0002; expected p_0000, p_0001, \.\.\."
    ):
        find_cases(folder)


@pytest.mark.parametrize(
    ("regions", "names"),
    [
        (
            {"whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3},
            {1: "whole tumour without core", 2: "core without enhancing", 3: "enhancing"},
        ),
        ({"whole tumour": [1, 2, 3], "core": [2, 3]}, {1: "whole tumour without core", 2: "core 2", 3: "core 3"}),
        ({"a": [1, 2], "b": [2, 3]}, {1: "a", 2: "a and b", 3: "b"}),
        ({"one": [1], "two": 2}, {1: "one", 2: "two"}),
    ],
)
def test_labels_of_nnunets_regions_are_named_by_the_regions(regions, names, tmp_path: Path) -> None:
    labels = {"background": 0, **regions, "ignore": 4}
    folder = nnunet(tmp_path, ["p_0000", "p_0001"], ["p"], labels=labels, regions_class_order=[1, 2, 3])
    assert find_cases(folder).labels == {0: "background", **names}


def cases_of(*patients: str) -> list[Case]:
    return [Case(name, Path(name), Path(name), name) for name in patients]


# ---- Decathlon folders -----------------------------------------------------------------------------------------------


def test_a_decathlon_folder(tmp_path: Path) -> None:
    found = find_cases(decathlon(tmp_path, ["b_2", "a_1", "c.3"]))
    assert [case.name for case in found.cases] == ["a_1", "b_2", "c.3"], "sorted, whatever dataset.json says"
    assert found.cases[0] == Case(
        "a_1", tmp_path / "imagesTr" / "a_1.nii.gz", tmp_path / "labelsTr" / "a_1.nii.gz", "a_1"
    )
    assert found.labels == {0: "background", 1: "anterior", 2: "posterior"}
    assert found.channels == ("T1",)


def test_channels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    modality = {str(i): f"channel {i}" for i in (10, 2, 0, 1)}
    assert find_cases(decathlon(tmp_path, ["a"], modality=modality)).channels == (
        "channel 0", "channel 1", "channel 2", "channel 10",
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"training": [{"image": "a.nii.gz"}]}', '{"training": [], "labels": {"one": "x"}}', '"text"'],
)
def test_a_bad_dataset_json_is_refused_by_name(tmp_path: Path, text) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json: found an unreadable entry.*expected a Decathlon") as caught:
        find_cases(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_decathlon_case_without_its_label_is_refused(tmp_path: Path) -> None:
    decathlon(tmp_path, ["a", "b"])
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(InputError, match=r"labelsTr.b\.nii\.gz: found no such file; expected .* of case b"):
        find_cases(tmp_path)


def test_a_decathlon_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no labelled case"):
        find_cases(decathlon(tmp_path, []))


# ---- image-mask folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr")], ids=str
)
def test_an_image_mask_folder(tmp_path: Path, images, labels) -> None:
    for name in ("two", "one"):
        scan(tmp_path / images / f"{name}.nii.gz")
        scan(tmp_path / labels / f"{name}.nii.gz")
    (tmp_path / images / "notes.txt").write_text("not a scan")
    found = find_cases(tmp_path)
    assert [(case.name, case.patient) for case in found.cases] == [("one", "one"), ("two", "two")]
    assert found.cases[0].image == tmp_path / images / "one.nii.gz"
    assert found.cases[0].label == tmp_path / labels / "one.nii.gz"
    assert found.labels == {}, "such a folder does not name its labels"


def test_image_and_mask_may_be_of_different_kinds(tmp_path: Path) -> None:
    scan(tmp_path / "images" / "a.nii.gz")
    label = scan(tmp_path / "masks" / "a.nii")
    assert find_cases(tmp_path).cases[0].label == label


@pytest.mark.parametrize(("channels", "names"), [(1, ("image",)), (3, ("red", "green", "blue"))])
def test_photographs_have_masks_in_another_format_and_colours_as_channels(tmp_path: Path, channels, names) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for name, suffix in {"a": "", "b": "_seg", "c": "_segmentation"}.items():
        colours = np.arange(64 * channels, dtype=np.uint8).reshape(8, 8, channels).squeeze()
        Image.fromarray(colours).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks" / f"{name}{suffix}.png")
    found = find_cases(tmp_path)
    assert [(case.image.name, case.label.name) for case in found.cases] == [
        ("a.jpg", "a.png"),
        ("b.jpg", "b_seg.png"),
        ("c.jpg", "c_segmentation.png"),
    ]
    assert found.channels == names


@pytest.mark.parametrize("masks", ["labels", "labels/p1", "raters/1"])
@pytest.mark.parametrize("names", [("a.nii.gz", "a_seg.nii.gz"), ("a.nii", "a.nii.gz")])
def test_two_masks_of_a_case_are_refused(tmp_path: Path, masks: str, names: tuple[str, str]) -> None:
    """The last one by name was taken, so that the output of a model replaced the manual mask without a word."""
    scan(tmp_path / "images" / ("p1" if "p1" in masks else "") / "a.nii.gz")
    for name in names:
        scan(tmp_path / masks / name)
    with pytest.raises(InputError, match=rf"found two masks of the case \S*a, {names[0]} and {names[1]}; expected one"):
        find_cases(tmp_path)


def test_pictures_beside_scans_are_no_cases(tmp_path: Path) -> None:
    """Previews and screenshots lie beside scans; only in a folder without volumes are images the scans."""
    scan(tmp_path / "images" / "a.nii.gz")
    scan(tmp_path / "labels" / "a.nii.gz")
    for name in ("a_preview.png", "montage.png"):
        Image.new("L", (4, 4)).save(tmp_path / "images" / name)
    assert [case.name for case in find_cases(tmp_path).cases] == ["a"]


def test_subfolders_name_patients_who_stay_on_one_side(tmp_path: Path) -> None:
    """Two visits of a patient in training and test would leak."""
    for patient in "abcde":
        for visit in ("visit1", "visit2"):
            scan(tmp_path / "images" / patient / f"{visit}.nii.gz")
            scan(tmp_path / "labels" / patient / f"{visit}.nii.gz")
    scan(tmp_path / "images" / "single.nii.gz")
    scan(tmp_path / "labels" / "single.nii.gz")
    found = find_cases(tmp_path)
    assert len(found.cases) == 11
    assert {case.name: case.patient for case in found.cases}["a/visit1"] == "a"
    assert all(case.label == tmp_path / "labels" / case.image.relative_to(tmp_path / "images") for case in found.cases)
    split = split_by_hash(found.cases, test=2, validation=1)
    sides = [{name.split("/")[0] for name in side} for side in (split.train, split.validation, split.test)]
    assert [len(side) for side in sides] == [3, 1, 2]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert len(split.train) + len(split.validation) + len(split.test) == 11


def test_hidden_files_beside_patients_are_no_scans(tmp_path: Path) -> None:
    """File browsers leave .DS_Store and the like in every folder that they show."""
    for part in ("images", "labels"):
        scan(tmp_path / part / "p1" / "scan.nii.gz")
        (tmp_path / part / ".DS_Store").write_text("x")
        (tmp_path / part / "p1" / "._scan.nii.gz").write_text("x")
    assert [case.name for case in find_cases(tmp_path).cases] == ["p1/scan"]


def test_an_image_without_its_mask_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scan(tmp_path / "images" / f"{name}.nii.gz")
    scan(tmp_path / "labels" / "a.nii.gz")
    with pytest.raises(InputError, match=r"labels.b\.nii\.gz: found no such file; .*add the file or drop the case"):
        find_cases(tmp_path)


def test_a_mask_of_another_patient_does_not_count(tmp_path: Path) -> None:
    scan(tmp_path / "images" / "p1" / "scan.nii.gz")
    scan(tmp_path / "labels" / "p2" / "scan.nii.gz")
    with pytest.raises(InputError, match="no such file"):
        find_cases(tmp_path)


@pytest.mark.parametrize("folders", [[], ["images"], ["labels"], ["scans", "labels"]], ids=str)
def test_a_folder_of_neither_layout_is_refused(tmp_path: Path, folders) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(InputError, match=r"neither dataset\.json nor images/"):
        find_cases(tmp_path)


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError, match="no labelled case"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match=r"no such folder; expected a data folder; check the path$"):
        find_cases(tmp_path / "nothing")


# ---- the split -------------------------------------------------------------------------------------------------------


def test_patients_are_ranked_by_the_hash_of_their_names() -> None:
    """SHA-256 begins with d: 18ac, c: 2e7d, b: 3e23, e: 3f79, a: ca97."""
    split = split_by_hash(cases_of(*"abcde"), test=2, validation=1)
    assert (split.test, split.validation, split.train) == (("c", "d"), ("b",), ("a", "e"))
    split = split_by_hash(cases_of(*"abcde"), test=0, validation=1)
    assert (split.test, split.validation, split.train) == ((), ("d",), ("a", "b", "c", "e"))


@settings(deadline=None, max_examples=50)
@given(
    names=st.sets(st.text("abcdefgh0123456789", min_size=1, max_size=6), min_size=4, max_size=20),
    test=st.integers(0, 2),
    validation=st.integers(0, 1),
    order=st.randoms(),
)
def test_the_split_covers_all_and_ignores_order(names, test, validation, order) -> None:
    shuffled = sorted(names)
    order.shuffle(shuffled)
    split, again = (split_by_hash(cases_of(*n), test, validation) for n in (sorted(names), shuffled))
    assert [set(s) for s in (split.train, split.validation, split.test)] == [
        set(s) for s in (again.train, again.validation, again.test)
    ]
    assert sorted([*split.train, *split.validation, *split.test]) == sorted(names)
    assert (len(split.test), len(split.validation)) == (test, validation)


def test_more_patients_only_push_others_towards_training() -> None:
    """A new patient never moves a training patient into the test set."""
    before = split_by_hash(cases_of(*"abcde"), test=2, validation=1)
    after = split_by_hash(cases_of(*"abcdefghij"), test=2, validation=1)
    assert set(before.train) <= set(after.train)


@pytest.mark.parametrize(("test", "validation"), [(3, 2), (5, 0), (0, 5), (-1, 1), (1, -1)])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(test, validation) -> None:
    with pytest.raises(InputError, match=r"found 5 patients; .*lower what the configuration holds out"):
        split_by_hash(cases_of(*"abcde"), test, validation)

"""Lists of files in the place of a folder."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.file_lists import FileList, folder_or_files
from medseg_diffusion.data.healthy import find_healthy
from medseg_diffusion.data.image_cache import packed
from medseg_diffusion.errors import InputError, UsageError
from tests.helpers.segmenters import save


def listed(*entries: object) -> FileList:
    found = folder_or_files(list(entries))  # type: ignore[arg-type]
    assert isinstance(found, FileList)
    return found


def test_a_folder_is_its_path(tmp_path: Path) -> None:
    assert folder_or_files(str(tmp_path)) == tmp_path


def test_a_list_has_the_cases_of_its_folder(block_scans: Path) -> None:
    """Names and patients are the same, and so is the split."""
    folder = find_cases(block_scans)
    entries = [(str(case.image), case.label) for case in reversed(folder.cases)]
    assert find_cases(listed(*entries)).cases == folder.cases


def test_entries_with_channels_readers_patients_and_names(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{patient}" / f"{name}.nii.gz") for patient in "ab" for name in ("t1", "flair", "seg")]
    one = {"image": files[:2], "label": [files[2], files[5]], "patient": "P", "name": "first"}
    second, first = find_cases(listed(one, (files[3:5], files[5]))).cases
    assert (first.name, first.patient, first.images, first.labels) == (
        "first",
        "P",
        tuple(files[:2]),
        (files[2], files[5]),
    )
    assert (second.name, second.patient, second.further_channels) == ("b/t1", "b/t1", (files[4],))


def test_names_have_as_many_folders_as_tell_them_apart(tmp_path: Path) -> None:
    files = [save(tmp_path / patient / "scans" / "t1.nii.gz") for patient in "ab"]
    assert [entry.name for entry in listed(*files).entries] == ["a/scans/t1", "b/scans/t1"]
    assert [scan.patient for scan in find_healthy(listed(*files))] == ["a/scans/t1", "b/scans/t1"]


def test_healthy_scans_may_have_labels(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{name}.nii.gz") for name in "abc"]
    plain, labelled = find_healthy(listed(files[0], (files[1], files[2])))
    assert plain.label is None and labelled.label == files[2]
    with pytest.raises(InputError, match=r"a\.nii\.gz: found no labels; expected a label map of every image"):
        find_cases(listed(files[0]))


def test_a_list_of_pictures_is_packed_as_its_folder(pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.png"))
    entries = [{"image": file, "class": file.parent.name, "patient": str(file)} for file in files]
    images = packed(listed(*entries), tmp_path, 16, held_out=(0, 4))
    assert images.classes == ("left", "right") and len(images.part("validation")) == 4 and len(images.images) == 24
    assert packed(listed(*entries), tmp_path, 16, held_out=(0, 4)).folder == images.folder, "packed only once"
    assert packed(listed(*entries[1:]), tmp_path, 16, held_out=(0, 4)).folder != images.folder


def test_a_bad_list_is_refused_in_one_line(tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii.gz")
    with pytest.raises(UsageError, match="an empty list of files"):
        listed()
    with pytest.raises(UsageError, match=r"entry 2 of the list is the keys image, mask; expected an image, a pair"):
        listed(scan, {"image": scan, "mask": scan})
    with pytest.raises(UsageError, match=r"entry 1 of the list is \(1, 2, 3\); expected"):
        listed((1, 2, 3))
    with pytest.raises(InputError, match=r"b\.nii\.gz: found no such file"):
        listed((scan, tmp_path / "b.nii.gz"))
    with pytest.raises(InputError, match="the same image twice in the list"):
        listed(scan, scan)
    with pytest.raises(UsageError, match="two entries of the list have the name 'x'"):
        listed({"image": scan, "name": "x"}, {"image": save(tmp_path / "c.nii.gz"), "name": "x"})
    for image, message in (
        (3, "entry 1 of the list names 3; expected a file"),
        ([], "entry 1 of the list has no image"),
    ):
        with pytest.raises(UsageError, match=message):
            listed({"image": image})


def test_the_number_0_is_a_patient_and_a_class(tmp_path: Path) -> None:
    """Tables number patients from 0: the scans of patient 0 must stay on one side of a split."""
    entries = [{"image": save(tmp_path / f"{name}.nii.gz"), "patient": 0, "class": 0} for name in "ab"]
    assert {(entry.patient, entry.category) for entry in listed(*entries).entries} == {("0", "0")}


def test_names_never_hold_a_whole_path(tmp_path: Path) -> None:
    """Splits depend on them, and must not depend on where a folder lies."""
    files = [save(tmp_path / f"a.{suffix}") for suffix in ("nii", "nii.gz")]
    with pytest.raises(UsageError, match=r"two entries of the list have the name '[^']*a'; give each its own"):
        listed(*files)
    named = [{"image": file, "name": file.name} for file in files]
    assert [entry.name for entry in listed(*named).entries] == ["a.nii", "a.nii.gz"]


def test_a_long_list_takes_no_longer_for_each_file(tmp_path: Path) -> None:
    """20,000 files in a second; comparing every file with every other one took minutes."""
    scan = save(tmp_path / "scan.nii.gz")
    files = [tmp_path / f"{number}.nii.gz" for number in range(20_000)]
    for file in files:
        file.hardlink_to(scan)
    started = time.process_time()
    assert len(listed(*files).entries) == len(files)
    assert time.process_time() - started < 20

"""`medseg check`: opens what a training or a segmentation would open, and says what would stop it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.data.images import find_images
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.modality import ModelInput
from medseg_diffusion.volumes.sources import find_sources
from medseg_diffusion.workflows.check import check
from tests.helpers import untrusted_files
from tests.helpers.cli import error_lines, medseg
from tests.volumes.test_dicom import COLUMNS, ROWS, series
from tests.volumes.test_dicom_series import study, values


def save(path: Path, array: np.ndarray, shift: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4)
    affine[0, 3] = shift
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Three cases, whose labels 1 and 2 are named."""
    rng = np.random.default_rng(0)
    for name in "abc":
        save(tmp_path / "d" / "imagesTr" / f"{name}.nii.gz", rng.random((6, 7, 8)).astype(np.float32))
        save(tmp_path / "d" / "labelsTr" / f"{name}.nii.gz", rng.integers(0, 3, (6, 7, 8)).astype(np.uint8))
    cases = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in "abc"]
    names = {"0": "background", "1": "head", "2": "tail"}
    content = {"training": cases, "labels": names, "modality": {"0": "T1"}}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(content))
    return tmp_path / "d"


def test_a_sound_folder_has_no_problems(labelled: Path) -> None:
    calls: list[tuple[str, float]] = []
    report = check(labelled, lambda text, share: calls.append((text, share)))
    assert calls == [(f"files: {i} of 3", i / 3) for i in (1, 2, 3)]
    assert (report.broken, report.remarks, report.labelled) == ([], [], 3)
    assert report.labels == {"0 background": 3, "1 head": 3, "2 tail": 3}
    result = medseg("check", labelled)
    assert result.exit_code == 0 and "cases with label: 0 background (3), 1 head (3)" in result.stdout


def unnamed(folder: Path) -> None:
    save(folder / "labelsTr" / "b.nii.gz", np.full((6, 7, 8), 7, np.uint8))


def absent(folder: Path) -> None:
    for name in "abc":
        save(folder / "labelsTr" / f"{name}.nii.gz", np.eye(7, 8)[None].repeat(6, 0).astype(np.uint8))


def elsewhere(folder: Path) -> None:
    save(folder / "labelsTr" / "b.nii.gz", np.ones((6, 7, 8), np.uint8), shift=3.0)


def other_size(folder: Path) -> None:
    save(folder / "labelsTr" / "b.nii.gz", np.ones((6, 7, 5), np.uint8))


def fractions(folder: Path) -> None:
    save(folder / "labelsTr" / "b.nii.gz", np.full((6, 7, 8), 0.5, np.float32))


def missing(folder: Path) -> None:
    (folder / "labelsTr" / "b.nii.gz").unlink()


def damaged(folder: Path) -> None:
    path = folder / "labelsTr" / "b.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the check sum
    path.write_bytes(bytes(content))


def channels(folder: Path) -> None:
    save(folder / "imagesTr" / "b.nii.gz", np.random.default_rng(0).random((6, 7, 8, 2)).astype(np.float32))


def readers_cannot_read(folder: Path) -> None:
    (folder / "imagesTr" / "b.nii.gz").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unnamed, r"labels without a name \(7\); expected 0 background, 1 head, 2 tail; name them in dataset.json"),
        (absent, r"no voxel of label 2 in any case; expected .*; add such a case, or take the label out"),
        (elsewhere, "b.nii.gz: found a grid up to 3 mm away; .*; resample"),
        (other_size, "labelsTr/b.nii.gz: found 6 x 7 x 5 voxels; expected 6 x 7 x 8 as in"),
        (fractions, "labelsTr/b.nii.gz: found the label 0.5; expected whole numbers"),
        (missing, "labelsTr/b.nii.gz: found no such file; .*; add the file or drop the case"),
        (damaged, "labelsTr/b.nii.gz: found an? (damaged|unreadable) file .*; copy "),
        (channels, r"images of different kinds \(1 channels in 2 files, 2 channels in 1 files\); .* convert"),
        (readers_cannot_read, "imagesTr/b.nii.gz: found an unreadable file"),
    ],
)
def test_what_would_stop_a_training_is_said_with_a_remedy(labelled: Path, change, message: str) -> None:
    change(labelled)
    result = medseg("check", labelled)
    assert result.exit_code == 1
    (line,) = error_lines(result)
    assert line.startswith("medseg: error: ") and re.search(message, line), line
    assert "problems: 1" in result.stdout


def test_a_file_without_permission_is_named_so(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was called incomplete, and to be converted again. Root may read everything, hence the stand-in."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.nii.gz" and access(path, mode))
    lines = error_lines(medseg("check", labelled))
    assert lines and all("permission denied" in line for line in lines)


def test_what_is_unusual_is_a_warning(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((6, 7, 8)).astype(np.float32)
    for name in ("a", "b", "c"):
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, np.diag([10.0, 10.0, 10.0, 1.0])), path)
    result = medseg("check", tmp_path, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["broken"] == []
    assert [f"medseg: warning: {name}.nii.gz: voxels of 10 x 10 x 10 mm" in result.stderr for name in "abc"] == [
        True
    ] * 3


def test_dicom_series_are_opened_wherever_they_are(tmp_path: Path) -> None:
    """A series, a folder of series beside scans, a zip and one file."""
    series = untrusted_files.write_series(tmp_path / "d" / "s1")
    untrusted_files.write_series(tmp_path / "d" / "s2", untrusted_files.dicom_bytes(untrusted_files.dicom_slice(1)))
    save(tmp_path / "d" / "a.nii.gz", np.random.default_rng(0).random((6, 7, 8)).astype(np.float32))
    shutil.make_archive(str(tmp_path / "z"), "zip", series)
    for path in (series, tmp_path / "z.zip", tmp_path / "d" / "a.nii.gz"):
        report = check(path)
        assert report.broken == [] and report.parts == {"all": 1}
    report = check(tmp_path / "d")
    (line,) = report.broken
    assert report.parts == {"all": 3} and "d/s2: found several images at one position" in line


def test_a_picture_does_not_hide_the_scans_beside_it(tmp_path: Path) -> None:
    """All files are opened, and the mixture is told, because it stops a training."""
    for name in "abcde":
        save(tmp_path / f"{name}.nii.gz", np.random.default_rng(0).random((6, 7, 8)).astype(np.float32))
    (tmp_path / "b.nii.gz").write_bytes(b"")
    Image.new("L", (8, 9)).save(tmp_path / "montage.png")
    report = check(tmp_path)
    assert (report.kind, report.parts, report.sizes) == ("images and scans", {"all": 6}, {"6 x 7 x 8": 4, "8 x 9": 1})
    mixture, damaged = report.broken
    assert "found both images (1: montage.png) and scans (5: a.nii.gz, b.nii.gz and 3 more)" in mixture
    assert "b.nii.gz: found an unreadable file" in damaged


def test_previews_of_scans_are_no_images(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((6, 7, 8)).astype(np.float32))
    Image.new("L", (8, 9)).save(tmp_path / "b_preview.png")
    report = check(tmp_path)
    assert (report.kind, report.parts, report.broken) == ("scans", {"all": 1}, [])


def test_scans_in_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    """A folder of nothing else is refused with the remedy. Slices of a series may have any suffix."""
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1" / "b.mgz").touch()
    with pytest.raises(InputError, match=r"found no image, but 1 file in .* \(p1/b\.mgz\); .*; convert them to NIfTI$"):
        check(tmp_path)
    save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((6, 7, 8)).astype(np.float32))
    for path in series(tmp_path / "s", values()).iterdir():
        path.rename(path.with_suffix(".img"))
    report = check(tmp_path)
    left_out = f"left out 1 file in formats that are not read ({tmp_path}/p1/b.mgz); convert them to NIfTI"
    assert (report.broken, report.remarks) == ([], [left_out])


def test_one_picture_is_opened_as_segment_would(tmp_path: Path) -> None:
    Image.new("L", (8, 9)).save(tmp_path / "picture.png")
    report = check(tmp_path / "picture.png")
    assert (report.kind, report.parts, report.sizes, report.broken) == ("images", {"all": 1}, {"8 x 9": 1}, [])


@pytest.mark.parametrize("beside", ["nothing", "scan", "picture", "labelled pictures"])
def test_the_studies_that_segment_reads_are_opened_at_any_depth(tmp_path: Path, beside: str) -> None:
    """Of a study each series but the localizer. Labelled pictures beside them are training data all the same."""
    study(tmp_path / "patients" / "p1" / "visit", nested=True)
    series(tmp_path / "patients" / "p2" / "visit" / "s", values(), StudyInstanceUID="1.9")
    if beside == "scan":
        save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((6, 7, 8)).astype(np.float32))
    elif beside != "nothing":
        for part in ("images", "labels") if beside == "labelled pictures" else (".",):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.new("L", (8, 9)).save(tmp_path / part / "a.png")
    found = [source.path for source in find_sources([tmp_path / "patients"], ModelInput())]
    assert found == [tmp_path / "patients" / "p1" / "visit", tmp_path / "patients" / "p2" / "visit" / "s"]
    report = check(tmp_path)
    assert report.parts == {"all": 4 + (beside != "nothing")} and report.sizes[f"{COLUMNS} x {ROWS} x 6"] == 4
    if beside == "picture":
        names = r"patients/p1/visit/S2, patients/p1/visit/S3 and 2 more"
        assert re.search(rf"found both images \(1: a\.png\) and scans \(4: {names}\)", report.broken.pop())
    assert report.broken == []


def test_a_picture_beside_dicom_is_no_data_set(tmp_path: Path) -> None:
    series(tmp_path / "s", values())
    Image.new("L", (8, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"both images \(1: a\.png\) and scans \(1: s\)"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("empty", "check the path"),
        ("notes.txt", "convert or rename the file"),
        ("a.zip", "download or unpack it again"),
        ("nowhere", "check the path"),
    ],
)
def test_what_holds_no_data_is_refused_with_a_remedy_that_check_has(tmp_path: Path, name: str, remedy: str) -> None:
    """`check` takes its path without an option."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no scan")
    (tmp_path / "a.zip").write_text("no zip")
    result = medseg("check", tmp_path / name)
    (line,) = error_lines(result)
    assert result.exit_code == 3 and line.endswith(f"; {remedy}"), line


def test_options_in_a_remedy_are_told_with_the_commands_that_have_them(tmp_path: Path) -> None:
    """`check` has neither --skip-broken nor --series."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"broken")
    (line,) = error_lines(medseg("check", tmp_path / "pictures"))
    assert line.endswith("; replace it, or leave it out with --skip-broken of train-generator or evaluate-generator")
    (line,) = error_lines(medseg("check", study(tmp_path / "series")))
    assert "; choose one with --series of segment or anomaly (" in line
    assert line.endswith("), or give a folder that holds it alone")

"""Folders, zips and media with several DICOM series: the one that fits or was named is read, never one by a guess."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import SegmentationStorage

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.modality import ModelInput, SeriesChoice
from medseg_diffusion.volumes.sources import InputOptions, find_sources, series_below
from tests.helpers import volumes
from tests.volumes.test_dicom import COLUMNS, ROWS, edited, enhanced, series, turned

T1, FLAIR, CT = SeriesChoice(kind="T1"), SeriesChoice(kind="FLAIR"), SeriesChoice(kind="CT")
BRAIN = ModelInput("brain", ("T1",))


def values(offset: int = 0, slices: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 1000, (slices, ROWS, COLUMNS)) + offset


def study(folder: Path, nested: bool = False, uid: str = "1.2.3") -> Path:
    """A localizer, two MR series and a CT, in one folder or each in its own; the CT's values are 3000 and above."""
    kinds = [
        (1, "localizer", "MR", 0),
        (2, "t1_mprage_sag", "MR", 1000),
        (3, "t2_flair", "MR", 2000),
        (4, "", "CT", 3000),
    ]
    for number, name, modality, offset in kinds:
        target = folder / f"S{number}" if nested else folder / "new"
        count = 3 if number == 1 else 6
        series(target, values(offset, count), uid=f"1.2.{number}", modality=modality, SeriesNumber=number,
               SeriesDescription=name, StudyInstanceUID=uid)  # fmt: skip
        if not nested:
            for file in target.iterdir():
                file.rename(folder / f"{number}-{file.name}")
    return folder


@pytest.mark.parametrize(
    ("choice", "lowest"),
    [
        (T1, 1000),
        (FLAIR, 2000),
        (CT, 3000),
        (SeriesChoice("3"), 2000),
        (SeriesChoice("1.2.3"), 2000),
        (SeriesChoice("MPRAGE", kind="FLAIR"), 1000),  # what the user names comes before what fits
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:.*read the DICOM series")
def test_the_series_that_fits_or_is_named_is_read(choice, lowest, nested, tmp_path: Path) -> None:
    volume = read_volume(study(tmp_path / "s", nested), series=choice)
    assert lowest <= float(volume.data.min()) < float(volume.data.max()) < lowest + 1000


def test_the_choice_and_what_is_left_out_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as said:
        read_volume(study(tmp_path / "s"), series=T1)
    assert str(said[0].message) == (
        "s: read the DICOM series 2 MR t1_mprage_sag (6 slices) and left out 1 MR localizer (3 slices); "
        "3 MR t2_flair (6 slices); 4 CT (6 slices)"
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            SeriesChoice(kind="T2"),
            "found 4 DICOM series: 1 MR localizer .* expected one T2 series; choose one with --series",
        ),
        (SeriesChoice(kind="MR"), "found 4 DICOM series: .* expected one MR series"),
        (SeriesChoice(), r"4 DICOM series: .*; 4 CT \(6 slices\); expected one series"),
        (SeriesChoice("7"), "4 DICOM series: .* expected one series that is named by '7'"),
        (SeriesChoice("1.2"), "found 4 DICOM series that '1.2' names: 1 MR localizer"),
    ],
)
def test_without_one_that_fits_all_are_listed(choice, message, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_volume(study(tmp_path / "s"), series=choice)


@pytest.mark.filterwarnings("ignore:.*read the DICOM series")
def test_zips_and_media_are_read_as_folders(tmp_path: Path) -> None:
    """The index of a medium is not trusted: the files below it are read, whatever it names."""
    folder = study(tmp_path / "cd", nested=True)
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + b"../../etc/passwd")
    with zipfile.ZipFile(tmp_path / "cd.zip", "w") as archive:
        for file in sorted(folder.rglob("*.IMA")):
            archive.write(file, file.relative_to(folder))
    expected = read_volume(folder / "S2")
    for path in (folder, folder / "DICOMDIR", tmp_path / "cd.zip"):
        (source,) = find_sources([path], BRAIN)
        assert source.path == (folder if path.is_dir() or path.name == "DICOMDIR" else path)
        assert (read_volume(source.path, series=T1).data == expected.data).all()


def test_the_studies_below_a_folder_are_scans(tmp_path: Path) -> None:
    """A study of several series is one scan. Segmentations are results."""
    study(tmp_path / "p1" / "visit", nested=True, uid="1.1")
    study(tmp_path / "p2" / "visit", nested=True, uid="1.2")
    series(tmp_path / "p3", values())
    for path in series(tmp_path / "out", values(), StudyInstanceUID="1.1").iterdir():
        mask = pydicom.dcmread(path)
        mask.Modality, mask.SOPClassUID, mask.file_meta.MediaStorageSOPClassUID = "SEG", *2 * [SegmentationStorage]
        mask.save_as(path)
    found = find_sources([tmp_path], BRAIN)
    assert {(str(one.path.relative_to(tmp_path)), str(one.folder)) for one in found} == {
        ("p1/visit", "p1"), ("p2/visit", "p2"), ("p3", "."),
    }  # fmt: skip


def zipped(path: Path, folder: Path) -> Path:
    return Path(shutil.make_archive(str(path.with_suffix("")), "zip", folder))


def test_zips_with_dicom_in_a_folder_are_scans(tmp_path: Path) -> None:
    """At any depth. Not those that hold no DICOM or only segmentations, nor those that were unpacked beside."""
    slices = series(tmp_path / "s", values())
    folder = tmp_path / "d"
    for path in (folder / "a.zip", folder / "more" / "b.zip", folder / "more" / "c.zip"):
        path.parent.mkdir(parents=True, exist_ok=True)
        zipped(path, slices)
    shutil.copytree(slices, folder / "more" / "c" / "series")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no image")
    (tmp_path / "other" / "x.nii.gz").touch()
    zipped(folder / "notes.zip", tmp_path / "other")
    mask = pydicom.dcmread(next(slices.iterdir()))
    mask.Modality, mask.SOPClassUID, mask.file_meta.MediaStorageSOPClassUID = "SEG", *2 * [SegmentationStorage]
    (tmp_path / "masks").mkdir()
    mask.save_as(tmp_path / "masks" / "mask.dcm")
    zipped(folder / "masks.zip", tmp_path / "masks")
    found = {one.path.relative_to(folder).as_posix(): one for one in find_sources([folder], BRAIN)}
    assert {name: str(one.folder) for name, one in found.items()} == {
        "more/c/series": "more/c", "a.zip": ".", "more/b.zip": "more",
    }  # fmt: skip
    assert found["a.zip"] == find_sources([folder / "a.zip"], BRAIN)[0]
    assert (read_volume(found["a.zip"].path).data == read_volume(slices).data).all()
    matching = find_sources([folder], BRAIN, InputOptions(pattern="*.zip"))
    assert [one.path.name for one in matching] == ["a.zip"]
    assert {path.relative_to(folder).as_posix() for path in series_below(folder)} == set(found)


def test_a_part_of_a_zip_is_not_left_out_in_silence(tmp_path: Path) -> None:
    path = zipped(tmp_path / "d" / "a.zip", series(tmp_path / "s", values()))
    path.write_bytes(path.read_bytes()[:-50])
    (source,) = find_sources([tmp_path / "d"], BRAIN)
    with pytest.raises(InputError, match=r"a\.zip: found an unreadable DICOM series \(no zip, or a part of one\)"):
        read_volume(source.path)


def test_a_slice_that_matches_a_pattern_stands_for_its_series(tmp_path: Path) -> None:
    from medseg_diffusion.volumes.sources import InputOptions

    study(tmp_path, nested=True)
    found = find_sources([tmp_path], BRAIN, InputOptions(pattern="*/*.IMA"))
    assert [one.path.name for one in found] == ["S1", "S2", "S3", "S4"]


# ---- localizers ------------------------------------------------------------------------------------------------------


def scout(folder: Path, **changes: object) -> Path:
    """The series with one more image, across the others."""
    series(folder / "other", values(5000, 1), uid="1.2.9", **changes)
    (file,) = (folder / "other").iterdir()
    file.rename(folder / "scout.IMA")
    (folder / "other").rmdir()
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"ImageOrientationPatient": [round(float(v), 8) for v in (*turned()[1], *turned()[2])]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "Rows": 4, "PixelData": bytes(2 * 4 * COLUMNS)},
    ],
)
def test_a_localizer_within_the_series_is_left_out_and_named(changes, tmp_path: Path) -> None:
    expected = read_volume(series(tmp_path / "a", values(), uid="1.2.9"))
    folder = scout(series(tmp_path / "b", values(), uid="1.2.9"), **changes)
    with pytest.warns(UserWarning, match=r"^\S+: left out localizers: scout.IMA$"):
        volume = read_volume(folder)
    assert (volume.data == expected.data).all() and np.allclose(volume.affine, expected.affine)


def test_a_turned_slice_of_the_stack_is_no_localizer(tmp_path: Path) -> None:
    """Without it there is a gap, so that the series is refused for its orientation."""
    folder = edited(series(tmp_path / "s", values()), 2, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    with pytest.raises(InputError, match=r"slices of different orientation .*another in 1"):
        read_volume(folder)


def test_only_localizers_are_a_series(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "s", values(), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    assert volume.data.shape[1:] == (COLUMNS, ROWS, 6)


def test_abutting_stacks_are_named_with_their_gap(tmp_path: Path) -> None:
    """Two stacks of one file at different heights: the message says that they are stacks."""
    file = enhanced(tmp_path / "e" / "1.dcm", values(), [0, 1, 2, 4, 5], stack=["1"] * 3 + ["2"] * 2)
    with pytest.raises(InputError, match=r"slices 3 to 6 mm apart \(stack 1, 2\)"):
        read_volume(file)


def test_damaged_names_of_a_series_do_not_matter(tmp_path: Path) -> None:
    """A number that is none can only be read as missing; the voxels are sound."""
    folder = series(tmp_path / "s", values(), SeriesNumber=7)
    for file in folder.iterdir():
        content = file.read_bytes()
        at = content.index(b"\x20\x00\x11\x00IS")
        file.write_bytes(content[: at + 8] + b"x " + content[at + 10 :])
    assert float(read_volume(folder).data.max()) < 1000


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:.*read the DICOM series")
def test_real_series_of_one_study_are_told_apart(data_folder: Path) -> None:
    """The two series lie in folders of their own: one scan, of which the user or the model names the series."""
    (source,) = find_sources([data_folder / "dicom"], BRAIN)
    assert source.path == data_folder / "dicom"
    with pytest.raises(
        InputError, match=r"2 DICOM series: MR HippoCrop \(32 slices\); 12 MR T1post \(22 slices\); .* one T1 "
    ):
        read_volume(source.path, series=T1)
    after = read_volume(source.path, series=SeriesChoice(kind="T1c"))
    named = read_volume(source.path, series=SeriesChoice("hippo"))
    assert (after.data == read_volume(data_folder / "dicom" / "t1post").data).all()
    assert (named.data == read_volume(data_folder / "dicom" / "hippocampus_crop").data).all()


@pytest.mark.parametrize("content", ["empty", "start", "header", "zeros"])
@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_a_damaged_slice_at_the_end_is_not_left_out_in_silence(content: str, suffix: str, tmp_path: Path) -> None:
    """In the middle it would show as a gap; at the end the volume would only be shorter."""
    folder = series(tmp_path / "s", values())
    places = {path: pydicom.dcmread(path).ImagePositionPatient for path in folder.iterdir()}
    last = max(places, key=lambda path: np.dot(places[path], turned()[2]))
    whole = last.read_bytes()
    last.unlink()
    pixels = 2 * ROWS * COLUMNS
    cut = {"empty": b"", "start": whole[:100], "header": whole[: -pixels - 400], "zeros": bytes(len(whole))}[content]
    (folder / f"last{suffix}").write_bytes(cut)
    if suffix or content == "header":
        with pytest.raises(InputError, match="last"):
            read_volume(folder)
    else:
        with pytest.warns(UserWarning, match="^s: left out files that are no DICOM: last$"):
            assert read_volume(folder).shape[2] == 5


@pytest.mark.filterwarnings("ignore:.*read the DICOM series")
def test_a_number_is_no_part_of_a_description(tmp_path: Path) -> None:
    for number, name in ((1, "T1 3D MPRAGE"), (2, "T2")):
        series(tmp_path / "p" / name, values(), uid=f"1.2.{number}", SeriesNumber=number, SeriesDescription=name,
               StudyInstanceUID="1")  # fmt: skip
    with pytest.raises(InputError, match="one series that is named by '3'"):
        read_volume(tmp_path / "p", series=SeriesChoice("3"))


@pytest.mark.filterwarnings("ignore:.*read the DICOM series")
def test_a_whole_uid_is_one_series_though_others_begin_with_it(tmp_path: Path) -> None:
    for uid, offset in (("1.2.3.1", 1000), ("1.2.3.10", 2000)):
        series(tmp_path / "p" / uid, values(offset), uid=uid, StudyInstanceUID="1")
    assert float(read_volume(tmp_path / "p", series=SeriesChoice("1.2.3.1")).data.max()) < 2000


def test_results_in_dicom_are_no_scans_wherever_they_lie(tmp_path: Path) -> None:
    """In a folder of series, beside the slices (sorted first), and under a pattern."""
    study_folder = tmp_path / "p"
    for number in (1, 2):
        series(study_folder / f"s{number}", values(), uid=f"1.2.{number}", StudyInstanceUID="1", SeriesNumber=number)
    mask = pydicom.dcmread(next((study_folder / "s1").iterdir()))
    mask.Modality, mask.SOPClassUID, mask.file_meta.MediaStorageSOPClassUID = "SEG", *2 * [SegmentationStorage]
    expected = [one.path for one in find_sources([study_folder], BRAIN)]
    mask.save_as(study_folder / "s1_seg.dcm")
    assert [one.path for one in find_sources([study_folder], BRAIN)] == expected == [study_folder]
    with pytest.raises(InputError, match="2 DICOM series"):
        read_volume(study_folder)
    mask.save_as(study_folder / "s1" / "-first.dcm")
    assert [one.path for one in find_sources([tmp_path], BRAIN)] == [study_folder]
    matching = find_sources([study_folder], BRAIN, InputOptions(pattern="**/*"))
    assert [one.path for one in matching] == [study_folder / "s1", study_folder / "s2"]


def test_a_file_does_not_hide_the_studies_below(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        series(tmp_path / patient / "st" / "s1", values(), StudyInstanceUID=patient[1:])
    volumes.save(tmp_path / "x.nii.gz")
    found = [one.path.relative_to(tmp_path).as_posix() for one in find_sources([tmp_path], BRAIN)]
    assert found == ["x.nii.gz", "p1/st/s1", "p2/st/s1"]

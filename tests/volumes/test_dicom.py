"""DICOM series: voxels lie where the headers say, and what cannot be one volume is refused in one line."""

from __future__ import annotations

import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from medseg_cli.main import app
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from typer.testing import CliRunner

from medseg_diffusion.errors import InputError, UsageError, remarks
from medseg_diffusion.volumes import dicom
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.outputs import refuse_collisions, segmentation_outputs
from medseg_diffusion.volumes.paths import scan_name

ROWS, COLUMNS, SLICES = 7, 5, 6
SPACING = (1.5, 0.75, 3.0)  # between rows, columns and slices
LPS_RAS = np.array([-1.0, -1.0, 1.0])


def turned() -> np.ndarray:
    """Unit vectors (3, 3) along columns' index, rows' index and slices, in LPS."""
    return nib.eulerangles.euler2mat(0.3, -0.2, 0.1).T


def series(folder: Path, values: np.ndarray, *, uid: str = "", modality: str = "MR", **changes: object) -> Path:
    """Writes ``values`` (SLICES, ROWS, COLUMNS), the slices in an order that names and numbers do not tell."""
    folder.mkdir(parents=True, exist_ok=True)
    places = changes.pop("places", [k * SPACING[2] for k in range(len(values))])
    shifts = changes.pop("shifts", [0.0] * len(values))  # of each slice along its rows, in mm
    along, down, normal = turned()
    uid = uid or generate_uid()
    for k in np.random.default_rng(0).permutation(len(values)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = uid, uid, uid
        data.Modality = modality
        data.Rows, data.Columns, data.SamplesPerPixel = ROWS, COLUMNS, 1
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.PhotometricInterpretation = "MONOCHROME2"
        data.PixelSpacing = [SPACING[0], SPACING[1]]
        data.ImageOrientationPatient = [round(float(v), 8) for v in (*along, *down)]
        place = np.array([10.0, -20.0, 30.0]) + places[k] * normal + shifts[k] * along
        data.ImagePositionPatient = [round(float(v), 6) for v in place]
        data.PixelData = values[k].astype(np.uint16).tobytes()
        for name, value in changes.items():
            setattr(data, name, value)
        data.save_as(folder / f"{(k * 4 + 1) % len(values)}-{k}.IMA", enforce_file_format=True)
    return folder


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4000, (SLICES, ROWS, COLUMNS))


def test_voxels_lie_where_the_headers_say(values, tmp_path: Path) -> None:
    folder = series(tmp_path / "head", values)
    volume = read_volume(folder)
    assert volume.header.modality == "MR" and scan_name(folder) == "head"
    along, down, normal = turned()
    for k, row, column in ((0, 0, 0), (5, 6, 4), (2, 3, 1)):
        lps = np.array([10.0, -20.0, 30.0]) + k * SPACING[2] * normal + row * SPACING[0] * down
        lps = lps + column * SPACING[1] * along
        i, j, m = np.rint(np.linalg.inv(volume.affine) @ [*(lps * LPS_RAS), 1])[:3].astype(int)
        np.testing.assert_allclose((volume.affine @ [i, j, m, 1])[:3], lps * LPS_RAS, atol=1e-4)
        assert float(volume.data[0, i, j, m]) == values[k, row, column]


def test_slope_and_intercept_are_applied(values, tmp_path: Path) -> None:
    plain = read_volume(series(tmp_path / "a", values))
    scaled = read_volume(series(tmp_path / "b", values, RescaleSlope="2", RescaleIntercept="-1000"))
    np.testing.assert_allclose(scaled.data, 2 * plain.data - 1000)


def test_values_that_are_shown_inverted_are_read_as_stored_and_told(values, tmp_path: Path) -> None:
    """MONOCHROME1 concerns the display alone: a Hounsfield unit means the same."""
    plain = read_volume(series(tmp_path / "a", values))
    with remarks() as said:
        inverted = read_volume(series(tmp_path / "b", values, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted.data, plain.data)
    assert said == ["b: its lowest values are shown white (MONOCHROME1); values are read as they are stored"]


def test_folders_of_series_are_scans_beside_files(values, tmp_path: Path) -> None:
    first, second = series(tmp_path / "p1", values), series(tmp_path / "p2", values)
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    (tmp_path / "notes").mkdir()
    assert find_scans(tmp_path) == [tmp_path / "a.nii.gz", first, second]
    assert find_scans(first) == [first]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"places": [0, 3, 6, 12, 15, 18]}, "slices 3 to 6 mm apart; expected slices at one distance"),
        ({"places": [0, 3, 6, 6, 9, 12]}, "several images at one position"),
        ({"shifts": [0, 1, 2, 1, 0, 1]}, "slices shifted unevenly against each other"),
        ({"ImagePositionPatient": None}, "slices without position"),
        ({"PixelSpacing": None}, r"no PixelSpacing in .*IMA"),
        ({"PixelSpacing": [0, 1]}, "a pixel spacing of 0 x 1 mm"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, r"colour images \(RGB\)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, r"colour images \(PALETTE COLOR\); expected one intensity"),
    ],
)
def test_slices_that_are_no_volume_are_refused(changes, message, values, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_volume(series(tmp_path / "s", values, **changes))


def edited(folder: Path, number: int, **changes: object) -> Path:
    """The series with changed attributes in one of its files."""
    file = sorted(folder.iterdir())[number]
    data = pydicom.dcmread(file)
    for name, value in changes.items():
        setattr(data, name, value)
    data.save_as(file)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "slices of different orientation .* another in 1"),
        ({"PixelSpacing": [0.7, 0.7]}, "slices of different pixel spacing .*0.7 x 0.7 mm in 1"),
        ({"Rows": 4, "PixelData": bytes(2 * 4 * COLUMNS)}, r"slices of different size .*5 x 4 in 1.* localizer"),
    ],
)
def test_a_slice_that_differs_is_named(changes, message, values, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_volume(edited(series(tmp_path / "s", values), 2, **changes))


def test_every_slice_has_its_own_slope(values, tmp_path: Path) -> None:
    """As PET series and some MR scanners have it; that of the first slice gives wrong numbers for all others."""
    plain = read_volume(series(tmp_path / "a", values))
    folder = series(tmp_path / "b", values)
    factors = {}
    for number, file in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(file)
        data.RescaleSlope, data.RescaleIntercept = str(0.01 * (number + 1)), "-3"
        place = float(np.array(data.ImagePositionPatient, float) @ turned()[2])
        factors[place] = 0.01 * (number + 1)
        data.save_as(file)
    scaled = read_volume(folder)
    for k, place in enumerate(sorted(factors)):
        np.testing.assert_allclose(scaled.data[..., k], plain.data[..., k] * factors[place] - 3, rtol=1e-5, atol=1e-4)


def enhanced(path: Path, values: np.ndarray, order: list[int], **frames: list[object]) -> Path:
    """One multi-frame file of the series' slices, in any order, each with its place in its functional groups."""
    first = pydicom.dcmread(sorted(series(path.parent / "slices", values).iterdir())[0])
    along, down, normal = turned()
    data = FileDataset("", {}, file_meta=first.file_meta, preamble=b"\0" * 128)
    for name in [
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "Modality",
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "PhotometricInterpretation",
    ]:
        setattr(data, name, getattr(first, name))
    data.SOPClassUID, data.SOPInstanceUID = EnhancedMRImageStorage, generate_uid()
    data.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [SPACING[0], SPACING[1]]
    orientation.ImageOrientationPatient = [round(float(v), 8) for v in (*along, *down)]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    data.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for number, k in enumerate(order):
        group, place, content, scaling = Dataset(), Dataset(), Dataset(), Dataset()
        position = np.array([10.0, -20.0, 30.0]) + k * SPACING[2] * normal
        place.ImagePositionPatient = [round(float(v), 6) for v in position]
        content.StackID = str(frames.get("stack", ["1"] * len(order))[number])
        scaling.RescaleSlope, scaling.RescaleIntercept = str(k + 1), "0"
        group.PlanePositionSequence, group.FrameContentSequence = [place], [content]
        group.PixelValueTransformationSequence = [scaling]
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = groups
    data.NumberOfFrames = len(order)
    data.PixelData = np.stack([values[k] for k in order]).astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def test_frames_of_one_file_are_ordered_by_their_places(values, tmp_path: Path) -> None:
    """With the slope of each frame. A folder that holds the file, and the file itself, are the same scan."""
    plain = read_volume(series(tmp_path / "a", values))
    file = enhanced(tmp_path / "frames" / "e" / "1.dcm", values, [3, 0, 5, 1, 4, 2])
    for path in (file, file.parent):
        volume = read_volume(path)
        np.testing.assert_allclose(volume.affine, plain.affine, atol=1e-4)
        np.testing.assert_allclose(volume.data, plain.data * torch.arange(1, SLICES + 1))
    assert scan_name(file) == "1"


def test_stacks_of_one_file_are_told_apart(values, tmp_path: Path) -> None:
    twice = enhanced(tmp_path / "e" / "1.dcm", values, [0, 1, 2, 0, 1, 2], stack=["1"] * 3 + ["2"] * 3)
    with pytest.raises(InputError, match=r"several images at one position \(stack 1, 2\)"):
        read_volume(twice)


def test_a_zip_and_files_without_preamble_are_the_same_series(values, tmp_path: Path) -> None:
    folder = series(tmp_path / "s", values)
    expected = read_volume(folder)
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"study/{file.name}")
        archive.writestr("__MACOSX/._1", b"no image")
        archive.writestr("study/readme.txt", b"no image")
    bare = tmp_path / "bare"
    bare.mkdir()
    for number, file in enumerate(folder.iterdir()):
        data = pydicom.dcmread(file)
        buffer = pydicom.filebase.DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        pydicom.filewriter.write_dataset(buffer, data)
        (bare / str(number)).write_bytes(buffer.getvalue())
    assert scan_name(tmp_path / "s.zip") == "s" and find_scans(bare) == [bare]
    for path in (tmp_path / "s.zip", bare):
        volume = read_volume(path)
        np.testing.assert_allclose(volume.affine, expected.affine)
        assert torch.equal(volume.data, expected.data)


def test_results_lie_beside_a_series_and_never_in_it(values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = series(tmp_path / "s", values)
    monkeypatch.chdir(folder)
    files = segmentation_outputs(Path("."), None, 1)
    assert files["segmentation"] == tmp_path / "s_seg.nii.gz"
    for output in (folder, Path(".")):
        with pytest.raises(UsageError, match="holds a DICOM series, which results must not join"):
            refuse_collisions({folder: segmentation_outputs(folder, output, 1)})


def test_other_folders_are_refused(values, tmp_path: Path) -> None:
    series(tmp_path / "two", values)
    for file in (tmp_path / "two").iterdir():
        file.rename(file.with_name("x" + file.name))
    series(tmp_path / "two", values)
    with pytest.raises(
        InputError, match=r"2 DICOM series: MR \(6 slices\) [0-9.]+; MR \(6 slices\) [0-9.]+; expected one series"
    ):
        read_volume(tmp_path / "two")
    with pytest.raises(InputError, match="a series of one slice"):
        read_volume(series(tmp_path / "one", values[:1]))
    slice_of = next((tmp_path / "one").iterdir()).rename(tmp_path / "one" / "1.dcm")
    with pytest.raises(InputError, match=r"a series of one slice; expected a volume of several"):
        read_volume(slice_of)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder without scans"):
        find_scans(tmp_path / "empty")


@pytest.mark.data
def test_real_series_from_slices_to_a_mask_on_the_same_grid(data_folder: Path, tmp_path: Path) -> None:
    scan = data_folder / "dicom" / "hippocampus_crop"
    volume = read_volume(scan)
    assert sorted(volume.shape) == [32, 35, 51] and volume.header.modality == "MR"
    command = ["segment", str(scan), "-m", "hippocampus-t1", "-o", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    mask = nib.load(tmp_path / "hippocampus_crop_seg.nii.gz")
    np.testing.assert_allclose(mask.affine, volume.affine, atol=1e-4)
    labels = np.asarray(mask.dataobj)
    assert mask.shape == volume.shape and 1000 < np.count_nonzero(labels) < 8000 and set(np.unique(labels)) == {0, 1, 2}


@pytest.mark.data
def test_an_oblique_series_is_where_its_headers_say(data_folder: Path) -> None:
    volume = read_volume(data_folder / "dicom" / "t1post")
    files = sorted((data_folder / "dicom" / "t1post").iterdir())
    places = np.array([pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient for file in files], float)
    first = np.array([(volume.affine @ [0, 0, k, 1])[:3] for k in range(22)])  # the first voxel of every slice
    apart = np.linalg.norm(first[:, None] - places * LPS_RAS, axis=2)
    assert apart.min(0).max() < 0.01 and sorted(apart.argmin(0)) == list(range(22))
    assert volume.shape[2] == 22 and volume.spacing[2] == pytest.approx(6.5, abs=0.01)


def two_slices(folder: Path, name: str) -> Path:
    """A series of two slices, both of a file of pydicom's, the second one 5 mm further."""
    folder.mkdir()
    file = get_testdata_file(name, download=False)
    assert isinstance(file, str)
    for k in range(2):
        data = pydicom.dcmread(file)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        normal = np.cross(*np.array(data.ImageOrientationPatient, float).reshape(2, 3))
        data.ImagePositionPatient = [
            round(float(v), 6) for v in np.array(data.ImagePositionPatient, float) + 5 * k * normal
        ]
        data.RescaleSlope, data.RescaleIntercept = str(2 + k), "-7"
        data.save_as(folder / f"{k}.dcm")
    return folder


@pytest.mark.parametrize("compression", ["jpeg_ls_lossless", "jp2klossless", "RLE"])
def test_lossless_compression_changes_no_voxel(compression: str, tmp_path: Path) -> None:
    """The same image, stored plainly and compressed; each slice has its own slope. Also from a zip."""
    plain = read_volume(two_slices(tmp_path / "plain", "MR_small.dcm"))
    folder = two_slices(tmp_path / "compressed", f"MR_small_{compression}.dcm")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    for path in (folder, tmp_path / "c.zip"):
        assert torch.equal(read_volume(path).data, plain.data)


def test_pixels_without_a_decoder_name_their_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_slices(tmp_path / "s", "MR_small_jpeg_ls_lossless.dcm")
    monkeypatch.setattr(dicom, "_decoded_by_itk", lambda frame: None)

    def no_decoder(self: Dataset) -> None:  # as without pyjpegls and pylibjpeg
        raise RuntimeError("Unable to decompress: no plug-in")

    monkeypatch.setattr(Dataset, "pixel_array", property(no_decoder))
    with pytest.raises(InputError, match=r"compressed as JPEG-LS Lossless.*pip install 'medseg-diffusion\[dicom\]'"):
        read_volume(folder)

"""DICOM segmentations: every voxel where it was, read by two readers, and complete headers that refer to the scan."""

from __future__ import annotations

import shutil
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from highdicom._standard_utils import check_required_attributes, get_iod_module_map, get_sop_class_iod_map
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedMRImageStorage, MRImageStorage, SegmentationStorage

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.dicom_seg import PRIVATE_SCHEME, Algorithm, Segment, SegmentationFile, require_series
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.modality import SeriesChoice
from medseg_diffusion.volumes.outputs import refuse_collisions, segmentation_outputs
from medseg_diffusion.volumes.paths import is_series
from medseg_diffusion.volumes.volume import Volume
from tests.helpers.dicom_series import ORDER, SLICES, enhanced, place, series

HIPPOCAMPUS = Segment(
    "anterior", ("91723000", "SCT", "Anatomical Structure"), ("5366008", "SCT", "Hippocampus"),
    modifiers=(("255549009", "SCT", "Anterior"),), region=("12738006", "SCT", "Brain"),
)  # fmt: skip
SEGMENTS = [HIPPOCAMPUS, Segment("absent"), Segment("weiße Substanz")]
ALGORITHM = Algorithm("a-model", "ab" * 32, {"seed": "3", "steps": "10"})


def labels_for(volume: Volume) -> torch.Tensor:
    """Classes 1 and 3 at random in some slices; no class 2, and nothing in the first slice."""
    labels = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 3], volume.shape).astype(np.uint8))
    labels[..., 0] = 0
    labels[..., 2][labels[..., 2] == 1] = 0
    return labels


def written(scan: Path, path: Path, labels: torch.Tensor | None = None, segments: list[Segment] = SEGMENTS) -> Dataset:
    volume = read_volume(scan)
    SegmentationFile(volume, segments, ALGORITHM).write(labels_for(volume) if labels is None else labels, path)
    return pydicom.dcmread(path)


def read_by_hand(file: Dataset, volume: Volume) -> np.ndarray:
    """The labels, from bits and positions alone: every marked pixel is put where its frame's headers say."""
    labels = np.zeros(volume.shape, np.uint8)
    size = file.Rows * file.Columns
    bits = np.unpackbits(np.frombuffer(file.PixelData, np.uint8), bitorder="little")[: size * file.NumberOfFrames]
    shared = file.SharedFunctionalGroupsSequence[0]
    axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    frames = bits.reshape(-1, file.Rows, file.Columns)
    for pixels, group in zip(frames, file.PerFrameFunctionalGroupsSequence, strict=True):
        rows, columns = np.nonzero(pixels)
        start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        lps = start + columns[:, None] * column_mm * axes[0] + rows[:, None] * row_mm * axes[1]
        ras = np.c_[lps * [-1, -1, 1], np.ones(len(lps))]
        index = ras @ np.linalg.inv(volume.affine).T
        assert np.abs(index - np.rint(index)).max(initial=0) < 0.01
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        labels[tuple(np.rint(index[:, :3]).astype(int).T)] = number
    return labels


def read_by_highdicom(path: Path, volume: Volume) -> np.ndarray:
    """The labels, from highdicom's volume of the whole file, put onto the scan's grid by its affine."""
    read = highdicom.seg.segread(path).get_volume(combine_segments=True)
    indices = np.argwhere(read.array > 0)
    lps = np.c_[indices, np.ones(len(indices))] @ read.affine.T
    index = np.rint((lps * [-1, -1, 1, 1]) @ np.linalg.inv(volume.affine).T)[:, :3].astype(int)
    labels = np.zeros(volume.shape, np.uint8)
    labels[tuple(index.T)] = read.array[tuple(indices.T)]
    return labels


SOURCES = {
    "files": lambda folder: series(folder),
    "zip": lambda folder: Path(shutil.make_archive(str(folder), "zip", series(folder))),
    "enhanced": lambda folder: enhanced(folder, [ORDER]),
    "enhanced with an orientation in every frame": lambda folder: enhanced(folder, [ORDER], own_orientations=True),
    "several enhanced files": lambda folder: enhanced(folder, [ORDER[:4], ORDER[4:]]),
    "enhanced files of one frame": lambda folder: enhanced(folder, [[k] for k in ORDER]),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_voxel_is_where_it_was_and_refers_to_its_image(kind: str, tmp_path: Path) -> None:
    scan = SOURCES[kind](tmp_path / "scan")
    volume = read_volume(scan)
    file = written(scan, tmp_path / "mask.dcm")
    labels = labels_for(volume).numpy()
    np.testing.assert_array_equal(read_by_hand(file, volume), labels)
    np.testing.assert_array_equal(read_by_highdicom(tmp_path / "mask.dcm", volume), labels)

    # The image that a frame names has the frame's position, and no frame is empty.
    sources = {}
    for path in (tmp_path / "scan").iterdir():
        source = pydicom.dcmread(path)
        groups = source.get("PerFrameFunctionalGroupsSequence")
        places = [group.PlanePositionSequence[0] for group in groups] if groups else [source]
        sources[source.SOPInstanceUID] = [[float(mm) for mm in one.ImagePositionPatient] for one in places]
    assert 0 < file.NumberOfFrames == len(file.PerFrameFunctionalGroupsSequence) < 2 * SLICES
    for group in file.PerFrameFunctionalGroupsSequence:
        (reference,) = group.DerivationImageSequence[0].SourceImageSequence
        number = int(reference.get("ReferencedFrameNumber", 1))
        expected = sources[reference.ReferencedSOPInstanceUID][number - 1]
        assert [float(mm) for mm in group.PlanePositionSequence[0].ImagePositionPatient] == expected
        assert ("ReferencedFrameNumber" in reference) == kind.startswith(("enhanced", "several"))
    named = file.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert sorted(one.ReferencedSOPInstanceUID for one in named) == sorted(sources)
    classes = {one.ReferencedSOPClassUID for one in [*named, *file.SourceImageSequence]}
    assert classes == {MRImageStorage if kind in ("files", "zip") else EnhancedMRImageStorage}


def test_frames_of_a_tilted_gantry_are_where_their_images_are(tmp_path: Path) -> None:
    scan = series(tmp_path / "scan")
    for path in scan.iterdir():
        data = pydicom.dcmread(path)
        along = np.array(data.ImageOrientationPatient[3:], float)
        k = np.argmin([np.linalg.norm(np.subtract(data.ImagePositionPatient, place(k))) for k in range(SLICES)])
        data.ImagePositionPatient = [round(float(mm), 6) for mm in place(int(k)) + 0.9 * k * along]
        data.save_as(path)
    volume = read_volume(scan)
    file = written(scan, tmp_path / "mask.dcm")
    np.testing.assert_array_equal(read_by_hand(file, volume), labels_for(volume).numpy())


@pytest.mark.filterwarnings("ignore:.*read the DICOM series")
def test_a_mask_refers_to_the_series_that_was_read(tmp_path: Path) -> None:
    """Of several in one folder, by --series."""
    for name, number in (("one", 1), ("two", 2)):
        series(tmp_path / "study" / name, SeriesNumber=number, StudyInstanceUID="1.2.3")
    volume = read_volume(tmp_path / "study", series=SeriesChoice("2"))
    SegmentationFile(volume, SEGMENTS, ALGORITHM).write(labels_for(volume), tmp_path / "mask.dcm")
    file = pydicom.dcmread(tmp_path / "mask.dcm")
    source = pydicom.dcmread(tmp_path / "study" / "two" / "0.dcm")
    assert file.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert file.SeriesNumber == 1002


def test_an_empty_mask_is_written_with_all_its_frames(tmp_path: Path) -> None:
    scan = series(tmp_path / "scan")
    volume = read_volume(scan)
    file = written(scan, tmp_path / "mask.dcm", torch.zeros(volume.shape, dtype=torch.uint8))
    assert file.NumberOfFrames == SLICES * len(SEGMENTS) and not np.frombuffer(file.PixelData, np.uint8).any()
    assert [segment.SegmentLabel for segment in file.SegmentSequence] == ["anterior", "absent", "weiße Substanz"]
    groups = file.PerFrameFunctionalGroupsSequence
    places = {tuple(group.PlanePositionSequence[0].ImagePositionPatient) for group in groups}
    assert places == {tuple(place(k)) for k in range(SLICES)}


def test_the_headers_say_whose_and_what_it_is(tmp_path: Path) -> None:
    scan = series(
        tmp_path / "scan", SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg", PatientSex="F",
        SeriesDescription="T1", AccessionNumber="17", StudyDate="20200119",
    )  # fmt: skip
    source, file = pydicom.dcmread(scan / "0.dcm"), written(scan, tmp_path / "mask.dcm")
    assert file.SOPClassUID == SegmentationStorage and file.SegmentationType == "BINARY" and file.Modality == "SEG"
    assert str(file.PatientName) == "Müller^Jörg"
    for name in (
        "PatientID", "PatientSex", "AccessionNumber", "StudyDate", "StudyInstanceUID", "FrameOfReferenceUID"
    ):  # fmt: skip
        assert file[name].value == source[name].value
    assert file.SeriesInstanceUID != source.SeriesInstanceUID
    assert file.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert (file.SeriesNumber, file.SeriesDescription) == (1004, "a-model: T1")
    shared = file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (shared.SliceThickness, shared.SpacingBetweenSlices) == (2.5, 3.0)

    first, absent, private = file.SegmentSequence
    kind = first.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("5366008", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Anterior"
    assert first.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    assert first.AnatomicRegionSequence[0].CodeMeaning == "Brain"
    assert first.SegmentAlgorithmType == "AUTOMATIC" and first.SegmentAlgorithmName == "a-model"
    algorithm = first.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("a-model", "ab" * 32)
    assert algorithm.AlgorithmParameters == "seed=3,steps=10"
    own = private.SegmentedPropertyTypeCodeSequence[0]
    assert (own.CodingSchemeDesignator, own.CodeMeaning) == (PRIVATE_SCHEME, "weiße Substanz")
    assert own.CodeValue != absent.SegmentedPropertyTypeCodeSequence[0].CodeValue and len(own.CodeValue) <= 16
    assert file.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == PRIVATE_SCHEME
    again = written(scan, tmp_path / "again.dcm")
    assert again.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0].CodeValue == own.CodeValue
    assert again.PixelData == file.PixelData
    for name in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert file[name].value != again[name].value
    coded = written(scan, tmp_path / "coded.dcm", torch.ones(read_volume(scan).shape, dtype=torch.uint8), [HIPPOCAMPUS])
    assert "CodingSchemeIdentificationSequence" not in coded


@pytest.mark.parametrize("kind", ["files", "enhanced"])
def test_no_required_attribute_is_missing(kind: str, tmp_path: Path) -> None:
    """Of type 1 and 2, in all mandatory modules of the standard's Segmentation IOD, as highdicom tabulates them."""
    file = written(SOURCES[kind](tmp_path / "scan"), tmp_path / "mask.dcm")
    modules = [one for one in get_iod_module_map()[get_sop_class_iod_map()[file.SOPClassUID]] if one["usage"] == "M"]
    assert len(modules) > 8
    for module in modules:
        if module["key"] == "segmentation-multi-frame-functional-groups":  # shared or per frame, which no table can say
            for group in file.PerFrameFunctionalGroupsSequence:
                parts = {**file.SharedFunctionalGroupsSequence[0], **group}
                assert {pydicom.tag.Tag(name) for name in (
                    "PixelMeasuresSequence", "PlaneOrientationSequence", "PlanePositionSequence",
                    "FrameContentSequence", "DerivationImageSequence", "SegmentIdentificationSequence",
                )} <= set(parts)  # fmt: skip
            continue
        check_required_attributes(file, module["key"])
    for name in (
        "ContentDate",
        "ContentTime",
        "ContentLabel",
        "DeviceSerialNumber",
        "SoftwareVersions",
        "Manufacturer",
    ):
        assert file[name].value, f"type 1: {name}"


def test_sparse_or_odd_patient_data_are_no_obstacle(tmp_path: Path) -> None:
    scan = series(tmp_path / "scan", PatientID=None, PatientName=None, PatientSex="N", SeriesNumber=None)
    file = written(scan, tmp_path / "mask.dcm")
    assert file.PatientID == "" and file.PatientSex == "" and file.SeriesNumber == 1000


@pytest.mark.parametrize("name", ["FrameOfReferenceUID", "StudyInstanceUID", "SOPInstanceUID"])
def test_series_that_cannot_be_referred_to_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    scan = series(tmp_path / "scan", **{name: None})
    with pytest.raises(InputError, match=f"scan: found images without {name}; .*; use --format nifti"):
        SegmentationFile(read_volume(scan), SEGMENTS, ALGORITHM)


def test_a_volume_on_another_grid_is_refused(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "scan"))
    with pytest.raises(InputError, match="a volume that is not made of its slices one by one"):
        SegmentationFile(volume.oriented("LPI"), SEGMENTS, ALGORITHM)
    with pytest.raises(ValueError, match="a mask of shape"):
        SegmentationFile(volume, SEGMENTS, ALGORITHM).write(torch.zeros(2, 2, 2), tmp_path / "mask.dcm")


def test_only_dicom_can_be_referred_to(tmp_path: Path) -> None:
    scan = series(tmp_path / "scan")
    require_series([scan])
    (tmp_path / "scan.nii.gz").touch()
    with pytest.raises(UsageError, match=r"scan\.nii\.gz: is no DICOM series.*use --format nifti"):
        require_series([scan, tmp_path / "scan.nii.gz"])


def test_a_failure_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = read_volume(series(tmp_path / "scan"))
    file = SegmentationFile(volume, SEGMENTS, ALGORITHM)
    (tmp_path / "out").mkdir()

    def full(self: Dataset, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Dataset, "save_as", full)
    with pytest.raises(OSError, match="no space left"):
        file.write(labels_for(volume), tmp_path / "out" / "mask.dcm")
    assert list((tmp_path / "out").iterdir()) == []


def test_results_are_no_series(tmp_path: Path) -> None:
    """A mask beside series does not turn their folder into one, and a folder of masks takes more of them."""
    scans = [series(tmp_path / "study" / name) for name in ("a", "b")]
    for scan in scans:
        written(scan, segmentation_outputs(scan, None, 1, "dicom-seg")["segmentation"])
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == ["a", "a_seg.dcm", "b", "b_seg.dcm"]
    assert find_scans(tmp_path / "study") == scans and not is_series(tmp_path / "study")
    refuse_collisions({scan: segmentation_outputs(scan, None, 2, "dicom-seg") for scan in scans})
    with pytest.raises(UsageError, match="holds a DICOM series, which results must not join"):
        refuse_collisions({scans[0]: segmentation_outputs(scans[0], scans[1], 1, "dicom-seg")})


def test_a_segmentation_is_no_scan(tmp_path: Path) -> None:
    scan = series(tmp_path / "scan")
    before = read_volume(scan)
    written(scan, tmp_path / "mask.dcm")
    with pytest.raises(InputError, match=r"mask\.dcm: found no DICOM image"):
        read_volume(tmp_path / "mask.dcm")
    shutil.move(tmp_path / "mask.dcm", scan)  # as archives export a study
    assert torch.equal(read_volume(scan).data, before.data) and is_series(scan)


@pytest.mark.data
@pytest.mark.parametrize("name", ["hippocampus_crop", "t1post"])
def test_real_series(name: str, data_folder: Path, tmp_path: Path) -> None:
    volume = read_volume(data_folder / "dicom" / name)
    labels = torch.zeros(volume.shape, dtype=torch.uint8)
    labels[3:20, 5:9, 2:12], labels[10:30, 20:40, 11:15] = 1, 3
    file = written(data_folder / "dicom" / name, tmp_path / "mask.dcm", labels)
    np.testing.assert_array_equal(read_by_hand(file, volume), labels.numpy())
    np.testing.assert_array_equal(read_by_highdicom(tmp_path / "mask.dcm", volume), labels.numpy())

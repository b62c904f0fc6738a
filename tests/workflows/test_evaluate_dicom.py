"""`medseg evaluate` on DICOM segmentations, which name their classes and may leave out empty slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from medseg_diffusion.api.evaluation import evaluate_arrays
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.dicom_seg import Algorithm, Segment, SegmentationFile
from medseg_diffusion.volumes.io import read_labels, read_volume, stored_labels, write_labels, write_map
from medseg_diffusion.workflows.evaluate import EvaluateOptions, evaluate
from tests.helpers.cli import error_lines, medseg
from tests.helpers.dicom_series import AXES, SLICE_MM, SLICES, place, series
from tests.helpers.pages import viewed

ALGORITHM = Algorithm("a-model", "ab" * 32, {})


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return series(tmp_path / "scan")


def mask(scan: Path, slices: slice, seed: int) -> torch.Tensor:
    """Classes 1 and 2 at random in some slices."""
    labels = torch.zeros(read_volume(scan).shape, dtype=torch.uint8)
    inside = labels[..., slices]
    inside[:] = torch.from_numpy(np.random.default_rng(seed).choice([0, 1, 2], inside.shape).astype(np.uint8))
    return labels


def as_dicom(labels: torch.Tensor, scan: Path, path: Path, names: tuple[str, ...] = ("liver", "tumour")) -> Path:
    path.parent.mkdir(exist_ok=True)
    SegmentationFile(read_volume(scan), [Segment(name) for name in names], ALGORITHM).write(labels, path)
    return path


def as_nifti(labels: torch.Tensor, scan: Path, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_labels(labels[None], read_volume(scan), path)
    return path


@pytest.mark.parametrize("slices", [slice(1, 4), slice(3, 6), slice(2, 3), slice(0, 0)], ids=str)
def test_the_format_of_a_mask_changes_no_number(scan: Path, tmp_path: Path, slices: slice) -> None:
    ours, theirs = mask(scan, slices, 0), mask(scan, slice(2, 5), 1)
    files = {
        "nifti": (as_nifti(ours, scan, tmp_path / "a.nii.gz"), as_nifti(theirs, scan, tmp_path / "b.nii.gz")),
        "dicom": (as_dicom(ours, scan, tmp_path / "a.dcm"), as_dicom(theirs, scan, tmp_path / "b.dcm")),
    }
    expected = evaluate(*files["nifti"], tmp_path / "out", EvaluateOptions(labels={1: "liver", 2: "tumour"}))
    for predicted, reference in (("dicom", "nifti"), ("nifti", "dicom"), ("dicom", "dicom")):
        result = evaluate(files[predicted][0], files[reference][1], tmp_path / predicted)
        assert result.labels == {1: "liver", 2: "tumour"}, "as the segments are called"
        assert result.warnings == ()
        for label in (1, 2):
            one, other = result.cases[0].results[label], expected.cases[0].results[label]
            assert one.overlap.n_pred == other.overlap.n_pred and one.overlap.n_ref == other.overlap.n_ref
            assert one.metrics == pytest.approx(other.metrics, abs=1e-4, nan_ok=True)


def test_folders_pair_segmentations_by_name_and_the_page_shows_the_scan(scan: Path, tmp_path: Path) -> None:
    labels = mask(scan, slice(1, 3), 0)
    as_dicom(labels, scan, tmp_path / "pred" / "scan_seg.dcm")
    as_dicom(labels, scan, tmp_path / "ref" / "scan.dcm")
    volume = read_volume(scan)
    (tmp_path / "images").mkdir()
    write_map(volume.data, volume, tmp_path / "images" / "scan.nii.gz")
    done = medseg(
        "evaluate", tmp_path / "pred", tmp_path / "ref", "-o", tmp_path / "out", "--images", tmp_path / "images"
    )
    assert done.exit_code == 0, done.output
    assert "liver" in done.output and "1.000" in done.output
    assert viewed((tmp_path / "out" / "report.html").read_text())["scan"].keys() == {"scan", "reference", "prediction"}


def test_the_series_itself_is_the_background_of_a_single_case(scan: Path, tmp_path: Path) -> None:
    path = as_dicom(mask(scan, slice(1, 3), 0), scan, tmp_path / "a.dcm")
    evaluate(path, path, tmp_path / "out", EvaluateOptions(images=scan))
    assert "scan" in viewed((tmp_path / "out" / "report.html").read_text())["a"]


def test_raters_may_have_marked_other_slices(scan: Path, tmp_path: Path) -> None:
    masks = [mask(scan, slice(first, first + 2), first) for first in range(4)]
    nifti = [as_nifti(one, scan, tmp_path / f"{i}.nii.gz") for i, one in enumerate(masks)]
    dicom = [as_dicom(one, scan, tmp_path / f"{i}.dcm") for i, one in enumerate(masks)]
    expected, result = (
        evaluate(paths[0], paths[1], tmp_path / "out", EvaluateOptions(raters=paths[2:])).cases[0].agreement
        for paths in (nifti, dicom)
    )
    assert result is not None and expected is not None
    assert result.energy_distance == pytest.approx(expected.energy_distance) and result.energy_distance > 0


def test_from_python_too(scan: Path, tmp_path: Path) -> None:
    labels = mask(scan, slice(1, 3), 0)
    one = as_dicom(labels, scan, tmp_path / "one.dcm")
    assert evaluate_arrays(one, as_nifti(labels, scan, tmp_path / "one.nii.gz"))[2].dice == 1.0
    assert stored_labels(one) == {1: "liver", 2: "tumour"}
    assert sorted(read_labels(one).data.unique().tolist()) == [0, 1, 2]


def test_segments_in_another_order_are_told(scan: Path, tmp_path: Path) -> None:
    labels = mask(scan, slice(1, 3), 0)
    one = as_dicom(labels, scan, tmp_path / "one.dcm")
    turned = as_dicom(labels, scan, tmp_path / "other.dcm", names=("tumour", "liver"))
    (text,) = evaluate(one, turned, tmp_path / "out").warnings[:1]
    assert "Label 1 is tumour in" in text and "but liver in" in text


def edited(source: Path, path: Path, change: Callable[[pydicom.Dataset], None]) -> Path:
    dataset = pydicom.dcmread(source)
    change(dataset)
    dataset.save_as(path)
    return path


def without_step(dataset: pydicom.Dataset, thickness: float | None = None) -> None:
    """As many programs write: nothing on the distance of slices."""
    (measures,) = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        if name in measures:
            delattr(measures, name)
    if thickness is not None:
        measures.SliceThickness = thickness


@pytest.mark.parametrize("chosen", [[1, 5], [1, 3], [3]], ids=str)
def test_the_distance_of_slices_is_that_of_the_other_file(scan: Path, tmp_path: Path, chosen: list[int]) -> None:
    labels = mask(scan, slice(0, 6), 0)
    labels[..., [k for k in range(SLICES) if k not in chosen]] = 0
    whole = as_dicom(labels, scan, tmp_path / "whole.dcm")
    alone = edited(whole, tmp_path / "alone.dcm", without_step)
    expected = evaluate(whole, as_nifti(labels, scan, tmp_path / "a.nii.gz"), tmp_path / "out").cases[0]
    for one, other in ((alone, tmp_path / "a.nii.gz"), (tmp_path / "a.nii.gz", alone)):
        result = evaluate(one, other, tmp_path / "out")
        assert result.cases[0].results[1].metrics == pytest.approx(expected.results[1].metrics, nan_ok=True, abs=1e-4)
        assert any("does not say how far its slices are apart" in text for text in result.warnings)
    thick = edited(whole, tmp_path / "thick.dcm", lambda dataset: without_step(dataset, SLICE_MM))
    assert evaluate(thick, thick, tmp_path / "out").warnings == ()


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segments_keep_their_numbers_and_names(scan: Path, tmp_path: Path, kind: str) -> None:
    """Of other programs, segments need not be numbered 1, 2, ..."""
    labels = mask(scan, slice(1, 3), 0)

    def renumber(dataset: pydicom.Dataset) -> None:
        numbers = {1: 3, 2: 7}
        for item in dataset.SegmentSequence:
            item.SegmentNumber = numbers[item.SegmentNumber]
        for group in dataset.PerFrameFunctionalGroupsSequence:
            (segment,) = group.SegmentIdentificationSequence
            segment.ReferencedSegmentNumber = numbers[segment.ReferencedSegmentNumber]
        if kind == "LABELMAP":
            size = int(dataset.Rows) * int(dataset.Columns)
            bits = dataset.pixel_array.reshape(-1, size)
            frames: dict[tuple[float, ...], np.ndarray] = {}
            groups = {}
            for frame, group in zip(bits, dataset.PerFrameFunctionalGroupsSequence, strict=True):
                place = tuple(group.PlanePositionSequence[0].ImagePositionPatient)
                number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
                frames[place] = frames.get(place, np.zeros(size, np.uint8)) + frame * number
                groups[place] = group
            dataset.SegmentationType, dataset.NumberOfFrames = "LABELMAP", len(frames)
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
            dataset.PerFrameFunctionalGroupsSequence = list(groups.values())
            pixels = b"".join(frame.astype(np.uint8).tobytes() for frame in frames.values())
            dataset.PixelData = pixels + bytes(len(pixels) % 2)

    path = edited(as_dicom(labels, scan, tmp_path / "one.dcm"), tmp_path / "other.dcm", renumber)
    assert stored_labels(path) == {3: "liver", 7: "tumour"}
    renumbered = as_nifti(torch.where(labels == 2, 7, torch.where(labels == 1, 3, 0)).to(torch.uint8), scan,
                          tmp_path / "a.nii.gz")  # fmt: skip
    result = evaluate(path, renumbered, tmp_path / "out")
    assert result.labels == {3: "liver", 7: "tumour"} and result.cases[0].mean_dice == 1.0


def test_a_tilted_gantry_is_read_as_it_was_written(tmp_path: Path) -> None:
    tilted = series(tmp_path / "tilted")
    for file in tilted.iterdir():
        dataset = pydicom.dcmread(file)
        k = np.array(dataset.ImagePositionPatient, float)
        number = round(float(np.dot(k - place(0), AXES[2]) / SLICE_MM))
        dataset.ImagePositionPatient = [round(float(mm), 6) for mm in k + number * 0.8 * AXES[1]]
        dataset.save_as(file)
    labels = mask(tilted, slice(1, 4), 0)
    path = as_dicom(labels, tilted, tmp_path / "mask.dcm")
    aligned = read_volume(tilted).aligned(read_labels(path))
    torch.testing.assert_close(aligned.data[0], labels.int())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: setattr(d, "SegmentationType", "FRACTIONAL"), "a segmentation of probabilities"),
        (lambda d: setattr(d, "PixelData", b"\xff" * len(d.PixelData)), "segments that overlap"),
        (lambda d: delattr(d, "SegmentSequence"), "an unreadable DICOM segmentation"),
        (
            lambda d: setattr(
                d.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0], "ImagePositionPatient", [1.0, 2.0, 3.3]
            ),
            "slices",
        ),
    ],
    ids=["fractional", "overlap", "no segments", "uneven"],
)
def test_what_is_no_label_map_is_refused(scan: Path, tmp_path: Path, change, message: str) -> None:
    path = edited(as_dicom(mask(scan, slice(1, 5), 0), scan, tmp_path / "one.dcm"), tmp_path / "bad.dcm", change)
    with pytest.raises(InputError, match=message):
        read_labels(path)


def test_a_file_without_preamble_is_read(scan: Path, tmp_path: Path) -> None:
    labels = mask(scan, slice(1, 3), 0)
    path = as_dicom(labels, scan, tmp_path / "one.dcm")
    dataset = pydicom.dcmread(path)
    bare = tmp_path / "bare.dcm"
    pydicom.dcmwrite(bare, pydicom.Dataset(dataset), implicit_vr=False, little_endian=True)
    torch.testing.assert_close(read_volume(scan).aligned(read_labels(bare)).data[0], labels.int())


def test_a_damaged_segmentation_is_refused_in_one_line(scan: Path, tmp_path: Path) -> None:
    path = as_dicom(mask(scan, slice(1, 3), 0), scan, tmp_path / "one.dcm")
    reference = as_nifti(mask(scan, slice(1, 3), 0), scan, tmp_path / "one.nii.gz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError):
        read_labels(path)
    done = medseg("evaluate", path, reference, "-o", tmp_path / "out")
    assert done.exit_code == 3 and len(error_lines(done)) == 1
    assert not (tmp_path / "out").exists()

"""Healthy slices: which are taken, which are left out, and how often each is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import generate_uid

from medseg_diffusion.data.healthy import (
    find_healthy,
    healthy_slices,
    healthy_source,
    left_out,
    lesion_map,
    packed_healthy,
    refuse_lesions,
)
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.preprocessing import Preprocessing
from tests.helpers.anomaly import head, write
from tests.helpers.dicom_series import series


def test_slices_near_a_labelled_one_are_left_out() -> None:
    label = torch.zeros(4, 4, 10)
    label[1, 1, 4:6] = 1
    kept = {n: healthy_slices(label, 10, n).nonzero().flatten().tolist() for n in (1, 3)}
    assert kept == {1: [0, 1, 2, 3, 6, 7, 8, 9], 3: [0, 1, 8, 9]}
    assert bool(healthy_slices(None, 10, 3).all())


def test_healthy_and_unhealthy_slices_are_packed_with_their_class_and_side(anomaly_scans, tmp_path: Path) -> None:
    source = healthy_source(anomaly_scans, 2, anomaly_scans, (2, 2))
    images = packed_healthy(source, tmp_path, (16, 16), 1, Preprocessing())
    assert images.classes == ("healthy", "unhealthy")
    # 12 slices less those closer than 2 to slices 4..6; and the 3 labelled ones.
    for part, patients in (("train", 4), ("validation", 2), ("test", 2)):
        labels = images.labels[images.part(part)]
        assert [int((labels == value).sum()) for value in (0, 1)] == [7 * patients, 3 * patients]
    bright = images.images.reshape(len(images.images), -1).max(1)
    assert len(bright) == 80


def test_every_height_is_drawn_as_often_as_it_occurs(tmp_path: Path) -> None:
    """Healthy slices are rare where lesions are: a model would hardly see that part of a healthy head."""
    for i in range(20):  # in every second scan a lesion in three of ten slices
        image, label = head(i, slice(4, 7) if i % 2 else None, (20, 24, 10))
        write(tmp_path / "all" / "images" / f"s{i:02}.nii.gz", image)
        write(tmp_path / "all" / "labels" / f"s{i:02}.nii.gz", label)
    source = healthy_source(tmp_path / "all", 1, tmp_path / "all", (0, 0))
    images = packed_healthy(source, tmp_path, (16, 16), 1, Preprocessing())
    times = np.bincount(images.epoch, minlength=len(images.images))
    healthy, unhealthy = (times[images.labels == label] for label in (0, 1))
    assert healthy[:10].tolist() == [1, 1, 1, 1, 2, 2, 2, 1, 1, 1] and healthy[10:17].tolist() == [1] * 7
    assert unhealthy.tolist() == [2] * 30
    # Where nothing is left out, every slice is drawn once.
    alone = healthy_source(tmp_path / "all" / "images", None, None, (0, 0))
    every = packed_healthy(alone, tmp_path, (16, 16), 1, Preprocessing())
    assert np.array_equal(np.sort(every.epoch), np.arange(200))


def test_a_scan_that_patients_csv_gives_to_another_patient_is_packed_again(tmp_path: Path) -> None:
    """Else the old split stays in use, and a scan that is held out now was trained on."""
    data = tmp_path / "scans"
    for i in range(6):
        write(data / f"s{i}.nii.gz", head(i, None, (16, 16, 4))[0])

    def trained(patients: str) -> tuple[set[str], set[str]]:
        rows = [f"s{i},{patient}" for i, patient in enumerate(patients)]
        (data / "patients.csv").write_text("\n".join(["case,patient", *rows]))
        source = healthy_source(data, None, None, (1, 1))
        images = packed_healthy(source, tmp_path / "store", (16, 16), 1, Preprocessing())
        wanted = {scan.name for scan in source.scans if source.splits[scan.patient] == "train"}
        return {images.names[i] for i in images.part("train")}, wanted

    for patients in ("aabbcc", "ccaabb"):  # the same patients, with other scans
        found, wanted = trained(patients)
        assert found == wanted and len(found) == 2


def test_a_series_whose_slices_are_replaced_is_packed_again(tmp_path: Path) -> None:
    """Replaced files leave the size and time of their folder as they were."""
    data = tmp_path / "scans"
    for name in ("a", "b"):
        series(data / name)

    def packed_pixels() -> np.ndarray:
        source = healthy_source(data, None, None, (0, 0))
        return np.array(packed_healthy(source, tmp_path / "store", (8, 8), 1, Preprocessing()).images)

    before = packed_pixels()
    stored = (data / "a").stat()
    for file in sorted((data / "a").glob("*.dcm")):
        dataset = pydicom.dcmread(file)
        dataset.PixelData = (4000 - dataset.pixel_array).astype(np.uint16).tobytes()
        file.write_bytes(b"")
        dataset.save_as(file)
    assert (data / "a").stat().st_mtime_ns == stored.st_mtime_ns
    assert not np.array_equal(before, packed_pixels())


def test_small_lesions_count_whatever_the_models_voxels(tmp_path: Path) -> None:
    """A lesion of one voxel of 0.5 mm has an eighth of a voxel of 1 mm: no majority, and still a lesion."""
    for i in range(4):
        image, label = head(i, None, (40, 48, 24))
        label[20, 24, 13] = 1
        write(tmp_path / "scans" / "images" / f"s{i}.nii.gz", image, 0.5)
        write(tmp_path / "scans" / "labels" / f"s{i}.nii.gz", label, 0.5)
    found = find_healthy(tmp_path / "scans")
    with pytest.raises(InputError, match="found 1 labelled voxels"):
        refuse_lesions(found[0], None)
    _, placement = Preprocessing(spacing_mm=(1, 1, 1)).apply(read_volume(found[0].image))
    lesions = lesion_map(found[0], placement)
    assert lesions is not None and lesions[..., 6].any() and not lesions[..., :5].any() and not lesions[..., 8:].any()


def test_air_is_not_counted_as_left_out_for_a_lesion(tmp_path: Path) -> None:
    for i in range(4):
        image, label = head(i, slice(4, 6))
        image[..., :3] = 5 + np.random.default_rng(i).normal(0, 0.01, (20, 24, 3))
        write(tmp_path / "scans" / "images" / f"s{i}.nii.gz", image)
        write(tmp_path / "scans" / "labels" / f"s{i}.nii.gz", label)
    source = healthy_source(tmp_path / "scans", 1, None, (0, 0))
    images = packed_healthy(source, tmp_path, (16, 16), 1, Preprocessing())
    assert len(images.images) == 4 * 7 and left_out(images)["train"] == 4 * 2


def test_localizers_are_no_healthy_scans(tmp_path: Path) -> None:
    uid = generate_uid()
    series(tmp_path / "p1" / "t1", StudyInstanceUID=uid)
    series(tmp_path / "p1" / "survey", StudyInstanceUID=uid, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with pytest.warns(UserWarning, match="left out localizers: p1/survey"):
        assert [scan.name for scan in find_healthy(tmp_path)] == ["p1/t1"]


def test_dicom_series_in_deeper_folders_belong_to_the_patient_of_the_first(tmp_path: Path) -> None:
    for path in ("p1/study/t1", "p1/study/t2", "p2/study/t1"):
        series(tmp_path / path)
    write(tmp_path / "p3.nii.gz", head(0)[0])
    found = {scan.name: scan.patient for scan in find_healthy(tmp_path)}
    assert found == {"p1/study/t1": "p1", "p1/study/t2": "p1", "p2/study/t1": "p2", "p3": "p3"}
    series(tmp_path / "elsewhere" / "p4" / "t1")
    (tmp_path / "p4").symlink_to(tmp_path / "elsewhere" / "p4")
    (tmp_path / "elsewhere" / "p4" / "loop").symlink_to(tmp_path / "elsewhere")
    assert len(find_healthy(tmp_path)) == 5, "linked folders count once"
    (one,) = find_healthy(tmp_path / "p1" / "study" / "t1")
    assert (one.name, one.patient) == ("t1", "t1")

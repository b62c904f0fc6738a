"""The DICOM files that come with pydicom, of many makers, some broken: each is read rightly or refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_files
from pydicom.dataset import FileDataset
from pydicom.uid import generate_uid

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_volume

with warnings.catch_warnings(action="ignore"):
    FILES = sorted(Path(path) for path in get_testdata_files() if Path(path).is_file())
FOLDERS = sorted({path.parent for path in FILES})


def opened(path: Path) -> FileDataset | None:
    """The file as pydicom reads it; None if it is no image with a place in the patient."""
    with warnings.catch_warnings(action="ignore"):
        try:
            data = pydicom.dcmread(path)
            placed = all(data.get(name) for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
            return data if placed and "PixelData" in data else None
        except Exception:  # nearly anything, for the broken ones
            return None


PLACED = [path for path in FILES if opened(path) is not None]


def of_folder(path: Path) -> str:
    return "/".join(path.parts[-2:])


@pytest.mark.parametrize("path", [*FILES, *FOLDERS], ids=of_folder)
def test_a_file_or_folder_alone_is_a_volume_or_one_line(path: Path) -> None:
    try:
        volume = read_volume(path, channels=None)
    except InputError as error:
        message = str(error)
        read = path.parent if path.name == "DICOMDIR" else path  # an index stands for the files beside and below it
        assert "\n" not in message and message.startswith(f"{read}: found ") and len(message) < 1000
    else:
        assert volume.data.isfinite().all() and min(volume.spacing) > 0.05


def twins(path: Path, folder: Path) -> tuple[Path, np.ndarray] | None:
    """A series of the file's slice and a copy of it 4 mm further, and the rescaled values; None if it is unwritable."""
    folder.mkdir()
    with warnings.catch_warnings(action="ignore"):
        for k in range(2):
            data = opened(path)
            assert data is not None
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            axes = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
            place = np.array(data.ImagePositionPatient, float) + 4 * k * np.cross(*axes)
            data.ImagePositionPatient = [round(float(v), 6) for v in place]
            data.save_as(folder / f"{k}.dcm")
        pixels = data.pixel_array
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    return folder, pixels.astype(np.float64) * slope + intercept


def test_slices_of_every_maker_have_the_values_that_pydicom_reads(tmp_path: Path) -> None:
    right, refused = [], {}
    for number, path in enumerate(PLACED):
        try:
            folder, expected = twins(path, tmp_path / str(number))
        except Exception:  # pydicom cannot decode or write it
            folder, expected = tmp_path / str(number), None
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                volume = read_volume(folder)
        except InputError as error:
            refused[path.name] = str(error)
            continue
        assert all(str(one.message).startswith(f"{folder.name}: ") for one in said), path.name
        assert expected is not None, f"{path.name}: read, although pydicom cannot decode it"
        right.append(path.name)
        assert volume.shape == (*expected.shape[::-1], 2), path.name
        for k in range(2):
            np.testing.assert_allclose(volume.data[0, :, :, k].T, expected, rtol=1e-5, atol=1e-3, err_msg=path.name)
        assert volume.spacing[2] == pytest.approx(4, abs=1e-3), path.name
    assert len(right) >= 30, (right, refused)
    assert all("\n" not in message for message in refused.values())

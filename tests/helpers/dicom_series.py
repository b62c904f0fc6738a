"""DICOM series of an oblique volume: one file for each slice, or multi-frame files; names do not tell their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

ROWS, COLUMNS, SLICES = 7, 5, 6
ROW_MM, COLUMN_MM, SLICE_MM = 1.5, 0.75, 3.0
AXES = nib.eulerangles.euler2mat(0.3, -0.2, 0.1).T  # rows: unit vectors along columns' index, rows' index and slices
VALUES = np.random.default_rng(1).integers(0, 4000, (SLICES, ROWS, COLUMNS)).astype(np.uint16)
ORDER = (3, 0, 5, 1, 4, 2)


def place(k: int) -> list[float]:
    """Position of slice k, LPS mm."""
    return [round(float(mm), 6) for mm in np.array([10.0, -20.0, 30.0]) + k * SLICE_MM * AXES[2]]


def orientation() -> list[float]:
    return [round(float(part), 8) for part in AXES[:2].ravel()]


def _file(kind: str, uid: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = f"{uid}.1", f"{uid}.2", f"{uid}.3"
    data.Modality, data.SeriesNumber, data.PatientID, data.PatientName = "MR", 4, "P1", "Test^Patient"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    return data


def series(folder: Path, **changes: object) -> Path:
    """One file for each slice; a change to None removes the attribute."""
    folder.mkdir(parents=True)
    uid = generate_uid(entropy_srcs=[str(folder)])[:40]
    for number, k in enumerate(ORDER):
        data = _file(MRImageStorage, uid)
        data.PixelSpacing, data.SliceThickness = [ROW_MM, COLUMN_MM], 2.5
        data.ImageOrientationPatient, data.ImagePositionPatient = orientation(), place(k)
        data.PixelData = VALUES[k].tobytes()
        for name, value in changes.items():
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def enhanced(folder: Path, files: Sequence[Sequence[int]], own_orientations: bool = False) -> Path:
    """Multi-frame files of these slices each; ``own_orientations`` stores orientation and spacing for every frame."""
    folder.mkdir(parents=True)
    uid = generate_uid(entropy_srcs=[str(folder)])[:40]
    for number, slices in enumerate(files):
        data = _file(EnhancedMRImageStorage, uid)
        measures, axes = Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [ROW_MM, COLUMN_MM], 2.5
        axes.ImageOrientationPatient = orientation()
        shared, groups = Dataset(), [Dataset() for _ in slices]
        for group in groups if own_orientations else [shared]:
            group.PixelMeasuresSequence, group.PlaneOrientationSequence = [measures], [axes]
        for group, k in zip(groups, slices, strict=True):
            position = Dataset()
            position.ImagePositionPatient = place(k)
            group.PlanePositionSequence = [position]
        data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], groups
        data.NumberOfFrames = len(slices)
        data.PixelData = np.stack([VALUES[k] for k in slices]).tobytes()
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder

"""Reads DICOM segmentations, of this package and of other programs, as label maps.

highdicom reads them, too, but takes the smallest distance between the slices of a file, or 1 mm, for that of the scan
where the file does not tell it, and no slices of a tilted gantry.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import torch
from pydicom.dataset import Dataset

from medseg_diffusion.errors import InputError, quiet_libraries, remark

from .dicom import LPS_RAS, UNEVEN, Frame, frames_of, groups_of, require_same, text_of, value_of, with_syntax
from .volume import FloatArray, Header, Volume

_EXPORT = "export it again, or as NIfTI"
_MOST_SLICES = 10_000


def read_segmentation(path: Path) -> tuple[Volume, dict[int, str]]:
    """Read a DICOM segmentation.

    Returns:
        (1, I, J, K) int32, the number of the segment of every voxel; its grid may be a part of the scan's
        (`Header.sparse`), with the axes in another order. And number -> label of the segments; if this package wrote
        them, each is the `dicom_seg.segment_label` of a class.

    Raises:
        InputError: another file, a damaged one, one of probabilities, segments that overlap, or slices at uneven
            distances.
    """
    try:
        with quiet_libraries():
            dataset = with_syntax(pydicom.dcmread(path, force=True))
            names = _names(dataset)
            if dataset.SegmentationType == "FRACTIONAL":
                expected = "segments without fractions (BINARY or LABELMAP)"
                raise InputError(path, "a segmentation of probabilities (FRACTIONAL)", expected, _EXPORT)
            frames = list(frames_of(path, path.name, lambda: path.open("rb"), dataset))
            pixels = np.asarray(dataset.pixel_array).reshape(len(frames), dataset.Rows, dataset.Columns)
            numbers = [_number(dataset, frame) for frame in frames]
            groups = groups_of(dataset, 0)
            stated, thickness = (
                abs(float(value_of(groups, "PixelMeasuresSequence", name) or 0))
                for name in ("SpacingBetweenSlices", "SliceThickness")
            )
    except (InputError, MemoryError):
        raise
    except Exception as error:  # pydicom raises nearly anything for damaged files
        raise _unreadable(path, error) from error
    places, affine, step = _grid(path, frames, (stated, thickness))
    if step not in (stated, thickness):
        remark(f"{path.name}: does not say how far its slices are apart; {step:g} mm is assumed")
    labels = np.zeros((pixels.shape[2], pixels.shape[1], max(places) + 1), np.int32)
    for place, stored, number in zip(places, pixels, numbers, strict=True):
        plane, marked = labels[:, :, place], stored.T.astype(np.int32)
        if number is not None:
            marked = np.where(marked > 0, number, 0)
        if np.any((plane != marked) & (plane > 0) & (marked > 0)):
            raise InputError(path, "segments that overlap", "one segment at most in each voxel", _EXPORT)
        np.copyto(plane, marked, where=marked > 0)
    header = Header(modality="SEG", sparse=True, unknown_step=step != stated)
    return Volume(torch.from_numpy(labels)[None], affine, path, header), names


def segment_names(path: Path) -> dict[int, str]:
    """Number -> label of the segments of a DICOM segmentation, by its header alone.

    Raises:
        InputError: another file, or a damaged one.
    """
    try:
        with quiet_libraries():
            return _names(pydicom.dcmread(path, force=True, stop_before_pixels=True))
    except Exception as error:
        raise _unreadable(path, error) from error


def _names(dataset: Dataset) -> dict[int, str]:
    numbered = {int(item.SegmentNumber): str(item.get("SegmentLabel") or "") for item in dataset.SegmentSequence}
    return {number: name or f"segment {number}" for number, name in sorted(numbered.items()) if number}


def _number(dataset: Dataset, frame: Frame) -> int | None:
    """The segment of a frame; None if its values are the segments (LABELMAP)."""
    if dataset.SegmentationType == "LABELMAP":
        return None
    number = value_of(groups_of(dataset, frame.index), "SegmentIdentificationSequence", "ReferencedSegmentNumber")
    return int(number)


def _grid(path: Path, frames: Sequence[Frame], steps: Sequence[float]) -> tuple[list[int], FloatArray, float]:
    """The slice of every frame, the affine voxel -> RAS mm, and the distance between slices.

    That is the first of ``steps`` which leads to all slices, or the smallest distance between them; 1 mm for a single
    slice.
    """
    require_same(path, frames)
    first = frames[0]
    normal = np.cross(*first.axes)
    along = np.array([frame.position @ normal for frame in frames])
    lowest, distances = frames[int(along.argmin())], along - along.min()
    smallest = float(distances[distances > 1e-3].min(initial=np.inf))
    for step in (*steps, smallest if np.isfinite(smallest) else 1.0):
        places = _places(distances, step)
        if places is not None:
            break
    else:
        raise InputError(path, "slices at uneven distances", "slices at one distance", _EXPORT)
    farthest, count = frames[int(along.argmax())], int(places.max())
    step_mm = (farthest.position - lowest.position) / count if count else normal * step
    expected = lowest.position + places[:, None] * step_mm
    if np.linalg.norm(expected - [frame.position for frame in frames], axis=1).max() > UNEVEN * step:
        raise InputError(path, "slices shifted unevenly against each other", "slices in one line", _EXPORT)
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.spacing[1]
    affine[:3, 1] = first.axes[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step_mm, lowest.position
    return places.tolist(), LPS_RAS @ affine, step


def _places(distances: FloatArray, step: float) -> npt.NDArray[np.int64] | None:
    """Numbers of slices at these distances from the first, in mm; None if the step does not lead to them."""
    farthest = float(distances.max())
    if step < 1e-3 or farthest / step > _MOST_SLICES:
        return None
    last = round(farthest / step)
    if abs(last * step - farthest) > max(UNEVEN * step, 2e-3 * farthest):  # a step in a header may be rounded
        return None
    exact = distances * (last / farthest) if last else distances
    places = np.rint(exact)
    return None if np.abs(exact - places).max() > UNEVEN else places.astype(np.int64)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        path, f"an unreadable DICOM segmentation ({text_of(error)})", "a complete one", "copy or export it again"
    )

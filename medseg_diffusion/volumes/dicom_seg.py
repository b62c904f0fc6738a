"""Writes masks of DICOM series as DICOM segmentations (DICOM-SEG), which refer to the images of the series.

The segmentation type is BINARY, one bit for each voxel and class: every viewer of DICOM-SEG reads it. LABELMAP came
into the standard in 2024, and few viewers and archives know it yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from medseg_diffusion.errors import InputError, UsageError, quiet_libraries
from medseg_diffusion.files import whole_file

from .paths import MAKER, is_dicom
from .volume import Volume, grid_distance

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom.dataset import Dataset

    from .dicom import SourceSlice

Code = tuple[str, str, str]
"""Value, scheme and meaning of a code, such as ("39607008", "SCT", "Lung"). SCT is SNOMED CT."""
PRIVATE_SCHEME = "99MEDSEG"
"""Scheme of the types of classes for which no code is known. Their values are the start of the SHA-256 of the name."""
TISSUE: Code = ("85756007", "SCT", "Tissue")
"""Category of such classes."""

_SERIES_NUMBERS_FROM = 1000  # to which the number of the source series is added
# Elements that every DICOM file must have; those of old or anonymised files may lack them, which then stay empty.
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
# Elements that name the maker of a mask, and the characters of them that `SavedModel.signature` has.
_MAKER = (("Manufacturer", 64), ("ManufacturerModelName", 48), ("DeviceSerialNumber", 12))
_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames")


@dataclass(frozen=True)
class Segment:
    """A class of a mask, and what it means; without ``type``, a private code of the name stands in its place.

    Attributes:
        name: name of the class.
        category: code of its kind, such as tissue (DICOM's context group 7150).
        type: code of what it is (context group 7151).
        modifiers: codes that restrict the type, such as anterior or left (context groups 2 and 244).
        region: code of the part of the body in which it lies (context group 4).
    """

    name: str
    category: Code = TISSUE
    type: Code | None = None
    modifiers: tuple[Code, ...] = ()
    region: Code | None = None


@dataclass(frozen=True)
class Algorithm:
    """What made the mask.

    Attributes:
        name: name of the model.
        version: SHA-256 of its weights, in hexadecimal.
        parameters: options that change the result, such as the seed.
    """

    name: str
    version: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def require_series(scans: Sequence[Path]) -> None:
    """UsageError for a scan that is no DICOM: a segmentation refers to DICOM images."""
    for scan in scans:
        if not is_dicom(scan):
            raise UsageError(
                f"{scan}: is no DICOM series, and a DICOM segmentation refers to the images of one; use --format nifti"
            )


class SegmentationFile:
    """The DICOM segmentation of a scan, before its mask is known.

    Patient, study and frame of reference are those of the scan. Every written file is a series of its own with new
    UIDs, also when a run is repeated: a UID must never name two files, and these differ in their time.

    Args:
        scan: read from DICOM, not reoriented.
        segments: the classes of the labels 1, 2, ...
        algorithm: what makes the mask.

    Raises:
        InputError: headers to which a segmentation cannot refer, for example without a frame of reference.
    """

    def __init__(self, scan: Volume, segments: Sequence[Segment], algorithm: Algorithm) -> None:
        from .dicom import source_slices

        assert scan.source is not None
        self._path = scan.source
        self._slices, affine = source_slices(scan.source, scan.header.series)
        self._shape = scan.shape
        if len(self._slices) != scan.shape[2] or grid_distance(affine, scan.affine, scan.shape) > 1e-3:
            raise self._unusable("a volume that is not made of its slices one by one")
        self._segments, self._algorithm = segments, algorithm
        # One voxel shows before the computation whether the headers will do after it.
        probe = np.zeros(scan.shape[::-1], np.uint8)
        probe[0, 0, 0] = 1
        self._dataset(probe)

    def write(self, labels: Tensor, path: Path) -> None:
        """Write a mask. Frames without a voxel of a class are left out; of an empty mask, all frames are written.

        Args:
            labels: (I, J, K) whole numbers, 0 for the background, on the grid of the scan.
            path: the file. It is renamed into place when it is complete.

        Raises:
            ValueError: another grid.
        """
        if tuple(labels.shape) != self._shape:
            raise ValueError(f"a mask of shape {tuple(labels.shape)} for a scan of shape {self._shape}")
        # torch transposes several times faster than numpy
        dataset = self._dataset(labels.detach().cpu().permute(2, 1, 0).contiguous().numpy())
        with whole_file(path) as temporary:
            dataset.save_as(temporary, enforce_file_format=True)

    def _dataset(self, labels: npt.NDArray[Any]) -> Dataset:
        """The segmentation of labels (slices, rows, columns)."""
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
            if any(not one.header.get(name) for one in self._slices):
                raise self._unusable(f"images without {name}")
        try:
            with quiet_libraries():  # of values in the source that DICOM does not allow
                dataset = _segmentation(self._slices, labels, self._segments, self._algorithm)
                _state_distance(dataset, self._slices)
                _refer_to(dataset, self._slices)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._unusable(f"headers that a segmentation cannot refer to ({error})") from error
        return dataset

    def _unusable(self, found: str) -> InputError:
        return InputError(self._path, found, "a complete DICOM series for a DICOM segmentation", "use --format nifti")


def description(path: Path) -> str:
    """Manufacturer, model and its version, in the words of `SavedModel.signature`; empty if they cannot be read."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        with quiet_libraries():
            header = dcmread(path, stop_before_pixels=True, specific_tags=[name for name, _ in _MAKER])
        words = (str(header.get(name, ""))[:length] for name, length in _MAKER)
        return " ".join(words).encode("ascii", "replace").decode()
    except (AttributeError, EOFError, InvalidDicomError, KeyError, OSError, TypeError, ValueError):
        return ""


def segment_label(name: str) -> str:
    """The label of the segment of a class: the name, as far as DICOM can hold it."""
    return _text(name)


def _segmentation(
    slices: Sequence[SourceSlice], labels: npt.NDArray[Any], segments: Sequence[Segment], algorithm: Algorithm
) -> Dataset:
    import highdicom
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.uid import generate_uid

    header = slices[0].header
    own = CodingSchemeIdentificationItem(
        PRIVATE_SCHEME, name="Classes of medseg-diffusion", responsible_organization="medseg-diffusion"
    )
    now = datetime.now()
    dataset = highdicom.seg.Segmentation(
        source_images=_as_single_images(slices),
        pixel_array=labels.astype(np.min_scalar_type(len(segments)), copy=False),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(i, segment, algorithm) for i, segment in enumerate(segments, start=1)],
        series_instance_uid=generate_uid(prefix=None),
        series_number=_SERIES_NUMBERS_FROM + max(0, int(header.get("SeriesNumber") or 0)),
        series_description=_text(f"{algorithm.name}: {header.get('SeriesDescription') or 'segmentation'}"),
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=_text(algorithm.name),
        software_versions=version("medseg-diffusion"),
        device_serial_number=algorithm.version,
        content_label="SEGMENTATION",
        content_description=_text(", ".join(segment.name for segment in segments)),
        content_creator_name="medseg-diffusion",
        content_date=now.date(),
        content_time=now.time(),
        coding_schemes=[own] if any(segment.type is None for segment in segments) else None,
        specific_character_set="ISO_IR 192",  # UTF-8: the names of classes are free
        omit_empty_frames=bool(labels.any()),
    )
    size = -(-int(dataset.NumberOfFrames) * labels[0].size // 8)
    dataset.PixelData = dataset.PixelData[:size] + bytes(size % 2)  # highdicom pads with the digit 0, not with a null
    return dataset


def _state_distance(segmentation: Dataset, slices: Sequence[SourceSlice]) -> None:
    """States the distance between slices along their normal, since frames may be left out.

    highdicom takes that of their first voxels, which is longer if the gantry was tilted.
    """
    first, second = slices[0], slices[1]
    distance = abs(float((second.position - first.position) @ np.cross(*first.axes)))
    (measures,) = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    measures.SpacingBetweenSlices = f"{distance:.6f}".rstrip("0").rstrip(".")


def _description(number: int, segment: Segment, algorithm: Algorithm) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues
    from highdicom.seg import SegmentDescription as Description
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code as Coded

    private = sha256(segment.name.encode()).hexdigest()[:16].upper(), PRIVATE_SCHEME, _text(segment.name)
    description = Description(
        number,
        segment_label(segment.name),
        Coded(*segment.category),
        Coded(*(segment.type or private)),
        SegmentAlgorithmTypeValues.AUTOMATIC,
        AlgorithmIdentificationSequence(
            name=_text(algorithm.name),
            family=codes.DCM.ArtificialIntelligence,
            version=algorithm.version,
            source="medseg-diffusion",
            parameters=dict(algorithm.parameters),
        ),
        anatomic_regions=[Coded(*segment.region)] if segment.region is not None else None,
    )
    if segment.modifiers:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [
            CodedConcept.from_code(Coded(*modifier)) for modifier in segment.modifiers
        ]
    return description


def _as_single_images(slices: Sequence[SourceSlice]) -> list[Dataset]:
    """Headers of MR images of one frame each, in the order of the slices, with the attributes that highdicom reads.

    highdicom takes images of one frame, or one multi-frame file whose frames share one orientation. Here a volume may
    come from several such files, or from frames that store their orientation each. `_refer_to` puts the real images
    into the references.
    """
    from copy import deepcopy

    from pydicom.dataset import Dataset
    from pydicom.uid import MRImageStorage
    from pydicom.valuerep import format_number_as_ds

    first = Dataset()
    for element in slices[0].header:
        if element.keyword not in _FRAMES:
            first.add(deepcopy(element))
    first.decode()  # from the source's character set: the segmentation has another
    for keyword in _MAY_BE_EMPTY:
        if keyword not in first:
            setattr(first, keyword, None)
    if first.PatientSex not in ("M", "F", "O"):
        first.PatientSex = None
    gap = round(float(np.linalg.norm(slices[1].position - slices[0].position)), 6)
    images = [first, *(Dataset() for _ in slices[1:])]
    for number, (image, one) in enumerate(zip(images, slices, strict=True)):
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"):
            setattr(image, keyword, one.header.get(keyword))
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, _stand_in(number)
        image.ImagePositionPatient = [format_number_as_ds(float(mm)) for mm in one.position]
        image.ImageOrientationPatient = [format_number_as_ds(float(part)) for part in slices[0].axes.ravel()]
        image.PixelSpacing = [format_number_as_ds(mm) for mm in slices[0].spacing]
        image.SliceThickness = format_number_as_ds(slices[0].thickness or gap)
        image.SpacingBetweenSlices = format_number_as_ds(gap)
    return images


def _stand_in(number: int) -> str:
    """UID in the place of that of a slice's image."""
    return f"2.25.{number}"


def _refer_to(segmentation: Dataset, slices: Sequence[SourceSlice]) -> None:
    """Put the real images of the slices into a segmentation of `_as_single_images`: in its frames, and as a whole."""
    from pydicom.dataset import Dataset

    real = {_stand_in(number): one for number, one in enumerate(slices)}
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        (derivation,) = group.DerivationImageSequence
        (reference,) = derivation.SourceImageSequence
        if reference.ReferencedSOPInstanceUID in real:  # the frames of all classes of a slice share one item
            one = real[reference.ReferencedSOPInstanceUID]
            reference.ReferencedSOPClassUID = one.header.SOPClassUID
            reference.ReferencedSOPInstanceUID = one.header.SOPInstanceUID
            if one.frame is not None:
                reference.ReferencedFrameNumber = one.frame
    references = {}
    for one in slices:
        reference = Dataset()
        reference.ReferencedSOPClassUID = one.header.SOPClassUID
        reference.ReferencedSOPInstanceUID = one.header.SOPInstanceUID
        references[str(one.header.SOPInstanceUID)] = reference
    segmentation.SourceImageSequence = list(references.values())
    segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence = list(references.values())


def _text(value: str) -> str:
    """A text that DICOM can hold in one value of at most 64 characters."""
    return " ".join("".join(" " if c == "\\" or ord(c) < 32 else c for c in value).split())[:64].strip() or "unnamed"

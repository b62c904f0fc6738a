"""DICOM: the slices of a series, or the frames of one file, as one volume.

pydicom reads every header and every pixel. Each frame has its own position, orientation, voxel size and rescaling: a
reader that takes those of the first slice for all gives wrong numbers without a word.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medseg_diffusion.errors import InputError, listed, quiet_libraries, remark

from .archives import zip_entries
from .modality import BIDS_SUFFIX, DICOM_MODALITY, SeriesChoice, kind_of
from .paths import DICOM_SUFFIXES, dicom_files, is_dicomdir
from .volume import FileImage, FloatArray, Header

UNEVEN = 0.05  # largest variation of the step between slices, as a share of it: many files round the positions
_TURNED = 1e-3  # largest difference between the direction cosines of two slices
LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_TYPES: dict[tuple[int, int], npt.DTypeLike] = {
    (8, 0): np.uint8, (8, 1): np.int8, (16, 0): np.uint16, (16, 1): np.int16, (32, 0): np.uint32, (32, 1): np.int32,
}  # fmt: skip

Opener = Callable[[], AbstractContextManager[BinaryIO]]
_File = tuple[str, Opener, Dataset]  # name, opener and header
_LISTED = 8  # most series in a message
_LOCALIZER = re.compile(r"locali[sz]er|scout|topogram|surview|(?<![a-z])(loc|survey)(?![a-z])")


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: the header of its file, its number within the file, its place, and its rescaling."""

    name: str
    open: Opener
    header: Dataset
    index: int
    position: FloatArray
    axes: FloatArray
    spacing: tuple[float, float]
    slope: float
    intercept: float
    rescaled: str  # what the file states of slope and intercept


def open_image(path: Path, choice: SeriesChoice = SeriesChoice()) -> FileImage:
    """Read the headers of one series in a folder (its subfolders, if it has no slices itself), a zip, or a file.

    Of several series, the one is read that the user named, or else the only one of the kind that fits. Localizers are
    left out, with a warning.

    Args:
        path: the folder, zip, multi-frame file or DICOMDIR.
        choice: which series is read.

    Raises:
        InputError: none or several of the series fit; slices of different sizes, orientations or voxel sizes; missing,
            repeated or unevenly spaced slices; a single slice; colours; or a damaged file.
    """
    with quiet_libraries():
        frames = _volume_frames(path, choice)
        header = frames[0].header
        shape = int(header.Columns), int(header.Rows), len(frames)
        scaled = any((frame.slope, frame.intercept) != (1.0, 0.0) for frame in frames)
        dtype = np.dtype(np.float32) if scaled else np.result_type(*{_type(frame.header) for frame in frames})

    def load() -> npt.NDArray[np.generic]:
        voxels = np.empty(shape, dtype)
        stored: dict[str, npt.NDArray[np.generic]] = {}
        larger: list[str] = []
        for k, frame in enumerate(frames):
            if frame.name not in stored:
                with quiet_libraries():
                    stored = {frame.name: _pixels(path, frame, larger)}  # one file at a time
            pixels = stored[frame.name]
            pixels = pixels[frame.index] if pixels.ndim == 3 else pixels
            if pixels.shape != (shape[1], shape[0]):
                raise _unreadable(path, f"{frame.name}: {pixels.shape} pixels where the header has {shape[1::-1]}")
            with np.errstate(over="ignore"):  # what is beyond float32 is refused as infinite
                if scaled:
                    pixels = pixels.astype(np.float64) * frame.slope + frame.intercept
                voxels[:, :, k] = pixels.T.astype(dtype)
        if larger:
            text = (
                f"{path.name}: {len(larger)} of its files hold more pixels than their headers say, such as {larger[0]}"
            )
            remark(text)
        return voxels

    return FileImage(
        shape,
        dtype,
        _affine(frames),
        Header(modality=str(header.get("Modality", "")), series=str(header.get("SeriesInstanceUID", ""))),
        load,
    )


@dataclass(frozen=True, eq=False)
class SourceSlice:
    """Where a slice of `open_image` comes from.

    Attributes:
        header: the file's header, without pixels.
        frame: number of the frame in the file, from 1; None in a file of one image.
        position: (3,) centre of the first voxel, LPS mm.
        axes: (2, 3) unit vectors along which columns and rows are counted, LPS.
        spacing: distance in mm between rows, and between columns.
        thickness: in mm; None if the headers do not tell it.
    """

    header: Dataset
    frame: int | None
    position: FloatArray
    axes: FloatArray
    spacing: tuple[float, float]
    thickness: float | None


def source_slices(path: Path, series: str) -> tuple[list[SourceSlice], FloatArray]:
    """The source of every slice of `open_image`, in the order of the slices, and the affine that it gives them.

    Args:
        path: as `open_image`.
        series: UID of the series that was read (`Header.series`).

    Raises:
        InputError: as `open_image`.
    """
    slices, frames = [], _volume_frames(path, SeriesChoice(series or None))
    for frame in frames:
        thickness = value_of(groups_of(frame.header, frame.index), "PixelMeasuresSequence", "SliceThickness")
        number = frame.index + 1 if "NumberOfFrames" in frame.header else None
        slices.append(
            SourceSlice(
                frame.header, number, frame.position, frame.axes, frame.spacing, float(thickness) if thickness else None
            )
        )
    return slices, _affine(frames)


def _volume_frames(path: Path, choice: SeriesChoice) -> list[Frame]:
    """The frames of the chosen series of a folder, a zip or a file, in the order of the volume's slices."""
    path = path.parent if is_dicomdir(path) else path
    chosen = _chosen(path, _all_series(_images(path)), choice)
    return _volume(
        path, [frame for name, opener, header in chosen.files for frame in frames_of(path, name, opener, header)]
    )


def _type(header: Dataset) -> npt.DTypeLike:
    """Type of the stored values of a file."""
    if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
        return np.float32
    key = int(header.get("BitsAllocated", 16)), int(header.get("PixelRepresentation", 0))
    return _TYPES.get(key, np.float32)


def _affine(frames: Sequence[Frame]) -> FloatArray:
    """(4, 4) voxel -> RAS mm; the array's axes are column, row and slice."""
    first, last = frames[0], frames[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.spacing[1]
    affine[:3, 1] = first.axes[1] * first.spacing[0]
    affine[:3, 2] = (last.position - first.position) / (len(frames) - 1)
    affine[:3, 3] = first.position
    result: FloatArray = LPS_RAS @ affine
    return result


# ---- files -----------------------------------------------------------------------------------------------------------


def study_of(folder: Path) -> str:
    """UID of the study of the first DICOM file of a folder; empty if the file does not tell it."""
    for file in dicom_files(folder):
        try:
            header = _header(folder, file.name, lambda file=file: file.open("rb"))  # type: ignore[misc]
        except InputError:
            continue
        if header is not None:
            return str(_attribute(header, "StudyInstanceUID"))
    return ""


def holds_scan(folder: Path) -> bool:
    """Whether one of the series in a folder is neither a localizer nor a single slice, or cannot be read."""
    try:
        return not all(one.is_no_scan for one in _all_series(_images(folder)))
    except InputError:
        return True


def _images(path: Path) -> list[_File]:
    """Name, opener and header of every DICOM image, sorted by name; InputError if there is none.

    A segmentation is no image: a result that was exported with its series changes nothing.
    """
    files: list[_File] = []
    others: list[str] = []
    damaged: list[str] = []
    for name, opener in _files(path):
        header = _header(path, name, opener)
        if header is None:
            if name.lower().endswith(DICOM_SUFFIXES):
                damaged.append(name)
            elif not Path(name).suffix[1:].isalpha():  # readme.txt and the like lie beside many series
                others.append(name)
        elif _attribute(header, "Modality") == "SEG":
            continue
        elif "Rows" in header and "Columns" in header:
            files.append((name, opener, header))
        elif "Image Storage" in UID(str(header.SOPClassUID)).name:  # not a report or a presentation state
            damaged.append(name)
    if not files:
        raise InputError(path, "no DICOM image", "the slices of one series", "check the path")
    if damaged:  # at the end of a series, a slice that is left out would not show as a gap
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise _unreadable(path, f"{damaged[0]}{more}: no complete DICOM image")
    if others:
        remark(f"{path.name}: left out files that are no DICOM: {listed(others, 3)}")
    return files


def _files(path: Path) -> Iterator[tuple[str, Opener]]:
    if path.is_dir():
        for file in dicom_files(path):
            yield str(file.relative_to(path)), lambda file=file: file.open("rb")  # type: ignore[misc]
    elif zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise _unreadable(path, text_of(error)) from error
        for info in zip_entries(archive, path):
            if info.filename.rpartition("/")[2].upper() != "DICOMDIR":
                yield info.filename, lambda info=info: archive.open(info)  # type: ignore[misc]
    elif path.suffix.lower() == ".zip":
        raise _unreadable(path, "no zip, or a part of one")
    else:
        yield path.name, lambda: path.open("rb")


def _header(path: Path, name: str, opener: Opener) -> Dataset | None:
    """The header of a DICOM file, with or without its preamble; None for a file of another kind."""
    for force in (False, True):
        try:
            with opener() as file:
                header = pydicom.dcmread(file, stop_before_pixels=True, force=force)
                # Elements are parsed when they are read, so that a damaged one is found here.
                return header if "SOPClassUID" in header and header.SOPClassUID else None
        except InvalidDicomError:
            continue
        except Exception as error:  # pydicom raises nearly anything for damaged files
            if force:
                return None
            raise _unreadable(path, f"{name}: {text_of(error)}") from error
    return None


# ---- series ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Series:
    """The files of one series, each with name, opener and header."""

    files: Sequence[_File]

    @property
    def header(self) -> Dataset:
        return self.files[0][2]

    def text(self, *names: str) -> str:
        """The values of attributes, joined by spaces."""
        values = (" ".join(str(_attribute(self.header, name)).split()) for name in names)
        return " ".join(value for value in values if value)

    @property
    def slices(self) -> int:
        counts = (str(_attribute(header, "NumberOfFrames")) for _, _, header in self.files)
        return sum(int(count) if count.isdecimal() else 1 for count in counts)  # a damaged number is refused later

    @property
    def kind(self) -> str | None:
        agent = " contrast" if _attribute(self.header, "ContrastBolusAgent") else ""
        described = self.text("SeriesDescription") or self.text("ProtocolName")
        return kind_of(described + agent)

    @property
    def is_no_scan(self) -> bool:
        """Whether it is a localizer, or of a single slice."""
        described = _LOCALIZER.search(self.text("SeriesDescription", "ProtocolName").lower())
        localizer = described is not None or all(map(_is_localizer, self.files))
        return localizer or self.slices == 1

    def __str__(self) -> str:
        named = self.text("SeriesNumber", "Modality", "SeriesDescription") or "unnamed"
        return f"{named} ({self.slices} slice{'s' if self.slices > 1 else ''})"


def _all_series(files: Sequence[_File]) -> list[_Series]:
    """The series of files, sorted by number."""
    by_uid: dict[str, list[_File]] = defaultdict(list)
    for file in files:
        by_uid[str(file[2].get("SeriesInstanceUID", ""))].append(file)
    return sorted(
        map(_Series, by_uid.values()), key=lambda one: (len(one.text("SeriesNumber")), one.text("SeriesNumber"))
    )


def _chosen(path: Path, series: Sequence[_Series], choice: SeriesChoice) -> _Series:
    """The series that the user named, or the only one that fits; InputError if that is none or several."""
    if choice.named is not None:
        fitting = _named(series, choice.named)
    elif len(series) == 1:
        return series[0]
    else:
        scans = [one for one in series if not one.is_no_scan]
        modality = DICOM_MODALITY.get(choice.kind or "")
        fitting = [one for one in scans if modality in (None, one.text("Modality"))]
        if choice.kind in BIDS_SUFFIX and len(scans) > 1:
            fitting = [one for one in fitting if one.kind == choice.kind]
    if len(fitting) != 1:
        some = fitting if choice.named is not None and fitting else series
        which = f" that {choice.named!r} names" if some is fitting else ""
        more = f"; and {len(some) - _LISTED} more" if len(some) > _LISTED else ""
        expected = f"one {choice.kind or ''} series".replace("  ", " ")
        raise InputError(
            path,
            f"{len(some)} DICOM series{which}: {'; '.join(map(_with_uid(some), some[:_LISTED]))}{more}",
            expected if choice.named is None else f"one series that is named by {choice.named!r}",
            "choose one with --series of segment or anomaly (its number, the start of its UID, or a part of its "
            "description), or give a folder that holds it alone",
        )
    if choice.named is None:
        rest = "; ".join(str(one) for one in series if one is not fitting[0])
        remark(f"{path.name}: read the DICOM series {fitting[0]} and left out {rest}")
    return fitting[0]


def _named(series: Sequence[_Series], name: str) -> list[_Series]:
    """The series of this number; if there is none, those of this start of the UID or part of the description."""
    exact = [one for one in series if name in (one.text("SeriesNumber"), one.text("SeriesInstanceUID"))]
    if exact or name.isdecimal():  # a number is never a part of a description, which may be that of another series
        return exact
    return [
        one
        for one in series
        if ("." in name and one.text("SeriesInstanceUID").startswith(name))
        or name.lower() in one.text("SeriesDescription").lower()
    ]


def _with_uid(series: Sequence[_Series]) -> Callable[[_Series], str]:
    """How series are listed: with their UIDs if number and description do not tell them apart."""
    listed = [str(one) for one in series]
    alike = len(set(listed)) < len(listed)
    return lambda one: f"{one}{' ' + one.text('SeriesInstanceUID') if alike else ''}"


def _is_localizer(file: _File) -> bool:
    kinds = _attribute(file[2], "ImageType")
    return "LOCALIZER" in ([kinds] if isinstance(kinds, str) else list(kinds))


def _attribute(header: Dataset, name: str) -> Any:
    """The value of an attribute that a scan can do without; "" if it is missing or damaged."""
    try:
        return header.get(name) or ""
    except Exception:  # pydicom raises nearly anything for damaged values
        return ""


# ---- frames ----------------------------------------------------------------------------------------------------------


def frames_of(path: Path, name: str, opener: Opener, header: Dataset) -> Iterator[Frame]:
    """The frames of one file, each with the values of its own functional groups, else those of the whole file."""
    try:
        count = int(header.get("NumberOfFrames") or 1)
        each = cast(Sequence[Dataset], header.get("PerFrameFunctionalGroupsSequence") or [])
        for element in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation"):
            int(header.get(element, 0))  # raises here what a damaged value raises
        if count != (len(each) or 1):
            raise ValueError(f"{count} frames, but the places of {len(each) or 1}")
        for index in range(count):
            groups = groups_of(header, index)
            position = value_of(groups, "PlanePositionSequence", "ImagePositionPatient")
            axes = value_of(groups, "PlaneOrientationSequence", "ImageOrientationPatient")
            spacing = value_of(groups, "PixelMeasuresSequence", "PixelSpacing")
            if not position or not axes:
                raise InputError(
                    path, "slices without position or orientation", "both for every slice", "export the series again"
                )
            if not spacing:
                raise InputError(
                    path,
                    f"no PixelSpacing in {name}",
                    "the distance between pixels in every file",
                    "export the series again",
                )
            slope = value_of(groups, "PixelValueTransformationSequence", "RescaleSlope")
            intercept = value_of(groups, "PixelValueTransformationSequence", "RescaleIntercept")
            if slope is not None and float(slope) == 0:
                raise ValueError("a RescaleSlope of 0")
            yield Frame(
                name,
                opener,
                header,
                index,
                _numbers(position, 3),
                _numbers(axes, 6).reshape(2, 3),
                tuple(_numbers(spacing, 2).tolist()),
                1.0 if slope is None else float(slope),
                0.0 if intercept is None else float(intercept),
                " and ".join(
                    f"{'no ' if value is None else ''}{what}"
                    for value, what in ((slope, "slope"), (intercept, "intercept"))
                ),
            )
    except (InputError, MemoryError):
        raise
    except Exception as error:  # values of an impossible kind, such as a position of two numbers
        raise _unreadable(path, f"{name}: {text_of(error)}") from error


def groups_of(header: Dataset, index: int) -> list[Dataset]:
    """Where the attributes of a frame stand: in its own functional groups, in those of all frames, in the file."""
    shared = cast(Sequence[Dataset], header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    each = cast(Sequence[Dataset], header.get("PerFrameFunctionalGroupsSequence") or [])
    return [each[index], shared, header] if each else [shared, header]


def value_of(groups: Sequence[Dataset], sequence: str, name: str) -> Any:
    """An attribute from the first of the functional groups that has it, or from the file itself, the last of them."""
    *functional, whole = groups
    for group in functional:
        for item in cast(Sequence[Dataset], group.get(sequence) or []):
            if item.get(name) is not None:
                return item.get(name)
    return whole.get(name)


def _numbers(values: Any, count: int) -> FloatArray:
    array = np.array(values, dtype=np.float64)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise ValueError(f"expected {count} numbers, got {values}")
    return array


def _volume(path: Path, frames: list[Frame]) -> list[Frame]:
    """The frames as one volume (`_stacked`), without localizers, which are named in a warning."""
    localizers = _localizers(frames)
    rest = [frame for frame in frames if frame not in localizers]
    try:
        stacked = _stacked(path, rest)
    except InputError:
        if not localizers:
            raise
        return _stacked(path, frames)  # without localizers, too, they are no volume: the message is about all of them
    if localizers:
        names = list(dict.fromkeys(frame.name for frame in localizers))
        remark(f"{path.name}: left out localizers: {listed(names, 3)}")
    return stacked


def _localizers(frames: Sequence[Frame]) -> list[Frame]:
    """The frames whose image type says so, or else up to three that lie across many others."""
    said = [frame for frame in frames if _is_localizer((frame.name, frame.open, frame.header))]
    if said:
        return said if len(said) < len(frames) else []
    normals = np.array([np.cross(*frame.axes) for frame in frames])
    typical = np.median(normals, axis=0)
    across = [frame for frame, normal in zip(frames, normals, strict=True) if abs(float(normal @ typical)) < 0.7]
    return across if len(across) <= min(3, len(frames) // 4) else []


def _stacked(path: Path, frames: list[Frame]) -> list[Frame]:
    """The frames in the order of their position; InputError unless they are one evenly stacked volume."""
    require_same(path, frames)
    if len(frames) == 1:
        raise InputError(path, "a series of one slice", "a volume of several", "export the whole series")
    normal = np.cross(*frames[0].axes)
    along = [float(frame.position @ normal) for frame in frames]
    frames = [frames[i] for i in np.argsort(along, kind="stable")]
    steps = np.diff([frame.position for frame in frames], axis=0)
    gaps = steps @ normal
    typical = float(np.median(gaps))
    if gaps.min() < 1e-3:
        kinds = _differences(frames)
        raise InputError(
            path,
            f"several images at one position{kinds}",
            "one image at each position of a slice",
            "export one time point, echo or reconstruction alone",
        )
    if abs(gaps - typical).max() > UNEVEN * typical:
        raise InputError(
            path,
            f"slices {gaps.min():.3g} to {gaps.max():.3g} mm apart{_differences(frames)}",
            "slices at one distance",
            "add the missing slices, or resample the series elsewhere",
        )
    # A tilted gantry shifts every slice by the same distance against its neighbour: the axes are sheared.
    if np.linalg.norm(steps - steps.mean(0), axis=1).max() > UNEVEN * typical:
        raise InputError(
            path,
            "slices shifted unevenly against each other",
            "slices in one line",
            "export the series again, or resample it elsewhere",
        )
    return frames


def require_same(path: Path, frames: Sequence[Frame]) -> None:
    """InputError unless all frames have the same size, orientation and voxel size, and one number per pixel."""

    def differing(what: str, values: Sequence[str], remedy: str) -> None:
        kinds = list(dict.fromkeys(values))
        if len(kinds) > 1:
            counts = ", ".join(f"{kind} in {values.count(kind)}" for kind in kinds[:3])
            raise InputError(path, f"slices of different {what} ({counts})", f"one {what} in all slices", remedy)

    export = "export the series again"
    differing(
        "size",
        [f"{frame.header.Columns} x {frame.header.Rows}" for frame in frames],
        "take the slices of another size out (often a localizer)",
    )
    first = frames[0]
    turned = [float(np.abs(frame.axes - first.axes).max()) > _TURNED for frame in frames]
    differing("orientation", ["another" if other else "that of the first" for other in turned], export)
    differing("pixel spacing", [" x ".join(f"{mm:.6g}" for mm in frame.spacing) + " mm" for frame in frames], export)
    differing("rescaling", [frame.rescaled for frame in frames], export)
    lengths, angle = np.linalg.norm(first.axes, axis=1), float(first.axes[0] @ first.axes[1])
    if np.abs(lengths - 1).max() > 0.01 or abs(angle) > 0.01:
        raise InputError(path, "an orientation that is no pair of perpendicular unit vectors", "one", export)
    if min(first.spacing) <= 0:
        raise InputError(path, f"a pixel spacing of {first.spacing[0]:g} x {first.spacing[1]:g} mm", "above 0", export)
    kinds = {str(frame.header.get("PhotometricInterpretation") or "MONOCHROME2") for frame in frames}
    if int(first.header.get("SamplesPerPixel", 1)) != 1 or not kinds <= {"MONOCHROME1", "MONOCHROME2"}:
        found = f"colour images ({', '.join(sorted(kinds))})"
        raise InputError(path, found, "one intensity per pixel", "export the original series")
    if "MONOCHROME1" in kinds:  # a matter of display: rescaled values mean the same
        remark(f"{path.name}: its lowest values are shown white (MONOCHROME1); values are read as they are stored")


def _differences(frames: Sequence[Frame]) -> str:
    """What tells images at the same position apart, in brackets; empty if the headers do not say it."""
    named: Mapping[str, tuple[str, str]] = {
        "echo time": ("MREchoSequence", "EffectiveEchoTime"),
        "stack": ("FrameContentSequence", "StackID"),
        "time": ("FrameContentSequence", "TemporalPositionIndex"),
    }
    alone = {"echo time": "EchoTime", "time": "TemporalPositionIdentifier", "image type": "ImageType"}
    for what in (*named, "image type"):
        values = set()
        for frame in frames:
            each = cast(Sequence[Dataset], frame.header.get("PerFrameFunctionalGroupsSequence") or [])
            value = value_of([each[frame.index], Dataset()], *named[what]) if each and what in named else None
            values.add(str(frame.header.get(alone.get(what, ""), "") if value is None else value))
        if len(values) > 1:
            return f" ({what} {', '.join(sorted(values)[:3])})"
    return ""


# ---- pixels ----------------------------------------------------------------------------------------------------------


def _pixels(path: Path, frame: Frame, larger: list[str]) -> npt.NDArray[np.generic]:
    """The stored values of a file: (rows, columns), or (frames, rows, columns).

    A file with more bytes than its size asks for is added to ``larger``.
    """
    try:
        with frame.open() as file:
            dataset = with_syntax(pydicom.dcmread(file, force=True))
        array = np.asarray(dataset.pixel_array)
        compressed = dataset.file_meta.TransferSyntaxUID.is_compressed
        excess = 0 if compressed else len(dataset.get("PixelData", b"")) - array.nbytes
    except (RuntimeError, NotImplementedError) as error:
        syntax = UID(str(frame.header.file_meta.get("TransferSyntaxUID", "")))
        if not (syntax.is_transfer_syntax and syntax.is_compressed):
            raise _unreadable(path, f"{frame.name}: {text_of(error)}") from error
        if (stored := _decoded_by_itk(frame)) is not None:
            return stored
        raise InputError(
            path,
            f"pixels compressed as {syntax.name}, which cannot be decoded here",
            "a transfer syntax with a decoder",
            "pip install 'medseg-diffusion[dicom]', or export the series uncompressed",
        ) from error
    except Exception as error:  # pydicom raises nearly anything for damaged files
        raise _unreadable(path, f"{frame.name}: {text_of(error)}") from error
    if excess > 1:  # one byte fills an odd length
        larger.append(frame.name)
    return array


def _decoded_by_itk(frame: Frame) -> npt.NDArray[np.generic] | None:
    """The stored values (rows, columns) of a file of one frame; None if ITK has no decoder for it either.

    pydicom decodes most kinds of JPEG only with plug-ins, ITK without. ITK rescales, which is undone: the values are
    those of one frame, so that its slope is the right one.
    """
    import SimpleITK as sitk

    if int(frame.header.get("NumberOfFrames") or 1) != 1:
        return None
    with frame.open() as file, NamedTemporaryFile(suffix=".dcm") as copy:  # ITK reads named files, not members of a zip
        shutil.copyfileobj(file, copy)
        copy.flush()
        try:
            values = sitk.GetArrayFromImage(sitk.ReadImage(copy.name)).astype(np.float64)
        except RuntimeError:
            return None
    return np.asarray(np.rint((values.reshape(values.shape[-2:]) - frame.intercept) / frame.slope))


def with_syntax(dataset: Dataset) -> Dataset:
    """The dataset with a transfer syntax: a file without preamble and meta header has that of its encoding."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0] is not False
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def text_of(error: Exception) -> str:
    """The text of an error on one line, of at most 120 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:120].rstrip(".")


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(path, f"an unreadable DICOM series ({reason})", "complete files", "copy or export it again")

"""NRRD and MetaImage files through SimpleITK. Only this module converts between its LPS coordinates and our RAS."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from medseg_diffusion.errors import InputError, remark

from .volume import FileImage, FloatArray, Header, Volume, spacing_of

_LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse
# The spaces of NRRD that name the patient's axes, as far as ITK turns them into its own.
_PATIENT_SPACES = (
    *("right-anterior-superior", "left-anterior-superior", "left-posterior-superior"),
    *("ras", "las", "lps"),
)
_SOFTWARE = "Software"  # key of the description, which neither format has a field for


@dataclass(frozen=True)
class _TextHeader:
    """The header of a file before ITK reads it.

    Attributes:
        meta: whether it is a MetaImage; else it is an NRRD.
        fields: values by name, in lower case for NRRD, whose names have no case.
        end: the byte behind it.
        data: the file of the voxels; None if they follow the header.
        packed: whether the voxels are compressed; None if their size is not known beforehand.
    """

    meta: bool
    fields: dict[str, str]
    end: int
    data: Path | None
    packed: bool | None


def open_image(path: Path) -> FileImage:
    """Read the header of a .nrrd, .mha or .mhd file.

    Raises:
        InputError: a file of another format, or a damaged one.
    """
    header = _read_header(path)
    _require_plausible(path, header)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path) from error
    if (missing := _missing_orientation(header)) is not None:
        remark(f"{path.name}: its header has no orientation ({missing}), so left and right are a guess")
    axes = reader.GetDimension()
    components = reader.GetNumberOfComponents()
    shape = tuple(int(n) for n in reader.GetSize()) + ((components,) if components > 1 else ())

    def load() -> npt.NDArray[np.generic]:
        _require_whole(path, header, math.prod(shape) * dtype.itemsize)
        try:
            array = sitk.GetArrayFromImage(reader.Execute())  # (..., K, J, I[, components])
        except RuntimeError as error:
            raise _unreadable(path) from error
        order = [*range(axes - 1, -1, -1), *range(axes, array.ndim)]
        return np.asarray(array.transpose(order))

    affine = _affine(reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection(), axes)
    dtype = np.dtype(_dtype(reader.GetPixelID()))
    return FileImage(shape, dtype, affine, Header(), load)


def _missing_orientation(header: _TextHeader) -> str | None:
    """What a header has, or has not, in place of the patient's axes; None if it names them."""
    if header.meta:
        named = header.fields.keys() & {"TransformMatrix", "Rotation", "Orientation"}
        return None if named else "no TransformMatrix"
    space = header.fields.get("space")
    if space is None:
        return "no space"
    return None if space.lower() in _PATIENT_SPACES else f"space {space[:40]}"


def _require_plausible(path: Path, header: _TextHeader) -> None:
    """InputError for what ITK crashes on, prints to the terminal, or replaces without a word.

    That is: a number of axes that is none, a missing voxel size, for which it takes 1 mm, and voxels in other files
    than one beside the header.
    """
    fields = header.fields
    if header.meta:
        _require_plausible_numbers(path, fields)
        spacing, names = fields.get("ElementSpacing", fields.get("ElementSize", "")), "ElementSpacing"
    else:
        spacing, names = fields.get("space directions", fields.get("spacings", "")), "space directions"
    axes = len(fields.get("DimSize", fields.get("sizes", "")).split())
    if sum(_is_size(size) for size in re.findall(r"\([^)]*\)|\S+", spacing)) < min(3, axes):
        raise InputError(path, f"no voxel size in {names}", "one for each axis", "convert the scan again")
    if header.data is not None and not header.data.is_file():
        raise InputError(path, f"no file {header.data.name} beside it", "the voxels", "copy both files")


def _require_plausible_numbers(path: Path, fields: Mapping[str, str]) -> None:
    """InputError unless a MetaImage's lists of numbers have the length that its axes ask for."""
    text, sizes = fields.get("NDims", ""), fields.get("DimSize", "").split()
    axes = int(text) if text in ("1", "2", "3", "4", "5") else 0
    if len(sizes) != axes or not axes or not all(n.isdecimal() and int(n) > 0 for n in sizes):
        found = f"NDims = {text[:20] or 'none'} and DimSize = {' '.join(sizes)[:40] or 'none'}"
        raise InputError(path, found, "1 to 5 axes and the size of each", "convert the scan again")
    square, each = ("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Position", "Origin", "ElementSpacing")
    for name, count in ((name, axes**2 if name in square else axes) for name in (*square, *each) if name in fields):
        if len(numbers := fields[name].split()) != count or not all(map(_is_number, numbers)):
            raise InputError(path, f"{name} = {fields[name][:60]}", f"{count} numbers", "convert the scan again")
    packed = fields.get("CompressedDataSize", "0")
    if "ElementType" not in fields or "ElementDataFile" not in fields or not packed.isdecimal():
        raise _unreadable(path)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_size(text: str) -> bool:
    """Whether a word is a number above 0, or a vector of numbers, "(0.9,0,0)"."""
    if text.startswith("("):
        return all(map(_is_number, text.strip("()").split(",")))
    return _is_number(text) and float(text) > 0


def _require_whole(path: Path, header: _TextHeader, size: int) -> None:
    """InputError unless there are exactly ``size`` bytes of voxels, and the check sum of compressed ones is right.

    ITK stops reading before the sum, and takes voxels from the wrong place if there are more bytes than it expects.
    """
    if header.packed is None:  # text, or parts of the file are skipped
        return
    file, begin = header.data or path, 0 if header.data else header.end
    stored = file.stat().st_size - begin
    if header.packed:
        length = header.fields.get("CompressedDataSize", "none") if header.meta else str(stored)
        if not length.isdecimal() or int(length) > stored:
            raise _unreadable(path, f" (CompressedDataSize = {length[:20]}, but there are {stored} bytes)")
        with file.open("rb") as content:
            content.seek(begin)
            stored = _unpacked_size(path, content, int(length), size)
    if stored != size:
        count = f"more than {size}" if stored > size else str(stored)
        raise _unreadable(path, f" ({count} bytes of voxels, where its header asks for {size})")


def _unpacked_size(path: Path, content: BinaryIO, length: int, most: int) -> int:
    """The unpacked size of ``length`` bytes, whose check sum must be right; a little above ``most`` if it is larger."""
    decoder, count = zlib.decompressobj(32 + zlib.MAX_WBITS), 0  # zlib (MetaImage) or gzip (NRRD)
    try:
        while not decoder.eof and count <= most:
            chunk = decoder.unconsumed_tail
            if not chunk:
                chunk = content.read(min(length, 2**20))
                length -= len(chunk)
            unpacked = decoder.decompress(chunk, 2**20)
            count += len(unpacked)
            if not chunk and not unpacked:
                raise _unreadable(path)  # cut off
    except zlib.error as error:
        raise InputError(
            path, f"a damaged file ({' '.join(str(error).split())})", "the check sum of its content", "copy it again"
        ) from error
    return count


def _read_header(path: Path) -> _TextHeader:
    """The lines of a header.

    Raises:
        InputError: a header that gives one name two values, or names a file that does not lie beside it.
    """
    fields: dict[str, str] = {}
    meta = path.suffix.lower() != ".nrrd"
    with path.open("rb") as file:
        while line := file.readline(2**16):
            text = line.decode("latin-1").strip()
            if not text and not meta:
                break  # the end of an NRRD header
            if not meta and text.startswith("#"):
                continue
            name, sign, value = text.partition("=" if meta else ":")
            name, value = name.strip() if meta else name.strip().lower(), value.strip()
            if sign and fields.setdefault(name, value) != value:
                raise InputError(path, f"two values of {name}", "one", "repair the header or convert the scan again")
            if name == "ElementDataFile":
                break  # the end of a MetaImage header
        end = file.tell()
    data = fields.get("ElementDataFile" if meta else "data file", fields.get("datafile", "LOCAL"))
    place = Path(data)
    if data.upper() == "LIST" or "%" in data or place.is_absolute() or ".." in place.parts:
        raise InputError(path, f"voxels in {data[:80]}", "one file beside the header", "convert the scan to one file")
    if meta:
        packed = _is_true(fields.get("CompressedData", ""))
        skipped = fields.get("HeaderSize", "0")
        if skipped != "0" and (packed or data.upper() == "LOCAL"):
            raise InputError(path, f"HeaderSize = {skipped[:20]}", "0 for these voxels", "convert the scan again")
        plain = _is_true(fields.get("BinaryData", "")) and skipped == "0"
    else:
        encoding = fields.get("encoding", "").lower()
        skips = {"byte skip", "byteskip", "line skip", "lineskip"}
        plain = encoding in ("raw", "gzip", "gz") and not fields.keys() & skips
        packed = encoding != "raw"
    file_of_voxels = None if data.upper() == "LOCAL" else path.parent / place
    return _TextHeader(meta, fields, end, file_of_voxels, packed if plain else None)


def _is_true(value: str) -> bool:
    """As MetaIO reads it: by the first letter."""
    return value[:1].lower() in ("t", "1")


def write(path: Path, array: npt.NDArray[np.generic], like: Volume) -> None:
    """Write voxels (I, J, K), or (I, J, K, C) as an image of C components, with the geometry of `like`."""
    order = (2, 1, 0, 3)[: array.ndim]
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(order)), isVector=array.ndim == 4)
    affine = _LPS_RAS @ like.affine
    spacing = spacing_of(affine)
    image.SetSpacing(spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.array(spacing)).ravel().tolist())
    if like.header.description:
        image.SetMetaData(_SOFTWARE, like.header.description)
    sitk.WriteImage(image, str(path), useCompression=True)


def description(path: Path) -> str:
    """What a file says of itself (`Header.description`); empty if it says nothing or cannot be read."""
    try:
        header = _read_header(path)
    except (InputError, OSError):
        return ""
    name = _SOFTWARE if header.meta else _SOFTWARE.lower()
    return header.fields.get(name, "").removeprefix("=")  # an NRRD has "key:=value"


def _affine(
    spacing: tuple[float, ...], origin: tuple[float, ...], direction: tuple[float, ...], axes: int
) -> FloatArray:
    affine = np.eye(4)
    used = min(axes, 3)
    cosines = np.array(direction).reshape(axes, axes)[:used, :used]
    affine[:used, :used] = cosines * np.array(spacing[:used])
    affine[:used, 3] = origin[:used]
    result: FloatArray = _LPS_RAS @ affine
    return result


def _dtype(pixel_id: int) -> npt.DTypeLike:
    names = {
        sitk.sitkUInt8: np.uint8,
        sitk.sitkInt8: np.int8,
        sitk.sitkUInt16: np.uint16,
        sitk.sitkInt16: np.int16,
        sitk.sitkUInt32: np.uint32,
        sitk.sitkInt32: np.int32,
        sitk.sitkUInt64: np.uint64,
        sitk.sitkInt64: np.int64,
        sitk.sitkFloat32: np.float32,
        sitk.sitkFloat64: np.float64,
        sitk.sitkVectorUInt8: np.uint8,
        sitk.sitkVectorInt8: np.int8,
        sitk.sitkVectorUInt16: np.uint16,
        sitk.sitkVectorInt16: np.int16,
        sitk.sitkVectorUInt32: np.uint32,
        sitk.sitkVectorInt32: np.int32,
        sitk.sitkVectorUInt64: np.uint64,
        sitk.sitkVectorInt64: np.int64,
        sitk.sitkVectorFloat32: np.float32,
        sitk.sitkVectorFloat64: np.float64,
        sitk.sitkComplexFloat32: np.complex64,
        sitk.sitkComplexFloat64: np.complex128,
    }
    return names.get(pixel_id, np.float64)


def _unreadable(path: Path, reason: str = "") -> InputError:
    return InputError(
        path, f"an unreadable file{reason}", "a complete NRRD or MetaImage file", "copy or convert the scan again"
    )

"""NRRD and MetaImage files through SimpleITK. Only this module converts between its LPS coordinates and our RAS."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from medseg_diffusion.errors import InputError

from .volume import FileImage, FloatArray, Header, Volume, spacing_of

_LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse


def open_image(path: Path) -> FileImage:
    """Read the header of a .nrrd, .mha or .mhd file.

    Raises:
        InputError: a file of another format, or a damaged one.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path) from error
    axes = reader.GetDimension()
    components = reader.GetNumberOfComponents()
    shape = tuple(int(n) for n in reader.GetSize()) + ((components,) if components > 1 else ())

    def load() -> npt.NDArray[np.generic]:
        _require_sum(path)
        try:
            array = sitk.GetArrayFromImage(reader.Execute())  # (..., K, J, I[, components])
        except RuntimeError as error:
            raise _unreadable(path) from error
        order = [*range(axes - 1, -1, -1), *range(axes, array.ndim)]
        return np.asarray(array.transpose(order))

    affine = _affine(reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection(), axes)
    dtype = np.dtype(_dtype(reader.GetPixelID()))
    return FileImage(shape, dtype, affine, Header(), load)


def _require_sum(path: Path) -> None:
    """InputError unless the check sum of compressed voxels is right: ITK stops reading before it."""
    try:
        compressed, file, begin = _compressed(path)
        if not compressed:
            return
        decoder = zlib.decompressobj(32 + zlib.MAX_WBITS)  # zlib (MetaImage) or gzip (NRRD)
        with file.open("rb") as content:
            content.seek(begin)
            while not decoder.eof and (chunk := content.read(2**20)):
                decoder.decompress(chunk)
        if not decoder.eof:  # cut off
            raise _unreadable(path)
    except (zlib.error, OSError, ValueError) as error:
        raise InputError(
            path, f"a damaged file ({' '.join(str(error).split())})", "the check sum of its content", "copy it again"
        ) from error


def _compressed(path: Path) -> tuple[bool, Path, int]:
    """Whether the voxels have a check sum, the file that holds them, and the byte at which they begin."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while line := file.readline(2**16):
            text = line.decode("latin-1").strip()
            if not text:
                break  # the end of an NRRD header
            name, sign, value = text.partition("=") if path.suffix.lower() != ".nrrd" else text.partition(":")
            if sign:
                fields[name.strip().lower()] = value.strip()
            if name.strip().lower() == "elementdatafile":
                break  # the end of a MetaImage header
        begin = file.tell()
    nrrd = fields.get("encoding", "").lower() in ("gzip", "gz")
    meta = fields.get("compresseddata", "").lower() == "true"
    other = fields.get("elementdatafile", "LOCAL") if meta else fields.get("data file", fields.get("datafile", "LOCAL"))
    if other.upper() == "LOCAL":
        return nrrd or meta, path, begin
    detached = path.parent / other
    return (nrrd or meta) and detached.is_file(), detached, 0


def write(path: Path, array: npt.NDArray[np.generic], like: Volume) -> None:
    """Write voxels (I, J, K), or (I, J, K, C) as an image of C components, with the geometry of `like`."""
    order = (2, 1, 0, 3)[: array.ndim]
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(order)), isVector=array.ndim == 4)
    affine = _LPS_RAS @ like.affine
    spacing = spacing_of(affine)
    image.SetSpacing(spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.array(spacing)).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def affine_of(image: sitk.Image) -> FloatArray:
    """(4, 4) voxel -> RAS mm of a SimpleITK image of three or more axes."""
    return _affine(image.GetSpacing(), image.GetOrigin(), image.GetDirection(), image.GetDimension())


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
        sitk.sitkVectorUInt16: np.uint16,
        sitk.sitkVectorInt16: np.int16,
        sitk.sitkVectorFloat32: np.float32,
        sitk.sitkVectorFloat64: np.float64,
        sitk.sitkComplexFloat32: np.complex64,
        sitk.sitkComplexFloat64: np.complex128,
    }
    return names.get(pixel_id, np.float64)


def _unreadable(path: Path) -> InputError:
    return InputError(path, "an unreadable file", "a complete NRRD or MetaImage file", "copy or convert the scan again")

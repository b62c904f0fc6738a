"""NIfTI files: the geometry's codes and matrices are preserved; slope and intercept are applied to the voxels."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medseg_diffusion.errors import InputError, quiet_libraries, remark

from .label_table import CARET, LabelTable, from_extension, to_extension
from .volume import FileImage, FloatArray, Header, Volume, check_affine, grid_distance

# What nibabel, gzip and numpy raise for files that are truncated, damaged or of another format.
_BROKEN = (OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError)
_BROKEN_HEADER = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)
_MOST_PACKED = 1032  # bytes that one byte of gzip can hold
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI unit codes of metres and micrometres; all others count as millimetres


def open_image(path: Path) -> FileImage:
    """Read the header of a .nii or .nii.gz file.

    Raises:
        InputError: a file of another format, or a damaged one.
    """
    try:
        with _quiet():  # its remarks do not name the file; ours do
            image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise InputError(path, f"a {type(image).__name__}", "a NIfTI volume", "convert it to a NIfTI volume")
        _require_plausible(path, image.header)
        dtype = np.dtype(image.header.get_data_dtype())
        _require_size(path, _end_of_voxels(image))
        affine, header = _geometry(path, image)
    except (*_BROKEN, *_BROKEN_HEADER) as error:
        raise _unreadable(path, error) from error

    def load() -> npt.NDArray[np.generic]:
        try:
            end = _end_of_voxels(image)
            if not path.name.lower().endswith(".gz"):
                _say_tail(path, path.stat().st_size - end)
                return np.asanyarray(image.dataobj)
            content = _decompressed(path, end)
            with _quiet():
                whole = type(image).from_bytes(content)
            return np.asanyarray(whole.dataobj)
        except _BROKEN as error:
            raise _unreadable(path, error) from error

    return FileImage(tuple(image.shape), dtype, affine, header, load)


def opened_in_memory(image: nib.spatialimages.SpatialImage, name: Path) -> FileImage:
    """An image of nibabel as an opened file; ``name`` stands for its file in messages.

    Raises:
        InputError: no affine, or an unusable one.
    """
    if isinstance(image, nib.Nifti1Image):
        affine, header = _geometry(name, image)
    else:  # formats such as MGH state only the affine, in mm
        affine, header = np.asarray(image.affine, dtype=np.float64), Header()
        check_affine(affine, name)
    array = np.asanyarray(image.dataobj)
    return FileImage(tuple(array.shape), array.dtype, affine, header, lambda: array)


def stored_labels(path: Path) -> dict[int, str]:
    """Label value -> name, by the label table in the header of a file (`label_table`); empty without one."""
    header = _readable_header(path)
    extensions = [] if header is None else header.extensions
    tables = (from_extension(extension.content) for extension in extensions if extension.get_code() in (CARET, 0))
    return next((table for table in tables if table), {})


def description(path: Path) -> str:
    """What a file says of itself (`Header.description`); empty if it says nothing or cannot be read."""
    header = _readable_header(path)
    return "" if header is None else header["descrip"].item().decode("latin-1")


def _readable_header(path: Path) -> nib.Nifti1Header | None:
    """The header of a file; None if it cannot be read, of which reading the voxels says what is wrong."""
    try:
        with _quiet():
            image = nib.load(path)
    except (*_BROKEN, *_BROKEN_HEADER):
        return None
    return image.header if isinstance(image, nib.Nifti1Image) else None


def write(path: Path, array: npt.NDArray[np.generic], like: Volume, labels: LabelTable | None = None) -> None:
    """Write voxels (I, J, K) or (I, J, K, C) unscaled (slope 1, intercept 0) with the geometry of `like`.

    ``labels`` are the names and colours of a label map, for its header.
    """
    nib.save(image_of(array, like, labels), path)


def image_of(array: npt.NDArray[np.generic], like: Volume, labels: LabelTable | None = None) -> nib.Nifti1Image:
    """Voxels (I, J, K) or (I, J, K, C) as an image of nibabel with the geometry of `like` (and a label table)."""
    kind = nib.Nifti1Image if max(array.shape) < 2**15 else nib.Nifti2Image
    header = kind.header_class()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    units = like.header.xyzt_units
    to_file = np.diag([*[1 / _MILLIMETRES.get(units & 7, 1.0)] * 3, 1.0])
    qform = like.affine if like.header.qform is None else like.header.qform
    header.set_qform(to_file @ qform, code=like.header.qform_code)
    header.set_sform(to_file @ like.affine, code=like.header.sform_code)
    header["xyzt_units"] = units
    header["descrip"] = like.header.description.encode("ascii")[:79]
    header.set_slope_inter(1, 0)
    if labels:
        content = to_extension(labels, maps=array.shape[3] if array.ndim == 4 else 1)
        header.extensions.append(nib.nifti1.Nifti1Extension(CARET, content))
    return kind(array, header.get_best_affine(), header)


def _end_of_voxels(image: nib.Nifti1Image) -> int:
    """The byte behind the last voxel, by the header."""
    count = math.prod(int(n) for n in image.shape)
    return int(cast(nib.arrayproxy.ArrayProxy, image.dataobj).offset) + count * int(
        image.header.get_data_dtype().itemsize
    )


def _require_size(path: Path, end: int) -> None:
    """InputError for a header that asks for more voxels than the file can hold; said before memory is asked for."""
    size = path.stat().st_size
    if end > (size * _MOST_PACKED + 2**10 if path.name.lower().endswith(".gz") else size):
        raise _unreadable(path, EOFError(f"{size} bytes, where its header asks for {end}"))


def _say_tail(path: Path, count: int) -> None:
    if count > 0:
        text = f"{path.name}: {count} bytes follow the voxels, so its header may be damaged; check the scan's size"
        remark(text)


def _decompressed(path: Path, end: int) -> bytes:
    """The first ``end`` bytes in a gzip file, after the whole of it was read.

    nibabel stops reading before the check sum. Reading the file once more for it would take as long again.

    Raises:
        InputError: a wrong check sum, or more than twice as many bytes.
        EOFError: a file that is cut off.
    """
    try:
        with gzip.open(path) as file:
            content, more = file.read(end), 0
            while rest := file.read(2**20):
                more += len(rest)
                if more > max(end, 2**20):
                    raise InputError(
                        path,
                        f"more than {more} bytes behind the voxels",
                        f"about {end} bytes, as its header says",
                        "convert the scan again",
                    )
    except gzip.BadGzipFile as error:
        raise InputError(
            path, f"a damaged file ({' '.join(str(error).split())})", "the check sum of its content", "copy it again"
        ) from error
    _say_tail(path, more)
    return content


def _require_plausible(path: Path, header: nib.Nifti1Header) -> None:
    """InputError for voxels that would begin inside the header, or a voxel size that is no size."""
    stored = _stored(path, header)
    size, offset = int(header["sizeof_hdr"]) + 4, float(stored["vox_offset"])
    begin = int(offset) if np.isfinite(offset) else 0
    if header.is_single and begin < size:
        raise InputError(
            path, f"voxels from byte {begin} on, inside the header", f"byte {size} or later", "convert the scan again"
        )
    bits, expected = int(stored["bitpix"]), 8 * int(header.get_data_dtype().itemsize)
    if bits not in (0, expected):
        raise InputError(
            path,
            f"{bits} bits per voxel beside the type {header.get_data_dtype()}",
            f"{expected} bits",
            "repair the header or convert the scan again",
        )
    sizes = [float(mm) for mm in stored["pixdim"][1:4]]
    if not int(header["sform_code"]) and (min(sizes) <= 0 or not np.isfinite(sizes).all()):
        found = " x ".join(f"{mm:g}" for mm in sizes)
        raise InputError(path, f"a voxel size of {found} mm", "sizes above 0", "repair the header or convert it again")


def _stored(path: Path, header: nib.Nifti1Header) -> np.void:
    """The header as it is in the file: nibabel's copy has a vox_offset of 0, and 1 for a missing voxel size."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        content = file.read(int(header["sizeof_hdr"]))
    return cast(np.void, np.frombuffer(content, header.template_dtype.newbyteorder(header.endianness), 1)[0])


def _geometry(path: Path, image: nib.Nifti1Image) -> tuple[FloatArray, Header]:
    raw = image.header
    units = int(raw["xyzt_units"])
    scale = _MILLIMETRES.get(units & 7, 1.0)
    to_mm = np.diag([scale, scale, scale, 1.0])
    own = np.asarray(image.affine, dtype=np.float64)
    check_affine(own, path)
    affine: FloatArray = to_mm @ own
    qform_code, sform_code = int(raw["qform_code"]), int(raw["sform_code"])
    if not qform_code and not sform_code:
        remark(
            f"{path.name}: its header has no orientation (qform and sform codes are 0), so left and right are a guess"
        )
    qform = _qform(raw, to_mm) if qform_code and sform_code else None
    if qform_code and sform_code and qform is None:
        qform_code = 0  # an unusable quaternion is not written again
        remark(f"{path.name}: its qform is unusable; the sform is used alone")
    elif qform is not None:
        own, other = (np.linalg.norm(one[:3, :3], axis=0) for one in (affine, qform))
        sound = bool(np.isfinite(affine).all()) and abs(np.linalg.det(affine[:3, :3])) > 0  # else refused later
        if sound and np.abs(own - other).max() > 0.1 * own.min():
            sizes = [" x ".join(f"{mm:g}" for mm in one) for one in (own, other)]
            remark(f"{path.name}: its sform has voxels of {sizes[0]} mm, its qform of {sizes[1]} mm; the sform is used")
        if grid_distance(qform, affine, tuple(image.shape)) < 1e-3:
            qform = None
    return affine, Header(qform_code, sform_code, units, qform)


def _qform(raw: nib.Nifti1Header, to_mm: FloatArray) -> FloatArray | None:
    """The transform of the quaternion in mm; None if it is unusable. A norm above 1 by rounding counts as 1."""
    quaternion = np.array([raw[name] for name in ("quatern_b", "quatern_c", "quatern_d")], dtype=np.float64)
    norm = float(np.linalg.norm(quaternion))
    if not np.isfinite(quaternion).all() or norm > 1.01:
        return None
    copy = raw.copy()
    if norm > 1:
        for name, value in zip(("quatern_b", "quatern_c", "quatern_d"), quaternion / norm * (1 - 1e-7), strict=True):
            copy[name] = value
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # of what is refused here
            qform = np.asarray(copy.get_qform(), dtype=np.float64)
        check_affine(qform, None)
    except (ValueError, InputError, *_BROKEN_HEADER):
        return None
    return to_mm @ qform


@contextmanager
def _quiet() -> Iterator[None]:
    """Without nibabel's warnings and log lines."""
    with quiet_libraries():
        level = nib.imageglobals.logger.level
        nib.imageglobals.logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            nib.imageglobals.logger.setLevel(level)


def _unreadable(path: Path, error: Exception) -> InputError:
    # Some of nibabel's messages have several lines; ours have one.
    reason = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
    return InputError(path, f"an unreadable file ({reason})", "a complete NIfTI file", "copy or convert the scan again")

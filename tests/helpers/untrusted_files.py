"""Small sound scans of every format, and damaged copies of them. The same files in every run."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

SHAPE = (8, 7, 6)
"""Columns, rows and slices of every scan here."""
SPACING = (1.5, 0.75, 3.0)


def voxels(seed: int = 0) -> np.ndarray:
    """Noise of 0 to 899, int16, which hardly compresses."""
    return np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.int16)


Voxels = Literal["same", "one", "header", "any"]


@dataclass(frozen=True)
class Damaged:
    """A damaged file.

    Attributes:
        name: what was done to it, and its suffix.
        content: its bytes; those of the one changed slice for a DICOM series.
        checked: the change lies in bytes that a check sum protects, so that it is refused or changes nothing.
        voxels: which voxels a reading has that is not refused: the "same" as the sound file, all but "one" of them,
            those that the changed "header" asks for, or "any", because nothing in the file tells which are right.
    """

    name: str
    content: bytes
    checked: bool = False
    voxels: Voxels = "same"


# ---- sound files -----------------------------------------------------------------------------------------------------


def nifti() -> bytes:
    """A NIfTI-1 file with equal qform and sform, without compression."""
    image = nib.Nifti1Image(voxels(), np.diag([-SPACING[0], SPACING[1], SPACING[2], 1.0]))
    image.header.set_qform(image.affine, 1)
    image.header.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def nrrd(compressed: bool) -> bytes:
    """An NRRD file, raw or with gzip."""
    data = np.asfortranarray(voxels()).tobytes(order="F")
    lines = [
        "NRRD0004",
        "type: short",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {SHAPE[0]} {SHAPE[1]} {SHAPE[2]}",
        f"space directions: ({SPACING[0]},0,0) (0,{SPACING[1]},0) (0,0,{SPACING[2]})",
        "kinds: domain domain domain",
        "endian: little",
        f"encoding: {'gzip' if compressed else 'raw'}",
        "space origin: (10,-20,30)",
    ]
    return ("\n".join(lines) + "\n\n").encode() + (gzip.compress(data, mtime=0) if compressed else data)


def metaimage(compressed: bool) -> bytes:
    """A MetaImage of one file, raw or with zlib."""
    data = np.asfortranarray(voxels()).tobytes(order="F")
    stored = zlib.compress(data) if compressed else data
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        f"CompressedData = {compressed}",
        *([f"CompressedDataSize = {len(stored)}"] if compressed else []),
        "TransformMatrix = 1 0 0 0 1 0 0 0 1",
        "Offset = 10 -20 30",
        f"ElementSpacing = {SPACING[0]} {SPACING[1]} {SPACING[2]}",
        f"DimSize = {SHAPE[0]} {SHAPE[1]} {SHAPE[2]}",
        "ElementType = MET_SHORT",
        "ElementDataFile = LOCAL",
    ]
    return ("\n".join(lines) + "\n").encode() + stored


def dicom_slice(k: int) -> FileDataset:
    """Slice ``k`` of an MR series, explicit little endian."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.4.{k + 1}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    data.Modality = "MR"
    data.Rows, data.Columns, data.SamplesPerPixel = SHAPE[1], SHAPE[0], 1
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    data.PixelSpacing = [SPACING[1], SPACING[0]]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [10.0, -20.0, 30.0 + k * SPACING[2]]
    data.RescaleSlope, data.RescaleIntercept = "2", "-5"
    data.PixelData = voxels()[:, :, k].T.astype(np.uint16).tobytes()
    return data


def dicom_bytes(data: FileDataset) -> bytes:
    """A DICOM file as it is on the disk."""
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@cache
def _sound_slice(k: int) -> bytes:
    return dicom_bytes(dicom_slice(k))


def write_series(folder: Path, changed: bytes | None = None) -> Path:
    """The MR series as a folder, its third slice replaced by ``changed``."""
    folder.mkdir(parents=True)
    for k in range(SHAPE[2]):
        (folder / f"{k}.dcm").write_bytes(_sound_slice(k) if changed is None or k != 2 else changed)
    return folder


# ---- damage ----------------------------------------------------------------------------------------------------------


def cut_off(content: bytes, suffix: str, count: int, checked: bool = False) -> Iterator[Damaged]:
    """``count`` copies of which ever more is missing at the end."""
    for length in np.linspace(0, len(content) - 1, count).astype(int):
        yield Damaged(f"cut-{length}{suffix}", content[:length], checked)


def flipped(
    content: bytes,
    suffix: str,
    count: int,
    first: int = 0,
    checked: bool = False,
    voxels: Voxels = "one",
) -> Iterator[Damaged]:
    """``count`` copies with one flipped bit, at or after byte ``first``."""
    rng = np.random.default_rng(len(content))
    for place in np.sort(rng.choice(np.arange(first, len(content)), count, replace=False)):
        bit = int(rng.integers(8))
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        yield Damaged(f"bit-{place}.{bit}{suffix}", bytes(changed), checked, voxels)


def noise(size: int, seed: int = 3) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def damaged_nifti() -> Iterator[Damaged]:
    """Headers of impossible values, cut-off and flipped files, with and without compression."""
    sound = nifti()
    packed = gzip.compress(sound, mtime=0)
    yield from cut_off(sound, ".nii", 24)
    yield from cut_off(packed, ".nii.gz", 24, checked=True)
    for one in flipped(sound[:352], ".nii", 60, voxels="header"):
        yield Damaged(one.name, one.content + sound[352:], voxels="header")
    yield from flipped(sound, ".nii", 60, first=352)
    yield from flipped(packed, ".nii.gz", 40, checked=True)
    for name, content in (("noise", noise(2000)), ("zeros", bytes(2000)), ("text", b"a scan\n" * 60)):
        yield Damaged(f"{name}.nii", content)
        yield Damaged(f"{name}.nii.gz", content)
        yield Damaged(f"packed-{name}.nii.gz", gzip.compress(content, mtime=0))
    yield Damaged("tail.nii", sound + noise(500))
    yield Damaged("tail.nii.gz", packed + noise(500), checked=True)
    yield Damaged("zeros-behind.nii.gz", packed + bytes(500), checked=True)
    yield Damaged("twice.nii.gz", packed + packed)
    yield Damaged("packed-twice.nii.gz", gzip.compress(packed, mtime=0))
    yield Damaged("not-packed.nii.gz", sound)
    yield Damaged("packed.nii", packed)
    header = nib.Nifti1Header.template_dtype
    for field in header.names or ():
        kind, offset = header.fields[field][:2]
        base, count = kind.base, int(np.prod(kind.shape)) if kind.shape else 1
        for item in range(count):
            for value in _impossible(base):
                changed = bytearray(sound)
                place = offset + item * base.itemsize
                changed[place : place + base.itemsize] = np.array([value], base).tobytes()
                index = f"[{item}]" if kind.shape else ""
                yield Damaged(f"{field}{index}={value}.nii", bytes(changed), voxels="header")
    for sizes in ((3, 32767, 32767, 32767), (3, 8, 7, 5), (3, 8, 7, 7), (3, 7, 8, 6), (4, 8, 7, 3, 2), (2, 8, 7), (0,)):
        changed = bytearray(sound)
        changed[40 : 40 + 2 * len(sizes)] = struct.pack(f"<{len(sizes)}h", *sizes)
        name = f"dim={'x'.join(map(str, sizes))}.nii"
        yield Damaged(name, bytes(changed), voxels="header")
        yield Damaged(f"{name}.gz", gzip.compress(bytes(changed), mtime=0), voxels="header")
    swapped = bytearray(sound)
    swapped[0:4] = swapped[3::-1]
    yield Damaged("sizeof_hdr-swapped.nii", bytes(swapped))
    for code in (0, 1, 4, 8, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304):
        changed = bytearray(sound)
        changed[70:72] = struct.pack("<h", code)
        yield Damaged(f"datatype={code}.nii", bytes(changed), voxels="header")


def _impossible(kind: np.dtype[Any]) -> tuple[Any, ...]:
    if kind.kind == "f":
        return 0.0, -1.0, float("nan"), float("inf"), 1e38
    if kind.kind == "i":
        return 0, -1, int(np.iinfo(kind).max)
    return (255,) if kind.kind == "u" else ()


_TEXT_VALUES = ("", "0", "-1", "-1 -1 -1", "0 0 0", "99999999 99999999 99999999", "nan nan nan", "none", "1e400", "ä")


def damaged_text_header(sound: bytes, suffix: str, end: bytes, sign: str, checked: bool) -> Iterator[Damaged]:
    """A file whose header is lines of text: every line is left out, repeated, and given other values."""
    begin = sound.index(end) + len(end)
    head, data = sound[:begin], sound[begin:]
    lines = head.splitlines(keepends=True)
    for i, line in enumerate(lines):
        yield Damaged(f"without-{i}{suffix}", b"".join(lines[:i] + lines[i + 1 :]) + data)
        yield Damaged(f"twice-{i}{suffix}", b"".join(lines[: i + 1] + lines[i:]) + data)
        name, found, _ = line.decode().partition(sign)
        voxels: Voxels = "any" if "MSB" in name else "same"  # the order of bytes has no other trace
        for j, value in enumerate(_TEXT_VALUES if found else ()):
            changed = f"{name}{sign} {value}\n".encode()
            yield Damaged(
                f"value-{i}-{j}{suffix}", b"".join([*lines[:i], changed, *lines[i + 1 :]]) + data, False, voxels
            )
            yield Damaged(f"again-{i}-{j}{suffix}", b"".join([*lines[: i + 1], changed, *lines[i + 1 :]]) + data)
    yield Damaged(f"no-header{suffix}", data)
    yield Damaged(f"no-data{suffix}", head)
    yield Damaged(f"tail{suffix}", sound + noise(300))
    yield from cut_off(sound, suffix, 16)
    yield from flipped(sound, suffix, 30, first=begin, checked=checked)
    for one in flipped(head, suffix, 30):
        yield Damaged(f"head-{one.name}", one.content + data)


def damaged_nrrd() -> Iterator[Damaged]:
    for compressed in (False, True):
        suffix = ".gz.nrrd" if compressed else ".nrrd"
        sound = nrrd(compressed)
        yield from damaged_text_header(sound, suffix, b"\n\n", ":", compressed)
        begin = sound.index(b"\n\n")
        for i, more in enumerate(
            ("data file: /etc/hostname", "data file: ../scan.raw", "data file: LIST", "byte skip: -1",
             "byte skip: 100000", "line skip: 9", "byte skip: 4", "space units: \"m\" \"m\" \"m\"")
        ):  # fmt: skip
            yield Damaged(f"more-{i}{suffix}", sound[:begin] + b"\n" + more.encode() + sound[begin:])


def damaged_metaimage() -> Iterator[Damaged]:
    for compressed in (False, True):
        suffix = ".z.mha" if compressed else ".mha"
        sound = metaimage(compressed)
        yield from damaged_text_header(sound, suffix, b"LOCAL\n", "=", compressed)
        for i, (old, new) in enumerate(
            ((b"LOCAL", b"/etc/hostname"), (b"LOCAL", b"../scan.raw"), (b"LOCAL", b"LIST"), (b"LOCAL", b"%d.raw 1 9 1"),
             (b"MET_SHORT", b"MET_DOUBLE"), (b"MET_SHORT", b"MET_UCHAR"), (b"MET_SHORT", b"MET_OTHER"),
             (b"NDims = 3", b"NDims = 4"), (b"NDims = 3", b"NDims = 9999"), (b"1 0 0 0 1 0", b"nan 0 0 0 1 0"),
             (b"ElementType", b"HeaderSize = -1\nElementType"), (b"ElementType", b"HeaderSize = 99999\nElementType"),
             (b"ElementType", b"ElementNumberOfChannels = 3\nElementType"))
        ):  # fmt: skip
            yield Damaged(f"other-{i}{suffix}", sound.replace(old, new, 1))


_ELEMENTS: dict[str, tuple[Any, ...]] = {
    "SOPClassUID": ("", "1.2"),
    "SeriesInstanceUID": ("", "9.9"),
    "Modality": ("", "CT"),
    "Rows": (0, 1, 65535),
    "Columns": (0, 1, 65535),
    "SamplesPerPixel": (0, 3, 65535),
    "BitsAllocated": (0, 1, 8, 12, 32, 64, 65535),
    "BitsStored": (0, 1, 16, 65535),
    "HighBit": (0, 65535),
    "PixelRepresentation": (1, 2, 65535),
    "PhotometricInterpretation": ("", "RGB", "PALETTE COLOR", "NONSENSE"),
    "PixelSpacing": ([], [0, 0], [-1, -1], [1e30, 1e30], [1e-30, 1e-30], [0.75, 1.5, 2.0]),
    "ImageOrientationPatient": ([], [0] * 6, [1, 0, 0, 1, 0, 0], [1, 0, 0], [1e30] * 6, [0, 1, 0, 1, 0, 0]),
    "ImagePositionPatient": ([], [0, 0, 0], [1e30, 1e30, 1e30], [10, -20], [10, -20, 33]),
    "RescaleSlope": ("", "0", "1e300", "-1", "1e-300"),
    "RescaleIntercept": ("", "1e300", "-1e38"),
    "NumberOfFrames": ("0", "-1", "2", "99999999"),
    "PixelData": (b"", b"\0", b"\0" * 2 * 7 * 4, b"\0" * 2 * 7 * 9),
}


_SCALING = ("RescaleSlope", "RescaleIntercept", "BitsStored", "PixelData", "PixelRepresentation")
"""Elements that say what the stored values mean; nothing else in a slice does."""


def damaged_dicom() -> Iterator[Damaged]:
    """Copies of one slice: elements left out, or of other values and kinds, cut-off and flipped files."""
    sound = dicom_bytes(dicom_slice(2))
    with pydicom.config.disable_value_validation():
        for name, values in _ELEMENTS.items():
            if name in dicom_slice(2):
                yield Damaged(f"without-{name}", _edited(lambda data, name=name: data.__delattr__(name)))
            for value in values:
                text = repr(value)[:24].replace("/", "")
                content = _edited(lambda data, name=name, value=value: setattr(data, name, value))
                voxels: Voxels = "any" if name in _SCALING else "same"
                yield Damaged(f"{name}={text}", content, voxels=voxels)
    for vr in (b"IS", b"DS", b"UI", b"OB", b"SQ", b"UN", b"FD", b"??", b"\0\0"):
        for name, place in (("Rows", sound.index(b"\x28\0\x10\0US")), ("Spacing", sound.index(b"\x28\0\x30\0DS"))):
            yield Damaged(f"{name}-as-{vr!r}".replace("\\", ""), sound[: place + 4] + vr + sound[place + 6 :])
    for name, text in (("nan", b"nan "), ("inf", b"inf "), ("text", b"abc "), ("comma", b"0,75")):
        place = sound.index(b"\x28\0\x30\0DS") + 8
        yield Damaged(f"spacing-{name}", sound[:place] + text + sound[place + 4 :])
        place = sound.index(b"\x20\0\x32\0DS") + 8
        yield Damaged(f"position-{name}", sound[:place] + text + sound[place + 4 :])
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5",
                   "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.3",
                   ""):  # fmt: skip
        yield Damaged(f"syntax-{syntax}", _with_meta(sound, syntax))
    yield Damaged("without-preamble", sound[132:])
    yield Damaged("without-meta", sound[sound.index(b"\x08\0\x16\0UI") :])
    yield Damaged("tail", sound + noise(300))
    yield from cut_off(sound, "", 24)
    begin = sound.index(b"\xe0\x7f\x10\0OW") + 12
    yield from flipped(sound, "", 30, first=begin)
    for one in flipped(sound[:begin], "", 60):
        yield Damaged(one.name, one.content + sound[begin:], voxels="any")


def _edited(change: Callable[[FileDataset], None]) -> bytes:
    data = dicom_slice(2)
    change(data)
    return dicom_bytes(data)


def _with_meta(sound: bytes, syntax: str) -> bytes:
    """The file with another transfer syntax, its elements as they are."""
    place = sound.index(b"\x02\0\x10\0UI")
    length = struct.unpack("<H", sound[place + 6 : place + 8])[0]
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return sound[: place + 6] + struct.pack("<H", len(value)) + value + sound[place + 8 + length :]

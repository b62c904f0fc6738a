"""NIfTI files that nibabel reads without a word although they are damaged or say impossible things."""

from __future__ import annotations

import gzip
import struct
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_labels, read_volume, write_labels
from medseg_diffusion.volumes.preprocessing import Preprocessing

VOXEL_OFFSET, QUATERNION, PIXDIM = 108, 256, 76  # bytes in a NIfTI-1 header
QFORM_CODE = 252


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A scan of 9 x 8 x 7 voxels of 1 mm with equal qform and sform."""
    data = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)
    image = nib.Nifti1Image(data, np.diag([-1.0, 1.0, 1.0, 1.0]))
    image.header.set_qform(image.affine, 1)
    image.header.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "sound.nii")
    return tmp_path / "sound.nii"


def changed(file: Path, place: int, values: bytes, suffix: str = ".nii") -> Path:
    content = bytearray(file.read_bytes())
    content[place : place + len(values)] = values
    target = file.with_name(f"changed{suffix}")
    target.write_bytes(gzip.compress(bytes(content)) if suffix.endswith(".gz") else bytes(content))
    return target


@pytest.mark.parametrize("read", [read_volume, read_labels])
def test_a_flipped_bit_in_a_compressed_file_is_found_by_its_check_sum(sound: Path, read) -> None:
    stored = gzip.compress(sound.read_bytes(), compresslevel=0)  # the voxels lie in the file as they are
    good = sound.with_name("good.nii.gz")
    good.write_bytes(stored)
    expected = read(good)
    for place in (len(stored) // 2, len(stored) - 6):  # of a voxel, and of the sum itself
        content = bytearray(stored)
        content[place] ^= 1
        bad = sound.with_name("bad.nii.gz")
        bad.write_bytes(bytes(content))
        with pytest.raises(InputError, match=r"bad.nii.gz: found a damaged file \(CRC check failed"):
            read(bad)
    assert torch.equal(read(good).data, expected.data)


def test_a_file_that_unpacks_to_much_more_than_its_voxels_is_refused(sound: Path) -> None:
    """Before it fills the memory: only what the header asks for is kept."""
    bomb = sound.with_name("bomb.nii.gz")
    bomb.write_bytes(gzip.compress(sound.read_bytes() + bytes(2**26)))
    with pytest.raises(InputError, match=r"more than \d+ bytes behind the voxels; expected about 1360 bytes"):
        read_volume(bomb)
    bomb.write_bytes(gzip.compress(sound.read_bytes() + bytes(100)))
    with pytest.warns(UserWarning, match=r"bomb\.nii\.gz: 100 bytes follow the voxels"):
        assert torch.equal(read_volume(bomb).data, read_volume(sound).data)


def test_a_type_that_contradicts_the_bits_of_a_voxel_is_refused(sound: Path) -> None:
    with pytest.raises(InputError, match="16 bits per voxel beside the type float32; expected 32 bits"):
        read_volume(changed(sound, 70, struct.pack("<h", 16)))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 351.0, float("nan")])
def test_voxels_do_not_begin_inside_the_header(sound: Path, suffix: str, offset: float) -> None:
    bad = changed(sound, VOXEL_OFFSET, struct.pack("<f", offset), suffix)
    reasons = "inside the header; expected byte 352 or later|vox offset|NaN"  # nibabel itself finds all but 0
    with pytest.raises(InputError, match=reasons):
        read_volume(bad)


def test_a_quaternion_above_one_by_rounding_is_one(sound: Path) -> None:
    """Beside a sound sform it must not matter: the affine is that of the sform."""
    bad = changed(sound, QUATERNION, struct.pack("<fff", 0.0, 1.0 + 3e-4, 0.0))
    with warnings.catch_warnings(action="error"):
        volume = read_volume(bad)
    assert torch.equal(volume.data, read_volume(sound).data) and np.array_equal(
        volume.affine, read_volume(sound).affine
    )
    write_labels((volume.data[0] > 100).int(), volume, bad.with_name("mask.nii.gz"))


@pytest.mark.parametrize("values", [(float("nan"), 0.0, 0.0), (0.0, 3.0, 0.0)])
def test_an_unusable_quaternion_is_said_and_not_written_again(sound: Path, values, tmp_path: Path) -> None:
    bad = changed(sound, QUATERNION, struct.pack("<fff", *values))
    with pytest.warns(UserWarning, match="changed.nii: its qform is unusable; the sform is used alone"):
        volume = read_volume(bad)
    write_labels((volume.data[0] > 100).int(), volume, tmp_path / "mask.nii.gz")
    written = nib.load(tmp_path / "mask.nii.gz")
    assert int(written.header["qform_code"]) == 0 and np.allclose(written.affine, volume.affine)


def test_no_voxel_size_is_refused(sound: Path) -> None:
    content = bytearray(sound.read_bytes())
    content[PIXDIM + 4 : PIXDIM + 16] = struct.pack("<fff", 0.0, 0.0, 0.0)
    content[QFORM_CODE + 2 : QFORM_CODE + 4] = struct.pack("<h", 0)  # no sform
    bad = sound.with_name("bad.nii")
    bad.write_bytes(bytes(content))
    with pytest.raises(InputError, match="a voxel size of 0 x 0 x 0 mm; expected sizes above 0"):
        read_volume(bad)


def test_a_header_without_orientation_is_said_once(sound: Path, tmp_path: Path) -> None:
    bad = changed(sound, QFORM_CODE, struct.pack("<hh", 0, 0))
    with pytest.warns(UserWarning, match=r"changed.nii: its header has no orientation .* left and right are a guess"):
        volume = read_volume(bad)
    with warnings.catch_warnings(action="error"):
        write_labels((volume.data[0] > 100).int(), volume, tmp_path / "mask.nii.gz")


def test_two_transforms_of_different_voxel_sizes_are_said(sound: Path) -> None:
    bad = changed(sound, PIXDIM + 4, struct.pack("<fff", 0.5, 0.5, 0.5))
    with pytest.warns(UserWarning, match="sform has voxels of 1 x 1 x 1 mm, its qform of 0.5 x 0.5 x 0.5 mm"):
        read_volume(bad)


@pytest.mark.parametrize(("size", "outcome"), [(1000.0, "refused"), (10.0, "said"), (0.01, "said"), (3.0, "usual")])
def test_impossible_voxel_sizes_are_refused_and_unusual_ones_said(size: float, outcome: str, tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((9, 8, 7)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([size, size, size, 1.0])), tmp_path / "scan.nii.gz")
    if outcome == "refused":
        with pytest.raises(InputError, match=r"found voxels of 1000 x 1000 x 1000 mm; .* check the unit"):
            read_volume(tmp_path / "scan.nii.gz")
    elif outcome == "said":
        with pytest.warns(UserWarning, match=rf"scan.nii.gz: voxels of {size:g} x .* mm, which is unusual for a scan"):
            read_volume(tmp_path / "scan.nii.gz")
    else:
        with warnings.catch_warnings(action="error"):
            read_volume(tmp_path / "scan.nii.gz")


@pytest.mark.filterwarnings("ignore:.*unusual for a scan")
def test_a_scan_is_not_enlarged_beyond_reason(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([10.0, 10.0, 10.0, 1.0])), tmp_path / "scan.nii.gz")
    with pytest.raises(InputError, match="voxels of 10 x 10 x 10 mm, each of which would become 1000 of the model's"):
        Preprocessing(spacing_mm=(1.0, 1.0, 1.0)).apply(read_volume(tmp_path / "scan.nii.gz"))

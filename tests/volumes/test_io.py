"""Files in and out: geometry survives, bad input is one clear line, nothing half-written is left."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medseg_diffusion.errors import InputError, MedsegError, UsageError
from medseg_diffusion.volumes.io import format_of, read_labels, read_volume, write_labels, write_map
from medseg_diffusion.volumes.paths import VOLUME_SUFFIXES
from medseg_diffusion.volumes.volume import Header, Volume
from tests.helpers.volumes import SHAPE, SHEARED, oblique, save, values

# ---- round trips ----


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
@pytest.mark.parametrize("channels", [1, 3])
def test_maps_return_in_every_format(tmp_path, suffix, channels) -> None:
    data = torch.from_numpy(values((channels, *SHAPE)))
    write_map(data, Volume(data, oblique()), tmp_path / f"map{suffix}")
    back = read_volume(tmp_path / f"map{suffix}", channels=channels)
    assert torch.equal(back.data, data)
    assert back.data.dtype == torch.float32
    np.testing.assert_allclose(back.affine, oblique(), atol=1e-5)
    assert back.source == tmp_path / f"map{suffix}"
    assert read_volume(tmp_path / f"map{suffix}", channels=None).data.shape == (channels, *SHAPE)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_labels_return_in_every_format(tmp_path, suffix) -> None:
    for top, stored in ((255, np.uint8), (256, np.uint16), (65535, np.uint16)):
        labels = torch.randint(0, top, SHAPE)
        labels[0, 0, 0] = top
        write_labels(labels, Volume(labels[None], oblique()), tmp_path / f"seg{suffix}")
        back = read_labels(tmp_path / f"seg{suffix}")
        assert back.data.dtype == torch.int32
        assert torch.equal(back.data[0], labels.int())
        assert format_of(suffix).open_image(tmp_path / f"seg{suffix}").dtype == stored


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_sheared_axes_survive(tmp_path, suffix) -> None:
    scan = Volume(torch.from_numpy(values()[None]), SHEARED)
    write_map(scan.data, scan, tmp_path / f"a{suffix}")
    np.testing.assert_allclose(read_volume(tmp_path / f"a{suffix}").affine, SHEARED, atol=1e-5)


def test_channels_and_singleton_axes(tmp_path) -> None:
    four = values((*SHAPE, 3))
    data = read_volume(save(tmp_path / "4d.nii", four), channels=3).data
    np.testing.assert_array_equal(data.numpy(), np.moveaxis(four, -1, 0))
    np.testing.assert_array_equal(
        read_volume(save(tmp_path / "5d.nii", four[:, :, :, None]), channels=3).data, data.numpy()
    )
    assert read_volume(save(tmp_path / "one.nii", values((*SHAPE, 1)))).data.shape == (1, *SHAPE)
    assert read_volume(save(tmp_path / "slice.nii", values((4, 5, 1)))).data.shape == (1, 4, 5, 1)


# ---- bad input ----


def truncated(path: Path) -> Path:
    save(path, values((30, 30, 30)))
    path.write_bytes(path.read_bytes()[:-4000])
    return path


def filled(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated_itk(path: Path, compressed: bool) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(values((30, 30, 30))), str(path), compressed)
    path.write_bytes(path.read_bytes()[:-4000])
    return path


def with_voxel(path: Path, value: float, dtype: type = np.float32) -> Path:
    array = values(dtype=dtype)
    array[1, 2, 3] = value
    return save(path, array)


def with_sform(path: Path, row: list[float], rows: int = 1) -> Path:
    save(path)
    content = bytearray(path.read_bytes())
    content[280 : 280 + 16 * rows] = struct.pack("<4f", *row) * rows
    path.write_bytes(content)
    return path


def without_voxels(path: Path) -> Path:
    save(path)
    content = bytearray(path.read_bytes())
    content[44:46] = struct.pack("<h", 0)
    path.write_bytes(content)
    return path


def coloured(path: Path) -> Path:
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, oblique()), path)
    return path


BAD = {
    "missing": (lambda d: d / "no.nii.gz", ["no such file", "check the path"]),
    "folder": (lambda d: d, ["found a folder"]),
    "suffix": (lambda d: filled(d / "a.txt", b"x"), ["'.txt'", ".nii.gz", "convert or rename"]),
    "garbage": (lambda d: filled(d / "a.nii", b"garbage" * 99), ["unreadable", "complete NIfTI"]),
    "empty": (lambda d: filled(d / "a.nii", b""), ["unreadable"]),
    "garbage gz": (lambda d: filled(d / "a.nii.gz", b"garbage" * 99), ["unreadable"]),
    "gzipped garbage": (lambda d: filled(d / "a.nii.gz", gzip.compress(b"x" * 999)), ["unreadable"]),
    "truncated": (lambda d: truncated(d / "a.nii"), ["unreadable", "copy or convert"]),
    "truncated gz": (lambda d: truncated(d / "a.nii.gz"), ["unreadable", "copy or convert"]),
    "truncated header": (lambda d: filled(d / "a.nii", save(d / "b.nii").read_bytes()[:300]), ["unreadable"]),
    "garbage nrrd": (lambda d: filled(d / "a.nrrd", b"garbage" * 99), ["unreadable", "NRRD"]),
    "truncated nrrd": (lambda d: truncated_itk(d / "a.nrrd", True), ["unreadable"]),
    "truncated raw nrrd": (lambda d: truncated_itk(d / "a.nrrd", False), ["unreadable"]),
    "truncated mha": (lambda d: truncated_itk(d / "a.mha", True), ["unreadable"]),
    "truncated raw mha": (lambda d: truncated_itk(d / "a.mha", False), ["unreadable"]),
    "mhd without data": (lambda d: filled(d / "a.mhd", b"ObjectType = Image\nNDims = 3\n"), ["DimSize = none"]),
    "2D": (lambda d: save(d / "a.nii", values((4, 5))), ["2D", "4 x 5", "3D volume", "stack"]),
    "4D": (lambda d: save(d / "a.nii", values((4, 5, 6, 3))), ["4D", "4 x 5 x 6 x 3", "3D volume", "extract"]),
    "5D": (lambda d: save(d / "a.nii", values((4, 5, 6, 3, 2))), ["5 axes", "extract"]),
    "NaN": (lambda d: with_voxel(d / "a.nii", np.nan), ["1 NaN or infinite", "0.0083 of all", "replace them"]),
    "Inf": (lambda d: with_voxel(d / "a.nii", -np.inf), ["1 NaN or infinite", "finite"]),
    "huge": (lambda d: with_voxel(d / "a.nii", -1e39, np.float64), ["3.4e38", "rescale"]),
    "constant": (lambda d: save(d / "a.nii", np.full(SHAPE, 7.5)), ["constant value 7.5", "contrast"]),
    "vanishing": (lambda d: save(d / "a.nii", values(dtype=np.float64) * 1e-60), ["constant value 0"]),
    "singular": (lambda d: with_sform(d / "a.nii", [0, 0, 0, 0]), ["singular", "invertible", "repair"]),
    "NaN affine": (lambda d: with_sform(d / "a.nii", [np.nan, 0, 0, 0]), ["NaN", "invertible"]),
    "zero affine": (lambda d: with_sform(d / "a.nii", [0, 0, 0, 0], rows=3), ["voxel size of 0 x 0 x 0 mm"]),
    "no voxels": (lambda d: without_voxels(d / "a.nii"), ["empty", "4 x 0 x 6"]),
    "RGB": (lambda d: coloured(d / "a.nii"), ["RGB", "greyscale"]),
    "complex": (lambda d: save(d / "a.nii", values().astype(np.complex64)), ["complex64", "one number"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path, kind) -> None:
    maker, parts = BAD[kind]
    path = maker(tmp_path)
    for read in (read_volume,) if kind in ("constant", "vanishing", "huge") else (read_volume, read_labels):
        with pytest.raises(InputError) as caught:
            read(path)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{path}: found ")
        for part in [*parts, "expected"]:
            assert part in message


def test_the_wrong_number_of_channels(tmp_path) -> None:
    with pytest.raises(InputError, match=r"a 3D image.*expected 4 channels.*merge the 4 images"):
        read_volume(save(tmp_path / "a.nii"), channels=4)
    with pytest.raises(InputError, match=r"4 x 5 x 6 x 3.*expected 4 channels"):
        read_volume(save(tmp_path / "b.nii", values((*SHAPE, 3))), channels=4)
    data = values((*SHAPE, 2))
    data[..., 1] = 3
    with pytest.raises(InputError, match="constant value 3 in channel 1"):
        read_volume(save(tmp_path / "c.nii", data), channels=2)


@pytest.mark.parametrize("value", [0.5, -1, 65536, np.nan])
def test_labels_must_be_whole_numbers_in_range(tmp_path, value) -> None:
    path = save(tmp_path / "a.nii", np.full(SHAPE, value, dtype=np.float32))
    with pytest.raises(InputError) as caught:
        read_labels(path)
    assert str(path) in str(caught.value)


def test_labels_may_be_constant_floating_or_scaled(tmp_path) -> None:
    assert (read_labels(save(tmp_path / "a.nii", np.zeros(SHAPE))).data == 0).all()
    whole = values(dtype=np.int16)
    image = nib.Nifti1Image(whole * 3, oblique())
    image.header.set_slope_inter(1 / 3, 0)  # float32 holds no third: the labels come out as 0.99999999
    nib.save(image, tmp_path / "b.nii")
    np.testing.assert_array_equal(read_labels(tmp_path / "b.nii").data[0].numpy(), whole)


# ---- writing fails ----


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_a_failed_write_leaves_nothing_and_spares_what_was_there(tmp_path, monkeypatch, suffix) -> None:
    path = filled(tmp_path / f"seg{suffix}", b"old")
    scan = Volume(torch.zeros(1, *SHAPE), oblique())

    def broken(target: Path, *_: object) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(format_of(suffix), "write", broken)
    with pytest.raises(OSError, match="disk full"):
        write_labels(torch.zeros(SHAPE, dtype=torch.uint8), scan, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_geometry_that_a_format_cannot_hold_is_refused(tmp_path) -> None:
    scan = Volume(torch.zeros(1, *SHAPE), SHEARED, header=Header(qform_code=1, sform_code=0))
    with pytest.raises(MedsegError, match="cannot keep the scan's affine"):
        write_labels(torch.zeros(SHAPE, dtype=torch.uint8), scan, tmp_path / "a.nii")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_write_nothing(tmp_path) -> None:
    scan = Volume(torch.zeros(1, *SHAPE), oblique())
    with pytest.raises(ValueError, match="must be integers"):
        write_labels(torch.zeros(SHAPE), scan, tmp_path / "a.nii")
    for value in (-1, 65536):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.65535"):
            write_labels(torch.full(SHAPE, value), scan, tmp_path / "a.nii")
    with pytest.raises(ValueError, match="not on the grid"):
        write_map(torch.zeros(2, 4, 5, 7), scan, tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"'\.gif'"):
        write_map(torch.zeros(SHAPE), scan, tmp_path / "a.gif")
    with pytest.raises(UsageError, match="no such folder"):
        write_map(torch.zeros(SHAPE), scan, tmp_path / "missing" / "a.nii")
    assert not list(tmp_path.iterdir())


# ---- real scans ----


@pytest.mark.data
def test_real_scans_are_read_and_their_geometry_is_written_back(data_folder: Path, tmp_path) -> None:
    scans = sorted((data_folder / "Task04_Hippocampus/imagesTr").glob("[!.]*.nii.gz"))[:5]
    scans += (
        sorted((data_folder / "whole_head").rglob("[!.]*.nii.gz"))[:3]
        + sorted((data_folder / "ms_lesions").rglob("*.nii.gz"))[:4]
    )
    assert len(scans) > 5
    for path in scans:
        scan = read_volume(path)
        write_labels(torch.zeros(scan.shape, dtype=torch.uint8), scan, tmp_path / "out.nii.gz")
        before, after = nib.load(path), nib.load(tmp_path / "out.nii.gz")
        np.testing.assert_allclose(after.affine, before.affine, atol=1e-4, err_msg=str(path))
        for field in ("qform_code", "sform_code", "xyzt_units"):
            assert after.header[field] == before.header[field], path

"""NIfTI files keep geometry, codes, units and values."""

from __future__ import annotations

import struct

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion.volumes.io import read_volume, write_labels, write_map
from medseg_diffusion.volumes.volume import Volume
from tests.helpers.volumes import SHAPE, oblique, save, values


@pytest.mark.filterwarnings("ignore:.*header has no orientation")
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (2, 4), (0, 0)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_keeps_geometry_codes_and_units(tmp_path, suffix, codes) -> None:
    scan = read_volume(save(tmp_path / f"in{suffix}", codes=codes, units=10))
    labels = torch.randint(0, 4, SHAPE)
    write_labels(labels, scan, tmp_path / f"out{suffix}")
    before, after = (nib.load(tmp_path / f"{name}{suffix}") for name in ("in", "out"))
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)
    for field in ("qform_code", "sform_code", "xyzt_units"):
        assert after.header[field] == before.header[field]
    np.testing.assert_allclose(after.header["pixdim"][1:4], before.header["pixdim"][1:4], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(after.dataobj), labels.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"in{suffix}", f"out{suffix}"]


def test_nifti_keeps_a_qform_that_differs(tmp_path) -> None:
    scan = read_volume(save(tmp_path / "in.nii", qform=oblique((0.3, 0.2, 0.1)), codes=(1, 2)))
    assert scan.header.qform is not None
    write_labels(torch.zeros(SHAPE, dtype=torch.uint8), scan, tmp_path / "out.nii")
    before, after = (nib.load(tmp_path / name) for name in ("in.nii", "out.nii"))
    np.testing.assert_allclose(after.get_qform(), before.get_qform(), atol=1e-4)
    np.testing.assert_allclose(after.get_sform(), before.get_sform(), atol=1e-6)


@pytest.mark.parametrize(("units", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001)])
def test_units_become_millimetres_and_return(tmp_path, units, factor) -> None:
    stored = oblique()
    stored[:3] /= factor
    scan = read_volume(save(tmp_path / "in.nii", units=units, codes=(1, 2), affine=stored))
    np.testing.assert_allclose(scan.affine, oblique(), rtol=1e-4)
    write_map(scan.data, scan, tmp_path / "out.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, stored, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("turn", [(np.pi, 0, 0), (np.pi - 1e-4, 0, 0), (np.pi, 1e-4, 2e-4), (0, np.pi, 0.1)])
def test_half_turns_survive_a_quaternion(tmp_path, turn) -> None:
    scan = read_volume(save(tmp_path / "in.nii", affine=oblique(turn), codes=(1, 0)))
    write_map(scan.data, scan, tmp_path / "out.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, scan.affine, atol=1e-2)


def test_labels_are_stored_unscaled(tmp_path) -> None:
    write_labels(torch.ones(SHAPE, dtype=torch.bool), Volume(torch.zeros(1, *SHAPE), oblique()), tmp_path / "a.nii")
    assert struct.unpack("<2f", (tmp_path / "a.nii").read_bytes()[112:120]) == (1.0, 0.0)


def test_slope_and_intercept_are_applied(tmp_path) -> None:
    image = nib.Nifti1Image(values(dtype=np.int16), oblique())
    image.header.set_slope_inter(0.5, -1000)
    nib.save(image, tmp_path / "a.nii")
    raw = values(dtype=np.int16)
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").data[0].numpy(), raw * 0.5 - 1000)

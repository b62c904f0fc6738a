"""ITK's formats place voxels where ITK does."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medseg_diffusion.errors import remarks
from medseg_diffusion.volumes.io import read_volume, write_labels
from tests.helpers.volumes import SHAPE, save, values


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_itk_formats_place_voxels_where_simpleitk_does(tmp_path, suffix) -> None:
    image = sitk.GetImageFromArray(values().transpose(2, 1, 0))
    image.SetSpacing((0.7, 1.3, 2.9))
    image.SetOrigin((11.0, -22.0, 33.5))
    image.SetDirection(nib.eulerangles.euler2mat(0.3, 0.5, -2.0).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    scan = read_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(scan.data[0].numpy(), values())
    for index in ((0, 0, 0), (3, 1, 5), (2, 4, 0)):
        left_posterior_superior = image.TransformIndexToPhysicalPoint(index)
        ours = nib.affines.apply_affine(scan.affine, index)
        np.testing.assert_allclose(ours * [-1, -1, 1], left_posterior_superior, atol=1e-6)
    write_labels(torch.ones(SHAPE, dtype=torch.int16), scan, tmp_path / f"b{suffix}")
    again = sitk.ReadImage(str(tmp_path / f"b{suffix}"))
    np.testing.assert_allclose(again.GetDirection(), image.GetDirection(), atol=1e-9)
    np.testing.assert_allclose(again.GetOrigin(), image.GetOrigin(), atol=1e-9)


def test_nifti_and_itk_agree_on_the_same_scan(tmp_path) -> None:
    image = sitk.ReadImage(str(save(tmp_path / "a.nii.gz")))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    one, other = read_volume(tmp_path / "a.nii.gz"), read_volume(tmp_path / "a.nrrd")
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-4)
    assert torch.equal(one.data, other.data)


@pytest.mark.parametrize(
    ("space", "missing"),
    [
        ("space: left-posterior-superior", None),
        ("space: RAS", None),
        ("space: scanner-xyz", "space scanner-xyz"),
        ("space: 3D-right-handed", "space 3D-right-handed"),
        ("space: 3D-left-handed", "space 3D-left-handed"),
        ("space dimension: 3", "no space"),
    ],
)
def test_an_nrrd_whose_space_does_not_name_the_patients_axes_is_told(tmp_path, space, missing) -> None:
    """Its axes are taken for LPS, which is wrong for most of them."""
    path = tmp_path / "a.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(values().transpose(2, 1, 0)), str(path))
    content = path.read_bytes()
    assert b"\nspace: left-posterior-superior\n" in content
    path.write_bytes(content.replace(b"space: left-posterior-superior", space.encode()))
    with remarks() as said:
        read_volume(path)
    expected = f"a.nrrd: its header has no orientation ({missing}), so left and right are a guess"
    assert said == ([] if missing is None else [expected])

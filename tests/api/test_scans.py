"""Scans in any form: the same voxels and geometry, and one clear line for what cannot be used."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion.api.scans import read_mask, read_scan
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.modality import ModelInput
from medseg_diffusion.volumes.volume import Volume
from tests.helpers.volumes import oblique, save, values

ONE, TWO = ModelInput("model", ("T1",)), ModelInput("model", ("T1", "FLAIR"))


def test_every_form_is_the_same_volume(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", qform=oblique((0.1, 0.1, 0.1)), codes=(2, 1))
    image = nib.load(path)
    array = np.asarray(image.dataobj)
    expected = read_volume(path)
    in_memory = nib.Nifti1Image(array.astype(np.float64), image.affine, image.header)
    for volume in (
        read_scan(path, ONE),
        read_scan(str(path), ONE),
        read_scan(expected, ONE),
        read_scan(image, ONE),
        read_scan(in_memory, ONE),
        read_scan(array, ONE, affine=image.affine),
        read_scan([path], ONE),
        read_scan({"T1": image}, ONE),
    ):
        assert torch.equal(volume.data, expected.data) and volume.data.dtype == torch.float32
        np.testing.assert_allclose(volume.affine, expected.affine)
    assert read_scan(image, ONE).header.qform_code == 2 and read_scan(image, ONE).source == path
    assert read_scan(in_memory, ONE).source is None
    np.testing.assert_allclose(read_scan(image, ONE).header.qform, expected.header.qform)  # type: ignore[arg-type]


def test_other_formats_of_nibabel_and_channels_last() -> None:
    image = nib.MGHImage(values(), oblique())
    np.testing.assert_allclose(read_scan(image, ONE).affine, oblique(), atol=1e-4)
    colours = np.stack([values(), values() + 1], axis=-1)
    volume = read_scan(colours, TWO, spacing_mm=(1, 2, 3))
    assert volume.spacing == (1.0, 2.0, 3.0) and torch.equal(volume.data[1], volume.data[0] + 1)
    assert read_scan(values()[..., 0], ONE, spacing_mm=(2, 3)).shape == (4, 5, 1), "one slice"


def test_channels_are_named_or_in_order(tmp_path: Path) -> None:
    t1, flair = save(tmp_path / "t1.nii.gz"), save(tmp_path / "flair.nii.gz", values() + 5)
    listed, named = read_scan([t1, flair], TWO), read_scan({"FLAIR": flair, "T1": nib.load(t1)}, TWO)
    assert torch.equal(listed.data, named.data) and len(listed.data) == 2
    with pytest.raises(UsageError, match=r"a list of 3 images; the model model \(2 channels: T1, FLAIR\) takes one"):
        read_scan([t1, t1, flair], TWO)
    with pytest.raises(UsageError, match=r"^images of the channels T1, T2; expected one image for each of T1, FLAIR, "):
        read_scan({"T1": t1, "T2": flair}, TWO)
    with pytest.raises(UsageError, match=r"channels mri; .* each of T1, the channels of the model model; name the ima"):
        read_scan({"mri": t1}, ONE)
    with pytest.raises(UsageError, match=r"channels 0; expected"):
        read_scan({0: t1}, ONE)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="resample one onto the other's grid"):
        read_scan([t1, save(tmp_path / "other.nii.gz", affine=np.eye(4))], TWO)


def test_no_image_is_no_scan() -> None:
    with pytest.raises(UsageError, match=r"a list of 0 images; the model .* takes one image for each channel"):
        read_scan([], ONE)


def test_an_array_needs_its_voxel_size_and_nothing_else_may_have_one(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz")
    with pytest.raises(InputError, match=r"the array: found no voxel size; expected that of the scan in mm; give spac"):
        read_scan(values(), ONE)
    for scan in (path, nib.load(path), read_volume(path)):
        with pytest.raises(UsageError, match="spacing_mm is for arrays; files, nibabel images and volumes have their"):
            read_scan(scan, ONE, spacing_mm=(1, 1, 1))
    with pytest.raises(UsageError, match="give one of them"):
        read_scan(values(), ONE, spacing_mm=(1, 1, 1), affine=np.eye(4))
    with pytest.raises(InputError, match=r"spacing_mm=\(1, 0, 1\); expected three sizes above 0"):
        read_scan(values(), ONE, spacing_mm=(1, 0, 1))
    with pytest.raises(InputError, match=r"spacing_mm=\(1, 2\); expected three sizes above 0"):  # of a volume
        read_scan(values(), ONE, spacing_mm=(1, 2))
    with pytest.raises(InputError, match=r"spacing_mm=\(2\); expected three sizes above 0"):
        read_scan(values(), ONE, spacing_mm=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 5, 6), np.nan), "the array: found 120 NaN or infinite voxels"),
        (np.ones((4, 5, 6)), "the constant value 1; expected an image with contrast"),
        (np.ones((4, 5, 6), complex), "complex128 voxels; expected one number per voxel"),
        (np.ones(4), "a 1D image"),
        (np.ones((4, 5, 0)), "an empty image"),
    ],
)
def test_unusable_arrays_are_refused_as_files_are(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_scan(array, ONE, spacing_mm=(1, 1, 1))


def test_volumes_are_checked_and_become_float32(tmp_path: Path) -> None:
    """Their voxels may come from anywhere, not only from read_volume."""
    data = torch.arange(120.0).reshape(1, 4, 5, 6)
    for dtype in (torch.float64, torch.int16, torch.uint8):
        scan = Volume(data.to(dtype), np.eye(4))
        assert torch.equal(read_scan(scan, ONE).data, data) and read_scan(scan, ONE).data.dtype == torch.float32
        assert scan.data.dtype == dtype
    for wrong, message in ((data / data, "1 NaN or infinite voxels"), (data * 0, "the constant value 0")):
        with pytest.raises(InputError, match=message):
            read_scan(Volume(wrong, np.eye(4)), ONE)


def test_a_folder_of_several_scans_is_no_scan(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz")
    assert read_scan(tmp_path, ONE).shape == (4, 5, 6)
    save(tmp_path / "b.nii.gz")
    with pytest.raises(UsageError, match=r"holds 2 scans; name one, or write files for all of them with segment\(\)"):
        read_scan(tmp_path, ONE)


def test_label_maps_are_whole_numbers(tmp_path: Path) -> None:
    labels = (values() > 100).astype(np.uint8)
    path = save(tmp_path / "mask.nii.gz", labels)
    expected = read_mask(path)
    for mask in (nib.load(path), expected):
        assert torch.equal(read_mask(mask).data, expected.data)
    assert torch.equal(read_mask(labels > 0, (1, 1, 1)).data, expected.data)
    with pytest.raises(InputError, match=r"the array: found the label [\d.]+; expected whole numbers from 0"):
        read_mask(values(), (1, 1, 1))
    with pytest.raises(InputError, match=r"1 channels of torch.float32; expected one channel of whole numbers"):
        read_mask(Volume(torch.zeros(1, 2, 2, 2), np.eye(4)))

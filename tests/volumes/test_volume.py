"""Geometry in memory: orientation is exact and reversible, other grids are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.volume import Header, Volume, reorient

ALL_CODES = ["".join(c) for axes in permutations(("RL", "AP", "SI")) for c in product(*axes)]


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """(3, 3) rotation by three angles in degrees."""
    return nib.eulerangles.euler2mat(*np.deg2rad([z, y, x]))


def make(shape=(3, 4, 5), spacing=(0.7, 1.1, 2.3), angles=(0, 0, 0), origin=(-31.7, 12.3, 0.123), **header) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = rotation(*angles) * spacing
    affine[:3, 3] = origin
    affine = affine.astype(np.float32).astype(np.float64)
    data = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(1, *shape)
    return Volume(data, affine, header=Header(**header))


TURNED = make(angles=(5, -8, 3)).affine


def place_of_each_value(volume: Volume) -> np.ndarray:
    """(N, 3) RAS mm of the voxel that holds 0, 1, 2, ..."""
    order = torch.argsort(volume.data.flatten()).numpy()
    index = np.stack(np.unravel_index(order, volume.shape), axis=-1)
    return nib.affines.apply_affine(volume.affine, index)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_every_orientation_keeps_each_voxel_in_place_and_returns_exactly(codes: str) -> None:
    volume = make(angles=(12, -7, 20), qform=rotation_matrix_4x4())
    turned = volume.oriented(codes)
    assert turned.axcodes == codes
    np.testing.assert_allclose(place_of_each_value(turned), place_of_each_value(volume), atol=1e-9)
    np.testing.assert_allclose(
        turned.header.qform @ np.linalg.inv(turned.affine),
        volume.header.qform @ np.linalg.inv(volume.affine),
        atol=1e-9,
    )
    back = turned.oriented("LPI").oriented(volume.axcodes)
    assert torch.equal(back.data, volume.data)
    assert np.array_equal(back.affine, volume.affine)
    assert np.array_equal(back.header.qform, volume.header.qform)


def rotation_matrix_4x4() -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(3, 4, 5)
    return matrix


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    spacing=st.tuples(*[st.floats(0.01, 50)] * 3),
    angles=st.tuples(*[st.floats(-25, 25)] * 3),
    origin=st.tuples(*[st.floats(-1e6, 1e6)] * 3),
    codes=st.sampled_from(ALL_CODES),
)
def test_the_way_back_is_exact_for_any_geometry(shape, spacing, angles, origin, codes) -> None:
    volume = make(shape, spacing, angles, origin)
    back = volume.oriented(codes).oriented(volume.axcodes)
    assert torch.equal(back.data, volume.data)
    assert np.array_equal(back.affine, volume.affine)
    np.testing.assert_allclose(volume.spacing, spacing, rtol=1e-5)


def test_orientation_agrees_with_nibabel() -> None:
    volume = make(angles=(100, 0, 20))
    ours = volume.oriented("RAS")
    theirs = nib.as_closest_canonical(nib.Nifti1Image(volume.data[0].numpy(), volume.affine))
    np.testing.assert_array_equal(ours.data[0].numpy(), theirs.get_fdata())
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-9)


def test_a_file_without_codes_gets_one_only_while_it_is_turned() -> None:
    volume = make(qform_code=0, sform_code=0)
    turned = volume.oriented("LPS")
    assert turned.header.sform_code == 2
    assert turned.oriented("RAS").header.sform_code == 0


@pytest.mark.parametrize("codes", ["RA", "RRS", "RAX", "ras", "RLS", ""])
def test_unknown_codes_are_refused(codes: str) -> None:
    with pytest.raises(ValueError, match="orientation must name"):
        make().oriented(codes)


def test_like_takes_other_channels_and_refuses_another_grid() -> None:
    volume = make()
    assert volume.like(torch.zeros(4, 3, 4, 5)).shape == (3, 4, 5)
    for wrong in (torch.zeros(1, 3, 4, 6), torch.zeros(3, 4, 5)):
        with pytest.raises(ValueError, match=r"shape \(.*\) is not on the grid \(C, 3, 4, 5\)"):
            volume.like(wrong)


def test_same_grid_compares_shape_and_position() -> None:
    volume, moved = make(), make(origin=(-31.7, 12.3, 0.13))
    volume.require_same_grid(moved)
    with pytest.raises(InputError, match="10 mm away"):
        volume.require_same_grid(make(origin=(-21.7, 12.3, 0.123)))
    with pytest.raises(InputError, match="3 x 4 x 6 voxels; expected 3 x 4 x 5"):
        volume.require_same_grid(make(shape=(3, 4, 6)))


def test_axes_in_another_order_are_the_same_grid() -> None:
    volume = make()
    aligned = volume.aligned(volume.oriented("PIR"))
    assert torch.equal(aligned.data, volume.data) and np.array_equal(aligned.affine, volume.affine)
    assert volume.aligned(near := make(origin=(-31.7, 12.3, 0.13))) is near, "nothing moves that needs not"
    with pytest.raises(InputError, match="10 mm away"):
        volume.aligned(make(origin=(-21.7, 12.3, 0.123)).oriented("PIR"))


@pytest.mark.parametrize("codes", ["RAS", "SAR", "LPI"])
def test_a_part_of_a_grid_comes_back_to_its_place(codes: str) -> None:
    """A DICOM segmentation may hold a part of the scan, with the axes in another order."""
    scan = Volume(torch.zeros(1, 6, 7, 5), affine=TURNED)
    whole = torch.zeros(1, 6, 7, 5, dtype=torch.int32)
    whole[0, 2:4, 1:6, 3] = torch.arange(10).reshape(2, 5)
    part = part_of(whole, (1, 1, 2), (5, 7, 5))
    torch.testing.assert_close(scan.aligned(part.oriented(codes)).data, whole)
    complete = replace(part, header=Header()).oriented(codes)
    with pytest.raises(InputError, match="4 x 6 x 3 voxels"):
        scan.aligned(complete.oriented("RAS"))
    assert complete.covering(scan) is complete


def test_two_parts_of_a_grid_are_compared_where_either_has_voxels() -> None:
    whole = torch.arange(6 * 7 * 5, dtype=torch.int32).reshape(1, 6, 7, 5)
    one, other = part_of(whole, (0, 2, 1), (4, 7, 2)), part_of(whole, (3, 0, 3), (6, 5, 5)).oriented("ASL")
    united = one.covering(other)
    turned = united.aligned(other).oriented("RAS").data
    expected_one, expected_other = torch.zeros_like(whole), torch.zeros_like(whole)
    expected_one[:, 0:4, 2:7, 1:2] = whole[:, 0:4, 2:7, 1:2]
    expected_other[:, 3:6, 0:5, 3:5] = whole[:, 3:6, 0:5, 3:5]
    torch.testing.assert_close(united.oriented("RAS").data, expected_one[..., 1:5])
    torch.testing.assert_close(turned, expected_other[..., 1:5])


def test_a_part_between_the_voxels_or_beyond_the_scan_is_refused() -> None:
    scan = Volume(torch.zeros(1, 6, 7, 5), affine=TURNED)
    between = part_of(torch.ones(1, 6, 7, 5), (1, 1, 1), (4, 4, 4))
    between.affine[0, 3] += 0.4
    beyond = part_of(torch.ones(1, 6, 7, 5), (1, 1, 1), (4, 4, 4))
    beyond.affine[:3, 3] -= 4 * TURNED[:3, 1]
    for part in (between, beyond):
        with pytest.raises(InputError, match="resample"):
            scan.aligned(part)


def test_slices_at_unknown_distances_are_placed_one_by_one() -> None:
    """A file that holds slices 1 and 4 alone does not say that two others lie between."""
    scan = Volume(torch.zeros(1, 6, 7, 5), affine=TURNED)
    whole = torch.zeros(1, 6, 7, 5, dtype=torch.int32)
    whole[..., 1], whole[..., 4] = 1, 2
    affine = TURNED @ np.diag([1.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = (TURNED @ [0, 0, 1, 1])[:3]
    part = Volume(whole[..., [1, 4]], affine, header=Header(sparse=True, unknown_step=True))
    for turned in (part, part.oriented("SLA")):
        torch.testing.assert_close(scan.aligned(turned).data, whole)
    known = replace(part, header=Header(sparse=True))
    with pytest.raises(InputError, match="6 x 7 x 2 voxels"):
        scan.aligned(known)


def part_of(whole: torch.Tensor, first: tuple[int, int, int], last: tuple[int, int, int]) -> Volume:
    """The part of a label map that a sparse file holds."""
    affine = TURNED.copy()
    affine[:3, 3] = (TURNED @ [*first, 1])[:3]
    box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    return Volume(whole[(slice(None), *box)].clone(), affine, header=Header(sparse=True))


def test_a_volume_refuses_what_has_no_place() -> None:
    with pytest.raises(ValueError, match=r"\(C, I, J, K\)"):
        Volume(torch.zeros(3, 4, 5), np.eye(4))
    for entries, text in (([1, 1, 0], "voxel size of 1 x 1 x 0"), ([1, np.nan, 1], "NaN")):
        with pytest.raises(InputError, match=text):
            Volume(torch.zeros(1, 3, 4, 5), np.diag([*entries, 1.0]))
    flat = np.eye(4)
    flat[:3, 1] = flat[:3, 0]
    with pytest.raises(InputError, match="singular"):
        Volume(torch.zeros(1, 3, 4, 5), flat)


def test_reorient_moves_an_axis_to_the_place_that_is_named() -> None:
    data = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(reorient(data, np.array([[2, 1], [0, -1], [1, 1]])), data.flip(2).permute(0, 2, 3, 1))

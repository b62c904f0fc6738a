"""Resampling: both ways of computing agree with each other and with scipy, and identity is exact."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg_diffusion.volumes import resample as module
from medseg_diffusion.volumes.resample import Part, resample, resample_slabs, spacing_grid


def affine_of(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), angles=(0.0, 0.0, 0.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*np.deg2rad(angles)) * spacing
    affine[:3, 3] = origin
    return affine


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


OBLIQUE = affine_of((0.8, 1.2, 2.0), (5, -3, 7), (20, -10, 35))


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("affine", [np.eye(4), OBLIQUE], ids=["plain", "oblique"])
def test_identity_is_exact(affine, mode) -> None:
    data = noise(2, 5, 6, 7)
    assert torch.equal(resample(data, affine, affine, (5, 6, 7), mode=mode), data)
    through_grid = module._oblique(data, np.eye(4), (5, 6, 7), mode, "edge")
    torch.testing.assert_close(through_grid, data, atol=1e-5, rtol=0)


def test_crops_flips_and_swapped_axes_are_exact() -> None:
    data = noise(1, 5, 6, 7)
    shift = np.eye(4)
    shift[:3, 3] = 1, 2, 3
    assert torch.equal(resample(data, OBLIQUE, OBLIQUE @ shift, (3, 3, 3)), data[:, 1:4, 2:5, 3:6])
    swap = np.array([[0, 0, -1, 4], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    assert torch.equal(resample(data, OBLIQUE, OBLIQUE @ swap, (6, 7, 5)), data.permute(0, 2, 3, 1).flip(3))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    target=st.tuples(*[st.integers(1, 9)] * 3),
    scale=st.tuples(*[st.floats(0.3, 3).filter(lambda s: abs(s - 1.2) > 1e-3)] * 3),
    origin=st.tuples(*[st.floats(-4, 4)] * 3),
    outside=st.sampled_from(["edge", -2.0]),
)
def test_the_fast_path_agrees_with_grid_sample(shape, target, scale, origin, outside) -> None:
    data = noise(2, *shape)
    step = affine_of(scale, origin)
    # A place on the very edge may fall to either side.
    for axis in range(3):
        places = origin[axis] + scale[axis] * np.arange(target[axis])
        if np.abs(np.stack([places + 0.5, places - shape[axis] + 0.5])).min() < 5e-3:
            return
    fast = resample(data, OBLIQUE, OBLIQUE @ step, target, outside=outside)
    slow = module._oblique(data, step, target, "linear", outside)
    assert fast.shape == (2, *target)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def test_nearest_agrees_with_grid_sample_and_keeps_the_type() -> None:
    data = (noise(1, 8, 9, 10) * 60000).to(torch.int32)
    step = affine_of((0.7, 1.3, 2.1), (0.123, -0.711, 0.456))
    fast = resample(data, np.eye(4), step, (9, 7, 5), mode="nearest", outside=7)
    assert fast.dtype == torch.int32
    assert torch.equal(fast, module._oblique(data, step, (9, 7, 5), "nearest", 7))


def test_oblique_sampling_agrees_with_scipy() -> None:
    data = noise(1, 12, 13, 14)
    step = affine_of((0.9, 1.0, 1.1), (4, 3, 2), (20, 15, -10))
    ours = resample(data, OBLIQUE, OBLIQUE @ step, (6, 6, 6))
    theirs = ndimage.affine_transform(
        data[0].double().numpy(), step[:3, :3], step[:3, 3], (6, 6, 6), order=1, mode="nearest"
    )
    torch.testing.assert_close(ours[0].double(), torch.from_numpy(theirs), atol=1e-4, rtol=0)


def test_coarse_sampling_smooths_as_scipy_does() -> None:
    data = noise(1, 40, 40, 40)
    sigma = np.sqrt(3**2 - 1) / 2.3548
    smooth = ndimage.gaussian_filter(data[0].double().numpy(), sigma, mode="nearest", truncate=3.0)
    ours = resample(data, np.eye(4), affine_of((3, 3, 3), (1, 1, 1)), (13, 13, 13))
    np.testing.assert_allclose(ours[0].numpy(), smooth[1::3, 1::3, 1::3], atol=0.002)


def test_a_fine_pattern_does_not_alias() -> None:
    stripes = (torch.arange(60) % 2).float().expand(1, 60, 60, 60)
    coarse = resample(stripes, np.eye(4), affine_of((2, 2, 2)), (30, 30, 30))
    assert (coarse[..., 3:-3] - 0.5).abs().max() < 0.1  # without smoothing: 0 everywhere


@pytest.mark.parametrize("outside", ["edge", 3.0])
def test_slabs_equal_the_whole(monkeypatch, outside) -> None:
    data, target = noise(2, 9, 10, 11), affine_of((0.9, 0.8, 0.7), (3, 3, 3), (30, 20, 10))
    whole = resample(data, np.eye(4), target, (12, 13, 14), outside=outside)
    monkeypatch.setattr(module, "_GRID_BYTES", 1)
    assert torch.equal(resample(data, np.eye(4), target, (12, 13, 14), outside=outside), whole)


def test_outside_begins_at_the_outer_edge_of_the_voxels() -> None:
    data = torch.full((1, 4, 4, 4), 2.0)
    line = resample(data, np.eye(4), affine_of((0.25, 1, 1), (-1, 0, 0)), (24, 4, 4), outside=-1.0)[0, :, 0, 0]
    places = torch.arange(24) * 0.25 - 1
    assert torch.equal(line == 2, (places >= -0.5) & (places <= 3.5))
    assert (data == 2).all()


@pytest.mark.parametrize(("n", "old", "new", "m"), [(256, 1, 1.5, 171), (10, 1, 2, 5), (10, 2, 1, 20), (1, 5, 1, 5)])
def test_spacing_grid_covers_the_field_of_view(n, old, new, m) -> None:
    affine = OBLIQUE @ np.diag([old / 0.8, old / 1.2, old / 2.0, 1])
    grid, shape = spacing_grid((n, n, n), affine, (new, new, new))
    assert shape == (m, m, m)
    centre, centre_new = (nib.affines.apply_affine(a, [(k - 1) / 2] * 3) for a, k in ((affine, n), (grid, m)))
    np.testing.assert_allclose(centre, centre_new, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), new)
    assert 0 <= m * new - n * old < new


def test_spacing_grid_leaves_what_fits_and_refuses_nonsense() -> None:
    grid, shape = spacing_grid((7, 8, 9), OBLIQUE, (0.8 * 1.0005, 1.2, 2.0))
    assert shape == (7, 8, 9)
    assert np.array_equal(grid, OBLIQUE)
    for wrong in ((1, 1), (1, 1, 0), (1, 1, float("nan"))):
        with pytest.raises(ValueError, match="three positive numbers"):
            spacing_grid((7, 8, 9), OBLIQUE, wrong)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="three sizes"):
        resample(noise(4, 4, 4), np.eye(4), np.eye(4), (4, 4, 4))


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_slabs_of_any_thickness_give_the_whole_bit_for_bit(data: st.DataObject) -> None:
    """In parts of any size, and any box of a part."""
    side = st.integers(1, 12)
    shape = (data.draw(side), data.draw(side), data.draw(side))
    image, affine = noise(2, *shape), affine_of((0.8, 1.2, 2.0), (5, -3, 7), (20, -10, 35))
    spacing = [data.draw(st.sampled_from([0.5, 1.0, 1.37, 2.2, 4.0])) * mm for mm in (0.8, 1.2, 2.0)]
    grid, target = spacing_grid(shape, affine, spacing)
    expected = resample(image, affine, grid, target)
    axis = data.draw(st.integers(0, 2), "axis")
    cuts = sorted({0, shape[axis], *data.draw(st.lists(st.integers(0, shape[axis]), max_size=4), "cuts")})
    slabs = (image.narrow(axis + 1, a, b - a) for a, b in itertools.pairwise(cuts))
    at_once = data.draw(st.sampled_from([1, 100, 10**6]), "values")
    done = 0
    for first, part in resample_slabs(slabs, axis, shape, affine, grid, target, at_once):
        values, whole = part.values(), expected.narrow(axis + 1, first, part.shape[axis])
        assert first == done and tuple(values.shape[1:]) == part.shape and torch.equal(values, whole)
        box = [slice(data.draw(st.integers(0, n - 1)), n) for n in part.shape]
        assert torch.equal(part.within(box, 1), whole[1, *box])
        mask = torch.zeros(part.data.shape[1:], dtype=torch.bool)
        mask[-1, 0, 0] = True
        reached = part.reach(mask)
        touched = Part(mask[None].float(), part.taps).values()[0]
        if reached is None:
            assert not touched.any()
        else:
            inside = touched[reached].sum()
            torch.testing.assert_close(inside, touched.sum())
        done += part.shape[axis]
    assert done == target[axis]

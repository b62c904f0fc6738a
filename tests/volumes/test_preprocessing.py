"""Scan to model grid and back: shapes, places, probabilities and intensities."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.preprocessing import Preprocessing, apply_labels, foreground_box
from medseg_diffusion.volumes.resample import resample
from medseg_diffusion.volumes.volume import Volume


def affine_of(spacing=(1.0, 1.0, 1.0), angles=(0.0, 0.0, 0.0), origin=(10.0, -20.0, 30.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*np.deg2rad(angles)) * spacing
    affine[:3, 3] = origin
    return affine


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def distance(shape, centre) -> torch.Tensor:
    grids = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in shape], indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grids, centre, strict=True)).sqrt()


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(2, 14)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 5)] * 3),
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    orientation=st.sampled_from([None, "RAS", "LPI", "SAL"]),
    target=st.sampled_from([None, (1.0, 1.0, 1.0), (2.0, 0.7, 3.0)]),
    channels=st.integers(1, 3),
)
def test_any_geometry_goes_there_and_back(shape, spacing, angles, orientation, target, channels) -> None:
    volume = Volume(noise(channels, *shape), affine_of(spacing, angles))
    image, placement = Preprocessing(orientation, target).apply(volume)
    assert image.shape == (channels, *placement.shape)
    assert image.dtype == torch.float32
    assert image.isfinite().all()
    back = placement.restore(image)
    assert back.shape == volume.data.shape
    if target is None:
        # Nothing was resampled: every voxel returns bit for bit.
        assert torch.equal(placement.restore(placement.forward(volume.data)), volume.data)
    constant = placement.restore(torch.full((channels, *placement.shape), 0.25))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.25))


@pytest.mark.parametrize("sides", [(17, 40), (24, 31), (60, 9)])
def test_a_photograph_of_any_shape_is_resized_and_its_mask_returns(sides) -> None:
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in sides], indexing="ij")
    disc = ((rows**2 + columns**2) < 0.5)[None, ..., None]
    photograph = Volume(disc.expand(3, -1, -1, -1).float() + 1, affine_of())
    image, placement = Preprocessing(None, size=(64, 48)).apply(photograph)
    assert image.shape == (3, 64, 48, 1) and placement.shape == (64, 48, 1)
    # Where it only enlarges, the pixel centres are those of the usual resize of whole pictures.
    if max(sides) <= 48:
        wanted = F.interpolate(disc[..., 0][None].float(), (64, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(placement.forward(disc.float())[..., 0], wanted[0], atol=1e-5, rtol=0)
    assert dice(placement.restore((image[:1] > 0).float()) > 0.5, disc) > 0.95
    with pytest.raises(ValueError, match="without spacing_mm"):
        Preprocessing(spacing_mm=(1, 1, 1), size=(64, 48))


@pytest.mark.parametrize("sides", [(16, 16), (15, 8), (64, 3)])
def test_a_centre_crop_keeps_the_middle_and_the_scaling_of_the_whole_scan(sides) -> None:
    data = torch.arange(2 * 33 * 20.0).reshape(1, 33, 20, 2)
    slices = Volume(data, affine_of())
    whole, _ = Preprocessing(None, low=0, high=100).apply(slices)
    image, placement = Preprocessing(None, low=0, high=100, crop_centre=sides).apply(slices)
    i, j = min(sides[0], 33), min(sides[1], 20)
    first, second = (33 - i) // 2, (20 - j) // 2
    part = (slice(None), slice(first, first + i), slice(second, second + j))
    assert torch.equal(image, whole[part])
    back = placement.restore(data[part], outside=-1.0)
    assert torch.equal(back[part], data[part]) and int((back == -1).sum()) == 2 * (33 * 20 - i * j)


def test_a_centre_crop_excludes_that_of_the_foreground() -> None:
    with pytest.raises(ValueError, match="without crop_foreground"):
        Preprocessing(crop_foreground=True, crop_centre=(8, 8))
    with pytest.raises(ValueError, match="no box can be given"):
        Preprocessing(crop_centre=(8, 8)).apply(Volume(noise(1, 9, 9, 9), affine_of()), ((0, 9), (0, 9), (0, 5)))


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.7, 0.7, 0.7), (2.0, 1.0, 0.5)])
def test_a_ramp_in_space_stays_in_its_place(spacing) -> None:
    affine = affine_of((0.9, 1.1, 1.4), (100, 20, -30))
    index = np.stack(np.meshgrid(*map(np.arange, (30, 28, 26)), indexing="ij"), -1)
    ramp = torch.from_numpy(nib.affines.apply_affine(affine, index)).permute(3, 0, 1, 2).float()
    _, placement = Preprocessing("LPS", spacing).apply(Volume(ramp, affine))
    there = placement.forward(ramp)
    index = np.stack(np.meshgrid(*map(np.arange, placement.shape), indexing="ij"), -1)
    places = torch.from_numpy(nib.affines.apply_affine(placement.affine, index)).permute(3, 0, 1, 2).float()
    inner = (slice(None), *[slice(6, -6)] * 3)
    torch.testing.assert_close(there[inner], places[inner], atol=1e-3, rtol=0)
    torch.testing.assert_close(placement.restore(there)[inner], ramp[inner], atol=1e-3, rtol=0)


@pytest.mark.parametrize("spacing", [1.3, 1.5, 2.0])
def test_probabilities_return_better_than_labels(spacing) -> None:
    scan = Volume(noise(1, 60, 58, 56), affine_of((-1, -1, 1)))
    _, placement = Preprocessing(spacing_mm=(spacing,) * 3).apply(scan)

    def phantom(shape, affine) -> torch.Tensor:
        """A ball of 14 mm within one of 24 mm, with borders that are soft over some voxels."""
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        away = np.linalg.norm(nib.affines.apply_affine(affine, index) - [-19.3, -48.1, 57.7], axis=-1)
        logits = np.stack([away - 24, np.minimum(away - 14, 24 - away), 14 - away]) / 2
        return torch.softmax(torch.from_numpy(logits).float(), 0)

    truth = phantom(scan.shape, scan.affine).argmax(0)
    model = phantom(placement.shape, placement.affine)
    ours = placement.restore(model, (1, 0, 0)).argmax(0)
    labels = model.argmax(0, keepdim=True)
    theirs = resample(labels, placement.affine, scan.affine, scan.shape, mode="nearest")[0]
    for label in (1, 2):
        assert dice(ours == label, truth == label) > 0.99
        assert dice(ours == label, truth == label) > dice(theirs == label, truth == label) + 0.005


# ---- foreground ----


def head(shape=(64, 60, 50), centre=(30, 32, 26), radius=14.0) -> torch.Tensor:
    """A dark ball with a bright rim and a small bright nose in noisy air."""
    away = distance(shape, centre)
    image = 30 * noise(*shape) + 250 * (away < radius) + 600 * ((away < radius) & (away > radius - 2))
    nose = distance(shape, (centre[0], centre[1] + radius, centre[2])) < 3
    return (image + 300 * nose)[None]


def test_the_crop_holds_the_head_and_saves_air() -> None:
    image = head()
    volume = Volume(image, affine_of((-2, 2, -2)))
    box = foreground_box(image[0], volume.affine)
    kept = torch.zeros_like(image, dtype=torch.bool)
    kept[(0, *(slice(*b) for b in box))] = True
    assert kept[image > 150].all()
    assert kept.float().mean() < 0.7
    scaled, placement = Preprocessing(crop_foreground=True).apply(volume)
    back = placement.restore(torch.stack([scaled[0] * 0, scaled[0] * 0 + 1]), outside=(1, 0))
    assert torch.equal(back[1] == 1, kept[0])
    assert torch.equal(back.sum(0), torch.ones(volume.shape))
    assert torch.equal(placement.restore(scaled, outside=-9.0) != -9, kept)


def test_a_second_large_part_is_kept_and_dirt_is_not() -> None:
    image = head((96, 40, 40), (20, 20, 20), 12)
    image[0, 70:80, 15:25, 15:25] = 500  # 8 cm^3
    image[0, 95, 20, 20] = 900
    (first, stop), *_ = foreground_box(image[0], affine_of((2, 2, 2)))
    assert first <= 8
    assert 80 <= stop <= 92


def test_without_air_nothing_is_cut() -> None:
    image = torch.full((20, 20, 20), 5.0)
    assert foreground_box(image, np.eye(4)) == ((0, 20),) * 3
    assert foreground_box(noise(60, 60, 60), affine_of()) == ((0, 60),) * 3


def test_a_cropped_and_resampled_scan_returns_to_its_shape() -> None:
    volume = Volume(head(), affine_of((2, -2, 2), (0, 0, 90)))
    image, placement = Preprocessing("LPI", (3.0, 2.0, 1.5), crop_foreground=True).apply(volume)
    assert placement.restore(image.expand(2, -1, -1, -1), (1, 0)).shape == (2, *volume.shape)


# ---- labels ----


def test_labels_are_voted_not_picked() -> None:
    labels = torch.zeros(1, 6, 6, 6, dtype=torch.int32)
    labels[:, 1::2] = 7
    labels[:, :, :, 3:] = 300
    volume = Volume(noise(1, 6, 6, 6), affine_of())
    same = apply_labels(volume.like(labels), Preprocessing().apply(volume)[1])
    assert same.dtype == torch.int32
    assert torch.equal(same, labels)
    coarse = apply_labels(volume.like(labels), Preprocessing(spacing_mm=(2, 2, 2)).apply(volume)[1])
    assert coarse.shape == (1, 3, 3, 3)
    assert (coarse[:, :, :, 2] == 300).all()
    with pytest.raises(InputError, match="mm away"):
        apply_labels(Volume(labels, affine_of(origin=(0, 0, 0))), Preprocessing().apply(volume)[1])


def test_labels_follow_the_image() -> None:
    away = distance((40, 42, 44), (21, 20, 19))
    volume = Volume((100 * (away < 12)).float()[None] + noise(1, 40, 42, 44), affine_of((1, 1, 1.2), (90, 0, 10)))
    image, placement = Preprocessing("SPL", (1.3, 1.3, 1.3), crop_foreground=True).apply(volume)
    labels = apply_labels(volume.like((away < 12).to(torch.int32)[None]), placement)
    assert dice(labels == 1, image > 0) > 0.99


# ---- intensities ----


def brain() -> torch.Tensor:
    return torch.where(distance((24, 24, 24), (12, 12, 12)) < 9, 100 + 50 * noise(24, 24, 24), torch.tensor(0.0))[None]


@pytest.mark.parametrize("intensity", ["percentile", "zscore", "median"])
@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0), (1e6, 0), (1e6, 3e7), (1e-6, -2e-4), (1e30, 0), (1e-30, 0)])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_intensities_do_not_depend_on_unit_and_offset(intensity, scale, offset, spacing) -> None:
    image, affine = brain(), affine_of()
    step = Preprocessing(spacing_mm=spacing, intensity=intensity)
    plain, _ = step.apply(Volume(image, affine))
    other, _ = step.apply(Volume((image.double() * scale + offset).float(), affine))
    torch.testing.assert_close(other, plain, atol=3e-5, rtol=1e-5)


def test_percentiles_of_the_foreground_become_minus_one_and_one() -> None:
    image = brain()
    image[0, 12, 12, 12] = 1e6
    scaled, _ = Preprocessing(low=5, high=95).apply(Volume(image, affine_of()))
    inside = image[image > 0]
    for percent, value in ((5, -1.0), (95, 1.0)):
        level = np.percentile(inside.numpy(), percent)
        assert abs(float(scaled[(image - level).abs() < 0.05].mean()) - value) < 0.01
    assert scaled.min() >= -1.5
    assert scaled.max() == 1.5
    order = image.flatten().argsort()
    assert (scaled.flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize("margin", [0, 20])
@pytest.mark.parametrize("scalp", [1.0, 4.0])
def test_the_median_does_not_depend_on_the_air_around_a_head_or_the_fat_of_its_scalp(margin, scalp) -> None:
    away = distance((48, 48, 12), (24, 24, 6))
    inner = 100 + 10 * noise(48, 48, 12)
    image = torch.where(away < 18, torch.where(away < 15, inner, scalp * 100), 2 * noise(48, 48, 12))
    image = torch.nn.functional.pad(image, (0, 0, margin, margin, margin, margin))
    scaled, _ = Preprocessing(intensity="median").apply(Volume(image[None], affine_of()))
    tissue = torch.nn.functional.pad(away < 12, (0, 0, margin, margin, margin, margin))
    assert abs(float(scaled[0][tissue].median()) + 0.3) < 0.02
    assert abs(float(scaled.min()) + 1) < 0.02 and float(scaled.max()) <= 1.5
    order = image.flatten().argsort()
    assert (scaled.flatten()[order].diff() >= 0).all()


def test_zscore_is_that_of_the_foreground_and_channels_are_independent() -> None:
    image = torch.cat([brain(), 1000 * brain().flip(1) + 7])
    scaled, _ = Preprocessing(intensity="zscore").apply(Volume(image, affine_of()))
    for values, raw in zip(scaled, image, strict=True):
        inside = values[raw > raw.min()]
        assert abs(float(inside.mean())) < 1e-4
        assert abs(float(inside.std()) - 1) < 1e-3


def test_images_of_few_values_are_scaled_too() -> None:
    for share in (0.002, 0.5):
        image = (noise(1, 20, 20, 20) < share).float()
        scaled, _ = Preprocessing().apply(Volume(image, affine_of()))
        assert scaled.isfinite().all()
        assert scaled[image == 1].min() > scaled[image == 0].max()


# ---- wrong use ----


def test_wrong_arguments_are_refused() -> None:
    volume = Volume(noise(1, 4, 5, 6), affine_of())
    _, placement = Preprocessing().apply(volume)
    with pytest.raises(ValueError, match="not on the model's grid"):
        placement.restore(noise(1, 4, 5, 7))
    with pytest.raises(ValueError, match="2 outside values were given for 3 channels"):
        placement.restore(noise(3, 4, 5, 6), outside=(1, 0))
    with pytest.raises(ValueError, match="not on the scan's grid"):
        placement.forward(noise(1, 4, 5, 7))
    with pytest.raises(ValueError, match="percentiles"):
        Preprocessing(low=60, high=40)
    with pytest.raises(ValueError, match="intensity must be one of percentile, zscore, median, got"):
        Preprocessing(intensity="minmax")
    with pytest.raises(ValueError, match="orientation"):
        Preprocessing(orientation="XYZ").apply(volume)


# ---- real scans ----


@pytest.mark.data
def test_no_head_is_cut_off_in_real_scans(data_folder: Path) -> None:
    images = sorted((data_folder / "whole_head/elderly_t1/images").rglob("[!.]*.nii.gz"))
    brains = sorted((data_folder / "whole_head/elderly_t1/dlmuse_automatic").rglob("[!.]*.nii.gz"))
    assert len(images) == len(brains) > 0
    for image, brain_path in zip(images, brains, strict=True):
        volume, mask = read_volume(image), read_volume(brain_path)
        box = foreground_box(volume.data[0], volume.affine)
        kept = torch.zeros_like(mask.data, dtype=torch.bool)
        kept[(0, *(slice(*b) for b in box))] = True
        assert kept[mask.data > 0].all(), image.name
        # What is bright enough for a scalp and smooth enough for no noise lies inside too.
        smooth = torch.nn.functional.avg_pool3d(volume.data, 3, 1, 1)
        assert kept[smooth > 0.25 * smooth.quantile(0.99)].float().mean() > 0.999, image.name

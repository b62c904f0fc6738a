"""Synthetic anomalies: where they lie, how large they are, and what they change."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg_diffusion.data.synthetic_anomalies import (
    STRONGEST_DEFORMATION,
    Anomaly,
    AnomalyRecipe,
    insert_anomaly,
    robust_spread,
)
from medseg_diffusion.errors import UsageError
from medseg_diffusion.workflows.synthesize_anomalies import SynthesisOptions, synthesize_anomalies

KINDS = ("hyper", "hypo", "deformation")
KIND = pytest.mark.parametrize("kind", KINDS)
ISOTROPIC = (1.0, 1.0, 1.0)


def texture(*shape: int, seed: int = 0) -> torch.Tensor:
    return 50 + 50 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def drawn(
    kind: str,
    radius: float,
    image: torch.Tensor | None = None,
    free: torch.Tensor | None = None,
    seed: int = 0,
    contrast: float = 0.3,
    spacing: tuple[float, float, float] = ISOTROPIC,
) -> Anomaly:
    """An anomaly of one radius, in texture without end unless told otherwise, for a spread of 100."""
    image = texture(64, 64, 64) if image is None else image
    free = torch.ones(image.shape, dtype=torch.bool) if free is None else free
    generator = torch.Generator().manual_seed(seed)
    recipe = AnomalyRecipe(kind, contrast, (radius, radius))
    found = insert_anomaly(image, free, spacing, recipe, 100.0, generator)
    assert found is not None
    return found


def offset_mm(anomaly: Anomaly, spacing: tuple[float, float, float] = ISOTROPIC) -> np.ndarray:
    """Vector (3, I, J, K) from the centre to every voxel."""
    lines = [(np.arange(n) - c) * mm for n, c, mm in zip(anomaly.mask.shape, anomaly.centre, spacing, strict=True)]
    return np.stack(np.meshgrid(*lines, indexing="ij"))


def test_the_spread_is_that_of_the_foreground_between_its_5th_and_95th_percentile() -> None:
    image = torch.cat([torch.arange(101.0), torch.full((99,), 5000.0)]).reshape(2, 10, 10)
    inside = image <= 100
    assert robust_spread(image, inside) == pytest.approx(90.0)
    assert robust_spread(image, torch.zeros_like(inside)) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    spacing=st.tuples(*[st.floats(0.8, 2.0)] * 3),
    radius=st.floats(3.0, 6.0),
)
def test_an_anomaly_lies_in_the_foreground_and_changes_nothing_else(kind, seed, spacing, radius) -> None:
    image = texture(28, 30, 26, seed=seed)
    lines = [np.linspace(-1, 1, n) for n in image.shape]
    ball = sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")) < 0.9
    recipe = AnomalyRecipe(kind, 0.3, (radius, 2 * radius))
    free = torch.from_numpy(ball)
    found = insert_anomaly(image, free, spacing, recipe, 100.0, torch.Generator().manual_seed(seed))
    assert found is not None
    assert bool(found.mask.any()) and bool(free[found.centre])
    assert not bool((found.mask & ~found.touched).any()) and not bool((found.touched & ~free).any())
    assert torch.equal(found.image[~found.touched], image[~found.touched])
    assert radius <= found.radius_mm <= 2 * radius
    if kind == "hyper":
        assert bool((found.image[found.mask] > image[found.mask]).all())
    else:
        assert found.image.min() >= image.min()
    if kind == "hypo":
        assert bool((found.image <= image).all())
    if kind == "deformation":
        assert found.image.max() <= image.max()


def whole(kind: str, radius: float, spacing: tuple[float, float, float] = ISOTROPIC) -> dict[int, Anomaly]:
    """By seed, the anomalies in 64 mm that the edge of the grid does not cut."""
    image = texture(*(round(64 / mm) for mm in spacing))
    found = {seed: drawn(kind, radius, image, seed=seed, spacing=spacing) for seed in range(8)}
    inner = tuple(slice(1, n - 1) for n in image.shape)
    return {seed: one for seed, one in found.items() if one.touched.sum() == one.touched[inner].sum()}


@KIND
def test_a_large_anomaly_has_the_volume_of_its_ball(kind: str) -> None:
    """Within 3 %; the mask of a deformation has a hole of less than a fifth of the radius, of 1 % of the volume."""
    expected = 4 / 3 * np.pi * 12**3
    found = whole(kind, 12.0)
    assert len(found) > 1
    for one in found.values():
        assert float(one.mask.sum()) == pytest.approx(expected, rel=0.03)
        if kind != "deformation":  # and yet it is no ball
            ball = torch.from_numpy(np.sqrt((offset_mm(one) ** 2).sum(0)) < 12)
            assert 0.1 < float((ball ^ one.mask).sum()) / expected < 0.6


@KIND
def test_a_shape_is_the_same_in_millimetres_on_any_grid(kind: str) -> None:
    """From the centre it reaches as far in voxels of 1 x 1 x 1 mm as of 0.5 x 1 x 3 mm, to the coarsest voxel."""
    other = (0.5, 1.0, 3.0)
    fine, coarse = whole(kind, 8.0), whole(kind, 8.0, other)
    seeds = fine.keys() & coarse.keys()
    assert len(seeds) > 1
    for seed in seeds:
        one, two = fine[seed], coarse[seed]
        ends = []
        for found, spacing in ((one, ISOTROPIC), (two, other)):
            inside = offset_mm(found, spacing)[:, found.mask.numpy()]
            ends.append(np.concatenate([inside.min(1), inside.max(1)]))
        np.testing.assert_allclose(*ends, atol=3.01)
        assert float(one.mask.sum()) == pytest.approx(1.5 * float(two.mask.sum()), rel=0.03)


@pytest.mark.parametrize(("kind", "sign"), [("hyper", 1), ("hypo", -1)])
def test_the_core_changes_by_contrast_times_spread_and_the_edge_is_two_voxels(kind: str, sign: int) -> None:
    image = texture(64, 64, 64)
    image[0, 0, 0] = 0.0  # far from it, so that there is room below
    found = drawn(kind, 10.0, image, contrast=0.4)
    cube = np.ones((3, 3, 3))
    mask = found.mask.numpy()
    core = torch.from_numpy(ndimage.binary_erosion(mask, cube, iterations=2))
    assert core.sum() > 1000
    torch.testing.assert_close(found.image[core] - image[core], torch.full((int(core.sum()),), sign * 40.0))
    assert not bool((found.touched & ~torch.from_numpy(ndimage.binary_dilation(mask, cube, iterations=2))).any())
    change = sign * (found.image - image)
    assert float(change[found.mask].min()) > 19.99 and float(change[~found.mask].max()) < 20.01
    soft = (change > 0.01) & (change < 39.99)
    assert 0.1 < float(soft.sum()) / float(found.mask.sum()) < 1.5


def test_nothing_gets_darker_than_the_darkest_voxel() -> None:
    image = texture(40, 40, 40)
    found = drawn("hypo", 8.0, image, contrast=2.0)
    assert float(found.image.min()) == float(image.min())


@pytest.mark.parametrize("contrast", [0.1, STRONGEST_DEFORMATION])
@pytest.mark.parametrize("spacing", [ISOTROPIC, (1.0, 0.8, 2.0)])
def test_a_deformation_displaces_along_the_rays_from_its_centre_and_does_not_fold(contrast, spacing) -> None:
    """The oracle: an image that holds one coordinate shows where the intensities of every voxel come from."""
    shape, radius = (56, 70, 44), 14.0
    places = np.stack(np.meshgrid(*[np.arange(n) * mm for n, mm in zip(shape, spacing, strict=True)], indexing="ij"))
    signs = set()
    for seed in range(3):
        ramps = [torch.from_numpy(axis).float() for axis in places]
        found = [drawn("deformation", radius, ramp, seed=seed, contrast=contrast, spacing=spacing) for ramp in ramps]
        assert len({one.centre for one in found}) == 1
        source = np.stack([one.image.numpy() for one in found]).astype(np.float64)
        moved = places - source
        size = np.sqrt((moved**2).sum(0))
        largest = contrast * radius
        assert abs(found[0].displacement_mm) == pytest.approx(largest)
        assert size.max() == pytest.approx(largest, rel=0.02)
        clear = np.abs(size - largest / 2) > 0.01 * largest
        np.testing.assert_array_equal(found[0].mask.numpy()[clear], (size > largest / 2)[clear])
        offset = offset_mm(found[0], spacing)
        outwards = np.sign(found[0].displacement_mm)
        along = outwards * (moved * offset).sum(0) / np.maximum(np.sqrt((offset**2).sum(0)), 1e-9)
        np.testing.assert_allclose(along, size, atol=2e-3)
        rows = [np.stack(np.gradient(axis, *spacing)) for axis in source]
        assert np.linalg.det(np.moveaxis(np.stack(rows), (0, 1), (-2, -1))).min() > 0
        signs.add(outwards)
    assert signs == {-1.0, 1.0}


def test_a_deformation_moves_intensities_and_keeps_their_range() -> None:
    image = texture(64, 64, 64)
    found = drawn("deformation", 10.0, image)
    assert float((found.image - image)[found.mask].abs().mean()) > 3
    assert found.image.min() >= image.min() and found.image.max() <= image.max()
    far = torch.from_numpy(np.sqrt((offset_mm(found) ** 2).sum(0)) > 1.2 * 1.15 * 10)
    assert far.sum() > 1000 and torch.equal(found.image[far], image[far])


@KIND
def test_an_anomaly_depends_on_its_generator_alone(kind: str) -> None:
    one, same, other = (drawn(kind, 8.0, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.image, same.image) and torch.equal(one.mask, same.mask) and one.centre == same.centre
    assert not torch.equal(one.image, other.image) and one.centre != other.centre


@KIND
def test_several_anomalies_do_not_touch(kind: str) -> None:
    image, free, masks = texture(64, 64, 64), torch.ones(64, 64, 64, dtype=torch.bool), []
    for seed in range(5):
        found = drawn(kind, 7.0, image, free, seed=seed)
        image, free = found.image, free & ~found.touched
        masks.append(found.mask.numpy())
    for one, other in combinations(masks, 2):
        assert not (ndimage.binary_dilation(one, np.ones((3, 3, 3))) & other).any()


@KIND
def test_the_radius_shrinks_to_what_there_is_room_for_and_too_small_a_foreground_holds_none(kind: str) -> None:
    lines = [np.arange(40) - 20] * 3
    distance = np.sqrt(sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")))
    recipe = AnomalyRecipe(kind, 0.3, (6.0, 60.0))
    for radius, fits in ((13.0, True), (4.0, False), (0.0, False)):
        free = torch.from_numpy(distance < radius)
        found = insert_anomaly(texture(40, 40, 40), free, ISOTROPIC, recipe, 100.0, torch.Generator().manual_seed(0))
        assert (found is not None) == fits
        if found is not None:
            assert 6.0 <= found.radius_mm < 20.0


@KIND
def test_a_single_slice_holds_a_disc(kind: str) -> None:
    found = drawn(kind, 12.0, texture(64, 64, 1))
    assert 0.5 < float(found.mask.sum()) / (np.pi * 12**2) < 1.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"radius_mm": (5.0, 4.0)}, "5 and 4"),
        ({"radius_mm": (0.0, 4.0)}, "0 and 4"),
        ({"contrast": 0.0}, "above 0"),
        ({"contrast": float("nan")}, "above 0"),
        ({"kind": "deformation", "contrast": 0.5}, "fold"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        AnomalyRecipe(**changes)
    with pytest.raises(UsageError, match=said):
        synthesize_anomalies([tmp_path], SynthesisOptions(tmp_path / "out", **changes))

"""Distances between surfaces: closed forms, and MONAI's implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance

from medseg_diffusion.metrics.surface import hd95, surface_distances


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    places = np.indices(shape)
    return sum((axis - c) ** 2 for axis, c in zip(places, centre, strict=True)) <= radius**2


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.3, 2.5)])
@pytest.mark.parametrize("shift", [0, 2, 5])
def test_hd95_is_that_of_monai(spacing, shift) -> None:
    a, b = ball((24, 24, 24), (11, 11, 11), 6), ball((24, 24, 24), (11, 11, 11 + shift), 5)
    expected = compute_hausdorff_distance(
        torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None], True, percentile=95, spacing=spacing
    )
    assert hd95(a, b, spacing) == pytest.approx(float(expected), abs=1e-5)


def test_parallel_plates_are_their_distance_apart() -> None:
    a, b = np.zeros((10, 20, 20), bool), np.zeros((10, 20, 20), bool)
    a[2], b[7] = True, True
    assert hd95(a, b, (1.5, 1, 1)) == pytest.approx(7.5)
    assert hd95(a, a, (1, 1, 1)) == 0
    distances = surface_distances(a, b, (1, 1, 1))
    assert len(distances.from_prediction) == len(distances.from_reference) == 400


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_has_the_distances_of_the_2d_image(axis) -> None:
    a, b = ball((20, 24), (9, 9), 6), ball((20, 24), (9, 13), 4)
    spacing = [0.5, 2.0]
    whole = [np.expand_dims(mask, axis) for mask in (a, b)]
    assert hd95(*whole, np.insert(spacing, axis, 7.0).tolist()) == pytest.approx(hd95(a, b, spacing))
    assert hd95(a, b, spacing) > 2


def test_a_distance_to_nothing_does_not_exist() -> None:
    a, nothing = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    assert math.isnan(hd95(a, nothing, (1, 1))) and math.isnan(hd95(nothing, nothing, (1, 1)))

"""Calibration, surface distances and agreement with several raters: closed forms, and reference implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance
from torchmetrics.functional.classification import multiclass_calibration_error

from medseg_diffusion.metrics.ambiguity import distances, generalised_energy_distance, matched_iou
from medseg_diffusion.metrics.calibration import BINS, Reliability, region
from medseg_diffusion.metrics.surface import hd95, surface_distances

# ---- calibration -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), classes=st.integers(2, 5))
def test_the_calibration_error_is_that_of_torchmetrics(seed, classes) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, 0.5), 400).T
    labels = rng.integers(0, classes, 400)
    expected = multiclass_calibration_error(torch.from_numpy(p.T), torch.from_numpy(labels), classes, BINS)
    assert Reliability.of(p, labels).ece == pytest.approx(float(expected), abs=1e-6)


def test_honest_probabilities_have_no_calibration_error_and_boasting_ones_do() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=200_000)
    truth = (rng.uniform(size=p.size) < p).astype(np.int64)
    honest = Reliability.of(np.stack([1 - p, p]), truth)
    assert honest.ece < 0.005
    assert honest.brier_score == pytest.approx(1 / 3, abs=0.005)  # 2 E p (1 - p)
    certain = Reliability.of(np.stack([p <= 0.5, p > 0.5]).astype(float), truth)
    assert certain.ece == pytest.approx(0.25, abs=0.005)  # E min(p, 1 - p)


def test_cases_add_up_and_regions_restrict() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet([1, 1, 1], (8, 8)).transpose(2, 0, 1)
    labels = rng.integers(0, 3, (8, 8))
    half = np.zeros((8, 8), bool)
    half[:3] = True
    whole, parts = Reliability.of(p, labels), Reliability.of(p, labels, half) + Reliability.of(p, labels, ~half)
    np.testing.assert_allclose(parts.count, whole.count)
    assert parts.ece == pytest.approx(whole.ece) and parts.brier_score == pytest.approx(whole.brier_score)
    nothing = Reliability.of(p, labels, np.zeros((8, 8), bool))
    assert math.isnan(nothing.ece) and math.isnan(nothing.brier_score)


def test_a_label_without_probability_and_another_grid_are_refused() -> None:
    p = np.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="labels from 0 to 2, but probabilities of 2 classes"):
        Reliability.of(p, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="not of one grid"):
        Reliability.of(p, np.array([0, 1]))


def test_the_region_reaches_three_voxels_around_the_foreground() -> None:
    labels = np.zeros((15, 15), int)
    labels[7, 7] = 2
    found = region(labels)
    assert found[7, 4] and not found[7, 3] and found.sum() == 25  # a diamond of radius 3
    assert not region(np.zeros((4, 4), int)).any()


# ---- surfaces --------------------------------------------------------------------------------------------------------


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
    assert all(len(found) == 400 for found in surface_distances(a, b, (1, 1, 1)))


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


# ---- several raters --------------------------------------------------------------------------------------------------

A, B, NONE = np.array([1, 1, 0, 0]), np.array([0, 1, 1, 0]), np.zeros(4, int)


def test_distances_are_one_minus_iou() -> None:
    found = distances([A, B, NONE], [A, NONE], 2)
    np.testing.assert_allclose(found, [[0, 1], [2 / 3, 1], [1, 0]])
    two = distances([np.array([1, 2, 0])], [np.array([1, 0, 2])], 3)
    np.testing.assert_allclose(two, [[0.5]])  # class 1 agrees, class 2 does not


def test_samples_that_differ_as_the_raters_have_no_energy_distance() -> None:
    raters = [A, B]
    assert generalised_energy_distance(raters, raters, 2) == pytest.approx(0)
    assert generalised_energy_distance([A, B, A, B], raters, 2) == pytest.approx(0)
    assert matched_iou([B, A], raters, 2) == pytest.approx(1)
    # One sample twice: 2 (1/3) - 0 - 1/3.
    assert generalised_energy_distance([A, A], raters, 2) == pytest.approx(1 / 3)
    assert matched_iou([A, A], raters, 2) == pytest.approx((1 + 1 / 3) / 2)
    assert matched_iou([A, A, B], raters, 2) == pytest.approx((3 + 2 + 1 / 3) / 6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), samples=st.integers(1, 4), raters=st.integers(1, 4))
def test_energy_distance_is_never_negative(seed, samples, raters) -> None:
    rng = np.random.default_rng(seed)
    first, second = (list(rng.integers(0, 2, (count, 12))) for count in (samples, raters))
    assert generalised_energy_distance(first, second, 2) >= -1e-9
    assert 0 <= matched_iou(first, second, 2) <= 1

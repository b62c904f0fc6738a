"""Calibration: closed forms, and the arithmetic of torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from medseg_diffusion.metrics.calibration import BINS, Reliability, region


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
    inside = region(labels)
    assert inside[7, 4] and not inside[7, 3] and inside.sum() == 25  # a diamond of radius 3
    assert not region(np.zeros((4, 4), int)).any()

"""Agreement of samples with several raters: values by hand, and bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.metrics.ambiguity import distances, generalised_energy_distance, matched_iou

A, B, NONE = np.array([1, 1, 0, 0]), np.array([0, 1, 1, 0]), np.zeros(4, int)


def test_distances_are_one_minus_iou() -> None:
    matrix = distances([A, B, NONE], [A, NONE], 2)
    np.testing.assert_allclose(matrix, [[0, 1], [2 / 3, 1], [1, 0]])
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

"""Agreement of samples with several raters: values by hand, and bounds."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.metrics import ambiguity
from medseg_diffusion.metrics.ambiguity import (
    Frequencies,
    ReaderAgreement,
    distances,
    generalised_energy_distance,
    majority,
    matched_iou,
)

A, B, NONE = np.array([1, 1, 0, 0]), np.array([0, 1, 1, 0]), np.zeros(4, int)


def test_distances_are_one_minus_iou() -> None:
    matrix = distances([A, B, NONE], [A, NONE], 2)
    np.testing.assert_allclose(matrix, [[0, 1], [2 / 3, 1], [1, 0]])
    two = distances([np.array([1, 2, 0])], [np.array([1, 0, 2])], 3)
    np.testing.assert_allclose(two, [[0.5]])  # class 1 agrees, class 2 does not


def test_distances_of_long_maps_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = (list(rng.integers(0, 3, (count, 5, 5))) for count in (3, 2))
    whole = distances(first, second, 3)
    monkeypatch.setattr(ambiguity, "_BLOCK", 4)
    np.testing.assert_array_equal(distances(first, second, 3), whole)


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


def test_frequencies_by_hand() -> None:
    """Samples A, A, B, NONE mark the pixels 2, 3, 1, 0 times of 4; readers A, NONE mark them 1, 1, 0, 0 times of 2."""
    frequencies = Frequencies.of([A, A, B, NONE], [A, NONE], 2)
    assert frequencies.count.sum() == 3  # nobody marks the last pixel
    # The pixels 0.5, 0.75 and 0.25 of the samples are in three bins; the readers have 0.5, 0.5 and 0.
    assert frequencies.ece == pytest.approx((0 + 0.25 + 0.25) / 3)
    twice = frequencies + frequencies
    assert twice.count.sum() == 6 and twice.ece == pytest.approx(frequencies.ece)
    assert np.isnan(Frequencies.of([NONE], [NONE], 2).ece)
    certain = Frequencies.of([A], [A], 2)
    assert certain.count[-1] == 2 and certain.ece == 0
    two = Frequencies.of([np.array([1, 2])], [np.array([2, 2])], 3)  # class 1: 1 against 0; class 2: 0, 1 against 1, 1
    assert two.ece == pytest.approx((1 + 1 + 0) / 3)


def test_a_majority_is_at_least_half() -> None:
    np.testing.assert_array_equal(majority([A, NONE], 2), A)
    np.testing.assert_array_equal(majority([A, NONE, NONE], 2), NONE)
    np.testing.assert_array_equal(majority([A, B, B], 2), B)
    np.testing.assert_array_equal(majority([np.array([1, 2]), np.array([2, 2]), np.array([2, 0])], 3), [2, 2])


def test_agreement_with_readers_by_hand() -> None:
    agreement = ReaderAgreement.of([A, NONE, NONE, NONE], [A, A, B, NONE], 2)
    # d: A-A 0, A-B 2/3, A-NONE 1, B-NONE 1. Rows of samples against readers: A: 0, 0, 2/3, 1; NONE: 1, 1, 1, 0.
    between = (5 / 3 + 3 * 3) / 16
    samples = 6 / 16  # A against three empty ones, twice
    readers = 2 * (2 * 2 / 3 + 2 * 1 + 1) / 16
    assert agreement.energy_distance == pytest.approx(2 * between - samples - readers)
    assert agreement.majority_dice == 0  # nothing against A
    assert (agreement.empty_samples, agreement.empty_readers) == (0.75, 0.25)
    assert agreement.matched_iou == pytest.approx((1 + 0 + 0 + 1) / 4)
    equal = ReaderAgreement.of([A, NONE], [A, NONE], 2)
    assert (equal.energy_distance, equal.matched_iou, equal.majority_dice) == pytest.approx((0, 1, 1))
    nothing = ReaderAgreement.of([NONE], [NONE, NONE], 2)
    assert (nothing.energy_distance, nothing.matched_iou, nothing.majority_dice) == (0, 1, 1)


def test_background_changes_no_agreement_and_costs_little_memory() -> None:
    """Most of a scan is marked by nobody: sums over all of it took hundreds of bytes a voxel, gigabytes for a head."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 3, (6, 6, 6)).astype(np.uint8) for _ in range(18)]
    large = [np.pad(labels, 29) for labels in small]
    tracemalloc.start()
    found = ReaderAgreement.of(large[:16], large[16:], 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * large[0].size
    expected = ReaderAgreement.of(small[:16], small[16:], 3)
    for name in ("energy_distance", "matched_iou", "majority_dice", "empty_samples", "empty_readers"):
        assert getattr(found, name) == getattr(expected, name)
    np.testing.assert_array_equal(found.frequencies.count, expected.frequencies.count)
    assert found.frequencies.ece == expected.frequencies.ece

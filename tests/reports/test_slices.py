"""Grey values of scans."""

from __future__ import annotations

import numpy as np

from medseg_diffusion.reports.slices import densest_slices, display_range, map_limit, plane


def test_display_range_ignores_background_and_outliers() -> None:
    image = np.zeros(10_000)
    image[:2000] = np.linspace(100, 200, 2000)
    image[0] = 1e6
    low, high = display_range(image)
    assert low == 0 and 190 < high < 210
    assert display_range(np.full(3, 5.0)) == (5.0, 6.0)


def test_slices_are_the_fullest_of_each_part() -> None:
    amount = np.zeros((4, 4, 20))
    amount[..., 3] = amount[..., 9] = 1
    amount[..., 4] = amount[..., 12] = 2
    assert [where.index for where in densest_slices(amount, 2, (1, 1, 1), 2)] == [4, 12]
    assert [where.index for where in densest_slices(amount, 2, (1, 1, 1), 1)] == [4]
    assert [where.index for where in densest_slices(np.zeros((4, 4, 9)), 2, (1, 1, 1), 3)] == [1, 4, 7]


def test_the_number_of_a_slice_says_from_which_side_it_counts() -> None:
    """Arrays are LAS, files often are not: slice 20 of 42 from the right is slice 23 of a RAS file."""
    titles = [plane(axis, 19, (42, 51, 28), (1, 1, 1)).title for axis in range(3)]
    assert titles == ["Sagittal 20 from R", "Coronal 20 from P", "Axial 20 from I"]


def test_one_outlier_does_not_set_the_scale_of_a_map() -> None:
    values = np.linspace(0, 1, 20_000)
    values[0] = 1e6
    assert 0.99 < map_limit(values) < 1.01
    assert map_limit(np.zeros(8)) == 1.0

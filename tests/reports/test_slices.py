"""Grey values of scans."""

from __future__ import annotations

import numpy as np

from medseg_diffusion.reports.slices import display_range


def test_display_range_ignores_background_and_outliers() -> None:
    image = np.zeros(10_000)
    image[:2000] = np.linspace(100, 200, 2000)
    image[0] = 1e6
    low, high = display_range(image)
    assert low == 0 and 190 < high < 210
    assert display_range(np.full(3, 5.0)) == (5.0, 6.0)

"""Plots: overlays to scale and upright, box plots of any input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg_diffusion.reports.plots import box_plot, overlay
from tests.helpers.pictures import extent, pixels


def test_overlay_is_to_scale() -> None:
    # 20 x 10 x 5 voxels of 1 x 2 x 6 mm: 20 mm wide, 20 mm deep, 30 mm high. Without an image the reference is grey.
    reference = np.zeros((40, 20, 10), np.uint8)
    reference[10:30, 5:15, 3:8] = 1
    picture = pixels(overlay(reference, np.zeros_like(reference), (1.0, 2.0, 6.0)))
    grey = np.all(np.abs(picture - 0.3) < 0.02, axis=-1)
    # All three planes are 40 mm wide: three equal columns.
    sizes = [extent(part) for part in np.array_split(grey, 3, axis=1)]
    # Outlines cover a few pixels at each edge.
    for (rows, columns), (tall, wide) in zip(sizes, [(20, 20), (30, 20), (30, 20)], strict=True):
        assert rows / columns == pytest.approx(tall / wide, rel=0.06)
    assert sizes[0][1] / sizes[1][1] == pytest.approx(1, rel=0.03)


def test_overlay_has_anterior_up_and_the_right_side_on_the_left() -> None:
    # A 2D image has one panel: voxel (I, J) = (2, 9) is right and near the front, as the axes are LAS.
    reference = np.zeros((12, 12, 1), np.uint8)
    reference[1:4, 8:11] = 1
    picture = pixels(overlay(reference, np.zeros_like(reference), (1.0, 1.0, 1.0)))
    rows, columns = np.nonzero(np.all(np.abs(picture - 0.3) < 0.02, axis=-1))
    assert columns.mean() < picture.shape[1] / 2 and rows.mean() < picture.shape[0] / 2


def test_overlay_draws_both_outlines_in_their_colours() -> None:
    reference, prediction = np.zeros((2, 16, 16, 16), np.uint8)
    reference[2:8, 2:8, 2:8] = prediction[9:14, 9:14, 9:14] = 1

    def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
        return int(np.all(np.abs(picture * 255 - colour) < 12, axis=-1).sum())

    orange, blue = (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)
    image = np.random.default_rng(0).random(reference.shape)
    both = pixels(overlay(reference, reference * 0 + prediction, (1, 1, 1), image))
    # The legend has both colours too: compare with pictures that lack one of the masks.
    no_prediction = pixels(overlay(reference, prediction * 0, (1, 1, 1), image))
    assert count(no_prediction, orange) > 500
    assert count(both, orange) >= count(no_prediction, orange) * 0.9
    no_reference = pixels(overlay(reference * 0, prediction, (1, 1, 1), image))
    assert count(no_reference, blue) > count(no_prediction, blue) + 300
    assert count(no_reference, orange) < count(no_prediction, orange) / 2


def test_box_plot_of_nothing_and_of_one() -> None:
    assert pixels(box_plot([])).size
    assert pixels(box_plot([("a", [math.nan]), ("b", [0.5]), ("b", [0.0, 1.0])])).size

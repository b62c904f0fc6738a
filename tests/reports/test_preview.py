"""Still pictures: to scale, in the radiological convention, with the anatomy visible, of any shape."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy.ndimage import label

from medseg_diffusion.reports.preview import Map, Outlines, Still, preview_png, still
from medseg_diffusion.reports.slices import to_png
from medseg_diffusion.reports.theme import CLASSES
from tests.helpers.pictures import pixels


def near(picture: np.ndarray, colour: str, tolerance: float = 0.08) -> np.ndarray:
    return np.all(np.abs(picture - to_rgb(colour)) < tolerance, axis=-1)


def outlines(picture: np.ndarray, colour: str) -> list[tuple[int, int, int, int]]:
    """Top, bottom, left and right of each closed line of a colour: of what is not as flat as the legend's."""
    parts, count = label(near(picture, colour), np.ones((3, 3)))
    found = [np.nonzero(parts == part) for part in range(1, count + 1)]
    boxes = [(int(r.min()), int(r.max()), int(c.min()), int(c.max())) for r, c in found]
    return [box for box in boxes if box[1] - box[0] > 10]


def test_preview_is_to_scale_and_outlined() -> None:
    image = np.random.default_rng(0).random((20, 20, 10)) * 0.01
    labels = np.zeros(image.shape, np.int32)
    labels[5:15, 5:15, 2:8] = 2
    picture = pixels(preview_png(image, labels, (1.0, 1.0, 4.0), {2: "thing"}))
    boxes = outlines(picture, CLASSES[1])  # the colour of the value 2, whether or not there is a 1
    assert len(boxes) == 9, "three slices of three planes"
    sizes = [(bottom - top) / (right - left) for top, bottom, left, right in boxes]
    # A square of 10 mm in the axial row on top, and 24 mm high in the others.
    assert sorted(sizes) == pytest.approx([1.0] * 3 + [2.4] * 6, rel=0.08)


def test_a_plain_slice_stands_left_of_each_outlined_one() -> None:
    image = np.random.default_rng(0).random((20, 20, 20))
    labels = np.zeros(image.shape, np.uint8)
    labels[8:12, 8:12, 8:12] = 1
    picture = pixels(to_png(still(Still(image, (1, 1, 1), [Outlines(labels, "#ff0000")]), slices_per_plane=1)))
    for top, bottom, left, right in outlines(picture, "#ff0000"):
        assert left > picture.shape[1] / 2
        # The anatomy is seen inside the outline as it is in the plain slice.
        panel = picture.shape[1] / 2
        inside = picture[top + 6 : bottom - 6, left + 6 : right - 6]
        beside = picture[top + 6 : bottom - 6, round(left - panel) + 6 : round(right - panel) + 6]
        assert np.ptp(inside) > 0.3 and abs(inside.mean() - beside.mean()) < 0.1


def test_the_right_side_is_on_the_left_and_the_nose_of_sagittal_slices_too() -> None:
    # Axes are LAS: low I is the patient's right, high J is anterior, high K superior.
    image, labels = np.zeros((2, 24, 24, 24))
    labels[2:5, 19:22, 19:22] = 1
    picture = pixels(to_png(still(Still(image, (1, 1, 1), [Outlines(labels, "#ff0000")]), slices_per_plane=1)))
    boxes = outlines(picture, "#ff0000")
    assert len(boxes) == 3
    panel = picture.shape[1] / 2
    for row, (top, bottom, left, right) in enumerate(sorted(boxes)):
        assert (left + right) / 2 - panel < 0.3 * panel  # right, right, anterior
        assert (top + bottom) / 2 - row * picture.shape[0] / 3 < 0.2 * picture.shape[0]


def test_marks_are_left_out_where_sides_are_unknown() -> None:
    image, labels = np.zeros((2, 16, 16, 1))
    marked = pixels(preview_png(image, labels, (1, 1, 1), {}))
    unmarked = pixels(preview_png(image, labels, (1, 1, 1), {}, oriented=False))
    white = [int((picture.min(axis=-1) > 0.95).sum()) for picture in (marked, unmarked)]
    assert white[0] > white[1] + 50


def test_a_map_lies_over_the_anatomy() -> None:
    stripes = np.broadcast_to((np.arange(24) // 3 % 2)[:, None, None], (24, 24, 24)).astype(float)
    values = np.zeros(stripes.shape)
    values[:, 12:] = 0.5
    drawn = Still(stripes, (1, 1, 1), [], Map(values, "Anomaly score", "plasma"))
    picture = pixels(to_png(still(drawn, slices_per_plane=1)))
    coloured = np.ptp(picture, axis=-1) > 0.15
    assert coloured.sum() > 2000
    # The stripes are seen through the colour.
    shades = picture[coloured].mean(axis=-1)
    assert np.percentile(shades, 90) - np.percentile(shades, 10) > 0.2


@pytest.mark.parametrize(("peak", "title"), [(0.5, "Score"), (0.9, "Score (brightest: 0.5 or more)")])
def test_the_colour_bar_of_a_map_says_that_it_is_clipped(peak: float, title: str) -> None:
    values = np.full((24, 24, 24), 0.5)
    values[3, 4, 5] = peak
    figure = still(Still(values, (1, 1, 1), [], Map(values, "Score", "plasma")), slices_per_plane=1)
    assert figure.axes[-1].get_title() == title


@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 9, 7), (6, 6, 6)])
def test_flat_and_empty_images(shape: tuple[int, int, int]) -> None:
    picture = pixels(preview_png(np.zeros(shape), np.zeros(shape, int), (1, 1, 1), {1: "a"}, np.zeros(shape)))
    assert picture.size


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(2, 2, 3\)"):
        preview_png(np.zeros((2, 2, 2)), np.zeros((2, 2, 3), int), (1, 1, 1), {})

"""Previews: to scale, coloured, of any shape."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_diffusion.reports.preview import preview_png
from tests.helpers.pictures import extent, pixels


def test_preview_is_to_scale_and_coloured() -> None:
    image = np.random.default_rng(0).random((20, 20, 10)) * 0.01
    labels = np.zeros(image.shape, np.int32)
    labels[5:15, 5:15, 2:8] = 2
    picture = pixels(preview_png(image, labels, (1.0, 1.0, 4.0), {2: "thing"}, slices_per_plane=1))
    # Pink over grey: red clearly above green, and nothing else is coloured.
    coloured = picture[..., 0] - picture[..., 1] > 0.2
    rows = np.flatnonzero(coloured.any(axis=1))
    bands = [band for band in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(band) > 20]
    assert len(bands) == 3, "one band per plane; the legend is thinner"
    sizes = [extent(coloured[band]) for band in bands]
    for (height, width), (tall, wide) in zip(sizes, [(10, 10), (24, 10), (24, 10)], strict=True):
        assert height / width == pytest.approx(tall / wide, rel=0.06)


def test_preview_adds_a_row_for_the_uncertainty() -> None:
    image = np.random.default_rng(0).random((12, 12, 6))
    labels = np.zeros(image.shape, np.uint8)
    plain = pixels(preview_png(image, labels, (1, 1, 1), {}))
    more = pixels(preview_png(image, labels, (1, 1, 1), {}, uncertainty=image))
    assert more.shape[0] > plain.shape[0] * 1.2 and more.shape[1] == plain.shape[1]


@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 9, 7), (6, 6, 6)])
def test_preview_of_flat_and_empty_images(shape: tuple[int, int, int]) -> None:
    picture = pixels(preview_png(np.zeros(shape), np.zeros(shape, int), (1, 1, 1), {1: "a"}, np.zeros(shape)))
    assert picture.size


def test_preview_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(2, 2, 3\)"):
        preview_png(np.zeros((2, 2, 2)), np.zeros((2, 2, 3), int), (1, 1, 1), {})

"""Scans on a generator's grid and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.volumes.fitting import from_generator_grid, labels_to_generator_grid, to_generator_grid


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=3, max_size=3), more=st.lists(st.integers(0, 7), min_size=3, max_size=3)
)
def test_a_padded_volume_comes_back_bit_for_bit(shape, more) -> None:
    size = [n + m for n, m in zip(shape, more, strict=True)]
    image = normal(2, 1, *shape)
    there = to_generator_grid(image, size)
    assert there.shape == (2, 1, *size) and float(there.sum()) == pytest.approx(
        float(image.sum()) - (there.numel() - image.numel()), abs=1e-2
    )
    assert torch.equal(from_generator_grid(there, shape), image)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12))
def test_a_slice_that_fits_without_resizing_comes_back_bit_for_bit(rows, columns) -> None:
    side = max(rows, columns)
    image = normal(1, 2, rows, columns)
    assert torch.equal(from_generator_grid(to_generator_grid(image, (side, side)), (rows, columns)), image)


def test_anterior_is_up_and_the_aspect_is_kept() -> None:
    slice_ = torch.zeros(1, 1, 20, 40)  # RAS: first axis to the right, second to the front
    slice_[..., 36:] = 1  # the front
    slice_[..., 16:, :4] = 2  # the right, at the back; half of all becomes one
    picture = to_generator_grid(slice_, (20, 20), fill=0.0)[0, 0]
    assert picture.shape == (20, 20)
    assert float(picture[0, 5:15].mean()) == pytest.approx(1, abs=0.05) and float(picture[:, :4].abs().sum()) == 0
    assert float(picture[19, 13]) == pytest.approx(2, abs=0.3)


def test_a_smooth_map_survives_the_way_there_and_back() -> None:
    x, y = torch.meshgrid(torch.linspace(0, 3, 50), torch.linspace(0, 3, 70), indexing="ij")
    image = (x.sin() * y.cos())[None, None]
    back = from_generator_grid(to_generator_grid(image, (48, 48), fill=0.0), (50, 70))
    assert back.shape == image.shape
    assert float((back - image)[..., 3:-3, 3:-3].abs().max()) < 0.02


def test_labels_keep_their_values_and_places() -> None:
    labels = torch.zeros(1, 30, 20, dtype=torch.int64)
    labels[0, 10:20, 5:15] = 3
    labels[0, 20:28, 5:15] = 7
    there = labels_to_generator_grid(labels, (15, 15))
    assert sorted(torch.unique(there).tolist()) == [0, 3, 7]
    assert int((there == 3).sum()) == 25 and int((there == 7).sum()) == 20
    assert torch.equal(
        labels_to_generator_grid(labels, (30, 30)),
        to_generator_grid(labels[:, None].float(), (30, 30), 0.0)[:, 0].long(),
    )


def test_what_is_padded_is_0_even_where_everything_is_labelled() -> None:
    there = labels_to_generator_grid(torch.full((1, 2, 4), 2, dtype=torch.uint8), (4, 4))
    assert there.dtype == torch.uint8 and int((there == 2).sum()) == 8 and int((there == 0).sum()) == 8


def test_a_cut_volume_is_filled_outside() -> None:
    image = normal(1, 1, 9, 4, 4)
    there = to_generator_grid(image, (4, 4, 4))
    back = from_generator_grid(there, (9, 4, 4), fill=5.0)
    assert torch.equal(back[:, :, 2:6], image[:, :, 2:6]) and bool((back[:, :, :2] == 5).all())

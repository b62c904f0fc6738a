"""Gaussian-weighted windows against MONAI's: the same windows in the same order, and the same numbers to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from torch import Tensor

from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.methods.segment import segment
from medseg_diffusion.methods.windows import Windows, count_batches, gaussian_weights, predict_in_windows
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import Sampler


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Recorder:
    """Three channels that depend on a window's intensities and corner, so that no window can be taken for another."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.corners: list[tuple[int, ...]] = []

    def __call__(self, patches: Tensor, corners: Sequence[tuple[int, ...]]) -> Tensor:
        self.batches.append(patches.clone())
        self.corners += corners
        shift = torch.tensor([sum((i + 1) * first for i, first in enumerate(corner)) for corner in corners])
        value = patches.sum(1) + shift.reshape(-1, *[1] * (patches.ndim - 2))
        return torch.stack([value, value.sin(), value.exp()], 1)


def of_monai(
    predict: Callable[[Tensor, list[tuple[int, ...]]], Tensor],
) -> Callable[[Tensor, list[list[slice]]], Tensor]:
    return lambda patches, places: predict(patches, [(p[0].start, *(axis.start for axis in p[2:])) for p in places])


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_windows_are_those_of_monai(data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from([2, 3]), "dims")
    side = st.integers(1, 13 if dims == 3 else 25)
    spatial = tuple(data.draw(side) for _ in range(dims))
    windows = Windows(tuple(data.draw(side) for _ in range(dims)), data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.8])))
    image = normal(data.draw(st.integers(1, 3), "images"), data.draw(st.integers(1, 2), "channels"), *spatial)
    batch = data.draw(st.integers(1, 5), "batch")
    ours, theirs = Recorder(), Recorder()
    found = predict_in_windows(image, windows, batch, ours)
    expected = sliding_window_inference(
        image, windows.of(spatial), batch, of_monai(theirs), overlap=windows.overlap, mode="gaussian", with_coord=True
    )
    assert ours.corners == theirs.corners
    # The type of a number is part of the seed that is made of it.
    assert [derive_seed(*corner) for corner in ours.corners] == [derive_seed(*corner) for corner in theirs.corners]
    assert [len(patches) for patches in ours.batches] == [len(patches) for patches in theirs.batches]
    assert all(map(torch.equal, ours.batches, theirs.batches))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(1,), (8, 8), (7, 4), (5, 6, 9), (1, 3, 32), (48, 48, 48)], ids=str)
def test_weights_are_those_of_monai(size: tuple[int, ...]) -> None:
    weights = gaussian_weights(size, torch.empty(1))
    assert torch.equal(weights, compute_importance_map(size, mode="gaussian", sigma_scale=0.125))
    assert weights.min() >= 1e-3 and weights.max() <= 1


def test_an_image_is_left_as_it_is() -> None:
    """A prediction that is the window itself is a view of the image."""
    image = normal(1, 2, 9, 7)
    before = image.clone()
    found = predict_in_windows(image, Windows((4, 4), 0.5), 1, lambda patches, corners: patches)
    assert torch.equal(image, before)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", [None, (5, 4, 3), (4, 4, 4), (20, 3, 20)], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_batches_are_counted_before_they_are_made(dims, size, overlap, batch_size) -> None:
    class Half:
        def probabilities(
            self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
        ) -> Tensor:
            return torch.full((len(image), len(seeds[0]), 2, *image.shape[2:]), 0.5)

    image, calls = normal(1, 11, 9, 6), []
    windows = Windows(size and size[:dims], overlap, batch_size)
    segment(Half(), image, [1, 2], DDIM(), [10, 0], windows, dims, lambda: calls.append(None))
    assert len(calls) == count_batches(image.shape, windows, dims, 2, image.device)

"""Jittered passes undo their changes, and depend on their seeds alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg_diffusion.tasks import jitter
from medseg_diffusion.tasks.jitter import Jitter

SEEDS = [[3, 4, 5, 6, 7, 8], [13, 14, 15, 16, 17, 18]]


def by_intensity(image: Tensor) -> Tensor:
    """Logits that depend on the voxel's own intensity."""
    return torch.cat([-3 * image, image, 2 * image.square()], 1)


def by_position(image: Tensor) -> Tensor:
    """Logits of background, the first and the second half of the first axis, whatever the image shows."""
    half = image.shape[2] // 2
    sides = torch.zeros(len(image), 3, *image.shape[2:])
    sides[:, 1, :half], sides[:, 2, half:] = 5, 5
    return sides


@pytest.mark.parametrize("shape", [(2, 1, 6, 5, 4), (2, 1, 7, 6)])
def test_what_is_changed_is_undone(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jitter, "GAIN", 0.0)
    monkeypatch.setattr(jitter, "SHIFT", 0.0)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    passes = Jitter(tuple(range(len(shape) - 2))).passes(by_intensity, image, SEEDS)
    expected = by_intensity(image).softmax(1)
    assert passes.shape == (2, 6, 3, *shape[2:])
    torch.testing.assert_close(passes, expected[:, None].expand_as(passes))


def test_passes_differ_and_depend_on_their_seeds_alone() -> None:
    image = torch.randn(2, 1, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    passes = Jitter((0,)).passes(by_intensity, image, SEEDS)
    assert len({tuple(one.flatten().tolist()) for one in passes[0]}) == 6
    alone = Jitter((0,)).passes(by_intensity, image[1:], [[SEEDS[1][4]]])
    torch.testing.assert_close(alone[0, 0], passes[1, 4])


def test_a_mirrored_pass_swaps_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the swap, half of the passes would call the left side right."""
    monkeypatch.setattr(jitter, "OFFSET", 0)
    image = torch.zeros(2, 1, 6, 5, 4)
    expected = by_position(image).argmax(1)
    swapped = Jitter((0,), torch.tensor([0, 2, 1])).passes(by_position, image, SEEDS).argmax(2)
    assert torch.equal(swapped, expected[:, None].expand_as(swapped))
    plain = Jitter((0,)).passes(by_position, image, SEEDS).argmax(2)
    assert not torch.equal(plain, swapped)

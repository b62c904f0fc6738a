"""Patches cover the image, and training looks at the noised patch alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian
from medseg_diffusion.tasks.patched import Box, PatchedDiffusion, boxes
from tests.helpers.diffusion import LINEAR, normal


def extent(box: Box) -> list[tuple[int, int]]:
    return [(axis.start, axis.stop) for axis in box]


def test_half_of_each_side_gives_4_patches_in_2d_and_8_in_3d() -> None:
    assert [extent(box) for box in boxes((4, 6))] == [
        [(0, 2), (0, 3)],
        [(0, 2), (3, 6)],
        [(2, 4), (0, 3)],
        [(2, 4), (3, 6)],
    ]
    assert len(boxes((4, 4, 4))) == 8
    assert [extent(box) for box in boxes((5, 1))] == [[(0, 3), (0, 1)], [(2, 5), (0, 1)]]
    assert [extent(box)[0] for box in boxes((10, 4), 4)] == [(0, 4), (4, 8), (6, 10)]


@settings(deadline=None, max_examples=80)
@given(size=st.lists(st.integers(1, 9), min_size=2, max_size=3), patch=st.none() | st.integers(1, 9))
def test_patches_are_of_one_size_and_cover_the_image(size, patch) -> None:
    if patch is not None and patch > min(size):
        return
    grid = boxes(size, patch)
    count = torch.zeros(size)
    for box in grid:
        assert list(count[box].shape) == [(n + 1) // 2 if patch is None else patch for n in size]
        count[box] += 1
    assert float(count.min()) == 1
    if all(n % 2 == 0 if patch is None else n % patch == 0 for n in size):
        assert float(count.max()) == 1


class Given(nn.Module):
    """Answers with its parameter whatever it sees, and notes what that is."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        self.seen, self.timesteps = x, timesteps
        return self.answer


@pytest.mark.parametrize(("shape", "patch"), [((1, 6, 8), None), ((1, 4, 6, 4), None), ((2, 5, 7), 3)])
def test_training_looks_at_the_noised_patch_alone(shape, patch) -> None:
    images, network = 0.3 * normal(5, 6, *shape), Given(normal(6, 6, *shape))
    task = PatchedDiffusion(
        NetworkDenoiser(network, LINEAR, "x0"), lambda size, own, like=None: torch.full_like(like, 2.0), patch
    )
    assert task.network is network
    loss = task({"image": images, "seed": torch.arange(6)})
    loss.backward()

    changed = network.seen != images
    for mask in changed.all(dim=1):
        where = mask.nonzero()
        box = tuple(slice(int(a), int(b) + 1) for a, b in zip(where.amin(0), where.amax(0), strict=True))
        assert box in boxes(shape[1:], patch) and bool(mask[box].all()), "a patch of the grid, all of it"
    assert torch.equal(changed.all(dim=1), changed.any(dim=1)), "all channels"
    alpha, sigma = LINEAR.scales(network.timesteps + 1, images)
    torch.testing.assert_close(network.seen[changed], (alpha * images + 2 * sigma)[changed])
    torch.testing.assert_close(loss, (network.answer - images).abs()[changed].mean())
    grad = network.answer.grad
    assert grad is not None and torch.equal(grad != 0, changed)


def test_patch_time_and_noise_are_those_of_the_examples_seed() -> None:
    images = 0.3 * normal(7, 40, 1, 4, 4)
    network = Given(torch.zeros(1, 1, 4, 4).double())
    task = PatchedDiffusion(NetworkDenoiser(network, LINEAR, "x0"), gaussian)
    seeds = torch.arange(40)
    loss, seen, times = task({"image": images, "seed": seeds}), network.seen, network.timesteps
    singles = []
    for i in (39, 3, 12):
        singles.append(task({"image": images[i : i + 1], "seed": seeds[i : i + 1]}))
        torch.testing.assert_close(network.seen[0], seen[i], rtol=0, atol=0)
        assert int(network.timesteps) == int(times[i])
    assert len({value.item() for value in singles}) == 3
    assert task({"image": images, "seed": seeds}).item() == loss.item()
    changed = (seen != images).flatten(1)
    patterns, counts = torch.unique(changed, dim=0, return_counts=True)
    assert len(patterns) == 4 and int(counts.min()) >= 3, "all patches have their turn"
    assert int(times.min()) < 200 and int(times.max()) > 800

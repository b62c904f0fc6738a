"""Patched restoration: every voxel from one patch, and only that patch is noised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.methods.patched import Patched
from medseg_diffusion.tasks.patched import boxes
from tests.helpers.diffusion import LINEAR, normal
from tests.helpers.gaussian_walks import MEAN, NORMAL, SHAPES, STD, Spy, no_noise


@settings(deadline=None, max_examples=40)
@given(size=st.lists(st.integers(2, 7), min_size=2, max_size=3), patch=st.sampled_from([None, 1, 2]))
def test_every_voxel_is_taken_from_one_patch_that_holds_it(size, patch) -> None:
    """A denoiser that answers with the number of the patch; where patches overlap, the last one is shown."""

    class Numbers:
        schedule = LINEAR

        def __call__(self, x_t: Tensor, t: Tensor, cond: object = None) -> Prediction:
            number = torch.arange(len(x_t)) // 2  # 2 images
            x0 = number.reshape(-1, *[1] * len(size), 1).expand_as(x_t).to(x_t) / 1000
            return Prediction(x0, x0)

    found = Patched(Numbers(), no_noise, size, patch=patch).healthy(torch.full((2, 2, *size), torch.nan), [0, 0])
    wanted = torch.empty(size)
    for i, box in enumerate(boxes(size, patch)):
        wanted[box] = i / 1000
    torch.testing.assert_close(found, wanted.expand_as(found))


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_patch_is_noised_when_it_is_restored(shape) -> None:
    images, spy = 0.3 * normal(3, 2, *shape), Spy(NORMAL)
    eps = normal(4, 2, *shape)
    detector = Patched(spy, lambda size, own, like=None: eps, shape[1:], time=400)
    found = detector.healthy(images, [0, 1])
    alpha, sigma = (float(value) for value in LINEAR.scales(400, images))
    (seen,) = spy.inputs
    for x, box in zip(seen.unflatten(0, (-1, 2)), boxes(shape[1:]), strict=True):
        place = (slice(None), slice(None), *box)
        torch.testing.assert_close(x[place], (alpha * images + sigma * eps)[place])
        x[place] = images[place]
        assert torch.equal(x, images)
    # The exact denoiser looks at no neighbour: regression of x0 on x_t, voxel by voxel.
    x_t = alpha * images + sigma * eps
    wanted = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
    torch.testing.assert_close(found, wanted)

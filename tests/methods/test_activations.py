"""Activations of a generator: the same in any batch, and only those that are wanted."""

from __future__ import annotations

import pytest
import torch

from medseg_diffusion.diffusion.noise import generators as random_generators
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.simplex import simplex
from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.methods.activations import Activations
from medseg_diffusion.tasks.image import ImageDiffusion
from tests.helpers.pixel_classifiers import activations, two_halves


def test_equal_images_have_equal_activations_in_any_batch() -> None:
    image, _ = two_halves(2)
    alone = activations()(image[None])
    together = activations()(torch.stack([torch.zeros_like(image), image]))
    assert len(alone) == 4  # two times, two blocks
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(both[1], one[0], rtol=1e-4, atol=1e-5)


def test_no_block_is_computed_after_the_last_wanted_one() -> None:
    net = activations(blocks=("decoder.0", "decoder.1"))
    called: list[int] = []
    for i, block in enumerate(net.task.denoiser.network.decoder):
        block.register_forward_hook(lambda *args, i=i: called.append(i))
    net(two_halves(2)[0][None])
    assert called == [0, 1, 0, 1]  # two times


def test_generators_without_such_activations_are_refused() -> None:
    task = activations().task
    with pytest.raises(UsageError, match=r"no block decoder\.9; it has encoder\.0 to decoder\.3"):
        Activations(task, None, (1, 16, 16), blocks=["decoder.9"])
    with pytest.raises(UsageError, match="time 1000 is beyond"):
        Activations(task, None, (1, 16, 16), times=[1000], blocks=[])
    with pytest.raises(ModelError, match="side of 15 is no multiple of 2"):
        Activations(task, None, (1, 16, 15), blocks=[])
    upsampler = ImageDiffusion(task.denoiser, Simple(), factor=2)
    with pytest.raises(ModelError, match="generators of whole images"):
        Activations(upsampler, None, (1, 16, 16), blocks=[])


def test_the_noise_is_that_of_the_generators_training() -> None:
    task = ImageDiffusion(activations().task.denoiser, Simple(), noise=simplex)
    found = Activations(task, None, (1, 16, 16), blocks=[], seed=3).noise
    torch.testing.assert_close(found, simplex((1, 16, 16), random_generators([3])))

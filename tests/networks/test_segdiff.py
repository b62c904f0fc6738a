"""SegDiff encodes the image once, and apart from the noisy mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import fold
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.tasks.mask import MaskDiffusion, MaskEncoding
from tests.helpers.networks import BOTH, awake, normal, size, small


def segdiff(dims: int, patch_size: int = 1) -> SegDiff:
    unet = small(dims, in_channels=1, out_channels=1, patch_size=patch_size)
    return awake(SegDiff(unet, image_channels=2, encoder_channels=6, encoder_blocks=1, encoder_growth=3))


@BOTH
@pytest.mark.parametrize("patch_size", [1, 2])
def test_segdiff_adds_the_image_after_the_first_convolution(dims, patch_size) -> None:
    """E sees F(x_t) + G(I): here the sum is put in by hand, through a hook on the first convolution."""
    network = segdiff(dims, patch_size)
    spatial = size(dims, 7, 9, 6)
    x, image, t = normal(15, 2, 1, *spatial), normal(16, 2, 2, *spatial), torch.tensor([3, 400])
    cond = network.encode_condition(image)
    assert list(cond) == ["stem"]
    folded = [-(-n // network.unet.factor) * 2 for n in spatial]
    assert cond["stem"].shape == (2, 8, *folded)
    out = network(x, t, cond)
    assert out.shape == x.shape
    padded = fold(network.unet.padded(image), patch_size)
    hook = network.unet.stem.register_forward_hook(lambda module, args, h: h + network.image_encoder(padded))
    torch.testing.assert_close(network(x, t, None), out, rtol=0, atol=0)
    hook.remove()
    assert not torch.allclose(network(x, t, None), out)


@torch.no_grad()
def test_the_image_encoder_is_made_of_scaled_residuals() -> None:
    """y = x + 0.2 blocks(x), each dense block x + 0.2 convolutions(x): seen with convolutions that add a constant."""
    encoder: Any = segdiff(2).image_encoder
    for parameter in encoder.trunk[0].parameters():
        parameter.zero_()
    x = normal(17, 1, 6, 5, 5)
    torch.testing.assert_close(encoder.trunk[0](x), x + 0.2 * x)
    for dense in encoder.trunk[0].blocks:
        nn.init.constant_(dense.convs[-1].bias, 1.0)
    torch.testing.assert_close(encoder.trunk[0](x), x + 0.2 * (x + 3 * 0.2))


@torch.no_grad()
def test_the_features_of_the_image_never_drown_those_of_the_mask() -> None:
    """Without a normalisation they grow without bound in training: then samples of one image are all equal."""
    network = segdiff(2)
    encoder: Any = network.image_encoder
    image, t = normal(15, 1, 2, 16, 16), torch.tensor([400])
    before = network.encode_condition(image)["stem"]
    encoder.last.weight.mul_(1e7)
    encoder.last.bias.mul_(1e7)
    after = network.encode_condition(image)
    torch.testing.assert_close(after["stem"], before, rtol=1e-3, atol=1e-3)
    one, other = (network(normal(seed, 1, 1, 16, 16), t, after) for seed in (16, 17))
    assert (one - other).std() > 0.1 * one.std()


class CountingEncoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.sizes: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        self.sizes.append(len(image))
        return self.encoder(image)


@BOTH
def test_an_image_is_encoded_once_for_all_samples_and_steps(dims) -> None:
    network: Any = segdiff(dims)
    network.image_encoder = CountingEncoder(network.image_encoder)
    calls: list[int] = []
    network.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    schedule = linear(100)
    model = MaskDiffusion(NetworkDenoiser(network, schedule, "x0"), MaskEncoding(2), Simple())
    image = normal(18, 2, 2, *[6] * dims)
    seeds = [[1, 2, 3], [4, 5, 6]]
    found = model.probabilities(image, seeds, DDIM(), spaced(schedule, 4, "trailing"))
    assert found.shape == (2, 3, 2, *[6] * dims)
    assert network.image_encoder.sizes == [2]
    assert calls == [6] * 4


@BOTH
def test_image_features_do_not_depend_on_the_noisy_mask(dims) -> None:
    """The condition is made from the image alone, and a walk leaves it as it was."""
    network, image = segdiff(dims), normal(19, 1, 2, *[6] * dims)
    before = network.encode_condition(image)["stem"].clone()
    cond = network.encode_condition(image)
    for seed in (1, 2):
        network(normal(seed, 1, 1, *[6] * dims), torch.tensor([seed]), cond)
    torch.testing.assert_close(cond["stem"], before, rtol=0, atol=0)
    assert not torch.allclose(network.encode_condition(image + 1)["stem"], before)


@BOTH
def test_samples_of_an_image_differ_by_their_seeds_only(dims) -> None:
    network, schedule = segdiff(dims), linear(100)
    model = MaskDiffusion(NetworkDenoiser(network, schedule, "x0"), MaskEncoding(2), Simple())
    image = normal(20, 1, 2, *[6] * dims)
    found = model.probabilities(image, [[7, 8, 7]], DDIM(), [100, 50, 0])[0]
    torch.testing.assert_close(found[0], found[2])
    assert not torch.allclose(found[0], found[1])

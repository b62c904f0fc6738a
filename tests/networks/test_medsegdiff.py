"""The FF-Parser of MedSegDiff against closed forms, and both versions' networks as the tasks use them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from medseg_diffusion.networks.medsegdiff import FFParser, MedSegDiff, hat_weights, stage_ends
from medseg_diffusion.networks.medsegdiff_v2 import MedSegDiffV2
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import UNet
from tests.helpers.medsegdiff import BOTH, NETWORKS, SIZES, noise, small

# ---- FF-Parser -------------------------------------------------------------------------------------------------------


@SIZES
def test_a_unit_attention_is_the_identity(size) -> None:
    x = noise(2, 3, *size)
    torch.testing.assert_close(FFParser(len(size), 3, bands=9)(x), x, rtol=1e-5, atol=1e-5)


def cosine(size: int, cycles: int) -> Tensor:
    """A horizontal cosine of ``cycles`` over an image of side ``size``, (1, 1, size, size)."""
    return torch.cos(2 * torch.pi * cycles * torch.arange(size) / size).expand(1, 1, size, size)


def test_a_low_pass_learnt_at_64_holds_at_48_and_65() -> None:
    """Frequencies are cycles per position, whatever the size; numbers of cycles that fit leave no leakage."""
    parser = FFParser(2, 1, bands=17)
    optimizer = torch.optim.Adam(parser.parameters(), lr=0.1)
    for step in range(60):
        image = noise(8, 1, 64, 64, seed=step)
        spectrum = torch.fft.fft2(image)
        along = [torch.fft.fftfreq(64).abs()[:, None], torch.fft.fftfreq(64).abs()[None]]
        wanted = torch.fft.ifft2(spectrum * (torch.maximum(*along) < 0.25)).real
        loss = (parser(image) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for size in (48, 65):
        low, high = cosine(size, round(size / 16)), cosine(size, round(3 * size / 8))
        with torch.no_grad():
            assert float((parser(low + high) - low).abs().max()) < 0.1
            assert float(parser(high).abs().max()) < 0.1 * float(high.abs().max())


def test_interpolation_is_exact_at_its_nodes_and_linear_between() -> None:
    weights = hat_weights(torch.tensor([-0.5, 0.0, 0.125, 0.5]), -0.5, 0.5, 5)
    assert weights.tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 1]]


# ---- whole networks --------------------------------------------------------------------------------------------------


@BOTH
@NETWORKS
def test_gradients_reach_every_parameter(name, dims) -> None:
    network = small(name, dims)
    cond = network.encode_condition(noise(2, 3, *[10] * dims))
    out = network(noise(2, 2, *[10] * dims, seed=1), torch.tensor([3, 700]), cond)
    assert out.shape == (2, 2, *[10] * dims)
    (out.square().mean() + cond.get("anchor", out).square().mean()).backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@NETWORKS
def test_a_result_depends_on_neither_its_batch_nor_its_place_in_it(name) -> None:
    network = small(name, 2).eval()
    image, x, t = noise(3, 3, 12, 9), noise(3, 2, 12, 9, seed=1), torch.tensor([5, 500, 999])
    with torch.no_grad():
        together = network(x, t, network.encode_condition(image))
        for i in (2, 0, 1):
            alone = network(x[i : i + 1], t[i : i + 1], network.encode_condition(image[i : i + 1]))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


@NETWORKS
def test_the_image_matters_and_is_encoded_apart(name) -> None:
    """Nothing of the condition knows x_t or t: it is made from the image alone, and changes the result."""
    network = small(name, 2).eval()
    x, t = noise(1, 2, 8, 8), torch.tensor([10])
    run = functools.partial(network, x, t)
    with torch.no_grad():
        first, second = (run(network.encode_condition(noise(1, 3, 8, 8, seed=s))) for s in (1, 2))
    assert float((first - second).abs().max()) > 1e-3


def test_medsegdiff_mixes_at_the_two_middle_stages() -> None:
    assert stage_ends([2, 1, 1]) == [2, 4, 6]
    for mult, wanted in (((1, 2, 2), (3, 5)), ((1, 1, 2, 2, 4, 4), (5, 7))):
        unet = UNet(2, 1, 1, channels=8, channel_mult=mult, num_res_blocks=1)
        assert MedSegDiff(unet, 1, 5).mixed_after == wanted


@pytest.mark.parametrize("name", ["v1", "v2", "segdiff"])
def test_checkpointing_reaches_the_encoder_of_the_image_and_changes_no_gradient(name) -> None:
    def gradients(checkpointing: bool) -> tuple[int, list[Tensor]]:
        torch.manual_seed(0)
        unet = UNet(2, 2, 2, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, checkpointing=checkpointing)
        network: Any
        if name == "segdiff":
            network = SegDiff(unet, 3, 8, 2, 4)
        else:
            network = MedSegDiff(unet, 3, bands=5) if name == "v1" else MedSegDiffV2(unet, 3, 2, 2, 8, 0.0)
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            cond = network.encode_condition(noise(2, 3, 16, 16))
        sum(value.square().mean() for value in cond.values()).backward()
        return kept, [p.grad for p in network.parameters() if p.grad is not None]

    (kept, wanted), (fewer, found) = gradients(False), gradients(True)
    assert fewer < 0.6 * kept
    torch.testing.assert_close(found, wanted)

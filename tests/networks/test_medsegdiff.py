"""MedSegDiff and MedSegDiff-V2: their parts against closed forms, and both networks as the tasks use them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.networks.medsegdiff import FFParser, MedSegDiff, hat_weights, stage_ends
from medseg_diffusion.networks.medsegdiff_v2 import (
    AnchorCondition,
    BandPass,
    GaussianSmoothing,
    MedSegDiffV2,
    SpectralAttention,
    filtered,
)
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import UNet

BOTH = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
SIZES = pytest.mark.parametrize("size", [(8, 8), (48, 65), (7, 1), (5, 6, 7)], ids=str)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


# ---- anchor condition ------------------------------------------------------------------------------------------------


@BOTH
def test_a_gate_of_zero_weights_scales_by_one_and_a_half(dims) -> None:
    features = noise(2, 4, *[6] * dims)
    gate = AnchorCondition(dims, 4)(features)
    assert gate.shape == (2, 1, *[6] * dims)
    torch.testing.assert_close((1 + gate) * features, 1.5 * features)


@BOTH
def test_the_gate_acts_on_what_the_first_convolution_gives(dims, monkeypatch) -> None:
    torch.manual_seed(0)
    network = MedSegDiffV2(UNet(dims, 2, 2, channels=8, channel_mult=(1, 2), num_res_blocks=1), 3, 2, 2, 8, 0.0)
    seen: list[Tensor] = []
    encode = network.unet.encode
    monkeypatch.setattr(network.unet, "encode", lambda x, emb: seen.append(x) or encode(x, emb))
    x, image, t = noise(1, 2, *[8] * dims), noise(1, 3, *[8] * dims), torch.tensor([5])
    with torch.no_grad():
        network(x, t, network.encode_condition(image))
        torch.testing.assert_close(seen[0], 1.5 * network.unet.stem(x))  # the gate's weights start at zero
        network.anchor.to_gate.bias.fill_(30.0)
        network(x, t, network.encode_condition(image))
        torch.testing.assert_close(seen[1], 2 * network.unet.stem(x))


@BOTH
def test_smoothing_keeps_constants_narrows_to_the_identity_and_moves_with_its_mean(dims) -> None:
    smoothing, x = GaussianSmoothing(dims), noise(2, 3, *[9] * dims)
    torch.testing.assert_close(smoothing(torch.full_like(x, 2.5)), torch.full_like(x, 2.5))
    with torch.no_grad():
        assert float(smoothing(x).var()) < 0.5 * float(x.var())
        smoothing.log_width.fill_(-3.0)
        torch.testing.assert_close(smoothing(x), x)
        smoothing.mean[0] = 1.0
        torch.testing.assert_close(smoothing(x)[:, :, :-1], x[:, :, 1:])


# ---- semantic condition ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_spectral_attention_is_attention_with_the_filtered_affinity_of_the_paper() -> None:
    """softmax(Re F^-1 [g (F Q)(F K)^* g] F / sqrt(d)) V, with the discrete Fourier transform as a matrix."""
    size, channels = (4, 5), 6
    torch.manual_seed(0)
    attention = SpectralAttention(2, channels, 1, 8)
    nn.init.normal_(attention.band_pass.last.weight)
    query, key, emb = noise(1, 20, channels), noise(1, 20, channels, seed=1), noise(1, 8, seed=2)
    half = attention.band_pass(size, emb)[0, 0]
    gate = torch.cat([half, half[:, 1:3].flip(1)], dim=1).flatten()  # |f| along the last axis, all frequencies
    fourier = torch.fft.fft2(torch.eye(20).reshape(20, *size)).reshape(20, 20).T.to(torch.complex64)
    affinity = (fourier @ attention.q(query)[0].to(fourier)) @ (fourier @ attention.k(key)[0].to(fourier)).conj().T
    back = fourier.conj().T @ (gate[:, None] * affinity * gate) @ fourier / 20**2
    assert float(back.imag.abs().max()) < 1e-5
    weights = (back.real / channels**0.5).softmax(dim=1)
    torch.testing.assert_close(
        attention(query, key, size, emb)[0], attention.proj(weights @ attention.v(key)[0]), rtol=1e-4, atol=1e-5
    )


@SIZES
def test_an_open_gate_changes_nothing(size) -> None:
    count = torch.Size(size).numel()
    tokens = noise(2, count, 4)
    shape = (*size[:-1], size[-1] // 2 + 1)
    torch.testing.assert_close(filtered(tokens, torch.ones(2, 4, *shape), size), tokens, rtol=1e-5, atol=1e-5)


def test_the_pass_band_depends_on_time() -> None:
    torch.manual_seed(0)
    band_pass = BandPass(2, 3, 8)
    gates = band_pass((6, 6), noise(2, 8)).detach()
    assert gates.shape == (2, 3, 6, 4)
    assert float((gates[0] - gates[1]).abs().max()) > 1e-3
    assert float(gates.min()) > 0 and float(gates.max()) < 1


# ---- whole networks --------------------------------------------------------------------------------------------------


def small(name: str, dims: int) -> MedSegDiff | MedSegDiffV2:
    """A small network with random weights everywhere, also where training starts from zeros."""
    torch.manual_seed(0)
    unet = UNet(dims, 2, 2, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1)
    network = MedSegDiff(unet, 3, bands=5) if name == "v1" else MedSegDiffV2(unet, 3, 2, 2, 8, 0.0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


NETWORKS = pytest.mark.parametrize("name", ["v1", "v2"])


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


def test_smoothing_is_in_float32_under_autocast() -> None:
    """A kernel in bfloat16 would not sum to 1, nor pass small gradients on."""
    smoothing, x = GaussianSmoothing(2), noise(1, 2, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = smoothing(x)
    torch.testing.assert_close(found, smoothing(x), rtol=0, atol=0)
    assert smoothing(x.bfloat16()).dtype == torch.float32

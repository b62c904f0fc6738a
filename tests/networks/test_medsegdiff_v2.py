"""The parts of MedSegDiff-V2 against closed forms: anchor and semantic condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medseg_diffusion.networks.medsegdiff_v2 import (
    AnchorCondition,
    BandPass,
    GaussianSmoothing,
    MedSegDiffV2,
    SpectralAttention,
    filtered,
)
from medseg_diffusion.networks.unet import UNet
from tests.helpers.medsegdiff import BOTH, SIZES, noise

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


def test_smoothing_is_in_float32_under_autocast() -> None:
    """A kernel in bfloat16 would not sum to 1, nor pass small gradients on."""
    smoothing, x = GaussianSmoothing(2), noise(1, 2, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = smoothing(x)
    torch.testing.assert_close(found, smoothing(x), rtol=0, atol=0)
    assert smoothing(x.bfloat16()).dtype == torch.float32

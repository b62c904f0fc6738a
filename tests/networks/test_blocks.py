"""Blocks of the networks are the published computations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medseg_diffusion.networks.blocks import AttentionBlock, ResBlock, conv, timestep_embedding
from tests.helpers.networks import BOTH, awake, normal


@BOTH
def test_an_untrained_residual_block_passes_its_input(dims) -> None:
    block, x, emb = ResBlock(8, 8, 16, dims), normal(3, 2, 8, *[4] * dims), normal(4, 2, 16)
    torch.testing.assert_close(block(x, emb), x, rtol=0, atol=0)
    halved = ResBlock(8, 8, 16, dims, resampling="down")(x, emb)
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    torch.testing.assert_close(halved, pool(x, 2), rtol=0, atol=0)
    doubled = ResBlock(8, 8, 16, dims, resampling="up")(x, emb)
    torch.testing.assert_close(pool(doubled, 2), x)
    torch.testing.assert_close(AttentionBlock(8, dims, 4)(x), x, rtol=0, atol=0)


def test_a_residual_block_is_the_published_computation() -> None:
    """AdaGN: GN(h) (1 + scale) + shift after the first convolution, the second convolution on SiLU of it."""
    block = awake(ResBlock(8, 12, 16, 2))
    x, emb = normal(5, 2, 8, 6, 6), normal(6, 2, 16)
    first, second = block.conv1, block.conv2
    h = F.silu(F.group_norm(x, 8, block.norm1.weight, block.norm1.bias))
    h = F.conv2d(h, first.weight, first.bias, padding=1)
    both = F.linear(F.silu(emb), *block.emb.parameters())
    normalised = F.group_norm(h, 4, block.norm2.weight, block.norm2.bias)
    scale, shift = both[:, :12, None, None], both[:, 12:, None, None]
    changed = normalised * (1 + scale) + shift
    skip = F.conv2d(x, block.skip.weight, block.skip.bias)
    expected = skip + F.conv2d(F.silu(changed), second.weight, second.bias, padding=1)
    torch.testing.assert_close(block(x, emb), expected)


@BOTH
def test_attention_is_softmax_over_all_positions(dims) -> None:
    block = awake(AttentionBlock(8, dims, head_channels=4))
    x = normal(7, 1, 8, *[3] * dims)
    tokens = block.norm(x).flatten(2)[0].T
    q, k, v = (tokens @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[:, head] @ k[:, head].T / math.sqrt(4)).softmax(dim=1)
        heads.append(weights @ v[:, head])
    out = torch.cat(heads, dim=1) @ block.proj.weight.T + block.proj.bias
    torch.testing.assert_close(block(x), x + out.T.reshape(x.shape))


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_channels \(5\) must divide the channels \(8\)"):
        AttentionBlock(8, 2, 5)


def test_the_time_embedding_is_the_published_one() -> None:
    """cos(t w_i), then sin(t w_i), w_i = 10000^(-i / half)."""
    for t in (0, 1, 999):
        frequencies = [10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(t * w) for w in frequencies] + [math.sin(t * w) for w in frequencies]
        found = timestep_embedding(torch.tensor([t]), 8)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=1e-4)
    assert timestep_embedding(torch.tensor([3, 4]), 7).shape == (2, 7)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_a_lone_small_volume_is_convolved_like_two_and_not_by_the_slow_fallback(kernel, stride) -> None:
    torch.manual_seed(0)
    layer = conv(3, 8, 8, kernel, stride)
    pair = torch.randn(2, 8, 9, 12, 9)
    with torch.no_grad(), torch.profiler.profile() as profile:
        lone = layer(pair[:1])
    torch.testing.assert_close(lone, layer(pair)[:1])
    assert not [event.name for event in profile.events() if "slow_conv" in event.name]
    with torch.no_grad():
        last = layer.to(memory_format=torch.channels_last_3d)(pair[:1].to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(last, lone)
    layer(pair[:1]).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0


def test_a_lone_volume_can_be_traced_without_gradients() -> None:
    """As --compile does: oneDNN's own convolution is unknown to compilers."""
    layer, lone = conv(3, 2, 2), torch.ones(1, 2, 4, 4, 4)
    with torch.no_grad():
        traced = torch.compile(layer, backend="aot_eager", fullgraph=True)(lone)
        torch.testing.assert_close(traced, layer(lone))

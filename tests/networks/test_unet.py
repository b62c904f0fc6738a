"""The U-Net and SegDiff's backbone: shapes, structure, activations and gradients, in 2D and 3D."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.objective import Simple
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.networks.autoencoder import KLAutoencoder, VQAutoencoder
from medseg_diffusion.networks.blocks import AttentionBlock, ResBlock, conv, timestep_embedding
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import UNet, fold, unfold
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.tasks.mask import MaskDiffusion, MaskEncoding

BOTH = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(module: Any, seed: int = 0) -> Any:
    """The module with all parameters drawn anew, so that no branch is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return module.eval()


def small(dims: int, **changes: object) -> UNet:
    options: dict[str, Any] = {
        "in_channels": 2,
        "out_channels": 3,
        "channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
    }
    return UNet(dims, **{**options, **changes})


def size(dims: int, *numbers: int) -> tuple[int, ...]:
    return numbers[:dims]


# ---- shapes ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("resampling", ["resblock", "conv", "plain"])
@pytest.mark.parametrize("attention", [(), (2,)], ids=["no-attention", "attention"])
@pytest.mark.parametrize("numbers", [(8, 8, 8), (7, 9, 5), (1, 3, 2)], ids=["even", "odd", "tiny"])
def test_the_output_has_the_size_of_the_input(dims, patch_size, resampling, attention, numbers) -> None:
    network = awake(
        small(dims, patch_size=patch_size, resampling=resampling, attention_factors=attention, head_channels=8)
    )
    spatial = size(dims, *numbers)
    out = network(normal(0, 2, 2, *spatial), torch.tensor([0, 999]))
    assert out.shape == (2, 3, *spatial)
    assert out.isfinite().all() and out.abs().max() > 0


@BOTH
@pytest.mark.parametrize("patch_size", [1, 2])
def test_padding_repeats_the_border_and_is_cropped_at_the_end(dims, patch_size) -> None:
    """An odd image gives what its hand-padded version gives, on the part that it covers."""
    network = awake(small(dims, patch_size=patch_size))
    assert network.factor == 2 * patch_size
    spatial = size(dims, 7, 9, 5)
    x, t = normal(1, 1, 2, *spatial), torch.tensor([5])
    missing = [-n % network.factor for n in spatial]
    by_hand = F.pad(x, [n for m in reversed(missing) for n in (0, m)], mode="replicate")
    torch.testing.assert_close(network.padded(x), by_hand, rtol=0, atol=0)
    part = (..., *(slice(0, n) for n in spatial))
    torch.testing.assert_close(network(x, t), network(by_hand, t)[part], rtol=0, atol=0)
    even = normal(1, 1, 2, *[4 * network.factor] * dims)
    assert network.padded(even) is even


@BOTH
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("resampling", ["resblock", "conv", "plain"])
def test_an_untrained_network_answers_exactly_zero(dims, patch_size, resampling) -> None:
    network = small(dims, patch_size=patch_size, resampling=resampling)
    out = network(normal(2, 2, 2, *[6] * dims), torch.tensor([3, 500]))
    torch.testing.assert_close(out, torch.zeros_like(out), rtol=0, atol=0)


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


@pytest.mark.parametrize(("dims", "depths"), [(4, 1), (2, (1, 1, 1)), (1, 1)])
def test_impossible_shapes_are_refused(dims, depths) -> None:
    with pytest.raises(ValueError, match="dims must be 2 or 3, with one num_res_blocks a level"):
        small(dims, num_res_blocks=depths)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 2, 8, 8, 8), (1, 2, 8)])
def test_an_input_of_another_shape_is_refused_with_the_expected_one(shape) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 2, 2 axes\) with the condition, got"):
        small(2)(torch.zeros(shape), torch.tensor([0]))


@BOTH
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_unfolding_inverts_folding(dims, patch_size) -> None:
    x = normal(8, 2, 3, *size(dims, 6, 12, 18))
    folded = fold(x, patch_size)
    assert folded.shape == (2, 3 * patch_size**dims, *(n // patch_size for n in x.shape[2:]))
    torch.testing.assert_close(unfold(folded, patch_size), x, rtol=0, atol=0)


def test_folding_keeps_a_patch_together() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert fold(x, 2)[0, :, 0, 1].tolist() == [2, 3, 6, 7]
    assert fold(torch.arange(8.0).reshape(1, 1, 2, 2, 2), 2).flatten().tolist() == list(range(8))


# ---- structure -------------------------------------------------------------------------------------------------------


@BOTH
def test_the_blocks_are_those_of_the_published_network(dims) -> None:
    """(1, 2, 3, 4), 2 blocks: 11 encoder blocks after the first convolution, 12 decoder blocks (the usual indices)."""
    network: Any = UNet(dims, 3, 3, channels=32, channel_mult=(1, 2, 3, 4), num_res_blocks=2, attention_factors=(4, 8))
    assert len(network.encoder) == 11
    assert len(network.middle) == 2
    assert len(network.decoder) == 12
    downs = [i for i, block in enumerate(network.encoder) if block.res.resampling == "down"]
    assert downs == [2, 5, 8], "published input_blocks 3, 6, 9"
    assert [i for i, block in enumerate(network.decoder) if block.up is not None] == [2, 5, 8]
    assert [i for i, block in enumerate(network.encoder) if block.attention is not None] == [6, 7, 9, 10]
    assert [i for i, block in enumerate(network.decoder) if block.attention is not None] == [0, 1, 2, 3, 4, 5]
    assert network.middle[0].attention is not None and network.middle[1].attention is None
    widths = [block.res.conv1.out_channels // 32 for block in network.decoder]
    assert widths == [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1]


def test_blocks_a_level_may_differ() -> None:
    network = small(2, channel_mult=(1, 2, 3), num_res_blocks=(2, 1, 3))
    assert len(network.encoder) == 2 + 1 + 3 + 2
    assert len(network.decoder) == 3 + 2 + 4
    assert network(torch.zeros(1, 2, 8, 8), torch.tensor([0])).shape == (1, 3, 8, 8)


def test_the_time_embedding_is_the_published_one() -> None:
    """cos(t w_i), then sin(t w_i), w_i = 10000^(-i / half)."""
    for t in (0, 1, 999):
        frequencies = [10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(t * w) for w in frequencies] + [math.sin(t * w) for w in frequencies]
        found = timestep_embedding(torch.tensor([t]), 8)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=1e-4)
    assert timestep_embedding(torch.tensor([3, 4]), 7).shape == (2, 7)


@BOTH
def test_time_and_every_input_change_the_answer(dims) -> None:
    network = awake(small(dims, in_channels=3))
    x, image = normal(9, 2, 2, *[8] * dims), normal(10, 2, 1, *[8] * dims)
    cond = network.encode_condition(image)
    out = network(x, torch.tensor([5, 5]), cond)
    assert not torch.allclose(out, network(x, torch.tensor([6, 6]), cond))
    assert not torch.allclose(out, network(x + 0.1, torch.tensor([5, 5]), cond))
    assert not torch.allclose(out, network(x, torch.tensor([5, 5]), {"concat": image + 0.1}))
    one = network(x[1:], torch.tensor([5]), {"concat": image[1:]})
    torch.testing.assert_close(out[1:], one, msg=lambda m: f"batch elements must not see each other: {m}")


# ---- activations -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("patch_size", [1, 2])
def test_activations_are_the_outputs_of_the_named_blocks(dims, patch_size) -> None:
    network = awake(small(dims, patch_size=patch_size, attention_factors=(2,), head_channels=8))
    seen: dict[str, Tensor] = {}
    for part in ("encoder", "middle", "decoder"):
        for i, block in enumerate(getattr(network, part)):
            name = f"{part}.{i}"
            block.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    names = network.block_names()
    assert names == [
        *(f"encoder.{i}" for i in range(3)), "middle.0", "middle.1", *(f"decoder.{i}" for i in range(4)),
    ]  # fmt: skip
    spatial = size(dims, 7, 8, 5)
    found = network.activations(normal(11, 2, 2, *spatial), torch.tensor([1, 2]), names=names)
    assert list(found) == names
    padded = [-(-n // network.factor) * 2 for n in spatial]  # sizes at the first level
    widths_and_levels = [(8, 0), (8, 1), (16, 1), (16, 1), (16, 1), (16, 1), (16, 0), (8, 0), (8, 0)]
    for name, (width, level) in zip(names, widths_and_levels, strict=True):
        torch.testing.assert_close(found[name], seen[name], rtol=0, atol=0)
        assert found[name].shape == (2, width, *(n // 2**level for n in padded)), name


def test_only_the_wanted_activations_are_returned() -> None:
    network, t = awake(small(2)), torch.tensor([1])
    x = normal(12, 1, 2, 8, 8)
    found = network.activations(x, t, names=["decoder.1"])
    assert list(found) == ["decoder.1"]
    assert network.activations(x, t) == {}


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no activations \['decoder\.9'\].*encoder\.0.*middle\.1.*decoder\.3"):
        small(2).activations(torch.zeros(1, 2, 4, 4), torch.tensor([0]), names=["encoder.0", "decoder.9"])


# ---- gradients -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(dims, dropout) -> None:
    network = awake(small(dims, attention_factors=(2,), head_channels=8, dropout=dropout)).train()
    x, t = normal(13, 2, 2, *[6] * dims), torch.tensor([10, 700])
    calls = []
    network.middle[0].register_forward_pre_hook(lambda *args: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        network.checkpointing = checkpointing
        network.zero_grad()
        torch.manual_seed(0)
        network(x, t).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert len(calls) == 3, "with checkpointing a block runs again in the backward pass"
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)


@BOTH
def test_every_parameter_is_trained(dims) -> None:
    network = awake(small(dims, attention_factors=(2,), head_channels=8))
    network(normal(14, 2, 2, *[6] * dims), torch.tensor([10, 700])).square().mean().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert idle == []


# ---- SegDiff ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", [UNet, KLAutoencoder, VQAutoencoder, NoisyClassifier])
def test_the_number_of_groups_reaches_every_normalisation(kind) -> None:
    """With as many groups as channels, every channel loses its mean: narrow networks need fewer."""
    shared = {"channels": 32, "channel_mult": (1, 2), "attention_factors": (2,), "norm_groups": 8}
    network = {
        UNet: lambda: UNet(2, 1, 1, **shared),
        NoisyClassifier: lambda: NoisyClassifier(2, 1, 3, (8, 8), **shared),
        KLAutoencoder: lambda: KLAutoencoder(2, 1, 1, 2, (32, 64), 1, (False, True), norm_groups=8),
        VQAutoencoder: lambda: VQAutoencoder(2, 1, 1, 2, (32, 64), 1, (False, True), 16, norm_groups=8),
    }[kind]()
    groups = [module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert groups and set(groups) == {8}


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


def test_what_monai_builds_convolves_lone_volumes_like_two_and_not_by_the_slow_fallback() -> None:
    torch.manual_seed(0)
    codec = KLAutoencoder(3, 1, 1, 2, (8, 8), 1, (False, False), norm_groups=8, middle_attention=False)
    pair = torch.randn(2, 1, 8, 12, 8)
    with torch.no_grad(), torch.profiler.profile() as profile:
        lone = codec.decode(codec.encode(pair[:1]))
    assert not [event.name for event in profile.events() if "slow_conv" in event.name]
    with torch.no_grad():
        torch.testing.assert_close(lone, codec.decode(codec.encode(pair))[:1], rtol=1e-4, atol=1e-5)

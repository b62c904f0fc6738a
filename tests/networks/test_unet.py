"""The U-Net: shapes, structure, activations and gradients, in 2D and 3D."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_diffusion.networks.autoencoder import KLAutoencoder, VQAutoencoder
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.unet import UNet, fold, unfold
from tests.helpers.networks import BOTH, awake, normal, size, small

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
def test_a_patch_head_sees_the_values_of_its_own_patch(dims) -> None:
    """Without features an output depends on the input of its own patch alone. Other layers are the published ones."""
    network, published = small(dims, patch_size=2, out_width=5), small(dims, patch_size=2)
    shapes = [{name: part.shape for name, part in one.state_dict().items()} for one in (network, published)]
    assert {name.partition(".")[0] for name, _ in shapes[0].items() ^ shapes[1].items()} == {"out"}
    head = awake(network).out
    head.norm.weight.data.zero_()
    head.norm.bias.data.zero_()
    x = normal(3, 1, network.in_channels, *size(dims, 9, 7, 5)).requires_grad_()
    out = network(x, torch.tensor([5]))
    assert out.shape[2:] == x.shape[2:]
    first = (0, slice(None), *[0] * dims)
    (gradient,) = torch.autograd.grad(out[first].sum(), x)
    reached = gradient.abs().sum((0, 1)).nonzero()
    assert reached.tolist() == list(map(list, itertools.product(range(2), repeat=dims)))


@BOTH
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("resampling", ["resblock", "conv", "plain"])
def test_an_untrained_network_answers_exactly_zero(dims, patch_size, resampling) -> None:
    network = small(dims, patch_size=patch_size, resampling=resampling)
    out = network(normal(2, 2, 2, *[6] * dims), torch.tensor([3, 500]))
    torch.testing.assert_close(out, torch.zeros_like(out), rtol=0, atol=0)


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

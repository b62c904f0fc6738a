"""Conversion from MONAI: DiffusionModelUNet and AutoencoderKL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.blocks import Block, Resample, ResBlock, SpatialTransformer
from medseg_diffusion.networks.unet import UNet

from .rules import Foreign, Rule, State, add_heads, apply, blocks_of, joined, same, transformer_rules

_RENAMED = (
    (r"(attentions\.\d+|middle_block\.attention|blocks\.\d+)\.(to_[qkv])\.", r"\1.attn.\2."),
    (r"(attentions\.\d+|middle_block\.attention|blocks\.\d+)\.proj_attn\.", r"\1.attn.out_proj."),
    (r"(transformer_blocks\.\d+\.attn\d)\.to_out\.0\.", r"\1.out_proj."),
    (r"upsampler\.conv\.conv\.", "upsampler.postconv.conv."),
    (r"(decoder\.blocks\.\d+)\.conv\.conv\.", r"\1.postconv.conv."),
)
"""Names in the package monai-generative, from which these networks came to MONAI, and the present ones."""


def present_names(state: State) -> dict[str, Tensor]:
    """The state dict with the present names, whichever it has."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        renamed[name] = value
    return renamed


def monai_unet(state: State, settings: Mapping[str, Any]) -> Foreign:
    """MONAI's DiffusionModelUNet, with self-attention or spatial transformers."""
    network = _monai_architecture(state, settings)
    with torch.device("meta"):
        ours = UNet(**network)
    rules = [*same("time_embed.0", "time_embed.0"), *same("time_embed.2", "time_embed.2")]
    rules += [*same("stem", "conv_in.conv"), *same("out.0", "out.0"), *same("out.2", "out.2.conv")]
    if "num_classes" in network:
        rules += same("label_embed", "class_embedding", "weight")
    rules += [*_monai_encoder(ours), *_monai_middle(ours), *_monai_decoder(ours)]
    assumed = [] if "norm_eps" in settings else ["an eps of 1e-6 in the normalisations (--set norm_eps=...)"]
    return Foreign("denoiser", network, apply(rules, state, ours, "MONAI DiffusionModelUNet"), assumed=assumed)


def _monai_architecture(state: State, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our `UNet` with the architecture of a state dict."""
    stem = state["conv_in.conv.weight"]
    channels = stem.shape[0]
    levels = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("down_blocks."))
    widths = [state[f"down_blocks.{i}.resnets.0.conv1.conv.weight"].shape[0] for i in range(levels)]
    groups = int(settings.get("norm_groups", 32))
    if any(width % channels for width in widths) or channels % groups:
        raise ModelError(
            f"level widths {widths} cannot be imported: they must be multiples of the first, and that of {groups} "
            "(the groups of the normalisation, --set norm_groups=N)"
        )
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in state for i in range(levels)]
    contexts = [name for name in state if name.endswith("attn2.to_k.weight")]
    network: dict[str, Any] = {
        "dims": stem.ndim - 2,
        "in_channels": stem.shape[1],
        "out_channels": state["out.2.conv.weight"].shape[0],
        "channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": [
            len({name.split(".")[3] for name in state if name.startswith(f"down_blocks.{i}.resnets.")})
            for i in range(levels)
        ],
        "attention_factors": [2**i for i, attends in enumerate(attention) if attends],
        "resampling": "resblock" if "down_blocks.0.downsampler.norm1.weight" in state else "conv",
        "scale_shift": False,
        "norm_eps": float(settings.get("norm_eps", 1e-6)),
        "norm_groups": groups,
        "middle_attention": True,
    }
    if "class_embedding.weight" in state:
        network["num_classes"] = state["class_embedding.weight"].shape[0]
    if contexts:
        network["context_channels"] = state[contexts[0]].shape[1]
        layers = {int(match.group(1)) for name in state if (match := re.search(r"transformer_blocks\.(\d+)", name))}
        network["transformer_depth"] = max(layers) + 1
    add_heads(settings, network, attention=True)
    return network


def _monai_encoder(ours: UNet) -> Iterator[Rule]:
    blocks, index = blocks_of(ours.encoder), 0
    for level, depth in enumerate(ours.depths):
        theirs = f"down_blocks.{level}"
        for j in range(depth):
            yield from _monai_block(f"encoder.{index}", theirs, j, blocks[index])
            index += 1
        if level < len(ours.depths) - 1:
            yield from _monai_resampler(f"encoder.{index}.res", f"{theirs}.downsampler", "op", blocks[index].res)
            index += 1


def _monai_middle(ours: UNet) -> Iterator[Rule]:
    first, second = blocks_of(ours.middle)
    yield from _monai_res("middle.0.res", "middle_block.resnet_1", first.res)
    yield from _monai_attention("middle.0.attention", "middle_block.attention", first.attention)
    yield from _monai_res("middle.1.res", "middle_block.resnet_2", second.res)


def _monai_decoder(ours: UNet) -> Iterator[Rule]:
    blocks, index = blocks_of(ours.decoder), 0
    for level, depth in enumerate(reversed(ours.depths)):
        theirs = f"up_blocks.{level}"
        for j in range(depth + 1):
            block = blocks[index]
            yield from _monai_block(f"decoder.{index}", theirs, j, block)
            if block.up is not None:
                yield from _monai_resampler(f"decoder.{index}.up", f"{theirs}.upsampler", "postconv", block.up)
            index += 1


def _monai_block(ours: str, theirs: str, j: int, block: Block) -> Iterator[Rule]:
    yield from _monai_res(f"{ours}.res", f"{theirs}.resnets.{j}", block.res)
    if block.attention is not None:
        yield from _monai_attention(f"{ours}.attention", f"{theirs}.attentions.{j}", block.attention)


def _monai_attention(ours: str, theirs: str, block: nn.Module | None) -> Iterator[Rule]:
    if isinstance(block, SpatialTransformer):
        yield from transformer_rules(ours, theirs, block, monai=True)
        return
    yield from same(f"{ours}.norm", f"{theirs}.norm")
    names = [f"{theirs}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    yield from joined(f"{ours}.qkv", names, ("weight", "bias"))
    yield from same(f"{ours}.proj", f"{theirs}.attn.out_proj")


def _monai_resampler(ours: str, theirs: str, name: str, block: nn.Module) -> Iterator[Rule]:
    if isinstance(block, ResBlock):
        yield from _monai_res(ours, theirs, block)
    else:
        yield from same(f"{ours}.conv", f"{theirs}.{name}.conv")


def _monai_res(ours: str, theirs: str, block: ResBlock | Resample) -> Iterator[Rule]:
    assert isinstance(block, ResBlock)
    yield from same(f"{ours}.norm1", f"{theirs}.norm1")
    yield from same(f"{ours}.conv1", f"{theirs}.conv1.conv")
    yield from same(f"{ours}.emb", f"{theirs}.time_emb_proj")
    yield from same(f"{ours}.norm2", f"{theirs}.norm2")
    yield from same(f"{ours}.conv2", f"{theirs}.conv2.conv")
    if not isinstance(block.skip, nn.Identity):
        yield from same(f"{ours}.skip", f"{theirs}.skip_connection.conv")


def monai_autoencoder(state: State, settings: Mapping[str, Any]) -> Foreign:
    """MONAI's AutoencoderKL. Its layout is one of ours; only the three outer convolutions have other names."""
    stem = state["encoder.blocks.0.conv.weight"]
    channels, blocks, attention = [stem.shape[0]], [0], [False]
    count = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.blocks."))
    # The last are normalisation and convolution; before them residual, attention, residual of the non-local attention.
    middle = f"encoder.blocks.{count - 4}.attn.to_q.weight" in state
    for i in range(1, count - (5 if middle else 2)):
        base = f"encoder.blocks.{i}"
        if f"{base}.conv.conv.weight" in state:
            channels, blocks, attention = [*channels, 0], [*blocks, 0], [*attention, False]
        elif f"{base}.attn.to_q.weight" in state:
            attention[-1] = True
        else:
            channels[-1] = state[f"{base}.conv1.conv.weight"].shape[0]
            blocks[-1] += 1
    if len(set(blocks)) > 1:
        raise ModelError(
            f"a MONAI autoencoder with {blocks} residual blocks a level cannot be imported: the levels must be equally "
            "deep"
        )
    latent = state["quant_conv_mu.conv.weight"].shape[0]
    network: dict[str, Any] = {
        "dims": stem.ndim - 2,
        "in_channels": stem.shape[1],
        "out_channels": [
            value for name, value in state.items() if re.fullmatch(r"decoder\.blocks\.\d+\.conv\.weight", name)
        ][-1].shape[0],
        "latent_channels": latent,
        "channels": channels,
        "num_res_blocks": blocks[0],
        "attention_levels": attention,
        "layout": "monai",
        "norm_eps": float(settings.get("norm_eps", 1e-6)),
        "norm_groups": int(settings.get("norm_groups", 32)),
        "middle_attention": middle,
    }
    with torch.device("meta"):
        ours = KLAutoencoder(**network)
    outer = ("quant_conv_mu", "quant_conv_log_sigma", "post_quant_conv")
    rules = [rule for name in outer for rule in same(name, f"{name}.conv")]
    rules += [Rule(name, (name,)) for name in ours.state_dict() if name.startswith(("encoder.", "decoder."))]
    weights = apply(rules, state, ours, "MONAI AutoencoderKL")
    weights["shift"], weights["scale"] = torch.zeros(latent), torch.ones(latent)
    return Foreign("autoencoder", network, weights)

"""Conversion from guided-diffusion and improved-diffusion: U-Net and noisy classifier.

The U-Net of latent-diffusion has the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks.blocks import AttentionBlock, Block, ResBlock
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.unet import UNet

from .rules import Foreign, Rule, State, add_heads, apply, blocks_of, pointwise, same, transformer_rules


def _openai_layout(state: State) -> tuple[dict[str, Any], bool]:
    """The arguments of our network that input_blocks and middle_block show, and whether it has attention."""
    stem = state["input_blocks.0.0.weight"]
    channels, dims = stem.shape[0], stem.ndim - 2
    count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("input_blocks."))
    widths: list[int] = []
    depths: list[int] = []
    attention: list[bool] = []
    kind = "plain"
    depth, level_attention, before = 0, False, channels
    ends = _level_ends(state, count)
    for i in range(1, count):
        base = f"input_blocks.{i}"
        if i in ends:
            widths, depths, attention = [*widths, before], [*depths, depth], [*attention, level_attention]
            depth, level_attention = 0, False
            if f"{base}.0.op.weight" in state:
                kind = "conv"
            elif f"{base}.0.in_layers.0.weight" in state:
                kind = "resblock"
            continue
        before = state[f"{base}.0.in_layers.2.weight"].shape[0]
        depth += 1
        level_attention |= f"{base}.1.norm.weight" in state
    widths, depths, attention = [*widths, before], [*depths, depth], [*attention, level_attention]
    if any(width % channels for width in widths):
        raise ModelError(f"level widths {widths} are no multiples of {channels}; such networks cannot be imported")
    first = next(name for name in state if re.fullmatch(r"input_blocks\.1\.0\.emb_layers\.1\.weight", name))
    middle = "middle_block.1.norm.weight" in state
    network: dict[str, Any] = {
        "dims": dims,
        "in_channels": stem.shape[1],
        "channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": depths,
        "attention_factors": [2**level for level, attends in enumerate(attention) if attends],
        "resampling": kind,
        "scale_shift": state[first].shape[0] == 2 * state["input_blocks.1.0.in_layers.2.weight"].shape[0],
    }
    return network, middle or any(attention)


def _level_ends(state: State, count: int) -> set[int]:
    """The input blocks that halve the size: they have an "op", mirror a doubling block, or have no parameters."""
    ops = {i for i in range(1, count) if f"input_blocks.{i}.0.op.weight" in state}
    gaps = {i for i in range(1, count) if not any(name.startswith(f"input_blocks.{i}.") for name in state)}
    if ops or gaps:
        return ops | gaps
    # A residual block that resamples has the same names as any other. In the decoder it is recognised as the second
    # residual block of its output block.
    outputs = [name for name in state if name.startswith("output_blocks.")]
    doubling = sorted(
        {int(name.split(".")[1]) for name in outputs if re.match(r".*\.[12]\.in_layers\.0\.weight", name)}
    )
    if doubling:
        period = doubling[0] + 1
        return set(range(period, count, period))
    # A classifier has no decoder. All levels have the same number of blocks, a block that resamples has no attention
    # and keeps the width, and only the first block of a level may widen.
    for depth in range(1, count):
        levels, rest = divmod(count, depth + 1)
        ends = set(range(depth + 1, count, depth + 1))
        if (
            rest == 0
            and levels > 1
            and all(_may_halve(state, i) for i in ends)
            and not _widens_inside(state, ends, count)
        ):
            return ends
    return set()


def _may_halve(state: State, i: int) -> bool:
    norm, conv = (state[f"input_blocks.{i}.0.{layer}.weight"].shape for layer in ("in_layers.0", "in_layers.2"))
    return norm[0] == conv[0] and f"input_blocks.{i}.1.norm.weight" not in state


def _widens_inside(state: State, ends: set[int], count: int) -> bool:
    firsts = {1, *(end + 1 for end in ends)}
    return any(f"input_blocks.{i}.0.skip_connection.weight" in state and i not in firsts for i in range(1, count))


def openai_unet(state: State, settings: Mapping[str, Any]) -> Foreign:
    """The U-Net, unconditional or conditioned by classes, a low-resolution image or a context."""
    network, attention = _openai_layout(state)
    network["out_channels"] = state["out.2.weight"].shape[0]
    network["middle_attention"] = "middle_block.1.norm.weight" in state
    if "label_emb.weight" in state:
        network["num_classes"] = state["label_emb.weight"].shape[0]
    contexts = [name for name in state if name.endswith("attn2.to_k.weight")]
    if contexts:
        network["context_channels"] = state[contexts[0]].shape[1]
        layers = {int(match.group(1)) for name in state if (match := re.search(r"transformer_blocks\.(\d+)", name))}
        network["transformer_depth"] = max(layers) + 1
    if "norm_eps" in settings:
        network["norm_eps"] = float(settings["norm_eps"])
    add_heads(settings, network, attention)
    assumed = []
    legacy = settings.get("qkv_order", "legacy") == "legacy"
    if attention and not contexts and "qkv_order" not in settings:
        assumed.append("queries, keys and values in the legacy order (--set qkv_order=new for the other)")
    with torch.device("meta"):
        ours = UNet(**network)
    rules = [*same("time_embed.0", "time_embed.0"), *same("time_embed.2", "time_embed.2")]
    rules += [*same("stem", "input_blocks.0.0"), *same("out.0", "out.0"), *same("out.2", "out.2")]
    if "num_classes" in network:
        rules += same("label_embed", "label_emb", "weight")
    rules += _openai_encoder(ours, legacy)
    for i, block in enumerate(blocks_of(ours.decoder)):
        base = f"output_blocks.{i}"
        rules += _openai_block(f"decoder.{i}", base, block, legacy)
        if block.up is not None:
            place = f"{base}.{1 if block.attention is None else 2}"
            if isinstance(block.up, ResBlock):
                rules += _openai_res(f"decoder.{i}.up", place, block.up)
            elif block.up.conv is not None:
                rules += same(f"decoder.{i}.up.conv", f"{place}.conv")
    return Foreign("denoiser", network, apply(rules, state, ours, "U-Net"), assumed=assumed)


def openai_classifier(state: State, settings: Mapping[str, Any]) -> Foreign:
    """The noisy classifier with attention pooling."""
    network, attention = _openai_layout(state)
    depths = network.pop("num_res_blocks")
    if len(set(depths)) > 1:
        raise ModelError(f"a classifier with {depths} residual blocks a level cannot be imported: they must be equal")
    network["num_res_blocks"] = depths[0]
    network["num_classes"] = state["out.2.c_proj.weight"].shape[0]
    positions = state["out.2.positional_embedding"].shape[1] - 1
    side = round(positions ** (1 / network["dims"]))
    network["size"] = [side * 2 ** (len(network["channel_mult"]) - 1)] * network["dims"]
    add_heads(settings, network, attention)
    if "num_heads" in network:
        raise UsageError("a noisy classifier pools by heads of equal width: give --set head_channels=N")
    legacy = settings.get("qkv_order", "legacy") == "legacy"
    with torch.device("meta"):
        ours = NoisyClassifier(**network)
    rules = [*same("time_embed.0", "time_embed.0"), *same("time_embed.2", "time_embed.2")]
    rules += [*same("stem", "input_blocks.0.0"), *_openai_encoder(ours, legacy), *same("norm", "out.0")]
    rules += [Rule("pool.positional", ("out.2.positional_embedding",))]
    rules += [*pointwise("pool.qkv", "out.2.qkv_proj"), *pointwise("pool.proj", "out.2.c_proj")]
    return Foreign("classifier", network, apply(rules, state, ours, "noisy classifier"))


def _openai_encoder(ours: UNet | NoisyClassifier, legacy: bool) -> Iterator[Rule]:
    for i, block in enumerate(blocks_of(ours.encoder)):
        yield from _openai_block(f"encoder.{i}", f"input_blocks.{i + 1}", block, legacy)
    first, second = blocks_of(ours.middle)
    yield from _openai_block("middle.0", "middle_block", first, legacy)
    place = "middle_block.1" if first.attention is None else "middle_block.2"
    assert isinstance(second.res, ResBlock)
    yield from _openai_res("middle.1.res", place, second.res)


def _openai_block(ours: str, theirs: str, block: Block, legacy: bool) -> Iterator[Rule]:
    if isinstance(block.res, ResBlock):
        yield from _openai_res(f"{ours}.res", f"{theirs}.0", block.res)
    elif block.res.conv is not None:
        yield from same(f"{ours}.res.conv", f"{theirs}.0.op")
    if isinstance(block.attention, AttentionBlock):
        heads = block.attention.num_heads
        yield from same(f"{ours}.attention.norm", f"{theirs}.1.norm")
        for part in ("weight", "bias"):
            yield Rule(
                f"{ours}.attention.qkv.{part}",
                (f"{theirs}.1.qkv.{part}",),
                lambda w, heads=heads, legacy=legacy: (
                    _reordered(w, heads) if legacy else w.reshape(len(w), -1).squeeze(1)
                ),
            )
        yield from pointwise(f"{ours}.attention.proj", f"{theirs}.1.proj_out")
    elif block.attention is not None:
        yield from transformer_rules(f"{ours}.attention", f"{theirs}.1", block.attention)


def _reordered(rows: Tensor, heads: int) -> Tensor:
    """Rows in the order (head, q/k/v, channel), reordered to (q/k/v, head, channel)."""
    flat = rows.reshape(rows.shape[0], -1).squeeze(1)
    return flat.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _openai_res(ours: str, theirs: str, block: ResBlock) -> Iterator[Rule]:
    pairs = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("emb", "emb_layers.1")]
    pairs += [("norm2", "out_layers.0"), ("conv2", "out_layers.3")]
    for mine, other in pairs:
        yield from same(f"{ours}.{mine}", f"{theirs}.{other}")
    if not isinstance(block.skip, nn.Identity):
        yield from same(f"{ours}.skip", f"{theirs}.skip_connection")

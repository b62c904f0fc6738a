"""Conversion from latent-diffusion: the U-Net with spatial transformers and the KL autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks.autoencoder import KLAutoencoder

from .openai import openai_unet
from .rules import Foreign, Rule, State, apply, pointwise, same


def latent_diffusion(state: State, settings: Mapping[str, Any]) -> Foreign:
    """The denoiser or the autoencoder, from a checkpoint of both or a state dict of one."""
    unet, first = (_below(state, prefix) for prefix in ("model.diffusion_model.", "first_stage_model."))
    part = settings.get("part", "denoiser" if unet or "input_blocks.0.0.weight" in state else "autoencoder")
    if part not in ("denoiser", "autoencoder"):
        raise UsageError(f"--set part={part}: use denoiser or autoencoder")
    if part == "autoencoder":
        autoencoder = _ldm_autoencoder(first or state)
        if "scale_factor" in state:
            scale = autoencoder.weights["scale"]
            autoencoder.weights["scale"] = torch.full_like(scale, float(state["scale_factor"]))
        return autoencoder
    averaged = _averaged(unet, state)
    denoiser = openai_unet(averaged or unet or state, settings)
    if averaged:
        denoiser.assumed.append("the averaged weights (model_ema) are taken, as latent-diffusion samples with them")
    denoiser.betas = state.get("betas")
    if first:
        denoiser.assumed.append("the autoencoder is left out (--set part=autoencoder imports it)")
    others = sorted({name.split(".")[0] for name in state if "." in name} - {"model", "first_stage_model", "model_ema"})
    if unet and others:
        denoiser.assumed.append(f"left out: {', '.join(others)}")
    return denoiser


def _averaged(unet: State, state: State) -> dict[str, Tensor]:
    """The averaged weights of a denoiser, stored under the names of the weights without their dots; empty if absent."""
    names = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in unet}
    if not names or not all(own in state for own in names.values()):
        return {}
    return {name: state[own] for name, own in names.items()}


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _ldm_autoencoder(state: State) -> Foreign:
    state = {name: value for name, value in state.items() if not name.startswith(("loss.", "model_ema."))}
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    blocks = 1 + max(int(name.split(".")[4]) for name in state if name.startswith("encoder.down.0.block."))
    channels = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attention = [f"encoder.down.{i}.attn.0.norm.weight" in state for i in range(levels)]
    stem = state["encoder.conv_in.weight"]
    latent = state["post_quant_conv.weight"].shape[1]
    if state["quant_conv.weight"].shape[:2] != (2 * latent, 2 * latent):
        raise ModelError(
            f"an autoencoder whose quant_conv is {tuple(state['quant_conv.weight'].shape)} cannot be imported: "
            f"expected {2 * latent} channels on both sides (double_z, z_channels = embed_dim)"
        )
    network: dict[str, Any] = {
        "dims": stem.ndim - 2,
        "in_channels": stem.shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": latent,
        "channels": channels,
        "num_res_blocks": blocks,
        "attention_levels": attention,
        "layout": "latent-diffusion",
    }
    with torch.device("meta"):
        ours = KLAutoencoder(**network)
    rules = [*same("quant_conv", "quant_conv"), *same("post_quant_conv", "post_quant_conv")]
    down = [("conv", "conv_in")]
    for i in range(levels):
        for j in range(blocks):
            down += [("res", f"down.{i}.block.{j}"), *([("attention", f"down.{i}.attn.{j}")] if attention[i] else [])]
        down += [("down", f"down.{i}.downsample")] if i < levels - 1 else []
    middle = [("res", "mid.block_1"), ("attention", "mid.attn_1"), ("res", "mid.block_2")]
    last = [("norm", "norm_out"), ("conv", "conv_out")]
    up = [("conv", "conv_in"), *middle]
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            up += [("res", f"up.{i}.block.{j}"), *([("attention", f"up.{i}.attn.{j}")] if attention[i] else [])]
        up += [("up", f"up.{i}.upsample")] if i else []
    for side, order in (("encoder", [*down, *middle, *last]), ("decoder", [*up, *last])):
        for index, (kind, name) in enumerate(order):
            rules += _ldm_autoencoder_block(kind, f"{side}.blocks.{index}", f"{side}.{name}", state)
    weights = apply(rules, state, ours, "latent-diffusion autoencoder")
    weights["shift"], weights["scale"] = torch.zeros(latent), torch.ones(latent)
    return Foreign("autoencoder", network, weights)


def _ldm_autoencoder_block(kind: str, ours: str, theirs: str, state: State) -> Iterator[Rule]:
    if kind == "conv":
        yield from same(f"{ours}.conv", theirs)
    elif kind == "norm":
        yield from same(f"{ours}.0", theirs)
    elif kind == "down":
        yield from same(f"{ours}.conv.conv", f"{theirs}.conv")
    elif kind == "up":
        yield from same(f"{ours}.postconv.conv", f"{theirs}.conv")
    elif kind == "res":
        for name in ("norm1", "norm2"):
            yield from same(f"{ours}.{name}", f"{theirs}.{name}")
        names = ["conv1", "conv2"]
        names += ["nin_shortcut"] if f"{theirs}.nin_shortcut.weight" in state else []
        for name in names:
            yield from same(f"{ours}.{name}.conv", f"{theirs}.{name}")
    else:
        yield from same(f"{ours}.norm", f"{theirs}.norm")
        for mine, other in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("out_proj", "proj_out")):
            yield from pointwise(f"{ours}.attn.{mine}", f"{theirs}.{other}")

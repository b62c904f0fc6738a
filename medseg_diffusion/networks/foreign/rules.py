"""Rules that map published parameters to ours by name, and the function that applies and checks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.blocks import Block, SpatialTransformer
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.unet import UNet

from .signatures import few, nearest

State = Mapping[str, Tensor]


@dataclass
class Foreign:
    """A converted checkpoint.

    Attributes:
        kind: "denoiser", "classifier" or "autoencoder".
        network: the constructor's arguments of our `UNet`, `NoisyClassifier` or `KLAutoencoder`.
        weights: its state dict.
        betas: (T,) the noise schedule, if the file has one.
        assumed: what was assumed or left out, for a report.
    """

    kind: Literal["denoiser", "classifier", "autoencoder"]
    network: dict[str, Any]
    weights: dict[str, Tensor]
    betas: Tensor | None = None
    assumed: list[str] = field(default_factory=list)

    def build(self) -> nn.Module:
        """Our network with the converted weights."""
        network = _KINDS[self.kind](**self.network)
        network.load_state_dict(self.weights)
        return network


_KINDS: dict[str, type[nn.Module]] = {"denoiser": UNet, "classifier": NoisyClassifier, "autoencoder": KLAutoencoder}


@dataclass(frozen=True)
class Rule:
    """One of our parameters, the published parameters that it is made from, and the function that makes it."""

    ours: str
    theirs: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


def apply(rules: Iterable[Rule], state: State, network: nn.Module, what: str) -> dict[str, Tensor]:
    """Apply the rules to a published state dict.

    Args:
        rules: one for each of our parameters.
        state: the published state dict.
        network: our network; only its names and shapes are used.
        what: the published network, for messages.

    Returns:
        Our state dict.

    Raises:
        ModelError: missing, remaining or wrongly shaped parameters.
    """
    expected = network.state_dict()
    rules = list(rules)
    used = {name for rule in rules for name in rule.theirs}
    problems = []
    if missing := sorted(used - set(state)):
        problems.append(f"missing {few(missing)}")
    if unexpected := sorted(set(state) - used):
        problems.append(f"unexpected {few(unexpected)}")
    result: dict[str, Tensor] = {}
    misshapen = []
    for rule in rules:
        if all(name in state for name in rule.theirs):
            tensor = rule.make(*(state[name].float() for name in rule.theirs))
            if tensor.shape != expected[rule.ours].shape:
                shapes = ", ".join(f"{name} {tuple(state[name].shape)}" for name in rule.theirs)
                misshapen.append(f"{shapes} for {tuple(expected[rule.ours].shape)}")
            result[rule.ours] = tensor.contiguous()
    if misshapen:
        problems.append(f"wrongly shaped {few(misshapen)}")
    if problems:
        raise ModelError(f"not a {what} that fits together: {'; '.join(problems)}; {nearest(state)}")
    assert set(result) | {"shift", "scale"} >= set(expected), sorted(set(expected) - set(result))
    return result


def same(ours: str, theirs: str, *parts: str) -> Iterator[Rule]:
    """Weight and bias, unchanged."""
    for part in parts or ("weight", "bias"):
        yield Rule(f"{ours}.{part}", (f"{theirs}.{part}",))


def pointwise(ours: str, theirs: str) -> Iterator[Rule]:
    """A convolution with kernel size 1, as a linear layer."""
    yield Rule(f"{ours}.weight", (f"{theirs}.weight",), lambda w: w.flatten(1))
    yield Rule(f"{ours}.bias", (f"{theirs}.bias",))


def joined(ours: str, theirs: Iterable[str], parts: Iterable[str]) -> Iterator[Rule]:
    """Several layers with the same input, concatenated to one layer."""
    for part in parts:
        yield Rule(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), lambda *w: torch.cat(w).squeeze())


def add_heads(settings: Mapping[str, Any], network: dict[str, Any], attention: bool) -> None:
    """Add the user's number of attention heads, which shapes do not show.

    Raises:
        UsageError: a network with attention, but no number of heads.
    """
    if not attention:
        return
    if "num_heads" not in settings and "head_channels" not in settings:
        raise UsageError(
            "this network has attention, and shapes do not tell its heads: add --set head_channels=N or num_heads=N"
        )
    network.update({name: int(settings[name]) for name in ("num_heads", "head_channels") if name in settings})


def blocks_of(modules: nn.Module) -> list[Block]:
    """The blocks in one of our U-Net's module lists."""
    return [module for module in modules.children() if isinstance(module, Block)]


def transformer_rules(ours: str, theirs: str, block: SpatialTransformer, monai: bool = False) -> Iterator[Rule]:
    """A spatial transformer with the names of latent-diffusion or MONAI."""
    wrapped = ".conv" if monai else ""
    yield from same(f"{ours}.norm", f"{theirs}.norm")
    yield from pointwise(f"{ours}.proj_in", f"{theirs}.proj_in{wrapped}")
    yield from pointwise(f"{ours}.proj_out", f"{theirs}.proj_out{wrapped}")
    out, gate, last = ("out_proj", "ff.linear1", "ff.linear2") if monai else ("to_out.0", "ff.net.0.proj", "ff.net.2")
    for i in range(len(block.layers)):
        mine, other = f"{ours}.layers.{i}", f"{theirs}.transformer_blocks.{i}"
        for name, attention in (("self_attention", "attn1"), ("cross_attention", "attn2")):
            yield from same(f"{mine}.{name}.q", f"{other}.{attention}.to_q", "weight")
            yield from joined(
                f"{mine}.{name}.kv", [f"{other}.{attention}.to_k", f"{other}.{attention}.to_v"], ["weight"]
            )
            yield from same(f"{mine}.{name}.proj", f"{other}.{attention}.{out}")
        yield from same(f"{mine}.gate", f"{other}.{gate}")
        yield from same(f"{mine}.out", f"{other}.{last}")
        for norm in ("norm1", "norm2", "norm3"):
            yield from same(f"{mine}.{norm}", f"{other}.{norm}")

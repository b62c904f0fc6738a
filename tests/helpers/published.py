"""The published networks, as functions of state dicts in the published names: what imported weights must agree with.

Written from the papers and from the published module structure (which layer has which name), independently of the
package: nothing here imports it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass
class Builder:
    """Random weights under published names."""

    state: State = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def weights(self, name: str, *shape: int, bias: bool = True) -> None:
        fan_in = math.prod(shape[1:]) or 1
        self.state[f"{name}.weight"] = torch.randn(shape, generator=self.generator) / math.sqrt(fan_in)
        if bias:
            self.state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=self.generator)

    def norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=self.generator)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=self.generator)


def conv(state: State, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    function = F.conv2d if x.ndim == 4 else F.conv3d
    return function(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=padding)


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def time_embedding(state: State, t: Tensor, channels: int) -> Tensor:
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(channels // 2) / (channels // 2))
    emb = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return linear(state, "time_embed.2", F.silu(linear(state, "time_embed.0", emb)))


# ---- the family of guided-diffusion ----------------------------------------------------------------------------------


@dataclass
class OpenAI:
    """Input blocks, middle block and output blocks of one configuration.

    Every module of a block is (name, kind): res, down, up (residual blocks), op, conv (resampling), attention,
    transformer.
    """

    dims: int = 2
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 32
    mult: tuple[int, ...] = (1, 2)
    depth: int = 1
    attention: tuple[bool, ...] = (False, True)
    heads: int = 2
    scale_shift: bool = True
    new_order: bool = False
    resblock_updown: bool = False
    classes: int | None = None
    context: int | None = None
    layers: int = 1
    classifier_side: int | None = None
    resample_by_convolution: bool = True

    def __post_init__(self) -> None:
        self.builder = Builder()
        self.state = self.builder.state
        c, emb = self.channels, 4 * self.channels
        self.builder.weights("time_embed.0", emb, c)
        self.builder.weights("time_embed.2", emb, emb)
        if self.classes is not None:
            self.builder.weights("label_emb", self.classes, emb, bias=False)
        self.builder.weights("input_blocks.0.0", c, self.in_channels, *[3] * self.dims)
        self.inputs: list[list[tuple[str, str]]] = []
        skips, width = [c], c
        for level, m in enumerate(self.mult):
            for _ in range(self.depth):
                name = f"input_blocks.{len(self.inputs) + 1}"
                block = [self._res(f"{name}.0", width, m * c)]
                width = m * c
                if self.attention[level]:
                    block.append(self._attention(f"{name}.1", width))
                self.inputs.append(block)
                skips.append(width)
            if level < len(self.mult) - 1:
                name = f"input_blocks.{len(self.inputs) + 1}"
                self.inputs.append([self._down(f"{name}.0", width)])
                skips.append(width)
        self.middle = [
            self._res("middle_block.0", width, width),
            self._attention("middle_block.1", width),
            self._res("middle_block.2", width, width),
        ]
        self.outputs: list[list[tuple[str, str]]] = []
        if self.classifier_side is not None:
            self.builder.norm("out.0", width)
            positions = (self.classifier_side // 2 ** (len(self.mult) - 1)) ** self.dims + 1
            self.state["out.2.positional_embedding"] = torch.randn(width, positions, generator=self.builder.generator)
            self.builder.weights("out.2.qkv_proj", 3 * width, width, 1)
            self.builder.weights("out.2.c_proj", self.out_channels, width, 1)
            return
        for level, m in reversed(list(enumerate(self.mult))):
            for i in range(self.depth + 1):
                name = f"output_blocks.{len(self.outputs)}"
                block = [self._res(f"{name}.0", width + skips.pop(), m * c)]
                width = m * c
                if self.attention[level]:
                    block.append(self._attention(f"{name}.1", width))
                if level and i == self.depth:
                    block.append(self._up(f"{name}.{len(block)}", width))
                self.outputs.append(block)
        self.builder.norm("out.0", width)
        self.builder.weights("out.2", self.out_channels, width, *[3] * self.dims)

    def _res(self, name: str, inside: int, outside: int, kind: str = "res") -> tuple[str, str]:
        kernel, emb = [3] * self.dims, 4 * self.channels
        self.builder.norm(f"{name}.in_layers.0", inside)
        self.builder.weights(f"{name}.in_layers.2", outside, inside, *kernel)
        self.builder.weights(f"{name}.emb_layers.1", (1 + self.scale_shift) * outside, emb)
        self.builder.norm(f"{name}.out_layers.0", outside)
        self.builder.weights(f"{name}.out_layers.3", outside, outside, *kernel)
        if inside != outside:
            self.builder.weights(f"{name}.skip_connection", outside, inside, *[1] * self.dims)
        return name, kind

    def _down(self, name: str, width: int) -> tuple[str, str]:
        if self.resblock_updown:
            return self._res(name, width, width, "down")
        if not self.resample_by_convolution:
            return name, "pool"
        self.builder.weights(f"{name}.op", width, width, *[3] * self.dims)
        return name, "op"

    def _up(self, name: str, width: int) -> tuple[str, str]:
        if self.resblock_updown:
            return self._res(name, width, width, "up")
        if not self.resample_by_convolution:
            return name, "repeat"
        self.builder.weights(f"{name}.conv", width, width, *[3] * self.dims)
        return name, "conv"

    def _attention(self, name: str, width: int) -> tuple[str, str]:
        b = self.builder
        b.norm(f"{name}.norm", width)
        if self.context is None:
            b.weights(f"{name}.qkv", 3 * width, width, 1)
            b.weights(f"{name}.proj_out", width, width, 1)
            return name, "attention"
        b.weights(f"{name}.proj_in", width, width, *[1] * self.dims)
        b.weights(f"{name}.proj_out", width, width, *[1] * self.dims)
        for i in range(self.layers):
            layer = f"{name}.transformer_blocks.{i}"
            for attention, source in (("attn1", width), ("attn2", self.context)):
                b.weights(f"{layer}.{attention}.to_q", width, width, bias=False)
                b.weights(f"{layer}.{attention}.to_k", width, source, bias=False)
                b.weights(f"{layer}.{attention}.to_v", width, source, bias=False)
                b.weights(f"{layer}.{attention}.to_out.0", width, width)
            b.weights(f"{layer}.ff.net.0.proj", 8 * width, width)
            b.weights(f"{layer}.ff.net.2", width, 4 * width)
            for number in (1, 2, 3):
                b.norm(f"{layer}.norm{number}", width)
        return name, "transformer"

    # -- forward --

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        s = self.state
        emb = time_embedding(s, t, self.channels)
        if y is not None:
            emb = emb + s["label_emb.weight"][y]
        h = conv(s, "input_blocks.0.0", x)
        skips = [h]
        for block in self.inputs:
            for module in block:
                h = self._run(*module, h, emb, context)
            skips.append(h)
        for module in self.middle:
            h = self._run(*module, h, emb, context)
        if self.classifier_side is not None:
            return self._pool(F.silu(norm(s, "out.0", h, 1e-5)))
        for block in self.outputs:
            h = torch.cat([h, skips.pop()], dim=1)
            for module in block:
                h = self._run(*module, h, emb, context)
        return conv(s, "out.2", F.silu(norm(s, "out.0", h, 1e-5)))

    def _run(self, name: str, kind: str, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        s = self.state
        if kind == "op":
            return conv(s, f"{name}.op", h, stride=2)
        if kind == "conv":
            return conv(s, f"{name}.conv", self._resized(h, "up"))
        if kind in ("pool", "repeat"):
            return self._resized(h, "down" if kind == "pool" else "up")
        if kind == "attention":
            return self._self_attention(name, h)
        if kind == "transformer":
            return self._transformer(name, h, context)
        inner = self._resized(F.silu(norm(s, f"{name}.in_layers.0", h, 1e-5)), kind)
        inner = conv(s, f"{name}.in_layers.2", inner)
        change = linear(s, f"{name}.emb_layers.1", F.silu(emb))[(..., *[None] * self.dims)]
        if self.scale_shift:
            scale, shift = change.chunk(2, dim=1)
            inner = norm(s, f"{name}.out_layers.0", inner, 1e-5) * (1 + scale) + shift
        else:
            inner = norm(s, f"{name}.out_layers.0", inner + change, 1e-5)
        inner = conv(s, f"{name}.out_layers.3", F.silu(inner))
        h = self._resized(h, kind)
        if f"{name}.skip_connection.weight" in s:
            h = conv(s, f"{name}.skip_connection", h, padding=0)
        return h + inner

    def _resized(self, h: Tensor, kind: str) -> Tensor:
        if kind == "down":
            return (F.avg_pool2d if self.dims == 2 else F.avg_pool3d)(h, 2)
        return F.interpolate(h, scale_factor=2.0, mode="nearest") if kind == "up" else h

    def _self_attention(self, name: str, h: Tensor) -> Tensor:
        s, tokens = self.state, norm(self.state, f"{name}.norm", h, 1e-5).flatten(2)
        qkv = F.conv1d(tokens, s[f"{name}.qkv.weight"], s[f"{name}.qkv.bias"])
        mixed = self._mix(qkv, self.new_order)
        return h + F.conv1d(mixed, s[f"{name}.proj_out.weight"], s[f"{name}.proj_out.bias"]).reshape(h.shape)

    def _mix(self, qkv: Tensor, new_order: bool) -> Tensor:
        """softmax attention of (B, 3 C, L): legacy rows are head by head, new ones queries, keys, values."""
        batch, rows, length = qkv.shape
        size = rows // 3 // self.heads
        if new_order:
            q, k, v = (part.reshape(batch * self.heads, size, length) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch * self.heads, 3 * size, length).split(size, dim=1)
        weights = (torch.einsum("bct,bcs->bts", q, k) / math.sqrt(size)).softmax(dim=-1)
        return torch.einsum("bts,bcs->bct", weights, v).reshape(batch, -1, length)

    def _pool(self, h: Tensor) -> Tensor:
        s = self.state
        tokens = h.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + s["out.2.positional_embedding"]
        qkv = F.conv1d(tokens, s["out.2.qkv_proj.weight"], s["out.2.qkv_proj.bias"])
        mixed = self._mix(qkv, new_order=True)
        return F.conv1d(mixed, s["out.2.c_proj.weight"], s["out.2.c_proj.bias"])[:, :, 0]

    def _transformer(self, name: str, h: Tensor, context: Tensor | None) -> Tensor:
        s = self.state
        x = conv(s, f"{name}.proj_in", norm(s, f"{name}.norm", h, 1e-6), padding=0).flatten(2).transpose(1, 2)
        for i in range(self.layers):
            layer = f"{name}.transformer_blocks.{i}"
            x = x + self._cross(f"{layer}.attn1", self._layer_norm(f"{layer}.norm1", x), None)
            x = x + self._cross(f"{layer}.attn2", self._layer_norm(f"{layer}.norm2", x), context)
            value, gate = linear(s, f"{layer}.ff.net.0.proj", self._layer_norm(f"{layer}.norm3", x)).chunk(2, dim=-1)
            x = x + linear(s, f"{layer}.ff.net.2", value * F.gelu(gate))
        return h + conv(s, f"{name}.proj_out", x.transpose(1, 2).reshape(h.shape), padding=0)

    def _layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _cross(self, name: str, x: Tensor, context: Tensor | None) -> Tensor:
        source = x if context is None else context
        parts = []
        q, k, v = (linear(self.state, f"{name}.{p}", y) for p, y in (("to_q", x), ("to_k", source), ("to_v", source)))
        for head in range(self.heads):
            size = q.shape[-1] // self.heads
            own = slice(head * size, (head + 1) * size)
            weights = (q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(size)).softmax(dim=-1)
            parts.append(weights @ v[..., own])
        return linear(self.state, f"{name}.to_out.0", torch.cat(parts, dim=-1))


# ---- the autoencoder of latent-diffusion -----------------------------------------------------------------------------


@dataclass
class LatentAutoencoder:
    """Encoder to the 2 z moments, decoder back; attention at chosen levels and in the middle."""

    channels: int = 32
    mult: tuple[int, ...] = (1, 2)
    depth: int = 2
    attention: tuple[bool, ...] = (False, False)
    latent: int = 4
    in_channels: int = 3

    def __post_init__(self) -> None:
        self.builder = Builder()
        self.state = self.builder.state
        b, c = self.builder, self.channels
        widths = [m * c for m in self.mult]
        b.weights("encoder.conv_in", c, self.in_channels, 3, 3)
        width = c
        for i, wanted in enumerate(widths):
            for j in range(self.depth):
                self._res(f"encoder.down.{i}.block.{j}", width, wanted)
                width = wanted
                if self.attention[i]:
                    self._attention(f"encoder.down.{i}.attn.{j}", width)
            if i < len(widths) - 1:
                b.weights(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
        for side, outside in (("encoder", 2 * self.latent), ("decoder", self.in_channels)):
            self._res(f"{side}.mid.block_1", widths[-1], widths[-1])
            self._attention(f"{side}.mid.attn_1", widths[-1])
            self._res(f"{side}.mid.block_2", widths[-1], widths[-1])
            last = widths[-1] if side == "encoder" else widths[0]
            b.norm(f"{side}.norm_out", last)
            b.weights(f"{side}.conv_out", outside, last, 3, 3)
        b.weights("decoder.conv_in", widths[-1], self.latent, 3, 3)
        width = widths[-1]
        for i, wanted in reversed(list(enumerate(widths))):
            for j in range(self.depth + 1):
                self._res(f"decoder.up.{i}.block.{j}", width, wanted)
                width = wanted
                if self.attention[i]:
                    self._attention(f"decoder.up.{i}.attn.{j}", width)
            if i:
                b.weights(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
        b.weights("quant_conv", 2 * self.latent, 2 * self.latent, 1, 1)
        b.weights("post_quant_conv", self.latent, self.latent, 1, 1)

    def _res(self, name: str, inside: int, outside: int) -> None:
        self.builder.norm(f"{name}.norm1", inside)
        self.builder.weights(f"{name}.conv1", outside, inside, 3, 3)
        self.builder.norm(f"{name}.norm2", outside)
        self.builder.weights(f"{name}.conv2", outside, outside, 3, 3)
        if inside != outside:
            self.builder.weights(f"{name}.nin_shortcut", outside, inside, 1, 1)

    def _attention(self, name: str, width: int) -> None:
        self.builder.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.builder.weights(f"{name}.{part}", width, width, 1, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.state
        h = conv(s, "encoder.conv_in", x)
        for i in range(len(self.mult)):
            for j in range(self.depth):
                h = self._run_res(f"encoder.down.{i}.block.{j}", h)
                if self.attention[i]:
                    h = self._run_attention(f"encoder.down.{i}.attn.{j}", h)
            if i < len(self.mult) - 1:
                h = conv(s, f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = self._finish("encoder", self._run_middle("encoder", h))
        mean, log_variance = conv(s, "quant_conv", h, padding=0).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        s = self.state
        h = self._run_middle("decoder", conv(s, "decoder.conv_in", conv(s, "post_quant_conv", z, padding=0)))
        for i in reversed(range(len(self.mult))):
            for j in range(self.depth + 1):
                h = self._run_res(f"decoder.up.{i}.block.{j}", h)
                if self.attention[i]:
                    h = self._run_attention(f"decoder.up.{i}.attn.{j}", h)
            if i:
                h = conv(s, f"decoder.up.{i}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self._finish("decoder", h)

    def _finish(self, side: str, h: Tensor) -> Tensor:
        return conv(self.state, f"{side}.conv_out", F.silu(norm(self.state, f"{side}.norm_out", h, 1e-6)))

    def _run_middle(self, side: str, h: Tensor) -> Tensor:
        h = self._run_attention(f"{side}.mid.attn_1", self._run_res(f"{side}.mid.block_1", h))
        return self._run_res(f"{side}.mid.block_2", h)

    def _run_res(self, name: str, h: Tensor) -> Tensor:
        s = self.state
        inner = conv(s, f"{name}.conv1", F.silu(norm(s, f"{name}.norm1", h, 1e-6)))
        inner = conv(s, f"{name}.conv2", F.silu(norm(s, f"{name}.norm2", inner, 1e-6)))
        if f"{name}.nin_shortcut.weight" in s:
            h = conv(s, f"{name}.nin_shortcut", h, padding=0)
        return h + inner

    def _run_attention(self, name: str, h: Tensor) -> Tensor:
        s, inside = self.state, norm(self.state, f"{name}.norm", h, 1e-6)
        q, k, v = (conv(s, f"{name}.{part}", inside, padding=0).flatten(2) for part in ("q", "k", "v"))
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
        mixed = (v @ weights.transpose(1, 2)).reshape(h.shape)
        return h + conv(s, f"{name}.proj_out", mixed, padding=0)


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path

"""The parts of diffusion U-Nets: residual blocks with time, resampling, self- and cross-attention; 2D and 3D."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resampling = Literal["none", "down", "up"]
ResamplingKind = Literal["resblock", "conv", "plain"]


class _Conv3d(nn.Conv3d):
    """A convolution that uses oneDNN also for a single small volume.

    For a batch of one with channels x depth x height below about 20,000, PyTorch uses a fallback that takes seven times
    as long (`use_mkldnn` in its Convolution.cpp). A crop of an organ is that small at every level of a U-Net. Compilers
    and the ONNX exporter do not know oneDNN's own convolution.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        lone = x.device.type == "cpu" and x.shape[0] == 1 and x.dtype == torch.float32
        plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        if lone and plain and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
            padding = cast(tuple[int, ...], self.padding)
            return torch.mkldnn_convolution(x, weight, bias, padding, self.stride, self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)


def speed_up_lone_volumes(module: nn.Module) -> None:
    """Make the 3D convolutions of a module from another library fast for single volumes, as those of `conv` are."""
    for part in module.modules():
        if type(part) is nn.Conv3d:
            part.__class__ = _Conv3d


def conv(dims: int, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A convolution in ``dims`` dimensions with "same" padding for odd kernels."""
    layer = {2: nn.Conv2d, 3: _Conv3d}[dims]
    return layer(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)


def normalisation(channels: int, eps: float = 1e-5, groups: int = 32) -> nn.GroupNorm:
    """Group normalisation with gcd(``groups``, ``channels``) groups.

    The published number of 32 is for 128 and more channels. With one channel per group, every channel loses its mean
    over the image, and with it global properties such as brightness.
    """
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=eps)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all parameters set to 0, so that its branch has no effect at the start of training."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, channels: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding (B, channels) float32 of ``timesteps`` (B,), cosines first (Vaswani et al. 2017)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, channels % 2))


class ResBlock(nn.Module):
    """norm-SiLU-[resample]-conv, time embedding, norm-SiLU-dropout-conv, plus the (resampled, projected) input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        emb_channels: length of the time embedding; 0 for a block without time.
        dims: 2 or 3.
        dropout: probability, before the second convolution.
        resampling: "down" halves (average pooling), "up" doubles (nearest) both branches.
        scale_shift: the embedding scales and shifts the second normalisation's output (Dhariwal & Nichol's AdaGN);
            otherwise it is added before that normalisation (Ho et al.).
        norm_eps: epsilon of the group normalisations.
        norm_groups: groups of the group normalisations.
    """

    # many: the options of the published residual blocks, which `Parts` fills in
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dims: int,
        dropout: float = 0.0,
        resampling: Resampling = "none",
        scale_shift: bool = True,
        norm_eps: float = 1e-5,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.resampling: Resampling = resampling
        self.dims = dims
        self.scale_shift = scale_shift
        self.norm1 = normalisation(in_channels, norm_eps, norm_groups)
        self.conv1 = conv(dims, in_channels, out_channels)
        self.emb = nn.Linear(emb_channels, (1 + scale_shift) * out_channels) if emb_channels else None
        self.norm2 = normalisation(out_channels, norm_eps, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv(dims, out_channels, out_channels))
        self.skip = nn.Identity() if in_channels == out_channels else conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(resample(F.silu(self.norm1(x)), self.resampling))
        if self.emb is None or emb is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self._time(x, self.emb, emb).chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + self._time(x, self.emb, emb))
        return self.skip(resample(x, self.resampling)) + self.conv2(self.dropout(F.silu(h)))

    def _time(self, x: Tensor, layer: nn.Linear, emb: Tensor) -> Tensor:
        return cast(Tensor, layer(F.silu(emb)).reshape(x.shape[0], -1, *[1] * self.dims))


def resample(x: Tensor, resampling: Resampling) -> Tensor:
    """Halve every spatial axis of (B, C, *S) by averaging, double it by repetition, or leave it ("none")."""
    if resampling == "down":
        return (F.avg_pool2d if x.ndim == 4 else F.avg_pool3d)(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if resampling == "up" else x


class Resample(nn.Module):
    """Resampling without a residual block; the kind "conv" has a learned 3^dims convolution (stride 2 for "down")."""

    def __init__(self, channels: int, dims: int, resampling: Resampling, kind: ResamplingKind) -> None:
        super().__init__()
        self.resampling = resampling
        stride = 2 if resampling == "down" else 1
        self.conv = conv(dims, channels, channels, stride=stride) if kind == "conv" else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        if self.conv is None:
            return resample(x, self.resampling)
        return cast(Tensor, self.conv(x if self.resampling == "down" else resample(x, "up")))


def padded_to(x: Tensor, multiple: int) -> Tensor:
    """Pads (B, C, *S) at the end of every axis to a multiple: images repeat the border, labels get background."""
    missing = [-n % multiple for n in x.shape[2:]]
    if not any(missing):
        return x
    pad = [amount for m in reversed(missing) for amount in (0, m)]
    return F.pad(x, pad, mode="replicate") if x.is_floating_point() else F.pad(x, pad)


def heads_of(channels: int, head_channels: int, num_heads: int | None = None) -> int:
    """The number of attention heads: ``num_heads``, or ``channels`` / ``head_channels`` if it is None.

    Raises:
        ValueError: a number that does not divide the channels.
    """
    count = num_heads or (channels // head_channels if channels % head_channels == 0 else 0)
    if not count or channels % count:
        setting = f"{num_heads} heads" if num_heads else f"head_channels ({head_channels})"
        raise ValueError(f"{setting} must divide the channels ({channels})")
    return count


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention, softmax(q k^T / sqrt(d)) v per head, of tokens (B, L, C)."""
    q, k, v = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual connection.

    The rows of ``qkv`` are all queries, then all keys, then all values, and within each the heads in order. Guided
    diffusion calls this its new order. Weights in its older order are permuted when they are imported.
    """

    def __init__(
        self,
        channels: int,
        dims: int,
        head_channels: int,
        num_heads: int | None = None,
        norm_eps: float = 1e-5,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.num_heads = heads_of(channels, head_channels, num_heads)
        self.norm = normalisation(channels, norm_eps, norm_groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=2)
        h = self.proj(attend(q, k, v, self.num_heads))
        return x + h.transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of tokens (B, L, C) to a context (B, M, D), or self-attention without a context."""

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_channels, 2 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=2)
        return cast(Tensor, self.proj(attend(self.q(x), k, v, self.heads)))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward layer, each residual and after a LayerNorm."""

    def __init__(self, channels: int, context_channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = CrossAttention(channels, channels, heads)
        self.cross_attention = CrossAttention(channels, context_channels, heads)
        self.gate = nn.Linear(channels, 8 * channels)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context)
        value, gate = self.gate(self.norm3(x)).chunk(2, dim=2)
        return x + cast(Tensor, self.out(self.dropout(value * F.gelu(gate))))


class SpatialTransformer(nn.Module):
    """Transformer layers over all positions, conditioned by a context (Rombach et al. 2022, sec. 3.3).

    Without a context, the second attention of each layer is self-attention too, which needs ``context_channels`` equal
    to ``channels``.
    """

    def __init__(
        self,
        channels: int,
        dims: int,
        context_channels: int,
        head_channels: int,
        num_heads: int | None = None,
        depth: int = 1,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        heads = heads_of(channels, head_channels, num_heads)
        self.norm = normalisation(channels, 1e-6, norm_groups)
        self.proj_in = nn.Linear(channels, channels)
        self.layers = nn.ModuleList(TransformerLayer(channels, context_channels, heads, dropout) for _ in range(depth))
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for layer in self.layers:
            tokens = layer(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """One entry of the encoder or decoder: a residual or resampling block, with optional attention and upsampling."""

    def __init__(
        self,
        res: ResBlock | Resample,
        attention: AttentionBlock | SpatialTransformer | None = None,
        up: ResBlock | Resample | None = None,
    ) -> None:
        super().__init__()
        self.res = res
        self.attention = attention
        self.up = up

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        h = self.res(x, emb)
        if isinstance(self.attention, SpatialTransformer):
            h = self.attention(h, context)
        elif self.attention is not None:
            h = self.attention(h)
        return h if self.up is None else self.up(h, emb)


@dataclass(frozen=True)
class Parts:
    """The options that all blocks of a network share, and the functions that build the blocks.

    The attributes are those of `medseg_diffusion.networks.unet.UNet`. ``emb_channels`` is the length of its embedding.
    """

    dims: int
    emb_channels: int
    attention_factors: tuple[int, ...] = ()
    head_channels: int = 32
    num_heads: int | None = None
    dropout: float = 0.0
    resampling: ResamplingKind = "resblock"
    scale_shift: bool = True
    norm_eps: float = 1e-5
    norm_groups: int = 32
    context_channels: int | None = None
    transformer_depth: int = 1

    def res(self, in_channels: int, out_channels: int, direction: Resampling = "none") -> ResBlock:
        return ResBlock(
            in_channels,
            out_channels,
            self.emb_channels,
            self.dims,
            self.dropout,
            direction,
            self.scale_shift,
            self.norm_eps,
            self.norm_groups,
        )

    def resampler(self, width: int, direction: Resampling) -> ResBlock | Resample:
        if self.resampling == "resblock":
            return self.res(width, width, direction)
        return Resample(width, self.dims, direction, self.resampling)

    def attention(self, width: int) -> AttentionBlock | SpatialTransformer:
        if self.context_channels is None:
            return AttentionBlock(width, self.dims, self.head_channels, self.num_heads, self.norm_eps, self.norm_groups)
        return SpatialTransformer(
            width,
            self.dims,
            self.context_channels,
            self.head_channels,
            self.num_heads,
            self.transformer_depth,
            self.dropout,
            self.norm_groups,
        )

    def attention_at(self, width: int, level: int) -> AttentionBlock | SpatialTransformer | None:
        return self.attention(width) if 2**level in self.attention_factors else None

    def encoder(self, channels: int, widths: list[int], depths: list[int]) -> tuple[nn.ModuleList, list[int]]:
        """The blocks after the first convolution, and the widths of all skip connections, the first one included.

        Args:
            channels: width of the first convolution's output.
            widths: width of each level.
            depths: residual blocks of each level.
        """
        blocks, skips, width = nn.ModuleList(), [channels], channels
        for level, (level_width, depth) in enumerate(zip(widths, depths, strict=True)):
            for _ in range(depth):
                blocks.append(Block(self.res(width, level_width), self.attention_at(level_width, level)))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                blocks.append(Block(self.resampler(width, "down")))
                skips.append(width)
        return blocks, skips

    def middle(self, width: int, attention: bool) -> nn.ModuleList:
        """The two blocks of the lowest level."""
        return nn.ModuleList(
            [Block(self.res(width, width), self.attention(width) if attention else None), Block(self.res(width, width))]
        )

    def decoder(self, width: int, skips: list[int], widths: list[int], depths: list[int]) -> nn.ModuleList:
        """The decoder's blocks, which mirror those of the encoder with one more in each level.

        Args:
            width: width of the bottleneck.
            skips: widths of the skip connections, from `encoder`.
            widths: width of each level.
            depths: residual blocks of each encoder level.
        """
        blocks, skips = nn.ModuleList(), list(skips)
        for level, (level_width, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
            for i in range(depth + 1):
                in_channels, width = width + skips.pop(), level_width
                up = self.resampler(width, "up") if level and i == depth else None
                blocks.append(Block(self.res(in_channels, width), self.attention_at(width, level), up))
        return blocks

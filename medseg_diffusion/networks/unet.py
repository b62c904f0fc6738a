"""The U-Net of guided diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233, "ADM"), in 2D and 3D from the same code.

Residual blocks with adaptive group normalisation (scale and shift from the time embedding), down- and upsampling
inside residual blocks (BigGAN), multi-head self-attention at chosen levels, zero-initialised last layers. The encoder,
middle and decoder are lists of blocks in the published order, so that activations have the published indices.
Volumes are expensive at full resolution: a patch size p folds p^dims positions into channels before the first and
after the last block (Hoogeboom et al. 2023, arXiv 2301.11093, sec. 3), and "plain" resampling has no convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medseg_diffusion.diffusion.denoiser import Condition

Resampling = Literal["none", "down", "up"]
ResamplingKind = Literal["resblock", "conv", "plain"]
Collect = Callable[[str, Tensor], None]


def conv(dims: int, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A convolution in ``dims`` dimensions with "same" padding for odd kernels."""
    layer = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return layer(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)


def normalisation(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups, or as many as divide the channels and 32."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all parameters 0, so that its branch starts as nothing."""
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
    """norm-SiLU-[resample]-conv, AdaGN(emb)-SiLU-dropout-conv, plus the (resampled, projected) input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        emb_channels: length of the time embedding.
        dims: 2 or 3.
        dropout: probability, before the second convolution.
        resampling: "down" halves (average pooling), "up" doubles (nearest) both branches.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dims: int,
        dropout: float = 0.0,
        resampling: Resampling = "none",
    ) -> None:
        super().__init__()
        self.resampling: Resampling = resampling
        self.dims = dims
        self.norm1 = normalisation(in_channels)
        self.conv1 = conv(dims, in_channels, out_channels)
        self.emb = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = normalisation(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv(dims, out_channels, out_channels))
        self.skip = nn.Identity() if in_channels == out_channels else conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self._resample(F.silu(self.norm1(x))))
        scale, shift = self.emb(F.silu(emb)).reshape(len(x), -1, *[1] * self.dims).chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(self._resample(x)) + self.conv2(self.dropout(F.silu(h)))

    def _resample(self, x: Tensor) -> Tensor:
        return resample(x, self.resampling)


def resample(x: Tensor, resampling: Resampling) -> Tensor:
    """Halves every spatial axis of (B, C, *S) by averaging, or doubles it by repetition."""
    if resampling == "down":
        return (F.avg_pool2d if x.ndim == 4 else F.avg_pool3d)(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if resampling == "up" else x


class Resample(nn.Module):
    """Resampling without a residual block; "conv" learns a 3^dims convolution with it (stride 2 downwards)."""

    def __init__(self, channels: int, dims: int, resampling: Resampling, kind: ResamplingKind) -> None:
        super().__init__()
        self.resampling = resampling
        stride = 2 if resampling == "down" else 1
        self.conv = conv(dims, channels, channels, stride=stride) if kind == "conv" else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.conv is None:
            return resample(x, self.resampling)
        return cast(Tensor, self.conv(x if self.resampling == "down" else resample(x, "up")))


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, dims: int, head_channels: int) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"head_channels ({head_channels}) must divide the channels ({channels})")
        self.num_heads = channels // head_channels
        self.norm = normalisation(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(batch, -1, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens.shape)
        return x + self.proj(h).transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """One entry of the encoder or decoder: a residual (or resampling) block, perhaps attention, perhaps upsampling."""

    def __init__(
        self, res: ResBlock | Resample, attention: AttentionBlock | None = None, up: ResBlock | Resample | None = None
    ) -> None:
        super().__init__()
        self.res = res
        self.attention = attention
        self.up = up

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.res(x, emb)
        if self.attention is not None:
            h = self.attention(h)
        return h if self.up is None else self.up(h, emb)


class UNet(nn.Module):
    """A time-conditional U-Net: (x (B, in_channels, *S), timesteps (B,), cond) -> (B, out_channels, *S).

    Any spatial size: the input is padded by replication to a multiple of ``factor`` = patch_size 2^(levels - 1) and
    the output cropped. The condition's entry "concat" (B, C', *S) is concatenated to x (``in_channels`` counts both);
    "stem" (B, channels, *S / patch_size), made from the padded image, is added after the first convolution.

    Args:
        dims: 2 or 3 spatial dimensions.
        in_channels: channels of x and of the concatenated condition together.
        out_channels: channels of the output.
        channels: width of the first level.
        channel_mult: width of each level as a multiple of ``channels``; as many levels as entries.
        num_res_blocks: residual blocks of each encoder level (the decoder has one more); an int for all levels.
        attention_factors: downsampling factors (1, 2, 4, ...) at which residual blocks are followed by attention.
        head_channels: channels of each attention head.
        dropout: probability in the residual blocks.
        resampling: "resblock" inside residual blocks (ADM), "conv" by a convolution, "plain" by pooling and repetition.
        patch_size: side of the patches that are folded into channels; 1 is the published network.
        checkpointing: recompute the blocks' activations in the backward pass to save memory.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int | Sequence[int] = 2,
        attention_factors: Sequence[int] = (),
        head_channels: int = 32,
        dropout: float = 0.0,
        resampling: ResamplingKind = "resblock",
        patch_size: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        depths = [num_res_blocks] * len(channel_mult) if isinstance(num_res_blocks, int) else list(num_res_blocks)
        if dims not in (2, 3) or len(depths) != len(channel_mult):
            raise ValueError(
                f"dims must be 2 or 3, with one num_res_blocks a level: got {dims}, {depths}, {channel_mult}"
            )
        self.dims = dims
        self.in_channels = in_channels
        self.channels = channels
        self.checkpointing = checkpointing
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(channel_mult) - 1)
        emb = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def res(inside: int, outside: int) -> ResBlock:
            return ResBlock(inside, outside, emb, dims, dropout)

        def resampler(width: int, direction: Resampling) -> ResBlock | Resample:
            if resampling == "resblock":
                return ResBlock(width, width, emb, dims, dropout, direction)
            return Resample(width, dims, direction, resampling)

        def attention(width: int, level: int) -> AttentionBlock | None:
            return AttentionBlock(width, dims, head_channels) if 2**level in attention_factors else None

        self.stem = conv(dims, in_channels * patch_size**dims, channels)
        self.encoder = nn.ModuleList()
        skips, width = [channels], channels
        for level, (mult, depth) in enumerate(zip(channel_mult, depths, strict=True)):
            for _ in range(depth):
                self.encoder.append(Block(res(width, mult * channels), attention(mult * channels, level)))
                width = mult * channels
                skips.append(width)
            if level < len(channel_mult) - 1:
                self.encoder.append(Block(resampler(width, "down")))
                skips.append(width)
        use_middle = bool(attention_factors)
        self.middle = nn.ModuleList(
            [
                Block(res(width, width), AttentionBlock(width, dims, head_channels) if use_middle else None),
                Block(res(width, width)),
            ]
        )
        self.decoder = nn.ModuleList()
        for level, (mult, depth) in reversed(list(enumerate(zip(channel_mult, depths, strict=True)))):
            for i in range(depth + 1):
                inside, width = width + skips.pop(), mult * channels
                up = resampler(width, "up") if level and i == depth else None
                self.decoder.append(Block(res(inside, width), attention(width, level), up))
        self.out = nn.Sequential(
            normalisation(width), nn.SiLU(), zeroed(conv(dims, width, out_channels * patch_size**dims))
        )

    def encode_condition(self, image: Tensor) -> Condition:
        """What conditions every step: for this network the image (B, C', *S) itself, concatenated."""
        return {"concat": image}

    def forward(self, x: Tensor, timesteps: Tensor, cond: Condition | None = None) -> Tensor:
        return self._run(x, timesteps, cond or {}, lambda name, h: None)

    def activations(
        self, x: Tensor, timesteps: Tensor, cond: Condition | None = None, names: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The outputs of the named blocks, "encoder.i", "middle.i", "decoder.i": (B, C_i, *S_i) of the padded input.

        Raises:
            ValueError: a name that the network does not have, with those it has.
        """
        found: dict[str, Tensor] = {}
        if unknown := set(names) - set(self.block_names()):
            raise ValueError(f"no activations {sorted(unknown)}; this network has {self.block_names()}")
        self._run(x, timesteps, cond or {}, lambda name, h: found.update({name: h} if name in names else {}))
        return found

    def block_names(self) -> list[str]:
        """Names of all activations, in the order of computation."""
        parts = (("encoder", self.encoder), ("middle", self.middle), ("decoder", self.decoder))
        return [f"{part}.{i}" for part, blocks in parts for i in range(len(blocks))]

    def _run(self, x: Tensor, timesteps: Tensor, cond: Condition, collect: Collect) -> Tensor:
        if "concat" in cond:
            x = torch.cat([x, cond["concat"]], dim=1)
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected (B, {self.in_channels}, {self.dims} axes) with the condition, got {tuple(x.shape)}"
            )
        size = x.shape[2:]
        emb = self.time_embed(timestep_embedding(timesteps, self.channels).to(x.dtype))
        h = self.stem(fold(self.padded(x), self.patch_size))
        if "stem" in cond:
            h = h + cond["stem"]
        skips = [h]
        for i, block in enumerate(self.encoder):
            h = self._call_block(block, h, emb)
            collect(f"encoder.{i}", h)
            skips.append(h)
        for i, block in enumerate(self.middle):
            h = self._call_block(block, h, emb)
            collect(f"middle.{i}", h)
        for i, block in enumerate(self.decoder):
            h = self._call_block(block, torch.cat([h, skips.pop()], dim=1), emb)
            collect(f"decoder.{i}", h)
        return unfold(self.out(h), self.patch_size)[(slice(None), slice(None), *(slice(0, n) for n in size))]

    def _call_block(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, h, emb, use_reentrant=False))
        return cast(Tensor, block(h, emb))

    def padded(self, x: Tensor) -> Tensor:
        """(B, C, *S) with every spatial axis extended by replication, at its end, to a multiple of ``factor``."""
        missing = [-n % self.factor for n in x.shape[2:]]
        if not any(missing):
            return x
        return F.pad(x, [amount for m in reversed(missing) for amount in (0, m)], mode="replicate")


def fold(x: Tensor, size: int) -> Tensor:
    """(B, C, *S) to (B, C size^dims, *S / size): patches of ``size`` positions an axis become channels."""
    if size == 1:
        return x
    pattern = "b c (h p) (w q) -> b (c p q) h w" if x.ndim == 4 else "b c (d o) (h p) (w q) -> b (c o p q) d h w"
    axes = {"p": size, "q": size} if x.ndim == 4 else {"o": size, "p": size, "q": size}
    return rearrange(x, pattern, **axes)


def unfold(x: Tensor, size: int) -> Tensor:
    """The inverse of `fold`."""
    if size == 1:
        return x
    pattern = "b (c p q) h w -> b c (h p) (w q)" if x.ndim == 4 else "b (c o p q) d h w -> b c (d o) (h p) (w q)"
    axes = {"p": size, "q": size} if x.ndim == 4 else {"o": size, "p": size, "q": size}
    return rearrange(x, pattern, **axes)

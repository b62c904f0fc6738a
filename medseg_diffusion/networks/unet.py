"""The U-Net of guided diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233, "ADM"), in 2D and 3D from the same code.

It has residual blocks with adaptive group normalisation (scale and shift from the time embedding), down- and upsampling
inside residual blocks (BigGAN), multi-head self-attention at some levels, and zero-initialised last layers. Encoder,
middle and decoder are lists of blocks in the published order, so that activations have the published indices.

Two options reduce the cost of volumes. A patch size p folds p^dims positions into channels before the first block and
unfolds them after the last (Hoogeboom et al. 2023, arXiv 2301.11093, sec. 3). "plain" resampling has no convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medseg_diffusion.diffusion.denoiser import Condition

from .blocks import Parts, ResamplingKind, conv, normalisation, padded_to, timestep_embedding, zeroed

Collect = Callable[[str, Tensor], None]


class UNet(nn.Module):
    """A time-conditional U-Net: (x (B, in_channels, *S), timesteps (B,), cond) -> (B, out_channels, *S).

    The spatial size is arbitrary: the input is padded by replication to a multiple of ``factor`` = patch_size *
    2^(levels - 1), and the output is cropped. The condition has these optional entries:

    "concat" (B, C', *S)                     concatenated to x; ``in_channels`` counts both
    "label" (B,) int64                       a class; its embedding is added to that of the time
    "context" (B, L, context_channels)       tokens for cross-attention
    "stem" (B, channels, *S / patch_size)    features of the padded image, added after the first convolution

    Args:
        dims: 2 or 3 spatial dimensions.
        in_channels: channels of x and of the concatenated condition together.
        out_channels: channels of the output.
        channels: width of the first level.
        channel_mult: width of each level as a multiple of ``channels``, one entry per level.
        num_res_blocks: residual blocks of each encoder level (the decoder has one more); an int for all levels.
        attention_factors: downsampling factors (1, 2, 4, ...) at which residual blocks are followed by attention.
        head_channels: channels of each attention head.
        num_heads: number of attention heads, instead of ``head_channels``.
        dropout: probability in the residual blocks.
        resampling: "resblock" inside residual blocks (ADM), "conv" by a convolution, "plain" by pooling and repetition.
        patch_size: side of the patches that are folded into channels; 1 is the published network.
        checkpointing: recompute the blocks' activations in the backward pass to save memory.
        scale_shift: how the embedding acts (`ResBlock`).
        norm_eps: epsilon of the group normalisations; 1e-5 in guided diffusion, 1e-6 in MONAI.
        norm_groups: groups of the group normalisations; fewer for narrow networks
            (`medseg_diffusion.networks.blocks.normalisation`).
        middle_attention: attention at the lowest level; None to have it if any other level has attention.
        out_width: hidden channels of a `PatchHead`; None for the published last layer, a convolution of side 3.
        num_classes: number of labels, including "no label" if the model has it.
        context_channels: width of the context. With it, attention is by spatial transformers.
        transformer_depth: layers of each spatial transformer.

    Raises:
        ValueError: dims other than 2 and 3, or a number of ``num_res_blocks`` that is not the number of levels.
    """

    # many, long: mirrors UNetSection and DenoiserUNetSection; one line for each attribute and stage of the network
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
        num_heads: int | None = None,
        dropout: float = 0.0,
        resampling: ResamplingKind = "resblock",
        patch_size: int = 1,
        checkpointing: bool = False,
        scale_shift: bool = True,
        norm_eps: float = 1e-5,
        norm_groups: int = 32,
        middle_attention: bool | None = None,
        out_width: int | None = None,
        num_classes: int | None = None,
        context_channels: int | None = None,
        transformer_depth: int = 1,
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
        self.num_classes = num_classes
        self.context_channels = context_channels
        self.depths = tuple(depths)
        self.widths = tuple(mult * channels for mult in channel_mult)
        emb = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_embed = None if num_classes is None else nn.Embedding(num_classes, emb)
        self.parts = parts = Parts(
            dims=dims,
            emb_channels=emb,
            attention_factors=tuple(attention_factors),
            head_channels=head_channels,
            num_heads=num_heads,
            dropout=dropout,
            resampling=resampling,
            scale_shift=scale_shift,
            norm_eps=norm_eps,
            norm_groups=norm_groups,
            context_channels=context_channels,
            transformer_depth=transformer_depth,
        )
        widths = list(self.widths)
        self.stem = conv(dims, in_channels * patch_size**dims, channels)
        self.encoder, skips = parts.encoder(channels, widths, depths)
        self.middle = parts.middle(
            widths[-1], bool(attention_factors) if middle_attention is None else middle_attention
        )
        self.decoder = parts.decoder(widths[-1], skips, widths, depths)
        outputs = out_channels * patch_size**dims
        norm = normalisation(widths[0], norm_eps, norm_groups)
        self.out: nn.Module = (
            nn.Sequential(norm, nn.SiLU(), zeroed(conv(dims, widths[0], outputs)))
            if out_width is None
            else PatchHead(norm, self.stem, out_width, outputs)
        )

    def encode_condition(self, image: Tensor) -> Condition:
        """The condition of every step. For this network it is the image (B, C', *S), which is concatenated."""
        return {"concat": image}

    def forward(self, x: Tensor, timesteps: Tensor, cond: Condition | None = None) -> Tensor:
        return self._run(x, timesteps, cond or {}, lambda name, h: None)

    def activations(
        self, x: Tensor, timesteps: Tensor, cond: Condition | None = None, names: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The outputs (B, C_i, *S_i) of the blocks ``names``, such as "decoder.3" (`block_names`), of the padded input.

        Raises:
            ValueError: a name that the network does not have; lists all names.
        """
        outputs: dict[str, Tensor] = {}
        if unknown := set(names) - set(self.block_names()):
            raise ValueError(f"no activations {sorted(unknown)}; this network has {self.block_names()}")

        def collect(name: str, h: Tensor) -> None:
            if name in names:
                outputs[name] = h
            if len(outputs) == len(set(names)):  # later blocks are not needed
                raise StopIteration

        with suppress(StopIteration):
            self._run(x, timesteps, cond or {}, collect)
        return outputs

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
        emb = self.embedding(timesteps, cond, x.dtype)
        context = None if self.context_channels is None else self._needed(cond, "context")
        patches = fold(self.padded(x), self.patch_size)
        h = self.stem(patches)
        if "stem" in cond:
            h = h + cond["stem"]
        skips = self.encode(h, emb, context, collect)
        return self.decode(skips[-1], skips, emb, patches, size, context, collect)

    def embedding(self, timesteps: Tensor, cond: Condition, dtype: torch.dtype) -> Tensor:
        """The embedding (B, 4 * channels) of the time, and of the class if the network is conditioned by it."""
        emb = self.time_embed(timestep_embedding(timesteps, self.channels).to(dtype))
        if self.label_embed is not None:
            emb = emb + self.label_embed(self._needed(cond, "label")).to(emb.dtype)
        return cast(Tensor, emb)

    def encode(
        self, h: Tensor, emb: Tensor, context: Tensor | None = None, collect: Collect = lambda name, h: None
    ) -> list[Tensor]:
        """The stem's output ``h`` and the outputs of all encoder blocks. The decoder reads them from last to first."""
        skips = [h]
        for i, block in enumerate(self.encoder):
            skips.append(self._call_block(block, skips[-1], emb, context))
            collect(f"encoder.{i}", skips[-1])
        return skips

    def decode(
        self,
        h: Tensor,
        skips: Sequence[Tensor],
        emb: Tensor,
        patches: Tensor,
        size: Sequence[int],
        context: Tensor | None = None,
        collect: Collect = lambda name, h: None,
    ) -> Tensor:
        """The output (B, out_channels, *size) from the bottleneck ``h``, the encoder's outputs and the folded input."""
        for i, block in enumerate(self.middle):
            h = self._call_block(block, h, emb, context)
            collect(f"middle.{i}", h)
        for i, (block, skip) in enumerate(zip(self.decoder, reversed(skips), strict=True)):
            h = self._call_block(block, torch.cat([h, skip], dim=1), emb, context)
            collect(f"decoder.{i}", h)
        out = self.out(h, patches) if isinstance(self.out, PatchHead) else self.out(h)
        return unfold(out, self.patch_size)[(slice(None), slice(None), *(slice(0, n) for n in size))]

    def _call_block(self, block: nn.Module, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return recomputed(self.checkpointing, block, h, emb, context)

    def _needed(self, cond: Condition, name: str) -> Tensor:
        if name not in cond:
            raise ValueError(f"this network is conditioned by {name!r}, and the condition has only {sorted(cond)}")
        return cond[name]

    def padded(self, x: Tensor) -> Tensor:
        """(B, C, *S) with every spatial axis padded at its end, by replication, to a multiple of ``factor``."""
        return padded_to(x, self.factor)


class PatchHead(nn.Module):
    """Two convolutions of side 1: (features (B, F, *S), folded input (B, C, *S)) -> (B, out_channels, *S).

    The features of a patch need not repeat the input's values in it, which say where in the patch a boundary lies. With
    many classes, a last convolution of side 3 of all outputs would be a fifth of the network's arithmetic.

    Args:
        norm: normalises the features.
        stem: the network's first convolution, which gives the dimensions and the channels of the folded input.
        width: hidden channels.
        out_channels: channels of the folded output.
    """

    def __init__(self, norm: nn.GroupNorm, stem: nn.Module, width: int, out_channels: int) -> None:
        super().__init__()
        weight = cast(Tensor, stem.weight)
        dims, inputs = weight.ndim - 2, weight.shape[1]
        self.norm = norm
        self.hidden = conv(dims, norm.num_channels + inputs, width, kernel=1)
        self.last = zeroed(conv(dims, width, out_channels, kernel=1))

    def forward(self, h: Tensor, patches: Tensor) -> Tensor:
        features = torch.cat([F.silu(self.norm(h)), patches.to(h.dtype)], dim=1)
        return cast(Tensor, self.last(F.silu(self.hidden(features))))


def recomputed(checkpointing: bool, block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """A block's output. With ``checkpointing`` its activations are not stored, but recomputed for the gradient."""
    if checkpointing and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False))
    return cast(Tensor, block(*inputs))


def fold(x: Tensor, size: int) -> Tensor:
    """(B, C, *S) to (B, C * size^dims, *S / size): patches of ``size`` positions along each axis become channels."""
    if size == 1:
        return x
    dims = x.ndim - 2
    split = x.reshape(*x.shape[:2], *(n for side in x.shape[2:] for n in (side // size, size)))
    inner, outer = range(3, 2 * dims + 2, 2), range(2, 2 * dims + 2, 2)
    return split.permute(0, 1, *inner, *outer).flatten(1, dims + 1)


def unfold(x: Tensor, size: int) -> Tensor:
    """The inverse of `fold`."""
    if size == 1:
        return x
    dims = x.ndim - 2
    split = x.unflatten(1, (-1, *[size] * dims))
    whole = split.permute(0, 1, *(axis for i in range(dims) for axis in (2 + dims + i, 2 + i)))
    return whole.reshape(*whole.shape[:2], *(size * side for side in x.shape[2:]))

"""How a network is made ready for inference: its device, its memory layout, and its compilation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from medseg_diffusion.device import with_memory_format
from medseg_diffusion.errors import quiet_libraries, remark

MOST_SHAPES = 8
"""Largest number of input shapes for which a network is compiled; the batch counts as a part of the shape."""

Shape = tuple[object, ...]


def placed(
    network: nn.Module, device: torch.device | str, channels_last: bool = False, compiled: bool = False
) -> nn.Module:
    """The network itself on ``device``, its convolutions in channels-last layout and its forward pass compiled if so.

    The forward pass alone is replaced: names of weights, hooks on the network and its other methods stay as they are.
    """
    with_memory_format(network.to(device), channels_last)
    if compiled:
        network.forward = CompiledForward(network)
    return network


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Inside the block, the networks in ``model`` run as they are: compiled ones call no hooks of their layers."""
    forwards = [(module, module.forward) for module in model.modules() if isinstance(module.forward, CompiledForward)]
    try:
        for module, forward in forwards:
            module.forward = forward.plain
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward


def filled_up_to(model: nn.Module, samples: int | None) -> None:
    """From now on, compiled networks in ``model`` fill no batch up to more than so many samples; None for no limit."""
    for module in model.modules():
        if isinstance(module.forward, CompiledForward):
            module.forward.most = samples


class CompiledForward:
    """The forward pass (x (B, ...), timesteps (B,), cond) of a network, compiled by torch.compile.

    Its outputs differ by rounding from those of the network. On CUDA they come from CUDA graphs. A shape is compiled
    once. A batch that is smaller than a compiled one is filled up and not compiled: the last batch of a scan is often
    smaller. A batch for which memory does not suffice is not used for smaller ones. The network runs as it is after
    `MOST_SHAPES` shapes, where a gradient is asked for, and if the compiler fails, of which one remark tells.
    """

    def __init__(self, network: nn.Module) -> None:
        self.plain = network.forward
        self.most: int | None = None
        self._compiled: dict[str, object] = {}  # by type of device
        self._batches: dict[Shape, list[int]] = {}
        self._works = True

    def __call__(self, x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        size = self._compiled_batch(x, cond or {}) if self._works and not x.requires_grad else None
        if size is None:
            return cast(Tensor, self.plain(x, timesteps, cond))
        more = size - len(x)
        filled = None if cond is None else {name: _filled(value, len(x), more) for name, value in cond.items()}
        try:
            return self._run(_filled(x, len(x), more), _filled(timesteps, len(x), more), filled)[: len(x)]
        except torch._dynamo.exc.TorchDynamoException as error:
            self._works = False
            reason = str(getattr(error, "inner_exception", error)).strip() or type(error).__name__
            remark(f"--compile: the network is used as it is, because compiling it failed ({reason.splitlines()[0]})")
        except torch.cuda.OutOfMemoryError:
            self._forget(size)
            raise
        return cast(Tensor, self.plain(x, timesteps, cond))

    def _compiled_batch(self, x: Tensor, cond: Mapping[str, Tensor]) -> int | None:
        """The batch that is computed for ``x``; None if its shape must not be compiled any more."""
        # What decides whether torch compiles anew: another device or precision counts as another shape.
        key = (
            x.device, x.dtype, x.shape[1:], torch.is_autocast_enabled(x.device.type), torch.is_grad_enabled(),
            *((name, value.dtype, value.shape[1:]) for name, value in sorted(cond.items())),
        )  # fmt: skip
        batches = self._batches.setdefault(key, [])
        most = math.inf if self.most is None else max(self.most, len(x))
        if large_enough := [batch for batch in batches if len(x) <= batch <= most]:
            return min(large_enough)
        if sum(map(len, self._batches.values())) >= MOST_SHAPES:
            remark(f"--compile: {MOST_SHAPES} shapes are compiled; the network is used as it is for further ones")
            return None
        batches.append(len(x))
        return len(x)

    def _forget(self, size: int) -> None:
        """Batches of this size and above are not filled up to any more: memory does not suffice for them."""
        for batches in self._batches.values():
            batches[:] = [batch for batch in batches if batch < size]

    def _run(self, x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor] | None) -> Tensor:
        kind, graphs = x.device.type, x.device.type == "cuda"
        if kind not in self._compiled:
            self._compiled[kind] = torch.compile(
                self.plain, dynamic=False, mode="reduce-overhead" if graphs else "default"
            )
        forward = self._compiled[kind]
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # The compiler's advice is for developers. Its own limit of shapes counts all networks of a class together.
        with quiet_libraries(), torch._dynamo.config.patch(recompile_limit=16 * MOST_SHAPES):
            out = cast(Tensor, forward(x, timesteps, cond))  # type: ignore[operator]
        return out.clone() if graphs else out  # the next call of a graph overwrites it


def _filled(value: Tensor, batch: int, more: int) -> Tensor:
    """``value`` (B, ...) with ``more`` copies of its last sample; a value of another batch belongs to all samples."""
    if more == 0 or len(value) != batch:
        return value
    return torch.cat([value, value[-1:].expand(more, *value.shape[1:])])

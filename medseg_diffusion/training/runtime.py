"""Device, precision and processes of a training run."""

from __future__ import annotations

import atexit
import ctypes
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from medseg_diffusion.errors import MedsegError, UsageError

Precision = Literal["auto", "fp32", "bf16"]
_GRACE_S = 15.0


def choose_device(name: str = "auto") -> torch.device:
    """The torch device of "auto", "cpu", "cuda", "cuda:N" or "mps"; auto prefers CUDA, then MPS.

    Raises:
        UsageError: an unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"device {name!r} asked for, but {torch.cuda.device_count()} CUDA devices found; try --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' asked for, but this machine has none; try --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def tune(device: torch.device) -> None:
    """Makes computing on ``device`` faster in this process: on CUDA, TF32 for float32 and cuDNN's algorithm search."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def keep_freed_memory() -> None:
    """Lets this process reuse freed memory instead of returning it to the system. Meant for single processes on CPUs.

    By default every large tensor is mapped anew and its pages are zeroed by the kernel, which took a third of the time
    of segmenting a head. Nothing happens without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def arranged(network: nn.Module, channels_last: bool, compiled: bool) -> nn.Module:
    """Returns the network with convolutions in channels-last layout, or compiled at its first call, or both.

    The names of its parameters stay the same.
    """
    if channels_last:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            elif isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
    if compiled:
        network.compile()
    return network


def autocast_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype | None:
    """bfloat16 where it pays, else None for plain float32.

    "auto" chooses bf16 on CUDA devices that support it and on CPUs with AMX tiles. AVX512-BF16 alone is not enough: the
    3D convolutions of this package measured slower with it than in float32.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 cannot tell
    amx = device.type == "cpu" and known.get("amx_bf16", False)
    return torch.bfloat16 if amx else None


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[Any]:
    """A context in which networks compute in `autocast_dtype`; for plain float32 it does nothing."""
    dtype = autocast_dtype(device, precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def _leave_group() -> None:
    """Ends the threads of the process group, which could make a process abort at its exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Runtime:
    """A thin layer over accelerate, for one process or for several started by a launcher (RANK and WORLD_SIZE set)."""

    def __init__(self, device: str = "auto", precision: Precision = "auto") -> None:
        chosen = choose_device(device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)
        tune(chosen)
        if chosen.type == "cpu":
            keep_freed_memory()
        self.autocast = autocast_dtype(chosen, precision)
        # Accelerate keeps its settings in a process-wide singleton; a second run in one process needs its own.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision="bf16" if self.autocast is torch.bfloat16 else "no",
            # The others wait while the main process prepares data or validates.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        )
        if self.world_size > 1:
            atexit.register(_leave_group)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns the model on the device (wrapped if there are several processes) and its optimiser."""
        return self.accelerator.prepare(model, optimizer)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Clips the gradient to ``max_norm`` and returns its norm before."""
        return float(self.accelerator.clip_grad_norm_(model.parameters(), max_norm))

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over the processes."""
        with self._together():
            return float(self.accelerator.reduce(value.detach().float(), reduction="mean"))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world_size == 1:
            return flag
        with self._together():
            return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), reduction="sum") > 0)

    def wait(self) -> None:
        """Waits until all processes have reached this point.

        Raises:
            MedsegError: one of them has ended.
        """
        with self._together():
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """For communication between processes, which fails when another process has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1:
                raise
            # The exit code of the run is that of the process that ends first. It should be the one with the actual
            # error, so this one waits; the launcher ends it meanwhile.
            time.sleep(_GRACE_S)
            raise MedsegError(f"another process ended early ({str(error).splitlines()[0]})") from error

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the body first, so that the others find its results in a cache."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

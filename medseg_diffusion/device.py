"""Where and how tensors are computed: device, precision, memory, batch sizes."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from .errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]

POSITIONS_AT_ONCE = {"cpu": 2**18, "cuda": 2**21}
"""Positions of all samples in a batch, by type of device: small for a CPU's caches, large for a GPU."""


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
    of segmenting a head. Nothing happens without glibc. The heap grows in small steps: large ones leave gaps, which
    took up to 1 GB with large scans.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**24)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def return_freed_memory() -> None:
    """Returns freed memory to the system in spite of `keep_freed_memory`. Nothing happens without glibc."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def process_bytes() -> int:
    """Bytes of memory that this process takes now; without /proc the most that it has taken, and 0 if unknown."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_process_bytes() or 0


def peak_process_bytes() -> int | None:
    """The most memory in bytes that this process has taken; None where the system does not tell it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def with_memory_format(network: nn.Module, channels_last: bool) -> nn.Module:
    """The network itself, its convolutions in channels-last layout if asked for."""
    if channels_last:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            elif isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
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


def at_once(positions: int, device: torch.device) -> int:
    """How many samples, of ``positions`` each, share a batch. It limits memory and changes results only by rounding."""
    return max(1, POSITIONS_AT_ONCE.get(device.type, POSITIONS_AT_ONCE["cpu"]) // positions)

"""How fast a training is, and how much of its device it uses."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from medseg_diffusion.device import peak_process_bytes

from .runtime import Runtime

PEAK_TFLOPS = {
    "B200": (2250, 1125),
    "H200": (989, 495),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 418),
    "H100": (989, 495),
    "GH200": (989, 495),
    "A100": (312, 156),
    "A30": (165, 82),
    "A40": (150, 75),
    "A10G": (70, 35),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L40": (181, 90.5),
    "L4": (121, 60),
    "RTX A6000": (155, 77.4),
}
"""Peak of dense matrix products in 10^12 operations a second, (bfloat16, TF32), by words of the device's name.

From the vendor's data sheets; the first entry that fits counts. Other devices have no known peak. A peak measured by a
matrix product would be that of its size and of what else the machine does; so on a CPU no utilisation is given.
"""

BACKWARD = 3
"""A training step is counted as three forward passes: the backward pass takes about two."""


class Throughput:
    """Speed between one reading of the device and the next, and between validations.

    Args:
        examples: in a step, over all processes together.
        flops: floating-point operations of a step in this process (`flops_of_pass`).
        runtime: the device.
    """

    def __init__(self, examples: int, flops: float, runtime: Runtime) -> None:
        self.examples, self.flops, self.runtime = examples, flops, runtime
        self.peak = peak_flops(runtime)
        self.started, self.waited_before = time.monotonic(), 0.0
        self.seconds = self.waited = 0.0  # since the last validation
        self.steps = 0
        self.seconds_per_step = 0.0

    def begin(self, waited: float) -> None:
        """Starts at the first batch: the start of the workers, for which the process has ``waited``, does not count."""
        self.waited_before = waited
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last reading: a validation, or the writing of a file."""
        self.started = time.monotonic()

    def read(self, steps: int, waited: float) -> float:
        """Takes the time since the last reading, in which ``steps`` steps were made; returns the seconds of each.

        Args:
            steps: at least 1.
            waited: `Batches.waited`.
        """
        now = time.monotonic()
        took, self.started = now - self.started, now
        self.seconds += took
        self.waited += waited - self.waited_before
        self.waited_before = waited
        self.steps += steps
        # Smoothed over some 20 steps, so that the time left does not jump.
        weight = 1.0 if self.seconds_per_step == 0 else 1 - 0.95**steps
        self.seconds_per_step += weight * (took / steps - self.seconds_per_step)
        return took / steps

    @property
    def waiting(self) -> float:
        """Share of the time since the last validation in which the device waited for examples."""
        return self.waited / self.seconds if self.seconds else 0.0

    def numbers(self) -> dict[str, float]:
        """The numbers since the last call, by their names in log.csv; empty without a step.

        seconds_per_step, examples_per_s (of all processes), waiting (share of the time without examples),
        peak_memory_gb (10^9 bytes, of the device or, on a CPU, of the process, if known), tflop_per_s (10^12 operations
        a second and device), and flop_utilisation (their share of the device's peak) where the peak is known.
        """
        if not self.steps:
            return {}
        each = self.seconds / self.steps
        numbers = {
            "seconds_per_step": each,
            "examples_per_s": self.examples / each,
            "waiting": self.waiting,
            "tflop_per_s": self.flops / each / 1e12,
        }
        if (peak := peak_bytes(self.runtime.device)) is not None:
            numbers["peak_memory_gb"] = peak / 1e9
        if self.peak is not None:
            numbers["flop_utilisation"] = self.flops / each / self.peak
        self.seconds = self.waited = 0.0
        self.steps = 0
        return numbers


def peak_flops(runtime: Runtime) -> float | None:
    """Peak operations per second of the device in the precision of the run (`PEAK_TFLOPS`), None if unknown."""
    if runtime.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(runtime.device)
    half, single = next((peaks for part, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), (None, None))
    peak = half if runtime.autocast is torch.bfloat16 else single
    return None if peak is None else 1e12 * peak


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that has been taken: of the GPU, else of this process; None if the system does not tell it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_process_bytes()


@torch.no_grad()
def flops_of_pass(model: nn.Module, batch: Mapping[str, Tensor], runtime: Runtime) -> float:
    """Floating-point operations of a training step on ``batch``: `BACKWARD` times those of a forward pass.

    Args:
        model: in evaluation mode; the losses of training alone, such as adversarial ones, are left out.
        batch: examples on the device.
        runtime: precision.
    """
    # Imported where used: slow.
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

    def single(image: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        return conv_flop_count(list(image), list(weight), list(out_shape))

    # The convolution of single volumes on a CPU (`networks.blocks`), which torch does not count.
    known = {torch.ops.aten.mkldnn_convolution: single}

    # The search for the fastest convolution is not worth it for one pass.
    cudnn = torch.backends.cudnn
    patient = cudnn.flags(enabled=cudnn.enabled, benchmark=False, allow_tf32=True)
    with (
        _eager(model),
        patient,
        runtime.accelerator.autocast(),
        FlopCounterMode(display=False, custom_mapping=known) as counter,
    ):
        model(batch)
    return BACKWARD * float(counter.get_total_flops())


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Within it, a compiled model runs as it is written: operations inside compiled code cannot be counted."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()

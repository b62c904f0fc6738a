"""Device, precision and processes of a training run."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from medseg_diffusion.device import Precision, autocast_dtype, choose_device, keep_freed_memory, tune
from medseg_diffusion.errors import MedsegError

_GRACE_S = 15.0


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

    def prepare(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        """Returns the model on the device (wrapped if there are several processes) and its optimisers."""
        wrapped, *prepared = self.accelerator.prepare(model, *optimizers)
        return wrapped, prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Clips the gradient of ``parameters`` to ``max_norm`` and returns its norm before."""
        return float(self.accelerator.clip_grad_norm_(parameters, max_norm))

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

"""Device, precision and processes of a training run."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from medseg_diffusion.data.draws import UNFINISHED
from medseg_diffusion.device import Precision, autocast_dtype, choose_device, keep_freed_memory, tune
from medseg_diffusion.errors import MedsegError

_GRACE_S = 15.0
_LAST_TENSORS_S = 0.5
"""Seconds after which is checked whether the threads of a process group have let go of their tensors."""
_IDLE_S = 0.02
"""Processor time in `_LAST_TENSORS_S` below which they have ended."""
MEETING_MIN = 10.0
"""Minutes in which all processes of a training have to come: one that never starts must not hold up the others."""
_WAIT = timedelta(days=1)
"""The longest that the others wait for the main process, which prepares data or validates."""


def _meet(device: torch.device) -> None:
    """Joins the process group that the launcher describes, if there are several processes.

    Accelerate would do so with one time limit for the meeting and for everything after it.

    Raises:
        MedsegError: not all processes have come within `MEETING_MIN` minutes, or one of them has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        return
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=MEETING_MIN)))
    except (RuntimeError, ValueError) as error:
        count, place = os.environ["WORLD_SIZE"], f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise MedsegError(
            f"not all {count} processes came to {place} within {MEETING_MIN:g} minutes: start all of them, with "
            "MASTER_ADDR and MASTER_PORT that they can reach"
        ) from error
    store.set_timeout(_WAIT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_WAIT)
    except RuntimeError as error:  # one has met the others, and ended before they had met it
        raise _ended_early(error) from error


def _ended_early(error: RuntimeError) -> MedsegError:
    """The error of a process that cannot reach another one.

    The exit code of a training is that of the process that ends first. It should be the one with the actual error, so
    this one waits; the launcher ends it meanwhile.
    """
    time.sleep(_GRACE_S)
    return MedsegError(f"another process ended early ({str(error).splitlines()[0]})")


def _leave_group() -> None:
    """Ends the threads of the process group, which could make a process abort at its exit.

    Once a model was wrapped, torch leaves them running. Such a thread needs the interpreter to let go of its last
    tensor; where the interpreter has ended before, the whole process aborts.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        ends = time.monotonic() + _GRACE_S
        while time.monotonic() < ends:  # nothing tells when they have ended; at work, they take processor time
            before = time.process_time()
            time.sleep(_LAST_TENSORS_S)
            if time.process_time() - before < _IDLE_S:
                break


class Runtime:
    """A thin layer over accelerate, for one process or for several started by a launcher (RANK and WORLD_SIZE set)."""

    def __init__(self, device: str = "auto", precision: Precision = "auto", sharding: bool = False) -> None:
        chosen = choose_device(device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)
        tune(chosen)
        if chosen.type == "cpu":
            keep_freed_memory()
        self.autocast = autocast_dtype(chosen, precision)
        # Accelerate keeps its settings in a process-wide singleton; a second run in one process needs its own.
        AcceleratorState._reset_state(reset_partial_state=True)
        _meet(chosen)
        self.accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision="bf16" if self.autocast is torch.bfloat16 else "no",
        )
        self.sharded = sharding and self.world_size > 1
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

    @property
    def is_idle(self) -> bool:
        """Whether the device has nothing left to do. A CPU never has, because it computes at once."""
        return self.device.type != "cuda" or bool(torch.cuda.current_stream(self.device).query())

    @property
    def precision(self) -> str:
        """Name of the precision in which networks compute."""
        return "bf16" if self.autocast is torch.bfloat16 else "fp32"

    def prepare(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        """Returns the model on the device (wrapped if there are several processes) and its optimisers."""
        if self.sharded:
            return model, list(optimizers)
        wrapped, *prepared = self.accelerator.prepare(model, *optimizers)
        return wrapped, prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        if self.sharded:
            return model
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def exchanging(self, model: nn.Module, exchange: bool) -> AbstractContextManager[Any]:
        """For a forward and a backward pass after which the processes exchange gradients, or add them up first."""
        if self.sharded:
            cast(Any, model).set_requires_gradient_sync(exchange)
            return nullcontext()
        return nullcontext() if exchange or self.world_size == 1 else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Clips the gradient of ``parameters`` to ``max_norm``; returns its norm before, a scalar on the device."""
        norm: Any = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shares

    def step(self, optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        """Changes the parameters, unless ``skip``, a bool scalar on the device, is true.

        The fused AdamW decides on the device, as it does for `torch.amp.GradScaler`.
        """
        # Accelerate's wrapper looks for an optional package at every step, which takes a millisecond.
        own = getattr(optimizer, "optimizer", optimizer)
        if own.defaults["fused"]:
            own.found_inf = skip.float()  # type: ignore[union-attr]
            own.step()
        elif not bool(skip):  # MPS
            own.step()

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a scalar over the processes, on the device."""
        if self.world_size == 1:
            return value.detach().float()
        with self._together():
            return self.accelerator.reduce(value.detach().float(), reduction="mean")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process. Several processes wait for each other."""
        if self.world_size == 1:
            return list(flags)
        with self._together():
            counts: list[float] = self.accelerator.reduce(
                torch.tensor(flags, dtype=torch.float32, device=self.device), reduction="sum"
            ).tolist()
            return [count > 0 for count in counts]

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
            raise _ended_early(error) from error

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the body first, so that the others find its results in a cache."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def to_device(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch on the device, without waiting for it. The seeds stay on the CPU, where they are used."""
        seeds = ("seed", UNFINISHED)
        moved = {k: v if k in seeds else v.to(self.device, non_blocking=True) for k, v in batch.items()}
        # No dict: with several processes, torch would move what is in one to the GPU, the seeds as well.
        return MappingProxyType(moved)

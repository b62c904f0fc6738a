"""The resume files of a training run: each holds everything that is needed to continue bit-exactly."""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg_diffusion.errors import InputError, MedsegError
from medseg_diffusion.files import whole_file

from .ema import EMA
from .runtime import Runtime
from .sharding import gathered, load_model, load_optimizer


@dataclass
class TrainingState:
    """What changes in the course of a training run. Every field beside the first three is stored as it is.

    Attributes:
        model: on its device, wrapped if there are several processes.
        optimizers: of the model's parameters, one for each of its parts.
        ema: averaged weights.
        step: number of completed optimiser steps.
        loss: exponentially smoothed training loss.
        score: of the last validation, None before the first.
        best: numbers of the best validation and its "step"; empty before the first.
        validated: step of the last validation. It is behind ``step`` if a signal came before or during a validation.
        skipped: number of steps that were skipped because their loss or gradient was not finite.
        skipped_in_a_row: of these, the last ones without any other step since.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA
    step: int = 0
    loss: float = 0.0
    score: float | None = None
    best: dict[str, float] = field(default_factory=dict)
    validated: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def numbers(self) -> dict[str, Any]:
        """The fields that are numbers, or a dict of numbers."""
        return {one.name: getattr(self, one.name) for one in fields(self)[3:]}


def tensors_of(state: TrainingState, runtime: Runtime) -> dict[str, Any]:
    """Weights, averages and moments, whole. Processes that share them out have to call it together.

    Only the main process gets them then, on the CPU; the averages are also copied into `EMA.whole`.
    """
    tensors: dict[str, Any] = {
        "model": runtime.unwrap(state.model).state_dict(),
        "ema": state.ema.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
    }
    if runtime.sharded:
        tensors = gathered(tensors, keep=runtime.is_main)
        if runtime.is_main:
            state.ema.whole.load_state_dict(tensors["ema"])
    return tensors


class Checkpoints:
    """The resume files in RUN/checkpoints, step-000123.pt for step 123.

    They are written by `torch.save`, that is, as zip archives, which hold a CRC-32 of everything in them. `torch.load`
    does not compare it; this class does, after writing and before loading.

    Args:
        run: the run directory.
        kept: how many files are kept, the newest ones.
    """

    def __init__(self, run: Path, kept: int = 2) -> None:
        self.folder = run / "checkpoints"
        self.kept = kept

    def files(self) -> list[Path]:
        """The resume files, the newest first."""
        numbered = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
        last = self.folder / "last.pt"  # the only one, and so the oldest, of a run that an earlier version started
        return sorted(numbered, key=_step, reverse=True) + ([last] if last.is_file() else [])

    def remove_left_over(self) -> None:
        """Removes what a process that was killed while it saved has left; no other process may be saving."""
        for left_over in self.folder.glob(".*.pt.*.tmp"):
            left_over.unlink(missing_ok=True)

    def save(self, state: TrainingState, tensors: dict[str, Any]) -> None:
        """Writes ``state``, reads it back, and removes what is older than the files to keep.

        Args:
            state: its numbers are written.
            tensors: its `tensors_of`.

        Raises:
            OSError: the file cannot be written, or is damaged when it is read back. Those before it are still there.
        """
        content = {"state": state.numbers(), "ema_updates": state.ema.updates, **tensors}
        path = self.folder / f"step-{state.step:06d}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            _write(content, temporary)
            if damage := self.damage(temporary):
                raise OSError(f"{path}: damaged when read back after writing ({damage}); check the disk")
        # Later steps are of a past from which the run was set back: it went on from the last whole file before them.
        later = [file for file in self.files() if _step(file) > state.step]
        older = [file for file in self.files() if _step(file) <= state.step]
        for file in later + older[self.kept :]:
            file.unlink(missing_ok=True)

    def load(self, state: TrainingState, runtime: Runtime) -> None:
        """Sets ``state`` to the content of the newest file that is whole; a warning names those that are not.

        Raises:
            InputError: there is no file, none is whole, or the newest whole one is of another model.
        """
        files = self.files()
        if not files:
            raise InputError(
                self.folder, "no resume file", "a run that was started before", "drop --resume to start it"
            )
        refused: list[InputError] = []
        for file in files:
            try:
                content = self.content(file)
            except InputError as error:
                refused.append(error)
                continue
            if refused:
                warnings.warn(f"{files[0]}: is damaged; continuing from {file.name}", stacklevel=2)
            _restore(state, content, file, runtime)
            return
        raise refused[0]

    def content(self, file: Path) -> dict[str, Any]:
        """What a resume file holds; tensors are on the CPU.

        Raises:
            InputError: it is damaged.
        """
        damage = self.damage(file)
        if not damage:
            try:
                content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                return content
            except Exception as error:  # what the checksums do not cover can raise nearly anything
                damage = str(error).partition("\n")[0]
        raise InputError(
            file, f"a damaged resume file ({damage})", "a whole one", "restore it, or start a new run in another folder"
        )

    @staticmethod
    def damage(file: Path) -> str:
        """What is wrong with a resume file, by its structure and checksums; empty if nothing is."""
        try:
            with zipfile.ZipFile(file) as archive:
                part = archive.testzip()
        except Exception as error:  # a damaged archive can raise nearly anything
            return str(error) or type(error).__name__
        return f"the checksum of {part} differs" if part else ""


@contextmanager
def full_disk_explained(run: Path, state: TrainingState) -> Iterator[None]:
    """Inside the block, a full disk is a MedsegError: the folder, the bytes that a resume file needs, what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free, needed = shutil.disk_usage(run).free, _bytes_of(state)
        raise MedsegError(
            f"{run}: the disk is full: {free / 1e6:.1f} MB are free, and a resume file needs {needed / 1e6:.1f} MB; "
            "free some space and continue with --resume"
        ) from error


def _bytes_of(state: TrainingState) -> int:
    """About the size of a resume file."""
    moments = [part for optimizer in state.optimizers for one in optimizer.state.values() for part in one.values()]
    tensors = [*state.model.state_dict().values(), *state.ema.module.state_dict().values(), *moments]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def _step(file: Path) -> int:
    """The step of a resume file by its name; -1 for last.pt of earlier versions."""
    number = file.stem.partition("-")[2]
    return int(number) if number else -1


def _write(content: dict[str, Any], path: Path) -> None:
    """Writes a file that is on the disk, and not only in memory, when this returns."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch stumbles over its own clean-up after a failed write and hides why it failed.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # what is read back then comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _restore(state: TrainingState, content: dict[str, Any], path: Path, runtime: Runtime) -> None:
    """Sets ``state`` to what the resume file ``path`` holds; InputError if it is of another model."""
    try:
        load_model(runtime.unwrap(state.model), content["model"])
        load_model(state.ema.module, content["ema"])
        state.ema.updates = content["ema_updates"]
        # Earlier versions had one optimiser.
        stored = content["optimizers"] if "optimizers" in content else [content["optimizer"]]
        for optimizer, moments in zip(state.optimizers, stored, strict=True):
            load_optimizer(optimizer, moments)
        numbers = {"validated": content["state"]["step"], **content["state"]}  # earlier versions always validated first
        for name in state.numbers().keys() & numbers.keys():
            setattr(state, name, numbers[name])
    except Exception as error:  # torch and dicts raise several kinds
        raise InputError(
            path,
            f"an unusable resume file ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            "the one that this configuration wrote",
            "restore it, or start a new run in another folder",
        ) from error

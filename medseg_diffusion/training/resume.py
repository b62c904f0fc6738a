"""The resume file: everything that a training run needs to continue bit-exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from medseg_diffusion.errors import InputError
from medseg_diffusion.files import whole_file

from .ema import EMA
from .runtime import Runtime


@dataclass
class TrainingState:
    """What changes in the course of a training run.

    Attributes:
        model: on its device, wrapped if there are several processes.
        optimizers: of the model's parameters, one for each of its parts.
        ema: averaged weights.
        step: number of completed optimiser steps.
        loss: exponentially smoothed training loss.
        score: of the last validation, None before the first.
        skipped: number of steps that were skipped because their loss or gradient was not finite.
        skipped_in_a_row: of these, the last ones without any other step since.
        best: numbers of the best validation and its "step"; empty before the first.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA
    step: int = 0
    loss: float = 0.0
    score: float | None = None
    best: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0


NUMBERS = ("step", "loss", "score", "best", "skipped", "skipped_in_a_row")
"""The fields of `TrainingState` that are plain values."""


def save_state(path: Path, state: TrainingState, runtime: Runtime) -> None:
    """Writes ``state`` to the resume file ``path``."""
    content = {
        "state": {name: getattr(state, name) for name in NUMBERS},
        "model": runtime.unwrap(state.model).state_dict(),
        "ema": state.ema.module.state_dict(),
        "ema_updates": state.ema.updates,
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it saved
        left_over.unlink(missing_ok=True)
    with whole_file(path, durable=True) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_state(path: Path, state: TrainingState, runtime: Runtime) -> None:
    """Sets ``state`` to the content of the resume file ``path``.

    Raises:
        InputError: the file is missing, damaged, or of another model.
    """
    if not path.is_file():
        raise InputError(path, "no resume file", "a run that was started before", "drop --resume to start it")
    try:
        content = torch.load(path, map_location=runtime.device, weights_only=True)
        runtime.unwrap(state.model).load_state_dict(content["model"])
        state.ema.module.load_state_dict(content["ema"])
        state.ema.updates = content["ema_updates"]
        # Earlier versions had one optimiser.
        stored = content["optimizers"] if "optimizers" in content else [content["optimizer"]]
        for optimizer, moments in zip(state.optimizers, stored, strict=True):
            optimizer.load_state_dict(moments)
        for name in NUMBERS:
            # Earlier versions counted no skipped steps.
            setattr(state, name, content["state"].get(name, getattr(state, name)))
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(
            path,
            f"an unusable resume file ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            "the one that this configuration wrote",
            "restore it, or start a new run in another folder",
        ) from error

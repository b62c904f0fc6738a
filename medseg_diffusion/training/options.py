"""What a training is told, and what it tells: its settings, its callbacks, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from .log import Tracker

Decay = Literal["polynomial", "linear", "constant"]


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of the optimisation.

    Attributes:
        batch_size: examples per step over all processes together.
        examples_at_once: largest number of examples that a device computes together; None computes its share of the
            batch at once. The gradient stays that of the batch as long as the loss is a mean over its examples.
        max_steps: optimiser steps of the whole run.
        learning_rate: peak of AdamW's rate, after a linear warm-up.
        warmup_steps: length of the warm-up.
        decay: of the learning rate after the warm-up (`learning_rate`).
        weight_decay: AdamW's decoupled decay of the weights; with 0 it is Adam.
        ema_decay: decay of the averaged weights, with warm-up.
        gradient_clip: largest norm of the gradient.
        workers: processes that prepare examples; 0 prepares them in the training process.
        validate_every: steps between validations.
        read_every: steps between two readings of losses and gradient norms from the device. It changes no result.
        checkpoint_minutes: minutes between resume files.
        checkpoint_steps: steps between resume files; 0 leaves it to the minutes alone.
        checkpoints_kept: how many resume files are kept.
        trackers: also log to these (`medseg_diffusion.training.log`).
    """

    batch_size: int = 4
    examples_at_once: int | None = None
    max_steps: int = 10_000
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    decay: Decay = "polynomial"
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    workers: int = 0
    validate_every: int = 500
    read_every: int = 10
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    checkpoints_kept: int = 2
    trackers: tuple[Tracker, ...] = ()


@dataclass(frozen=True)
class Progress:
    """What a display needs.

    Attributes:
        step: number of steps done.
        max_steps: number of steps planned.
        loss: smoothed loss; it and the numbers below are those of the last reading of the device.
        seconds_left: for the other steps.
        score: of the last validation, None before the first.
        examples_per_s: of all processes together.
        waiting: share of the time in which the device waited for examples.
        skipped: number of steps that were skipped because their loss or gradient was not finite.
    """

    step: int
    max_steps: int
    loss: float
    seconds_left: float
    score: float | None
    examples_per_s: float = 0.0
    waiting: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Callbacks:
    """What differs between models: how one is validated and how one is written.

    Attributes:
        validate: averaged model -> named numbers; "score" decides which weights are the best. Those of
            `medseg_diffusion.training.health.Predictions`, if any, are looked at and logged, but not stored.
        save: (averaged model, step, numbers) -> writes the loadable model.
        progress: called after every step of the main process.
    """

    validate: Callable[[nn.Module], Mapping[str, float]]
    save: Callable[[nn.Module, int, Mapping[str, float]], None]
    progress: Callable[[Progress], None] = lambda progress: None


@dataclass(frozen=True)
class TrainingRun:
    """Where a run is stored, and how this call of `fit` starts and stops.

    Attributes:
        folder: the run directory.
        seed: of dropout; the training examples carry their own.
        resume: continue from the newest resume file. A run that was stopped before it had one starts again.
        max_steps: stop after this step even if the run is longer; the learning rate follows
            `TrainingOptions.max_steps`.
        time_limit_min: stop this call after so many minutes.
    """

    folder: Path
    seed: int = 0
    resume: bool = False
    max_steps: int | None = None
    time_limit_min: float | None = None


def learning_rate(step: int, options: TrainingOptions) -> float:
    """The rate of a step: linear warm-up to the peak, then the decay.

    "polynomial" is (1 - progress)^0.9 to 0 at ``max_steps`` (as nnU-Net), "linear" is 1 - progress. "constant" stays at
    the peak, as published for most diffusion models, whose averaged weights are used.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.max_steps - options.warmup_steps)
    power = {"polynomial": 0.9, "linear": 1.0, "constant": 0.0}[options.decay]
    return options.learning_rate * max(0.0, 1 - progress) ** power

"""What the trainings share: a run folder that starts once, a deadline for all stages, and the loadable model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from medseg_diffusion.config.shared import TrainingSection
from medseg_diffusion.data.draws import Draws, Examples
from medseg_diffusion.device import with_memory_format
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.files import remove_left_over, restore_folder
from medseg_diffusion.models.card import render_card
from medseg_diffusion.models.store import save_model

from .lock import hold
from .log import require_trackers
from .progress import OnProgress, count_of, silent, step_text
from .resume import Checkpoints
from .run import keep_sides, require_startable, start_run
from .runtime import Runtime
from .trainer import Callbacks, Outcome, Progress, TrainingOptions, TrainingRun, fit

ARITHMETIC = ("precision", "channels_last", "compile", "sharding")
"""Keys of the training section that say how to compute, not what."""
FIRST_STAGE_WARMUP = 50
"""Warm-up steps of the small networks that a segmenter needs first: the finder and the autoencoder of masks."""


@dataclass(frozen=True)
class Job:
    """One call of a training command.

    Attributes:
        run: the run directory, new unless ``resume``.
        resume: continue an interrupted run with the configuration that it was started with.
        max_steps: stop each network at this step; the learning rate follows training.max_steps.
        time_limit_min: stop after so many minutes from ``began``.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of weights, order, augmentation, times and noise.
        on_progress: called with a text and the share done, in the preparation and after every step.
        on_step: called with the numbers of every training step.
        on_outcome: called at the end of every training.
        began: `time.monotonic` at the start.
    """

    run: Path
    resume: bool = False
    max_steps: int | None = None
    time_limit_min: float | None = None
    device: str = "auto"
    seed: int = 0
    on_progress: OnProgress = silent
    on_step: Callable[[Progress], None] = lambda progress: None
    on_outcome: Callable[[Outcome], None] = lambda outcome: None
    began: float = field(default_factory=time.monotonic)

    def on_prepare(self, what: str, done: int, total: int) -> None:
        """Tells that ``done`` of ``total`` items are prepared."""
        count_of(self.on_progress)(what, done, total)

    def step_done(self, state: Progress) -> None:
        """Tells of a training step."""
        self.on_progress(step_text(state), state.step / max(state.max_steps, 1))
        self.on_step(state)

    @property
    def model(self) -> Path:
        """The model directory of the run."""
        return self.run / "model"

    @property
    def started(self) -> bool:
        """Whether the run folder holds a run."""
        return (self.run / "config.yaml").is_file()

    @property
    def minutes_left(self) -> float | None:
        """Until the time limit, 0 after it; None without one."""
        if self.time_limit_min is None:
            return None
        return max(0.0, self.time_limit_min - (time.monotonic() - self.began) / 60)

    def clock_started(self) -> Job:
        """This job, with a time limit that counts from now: the preparation of the data is over."""
        return replace(self, began=time.monotonic())

    def stage(self, folder: Path) -> Job:
        """This call's training of a part in a folder of its own: resumed if it was started before."""
        part = replace(self, run=folder)
        return replace(part, resume=self.resume and part.started)

    def first_stage(self, name: str) -> Job:
        """The training of a part that the network needs, in the folder ``name``. Only the time limit ends it early."""
        folder = self.run / name
        return replace(self, run=folder, resume=self.resume and bool(Checkpoints(folder).files()), max_steps=None)

    def require_startable(self, config: BaseModel, noted: Mapping[str, Any] | None = None) -> None:
        """What `start` refuses, before any work is done; see `medseg_diffusion.training.run.require_startable`."""
        section = getattr(config, "training", None)
        if isinstance(section, TrainingSection):
            require_trackers(section.trackers)
        require_startable(self.run, config, {"seed": self.seed, **(noted or {})}, self.resume)

    def start(
        self,
        config: BaseModel,
        noted: Mapping[str, Any] | None = None,
        sides: Mapping[str, Any] | None = None,
        data: Path | str | None = None,
        sides_file: str = "split.json",
    ) -> None:
        """Writes config.yaml and the sides of the split, and keeps other processes out of the folder (`hold`).

        Call it after everything that can be refused, so that a refused call can be corrected and repeated in the same
        folder.

        Args:
            config: the whole configuration.
            noted: what else has to be the same to resume, in plain types.
            sides: which case is on which side; None if the data say so themselves.
            data: the data folder or what it is called, for messages.
            sides_file: where sides are written.

        Raises:
            UsageError: the run exists and is not resumed, was started with another configuration, or is being trained.
            InputError: the sides have changed since the run was started.
        """
        start_run(self.run, config, {"seed": self.seed, **(noted or {})}, self.resume)
        hold(self.run)
        if self.resume:  # tidies up after a process that was killed
            restore_folder(self.model)
            remove_left_over([self.run / name for name in ("config.yaml", "log.csv", sides_file)], time.time())
        if sides is not None:
            keep_sides(self.run / sides_file, sides, data or self.run, self.resume)

    def seed_weights(self) -> None:
        """Makes the weights of the network that is built next depend on the seed alone."""
        torch.manual_seed(derive_seed(self.seed, "weights"))

    def fit(
        self, model: nn.Module, examples: Examples, section: TrainingSection, callbacks: Callbacks, runtime: Runtime
    ) -> Outcome:
        """Trains ``model`` on the job's draws of ``examples``; see `medseg_diffusion.training.trainer.fit`."""
        run = TrainingRun(self.run, self.seed, self.resume, self.max_steps, self.minutes_left)
        outcome = fit(model, Draws(examples, self.seed), training_options(section), callbacks, run, runtime)
        self.on_outcome(outcome)
        return outcome

    def save(self, card: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Writes the loadable model."""
        save_model(self.model, card, weights, render_card(card))


def training_options(section: TrainingSection) -> TrainingOptions:
    """The optimisation of a configuration."""
    return TrainingOptions(**section.model_dump(exclude=set(ARITHMETIC)))


def arranged(network: nn.Module, section: TrainingSection) -> nn.Module:
    """The network itself, with the memory format of a configuration, and compiled at its first call if it says so."""
    with_memory_format(network, section.channels_last)
    if section.compile:
        network.compile()
    return network

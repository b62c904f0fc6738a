"""The first stage of a segmenter with a finder: the network that finds the organ on a coarse grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.models.card import versions
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.tasks.mask import FeedForward
from medseg_diffusion.training.job import FIRST_STAGE_WARMUP, Job
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.trainer import Callbacks

from .segmenter_data import SegmenterData

FOLDER = "finder"
"""Folder of this stage in the run folder."""


def train_finder(finder: FeedForward, config: SegmenterConfig, data: SegmenterData, job: Job, runtime: Runtime) -> None:
    """Train the finder in the run folder of ``job``, and give it the weights with the best validation Dice."""
    assert config.finder is not None and data.coarse is not None
    section, (examples, validation) = config.finder, data.coarse

    def validate(averaged: nn.Module) -> dict[str, float]:
        dice = []
        for done, case in enumerate(validation):
            job.on_prepare("validation: coarse window", done, len(validation))
            with torch.no_grad():
                logits = cast(FeedForward, averaged).logits(case.image[None].to(runtime.device))
            overlap = label_overlap(logits.argmax(1)[0].cpu().numpy(), case.label.numpy(), [1])[1]
            dice.append(1.0 if overlap.dice != overlap.dice else overlap.dice)  # neither has a brain
        return {"score": sum(dice) / len(dice)}

    def save(averaged: nn.Module, step: int, numbers: Mapping[str, float]) -> None:
        card = {
            "task": "finder",
            "config": config.model_dump(mode="json"),
            "training": {"seed": job.seed, "step": step},
            "metrics": {"validation": dict(numbers)},
            "versions": versions(),
        }
        save_model(job.model, card, averaged.state_dict(), "# Finder\n")

    changed = config.training.model_copy(
        update={
            "batch_size": section.batch_size,
            "max_steps": section.max_steps,
            "learning_rate": section.learning_rate,
            "warmup_steps": FIRST_STAGE_WARMUP,
            "validate_every": max(1, section.max_steps // 4),
        }
    )
    job.fit(finder, examples, changed, Callbacks(validate, save, job.step_done), runtime)
    finder.load_state_dict(load_model_files(job.model).weights)

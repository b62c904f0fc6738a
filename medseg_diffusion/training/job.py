"""What all trainings share."""

from __future__ import annotations

from medseg_diffusion.config.shared import TrainingSection

from .trainer import TrainingOptions

ARITHMETIC = ("precision", "channels_last", "compile")
"""Keys of the training section that say how to compute, not what."""


def training_options(section: TrainingSection) -> TrainingOptions:
    """The optimisation of a configuration."""
    return TrainingOptions(**section.model_dump(exclude=set(ARITHMETIC)))

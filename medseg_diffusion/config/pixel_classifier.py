"""Configuration of label-efficient segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
)

from .shared import AugmentationSection, Section


class LabelledDataSection(Section):
    """Labelled images for pixel classifiers; ``labels`` names the classes above background where the folder does not.

    Sides are those of `DataSection` with the same numbers; None takes as many as the generator held out, or those of
    `DataSection` where it does not say. ``pixels_per_class`` are sampled from a labelled case or slice and, among
    them, its ``copies``, which are changed as the augmentation says; 0 as published.
    """

    labels: tuple[str, ...] = ()
    test_cases: int | None = Field(None, ge=0)
    validation_cases: int | None = Field(None, ge=0)
    pixels_per_class: int = Field(1000, ge=20)
    copies: int = Field(0, ge=0)


class FeaturesSection(Section):
    """`medseg_diffusion.methods.activations.Activations`.

    ``blocks`` are numbers of decoder blocks; "auto" takes the published ones, 5, 6, 7, 8 and 12, where the generator
    has them, otherwise those of the finer half of the decoder's resolutions, or the best five of a search among them
    if they have more features than the published ones. ``times`` count from 0.
    """

    times: tuple[int, ...] = Field((50, 150, 250), min_length=1)
    blocks: Literal["auto"] | Annotated[tuple[int, ...], Field(min_length=1)] = "auto"


class PixelClassifierSection(Section):
    """`medseg_diffusion.methods.label_efficient.ClassifierOptions`."""

    members: int = Field(10, ge=1)
    hidden: tuple[int, int] | None = None
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    max_epochs: int = Field(100, ge=1)
    min_epochs: int = Field(4, ge=0)
    min_steps: int = Field(1000, ge=0)
    patience: int = Field(50, ge=1)


class PixelClassifierConfig(Section):
    """Label-efficient segmentation: classifiers of a generator's activations, trained on a few labelled images."""

    description: str = ""
    method: Literal["label-efficient"]
    data: LabelledDataSection = LabelledDataSection()
    augmentation: AugmentationSection = AugmentationSection()
    features: FeaturesSection = FeaturesSection()
    classifier: PixelClassifierSection = PixelClassifierSection()
    largest_part: bool = False

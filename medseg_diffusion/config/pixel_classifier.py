"""Configuration of label-efficient segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
)

from .shared import AugmentationSection, ClassCodesSection, Section


class LabelledDataSection(Section):
    """Labelled images for pixel classifiers.

    ``labels`` names the classes above background if the folder does not; ``codes`` says what they mean. The split is
    that of `DataSection` with the same numbers; None takes the numbers that the generator held out or, if these are
    unknown, the defaults of `DataSection`. ``copies`` is the number of augmented copies of every labelled case or
    slice; the published method has 0. ``pixels_per_class`` pixels are sampled from a case or slice and its copies
    together.
    """

    labels: tuple[str, ...] = ()
    codes: dict[str, ClassCodesSection] = Field(default_factory=dict)
    test_cases: int | None = Field(None, ge=0)
    validation_cases: int | None = Field(None, ge=0)
    pixels_per_class: int = Field(1000, ge=20)
    copies: int = Field(0, ge=0)


class FeaturesSection(Section):
    """Settings of `medseg_diffusion.methods.activations.Activations`.

    ``blocks`` are numbers of decoder blocks. "auto" takes the published blocks 5, 6, 7, 8 and 12 if the generator has
    them. Otherwise it takes the blocks in the finer half of the decoder's resolutions; if these have more features than
    the published blocks, a search takes the best five of them. ``times`` count from 0.
    """

    times: tuple[int, ...] = Field((50, 150, 250), min_length=1)
    blocks: Literal["auto"] | Annotated[tuple[int, ...], Field(min_length=1)] = "auto"


class PixelClassifierSection(Section):
    """Settings of `medseg_diffusion.methods.label_efficient.ClassifierOptions`."""

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

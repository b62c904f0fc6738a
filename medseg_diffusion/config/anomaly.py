"""Configuration of anomaly segmentation."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from .generator import GeneratorConfig, NoisyClassifierConfig
from .shared import Section


class LatentHealingSection(Section):
    """Settings of `medseg_diffusion.methods.latent_healing.LatentHealing`.

    ``times`` is the number of KL maps, at times between ``earliest`` and ``latest``.
    """

    times: int = Field(21, ge=1)
    earliest: int = Field(400, ge=2)
    latest: int = Field(600, ge=2)
    start: int = Field(500, ge=1)
    steps: int = Field(25, ge=1)
    draws: int = Field(1, ge=1)
    quantile: float = Field(0.975, ge=0, lt=1)
    smoothing: float = Field(1.0, ge=0)


class PartialNoiseSection(Section):
    """Settings of `medseg_diffusion.methods.partial_noise.PartialNoise`; the noise is that of the training."""

    start: int = Field(250, ge=1)
    steps: int = Field(25, ge=1)
    draws: int = Field(1, ge=1)


class PatchedSection(Section):
    """Settings of `medseg_diffusion.methods.patched.Patched`; patches and noise are those of the training."""

    time: int = Field(500, ge=1)
    draws: int = Field(1, ge=1)


class CounterfactualSection(Section):
    """Settings of `medseg_diffusion.methods.counterfactual`.

    ``scale`` multiplies the classifier's gradient; without a classifier the guidance is classifier-free.
    """

    start: int = Field(500, ge=1)
    steps: int = Field(50, ge=1)
    scale: float = Field(100.0, ge=0)
    guidance: float = Field(3.0, ge=0)


class PostprocessingSection(Section):
    """Post-processing of an anomaly map on the model's grid, and of its mask.

    ``median`` is the side of a median filter in voxels (1: none; slices are filtered in their planes). The foreground
    is eroded by ``erosion`` voxels. Connected parts of the mask below ``min_volume_mm3`` are dropped.
    """

    median: int = Field(1, ge=1)
    erosion: int = Field(0, ge=0)
    min_volume_mm3: float = Field(0.0, ge=0)

    @field_validator("median")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("an even side would shift the map by half a voxel; take an odd one")
        return value


class AnomalyConfig(Section):
    """Anomaly segmentation: a generator of healthy images, and the settings of its detectors.

    The kind of generator decides which detectors there are: a latent one has "latent-healing" and "reconstruction", a
    pixel one "partial-noise", a patched one "patched". A pixel generator with classes has "counterfactual" and, with a
    ``classifier``, "classifier-guided".

    The threshold is the ``quantile`` of the maps of held-out healthy scans. ``residual`` "bright" ignores voxels that
    are darker than in the healthy image. A DICOM series of another ``modality`` (MR, CT, ...) is an error; other file
    formats do not state their modality.
    """

    description: str = ""
    method: Literal["anomaly"]
    generator: GeneratorConfig
    classifier: NoisyClassifierConfig | None = None
    modality: str | None = None
    quantile: float = Field(0.975, gt=0, lt=1)
    residual: Literal["absolute", "bright"] = "absolute"
    latent_healing: LatentHealingSection = LatentHealingSection()
    partial_noise: PartialNoiseSection = PartialNoiseSection()
    patched: PatchedSection = PatchedSection()
    counterfactual: CounterfactualSection = CounterfactualSection()
    postprocessing: PostprocessingSection = PostprocessingSection()

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names of the detectors that this generator has, the default one first."""
        if self.generator.method == "latent":
            return ("latent-healing", "reconstruction")
        if self.generator.method == "patched":
            return ("patched",)
        if self.generator.condition.classes == "none":
            return ("partial-noise",)
        return ("counterfactual",) if self.classifier is None else ("classifier-guided", "counterfactual")

    @property
    def needs_unhealthy(self) -> bool:
        """Whether the training also needs unhealthy images."""
        return self.generator.condition.classes != "none"

    @model_validator(mode="after")
    def _parts(self) -> AnomalyConfig:
        generator, classifier = self.generator, self.classifier
        if generator.method == "upsampler":
            raise ValueError("generator.method upsampler enlarges images; it cannot detect anomalies")
        if generator.condition.mask:
            raise ValueError("generator.condition.mask: healthy images have no masks")
        if generator.method == "latent" and generator.condition.classes != "none":
            raise ValueError("generator.method latent takes no classes here; counterfactuals need method pixel")
        if classifier is not None and not self.needs_unhealthy:
            raise ValueError("a classifier needs a generator with generator.condition.classes")
        if classifier is not None and (
            classifier.data != generator.data.images
            or classifier.preprocessing != generator.preprocessing
            or classifier.schedule != generator.diffusion.schedule
        ):
            raise ValueError("classifier: its data, preprocessing and schedule must be the generator's")
        if generator.diffusion.noise != "gaussian" and not {"partial-noise", "patched"} & set(self.detectors):
            raise ValueError(f"generator.diffusion.noise: {self.detectors[0]} is defined for gaussian noise")
        if self.needs_unhealthy and generator.condition.drop == 0:
            raise ValueError("generator.condition.drop: counterfactuals need images whose class was dropped")
        self._check_times(generator.diffusion.schedule.num_steps)
        return self

    def _check_times(self, last: int) -> None:
        """Check the times before the training; a detector would reject them only after it."""
        healing, partial, counterfactual = self.latent_healing, self.partial_noise, self.counterfactual
        for method, fits, needed in (
            ("latent-healing", healing.steps <= healing.start <= last, f"steps <= start <= {last}"),
            ("latent-healing", healing.earliest <= healing.latest <= last, f"earliest <= latest <= {last}"),
            ("partial-noise", partial.steps <= partial.start <= last, f"steps <= start <= {last}"),
            ("patched", self.patched.time <= last, f"time <= {last}"),
            ("counterfactual", counterfactual.steps < counterfactual.start <= last, f"steps < start <= {last}"),
        ):
            if method in self.detectors and not fits:
                raise ValueError(f"{method.replace('-', '_')}: needs {needed}")

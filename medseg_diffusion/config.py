"""Run configurations: strict YAML to typed, frozen objects.

A configuration is data: it names no code. Sections mirror the constructors that they feed, and a test compares the
two. An unknown key is refused with its dotted path and the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from .errors import UsageError
from .sections import (
    AnchorLossSection,
    AugmentationSection,
    AutoencoderLossSection,
    AutoencoderNetworkSection,
    AutoencoderSection,
    ClassifierNetworkSection,
    CounterfactualSection,
    DataSection,
    DenoiserUNetSection,
    DiffusionSection,
    DynamicEncodingSection,
    FeaturesSection,
    GeneratorSamplingSection,
    ImageConditionSection,
    ImageDataSection,
    ImageDiffusionSection,
    ImageEncoderSection,
    InferenceSection,
    LabelledDataSection,
    LatentHealingSection,
    MaskAutoencoderSection,
    NoisyClassifierSection,
    PartialNoiseSection,
    PatchedSection,
    PixelClassifierSection,
    PostprocessingSection,
    PreprocessingSection,
    ScheduleSection,
    Section,
    SemanticConditionSection,
    TrainingSection,
    UNetSection,
)


class SegmenterConfig(Section):
    """A mask segmenter: mask diffusion in one of four networks or in latents, or the matched feed-forward baseline.

    "ensemdiff" concatenates the image. ``image_encoder`` is SegDiff's, ``dynamic_encoding`` MedSegDiff's,
    ``semantic_condition`` and ``anchor_loss`` are MedSegDiff-V2's, ``mask_autoencoder`` is of "latent-mask".
    """

    description: str = ""
    method: Literal["ensemdiff", "segdiff", "medsegdiff", "medsegdiff-v2", "latent-mask", "baseline"]
    data: DataSection
    preprocessing: PreprocessingSection = PreprocessingSection()
    augmentation: AugmentationSection = AugmentationSection()
    network: UNetSection = UNetSection()
    image_encoder: ImageEncoderSection = ImageEncoderSection()
    dynamic_encoding: DynamicEncodingSection = DynamicEncodingSection()
    semantic_condition: SemanticConditionSection = SemanticConditionSection()
    anchor_loss: AnchorLossSection = AnchorLossSection()
    mask_autoencoder: MaskAutoencoderSection = MaskAutoencoderSection()
    diffusion: DiffusionSection = DiffusionSection()
    training: TrainingSection = TrainingSection()
    inference: InferenceSection = InferenceSection()

    @model_validator(mode="after")
    def _dimensions(self) -> SegmenterConfig:
        for name, window in (("data.window", self.data.window), ("inference.window", self.inference.window)):
            if window is not None and len(window) != self.network.dims:
                raise ValueError(f"{name} has {len(window)} numbers, but network.dims is {self.network.dims}")
        if wrong := [axis for axis in self.augmentation.flip_axes if axis >= self.network.dims]:
            raise ValueError(f"augmentation.flip_axes: no axis {wrong[0]} in {self.network.dims}D")
        if self.preprocessing.size is not None and self.network.dims != 2:
            raise ValueError("preprocessing.size resizes pictures, but network.dims is 3")
        if self.method == "latent-mask" and self.diffusion.head == "logits":
            raise ValueError("latents have no head: logits and no dice_ce_weight")
        return self


class PixelClassifierConfig(Section):
    """Label-efficient segmentation: classifiers of a generator's activations, trained on a few labelled images."""

    description: str = ""
    method: Literal["label-efficient"]
    data: LabelledDataSection = LabelledDataSection()
    augmentation: AugmentationSection = AugmentationSection()
    features: FeaturesSection = FeaturesSection()
    classifier: PixelClassifierSection = PixelClassifierSection()
    largest_part: bool = False


def _no_size(preprocessing: PreprocessingSection) -> None:
    if preprocessing.size is not None:
        raise ValueError("preprocessing.size is of segmenters; here data.size is what images are made")


class GeneratorConfig(Section):
    """A generator of images or volumes: of pixels, of an autoencoder's latents, or of either from a smaller image.

    Method "patched" (pDDPM) learns to restore patches of an image from what surrounds them, and cannot be sampled.
    ``autoencoder`` (method latent, and an upsampler of latents) is the configuration of the first stage, a preset's
    name or a YAML file.
    ``factor`` (method upsampler) is how much smaller the low-resolution image is. ``preprocessing`` is of scans.
    """

    description: str = ""
    method: Literal["pixel", "latent", "upsampler", "patched"]
    autoencoder: str | None = None
    factor: int = Field(2, ge=2)
    data: ImageDataSection = ImageDataSection()
    preprocessing: PreprocessingSection = PreprocessingSection()
    network: UNetSection = UNetSection(dims=2)
    condition: ImageConditionSection = ImageConditionSection()
    diffusion: ImageDiffusionSection = ImageDiffusionSection()
    training: TrainingSection = TrainingSection()
    sampling: GeneratorSamplingSection = GeneratorSamplingSection()

    @model_validator(mode="after")
    def _stages(self) -> GeneratorConfig:
        if self.method == "latent" and self.autoencoder is None:
            raise ValueError("method latent names its autoencoder")
        _no_size(self.preprocessing)
        if self.method == "upsampler" and any(side % self.factor for side in self.data.shape):
            raise ValueError(f"data.size {self.data.size} is no multiple of factor {self.factor}")
        if self.method in ("pixel", "patched") and self.autoencoder is not None:
            raise ValueError(f"method {self.method} has no autoencoder")
        if self.method == "patched" and (
            self.diffusion.target != "x0" or self.diffusion.objective != "simple" or self.condition.classes != "none"
        ):
            raise ValueError("method patched needs diffusion.target: x0 and objective: simple, and knows no classes")
        if self.network.dims != len(self.data.shape):
            raise ValueError(f"data.size has {len(self.data.shape)} sides, but network.dims is {self.network.dims}")
        attends = bool(self.network.attention_factors) or self.network.middle_attention is True
        if self.condition.classes == "cross-attention" and not attends:
            raise ValueError("condition.classes cross-attention needs network.attention_factors")
        return self


class ImageAutoencoderConfig(Section):
    """The first stage of a latent generator."""

    description: str = ""
    method: Literal["autoencoder"]
    data: ImageDataSection = ImageDataSection()
    preprocessing: PreprocessingSection = PreprocessingSection()
    network: AutoencoderNetworkSection = AutoencoderNetworkSection()
    loss: AutoencoderLossSection = AutoencoderLossSection()
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _images(self) -> ImageAutoencoderConfig:
        _no_size(self.preprocessing)
        factor = 2 ** (len(self.network.channels) - 1)
        if odd := [side for side in self.data.shape if side % factor]:
            raise ValueError(f"data.size: {odd[0]} is no multiple of {factor}, by which the autoencoder divides it")
        return self


class NoisyClassifierConfig(Section):
    """A classifier of noisy images, to guide a pixel generator of the same schedule."""

    description: str = ""
    method: Literal["classifier"]
    data: ImageDataSection = ImageDataSection()
    preprocessing: PreprocessingSection = PreprocessingSection()
    network: ClassifierNetworkSection = ClassifierNetworkSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _images(self) -> NoisyClassifierConfig:
        _no_size(self.preprocessing)
        return self


class AnomalyConfig(Section):
    """Anomaly segmentation: a generator of healthy images, and how its detectors are used.

    What the generator is decides what can be detected with: latent "latent-healing" and "reconstruction", pixel
    "partial-noise", patched "patched", pixel with classes "counterfactual" and, with a ``classifier``,
    "classifier-guided". ``quantile`` of the maps of held-out healthy scans is the threshold. ``residual`` "bright"
    leaves out where a scan is darker than its healthy image. DICOM series of another ``modality`` (MR, CT, ...) are
    refused; files of other formats do not say theirs.
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
        """Names of the detectors that this generator serves, the default one first."""
        if self.generator.method == "latent":
            return ("latent-healing", "reconstruction")
        if self.generator.method == "patched":
            return ("patched",)
        if self.generator.condition.classes == "none":
            return ("partial-noise",)
        return ("counterfactual",) if self.classifier is None else ("classifier-guided", "counterfactual")

    @property
    def needs_unhealthy(self) -> bool:
        """Whether its detectors were told what unhealthy images are."""
        return self.generator.condition.classes != "none"

    @model_validator(mode="after")
    def _parts(self) -> AnomalyConfig:
        generator, classifier = self.generator, self.classifier
        if generator.method == "upsampler":
            raise ValueError("generator.method upsampler enlarges images; it cannot detect anomalies")
        if generator.method == "latent" and generator.condition.classes != "none":
            raise ValueError("generator.method latent takes no classes here; counterfactuals are of pixels")
        if classifier is not None and not self.needs_unhealthy:
            raise ValueError("a classifier needs a generator with generator.condition.classes")
        if classifier is not None and (
            classifier.data != generator.data
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
        """What a detector would refuse is refused before the training, not after it."""
        healing, partial, walk = self.latent_healing, self.partial_noise, self.counterfactual
        for method, fits, needed in (
            ("latent-healing", healing.steps <= healing.start <= last, f"steps <= start <= {last}"),
            ("latent-healing", healing.earliest <= healing.latest <= last, f"earliest <= latest <= {last}"),
            ("partial-noise", partial.steps <= partial.start <= last, f"steps <= start <= {last}"),
            ("patched", self.patched.time <= last, f"time <= {last}"),
            ("counterfactual", walk.steps < walk.start <= last, f"steps < start <= {last}"),
        ):
            if method in self.detectors and not fits:
                raise ValueError(f"{method.replace('-', '_')}: needs {needed}")


class DenoiserConfig(Section):
    """A denoiser of images or latents: what a model card holds of it."""

    network: DenoiserUNetSection
    schedule: ScheduleSection = ScheduleSection()
    target: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False


class ClassifierConfig(Section):
    """A classifier of noisy images, and the schedule of the model that it guides."""

    network: NoisyClassifierSection
    schedule: ScheduleSection = ScheduleSection()


class AutoencoderConfig(Section):
    """An autoencoder of images."""

    network: AutoencoderSection


def presets() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(str(resources.files("medseg_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


NOTES = ("seed", "init", "exclude_labelled", "autoencoder_sha256", "generator_sha256")
"""What config.yaml of a run folder holds beside the configuration."""

AnyConfig = (
    SegmenterConfig
    | PixelClassifierConfig
    | GeneratorConfig
    | ImageAutoencoderConfig
    | NoisyClassifierConfig
    | AnomalyConfig
)
_SCHEMAS: dict[str, type[AnyConfig]] = {
    "ensemdiff": SegmenterConfig,
    "segdiff": SegmenterConfig,
    "medsegdiff": SegmenterConfig,
    "medsegdiff-v2": SegmenterConfig,
    "latent-mask": SegmenterConfig,
    "baseline": SegmenterConfig,
    "label-efficient": PixelClassifierConfig,
    "anomaly": AnomalyConfig,
    "pixel": GeneratorConfig,
    "latent": GeneratorConfig,
    "upsampler": GeneratorConfig,
    "patched": GeneratorConfig,
    "autoencoder": ImageAutoencoderConfig,
    "classifier": NoisyClassifierConfig,
}


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Reads a preset or a YAML file, with overrides "a.b=value" (value in YAML); ``method`` says of what kind it is.

    The config.yaml of a run folder is read without what it notes beside the configuration (`NOTES`).

    Raises:
        UsageError: unknown preset or file, bad YAML, an unknown key (with the nearest known one) or a bad value.
    """
    path = Path(name_or_path)
    if not path.is_file():
        known = presets()
        if str(name_or_path) not in known:
            raise UsageError(
                f"{name_or_path}: no such file and no preset of that name{_nearest(str(name_or_path), known)}"
            )
        path = known[str(name_or_path)]
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}); correct the file") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds {type(content).__name__}, expected sections such as data: and network:")
    if path.name == "config.yaml":
        content = {key: value for key, value in content.items() if key not in NOTES}
    for override in overrides:
        override_key(content, override)
    return parse_config(content, str(path))


def load_segmenter_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> SegmenterConfig:
    """`load_config` for a segmenter; UsageError for the configuration of something else."""
    config = load_config(name_or_path, overrides)
    if not isinstance(config, SegmenterConfig):
        command = {"label-efficient": "train-pixel-classifier", "anomaly": "train-anomaly"}.get(
            config.method, "train-generator"
        )
        raise UsageError(f"{name_or_path}: configures a {config.method}; train it with {command}")
    return config


def parse_config(content: Mapping[str, Any], source: str) -> AnyConfig:
    """A configuration from plain types, e.g. that of a model card; errors name ``source`` and the dotted key."""
    method = content.get("method")
    if method not in _SCHEMAS:
        found = f"got {method!r}" if method else "Field required"
        raise UsageError(f"{source}: method: {found}; known: {', '.join(_SCHEMAS)}")
    schema = _SCHEMAS[str(method)]
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            names = _fields(schema, first["loc"][:-1])
            raise UsageError(f"{source}: unknown key {key}{_nearest(str(first['loc'][-1]), names)}") from error
        raise UsageError(f"{source}: {key or 'configuration'}: {first['msg']} (got {first['input']!r})") from error


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Settings "name=value" with values in YAML; UsageError for anything else."""
    content: dict[str, Any] = {}
    for setting in settings:
        override_key(content, setting)
    return content


def override_key(content: dict[str, Any], override: str) -> None:
    """Sets a key of ``content`` by "a.b=value" (value in YAML); UsageError for anything else."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {override}: expected a.b=value")
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UsageError(f"--set {override}: {part} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: {text!r} is not YAML") from error


def _fields(section: Any, location: Sequence[int | str]) -> Sequence[str]:
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        section = next((one for one in get_args(annotation) if hasattr(one, "model_fields")), annotation)
    return list(section.model_fields)


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"

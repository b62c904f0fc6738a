"""Builds schedules, samplers, models and detectors: the only place where the names in configurations become objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from .config.anomaly import AnomalyConfig
from .config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from .config.segmenter import DiffusionSection, SegmenterConfig
from .config.shared import AugmentationSection, PreprocessingSection, ScheduleSection
from .data.augmentation import Augmentation
from .data.healthy import HEALTHY
from .diffusion import schedule
from .diffusion.categorical import label_noise
from .diffusion.denoiser import Denoiser, Head, NetworkDenoiser
from .diffusion.guidance import Classifier, FixedCondition
from .diffusion.noise import LogitNormalTimes, NoiseSource, TimeSource, gaussian, uniform_times
from .diffusion.objective import Bound, Hybrid, ImportanceTimes, Objective, Simple
from .diffusion.schedule import NoiseSchedule
from .diffusion.simplex import simplex
from .errors import UsageError
from .methods.counterfactual import ClassifierCounterfactual, FreeCounterfactual
from .methods.detector import Detector
from .methods.latent_healing import HealthyLatents, LatentHealing, Reconstruction
from .methods.partial_noise import PartialNoise
from .methods.patched import Patched
from .networks.autoencoder import Codec, KLAutoencoder, VQAutoencoder
from .networks.latent_mask import LatentMask
from .networks.medsegdiff import MedSegDiff
from .networks.medsegdiff_v2 import MedSegDiffV2
from .networks.noisy_classifier import NoisyClassifier
from .networks.probabilistic_unet import ProbabilisticUNet
from .networks.segdiff import SegDiff
from .networks.unet import UNet
from .sampling.ddim import DDIM
from .sampling.ddpm import DDPM
from .sampling.dpm_solver import DPMSolver
from .sampling.heun import Heun
from .sampling.loop import Sampler, Spacing, spaced
from .tasks.categorical_mask import CategoricalMaskDiffusion
from .tasks.classifier import NoisyClassification
from .tasks.image import ImageDiffusion
from .tasks.latent_mask import LatentMaskDiffusion, MaskAutoencoder
from .tasks.mask import AnchorLoss, Auxiliary, FeedForward, MaskDiffusion, MaskEncoding
from .tasks.patched import PatchedDiffusion
from .tasks.probabilistic_unet import ProbabilisticSegmentation
from .volumes.preprocessing import Preprocessing

SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": schedule.linear,
    "cosine": schedule.cosine,
    "scaled-linear": schedule.scaled_linear,
    "sigmoid": schedule.sigmoid,
    "rectified-flow": schedule.rectified_flow,
}
SAMPLERS: dict[str, type[Any]] = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMSolver, "euler": DDIM, "heun": Heun}
"""Euler's step of rectified flow is that of DDIM; "euler" takes it at other times."""
_SPACING: dict[str, Spacing] = {"euler": "trailing", "heun": "trailing"}
"""Steps of equal lengths, that to the clean tensor included: those of rectified flow are even in u = t / T."""

SHAPE_PRIOR = "shape_prior"
"""Key of the shape prior among a model's weights (uint8)."""
FINDER = "finder."
"""Prefix of the finder's weights among those of a model."""

Segmenter = MaskDiffusion | LatentMaskDiffusion | CategoricalMaskDiffusion | FeedForward | ProbabilisticSegmentation


def noise_schedule(section: ScheduleSection) -> NoiseSchedule:
    """The noise schedule of a configuration; UsageError if its betas are impossible."""
    try:
        ends = {name: getattr(section, name) for name in ("beta_start", "beta_end")}
        ends = {name: value for name, value in ends.items() if value is not None}
        return SCHEDULES[section.name](section.num_steps, **ends)
    except ValueError as error:
        raise UsageError(f"schedule: {error}") from error


def sampler(name: str) -> Sampler:
    """The sampler of a command-line name."""
    if name not in SAMPLERS:
        raise UsageError(f"sampler {name!r} is unknown; use {', '.join(SAMPLERS)}")
    made: Sampler = SAMPLERS[name]()
    return made


def evaluations(sampler: str, steps: int) -> int:
    """Calls of the denoiser for one sample: Heun's method takes two a step, and one for the step to the clean image."""
    return 2 * steps - 1 if sampler == "heun" else steps


def generator_times(schedule: NoiseSchedule, sampler: str, steps: int) -> list[int]:
    """The times that a generator's sampler visits in ``steps`` steps, with the warnings of `spaced`.

    Published scores of DDPM and DDIM are for evenly spaced times from T to 1, DPM-Solver's for times even in log-SNR.
    """
    return spaced(schedule, steps, _SPACING.get(sampler, "log-snr" if sampler == "dpm++" else "linspace"))


def samplers(config: SegmenterConfig) -> tuple[str, ...]:
    """Names of the samplers of a segmenter; empty for a method that takes no steps."""
    if config.method in ("baseline", "probabilistic-unet"):
        return ()
    return ("ddpm",) if config.method == "categorical" else tuple(SAMPLERS)


def times(config: SegmenterConfig, steps: int, sampler: str | None = None) -> list[int]:
    """The times that a segmenter's sampler visits in ``steps`` steps, with the warnings of `spaced`.

    ``sampler`` None is that of the configuration. Euler's and Heun's times, and those of categorical diffusion, are
    evenly spaced, others even in log-SNR. A method without a sampler takes one step.
    """
    if not samplers(config):
        return [1, 0]
    schedule = noise_schedule(config.diffusion.schedule)
    if config.method != "categorical":
        first, last = _times_between(config.diffusion, schedule)
        return spaced(schedule, steps, _SPACING.get(sampler or config.inference.sampler, "log-snr"), last, first)
    first, last = _times_between(config.diffusion, label_noise(schedule))
    return spaced(schedule, steps, "trailing" if config.diffusion.log_snr is None else "linspace", last, first)


def _times_between(section: DiffusionSection, schedule: NoiseSchedule) -> tuple[int, int]:
    """The first and the last time of training and sampling; ``schedule`` is `label_noise` for labels."""
    if section.log_snr is None:
        return 1, schedule.num_steps
    try:
        return schedule.times_between(*section.log_snr, section.scale)
    except ValueError as error:
        raise UsageError(f"diffusion.log_snr: {error}") from error


def _time_source(section: DiffusionSection, schedule: NoiseSchedule) -> TimeSource:
    """How the training times of masks or their latents are drawn."""
    first, last = _times_between(section, schedule)
    if section.times == "uniform":
        return partial(uniform_times, last, first=first)
    return _logit_normal(section.times_mean, section.times_std, schedule, first, last)


def _logit_normal(mean: float, std: float, schedule: NoiseSchedule, first: int, last: int) -> LogitNormalTimes:
    try:
        return LogitNormalTimes(schedule, mean, std, first, last)
    except ValueError as error:
        raise UsageError(f"diffusion.times: {error}") from error


def preprocessing(section: PreprocessingSection) -> Preprocessing:
    """The preprocessing of a configuration."""
    try:
        return Preprocessing(**section.model_dump())
    except ValueError as error:
        raise UsageError(f"preprocessing: {error}") from error


def image_preprocessing(section: PreprocessingSection, size: Sequence[int]) -> Preprocessing:
    """The preprocessing of scans for a generator's images of ``size``; pixels of slices become square."""
    return replace(preprocessing(section), square_pixels=len(size) == 2)


def augmentation(section: AugmentationSection) -> Augmentation:
    """The augmentation of a configuration."""
    return Augmentation(**section.model_dump())


def segmenter(config: SegmenterConfig, num_classes: int) -> Segmenter:
    """The untrained model of a configuration for ``num_classes`` classes, background included."""
    encoding = MaskEncoding(num_classes, config.diffusion.scale)
    makers: dict[str, Callable[[SegmenterConfig, MaskEncoding], Segmenter]] = {
        "baseline": _feed_forward,
        "probabilistic-unet": _probabilistic_unet,
        "categorical": _categorical,
    }
    try:
        return makers.get(config.method, _mask_diffusion)(config, encoding)
    except ValueError as error:
        raise UsageError(f"network: {error}") from error


def finder(config: SegmenterConfig) -> FeedForward | None:
    """The untrained network that finds the organ of a configuration; None for one without ``finder``."""
    if config.finder is None:
        return None
    encoding = MaskEncoding(2)
    try:
        section = config.finder.network.model_dump()
        network = UNet(in_channels=config.data.channels, out_channels=encoding.channels, **section)
    except ValueError as error:
        raise UsageError(f"finder.network: {error}") from error
    return FeedForward(network, encoding)


def segmenter_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the segmenter alone, of all that a model stores."""
    return {name: value for name, value in weights.items() if name != SHAPE_PRIOR and not name.startswith(FINDER)}


def finder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the finder alone; empty for a model without one."""
    return {name.removeprefix(FINDER): value for name, value in weights.items() if name.startswith(FINDER)}


def _feed_forward(config: SegmenterConfig, encoding: MaskEncoding) -> FeedForward:
    network = UNet(in_channels=config.data.channels, out_channels=encoding.channels, **config.network.model_dump())
    section = config.feed_forward
    return FeedForward(network, encoding, section.loss == "dice-cross-entropy", section.members == "pixels")


def _probabilistic_unet(config: SegmenterConfig, encoding: MaskEncoding) -> ProbabilisticSegmentation:
    section, channels = config.probabilistic_unet, config.data.channels
    network = ProbabilisticUNet(
        UNet(in_channels=channels, out_channels=section.features, **config.network.model_dump()),
        section.features,
        channels,
        encoding.channels,
        encoding.channels,
        section.latent_channels,
        section.layers,
        config.network.norm_groups,
    )
    return ProbabilisticSegmentation(network, encoding, section.beta)


def _categorical(config: SegmenterConfig, encoding: MaskEncoding) -> CategoricalMaskDiffusion:
    classes, section = encoding.num_classes, config.diffusion
    network = UNet(in_channels=classes + config.data.channels, out_channels=classes, **config.network.model_dump())
    schedule = noise_schedule(section.schedule)
    between = _times_between(section, label_noise(schedule))
    return CategoricalMaskDiffusion(network, schedule, classes, section.cross_entropy_weight, between)


def _mask_diffusion(config: SegmenterConfig, encoding: MaskEncoding) -> MaskDiffusion | LatentMaskDiffusion:
    section = config.diffusion
    logits: Head = "sigmoid" if encoding.channels == 1 else "softmax"
    denoiser = NetworkDenoiser(
        _conditional_network(config, encoding),
        noise_schedule(section.schedule),
        section.target,
        section.learned_variance,
        logits if section.head == "logits" else "linear",
        section.scale,
        section.normalised,
    )
    simple = Simple(section.weighting, section.gamma)
    objective = Hybrid(simple, Bound("gaussian")) if section.learned_variance else simple
    if config.method == "latent-mask":
        codec = mask_autoencoder(config, encoding)
        return LatentMaskDiffusion(denoiser, codec, objective, _time_source(section, denoiser.schedule))
    return MaskDiffusion(
        denoiser,
        encoding,
        objective,
        Auxiliary(section.dice_ce_weight, section.dice_ce_log_snr, section.cross_entropy_weight),
        AnchorLoss(**config.anchor_loss.model_dump()),
        _time_source(section, denoiser.schedule),
    )


def _conditional_network(config: SegmenterConfig, encoding: MaskEncoding) -> nn.Module:
    """The denoising network of a method, which is conditioned by the image."""
    latent, image_channels = config.mask_autoencoder, config.data.channels
    channels = latent.latent_channels if config.method == "latent-mask" else encoding.channels
    concatenated = {"ensemdiff": image_channels, "latent-mask": latent.features}.get(config.method, 0)
    unet = UNet(
        in_channels=channels + concatenated,
        out_channels=(1 + config.diffusion.learned_variance) * channels,
        **config.network.model_dump(),
    )
    if config.method == "segdiff":
        return SegDiff(unet, image_channels, **config.image_encoder.model_dump())
    if config.method == "medsegdiff":
        return MedSegDiff(unet, image_channels, **config.dynamic_encoding.model_dump())
    if config.method == "medsegdiff-v2":
        return MedSegDiffV2(unet, image_channels, channels, **config.semantic_condition.model_dump())
    if config.method == "latent-mask":
        return LatentMask(
            config.network.dims,
            unet,
            image_channels,
            latent.features,
            latent.channels,
            latent.num_res_blocks,
            latent.norm_groups,
        )
    return unet


def mask_autoencoder(config: SegmenterConfig, encoding: MaskEncoding) -> MaskAutoencoder:
    """The untrained autoencoder of masks of a configuration."""
    section = config.mask_autoencoder
    codec = KLAutoencoder(
        config.network.dims,
        encoding.channels,
        encoding.channels,
        section.latent_channels,
        section.channels,
        section.num_res_blocks,
        [False] * len(section.channels),
        norm_groups=section.norm_groups,
        middle_attention=False,  # local context describes a mask, and attention over many latents would be slow
    )
    return MaskAutoencoder(codec, encoding, 2 ** (len(section.channels) - 1), section.kl_weight)


def autoencoder(config: ImageAutoencoderConfig) -> KLAutoencoder | VQAutoencoder:
    """The untrained autoencoder of a configuration."""
    section, channels = config.network, config.data.channels
    shared: dict[str, Any] = {
        "dims": len(config.data.shape),
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": section.latent_channels,
        "channels": section.channels,
        "num_res_blocks": section.num_res_blocks,
        "attention_levels": section.attention_levels,
        "middle_attention": section.middle_attention,
        "norm_groups": section.norm_groups,
    }
    try:
        if section.quantiser == "vq":
            return VQAutoencoder(**shared, codebook_size=section.codebook_size)
        return KLAutoencoder(**shared)
    except ValueError as error:
        raise UsageError(f"network: {error}") from error


def noise_source(name: Literal["gaussian", "simplex"]) -> NoiseSource:
    """The source of noise of a configuration."""
    return gaussian if name == "gaussian" else simplex


def generator(
    config: GeneratorConfig, num_classes: int, latent_channels: int | None = None, mask_classes: int = 0
) -> ImageDiffusion | PatchedDiffusion:
    """The untrained generator of a configuration.

    Args:
        config: Configuration of a pixel, latent, upsampler or patched generator.
        num_classes: Number of classes in the data; used if the configuration has a class condition.
        latent_channels: Channels of the autoencoder's latents; None for pixels.
        mask_classes: Number of classes of the masks, background included; used if the configuration has masks.
    """
    section, condition = config.diffusion, config.condition
    channels = latent_channels or config.data.channels
    with_class = condition.classes != "none"
    if with_class and not num_classes:
        raise UsageError("condition.classes asks for classes, but the data has none; set condition.classes=none")
    if condition.mask and not mask_classes:
        raise UsageError("condition.mask asks for masks, but the data has none; set condition.mask=false")
    concatenated = mask_classes if condition.mask else config.data.channels if config.method == "upsampler" else 0
    token = condition.context_channels if condition.classes == "cross-attention" else None
    try:
        network = UNet(
            in_channels=channels + concatenated,
            out_channels=(1 + section.learned_variance) * channels,
            num_classes=num_classes + 1 if condition.classes == "embedding" else None,
            context_channels=token,
            **config.network.model_dump(),
        )
    except ValueError as error:
        raise UsageError(f"network: {error}") from error
    schedule = noise_schedule(section.schedule)
    noise = noise_source(section.noise)
    if config.method == "patched":
        return PatchedDiffusion(NetworkDenoiser(network, schedule, section.target), noise)
    simple = Simple(section.weighting, section.gamma)
    bound = Bound("gaussian" if latent_channels else "discretised")
    objectives: dict[str, Objective] = {"simple": simple, "hybrid": Hybrid(simple, bound), "bound": bound}
    times: ImportanceTimes | LogitNormalTimes | None = None
    if section.times == "importance":
        times = ImportanceTimes(schedule.num_steps)
    elif section.times == "logit-normal":
        times = _logit_normal(section.times_mean, section.times_std, schedule, 1, schedule.num_steps)
    return ImageDiffusion(
        NetworkDenoiser(network, schedule, section.target, section.learned_variance),
        objectives[section.objective],
        times,
        num_classes if with_class else 0,
        condition.drop,
        token,
        config.factor if config.method == "upsampler" else None,
        noise,
        mask_classes if condition.mask else 0,
    )


def noisy_classifier(config: NoisyClassifierConfig, num_classes: int) -> NoisyClassification:
    """The untrained classifier of noisy images of a configuration."""
    if not num_classes:
        raise UsageError("a classifier needs classes, but the data has none")
    size = config.data.shape
    try:
        network = NoisyClassifier(len(size), config.data.channels, num_classes, size, **config.network.model_dump())
    except ValueError as error:
        raise UsageError(f"network: {error}") from error
    return NoisyClassification(network, noise_schedule(config.schedule))


def make_detector(
    config: AnomalyConfig,
    task: ImageDiffusion | PatchedDiffusion,
    codec: Codec | None,
    classifier: nn.Module | None,
    method: str,
    healthy: HealthyLatents | None,
    latent_quantile: float | None = None,
) -> Detector:
    """Build the detector ``method`` of a configuration from its trained parts.

    Args:
        config: Settings of the detectors.
        task: The trained generator.
        codec: The autoencoder of a latent generator.
        classifier: The noisy classifier, for "classifier-guided".
        method: One of ``config.detectors``.
        healthy: Statistics of healthy latents; "latent-healing" cannot score without them.
        latent_quantile: Quantile of latents for "latent-healing"; None takes that of the configuration.

    Raises:
        UsageError: Settings that the generator's schedule does not allow.
    """
    denoiser, kind = task.denoiser, config.residual
    try:
        if method == "latent-healing":
            return _latent_healing(config, denoiser, cast(Codec, codec), healthy, latent_quantile)
        if method == "reconstruction":
            return Reconstruction(cast(Codec, codec), kind)
        noise = noise_source(config.generator.diffusion.noise)
        if method == "partial-noise":
            partial = config.partial_noise
            return PartialNoise(denoiser, noise, partial.start, partial.steps, partial.draws, kind)
        if method == "patched":
            size, patched = config.generator.data.shape, config.patched
            return Patched(denoiser, noise, size, patched.time, draws=patched.draws, residual=kind)
        assert isinstance(task, ImageDiffusion)
        section = config.counterfactual
        span = section.start, section.steps
        label = torch.tensor([HEALTHY], device=next(task.parameters()).device)
        null = task.null(label)
        if method == "classifier-guided":
            guide = cast(Classifier, classifier)
            return ClassifierCounterfactual(FixedCondition(denoiser, null), guide, HEALTHY, *span, section.scale, kind)
        return FreeCounterfactual(denoiser, task.condition(label), null, *span, section.guidance, kind)
    except ValueError as error:
        raise UsageError(f"{method}: {error}") from error


def _latent_healing(
    config: AnomalyConfig,
    denoiser: Denoiser,
    codec: Codec,
    healthy: HealthyLatents | None,
    latent_quantile: float | None,
) -> LatentHealing:
    section = config.latent_healing
    times = np.linspace(section.earliest, section.latest, section.times).round().astype(int).tolist()
    return LatentHealing(
        denoiser,
        codec,
        times,
        section.start,
        section.steps,
        section.quantile if latent_quantile is None else latent_quantile,
        section.smoothing,
        healthy,
        residual=config.residual,
        draws=section.draws,
    )

"""Keys that are set although nothing reads them: the run and the model's card would state them as if they counted."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pydantic import BaseModel

from .anomaly import AnomalyConfig
from .generator import GeneratorConfig, ImageAutoencoderConfig
from .segmenter import SegmenterConfig
from .shared import Section

_SECTIONS = {
    "image_encoder": "segdiff",
    "dynamic_encoding": "medsegdiff",
    "semantic_condition": "medsegdiff-v2",
    "anchor_loss": "medsegdiff-v2",
    "mask_autoencoder": "latent-mask",
    "probabilistic_unet": "probabilistic-unet",
    "feed_forward": "baseline",
}
"""Section of a segmenter -> the one method that reads it."""
_DIFFUSION: dict[str, Collection[str]] = {
    "baseline": (),
    "probabilistic-unet": (),
    "categorical": ("schedule", "cross_entropy_weight", "log_snr"),
    "patched": ("schedule", "noise", "target", "learned_variance", "objective"),
}
"""Method -> what it reads of the section diffusion, if that is not all of it."""
_SWITCHED = {
    "gamma": ("weighting", "min-snr"),
    "times_mean": ("times", "logit-normal"),
    "times_std": ("times", "logit-normal"),
}
"""Key of the section diffusion -> the other key of it, and the value of that, with which it is read."""
_DETECTORS = {
    "latent_healing": "latent-healing",
    "partial_noise": "partial-noise",
    "patched": "patched",
    "counterfactual": "counterfactual",  # beside "classifier-guided", which reads it, too
}
"""Section of an anomaly model -> the detector that reads it."""


def unread_keys(config: BaseModel) -> dict[str, list[str]]:
    """Setting, such as "method: baseline" -> the keys that differ from their defaults and have no effect with it."""
    unread: dict[str, list[str]] = {}
    for key, reason in _unread(config):
        unread.setdefault(reason, []).append(key)
    return unread


def _unread(config: BaseModel) -> Iterator[tuple[str, str]]:
    if isinstance(config, SegmenterConfig):
        yield from _of_segmenter(config)
    elif isinstance(config, GeneratorConfig):
        yield from _of_generator(config)
    elif isinstance(config, ImageAutoencoderConfig):
        yield from _of_autoencoder(config)
    elif isinstance(config, AnomalyConfig):
        yield from ((f"generator.{key}", f"generator.{reason}") for key, reason in _unread(config.generator))
        yield from _of_detectors(config)


def _of_segmenter(config: SegmenterConfig) -> Iterator[tuple[str, str]]:
    method = f"method: {config.method}"
    for name, reader in _SECTIONS.items():
        if reader != config.method:
            yield from ((f"{name}.{key}", method) for key in _changed(getattr(config, name)))
    yield from _of_diffusion(config.method, config.diffusion)
    if config.method in ("baseline", "probabilistic-unet"):  # one step is what they do
        unread = {"sampler"} if config.inference.steps == 1 else {"sampler", "steps"}
        yield from ((f"inference.{key}", method) for key in _changed(config.inference) if key in unread)
    if config.data.source == "brain-labelmaps":
        source = "data.source: brain-labelmaps"
        yield from ((f"augmentation.{key}", source) for key in _changed(config.augmentation))
        yield from ((f"data.{key}", source) for key in ("labels", "merge_labels") if getattr(config.data, key))


def _of_generator(config: GeneratorConfig) -> Iterator[tuple[str, str]]:
    yield from _of_diffusion(config.method, config.diffusion)
    if config.method != "upsampler" and "factor" in _changed(config):
        yield "factor", f"method: {config.method}"
    condition = config.condition
    if condition.classes == "none" and not condition.mask and "drop" in _changed(condition):
        yield "condition.drop", "condition.classes: none"
    if condition.classes != "cross-attention" and "context_channels" in _changed(condition):
        yield "condition.context_channels", f"condition.classes: {condition.classes}"


def _of_autoencoder(config: ImageAutoencoderConfig) -> Iterator[tuple[str, str]]:
    if config.training.compile:
        yield "training.compile", "method: autoencoder"
    unread = ("loss", "kl_weight") if config.network.quantiser == "vq" else ("network", "codebook_size")
    if unread[1] in _changed(getattr(config, unread[0])):
        yield ".".join(unread), f"network.quantiser: {config.network.quantiser}"


def _of_detectors(config: AnomalyConfig) -> Iterator[tuple[str, str]]:
    generator = f"the generator, which has {' and '.join(config.detectors)}"
    for name, detector in _DETECTORS.items():
        if detector not in config.detectors:
            yield from ((f"{name}.{key}", generator) for key in _changed(getattr(config, name)))
        elif name == "counterfactual" and config.classifier is None and "scale" in _changed(config.counterfactual):
            yield "counterfactual.scale", "classifier: null"


def _of_diffusion(method: str, section: Section) -> Iterator[tuple[str, str]]:
    for key in _changed(section):
        if key not in _DIFFUSION.get(method, [key]):
            yield f"diffusion.{key}", f"method: {method}"
        elif key in _SWITCHED and getattr(section, _SWITCHED[key][0]) != _SWITCHED[key][1]:
            switch = _SWITCHED[key][0]
            yield f"diffusion.{key}", f"diffusion.{switch}: {getattr(section, switch)}"


def _changed(section: Section) -> list[str]:
    """The keys of a section whose values are not their defaults."""
    fields = type(section).model_fields
    return [key for key, value in section if value != fields[key].get_default(call_default_factory=True)]

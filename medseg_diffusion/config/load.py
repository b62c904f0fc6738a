"""Reads run configurations from strict YAML into typed, frozen objects.

A configuration is data and names no code. Its sections mirror constructors, and a test compares the two. An unknown key
is an error that names its dotted path and the nearest valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from medseg_diffusion.errors import UsageError, remark

from .anomaly import AnomalyConfig
from .generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from .pixel_classifier import PixelClassifierConfig
from .segmenter import SegmenterConfig, SegmenterMethod
from .unread import unread_keys


def presets() -> dict[str, Path]:
    """Name -> file of every configuration that ships with the package."""
    folder = Path(str(resources.files("medseg_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


NOTES = ("seed", "init", "exclude_labelled", "autoencoder_sha256", "generator_sha256", "perceptual_loss")
"""Keys in the config.yaml of a run folder that are not part of the configuration."""

AnyConfig = (
    SegmenterConfig
    | PixelClassifierConfig
    | GeneratorConfig
    | ImageAutoencoderConfig
    | NoisyClassifierConfig
    | AnomalyConfig
)
_SCHEMAS: dict[str, type[AnyConfig]] = {
    **dict.fromkeys(get_args(SegmenterMethod), SegmenterConfig),
    "label-efficient": PixelClassifierConfig,
    "anomaly": AnomalyConfig,
    "pixel": GeneratorConfig,
    "latent": GeneratorConfig,
    "upsampler": GeneratorConfig,
    "patched": GeneratorConfig,
    "autoencoder": ImageAutoencoderConfig,
    "classifier": NoisyClassifierConfig,
}


@dataclass(frozen=True)
class Preset:
    """One entry of `medseg configs list`: a configuration that ships.

    Attributes:
        name: Its name, which trainings take.
        command: The command that takes it.
        description: What it is for, in a few sentences.
    """

    name: str
    command: str
    description: str


def described_presets() -> list[Preset]:
    """All presets, by command and name."""
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # six times as fast, and not in every build of PyYAML
    presets_here = []
    for name, path in presets().items():
        content = fast(path.read_text(encoding="utf-8")).get_single_data()
        presets_here.append(Preset(name, command_of(content["method"]), " ".join(content["description"].split())))
    return sorted(presets_here, key=lambda preset: (preset.command, preset.name))


def command_of(method: str) -> str:
    """The command that trains a method."""
    schema = _SCHEMAS[method]
    commands: dict[type[AnyConfig], str] = {
        SegmenterConfig: "train-segmenter",
        PixelClassifierConfig: "train-pixel-classifier",
        AnomalyConfig: "train-anomaly",
    }
    return commands.get(schema, "train-generator")


Overrides = Sequence[str] | Mapping[str, Any]
"""Texts "a.b=value" with values in YAML, or a mapping from "a.b" to values."""


def load_config(config: str | Path | AnyConfig, overrides: Overrides = ()) -> AnyConfig:
    """Read a preset or a YAML file, or take a configuration, and apply overrides. ``method`` decides the type.

    In the config.yaml of a run folder, the keys `NOTES` are ignored. Keys of a preset or file that are set although
    nothing reads them (`unread_keys`) are named in a warning.

    Args:
        config: Name of a preset (`presets`), YAML file, or a configuration.
        overrides: Values for single keys: {"training.max_steps": 100}, or the command line's "training.max_steps=100".

    Raises:
        UsageError: unknown preset or file, bad YAML, a key that occurs twice, an unknown key (with the nearest known
            one), or a bad value.
    """
    if isinstance(config, BaseModel):
        if not overrides:
            return config
        content, source = config.model_dump(mode="json"), "the configuration"
    else:
        content, source = _content(config)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(content, key, value)
    else:
        for override in overrides:
            override_key(content, override)
    loaded = parse_config(content, source)
    if not isinstance(config, BaseModel):
        for reason, keys in unread_keys(loaded).items():
            remark(f"{source}: without an effect, because of {reason}: {', '.join(keys)}")
    return loaded


class _StrictLoader(yaml.SafeLoader):
    """Refuses keys that occur twice, of which YAML's loaders take the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UsageError(
                    f"{self.name}: line {key.start_mark.line + 1}: the key {key.value} occurs a second time; keep one"
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _content(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """The content of a preset or YAML file, and its path."""
    path = Path(name_or_path)
    if not path.is_file():
        available = presets()
        if str(name_or_path) not in available:
            raise UsageError(
                f"{name_or_path}: no such file and no preset of that name{_nearest(str(name_or_path), available)}"
            )
        path = available[str(name_or_path)]
    try:
        with path.open(encoding="utf-8") as file:
            content = _StrictLoader(file).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}); correct the file") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds {type(content).__name__}, expected sections such as data: and network:")
    if path.name == "config.yaml":
        content = {key: value for key, value in content.items() if key not in NOTES}
    return content, str(path)


def load_segmenter_config(config: str | Path | SegmenterConfig, overrides: Overrides = ()) -> SegmenterConfig:
    """`load_config` for a segmenter; UsageError for another configuration."""
    loaded = load_config(config, overrides)
    if not isinstance(loaded, SegmenterConfig):
        raise _of_another_kind(config, loaded)
    return loaded


ImageConfig = GeneratorConfig | ImageAutoencoderConfig | NoisyClassifierConfig
"""Configuration of a model that trains on images."""


def load_image_config(config: str | Path | ImageConfig, overrides: Overrides = ()) -> ImageConfig:
    """`load_config` for a model that trains on images; UsageError for another configuration."""
    loaded = load_config(config, overrides)
    if not isinstance(loaded, ImageConfig):
        raise _of_another_kind(config, loaded)
    return loaded


def load_anomaly_config(config: str | Path | AnomalyConfig, overrides: Overrides = ()) -> AnomalyConfig:
    """`load_config` for an anomaly model; UsageError for another configuration."""
    loaded = load_config(config, overrides)
    if not isinstance(loaded, AnomalyConfig):
        raise _of_another_kind(config, loaded)
    return loaded


def load_pixel_config(config: str | Path | PixelClassifierConfig, overrides: Overrides = ()) -> PixelClassifierConfig:
    """`load_config` for pixel classifiers; UsageError for another configuration."""
    loaded = load_config(config, overrides)
    if not isinstance(loaded, PixelClassifierConfig):
        raise _of_another_kind(config, loaded)
    return loaded


def _of_another_kind(config: str | Path | AnyConfig, loaded: AnyConfig) -> UsageError:
    named = config if isinstance(config, str | Path) else "the configuration"
    return UsageError(f"{named}: is of method {loaded.method}; train it with {command_of(loaded.method)}")


def parse_config(content: Mapping[str, Any], source: str) -> AnyConfig:
    """Turn plain types, such as those of a model card, into a configuration; errors name ``source`` and the key."""
    method = content.get("method")
    if not isinstance(method, str) or method not in _SCHEMAS:
        misspelt = difflib.get_close_matches("method", list(map(str, content)), n=1)
        if misspelt and "method" not in content:
            raise UsageError(f"{source}: unknown key {misspelt[0]}; did you mean method?")
        actual = f"got {method!r}" if method else "Field required"
        raise UsageError(f"{source}: method: {actual}; known: {', '.join(_SCHEMAS)}")
    schema = _SCHEMAS[method]
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        # Unknown keys first: a misspelt section leaves defaults in its place, with which the other values may clash.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            names = _fields(schema, first["loc"][:-1])
            raise UsageError(f"{source}: unknown key {key}{_nearest(str(first['loc'][-1]), names)}") from error
        message = first["msg"].removeprefix("Value error, ")
        # A rule about several keys names them itself; its input is the whole section.
        given = "" if isinstance(first["input"], Mapping) else f" (got {first['input']!r})"
        raise UsageError(f"{source}: {key or 'configuration'}: {message}{given}") from error


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse settings "name=value" with values in YAML; UsageError for any other text."""
    content: dict[str, Any] = {}
    for setting in settings:
        override_key(content, setting)
    return content


def override_key(content: dict[str, Any], override: str) -> None:
    """Set a key of ``content`` by "a.b=value" (value in YAML); UsageError for any other text."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {override}: expected a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: {text!r} is not YAML") from error
    _set(content, key, value)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    """Set the key "a.b" of ``content``; UsageError if a is no section."""
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UsageError(f"{key}={value}: {part} is a value, not a section")
    node[last] = value


def _fields(section: Any, location: Sequence[int | str]) -> Sequence[str]:
    for part in location:
        if get_origin(section) is dict:  # sections by name, such as data.codes
            section = get_args(section)[1]
            continue
        section = section.model_fields[str(part)].annotation
        if get_origin(section) is not dict:
            section = next((one for one in get_args(section) if hasattr(one, "model_fields")), section)
    return list(section.model_fields)


def _nearest(name: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"

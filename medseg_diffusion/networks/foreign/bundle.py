"""Reads the configuration of a MONAI bundle as data: nothing in it is executed.

A bundle's configuration names code: "_target_" is a class, "$..." an expression, "@id" a reference. Only plain values
are taken: numbers, texts, lists of them, references to such, and expressions that are plain literals. Layout and names
are those of the model zoo (brats_mri_generative_diffusion, brain_image_synthesis_latent_diffusion_model, ...).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from medseg_diffusion.errors import InputError, ModelError, UsageError

from .checkpoint_file import read_state

Part = Literal["denoiser", "autoencoder"]
_CLASSES: dict[str, Part] = {"DiffusionModelUNet": "denoiser", "AutoencoderKL": "autoencoder"}
_FIRST: dict[Part, str] = {"denoiser": "conv_in.conv.weight", "autoencoder": "encoder.blocks.0.conv.weight"}
"""A weight that only this network has."""
_SCHEDULES = {"linear_beta": "linear", "scaled_linear_beta": "scaled-linear"}
_TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_GAUSSIAN = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
_MOST_BYTES = 2**24
_LONGEST, _DEPTH = 64, 16
_MISSING: Any = object()


@dataclass(frozen=True)
class BundleNetwork:
    """A network of a bundle: the file of its weights, and what the shapes of the weights do not show.

    Attributes:
        part: denoiser or autoencoder.
        file: a state dict below models/.
        settings: settings of `convert` and of the import of a denoiser.
    """

    part: Part
    file: Path
    settings: dict[str, Any]


def read_bundle(folder: Path, part: str | None = None) -> BundleNetwork:
    """The chosen network of a bundle; the only one if ``part`` is None.

    Raises:
        InputError: no bundle, or a file of it that cannot be read.
        ModelError: none of the networks that can be imported, a value that is no plain literal, or no weights.
        UsageError: a part that the bundle does not have, or several to choose from.
    """
    if not (folder / "configs").is_dir():
        raise InputError(
            folder, "no folder configs", "the folder of a MONAI bundle", "unpack the bundle and give its folder"
        )
    configs = [_Config.read(path) for path in _config_files(folder / "configs")]
    networks: dict[Part, tuple[_Config, Mapping[str, Any]]] = {}
    for config in configs:
        for name, section in config.sections():
            if name in _CLASSES:
                networks.setdefault(_CLASSES[name], (config, section))
    if not networks:
        raise ModelError(f"{folder}: names no {' and no '.join(_CLASSES)}, which are what can be imported")
    if part is None and len(networks) > 1:
        raise UsageError(
            f"{folder}: holds a {' and an '.join(sorted(networks, reverse=True))}; choose with --set part=NAME"
        )
    chosen = next((one for one in networks if part in (None, one)), None)
    if chosen is None:
        raise UsageError(f"--set part={part}: {folder} holds {', '.join(networks)}")
    config, section = networks[chosen]
    settings = _of_network(config, section)
    if chosen == "denoiser":
        settings |= _heads(config, section) | _of_scheduler(configs)
    return BundleNetwork(chosen, _weights(folder, chosen), settings)


def _config_files(folder: Path) -> list[Path]:
    """JSON and YAML files, those for inference first: they name the networks that were published."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".yaml", ".yml") and path.is_file()]
    files = [path for path in files if path.stem != "metadata"]
    return sorted(files, key=lambda path: (path.stem != "inference", "inference" not in path.stem, path.name))


@dataclass(frozen=True)
class _Config:
    """One file of a configuration, as it stands there."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Config:
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes")
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(path, f"no readable configuration ({reason})", "JSON or YAML", "copy it again") from error
        if not isinstance(content, Mapping):
            raise InputError(path, type(content).__name__, "entries such as network_def", "copy the bundle again")
        return cls(path, content)

    def sections(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Class name and entries of every section on the first level that names a class."""
        for section in self.content.values():
            if isinstance(section, Mapping) and isinstance(section.get("_target_"), str):
                yield section["_target_"].rpartition(".")[2], section

    def plain(self, section: Mapping[str, Any], name: str, default: Any = _MISSING) -> Any:
        """A number, text, truth value or list of numbers."""
        if name not in section and default is not _MISSING:
            return default
        value = self._literal(section.get(name), name, _DEPTH)
        items = value if isinstance(value, list) else [value]
        if len(items) > _LONGEST or not all(isinstance(item, int | float | str | None) for item in items):
            raise self._no_number(name)
        return value

    def _no_number(self, name: str) -> ModelError:
        return ModelError(f"{self.path}: {name}: expected a number or a list of numbers")

    def _literal(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, list | tuple) and depth and len(value) <= _LONGEST:
            items: list[Any] = []
            for item in value:
                items.append(self._literal(item, name, depth - 1))
                if isinstance(items[-1], list):  # at once: lists of references to lists would take forever
                    raise self._no_number(name)
            return items
        if isinstance(value, str) and value.startswith("@") and depth:
            node: Any = self.content
            for key in value[1:].replace("::", "#").split("#"):
                if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                    node = node[int(key)]
                elif isinstance(node, Mapping) and key in node:
                    node = node[key]
                else:
                    raise ModelError(f"{self.path}: {name}: {value[:80]!r} refers to nothing in this file")
            return self._literal(node, name, depth - 1)
        if not isinstance(value, str) or not value.startswith(("$", "@", "%")):
            return value
        try:
            if value.startswith("$"):
                return ast.literal_eval(value[1:].strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
        raise ModelError(
            f"{self.path}: {name}: {value[:80]!r} is code, which is not executed; write its value there, or give it "
            "with --set"
        )


def _of_network(config: _Config, section: Mapping[str, Any]) -> dict[str, Any]:
    groups, eps = config.plain(section, "norm_num_groups", 32), config.plain(section, "norm_eps", 1e-6)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or not isinstance(eps, int | float):
        raise ModelError(f"{config.path}: norm_num_groups and norm_eps: expected numbers, got {groups!r} and {eps!r}")
    return {"norm_groups": groups, "norm_eps": float(eps)}


def _heads(config: _Config, section: Mapping[str, Any]) -> dict[str, Any]:
    """num_heads or head_channels, whichever is the same at all levels with attention; empty without attention."""
    # The defaults are those of DiffusionModelUNet.
    widths = config.plain(section, "channels" if "channels" in section else "num_channels", [32, 64, 64, 64])
    levels = config.plain(section, "attention_levels", [False, False, True, True])
    heads = config.plain(section, "num_head_channels", 8)
    if not isinstance(widths, list) or not isinstance(levels, list):
        raise ModelError(f"{config.path}: channels and attention_levels: expected lists")
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    if not len(widths) == len(levels) == len(heads):
        raise ModelError(f"{config.path}: channels, attention_levels and num_head_channels differ in length")
    if not all(isinstance(number, int) for number in (*widths, *heads)):
        raise ModelError(f"{config.path}: channels and num_head_channels: expected whole numbers")
    # The middle block, which always attends, has the heads of the last level.
    attending = [(w, h) for w, h, on in zip(widths, heads, [*levels[:-1], True], strict=True) if on]
    if any(h < 1 or w % h for w, h in attending):
        raise ModelError(f"{config.path}: num_head_channels {heads}: channels {widths} must be multiples of them")
    if len({h for _, h in attending}) == 1:
        return {"head_channels": attending[0][1]}
    if len({w // h for w, h in attending}) == 1:
        return {"num_heads": attending[0][0] // attending[0][1]}
    raise ModelError(f"{config.path}: num_head_channels {heads}: neither their width nor their number is constant")


def _of_scheduler(configs: list[_Config]) -> dict[str, Any]:
    """Schedule and target of the first scheduler that a file names; empty if none does."""
    for config in configs:
        for name, section in config.sections():
            if name not in (*_GAUSSIAN, "RFlowScheduler") and "num_train_timesteps" not in section:
                continue  # no schedule of noise, but one of learning rates, say
            if name not in _GAUSSIAN:
                raise ModelError(f"{config.path}: {name}: not a schedule of Gaussian diffusion that can be imported")
            schedule = config.plain(section, "schedule", "linear_beta")
            target = config.plain(section, "prediction_type", "epsilon")
            if schedule not in _SCHEDULES or target not in _TARGETS:
                raise ModelError(
                    f"{config.path}: {name}: schedule {schedule!r} and prediction {target!r} cannot be imported; "
                    f"known: {', '.join(_SCHEDULES)}; {', '.join(_TARGETS)}"
                )
            return {
                "schedule": _SCHEDULES[schedule],
                "num_steps": config.plain(section, "num_train_timesteps", 1000),
                "beta_start": config.plain(section, "beta_start", 1e-4),
                "beta_end": config.plain(section, "beta_end", 2e-2),
                "target": _TARGETS[target],
            }
    return {}


def _weights(folder: Path, part: Part) -> Path:
    """The file below models/ that holds the weights of a part, by the names in it."""
    files = [path for path in sorted((folder / "models").glob("*")) if path.suffix in (".pt", ".pth", ".safetensors")]
    for path in files:
        state: Mapping[str, Tensor] = read_state(path)
        if _FIRST[part] in state:
            return path
    names = ", ".join(path.name for path in files) or "no .pt, .pth or .safetensors file"
    raise ModelError(f"{folder / 'models'}: {names}, without the weights of the {part}; download the large files, too")

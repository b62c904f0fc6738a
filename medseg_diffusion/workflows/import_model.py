"""Published weights as models of this package: `medseg models import`, and what they are good for once here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.imported import IMPORTED
from medseg_diffusion.models.store import save_model
from medseg_diffusion.networks.foreign import SOURCES, Foreign, Source, convert, read_state

_OF_THE_NETWORK = {"head_channels", "num_heads", "qkv_order", "norm_eps", "part"}
_OF_THE_IMAGES = {"size"}
_OF_THE_DIFFUSION = {"schedule", "num_steps", "beta_start", "beta_end", "target", "learned_variance"}


def import_model(
    file: Path, source: Source, output: Path, settings: Mapping[str, Any] | None = None
) -> tuple[Path, list[str]]:
    """Converts a published checkpoint into the model directory ``output``.

    Args:
        file: a .pt, .pth, .ckpt or .safetensors file.
        source: guided-diffusion, improved-diffusion, latent-diffusion or monai.
        output: the model directory, new.
        settings: what the shapes do not tell: those of `medseg_diffusion.networks.foreign.convert`, and schedule,
            num_steps, beta_start, beta_end, target, learned_variance; and size, the side of the images, without which
            a denoiser cannot be sampled.

    Returns:
        The model directory, and a sentence for each thing that was assumed or left out.

    Raises:
        ModelError: a file that is no state dict or does not fit.
        UsageError: a setting that is missing or unknown, or an output that exists.
    """
    given = dict(settings or {})
    if source not in SOURCES:
        raise UsageError(f"--from {source}: unknown; use {', '.join(SOURCES)}")
    known = _OF_THE_NETWORK | _OF_THE_DIFFUSION | _OF_THE_IMAGES
    if unknown := sorted(set(given) - known):
        raise UsageError(f"--set {unknown[0]}: unknown; known: {', '.join(sorted(known))}")
    size = given.get("size")
    if size is not None and not (isinstance(size, int) and size > 0):
        raise UsageError(f"--set size={size}: expected a whole number of pixels")
    if output.exists():
        raise UsageError(f"{output}: exists; choose a new folder")
    try:
        found = convert(read_state(file), source, {k: v for k, v in given.items() if k in _OF_THE_NETWORK})
    except ModelError as error:
        raise ModelError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from error
    content = _config(found, source, given)
    try:
        config = IMPORTED[found.kind].model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--set {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    card = {
        "task": found.kind,
        "method": source,
        "dims": found.network["dims"],
        "labels": {},
        "channels": [str(i) for i in range(found.network["in_channels"])],
        "config": config.model_dump(mode="json"),
        "training": {"imported": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "metrics": {},
        "size": size,
        "assumed": found.assumed,
        "licence": "that of the imported weights",
        "versions": {"medseg-diffusion": version("medseg-diffusion")},
    }
    save_model(output, card, found.weights, _readme(card))
    return output, found.assumed


def _config(found: Foreign, source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    if found.kind == "autoencoder":
        return {"network": found.network}
    content: dict[str, Any] = {"network": found.network, "schedule": _schedule(found, source, given)}
    if found.kind == "denoiser":
        content |= {"target": given.get("target", "eps"), "learned_variance": _learned_variance(found, source, given)}
        if "target" not in given:
            found.assumed.append("predictions of the noise (--set target=v for the velocity)")
    return content


_ENDS = {"linear": (1e-4, 2e-2), "scaled-linear": (1.5e-3, 1.95e-2)}
"""Of betas, as published."""


def _schedule(found: Foreign, source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("num_steps", "beta_start", "beta_end")
    if found.betas is None:
        name = given.get("schedule", "linear")
        if "schedule" not in given:
            found.assumed.append("a linear schedule of 1000 steps (--set schedule=cosine, --set num_steps=4000, ...)")
        content = {"name": name, **{key: given[key] for key in keys if key in given}}
        if source in ("monai", "latent-diffusion") and name in _ENDS and isinstance(given.get("num_steps"), int):
            # Their ends are those of the betas themselves, ours those of 1000 steps (`diffusion.schedule.linear`).
            ends = (given.get(key, end) for key, end in zip(keys[1:], _ENDS[name], strict=True))
            content |= {key: given["num_steps"] / 1000 * float(end) for key, end in zip(keys[1:], ends, strict=True)}
        return content
    betas = found.betas.double()
    for name, power in (("scaled-linear", 0.5), ("linear", 1.0)):
        line = torch.linspace(float(betas[0]) ** power, float(betas[-1]) ** power, len(betas), dtype=torch.float64)
        if torch.allclose(line ** (1 / power), betas, rtol=1e-4, atol=0):
            scale = len(betas) / 1000  # our ends are those of 1000 steps
            return {
                "name": name,
                "num_steps": len(betas),
                "beta_start": scale * float(betas[0]),
                "beta_end": scale * float(betas[-1]),
            }
    raise ModelError("the checkpoint's betas are neither linear nor scaled-linear; such schedules cannot be imported")


def _learned_variance(found: Foreign, source: Source, given: Mapping[str, Any]) -> bool:
    if "learned_variance" in given:
        return bool(given["learned_variance"])
    inside, outside = found.network["in_channels"], found.network["out_channels"]
    if outside == 2 * inside:
        return True
    if outside == inside and inside % 2 == 0 and source in ("guided-diffusion", "improved-diffusion"):
        raise UsageError(
            f"{inside} channels in and out fit a plain model and one with a condition of {inside // 2} channels and a "
            "learned variance: add --set learned_variance=true or false"
        )
    return False


def _readme(card: Mapping[str, Any]) -> str:
    assumed = "".join(f"* {sentence}\n" for sentence in card["assumed"]) or "* nothing\n"
    return (
        f"# Imported from {card['method']}\n\n{card['task']}, {card['dims']}D; from {card['training']['imported']} "
        f"(SHA-256 {card['training']['sha256']}).\n\nAssumed or left out:\n\n{assumed}\n```\n"
        f"{yaml.safe_dump(card['config'], sort_keys=False)}```\n\nThe terms are those of the imported weights.\n"
    )

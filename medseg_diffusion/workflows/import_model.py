"""`medseg models import`: convert published weights into model folders."""

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
from medseg_diffusion.files import require_new_folder
from medseg_diffusion.models.imported import IMPORTED
from medseg_diffusion.models.store import save_model
from medseg_diffusion.networks.foreign import SOURCES, Foreign, Source, convert, read_state

_NETWORK_SETTINGS = {"head_channels", "num_heads", "qkv_order", "norm_eps", "norm_groups", "part"}
_IMAGE_SETTINGS = {"size"}
_DIFFUSION_SETTINGS = {"schedule", "num_steps", "beta_start", "beta_end", "target", "learned_variance"}


def import_model(
    file: str | Path, source: Source, output: str | Path, settings: Mapping[str, Any] | None = None
) -> tuple[Path, list[str]]:
    """Convert a published checkpoint into the model directory ``output``.

    Args:
        file: A .pt, .pth, .ckpt or .safetensors file.
        source: guided-diffusion, improved-diffusion, latent-diffusion or monai.
        output: The model directory, which must not exist.
        settings: Values that cannot be inferred from the shapes of the weights: those of
            `medseg_diffusion.networks.foreign.convert`, and schedule, num_steps, beta_start, beta_end, target,
            learned_variance and size. ``size`` is the side of the images; a denoiser cannot be sampled without it.

    Returns:
        The model directory, and one sentence for each assumption and each part that was left out.

    Raises:
        ModelError: A file that is not a state dict or does not fit.
        UsageError: A setting that is missing or unknown, or an output that exists.
    """
    file, output, settings = Path(file), Path(output), dict(settings or {})
    if source not in SOURCES:
        raise UsageError(f"--from {source}: unknown; use {', '.join(SOURCES)} or monai-bundle")
    allowed = _NETWORK_SETTINGS | _DIFFUSION_SETTINGS | _IMAGE_SETTINGS
    if unknown := sorted(set(settings) - allowed):
        raise UsageError(f"--set {unknown[0]}: unknown; known: {', '.join(sorted(allowed))}")
    size = settings.get("size")
    if size is not None and not (isinstance(size, int) and size > 0):
        raise UsageError(f"--set size={size}: expected a whole number of pixels")
    require_new_folder(output)
    try:
        imported = convert(read_state(file), source, {k: v for k, v in settings.items() if k in _NETWORK_SETTINGS})
    except ModelError as error:
        raise ModelError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from error
    content = _config(imported, source, settings)
    try:
        config = IMPORTED[imported.kind].model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--set {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    card = {
        "task": imported.kind,
        "method": source,
        "dims": imported.network["dims"],
        "labels": {},
        "channels": [str(i) for i in range(imported.network["in_channels"])],
        "config": config.model_dump(mode="json"),
        "training": {"imported": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "metrics": {},
        "size": size,
        "assumed": imported.assumed,
        "licence": "that of the imported weights",
        "versions": {"medseg-diffusion": version("medseg-diffusion")},
    }
    save_model(output, card, imported.weights, _readme(card))
    return output, imported.assumed


def _config(imported: Foreign, source: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
    if imported.kind == "autoencoder":
        return {"network": imported.network}
    content: dict[str, Any] = {"network": imported.network, "schedule": _schedule(imported, source, settings)}
    if imported.kind == "denoiser":
        content |= {
            "target": settings.get("target", "eps"),
            "learned_variance": _learned_variance(imported, source, settings),
        }
        if "target" not in settings:
            imported.assumed.append("predictions of the noise (--set target=v for the velocity)")
    return content


_ENDS = {"linear": (1e-4, 2e-2), "scaled-linear": (1.5e-3, 1.95e-2)}
"""Published first and last beta of each schedule."""


def _schedule(imported: Foreign, source: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("num_steps", "beta_start", "beta_end")
    if imported.betas is None:
        name = settings.get("schedule", "linear")
        if "schedule" not in settings:
            imported.assumed.append(
                "a linear schedule of 1000 steps (--set schedule=cosine, --set num_steps=4000, ...)"
            )
        content = {"name": name, **{key: settings[key] for key in keys if key in settings}}
        if source in ("monai", "latent-diffusion") and name in _ENDS and isinstance(settings.get("num_steps"), int):
            # The source states the ends of the actual betas; `diffusion.schedule.linear` takes the ends for 1000 steps.
            ends = (settings.get(key, end) for key, end in zip(keys[1:], _ENDS[name], strict=True))
            content |= {key: settings["num_steps"] / 1000 * float(end) for key, end in zip(keys[1:], ends, strict=True)}
        return content
    betas = imported.betas.double()
    for name, power in (("scaled-linear", 0.5), ("linear", 1.0)):
        line = torch.linspace(float(betas[0]) ** power, float(betas[-1]) ** power, len(betas), dtype=torch.float64)
        if torch.allclose(line ** (1 / power), betas, rtol=1e-4, atol=0):
            scale = len(betas) / 1000  # `diffusion.schedule` takes the ends for 1000 steps
            return {
                "name": name,
                "num_steps": len(betas),
                "beta_start": scale * float(betas[0]),
                "beta_end": scale * float(betas[-1]),
            }
    raise ModelError("the checkpoint's betas are neither linear nor scaled-linear; such schedules cannot be imported")


def _learned_variance(imported: Foreign, source: Source, settings: Mapping[str, Any]) -> bool:
    if "learned_variance" in settings:
        return bool(settings["learned_variance"])
    inside, outside = imported.network["in_channels"], imported.network["out_channels"]
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

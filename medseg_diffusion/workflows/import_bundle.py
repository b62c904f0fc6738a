"""`medseg models import --from monai-bundle`: a network of a MONAI bundle as a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import UsageError
from medseg_diffusion.networks.foreign.bundle import read_bundle

from .import_model import import_model


def import_bundle(
    folder: str | Path, output: str | Path, settings: Mapping[str, Any] | None = None
) -> tuple[Path, list[str]]:
    """Convert the autoencoder or the denoiser of a bundle, without executing its configuration.

    Args:
        folder: The bundle, in the layout of MONAI's model zoo.
        output: The model directory, which must not exist.
        settings: ``part`` (denoiser or autoencoder) of a bundle with both, and those of `import_model`, which replace
            the bundle's.

    Returns:
        The model directory, and one sentence for each assumption.

    Raises:
        InputError: No bundle.
        ModelError: A network that cannot be imported, a value that is code, or missing weights.
        UsageError: A setting that is missing or unknown, or an output that exists.
    """
    given = dict(settings or {})
    part = given.pop("part", None)
    if part is not None and not isinstance(part, str):
        raise UsageError(f"--set part={part}: use denoiser or autoencoder")
    bundle = read_bundle(Path(folder), part)
    if "num_heads" in given or "head_channels" in given:
        for name in ("num_heads", "head_channels"):
            bundle.settings.pop(name, None)
    return import_model(bundle.file, "monai", output, {**bundle.settings, **given})

"""`medseg info`: versions, devices and models, for a bug report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "medseg-diffusion",
    "torch",
    "monai",
    "numpy",
    "nibabel",
    "SimpleITK",
    "pydicom",
    "highdicom",
    "scikit-image",
)
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def info() -> dict[str, Any]:
    """Versions, platform, CPU, devices and models of this installation, even if some of them are missing or broken.

    Returns:
        "versions" (package -> version, or None), "platform", "cpu", "devices" and "models".
    """
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "devices": _devices(),
        "models": _models(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; elsewhere the features stay unknown
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None)
    features = None if flags is None else [name for name in CPU_FEATURES if name in flags]
    return {"machine": platform.machine(), "cores": os.cpu_count(), "features": features}


def _devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError):  # missing, or a broken install without its libraries
        return []
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _models() -> dict[str, Any]:
    try:
        from medseg_diffusion.models.store import list_models, model_folders

        folders = {f"{source} folder": str(folder) for source, folder in model_folders().items()}
        return folders | {"installed": [model.name for model in list_models()]}
    except Exception as error:  # the report must show whatever is wrong with an installation
        return {"error": f"{type(error).__name__}: {error}"}

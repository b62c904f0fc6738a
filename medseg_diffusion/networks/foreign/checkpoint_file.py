"""Reads checkpoint files from other sources without executing code in them."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from medseg_diffusion.errors import ModelError


class _Inert:
    """Replaces objects of training frameworks that are stored beside the weights. It ignores its arguments."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_CALLBACKS = (
    "model_checkpoint.ModelCheckpoint",
    "early_stopping.EarlyStopping",
    "lr_monitor.LearningRateMonitor",
    "timer.Timer",
    "progress.ProgressBar",
    "progress.tqdm_progress.TQDMProgressBar",
    "progress.rich_progress.RichProgressBar",
)
_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, f"{package}.callbacks.{name}")
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in _CALLBACKS
]


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file: safetensors, a plain state dict, or one under the key "state_dict".

    Pickles are read by `torch.load(weights_only=True)`, which executes no code in the file. Lightning's callbacks are
    recognised by their names and ignored.

    Raises:
        ModelError: a missing or damaged file, or one that contains something else.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give a .pt, .pth, .ckpt or .safetensors file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ModelError(f"{path}: an empty file, expected a checkpoint; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a Git LFS pointer, not the checkpoint; download the file itself (git lfs pull)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {match.group(1)}" if match else "something else than tensors"
        raise ModelError(
            f"{path}: holds {what}, expected a plain state dict; nothing was executed. "
            "Save the state dict alone with torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # torch.load raises nearly anything for a damaged file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ModelError(f"{path}: unreadable ({reason}); copy the file again") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: holds {type(content).__name__}, expected a state dict of names and tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}

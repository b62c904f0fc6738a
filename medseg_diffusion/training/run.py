"""The run directory: who may write into it, and what is noted of how it was made."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.reports.files import write_files


def start_run(run: Path, resolved: Mapping[str, Any], resume: bool) -> None:
    """Makes the run directory and writes its config.yaml.

    Args:
        run: the directory, new unless ``resume``.
        resolved: the whole configuration and the seed, in plain types.
        resume: go on with a run that was started with the same.

    Raises:
        UsageError: the run exists and ``resume`` is off, does not exist and it is on, or was started with another
            configuration.
    """
    require_startable(run, resume)
    file = run / "config.yaml"
    if resume:
        before = yaml.safe_load(file.read_text())
        changed = [key for key in resolved if _given(before.get(key)) != _given(resolved[key])]
        if changed:
            raise UsageError(
                f"{run}: was started with another {' and '.join(changed)}; "
                f"resume with {file} and seed {before.get('seed')}, or use another folder"
            )
    else:
        run.mkdir(parents=True, exist_ok=True)
        write_files(run, {file.name: yaml.safe_dump(dict(resolved), sort_keys=False)})


def require_startable(run: Path, resume: bool) -> None:
    """UsageError where a run would be started over another, or resumed without one: before any work is done."""
    exists = (run / "config.yaml").is_file()
    if exists and not resume:
        raise UsageError(f"{run}: holds a run already; add --resume to continue it, or choose another folder")
    if resume and not exists:
        raise UsageError(f"{run}: holds no run; drop --resume to start it")


def keep_sides(file: Path, sides: Mapping[str, Any], data: Path, resume: bool) -> None:
    """Writes which case is on which side of a run's split; of a resumed run they must not have moved.

    Raises:
        InputError: the data folder holds other cases than at the start, so that some are on other sides: cases that
            were trained on would be tested on.
    """
    content = json.loads(json.dumps(sides))
    if resume and file.is_file() and json.loads(file.read_text()) != content:
        raise InputError(
            data,
            "other cases than when the run was started, which moves some from one side to another",
            f"the cases of {file}",
            "restore them, or start a new run in another folder",
        )
    write_json(file, content)


def _given(value: Any) -> Any:
    """A part of a configuration without its keys of null: a version that knows one more key resumes older runs."""
    if isinstance(value, Mapping):
        return {key: _given(part) for key, part in value.items() if part is not None}
    return value


def versions() -> dict[str, str]:
    """What a model card says of the software that made the model."""
    names = ("medseg-diffusion", "torch", "monai")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)

"""The run directory: when a run may start or continue in it, and the files that record how it was made."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import require_folder, write_files, write_json

Content = TypeVar("Content")


def start_run(run: Path, config: BaseModel, noted: Mapping[str, Any], resume: bool) -> None:
    """Makes the run directory and writes its config.yaml. A resumed run keeps the one that it has.

    Args:
        run: the directory, new unless ``resume``.
        config: the whole configuration.
        noted: the seed, and whatever else must not change when the run is resumed, in plain types.
        resume: continue a run that was started with the same configuration, perhaps by an older version of the
            package that knew fewer keys.

    Raises:
        UsageError, InputError: see `require_startable`.
    """
    require_startable(run, config, noted, resume)
    if not resume:
        run.mkdir(parents=True, exist_ok=True)
        content = {**config.model_dump(mode="json"), **noted}
        write_files(run, {"config.yaml": yaml.safe_dump(content, sort_keys=False)})


def require_startable(run: Path, config: BaseModel, noted: Mapping[str, Any], resume: bool) -> None:
    """Raises what `start_run` would raise, before any work is done.

    Raises:
        UsageError: the run exists and ``resume`` is off, does not exist and it is on, was started with another
            configuration, or cannot be a folder.
        InputError: the config.yaml of the run is damaged.
    """
    require_folder(run)
    file = run / "config.yaml"
    if file.is_file() and not resume:
        raise UsageError(f"{run}: holds a run already; add --resume to continue it, or choose another folder")
    if not resume:
        return
    if not file.is_file():
        raise UsageError(f"{run}: holds no run; drop --resume to start it")
    before = _completed(read_run_file(file, _mapping), type(config))
    now = {**config.model_dump(mode="json"), **noted}
    if changed := [key for key in now if before.get(key) != now[key]]:
        raise UsageError(
            f"{run}: was started with another {' and '.join(changed)}; "
            f"resume with {file} and seed {before.get('seed')}, or use another folder"
        )


def keep_sides(file: Path, sides: Mapping[str, Any], data: Path | str, resume: bool) -> None:
    """Writes which case is on which side of a run's split. In a resumed run, no case may have changed sides.

    Raises:
        InputError: the data folder holds other cases than at the start, so that some have changed sides: cases used
            for training would be tested on. Or ``file`` is damaged.
    """
    content = json.loads(json.dumps(sides))
    if resume and file.is_file() and read_run_file(file, json.loads) != content:
        raise InputError(
            data,
            "other cases than when the run was started, which moves some from one side to another",
            f"the cases of {file}",
            "restore them, or start a new run in another folder",
        )
    write_json(file, content)


def read_run_file(file: Path, parse: Callable[[str], Content]) -> Content:
    """What a file holds that the run has written, by ``parse``.

    Raises:
        InputError: ``parse`` cannot read it.
    """
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, yaml.YAMLError, csv.Error) as error:
        raise InputError(
            file,
            f"a damaged file ({' '.join(str(error).split())})",
            "the one that the run has written",
            "restore it, or start a new run in another folder",
        ) from error


def _mapping(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError("no keys with values")
    return content


def _completed(before: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """The stored configuration, with defaults for the keys that the version that wrote it did not know."""
    own = {key: value for key, value in before.items() if key in kind.model_fields}
    try:
        return {**before, **kind.model_validate(own).model_dump(mode="json")}
    except ValidationError:  # written by a version that knew other keys: compare it unchanged
        return dict(before)

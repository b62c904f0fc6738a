"""`medseg models install` and `medseg models remove`: the models in the user's folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from uuid import uuid4

from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.files import temporary_folder, whole_folder
from medseg_diffusion.models.packed import unpack
from medseg_diffusion.models.store import FILES, SUMS, find_model, load_model_files, model_folders, name_of

from .hub import download, repository_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def install_model(source: str | Path, name: str | None = None, overwrite: bool = False) -> Path:
    """Put a model into the user's folder, after its checksums and its weights have been checked; return its folder.

    Nothing is there before all of it is, and nothing in it is executed. Checksums tell a damaged copy, not who made it.

    Args:
        source: A zip from `medseg models export`, a model folder, a run folder, or hf:OWNER/NAME[@REVISION], a
            repository of the Hugging Face hub. The network is used for the last one alone.
        name: Name under which commands find it; None for that in the zip, of the folder or of the repository.
        overwrite: Replace a model of that name, and hide a built-in one.

    Raises:
        InputError: A source that does not exist, or a zip that is damaged, strange or of no model.
        ModelError: A model that is incomplete or damaged, or a repository that cannot be reached.
        UsageError: A name that is taken or that is no name.
    """
    repository = repository_of(source)
    if repository is None and not Path(source).exists():
        expected = "the zip of a model, a model folder or hf:OWNER/NAME"
        raise InputError(Path(source), "no such file or folder", expected, "check the path")
    if name is not None:
        _require_free(name, overwrite)
    home = model_folders()["user"]
    home.mkdir(parents=True, exist_ok=True)
    with temporary_folder(home / "incoming") as staged:
        if repository is not None:
            own_name = repository.partition("@")[0].partition("/")[2]
            download(repository, staged)
        elif Path(source).is_dir():
            folder = find_model(source)
            own_name = name_of(folder)
            for file in (*FILES, SUMS):
                if (folder / file).is_file():
                    shutil.copyfile(folder / file, staged / file)
        else:
            own_name = unpack(Path(source), staged)
        name = name or own_name
        _require_free(name, overwrite)
        try:
            load_model_files(staged)
        except ModelError as error:
            raise ModelError(str(error).replace(str(staged), str(source))) from error
        with whole_folder(home / name, replace=overwrite, private=False) as final:
            for file in (*FILES, SUMS):
                (staged / file).rename(final / file)
    return home / name


def remove_model(name: str) -> Path:
    """Delete a model from the user's folder; return the folder that it had. A built-in one that it hid is back.

    Args:
        name: Name of the model.

    Raises:
        UsageError: A built-in model.
        ModelError: There is no such model.
    """
    path = require_removable(name)
    if path.is_symlink():
        path.unlink()
        return path
    # Renamed first: no process finds half a model.
    leaving = path.rename(path.with_name(f".{name}.{uuid4().hex[:8]}.tmp"))
    shutil.rmtree(leaving)
    return path


def require_removable(name: str) -> Path:
    """The folder of a model in the user's folder; UsageError for a built-in one, ModelError if there is none."""
    folders = model_folders()
    if _NAME.fullmatch(name) and (folders["user"] / name).is_dir():
        return folders["user"] / name
    if _NAME.fullmatch(name) and (folders["package"] / name).is_dir():
        raise UsageError(f"{name}: ships with the package and cannot be removed")
    raise ModelError(f"{name}: no installed model has this name; `medseg models list` lists them")


def _require_free(name: str, overwrite: bool) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name[:100]!r}: a model's name begins with a letter or digit, and has letters, digits, '.', '_' "
            "and '-', at most 100; choose one with --name"
        )
    for kind, folder in model_folders().items():
        if (folder / name).exists() and not overwrite:
            built_in = "is built in and would be hidden" if kind == "package" else "is installed"
            raise UsageError(f"{name}: a model of this name {built_in}; choose another --name, or add --overwrite")

"""Models from and to the Hugging Face hub, by the package huggingface_hub; nothing else here uses the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.store import FILES, SUMS

PREFIX = "hf:"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


def repository_of(source: str | Path) -> str | None:
    """OWNER/NAME or OWNER/NAME@REVISION of "hf:OWNER/NAME"; None for a path.

    Raises:
        UsageError: Another text behind "hf:".
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return None
    repository = text.removeprefix(PREFIX)
    if not re.fullmatch(rf"{_PART}/{_PART}(@{_PART})?", repository) or ".." in repository:
        raise UsageError(f"{text}: names no repository; expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION to install")
    return repository


def download(repository: str, folder: Path) -> None:
    """Write the files of the model in a repository into ``folder``; others in it are left out.

    Raises:
        ModelError: The hub or the repository cannot be reached, or huggingface_hub is missing.
    """
    name, _, revision = repository.partition("@")
    with _hub(repository) as hub:
        hub.snapshot_download(name, revision=revision or None, local_dir=folder, allow_patterns=[*FILES, SUMS])


def upload(folder: Path, repository: str) -> None:
    """Write a model into a repository, which is made, and private, if it does not exist.

    Raises:
        UsageError: A repository with a revision.
        ModelError: The hub cannot be reached or refuses, or huggingface_hub is missing.
    """
    if "@" in repository:
        raise UsageError(f"{PREFIX}{repository}: a model is pushed to the main revision; leave @... out")
    with _hub(repository) as hub:
        api = hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Model {folder.name}")


@contextmanager
def _hub(repository: str) -> Iterator[Any]:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            "the Hugging Face hub needs huggingface_hub; install it with: pip install 'medseg-diffusion[hub]'"
        ) from error
    try:
        yield huggingface_hub
    except Exception as error:  # of the network, of HTTP, of the hub's rules: they have no common base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{PREFIX}{repository}: the hub did not answer as expected ({reason}); check the name, the network and, "
            "for a private repository, `hf auth login`"
        ) from error

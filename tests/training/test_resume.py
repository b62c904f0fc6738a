"""Resume files that are missing or unusable are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medseg_diffusion.errors import InputError
from tests.helpers.training import resume_file, train


def test_nothing_to_resume_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"last\.pt: found no resume file.*drop --resume"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other model"])
def test_an_unusable_resume_file_is_refused(whole: Path, tmp_path: Path, damage) -> None:
    target = tmp_path / "checkpoints" / "last.pt"
    target.parent.mkdir()
    content = (whole / "checkpoints" / "last.pt").read_bytes()
    if damage == "other model":
        other = resume_file(whole)
        other["model"].popitem()
        torch.save(other, target)
    else:
        target.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(InputError, match=r"last\.pt: found an unusable resume file"):
        train(tmp_path, resume=True)

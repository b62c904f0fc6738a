"""Resume files: which are kept and chosen, what is damaged, and disks that are full."""

from __future__ import annotations

import errno
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg_diffusion.errors import InputError, MedsegError
from medseg_diffusion.training.log import TrainingLog
from medseg_diffusion.training.resume import Checkpoints
from medseg_diffusion.training.trainer import Progress
from tests.helpers.training import assert_same, resume_file, rows, scores, train


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- which files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [6, 8]),  # of the validations at every second step
        ({"checkpoints_kept": 1}, [8]),
        ({"checkpoints_kept": 3, "checkpoint_steps": 3, "validate_every": 8}, [3, 6, 8]),
        ({"checkpoint_minutes": 1e-9}, [7, 8]),
    ],
)
def test_the_newest_files_are_kept(tmp_path: Path, changes: dict[str, Any], expected: list[int]) -> None:
    train(tmp_path, changes=changes)
    assert names(tmp_path) == [f"step-{step:06d}.pt" for step in expected]


def test_a_run_of_an_earlier_version_goes_on(whole: Path, tmp_path: Path) -> None:
    """It has one file, of another name, and knows nothing of a validation that is due."""
    train(tmp_path, max_steps=4)
    content = resume_file(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    del content["state"]["validated"]
    torch.save(content, tmp_path / "checkpoints" / "last.pt")
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert names(tmp_path) == ["step-000006.pt", "step-000008.pt"]
    assert scores(tmp_path) == scores(whole)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    train(tmp_path, max_steps=2)
    (tmp_path / "checkpoints" / ".step-000004.pt.123-abc.tmp").write_bytes(b"half")
    train(tmp_path, resume=True)
    assert names(tmp_path) == ["step-000006.pt", "step-000008.pt"]


def test_only_the_start_of_a_call_removes_what_is_half_written(whole: Path, tmp_path: Path) -> None:
    """Another process may be writing it, on a file system where the two cannot be kept apart."""
    name = ".step-000004.pt.123-abc.tmp"

    def appear(progress: Progress) -> None:
        if progress.step == 1:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "checkpoints" / name).write_bytes(b"half")

    train(tmp_path, progress=appear)
    assert names(tmp_path) == [name, "step-000006.pt", "step-000008.pt"]


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_nothing_to_resume_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoints: found no resume file.*drop --resume"):
        train(tmp_path, resume=True)


def damaged(content: bytes, how: str) -> bytes:
    """One changed bit in the middle is in the tensors, where `torch.load` does not see it."""
    if how == "changed":
        return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    return content[: {"truncated": len(content) // 2, "short": len(content) - 1, "empty": 0}[how]]


@pytest.mark.parametrize("how", ["truncated", "short", "empty", "changed"])
def test_a_damaged_newest_file_falls_back_to_the_one_before(whole: Path, tmp_path: Path, how: str) -> None:
    train(tmp_path, max_steps=6)
    newest, before = Checkpoints(tmp_path).files()
    newest.write_bytes(damaged(newest.read_bytes(), how))
    with pytest.warns(UserWarning, match=r"step-000006\.pt: is damaged; continuing from step-000004\.pt") as said:
        train(tmp_path, resume=True, max_steps=5)
    assert len(said) == 1 and before.name == "step-000004.pt"
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "5"]
    assert names(tmp_path) == ["step-000004.pt", "step-000005.pt"], "the damaged one is no longer the newest"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path)["model"], resume_file(whole)["model"])


@pytest.mark.parametrize("how", ["truncated", "empty", "changed", "other model"])
def test_an_unusable_resume_file_is_refused(whole: Path, tmp_path: Path, how: str) -> None:
    """If it is the only one; and a whole file of another model is no reason to take an older one."""
    kept = 2 if how == "other model" else 1
    train(tmp_path, changes={"checkpoints_kept": kept})
    newest = Checkpoints(tmp_path).files()[0]
    if how == "other model":
        other = resume_file(whole)
        other["model"].popitem()
        torch.save(other, newest)
    else:
        newest.write_bytes(damaged(newest.read_bytes(), how))
    with pytest.raises(InputError, match=r"step-000008\.pt: found (an unusable|a damaged) resume file"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("part", ["short", "changed"])
def test_a_write_that_went_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The disk took the bytes and lost some of them: the files before stay, and the run ends."""
    train(tmp_path, max_steps=4)
    before, fsync = names(tmp_path), os.fsync

    def faulty(number: int) -> None:
        size = os.fstat(number).st_size
        if part == "short":
            os.ftruncate(number, size - 100)
        else:
            os.pwrite(number, b"?" * 100, size // 2)  # more than the archive's padding
        fsync(number)

    monkeypatch.setattr("medseg_diffusion.training.resume.os.fsync", faulty)
    with pytest.raises(OSError, match=r"step-000006\.pt: damaged when read back after writing"):
        train(tmp_path, resume=True)
    assert names(tmp_path) == before


def test_any_damage_to_the_content_is_noticed(whole: Path, tmp_path: Path) -> None:
    """Of 200 random changes of one byte, those that are not noticed change nothing that is loaded."""
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    newest = Checkpoints(tmp_path).files()[0]
    content, expected, choice, noticed = newest.read_bytes(), resume_file(tmp_path), random.Random(0), 0
    for _ in range(200):
        place = choice.randrange(len(content))
        changed = content[place] ^ choice.randrange(1, 256)
        newest.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
        try:
            found = Checkpoints(tmp_path).content(newest)
        except InputError as error:
            assert "found a damaged resume file" in str(error)
            noticed += 1
        else:
            assert_same(found, expected)
    assert noticed > 100


# ---- full disks ------------------------------------------------------------------------------------------------------


FULL = (
    r"the disk is full: [\d.]+ MB are free, and a resume file needs [\d.]+ MB; free some space and continue with --resu"
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_run_with_its_last_good_state(whole: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    train(run, max_steps=4)
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * 10_000)
    with filler.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"0" * 512)
    with pytest.raises(MedsegError, match=FULL) as caught:
        train(run, resume=True)
    assert "\n" not in str(caught.value) and caught.value.exit_code != 0
    assert not list(run.rglob("*.tmp"))
    assert resume_file(run)["state"]["step"] == 4
    filler.unlink()
    train(run, resume=True)
    assert_same(resume_file(run), resume_file(whole))
    assert scores(run) == scores(whole)


@pytest.mark.parametrize("where", ["checkpoint", "log", "model"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_wherever_it_is_noticed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    """The write fails at step 6."""

    def fails(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    train(tmp_path, max_steps=4)
    before = names(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(MedsegError, match=FULL):
        if where == "checkpoint":
            patch.setattr(torch, "save", fails)
        elif where == "log":
            patch.setattr(TrainingLog, "validation", fails)
        train(tmp_path, resume=True, save=fails if where == "model" else lambda *args: None)
    assert names(tmp_path) == before and not list(tmp_path.rglob("*.tmp"))
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert scores(tmp_path) == scores(whole)


def test_a_run_whose_first_resume_file_could_not_be_written_starts_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first validation is in the log, which must not make it look like a run that has lost its resume files."""

    def fails(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "config.yaml").touch()
    with monkeypatch.context() as patch, pytest.raises(MedsegError, match=FULL):
        patch.setattr(torch, "save", fails)
        train(tmp_path)
    assert len(rows(tmp_path)) == 1
    train(tmp_path, resume=True)
    assert_same(resume_file(tmp_path), resume_file(whole))
    assert scores(tmp_path) == scores(whole)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="no resume file"):
        train(tmp_path, resume=True)


def test_a_full_disk_at_an_interruption_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            monkeypatch.setattr(torch, "save", fails)
            raise KeyboardInterrupt

    def fails(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MedsegError, match=FULL):
        train(tmp_path, progress=interrupt)
    assert names(tmp_path) == ["step-000002.pt"]


def test_another_failure_of_the_disk_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="Input/output error"):
        train(tmp_path)

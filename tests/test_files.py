"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from medseg_diffusion import files
from medseg_diffusion.files import write_files


def test_files_appear_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "folder"
    assert write_files(folder, {"a.txt": "ä", "b.bin": b"1"}) == (folder / "a.txt", folder / "b.bin")
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ä"

    original, synced = os.fsync, []

    def full_disk(number: int) -> None:
        synced.append(sorted(os.listdir(folder)))
        original(number)
        if len(synced) == 2:
            raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_files(folder, {"a.txt": "changed", "b.bin": b"22"})
    assert len(synced[1]) == 4, "the first one is not renamed before the second one is on the disk"
    assert sorted(os.listdir(folder)) == ["a.txt", "b.bin"]
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ä" and (folder / "b.bin").read_bytes() == b"1"


def test_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    """Names of files are bytes on Linux. A result with such a name must not be lost; in JSON it stays readable."""
    name = os.fsdecode(b"caf\xe9.nii.gz")
    text, content = write_files(tmp_path, {"a.md": name, "b.json": json.dumps([name], ensure_ascii=False)})
    assert text.read_text(encoding="utf-8") == r"caf\udce9.nii.gz"
    assert json.loads(content.read_text(encoding="utf-8")) == [name]


def test_what_a_killed_process_has_left_of_these_results_is_removed(tmp_path: Path) -> None:
    before, now = time.time(), time.time() + 60

    def left(name: str, changed: float, *, folder: bool = False) -> Path:
        path = tmp_path / name
        if folder:
            path.mkdir()
            (path / "part.nii.gz").touch()
            os.utime(path / "part.nii.gz", (changed, changed))
        else:
            path.touch()
        os.utime(path, (before - 1000, before - 1000) if folder else (changed, changed))
        return path

    old = [left(".a_seg.nii.gz.k3j_2l1m.tmp", before - 10, folder=True), left(".a.json.71-0a1b2c3d.tmp", before - 10)]
    kept = [
        left(".a_seg.nii.gz.abcdefgh.tmp", now, folder=True),  # another process writes a file in it
        left(".a.json.72-0a1b2c3d.tmp", now),
        left(".b_seg.nii.gz.k3j_2l1m.tmp", before - 10, folder=True),  # of another part of the scans
        left(".a.json", before - 10),
        left("a.json", before - 10),
    ]
    targets = [tmp_path / "a_seg.nii.gz", tmp_path / "a.json", tmp_path / "no-such-folder" / "a.json"]
    files.remove_left_over(targets, before)
    assert not [path.name for path in old if path.exists()]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in kept)


def test_temporary_names_are_recognised(tmp_path: Path) -> None:
    """Otherwise nothing would be removed after a kill."""
    target = tmp_path / "scan.1_seg.nii.gz"
    with files.temporary_folder(target) as folder:
        names = [folder.name, files._temporary_name(target.name)]
    for name in names:
        temporary = files._TEMPORARY.fullmatch(name)
        assert temporary and temporary[1] == target.name

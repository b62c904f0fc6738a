"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medseg_diffusion.files import write_files


def test_files_appear_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "folder"
    assert write_files(folder, {"a.txt": "ä", "b.bin": b"1"}) == (folder / "a.txt", folder / "b.bin")
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ä"

    original = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        if "b.bin" in self.name:
            original(self, data[:1])
            raise OSError("no space left")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_files(folder, {"a.txt": "changed", "b.bin": b"22"})
    assert sorted(os.listdir(folder)) == ["a.txt", "b.bin"]
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ä" and (folder / "b.bin").read_bytes() == b"1"

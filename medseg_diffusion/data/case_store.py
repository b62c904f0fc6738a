"""Prepared cases in one memory-mapped file, which worker processes and ranks share.

The page cache of the system holds the file once, however many processes read it; and one open file serves any number of
cases. A store is a folder with two files:

cases.bin      the arrays one after another, without headers
cases.jsonl    a line for each case: its name, state, and the types, shapes and offsets of its arrays

Both only grow: a case that is stored again gets a new line, and the last line of a name counts. A line is written after
its arrays, so a process that is killed loses nothing but the case at hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes. Arrays begin at multiples of it, which suits every type and the cache lines of CPUs."""


class CaseStore:
    """Named lists of arrays.

    Args:
        folder: folder of the store; it is made if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.arrays, self.index = folder / "cases.bin", folder / "cases.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}
        size = self.arrays.stat().st_size if self.arrays.is_file() else 0
        lines = self.index.read_bytes() if self.index.is_file() else b""
        self._in_a_line = not lines.endswith(b"\n") if lines else False
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a process was killed while it wrote the line
                continue
            if entry["end"] <= size:
                self.entries[entry["name"]] = entry
        self._mapped: np.ndarray | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the folder's name alone: a worker process maps the file itself."""
        return CaseStore, (self.folder,)

    def holds(self, name: str, state: str) -> bool:
        """Whether a case is stored, made in the way that ``state`` describes."""
        return name in self.entries and self.entries[name]["state"] == state

    def add(self, name: str, state: str, arrays: Sequence[np.ndarray]) -> None:
        """Stores a case. The views that were given out before stay valid."""
        parts = []
        with self.arrays.open("ab") as file:
            for array in arrays:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                parts.append([array.dtype.str, list(array.shape), file.tell()])
                file.write(np.ascontiguousarray(array).data)
            end = file.tell()
        entry = {"name": name, "state": state, "arrays": parts, "end": end}
        with self.index.open("a") as file:
            file.write(("\n" if self._in_a_line else "") + json.dumps(entry) + "\n")
        self.entries[name], self._mapped, self._in_a_line = entry, None, False

    def tensors(self, name: str) -> list[Tensor]:
        """The arrays of a case, memory-mapped. What is written into them reaches no other process and not the file.

        Raises:
            KeyError: no such case.
        """
        if self._mapped is None:
            self._mapped = np.memmap(self.arrays, np.uint8, "c")
        views = []
        for kind, shape, offset in self.entries[name]["arrays"]:
            type_ = np.dtype(kind)
            part = self._mapped[offset : offset + math.prod(shape) * type_.itemsize]
            views.append(torch.from_numpy(part.view(type_).reshape(shape)))
        return views

"""Models that many tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path


class TrainedOnUse(dict[str, Path]):
    """Models by their names; each is trained when a test first asks for it, without a word of what it lacks."""

    def __init__(self, train: Callable[[str], Path]) -> None:
        super().__init__()
        self.train = train

    def __missing__(self, name: str) -> Path:
        with warnings.catch_warnings(action="ignore"):
            self[name] = self.train(name)
        return self[name]

"""The scores of generators as a table: one row per model and sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # pages of other commands need no torch
    from .generation import Scores

FLOOR = "real images (floor)"
"""Name of the row of real images scored against other real images."""


@dataclass(frozen=True)
class GeneratorRow:
    """A row of the table.

    Attributes:
        model: The name as given.
        sampler: Name of the sampler; empty for folders of samples and the floor.
        steps: Its number of steps; 0 without a sampler.
        scores: The scores.
    """

    model: str
    sampler: str
    steps: int
    scores: Scores

    def cells(self) -> dict[str, Any]:
        """The row in the form of a printable table, with the columns in the order of published tables."""
        s = self.scores
        return {
            "model": self.model,
            "sampler": f"{self.sampler}-{self.steps}" if self.sampler else "",
            "recall": round(s.recall, 4),
            "precision": round(s.precision, 4),
            "IS": None if s.inception_score is None else round(s.inception_score, 2),
            "FID": round(s.fid, 2),
            "sFID": None if s.sfid is None else round(s.sfid, 2),
            "KID": round(s.kid, 5),
            **({} if s.ms_ssim is None else {"MS-SSIM": round(s.ms_ssim, 4)}),
            "N": s.count,
            **{f"FID {name}": round(plane.fid, 2) for name, plane in s.planes.items()},
        }


@dataclass
class GeneratorEvaluation:
    """The table of scores, with what is needed to interpret it.

    Attributes:
        extractor: Name of the feature extractor.
        maps: Name of the extractor's spatial features, which sFID compares.
        reference: Path of the real images.
        reference_count: Number of real images.
        upsampler: Model that enlarged the samples, or None.
        rows: The rows of the table.
        warnings: Facts that the reader should know, one sentence each.
    """

    extractor: str
    maps: str
    reference: str
    reference_count: int
    upsampler: str | None = None
    rows: list[GeneratorRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def table(self) -> list[dict[str, Any]]:
        """All rows, printable."""
        return [row.cells() for row in self.rows]

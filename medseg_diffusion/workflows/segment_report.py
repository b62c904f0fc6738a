"""The page about the scans of a call of `medseg segment`, from its results and the files that were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.models.store import SavedModel
from medseg_diffusion.reports.batch import distinct_names, linked, models_of
from medseg_diffusion.reports.segment_page import SegmentedScan, segment_page, with_outliers
from medseg_diffusion.reports.theme import class_colours
from medseg_diffusion.reports.viewer import LayerKind, ViewedCase, viewed_case, viewer
from medseg_diffusion.volumes.io import read_map
from medseg_diffusion.volumes.volume import Volume

from .finished import read_mask
from .scans import ScanResult
from .viewed import MOST_VIEWED, BatchReport, ViewerCapacity, made_by, remarks_of


class SegmentReport(BatchReport):
    """The page of a call. ``names`` are the classes without background, by value."""

    def __init__(
        self, path: Path | None, names: Mapping[int, str], read: Callable[[Path], Volume], command: str, count: int
    ) -> None:
        super().__init__(path, read, command, count)
        self._names = names

    def uses(self, saved: SavedModel, settings: Mapping[str, str]) -> None:
        """Note the model, and the settings in force after its defaults."""
        self._made = {"model": f"{saved.name} (weights {saved.sha256[:12]})", **settings}

    def _page(self, path: Path, stopped: str) -> str:
        classes = {self._names[value]: colour for value, colour in class_colours(self._names).items()}
        names = distinct_names([result.scan for result in self._results])
        results = dict(zip(names, self._results, strict=True))
        scans = with_outliers([_on_page(name, result, path) for name, result in results.items()], list(classes))
        cases = list(self._cases(chosen(scans), results))
        return segment_page(
            scans,
            classes,
            viewer(cases) if cases else None,
            made=models_of(scans, self._made),
            stopped=stopped,
            command=self._command,
        )

    def _cases(self, chosen: Sequence[tuple[str, str]], results: Mapping[str, ScanResult]) -> Iterator[ViewedCase]:
        """The chosen scans, one after the other; those whose files have gone are left out."""
        room = ViewerCapacity()
        for name, reason in chosen:
            result = results[name]
            try:
                scan = self._read(result.scan)
                volumes: dict[LayerKind, Volume] = {
                    "scan": scan,
                    "prediction": scan.aligned(read_mask(result.outputs["segmentation"], self._names)),
                }
                if "uncertainty" in result.outputs:
                    volumes["uncertainty"] = scan.aligned(read_map(result.outputs["uncertainty"], 1))
            except (MedsegError, OSError, ValueError):  # ValueError: a name that libraries cannot open
                continue
            if not room.for_more(volumes.values()):
                return
            yield viewed_case(name, reason, volumes, self._names, {"prediction": "Mask"})


def chosen(scans: Sequence[SegmentedScan]) -> list[tuple[str, str]]:
    """The names of at most `MOST_VIEWED` scans for the viewer, each with the reason.

    Flagged scans come first, then those with the smallest, median and largest size of all classes together, then
    the others, in their order.
    """
    segmented = [scan for scan in scans if scan.volumes_ml]
    reasons = {scan.name: ", ".join(scan.flags) for scan in segmented if scan.flags}
    by_volume = sorted(segmented, key=lambda scan: sum(scan.volumes_ml.values()))
    if len(by_volume) > 2:
        for place, rank in ((0, "smallest"), (len(by_volume) // 2, "median"), (-1, "largest")):
            reasons.setdefault(by_volume[place].name, f"{rank} {by_volume[place].size.quantity}")
    for scan in segmented:
        reasons.setdefault(scan.name, "")
    return list(reasons.items())[:MOST_VIEWED]


def _on_page(name: str, result: ScanResult, page: Path) -> SegmentedScan:
    files = {"scan": result.scan, **{_KINDS.get(kind, kind): file for kind, file in result.outputs.items()}}
    return SegmentedScan(
        name,
        result.status,
        result.flags,
        remarks_of(result),
        result.seconds,
        made_by(result),
        linked(files, page),
        result.volumes_ml,
        result.intervals_ml,
        result.members_ml,
        result.level,
        result.quality,
    )


_KINDS = {"segmentation": "mask"}

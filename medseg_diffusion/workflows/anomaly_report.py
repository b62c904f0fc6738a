"""The page about the scans of a call of `medseg anomaly`, from its results and the files that were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from medseg_diffusion.errors import MedsegError, ModelError
from medseg_diffusion.methods.healthy_scores import HealthyScores
from medseg_diffusion.models.anomaly import AnomalyModel, stored_scores
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.reports.anomaly_page import ScoredScan, WorstSlices, anomaly_page, worst_first
from medseg_diffusion.reports.batch import distinct_names, linked, models_of
from medseg_diffusion.reports.preview import Map, Still, class_outlines, still
from medseg_diffusion.reports.slices import to_jpeg
from medseg_diffusion.reports.theme import ANOMALY
from medseg_diffusion.reports.viewer import LayerKind, ViewedCase, viewed_case, viewer
from medseg_diffusion.volumes.io import read_labels, read_map, upright
from medseg_diffusion.volumes.volume import Volume

from .anomaly_result import AnomalyResult, compared
from .scans import ScanResult
from .viewed import MOST_VIEWED, BatchReport, ViewerCapacity, made_by, remarks_of

MOST_PICTURES = 8
"""Largest number of scans whose worst slices are drawn."""
_MASK = {1: "anomaly"}


class AnomalyReport(BatchReport):
    """The page of a call. ``model`` is the name or folder of the model."""

    def __init__(
        self, path: Path | None, model: str | Path, read: Callable[[Path], Volume], command: str, count: int
    ) -> None:
        super().__init__(path, read, command, count)
        self._model = model
        self._healthy: list[float] = []

    def uses(self, model: AnomalyModel, settings: Mapping[str, str]) -> None:
        """Note the model with its healthy scans, and the settings in force after its defaults."""
        self._made = {"model": f"{model.name} (weights {model.saved.sha256[:12]})", **settings}
        self._compares_with(None if model.notes else model.healthy_scores())  # with notes, scores are not comparable

    def _compares_with(self, healthy: HealthyScores | None) -> None:
        if healthy is not None:
            self._healthy = healthy.scan_scores.tolist()
            self._made["calibration"] = f"{len(self._healthy)} healthy scans of {healthy.patients} patients"

    def _finished_earlier(self) -> None:
        """Note the model's healthy scans if no scan needed the model, but it is the one that made the maps."""
        made = {
            (one.model_sha256, one.method)
            for one in self._results
            if isinstance(one, AnomalyResult) and one.healthy_scans is not None
        }
        with suppress(ModelError):
            saved = load_model_files(self._model)
            if [sha256 for sha256, _ in made] == [saved.sha256]:
                ((_, method),) = made
                self._compares_with(stored_scores(saved, method))

    def _page(self, path: Path, stopped: str) -> str:
        names = distinct_names([result.scan for result in self._results])
        results = dict(zip(names, self._results, strict=True))
        scans = worst_first([_on_page(name, result, path) for name, result in results.items()])
        if not self._made:
            self._finished_earlier()
        cases, pictures, room = list[ViewedCase](), list[WorstSlices](), ViewerCapacity()
        for name, reason in chosen(scans):
            volumes = self._volumes(results[name])
            if volumes is None:
                continue
            if not room.for_more(volumes.values()):
                break
            cases.append(viewed_case(name, reason, volumes, _MASK, {"prediction": "Mask"}))
            if len(pictures) < MOST_PICTURES:
                pictures.append(WorstSlices(name, _picture(volumes)))
        return anomaly_page(
            scans,
            pictures,
            viewer(cases) if cases else None,
            healthy=self._healthy,
            made=models_of(scans, self._made),
            stopped=stopped,
            command=self._command,
        )

    def _volumes(self, result: ScanResult) -> dict[LayerKind, Volume] | None:
        """What is shown of a scan, read from its files; None if they have gone."""
        files = result.outputs
        try:
            scan = self._read(result.scan)
            volumes: dict[LayerKind, Volume] = {
                "scan": scan,
                "anomaly": read_map(files["map"], 1),
                "prediction": read_labels(files["mask"]),
            }
            if "counterpart" in files:
                volumes["counterpart"] = read_map(files["counterpart"], 1)
            for volume in volumes.values():
                scan.require_same_grid(volume)
        except (MedsegError, OSError, KeyError, ValueError):  # ValueError: a name that libraries cannot open
            return None
        return volumes


def _picture(volumes: Mapping[LayerKind, Volume]) -> bytes:
    """The worst slices of a scan, as JPEG."""
    shown = {kind: upright(volume, "") for kind, volume in volumes.items()}
    arrays = {kind: volume.data[0].numpy() for kind, volume in shown.items()}
    content = Still(
        arrays["scan"],
        shown["scan"].spacing,
        [class_outlines(arrays["prediction"], _MASK)],
        Map(arrays["anomaly"], "anomaly map", ANOMALY),
        arrays.get("counterpart"),
    )
    return to_jpeg(still(content))


def chosen(scans: Sequence[ScoredScan]) -> list[tuple[str, str]]:
    """The names of at most `MOST_VIEWED` scans for the viewer, each with the reason.

    Flagged scans come first, then those with the median and the lowest score, then the others, highest score first.
    """
    scored = [scan for scan in scans if scan.score is not None]
    reasons = {scan.name: ", ".join(scan.flags) for scan in scored if scan.flags}
    by_score = sorted(scored, key=lambda scan: -(scan.score or 0.0))
    if len(by_score) > 2:
        for place, reason in ((0, "highest score"), (len(by_score) // 2, "median score"), (-1, "lowest score")):
            reasons.setdefault(by_score[place].name, reason)
    for scan in by_score:
        reasons.setdefault(scan.name, "")
    return list(reasons.items())[:MOST_VIEWED]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _on_page(name: str, result: ScanResult, page: Path) -> ScoredScan:
    common = ScoredScan(
        name,
        result.status,
        result.flags,
        remarks_of(result),
        result.seconds,
        made_by(result),
        linked({"scan": result.scan, **result.outputs}, page),
        volume_ml=result.volumes_ml.get("anomaly"),
    )
    if not isinstance(result, AnomalyResult) or result.score is None:
        return common
    return replace(
        common,
        score=result.score,
        percentile=result.healthy_percentile,
        healthy_scans=result.healthy_scans,
        compared=compared(result.healthy_percentile, result.healthy_scans),
        share=result.share_of_foreground,
        # As in the files, so that finished scans have the threshold of the others.
        threshold=_rounded(result.threshold),
        expected_share=_rounded(result.healthy_false_positive_rate),
        method=result.method,
    )

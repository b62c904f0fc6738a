"""The content of *_statistics.json: sizes, places and intensities of the classes of a segmented scan."""

from __future__ import annotations

from typing import Any

from medseg_diffusion.metrics.regions import Region, regions
from medseg_diffusion.models.segmentation import Segmentation, SegmentationModel
from medseg_diffusion.models.store import is_deterministic

from .scans import Scan


def segmentation_statistics(scan: Scan, segmentation: Segmentation, model: SegmentationModel) -> dict[str, Any]:
    """The statistics of a scan; docs/reference/outputs.md describes every key."""
    names = segmentation.classes
    channels = _channel_names(model.saved.card["channels"], len(scan.volume.data))
    measured = regions(segmentation.labels.numpy(), scan.volume.data.numpy(), scan.volume.affine, max(names))
    classes = {
        name: {
            "label": value,
            "volume_ml": round(segmentation.volumes_ml[name], 4),
            **_entries(measured[value - 1], channels),
        }
        for value, name in names.items()
    }
    for key, ends in (("interval_ml", segmentation.intervals_ml), ("members_ml", segmentation.members_ml)):
        for name, both in ends.items():
            classes[name][key] = [round(end, 4) for end in both]
    for name, dice in segmentation.agreement.items():
        classes[name]["pairwise_dice"] = round(dice, 4) if dice == dice else None
    content: dict[str, Any] = {
        "scan": scan.path.name,
        "model": model.saved.name,
        "model_sha256": model.saved.sha256,
        "seconds": scan.seconds,
        "classes": classes,
    }
    if segmentation.disagreement is not None:
        content["disagreement"] = round(segmentation.disagreement, 5)
    if segmentation.level is not None:
        content["interval_level"] = segmentation.level
    if is_deterministic(model.saved.card):
        content["deterministic"] = True
    if segmentation.quality is not None:
        content["quality"] = segmentation.quality
    if segmentation.unlike_training:
        content["unlike_training"] = segmentation.unlike_training
    return content


def _entries(region: Region, channels: list[str]) -> dict[str, Any]:
    intensity = dict(zip(channels, region.intensities, strict=True))
    return {
        "voxels": region.voxels,
        "extent_mm": _by_axis(region.extent_mm),
        "centroid_ras_mm": _by_axis(region.centroid_mm),
        "touches_border": region.touches_border,
        "intensity": {
            name: {"mean": None, "sd": None} if both is None else {"mean": _short(both[0]), "sd": _short(both[1])}
            for name, both in intensity.items()
        },
    }


def _by_axis(values: tuple[float, float, float] | None) -> dict[str, float] | None:
    return None if values is None else dict(zip("RAS", (round(value, 3) for value in values), strict=True))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _channel_names(names: list[str], count: int) -> list[str]:
    """Distinct names of the channels: those of the model, numbered where two are equal."""
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names[:count], start=1)]

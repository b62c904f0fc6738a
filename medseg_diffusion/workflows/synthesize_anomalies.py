"""`medseg synthesize-anomalies`: insert synthetic anomalies into healthy scans and write a labelled folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_diffusion.data.synthetic_anomalies import (
    FINEST_RADIUS,
    Anomaly,
    AnomalyKind,
    AnomalyRecipe,
    insert_anomaly,
    robust_spread,
)
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import as_paths, write_json
from medseg_diffusion.training.progress import OnProgress, silent
from medseg_diffusion.volumes.foreground import scan_foreground
from medseg_diffusion.volumes.io import read_volume, write_labels, write_map
from medseg_diffusion.volumes.outputs import labelled_outputs, refuse_collisions
from medseg_diffusion.volumes.paths import SUFFIXES
from medseg_diffusion.volumes.volume import Volume

from .scans import Scan, ScanResult, Work, Write, all_scans, each_scan, paths_of


@dataclass(frozen=True)
class SynthesisOptions:
    """Options of `synthesize_anomalies`.

    Attributes:
        output: Folder to write.
        kind: "hyper" (brighter), "hypo" (darker) or "deformation".
        contrast: Strength of the anomaly (`AnomalyRecipe`).
        count: Number of anomalies in each scan; they do not touch.
        radius_mm: Smallest and largest radius.
        seed: Seed of all randomness. Every scan derives its seed from this and its name, and every anomaly from the
            scan's seed and its number.
    """

    output: Path
    kind: AnomalyKind = "hyper"
    contrast: float = 0.3
    count: int = 1
    radius_mm: tuple[float, float] = (4.0, 10.0)
    seed: int = 0

    def __post_init__(self) -> None:
        as_paths(self, "output")


def synthesize_anomalies(
    scans: str | Path | Sequence[str | Path],
    options: SynthesisOptions,
    on_case: Callable[[ScanResult], None] | None = None,
    on_progress: OnProgress = silent,
) -> list[ScanResult]:
    """Insert anomalies into scans and write images/, labels/ and anomalies.json.

    The result is a labelled folder for training and for `medseg evaluate`. Images and labels (uint8, 1 in the
    anomalies) are on the grids of the scans. The image is written after its label, so that a case with an image is
    complete. anomalies.json describes the scans of the latest run. A scan that fails does not stop the others.

    Args:
        scans: Files of one channel, or folders of them.
        options: The options.
        on_case: Called after every scan.
        on_progress: Called with the scan's name, after "3 of 8: " if there are several, and the share done, 0 to 1.

    Raises:
        UsageError: Impossible options, or two scans with the same name.
        InputError: A path that does not exist, or a folder without scans.
    """
    if options.output.name.lower().endswith(SUFFIXES):
        raise UsageError(f"-o {options.output} is a file; give a folder for images, labels and anomalies.json")
    if options.count < 1:
        raise UsageError(f"--count {options.count}: expected 1 or more")
    try:
        recipe = AnomalyRecipe(options.kind, options.contrast, options.radius_mm)
    except ValueError as error:
        raise UsageError(str(error)) from error
    outputs = {path: labelled_outputs(path, options.output) for path in all_scans(paths_of(scans))}
    refuse_collisions(outputs)
    described: list[dict[str, Any]] = []

    def write(scan: Scan, image: Tensor, mask: Tensor, description: dict[str, Any]) -> ScanResult:
        result = _write_results(scan, image, mask)
        described.append(description)
        write_json(options.output / "anomalies.json", {"seed": options.seed, "scans": described})
        return result

    def compute(recipe: AnomalyRecipe, scan: Scan) -> Write:
        return partial(write, scan, *_insert_into(scan, recipe, options))

    work = Work(read_volume, lambda: recipe, compute, "images")
    return each_scan(outputs, work, on_case=on_case, on_progress=on_progress)


def _insert_into(scan: Scan, recipe: AnomalyRecipe, options: SynthesisOptions) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The image and the mask of its anomalies, bool, both (I, J, K), and the scan's entry in anomalies.json."""
    volume = scan.volume
    image = volume.data[0]
    free = scan_foreground(volume)
    spread = robust_spread(image, free)
    _check(volume, recipe, spread, empty=not bool(free.any()))
    mask = torch.zeros_like(free)
    anomalies: list[dict[str, Any]] = []
    for number in range(options.count):
        seed = derive_seed(derive_seed(options.seed, scan.name), number)
        generator = torch.Generator().manual_seed(seed)
        anomaly = insert_anomaly(image, free, volume.spacing, recipe, spread, generator)
        if anomaly is None:
            raise _no_room(scan.path, number, recipe, options.count)
        image, mask, free = anomaly.image, mask | anomaly.mask, free & ~anomaly.touched
        anomalies.append(_entry(anomaly, volume, recipe, seed))
        scan.on_progress((number + 1) / options.count)
    return image, mask, {"scan": scan.path.name, "spread": spread, "anomalies": anomalies}


def _write_results(scan: Scan, image: Tensor, mask: Tensor) -> ScanResult:
    """Write the label, then the image."""
    volume, files = scan.volume, scan.outputs
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(mask.to(torch.uint8), volume, files["labels"])
    write_map(image, volume, files["images"])
    volume_ml = float(mask.sum()) * volume.voxel_mm3 / 1000
    return ScanResult(scan.path, "done", files, scan.seconds, {"anomaly": volume_ml})


def _entry(anomaly: Anomaly, volume: Volume, recipe: AnomalyRecipe, seed: int) -> dict[str, Any]:
    """The entry of an anomaly in anomalies.json."""
    centre = volume.affine @ [*anomaly.centre, 1.0]
    content: dict[str, Any] = {
        "kind": recipe.kind,
        "centre_mm": [round(float(mm), 3) for mm in centre[:3]],  # RAS
        "radius_mm": round(anomaly.radius_mm, 3),
        "contrast": recipe.contrast,
        "voxels": int(anomaly.mask.sum()),
        "seed": seed,
    }
    if recipe.kind == "deformation":
        content["displacement_mm"] = round(anomaly.displacement_mm, 3)
    return content


def _check(volume: Volume, recipe: AnomalyRecipe, spread: float, empty: bool) -> None:
    """Refuse voxels too coarse for the radius, and a foreground in which nothing could be seen."""
    finest, lowest = min(volume.spacing), recipe.radius_mm[0]
    if lowest < FINEST_RADIUS * finest:
        raise InputError(
            volume.source,
            f"voxels of {finest:g} mm or more",
            f"voxels of at most {lowest / FINEST_RADIUS:.3g} mm for a radius of {lowest:g} mm",
            f"raise --radius-mm to {FINEST_RADIUS * finest:.3g} or more",
        )
    if spread <= 0 and not empty:
        raise InputError(
            volume.source, "a foreground of one intensity", "an image with contrast", "check that it is a scan"
        )


def _no_room(scan: Path, placed: int, recipe: AnomalyRecipe, count: int) -> InputError:
    lowest = recipe.radius_mm[0]
    if placed:
        found, remedy = f"room for {placed} of {count} anomalies", "lower --count or --radius-mm"
    else:
        found, remedy = "a foreground too small for an anomaly", "lower --radius-mm or leave the scan out"
    return InputError(scan, found, f"a foreground with room for {count} of radius {lowest:g} mm", remedy)

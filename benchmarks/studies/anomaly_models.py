"""Compares anomaly models with each other and with simple baselines, on whole held-out patients.

    python benchmarks/studies/anomaly_models.py DATA OUT RUN[:METHOD]... \
        [--side test] [--trained-on D] [--exclude 3] [--cases N]

DATA is a labelled folder. If the models were trained on it, the patients of one side of the split are scored. For
another folder use --side all, which scores all patients, and name the training folder with --trained-on. If DATA holds
scans of the training folder with synthetic anomalies, --trained-on names the folder without them, and the split of the
training holds. The baselines are:

"intensity"  the scan itself, scaled as for the models
"height"     how often training patients have a lesion at this relative height, whatever the image shows (left out if
             training scans have no lesions)

Both baselines get their threshold from the healthy slices of the validation patients, exactly as the models do. All
scores count in the same foreground, after the same median filter. The output is cases.csv (one row per patient and
method), table.md, heights.json and heights.png (heights of healthy slices and lesions), and curves.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.data.cases import Case, find_cases
from medseg_diffusion.data.healthy import HealthyScan, find_healthy, healthy_slices
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.methods.healthy_scores import fit_scores
from medseg_diffusion.metrics.detection import Curve, ScoredVoxels
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import mean_interval
from medseg_diffusion.models.anomaly import AnomalyModel, DetectionOptions
from medseg_diffusion.models.anomaly_map import AnomalyMap, filtered, mask_of
from medseg_diffusion.volumes.foreground import scan_foreground
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.preprocessing import Intensity, Preprocessing

BINS = 20
"""Number of bins of relative height in the baseline "height"."""
AnyCase = Case | HealthyScan


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan with its lesions and foreground, on its own grid."""

    name: str
    image: Tensor
    lesions: Tensor
    inside: Tensor
    voxel_mm3: float


@dataclass(frozen=True)
class Contender:
    """One row of the table. ``score`` makes the map of a scan; ``labels`` says which labels the training used."""

    name: str
    score: Callable[[AnyCase, Scan], AnomalyMap]
    threshold: float
    labels: str = "none"
    min_volume_mm3: float = 0.0


def load(case: AnyCase, intensity: Intensity = "percentile") -> Scan:
    volume = read_volume(case.image).oriented("RAS")
    lesions = torch.zeros(volume.data.shape[1:], dtype=torch.bool)
    if case.label is not None:
        lesions = read_labels(case.label).oriented("RAS").data[0] > 0
    image, _ = Preprocessing(intensity=intensity).apply(volume)  # the grid stays: the volume lies in RAS
    return Scan(case.name, image[0], lesions, scan_foreground(volume), float(np.prod(volume.spacing)))


def heights(scan: Scan) -> NDArray[np.float64]:
    """Relative height, 0 to 1, of every slice, from the lowest to the highest slice with foreground."""
    shown = np.flatnonzero(scan.inside.flatten(0, 1).any(0).numpy())
    return (np.arange(scan.image.shape[2]) - shown[0]) / max(1, shown[-1] - shown[0])


def bins(scan: Scan) -> NDArray[np.int64]:
    return np.clip((heights(scan) * BINS).astype(int), 0, BINS - 1)


def healthy(scan: Scan, exclude: int) -> Tensor:
    """Foreground voxels of healthy slices."""
    return scan.inside & healthy_slices(scan.lesions.float(), scan.image.shape[2], exclude)


def height_prior(cases: Sequence[AnyCase]) -> NDArray[np.float64]:
    """Share of foreground voxels that are lesion at each relative height, over training patients."""
    lesion, total = np.zeros(BINS), np.zeros(BINS)
    for case in cases:
        scan = load(case)
        where = bins(scan)
        np.add.at(lesion, where, (scan.lesions & scan.inside).flatten(0, 1).sum(0).numpy())
        np.add.at(total, where, scan.inside.flatten(0, 1).sum(0).numpy())
    return lesion / np.maximum(total, 1)


def row(contender: Contender, case: AnyCase, scan: Scan, exclude: int) -> tuple[dict[str, float | str], Tensor]:
    started = time.monotonic()
    anomaly_map = contender.score(case, scan)
    seconds = time.monotonic() - started
    score = anomaly_map.score
    voxels = ScoredVoxels.of(score.numpy(), scan.lesions.numpy(), scan.inside.numpy())
    curve = Curve.of(voxels)
    slices = scan.lesions.flatten(0, 1).any(0)
    within = Curve.of(ScoredVoxels.of(score.numpy(), scan.lesions.numpy(), (scan.inside & slices).numpy()))
    above = score > contender.threshold
    mask = mask_of(anomaly_map, contender.threshold, scan.voxel_mm3, contender.min_volume_mm3)
    free, height = healthy(scan, exclude), heights(scan)
    thirds = []
    for low in (0, 1 / 3, 2 / 3):
        part = free & torch.from_numpy((height >= low) & (height < low + 1 / 3 + 1e-9))
        thirds.append(float(above[part].float().mean()) if part.any() else float("nan"))
    return {
        "method": contender.name,
        "labels": contender.labels,
        "patient": scan.name,
        "auroc": curve.auroc,
        "auprc": curve.average_precision,
        "auprc_in_tumour_slices": within.average_precision,
        "lesion_share": float((scan.lesions & scan.inside).sum() / scan.inside.sum()),
        "dice": float(label_overlap(mask.numpy(), scan.lesions.numpy(), [1])[1].dice),
        "best_dice": curve.best_dice()[0],
        "false_positive_rate": float(above[free].float().mean()) if free.any() else float("nan"),
        "fpr_low": thirds[0],
        "fpr_middle": thirds[1],
        "fpr_high": thirds[2],
        "evaluations": float(anomaly_map.evaluations),
        "seconds": seconds,
    }, score


def models(names: Sequence[str]) -> tuple[list[Contender], dict[str, str], AnomalyConfig]:
    """The models, the split of their training patients, and the configuration of the first model.

    Split, scaling of intensities and median filter must be the same for all models.
    """
    contenders: list[Contender] = []
    sides: dict[str, str] | None = None
    first: AnomalyConfig | None = None
    for name in names:
        path, _, method = name.partition(":")
        model = AnomalyModel(path, DetectionOptions(method or None), "cpu")
        calibration = model.healthy_scores()
        assert calibration is not None
        split = json.loads((model.saved.path.parent / "split.json").read_text())
        if sides not in (None, split):
            raise SystemExit(f"{path}: was trained on another split than {names[0]}")
        sides = split
        first = first or model.config
        if shared(model.config) != shared(first):
            raise SystemExit(f"{path}: has another intensity scaling or filter than {names[0]}")

        def score(case: AnyCase, scan: Scan, model: AnomalyModel = model) -> AnomalyMap:
            volume = read_volume(case.image)
            result = model.score(volume.oriented("RAS"), derive_seed(0, case.name))
            return replace(result, foreground=scan.inside)

        title = f"{model.name}:{model.method}"
        if title in {other.name for other in contenders}:
            raise SystemExit(f"{title}: named twice; rename one run folder")
        smallest = model.config.postprocessing.min_volume_mm3
        labels = "slices" if model.config.needs_unhealthy else "none"
        contenders.append(Contender(title, score, calibration.automatic, labels, smallest))
    assert sides is not None and first is not None
    return contenders, sides, first


def shared(config: AnomalyConfig) -> tuple[object, ...]:
    """The settings that must be the same for all contenders."""
    dims = len(config.generator.data.shape)
    return config.generator.preprocessing.intensity, config.postprocessing.median, config.postprocessing.erosion, dims


def calibrated(contender: Contender, cases: Sequence[AnyCase], exclude: int, intensity: Intensity) -> Contender:
    """The contender with a threshold from the healthy slices of ``cases``."""
    values = []
    for case in cases:
        scan = load(case, intensity)
        inside = contender.score(case, scan).score[healthy(scan, exclude)].numpy()
        if inside.size:
            values.append(inside)
    return replace(contender, threshold=fit_scores(values, [], 0.975).automatic)


def table(rows: Sequence[dict[str, float | str]], pooled: dict[str, ScoredVoxels]) -> str:
    columns = [
        ("auprc", "AUPRC"),
        ("auprc_in_tumour_slices", "AUPRC, tumour slices"),
        ("auroc", "AUROC"),
        ("dice", "Dice at threshold"),
        ("best_dice", "best Dice per patient (optimistic)"),
        ("false_positive_rate", "false positives on healthy slices"),
        ("fpr_low", "low third"),
        ("fpr_middle", "middle"),
        ("fpr_high", "high"),
        ("seconds", "s per volume"),
        ("evaluations", "evaluations per volume"),
    ]
    head = ["method", "labels used", *[title for _, title in columns], "best pooled Dice (optimistic)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in dict.fromkeys(str(r["method"]) for r in rows):
        method_rows = [r for r in rows if r["method"] == method]
        cells = [method, str(method_rows[0]["labels"])]
        for key, _ in columns:
            interval = mean_interval([float(r[key]) for r in method_rows])
            digits = {"seconds": 1, "evaluations": 0}.get(key, 3)
            text = f"{interval.mean:.{digits}f}"
            if key in ("seconds", "evaluations"):
                cells.append(text)
            elif interval.n < len(method_rows):  # not every patient has healthy slices in every third
                cells.append(f"{text} ({interval.low:.3f} to {interval.high:.3f}; n = {interval.n})")
            else:
                cells.append(f"{text} ({interval.low:.3f} to {interval.high:.3f})")
        cells.append(f"{Curve.of(pooled[method]).best_dice()[0]:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL[:METHOD]")
    parser.add_argument("--side", choices=("test", "validation", "all"), default="test")
    parser.add_argument("--trained-on", type=Path, help="the models' training folder, if DATA is another one")
    parser.add_argument("--exclude", type=int, default=3)
    parser.add_argument("--cases", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    contenders, sides, config = models(options.models)
    intensity = config.generator.preprocessing.intensity
    training_cases = find_healthy(options.trained_on or options.data)
    training, validation = (
        [case for case in training_cases if sides[case.patient] == side] for side in ("train", "validation")
    )
    prior = height_prior(training)

    def brightness(case: AnyCase, scan: Scan) -> AnomalyMap:
        return AnomalyMap(filtered(scan.image, config), scan.inside, 0.0, 0)

    def height(case: AnyCase, scan: Scan) -> AnomalyMap:
        score = torch.from_numpy(prior[bins(scan)]).float().expand(scan.image.shape).contiguous()
        return AnomalyMap(score, scan.inside, 0.0, 0)

    plain = [Contender("intensity", brightness, 0.0)]
    if prior.any():
        plain.append(Contender("height", height, 0.0, "voxels"))
    contenders += [calibrated(contender, validation, options.exclude, intensity) for contender in plain]
    scored_cases = find_cases(options.data).cases
    if options.side != "all":
        scored_cases = tuple(case for case in scored_cases if sides[case.patient] == options.side)
    rows: list[dict[str, float | str]] = []
    voxels_of: dict[str, list[ScoredVoxels]] = {contender.name: [] for contender in contenders}
    for case in scored_cases[: options.cases]:
        scan = load(case, intensity)
        for contender in contenders:
            numbers, score = row(contender, case, scan, options.exclude)
            rows.append(numbers)
            voxels_of[contender.name].append(ScoredVoxels.of(score.numpy(), scan.lesions.numpy(), scan.inside.numpy()))
            print(f"{case.name} {contender.name}: AUPRC {numbers['auprc']:.3f}, Dice {numbers['dice']:.3f}", flush=True)
        with (options.out / "cases.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    pooled = {name: ScoredVoxels.pooled(voxels) for name, voxels in voxels_of.items()}
    (options.out / "table.md").write_text(table(rows, pooled))
    if prior.any():
        counts = histograms(training, options.exclude)
        (options.out / "heights.json").write_text(json.dumps(counts))
        heights_picture(counts, options.out / "heights.png")
    curves(pooled, options.out / "curves.png")
    print((options.out / "table.md").read_text())


def histograms(cases: Sequence[AnyCase], exclude: int) -> dict[str, list[int]]:
    """Slices of the training patients at each relative height: healthy ones (trained on) and those with a lesion."""
    counts = {"healthy": np.zeros(BINS, int), "lesion": np.zeros(BINS, int)}
    for case in cases:
        scan = load(case)
        where = bins(scan)
        free = healthy_slices(scan.lesions.float(), scan.image.shape[2], exclude).numpy()
        np.add.at(counts["healthy"], where[free], 1)
        np.add.at(counts["lesion"], where[scan.lesions.flatten(0, 1).any(0).numpy()], 1)
    return {name: [int(n) for n in values] for name, values in counts.items()}


def heights_picture(counts: dict[str, list[int]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    places = (np.arange(BINS) + 0.5) / BINS
    for shift, (name, values) in zip((-0.2, 0.2), counts.items(), strict=True):
        axes.bar(places + shift / BINS, values, width=0.4 / BINS, label={"lesion": "with a lesion"}.get(name, name))
    axes.set(xlabel="relative height (0: lowest slice)", ylabel="slices of training patients", xlim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(pooled: dict[str, ScoredVoxels], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for name, voxels in pooled.items():
        points = Curve.of(voxels).precision_recall_points()
        axes.step(points[:, 0], points[:, 1], where="pre", label=name, linewidth=1.3)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""Anomaly models against each other and against baselines that anybody can have, on whole held-out patients.

    python benchmarks/anomaly.py DATA OUT MODEL[:METHOD]... [--side test] [--exclude 3] [--cases N]

DATA is a labelled folder; the patients of the models' test side are scored whole. Beside the models:

"intensity"  the scan itself, its percentiles mapped to [-1, 1]: plain thresholding
"height"     how often training patients have a lesion at this relative height: knows nothing but the slice's position

Both get a threshold from the healthy slices of the validation patients, exactly as the models do. All scores count in
one and the same foreground. Written: cases.csv (one row a patient and method), table.md, heights.json, curves.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg_diffusion.anomaly import AnomalyModel
from medseg_diffusion.data.cases import Case, find_cases, split_by_hash
from medseg_diffusion.data.healthy import healthy_slices
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.methods.healthy_scores import fit_scores
from medseg_diffusion.metrics.detection import Curve, ScoredVoxels
from medseg_diffusion.metrics.statistics import mean_interval
from medseg_diffusion.volumes.foreground import foreground
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.preprocessing import Preprocessing

BINS = 20
"""Relative heights of the baseline that knows nothing else."""


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
    """One row of the table: ``score`` maps a scan to a map, ``threshold`` is None until it was calibrated."""

    name: str
    score: Callable[[Case, Scan], Tensor]
    threshold: float
    evaluations: str


def load(case: Case) -> Scan:
    volume = read_volume(case.image).oriented("RAS")
    lesions = read_labels(case.label).oriented("RAS").data[0] > 0
    image, placement = Preprocessing().apply(volume)
    inside = placement.restore(foreground(image[0])[None].float())[0] > 0.5
    return Scan(case.name, image[0], lesions, inside, float(np.prod(volume.spacing)))


def heights(scan: Scan) -> NDArray[np.float64]:
    """Relative height, 0 to 1, of every slice, from the lowest to the highest slice with foreground."""
    shown = np.flatnonzero(scan.inside.flatten(0, 1).any(0).numpy())
    return (np.arange(scan.image.shape[2]) - shown[0]) / max(1, shown[-1] - shown[0])


def bins(scan: Scan) -> NDArray[np.int64]:
    return np.clip((heights(scan) * BINS).astype(int), 0, BINS - 1)


def healthy(scan: Scan, exclude: int) -> Tensor:
    """Foreground voxels of healthy slices."""
    return scan.inside & healthy_slices(scan.lesions.float(), scan.image.shape[2], exclude)


def height_prior(cases: Sequence[Case]) -> NDArray[np.float64]:
    """Share of foreground voxels that are lesion at each relative height, over training patients."""
    lesion, total = np.zeros(BINS), np.zeros(BINS)
    for case in cases:
        scan = load(case)
        where = bins(scan)
        np.add.at(lesion, where, (scan.lesions & scan.inside).flatten(0, 1).sum(0).numpy())
        np.add.at(total, where, scan.inside.flatten(0, 1).sum(0).numpy())
    return lesion / np.maximum(total, 1)


def row(contender: Contender, case: Case, scan: Scan, exclude: int) -> tuple[dict[str, float | str], Tensor]:
    started = time.monotonic()
    score = contender.score(case, scan)
    seconds = time.monotonic() - started
    voxels = ScoredVoxels.of(score.numpy(), scan.lesions.numpy(), scan.inside.numpy())
    curve = Curve.of(voxels)
    slices = scan.lesions.flatten(0, 1).any(0)
    within = Curve.of(ScoredVoxels.of(score.numpy(), scan.lesions.numpy(), (scan.inside & slices).numpy()))
    above = score > contender.threshold
    free, height = healthy(scan, exclude), heights(scan)
    thirds = []
    for low in (0, 1 / 3, 2 / 3):
        part = free & torch.from_numpy((height >= low) & (height < low + 1 / 3 + 1e-9))
        thirds.append(float(above[part].float().mean()) if part.any() else float("nan"))
    return {
        "method": contender.name,
        "patient": scan.name,
        "auroc": curve.auroc,
        "auprc": curve.average_precision,
        "auprc_in_tumour_slices": within.average_precision,
        "lesion_share": float((scan.lesions & scan.inside).sum() / scan.inside.sum()),
        "dice": float(voxels.dice(contender.threshold)),
        "best_dice": curve.best_dice()[0],
        "false_positive_rate": float(above[free].float().mean()) if free.any() else float("nan"),
        "fpr_low": thirds[0],
        "fpr_middle": thirds[1],
        "fpr_high": thirds[2],
        "seconds": seconds,
    }, score


def models(names: Sequence[str], exclude: int) -> tuple[list[Contender], AnomalyModel]:
    found, first = [], None
    for name in names:
        path, _, method = name.partition(":")
        model = AnomalyModel(path, method or None, "cpu")
        first = first or model
        calibration = model.healthy_scores()
        assert calibration is not None

        def score(case: Case, scan: Scan, model: AnomalyModel = model) -> Tensor:
            volume = read_volume(case.image)
            return volume.like(model.score(volume, derive_seed(0, case.name)).score[None]).oriented("RAS").data[0]

        found.append(
            Contender(
                f"{Path(path).name}:{model.method}", score, calibration.automatic, str(model.detector.evaluations)
            )
        )
    assert first is not None
    return found, first


def calibrated(name: str, score: Callable[[Case, Scan], Tensor], cases: Sequence[Case], exclude: int) -> Contender:
    values = []
    for case in cases:
        scan = load(case)
        inside = score(case, scan)[healthy(scan, exclude)].numpy()
        if inside.size:
            values.append(inside)
    return Contender(name, score, fit_scores(values, [], 0.975).automatic, "0")


def table(rows: Sequence[dict[str, float | str]], pooled: dict[str, ScoredVoxels], calls: dict[str, str]) -> str:
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
    ]
    head = ["method", *[title for _, title in columns], "best pooled Dice (optimistic)", "evaluations a slice"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in dict.fromkeys(str(r["method"]) for r in rows):
        own = [r for r in rows if r["method"] == method]
        cells = [method]
        for key, _ in columns:
            found = mean_interval([float(r[key]) for r in own])
            digits = 1 if key == "seconds" else 3
            text = f"{found.mean:.{digits}f}"
            cells.append(text if key.startswith(("fpr", "sec")) else f"{text} ({found.low:.3f} to {found.high:.3f})")
        cells += [f"{Curve.of(pooled[method]).best_dice()[0]:.3f}", calls[method]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL[:METHOD]")
    parser.add_argument("--side", choices=("test", "validation"), default="test")
    parser.add_argument("--exclude", type=int, default=3)
    parser.add_argument("--cases", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    contenders, first = models(options.models, options.exclude)
    section = first.config.generator.data
    cases = {case.name: case for case in find_cases(options.data).cases}
    split = split_by_hash(list(cases.values()), section.test_images, section.validation_images)
    validation = [cases[name] for name in split.validation]
    prior = height_prior([cases[name] for name in split.train])
    contenders += [
        calibrated("intensity", lambda case, scan: scan.image, validation, options.exclude),
        calibrated(
            "height",
            lambda case, scan: torch.from_numpy(prior[bins(scan)]).float().expand(scan.image.shape).contiguous(),
            validation,
            options.exclude,
        ),
    ]
    rows: list[dict[str, float | str]] = []
    kept: dict[str, list[ScoredVoxels]] = {contender.name: [] for contender in contenders}
    for name in [*getattr(split, options.side)][: options.cases]:
        scan = load(cases[name])
        for contender in contenders:
            found, score = row(contender, cases[name], scan, options.exclude)
            rows.append(found)
            kept[contender.name].append(ScoredVoxels.of(score.numpy(), scan.lesions.numpy(), scan.inside.numpy()))
            print(f"{name} {contender.name}: AUPRC {found['auprc']:.3f}, Dice {found['dice']:.3f}", flush=True)
        with (options.out / "cases.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    pooled = {name: ScoredVoxels.pooled(voxels) for name, voxels in kept.items()}
    (options.out / "table.md").write_text(
        table(rows, pooled, {contender.name: contender.evaluations for contender in contenders})
    )
    (options.out / "heights.json").write_text(json.dumps(histograms([cases[n] for n in split.train], options.exclude)))
    curves(pooled, options.out / "curves.png")
    print((options.out / "table.md").read_text())


def histograms(cases: Sequence[Case], exclude: int) -> dict[str, list[int]]:
    """Slices of the training patients at each relative height: healthy ones (trained on) and those with a lesion."""
    counts = {"healthy": np.zeros(BINS, int), "lesion": np.zeros(BINS, int)}
    for case in cases:
        scan = load(case)
        where = bins(scan)
        free = healthy_slices(scan.lesions.float(), scan.image.shape[2], exclude).numpy()
        np.add.at(counts["healthy"], where[free], 1)
        np.add.at(counts["lesion"], where[scan.lesions.flatten(0, 1).any(0).numpy()], 1)
    return {name: [int(n) for n in values] for name, values in counts.items()}


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

"""Scores the brain-tissue model on synthetic scans of held-out anatomies and on real elderly heads.

    python benchmarks/studies/brain_tissue.py MODEL --labelmaps brain_labelmaps --heads whole_head/elderly_t1

This prints the Dice per tissue on synthetic whole heads (T1-like and of any contrast), and the Dice of the brain mask
(all three tissues) against the masks that come with the heads (images/ beside dlmuse_automatic/).

    python benchmarks/studies/brain_tissue.py MODEL --labelmaps brain_labelmaps --sweep 1 2 5 10 50 --ensembles 1 5

This prints the Dice per tissue by number of steps and ensemble size, on synthetic windows of the held-out anatomies.
The members of the largest ensemble are sampled once; smaller ensembles are their first members.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from medseg_diffusion.build import noise_schedule
from medseg_diffusion.data.cases import Case, split_by_hash
from medseg_diffusion.data.label_maps import LabelMap, load_label_map
from medseg_diffusion.data.synthetic_brains import SynthesisConfig, SyntheticBrains, synthetic_scan
from medseg_diffusion.device import keep_freed_memory
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.methods.segment import segment
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import mean_interval
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.segmenter import MaskSegmenter
from medseg_diffusion.sampling.loop import spaced
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.volumes.paths import scan_name
from medseg_diffusion.volumes.volume import Volume


def held_out(model: MaskSegmenter, folder: Path) -> list[LabelMap]:
    """The test anatomies in ``folder``, which neither the training nor the validation of the model used."""
    cases = [Case(scan_name(file), file, file, scan_name(file)) for file in find_scans(folder)]
    section = model.config.data
    split = split_by_hash(cases, section.test_cases, section.validation_cases)
    return [load_label_map(case.label) for case in cases if case.name in split.test]


def sweep(model: MaskSegmenter, folder: Path, steps: list[int], ensembles: list[int], windows: int) -> None:
    """Print Dice per tissue and seconds per window for every number of steps and ensemble size."""
    examples = SyntheticBrains(held_out(model, folder), model.config.data.window)
    drawn = [examples.example(i, torch.Generator().manual_seed(derive_seed("sweep", i))) for i in range(windows)]
    labels = [label for label in model.labels if label]
    schedule = noise_schedule(model.config.diffusion.schedule)
    for count in steps:
        times = spaced(schedule, count)
        dice: dict[tuple[int, int], list[float]] = {(n, label): [] for n in ensembles for label in labels}
        started = time.perf_counter()
        for i, example in enumerate(drawn):
            seeds = [derive_seed("sweep", i, member) for member in range(max(ensembles))]
            image = example["image"].to(model.device)
            with torch.no_grad():
                members = segment(model.model, image, seeds, model.way.sampler, times).cpu()
            for n in ensembles:
                prediction = members[:n].mean(0).argmax(0)
                overlap = label_overlap(prediction.numpy(), example["label"].numpy(), labels)
                for label in labels:
                    dice[n, label].append(overlap[label].dice)
        seconds = (time.perf_counter() - started) / windows / max(ensembles)
        for n in ensembles:
            row = {model.labels[label]: str(mean_interval(dice[n, label])) for label in labels}
            print(
                {"steps": len(times) - 1, "ensemble": n, "windows": windows, **row, "s": f"{n * seconds:.2f}"},
                flush=True,
            )


def synthetic(model: MaskSegmenter, folder: Path, scans: int) -> None:
    """Print the Dice on ``scans`` whole heads of each held-out anatomy, T1-like and of any contrast."""
    anatomies = held_out(model, folder)
    labels = [label for label in model.labels if label]
    for title, config in (
        ("T1-like", replace(SynthesisConfig(), t1_share=1.0)),
        ("any contrast", replace(SynthesisConfig(), t1_share=0.0)),
    ):
        dice: dict[int, list[float]] = {label: [] for label in labels}
        for anatomy in anatomies:
            for i in range(scans):
                generator = torch.Generator().manual_seed(derive_seed("test", title, anatomy.name, i))
                image, tissue, affine = synthetic_scan(anatomy, generator, config)
                prediction = model.segment(Volume(image[None], affine), derive_seed(anatomy.name, i)).labels
                overlap = label_overlap(prediction.numpy(), tissue.numpy(), labels)
                for label in labels:
                    dice[label].append(overlap[label].dice)
                print(f"  {anatomy.name} {i}", [round(dice[label][-1], 3) for label in labels], flush=True)
        _print(f"synthetic, {title}", model, dice)


def heads(model: MaskSegmenter, folder: Path) -> None:
    """Print the Dice of the brain mask on real heads."""
    dice: list[float] = []
    seconds: list[float] = []
    for file in find_scans(folder / "images"):
        volume = read_volume(file)
        reference = read_labels(folder / "dlmuse_automatic" / file.name).data[0] > 0
        started = time.perf_counter()
        prediction = model.segment(volume, derive_seed(0, scan_name(file))).labels > 0
        seconds.append(time.perf_counter() - started)
        dice.append(label_overlap(prediction.numpy(), reference.numpy(), [1])[1].dice)
        print(f"  {file.name} {dice[-1]:.3f} ({seconds[-1]:.0f} s)", flush=True)
    print(f"brain mask on {len(dice)} heads: {mean_interval(dice)}, {np.mean(seconds):.0f} s each")


def _print(title: str, model: MaskSegmenter, dice: dict[int, list[float]]) -> None:
    for label, values in dice.items():
        print(f"{title}: {model.labels[label]} {mean_interval(values)}")
    print(f"{title}: mean {np.mean([np.nanmean(values) for values in dice.values()]):.3f}", flush=True)


def main() -> None:
    """Run the measurements that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--labelmaps", type=Path)
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--scans", type=int, default=2, help="synthetic scans of each anatomy")
    parser.add_argument(
        "--sweep", type=int, nargs="+", metavar="STEPS", help="numbers of steps; windows instead of whole heads"
    )
    parser.add_argument("--ensembles", type=int, nargs="+", default=[1, 5], help="ensemble sizes of the sweep")
    parser.add_argument("--windows", type=int, default=8, help="number of windows of the sweep")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ensemble", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    keep_freed_memory()  # as `medseg segment` does
    model = load_segmenter(options.model, options.device, ensemble=options.ensemble, steps=options.steps)
    assert isinstance(model, MaskSegmenter), f"{model.saved.name} samples no masks"
    if options.sweep:
        if not options.labelmaps:
            parser.error("--sweep needs --labelmaps")
        sweep(model, options.labelmaps, options.sweep, options.ensembles, options.windows)
    elif options.labelmaps:
        synthetic(model, options.labelmaps, options.scans)
    if options.heads:
        heads(model, options.heads)


if __name__ == "__main__":
    main()

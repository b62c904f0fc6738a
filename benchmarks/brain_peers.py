"""How long does a brain take, and how good is it, beside Atropos, deepbet and dipy on the same scans?

    python benchmarks/brain_peers.py DATA OUT [--model brain-tissue-t1] [--scans 5] [--tools ours atropos deepbet dipy]

DATA is the folder with brain_structures/ (skull-stripped scans, manual structures) and whole_head/ (elderly heads with
automatic brain masks). Every tool is a process of its own; seconds are from its start to the written mask. Tools that
are not installed are left out (pip install antspyx deepbet dipy). Atropos and dipy get the scan's own brain mask on
skull-stripped scans, and ours on whole heads, whose time is not counted; where there is none, they are not run. Atropos
runs without a correction of the bias field (N4), which would take longer and help it. OUT/peers.csv has a row for each
scan and tool, OUT/table.md the means. A tool that fails on a scan has an empty row, and is counted.

Structures are compared as the model's classes (studies/brain_references.py), tissues as grey and white matter. The
brain of a skull-stripped scan is what has a manual label, which leaves out the CSF of the sulci: even the scan's own
mask, which Atropos and dipy get, is larger.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from common import cpu_name, installed

from medseg_diffusion.data.brain_classes import STRUCTURES, TISSUES
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.models.store import load_card

sys.path.append(str(Path(__file__).parent / "studies"))
from brain_references import structures

Labels = npt.NDArray[np.integer]

PACKAGES = {"atropos": "ants", "deepbet": "deepbet", "dipy": "dipy"}
ATROPOS = """
import ants, sys
image, mask = ants.image_read(sys.argv[1]), ants.image_read(sys.argv[3])
result = ants.atropos(a=image, x=ants.threshold_image(mask, 0.5, 1e9), i="kmeans[3]", m="[0.2,1x1x1]", c="[5,0]")
ants.image_write(result["segmentation"], sys.argv[2])
"""
DIPY = """
import sys
import nibabel as nib, numpy as np
from dipy.segment.tissue import TissueClassifierHMRF
scan, mask = nib.load(sys.argv[1]), np.asarray(nib.load(sys.argv[3]).dataobj) > 0
data = np.where(mask, scan.get_fdata(), 0)
_, labels, _ = TissueClassifierHMRF().classify(data, 3, 0.1, tolerance=1e-5, max_iter=100)
nib.save(nib.Nifti1Image(labels.astype(np.uint8), scan.affine), sys.argv[2])
"""
DEEPBET = """
import sys
from deepbet import run_bet
run_bet([sys.argv[1]], mask_paths=[sys.argv[2]], no_gpu=True)
"""
NEED_A_MASK = ("atropos", "dipy")
STRUCTURES_OF_MEAN = ("thalamus", "caudate", "putamen", "pallidum", "hippocampus", "amygdala")
"""The structures of the mean in the table."""


def command(tool: str, model: str, scan: Path, out: Path, mask: Path) -> list[str]:
    if tool == "ours":
        run = "from medseg_cli.main import app; app()"
        return [sys.executable, "-c", run, "segment", str(scan), "-m", model, "-o", str(out), "--device", "cpu"]
    script = {"atropos": ATROPOS, "deepbet": DEEPBET, "dipy": DIPY}[tool]
    return [sys.executable, "-c", script, str(scan), str(out), str(mask)]


def read(path: Path) -> Labels:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj).astype(np.int32)


def tissues_of(labels: Labels, names: Sequence[str]) -> Labels:
    """Classes of a model or tool as tissues: by the names of tissues, or of structures."""
    tissue = {name: value for value, name in enumerate(TISSUES.names)}
    if "grey matter" in names:
        table = [tissue[name] for name in names]
    else:
        class_of = TISSUES.class_of
        table = [class_of[STRUCTURES.labels[name][0]] for name in names]
    return np.asarray(table)[labels]


def dice(prediction: Labels, reference: Labels, value: int = 1) -> float:
    return label_overlap(prediction, reference, [value])[value].dice


def scored(
    tool: str, labels: Labels, reference: Labels | None, brain: Labels, names: Sequence[str]
) -> dict[str, float]:
    """Dice by what is compared; a tool that finds the brain alone has that number alone."""
    numbers = {"brain": dice((labels > 0).astype(int), (brain > 0).astype(int))}
    if reference is None or tool == "deepbet":
        return numbers
    own = tissues_of(labels, TISSUES.names if tool != "ours" else names)
    theirs = tissues_of(reference, STRUCTURES.names)
    for value, name in enumerate(TISSUES.names):
        if value > 1:  # manual CSF is that between the structures alone
            numbers[name] = dice(own, theirs, value)
    for value, name in enumerate(names if tool == "ours" else ()):
        if value and name in STRUCTURES.names and name != "other CSF":
            numbers[name] = dice((labels == value).astype(int), (reference == STRUCTURES.names.index(name)).astype(int))
    return numbers


def summary(rows: Sequence[dict[str, str]], tools: Sequence[str]) -> str:
    """Means as a Markdown table, by kind of scan and tool."""

    def mean(chosen: Sequence[dict[str, str]], names: Sequence[str]) -> str:
        values = [float(row[name]) for row in chosen for name in names if row.get(name)]
        return f"{statistics.fmean(values):.3f}" if values else ""

    sides = [f"{side} {name}" for name in STRUCTURES_OF_MEAN for side in ("left", "right")]
    ventricles = ["left lateral ventricle", "right lateral ventricle"]
    lines = [
        "| scans | tool | done | seconds (median) | brain | grey | white | lateral ventricles | six structures |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for tool in tools:
            own = [row for row in rows if (row["kind"], row["tool"]) == (kind, tool)]
            done = [row for row in own if row["seconds"]]
            if not own:
                continue
            seconds = f"{statistics.median(float(row['seconds']) for row in done):.1f}" if done else ""
            columns = [["brain"], ["grey matter"], ["white matter"], ventricles, sides]
            cells = [kind, tool, f"{len(done)} of {len(own)}", seconds, *(mean(done, names) for names in columns)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="brain-tissue-t1")
    parser.add_argument("--scans", type=int, default=5, help="scans of each kind, the last by name")
    parser.add_argument("--tools", nargs="+", default=["ours", *PACKAGES], choices=["ours", *PACKAGES])
    options = parser.parse_args()
    known = [tool for tool in ("ours", *PACKAGES) if tool == "ours" or installed(PACKAGES[tool])]
    tools = [tool for tool in known if tool in options.tools]  # `ours` first: others need its masks
    names = [str(name) for name in load_card(options.model)["labels"].values()]
    work = options.out / "masks"
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    stripped = sorted((options.data / "brain_structures" / "images").glob("*.nii.gz"))[-options.scans :]
    heads = sorted((options.data / "whole_head" / "elderly_t1" / "images").glob("*.nii.gz"))[-options.scans :]
    for kind, scan in [*(("skull-stripped", file) for file in stripped), *(("whole head", file) for file in heads)]:
        reference: Labels | None = None
        brain: Labels
        if kind == "skull-stripped":
            manual = nib.Nifti1Image.from_filename(scan.parent.parent / "labels" / scan.name)
            reference = structures(np.asarray(manual.dataobj).astype(np.int32), manual.affine)
            brain, mask = reference, scan
        else:
            brain = read(scan.parent.parent / "dlmuse_automatic" / scan.name)
            mask = work / f"ours_{scan.name}"
        for tool in tools:
            if tool in NEED_A_MASK and not mask.exists():
                print(f"{tool} is left out on {scan.name}: it needs a mask of `ours`", flush=True)
                continue
            out = work / f"{tool}_{scan.name}"
            started = time.perf_counter()
            log = subprocess.run(
                command(tool, options.model, scan, out, mask), capture_output=True, text=True, check=False
            )
            row = {"kind": kind, "scan": scan.name, "tool": tool, "seconds": ""}
            if log.returncode == 0 and out.exists():
                row["seconds"] = f"{time.perf_counter() - started:.2f}"
                numbers = scored(tool, read(out), reference, brain, names)
                row |= {name: f"{value:.4f}" for name, value in numbers.items()}
            else:
                print(f"{tool} failed on {scan.name}: {(log.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
            rows.append(row)
            print({key: value for key, value in row.items() if key not in STRUCTURES.names[1:]}, flush=True)
            with (options.out / "peers.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for each in rows for key in each)))
                writer.writeheader()
                writer.writerows(rows)
    text = f"{cpu_name()}\n\n{summary(rows, tools)}\n"
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

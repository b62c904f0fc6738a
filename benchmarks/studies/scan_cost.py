"""Seconds and peak memory of a segmentation, outside of the network.

    python benchmarks/studies/scan_cost.py [--cases head slices ...] [--network] [--cpu]

Two equal scans are segmented in a process of its own for each case; the seconds are of the second, for which all is
imported and loaded. The network is replaced by a formula of the intensities, unless --network is given. "back" is
everything from the probabilities on the model's grid to the labels on the scan's grid. `medseg segment` reads the next
scan and writes the last one beside the network, so that only "to grid" and "back" add to its time.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from medseg_diffusion import build
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.device import keep_freed_memory
from medseg_diffusion.models import ensemble_segmenter
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import save_model
from medseg_diffusion.volumes.io import read_volume, write_labels

CLASSES = 10
HEAD, BODY = (182, 218, 182), (512, 512, 400)
CASES: dict[str, tuple[str, tuple[int, int, int], tuple[float, float, float], dict[str, Any]]] = {
    "head": ("brain-tissue-t1, 1 mm", HEAD, (1.0, 1.0, 1.0), {}),
    "slices": ("2D, whole slices", BODY, (0.8, 0.8, 1.0), {"dims": 2}),
    "windows": ("3D windows at 1.5 mm", BODY, (0.8, 0.8, 1.0), {"spacing_mm": [1.5, 1.5, 1.5], "window": [128] * 3}),
    "native": ("3D windows at the scan's voxel size", BODY, (0.8, 0.8, 1.0), {"window": [64, 128, 128]}),
}
"""Name -> description, shape and voxel size of the scan, and the model: none for the one of the package."""


def write_scan(path: Path, shape: Sequence[int], spacing: Sequence[float]) -> None:
    """An ellipsoid of three shells with noise, int16 in air of -1000, whose axes are stored as LPS."""
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    radius = np.sqrt(sum((axis / 0.85) ** 2 for axis in axes)).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 15, shape[:2]).astype(np.float32)[..., None]
    scan = np.where(radius < 1, 40 + 160 * np.floor(3 * radius) + noise, -1000).astype(np.int16)
    nib.save(nib.Nifti1Image(scan, np.diag([-spacing[0], -spacing[1], spacing[2], 1])), path)


def write_model(path: Path, dims: int = 3, spacing_mm: list[float] | None = None, window: Any = None) -> None:
    """A small untrained model of `CLASSES` classes."""
    content = {
        "method": "baseline",
        "data": {"labels": [f"organ {i}" for i in range(1, CLASSES)], "window": [32] * dims},
        "network": {"dims": dims, "channels": 8, "channel_mult": [1, 2]},
        "preprocessing": {"spacing_mm": spacing_mm},
        "inference": {"window": window, "overlap": 0.25},
    }
    config = parse_config(content, "benchmark")
    assert isinstance(config, SegmenterConfig)
    torch.manual_seed(0)
    card = {
        "method": config.method,
        "labels": {str(i): f"organ {i}" if i else "background" for i in range(CLASSES)},
        "channels": ["CT"],
        "config": config.model_dump(mode="json"),
    }
    save_model(path, card, build.segmenter(config, CLASSES).state_dict(), "")


def formula(classes: int) -> Callable[..., Tensor]:
    """Probabilities in place of a network's: every class is a range of intensities."""

    def probabilities(image: Tensor, seeds: Sequence[Sequence[int]], *rest: Any) -> Tensor:
        centres = torch.linspace(-1, 1.2, classes).reshape(1, 1, -1, *[1] * (image.ndim - 2))
        scores = (image[:, None, :1] - centres).square_().mul_(-40).softmax(2)
        return scores.expand(-1, len(seeds[0]), *[-1] * (image.ndim - 1))

    return probabilities


class Clock:
    """Adds up the seconds of the calls of functions, those of the wall or of the CPU."""

    def __init__(self, cpu: bool) -> None:
        self.now = time.process_time if cpu else time.perf_counter
        self.seconds: dict[str, float] = {}

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started

        return timed


def measure(scans: list[Path], name: str, network: bool, cpu: bool) -> None:
    """Segment the scans one after another; print seconds of the last, and the peak of the memory in GB, as JSON."""
    clock = Clock(cpu)
    keep_freed_memory()
    model: Any = load_segmenter(name, "cpu", ensemble=1)
    model.model.probabilities = clock.of(
        "network", model.model.probabilities if network else formula(len(model.labels))
    )
    patched: Any = ensemble_segmenter
    patched.on_model_grid = clock.of("to grid", patched.on_model_grid)
    for scan in scans:
        clock.seconds.clear()
        volume = clock.of("read", read_volume)(scan)
        labels = clock.of("segment", model.segment)(volume).labels
        clock.of("write", write_labels)(labels, volume, scan.parent.parent / "mask.nii.gz")
        del volume, labels
    print(json.dumps({**clock.seconds, "GB": peak_gb()}))


def peak_gb() -> float:
    """Largest memory of this process so far, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would count the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e9 if sys.platform == "darwin" else used * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--network", action="store_true", help="with the model's own network")
    parser.add_argument("--cpu", action="store_true", help="seconds of the CPU, for a machine that does other work")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "SCANS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        model, folder = options.measure
        measure(sorted(Path(folder).glob("*.nii.gz")), model, options.network, options.cpu)
        return
    columns = ("read", "to grid", "network", "back", "write", "outside", "GB")
    print(f"{'':58}" + "".join(f"{name:>9}" for name in columns))
    for name in options.cases:
        text, shape, spacing, model = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            path = "brain-tissue-t1"
            if model:
                path = str(Path(folder) / "model")
                write_model(Path(path), **model)
            (Path(folder) / "scans").mkdir()
            for one in ("a", "b"):
                write_scan(Path(folder) / "scans" / f"{one}.nii.gz", shape, spacing)
            command = [sys.executable, __file__, "--measure", path, str(Path(folder) / "scans")]
            output = subprocess.run(
                command + ["--network"] * options.network + ["--cpu"] * options.cpu,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
        found = json.loads(output.splitlines()[-1])
        found["back"] = found["segment"] - found["to grid"] - found["network"]
        found["outside"] = sum(found[part] for part in ("read", "to grid", "back", "write"))
        size = " x ".join(map(str, shape))
        voxels = math.prod(shape) / 1e6
        print(f"{f'{name}: {size} ({voxels:.0f} M), {text}':58}" + "".join(f"{found[c]:9.2f}" for c in columns))


if __name__ == "__main__":
    main()

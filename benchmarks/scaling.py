"""What do two training processes gain over one, at the same batch in all?

    python benchmarks/scaling.py

`medseg train-segmenter` runs with one and with two processes of one thread each (gloo on the CPU), for a short and for
a longer training. Their difference is the time of the further steps: starting, preparing and saving cancel out. Two is
the most that two cores can give.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from common import Number, Options, Row, main

MEDSEG = Path(sys.executable).with_name("medseg")
"""The command of this environment, which --gpus starts again by its path; PATH may lack it or name another one."""
PRESET = "ensemdiff-hippocampus-small"


def write_scans(folder: Path) -> None:
    """Forty small crops with two labels in the middle."""
    random = np.random.default_rng(0)
    label = np.zeros((36, 52, 38), np.uint8)
    label[10:20, 20:30, 12:22], label[20:28, 20:30, 12:22] = 1, 2
    for i in range(40):
        image = random.normal(100, 20, label.shape).astype(np.float32) + 40 * label
        for name, data in (("images", image), ("labels", label)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, np.eye(4)), folder / name / f"s{i:02d}.nii.gz")


def seconds(data: Path, run: Path, steps: int, processes: int, batch: int) -> float:
    """The time of a training of so many steps; ``batch`` is that of all processes together."""
    section = [
        f"training.batch_size={batch // processes}", f"training.validate_every={steps}", "training.precision=fp32",
        "data.test_cases=2", "data.validation_cases=1", "data.calibration_cases=2",
    ]  # fmt: skip
    command = [
        str(MEDSEG), "train-segmenter", PRESET, "--data", str(data), "-o", str(run),
        "--max-steps", str(steps), "--device", "cpu", "--gpus", str(processes), "--quiet",
        *(part for entry in section for part in ("--set", entry)),
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the training ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - started


def rows(options: Options) -> Iterator[Row]:
    batch, counts = 4, options.size((4, 24), (1,))
    taken: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        write_scans(Path(folder) / "data")
        for i in range(1 if options.quick else options.repeats):
            for processes in (1, 2):
                times = [
                    seconds(Path(folder) / "data", Path(folder) / f"{i}-{processes}-{steps}", steps, processes, batch)
                    for steps in counts
                ]
                # A rehearsal has one training of each kind, and so the time of all of it.
                taken[processes].append((times[-1] - sum(times[:-1])) / (counts[-1] - sum(counts[:-1])))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"a training step of {PRESET}, batch {batch} in all, two processes"
    note = f"on {cores} core{'s' if cores != 1 else ''}, float32"
    yield Row(text, "one process", Number.of(taken[2]), Number.of(taken[1]), note=note)


if __name__ == "__main__":
    main("scaling", __doc__, rows, repeats=2)

"""The first minutes of a new user, with what is installed alone: `make wheel-install-test` runs it as a program.

A scan is made, segmented, sent as a model would be to another machine, and everything is looked at.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

import medseg_diffusion

MEDSEG = Path(sys.executable).with_name("medseg")


def medseg(*arguments: object) -> str:
    started = time.perf_counter()
    done = subprocess.run([MEDSEG, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"medseg {arguments}: {done.stdout}{done.stderr}"
    print(f"{time.perf_counter() - started:6.1f} s  medseg {' '.join(map(str, arguments))}")
    return done.stdout


def main() -> None:
    assert Path(medseg_diffusion.__file__).is_relative_to(Path(sys.prefix)), "the package is not the installed one"
    noise = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(noise.random((35, 50, 35)).astype(np.float32), np.eye(4)), "scan.nii.gz")
    print(medseg("--version").strip())
    medseg("segment", "scan.nii.gz", "-m", "hippocampus-t1", "--device", "cpu", "--ensemble", 2)
    mask = np.asarray(nib.load("scan_seg.nii.gz").dataobj)
    assert mask.shape == (35, 50, 35) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1, 2}
    medseg("models", "export", "hippocampus-t1", "-o", "mine.zip")
    medseg("models", "install", "mine.zip")
    assert medseg("models", "show", "mine").startswith("# mine\n")
    medseg("segment", "scan.nii.gz", "-m", "mine", "--device", "cpu", "--ensemble", 2, "-o", "again.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load("again.nii.gz").dataobj), mask)
    assert "train-segmenter" in medseg("configs", "list")


if __name__ == "__main__":
    main()

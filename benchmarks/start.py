"""How long do commands take to start, compared with a bare `import torch`?

    python benchmarks/start.py

Each command runs in processes of its own, in turn with `import torch`. `medseg segment` is timed from the start of the
process to the first call of the network, on a crop of the size of a hippocampus.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from common import Options, Row, main

TORCH = "import torch"
MEDSEG = "import sys; from medseg_cli.main import app; sys.argv = ['medseg', *sys.argv[1:]]; app()"
# The process ends at the first call of any network.
FIRST_CALL = (
    "import os, torch\n"
    "torch.nn.modules.module.register_module_forward_pre_hook(lambda *arguments: os._exit(77))\n" + MEDSEG
)


def process(code: str, *arguments: str, status: int = 0) -> Callable[[], None]:
    """A function that runs ``code`` in a new Python process, which has to end with ``status``."""

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        if done.returncode != status:
            raise SystemExit(f"ended with {done.returncode}, not {status}: {done.stderr}")

    return run


def rows(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "crop.nii.gz"
        crop = np.random.default_rng(0).random((36, 52, 38), np.float32)
        nib.save(nib.Nifti1Image(crop, np.eye(4)), scan)
        segment = ("segment", str(scan), "-m", "hippocampus-t1", "--device", "cpu", "-o", str(Path(folder) / "out"))
        run = ("train-segmenter", "none", "--data", folder, "-o", str(Path(folder) / "run"))
        runs = {
            TORCH: process(TORCH),
            "segment: first call of the network": process(FIRST_CALL, *segment, status=77),
            "segment: a mistyped path": process(MEDSEG, "segment", str(scan) + "x", status=3),
            "segment: a mistyped model": process(MEDSEG, "segment", str(scan), "-m", "none", status=4),
            "train-segmenter: an unknown preset": process(MEDSEG, *run, status=2),
            "models list": process(MEDSEG, "models", "list"),
            "configs list": process(MEDSEG, "configs", "list"),
            "--help": process(MEDSEG, "--help"),
        }
        if options.quick:
            runs = {name: runs[name] for name in (TORCH, "--help")}
        times = options.in_turns(runs, warm=0)
    torch = times.pop(TORCH)
    for name, taken in times.items():
        yield Row(f"medseg {name}", TORCH, taken, torch)


if __name__ == "__main__":
    main("start", __doc__, rows)

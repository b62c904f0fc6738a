"""How long commands take to start, as ratios to a bare `import torch` in the same run.

    python benchmarks/start.py

Each command runs in processes of its own, in turn with `import torch`; the median over the rounds is printed.
`medseg segment` is timed from the start of the process to the first call of the network, on a crop of the size of a
hippocampus.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

TORCH = "import torch"
MEDSEG = "import sys; from medseg_cli.main import app; sys.argv = ['medseg', *sys.argv[1:]]; app()"
# The process ends at the first call of any network.
FIRST_CALL = (
    "import os, torch\n"
    "torch.nn.modules.module.register_module_forward_pre_hook(lambda *arguments: os._exit(77))\n" + MEDSEG
)


def seconds(code: str, *arguments: str, status: int = 0) -> float:
    """The time that a new Python process takes for ``code``, which has to end with ``status``."""
    started = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    taken = time.perf_counter() - started
    if process.returncode != status:
        raise SystemExit(f"ended with {process.returncode}, not {status}: {process.stderr}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "crop.nii.gz"
        crop = np.random.default_rng(0).random((36, 52, 38), np.float32)
        nib.save(nib.Nifti1Image(crop, np.eye(4)), scan)
        segment = ("segment", str(scan), "-m", "hippocampus-t1", "--device", "cpu", "-o", str(Path(folder) / "out"))
        cases = {
            "import torch": lambda: seconds(TORCH),
            "segment: first call of the network": lambda: seconds(FIRST_CALL, *segment, status=77),
            "segment: a mistyped path": lambda: seconds(MEDSEG, "segment", str(scan) + "x", status=3),
            "segment: a mistyped model": lambda: seconds(MEDSEG, "segment", str(scan), "-m", "none", status=4),
            "train-segmenter: an unknown preset": lambda: seconds(
                MEDSEG, "train-segmenter", "none", "--data", folder, "-o", str(Path(folder) / "run"), status=2
            ),
            "models list": lambda: seconds(MEDSEG, "models", "list"),
            "models show": lambda: seconds(MEDSEG, "models", "show", "hippocampus-t1"),
            "configs list": lambda: seconds(MEDSEG, "configs", "list"),
            "--help": lambda: seconds(MEDSEG, "--help"),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, run in cases.items():
                times[name].append(run())
    torch = statistics.median(times["import torch"])
    print(f"{'':36} {'s':>6} {'ratio to import torch':>22}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:36} {median:6.2f} {median / torch:22.2f}")


if __name__ == "__main__":
    main()

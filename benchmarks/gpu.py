"""`make gpu`: what needs a GPU, in at most nine minutes.

    python benchmarks/gpu.py [--part tests throughput generators] [--data tiny-imagenet-200.zip] [--out gpu-output]
    python benchmarks/gpu.py --part brain --labelmaps brain_labelmaps

tests        the tests marked `cuda`
throughput   training steps and evaluations of four presets, beside MONAI and diffusers (gpu_throughput.py)
generators   the generators of Tiny ImageNet for two minutes each, with pictures and scores (gpu_training.py)
brain        the brain model for eight minutes, alone

Every part runs in processes of its own, which are stopped at the part's limit; what it has written stays, and the next
part runs. OUT/gpu.json says how each ended. OUT stays below 16 MB. --rehearse does the same on the CPU with the
smallest sizes. No network is needed. The exit code is 2 if something is missing, 1 if a part failed or was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import end_at_sigterm, installed, limited, machine, write_numbers

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("MEDSEG_DATA", HERE.parent / "../shared/data"))
LIMITS = {"tests": 60.0, "throughput": 100.0, "generators": 370.0, "brain": 530.0}
"""Most seconds of each part, until its processes are gone. The first three together leave ten of nine minutes."""
USUAL = ("tests", "throughput", "generators")
MOST_BYTES = 16_000_000


def command(part: str, options: argparse.Namespace) -> list[str]:
    """The command line of a part."""
    rehearse = ["--rehearse"] * options.rehearse
    if part == "tests":
        few = [str(HERE.parent / "tests" / "test_device.py"), "-k", "gpu"] if options.rehearse else []
        return [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider",
                f"--junitxml={options.out / 'tests.xml'}", *few]  # fmt: skip
    if part == "throughput":
        seconds, file = ["--seconds", str(LIMITS[part] - 10)], options.out / "throughput.json"
        return [
            sys.executable,
            str(HERE / "gpu_throughput.py"),
            str(file),
            *seconds,
            *rehearse,
        ]
    data = options.labelmaps if part == "brain" else options.data
    return [sys.executable, str(HERE / "gpu_training.py"), part, str(options.out), "--data", str(data), *rehearse]


def numbers_of_tests(file: Path) -> dict[str, int]:
    """Counts of a junit file; empty if pytest did not write one."""
    if not file.exists():
        return {}
    suite = next(ElementTree.parse(file).iter("testsuite"))
    return {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}


def missing(parts: Sequence[str], options: argparse.Namespace) -> str | None:
    """What is missing, in one line."""
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            return "no CUDA device: run this on a machine with a GPU, or --rehearse it on the CPU"
    if "tests" in parts and not installed("pytest"):
        return "pytest is not installed: pip install '.[test]'"
    if "generators" in parts and not options.data.exists():
        return f"{options.data}: not found; name Tiny ImageNet (the zip or its folder) with DATA=... or --data"
    if "brain" in parts and not options.labelmaps.exists():
        return f"{options.labelmaps}: not found; name the folder of label maps with LABELMAPS=... or --labelmaps"
    return None


def within_limit(folder: Path) -> list[str]:
    """Delete the largest files until the folder is small enough; their names."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    total, dropped = sum(path.stat().st_size for path in files), []
    for path in files:
        if total <= MOST_BYTES:
            break
        total -= path.stat().st_size
        dropped.append(f"{path.relative_to(folder)} ({path.stat().st_size / 1e6:.1f} MB)")
        path.unlink()
    return dropped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=LIMITS, default=list(USUAL))
    parser.add_argument("--data", type=Path, default=DATA / "tiny-imagenet-200.zip", help="Tiny ImageNet")
    parser.add_argument("--labelmaps", type=Path, default=DATA / "brain_labelmaps", help="label maps of heads")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-output"))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the smallest sizes")
    parser.add_argument("--limit", type=float, help="most seconds of each part, instead of its own limit")
    options = parser.parse_args()
    options.out, options.data = options.out.resolve(), options.data.resolve()
    options.labelmaps = options.labelmaps.resolve()
    if reason := missing(options.part, options):
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    end_at_sigterm()
    result: dict[str, Any] = {"machine": machine("cpu" if options.rehearse else "cuda"), "rehearsal": options.rehearse}
    result["parts"] = {}
    for part in options.part:
        began, limit = time.monotonic(), options.limit or LIMITS[part]
        with (options.out / f"{part}.log").open("w") as log:
            how, status = limited(command(part, options), limit, log, HERE.parent)
        taken = time.monotonic() - began
        result["parts"][part] = {"ended": how, "status": status, "seconds": round(taken, 1), "limit": limit}
        if part == "tests":
            result["parts"][part] |= numbers_of_tests(options.out / "tests.xml")
        print(f"{part}: {how} after {taken:.0f} s", flush=True)
        result["dropped"] = within_limit(options.out)
        write_numbers(options.out / "gpu.json", result)
    print(f"results: {options.out}")
    return 0 if all(part["ended"] == "done" for part in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Starting a training run in several processes of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def launched() -> bool:
    """Whether this process already is one of several (torchrun, SLURM or accelerate have set RANK and WORLD_SIZE)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is the only process, or the one of several that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def launch(command: Sequence[str], processes: int) -> int:
    """Runs ``command`` (program and arguments) in ``processes`` processes through torchrun; returns its exit code.

    The processes find each other by themselves on a free port; each gets its own device.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*torchrun, "--no-python", *command], check=False).returncode

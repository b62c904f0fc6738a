"""The training commands in processes of their own, alone or together: by torchrun, srun's variables or --gpus."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "JOB_COMPLETION_INDEX")
MEDSEG = str(Path(sys.executable).with_name("medseg"))


def environment(**more: str) -> dict[str, str]:
    """This environment without the variables of launchers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def start(words: Sequence[object], **more: str) -> subprocess.Popen[str]:
    """`medseg` with these words, in a session of its own."""
    return subprocess.Popen(
        [MEDSEG, *map(str, words)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def with_torchrun(words: Sequence[object]) -> list[subprocess.Popen[str]]:
    """Two processes of torchrun itself."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python", MEDSEG]
    return [
        subprocess.Popen(
            [sys.executable, *torchrun, *map(str, words)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    ]


def with_srun(words: Sequence[object]) -> list[subprocess.Popen[str]]:
    """Two processes with the variables that srun sets for two tasks of one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node7"}
    return [
        start(words, **shared, MASTER_PORT=port, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in (0, 1)
    ]


def with_gpus(words: Sequence[object]) -> list[subprocess.Popen[str]]:
    """Two processes of our own launcher."""
    return [start([*words, "--gpus", 2])]


LAUNCHERS: dict[str, Callable[[Sequence[object]], list[subprocess.Popen[str]]]] = {
    "torchrun": with_torchrun,
    "srun": with_srun,
    "--gpus 2": with_gpus,
}


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of every process. All of them, and what they started, are gone afterwards."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return found


def wait_until(
    condition: Callable[[], object], processes: Sequence[subprocess.Popen[str]], timeout: float = 120
) -> None:
    """Waits for something that the processes do."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it took too long"
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)

"""Starting a training run in several processes of one machine."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from uuid import uuid4

from medseg_diffusion.errors import MedsegError


def launched() -> bool:
    """Whether this process already is one of several (torchrun, SLURM or accelerate have set RANK and WORLD_SIZE)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is the only process, or the one of several that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def launch(command: Sequence[str], processes: int) -> int:
    """Runs ``command`` (program and arguments) in ``processes`` processes of this machine, as torchrun does.

    The processes find each other by themselves on a free port; each gets its own device. Returns 0, or the exit code of
    the process that failed first: the others are ended then.

    Raises:
        MedsegError: the first to end was ended by a signal, so that it could not say why.
    """
    # Reading a command's options is not to wait for these.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a process that fails says why itself
    config = LaunchConfig(
        1, 1, processes, run_id=str(uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            raise MedsegError(f"process {rank} of {processes} was ended by {name}; was there enough memory?") from error
        return first.exitcode
    return 0

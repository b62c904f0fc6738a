"""Starting a training run in several processes of one machine."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from uuid import uuid4

from medseg_diffusion.errors import MedsegError, Stopped, UsageError

from .interrupt import PREEMPTIONS


def is_first() -> bool:
    """Whether this is the only process, or the one of rank 0, which prints for all."""
    return os.environ.get("RANK", "0") == "0"


def launch(command: Sequence[str], processes: int, device: str = "cpu") -> int:
    """Runs ``command`` (program and arguments) in ``processes`` processes of this machine, as torchrun does.

    The processes find each other on a free port, and each uses its own device. If one fails, the others are ended.
    Returns 0, or the exit code of the process that failed first; 75 (`Stopped`) if SIGTERM or SIGUSR1 ended them.

    Raises:
        UsageError: more processes than GPUs, if ``device`` ("auto", "cpu", "cuda", "mps") means GPUs; no such device.
        MedsegError: a signal ended the process that failed first, so that it could not print a reason.
        KeyboardInterrupt: Ctrl-C.
    """
    # Imported here because they are slow to import: other commands must not wait for them.
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from medseg_diffusion.device import choose_device

    choose_device(device)  # a device that is missing is said once, not by every process
    if device in ("auto", "cuda") and 0 < torch.cuda.device_count() < processes:
        raise UsageError(f"--gpus {processes}: this machine has {torch.cuda.device_count()}; give at most this number")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"
    )  # seconds to finish the step and write the resume file
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # a process that fails prints the reason itself
    config = LaunchConfig(
        1, 1, processes, run_id=str(uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *PREEMPTIONS)}
    try:
        for number in PREEMPTIONS[1:]:  # torch passes SIGTERM on, but not SIGUSR1
            signal.signal(number, lambda number, frame: signal.raise_signal(signal.SIGTERM))
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as error:  # the processes have received it too, and have ended by now
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return Stopped.exit_code if error.sigval == signal.SIGTERM else 128 + error.sigval
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if -first.exitcode in PREEMPTIONS:  # so early that nothing caught it
            return Stopped.exit_code
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            hint = "; was there enough memory?" if name == "SIGKILL" else ""
            raise MedsegError(f"process {rank} of {processes} was ended by {name}{hint}") from error
        return first.exitcode
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0

"""The place of this process among those of its launcher, from the environment: torchrun, srun, Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from medseg_diffusion.errors import UsageError

TORCH_PORT = "29500"
_SPECIAL_STEPS = 0xFFFFFFF0


@dataclass(frozen=True)
class Place:
    """Process ``index`` (from 0) of ``count``, and the variable that says so."""

    index: int
    count: int
    variable: str

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"{self.variable} is set, but the number of processes is {self.count}")
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"{self.variable} gives number {self.index}, counted from 0, of {self.count}; "
                f"expected 0 to {self.count - 1}"
            )


def number(name: str, environment: Mapping[str, str]) -> int:
    """The value of a variable.

    Raises:
        UsageError: it is not set, or no number.
    """
    value = environment.get(name, "")
    if not value.isdecimal():
        found = f"is {value!r}, which is no number" if value else "is not set"
        raise UsageError(f"the environment variable {name} {found}")
    return int(value)


def torchrun_place(environment: Mapping[str, str]) -> Place | None:
    """The place among the processes of torchrun, or of what sets the same variables."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    return Place(number("RANK", environment), number("WORLD_SIZE", environment), "RANK")


def srun_place(environment: Mapping[str, str]) -> Place | None:
    """The place among the tasks of srun, or of a batch script, which is task 0 of all that were asked for."""
    if "SLURM_NTASKS" not in environment and "SLURM_PROCID" not in environment:
        return None
    return Place(number("SLURM_PROCID", environment), number("SLURM_NTASKS", environment), "SLURM_PROCID")


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process. In a batch script, or in a shell of salloc, it has not.

    Such a shell has no step, or one of the largest numbers, which SLURM keeps for itself.
    """
    step = environment.get("SLURM_STEP_ID", "" if "SLURM_JOB_ID" in environment else "0")
    return step.isdecimal() and int(step) < _SPECIAL_STEPS


def index_place(environment: Mapping[str, str], count: int) -> Place:
    """The place among the pods of an indexed job of Kubernetes."""
    return Place(number("JOB_COMPLETION_INDEX", environment), count, "JOB_COMPLETION_INDEX")


# ---- training --------------------------------------------------------------------------------------------------------

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch needs to know to train in all processes of the launcher, as torchrun sets it; empty for one process.

    Raises:
        UsageError: variables that are missing or contradict each other.
    """
    if "WORLD_SIZE" in environment and "RANK" not in environment and "JOB_COMPLETION_INDEX" in environment:
        place = index_place(environment, number("WORLD_SIZE", environment))
        found = {"LOCAL_RANK": "0", "MASTER_PORT": TORCH_PORT}  # one process in each pod
    elif torch_place := torchrun_place(environment):
        place = torch_place
        # PyTorchJob starts one process in each pod and does not set it; scripts for srun often set all but this one.
        found = {"LOCAL_RANK": environment.get("SLURM_LOCALID", "0") if is_task(environment) else "0"}
    elif is_task(environment) and (task := srun_place(environment)):
        place = task
        found = _of_slurm(environment) if task.count > 1 else {}
    else:
        return {}
    if place.count == 1:
        return {}
    found |= {name: environment[name] for name in TORCHRUN[2:] if environment.get(name)}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in found:
            raise UsageError(
                f"the environment variable {name} is not set; the {place.count} processes need it to find each other"
            )
    Place(number("LOCAL_RANK", found), place.count, "LOCAL_RANK")
    if not 0 < number("MASTER_PORT", found) < 2**16:
        raise UsageError(f"the environment variable MASTER_PORT is {found['MASTER_PORT']}; expected 1 to 65535")
    return {"RANK": str(place.index), "WORLD_SIZE": str(place.count), **found}


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """LOCAL_RANK of a task, and the same address and port for all tasks: the first node, and a port by the job.

    The port lies below those that systems hand out by themselves.
    """
    job = number("SLURM_JOB_ID", environment) if "SLURM_JOB_ID" in environment else 0
    step = environment.get("SLURM_STEP_ID", "0")
    port = 15_000 + (job + 7_919 * (int(step) if step.isdecimal() else 0)) % 15_000
    found = {"LOCAL_RANK": str(number("SLURM_LOCALID", environment)), "MASTER_PORT": str(port)}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes is None and "MASTER_ADDR" not in environment:
        raise UsageError("the environment variable SLURM_JOB_NODELIST is not set; or set MASTER_ADDR to the first node")
    return found | ({"MASTER_ADDR": first_node(nodes)} if nodes else {})


def first_node(nodes: str) -> str:
    """The first name of a list of SLURM, such as node003 of node[003-010,12],login1; the machine itself if it is alone.

    Raises:
        UsageError: no such list.
    """
    first = re.match(r"(?:[^,\[\]\s]|\[[\d,-]+\])+", nodes)
    if not first:
        raise UsageError(f"the environment variable SLURM_JOB_NODELIST is {nodes!r}, which is no list of nodes")
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
    return "127.0.0.1" if name == nodes else name

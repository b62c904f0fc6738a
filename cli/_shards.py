"""`--shard`: the part of the scans that one process takes, as given or from the environment of its launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from medseg_diffusion.errors import UsageError

from ._launchers import Place, index_place, is_task, number, srun_place, torchrun_place

Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="i/n|auto|auto/n",
        help="Take only part i of n of the scans (1/4 to 4/4). auto reads i and n from torchrun, srun or a SLURM "
        "array; auto/n reads i from the index of a Kubernetes job.",
    ),
]


def parse_shard(value: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """The part (i, n), 1 <= i <= n, of a value of --shard; None for None.

    Raises:
        UsageError: another value, or variables that are missing or contradict each other.
    """
    if value is None:
        return None
    first, _, last = value.partition("/")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    if value != "auto" and not (first == "auto" and last.isdecimal() and int(last) >= 1):
        raise UsageError(f"--shard {value!r}: expected i/n with 1 <= i <= n, for instance 1/4, or auto, or auto/n")
    try:
        return _of_launcher(environment) if value == "auto" else _part(index_place(environment, int(last)))
    except UsageError as error:
        raise UsageError(f"--shard {value}: {error}") from error


def failures_file(output: Path | None) -> Path:
    """The list of failed scans in the output folder, or else in the current one."""
    return (output or Path()) / "failures.csv"


def _of_launcher(environment: Mapping[str, str]) -> tuple[int, int]:
    """The part of a process among those of a launcher, among the tasks of a SLURM array.

    The variables of torchrun come before those of srun, because srun may start torchrun, whose ranks then count all
    processes. An array does not exclude the two: each of its tasks may be several processes.
    """
    array = _of_array(environment) if "SLURM_ARRAY_TASK_ID" in environment else None
    process = torchrun_place(environment)
    if process is None and ("SLURM_NTASKS" in environment or array is None):
        process = srun_place(environment)
        if process is not None and process.count > 1 and not is_task(environment):
            # A batch script has task number 0 of all tasks that were asked for, and is the only one.
            raise UsageError(
                f"SLURM_NTASKS is {process.count}, but SLURM_STEP_ID is not set: this is no task of srun, "
                "and the scans of the other tasks would be left out; start medseg with srun"
            )
    if array is None and process is None:
        hint = "give --shard auto/n with the completions of the job" if "JOB_COMPLETION_INDEX" in environment else ""
        raise UsageError(
            "none of RANK (torchrun), SLURM_PROCID (srun) and SLURM_ARRAY_TASK_ID (sbatch --array) is "
            f"set; {hint or 'start medseg with one of them, or give --shard i/n'}"
        )
    (i, n), (j, m) = (_part(place) if place is not None else (1, 1) for place in (array, process))
    return (i - 1) * m + j, n * m


def _of_array(environment: Mapping[str, str]) -> Place:
    """The place of a task in its SLURM array, whose identifiers may begin anywhere and have steps."""
    task, first, count = (number(f"SLURM_ARRAY_TASK_{name}", environment) for name in ("ID", "MIN", "COUNT"))
    step = number("SLURM_ARRAY_TASK_STEP", {"SLURM_ARRAY_TASK_STEP": "1", **environment}) or 1
    last = number("SLURM_ARRAY_TASK_MAX", {"SLURM_ARRAY_TASK_MAX": str(first + (count - 1) * step), **environment})
    if last != first + (count - 1) * step or (task - first) % step:
        raise UsageError(
            f"the {count} tasks of the SLURM array from {first} to {last} are not evenly spaced; number "
            "them without gaps, as in --array=0-99, or give --shard i/n"
        )
    return Place((task - first) // step, count, "SLURM_ARRAY_TASK_ID")


def _part(place: Place) -> tuple[int, int]:
    return place.index + 1, place.count

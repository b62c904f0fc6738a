"""`--shard`: parts given by number, and by the environment of torchrun, SLURM and Kubernetes."""

from __future__ import annotations

import pytest
from medseg_cli._shards import parse_shard

from medseg_diffusion.errors import UsageError
from tests.helpers.cli import error_lines, medseg

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
TASK = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "3"}
BATCH = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("value", "environment", "part"),
    [
        (None, TORCHRUN, None),  # without the option nothing is divided
        ("2/3", TORCHRUN, (2, 3)),
        ("auto", TORCHRUN, (2, 2)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"}, (1, 1)),
        ("auto", {"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, (3, 3)),
        ("auto", TASK, (3, 3)),
        ("auto", TORCHRUN | TASK, (2, 2)),  # srun starts torchrun, whose ranks count all processes
        ("auto", ARRAY, (3, 4)),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "5"}, (1, 4)),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_STEP": "1"}, (3, 4)),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_MAX": "11", "SLURM_ARRAY_TASK_STEP": "2"}, (2, 4)),
        ("auto", ARRAY | BATCH, (3, 4)),  # the batch script of an array's task
        ("auto", ARRAY | {"SLURM_PROCID": "0"}, (3, 4)),  # the same without --ntasks
        ("auto", ARRAY | TASK, (9, 12)),  # three processes in each task of the array
        ("auto", ARRAY | TORCHRUN, (6, 8)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "0"}, (1, 5)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "4"} | TORCHRUN | ARRAY, (5, 5)),
    ],
)
def test_parts(value: str | None, environment: dict[str, str], part: tuple[int, int] | None) -> None:
    assert parse_shard(value, environment) == part


@pytest.mark.parametrize("array", [{}, ARRAY])
def test_the_processes_of_all_tasks_take_every_part_once(array: dict[str, str]) -> None:
    tasks = [array | {"SLURM_ARRAY_TASK_ID": str(i)} for i in range(5, 9)] if array else [{}]
    processes = [task | TASK | {"SLURM_PROCID": str(i)} for task in tasks for i in range(3)]
    parts = [parse_shard("auto", environment) for environment in processes]
    assert parts == [(i + 1, len(processes)) for i in range(len(processes))]


@pytest.mark.parametrize(
    ("value", "environment", "message"),
    [
        ("0/3", {}, "expected i/n"),
        ("4/3", {}, "expected i/n"),
        ("1/", {}, "expected i/n"),
        ("auto/", {}, "expected i/n"),
        ("auto/0", {}, "expected i/n"),
        ("rank", {}, "expected i/n"),
        ("auto", {}, "none of RANK .* SLURM_PROCID .* SLURM_ARRAY_TASK_ID .* is set"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "give --shard auto/n with the completions of the job"),
        ("auto", {"RANK": "1"}, "WORLD_SIZE is not set"),
        ("auto", {"WORLD_SIZE": "2"}, "RANK is not set"),
        ("auto", {"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first', which is no number"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK gives number 2, counted from 0, of 2; expected 0 to 1"),
        ("auto", {"SLURM_PROCID": "0"}, "SLURM_NTASKS is not set"),
        ("auto", {"SLURM_NTASKS": "2"}, "SLURM_PROCID is not set"),  # salloc without srun
        ("auto", BATCH | {"SLURM_NTASKS": "4"}, "SLURM_STEP_ID is not set: this is no task of srun"),
        ("auto", ARRAY | BATCH | {"SLURM_NTASKS": "4"}, "SLURM_STEP_ID is not set: this is no task of srun"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "9"}, "SLURM_ARRAY_TASK_ID gives number 4"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_MAX": "20"}, "4 tasks of the SLURM array from 5 to 20 are not evenly"),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_STEP": "2"}, "not evenly spaced"),
        ("auto/3", {}, "JOB_COMPLETION_INDEX is not set"),
        ("auto/3", {"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX gives number 3"),
    ],
)
def test_a_wrong_or_missing_part_is_refused(value: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_shard(value, environment)


@pytest.mark.parametrize("command", ["segment", "anomaly"])
def test_the_commands_say_in_one_line_which_variable_is_missing(
    command: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    scan = tmp_path_factory.mktemp("shards") / "scan.nii.gz"
    scan.touch()
    result = medseg(command, scan, "--shard", "auto/4")
    assert result.exit_code == 2
    assert error_lines(result) == [
        "medseg: error: --shard auto/4: the environment variable JOB_COMPLETION_INDEX is not set"
    ]

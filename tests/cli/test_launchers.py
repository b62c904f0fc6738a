"""The place of a training process among others, and what is said when the environment does not add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from medseg_cli._launchers import first_node, rendezvous

from medseg_diffusion.errors import UsageError
from tests.helpers.cli import error_lines, medseg

SHARED = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **SHARED}
TASK = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
NODES = TASK | {"SLURM_JOB_NODELIST": "node[007-008]"}
ALONE = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4"}
POD = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train"}
SLURM_PORT = {"MASTER_PORT": "19711"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (TORCHRUN, TORCHRUN),
        (TORCHRUN | NODES, TORCHRUN),  # srun has started torchrun
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, {}),
        ({key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}, TORCHRUN | {"LOCAL_RANK": "0"}),
        ({**NODES, **SHARED, "RANK": "3", "WORLD_SIZE": "4"}, TORCHRUN),  # a script for srun has set these two
        (NODES, {**TORCHRUN, "MASTER_ADDR": "node007", **SLURM_PORT}),
        (NODES | {"SLURM_STEP_NODELIST": "node008"}, {**TORCHRUN, "MASTER_ADDR": "127.0.0.1", **SLURM_PORT}),
        (NODES | SHARED, TORCHRUN),  # what is set by hand counts
        (NODES | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}),
        (ALONE, {}),  # a shell of salloc
        (ALONE | {"SLURM_PROCID": "0"}, {}),  # a batch script
        (NODES | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, {}),  # an interactive step of salloc
        (POD, {**TORCHRUN, "LOCAL_RANK": "0", "MASTER_ADDR": "train-0.train", "MASTER_PORT": "29500"}),
        ({"JOB_COMPLETION_INDEX": "3"}, {}),  # a job of independent pods
    ],
)
def test_places(environment: dict[str, str], expected: dict[str, str]) -> None:
    assert rendezvous(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (TORCHRUN | {"RANK": "4"}, "RANK gives number 4, counted from 0, of 4; expected 0 to 3"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', which is no number"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', which is no number"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK gives number 4, counted from 0, of 4"),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "0"}, "RANK is set, but the number of processes is 0"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is 0; expected 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; expected 1 to 65535"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set; the 4 processes need it"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({**NODES, "SLURM_NTASKS": "3"}, "SLURM_PROCID gives number 3"),
        ({key: value for key, value in NODES.items() if key != "SLURM_NTASKS"}, "SLURM_NTASKS is not set"),
        ({key: value for key, value in NODES.items() if key != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        (TASK, "SLURM_JOB_NODELIST is not set"),
        (TASK | {"SLURM_JOB_NODELIST": " "}, "SLURM_JOB_NODELIST is ' ', which is no list of nodes"),
        (POD | {"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX gives number 4"),
        (POD | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_what_is_missing_or_contradictory_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rendezvous(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node003", "127.0.0.1"),
        ("node003,node004", "node003"),
        ("node[003-010,12],login1", "node003"),
        ("rack[1-2]node[05,07-09]", "rack1node05"),
        ("gpu-a.example.org,gpu-b.example.org", "gpu-a.example.org"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_all_tasks_of_a_job_meet_at_one_place() -> None:
    tasks = [NODES | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % 2)} for i in range(4)]
    found = [rendezvous(task) for task in tasks]
    assert [task.pop("RANK") for task in found] == ["0", "1", "2", "3"]
    assert [task.pop("LOCAL_RANK") for task in found] == ["0", "1", "0", "1"]
    assert all(task == found[0] for task in found)
    other = rendezvous(NODES | {"SLURM_STEP_ID": "1"})
    assert other["MASTER_PORT"] != found[0]["MASTER_PORT"], "two steps of a job may run at the same time"


# ---- the commands ----------------------------------------------------------------------------------------------------

COMMANDS = {
    "train-segmenter": ["ensemdiff-hippocampus-small", "--data", "DATA"],
    "train-generator": ["adm-tiny-imagenet-small", "--data", "DATA"],
    "train-anomaly": ["anomaly-partial-noise-small", "--healthy", "DATA"],
    "train-pixel-classifier": ["label-efficient", "--data", "DATA", "--labelled", "1", "--generator", "flair-anomaly"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (TORCHRUN | {"RANK": "9"}, [], "RANK gives number 9, counted from 0, of 4; expected 0 to 3"),
        (TORCHRUN, ["--gpus", "3"], "--gpus 3, but the launcher has started 4 processes"),
        (TORCHRUN, ["--device", "cuda:1"], "--device cuda:1: several processes take one GPU each"),
        ({}, ["--gpus", "2", "--device", "cuda:1"], "--device cuda:1: several processes take one GPU each"),
        ({}, ["--gpus", "2", "--device", "cuda"], "'cuda' asked for, but 0 CUDA devices found"),
    ],
)
def test_every_training_command_refuses_them_in_one_line(
    command: str,
    environment: dict[str, str],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [str(tmp_path) if word == "DATA" else word for word in COMMANDS[command]]
    result = medseg(command, *words, "-o", tmp_path / "run", *options)
    (line,) = error_lines(result)
    assert result.exit_code == 2 and message in line
    assert not (tmp_path / "run").exists()

"""Trainings that a scheduler or a user stops: the exit code, the line, and what is left to go on with."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import time
from pathlib import Path

import pytest
import yaml

from medseg_diffusion.training.resume import Checkpoints
from tests.helpers import pixel_classifiers, training
from tests.helpers.commands import LAUNCHERS, ended, start, wait_until
from tests.helpers.training import assert_same, resume_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="times and children are read in /proc")

SECONDS = 5.0
"""That a small training may compute until it has stopped; of its own time, not of that of a busy machine."""
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


@pytest.fixture
def words(block_scans: Path, tmp_path: Path) -> list[object]:
    """A training of a segmenter that would take hours."""
    config = training.config(max_steps=100_000, validate_every=50_000, checkpoint_steps=2)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return ["train-segmenter", file, "--data", block_scans, "-o", tmp_path / "run", "--device", "cpu"]


def has_begun(run: Path) -> bool:
    return bool(Checkpoints(run).files())


def children_seconds() -> float:
    """The time that processes have computed that this one has started, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_of(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[] if number == signal.SIGTERM else pytest.mark.slow) for number in CODES]
)
def test_a_stopped_training_says_how_to_go_on(number: signal.Signals, words: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    others = children_seconds()
    process = start(words)
    wait_until(lambda: has_begun(run), [process])
    before = seconds_of(process.pid)
    os.killpg(process.pid, number)
    ((code, out, err),) = ended([process])
    assert children_seconds() - others - before < SECONDS
    assert code == CODES[number] and not out and "Traceback" not in err
    (line,) = err.strip().splitlines()
    step = resume_file(run)["state"]["step"]
    assert not list(run.rglob("*.tmp"))
    if number == signal.SIGINT:
        assert line == "medseg: stopped: interrupted"
        return
    says = (
        f"medseg: stopped: {number.name}: stopped after step {step} of 100000, which is saved; continue with: medseg "
    )
    assert line.startswith(says)
    again = shlex.split(line.removeprefix(says))
    assert again == [*map(str, words), "--resume"]
    ((code, out, err),) = ended([start([*again, "--max-steps", step + 2])])
    assert code == 0, err
    assert f"{step + 2} of 100000 steps, ended by --max-steps" in out.splitlines()
    assert out.splitlines()[-1] == f"next: {shlex.join(['medseg', *again])}"
    whole = [tmp_path / "whole" if word == run else word for word in words]
    ((code, out, err),) = ended([start([*whole, "--max-steps", step + 2])])
    assert code == 0, err
    assert_same(resume_file(run), resume_file(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("launcher", "to", "codes"),
    [
        ("--gpus 2", "launcher", {75}),
        ("--gpus 2", "group", {75}),  # as srun sends it
        ("--gpus 2", "one", {75}),
        ("srun", "launcher", {75}),  # every task gets it
        ("srun", "one", {75}),  # only one does, and the other one stops with it
        ("torchrun", "one", {1}),  # torchrun has an exit code of its own
    ],
)
def test_all_processes_stop_together(
    launcher: str, to: str, codes: set[int], number: signal.Signals, words: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    processes = LAUNCHERS[launcher](words)
    wait_until(lambda: has_begun(run), processes)
    if to == "group":
        os.killpg(processes[0].pid, number)
    elif to == "one" and launcher != "srun":
        os.kill(_children(processes[0].pid)[-1], number)
    else:
        for process in processes[: 1 if to == "one" else None]:
            process.send_signal(number)
    results = ended(processes)
    assert {code for code, _, _ in results} == codes, results
    said = "".join(err for _, _, err in results)
    assert said.count("continue with: medseg train-segmenter") == 1
    step = resume_file(run)["state"]["step"]
    assert f"stopped after step {step} of 100000" in said
    assert "another process ended early" not in said


def _children(parent: int) -> list[int]:
    """The processes that ``parent`` has started, by number."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == parent:
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
def test_a_signal_before_the_training_leaves_nothing(words: list[object], tmp_path: Path) -> None:
    """While data are prepared. The same command starts the run."""
    run = tmp_path / "run"
    process = start(words)
    wait_until(lambda: (run / "cache").is_dir(), [process])
    process.send_signal(signal.SIGUSR1)
    ((code, _, err),) = ended([process])
    assert code == 75 and "continue with: medseg train-segmenter" in err and "Traceback" not in err
    assert not list(run.rglob("*.tmp"))
    resume = ["--resume"] if err.strip().endswith("--resume") else []
    ((code, _, err),) = ended([start([*words, *resume, "--max-steps", 1])])
    assert code == 0, err


@pytest.mark.slow
def test_pixel_classifiers_are_not_left_half_trained(
    box_scans: Path, box_generators: dict[int, Path], tmp_path: Path
) -> None:
    config = pixel_classifiers.quick().model_dump(mode="json")
    config["classifier"] |= {"members": 500, "min_steps": 10_000}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    command = ["train-pixel-classifier", tmp_path / "config.yaml", "--generator", box_generators[2], "--labelled", 2]
    command += ["--data", box_scans, "-o", run, "--device", "cpu"]
    process = start(command)
    wait_until(lambda: (run / "cache" / "features.npy").is_file(), [process])
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    ((code, _, err),) = ended([process])
    assert code == 75 and err.strip().endswith(f"continue with: {shlex.join(['medseg', *map(str, command)])}")
    assert not run.exists() or not list(run.iterdir())

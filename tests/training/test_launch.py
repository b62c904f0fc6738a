"""Several processes on one machine: who they are, and what comes back when one fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medseg_diffusion.errors import MedsegError
from medseg_diffusion.training.launch import launch

WHO = """
import os, pathlib, sys
name = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}, {os.environ['LOCAL_RANK']} here"
pathlib.Path(sys.argv[1], name).touch()
"""
FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(3)
time.sleep(60)
"""
SAVES = """
import os, pathlib, signal, sys, time
def save(number, frame):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "saved" + os.environ["RANK"]).touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path(sys.argv[1], "ready" + os.environ["RANK"]).touch()
time.sleep(60)
"""
KILLED = """
import os, signal, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_every_process_knows_its_place(tmp_path: Path) -> None:
    assert launch([sys.executable, "-c", WHO, str(tmp_path)], 2) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0 of 2, 0 here", "1 of 2, 1 here"}


def test_the_exit_code_of_the_first_failure_comes_back_and_nobody_waits_for_the_others() -> None:
    assert launch([sys.executable, "-c", FAILS], 2) == 3


def test_a_process_that_was_killed_is_named() -> None:
    with pytest.raises(MedsegError, match="process 1 of 2 was ended by SIGKILL"):
        launch([sys.executable, "-c", KILLED], 2)


def test_ctrl_c_reaches_every_process_and_waits_for_what_they_save(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVES, str(tmp_path)]
    stop = f"from medseg_diffusion.training.launch import launch; launch({command}, 2)"
    parent = subprocess.Popen([sys.executable, "-c", stop], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    _, printed = parent.communicate(timeout=60)
    assert parent.returncode == -signal.SIGINT and printed.strip().endswith("KeyboardInterrupt"), printed
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_a_failure_is_told_once_and_its_exit_code_kept(tmp_path: Path) -> None:
    """The folder is there, so that it is the processes that find nothing in it."""
    medseg = Path(sys.executable).with_name("medseg")
    (tmp_path / "none").mkdir()
    command = [medseg, "train-segmenter", "baseline-hippocampus-small", "-o", tmp_path / "run", "--device", "cpu"]
    found = subprocess.run([*command, "--data", tmp_path / "none", "--gpus", "2"], capture_output=True, text=True)
    assert found.returncode == 3, found.stderr
    assert found.stderr.count("found neither dataset.json nor images/") == 1 and "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists(), "the call can be corrected and given again"

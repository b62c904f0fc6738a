"""Runs that are killed, and runs in several processes, end with the files of one run that nobody disturbed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medseg_diffusion.workflows.results_table import read_table
from tests.helpers.segmenters import save

COMMAND = [sys.executable, "-c", "from medseg_cli.main import app; app()"]
LAUNCHER = ("RANK", "WORLD_SIZE", "SLURM_", "JOB_COMPLETION_INDEX")


def start(scans: Path, model: Path, output: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """`medseg segment` with maps, so that much of the time goes into writing."""
    words = ["--device", "cpu", "--skip-existing", "--save-probabilities", "--save-uncertainty"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    return subprocess.Popen(
        [*COMMAND, "segment", str(scans), "-m", str(model), "-o", str(output), *words, *options],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included, but for the tables, which hold times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".csv"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def volumes(folder: Path) -> dict[str, str]:
    """Name of the scan -> volume, in all tables of a folder."""
    rows = [row for path in folder.glob("volumes*.csv") for row in read_table(path)]
    assert len({row["scan"] for row in rows}) == len(rows)
    return {Path(row["scan"]).name: row["bright_volume_ml"] for row in rows}


def wait_for(process: subprocess.Popen[str], scans: int) -> None:
    """Wait until so many scans are done or skipped."""
    assert process.stdout is not None
    while scans > 0:
        line = process.stdout.readline()
        assert line, "the process has ended"
        scans -= "segmentation: " in line


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def twenty_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twenty")
    for i in range(20):
        save(folder / f"case{i:02d}.nii.gz", np.random.default_rng(i).random((20, 18, 16)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def undisturbed(twenty_scans: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The output folder of one run, and the seconds from its first result to its end."""
    output = tmp_path_factory.mktemp("undisturbed")
    process = start(twenty_scans, tiny_model, output)
    wait_for(process, 1)
    began = time.monotonic()
    finish(process)
    assert len(contents(output)) == 61, "three files for each scan, and the names of the classes"
    return output, time.monotonic() - began


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_whole_files_and_the_same_command_does_the_rest(
    kills: int, twenty_scans: Path, tiny_model: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = contents(undisturbed[0]), undisturbed[1]
    moments = random.Random(kills)
    finished: list[int] = []
    for scans in sorted(moments.sample(range(1, 18), kills)):
        process = start(twenty_scans, tiny_model, tmp_path)
        wait_for(process, scans)
        time.sleep(moments.uniform(0, seconds / 20))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = {name: content for name, content in contents(tmp_path).items() if not name.startswith(".")}
        assert whole.items() <= expected.items()
        # The first scan of each call is in the table at once, later ones after ten seconds at most.
        assert volumes(tmp_path) and volumes(tmp_path).items() <= volumes(undisturbed[0]).items()
        finished.append(len([name for name in whole if name.endswith("_seg.nii.gz")]))
    assert finished == sorted(finished) and 0 < finished[0] < 20, "the kills came while scans were segmented"
    finish(start(twenty_scans, tiny_model, tmp_path))
    assert contents(tmp_path) == expected and volumes(tmp_path) == volumes(undisturbed[0])
    assert len(volumes(tmp_path)) == 20
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing temporary is left"


def test_two_processes_give_the_files_of_one(
    twenty_scans: Path, tiny_model: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    ranks = [
        start(twenty_scans, tiny_model, tmp_path, "--shard", "auto", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)
    ]
    shares = [len([line for line in finish(rank).splitlines() if "segmentation: " in line]) for rank in ranks]
    assert sum(shares) == 20 and min(shares) > 0
    assert contents(tmp_path) == contents(undisturbed[0]) and volumes(tmp_path) == volumes(undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "by", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_stopped_run_leaves_no_temporary_file(
    number: signal.Signals,
    by: str,
    code: int,
    twenty_scans: Path,
    tiny_model: Path,
    undisturbed: tuple[Path, float],
    tmp_path: Path,
) -> None:
    process = start(twenty_scans, tiny_model, tmp_path)
    wait_for(process, 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    (line,) = err.splitlines()
    assert re.fullmatch(
        f"medseg: stopped: {by} after [0-9]+ of 20 scans; the same command with --skip-existing goes on", line
    )
    files = contents(tmp_path)
    assert files.items() <= contents(undisturbed[0]).items()
    of_scans = files.keys() - {"dseg.tsv"}
    assert 0 < len(of_scans) < 60 and len(of_scans) % 3 == 0, "the last result is whole"
    assert len(volumes(tmp_path)) == len(of_scans) // 3, "the table has it, too"

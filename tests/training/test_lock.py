"""A run folder is trained by one process at a time, and no lock outlives its process."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medseg_diffusion.errors import UsageError
from medseg_diffusion.training.lock import hold, holding_runs
from medseg_diffusion.workflows.train_generator import train_generator
from tests.helpers.generators import small_config

fcntl = pytest.importorskip("fcntl", reason="this system has no locks")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    return tmp_path


def test_a_run_that_is_being_trained_is_refused_and_goes_on(pictures: Path, tmp_path: Path) -> None:
    """The second process would remove what the first one is writing."""
    run, refused = tmp_path / "run", []

    def again(progress: object) -> None:
        with pytest.raises(UsageError, match="run: is being trained by another process; wait") as error:
            train_generator(config, pictures, run, resume=True, device="cpu")
        refused.append(error)

    config = small_config("pixel")
    model = train_generator(config, pictures, run, device="cpu", on_step=again)
    assert len(refused) == 2
    before = yaml.safe_load((run / "config.yaml").read_text())
    train_generator(config, pictures, run, resume=True, device="cpu")
    assert yaml.safe_load((run / "config.yaml").read_text()) == before and model.is_dir()


def test_a_killed_process_leaves_nothing_locked(run: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from medseg_diffusion.training.lock import hold, holding_runs\n"
        "with holding_runs(): hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with holding_runs(), pytest.raises(UsageError, match="another process"):
            hold(run)
        other.kill()
    with holding_runs():
        hold(run)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_failed_training_leaves_nothing_locked(run: Path) -> None:
    """Notebooks go on in the same process, and keep the frames of the last error."""
    with pytest.raises(ValueError) as kept, holding_runs():
        hold(run)
        raise ValueError
    with holding_runs():
        hold(run)
    assert kept.traceback


def test_a_file_system_without_locks_stops_no_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def flock(file: object, operation: int) -> None:
        tried.append(operation)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with holding_runs():
        hold(run)
    assert len(tried) == 1
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    with holding_runs():
        hold(run)
    assert len(tried) == 1 and [path.name for path in run.iterdir()] == ["config.yaml"]

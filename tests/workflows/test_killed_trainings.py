"""Trainings that are killed at any moment and resumed end as if nothing had happened: losses, weights, model, log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg_diffusion.training.history import read_history
from medseg_diffusion.training.resume import Checkpoints
from tests.helpers.training import ROOT, assert_same, resume_file, scores

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks, which this system has not")

FAMILIES = [
    "ensemdiff",
    "categorical",
    "baseline",
    "probabilistic-unet",
    "latent-mask",
    "pixel",
    "latent",
    "anomaly",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the first of the processes: this one shall not import what it needs."""
    return tmp_path_factory.mktemp("kills") / "data"


def trainings(run: Path) -> list[Path]:
    """The folders of a run that hold a training, relative to it: those of its stages, too."""
    return sorted(path.parent.relative_to(run) for path in run.rglob("checkpoints"))


@pytest.mark.parametrize(
    ("family", "kills"),
    [("ensemdiff", 3), *(pytest.param(family, 20, marks=pytest.mark.slow) for family in FAMILIES)],
)
def test_a_killed_training_ends_as_one_that_nobody_killed(family: str, kills: int, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.kills", family, str(data), str(tmp_path / "runs"), str(kills)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["places"]) == kills and result["finished"]
    if kills > 10:
        assert len(set(result["places"])) > 4, "the kills came at different steps"
    whole = tmp_path / "runs" / "whole"
    assert trainings(whole)
    for run in map(Path, result["finished"]):
        assert trainings(run) == trainings(whole)
        for part in trainings(whole):
            expected, found = read_history(whole / part), read_history(run / part)
            np.testing.assert_array_equal(found.steps, expected.steps)
            np.testing.assert_array_equal(found.loss, expected.loss)
            np.testing.assert_array_equal(found.gradient_norm, expected.gradient_norm)
            assert_same(resume_file(run / part), resume_file(whole / part))
            assert scores(run / part) == scores(whole / part)
            assert len(Checkpoints(run / part).files()) == 2
        name = Path("model") / "weights.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()
        assert not [file for file in run.rglob(".*") if "cache" not in file.parts], "nothing temporary is left"

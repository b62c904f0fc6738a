"""docs/scaling.md: its scripts and its manifest are run as they stand, in the environment that a cluster would give."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from medseg_diffusion.workflows.scans import part_of
from tests.helpers.segmenters import make_model, save, tiny_config

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
SHELL, MANIFEST = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL), re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with four scans, one of them damaged, a model and the command."""
    for i in range(3):
        save(tmp_path / "scans" / f"s{i}.nii.gz", np.random.default_rng(i).random((9, 8, 7)).astype(np.float32))
    (tmp_path / "scans" / "bad.nii.gz").write_bytes(b"no scan")
    make_model(tmp_path / "my-model", tiny_config())
    command = tmp_path / "bin" / "medseg"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom medseg_cli.main import app\napp()\n")
    command.chmod(0o755)
    return tmp_path


def bash(site: Path, script: str, **environment: str) -> int:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD_SIZE", "SLURM_"))}
    path = f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script], cwd=site, env={**kept, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    ).returncode


def masks(site: Path) -> list[str]:
    return sorted(path.name for path in (site / "results").glob("*_seg.nii.gz"))


def script_with(text: str) -> str:
    (script,) = (script for script in SHELL if text in script)
    return script


def test_one_process_and_the_processes_of_one_machine(site: Path) -> None:
    assert bash(site, script_with("results.jsonl")) == 1  # one scan is damaged
    assert len((site / "results.jsonl").read_text().splitlines()) == 4
    assert masks(site) == [f"s{i}_seg.nii.gz" for i in range(3)]
    for mask in masks(site):
        (site / "results" / mask).unlink()
    assert bash(site, script_with("CUDA_VISIBLE_DEVICES")) == 0  # of `wait`
    assert masks(site) == [f"s{i}_seg.nii.gz" for i in range(3)]


def test_the_array_and_the_list_of_all_failures(site: Path) -> None:
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
    # What sbatch sets for the tasks of this array, but for two of them.
    codes = [bash(site, script_with("#SBATCH"), **array, SLURM_ARRAY_TASK_ID=str(i), SLURM_PROCID="0") for i in (0, 1)]
    assert sorted(codes) == [0, 1] and masks(site) == [f"s{i}_seg.nii.gz" for i in range(3)]
    assert bash(site, script_with("awk").replace("of-200", "of-2")) == 0
    with (site / "failures.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["scan"], row["exit_code"]) == ("scans/bad.nii.gz", "3")


def test_the_indexed_job(site: Path) -> None:
    job = yaml.safe_load(MANIFEST[0])["spec"]
    (container,) = job["template"]["spec"]["containers"]
    words = [word.replace("/data/", f"{site}/") for word in container["command"]]
    assert job["completionMode"] == "Indexed" and f"auto/{job['completions']}" in words
    scans = sorted((site / "scans").iterdir())
    count = job["completions"]
    indices = [i for i in range(count) if part_of({scan: {} for scan in scans}, (i + 1, count))]
    codes = [bash(site, " ".join(words), JOB_COMPLETION_INDEX=str(index)) for index in indices]
    assert 0 in codes and len([code for code in codes if code]) == 1
    assert masks(site) == [f"s{i}_seg.nii.gz" for i in range(3)]
    assert len(list((site / "results").glob("failures.*-of-200.csv"))) == 1

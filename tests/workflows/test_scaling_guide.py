"""docs/how-to/cluster.md: its scripts and manifest are run as they stand, in the environment of a cluster."""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

from medseg_diffusion.errors import InputError, ModelError, Stopped, UsageError
from medseg_diffusion.workflows.scans import part_of
from tests.helpers.segmenters import make_model, save, tiny_config
from tests.helpers.training import config, resume_file

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "cluster.md").read_text()
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
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RANK", "WORLD_SIZE", "MASTER_", "SLURM_"))
    }
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
    codes = [bash(site, script_with("--array"), **array, SLURM_ARRAY_TASK_ID=str(i), SLURM_PROCID="0") for i in (0, 1)]
    assert sorted(codes) == [0, 1] and masks(site) == [f"s{i}_seg.nii.gz" for i in range(3)]
    assert bash(site, script_with("failures.*").replace("of-200", "of-2")) == 0
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


# ---- training --------------------------------------------------------------------------------------------------------

SRUN = """
import os, pathlib, signal, subprocess, sys, time
run = pathlib.Path("runs/mine")
first = not (run / "config.yaml").exists()
words = [word for word in sys.argv[1:] if word != "--kill-on-bad-exit=0"]
of_task = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node1"}
tasks = [
    subprocess.Popen(words, env={**os.environ, **of_task, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in (0, 1)
]
while first and not list(run.glob("checkpoints/*.pt")) and all(task.poll() is None for task in tasks):
    time.sleep(0.05)
for task in tasks if first else ():
    task.send_signal(signal.SIGUSR1)
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def training_site(tmp_path: Path, block_scans: Path) -> Path:
    """A folder with labelled scans, a configuration, the command, and what stands for SLURM's commands."""
    for name in ("data", "labelled"):
        shutil.copytree(block_scans, tmp_path / name)
    changes = config(max_steps=40, validate_every=40, checkpoint_steps=1).model_dump(mode="json")
    (tmp_path / "my-config.yaml").write_text(yaml.safe_dump(changes))
    commands = {
        "medseg": "from medseg_cli.main import app\napp()\n",
        "srun": SRUN,
        "scontrol": "import sys\nopen('requeued', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n",
    }
    (tmp_path / "bin").mkdir()
    for name, code in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{code}")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_the_training_is_queued_again_and_goes_on(training_site: Path) -> None:
    script = script_with("--signal=USR1@60").replace("medseg train-segmenter", "medseg train-segmenter --device cpu")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert bash(training_site, script, **job) == 75
    step = resume_file(training_site / "runs" / "mine")["state"]["step"]
    assert 0 < step < 40 and (training_site / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert bash(training_site, script, **job) == 0
    assert resume_file(training_site / "runs" / "mine")["state"]["step"] == 40
    assert len((training_site / "requeued").read_text().splitlines()) == 1


def test_the_training_job_of_kubernetes(training_site: Path) -> None:
    """Its pods find each other, and what their exit codes mean is what the manifest says."""
    service, job = yaml.safe_load_all(MANIFEST[1])
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert int(variables["WORLD_SIZE"]) == spec["completions"] == spec["parallelism"] == 2
    name = job["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{spec['template']['spec']['subdomain']}"
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    actions = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {
        Stopped.exit_code: "Ignore",
        **{kind.exit_code: "FailJob" for kind in (UsageError, InputError, ModelError)},
    }
    (script,) = container["args"]
    script = script.replace("/data/", f"{training_site}/").replace("train-segmenter", "train-segmenter --device cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ThreadPoolExecutor() as pods:
        codes = list(pods.map(lambda i: bash(training_site, script, **there, JOB_COMPLETION_INDEX=i), ("0", "1")))
    assert codes == [0, 0] and resume_file(training_site / "runs" / "mine")["state"]["step"] == 40

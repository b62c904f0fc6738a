"""`make gpu` rehearsed on the CPU: every part runs, an overlong one is stopped, and a line says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.brains import write_label_maps
from tests.helpers.tiny_imagenet import jpeg, tiny_imagenet

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GPU), *map(str, arguments)]
    # Children of the tests import the package from where the tests do, and keep the threads apart.
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu.json").read_text())


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run("--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("make gpu: no CUDA device") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_data_is_named_before_anything_runs(tmp_path: Path) -> None:
    done = run("--rehearse", "--data", tmp_path / "none.zip", "--out", tmp_path / "out")
    assert done.returncode == 2 and "none.zip: not found; name Tiny ImageNet" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_that_overruns_is_stopped_and_the_next_one_runs(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run("--rehearse", "--part", "throughput", "tests", "--limit", 1, "--out", tmp_path)
    parts = result(tmp_path)["parts"]
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert list(parts) == ["throughput", "tests"] and parts["throughput"]["ended"] == "stopped"


STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(600)
"""


def gone(process: int) -> bool:
    """Whether a process has ended, or is about to be forgotten by its new parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("ended_by", ["limit", "SIGTERM"])
def test_no_child_of_a_part_is_left(ended_by: str, tmp_path: Path) -> None:
    """A child that ignores SIGTERM ends, too, at the limit and where a scheduler ends the whole."""
    log, limit = tmp_path / "log", 6 if ended_by == "limit" else 600
    code = f"""
import sys, common
common.STOPPING = 1.0
common.end_at_sigterm()
with open({str(log)!r}, "w") as log:
    print(common.limited([sys.executable, "-c", {STUBBORN!r}], {limit}, log))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=GPU.parent, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while process.poll() is None and not (log.exists() and log.read_text().strip()):
        time.sleep(0.02)
    if ended_by == "SIGTERM":
        process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if ended_by == "limit" else 143)
    assert ("stopped" in out) == (ended_by == "limit")
    child = int(log.read_text())
    while not gone(child):
        assert time.monotonic() < until, "it computes on"
        time.sleep(0.02)


@pytest.mark.slow
def test_the_tests_are_counted(tmp_path: Path) -> None:
    done = run("--rehearse", "--part", "tests", OUT=str(tmp_path / "elsewhere"))
    part = result(tmp_path / "elsewhere")["parts"]["tests"]
    assert done.returncode == 0 and part["ended"] == "done"
    assert part["tests"] > 0 and (part["failures"], part["errors"]) == (0, 0)


@pytest.mark.slow
def test_throughput_of_all_presets_beside_others(tmp_path: Path) -> None:
    assert run("--rehearse", "--part", "throughput", "--out", tmp_path).returncode == 0
    rows = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    measured = {(row["preset"], row["network"]) for row in rows if "seconds" in row}
    for preset in ("adm-tiny-imagenet", "ldm-tiny-imagenet", "medsegdiff-isic", "ensemdiff-hippocampus-small"):
        assert {(preset, "ours"), (preset, "MONAI")} <= measured
        whats = {row["what"] for row in rows if row["preset"] == preset and row.get("network") == "ours"}
        assert whats == {"evaluation", "training step"}
    assert all(row["seconds"] > 0 and row["gflop_per_sample"] > 0 for row in rows if "seconds" in row)


@pytest.mark.slow
def test_generators_leave_pictures_and_scores(tmp_path: Path) -> None:
    data = tiny_imagenet(tmp_path / "data", per_class=6)
    for i in range(10):
        (data / "test" / "images" / f"test_more_{i}.JPEG").write_bytes(jpeg(20 * i))
    done = run("--rehearse", "--part", "generators", "--data", data, "--out", tmp_path / "out")
    assert done.returncode == 0, (tmp_path / "out" / "generators.log").read_text()
    content = json.loads((tmp_path / "out" / "generators.json").read_text())
    assert [numbers["steps"] for numbers in content["trainings"].values()] == [2, 2, 2]
    scored = [row["model"] for row in content["scores"]["rows"]]
    assert scored == ["real images (floor)", "ldm-tiny-imagenet", "adm-tiny-imagenet"]
    for name in ("autoencoder-tiny-imagenet", "ldm-tiny-imagenet", "adm-tiny-imagenet"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width >= 64


@pytest.mark.slow
def test_the_brain_model_is_left_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from medseg_diffusion.models.load import load_segmenter

    maps = write_label_maps(tmp_path / "maps")
    done = run("--rehearse", "--part", "brain", "--labelmaps", maps, "--out", tmp_path / "out")
    assert done.returncode == 0, (tmp_path / "out" / "brain.log").read_text()
    assert load_segmenter(tmp_path / "out" / "model", "cpu").labels[2] == "grey matter"
    assert json.loads((tmp_path / "out" / "brain.json").read_text())["steps"] == 2
    assert (tmp_path / "out" / "brain.csv").read_text().startswith("step,")
    weights = load_file(tmp_path / "out" / "model" / "weights.safetensors").values()
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float16}, "twice the size"
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) < 16_000_000

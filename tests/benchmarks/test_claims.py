"""`make bench`: every benchmark of a claim runs with its smallest sizes, and writes what performance.md quotes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CLAIMS = ("start", "unet", "samplers", "data", "segment", "metrics", "label_efficient", "anomaly", "scaling")
SHORT = ("samplers",)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("claim", [pytest.param(c, marks=() if c in SHORT else pytest.mark.slow) for c in CLAIMS])
def test_a_benchmark_compares_ours_with_a_peer(claim: str, tmp_path: Path) -> None:
    done = run(f"{claim}.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / f"{claim}.json").read_text())
    assert content["claim"] == claim and content["quick"] is True and "?" in content["question"]
    assert {"cpu", "cores", "threads", "torch"} <= set(content["machine"])
    assert content["rows"]
    for row in content["rows"]:
        assert row["peer"] and row["what"] and row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
        if row["theirs"] is None:
            assert row["times_better"] is None
        else:
            assert row["times_better"] == pytest.approx(row["theirs"]["median"] / row["ours"]["median"])


@pytest.mark.slow
def test_all_claims_make_one_table(tmp_path: Path) -> None:
    done = run("run.py", "--quick", "--only", "start", "samplers", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text in done.stdout and re.findall(r"^## (\w+)", text, re.MULTILINE) == ["start", "samplers"]


def test_the_benchmark_of_processes_starts_the_command_of_its_own_environment(tmp_path: Path) -> None:
    """`make bench` runs where .venv/bin is not on the PATH."""
    code = "import scaling; scaling.subprocess.run = lambda command, **options: exit(command[0]); "
    code += "from pathlib import Path; scaling.seconds(Path('d'), Path('r'), 1, 2, 4)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.stderr.strip() == str(Path(sys.executable).with_name("medseg"))


def test_a_benchmark_that_takes_too_long_is_named(tmp_path: Path) -> None:
    done = run("run.py", "--quick", "--only", "samplers", "--limit", 0.01, "--out", tmp_path)
    assert done.returncode == 1 and "failed: samplers" in done.stderr


def test_all_claims_are_documented() -> None:
    """The folder, its README, the page and `make bench` name the same scripts."""
    others = {"brain_peers", "common", "run", "gpu", "gpu_throughput", "gpu_training"}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - others == set(CLAIMS)
    listed = re.search(r"^CLAIMS = \((.*)\)$", (BENCHMARKS / "run.py").read_text(), re.MULTILINE)
    assert listed is not None and tuple(re.findall(r"\w+", listed[1])) == CLAIMS
    readme, page = (
        (BENCHMARKS / "README.md").read_text(),
        (ROOT / "docs" / "explanation" / "performance.md").read_text(),
    )
    for claim in CLAIMS:
        assert f"`{claim}.py`" in readme
        assert f"benchmarks/{claim}.py" in page

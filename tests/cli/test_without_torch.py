"""What needs no network answers at once: lists, help, wrong usage and mistyped names import neither torch nor MONAI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from medseg_cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as error:
    status = error.code or 0
print(sorted({"torch", "monai", "nibabel", "scipy", "SimpleITK"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["segment", "--help"], 0),
        (["models", "list"], 0),
        (["models", "show", "hippocampus-t1"], 0),
        (["models", "show", "hippocampus"], 4),
        (["configs", "list"], 0),
        (["configs", "show", "segdiff-hippocampus-small"], 0),
        (["segment", "nowhere.nii.gz"], 3),
        (["segment", "scan.nii.gz", "-m", "no-model"], 4),
        (["segment", "scan.nii.gz", "--shard", "3/2"], 2),
        (["anomaly", "scan.nii.gz", "--shard", "auto/3"], 2),
        (["segment", "scan.nii.gz", "--device", "gpu"], 2),
        (["anomaly", "nowhere.nii.gz"], 3),
        (["evaluate", "nowhere", "scan.nii.gz", "-o", "out"], 3),
        (["check", "nowhere"], 3),
        (["sample", "no-model", "-o", "out"], 4),
        (["train-segmenter", "segdif-hippocampus-small", "--data", ".", "-o", "run"], 2),
        (["train-segmenter", "segdiff-hippocampus-small", "--data", "nowhere", "-o", "run"], 3),
        (["train-segmenter", "segdiff-hippocampus-small", "--set", "data.windw=1", "--data", ".", "-o", "run"], 2),
        (["train-generator", "segdiff-hippocampus-small", "--data", ".", "-o", "run"], 2),
        (["train-anomaly", "segdiff-hippocampus-small", "--healthy", ".", "-o", "run"], 2),
        (["benchmark-segmenter", "no-model", "--data", ".", "-o", "out"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_answers_without_importing_torch(arguments: list[str], status: int, tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").touch()
    result = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == status, result.stderr
    assert result.stderr.splitlines()[-1] == "[]"
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]

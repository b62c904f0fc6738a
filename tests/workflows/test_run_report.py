"""The report on a run: complete, strict JSON, the same as --json, and written also if the run is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.volumes.sources import InputOptions
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly
from medseg_diffusion.workflows.scans import ScanResult
from medseg_diffusion.workflows.segment import SegmentOptions, segment
from tests.helpers.cli import error_lines, medseg
from tests.helpers.dicom_series import series
from tests.helpers.segmenters import run, save


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def read(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=refuse_constant)


def test_what_was_used_and_what_became_of_every_scan(tmp_path: Path, tiny_model: Path) -> None:
    scans = [save(tmp_path / "in" / f"{name}.nii.gz") for name in ("a", "bb", "ccc")]
    scans[1].write_bytes(b"not an image")
    file = tmp_path / "reports" / "run.json"
    file.parent.mkdir()
    run(scans[:1], tiny_model, output=tmp_path / "out")
    options = ("-m", tiny_model, "-o", tmp_path / "out", "--device", "cpu", "--ensemble", 2, "--skip-existing")
    result = medseg("segment", tmp_path / "in", *options, "--run-report", file, "--json")
    assert result.exit_code == 1
    report = read(file)
    saved = load_model_files(tiny_model)
    assert (report["version"], report["command"], report["status"], report["error"]) == (1, "segment", "failed", None)
    assert report["counts"] == {"done": 1, "skipped": 1, "failed": 1}
    assert {"medseg-diffusion", "torch", "monai", "python"} <= set(report["versions"]) and report["platform"]
    assert report["device"]["name"] == "cpu" and report["device"]["peak_memory_mb"] is None
    assert report["peak_memory_mb"] > 10
    assert report["options"]["seed"] == 0 and report["options"]["ensemble"] == 2
    assert report["options"]["output"] == str(tmp_path / "out")
    assert (report["model"]["name"], report["model"]["sha256"]) == (saved.name, saved.sha256)
    assert report["model"]["settings"]["ensemble"] == "2" and report["model"]["settings"]["steps"] == "2"
    started, finished = (datetime.fromisoformat(report[key]) for key in ("started", "finished"))
    assert started.tzinfo is not None and 0 < (finished - started).total_seconds() <= report["seconds"] + 1

    states = {Path(scan["scan"]).name: scan for scan in report["scans"]}
    assert [states[scan.name]["status"] for scan in scans] == ["skipped", "failed", "done"]
    assert "bb.nii.gz" in states["bb.nii.gz"]["error"] and states["bb.nii.gz"]["exit_code"] == 3
    assert states["a.nii.gz"]["sha256"] == {}, "a skipped scan is not read"
    for scan in scans[1:]:
        assert states[scan.name]["sha256"] == {str(scan): hashlib.sha256(scan.read_bytes()).hexdigest()}
    assert states["ccc.nii.gz"]["read_seconds"] > 0 and states["a.nii.gz"]["read_seconds"] is None
    assert [path.name for path in file.parent.iterdir()] == ["run.json"], "nothing half-written stays behind"

    own = {"sha256", "read_seconds", "finished"}  # beside them, the same as --json
    assert [{k: v for k, v in scan.items() if k not in own} for scan in report["scans"]] == [
        json.loads(line) for line in result.stdout.splitlines()
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_the_hash_of_a_folder_is_that_of_its_sums(nested: bool, tmp_path: Path, tiny_model: Path) -> None:
    scan = tmp_path / "scan"
    for number in (1, 2) if nested else (1,):
        series(scan / f"s{number}" if nested else scan, SeriesNumber=number, StudyInstanceUID="1.2")
    (scan / "notes").write_text("read me")
    if sys.platform == "linux":  # where names are bytes, and need be no text
        (scan / "notes").rename(scan / os.fsdecode(b"caf\xe9"))
    chosen = InputOptions(series="1")
    run([scan], tiny_model, run_report=tmp_path / "run.json", inputs=chosen)
    (noted,) = read(tmp_path / "run.json")["scans"]
    command = "cd scan && find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    sums = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert noted["status"] == "done" and noted["sha256"] == {str(scan): sums.stdout.split()[0]}


def test_a_run_that_stops_is_reported(tmp_path: Path, tiny_model: Path) -> None:
    scan, damaged = save(tmp_path / "scan.nii.gz"), tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    weights = next(damaged.rglob("weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="SHA-256"):
        run([scan], damaged, run_report=tmp_path / "run.json")
    report = read(tmp_path / "run.json")
    assert report["status"] == "stopped" and "SHA-256" in report["error"]
    assert report["model"] is None and report["device"] is None and report["scans"] == []


def test_ctrl_c_leaves_the_report_of_what_was_done(tmp_path: Path, tiny_model: Path) -> None:
    scans = [save(tmp_path / f"{name}.nii.gz") for name in "ab"]

    def interrupt(result: ScanResult) -> None:
        raise KeyboardInterrupt

    options = SegmentOptions(model=str(tiny_model), device="cpu", run_report=tmp_path / "run.json")
    with pytest.raises(KeyboardInterrupt):
        segment(scans, options, on_case=interrupt)
    report = read(tmp_path / "run.json")
    assert (report["status"], report["error"]) == ("stopped", "KeyboardInterrupt")
    assert [Path(scan["scan"]).name for scan in report["scans"]] == ["a.nii.gz"]


def test_a_report_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, tiny_model: Path) -> None:
    scan, folder = save(tmp_path / "scan.nii.gz"), series(tmp_path / "series")
    for name in ("run_report", "report"):
        for path, message in (
            (scan / "run.json", "is a file, but results need a folder"),
            (scan, "would overwrite the scan"),
            (tmp_path, "is a folder; give the report the name of a file"),
            (folder / "run.json", "holds a DICOM series"),
        ):
            with pytest.raises(UsageError, match=message):
                run([scan], tiny_model, **{name: path})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.nii.gz", "series"]


def test_anomaly_reports_too(tmp_path: Path, anomaly_models: dict[str, Path], anomaly_scans: Path) -> None:
    scan = sorted((anomaly_scans / "images").iterdir())[0]
    model = anomaly_models["pixel"]
    options = AnomalyOptions(
        model=str(model), output=tmp_path, device="cpu", threshold="0.5", run_report=tmp_path / "run.json"
    )
    (result,) = anomaly([scan], options)
    assert result.status == "done", result.error
    report = read(tmp_path / "run.json")
    assert (report["command"], report["status"]) == ("anomaly", "done")
    assert report["model"]["sha256"] == load_model_files(model).sha256
    assert report["model"]["settings"]["threshold"] == 0.5
    assert report["scans"][0]["volumes_ml"] == result.volumes_ml


def test_without_the_option_nothing_is_written(tmp_path: Path, tiny_model: Path) -> None:
    result = medseg("segment", save(tmp_path / "scan.nii.gz"), "-m", tiny_model, "--device", "cpu")
    assert result.exit_code == 0, error_lines(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.nii.gz", "scan_dseg.tsv", "scan_seg.nii.gz"]

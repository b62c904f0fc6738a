"""The study of synthetic data runs to its tables, and no arm sees a test patient."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg_diffusion.data.cases import find_cases
from tests.helpers.generators import QUIET, mask_config, save_labelled_volumes
from tests.helpers.segmenters import tiny_config

pytestmark = QUIET


def test_the_study_of_synthetic_data_runs_to_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "studies")
    study: Any = importlib.import_module("synthetic_data")
    save_labelled_volumes(tmp_path / "data", (16, 16, 3))
    labelled = {"labels": ["square"], "window": [8, 8], "test_cases": 1, "validation_cases": 1}
    segmenter = tiny_config(
        method="baseline", data=labelled, network={"dims": 2, "channels": 8, "channel_mult": [1]},
        inference={"steps": 1}, diffusion={}, training={"batch_size": 2, "warmup_steps": 1},
    )  # fmt: skip
    for name, config in (("generator", mask_config()), ("segmenter", segmenter)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [
        "synthetic_data.py", tmp_path / "data", tmp_path / "out", "--generator", tmp_path / "generator.yaml",
        "--segmenter", tmp_path / "segmenter.yaml", "--patients", 2, 0, "--seeds", 0, "--generator-steps", 2,
        "--segmenter-steps", 2, "--per-mask", 1,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    study.main()
    out = tmp_path / "out"
    with (out / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["patients"], row["arm"]) for row in rows} == {(n, arm) for n in ("2", "0") for arm in study.ARMS}
    (test,) = {row["patient"] for row in rows}
    for count, arm, real, synthetic in (("2", "augmented", 2, 0), ("2", "synthetic", 0, 2), ("0", "real", 4, 0)):
        cases = find_cases(out / count / f"{arm}-0" / "data" / "training").cases
        trained = [case for case in cases if case.name in _training(out / count / f"{arm}-0" / "run")]
        assert sum(case.name.startswith("synthetic") for case in trained) == synthetic
        assert len(trained) == real + synthetic and test not in {case.patient for case in trained}
    drawn = {case.patient for case in find_cases(out / "2" / "synthetic").cases}
    both = find_cases(out / "2" / "augmented-synthetic-0" / "data" / "training").cases
    assert len(drawn) == 2 and test not in drawn and len(both) == 2 + 2 + 2
    with (out / "generators.csv").open(newline="") as stream:
        assert [row["patients"] for row in csv.DictReader(stream)] == ["2", "0"]
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("weights.safetensors")}
    study.main()  # nothing is trained again
    assert stamps and stamps == {file: file.stat().st_mtime_ns for file in stamps}


def _training(run: Path) -> set[str]:
    split = json.loads((run / "split.json").read_text())
    return set(split["train"])

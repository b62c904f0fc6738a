"""`summary.json` and `cases.csv`."""

from __future__ import annotations

import csv
import io
import json

import pytest

from medseg_diffusion.metrics.registry import measured
from medseg_diffusion.reports.summary import cases_csv, summary_json
from tests.helpers.masks import evaluation


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_summary_is_strict_json_in_nnunets_shape() -> None:
    summary = json.loads(summary_json(evaluation()), parse_constant=refuse_constant)
    assert {"foreground_mean", "mean", "metric_per_case"} <= set(summary)
    keys = {"Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref"} | {
        metric.key for metric in measured(cldice=False)
    }
    assert set(summary["foreground_mean"]) == keys
    assert set(summary["mean"]) == {"1", "2", "3"} and all(set(values) == keys for values in summary["mean"].values())
    case = summary["metric_per_case"][0]
    assert case["prediction_file"] == "case_a_seg.nii.gz" and case["reference_file"] == "case_a.nii.gz"
    numbers = case["metrics"]["1"]
    assert set(numbers) == keys
    nnunet = {"Dice": 2 / 3, "IoU": 1 / 2, "TP": 1, "FP": 1, "FN": 0, "TN": 2, "n_pred": 2, "n_ref": 1}
    assert {key: numbers[key] for key in nnunet} == nnunet
    assert numbers["precision"] == 1 / 2 and numbers["recall"] == 1 and numbers["HD95_mm"] == pytest.approx(0.95)
    assert case["metrics"]["3"]["HD95_mm"] is None, "a number that does not exist"


def test_summary_averages_what_exists() -> None:
    summary = json.loads(summary_json(evaluation()))
    assert summary["mean"]["1"]["Dice"] == pytest.approx((2 / 3 + 1) / 2)
    assert summary["mean"]["1"]["n_pred"] == 1.5
    assert summary["mean"]["2"]["Dice"] == 1.0  # from the one case that has it
    assert summary["mean"]["3"]["Dice"] is None and summary["mean"]["3"]["TN"] == 4
    assert summary["foreground_mean"]["Dice"] == pytest.approx(
        (5 / 6 + 1) / 2
    )  # the class that never occurs is left out


def test_summary_says_how() -> None:
    summary = json.loads(summary_json(evaluation()))
    assert summary["n_cases"] == 2
    assert summary["labels"] == {"1": "one", "2": "case_a", "3": "three"}
    assert summary["policy"]["both_empty"] is None and summary["policy"]["reference_empty"] == 0.0
    interval = summary["confidence_interval_95"]["2"]["IoU"]
    assert interval == {"mean": 1.0, "low": None, "high": None, "n": 1, "n_missing": 1, "median": 1.0}
    assert {"medseg-diffusion", "numpy", "scipy", "python"} <= set(summary["versions"])


def test_csv_has_one_row_per_case_and_class() -> None:
    rows = list(csv.DictReader(io.StringIO(cases_csv(evaluation('a, "b"')))))
    assert [(row["case"], row["label"]) for row in rows] == [(c, k) for c in ('a, "b"', "case_b") for k in "123"]
    assert float(rows[0]["dice"]) == 2 / 3 and rows[0]["tp"] == "1"
    assert rows[2]["dice"] == rows[2]["iou"] == "" and rows[2]["n_ref"] == "0"

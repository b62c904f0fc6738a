"""`evaluate` on files: pairing, grids, rules for empty masks, and complete output or none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.errors import InputError
from medseg_diffusion.evaluation import evaluate

AFFINE = np.diag([-1.0, 2.0, 1.5, 1.0])


def save(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), path)
    return path


def box(start: int, stop: int, value: int = 1) -> np.ndarray:
    labels = np.zeros((10, 8, 6), dtype=np.uint8)
    labels[start:stop] = value
    return labels


def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Case a: 4 slabs against 4, 2 shared: Dice 1/2, IoU 1/3. Case b: perfect. Case c: empty in both."""
    pred, ref = tmp_path / "pred", tmp_path / "ref"
    for name, found, truth in (("a", box(0, 4), box(2, 6)), ("b", box(1, 3), box(1, 3)), ("c", box(0, 0), box(0, 0))):
        save(pred / f"{name}_seg.nii.gz", found)
        save(ref / f"{name}.nii.gz", truth)
    return pred, ref, tmp_path / "out"


def test_numbers_and_files(tmp_path: Path) -> None:
    pred, ref, out = folders(tmp_path)
    result = evaluate(pred, ref, out, labels={1: "box"})
    assert result.dice[1].mean == pytest.approx((0.5 + 1.0) / 2) and result.dice[1].n == 2
    assert result.iou[1].mean == pytest.approx((1 / 3 + 1.0) / 2)
    assert result.dice[1].n_missing == 1
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert summary["mean"]["1"]["Dice"] == pytest.approx(0.75)
    assert summary["foreground_mean"]["IoU"] == pytest.approx(2 / 3)
    assert [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]] == [0.5, 1.0, None]
    assert {"TP", "FP", "FN", "TN", "n_pred", "n_ref"} <= set(summary["metric_per_case"][0]["metrics"]["1"])
    rows = list(csv.DictReader((out / "cases.csv").read_text().splitlines()))
    assert len(rows) == 3
    page = (out / "report.html").read_text()
    assert "0.750" in page and page.count("data:image/png;base64,") == 3  # the plot, the best and the worst case
    assert "http" not in page.replace("http-equiv", "") and 'src="/' not in page
    assert sorted(path.name for path in out.iterdir()) == ["cases.csv", "report.html", "summary.json"]


def test_names_are_escaped(tmp_path: Path) -> None:
    name = "<img onerror=x>"
    save(tmp_path / "pred" / f"{name}_seg.nii.gz", box(0, 2))
    save(tmp_path / "ref" / f"{name}.nii.gz", box(0, 2))
    evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert name not in page and "&lt;img onerror" in page


def test_two_files_are_paired_whatever_their_names(tmp_path: Path) -> None:
    a, b = save(tmp_path / "x.nii.gz", box(0, 4)), save(tmp_path / "truth.nii", box(0, 4))
    assert evaluate(a, b, tmp_path / "out").dice[1].mean == 1.0


def test_pictures_use_the_scans(tmp_path: Path) -> None:
    pred, ref, out = folders(tmp_path)
    evaluate(pred, ref, out)
    plain = (out / "report.html").read_text()
    for name in "abc":
        scan = np.random.default_rng(0).random((10, 8, 6)).astype(np.float32)
        (tmp_path / "scans").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(scan, AFFINE), tmp_path / "scans" / f"{name}.nii.gz")
    evaluate(pred, ref, out, images=tmp_path / "scans")
    assert (out / "report.html").read_text() != plain


def test_predictions_beside_their_scans_and_maps_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "pred"
    save(folder / "a_seg.nii.gz", box(0, 4))
    for other in ("a", "a_prob", "a_uncertainty"):
        nib.save(nib.Nifti1Image(np.random.rand(10, 8, 6).astype(np.float32), AFFINE), folder / f"{other}.nii.gz")
    save(tmp_path / "ref" / "a.nii.gz", box(0, 4))
    assert evaluate(folder, tmp_path / "ref", tmp_path / "out").dice[1].mean == 1.0


def test_a_missing_prediction_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    pred, ref, out = folders(tmp_path)
    (pred / "b_seg.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no prediction for b \(1 of 3 references\)"):
        evaluate(pred, ref, out)
    assert not out.exists()


def test_another_grid_is_refused(tmp_path: Path) -> None:
    pred, ref, out = folders(tmp_path)
    save(pred / "b_seg.nii.gz", box(1, 3), np.diag([1.0, 2.0, 1.5, 1.0]))
    with pytest.raises(InputError, match=r"b_seg.nii.gz: found a grid up to 18 mm away"):
        evaluate(pred, ref, out)
    save(pred / "b_seg.nii.gz", box(1, 3)[:, :4])
    with pytest.raises(InputError, match=r"10, 4, 6|10 x 4 x 6"):
        evaluate(pred, ref, out)
    assert not out.exists()


def test_extra_predictions_are_reported(tmp_path: Path) -> None:
    pred, ref, out = folders(tmp_path)
    save(pred / "z_seg.nii.gz", box(0, 4))
    (warning,) = evaluate(pred, ref, out).warnings
    assert "z" in warning and "not evaluated" in warning


def test_false_alarms_count(tmp_path: Path) -> None:
    """A class that no reference has is kept, with Dice 0 wherever it was predicted."""
    save(tmp_path / "pred" / "a.nii.gz", box(0, 4) + box(5, 7, 2))
    save(tmp_path / "ref" / "a.nii.gz", box(0, 4))
    result = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")
    assert result.dice[2].mean == 0.0 and result.dice[1].mean == 1.0

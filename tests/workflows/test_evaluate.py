from __future__ import annotations

import csv
import json
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.io import read_map
from medseg_diffusion.workflows.evaluate import evaluate

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def box(stop: int, label: int = 1) -> np.ndarray:
    """A box of 4 x 4 x (stop - 2) voxels that begins at (2, 2, 2)."""
    array = np.zeros((10, 9, 8), np.uint8)
    array[2:6, 2:6, 2:stop] = label
    return array


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Case a: 2 of 4 layers found (Dice 2/3). Case b: exact, label 2. Case c: empty reference, label 3 predicted."""
    pred, ref = tmp_path / "pred", tmp_path / "ref"
    save(pred / "a_seg.nii.gz", box(4))
    save(ref / "a.nii.gz", box(6))
    save(pred / "b.nii.gz", box(6, 2))
    save(ref / "b_seg.nii.gz", box(6, 2))
    save(pred / "c_seg.nii.gz", box(6, 3))
    save(ref / "c.nii.gz", box(2))
    return pred, ref


def test_folders_end_to_end(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = evaluate(*folders, out)
    assert sorted(os.listdir(out)) == ["cases.csv", "report.html", "summary.json"]
    assert [case.name for case in result.cases] == ["a", "b", "c"]
    assert result.labels == {1: "label 1", 2: "label 2", 3: "label 3"}
    assert result.dice[1].mean == pytest.approx(2 * 2 / (2 + 4)) and result.dice[1].n == 1
    assert result.dice[2].mean == 1.0 and result.dice[2].n_missing == 2
    assert result.dice[3].mean == 0.0 and result.dice[3].n == 1  # predicted where no reference has it
    assert result.warnings == ()

    summary = json.loads((out / "summary.json").read_text())
    assert summary["metric_per_case"][0]["metrics"]["1"]["TP"] == 4 * 4 * 2
    assert summary["metric_per_case"][1]["prediction_file"].endswith("b.nii.gz")
    assert summary["mean"]["3"]["FP"] == pytest.approx(4 * 4 * 4 / 3)
    voxels = {sum(float(case["metrics"][k][key]) for key in ("TP", "FP", "FN", "TN"))
              for case in summary["metric_per_case"] for k in "123"}  # fmt: skip
    assert voxels == {10 * 9 * 8}, "also for a class that a case does not have"
    with (out / "cases.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 3
    page = (out / "report.html").read_text()
    assert re.findall(r"<h2>(\w+) case: (\w)", page) == [("Best", "b"), ("Median", "a"), ("Worst", "c")]
    assert f"medseg evaluate {folders[0]} {folders[1]} -o {out}" in page


def test_two_files_need_no_common_name(tmp_path: Path) -> None:
    pred, ref = save(tmp_path / "mine.nii.gz", box(5)), save(tmp_path / "truth.nii", box(5))
    result = evaluate(pred, ref, tmp_path / "out", labels={1: "liver"})
    assert result.cases[0].name == "truth" and result.table()[0]["class"] == "liver"
    assert result.dice[1].mean == 1.0


def test_one_prediction_meets_its_own_reference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    assert [case.name for case in evaluate(pred / "a_seg.nii.gz", ref, tmp_path / "out").cases] == ["a"]
    assert [case.name for case in evaluate(pred, ref / "b_seg.nii.gz", tmp_path / "out").cases] == ["b"]
    with pytest.raises(InputError, match="no reference for z"):
        evaluate(save(tmp_path / "z.nii.gz", box(3)), ref, tmp_path / "other")


def test_scans_and_maps_beside_the_masks_are_not_predictions(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    noise = np.random.default_rng(0).random((10, 9, 8)).astype(np.float32)
    for name in ("a.nii.gz", "a_prob.nii.gz", "a_uncertainty.nii.gz", ".hidden.nii.gz"):
        save(pred / name, noise)
    save(pred / "more_seg.nii.gz", box(3))
    result = evaluate(pred, ref, tmp_path / "out")
    assert result.cases[0].prediction_file.endswith("a_seg.nii.gz")
    assert result.warnings == (
        "Predictions without a reference, not evaluated: more.",
        "Not used for calibration: a_prob.nii.gz holds no class probabilities on the grid of its reference.",
    )
    assert result.reliability is None
    assert "not evaluated: more" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("labels", [[2, 1, 7], {7: "absent", 2: "two", 1: "one"}])
def test_asked_labels_only(folders: tuple[Path, Path], tmp_path: Path, labels: dict[int, str] | list[int]) -> None:
    result = evaluate(*folders, tmp_path / "out", labels=labels)
    assert list(result.labels) == [1, 2, 7]
    assert result.warnings == ("Labels not evaluated: 3.", "Labels in no reference and no prediction: 7.")
    assert result.dice[7].n == 0 and result.dice[7].n_missing == 3


def test_missing_prediction_is_named_and_nothing_is_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    (pred / "b.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no prediction for b \(1 of 3"):
        evaluate(pred, ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((10, 9, 7), np.uint8), AFFINE, "10 x 9 x 7 voxels; expected 10 x 9 x 8"),
        (box(4), np.diag([-1.0, 1.0, 2.0, 1.0]), "mm away"),
        (box(4) * np.float32(0.5), AFFINE, "label 0.5"),
    ],
)
def test_a_bad_file_leaves_the_earlier_result(
    folders: tuple[Path, Path], tmp_path: Path, array: np.ndarray, affine: np.ndarray, message: str
) -> None:
    pred, ref = folders
    out = tmp_path / "out"
    evaluate(pred, ref, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save(pred / "c_seg.nii.gz", array, affine)
    with pytest.raises(InputError, match=message) as caught:
        evaluate(pred, ref, out)
    assert "c_seg.nii.gz" in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_unusable_folders(tmp_path: Path) -> None:
    ref = save(tmp_path / "ref" / "a.nii.gz", box(4)).parent
    with pytest.raises(InputError, match="no such file or folder"):
        evaluate(tmp_path / "nowhere", ref, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="without label maps"):
        evaluate(tmp_path / "empty", ref, tmp_path / "out")
    save(ref / "a.nii", box(4))
    with pytest.raises(InputError, match=r"the same name as a\.nii"):
        evaluate(ref, ref, tmp_path / "out")


def test_no_label_at_all(tmp_path: Path) -> None:
    empty = save(tmp_path / "a.nii.gz", box(2))
    with pytest.raises(InputError, match="no label above 0"):
        evaluate(empty, empty, tmp_path / "out")
    result = evaluate(empty, empty, tmp_path / "out", labels=[1])  # asked for: absent, and said so
    assert result.dice[1].n_missing == 1


def test_a_scan_is_not_taken_for_a_label_map(tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii.gz", np.arange(12 * 12 * 12, dtype=np.int16).reshape(12, 12, 12))
    with pytest.raises(InputError, match="1728 different labels"):
        evaluate(scan, scan, tmp_path / "out")


def test_images_are_the_background(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    evaluate(pred, ref, tmp_path / "plain")
    noise = np.random.default_rng(0).random((10, 9, 8)).astype(np.float32)
    save(tmp_path / "images" / "a.nii.gz", noise)
    save(tmp_path / "images" / "b_0000.nii.gz", noise)
    evaluate(pred, ref, tmp_path / "pictured", images=tmp_path / "images")

    def pictures(folder: str) -> list[str]:
        page = (tmp_path / folder / "report.html").read_text()
        return re.findall(r'figure class="scan"><img src="([^"]+)"', page)

    same = [a == b for a, b in zip(pictures("plain"), pictures("pictured"), strict=True)]
    assert same == [False, False, True]  # best b and median a have a scan, worst c has none
    save(tmp_path / "images" / "a.nii.gz", noise[1:])
    with pytest.raises(InputError, match="9 x 9 x 8 voxels"):
        evaluate(pred, ref, tmp_path / "never", images=tmp_path / "images")
    assert not (tmp_path / "never").exists()


def test_pictures_are_the_same_whatever_the_storage_order(tmp_path: Path) -> None:
    pages = []
    for flip in (False, True):
        folder = tmp_path / str(flip)
        for name, stop in (("p", 4), ("r", 6)):
            array, affine = box(stop), AFFINE.copy()
            if flip:  # the same anatomy, stored from right to left
                array, affine[0, 0], affine[0, 3] = array[::-1].copy(), -1.0, 9.0
            save(folder / f"{name}.nii.gz", array, affine)
        evaluate(folder / "p.nii.gz", folder / "r.nii.gz", folder / "out")
        pages.append(re.findall(r"base64,([^\"]+)", (folder / "out" / "report.html").read_text()))
    assert pages[0] == pages[1]


def test_a_case_without_the_class_is_left_out_of_its_mean(tmp_path: Path) -> None:
    pred, ref = tmp_path / "pred", tmp_path / "ref"
    for name, found, truth in (("a", 4, 6), ("b", 6, 6), ("c", 2, 2)):  # half of it, exact, empty on both sides
        save(pred / f"{name}_seg.nii.gz", box(found))
        save(ref / f"{name}.nii.gz", box(truth))
    result = evaluate(pred, ref, tmp_path / "out")
    assert result.dice[1].mean == pytest.approx((2 / 3 + 1) / 2) and result.iou[1].mean == pytest.approx(
        (1 / 2 + 1) / 2
    )
    assert (result.dice[1].n, result.dice[1].n_missing) == (2, 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]] == [pytest.approx(2 / 3), 1.0, None]


def test_file_names_are_escaped(tmp_path: Path) -> None:
    name = "<img onerror=x>"
    save(tmp_path / "pred" / f"{name}_seg.nii.gz", box(4))
    save(tmp_path / "ref" / f"{name}.nii.gz", box(4))
    evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert name not in page and "&lt;img onerror" in page


# ---- surfaces, calibration, several raters ---------------------------------------------------------------------------


def test_distances_are_in_millimetres_and_missing_masks_have_none(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate(*folders, tmp_path / "out")
    assert result.hd95[1].mean == pytest.approx(2 * 2.0)  # two layers of 2 mm are missing
    assert result.hd95[2].mean == 0 and (result.hd95[2].n, result.hd95[2].n_missing) == (1, 2)
    assert result.hd95[3].n == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["metric_per_case"][0]["metrics"]["1"]["HD95_mm"] == pytest.approx(4.0)
    assert summary["metric_per_case"][2]["metrics"]["3"]["HD95_mm"] is None


def test_probabilities_beside_the_masks_are_judged(tmp_path: Path) -> None:
    pred, ref = tmp_path / "pred", tmp_path / "ref"
    truth = box(6)
    for name, certainty in (("a", 0.9), ("b", 0.7)):
        p = np.where(truth == 1, certainty, 1 - certainty).astype(np.float32)
        save(pred / f"{name}_seg.nii.gz", truth)
        save(pred / f"{name}_prob.nii.gz", np.stack([1 - p, p], axis=-1))
        save(ref / f"{name}.nii.gz", truth)
    result = evaluate(pred, ref, tmp_path / "out")
    assert result.reliability is not None
    assert result.reliability.ece == pytest.approx(0.2, abs=1e-6)  # always right, 0.8 sure on average
    assert result.reliability.brier_score == pytest.approx(2 * (0.1**2 + 0.3**2) / 2, abs=1e-6)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["calibration"]
    assert found["n_cases"] == 2 and found["ECE"] == pytest.approx(0.2, abs=1e-6)
    assert "<h2>Calibration</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_a_label_without_probability_is_no_calibration(tmp_path: Path) -> None:
    pred, ref = save(tmp_path / "pred" / "a_seg.nii.gz", box(5)), save(tmp_path / "ref" / "a.nii.gz", box(5, 2))
    save(tmp_path / "pred" / "a_prob.nii.gz", np.full((10, 9, 8, 2), 0.5, np.float32))
    result = evaluate(pred, ref, tmp_path / "out")
    assert "Not used for calibration: a_prob.nii.gz has no probability of label 2." in result.warnings


def test_labels_may_be_one_whatever_their_values(tmp_path: Path) -> None:
    """A model that was trained on merged labels writes 1 where references hold 255, or several classes."""
    pred, ref, other = tmp_path / "pred", tmp_path / "ref", tmp_path / "other"
    save(pred / "a_seg.nii.gz", box(4))
    save(ref / "a.nii.gz", box(4, 255))
    save(other / "a.nii.gz", box(6, 7))
    p = np.where(box(4) == 1, 0.9, 0.1).astype(np.float32)
    save(pred / "a_prob.nii.gz", np.stack([1 - p, p], axis=-1))
    apart = evaluate(pred, ref, tmp_path / "apart")
    assert [apart.dice[label].mean for label in (1, 255)] == [0, 0]
    assert any("none in common. Add --merge-labels" in warning for warning in apart.warnings)
    result = evaluate(pred, ref, tmp_path / "out", merge_labels=True, raters=[other])
    assert list(result.labels) == [1] and result.dice[1].mean == 1 and result.reliability is not None
    assert result.energy_distance is not None and result.energy_distance.mean == pytest.approx(0.25)
    assert "--merge-labels" in (tmp_path / "out" / "report.html").read_text()


def test_a_single_case_takes_a_rater_of_any_name_and_strangers_are_named(tmp_path: Path) -> None:
    pred, ref = save(tmp_path / "a_seg.nii.gz", box(4)), save(tmp_path / "ref" / "a.nii.gz", box(4))
    rater = save(tmp_path / "second.nii.gz", box(6))
    result = evaluate(pred, ref, tmp_path / "out", raters=[rater])
    assert result.energy_distance is not None and result.energy_distance.mean == pytest.approx(0.25)
    strangers = save(tmp_path / "others" / "b.nii.gz", box(6)).parent
    found = evaluate(pred, ref, tmp_path / "again", raters=[strangers])
    assert found.energy_distance is None and f"No case of this rater is evaluated: {strangers}." in found.warnings


def test_samples_are_compared_with_all_raters(tmp_path: Path) -> None:
    pred, one, two = tmp_path / "pred", tmp_path / "one", tmp_path / "two"
    for name in ("a", "b"):
        save(one / f"{name}.nii.gz", box(4))
        save(pred / f"{name}_seg.nii.gz", box(4))
    save(two / "a.nii.gz", box(6))
    alone = evaluate(pred, one, tmp_path / "alone")
    assert alone.energy_distance is None
    single = evaluate(pred, one, tmp_path / "single", raters=[two])
    assert single.energy_distance is not None and single.energy_distance.n == 1, "only case a has a second rater"
    assert single.energy_distance.mean == pytest.approx(0.25)  # 2 (0 + 1/2) / 2 - (1/2 + 1/2) / 4
    save(pred / "a_members.nii.gz", np.stack([box(6), box(4)], axis=-1))
    both = evaluate(pred, one, tmp_path / "both", raters=[two])
    assert both.energy_distance is not None and both.energy_distance.mean == pytest.approx(0, abs=1e-9)
    assert both.matched_iou is not None and both.matched_iou.mean == pytest.approx(1)
    assert "Several raters" in (tmp_path / "both" / "report.html").read_text()
    assert f"--rater {two}" in (tmp_path / "both" / "report.html").read_text()
    save(two / "a.nii.gz", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match="3 x 3 x 3 voxels; expected 10 x 9 x 8"):
        evaluate(pred, one, tmp_path / "bad", raters=[two])


# ---- score maps ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Predictions, references, maps. a: two lesions, the larger found. b: one lesion, found. c, d: none; c: an alarm.

    Lesion voxels score 0.9, of which half of those in b only 0.4; others 0.1, in c a part of 0.5.
    """
    pred, ref, maps = tmp_path / "pred", tmp_path / "ref", tmp_path / "maps"
    reference = {name: np.zeros((10, 9, 8), np.uint8) for name in "abcd"}
    reference["a"][2:6, 2:6, 2:6], reference["a"][8, 8, 7] = 1, 1
    reference["b"][2:6, 2:6, 2:6] = 1
    for name, truth in reference.items():
        scores = np.where(truth > 0, 0.9, 0.1).astype(np.float32)
        scores[8, 8, 7] = 0.1
        if name == "b":
            scores[2:4, 2:6, 2:6] = 0.4
        if name == "c":
            scores[0:2, 0:2, 0] = 0.5
        save(ref / f"{name}.nii.gz", truth)
        save(pred / f"{name}_seg.nii.gz", (scores > 0.45).astype(np.uint8))
        save(maps / f"{name}_anomaly.nii.gz", scores)
    return pred, ref, maps


def test_score_maps_end_to_end(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    for name, score in (("a", 0.8), ("b", 0.6), ("c", 0.7), ("d", 0.1)):
        (maps / f"{name}_anomaly.json").write_text(json.dumps({"score": score, "threshold": 0.45}))
    found = evaluate(pred, ref, tmp_path / "out", scores=maps).detection
    assert found is not None and list(found.cases) == ["a", "b", "c", "d"]
    a, b, c = (found.cases[name] for name in "abc")
    # a: of 65 lesion voxels one scores as the 655 others do.
    assert a.auroc == pytest.approx((64 + 0.5) / 65) and a.auprc == pytest.approx(64 / 65 + 65 / 720 / 65)
    assert a.best_dice == pytest.approx(2 * 64 / (65 + 64)) and a.best_dice == pytest.approx(a.overlap.dice)
    assert b.auroc == b.auprc == b.best_dice == 1 and b.overlap.dice == pytest.approx(2 * 32 / (64 + 32))
    assert np.isnan(c.auroc) and np.isnan(c.auprc) and np.isnan(c.best_dice), "no lesion: no number, not 0"
    assert (found.means["AUROC"].n, found.means["AUROC"].n_missing) == (2, 0), "over the cases with lesions"
    assert found.means["AUROC"].mean == pytest.approx((a.auroc + 1) / 2)
    # All together: 96 of 129 score 0.9, 32 score 0.4, below the 4 of c; one scores 0.1 as all others.
    others = 4 * 720 - 129
    assert found.pooled["AUROC"] == pytest.approx((96 + 32 * (others - 4) / others + 0.5 * (others - 4) / others) / 129)
    assert found.pooled["shared_Dice"] == pytest.approx(2 * 128 / (129 + 128 + 4))
    assert 0.3 < found.shared_threshold < 0.4 + 1e-6
    assert found.means["shared_Dice"].mean == pytest.approx((a.best_dice + 1) / 2)
    assert found.pooled["Dice"] == pytest.approx(2 * 96 / (129 + 96 + 4))
    assert found.pooled["recall"] == pytest.approx(96 / 129) and found.pooled["precision"] == pytest.approx(96 / 100)
    # Lesions: 2 found of 3, the missed one of one voxel; the part in c is the only false one.
    assert (found.lesions.n_predicted, found.lesions.n_false) == (3, 1)
    assert found.lesions.by_size() == [(1, 0), (2, 2), (0, 0), (0, 0)]  # 2 mm^3 a voxel: 0.002 and 0.128 ml
    assert found.lesion_means["false_positives"].mean == 1 / 4
    assert found.healthy["components"].mean == 1 / 2 and found.healthy["voxels"].mean == 4 / 2
    assert found.healthy["share"].mean == pytest.approx(4 / 720 / 2)
    assert found.scan_auroc == 3 / 4 and found.n_scan_scores == (2, 2)
    assert found.n_counted == 4 * 720 and found.n_left_out == 0


def test_score_maps_are_in_all_files(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    result = evaluate(pred, ref, tmp_path / "out", scores=maps, lesion_overlap=0.5)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["detection"]["pooled"]["Dice"] == pytest.approx(2 * 96 / (129 + 96 + 4))
    assert summary["detection"]["optimistic"]["why"] == "thresholds chosen on the same cases"
    assert summary["detection"]["lesions"]["by_size"][1] == {
        "from_ml": 0.1, "below_ml": 1.0, "n": 2, "n_detected": 2, "sensitivity": 1.0,
    }  # fmt: skip
    assert summary["detection"]["scans"]["AUROC"] is None, "no scores of whole scans"
    assert [case["detection"]["n_lesions"] for case in summary["metric_per_case"]] == [2, 1, 0, 0]
    assert summary["metric_per_case"][2]["detection"]["auroc"] is None
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["optimistic_dice_own_threshold"]) == 1 and rows[2]["auprc"] == ""
    assert rows[2]["n_false_components"] == "1"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "One threshold: score above 0.4, " in page
    assert page.count("chosen on the same cases") >= 4, "both rows of the table, the explanation and the cases"
    assert "at least 50 % of its voxels" in page and "2,880 voxels count, all of the score maps" in page
    assert f"--scores {maps} --lesion-overlap 0.5" in page and "ROC curve" in page
    assert result.table()[0]["auroc"] == pytest.approx((64.5 / 65 + 1) / 2)
    plain = evaluate(pred, ref, tmp_path / "plain")
    assert plain.detection is None and "auroc" not in plain.table()[0]
    assert "Score maps" not in (tmp_path / "plain" / "report.html").read_text()
    assert "detection" not in (tmp_path / "plain" / "summary.json").read_text()
    assert "auroc" not in (tmp_path / "plain" / "cases.csv").read_text()


def test_only_the_foreground_and_what_has_a_score_counts(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    inside = np.zeros((10, 9, 8), np.uint8)
    inside[1:7, 1:7, 1:7] = 1  # 216 voxels, without the lesion of one voxel and the false alarm
    for name in "abcd":
        save(tmp_path / "fg" / f"{name}.nii.gz", inside)
    result = evaluate(pred, ref, tmp_path / "out", scores=maps, foreground=tmp_path / "fg")
    found = result.detection
    assert found is not None and (found.n_counted, found.n_left_out) == (4 * 216, 4 * (720 - 216))
    assert found.cases["a"].auroc == found.pooled["AUROC"] == 1
    assert found.cases["a"].best_dice == pytest.approx(2 * 64 / (65 + 64)), "what lies outside is missed, as by a mask"
    assert found.healthy["share"].mean == 0 and found.healthy["voxels"].mean == 2
    assert result.warnings == (
        "Lesion voxels that do not count for AUROC and AUPRC, and that no threshold finds: 1 in 1 case.",
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "864 voxels count, those inside the foreground masks (2,016 are left out)" in page
    assert f"--foreground {tmp_path / 'fg'}" in page
    for name in "abcd":  # the same by NaN in the maps
        path = maps / f"{name}_anomaly.nii.gz"
        save(path, np.where(inside > 0, read_map(path).data[0].numpy(), np.float32(np.nan)))
    same = evaluate(pred, ref, tmp_path / "nan", scores=maps).detection
    assert same is not None and same.pooled == found.pooled and same.n_counted == found.n_counted
    assert "all of the score maps but where the score is NaN" in (tmp_path / "nan" / "report.html").read_text()


def test_maps_are_found_by_name(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    (maps / "a_anomaly.nii.gz").rename(maps / "a.nii.gz")
    (maps / "b_anomaly.nii.gz").rename(maps / "b_scores.nii.gz")
    save(maps / "b.nii.gz", np.zeros((2, 2, 2), np.float32))  # the scan: not what is judged
    save(maps / "c_anomaly_mask.nii.gz", np.zeros((2, 2, 2), np.uint8))
    found = evaluate(pred, ref, tmp_path / "out", scores=maps).detection
    assert found is not None and found.cases["b"].auroc == 1
    single = evaluate(pred / "b_seg.nii.gz", ref, tmp_path / "one", scores=maps / "b_scores.nii.gz").detection
    assert single is not None and list(single.cases) == ["b"]


def test_several_labels_are_lesions_together(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    truth = read_map(ref / "a.nii.gz").data[0].numpy().astype(np.uint8)
    truth[2:4] *= 2
    save(ref / "a.nii.gz", truth)
    result = evaluate(pred, ref, tmp_path / "out", scores=maps)
    assert result.detection is not None and list(result.labels) == [1, 2]
    assert result.detection.pooled["Dice"] == pytest.approx(2 * 96 / (129 + 96 + 4))
    assert result.detection.lesions.size_ml.size == 3
    assert "Score maps are compared with all evaluated labels together." in result.warnings
    one = evaluate(pred, ref, tmp_path / "one", scores=maps, labels=[1]).detection
    assert one is not None and one.cases["a"].overlap.n_ref == 33


def test_references_without_any_lesion(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    for name in "ab":
        (ref / f"{name}.nii.gz").unlink()
    result = evaluate(pred, ref, tmp_path / "out", scores=maps)
    assert "No reference holds a lesion: AUROC, AUPRC, best Dice and lesion detection do not exist." in result.warnings
    found = result.detection
    assert found is not None and np.isnan(found.pooled["AUROC"]) and found.means["AUROC"].n == 0
    assert found.healthy["components"].mean == 1 / 2 and found.lesions.precision == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["detection"]
    assert summary["pooled"]["AUROC"] is None and summary["optimistic"]["shared_threshold"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "ROC curve" not in page
        and "One threshold:" not in page
        and "nan" not in re.sub(r'data-value="nan"|base64,[^"]*', "", page)
    )
    save(pred / "c_seg.nii.gz", np.zeros((10, 9, 8), np.uint8))
    silent = evaluate(pred, ref, tmp_path / "silent", scores=maps).detection
    assert silent is not None and silent.healthy["voxels"].mean == 0, "nothing predicted, nothing there: a result"


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((10, 9, 7), np.float32), AFFINE, "10 x 9 x 7 voxels; expected 10 x 9 x 8"),
        (np.zeros((10, 9, 8), np.float32), np.diag([-1.0, 1.0, 2.0, 1.0]), "mm away"),
        (np.zeros((10, 9, 8, 2), np.float32), AFFINE, r"a 4D image \(10 x 9 x 8 x 2\); expected a 3D volume"),
        (np.where(box(3) > 0, np.inf, 0).astype(np.float32), AFFINE, "16 infinite voxels"),
        (np.where(box(3) > 0, 1e300, 0), AFFINE, "16 infinite voxels"),
        (np.full((10, 9, 8), np.nan, np.float32), AFFINE, "no score at all"),
    ],
)
def test_a_bad_score_map_is_one_line(
    scored: tuple[Path, Path, Path], tmp_path: Path, array: np.ndarray, affine: np.ndarray, message: str
) -> None:
    pred, ref, maps = scored
    save(maps / "b_anomaly.nii.gz", array, affine)
    with pytest.raises(InputError, match=message) as caught:
        evaluate(pred, ref, tmp_path / "out", scores=maps)
    assert "b_anomaly.nii.gz" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_maps_and_wrong_use(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    inside = save(tmp_path / "fg" / "a.nii.gz", np.zeros((10, 9, 8), np.uint8)).parent
    with pytest.raises(InputError, match=r"no foreground mask for b, c, d \(3 of 4 cases\)"):
        evaluate(pred, ref, tmp_path / "out", scores=maps, foreground=inside)
    with pytest.raises(InputError, match=r"fg/a\.nii\.gz: found no voxel with a score in .*a_anomaly"):
        evaluate(pred / "a_seg.nii.gz", ref, tmp_path / "out", scores=maps, foreground=inside)
    (maps / "c_anomaly.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no score map for c \(1 of 4 cases\); .*NAME_anomaly, NAME_scores, NAME"):
        evaluate(pred, ref, tmp_path / "out", scores=maps)
    with pytest.raises(InputError, match="no score map for a, c, d"):
        evaluate(pred, ref, tmp_path / "out", scores=maps / "b_anomaly.nii.gz")
    with pytest.raises(InputError, match="no such file or folder; expected a score map"):
        evaluate(pred, ref, tmp_path / "out", scores=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="give --scores too"):
        evaluate(pred, ref, tmp_path / "out", foreground=inside)
    with pytest.raises(UsageError, match="a lesion overlap of 0;"):
        evaluate(pred, ref, tmp_path / "out", scores=maps, lesion_overlap=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", '{"score": "high"}', '{"score": NaN}', '{"score": true}'])
def test_a_bad_score_of_a_scan_is_one_line(scored: tuple[Path, Path, Path], tmp_path: Path, text: str) -> None:
    pred, ref, maps = scored
    (maps / "b_anomaly.json").write_text(text)
    with pytest.raises(InputError, match=r"b_anomaly\.json: .*number") as caught:
        evaluate(pred, ref, tmp_path / "out", scores=maps)
    assert "\n" not in str(caught.value)


def test_scores_of_some_scans_are_used_and_said(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    for name, content in (("a", {"score": 2}), ("b", {"model": "x"}), ("d", {"score": 1.5})):
        (maps / f"{name}_anomaly.json").write_text(json.dumps(content))
    result = evaluate(pred, ref, tmp_path / "out", scores=maps)
    assert result.detection is not None and result.detection.scan_auroc == 1
    assert result.warnings == ("Scores of whole scans are known for 2 of 4 cases only.",)
    assert "1 with\nlesions against 1 without" in (tmp_path / "out" / "report.html").read_text()


def test_sizes_of_images_without_a_voxel_size_are_said_to_be_a_guess(tmp_path: Path) -> None:
    found = np.zeros((20, 30), np.uint8)
    found[3:9, 4:12] = 1
    for name, picture in (("pred", found), ("ref", found), ("maps", found * 200)):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "a.png")
    result = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out", scores=tmp_path / "maps")
    assert result.warnings == ("Images without a voxel size: sizes in ml take each pixel for 1 mm x 1 mm x 1 mm.",)
    assert result.detection is not None and result.detection.lesions.size_ml == [0.048]


def test_the_command_prints_the_scores(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    (script,) = entry_points(group="console_scripts", name="medseg")
    words = ["evaluate", str(pred), str(ref), "-o", str(tmp_path / "out"), "--scores", str(maps)]
    printed = CliRunner(env={"COLUMNS": "200"}).invoke(script.load(), words).stdout
    assert "2,880 voxels: all of the score maps" in printed and "lesions detected: 2 of 3" in printed
    assert "optimistic (chosen on the same cases): 0.996" in printed
    assert "2 scans without lesions: 0.500" in printed
    assert "--lesion-overlap" not in (tmp_path / "out" / "report.html").read_text(), "one default for both interfaces"
    rows = json.loads(CliRunner().invoke(script.load(), [*words, "--json"]).stdout)
    assert rows[0]["lesion_sensitivity"] == pytest.approx(2 / 3) and rows[0]["scan_auroc"] is None

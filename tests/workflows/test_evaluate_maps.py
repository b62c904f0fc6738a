"""`medseg evaluate --scores`: score maps compared with reference masks."""

from __future__ import annotations

import csv
import json
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.io import read_map
from medseg_diffusion.workflows.evaluate import EvaluateOptions, evaluate
from tests.helpers.masks import AFFINE, box, but_few, save
from tests.helpers.pages import Page


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Predictions, references, maps. a: two lesions, the larger detected. b: one lesion, detected. c: a false positive.

    Cases c and d have no lesion.

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
    detection = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps)).detection
    assert detection is not None and list(detection.cases) == ["a", "b", "c", "d"]
    a, b, c = (detection.cases[name] for name in "abc")
    # a: of 65 lesion voxels one scores as the 655 others do.
    assert a.auroc == pytest.approx((64 + 0.5) / 65) and a.auprc == pytest.approx(64 / 65 + 65 / 720 / 65)
    assert a.best_dice == pytest.approx(2 * 64 / (65 + 64)) and a.best_dice == pytest.approx(a.overlap.dice)
    assert b.auroc == b.auprc == b.best_dice == 1 and b.overlap.dice == pytest.approx(2 * 32 / (64 + 32))
    assert np.isnan(c.auroc) and np.isnan(c.auprc) and np.isnan(c.best_dice), "no lesion: no number, not 0"
    assert (detection.means["AUROC"].n, detection.means["AUROC"].n_missing) == (2, 0), "over the cases with lesions"
    assert detection.means["AUROC"].mean == pytest.approx((a.auroc + 1) / 2)
    # All together: 96 of 129 score 0.9, 32 score 0.4, below the 4 of c; one scores 0.1 as all others.
    others = 4 * 720 - 129
    assert detection.pooled["AUROC"] == pytest.approx(
        (96 + 32 * (others - 4) / others + 0.5 * (others - 4) / others) / 129
    )
    assert detection.pooled["shared_Dice"] == pytest.approx(2 * 128 / (129 + 128 + 4))
    assert 0.3 < detection.shared_threshold < 0.4 + 1e-6
    assert detection.means["shared_Dice"].mean == pytest.approx((a.best_dice + 1) / 2)
    assert detection.pooled["Dice"] == pytest.approx(2 * 96 / (129 + 96 + 4))
    assert detection.pooled["recall"] == pytest.approx(96 / 129) and detection.pooled["precision"] == pytest.approx(
        96 / 100
    )
    # Lesions: 2 detected of 3, the missed one of one voxel; the part in c is the only false one.
    assert (detection.lesions.n_predicted, detection.lesions.n_false) == (3, 1)
    assert detection.lesions.by_size() == [(1, 0), (2, 2), (0, 0), (0, 0)]  # 2 mm^3 a voxel: 0.002 and 0.128 ml
    assert detection.lesion_means["false_positives"].mean == 1 / 4
    assert detection.healthy["components"].mean == 1 / 2 and detection.healthy["voxels"].mean == 4 / 2
    assert detection.healthy["share"].mean == pytest.approx(4 / 720 / 2)
    assert detection.scan_auroc == 3 / 4 and detection.n_scan_scores == (2, 2)
    assert detection.n_counted == 4 * 720 and detection.n_left_out == 0


def test_score_maps_are_in_all_files(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps, lesion_overlap=0.5))
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
    assert "ROC curve" in page
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
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps, foreground=tmp_path / "fg"))
    detection = result.detection
    assert detection is not None and (detection.n_counted, detection.n_left_out) == (4 * 216, 4 * (720 - 216))
    assert detection.cases["a"].auroc == detection.pooled["AUROC"] == 1
    assert detection.cases["a"].best_dice == pytest.approx(2 * 64 / (65 + 64)), (
        "what lies outside is missed, as by a mask"
    )
    assert detection.healthy["share"].mean == 0 and detection.healthy["voxels"].mean == 2
    assert but_few(result.warnings) == [
        "Lesion voxels that do not count for AUROC and AUPRC, and that no threshold can detect: 1 in 1 case.",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "864 voxels count, those inside the foreground masks (2,016 are left out)" in page

    for name in "abcd":  # the same by NaN in the maps
        path = maps / f"{name}_anomaly.nii.gz"
        save(path, np.where(inside > 0, read_map(path).data[0].numpy(), np.float32(np.nan)))
    same = evaluate(pred, ref, tmp_path / "nan", EvaluateOptions(scores=maps)).detection
    assert same is not None and same.pooled == detection.pooled and same.n_counted == detection.n_counted
    assert "all of the score maps except where the score is NaN" in (tmp_path / "nan" / "report.html").read_text()


def test_maps_are_found_by_name(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    (maps / "a_anomaly.nii.gz").rename(maps / "a.nii.gz")
    (maps / "b_anomaly.nii.gz").rename(maps / "b_scores.nii.gz")
    save(maps / "b.nii.gz", np.zeros((2, 2, 2), np.float32))  # the scan: not what is judged
    save(maps / "c_anomaly_mask.nii.gz", np.zeros((2, 2, 2), np.uint8))
    detection = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps)).detection
    assert detection is not None and detection.cases["b"].auroc == 1
    single = evaluate(
        pred / "b_seg.nii.gz", ref, tmp_path / "one", EvaluateOptions(scores=maps / "b_scores.nii.gz")
    ).detection
    assert single is not None and list(single.cases) == ["b"]


def test_several_labels_are_lesions_together(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    truth = read_map(ref / "a.nii.gz").data[0].numpy().astype(np.uint8)
    truth[2:4] *= 2
    save(ref / "a.nii.gz", truth)
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps))
    assert result.detection is not None and list(result.labels) == [1, 2]
    assert result.detection.pooled["Dice"] == pytest.approx(2 * 96 / (129 + 96 + 4))
    assert result.detection.lesions.size_ml.size == 3
    assert "Score maps are compared with all evaluated labels together." in result.warnings
    one = evaluate(pred, ref, tmp_path / "one", EvaluateOptions(scores=maps, labels=[1])).detection
    assert one is not None and one.cases["a"].overlap.n_ref == 33


def test_references_without_any_lesion(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    for name in "ab":
        (ref / f"{name}.nii.gz").unlink()
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps))
    assert "No reference holds a lesion: AUROC, AUPRC, best Dice and lesion detection do not exist." in result.warnings
    detection = result.detection
    assert detection is not None and np.isnan(detection.pooled["AUROC"]) and detection.means["AUROC"].n == 0
    assert detection.healthy["components"].mean == 1 / 2 and detection.lesions.precision == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["detection"]
    assert summary["pooled"]["AUROC"] is None and summary["optimistic"]["shared_threshold"] is None
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert 'aria-label="ROC curve' not in page.text
    assert "One threshold:" not in page.seen and "nan" not in page.seen
    save(pred / "c_seg.nii.gz", np.zeros((10, 9, 8), np.uint8))
    silent = evaluate(pred, ref, tmp_path / "silent", EvaluateOptions(scores=maps)).detection
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
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps))
    assert "b_anomaly.nii.gz" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_maps_and_wrong_use(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    inside = save(tmp_path / "fg" / "a.nii.gz", np.zeros((10, 9, 8), np.uint8)).parent
    with pytest.raises(InputError, match=r"no foreground mask for b, c, d \(3 of 4 cases\)"):
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps, foreground=inside))
    with pytest.raises(InputError, match=r"fg/a\.nii\.gz: found no voxel with a score in .*a_anomaly"):
        evaluate(pred / "a_seg.nii.gz", ref, tmp_path / "out", EvaluateOptions(scores=maps, foreground=inside))
    (maps / "c_anomaly.nii.gz").unlink()
    with pytest.raises(InputError, match=r"no score map for c \(1 of 4 cases\); .*NAME_anomaly, NAME_scores, NAME"):
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps))
    with pytest.raises(InputError, match="no score map for a, c, d"):
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps / "b_anomaly.nii.gz"))
    with pytest.raises(InputError, match="no such file or folder; expected a score map"):
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="give --scores too"):
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(foreground=inside))
    with pytest.raises(UsageError, match="a lesion overlap of 0;"):
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps, lesion_overlap=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", '{"score": "high"}', '{"score": NaN}', '{"score": true}'])
def test_a_bad_score_of_a_scan_is_one_line(scored: tuple[Path, Path, Path], tmp_path: Path, text: str) -> None:
    pred, ref, maps = scored
    (maps / "b_anomaly.json").write_text(text)
    with pytest.raises(InputError, match=r"b_anomaly\.json: .*number") as caught:
        evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps))
    assert "\n" not in str(caught.value)


def test_scores_of_some_scans_are_used_and_said(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    for name, content in (("a", {"score": 2}), ("b", {"model": "x"}), ("d", {"score": 1.5})):
        (maps / f"{name}_anomaly.json").write_text(json.dumps(content))
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(scores=maps))
    assert result.detection is not None and result.detection.scan_auroc == 1
    assert but_few(result.warnings) == ["Only 2 of 4 cases have a score of the whole scan."]
    assert "1 with\nlesions against 1 without" in (tmp_path / "out" / "report.html").read_text()


def test_sizes_of_images_without_a_voxel_size_are_said_to_be_a_guess(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 4:12] = 1
    for name, picture in (("pred", mask), ("ref", mask), ("maps", mask * 200)):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "a.png")
    result = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out", EvaluateOptions(scores=tmp_path / "maps"))
    (warning,) = result.warnings
    assert "no voxel size" in warning and "1 x 1 x 1 mm" in warning
    assert result.detection is not None and result.detection.lesions.size_ml == [0.048]


def test_the_command_prints_the_scores(scored: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pred, ref, maps = scored
    (script,) = entry_points(group="console_scripts", name="medseg")
    words = ["evaluate", str(pred), str(ref), "-o", str(tmp_path / "out"), "--scores", str(maps)]
    printed = CliRunner(env={"COLUMNS": "200"}).invoke(script.load(), words).stdout
    assert "2,880 voxels: all of the score maps" in printed and "lesions detected: 2 of 3" in printed
    assert "optimistic (chosen on the same cases): 0.996" in printed
    assert "2 scans without lesions: 0.500" in printed
    assert "at least 10 % of its voxels" in (tmp_path / "out" / "report.html").read_text()
    assert EvaluateOptions().lesion_overlap == 0.1, "one default for both interfaces"
    content = json.loads(CliRunner().invoke(script.load(), [*words, "--json"]).stdout)
    assert content["detection"]["lesions"]["n_detected"] == 2
    rows = content["rows"]
    assert rows[0]["lesion_sensitivity"] == pytest.approx(2 / 3) and rows[0]["scan_auroc"] is None

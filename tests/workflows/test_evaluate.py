from __future__ import annotations

import csv
import html
import json
import os
import re
import shlex
import shutil
import sys
import tracemalloc
from importlib.metadata import entry_points
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from medseg_diffusion.data.pairs import MaskPair
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.workflows.evaluate import EvaluateOptions, compare_predictions, evaluate
from medseg_diffusion.workflows.evaluate_cases import RatersTask, compare_with_raters
from tests.helpers.cli import error_lines, medseg
from tests.helpers.masks import AFFINE, box, but_few, save
from tests.helpers.pages import viewed


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
    assert but_few(result.warnings) == []

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
    shown = re.findall(r"<option value=\"\d\">(\w) \(([\w ]+)\)", page)
    assert shown == [("c", "worst case"), ("a", "median case"), ("b", "best case")]
    assert "<code>medseg" not in page, "a call of the library has no command line"


def test_a_table_of_the_user_is_not_replaced(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The results have its name; that which says whose scans these are may exist nowhere else."""
    table, out = tmp_path / "cases.csv", tmp_path / "out"
    for text, options, message in (
        ("case,patient\na,1\nb,1\nc,2\n", ("--patients", table), "which is read; give -o another folder"),
        ("case,label,class,scanner\na,1,x,A\n", ("--strata", f"{table}:scanner"), "which is read; give -o another"),
        ("case,patient\na,1\n", (), "is no table of this command; move it"),
    ):
        table.write_text(text)
        result = medseg("evaluate", *folders, "-o", tmp_path, *options)
        assert result.exit_code == 2 and message in error_lines(result)[0], result.stderr
        assert table.read_text() == text and not (tmp_path / "summary.json").exists()
    (out / "pred").mkdir(parents=True)
    table.rename(out / "pred" / "cases.csv")
    other = shutil.copytree(folders[0], tmp_path / "other")
    with pytest.raises(UsageError, match=r"pred.cases\.csv: is no table of this command"):
        compare_predictions([folders[0], other], folders[1], out)
    for _ in range(2):
        evaluate(*folders, tmp_path / "own")  # its own table is replaced


def test_two_files_need_no_common_name(tmp_path: Path) -> None:
    pred, ref = save(tmp_path / "mine.nii.gz", box(5)), save(tmp_path / "truth.nii", box(5))
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(labels={1: "liver"}))
    assert result.cases[0].name == "truth" and result.table()[0]["class"] == "liver"
    assert result.dice[1].mean == 1.0


def test_the_command_line_stands_in_the_page(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", *map(str, folders), "-o", str(tmp_path / "my out"), "--label", "1=the liver", "--merge-labels"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/medseg", *words])
    (script,) = entry_points(group="console_scripts", name="medseg")
    result = CliRunner().invoke(script.load(), words)
    assert result.exit_code == 0, result.output
    page = html.unescape((tmp_path / "my out" / "report.html").read_text())
    assert f"<code>{shlex.join(['medseg', *words])}</code>" in page


def test_scans_and_maps_beside_the_masks_are_not_predictions(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    noise = np.random.default_rng(0).random((10, 9, 8)).astype(np.float32)
    for name in ("a.nii.gz", "a_prob.nii.gz", "a_uncertainty.nii.gz", ".hidden.nii.gz"):
        save(pred / name, noise)
    save(pred / "more_seg.nii.gz", box(3))
    result = evaluate(pred, ref, tmp_path / "out")
    assert result.cases[0].prediction_file.endswith("a_seg.nii.gz")
    assert but_few(result.warnings) == [
        "Predictions without a reference, not evaluated: more.",
        "Not used for calibration: a_prob.nii.gz holds no class probabilities on the grid of its reference.",
    ]
    assert result.reliability is None
    assert "not evaluated: more" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("labels", [[2, 1, 7], {7: "absent", 2: "two", 1: "one"}])
def test_asked_labels_only(folders: tuple[Path, Path], tmp_path: Path, labels: dict[int, str] | list[int]) -> None:
    result = evaluate(*folders, tmp_path / "out", EvaluateOptions(labels=labels))
    assert list(result.labels) == [1, 2, 7]
    assert but_few(result.warnings) == ["Labels not evaluated: 3.", "Labels in no reference and no prediction: 7."]
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


def test_no_label_at_all(tmp_path: Path) -> None:
    empty = save(tmp_path / "a.nii.gz", box(2))
    with pytest.raises(InputError, match="no label above 0"):
        evaluate(empty, empty, tmp_path / "out")
    result = evaluate(empty, empty, tmp_path / "out", EvaluateOptions(labels=[1]))  # asked for: absent, and said so
    assert result.dice[1].n_missing == 1


def test_a_scan_is_not_taken_for_a_label_map(tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii.gz", np.arange(12 * 12 * 12, dtype=np.int16).reshape(12, 12, 12))
    with pytest.raises(InputError, match="1727 different labels above 0"):
        evaluate(scan, scan, tmp_path / "out")


def test_images_are_the_background(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    evaluate(pred, ref, tmp_path / "plain")
    noise = np.random.default_rng(0).random((10, 9, 8)).astype(np.float32)
    save(tmp_path / "images" / "a.nii.gz", noise)
    save(tmp_path / "images" / "b_0000.nii.gz", noise)
    evaluate(pred, ref, tmp_path / "pictured", EvaluateOptions(images=tmp_path / "images"))

    plain, pictured = (viewed((tmp_path / folder / "report.html").read_text()) for folder in ("plain", "pictured"))
    assert set(plain) == set(pictured) == {"a", "b", "c"}
    same = [plain[name]["scan"] == pictured[name]["scan"] for name in "abc"]
    assert same == [False, False, True]  # c has no scan: masks are shown on black
    save(tmp_path / "images" / "a.nii.gz", noise[1:])
    with pytest.raises(InputError, match="9 x 9 x 8 voxels"):
        evaluate(pred, ref, tmp_path / "never", EvaluateOptions(images=tmp_path / "images"))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(("named", "shown"), [((), "c"), (("b", "a"), "ba")])
def test_the_viewer_holds_what_fits_and_the_named_cases(
    named: tuple[str, ...], shown: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are in memory before the numbers are written: nine chest scans would take 14 GB. The worst case, c, fits."""
    monkeypatch.setattr("medseg_diffusion.workflows.viewed.MOST_VOXELS", 3 * 10 * 9 * 8)
    evaluate(*folders, tmp_path / "out", EvaluateOptions(view=named))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "".join(re.findall(r"<option value=\"\d\">(\w) ", page)) == shown


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
        page = (folder / "out" / "report.html").read_text()
        pages.append((viewed(page), re.findall(r"base64,([^\"]+)", page)))
    assert pages[0] == pages[1]
    assert pages[0][1], "still pictures"


def test_a_case_without_the_class_is_left_out_of_its_mean(tmp_path: Path) -> None:
    pred, ref = tmp_path / "pred", tmp_path / "ref"
    for name, predicted, expected in (("a", 4, 6), ("b", 6, 6), ("c", 2, 2)):  # half of it, exact, empty on both sides
        save(pred / f"{name}_seg.nii.gz", box(predicted))
        save(ref / f"{name}.nii.gz", box(expected))
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


def test_files_that_store_the_axes_in_another_order_give_the_same_result(tmp_path: Path) -> None:
    """Masks from other programs: the same voxels at the same places, and nothing is interpolated."""
    noise = np.random.default_rng(0).random((10, 9, 8)).astype(np.float32)
    arrays = {
        "p/a_seg": box(5), "p/a_prob": np.stack([1 - noise, noise], -1), "p/a_uncertainty": noise,
        "p/a_members": np.stack([box(5), box(4)], -1), "rater/a": box(6), "maps/a": noise, "foreground/a": box(8),
        "images/a": noise,
    }  # fmt: skip
    ref, results = save(tmp_path / "ref" / "a.nii.gz", box(6)).parent, []
    for axes in ("RAS", "PIR"):
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
        )
        for name, array in arrays.items():
            image = nib.load(save(tmp_path / axes / f"{name}.nii.gz", array)).as_reoriented(turn)
            nib.save(image, tmp_path / axes / f"{name}.nii.gz")
        paths = {name: tmp_path / axes / name for name in ("images", "foreground")}
        options = EvaluateOptions(raters=[tmp_path / axes / "rater"], scores=tmp_path / axes / "maps", **paths)
        evaluate(tmp_path / axes / "p", ref, tmp_path / axes / "out", options)
        page, summary = ((tmp_path / axes / "out" / name).read_text() for name in ("report.html", "summary.json"))
        results.append((viewed(page), json.loads(summary.replace(f"/{axes}/", "/"))))
    assert results[0] == results[1]
    layers, summary = results[0]
    assert {"scan", "uncertainty", "anomaly"} <= set(layers["a"]), "all of them were used"
    assert {"calibration", "raters", "detection"} <= set(summary) and not summary["warnings"]


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
    calibration = json.loads((tmp_path / "out" / "summary.json").read_text())["calibration"]
    assert calibration["n_cases"] == 2 and calibration["ECE"] == pytest.approx(0.2, abs=1e-6)
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
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(merge_labels=True, raters=[other]))
    assert list(result.labels) == [1] and result.dice[1].mean == 1 and result.reliability is not None
    assert result.readers is not None and result.readers.energy_distance.mean == pytest.approx(0.25)


def test_a_single_case_takes_a_rater_of_any_name_and_strangers_are_named(tmp_path: Path) -> None:
    pred, ref = save(tmp_path / "a_seg.nii.gz", box(4)), save(tmp_path / "ref" / "a.nii.gz", box(4))
    rater = save(tmp_path / "second.nii.gz", box(6))
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(raters=[rater]))
    assert result.readers is not None and result.readers.energy_distance.mean == pytest.approx(0.25)
    strangers = save(tmp_path / "others" / "b.nii.gz", box(6)).parent
    unrated = evaluate(pred, ref, tmp_path / "again", EvaluateOptions(raters=[strangers]))
    assert unrated.readers is None and f"No case of this rater is evaluated: {strangers}." in unrated.warnings


def test_what_does_not_exist_is_a_dash_and_not_nan(tmp_path: Path) -> None:
    """Without a marked voxel the frequencies have no error, and without a lesion score maps have no AUROC."""
    empty = box(2)
    pred, ref = save(tmp_path / "p" / "a_seg.nii.gz", empty), save(tmp_path / "ref" / "a.nii.gz", empty)
    rater, scores = (
        save(tmp_path / "r" / "a.nii.gz", empty),
        save(tmp_path / "s" / "a_anomaly.nii.gz", empty + np.float32(0.5)),
    )
    done = medseg("evaluate", pred, ref, "-o", tmp_path / "out", "--rater", rater, "--label", 1)
    assert done.exit_code == 0, done.output
    assert "frequency ECE \u2013" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>Frequency ECE</dt><dd>\u2013</dd>" in page
    markdown = medseg(
        "evaluate", pred, ref, "-o", tmp_path / "maps", "--scores", scores, "--label", 1, "--markdown", "-"
    )
    assert markdown.exit_code == 0, markdown.output
    assert "mean AUROC \u2013 and AUPRC \u2013 over" in markdown.stdout


def test_a_rater_is_not_counted_twice(tmp_path: Path) -> None:
    """Neither under one name nor under two, nor as the reference: agreement would look better than it is."""
    pred, ref = save(tmp_path / "pred" / "a.nii.gz", box(4)).parent, save(tmp_path / "ref" / "a.nii.gz", box(4)).parent
    rater = save(tmp_path / "rater" / "a.nii.gz", box(6)).parent
    (tmp_path / "link").symlink_to(rater)
    for named, other in ((rater, rater), (rater, tmp_path / "link"), (rater, rater / "a.nii.gz"), (ref, "")):
        options = ("--rater", named, *(("--rater", other) if other else ()))
        result = medseg("evaluate", pred, ref, "-o", tmp_path / "out", *options)
        (line,) = error_lines(result)
        where = f"--rater {named}" if other else "the reference"
        assert result.exit_code == 2 and f"its mask of a is that of {where}; name each rater once" in line
    assert not (tmp_path / "out").exists()


def test_raters_of_a_large_scan_take_little_memory(tmp_path: Path) -> None:
    """64 bytes a voxel are the samples as they are read; with copies of whole scans it took 630."""
    mask = np.zeros((60, 60, 60), np.uint8)
    mask[20:40, 20:40, 20:40] = 7
    ref, rater, pred = (save(tmp_path / name, mask) for name in ("a.nii.gz", "rater.nii.gz", "p/a_seg.nii.gz"))
    save(pred.with_name("a_members.nii.gz"), np.stack([mask] * 16, axis=-1))
    tracemalloc.start()
    found = compare_with_raters(RatersTask(MaskPair("a", pred, ref), (rater,), (7,)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.agreement.matched_iou == 1 and peak < 200 * mask.size


def test_samples_are_compared_with_all_raters(tmp_path: Path) -> None:
    pred, one, two = tmp_path / "pred", tmp_path / "one", tmp_path / "two"
    for name in ("a", "b"):
        save(one / f"{name}.nii.gz", box(4))
        save(pred / f"{name}_seg.nii.gz", box(4))
    save(two / "a.nii.gz", box(6))
    alone = evaluate(pred, one, tmp_path / "alone")
    assert alone.readers is None
    single = evaluate(pred, one, tmp_path / "single", EvaluateOptions(raters=[two]))
    assert single.readers is not None and single.readers.energy_distance.n == 1, "only case a has a second rater"
    assert single.readers.energy_distance.mean == pytest.approx(0.25)  # 2 (0 + 1/2) / 2 - (1/2 + 1/2) / 4
    save(pred / "a_members.nii.gz", np.stack([box(6), box(4)], axis=-1))
    both = evaluate(pred, one, tmp_path / "both", EvaluateOptions(raters=[two]))
    assert both.readers is not None and both.readers.energy_distance.mean == pytest.approx(0, abs=1e-9)
    assert both.readers.matched_iou.mean == pytest.approx(1)
    assert "Several raters" in (tmp_path / "both" / "report.html").read_text()

    stale = nib.load(pred / "a_members.nii.gz")
    stale.header["descrip"] = b"medseg-diffusion another 0123456789ab"
    nib.save(stale, pred / "a_members.nii.gz")
    alone = evaluate(pred, one, tmp_path / "stale", EvaluateOptions(raters=[two]))
    assert alone.readers is not None and alone.readers.energy_distance.mean == pytest.approx(0.25), "as without members"
    assert [text for text in alone.warnings if "members" in text] == [
        f"{pred / 'a_members.nii.gz'}: not of the model that made the mask beside it, so it is not used."
    ]

    save(two / "a.nii.gz", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match="3 x 3 x 3 voxels; expected 10 x 9 x 8"):
        evaluate(pred, one, tmp_path / "bad", EvaluateOptions(raters=[two]))


def test_slices_of_one_patient_count_once(tmp_path: Path) -> None:
    """Two patients with three and one cases are n = 2, also in the score maps' means."""
    pred, ref, maps = tmp_path / "pred", tmp_path / "ref", tmp_path / "maps"
    rows = ["case,patient"]
    for name, size, patient in (("a1", 4, "a"), ("a2", 4, "a"), ("a3", 6, "a"), ("b1", 6, "b")):
        save(ref / f"{name}.nii.gz", box(4))
        save(pred / f"{name}.nii.gz", box(size))
        save(maps / f"{name}_scores.nii.gz", box(size).astype(np.float32))
        rows.append(f"{name},{patient}")
    table = tmp_path / "patients.csv"
    table.write_text("\n".join(rows))
    table.write_text("\n".join([*rows, "c1,c"]))
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(patients=table, scores=maps))
    assert f"{table}: 1 of 5 rows are of cases that are not there." in result.warnings
    dice = result.dice[1]
    low = 2 * 2 / (2 + 4)  # the layers of the two boxes
    assert dice.n == 2 and dice.mean == pytest.approx(((1 + 1 + low) / 3 + low) / 2, abs=1e-6)
    assert result.unit == "patients" and result.detection is not None and result.detection.means["Dice"].n == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["n_cases"], summary["n_patients"]) == (4, 2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Mean over patients" in page and "The cases of a patient are averaged first." in page
    alone = evaluate(pred, ref, tmp_path / "cases")
    assert alone.dice[1].n == 4 and "Mean over cases" in (tmp_path / "cases" / "report.html").read_text()
    table.write_text("\n".join(rows[:-1]))
    with pytest.raises(InputError, match="no row for case b1"):
        evaluate(pred, ref, tmp_path / "bad", EvaluateOptions(patients=table))
    assert not (tmp_path / "bad").exists()


# ---- tolerances, names, strata, processes ------------------------------------------------------------------------


def test_class_names_come_from_the_files_beside_the_masks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    (ref / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}))
    result = evaluate(*folders, tmp_path / "out")
    assert result.labels == {1: "liver", 2: "spleen", 3: "label 3"}
    assert evaluate(*folders, tmp_path / "out", EvaluateOptions(labels=[2])).labels == {2: "spleen"}
    assert evaluate(*folders, tmp_path / "out", EvaluateOptions(labels={2: "mine", 1: ""})).labels == {
        1: "liver",
        2: "mine",
    }
    merged = evaluate(*folders, tmp_path / "out", EvaluateOptions(merge_labels=True))
    assert merged.labels == {1: "label 1"}, "merged labels are not the class of label 1"
    (pred / "a_statistics.json").write_text(json.dumps({"classes": {"spleen": {}}}))
    assert any("Label 1 is liver in" in warning for warning in evaluate(*folders, tmp_path / "out").warnings)


def test_names_on_the_command_line_need_no_readable_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Which is the remedy that the message on an unreadable file names."""
    (folders[1] / "dataset.json").write_text("[]")
    with pytest.raises(InputError, match="or name the classes with --label VALUE=NAME"):
        evaluate(*folders, tmp_path / "out")
    assert evaluate(*folders, tmp_path / "out", EvaluateOptions(labels={1: "liver"})).labels == {1: "liver"}
    with pytest.raises(InputError, match="unreadable entry"):
        evaluate(*folders, tmp_path / "out", EvaluateOptions(labels={1: "liver", 2: ""}))


def test_pixels_of_image_files_are_not_passed_off_as_millimetres(tmp_path: Path) -> None:
    from PIL import Image

    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / folder / "a.png")
    result = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")
    assert len(result.warnings) == 1 and "a pixel counts as 1 x 1 x 1 mm" in result.warnings[0]


def test_a_class_may_have_a_tolerance_of_its_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Case a lacks two layers of 2 mm: within 4 mm all of the surface agrees, within 1 mm not."""
    _, ref = folders
    (ref / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}))

    def nsd(**options) -> float:
        return evaluate(*folders, tmp_path / "out", EvaluateOptions(**options)).means["nsd"][1].mean

    assert nsd(tolerance_mm=4.0) == nsd(tolerances_mm={"liver": 4.0}) == nsd(tolerances_mm={"1": 4.0}) == 1
    assert nsd() < 1 and nsd(tolerances_mm={"spleen": 4.0}) == nsd()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tolerance_mm"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    with pytest.raises(UsageError, match="'lever', but no class has this name; the names known are liver, spleen"):
        nsd(tolerances_mm={"lever": 4.0})
    unused = evaluate(*folders, tmp_path / "out", EvaluateOptions(tolerances_mm={"9": 2.0})).warnings
    assert but_few(unused) == ["Tolerances of labels that are not evaluated: 9."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance_mm": 0.0}, "a tolerance of 0 mm; expected a number above 0"),
        ({"tolerances_mm": {"1": float("nan")}}, "a tolerance of nan mm"),
        ({"jobs": 0}, "0 jobs; expected 1 or more"),
        ({"lesion_overlap": 1.5}, "a lesion overlap of 1.5"),
    ],
)
def test_options_out_of_range(folders: tuple[Path, Path], tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(*folders, tmp_path / "out", EvaluateOptions(**options))
    assert not (tmp_path / "out").exists()


def test_cldice_only_where_asked_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plain = evaluate(*folders, tmp_path / "plain")
    asked = evaluate(*folders, tmp_path / "asked", EvaluateOptions(cldice=True))
    assert "cldice" not in plain.means and asked.means["cldice"][2].mean == 1
    assert "clDice" in json.loads((tmp_path / "asked" / "summary.json").read_text())["mean"]["2"]


def test_strata_have_means_of_their_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "sites.csv"
    table.write_text("case,site\na,north\nb,south\nc,south\nz,west\n")
    result = evaluate(*folders, tmp_path / "out", EvaluateOptions(strata=(table, "site")))
    assert result.strata is not None and list(result.strata.means) == ["north", "south"]
    north, south = (result.strata.means[name]["dice"] for name in ("north", "south"))
    assert north[1].mean == pytest.approx(2 / 3) and north[2].n == 0 and south[2].mean == 1 and south[3].mean == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["strata"]["column"] == "site"
    assert summary["strata"]["confidence_interval_95"]["south"]["2"]["Dice"]["n"] == 1
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        assert {(row["case"], row["stratum"]) for row in csv.DictReader(file)} == {
            ("a", "north"), ("b", "south"), ("c", "south"),
        }  # fmt: skip
    table.write_text("case,site\na,north\nb,south\n")
    with pytest.raises(InputError, match="no row for case c"):
        evaluate(*folders, tmp_path / "never", EvaluateOptions(strata=(table, "site")))
    assert not (tmp_path / "never").exists()


def test_processes_change_nothing_and_hand_errors_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, _ = folders
    p = np.where(box(4) == 1, 0.9, 0.1).astype(np.float32)
    save(pred / "a_prob.nii.gz", np.stack([1 - p, p], axis=-1))
    progress: list[tuple[str, float]] = []
    evaluate(*folders, tmp_path / "one")
    evaluate(*folders, tmp_path / "two", EvaluateOptions(jobs=2), on_progress=lambda *state: progress.append(state))
    for name in ("summary.json", "cases.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert progress == [("cases: 1 of 3", 1 / 3), ("cases: 2 of 3", 2 / 3), ("cases: 3 of 3", 1.0)]
    save(pred / "b.nii.gz", box(6) * np.float32(0.5))
    with pytest.raises(InputError, match=r"found the label 0\.5; expected whole numbers"):
        evaluate(*folders, tmp_path / "never", EvaluateOptions(jobs=2))
    assert not (tmp_path / "never").exists()


# ---- several sets of predictions ---------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Twelve cases. Set first is right, second lacks layers; case 7 is in the first alone, case 8 has no reference."""
    first, second, ref = tmp_path / "runs" / "first", tmp_path / "runs" / "second", tmp_path / "ref"
    for i in range(12):
        save(first / f"case{i}_seg.nii.gz", box(8))
        if i != 7:
            save(second / f"case{i}_seg.nii.gz", box(5 + i % 2))
        if i != 8:
            save(ref / f"case{i}.nii.gz", box(8))
    return first, second, ref


def test_sets_of_predictions_are_compared_on_the_cases_that_all_have(sets, tmp_path: Path) -> None:
    *predictions, ref = sets
    out = tmp_path / "out"
    result = compare_predictions(predictions, ref, out)
    assert list(result.evaluations) == ["first", "second"]
    assert [case.name for case in result.first.cases] == sorted(f"case{i}" for i in range(12) if i not in (7, 8))
    assert result.left_out == {"case7": "no prediction in second", "case8": "no reference"}
    warning = "Only cases that all have are compared. Left out: case7 (no prediction in second), case8 (no reference)."
    assert result.warnings == (warning,) and result.evaluations["first"].warnings == (warning,)
    assert but_few(result.evaluations["second"].warnings) == [warning], "of a number that comparisons do not show"
    dice = next(one for one in result.differences if one.metric == "dice")
    lacking = [1 - 2 * layers / (layers + 6) for layers in (3, 4)]  # each in half of the cases
    assert dice.difference.mean == pytest.approx(np.mean(lacking)) and dice.difference.n == 10
    assert dice.conclusion.startswith("Dice of label 1: first is better (first minus second: +0.2")

    written = json.loads((out / "comparison.json").read_text())
    assert written["n_cases"] == 10 and written["left_out"]["case7"] == "no prediction in second"
    assert written["comparisons"][0]["conclusion"] == dice.conclusion
    for name in ("first", "second"):
        summary = json.loads((out / name / "summary.json").read_text())
        assert summary["mean"]["1"]["Dice"] == pytest.approx(result.evaluations[name].dice[1].mean)
        assert (out / name / "cases.csv").is_file() and (out / name / "report.html").is_file()


def test_single_files_are_one_case_whatever_their_names(tmp_path: Path) -> None:
    a, b, ref = (save(tmp_path / f"{name}.nii.gz", box(stop)) for name, stop in (("x", 5), ("y", 6), ("truth", 6)))
    result = compare_predictions([a, b], ref, tmp_path / "out")
    assert list(result.evaluations) == ["x", "y"] and [case.name for case in result.first.cases] == ["truth"]
    assert "too few cases (1)" in result.differences[0].conclusion


def test_sets_whose_folders_have_one_name_are_told_apart(sets, tmp_path: Path) -> None:
    first, second, ref = sets
    for place, old in (("a", first), ("b", second)):
        (tmp_path / place).mkdir()
        old.rename(tmp_path / place / "pred")
    result = compare_predictions([tmp_path / "a" / "pred", tmp_path / "b" / "pred"], ref, tmp_path / "out")
    assert list(result.evaluations) == ["a_pred", "b_pred"]


def test_a_page_that_cannot_be_made_leaves_nothing(sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the sets would stand there without their comparison."""

    def broken(*_: object, **__: object) -> str:
        raise InputError(tmp_path, "a page that cannot be made", "a page", "none")

    monkeypatch.setattr("medseg_diffusion.workflows.evaluate.comparison_page", broken)
    with pytest.raises(InputError, match="a page that cannot be made"):
        compare_predictions(sets[:2], sets[2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sets_that_cannot_be_compared(sets, tmp_path: Path) -> None:
    first, second, ref = sets
    with pytest.raises(UsageError, match="the same predictions twice"):
        compare_predictions([first, first], ref, tmp_path / "out")
    with pytest.raises(UsageError, match="two sets of predictions or more"):
        compare_predictions([first], ref, tmp_path / "out")
    with pytest.raises(UsageError, match="score maps belong to one set"):
        compare_predictions([first, second], ref, tmp_path / "out", EvaluateOptions(scores=first))
    other = save(tmp_path / "other" / "z.nii.gz", box(4)).parent
    with pytest.raises(InputError, match=r"no case that .*first, .*other all have a prediction for"):
        compare_predictions([first, other], ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_of_sets_stay_in_the_folder_of_results_and_away_from_masks(sets, tmp_path: Path, monkeypatch) -> None:
    first, second, ref = sets
    with pytest.raises(UsageError, match="the results of first would be written among its masks"):
        compare_predictions([first, second], ref, first.parent)
    assert not (first.parent / "report.html").exists() and not (first / "report.html").exists()
    (first / "below").mkdir()
    monkeypatch.chdir(first / "below")
    result = compare_predictions([Path(".."), second], ref, tmp_path / "out")
    assert list(result.evaluations) == ["first", "second"], "a name of .. would leave the folder"


def test_a_set_with_a_bad_file_leaves_nothing_of_the_other_sets(sets, tmp_path: Path) -> None:
    first, second, ref = sets
    (second / "case0_uncertainty.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match="case0_uncertainty"):
        compare_predictions([first, second], ref, tmp_path / "out", EvaluateOptions(view=["case0"]))
    assert not (tmp_path / "out").exists()


def test_a_case_to_view_is_looked_for_before_all_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(UsageError, match="--view x: no case of this name; there is, for instance, a"):
        evaluate(*folders, tmp_path / "out", EvaluateOptions(view=["x"]), lambda what, count, of: done.append(count))
    assert not done and not (tmp_path / "out").exists()


def test_the_command_compares_and_says_what_the_numbers_show(sets, tmp_path: Path) -> None:
    first, second, ref = map(str, sets)
    printed = medseg("evaluate", first, second, ref, "-o", str(tmp_path / "out"))
    assert printed.exit_code == 0, printed.output
    assert "Dice of label 1: first is better" in printed.output
    again = medseg("evaluate", first, second, "--reference", ref, "-o", str(tmp_path / "again"), "--json")
    content = json.loads(again.stdout)
    assert set(content["predictions"]) == {"first", "second"}
    assert {one["metric"] for one in content["comparisons"]} >= {"dice", "nsd", "hd95_mm", "absolute_volume_error_ml"}


def test_json_has_the_warnings_of_the_table_and_both_go_to_stderr(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A program that reads stdout must not miss that cases were left out, and stdout stays JSON."""
    pred, ref = folders
    save(pred / "more_seg.nii.gz", box(3))
    warning = "Predictions without a reference, not evaluated: more."
    command = ("evaluate", pred, ref, "-o", tmp_path / "out")
    table, as_json = medseg(*command), medseg(*command, "--json")
    content = json.loads(as_json.stdout)
    assert table.stderr == as_json.stderr == "".join(f"medseg: warning: {text}\n" for text in content["warnings"])
    assert but_few(content["warnings"]) == [warning] and [row["label"] for row in content["rows"]] == [1, 2, 3]
    quiet = medseg(*command, "--json", "--quiet")
    assert json.loads(quiet.stdout) == content and not quiet.stderr
    both = ("evaluate", pred, ref, ref, "-o", tmp_path / "both")
    warning = "Only cases that all have are compared. Left out: more (no reference)."
    compared = medseg(*both, "--json")
    said = json.loads(compared.stdout)["warnings"]
    assert but_few(said) == [warning]
    assert medseg(*both).stderr == compared.stderr == "".join(f"medseg: warning: {text}\n" for text in said)


def test_json_has_calibration_raters_and_strata_as_the_table(tmp_path: Path) -> None:
    pred, ref = save(tmp_path / "p" / "a_seg.nii.gz", box(5)).parent, save(tmp_path / "r" / "a.nii.gz", box(5)).parent
    save(pred / "a_prob.nii.gz", np.stack([box(5) == 0, box(5) == 1], axis=-1).astype(np.float32))
    (tmp_path / "sites.csv").write_text("case,site\na,north\n")
    extra = ("--rater", save(tmp_path / "second.nii.gz", box(6)), "--strata", f"{tmp_path / 'sites.csv'}:site")
    content = json.loads(medseg("evaluate", pred, ref, "-o", tmp_path / "out", *extra, "--json").stdout)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert all(content[key] == summary[key] for key in ("calibration", "raters", "strata"))
    assert content["calibration"]["ECE"] == 0 and content["strata"]["column"] == "site"


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_facts_about_files_are_warnings_of_the_result_once_for_all_files(tmp_path: Path, jobs: int) -> None:
    """Also those of processes of their own, which would print them on stderr in another form."""
    files = {"pred": "{}_seg.nii.gz", "ref": "{}.nii.gz", "other": "{}.nii"}
    for folder, name in files.items():
        (tmp_path / folder).mkdir()
        for case in "ab":
            nib.save(nib.Nifti1Image(box(5), None), tmp_path / folder / name.format(case))
    pred, ref, other = (tmp_path / folder for folder in files)
    result = evaluate(pred, ref, tmp_path / "out", EvaluateOptions(raters=[other], jobs=jobs))
    (warning,) = but_few(result.warnings)
    names, _, fact = warning.partition(": ")
    assert set(names.split(", ")) == {name.format(case) for name in files.values() for case in "ab"}
    assert fact.startswith("its header has no orientation") and fact.endswith(".")
    assert warning in json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PRED"], "name a prediction and its reference"),
        (["PRED", "REF", "--strata", "table.csv"], "not FILE.csv:COLUMN"),
        (["PRED", "REF", "--tolerance", "liver"], "not MM or CLASS=MM"),
        (["PRED", "REF", "--tolerance", "0"], "a tolerance of 0 mm"),
        (["PRED", "REF", "--jobs", "0"], "--jobs"),
        (["PRED", "REF", "--label", "x=1"], "not VALUE or VALUE=NAME"),
    ],
)
def test_wrong_usage_of_the_command(
    folders: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = dict(zip(("PRED", "REF"), map(str, folders), strict=True))
    result = medseg("evaluate", *[places.get(word, word) for word in arguments], "-o", str(tmp_path / "out"))
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_metrics_that_say_most(folders: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "sites.csv"
    table.write_text("case,class\na,north\nb,south\nc,south\n")  # a column with the name of one that is printed
    words = ["--tolerance", "4", "--tolerance", "2=1", "--strata", f"{table}:class", "--cldice", "--jobs", "1"]
    result = medseg("evaluate", *map(str, folders), "-o", str(tmp_path / "out"), *words)
    assert result.exit_code == 0, result.output
    heading, row = result.output.splitlines()[:2]
    assert heading.split() == ["class", "Dice", "NSD", "HD95", "mm", "Volume", "error", "ml", "cases"]
    assert row.startswith("label 1  0.667 (2 missing)  1.000 (2 missing)  4.00 (2 missing)")
    assert re.search(r"^south +label 3 +0.000 \(1 missing\)", result.output, re.MULTILINE)

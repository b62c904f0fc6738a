"""What `medseg segment` and `medseg anomaly` read, from the command line to the files they write."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.cli import error_lines, medseg
from tests.helpers.segmenters import make_model, save, tiny_config
from tests.volumes.test_dicom import series
from tests.volumes.test_dicom_series import study, values


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter with the channels T1 and FLAIR."""
    config = tiny_config(data={"window": [8, 8, 8], "channels": 2})
    return make_model(tmp_path_factory.mktemp("models") / "two", config)


def segment(*arguments: object) -> list[str]:
    """Run the command and return the masks that it wrote."""
    result = medseg("segment", *arguments, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    return [one["outputs"]["segmentation"] for one in map(json.loads, result.stdout.splitlines())]


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    """A BIDS folder of two subjects, whose scans are all different."""
    folder = tmp_path / "study"
    for number, (name, kind) in enumerate((s, k) for s in ("sub-01", "sub-02") for k in ("T1w", "FLAIR")):
        data = np.random.default_rng(number).random((9, 8, 10)).astype(np.float32)
        save(folder / name / "anat" / f"{name}_{kind}.nii.gz", data)
    (folder / "dataset_description.json").write_text("{}")
    return folder


def test_bids_pattern_and_list_give_the_same_masks(subjects: Path, tiny_model: Path, tmp_path: Path) -> None:
    """In the subjects' folders below -o; run again, the results are no scans and are left as they are."""
    (subjects / "scans.txt").write_text("sub-01/anat/sub-01_T1w.nii.gz\nsub-02/anat/sub-02_T1w.nii.gz\n")
    written = {}
    for name, arguments in {
        "bids": [subjects],
        "input": ["-i", subjects],
        "pattern": [subjects, "--pattern", "**/*_T1w*"],
        "list": [subjects / "scans.txt"],
    }.items():
        output = subjects / "derivatives" / name
        masks = segment(*arguments, "-m", tiny_model, "-o", output)
        written[name] = {Path(mask).relative_to(output): np.asarray(nib.load(mask).dataobj) for mask in masks}
        assert sorted(map(str, written[name])) == [f"sub-0{i}/anat/sub-0{i}_T1w_seg.nii.gz" for i in (1, 2)]
    for masks in written.values():
        assert all((masks[path] == written["bids"][path]).all() for path in written["bids"])
    again = segment(subjects, "--pattern", "sub-*/**/*_T1w*", "-m", tiny_model)
    assert [Path(mask).name for mask in again] == ["sub-01_T1w_seg.nii.gz", "sub-02_T1w_seg.nii.gz"]
    assert segment(subjects, "--pattern", "sub-*/**/*_T1w*", "-m", tiny_model) == again


def test_channels_by_bids_by_name_and_by_number_are_one_scan(
    subjects: Path, two_channels: Path, tmp_path: Path
) -> None:
    t1, flair = (subjects / "sub-01" / "anat" / f"sub-01_{kind}.nii.gz" for kind in ("T1w", "FLAIR"))
    cases = tmp_path / "cases"
    cases.mkdir()
    for number, file in enumerate((t1, flair)):
        (cases / f"case_000{number}.nii.gz").write_bytes(file.read_bytes())
    channels = ["--channel", f"flair={flair}", "--channel", f"T1={t1}"]
    by_name = segment(*channels, "-m", two_channels, "-o", tmp_path / "a.nii.gz")
    by_bids = segment(subjects, "-m", two_channels, "-o", tmp_path / "b")
    by_number = segment(cases, "-m", two_channels, "-o", tmp_path / "c")
    assert len(by_name) == len(by_number) == 1 and len(by_bids) == 2
    assert Path(by_number[0]).name == "case_seg.nii.gz"
    first, second = (np.asarray(nib.load(masks[0]).dataobj) for masks in (by_name, by_bids))
    assert (first == second).all()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name at least one scan"),
        (["--channel", "t1"], 2, "'t1' is not NAME=FILE"),
        (["--channel", "t1=x.nii.gz"], 3, "x.nii.gz: found no such file"),
        (["list.txt"], 3, "list.txt: found in line 2, gone.nii.gz: no such file"),
        ([".", "--pattern", "*_T1w.nii.gz"], 3, "found nothing that matches *_T1w.nii.gz"),
        (["a.nii.gz", "--series", "3"], 2, "none of the scans is DICOM"),
        (["a.nii.gz", "--fast", "--steps", "3"], 2, "--fast stands for --steps 1 --ensemble 1"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    arguments, code, message, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.nii.gz")
    (tmp_path / "list.txt").write_text("a.nii.gz\ngone.nii.gz\n")
    result = medseg("segment", *arguments, "-m", tiny_model, "--device", "cpu")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert code == 2 or len(error_lines(result)) == 1
    assert not list(tmp_path.glob("*_seg*"))


def test_a_dicom_study_is_segmented_by_the_models_series(tiny_model: Path, tmp_path: Path) -> None:
    folder = study(tmp_path / "visit", nested=True)
    result = medseg("segment", folder, "-m", tiny_model, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "warning" in result.stderr and "read the DICOM series 2 MR t1_mprage_sag (6 slices)" in result.stderr
    assert nib.load(tmp_path / "out" / "visit_seg.nii.gz").shape == (*values().shape[:0:-1], 6)
    other = medseg("segment", folder, "-m", tiny_model, "-o", tmp_path / "out", "--device", "cpu", "--series", "9")
    (line,) = error_lines(other)
    assert other.exit_code == 3 and "3 MR t2_flair (6 slices)" in line and "named by '9'" in line


def test_a_folder_of_dicom_zips_is_segmented_and_checked(tiny_model: Path, tmp_path: Path) -> None:
    """Each zip as when it is named directly."""
    for name in ("p1", "p2"):
        shutil.make_archive(str(tmp_path / "zips" / name), "zip", series(tmp_path / name, values()))
    shutil.make_archive(str(tmp_path / "zips" / "model"), "zip", tiny_model)
    named = segment(tmp_path / "zips" / "p1.zip", "-m", tiny_model, "-o", tmp_path / "one")
    masks = segment(tmp_path / "zips", "-m", tiny_model, "-o", tmp_path / "out")
    assert [Path(mask).name for mask in masks] == ["p1_seg.nii.gz", "p2_seg.nii.gz"]
    assert (nib.load(masks[0]).get_fdata() == nib.load(named[0]).get_fdata()).all()
    checked = json.loads(medseg("check", tmp_path / "zips", "--json").stdout)
    assert (checked["all files"], checked["problems"]) == (2, 0)


def test_scans_that_are_left_out_are_said_in_one_warning(tiny_model: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz")
    (tmp_path / "b.mgz").touch()
    result = medseg("segment", tmp_path, "-m", tiny_model, "-o", tmp_path / "out", "--device", "cpu", "--json")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1
    (line,) = [line for line in error_lines(result) if "left out" in line]
    named = f"({tmp_path}/b.mgz); convert them to NIfTI"
    assert line == f"medseg: warning: left out 1 file in formats that are not read {named}"


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_name_that_cannot_be_printed_costs_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """The scans after it are segmented, and an evaluation writes its results. The output of the tests is strict."""
    bad = os.fsdecode(b"bad\xff")
    for name in (bad, "good"):
        save(tmp_path / "scans" / f"{name}.nii.gz")
    words = ["segment", tmp_path / "scans", "-m", tiny_model, "-o", tmp_path / "masks", "--device", "cpu"]
    result = medseg(*words, "--report", tmp_path / "page.html", "--run-report", tmp_path / "run.json")
    assert result.exit_code == 0, result.output
    assert r"bad\udcff.nii.gz (" in result.stdout and "2 scans: 2 done" in result.stdout
    words = ["evaluate", tmp_path / "masks", tmp_path / "masks", "--label", 1, "-o", tmp_path / "out"]
    result = medseg(*words, "--markdown", tmp_path / "table.md", "--jobs", 1)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert Path(summary["metric_per_case"][0]["prediction_file"]) == tmp_path / "masks" / f"{bad}_seg.nii.gz"
    assert r"bad\udcff,1" in (tmp_path / "out" / "cases.csv").read_text("utf-8")


def test_anomaly_reads_folders_by_pattern(anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flair.nii.gz").write_bytes((anomaly_scans / "images" / "s0.nii.gz").read_bytes())
    command = ["anomaly", "-i", tmp_path, "--pattern", "*/flair.nii.gz", "-m", anomaly_models["pixel"]]
    result = medseg(*command, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    masks = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*_anomaly_mask.nii.gz"))
    assert masks == ["out/a/flair_anomaly_mask.nii.gz", "out/b/flair_anomaly_mask.nii.gz"]


@pytest.mark.parametrize(("flag", "instead"), [("--fast", "partial_noise.draws=2"), ("--keep-largest", "--min-volume")])
def test_anomaly_answers_flags_of_segment_with_the_right_one(flag: str, instead: str, tmp_path: Path) -> None:
    result = medseg("anomaly", tmp_path, flag)
    (line,) = error_lines(result)
    assert result.exit_code == 2 and instead in line
    assert flag not in medseg("anomaly", "--help").stdout

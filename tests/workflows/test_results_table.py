"""volumes.csv and anomalies.csv: one row a scan, whatever was finished, failed, divided, edited or killed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.methods.healthy_scores import HealthyScores
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.workflows import results_table
from medseg_diffusion.workflows.anomaly_result import AnomalyResult, compared, finished_anomaly
from medseg_diffusion.workflows.finished import EMPTY, MOSTLY_EMPTY, columns_of, finished_segmentation, numbers_of
from medseg_diffusion.workflows.results_table import FIRST, LAST, ResultsTable, read_table, table_path
from medseg_diffusion.workflows.scans import ScanResult, part_of
from tests.helpers.cli import error_lines, medseg
from tests.helpers.dicom_series import series
from tests.helpers.segmenters import calibrated, run, save

CPU = ("--device", "cpu")


def rows(file: Path) -> dict[str, dict[str, str]]:
    """Name of the scan -> row."""
    with file.open(newline="") as lines:
        return {Path(row["scan"]).name: row for row in csv.DictReader(lines)}


def three_scans(folder: Path) -> list[Path]:
    return [save(folder / f"{name}.nii.gz") for name in ("a", "bb", "ccc")]


def numbers(row: dict[str, str]) -> dict[str, str]:
    """A row without the columns that say which call wrote it."""
    return {name: value for name, value in row.items() if name != "status"}


def test_a_row_holds_what_the_result_holds(tmp_path: Path, tiny_model: Path) -> None:
    scans = three_scans(tmp_path / "in")
    model = calibrated(tiny_model, tmp_path / "known")
    results = run(scans, model, ensemble=3, output=tmp_path / "out", volumes=True)
    written = rows(tmp_path / "out" / "volumes.csv")
    assert list(next(iter(written.values()))) == [*FIRST, *columns_of({1: "bright"}), *LAST]
    for result in results:
        row = written[result.scan.name]
        assert (row["scan"], row["output"], row["status"]) == (
            str(result.scan), result.outputs["segmentation"].name, "done",
        )  # fmt: skip
        assert float(row["bright_volume_ml"]) == pytest.approx(result.volumes_ml["bright"], abs=1e-4)
        ends = float(row["bright_interval_low_ml"]), float(row["bright_interval_high_ml"])
        assert ends == pytest.approx(result.intervals_ml["bright"], abs=1e-4)
        assert (row["quality"], float(row["interval_level"])) == (result.quality, result.level) == ("usual", 0.8)
        assert float(row["seconds"]) == pytest.approx(result.seconds, abs=0.01)
        assert (row["model"], row["model_sha256"]) == ("known", load_model_files(model).sha256)
        assert row["error"] == row["flags"] == ""


@pytest.mark.parametrize("statistics", [True, False])
def test_finished_scans_keep_their_numbers(statistics: bool, tmp_path: Path, tiny_model: Path) -> None:
    scans = three_scans(tmp_path / "in")
    model, out = calibrated(tiny_model, tmp_path / "known", agreement=1.1), tmp_path / "out"
    run(scans[:2], model, ensemble=3, output=out, volumes=True, statistics=statistics)
    before = rows(out / "volumes.csv")
    results = run(scans, model, ensemble=3, output=out, volumes=True, statistics=statistics, skip_existing=True)
    after = rows(out / "volumes.csv")
    assert [after[scan.name]["status"] for scan in scans] == ["skipped", "skipped", "done"]
    for scan in scans[:2]:
        assert numbers(after[scan.name]) == numbers(before[scan.name])
        assert before[scan.name]["quality"] == "check" and before[scan.name]["flags"] == "members disagree"
    assert all(result.flags == ("members disagree",) for result in results)
    assert bool(results[0].members_ml) == statistics  # which the table does not hold


def test_finished_scans_keep_their_numbers_in_other_parts(tmp_path: Path, tiny_model: Path) -> None:
    """A change of --shard gives the table another name; the newest one in the folder tells of a scan."""
    scans, out = three_scans(tmp_path / "in"), tmp_path / "out"
    model = calibrated(tiny_model, tmp_path / "known", agreement=1.1)
    options = {"ensemble": 3, "output": out, "volumes": True}
    run(scans, model, **options)
    before = {name: numbers(row) for name, row in rows(out / "volumes.csv").items()}
    assert {row["quality"] for row in before.values()} == {"check"}
    for part in (1, 2):
        run(scans, model, skip_existing=True, shard=(part, 2), **options)
    in_parts = {name: row for file in out.glob("volumes.*-of-2.csv") for name, row in rows(file).items()}
    assert {name: numbers(row) for name, row in in_parts.items()} == before
    assert {row["status"] for row in in_parts.values()} == {"skipped"}
    other = calibrated(tiny_model, tmp_path / "other")
    for part in (1, 2):
        run(scans, other, seed=1, shard=(part, 2), **options)
    run(scans, model, skip_existing=True, **options)
    assert {row["model"] for row in rows(out / "volumes.csv").values()} == {"other"}, "not the row of a mask before"


def test_statistics_and_masks_give_the_same_volumes(tmp_path: Path, tiny_model: Path) -> None:
    scans = three_scans(tmp_path / "in")
    run(scans, tiny_model, output=tmp_path / "out", statistics=True, volumes=True)
    table = tmp_path / "out" / "volumes.csv"
    computed = rows(table)
    table.unlink()
    run(scans, tiny_model, output=tmp_path / "out", volumes=True, skip_existing=True)
    from_statistics = rows(table)
    table.unlink()
    for scan in scans:
        (tmp_path / "out" / f"{scan.name.removesuffix('.nii.gz')}_statistics.json").unlink()
    run(scans, tiny_model, output=tmp_path / "out", volumes=True, skip_existing=True)
    from_masks = rows(table)
    for scan in scans:
        volumes = {row[scan.name]["bright_volume_ml"] for row in (computed, from_statistics, from_masks)}
        assert len(volumes) == 1 and float(volumes.pop()) > 0
        assert from_statistics[scan.name]["model"] == "tiny" and from_statistics[scan.name]["seconds"]
        # A mask alone does not tell what made it.
        assert from_masks[scan.name]["model"] == from_masks[scan.name]["seconds"] == ""


def test_numbers_of_another_mask_do_not_count(tmp_path: Path, tiny_model: Path) -> None:
    """A mask that was edited, or written by a later call without --statistics, has its own volume and no interval."""
    scans, out = three_scans(tmp_path / "in"), tmp_path / "out"
    model = calibrated(tiny_model, tmp_path / "known")
    run(scans, model, ensemble=3, output=out, volumes=True, statistics=True)
    mask = nib.load(out / "a_seg.nii.gz")
    labels = np.zeros(mask.shape, np.uint8)
    labels[:2, :3, :4] = 1
    nib.save(nib.Nifti1Image(labels, mask.affine), out / "a_seg.nii.gz")
    run(scans, model, ensemble=3, output=out, volumes=True, skip_existing=True)
    row = rows(out / "volumes.csv")["a.nii.gz"]
    voxel_ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    assert float(row["bright_volume_ml"]) == pytest.approx(24 * voxel_ml, abs=1e-4)
    assert row["bright_interval_low_ml"] == row["quality"] == row["model"] == ""
    assert rows(out / "volumes.csv")["bb.nii.gz"]["bright_interval_low_ml"] != ""


def test_masks_that_tell_nothing_are_rows_with_a_warning(tmp_path: Path, tiny_model: Path) -> None:
    scans, out = three_scans(tmp_path / "in"), tmp_path / "out"
    run(scans, tiny_model, output=out)
    (out / "a_seg.nii.gz").write_bytes(b"no mask")
    mask = nib.load(out / "bb_seg.nii.gz")
    for name, value in (("bb", 0), ("ccc", 7)):
        nib.save(nib.Nifti1Image(np.full(mask.shape, value, np.uint8), mask.affine), out / f"{name}_seg.nii.gz")
    results = run(scans, tiny_model, output=out, volumes=True, skip_existing=True)
    assert [result.status for result in results] == ["skipped"] * 3
    written = rows(out / "volumes.csv")
    assert [written[scan.name]["flags"] for scan in scans] == ["warning", "empty mask", "warning"]
    assert "the finished mask cannot be read" in written["a.nii.gz"]["warnings"]
    assert written["bb.nii.gz"]["bright_volume_ml"] == "0.0"
    assert "the label 7 is no class of the model" in written["ccc.nii.gz"]["warnings"]


def test_an_empty_mask_keeps_the_word_of_its_members(tmp_path: Path) -> None:
    """The table does not hold members; "nothing was found" beside their warning would contradict it."""
    mask, scan = tmp_path / "a_seg.nii.gz", tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), mask)
    for text in (MOSTLY_EMPTY, EMPTY):
        first = ScanResult(scan, "done", {}, volumes_ml={"bright": 0.0}, warnings=(text,), flags=("empty mask",))
        with ResultsTable(tmp_path / "volumes.csv", columns_of({1: "bright"}), numbers_of, {scan: mask}) as table:
            table.add(first)
        (row,) = read_table(tmp_path / "volumes.csv")
        again = finished_segmentation(
            scan, {"segmentation": mask, "statistics": tmp_path / "no.json"}, {1: "bright"}, row
        )
        assert (again.warnings, again.flags) == ((text,), ("empty mask",))


@pytest.mark.parametrize(
    "damage", ['{"classes"', "[]", '{"classes": {}}', '{"classes": {"bright": {"volume_ml": "x"}}}']
)
def test_damaged_statistics_are_left_aside(damage: str, tmp_path: Path, tiny_model: Path) -> None:
    scan = save(tmp_path / "a.nii.gz")
    (result,) = run([scan], tiny_model, statistics=True)
    result.outputs["statistics"].write_text(damage)
    files = {"statistics": tmp_path / "a_statistics.json", "segmentation": tmp_path / "a_seg.nii.gz"}
    again = finished_segmentation(scan, files, {1: "bright"}, {})
    assert again.volumes_ml == pytest.approx(result.volumes_ml, rel=1e-5) and again.model == ""


def test_dicom_segmentations_are_counted_too(tmp_path: Path, tiny_model: Path) -> None:
    scans = [series(tmp_path / "in" / name) for name in ("one", "two")]
    options = {"output": tmp_path / "out", "output_format": "dicom-seg", "volumes": True}
    done = run(scans, tiny_model, **options)
    (tmp_path / "out" / "volumes.csv").unlink()
    again = run(scans, tiny_model, skip_existing=True, **options)
    assert [result.status for result in again] == ["skipped", "skipped"]
    for first, second in zip(done, again, strict=True):
        assert first.volumes_ml["bright"] > 0
        assert second.volumes_ml == pytest.approx(first.volumes_ml, rel=1e-5)


def test_the_command_writes_one_table_with_the_failures_and_one_for_each_part(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scans = three_scans(Path("in"))
    scans[1].write_bytes(b"no scan")
    assert medseg("segment", "in", "-m", tiny_model, "-o", "out", *CPU).exit_code == 1
    written = rows(Path("out/volumes.csv"))
    assert [written[scan.name]["status"] for scan in scans] == ["done", "failed", "done"]
    assert written["bb.nii.gz"]["output"] == "" and "bb.nii.gz: found" in written["bb.nii.gz"]["error"]
    for part in (1, 2):
        medseg("segment", "in", "-m", tiny_model, "-o", "parts", "--shard", f"{part}/2", *CPU)
    parts = {path.name: set(rows(path)) for path in Path("parts").glob("volumes*.csv")}
    shares = {i: {scan.name for scan in part_of({scan: {} for scan in scans}, (i, 2))} for i in (1, 2)}
    assert parts == {f"volumes.{i}-of-2.csv": names for i, names in shares.items() if names}


@pytest.mark.parametrize("command", ["segment", "anomaly"])
def test_no_part_replaces_what_another_part_tells_of_its_scans(
    command: str,
    tmp_path: Path,
    tiny_model: Path,
    anomaly_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page, the report on the run and the list of failures of a part are its own, as its table is."""
    monkeypatch.chdir(tmp_path)
    for good, bad in (("s0", "bad0"), ("s4", "bad1")):  # by the hash of their paths a pair for each part
        save(Path("in") / f"{good}.nii.gz")
        (Path("in") / f"{bad}.nii.gz").write_bytes(b"no scan")
    shares = {i: part_of({scan: {} for scan in sorted(Path("in").iterdir())}, (i, 2)) for i in (1, 2)}
    model = tiny_model if command == "segment" else anomaly_models["pixel"]
    words = ["-m", model, "-o", "out", "--report", "page.html", "--run-report", "run.json", *CPU]
    for i, share in shares.items():
        bad, good = sorted(scan.name for scan in share)
        result = medseg(command, "in", "--shard", f"{i}/2", *words)
        assert result.exit_code == 1 and f"see out/failures.{i}-of-2.csv" in result.stderr
        assert good in Path(f"page.{i}-of-2.html").read_text()
        told = json.loads(Path(f"run.{i}-of-2.json").read_text())["scans"]
        assert sorted(Path(scan["scan"]).name for scan in told) == [bad, good]
        assert list(rows(Path(f"out/failures.{i}-of-2.csv"))) == [bad]
    assert not Path("page.html").exists() and not Path("run.json").exists()


def test_where_the_table_stands(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, apart = [Path("a/x_seg.nii.gz"), Path("a/y_seg.nii.gz")], [Path("a/x_seg.nii.gz"), Path("b/x_seg.nii.gz")]
    assert table_path("volumes", beside, None, None) == Path("a/volumes.csv")
    assert table_path("volumes", apart, None, None) is None
    assert table_path("volumes", apart, Path("out"), (3, 9)) == Path("out/volumes.3-of-9.csv")
    assert table_path("volumes", beside[:1], Path("out"), None) is None
    monkeypatch.chdir(tmp_path)
    three_scans(Path("in"))
    assert medseg("segment", "in", "-m", tiny_model, *CPU).exit_code == 0
    assert [row["output"] for row in rows(Path("in/volumes.csv")).values()] == [
        f"{name}_seg.nii.gz" for name in ("a", "bb", "ccc")
    ]
    medseg("segment", "in/a.nii.gz", "-m", tiny_model, "-o", "single", *CPU)
    assert not list(Path("single").glob("*.csv"))


def test_rows_of_other_scans_stay_as_long_as_their_masks(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    first, second = three_scans(tmp_path / "in"), [save(tmp_path / "more" / f"{name}.nii.gz") for name in ("d", "ee")]
    run(first, tiny_model, output=out, volumes=True)
    before = rows(out / "volumes.csv")
    (out / "bb_seg.nii.gz").unlink()
    run(second, tiny_model, output=out, volumes=True)
    after = rows(out / "volumes.csv")
    assert set(after) == {"a.nii.gz", "ccc.nii.gz", "d.nii.gz", "ee.nii.gz"}
    assert after["a.nii.gz"] == before["a.nii.gz"]
    run([*first, *second], tiny_model, output=out, volumes=True, seed=1)
    assert len(rows(out / "volumes.csv")) == 5 and not list(out.glob(".*")), "each scan stands in it once"


def test_another_file_of_the_name_is_not_replaced(tmp_path: Path, tiny_model: Path) -> None:
    three_scans(tmp_path / "in")
    file = tmp_path / "out" / "volumes.csv"
    file.parent.mkdir()
    file.write_text("my,own,work\n")
    result = medseg("segment", tmp_path / "in", "-m", tiny_model, "-o", file.parent, *CPU)
    assert result.exit_code == 2 and "volumes.csv: is no table of results; move it" in error_lines(result)[0]
    assert [path.name for path in file.parent.iterdir()] == ["volumes.csv"] and file.read_text() == "my,own,work\n"


def test_a_table_that_cannot_be_written_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    scan = tmp_path / "a.nii.gz"
    monkeypatch.setattr(results_table, "write_files", full)
    with (
        pytest.warns(UserWarning, match=r"volumes.csv: No space left on device; the table is not written"),
        ResultsTable(tmp_path / "volumes.csv", [], lambda result: {}, {scan: scan}) as table,
    ):
        table.add(ScanResult(scan, "done"))


def test_the_table_is_complete_whenever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is killed while it goes through finished scans leaves the rows of those that it has not reached."""
    monkeypatch.setattr(results_table, "EVERY_S", 0.0)
    scans = {tmp_path / f"{i}.nii.gz": tmp_path / f"{i}_seg.nii.gz" for i in range(4)}
    for mask in scans.values():
        mask.touch()
    file = tmp_path / "volumes.csv"

    def added(status: str, x: float) -> list[list[tuple[str, str]]]:
        states = []
        with ResultsTable(file, ["x"], lambda result: {"x": x}, scans) as table:
            for scan in scans:
                table.add(ScanResult(scan, status))  # type: ignore[arg-type]
                states.append(sorted((Path(row["scan"]).name[0], row["x"]) for row in read_table(file)))
        return states

    assert [len(state) for state in added("done", 1.5)] == [1, 2, 3, 4]
    for i, state in enumerate(added("skipped", 2.5), 1):
        assert state == [(str(n), "2.5" if n < i else "1.5") for n in range(4)]


def test_lines_and_separators_in_names_and_errors_stay_in_their_field(tmp_path: Path) -> None:
    scan = tmp_path / 'odd, "name"\n=1+1.nii.gz'
    file = tmp_path / "volumes.csv"
    result = ScanResult(scan, "done", warnings=("one\ntwo", "three"), flags=("empty mask", "warning"))
    with ResultsTable(file, columns_of({1: "a, b"}), numbers_of, {scan: tmp_path / "x_seg.nii.gz"}) as table:
        table.add(result)
    (row,) = read_table(file)
    assert row["scan"] == str(scan) and row["warnings"] == "one two | three" and row["flags"] == "empty mask | warning"
    assert "a, b_volume_ml" in row


# ---- anomalies -------------------------------------------------------------------------------------------------------


def test_a_small_anomaly_is_not_nothing() -> None:
    """The command line said 0.00 ml where the page said 0.004 ml."""
    found = AnomalyResult(Path("a.nii.gz"), "done", score=0.5, threshold=0.25, volumes_ml={"anomaly": 0.004})
    assert found.headline == "score 0.500, not comparable with healthy scans; 0.004 ml above 0.250"
    everywhere = replace(found, healthy_false_positive_rate=0.996)
    assert everywhere.headline.endswith("(99.6 % of healthy tissue is expected above it)"), "it was 1e+02 %"


def test_anomalies_have_the_numbers_of_their_files(
    anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("anomaly", anomaly_scans / "images", "-m", anomaly_models["pixel"], "-o", out, *CPU)
    first = medseg(*command)
    assert first.exit_code == 0, first.output
    assert "score " in first.stdout and " healthy scans; " in first.stdout
    assert " % of healthy tissue is expected above it)" in first.stdout
    before = rows(out / "anomalies.csv")
    assert len(before) == 8
    for name, row in before.items():
        about = json.loads((out / f"{name.removesuffix('.nii.gz')}_anomaly.json").read_text())
        for key in ("score", "healthy_percentile", "healthy_scans", "volume_ml", "threshold", "share_of_foreground"):
            assert float(row[key]) == about[key]
        assert float(row["healthy_false_positive_rate"]) == about["healthy_false_positive_rate"] <= 0.025 + 1e-6
        assert row["model_sha256"] == about["model_sha256"] == load_model_files(anomaly_models["pixel"]).sha256
        assert row["flags"] == ("above healthy" if about["healthy_percentile"] >= 95 else "")
    again = medseg(*command, "--skip-existing", "--json")
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    assert {line["status"] for line in lines} == {"skipped"} and all(line["score"] > 0 for line in lines)
    after = rows(out / "anomalies.csv")
    assert {name: numbers(row) for name, row in after.items()} == {name: numbers(row) for name, row in before.items()}
    # Numbers of another mask do not count.
    mask = nib.load(out / "s0_anomaly_mask.nii.gz")
    nib.save(nib.Nifti1Image(np.ones(mask.shape, np.uint8), mask.affine), out / "s0_anomaly_mask.nii.gz")
    medseg(*command, "--skip-existing")
    edited = rows(out / "anomalies.csv")["s0.nii.gz"]
    assert float(edited["volume_ml"]) == pytest.approx(20 * 24 * 12 / 1000) and edited["score"] == ""


def test_finished_scans_keep_the_warnings_of_their_calls(
    anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path
) -> None:
    """Reasons why healthy scans say nothing about a scan, and remarks on its file, are in no file but the table."""
    (tmp_path / "in").mkdir()
    for name in ("s0", "s1"):
        nib.save(nib.load(anomaly_scans / "images" / f"{name}.nii.gz"), tmp_path / "in" / f"{name}.nii")
    with (tmp_path / "in" / "s0.nii").open("ab") as file:
        file.write(b"more")
    out = tmp_path / "out"
    command = ("anomaly", tmp_path / "in", "-m", anomaly_models["pixel"], "--median", "3", "-o", out, *CPU)
    assert medseg(*command).exit_code == 0
    before = rows(out / "anomalies.csv")
    assert "4 bytes follow the voxels" in before["s0.nii"]["warnings"] and "warning" in before["s0.nii"]["flags"]
    assert "calibrated with another median" in before["s1.nii"]["warnings"]
    medseg(*command, "--skip-existing")
    after = rows(out / "anomalies.csv")
    assert {name: numbers(row) for name, row in after.items()} == {name: numbers(row) for name, row in before.items()}
    mask = nib.load(out / "s1_anomaly_mask.nii.gz")
    nib.save(nib.Nifti1Image(np.ones(mask.shape, np.uint8), mask.affine), out / "s1_anomaly_mask.nii.gz")
    medseg(*command, "--skip-existing")
    assert "median" not in rows(out / "anomalies.csv")["s1.nii"]["warnings"], "of another mask"


def test_finished_scans_have_the_flags_and_words_of_new_ones(
    anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files hold one decimal of a percentile: 94.96 became 95 in them, and the finished scan was flagged."""
    monkeypatch.setattr(HealthyScores, "percentile", lambda self, score: 94.96)
    scan = anomaly_scans / "images" / "s0.nii.gz"
    command = ("anomaly", scan, "-m", anomaly_models["pixel"], "-o", tmp_path / "s_anomaly.nii.gz", "--json", *CPU)
    new, finished = (json.loads(medseg(*command, *more).stdout) for more in ((), ("--skip-existing",)))
    assert (new["status"], finished["status"]) == ("done", "skipped")
    assert new["flags"] == finished["flags"] and new["healthy_percentile"] == finished["healthy_percentile"]


def test_a_place_among_healthy_scans_is_not_rounded_up() -> None:
    assert compared(99.7, 300) == "higher than 99 % of 300 healthy scans", "one of them scored higher"
    assert compared(100, 300) == "higher than all 300 healthy scans"


@pytest.mark.parametrize("lacking", ["score", "threshold", None])
def test_numbers_of_an_incomplete_file_do_not_count(lacking: str | None, tmp_path: Path) -> None:
    files = {"mask": tmp_path / "a_anomaly_mask.nii.gz", "scores": tmp_path / "a_anomaly.json"}
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), files["mask"])
    content = {"score": 0.5, "threshold": 0.4, "volume_ml": 0.0, "seconds": 1.0, "model": "m"}
    files["scores"].write_text(json.dumps({key: value for key, value in content.items() if key != lacking}))
    result = finished_anomaly(tmp_path / "a.nii.gz", files, {})
    words = "score 0.500, not comparable with healthy scans; 0.000 ml above 0.400"
    assert result.headline == ("" if lacking else words) and result.model == ("" if lacking else "m")

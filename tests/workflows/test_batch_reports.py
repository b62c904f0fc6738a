"""`--report` of `segment` and `anomaly`: all scans of a call, with their numbers, whatever became of them."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows import segment as segment_module
from medseg_diffusion.workflows import segment_report as segment_report_module
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly
from medseg_diffusion.workflows.scans import ScanResult
from medseg_diffusion.workflows.viewed import MOST_VIEWED
from tests.helpers.anomaly import head, write
from tests.helpers.cli import medseg
from tests.helpers.dicom_series import series
from tests.helpers.segmenters import calibrated, run, save, save_image

EVIL = "<img src=x onerror=alert(1)>"


def overview(page: str) -> dict[str, list[str]]:
    """Name of the scan -> the texts of its row in the table of scans."""
    body = re.search(r'aria-label="Scans">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert body is not None
    found = {}
    for row in re.findall(r"<tr.*?</tr>", body[1], re.DOTALL):
        cells = [unescape(re.sub(r"<[^>]*>", " ", cell)).split() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        found[cells[0][0]] = [" ".join(cell) for cell in cells]
    return found


def without_scripts(page: Path) -> str:
    """The text of a page without its viewer's code."""
    return re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)


def viewed(page: str) -> list[str]:
    """The scans whose names open the viewer."""
    return [unescape(name) for name in re.findall(r'<tr[^>]* data-case="([^"]*)"', page)]


def test_finished_new_and_failed_scans_are_all_on_the_page(tmp_path: Path, tiny_model: Path) -> None:
    """Eight finished scans and a new one once gave a page of one."""
    scans = [save(tmp_path / "in" / f"s{i}.nii.gz") for i in range(4)]
    run(scans[:3], tiny_model, output=tmp_path / "out", statistics=True)
    scans.append(tmp_path / "in" / "broken.nii.gz")
    scans[-1].write_bytes(b"no scan")
    page = tmp_path / "out" / "page.html"
    results = run(scans, tiny_model, output=tmp_path / "out", skip_existing=True, report=page)
    assert [result.status for result in results] == ["skipped", "skipped", "skipped", "done", "failed"]
    text = page.read_text()
    rows = overview(text)
    assert list(rows) == ["broken.nii.gz", "s0.nii.gz", "s1.nii.gz", "s2.nii.gz", "s3.nii.gz"], "the failed one first"
    for result in results[:4]:
        assert rows[result.scan.name][1] == f"{result.volumes_ml['bright']:.3f}"
    assert "failed" in rows["broken.nii.gz"][0] and "found an unreadable file" in rows["broken.nii.gz"][-1]
    assert sorted(viewed(text)) == [f"s{i}.nii.gz" for i in range(4)], "finished scans have pictures, too"
    links = {unquote(unescape(link)) for link in re.findall(r'<a href="([^#"][^"]*)"', text)}
    assert {"s0_seg.nii.gz", "s3_seg.nii.gz", "../in/s0.nii.gz"} <= links
    assert all((page.parent / link).exists() for link in links)


def test_a_page_of_one_scan_has_no_overview(tmp_path: Path, tiny_model: Path) -> None:
    model = calibrated(tiny_model, tmp_path / "known", level=0.9)
    page = tmp_path / "page.html"
    (result,) = run([save(tmp_path / "scan.nii.gz")], model, ensemble=3, report=page)
    text = page.read_text()
    assert "<h2>scan.nii.gz</h2>" in text and 'id="overview"' not in text
    low, high = result.intervals_ml["bright"]
    assert f"{low:.3f} to {high:.3f}" in text and "90 % interval" in text and "Sampled masks" in text
    assert "<details>" not in text.split("How it was made")[0]
    assert "command" not in text.split("How it was made")[1].split("What the numbers")[0], "a Python caller has none"
    run([tmp_path / "scan.nii.gz"], model, skip_existing=True, report=page)
    assert "finished earlier" in page.read_text() and "finished earlier" not in text.split("What the numbers")[0]


def test_the_command_line_and_the_settings_are_on_the_page(tmp_path: Path, tiny_model: Path) -> None:
    scan, page = save(tmp_path / "scan.nii.gz"), tmp_path / "page.html"
    result = medseg("segment", scan, "-m", tiny_model, "--device", "cpu", "--ensemble", 2, "--report", page)
    assert result.exit_code == 0, result.output
    made = page.read_text().split("How it was made")[1]
    assert "<dt>command</dt><dd><code>medseg" in made
    assert re.search(r"tiny \(weights [0-9a-f]{12}\)", made) and "<dt>ensemble</dt><dd>2</dd>" in made


def test_a_stopped_call_leaves_the_page_of_what_was_done(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = [save(tmp_path / "in" / f"s{i}.nii.gz") for i in range(4)]
    compute = segment_module._segment_one

    def interrupted(model: object, scan: object, *others: object) -> object:
        if scan.name == "s2":  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return compute(model, scan, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(segment_module, "_segment_one", interrupted)
    page = tmp_path / "out" / "page.html"
    with pytest.raises(KeyboardInterrupt):
        run(scans, tiny_model, output=tmp_path / "out", report=page, volumes=True)
    assert list(overview(page.read_text())) == ["s0.nii.gz", "s1.nii.gz"]
    assert "the call was stopped after 2 of 4 scans: Ctrl-C" in page.read_text()
    assert len((tmp_path / "out" / "volumes.csv").read_text().splitlines()) == 3


def test_the_table_is_complete_before_the_page_is_made(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler kills soon after its signal, and the pictures of a page take longer than a table."""
    lines = []

    def page_of(*args: object, **options: object) -> str:
        lines.extend((tmp_path / "out" / "volumes.csv").read_text().splitlines())
        return "page"

    monkeypatch.setattr(segment_report_module, "segment_page", page_of)
    scans = [save(tmp_path / "in" / f"s{i}.nii.gz") for i in range(3)]
    run(scans, tiny_model, output=tmp_path / "out", report=tmp_path / "page.html", volumes=True)
    assert len(lines) == 4


def test_the_page_names_the_models_of_finished_scans(tmp_path: Path, tiny_model: Path) -> None:
    scans = [save(tmp_path / "in" / f"s{i}.nii.gz") for i in range(2)]
    other, page = calibrated(tiny_model, tmp_path / "other"), tmp_path / "page.html"
    run(scans[:1], other, output=tmp_path / "out", statistics=True)
    run(scans, tiny_model, output=tmp_path / "out", statistics=True, skip_existing=True, report=page)
    made = page.read_text().split("How it was made")[1]
    assert re.search(r"<dt>model</dt><dd>tiny \(weights [0-9a-f]{12}\)", made)
    assert re.search(r"<dt>finished scans by</dt><dd>other \(weights [0-9a-f]{12}\)", made)
    run(scans, tiny_model, output=tmp_path / "out", skip_existing=True, report=page)
    made = page.read_text().split("How it was made")[1]
    assert re.search(r"<dt>model</dt><dd>other \(weights [0-9a-f]{12}\), tiny \(weights", made)
    assert "finished scans by" not in made


def test_a_name_that_is_no_text_does_not_cost_the_page(tmp_path: Path) -> None:
    """Names are bytes on Linux. A finished scan is not read, so that it comes as far as the page."""
    name = os.fsdecode(b"caf\xe9.nii.gz")
    result = ScanResult(tmp_path / name, "skipped", {"segmentation": tmp_path / name}, volumes_ml={"x": 1.0})

    def read(path: Path) -> Volume:
        return read_volume(os.fsencode(path).decode("utf-8"))  # ValueError, as from libraries that take text alone

    with segment_report_module.SegmentReport(tmp_path / "page.html", {1: "x"}, read, "", 2) as page:
        page.add(result)
        page.add(replace(result, scan=tmp_path / "plain.nii.gz", outputs={}))
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "caf?.nii.gz" in text and 'href="caf%E9.nii.gz"' in text


def test_nothing_done_leaves_no_page(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(segment_module, "_load", broken)
    result = medseg("segment", save(tmp_path / "a.nii.gz"), "-m", tiny_model, "--report", tmp_path / "page.html")
    assert result.exit_code == 4 and not (tmp_path / "page.html").exists()


def test_names_from_files_stay_text(tmp_path: Path, tiny_model: Path) -> None:
    scans = [save(tmp_path / "in" / f"{EVIL}.nii.gz"), save(tmp_path / "in" / "plain.nii.gz")]
    (tmp_path / "in" / f"broken {EVIL}.nii.gz").write_bytes(b"no scan")
    page = tmp_path / "page.html"
    run([*scans, tmp_path / "in" / f"broken {EVIL}.nii.gz"], tiny_model, output=tmp_path / "out", report=page)
    text = page.read_text()
    assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;.nii.gz" in text


def test_scans_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, tiny_model: Path) -> None:
    for i in (1, 2):
        save(tmp_path / "in" / f"sub-{i}" / "anat" / "T1w.nii.gz")
    page = tmp_path / "page.html"
    options = ("--pattern", "**/*.nii.gz", "-o", tmp_path / "out", "--report", page, "--device", "cpu")
    assert medseg("segment", tmp_path / "in", "-m", tiny_model, *options).exit_code == 0
    assert list(overview(page.read_text())) == ["sub-1/anat/T1w.nii.gz", "sub-2/anat/T1w.nii.gz"]


def test_dicom_and_images_have_pictures(tmp_path: Path, tiny_model: Path, flat_model: Path) -> None:
    page = tmp_path / "page.html"
    run([series(tmp_path / "in" / "scan")], tiny_model, output=tmp_path / "a", output_format="dicom-seg", report=page)
    assert 'id="viewer"' in page.read_text()
    assert "Volume, ml" in page.read_text() and "Area" not in without_scripts(page)
    run([save_image(tmp_path / "picture.png")], flat_model, report=page)
    assert 'id="viewer"' in page.read_text()


def test_sizes_in_images_are_areas_in_pixels(tmp_path: Path, flat_model: Path) -> None:
    """Image files have no pixel size, so that millilitres would be made up; six of them have a plot, too."""
    page = tmp_path / "page.html"
    images = [save_image(tmp_path / "in" / f"{i}.png") for i in range(6)]
    done = medseg("segment", *images, "-m", flat_model, "-o", tmp_path / "out", "--report", page, "--verbose")
    assert done.exit_code == 0, done.output
    text = re.sub("<code>.*?</code>", "", without_scripts(page))  # without the command line
    assert "Area, pixels" in text and "Areas over the scans" in text and "smallest area" in text
    assert " ml" not in text and "olume" not in text
    with (tmp_path / "out" / "volumes.csv").open() as table:
        row = next(csv.DictReader(table))
    name, volume = next((key.removesuffix("_volume_ml"), value) for key, value in row.items() if "_volume_ml" in key)
    assert f"  {name}: {1000 * float(volume):.0f} pixels" in done.output and " ml" not in done.output


def test_a_page_does_not_mix_areas_and_volumes(tmp_path: Path, flat_model: Path) -> None:
    """Pixels of an image file stood in a column of millilitres, and counted for its median and outliers."""
    scans = [save(tmp_path / "in" / "a.nii.gz"), save_image(tmp_path / "in" / "b.png")]
    out, page = tmp_path / "out", tmp_path / "page.html"
    refused = medseg("segment", *scans, "-m", flat_model, "-o", out, "--report", page)
    assert refused.exit_code == 2 and "b.png" in refused.stderr and "a.nii.gz" in refused.stderr
    assert not page.exists() and not out.exists()


@pytest.fixture
def flat_model(tmp_path: Path) -> Path:
    from tests.helpers.segmenters import FLAT, make_model, tiny_config

    return make_model(tmp_path / "flat", tiny_config(**FLAT))


def test_a_scan_whose_files_have_gone_has_no_picture(tmp_path: Path, tiny_model: Path) -> None:
    scans = [save(tmp_path / "in" / f"s{i}.nii.gz") for i in range(3)]
    page = tmp_path / "page.html"
    segment_module.segment(
        scans,
        segment_module.SegmentOptions(str(tiny_model), tmp_path / "out", device="cpu", report=page),
        on_case=lambda result: result.scan.unlink() if result.scan.name == "s1.nii.gz" else None,
    )
    assert len(overview(page.read_text())) == 3 and sorted(viewed(page.read_text())) == ["s0.nii.gz", "s2.nii.gz"]


def test_the_viewer_holds_a_stated_number_of_scans() -> None:
    from medseg_diffusion.reports.segment_page import SegmentedScan
    from medseg_diffusion.workflows.segment_report import chosen

    scans = [SegmentedScan(f"s{i:02d}", "done", volumes_ml={"x": float(i % 17)}) for i in range(50)]
    scans[40] = SegmentedScan("flagged", "done", ("empty mask",), volumes_ml={"x": 0.0})
    scans[41] = SegmentedScan("failed", "failed", ("failed",))
    names = [name for name, _ in chosen(scans)]
    assert len(names) == MOST_VIEWED and names[0] == "flagged" and "failed" not in names
    assert [reason for _, reason in chosen(scans)][1:4] == ["smallest volume", "median volume", "largest volume"]


# ---- anomalies -------------------------------------------------------------------------------------------------------


def test_the_page_of_anomalies(anomaly_models: dict[str, Path], tmp_path: Path) -> None:
    scans = [write(tmp_path / "in" / f"s{i}.nii.gz", head(i, slice(4, 7) if i == 2 else None)[0]) for i in range(3)]
    page = tmp_path / "out" / "page.html"
    options = AnomalyOptions(str(anomaly_models["pixel"]), output=tmp_path / "out", device="cpu", report=page)
    first = anomaly(scans[:2], options)
    assert all((tmp_path / "out" / f"s{i}_anomaly_counterpart.nii.gz").exists() for i in (0, 1))
    assert {result.status for result in first} == {"done"}
    results = anomaly(scans, replace(options, skip_existing=True))
    text = page.read_text()
    rows = overview(text)
    scores = {result.scan.name: result.score for result in results}  # type: ignore[attr-defined]
    assert {name: row[1] for name, row in rows.items()} == {name: f"{score:.3f}" for name, score in scores.items()}
    assert "healthy scans (2)" in text and "these scans (3)" in text
    assert text.count("data:image/jpeg;base64") >= 3 and "healthy counterpart" in text
    assert sorted(viewed(text)) == ["s0.nii.gz", "s1.nii.gz", "s2.nii.gz"]
    assert "2 healthy scans of 2 patients" in text
    anomaly(scans, replace(options, skip_existing=True))  # the model is not needed, but its healthy scans are
    assert "healthy scans (2)" in page.read_text() and overview(page.read_text()) == rows

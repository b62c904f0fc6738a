"""The pages of `segment` and `anomaly` in a browser: no request, no error, inert names, tables, viewer, phone, dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly
from tests.helpers.anomaly import head, write
from tests.helpers.browser import PHONE, Visits, overflow
from tests.helpers.segmenters import calibrated, run, save

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Six scans, one with a hostile name and one that failed."""
    folder = tmp_path_factory.mktemp("segmented")
    scans = [save(folder / "in" / f"{name}.nii.gz") for name in (EVIL, "b", "c", "d", "e")]
    scans.append(folder / "in" / f"broken {EVIL}.nii.gz")
    scans[-1].write_bytes(b"no scan")
    model = calibrated(tiny_model, folder / "known", agreement=1.1)  # all of them are to be checked
    run(scans, model, ensemble=3, output=folder / "out", save_uncertainty=True, report=folder / "out" / "page.html")
    return folder / "out" / "page.html"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, anomaly_models: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    scans = [
        write(folder / "in" / f"{name}.nii.gz", head(i, slice(4, 7) if i == 1 else None)[0])
        for i, name in enumerate((EVIL, "b", "c", "d"))
    ]
    page = folder / "page.html"
    anomaly(scans, AnomalyOptions(str(anomaly_models["pixel"]), output=folder / "out", device="cpu", report=page))
    return page


@pytest.mark.parametrize("kind", ["segmented", "scored"])
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_a_phone_and_ask_for_nothing(
    kind: str, dark: bool, visit: Visits, request: pytest.FixtureRequest
) -> None:
    page = visit(request.getfixturevalue(kind), PHONE, dark=dark)
    for details in page.query_selector_all("details"):
        details.evaluate("(element) => { element.open = true; }")
    assert overflow(page) == 0


@pytest.mark.parametrize("kind", ["segmented", "scored"])
def test_scans_are_sorted_filtered_and_lead_to_viewer_or_details(
    kind: str, visit: Visits, request: pytest.FixtureRequest
) -> None:
    page = visit(request.getfixturevalue(kind))
    rows = page.locator("#overview tbody tr")
    count = rows.count()
    assert count == (6 if kind == "segmented" else 4)
    heading = page.locator("#overview th button").nth(1)
    for sign in (1, -1):
        heading.click()
        values = [float(value) for value in page.eval_on_selector_all(
            "#overview tbody td:nth-child(2)", "cells => cells.map(cell => cell.dataset.value)"
        ) if value != "nan"]  # fmt: skip
        assert len(values) == count - (kind == "segmented") and values == sorted(values, reverse=sign < 0)
    page.locator("#overview input[type=search]").fill("onerror")
    assert page.locator("#overview tbody tr:visible").count() == (2 if kind == "segmented" else 1)
    page.locator("#overview input[type=search]").fill("")
    assert page.locator("#overview tbody tr:visible").count() == count
    if kind == "segmented":  # the failed scan is not in the viewer
        page.locator("#overview a", has_text="broken").click()
        assert page.url.endswith("#scan-1") and "broken" in page.locator("#scan-1").inner_text()
        assert page.locator("#scan-1").get_by_text("found an unreadable file").is_visible()


@pytest.mark.parametrize("kind", ["segmented", "scored"])
def test_a_scan_of_the_table_opens_in_the_viewer(kind: str, visit: Visits, request: pytest.FixtureRequest) -> None:
    page = visit(request.getfixturevalue(kind))
    page.locator("#overview button.show-case", has_text="c.nii.gz").first.click()
    chosen = page.locator("#viewer option:checked", has_text="c.nii.gz")
    chosen.wait_for(state="attached")  # the scan is decoded first
    assert chosen.inner_text().startswith("c.nii.gz")

"""docs/files.md names the columns and keys of the files that the commands write, all of them and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import documented


def test_what_is_not_in_the_page_and_what_is_not_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the comparison itself: otherwise all the tests below could pass on an empty page."""
    page = tmp_path / "files.md"
    rows = ["| `a`, `b.<class>` | numbers |", "| `rows` | list |", "| `rows[].x.y` | number |", "| `any` | anything |"]
    page.write_text("\n".join(["# Files", "## one.json", "| key | content |", "|---|---|", *rows, "## two", ""]))
    monkeypatch.setattr(documented, "PAGE", page)
    good = {"a": 1, "b": {"left lung": 2}, "rows": [{"x": {"y": 3}}], "any": {"p": [{"q": 1}]}}

    def check(content: object) -> None:
        (tmp_path / "one.json").write_text(json.dumps(content))
        documented.assert_documented("one.json", tmp_path / "one.json")

    check(good)
    for more in ({"c": 1}, {"rows": [{"x": {"y": 3, "z": 4}}]}, {"rows": [{"w": 3}]}, {"a": {"inside": 1}, "a2": 1}):
        with pytest.raises(AssertionError, match="written, but not in the page"):
            check({**good, **more})
    for name in good:
        with pytest.raises(AssertionError, match="in the page, but not written"):
            check({key: value for key, value in good.items() if key != name})


def test_volumes_statistics_and_failures(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a calibrated model with several members, which has all of the numbers, and of scans that fail."""
    from tests.helpers.segmenters import calibrated, run, save

    monkeypatch.setattr("medseg_diffusion.workflows.segmentation_statistics.is_deterministic", lambda card: True)
    scans = [save(tmp_path / "in" / f"{name}.nii.gz") for name in ("a", "bb", "ccc")]
    scans[1].write_bytes(b"no scan")
    out = tmp_path / "out"
    model = calibrated(tiny_model, tmp_path / "known")
    options = {"output": out, "volumes": True, "statistics": True, "failures": out / "failures.csv"}
    run(scans, model, ensemble=3, **options)
    documented.assert_documented("volumes.csv", out / "volumes.csv")
    documented.assert_documented("*_statistics.json", out / "a_statistics.json")
    documented.assert_documented("failures.csv", out / "failures.csv")


def test_anomalies(anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path) -> None:
    from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly

    scans = [anomaly_scans / "images" / f"s{i}.nii.gz" for i in (0, 1)]
    anomaly(scans, AnomalyOptions(str(anomaly_models["pixel"]), output=tmp_path, device="cpu", table=True))
    documented.assert_documented("anomalies.csv", tmp_path / "anomalies.csv")
    documented.assert_documented("*_anomaly.json", tmp_path / "s0_anomaly.json")

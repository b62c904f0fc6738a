"""`medseg segment`: its exit codes, and one line for every failure."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from medseg_diffusion.errors import InputError, MedsegError, ModelError, UsageError
from tests.helpers.cli import error_lines, medseg
from tests.helpers.segmenters import calibrated, save


def test_segment_names_a_missing_file(tmp_path: Path) -> None:
    result = medseg("segment", tmp_path / "nowhere.nii.gz", "--device", "cpu")
    assert result.exit_code == 3
    (line,) = error_lines(result)
    assert line.startswith("medseg: error: ") and "nowhere.nii.gz" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MedsegError("one\ntwo"), 1),
        (UsageError("one two"), 2),
        (InputError("a.nii", "NaN", "numbers", "mend it"), 3),
        (ModelError("gone"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_expected_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int
) -> None:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    pipeline = types.SimpleNamespace(SegmentOptions=lambda **_: None, segment=raise_it)
    result = _with_pipeline(monkeypatch, tmp_path, pipeline)
    assert result.exit_code == code
    (line,) = error_lines(result)
    assert line.startswith("medseg: ")


@pytest.mark.parametrize(
    ("statuses", "code", "lines"),
    [(["done"], 0, 0), (["failed"], 3, 1), (["done", "failed", "skipped"], 1, 2), (["failed", "failed"], 1, 3)],
)
def test_exit_code_of_several_scans(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, statuses: list[str], code: int, lines: int
) -> None:
    pipeline = types.SimpleNamespace(SegmentOptions=lambda **_: None)
    cases = [
        types.SimpleNamespace(
            scan=Path(f"{i}.nii.gz"),
            status=status,
            outputs={"mask": Path(f"{i}_seg.nii.gz")},
            seconds=1.0,
            volumes_ml={},
            warnings=(),
            flags=(),
            headline="",
            error="unreadable" if status == "failed" else None,
            exit_code=3 if status == "failed" else 0,
        )
        for i, status in enumerate(statuses)
    ]

    def segment(scans: object, options: object, on_case: object, on_progress: object) -> list[object]:
        assert callable(on_case) and callable(on_progress)
        for case in cases:
            on_case(case)
            on_progress("scan", 1.0)
        return list(cases)

    pipeline.segment = segment
    result = _with_pipeline(monkeypatch, tmp_path, pipeline)
    assert result.exit_code == code
    assert len(error_lines(result)) == lines
    assert result.stdout.count("_seg.nii.gz") == len(statuses) - statuses.count("failed")


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def test_no_file_writes_to_the_terminal_as_it_likes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Descriptions of DICOM series, names of files and names of classes reached it with their escape sequences."""
    case = types.SimpleNamespace(
        scan=Path(f"a{ESCAPES}\udcff.nii.gz"),
        status="done",
        outputs={"mask": Path(f"a{ESCAPES}\udcff_seg.nii.gz")},
        seconds=1.0,
        volumes_ml={f"organ{ESCAPES}": 0.004},
        intervals_ml={},
        level=None,
        warnings=(f"series {ESCAPES}",),
        flags=("warning",),
        headline="",
        error=None,
        exit_code=0,
    )

    def segment(scans: object, options: object, on_case: Callable[[object], None], on_progress: object) -> list[object]:
        on_case(case)
        return [case, case]

    pipeline = types.SimpleNamespace(SegmentOptions=lambda **_: None, segment=segment)
    result = _with_pipeline(monkeypatch, tmp_path, pipeline, "--verbose")
    assert result.exit_code == 0, result.output
    assert not set(result.output) & set("\x1b\x07\x9b"), "no control characters"
    assert result.stdout.count(r"\udcff") == 4, "a byte that is no text is told apart from nothing"
    assert "organ: 0.004 ml" in result.stdout.replace("]0;owned[2J31m", ""), "a small finding is not 0.00 ml"
    assert "medseg: warning: " in result.stderr


def test_an_error_does_not_write_to_the_terminal_as_it_likes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raise_it(*_: object, **__: object) -> None:
        raise InputError("folder", f"2 series: {ESCAPES}T1", "one", "choose with --series")

    pipeline = types.SimpleNamespace(SegmentOptions=lambda **_: None, segment=raise_it)
    (line,) = error_lines(_with_pipeline(monkeypatch, tmp_path, pipeline))
    assert line.isprintable() and "T1" in line


def _with_pipeline(monkeypatch: pytest.MonkeyPatch, folder: Path, pipeline: object, *options: str) -> Result:
    """Run `medseg segment` on a scan, with a stand-in for the library's workflow."""
    from medseg_diffusion import workflows

    monkeypatch.setitem(sys.modules, "medseg_diffusion.workflows.segment", pipeline)
    monkeypatch.setattr(workflows, "segment", pipeline, raising=False)
    (folder / "scan.nii.gz").touch()
    return medseg("segment", str(folder / "scan.nii.gz"), *options)


def test_the_scans_to_check_are_named_at_the_end(tmp_path: Path, tiny_model: Path) -> None:
    model = calibrated(tiny_model, tmp_path / "known", agreement=1.1)
    for i in range(7):
        save(tmp_path / "in" / f"s{i}.nii.gz")
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"no scan")
    command = ("segment", tmp_path / "in", "-m", model, "--ensemble", 3, "-o", tmp_path / "out", "--device", "cpu")
    line = medseg(*command).stdout.splitlines()[-1]
    assert line.startswith("7 of 8 scans to check: s0.nii.gz (members disagree), s1.nii.gz (members disagree), ")
    assert line.endswith(" and 2 more") and "broken" not in line
    as_json = medseg(*command, "--json", "--skip-existing")
    assert len([json.loads(text) for text in as_json.stdout.splitlines()]) == 8
    assert "7 of 8 scans to check" in as_json.stderr
    assert "to check" not in medseg(*command, "--quiet").stdout

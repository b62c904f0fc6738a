"""The installed `medseg` command: what users type, read and get as exit code."""

from __future__ import annotations

import io
import json
import sys
import types
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from medseg_diffusion.errors import InputError, MedsegError, ModelError, UsageError

(SCRIPT,) = entry_points(group="console_scripts", name="medseg")
WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
COMMANDS = (
    "segment",
    "train-segmenter",
    "train-generator",
    "sample",
    "evaluate-generator",
    "train-pixel-classifier",
    "train-anomaly",
    "anomaly",
    "calibrate-anomaly",
    "synthesize-anomalies",
    "benchmark-segmenter",
    "evaluate",
    "check",
    "configs",
    "models",
    "info",
)


def medseg(*arguments: object) -> Result:
    return CliRunner(env=WIDE).invoke(SCRIPT.load(), [str(argument) for argument in arguments])


def error_lines(result: Result) -> list[str]:
    return result.stderr.strip().splitlines()


def test_help_lists_the_commands() -> None:
    result = medseg("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", [*COMMANDS, "configs list", "configs show", "models list", "models show"])
def test_every_command_has_help(command: str) -> None:
    assert medseg(*command.split(), "--help").exit_code == 0


def test_version() -> None:
    assert medseg("--version").output.strip() == f"medseg {version('medseg-diffusion')}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "scan.nii.gz", "--no-such-option"],
        ["segment"],
        ["segment", "scan.nii.gz", "--ensemble", "0"],
        ["segment", "scan.nii.gz", "--sampler", "euler"],
        ["segment", "scan.nii.gz", "--device", "gpu"],
        ["segment", "scan.nii.gz", "--shard", "3/2"],
        ["train-segmenter", "preset"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scan.nii.gz").touch()
    monkeypatch.chdir(tmp_path)
    assert medseg(*arguments).exit_code == 2


def test_segment_names_a_missing_file(tmp_path: Path) -> None:
    result = medseg("segment", tmp_path / "nowhere.nii.gz", "--device", "cpu")
    assert result.exit_code == 3
    (line,) = error_lines(result)
    assert line.startswith("medseg: error: ") and "nowhere.nii.gz" in line


GENERATOR = "adm-tiny-imagenet-small"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train-generator", "adm-tiny-imagenet-smal", "--data", "images", "-o", "run"], 2, GENERATOR),
        (["train-generator", "baseline-nuclei-small", "--data", "images", "-o", "run"], 2, "train-segmenter"),
        (["train-generator", GENERATOR, "--set", "network.chanels=8", "--data", "images", "-o", "run"], 2, "chanels"),
        (["train-generator", GENERATOR, "--stage", "autoencoder", "--data", "images", "-o", "run"], 2, "--stage"),
        (["train-generator", GENERATOR, "--resume", "--data", "images", "-o", "run"], 2, "run"),
        (["train-generator", GENERATOR, "--data", "nowhere", "-o", "run"], 3, "nowhere"),
        (
            ["train-generator", GENERATOR, "--set", "data.validation_images=2", "--data", "images", "-o", "run"],
            3,
            "broken.jpg",
        ),
        (["train-generator", GENERATOR, "--data", "images", "-o", "run"], 3, "data.validation_images"),
        (["train-generator", GENERATOR, "--data", "other.zip", "-o", "run"], 3, "other.zip"),
        (["sample", "no-such-model", "-o", "samples"], 4, "no-such-model"),
        (["sample", "brain-tissue-t1", "-o", "samples"], 4, "brain-tissue-t1"),
        (["evaluate-generator", "no-such-model", "--reference", "images", "-o", "scores"], 4, "no-such-model"),
        (
            ["evaluate-generator", "images", "--samplers", "ddim:x", "--reference", "images", "-o", "scores"],
            2,
            "ddim:x",
        ),
    ],
)
def test_what_generators_cannot_use_is_one_line_and_writes_nothing(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path / "home"))
    (tmp_path / "images").mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    for i in range(12):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "images" / "broken.jpg").write_bytes(buffer.getvalue()[:900])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no image")
    result = medseg(*arguments, "--device", "cpu")
    assert result.exit_code == code, result.stderr
    (line,) = error_lines(result)
    assert line.startswith("medseg: error: ") and said in line
    assert not [name for name in ("run", "samples", "scores") if (tmp_path / name).exists()]


def test_configs_list_and_show() -> None:
    names = json.loads(medseg("configs", "list", "--json").stdout)
    assert names == medseg("configs", "list").stdout.split() and names
    assert medseg("configs", "show", names[0]).exit_code == 0


def test_unknown_preset_names_the_nearest() -> None:
    name = medseg("configs", "list").stdout.split()[0]
    result = medseg("configs", "show", name + "x")
    assert result.exit_code == 2
    (line,) = error_lines(result)
    assert name in line


def test_models_list_and_show() -> None:
    models = json.loads(medseg("models", "list", "--json").stdout)
    assert models
    assert json.loads(medseg("models", "show", models[0]["name"], "--json").stdout)
    assert medseg("models", "list").exit_code == 0


def test_info_is_json() -> None:
    report = json.loads(medseg("info", "--json").stdout)
    assert report["versions"]["torch"] and "cpu" in report["devices"]
    assert "torch" in medseg("info").stdout


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


def _with_pipeline(monkeypatch: pytest.MonkeyPatch, folder: Path, pipeline: object) -> Result:
    """Run `medseg segment` on a scan, with a stand-in for the library's workflow."""
    from medseg_diffusion import workflows

    monkeypatch.setitem(sys.modules, "medseg_diffusion.workflows.segment", pipeline)
    monkeypatch.setattr(workflows, "segment", pipeline, raising=False)
    (folder / "scan.nii.gz").touch()
    return medseg("segment", str(folder / "scan.nii.gz"))


def test_the_entry_point_is_a_typer_app() -> None:
    assert isinstance(SCRIPT.load(), typer.Typer)

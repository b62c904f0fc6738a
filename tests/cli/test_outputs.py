"""Every command refuses an output that it could not write before it computes anything, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli import error_lines, medseg

CPU = ("--device", "cpu")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Files that no command may read or change: each would be refused with another exit code."""
    (tmp_path / "scan.nii.gz").write_bytes(b"no scan")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("no card")
    return tmp_path


COMMANDS = {
    "segment": ("segment", "{scan}", "-m", "{model}", "-o", "{out}", *CPU),
    "segment --report": ("segment", "{scan}", "-m", "{model}", "--report", "{out}/page.html", *CPU),
    "anomaly": ("anomaly", "{scan}", "-m", "{model}", "-o", "{out}", *CPU),
    "synthesize-anomalies": ("synthesize-anomalies", "{scan}", "-o", "{out}"),
    "evaluate": ("evaluate", "{scan}", "{scan}", "-o", "{out}"),
    "sample": ("sample", "{model}", "-n", "1", "-o", "{out}", *CPU),
    "evaluate-generator": ("evaluate-generator", "{model}", "--reference", "{pictures}", "-o", "{out}", *CPU),
    "benchmark-segmenter": ("benchmark-segmenter", "{model}", "--data", "{labelled}", "-o", "{out}", *CPU),
    "benchmark-segmenter --markdown": (
        "benchmark-segmenter", "{model}", "--data", "{labelled}", "-o", "{labelled}", "--markdown", "{out}/a.md", *CPU,
    ),
    "evaluate-generator --markdown": (
        "evaluate-generator", "{model}", "--reference", "{pictures}", "-o", "{pictures}", "--markdown", "{out}/a.md",
    ),
    "evaluate --markdown": ("evaluate", "{scan}", "{scan}", "-o", "{labelled}", "--markdown", "{out}/a.md"),
    "calibrate-segmenter": ("calibrate-segmenter", "{model}", "--data", "{labelled}", "-o", "{out}", *CPU),
    "calibrate-anomaly": ("calibrate-anomaly", "{model}", "--healthy", "{labelled}", "-o", "{out}", *CPU),
    "models export": ("models", "export", "{model}", "-o", "{out}"),
    "models import": ("models", "import", "{weights}", "--from", "monai", "-o", "{out}"),
    "train-segmenter": ("train-segmenter", "ensemdiff-hippocampus-small", "--data", "{labelled}", "-o", "{out}", *CPU),
    "train-generator": ("train-generator", "adm-slices-small", "--data", "{labelled}", "-o", "{out}", *CPU),
    "train-anomaly": ("train-anomaly", "anomaly-partial-noise-small", "--healthy", "{labelled}", "-o", "{out}", *CPU),
    "train-pixel-classifier": (
        "train-pixel-classifier", "label-efficient", "--generator", "{model}", "--data", "{labelled}",
        "--labelled", "2", "-o", "{out}", *CPU,
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", ["file", "file/deep/er"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_below_a_file_is_refused_first(
    command: str, place: str, inputs: Path, pictures: Path, block_scans: Path, tiny_model: Path
) -> None:
    values = {
        "scan": inputs / "scan.nii.gz",
        "weights": inputs / "w.pt",
        "out": inputs / place,
        # segment and anomaly read the model's card first, which says what kind of scans they look for
        "model": tiny_model if command.startswith(("segment", "anomaly")) else inputs / "model",
        "pictures": pictures,
        "labelled": block_scans,
    }
    before = sorted(inputs.rglob("*"))
    result = medseg(*(str(part).format(**values) for part in COMMANDS[command]))
    lines = error_lines(result)
    assert result.exit_code == 2 and len(lines) == 1, result.output
    assert "file: " in lines[0] and ("is a file" in lines[0] or "exists" in lines[0] or "empty folder" in lines[0])
    assert sorted(inputs.rglob("*")) == before and (inputs / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["mask.nii.gz", "new.nii.gz", "picture.PNG", "brain.mgz", "IM0001"])
@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "{scan}", "{scan}", "-o", "{out}", "--markdown", "{named}"),
        ("segment", "{scan}", "-m", "{model}", "--report", "{named}", *CPU),
        ("segment", "{scan}", "-m", "{model}", "--run-report", "{named}", *CPU),
    ],
)
def test_a_text_never_replaces_a_scan_or_takes_its_name(
    command: tuple[str, ...], name: str, inputs: Path, tiny_model: Path
) -> None:
    """`--markdown a.nii.gz b.nii.gz ref.nii.gz`, where the name of the text was forgotten, replaced a mask by text."""
    (inputs / "mask.nii.gz").write_bytes(b"a mask")
    if name == "IM0001":
        (inputs / name).write_bytes(bytes(128) + b"DICM")
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    values = {"scan": inputs / "scan.nii.gz", "out": inputs / "out", "named": inputs / name, "model": tiny_model}
    result = medseg(*(part.format(**values) for part in command))
    lines = error_lines(result)
    assert result.exit_code == 2 and len(lines) == 1, result.output
    assert "name of a scan" in lines[0] or "DICOM series" in lines[0]
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before

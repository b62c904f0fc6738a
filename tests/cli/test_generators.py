"""Commands of generators refuse what they cannot use in one line, and write nothing."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.cli import error_lines, medseg

GENERATOR = "adm-tiny-imagenet-small"


def test_warnings_are_one_line_each_and_quiet_hides_them(image_models: dict[str, Path], tmp_path: Path) -> None:
    """More steps than there are times: they are fewer, which is said."""
    command = ("sample", image_models["pixel"], "-n", 1, "--sampler", "dpm++", "--steps", 90, "--device", "cpu")
    said = error_lines(medseg(*command, "-o", tmp_path / "loud"))
    assert len(said) == 1 and said[0].startswith("medseg: warning: 90 steps")
    assert medseg(*command, "-o", tmp_path / "quiet", "--quiet").stderr == ""


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

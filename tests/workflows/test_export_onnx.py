"""`medseg models export --onnx`: ONNX Runtime gives the probabilities of the model."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from medseg_diffusion import build
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.workflows import export_onnx
from tests.helpers import segmenters
from tests.helpers.cli import error_lines, medseg

# The exporter's own use of what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ONE = {"inference": {"steps": 1, "ensemble": 2}}
FLAT = {**segmenters.FLAT, "data": {"labels": ["bright"], "window": [8, 8]}}
CASES = {
    "logits": ONE,
    "linear": {**ONE, "diffusion": {"schedule": {"name": "cosine"}, "target": "x0"}},
    "segdiff": {
        **ONE,
        "method": "segdiff",
        "image_encoder": {"encoder_channels": 8, "encoder_blocks": 1, "encoder_growth": 8},
    },
    "baseline": {"method": "baseline"},
    "slices": {**ONE, **FLAT},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_runtime_samples_the_members_of_the_model(case: str, batch: int, tmp_path: Path) -> None:
    model = segmenters.make_model(tmp_path / "model", segmenters.tiny_config(**CASES[case]))
    result = medseg("models", "export", model, "-o", tmp_path / "m.onnx", "--onnx")
    assert result.exit_code == 0, result.output
    segmenter, config = restore_segmenter(load_model_files(model))
    size = [8] * config.network.dims
    image = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(batch))
    inputs = {"image": image.numpy()}
    if case != "baseline":  # the noise that the sampler draws for these seeds
        from medseg_diffusion.diffusion.noise import gaussian, generators

        inputs["noise"] = gaussian((1, *size), generators(range(batch)), like=image).numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    (found,) = session.run(["probabilities"], inputs)
    steps = build.times(config, 1)
    expected = segmenter.probabilities(image, [[i] for i in range(batch)], build.sampler("dpm++"), steps)[:, 0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 1e-3, "a constant would prove nothing"


def test_the_file_says_what_it_is_and_is_written_once(tmp_path: Path) -> None:
    model = segmenters.make_model(tmp_path / "model", segmenters.tiny_config(**ONE))
    export_onnx.export_onnx(model, tmp_path / "m.onnx")
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    about = {
        key.removeprefix("medseg."): json.loads(value) for key, value in stored.items() if key.startswith("medseg.")
    }
    assert about["labels"] == {"0": "background", "1": "bright"} and about["window"] == [8, 8, 8]
    assert about["preprocessing"]["orientation"] == "RAS" and about["ensemble"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "model"]
    result = medseg("models", "export", model, "-o", tmp_path / "m.onnx", "--onnx")
    assert result.exit_code == 2 and "exists" in error_lines(result)[0]


@pytest.mark.parametrize(
    ("changes", "name", "code", "message"),
    [
        ({}, "m.onnx", 4, "2 steps; ONNX files are made of models that evaluate their network once"),
        ({"method": "categorical", "inference": {"steps": 1, "sampler": "ddpm"}}, "m.onnx", 4, "evaluate their network once"),
        (ONE, "m.zip", 2, "expected a name that ends in .onnx"),
    ],
)  # fmt: skip
def test_what_onnx_cannot_hold_is_one_line(changes: dict, name: str, code: int, message: str, tmp_path: Path) -> None:
    model = segmenters.make_model(tmp_path / "model", segmenters.tiny_config(**changes))
    result = medseg("models", "export", model, "-o", tmp_path / name, "--onnx")
    (line,) = error_lines(result)
    assert result.exit_code == code and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_differs_from_the_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx, "TOLERANCE", -1.0)
    model = segmenters.make_model(tmp_path / "model", segmenters.tiny_config(**ONE))
    result = medseg("models", "export", model, "-o", tmp_path / "m.onnx", "--onnx")
    assert result.exit_code == 4 and "differ by" in error_lines(result)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

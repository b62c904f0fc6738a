"""`medseg models export --onnx`: ONNX Runtime gives the probabilities of the model."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from medseg_diffusion import build
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.errors import ModelError
from medseg_diffusion.models.one_evaluation import OneEvaluation
from medseg_diffusion.models.segmenter import restore_segmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.workflows import export_onnx
from tests.helpers import segmenters
from tests.helpers.cli import error_lines, medseg

# The exporter's own use of what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ONE = {"inference": {"steps": 1, "ensemble": 2}}
ENCODER = {"encoder_channels": 8, "encoder_blocks": 1, "encoder_growth": 8}
OTHERS = {
    "linear": {**ONE, "diffusion": {"schedule": {"name": "cosine"}, "target": "x0"}},
    "from a later time": {**ONE, "diffusion": {"schedule": {"name": "cosine"}, "scale": 0.5, "log_snr": [-2, 2]}},
    "segdiff": {**ONE, "method": "segdiff", "image_encoder": ENCODER},
    "baseline": {"method": "baseline"},
    "slices": {**ONE, **segmenters.FLAT, "data": {"labels": ["bright"], "window": [8, 8]}},
}


def export(folder: Path, changes: dict[str, object]) -> tuple[Path, Path]:
    """An untrained model, and its ONNX file."""
    model = segmenters.make_model(folder / "model", segmenters.tiny_config(**changes))
    result = medseg("models", "export", model, "-o", folder / "m.onnx", "--onnx")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "model"]
    return model, folder / "m.onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return export(tmp_path_factory.mktemp("onnx"), ONE)


def assert_same_members(model: Path, file: Path) -> None:
    """With the noise that the sampler draws for its seeds, in batches of any size."""
    segmenter, config = restore_segmenter(load_model_files(model))
    size = [8] * config.network.dims
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        image = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(batch))
        inputs = {"image": image.numpy()}
        if config.method != "baseline":
            inputs["noise"] = gaussian((1, *size), generators(range(batch)), like=image).numpy()
        assert [one.name for one in session.get_inputs()] == list(inputs)
        (found,) = session.run(["probabilities"], inputs)
        steps, seeds = build.times(config, 1), [[i] for i in range(batch)]
        expected = segmenter.probabilities(image, seeds, build.sampler("dpm++"), steps)[:, 0]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
        assert float(expected.std()) > 1e-3, "a constant would prove nothing"


def test_onnx_runtime_samples_the_members_of_the_model(exported: tuple[Path, Path]) -> None:
    assert_same_members(*exported)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_models_of_one_evaluation(case: str, tmp_path: Path) -> None:
    assert_same_members(*export(tmp_path, OTHERS[case]))


def test_the_file_says_what_it_is_and_is_written_once(exported: tuple[Path, Path]) -> None:
    model, file = exported
    stored = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    about = {key.removeprefix("medseg."): json.loads(value) for key, value in stored.items() if "medseg." in key}
    assert about["labels"] == {"0": "background", "1": "bright"} and about["window"] == [8, 8, 8]
    assert about["preprocessing"]["orientation"] == "RAS" and about["ensemble"] == 2
    result = medseg("models", "export", model, "-o", file, "--onnx")
    assert result.exit_code == 2 and "exists" in error_lines(result)[0]


def test_a_file_that_differs_from_the_model_is_refused(exported: tuple[Path, Path]) -> None:
    """The check before a file is kept: here against a model of other weights."""
    saved = load_model_files(exported[0])
    segmenter, _ = restore_segmenter(saved)
    inputs = [torch.rand(2, 1, 8, 8, 8), torch.rand(2, 1, 8, 8, 8)]
    network = OneEvaluation(segmenter, [1000, 0]).eval()
    export_onnx._check(network, inputs, exported[1], saved)
    torch.nn.init.normal_(next(segmenter.parameters()))
    with pytest.raises(ModelError, match="differ by"):
        export_onnx._check(network, inputs, exported[1], saved)


@pytest.mark.parametrize(
    ("changes", "name", "code", "message"),
    [
        ({}, "m.onnx", 4, "2 steps; ONNX files are made of models that evaluate their network once"),
        ({"method": "categorical", "inference": {"steps": 1, "sampler": "ddpm"}}, "m.onnx", 4, "categorical with 1"),
        (ONE, "m.zip", 2, "expected a name that ends in .onnx"),
    ],
)  # fmt: skip
def test_what_onnx_cannot_hold_is_one_line(changes: dict, name: str, code: int, message: str, tmp_path: Path) -> None:
    model = segmenters.make_model(tmp_path / "model", segmenters.tiny_config(**changes))
    result = medseg("models", "export", model, "-o", tmp_path / name, "--onnx")
    (line,) = error_lines(result)
    assert result.exit_code == code and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

"""`medseg evaluate-generator`: the table of scores, and what cannot be scored."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.metrics.generation import Scores
from medseg_diffusion.metrics.generation_summary import GeneratorRow
from medseg_diffusion.models.generator import restore_generator
from medseg_diffusion.models.image_source import SampleOptions
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.networks.extractors import extractor
from medseg_diffusion.workflows.evaluate_generator import (
    GeneratorEvaluationOptions,
    _suspicious,
    evaluate_generator,
    parse_samplers,
)
from medseg_diffusion.workflows.sample import sample
from medseg_diffusion.workflows.train_generator import train_generator
from tests.helpers.cli import medseg
from tests.helpers.generators import QUIET, small_config

pytestmark = QUIET


def test_the_table_has_a_row_a_sampler_and_the_floor_and_resumes(
    image_models, pictures, scoring_network, tmp_path: Path
) -> None:
    def run() -> object:
        return evaluate_generator(
            [str(image_models["pixel"]), str(pictures)],
            pictures,
            tmp_path / "out",
            GeneratorEvaluationOptions(
                [("ddim", 2), ("ddpm", 4)], SampleOptions(count=10, device="cpu"), str(scoring_network)
            ),
        )

    result = run()
    table = result.table()
    assert [row["sampler"] for row in table] == ["", "ddim-2", "ddpm-4", ""]
    assert result.extractor.startswith("small.onnx (")
    assert all(row["N"] == 10 for row in table)
    own = table[-1]  # ten of the real images against all of them
    assert own["recall"] > 0.3 and own["precision"] == 1
    assert own["FID"] < min(table[1]["FID"], table[2]["FID"])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.npy")}
    again = run()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again.table() == table
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["extractor"] == result.extractor
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h3>") == 5  # real images, the three rows, and how the numbers are computed
    assert page.count("data:image/png;base64") == 4 * 10, "as many real images as samples"
    assert "evenly spread over the reference" in page


def test_real_images_on_the_page_have_the_classes_of_the_samples(
    image_models, pictures, scoring_network, tmp_path: Path
) -> None:
    arguments = ["evaluate-generator", image_models["class"], "--reference", pictures, "-o", tmp_path / "out"]
    options = ["--samplers", "ddim:2", "-n", "6", "--extractor", scoring_network, "--device", "cpu"]
    result = medseg(*arguments, *options, "--markdown", "-")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("### Evaluation of generators") and "| class | ddim, 2 steps |" in result.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    named = re.findall(r'alt="([^",]*), image (\d): (left|right)"', page)
    real, samples = ([(n, c) for title, n, c in named if (title == "Real images") == real] for real in (True, False))
    assert len(real) == 6 and real == samples and {name for _, name in real} == {"left", "right"}


def test_enlarged_samples_are_scored_at_their_own_size(image_models, pictures, scoring_network, tmp_path: Path) -> None:
    options = SampleOptions(count=6, upsampler=str(image_models["upsampler"]), device="cpu")
    result = evaluate_generator(
        [str(image_models["half"])],
        pictures,
        tmp_path / "out",
        GeneratorEvaluationOptions([("ddim", 2)], options, str(scoring_network)),
    )
    assert [row.scores.count for row in result.rows] == [6, 6]
    assert np.load(next((tmp_path / "out").rglob("*.npy"))).shape == (6, 16, 16, 3)
    saved = load_model_files(image_models["upsampler"])
    again = {name: value + 1 for name, value in saved.weights.items()}
    save_model(tmp_path / "retrained", saved.card, again, "")
    shutil.copytree(tmp_path / "retrained", tmp_path / "same", dirs_exist_ok=True)
    changed = SampleOptions(count=6, upsampler=str(tmp_path / "same"), device="cpu")
    evaluate_generator(
        [str(image_models["half"])],
        pictures,
        tmp_path / "c",
        GeneratorEvaluationOptions([("ddim", 2)], changed, str(scoring_network)),
    )
    save_model(tmp_path / "same", saved.card, saved.weights, "")
    with pytest.raises(UsageError, match="holds samples of another model"):
        evaluate_generator(
            [str(image_models["half"])],
            pictures,
            tmp_path / "c",
            GeneratorEvaluationOptions([("ddim", 2)], changed, str(scoring_network)),
        )
    with pytest.raises(UsageError, match="only folders of samples"):
        evaluate_generator(
            [str(pictures)],
            pictures,
            tmp_path / "d",
            GeneratorEvaluationOptions([("ddim", 2)], changed, str(scoring_network)),
        )
    inside = sorted(extractor(str(scoring_network)).fingerprints)
    save_model(tmp_path / "cheat", {**saved.card, "loss_extractors": inside[:1]}, saved.weights, "")
    with pytest.raises(ModelError, match="cannot score it"):
        cheat = SampleOptions(count=6, upsampler=str(tmp_path / "cheat"), device="cpu")
        evaluate_generator(
            [str(image_models["half"])],
            pictures,
            tmp_path / "b",
            GeneratorEvaluationOptions([("ddim", 2)], cheat, str(scoring_network)),
        )


def test_a_fast_sampler_that_is_twice_as_bad_is_named() -> None:
    def row(sampler: str, steps: int, fid: float) -> GeneratorRow:
        return GeneratorRow("m", sampler, steps, Scores(0.5, 0.5, 2.0, fid, 1.0, 0.1, 10, 10))

    (said,) = _suspicious([row("ddim", 50, 210.1), row("ddim", 200, 190.0), row("ddpm", 1000, 100.0)])
    assert "FID 210.1 with ddim-50 is more than 2 times the 100.0 of ddpm-1000" in said


def test_what_cannot_be_scored_is_said_before_anything_is_sampled(
    image_models, pictures, scoring_network, tmp_path: Path
) -> None:
    def run(*names: object, samplers: tuple[tuple[str, int], ...] = (("ddim", 2),), **changes: object) -> None:
        options = SampleOptions(count=6, device="cpu", **changes)
        evaluate_generator(
            [str(name) for name in names],
            pictures,
            tmp_path / "out",
            GeneratorEvaluationOptions(samplers, options, str(scoring_network)),
        )

    saved = load_model_files(image_models["pixel"])
    inside = sorted(extractor(str(scoring_network)).fingerprints)
    save_model(tmp_path / "cheat", {**saved.card, "loss_extractors": inside[:1]}, saved.weights, "")
    with pytest.raises(ModelError, match=r"was trained with small\.onnx .* cannot score it"):
        run(image_models["half"], tmp_path / "cheat")
    save_model(tmp_path / "other" / image_models["pixel"].parent.name / "model", saved.card, saved.weights, "")
    with pytest.raises(UsageError, match="the name of two models or folders"):
        run(image_models["pixel"], tmp_path / "other" / image_models["pixel"].parent.name)
    with pytest.raises(UsageError, match="--guidance needs a model"):
        run(image_models["class"], image_models["pixel"], guidance=2.0)
    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "few" / f"{i}.png")
    with pytest.raises(UsageError, match="3 images are too few"):
        run(tmp_path / "few")
    stopped = tmp_path / "stopped"
    (stopped / "samples").mkdir(parents=True)
    (stopped / "config.yaml").write_text("method: pixel")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stopped / "samples" / "001.png")
    with pytest.raises(ModelError, match="found no model there"):
        run(stopped)
    assert not (tmp_path / "out").exists()


def test_samples_are_scored_without_their_overview(image_models, pictures, scoring_network, tmp_path: Path) -> None:
    sample(str(image_models["pixel"]), tmp_path / "s", SampleOptions(count=6, steps=2, device="cpu"))
    shutil.copy(tmp_path / "s" / "grid.png", tmp_path / "s" / "reference.png")  # as of `sample --reference`
    options = SampleOptions(count=100, device="cpu")
    result = evaluate_generator(
        [str(tmp_path / "s")], pictures, tmp_path / "out", GeneratorEvaluationOptions((), options, str(scoring_network))
    )
    assert [row.scores.count for row in result.rows] == [12, 6]  # real images in halves, and the samples
    assert "no images of it are held out" in result.warnings[-1]
    header = (tmp_path / "out" / "scores.csv").read_text().splitlines()[0]
    assert header.endswith("extractor,reference images")


def test_a_larger_count_adds_to_the_samples(image_models, pictures, scoring_network, tmp_path: Path) -> None:
    def run(count: int, output: str) -> np.ndarray:
        options = SampleOptions(count=count, batch_size=4, device="cpu")
        evaluate_generator(
            [str(image_models["pixel"])],
            pictures,
            tmp_path / output,
            GeneratorEvaluationOptions([("ddim", 2)], options, str(scoring_network)),
        )
        return np.load(next((tmp_path / output / "samples").rglob("*.npy")))

    few, more, anew = run(6, "out"), run(11, "out"), run(11, "new")
    assert len(few) == 6
    np.testing.assert_array_equal(more[:6], few)
    np.testing.assert_allclose(more.astype(int), anew.astype(int), atol=1)  # other batches round otherwise


def test_only_what_was_held_out_is_the_reference(pictures, scoring_network, tmp_path: Path) -> None:
    """Ranked anew in a part of the folder, images that were trained on would be called test images."""
    data = {"size": 16, "validation_images": 2, "test_images": 12}
    model = train_generator(small_config("pixel", data=data), pictures, tmp_path / "run", max_steps=1, device="cpu")
    held_out = restore_generator(load_model_files(model)).held_out
    assert held_out is not None
    part = tmp_path / "part"
    shutil.copytree(pictures, part)
    names = [str(file.relative_to(part)) for file in sorted(part.rglob("*.png"))]
    gone = [name for name in names if held_out.count([name])[0]][:2]  # two of the twelve
    for name in gone:
        (part / name).unlink()
    options = SampleOptions(count=10, device="cpu")
    found = evaluate_generator(
        [str(model)], part, tmp_path / "out", GeneratorEvaluationOptions([("ddim", 2)], options, str(scoring_network))
    )
    assert found.reference_count == 10


def test_models_that_see_scans_differently_are_scored_apart(tmp_path: Path, scoring_network) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        image = nib.Nifti1Image(rng.random((16, 16, 8)).astype(np.float32), np.eye(4))
        (tmp_path / "scans").mkdir(exist_ok=True)
        nib.save(image, tmp_path / "scans" / f"s{i}.nii.gz")
    data = {"size": 16, "channels": 1, "validation_images": 1}
    models = [
        train_generator(
            small_config("pixel", data=data, preprocessing={"intensity": how}), tmp_path / "scans", tmp_path / how,
            max_steps=1, device="cpu",
        )
        for how in ("percentile", "median")
    ]  # fmt: skip
    options = SampleOptions(count=10, device="cpu")
    with pytest.raises(UsageError, match="see scans after different preprocessing"):
        evaluate_generator(
            [str(m) for m in models],
            tmp_path / "scans",
            tmp_path / "out",
            GeneratorEvaluationOptions([("ddim", 2)], options, str(scoring_network)),
        )


def test_too_few_images_are_refused(image_models, pictures, scoring_network, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for i, file in enumerate(sorted(pictures.rglob("*.png"))[:7]):
        shutil.copy(file, few / f"{i}.png")
    with pytest.raises(UsageError, match="8 samples against 7 real images are too few"):
        options = SampleOptions(count=8, device="cpu")
        evaluate_generator(
            [str(image_models["pixel"])],
            few,
            tmp_path / "out",
            GeneratorEvaluationOptions([("ddim", 2)], options, str(scoring_network)),
        )
    with pytest.raises(UsageError, match="4 samples against 24 real images are too few"):
        evaluate_generator(
            [str(image_models["pixel"])],
            pictures,
            tmp_path,
            GeneratorEvaluationOptions([("ddim", 2)], SampleOptions(count=4, device="cpu"), str(scoring_network)),
        )


def test_samplers_are_parsed_or_refused() -> None:
    assert parse_samplers("ddim:50, ddpm:1000,heun:5") == [("ddim", 50), ("ddpm", 1000), ("heun", 5)]
    for text in ("ddim", "pndm:5", "ddim:0", "ddim:x"):
        with pytest.raises(UsageError, match="expected NAME:STEPS"):
            parse_samplers(text)

"""`medseg evaluate-generator` on volumes: slices in three planes, structural similarity, features of a segmenter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.metrics.generation import PLANES
from medseg_diffusion.models.image_source import SampleOptions
from medseg_diffusion.workflows.evaluate_generator import (
    GeneratorEvaluationOptions,
    default_count,
    evaluate_generator,
)
from medseg_diffusion.workflows.evaluated_images import RealImages
from medseg_diffusion.workflows.image_features import SLICES, slice_positions
from medseg_diffusion.workflows.sample import sample
from tests.helpers.cli import medseg
from tests.helpers.generators import QUIET

pytestmark = QUIET

SAMPLING = SampleOptions(count=6, device="cpu")


def test_volumes_are_scored_by_slices_in_three_planes(
    ball_generator: Path, ball_scans, scoring_network, tmp_path: Path
) -> None:
    options = GeneratorEvaluationOptions([("ddim", 2)], SAMPLING, str(scoring_network))
    result = evaluate_generator([str(ball_generator)], ball_scans, tmp_path / "out", options)
    floor, row = (one.scores for one in result.rows)
    for scores in (floor, row):
        assert set(scores.planes) == set(PLANES) and scores.inception_score is None and scores.sfid is None
        for score in ("fid", "kid"):
            mean = np.mean([getattr(plane, score) for plane in scores.planes.values()])
            assert getattr(scores, score) == pytest.approx(mean)
        assert scores.ms_ssim is not None and 0 <= scores.ms_ssim < 1
    assert row.fid > 10 * floor.fid, "an untrained network is far from the scans"
    assert (row.count, row.reference_count, floor.count) == (6, 12, 6)
    assert np.load(next((tmp_path / "out").rglob("*.npy"))).shape == (6, 12, 12, 12, 1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f"FID {name}" in page for name in PLANES)
    assert "MS-SSIM" in page and "the middle axial slice" in page
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"][1]["scores"]
    assert stored["planes"]["axial"] == {"fid": row.planes["axial"].fid, "kid": row.planes["axial"].kid}


def test_a_folder_of_sampled_volumes_has_the_scores_of_the_model(
    ball_generator: Path, ball_scans, scoring_network, tmp_path: Path
) -> None:
    options = SampleOptions(count=6, sampler="ddim", steps=2, device="cpu")
    sample(ball_generator, tmp_path / "samples", options)
    asked = GeneratorEvaluationOptions([("ddim", 2)], SAMPLING, str(scoring_network))
    result = evaluate_generator([str(ball_generator), str(tmp_path / "samples")], ball_scans, tmp_path / "out", asked)
    drawn, read = (row.scores for row in result.rows[1:])
    assert read.fid == pytest.approx(drawn.fid, rel=1e-3) and read.ms_ssim == pytest.approx(drawn.ms_ssim, abs=1e-4)
    with pytest.raises(UsageError, match="name the generator, too"):
        evaluate_generator(str(tmp_path / "samples"), ball_scans, tmp_path / "alone", asked)
    shutil.copytree(tmp_path / "samples", tmp_path / "other")
    small = nib.Nifti1Image(np.zeros((8, 12, 12), np.uint8), np.eye(4))
    nib.save(small, tmp_path / "other" / "00002.nii.gz")
    with pytest.raises(InputError, match="a volume of 8 x 12 x 12 x 1"):
        evaluate_generator([str(ball_generator), str(tmp_path / "other")], ball_scans, tmp_path / "wrong", asked)


def test_a_segmenter_of_volumes_compares_whole_volumes(
    ball_generator: Path, ball_scans, pictures, tmp_path: Path
) -> None:
    command = ["evaluate-generator", ball_generator, "--reference", ball_scans, "-o", tmp_path / "out"]
    command += ["--samplers", "ddim:2", "-n", "6"]
    result = medseg(*command, "--extractor", "hippocampus-t1", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["extractor"].startswith("hippocampus-t1 (")
    assert all("FID axial" not in row and row["MS-SSIM"] is not None for row in found["rows"])
    assert found["rows"][1]["FID"] > found["rows"][0]["FID"]
    options = GeneratorEvaluationOptions((), SAMPLING, "hippocampus-t1")
    with pytest.raises(UsageError, match="takes volumes, and these are images"):
        evaluate_generator(str(pictures), pictures, tmp_path / "images", options)


def test_without_a_number_as_many_volumes_are_drawn_as_there_are_real_ones(
    ball_generator: Path, ball_scans, scoring_network, tmp_path: Path
) -> None:
    """10,000 samples, the default for images, would be days of volumes."""
    options = GeneratorEvaluationOptions([("ddim", 1)], SampleOptions(device="cpu"), str(scoring_network))
    _, row = evaluate_generator([str(ball_generator)], ball_scans, tmp_path / "out", options).rows
    assert row.scores.count == row.scores.reference_count == 12
    command = ("evaluate-generator", ball_generator, "--reference", ball_scans, "-o", tmp_path / "command")
    more = ("--samplers", "ddim:1", "--extractor", scoring_network, "--device", "cpu", "--json")
    content = json.loads(medseg(*command, *more).stdout)
    assert content["rows"][1]["N"] == 12
    assert content["warnings"] == json.loads((tmp_path / "command" / "scores.json").read_text())["warnings"] != []


@pytest.mark.parametrize(
    ("shape", "count"), [((300, 4, 4, 4, 1), 100), ((30, 4, 4, 4, 1), 30), ((30, 4, 4, 3), 10_000)]
)
def test_the_default_number_of_samples(shape: tuple[int, ...], count: int) -> None:
    assert default_count(RealImages(np.zeros(shape, np.uint8), True, ())) == count


def test_slices_lie_in_the_middle_half_and_the_middle_one_is_among_them() -> None:
    for side in (8, 11, 12, 64, 181):
        positions = slice_positions(side)
        assert len(positions) == SLICES and positions == sorted(positions)
        assert positions[SLICES // 2] == side // 2
        assert side // 4 <= positions[0] and positions[-1] < side - side // 4

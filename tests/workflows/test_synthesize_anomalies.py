"""`medseg synthesize-anomalies` writes a labelled folder, and only where scores count."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from medseg_cli.main import app
from typer.testing import CliRunner, Result

from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.volumes.foreground import foreground, scan_foreground
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.workflows.synthesize_anomalies import SynthesisOptions, synthesize_anomalies

KIND = pytest.mark.parametrize("kind", ["hyper", "hypo", "deformation"])

TILTED = np.array([[0.0, -1.0, 0.1, 30.0], [1.2, 0.0, 0.0, -20.0], [0.0, 0.12, 2.0, 5.0], [0.0, 0.0, 0.0, 1.0]])


def head(path: Path, seed: int = 0, size: float = 1.0) -> Path:
    """A textured ball in air, at a tilted position; ``size`` is its share of the image."""
    shape = (48, 44, 30)
    lines = [np.linspace(-1, 1, n) for n in shape]
    inside = sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")) < 0.9 * size
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.where(inside, rng.normal(100, 10, shape), 0).astype(np.float32), TILTED)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["synthesize-anomalies", *map(str, arguments)])


@KIND
def test_the_command_writes_a_labelled_folder_that_it_describes(kind: str, tmp_path: Path) -> None:
    head(tmp_path / "scans/a.nii.gz", 0)
    head(tmp_path / "scans/b.nii.gz", 1)
    out = tmp_path / "out"
    arguments = (tmp_path / "scans", "--kind", kind, "--count", 2, "--radius-mm", 4, 5)
    result = run(*arguments, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["status"] for line in result.stdout.splitlines()] == ["done", "done"]
    cases = find_cases(out).cases
    about = json.loads((out / "anomalies.json").read_text())
    assert about["seed"] == 0 and [scan["scan"] for scan in about["scans"]] == ["a.nii.gz", "b.nii.gz"]
    for case, scan in zip(cases, about["scans"], strict=True):
        before = read_volume(tmp_path / "scans" / f"{case.name}.nii.gz")
        image, label = read_volume(case.image), read_labels(case.label)
        stored = nib.load(case.label)
        assert stored.get_data_dtype() == np.uint8 and set(label.data.unique().tolist()) == {0, 1}
        for written in (image, label):
            np.testing.assert_array_equal(written.affine, before.affine)
            assert written.header.xyzt_units == before.header.xyzt_units
        assert not bool((label.data[0].bool() & ~foreground(before.data[0])).any())
        assert not torch.equal(image.data, before.data)
        if kind != "deformation":  # inside its mask a blob changes every voxel but the darkest
            assert float((image.data != before.data)[label.data.bool()].float().mean()) > 0.99
        assert sum(one["voxels"] for one in scan["anomalies"]) == int(label.data.sum())
        for one in scan["anomalies"]:
            assert one["kind"] == kind and one["contrast"] == 0.3 and 4 <= one["radius_mm"] <= 5
            voxel = np.linalg.solve(before.affine, [*one["centre_mm"], 1])[:3]
            near = np.abs(np.argwhere(label.data[0].numpy()) - voxel).max(1)
            assert near.min() < 2.5
    again, other = tmp_path / "again", tmp_path / "other"
    assert run(tmp_path / "scans/b.nii.gz", *arguments[1:], "-o", again).exit_code == 0  # alone as among others
    assert run(*arguments, "-o", other, "--seed", 1).exit_code == 0
    file = Path("images/b.nii.gz")
    assert torch.equal(read_volume(out / file).data, read_volume(again / file).data)
    assert not torch.equal(read_volume(out / file).data, read_volume(other / file).data)
    seeds = [one["seed"] for scan in about["scans"] for one in scan["anomalies"]]
    assert len(set(seeds)) == 4


def test_a_bad_scan_stops_no_other_and_is_named_in_one_line(tmp_path: Path) -> None:
    good, small = head(tmp_path / "good.nii.gz"), head(tmp_path / "small.nii.gz", size=0.01)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    result = run(broken, small, good, "-o", tmp_path / "out")
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 3 and "broken.nii.gz" in lines[0] and "too small" in lines[1] and "2 of 3" in lines[2]
    assert [case.name for case in find_cases(tmp_path / "out").cases] == ["good"]
    alone = run(small, "-o", tmp_path / "alone")
    assert alone.exit_code == 3 and "found a foreground too small" in alone.stderr
    assert not (tmp_path / "alone").exists()
    many = run(good, "-o", tmp_path / "many", "--count", 500)
    assert many.exit_code == 3 and "of 500 anomalies" in many.stderr
    coarse = run(good, "-o", tmp_path / "coarse", "--radius-mm", 1, 4)
    assert coarse.exit_code == 3 and "raise --radius-mm to 1.5" in coarse.stderr


def test_wrong_usage_writes_nothing(tmp_path: Path) -> None:
    one, other = head(tmp_path / "a/scan.nii.gz"), head(tmp_path / "b/scan.nii.gz")
    out = tmp_path / "out"
    for arguments, said in [
        ((one, other, "-o", out), "would both be written"),
        ((one, "-o", tmp_path / "out.nii.gz"), "give a folder"),
        ((one, "-o", out, "--kind", "deformation", "--contrast", 1), "fold"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2 and said in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1
    assert run(one, "-o", out, "--count", 0).exit_code == 2
    inside = head(tmp_path / "data/images/scan.nii.gz")
    assert run(inside, "-o", tmp_path / "data").exit_code == 2  # it would overwrite the scan
    assert not out.exists()


def test_anomalies_lie_where_scores_count_in_any_orientation(tmp_path: Path) -> None:
    """The scalp is told by its depth in axial slices, which are not the slices of this file."""
    lines = [np.linspace(-1, 1, n) for n in (44, 48, 40)]
    inside = sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")) < 0.9
    image = np.random.default_rng(0).normal(5, 2, inside.shape) + 100 * inside
    affine = np.eye(4)[[2, 0, 1, 3]]  # axes to the front, up, to the right
    nib.save(nib.Nifti1Image(image.transpose(1, 2, 0).astype(np.float32), affine), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.axcodes == "ASR"
    free = scan_foreground(volume)
    assert int((free != foreground(volume.data[0])).sum()) > 500
    for seed in range(6):
        options = SynthesisOptions(tmp_path / f"{seed}", count=4, radius_mm=(3.0, 5.0), seed=seed)
        (result,) = synthesize_anomalies([tmp_path / "a.nii.gz"], options)
        assert result.status == "done"
        mask = read_labels(result.outputs["labels"]).data[0].bool()
        assert not bool((mask & ~free).any())


@pytest.mark.data
@pytest.mark.parametrize(
    "pattern", ["lgg_flair/imagesTr/TCGA_C*.nii.gz", "Task04_Hippocampus/imagesTr/*_00[1-9].nii.gz"]
)
@KIND
def test_real_scans_take_anomalies(data_folder: Path, tmp_path: Path, pattern: str, kind: str) -> None:
    files = sorted(data_folder.glob(pattern))[:3]
    if not files:
        pytest.skip(f"no {pattern} in {data_folder}")
    results = synthesize_anomalies(files, SynthesisOptions(tmp_path, kind))
    assert [result.error for result in results] == [None] * len(files)
    for file, case in zip(files, find_cases(tmp_path).cases, strict=True):
        inside = foreground(read_volume(file).data[0])
        mask = read_labels(case.label).data[0].bool()
        assert mask.sum() > 100 and not bool((mask & ~inside).any())

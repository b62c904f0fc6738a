"""Synthetic anomalies: where they lie, how large they are, what they change, and the command that writes them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medseg_cli.main import app
from scipy import ndimage
from typer.testing import CliRunner, Result

from medseg_diffusion.data.cases import find_cases
from medseg_diffusion.data.synthetic_anomalies import (
    STRONGEST_DEFORMATION,
    Anomaly,
    AnomalyRecipe,
    insert_anomaly,
    robust_spread,
)
from medseg_diffusion.errors import UsageError
from medseg_diffusion.volumes.foreground import foreground, scan_foreground
from medseg_diffusion.volumes.io import read_labels, read_volume
from medseg_diffusion.workflows.synthesize_anomalies import SynthesisOptions, synthesize_anomalies

KINDS = ("hyper", "hypo", "deformation")
KIND = pytest.mark.parametrize("kind", KINDS)
ISOTROPIC = (1.0, 1.0, 1.0)


def texture(*shape: int, seed: int = 0) -> torch.Tensor:
    return 50 + 50 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def drawn(
    kind: str,
    radius: float,
    image: torch.Tensor | None = None,
    free: torch.Tensor | None = None,
    seed: int = 0,
    contrast: float = 0.3,
    spacing: tuple[float, float, float] = ISOTROPIC,
) -> Anomaly:
    """An anomaly of one radius, in texture without end unless told otherwise, for a spread of 100."""
    image = texture(64, 64, 64) if image is None else image
    free = torch.ones(image.shape, dtype=torch.bool) if free is None else free
    generator = torch.Generator().manual_seed(seed)
    recipe = AnomalyRecipe(kind, contrast, (radius, radius))
    found = insert_anomaly(image, free, spacing, recipe, 100.0, generator)
    assert found is not None
    return found


def offset_mm(anomaly: Anomaly, spacing: tuple[float, float, float] = ISOTROPIC) -> np.ndarray:
    """Vector (3, I, J, K) from the centre to every voxel."""
    lines = [(np.arange(n) - c) * mm for n, c, mm in zip(anomaly.mask.shape, anomaly.centre, spacing, strict=True)]
    return np.stack(np.meshgrid(*lines, indexing="ij"))


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_the_spread_is_that_of_the_foreground_between_its_5th_and_95th_percentile() -> None:
    image = torch.cat([torch.arange(101.0), torch.full((99,), 5000.0)]).reshape(2, 10, 10)
    inside = image <= 100
    assert robust_spread(image, inside) == pytest.approx(90.0)
    assert robust_spread(image, torch.zeros_like(inside)) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    spacing=st.tuples(*[st.floats(0.8, 2.0)] * 3),
    radius=st.floats(3.0, 6.0),
)
def test_an_anomaly_lies_in_the_foreground_and_changes_nothing_else(kind, seed, spacing, radius) -> None:
    image = texture(28, 30, 26, seed=seed)
    lines = [np.linspace(-1, 1, n) for n in image.shape]
    ball = sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")) < 0.9
    recipe = AnomalyRecipe(kind, 0.3, (radius, 2 * radius))
    free = torch.from_numpy(ball)
    found = insert_anomaly(image, free, spacing, recipe, 100.0, torch.Generator().manual_seed(seed))
    assert found is not None
    assert bool(found.mask.any()) and bool(free[found.centre])
    assert not bool((found.mask & ~found.touched).any()) and not bool((found.touched & ~free).any())
    assert torch.equal(found.image[~found.touched], image[~found.touched])
    assert radius <= found.radius_mm <= 2 * radius
    if kind == "hyper":
        assert bool((found.image[found.mask] > image[found.mask]).all())
    else:
        assert found.image.min() >= image.min()
    if kind == "hypo":
        assert bool((found.image <= image).all())
    if kind == "deformation":
        assert found.image.max() <= image.max()


def whole(kind: str, radius: float, spacing: tuple[float, float, float] = ISOTROPIC) -> dict[int, Anomaly]:
    """By seed, the anomalies in 64 mm that the edge of the grid does not cut."""
    image = texture(*(round(64 / mm) for mm in spacing))
    found = {seed: drawn(kind, radius, image, seed=seed, spacing=spacing) for seed in range(8)}
    inner = tuple(slice(1, n - 1) for n in image.shape)
    return {seed: one for seed, one in found.items() if one.touched.sum() == one.touched[inner].sum()}


@KIND
def test_a_large_anomaly_has_the_volume_of_its_ball(kind: str) -> None:
    """Within 3 %; the mask of a deformation has a hole of less than a fifth of the radius, of 1 % of the volume."""
    expected = 4 / 3 * np.pi * 12**3
    found = whole(kind, 12.0)
    assert len(found) > 1
    for one in found.values():
        assert float(one.mask.sum()) == pytest.approx(expected, rel=0.03)
        if kind != "deformation":  # and yet it is no ball
            ball = torch.from_numpy(np.sqrt((offset_mm(one) ** 2).sum(0)) < 12)
            assert 0.1 < float((ball ^ one.mask).sum()) / expected < 0.6


@KIND
def test_a_shape_is_the_same_in_millimetres_on_any_grid(kind: str) -> None:
    """From the centre it reaches as far in voxels of 1 x 1 x 1 mm as of 0.5 x 1 x 3 mm, to the coarsest voxel."""
    other = (0.5, 1.0, 3.0)
    fine, coarse = whole(kind, 8.0), whole(kind, 8.0, other)
    seeds = fine.keys() & coarse.keys()
    assert len(seeds) > 1
    for seed in seeds:
        one, two = fine[seed], coarse[seed]
        ends = []
        for found, spacing in ((one, ISOTROPIC), (two, other)):
            inside = offset_mm(found, spacing)[:, found.mask.numpy()]
            ends.append(np.concatenate([inside.min(1), inside.max(1)]))
        np.testing.assert_allclose(*ends, atol=3.01)
        assert float(one.mask.sum()) == pytest.approx(1.5 * float(two.mask.sum()), rel=0.03)


@pytest.mark.parametrize(("kind", "sign"), [("hyper", 1), ("hypo", -1)])
def test_the_core_changes_by_contrast_times_spread_and_the_edge_is_two_voxels(kind: str, sign: int) -> None:
    image = texture(64, 64, 64)
    image[0, 0, 0] = 0.0  # far from it, so that there is room below
    found = drawn(kind, 10.0, image, contrast=0.4)
    cube = np.ones((3, 3, 3))
    mask = found.mask.numpy()
    core = torch.from_numpy(ndimage.binary_erosion(mask, cube, iterations=2))
    assert core.sum() > 1000
    torch.testing.assert_close(found.image[core] - image[core], torch.full((int(core.sum()),), sign * 40.0))
    assert not bool((found.touched & ~torch.from_numpy(ndimage.binary_dilation(mask, cube, iterations=2))).any())
    change = sign * (found.image - image)
    assert float(change[found.mask].min()) > 19.99 and float(change[~found.mask].max()) < 20.01
    soft = (change > 0.01) & (change < 39.99)
    assert 0.1 < float(soft.sum()) / float(found.mask.sum()) < 1.5


def test_nothing_gets_darker_than_the_darkest_voxel() -> None:
    image = texture(40, 40, 40)
    found = drawn("hypo", 8.0, image, contrast=2.0)
    assert float(found.image.min()) == float(image.min())


@pytest.mark.parametrize("contrast", [0.1, STRONGEST_DEFORMATION])
@pytest.mark.parametrize("spacing", [ISOTROPIC, (1.0, 0.8, 2.0)])
def test_a_deformation_displaces_along_the_rays_from_its_centre_and_does_not_fold(contrast, spacing) -> None:
    """The oracle: an image that holds one coordinate shows where the intensities of every voxel come from."""
    shape, radius = (56, 70, 44), 14.0
    places = np.stack(np.meshgrid(*[np.arange(n) * mm for n, mm in zip(shape, spacing, strict=True)], indexing="ij"))
    signs = set()
    for seed in range(3):
        ramps = [torch.from_numpy(axis).float() for axis in places]
        found = [drawn("deformation", radius, ramp, seed=seed, contrast=contrast, spacing=spacing) for ramp in ramps]
        assert len({one.centre for one in found}) == 1
        source = np.stack([one.image.numpy() for one in found]).astype(np.float64)
        moved = places - source
        size = np.sqrt((moved**2).sum(0))
        largest = contrast * radius
        assert abs(found[0].displacement_mm) == pytest.approx(largest)
        assert size.max() == pytest.approx(largest, rel=0.02)
        clear = np.abs(size - largest / 2) > 0.01 * largest
        np.testing.assert_array_equal(found[0].mask.numpy()[clear], (size > largest / 2)[clear])
        offset = offset_mm(found[0], spacing)
        outwards = np.sign(found[0].displacement_mm)
        along = outwards * (moved * offset).sum(0) / np.maximum(np.sqrt((offset**2).sum(0)), 1e-9)
        np.testing.assert_allclose(along, size, atol=2e-3)
        rows = [np.stack(np.gradient(axis, *spacing)) for axis in source]
        assert np.linalg.det(np.moveaxis(np.stack(rows), (0, 1), (-2, -1))).min() > 0
        signs.add(outwards)
    assert signs == {-1.0, 1.0}


def test_a_deformation_moves_intensities_and_keeps_their_range() -> None:
    image = texture(64, 64, 64)
    found = drawn("deformation", 10.0, image)
    assert float((found.image - image)[found.mask].abs().mean()) > 3
    assert found.image.min() >= image.min() and found.image.max() <= image.max()
    far = torch.from_numpy(np.sqrt((offset_mm(found) ** 2).sum(0)) > 1.2 * 1.15 * 10)
    assert far.sum() > 1000 and torch.equal(found.image[far], image[far])


@KIND
def test_an_anomaly_depends_on_its_generator_alone(kind: str) -> None:
    one, same, other = (drawn(kind, 8.0, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.image, same.image) and torch.equal(one.mask, same.mask) and one.centre == same.centre
    assert not torch.equal(one.image, other.image) and one.centre != other.centre


@KIND
def test_several_anomalies_do_not_touch(kind: str) -> None:
    image, free, masks = texture(64, 64, 64), torch.ones(64, 64, 64, dtype=torch.bool), []
    for seed in range(5):
        found = drawn(kind, 7.0, image, free, seed=seed)
        image, free = found.image, free & ~found.touched
        masks.append(found.mask.numpy())
    for one, other in combinations(masks, 2):
        assert not (ndimage.binary_dilation(one, np.ones((3, 3, 3))) & other).any()


@KIND
def test_the_radius_shrinks_to_what_there_is_room_for_and_too_small_a_foreground_holds_none(kind: str) -> None:
    lines = [np.arange(40) - 20] * 3
    distance = np.sqrt(sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")))
    recipe = AnomalyRecipe(kind, 0.3, (6.0, 60.0))
    for radius, fits in ((13.0, True), (4.0, False), (0.0, False)):
        free = torch.from_numpy(distance < radius)
        found = insert_anomaly(texture(40, 40, 40), free, ISOTROPIC, recipe, 100.0, torch.Generator().manual_seed(0))
        assert (found is not None) == fits
        if found is not None:
            assert 6.0 <= found.radius_mm < 20.0


@KIND
def test_a_single_slice_holds_a_disc(kind: str) -> None:
    found = drawn(kind, 12.0, texture(64, 64, 1))
    assert 0.5 < float(found.mask.sum()) / (np.pi * 12**2) < 1.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"radius_mm": (5.0, 4.0)}, "5 and 4"),
        ({"radius_mm": (0.0, 4.0)}, "0 and 4"),
        ({"contrast": 0.0}, "above 0"),
        ({"contrast": float("nan")}, "above 0"),
        ({"kind": "deformation", "contrast": 0.5}, "fold"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        AnomalyRecipe(**changes)
    with pytest.raises(UsageError, match=said):
        synthesize_anomalies([tmp_path], SynthesisOptions(tmp_path / "out", **changes))


# ---- files -----------------------------------------------------------------------------------------------------------

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
    assert [case["status"] for case in json.loads(result.stdout)] == ["done", "done"]
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

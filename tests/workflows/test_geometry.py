"""Any orientation, spacing, type and shape: the mask lies on the scan's grid, and turns with the scan."""

from __future__ import annotations

import warnings
from itertools import permutations, product
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.volumes.modality import ModelInput
from medseg_diffusion.workflows import segment as workflow
from tests.helpers.segmenters import run, thresholding

ORIENTATIONS = [
    "".join(codes)
    for pairs in permutations(("LR", "PA", "IS"))
    for codes in product(*pairs)
]  # fmt: skip
TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
SHAPE = (22, 19, 14)


def body(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A bright ball off the middle in a dim, uneven background: 0 to 1, smooth, so that resampling keeps its edge."""
    places = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij")
    distance = np.sqrt(sum((x - c) ** 2 for x, c in zip(places, (0.2, -0.1, 0.0), strict=True)))
    ripple = 0.05 * np.sin(7 * places[0] + 3 * places[1])
    return 0.15 + ripple + 0.7 / (1 + np.exp(18 * (distance - 0.55)))


def turned(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """The same image with axes of other directions; its voxels stay where they are in the patient."""
    start = nib.orientations.io_orientation(image.affine)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    return image.as_reoriented(nib.orientations.ornt_transform(start, target))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.count_nonzero((a > 0) & (b > 0)) / (np.count_nonzero(a) + np.count_nonzero(b)))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[np.ndarray, bool]:
    """An affine (4, 4) to RAS mm, oblique or not, of spacings of 0.2 to 6 mm; and whether it is sheared."""
    spacing = [draw(st.floats(0.2, 6.0)) for _ in range(3)]
    angles = [draw(st.sampled_from([0.0, 0.1, -0.35])) for _ in range(3)]
    shear = draw(st.sampled_from([0.0, 0.0, 0.15]))
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) @ np.array([[1, shear, 0], [0, 1, 0], [0, 0, 1]]) * spacing
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return affine, shear != 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, object]:
    """A model of volumes that resamples them, and one of slices."""
    folder = tmp_path_factory.mktemp("models")
    flat = {"network": {"dims": 2, "channels": 8, "channel_mult": [1, 2]}, "data": {"window": [8, 8]}}
    window = {"steps": 2, "window": [16, 16, 16], "overlap": 0.5}
    return {
        3: thresholding(folder / "volumes", preprocessing={"spacing_mm": [1.0, 1.2, 1.5]}, inference=window),
        2: thresholding(folder / "slices", **flat),
    }


def segmented(model: object, scan: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> nib.Nifti1Image:
    monkeypatch.setattr(workflow, "load_segmenter", lambda *arguments, **options: model)
    monkeypatch.setattr(workflow, "model_input", lambda name: ModelInput("threshold", ("image",)))
    monkeypatch.setattr(workflow, "load_card", lambda name: {"labels": {"0": "background", "1": "bright"}})
    (result,) = run([scan], scan, output=scan.parent / "out", **options)
    assert result.status == "done", result.error
    return nib.load(result.outputs["segmentation"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    geometry=geometries(),
    kind=st.sampled_from(TYPES),
    shape=st.tuples(st.integers(2, 16), st.integers(2, 16), st.integers(1, 12)),
    slope=st.sampled_from([None, (2.5, -7.0), (1e-3, 0.0), (-0.5, 100.0)]),
    form=st.sampled_from(["both", "sform", "qform", "other qform"]),
)
def test_a_mask_has_the_grid_of_its_scan(models, codes, geometry, kind, shape, slope, form) -> None:
    affine, sheared = geometry
    values = (body(shape) * 100).astype(kind)
    values.flat[0] = 0  # some contrast, however few voxels there are
    image = turned(nib.Nifti1Image(values, affine, dtype=np.dtype(kind)), codes)
    if slope is not None and np.dtype(kind).kind != "f":
        image.header.set_slope_inter(*slope)
    qform = image.affine.copy()
    if form == "other qform":
        qform[:3, 3] += 12.5
    scanner = 1 if form != "sform" else 0
    image.set_sform(image.affine, 0 if form == "qform" and not sheared else 2)
    image.set_qform(qform, scanner, strip_shears=True)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scan = Path(folder) / "scan.nii.gz"
        nib.save(image, scan)
        mask, stored = segmented(models[2 if shape[2] == 1 else 3], scan, patch), nib.load(scan)
        labels = np.asarray(mask.dataobj)
    assert labels.shape == stored.shape and labels.dtype == np.uint8 and set(np.unique(labels)) <= {0, 1}
    size = min(nib.affines.voxel_sizes(stored.affine))
    np.testing.assert_allclose(mask.affine, stored.affine, atol=2e-3 * size)
    for name in ("qform_code", "sform_code", "xyzt_units"):
        assert mask.header[name] == stored.header[name], name
    assert (mask.header.get_slope_inter()) == (None, None) or mask.header.get_slope_inter() == (1.0, 0.0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.6, 1.1, 2.3)])
@pytest.mark.parametrize("oblique", [False, True])
def test_the_mask_turns_with_the_scan(models, spacing, oblique, tmp_path: Path, monkeypatch) -> None:
    """In all 48 orientations, although the scan is resampled and seen in windows."""
    affine = np.eye(4)
    affine[:3, :3] = (nib.eulerangles.euler2mat(0.2, -0.1, 0.15) if oblique else np.eye(3)) * spacing
    affine[:3, 3] = -40, 25.5, 7
    scan = nib.Nifti1Image((body() * 1000).astype(np.int16), affine)
    expected = None
    for codes in ["RAS", *ORIENTATIONS]:
        nib.save(turned(scan, codes), tmp_path / "scan.nii.gz")
        mask = turned(segmented(models[3], tmp_path / "scan.nii.gz", monkeypatch), "RAS")
        labels = np.asarray(mask.dataobj)
        expected = labels if expected is None else expected
        assert 0.02 < labels.mean() < 0.6 and dice(labels, expected) >= 0.99, codes
        np.testing.assert_allclose(mask.affine, affine, atol=1e-4)


def test_a_real_network_sees_the_same_scan_in_every_orientation(tiny_model: Path, tmp_path: Path) -> None:
    """Its noise, too, lies in the patient and not in the file."""
    scan = nib.Nifti1Image((body() * 1000).astype(np.int16), np.diag([-1.0, 1.0, 2.0, 1.0]))
    found = []
    for codes in ("RAS", "LPS", "SAL", "PIR"):
        nib.save(turned(scan, codes), tmp_path / "scan.nii.gz")
        (result,) = run([tmp_path / "scan.nii.gz"], tiny_model, ensemble=2, output=tmp_path / codes)
        assert result.status == "done", result.error
        found.append(np.asarray(turned(nib.load(result.outputs["segmentation"]), "RAS").dataobj))
    assert found[0].any() and all(dice(one, found[0]) >= 0.99 for one in found[1:])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_slice_is_segmented_by_a_model_of_slices(models, axis: int, tmp_path: Path, monkeypatch) -> None:
    """An axial slice, whichever axis of the file is the thin one."""
    flat = nib.Nifti1Image((body((22, 19, 1)) * 1000).astype(np.int16), np.diag([0.5, 0.5, 4.0, 1.0]))
    codes = ("SRA", "RSA", "RAS")[axis]
    nib.save(turned(flat, codes), tmp_path / "scan.nii.gz")
    mask = segmented(models[2], tmp_path / "scan.nii.gz", monkeypatch)
    assert mask.shape[axis] == 1 and 0.02 < np.asarray(mask.dataobj).mean() < 0.6


def test_the_level_of_the_test_model_divides_the_ball_from_its_background(models) -> None:
    """The tests above would compare empty masks otherwise."""
    assert len(ORIENTATIONS) == len(set(ORIENTATIONS)) == 48
    values = body()
    assert values.max() > 0.8 and values.min() > 0.05 and 0.02 < (values > 0.5).mean() < 0.6

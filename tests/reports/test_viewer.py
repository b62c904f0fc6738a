"""The data of the viewer: in place, within its size, with every class."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import warnings
from base64 import b64decode
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion.errors import InputError
from medseg_diffusion.reports.theme import label_colour
from medseg_diffusion.reports.viewer import (
    Layer,
    ViewedCase,
    Viewer,
    reduced_image,
    reduced_labels,
    viewed_case,
    viewer,
)
from medseg_diffusion.volumes.volume import Volume

OBLIQUE = np.array([[0.1, -1.9, 0.2, 31], [0.98, 0.2, -0.4, -20], [0.1, 0.3, 2.9, 7], [0, 0, 0, 1]])


def data_of(shown: Viewer) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" class="viewer-data">(.*?)</script>', shown.html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def image_of(layer: dict[str, Any]) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(b64decode(layer["data"])))


def centre_mm(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ np.argwhere(voxels).mean(axis=0) + affine[:3, 3]


def noisy_case(shape: tuple[int, int, int], name: str = "case", affine: np.ndarray = OBLIQUE) -> ViewedCase:
    """Noise, which does not compress, with a bright labelled block."""
    scan = np.random.default_rng(0).random(shape)
    labels = np.zeros(shape, np.int32)
    block = tuple(slice(length // 8, length // 8 + 16) for length in shape)
    scan[block], labels[block] = 3.0, 700
    layers = [Layer("prediction", labels, labels={700: "block", 3: "absent"}), Layer("scan", scan)]
    return ViewedCase(name, "", affine, layers)


@pytest.mark.parametrize("max_bytes", [12_000_000, 1_250_000])
def test_layers_stay_where_they_are_in_the_patient(max_bytes: int) -> None:
    case = noisy_case((80, 96, 64))
    entry = data_of(viewer([case], max_bytes=max_bytes))["cases"][0]
    scan, labels = (image_of(layer) for layer in entry["layers"])
    assert [layer["kind"] for layer in entry["layers"]] == ["scan", "prediction"]
    affine = np.array([*entry["affine"], [0, 0, 0, 1]])
    assert nib.aff2axcodes(affine) == ("R", "A", "S") and list(scan.shape) == entry["shape"]
    assert np.allclose(scan.affine, np.diag([*nib.affines.voxel_sizes(affine), 1.0]), atol=1e-5)
    wanted = centre_mm(case.layers[0].data > 0, OBLIQUE)
    assert np.allclose(centre_mm(np.asarray(labels.dataobj) > 0, affine), wanted, atol=0.5)
    assert np.allclose(centre_mm(np.asarray(scan.dataobj) > 250, affine), wanted, atol=0.5)
    assert ("lower resolution" in entry["note"]) == (max_bytes < 2_000_000) == (scan.shape != (96, 80, 64))
    at = tuple(entry["start"])
    assert np.asarray(labels.dataobj)[at] == 2, "it opens within the block; classes are numbered from 1"


def test_page_stays_within_its_size_and_says_the_voxel_size() -> None:
    shown = viewer([noisy_case((96, 96, 96), str(i)) for i in range(3)], max_bytes=1_500_000)
    assert len(shown.html) + len(shown.script) < 1_500_000
    for entry in data_of(shown)["cases"]:
        sizes = re.findall(r"voxels of ([\d.]+) x ([\d.]+) x ([\d.]+) mm", entry["note"])
        affine = image_of(entry["layers"][0]).affine
        assert np.allclose([float(size) for size in sizes[0]], nib.affines.voxel_sizes(affine), rtol=0.01)
        assert "(96 x 96 x 96)" in entry["note"]


def test_long_axes_are_reduced() -> None:
    shape = data_of(viewer([noisy_case((400, 20, 17))]))["cases"][0]["shape"]
    assert sorted(shape) == [17, 20, 134]


def test_a_class_has_one_colour_in_all_cases() -> None:
    data = data_of(viewer([noisy_case((20, 20, 20)), noisy_case((24, 20, 20))]))
    assert data["classes"] == [
        {"name": "absent", "colour": label_colour(0)},
        {"name": "block", "colour": label_colour(1)},
    ]


def test_maps_keep_their_values() -> None:
    values = np.zeros((20, 20, 20))
    values[4:16, 4:16, 4:16] = 0.8
    entry = data_of(viewer([ViewedCase("a", "", np.eye(4), [Layer("uncertainty", values)])]))["cases"][0]
    blank, layer = entry["layers"]
    assert blank["empty"] and layer["title"] == "Uncertainty" and layer["high"] == 0.8
    assert np.asarray(image_of(layer).dataobj)[10, 10, 10] == 255


@pytest.mark.parametrize("peak", [0.5, 0.9])
def test_values_beyond_the_largest_byte_are_not_passed_off_as_exact(peak: float) -> None:
    values = np.full((30, 30, 30), 0.5, np.float32)
    values[3, 4, 5] = peak
    (entry,) = data_of(viewer([ViewedCase("a", "", np.eye(4), [Layer("anomaly", values)])]))["cases"]
    assert entry["layers"][1]["high"] == 0.5 and entry["layers"][1]["clipped"] == (peak > 0.5)


def test_voxels_without_a_number_are_black() -> None:
    image = np.full((20, 20, 20), 5.0)
    image[:10], image[0, 0, 0] = np.nan, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry = data_of(viewer([ViewedCase("a", "", np.eye(4), [Layer("scan", image)])]))["cases"][0]
    shown = np.asarray(image_of(entry["layers"][0]).dataobj)
    assert (shown[:10] == 0).all() and (shown[10:] == 255).all()


def test_reduced_images_are_means() -> None:
    image = np.arange(5 * 4 * 3, dtype=float).reshape(5, 4, 3)
    reduced = reduced_image(image, (2, 2, 1))
    assert reduced.shape == (3, 2, 3)
    assert reduced[0, 0, 0] == image[:2, :2, 0].mean() and reduced[2, 1, 2] == image[4, 2:, 2].mean()
    assert np.array_equal(reduced_image(image, (1, 1, 1)), image.astype(np.float32))


def test_reduced_labels_keep_volumes_and_small_and_thin_classes() -> None:
    labels = np.zeros((40, 40, 40), int)
    grid = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"))
    labels[((grid - 18.3) ** 2).sum(axis=0) < 12**2] = 1
    labels[18:20, :, :][labels[18:20] == 1] = 2  # a sheet
    labels[5, 5, 3:37] = 3  # a line
    labels[37, 37, 38] = 4  # a voxel
    for factors in ((2, 2, 2), (3, 1, 2)):
        reduced = reduced_labels(labels, factors)
        size = np.prod(factors)
        volumes = {label: (reduced == label).sum() * size / (labels == label).sum() for label in (1, 2, 3, 4)}
        assert volumes[1] == pytest.approx(1, abs=0.05) and volumes[2] == pytest.approx(1, abs=0.5)
        assert volumes[3] >= 1 and (reduced == 4).sum() == 1
        assert set(np.unique(reduced)) == {0, 1, 2, 3, 4}
    assert np.array_equal(reduced_labels(labels, (1, 1, 1)), labels)


def test_reduced_labels_keep_small_classes_within_large_ones() -> None:
    """A core of a voxel wins no block from the oedema around it; two cores in one block have one each, if they can."""
    labels = np.zeros((24, 24, 24), int)
    labels[3:21, 3:21, 3:21] = 1
    labels[9, 9, 9] = 2
    labels[17, 12, 12], labels[18, 12, 12], labels[18, 13, 12] = 3, 3, 4
    reduced = reduced_labels(labels, (3, 3, 3))
    assert {label: int((reduced == label).sum()) for label in (2, 3, 4)} == {2: 1, 3: 1, 4: 1}
    assert reduced[3, 3, 3] == 2 and reduced[5, 4, 4] == 3 and reduced[6, 4, 4] == 4
    # Where they cannot, a block has one class, and nothing else changes.
    labels[17, 12, 12] = 1
    reduced = reduced_labels(labels, (3, 3, 3))
    assert reduced[6, 4, 4] in (3, 4) and set(np.unique(reduced)) in ({0, 1, 2, 3}, {0, 1, 2, 4})


def test_a_case_is_made_of_volumes() -> None:
    scan = Volume(torch.rand(2, 6, 5, 4), OBLIQUE, Path("scan.nii.gz"))
    mask = scan.like(torch.ones(1, 6, 5, 4, dtype=torch.int32))
    case = viewed_case("a", "flagged", {"scan": scan, "reference": mask}, {1: "x"}, {"reference": "Reader 1"})
    assert case.oriented and np.array_equal(case.affine, OBLIQUE)
    assert np.array_equal(case.layers[0].data, scan.data[0]) and case.layers[0].labels == {}
    assert case.layers[1] == Layer("reference", case.layers[1].data, "Reader 1", {1: "x"})
    with pytest.raises(InputError):
        viewed_case("a", "", {"scan": scan, "reference": Volume(mask.data, np.eye(4))})


def test_an_image_file_is_not_turned() -> None:
    # Readers of image files use the axes of ITK: columns, rows and slices are LPS.
    photo = torch.rand(3, 6, 4, 1)
    case = viewed_case("a", "", {"scan": Volume(photo, np.diag([-1.0, -1, 1, 1]), Path("photo.png"))})
    assert not case.oriented
    drawn = case.layers[0].data  # columns to the right, rows upwards
    assert np.allclose(drawn, photo.mean(0).flip(1))
    stored = np.asarray(image_of(data_of(viewer([case]))["cases"][0]["layers"][0]).dataobj)
    assert np.corrcoef(stored.ravel(), drawn.ravel())[0, 1] > 0.9


def test_names_cannot_end_the_data() -> None:
    shown = viewer([noisy_case((8, 8, 8), "</script><b>")])
    assert (
        "<b>" not in shown.html
        and data_of(shown)["cases"][0]["name"] == "</script><b>"
        and shown.names == ["</script><b>"]
    )


def test_wrong_cases_are_refused() -> None:
    image, other = np.zeros((4, 4, 4)), np.zeros((4, 4, 5))
    with pytest.raises(ValueError, match="at least one case"):
        viewer([])
    with pytest.raises(ValueError, match=r"shapes .*\(4, 4, 4\), \(4, 4, 5\)"):
        viewer([ViewedCase("a", "", np.eye(4), [Layer("scan", image), Layer("anomaly", other)])])
    with pytest.raises(ValueError, match="several layers of one kind"):
        viewer([ViewedCase("a", "", np.eye(4), [Layer("scan", image), Layer("scan", image)])])


def test_niivue_is_the_documented_version_with_its_licences() -> None:
    folder = files("medseg_diffusion.reports") / "vendor" / "niivue"
    library = (folder / "niivue.min.js").read_bytes()
    readme = (folder / "README.md").read_text("utf-8")
    assert hashlib.sha256(library).hexdigest() in readme and f"({len(library)} bytes" in readme
    script = viewer([noisy_case((8, 8, 8))]).script
    assert "Copyright (c) 2021, Niivue" in script and "NiiVue 0.69.0" in script and "0.69.0" in readme
    assert script.count("</script") == 2

"""Synthesis of brain scans: the labels stay true to the image, and an example depends on its generator alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion.data.label_maps import LABELS, LabelMap, load_label_map
from medseg_diffusion.data.synthetic_brains import SynthesisConfig, SyntheticBrains, synthetic_scan
from medseg_diffusion.data.tissue import to_tissue
from medseg_diffusion.errors import InputError

STILL = SynthesisConfig(
    t1_share=1.0,
    rotation=0.0,
    scale=(1.0, 1.0),
    shear=0.0,
    coarse_warp=(30.0, 0.0),
    fine_warp=(12.0, 0.0),
    pieces=0.0,
    texture=0.0,
    bias=0.0,
    noise=0.0,
    spacing=(0.5, 1.0),
    strip=0.0,
    crop=0.0,
    gain=(1.0, 1.0),
    shift=(0.0, 0.0),
    atrophy=0.0,
    lesions=0.0,
    ventricles=0.0,
    rims=0.0,
)


def head() -> LabelMap:
    """Nested balls: white matter in cortex in CSF in bone in skin, 64 mm wide."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(64) - 31.5] * 3, indexing="ij"))
    radius = grid.square().sum(0).sqrt()
    labels = torch.zeros(64, 64, 64, dtype=torch.int64)
    for limit, label in ((31, 511), (27, 515), (25, 24), (22, 3), (15, 2)):
        labels[radius < limit] = label
    table = torch.zeros(max(LABELS) + 1, dtype=torch.uint8)
    table[list(LABELS)] = torch.arange(len(LABELS), dtype=torch.uint8)
    return LabelMap("balls", table[labels], torch.nonzero((labels > 0) & (labels < 500))[::9].int())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_example_depends_on_its_generator_alone() -> None:
    brains = SyntheticBrains([head()], (32, 40, 24))
    first, again, other = (brains.example(0, generator(seed)) for seed in (3, 3, 4))
    for key in ("image", "label"):
        assert torch.equal(first[key], again[key])
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize("seed", range(12))
def test_examples_have_the_shape_type_and_range_of_inference(seed: int) -> None:
    example = SyntheticBrains([head()], (32, 40, 24)).example(0, generator(seed))
    assert example["image"].shape == (1, 32, 40, 24) and example["image"].dtype == torch.float32
    assert example["label"].shape == (32, 40, 24) and example["label"].dtype == torch.int64
    assert example["image"].isfinite().all() and example["image"].abs().max() <= 1.5
    assert set(example["label"].unique().tolist()) <= {0, 1, 2, 3}


def test_without_randomness_the_labels_are_those_of_the_map() -> None:
    anatomy = head()
    _, tissue, affine = synthetic_scan(anatomy, generator(), STILL)
    np.testing.assert_allclose(np.abs(np.diag(affine)), 1.0)
    expected = torch.from_numpy(to_tissue(np.asarray(LABELS)[anatomy.index.numpy()]))
    # The scan is a little larger than the map, with the same centre.
    start = [(n - m) // 2 for n, m in zip(tissue.shape, expected.shape, strict=True)]
    inner = tissue[tuple(slice(s, s + 64) for s in start)]
    assert (inner == expected).float().mean() > 0.99


def test_labels_follow_the_deformation() -> None:
    """In a strongly deformed, noise-free T1-like scan each tissue keeps its own brightness."""
    config = replace(STILL, rotation=30.0, scale=(0.8, 1.2), coarse_warp=(20.0, 3.0), shear=0.1)
    for seed in range(3):
        image, tissue, _ = synthetic_scan(head(), generator(seed), config)
        means = [float(image[tissue == value].mean()) for value in (1, 2, 3)]
        assert means[0] < means[1] < means[2], f"CSF < grey < white expected in T1, got {means}"
        assert float(image[tissue == 3].std()) < 0.3 * means[2]


def test_pieces_change_the_tissue_outside_the_brain_alone() -> None:
    """The balls' skin is the only soft tissue: with pieces it has several intensities; the brain keeps its contrast."""
    anatomy = head()
    skin = torch.tensor(LABELS)[anatomy.index.long()] == 511
    spreads: dict[float, list[float]] = {0.0: [], 1.0: []}
    for pieces, found in spreads.items():
        for seed in range(6):
            config = replace(STILL, pieces=pieces, spacing=(1.0, 1.0))
            image, tissue, _ = synthetic_scan(anatomy, generator(seed), config)
            grey, white = image[tissue == 2], image[tissue == 3]
            assert grey.std() < 150 and white.std() < 150 and white.mean() > grey.mean()
            inner = image[tuple(slice((n - 64) // 2, (n - 64) // 2 + 64) for n in image.shape)]
            found.append(float(inner[skin].std() / inner[skin].mean()))
    assert np.median(spreads[1.0]) > 1.5 * np.median(spreads[0.0]), spreads


def test_a_stripped_head_has_nothing_outside_the_labels() -> None:
    config = replace(STILL, strip=1.0, spacing=(0.5, 0.5))
    for seed in range(4):
        image, tissue, _ = synthetic_scan(head(), generator(seed), config)
        far = torch.nn.functional.max_pool3d((tissue > 0).float()[None], 9, 1, 4)[0] == 0
        assert float(image[far].abs().max()) == 0.0
        assert (tissue == 3).any() and (tissue == 2).any()


def test_missing_field_of_view_is_background() -> None:
    config = replace(STILL, crop=1.0)
    lost = []
    for seed in range(4):
        image, tissue, _ = synthetic_scan(head(), generator(seed), config)
        whole, expected, _ = synthetic_scan(head(), generator(seed), STILL)
        lost.append(int((expected > 0).sum() - (tissue > 0).sum()))
        assert image.shape == whole.shape
    assert min(lost) >= 0 and max(lost) > 0


def test_epochs_cover_every_anatomy() -> None:
    assert len(SyntheticBrains([head(), head()], (16, 16, 16), per_map=5)) == 10


def test_label_map_files_are_checked(tmp_path: Path) -> None:
    labels = np.zeros((8, 9, 10), dtype=np.int16)
    labels[2:5, 3:6, 4:8] = 41
    path = tmp_path / "map.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.diag([-1.0, 1, 1, 1])), path)
    assert load_label_map(path).index.shape == (3, 3, 4)
    nib.save(nib.Nifti1Image(labels, np.diag([2.0, 2, 2, 1])), path)
    with pytest.raises(InputError, match=r"2 x 2 x 2 mm"):
        load_label_map(path)
    labels[2, 3, 4] = 999
    nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    with pytest.raises(InputError, match=r"\[999\]"):
        load_label_map(path)

"""Synthesis of brain scans: the labels stay true to the image, and an example depends on its generator alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from medseg_diffusion.data.brain_classes import STRUCTURES, TISSUES
from medseg_diffusion.data.label_maps import LABELS, TISSUE, LabelMap, load_label_map
from medseg_diffusion.data.random_fields import Draw, along_axes, blur, linear_weights, resized
from medseg_diffusion.data.synthetic_brains import (
    SynthesisConfig,
    SyntheticBrains,
    _acquired,
    _box,
    _deformed,
    _diseased,
    _render,
    _signal,
    _stripped,
    synthetic_scan,
)
from medseg_diffusion.data.synthetic_contrast import structure_intensities
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
    expected = torch.from_numpy(TISSUES.convert(np.asarray(LABELS)[anatomy.index.numpy()]))
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


def small_brain() -> LabelMap:
    """A brain 32 mm wide in a corner of a head 96 mm wide."""
    whole, inner = torch.full((96, 96, 96), LABELS.index(515), dtype=torch.uint8), head().index[::2, ::2, ::2]
    brain = (inner > LABELS.index(0)) & (TISSUE[inner.long()] > 0)
    whole[8:40, 8:40, 8:40][brain] = inner[brain]
    return LabelMap("corner", whole, torch.nonzero(TISSUE[whole.long()]).int())


def test_behind_a_finder_examples_show_the_brain() -> None:
    def with_brain(margin_mm: float | None) -> list[bool]:
        brains = SyntheticBrains([small_brain()], (48, 48, 48), config=STILL, margin_mm=margin_mm)
        return [bool((brains.example(0, generator(seed))["label"] > 0).any()) for seed in range(10)]

    assert all(with_brain(0.0)) and not all(with_brain(None))


def test_intensities_are_scaled_by_what_is_seen() -> None:
    """Of white matter alone, not of the whole head with its air."""
    anatomy, ends = head(), []
    for seen in (None, [slice(24, 40)] * 3):
        draw, centre = Draw(generator()), torch.full((3,), 32.0).double()
        _, _, low, high = _render(anatomy.index, draw, STILL, centre, [16] * 3, 1.0, True, seen)
        ends.append((low, high))
    assert ends[0][0] < ends[1][0] and ends[1][1] - ends[1][0] < (ends[0][1] - ends[0][0]) / 2


def test_the_box_of_a_brain_has_its_margins_within_the_map() -> None:
    box = _box(small_brain(), [2.0, 3.0, 100.0, 100.0, -1.0, 0.0])
    first, last = (end(small_brain().brain, 0).tolist() for end in (torch.amin, torch.amax))
    assert box == [slice(first[0] - 2, last[0] + 4), slice(0, 96), slice(first[2] + 1, last[2] + 1)]


def test_a_coarse_scan_shows_the_same_head_and_a_part_its_middle() -> None:
    anatomy, config = head(), replace(STILL, spacing=(1.0, 1.0))
    _, whole, _ = synthetic_scan(anatomy, generator(1), config)
    _, coarse, affine = synthetic_scan(anatomy, generator(1), config, spacing_mm=2.0)
    np.testing.assert_allclose(np.abs(np.diag(affine)), [2, 2, 2, 1])
    for value in (1, 2, 3):
        assert 8 * int((coarse == value).sum()) == pytest.approx(int((whole == value).sum()), rel=0.05)
    _, part, affine = synthetic_scan(anatomy, generator(1), config, part=((8, 8, 8), torch.full((3,), 31.5)))
    np.testing.assert_allclose(np.abs(np.diag(affine)), 1.0)
    assert part.shape == (8, 8, 8) and bool((part == 3).all()), "the middle of the balls is white matter"


def test_epochs_cover_every_anatomy() -> None:
    assert len(SyntheticBrains([head(), head()], (16, 16, 16), per_map=5)) == 10


@pytest.mark.parametrize("label", [0, 165])  # nothing, and the skull alone
def test_a_label_map_without_a_brain_is_refused(tmp_path: Path, label: int) -> None:
    """It was loaded, and a training ended at a random draw from no voxels."""
    assert TISSUES.class_of.get(label) == 0
    path = tmp_path / "map.nii.gz"
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), label, np.int16), np.diag([-1.0, 1, 1, 1])), path)
    with pytest.raises(InputError, match=r"map\.nii\.gz: found no voxel of a brain; expected a label map of a head"):
        load_label_map(path)


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
    labels[2, 3, 4] = 251  # corpus callosum: white matter, but of no side
    nib.save(nib.Nifti1Image(labels, np.diag([-1.0, 1, 1, 1])), path)
    assert load_label_map(path).index.shape == (3, 3, 4)
    with pytest.raises(InputError, match=r"\[251\]"):
        load_label_map(path, STRUCTURES)


# ---- sides, batches and resampling -----------------------------------------------------------------------------------


def two_sides() -> LabelMap:
    """A head whose left half (low indices in RAS) is white matter 2, its right half 41."""
    anatomy = head()
    index = anatomy.index.clone()
    right = torch.zeros_like(index, dtype=torch.bool)
    right[32:] = True
    index[right & (index == LABELS.index(2))] = LABELS.index(41)
    index[right & (index == LABELS.index(3))] = LABELS.index(42)
    return replace(anatomy, index=index)


def test_sides_stay_those_of_the_image() -> None:
    """Half of the heads are mirrored; in all of them the left structures lie at the low indices."""
    config = replace(STILL, scale=(1.0, 1.0))
    brains = SyntheticBrains([two_sides()], (64, 64, 64), config=config, classes=STRUCTURES)
    left, right = (STRUCTURES.names.index(f"{side} cerebral white matter") for side in ("left", "right"))
    compared = 0
    for seed in range(12):
        label = brains.example(0, generator(seed))["label"]
        places = [torch.nonzero(label == value)[:, 0].double() for value in (left, right)]
        if all(len(place) for place in places):
            assert places[0].max() < places[1].min()
            compared += 1
    assert compared > 5


def test_ventricles_grow_on_their_own_side() -> None:
    anatomy = two_sides()
    index, grid = anatomy.index.clone(), torch.stack(torch.meshgrid(*[torch.arange(64) - 31.5] * 3, indexing="ij"))
    for value, centre in ((4, -8.0), (43, 8.0)):
        ball = (grid[0] - centre).square() + grid[1].square() + grid[2].square() < 49
        index[ball] = LABELS.index(value)
    labels = index.long()
    grown = _diseased(labels, Draw(generator(2)), replace(STILL, ventricles=1.0), 1.0)
    changed = grown != labels
    assert changed.any()
    assert set(grown[changed][torch.nonzero(changed)[:, 0] < 32].tolist()) == {LABELS.index(4)}
    assert set(grown[changed][torch.nonzero(changed)[:, 0] >= 32].tolist()) == {LABELS.index(43)}


def test_a_batch_has_the_examples_that_would_be_made_alone() -> None:
    maps, window = [head(), two_sides()], (24, 32, 16)
    alone, together = (SyntheticBrains(maps, window, in_batches=later) for later in (False, True))
    draws = [together.example(i, generator(i)) for i in range(4)]
    batch = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    finished = together.finish({**batch, "seed": torch.arange(4)}, torch.device("cpu"))
    assert sorted(finished) == ["image", "label", "seed"]
    for i in range(4):
        example = alone.example(i, generator(i))
        assert torch.equal(finished["image"][i], example["image"])
        assert torch.equal(finished["label"][i], example["label"])


class ElsewhereDraw(Draw):
    """Draws numbers on the CPU, and images on "meta", where whole tensors of the CPU are an error."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(generator)
        self.device = torch.device("meta")

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(tuple(shape), device=self.device)


@pytest.mark.parametrize("seed", range(4))
def test_an_image_is_made_on_its_device_without_a_look_at_it(seed: int) -> None:
    """What a GPU does, up to the percentiles: no tensor stays on the CPU, and no value is read."""
    config = SynthesisConfig(pieces=1.0, lesions=1.0, atrophy=1.0, ventricles=1.0, rims=1.0, spacing=(1.5, 3.0))
    draw, index = ElsewhereDraw(generator(seed)), head().index.to("meta")
    centre = torch.full((3,), 31.5, dtype=torch.float64)
    labels = _diseased(_deformed(index, draw, config, centre, (24, 32, 16), 1.0), draw, config, 1.0)
    visible = _stripped(labels, draw, config, 1.0)
    means, deviations = (part.to("meta") for part in structure_intensities(draw, 0.5))
    image = _acquired(_signal(labels, means, deviations, draw, config, 1.0), visible, draw, config, 1.0)
    assert {part.device.type for part in (labels, visible, image)} == {"meta"}
    assert labels.shape == (24, 32, 16) and labels.dtype == torch.int64


@pytest.mark.cuda
def test_a_gpu_synthesises_the_same_labels_for_the_same_seed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    brains = SyntheticBrains([head()], (32, 40, 24), config=SynthesisConfig(pieces=1.0), in_batches=True)
    draw = brains.example(0, generator(1))
    batch = {name: value[None] for name, value in draw.items()}
    first, again = (brains.finish(batch, torch.device("cuda")) for _ in range(2))
    assert first["image"].is_cuda and torch.equal(first["image"], again["image"])
    assert torch.equal(first["label"], again["label"])


@pytest.mark.parametrize("sigma", [0.4, 1.3, 5.0])
def test_smoothing_is_the_convolution_with_a_gaussian(sigma: float) -> None:
    image = torch.randn(19, 14, 23, generator=generator())
    reach = max(1, round(3 * sigma))
    expected = gaussian_filter(image.double().numpy(), sigma, mode="nearest", radius=reach)
    np.testing.assert_allclose(blur(image, sigma).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(9, 14, 30), (1, 5, 64), (19, 14, 23)])
def test_resampling_is_that_of_torch(size: tuple[int, int, int]) -> None:
    image = torch.randn(19, 14, 23, generator=generator())
    expected = F.interpolate(image[None, None], size, mode="trilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(resized(image, size), expected, atol=1e-5, rtol=0)
    weights = [linear_weights(m, n, corners=True) for m, n in zip(image.shape, size, strict=True)]
    expected = F.interpolate(image[None, None], size, mode="trilinear", align_corners=True)[0, 0]
    torch.testing.assert_close(along_axes(image, weights), expected, atol=1e-5, rtol=0)

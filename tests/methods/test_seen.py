"""What a model has seen: the ranges, their margins, and the phrase for each kind of doubt."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from medseg_diffusion.methods.seen import (
    FEWEST_SCANS,
    MeasuredMask,
    MeasuredScan,
    Seen,
    contrast,
    lengths,
    measured_mask,
    measured_scan,
    sentence,
)

NAMES = {1: "grey", 2: "white"}
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def scan(seed: int, white: float = 1.0, shape: tuple[int, int, int] = (24, 24, 12)) -> MeasuredScan:
    """A scan of noise around -1 with a grey and a white block, and its mask."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.zeros(shape, dtype=torch.uint8)
    labels[4:12, 4:12], labels[12:20, 4:12] = 1, 2
    image = torch.tensor([-1.0, 0.0, white])[labels.long()] + 0.2 * torch.randn(shape, generator=random)
    measured = measured_scan(image[None], shape, AFFINE, "RAS", 3)
    return replace(measured, masks=[measured_mask(labels, image[None], NAMES, 0.002)])


@pytest.fixture(scope="module")
def seen() -> Seen:
    found = Seen.of([scan(seed) for seed in range(15)])
    assert found is not None
    return found


def test_the_entry_of_a_card_holds_all_of_it(seen: Seen) -> None:
    entry = json.loads(json.dumps(seen.entry(), allow_nan=False))
    assert Seen.from_entry(entry) == seen
    assert entry["voxel_mm"] == {"R": [1.0, 1.0], "A": [1.0, 1.0], "S": [2.0, 2.0]}
    assert entry["field_of_view_mm"]["S"] == [24.0, 24.0]
    assert entry["classes"]["white"]["volume_ml"] == [1.536, 1.536]
    assert list(entry["brighter"]) == ["white"], "only the brighter class of a pair"


def test_scans_like_those_of_the_training_raise_no_doubt(seen: Seen) -> None:
    for seed in range(100, 200):
        other = scan(seed, shape=(22, 24, 14))
        assert seen.doubts_of_scan(other) == seen.doubts_of_mask(other.masks[0]) == []


def test_images_without_a_voxel_size_are_compared_by_their_pixels() -> None:
    def picture(width: int) -> MeasuredScan:
        return measured_scan(torch.rand(1, 8, 8, 1), (width, 100, 1), None, None, 2)

    seen = Seen.of([picture(120 + n) for n in range(9)])
    assert seen is not None and Seen.from_entry(seen.entry()) == seen
    assert seen.doubts_of_scan(picture(150)) == []
    (said,) = seen.doubts_of_scan(picture(512))
    assert said == "512 pixels along axis 1 (trained on 120 to 128 pixels)"
    assert not replace(seen, pixels={}).doubts_of_scan(picture(512)), "of a model that takes images of any size"


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"voxel_mm": {"R": 1.0, "A": 1.0, "S": 10.0}}, "voxels of 10 mm along S (trained on 2 mm)"),
        ({"voxel_mm": {"R": 0.2, "A": 1.0, "S": 2.0}}, "voxels of 0.2 mm along R (trained on 1 mm)"),
        ({"field_of_view_mm": {"R": 8.0, "A": 9.0, "S": 24.0}}, "a field of view of 8 mm along R (trained on 24 mm)"),
        ({"field_of_view_mm": {"R": 24.0, "A": 24.0, "S": 240.0}}, "a field of view of 240 mm along S"),
        ({"intensity": [{**scan(0).intensity[0], "q50": 0.9}]}, "other intensities: median 0.90 on the model's scale"),
        (
            {"intensity": [{**scan(0).intensity[0], "lowest": 0.7}]},
            "other intensities: the lowest value in a share of 0.70",
        ),
    ],
)
def test_each_kind_of_doubt_about_a_scan_is_one_phrase(seen: Seen, changes: dict[str, object], phrase: str) -> None:
    (found,) = seen.doubts_of_scan(replace(scan(20), **changes))  # type: ignore[arg-type]
    assert phrase in found


def test_doubts_about_a_mask(seen: Seen) -> None:
    mask = scan(20).masks[0]

    def doubts(**changes: object) -> list[str]:
        return seen.doubts_of_mask(replace(mask, **changes))  # type: ignore[arg-type]

    assert doubts(volume_ml={"grey": 1.536, "white": 100.0}) == ["white of 100 ml (trained on 1.5 ml)"]
    assert doubts(volume_ml={"grey": 0.0, "white": 1.536}) == ["grey of 0 ml (trained on 1.5 ml)"]
    assert doubts(volume_ml={"grey": 0.0, "white": 0.0}) == ["an empty mask (no training scan had one)"]
    weak = {"white": {"grey": 0.6}, "grey": {"white": 0.4}}
    assert "white brighter than grey in only 60 % of pairs of voxels (trained on " in doubts(contrast=weak)[0]
    # An image without a voxel size has no volume, and its share counts.
    assert doubts(volume_ml={}) == []
    (share,) = doubts(volume_ml={}, image_share={"grey": 0.9, "white": mask.image_share["white"]})
    assert share.startswith("grey of 90 % of the image (trained on ")


def test_empty_references_make_an_empty_mask_usual() -> None:
    scans = [replace(scan(i), masks=[MeasuredMask({"a": i / 10}, {"a": i / 100}, {})]) for i in range(10)]
    found = Seen.of([replace(scans[0], masks=[MeasuredMask({"a": 0.0}, {"a": 0.0}, {})]), *scans])
    assert found is not None
    assert found.doubts_of_mask(MeasuredMask({"a": 0.0}, {"a": 0.0}, {})) == []


def test_one_odd_training_scan_does_not_widen_the_range() -> None:
    usual = [replace(scan(0), masks=[MeasuredMask({"a": 1 + i / 400}, {"a": 0.1}, {})]) for i in range(400)]
    odd = replace(scan(0), masks=[MeasuredMask({"a": 500.0}, {"a": 0.1}, {})])
    found = Seen.of([*usual, odd])
    assert found is not None
    assert found.volume_ml["a"][1] < 2.1
    assert found.doubts_of_mask(MeasuredMask({"a": 100.0}, {"a": 0.1}, {}))


def test_few_scans_of_a_spread_kind_leave_others_of_it_unmarked() -> None:
    """Of 15 training scans, the margins must not mark every 16th scan: less than 1 of 50 here."""
    random = np.random.default_rng(0)
    marked = 0
    for _ in range(20):
        volumes = np.exp(random.normal(0, 0.3, 15 + 50))
        masks = [MeasuredMask({"a": float(ml)}, {"a": 0.1}, {}) for ml in volumes]
        found = Seen.of([replace(scan(0), masks=[mask]) for mask in masks[:15]])
        assert found is not None
        marked += sum(bool(found.doubts_of_mask(mask)) for mask in masks[15:])
    assert marked < 20


def test_contrast_depends_on_no_unit() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (20, 20, 20), generator=random)
    image = labels + torch.randn(labels.shape, generator=random)
    share = contrast(labels, image, NAMES)["white"]["grey"]
    assert share == pytest.approx(0.76, abs=0.03)  # P(N(1, 2) > 0)
    assert contrast(labels, 1000 * image.exp() + 7, NAMES)["white"]["grey"] == share
    assert contrast(labels, -image, NAMES)["white"]["grey"] == pytest.approx(1 - share)
    assert contrast(labels, torch.zeros(labels.shape), NAMES)["white"]["grey"] == 0.5


def test_lengths_follow_the_axes_of_the_model() -> None:
    turned = np.zeros((4, 4))
    turned[2, 0], turned[0, 1], turned[1, 2], turned[3, 3] = -5.0, 1.0, 2.0, 1.0  # head-foot, left-right, front-back
    assert lengths((10, 20, 30), turned, "RAS", 3) == (
        {"R": 1.0, "A": 2.0, "S": 5.0},
        {"R": 20.0, "A": 60.0, "S": 50.0},
    )
    assert lengths((10, 20, 30), turned, "RAS", 2)[0] == {"R": 1.0, "A": 2.0}, "slices lie at any distance"
    assert lengths((10, 20, 1), turned, None, 3)[0] == {"axis 1": 5.0, "axis 2": 1.0}, "a single slice has no distance"


def test_too_few_scans_tell_no_range() -> None:
    assert Seen.of([scan(seed) for seed in range(FEWEST_SCANS - 1)]) is None
    assert sentence([]) == ""

"""Images to ensembles of probabilities: whole, in windows, slice by slice; and ensembles to one answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medseg_diffusion.methods.ensemble import class_volumes_ml, entropy, fuse, largest_part
from medseg_diffusion.methods.segment import Windows, segment
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import Sampler


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WHOLE = Windows()


class Pointwise:
    """Three classes from the intensity of a voxel alone; members are the same unless ``seeded``."""

    def __init__(self, seeded: bool = False) -> None:
        self.seeded = seeded
        self.batches: list[int] = []
        self.seen: dict[tuple[int, ...], Tensor] = {}

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        assert len(seeds) == len(image)
        self.batches.append(len(image))
        answers = []
        for one, own in zip(image, seeds, strict=True):
            self.seen[tuple(own)] = one
            members = []
            for seed in own:
                shift = (seed % 1000) / 500 if self.seeded else 0.0
                members.append(torch.stack([one.sum(0), -one[0] + shift, 0 * one[0]]).softmax(0))
            answers.append(torch.stack(members))
        return torch.stack(answers)


def run(model: Pointwise, image: Tensor, seeds: Sequence[int], windows: Windows = WHOLE, dims: int = 3) -> Tensor:
    return segment(model, image, seeds, DDIM(), [10, 0], windows, dims)


def by_hand(image: Tensor) -> Tensor:
    return torch.stack([image.sum(0), -image[0], 0 * image[0]]).softmax(0)


# ---- 3D --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("size", [None, (6, 6, 6), (4, 7, 5), (11, 9, 10), (20, 3, 20)], ids=str)
def test_windows_of_a_pointwise_model_are_the_whole_image(size, overlap, batch_size, channels) -> None:
    """What every window says alike must survive cutting, weighting and putting together, at the border too."""
    image = normal(0, channels, 11, 9, 10)
    found = run(Pointwise(), image, [1, 2], Windows(size, overlap, batch_size))
    assert found.shape == (2, 3, 11, 9, 10)
    torch.testing.assert_close(found, by_hand(image).expand(2, -1, -1, -1, -1), rtol=0, atol=1e-5)


def test_windows_are_no_larger_than_asked_for_and_cover_everything() -> None:
    model, image = Pointwise(seeded=True), torch.arange(11 * 9 * 10.0).reshape(1, 11, 9, 10)
    run(model, image, [1], Windows((6, 5, 20), 0.25))
    assert {tuple(window.shape[1:]) for window in model.seen.values()} == {(6, 5, 10)}
    covered = torch.cat([window.flatten() for window in model.seen.values()]).unique()
    assert len(covered) == image.numel()


@pytest.mark.parametrize("size", [None, (6, 6, 6)], ids=["whole", "windows"])
def test_members_differ_by_their_seed_and_do_not_depend_on_the_batch(size) -> None:
    image = normal(1, 1, 11, 9, 10)
    results, seen = [], []
    for batch_size in (1, 2, 5):
        model = Pointwise(seeded=True)
        results.append(run(model, image, [1, 2], Windows(size, 0.25, batch_size)))
        seen.append(model.seen)
        assert max(model.batches) == (1 if size is None else batch_size)
    for result, windows in zip(results[1:], seen[1:], strict=True):
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)
        assert set(windows) == set(seen[0])
        for own in windows:
            torch.testing.assert_close(windows[own], seen[0][own], rtol=0, atol=0)
    assert not torch.allclose(results[0][0], results[0][1])
    alone = run(Pointwise(seeded=True), image, [2], Windows(size, 0.25, 1))
    torch.testing.assert_close(alone[0], results[0][1], rtol=0, atol=1e-6)


def test_every_window_has_its_own_noise() -> None:
    model = Pointwise(seeded=True)
    run(model, normal(2, 1, 11, 9, 10), [1, 2], Windows((6, 6, 6), 0.25))
    own = [seed for pair in model.seen for seed in pair]
    assert len(model.seen) == 12 and len(set(own)) == 24  # starts 0, 4, 5 along the first axis, two along the others


def test_progress_is_told_after_every_batch() -> None:
    calls: list[int] = []
    model, image = Pointwise(), normal(3, 1, 11, 9, 10)
    segment(model, image, [1], DDIM(), [10, 0], Windows((6, 6, 6), 0.25, 3), 3, lambda: calls.append(len(calls)))
    assert len(calls) == len(model.batches) == 4


# ---- 2D --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
@pytest.mark.parametrize("size", [None, (6, 6), (30, 30)], ids=str)
def test_slices_across_the_third_axis_are_put_together(size, batch_size) -> None:
    image = normal(4, 2, 11, 9, 5)
    model = Pointwise()
    found = run(model, image, [1, 2], Windows(size, 0.25, batch_size), dims=2)
    assert found.shape == (2, 3, 11, 9, 5)
    torch.testing.assert_close(found, by_hand(image).expand(2, -1, -1, -1, -1), rtol=0, atol=1e-5)
    windows = 5 if size != (6, 6) else 5 * 3 * 2
    assert sum(model.batches) == windows and max(model.batches) == min(batch_size, windows)


@pytest.mark.parametrize("size", [None, (6, 6)], ids=["whole", "windows"])
def test_the_noise_of_a_slice_depends_on_its_place_alone(size) -> None:
    image = normal(5, 1, 11, 9, 5)
    results = []
    for batch_size in (1, 3, 7):
        model = Pointwise(seeded=True)
        results.append(run(model, image, [8, 9], Windows(size, 0.25, batch_size), dims=2))
        own = [seed for pair in model.seen for seed in pair]
        assert len(set(own)) == len(own) == 2 * sum(model.batches), "no two slices or windows share their noise"
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


# ---- ensembles -------------------------------------------------------------------------------------------------------


def member(labels: Tensor, num_classes: int = 2, certainty: float = 0.9) -> Tensor:
    one_hot = F.one_hot(labels, num_classes).movedim(-1, 0).float()
    return certainty * one_hot + (1 - certainty) / (num_classes - 1) * (1 - one_hot)


def truth(num_classes: int = 2, shape: tuple[int, ...] = (12, 12)) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(6))


def flipped(labels: Tensor, share: float, seed: int) -> Tensor:
    wrong = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(wrong, 1 - labels, labels)


@pytest.mark.parametrize("how", ["mean", "majority", "staple"])
@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("shape", [(12, 12), (6, 7, 5)], ids=["2D", "3D"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_identical_members_are_returned(how, num_classes, shape, count) -> None:
    labels = truth(num_classes, shape)
    fused = fuse(torch.stack([member(labels, num_classes)] * count), how)
    assert fused.shape == (num_classes, *shape)
    assert torch.equal(fused.argmax(0), labels)
    torch.testing.assert_close(fused.sum(0), torch.ones(shape))


def test_the_mean_and_the_majority_by_hand() -> None:
    """Two members slightly for class 1, one strongly for class 0: the majority and the mean disagree."""
    p = torch.tensor([0.45, 0.45, 0.95])
    members = torch.stack([p, 1 - p], dim=1)[..., None]
    torch.testing.assert_close(fuse(members, "mean")[:, 0], torch.tensor([1.85, 1.15]) / 3)
    torch.testing.assert_close(fuse(members, "majority")[:, 0], torch.tensor([1.0, 2.0]) / 3)


@pytest.mark.parametrize("how", ["majority", "staple"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_one_adversarial_rater_is_outvoted(how, num_classes) -> None:
    labels = truth(num_classes)
    adversary = member((labels + 1) % num_classes, num_classes, certainty=0.99)
    fused = fuse(torch.stack([member(labels, num_classes), adversary, *[member(labels, num_classes)] * 2]), how)
    assert torch.equal(fused.argmax(0), labels)


def test_staple_trusts_the_better_raters_where_the_majority_does_not() -> None:
    """Two raters at 2 % errors against three at 40 %: weighing them by performance must pay."""
    labels = truth(2, (32, 32))
    shares = [0.02, 0.02, 0.4, 0.4, 0.4]
    members = torch.stack([member(flipped(labels, share, seed)) for seed, share in enumerate(shares)])
    wrong = {how: float((fuse(members, how).argmax(0) != labels).float().mean()) for how in ("majority", "staple")}
    assert wrong["staple"] < 0.03
    assert wrong["staple"] < 0.5 * wrong["majority"]


@pytest.mark.parametrize("how", ["mean", "majority", "staple"])
def test_members_without_any_foreground_give_none(how) -> None:
    fused = fuse(torch.stack([member(torch.zeros(6, 6, dtype=torch.int64))] * 3), how)
    assert int(fused.argmax(0).sum()) == 0 and bool(fused.isfinite().all())


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    how=st.sampled_from(["mean", "majority", "staple"]),
    num_classes=st.integers(2, 5),
    count=st.integers(1, 5),
)
def test_any_fusion_is_a_distribution(seed, how, num_classes, count) -> None:
    members = normal(seed, count, num_classes, 5, 4).softmax(1)
    fused = fuse(members, how)
    assert bool((fused >= 0).all())
    torch.testing.assert_close(fused.sum(0), torch.ones(5, 4))


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_entropy_is_zero_for_certainty_and_one_for_ignorance(num_classes) -> None:
    certain = member(truth(num_classes), num_classes, certainty=1.0)
    torch.testing.assert_close(entropy(certain), torch.zeros(12, 12), rtol=0, atol=0)
    torch.testing.assert_close(entropy(torch.full((num_classes, 4), 1 / num_classes)), torch.ones(4))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), num_classes=st.integers(2, 6), spread=st.floats(0, 20, allow_subnormal=False))
def test_entropy_lies_between_zero_and_one(seed, num_classes, spread) -> None:
    p = (spread * normal(seed, num_classes, 6, 5)).softmax(0)
    h = entropy(p)
    assert h.shape == (6, 5)
    assert float(h.min()) >= -1e-6 and float(h.max()) <= 1 + 1e-5
    assert float(entropy(torch.tensor([[0.9], [0.1]]))) == pytest.approx(0.469, abs=1e-3)


def test_volumes_are_counted_in_millilitres() -> None:
    labels = torch.zeros(10, 10, 10, dtype=torch.int64)
    labels[:5] = 2
    found = class_volumes_ml(torch.stack([member(labels, 3), member(0 * labels, 3)]), voxel_mm3=2.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 1.0], [2.0, 0.0, 0.0]], dtype=torch.float64))
    assert math.isclose(float(found.sum()), 4.0)


def test_the_largest_part_is_found_by_faces_and_over_all_classes() -> None:
    labels = torch.zeros(6, 6, 6, dtype=torch.uint8)
    labels[0:2, 0:2, 0:2] = 1
    labels[2, 0:2, 0:2] = 2  # touches the block above: one part of two classes
    labels[4:6, 4:6, 4:6] = 3
    labels[3, 2, 2] = 1  # touches by an edge only
    keep = largest_part(labels)
    assert keep.dtype == torch.bool and int(keep.sum()) == 12
    assert bool(keep[:3, :2, :2].all())
    assert not bool(largest_part(torch.zeros(3, 3, 3, dtype=torch.uint8)).any())

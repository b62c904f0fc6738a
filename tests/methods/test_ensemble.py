"""Ensembles: fusion, uncertainty, agreement and volumes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medseg_diffusion.methods.ensemble import Ensemble, entropy, largest_part, most_probable, temperature_scaled
from tests.helpers.ensembles import member, normal


def test_members_that_agree_have_no_disagreement() -> None:
    member = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    same = Ensemble.of(member.expand(4, -1, -1, -1))
    assert float(same.uncertainty("mutual-information").max()) < 1e-6 and same.members().disagreement < 1e-6
    torn = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, :, None, None].expand(2, 2, 8, 8).clone()
    assert Ensemble.of(torn).members().disagreement == pytest.approx(1)  # log 2 / log 2
    torn[:, :, 2:] = torch.tensor([1.0, 0.0])[:, None, None]
    assert Ensemble.of(torn).members().disagreement == pytest.approx(
        1
    )  # 16 of 64 positions: more than the tenth that counts
    torn[:, :, :, 1:] = torch.tensor([1.0, 0.0])[:, None, None]
    assert Ensemble.of(torn).members().disagreement == pytest.approx(2 / 6)  # 2 of the 6 that count


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
    fused = Ensemble.of(torch.stack([member(labels, num_classes)] * count)).fuse(how)
    assert fused.shape == (num_classes, *shape)
    assert torch.equal(fused.argmax(0), labels)
    torch.testing.assert_close(fused.sum(0), torch.ones(shape))


def test_the_mean_and_the_majority_by_hand() -> None:
    """Two members slightly for class 1, one strongly for class 0: the majority and the mean disagree."""
    p = torch.tensor([0.45, 0.45, 0.95])
    members = torch.stack([p, 1 - p], dim=1)[..., None]
    torch.testing.assert_close(Ensemble.of(members).fuse("mean")[:, 0], torch.tensor([1.85, 1.15]) / 3)
    torch.testing.assert_close(Ensemble.of(members).fuse("majority")[:, 0], torch.tensor([1.0, 2.0]) / 3)


@pytest.mark.parametrize("how", ["majority", "staple"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_one_adversarial_rater_is_outvoted(how, num_classes) -> None:
    labels = truth(num_classes)
    adversary = member((labels + 1) % num_classes, num_classes, certainty=0.99)
    fused = Ensemble.of(torch.stack([member(labels, num_classes), adversary, *[member(labels, num_classes)] * 2])).fuse(
        how
    )
    assert torch.equal(fused.argmax(0), labels)


def test_staple_trusts_the_better_raters_where_the_majority_does_not() -> None:
    """Two raters at 2 % errors against three at 40 %: weighing them by performance must pay."""
    labels = truth(2, (32, 32))
    shares = [0.02, 0.02, 0.4, 0.4, 0.4]
    raters = [member(flipped(labels, share, seed)) for seed, share in enumerate(shares)]
    ensemble = Ensemble.of(torch.stack(raters))
    wrong = {how: float((ensemble.fuse(how).argmax(0) != labels).float().mean()) for how in ("majority", "staple")}
    assert wrong["staple"] < 0.03
    assert wrong["staple"] < 0.5 * wrong["majority"]


@pytest.mark.parametrize("how", ["mean", "majority", "staple"])
def test_members_without_any_foreground_give_none(how) -> None:
    fused = Ensemble.of(torch.stack([member(torch.zeros(6, 6, dtype=torch.int64))] * 3)).fuse(how)
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
    fused = Ensemble.of(members).fuse(how)
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
    found = Ensemble.of(torch.stack([member(labels, 3), member(0 * labels, 3)])).members().volumes_ml(voxel_mm3=2.0)
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


# ---- members one by one ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), cut=st.integers(1, 6), num_classes=st.integers(2, 4))
def test_adding_members_in_parts_equals_all_at_once(seed, cut, num_classes) -> None:
    members = (3 * normal(seed, 7, num_classes, 5, 4)).softmax(1)
    whole = Ensemble.of(members)
    parts = Ensemble.of(members[:cut]).add(members[cut:])
    assert len(parts) == len(whole) == 7
    for name in ("mean", "squares", "member_entropy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
    assert torch.equal(parts.labels, whole.labels) and torch.equal(whole.labels.long(), members.argmax(1))
    torch.testing.assert_close(whole.squares / 7, members[:, 0].var(0, unbiased=False), rtol=1e-4, atol=1e-6)


def test_only_disagreement_is_mutual_information() -> None:
    """Members that share their doubt have entropy but no mutual information; certain ones that differ have both."""
    doubt = Ensemble.of(torch.full((4, 2, 3), 0.5))
    torch.testing.assert_close(doubt.uncertainty("entropy"), torch.ones(3))
    torch.testing.assert_close(doubt.uncertainty("mutual-information"), torch.zeros(3))
    torch.testing.assert_close(doubt.uncertainty("variance"), torch.zeros(3))
    labels = torch.tensor([[0, 1, 1], [1, 1, 0]])
    dispute = Ensemble.of(torch.stack([member(one, certainty=1.0) for one in labels]))
    torch.testing.assert_close(dispute.uncertainty("entropy"), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(dispute.uncertainty("mutual-information"), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(dispute.uncertainty("variance"), torch.tensor([0.25, 0.0, 0.25]))


def test_pairwise_dice_by_hand() -> None:
    labels = torch.tensor([[1, 1, 0, 2], [1, 0, 0, 2], [1, 1, 0, 0]])
    found = Ensemble.of(torch.stack([member(one, 4) for one in labels])).members().pairwise_dice()
    # Class 1: 2/3, 1, 2/3; class 2: 1, 0, 0; class 3: nowhere.
    torch.testing.assert_close(found[:2], torch.tensor([7 / 9, 1 / 3], dtype=torch.float64))
    assert math.isnan(float(found[2]))
    assert bool(Ensemble.of(member(labels[0], 4)[None]).members().pairwise_dice().isnan().all())


def test_outside_a_mask_there_is_certain_background() -> None:
    members = normal(0, 3, 3, 4, 4).softmax(1)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3] = True
    found, before = Ensemble.of(members).within(mask), Ensemble.of(members)
    assert torch.equal(found.mean[:, mask], before.mean[:, mask])
    assert torch.equal(found.mean[:, ~mask], torch.tensor([[1.0], [0], [0]]).expand(-1, 8))
    assert not found.labels[:, ~mask].any() and torch.equal(found.labels[:, mask], before.labels[:, mask])
    assert not found.uncertainty("mutual-information")[~mask].any()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), temperature=st.floats(0.2, 5), num_classes=st.integers(2, 5))
def test_a_temperature_changes_certainty_but_no_label(seed, temperature, num_classes) -> None:
    p = (2 * normal(seed, num_classes, 50)).softmax(0)
    found = temperature_scaled(p, temperature)
    torch.testing.assert_close(found.sum(0), torch.ones(50))
    assert torch.equal(found.argmax(0), p.argmax(0))
    softer = entropy(found) - entropy(p)
    assert bool((softer >= -1e-5).all()) if temperature >= 1 else bool((softer <= 1e-5).all())
    if temperature > 0.5:
        torch.testing.assert_close(temperature_scaled(found, 1 / temperature), p, rtol=1e-2, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), num_classes=st.integers(1, 5), order=st.permutations(range(1, 4)))
def test_the_most_probable_class_is_the_argmax_in_any_layout(seed, num_classes, order) -> None:
    scores = normal(seed, num_classes, 3, 4, 5).mul(2).round()  # many are equal
    turned = scores.permute(0, *order)[:, :, 1:]
    found = most_probable(turned)
    assert found.dtype == torch.uint8 and torch.equal(found.long(), turned.argmax(0))

"""Images to ensembles of probabilities: whole, in windows, slice by slice; and ensembles to one answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from medseg_diffusion import device
from medseg_diffusion.methods.segment import segment
from medseg_diffusion.methods.windows import WHOLE, Windows, count_batches
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import Sampler


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pointwise:
    """Three classes from the intensity of a voxel alone; members are the same unless ``seeded``."""

    def __init__(self, seeded: bool = False) -> None:
        self.seeded = seeded
        self.batches: list[int] = []
        self.seen: dict[tuple[int, ...], Tensor] = {}
        self.seeds: list[tuple[int, ...]] = []

    def probabilities(
        self, image: Tensor, seeds: Sequence[Sequence[int]], sampler: Sampler, times: Sequence[int]
    ) -> Tensor:
        assert len(seeds) == len(image)
        self.batches.append(len(image))
        answers = []
        for one, own in zip(image, seeds, strict=True):
            self.seen[tuple(own)] = one
            self.seeds.append(tuple(own))
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


@pytest.mark.parametrize(("size", "places"), [(None, 1), ((6, 6), 6)], ids=["whole", "windows"])
def test_all_slices_of_a_member_have_the_noise_of_a_place_within_them(size, places) -> None:
    image = normal(5, 1, 11, 9, 5)
    results = []
    for batch_size in (1, 3, 7):
        model = Pointwise(seeded=True)
        results.append(run(model, image, [8, 9], Windows(size, 0.25, batch_size), dims=2))
        found = Counter(seed for pair in model.seeds for seed in pair)
        assert len(found) == 2 * places and set(found.values()) == {5}
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("members", "batches"), [(1, [4, 1]), (2, [2, 2, 1]), (9, [1] * 5)])
def test_slices_share_a_batch_as_far_as_memory_goes(members, batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.POSITIONS_AT_ONCE, "cpu", 4 * 11 * 9)
    model, image, windows = Pointwise(seeded=True), normal(6, 1, 11, 9, 5), Windows()
    seeds = list(range(members))
    found = run(model, image, seeds, windows, dims=2)
    assert model.batches == batches
    assert count_batches(image.shape, windows, 2, members, image.device) == len(batches)
    alone = run(Pointwise(seeded=True), image, seeds, Windows(batch_size=1), dims=2)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)

"""Replacing x_t: a network that uses it notices, one that does not gives the same masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion.methods.ablation import without_x_t


class Recorder(nn.Module):
    """Returns its input, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return x + t


def seen(replacement: str, labels: bool = False) -> list[Tensor]:
    """What a network sees in two calls with a batch of three."""
    network = Recorder()
    with without_x_t(network, replacement, labels):  # type: ignore[arg-type]
        for value in (5.0, 6.0):
            network(torch.full((3, 2, 64, 64), value), torch.zeros(()))
    network(torch.full((1, 2, 4, 4), 7.0), torch.zeros(()))
    assert (network.seen.pop() == 7).all(), "nothing is replaced afterwards"
    return network.seen


def test_fresh_noise_differs_between_members_and_steps() -> None:
    first, second = seen("fresh")
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    assert abs(float(first.mean())) < 0.03 and abs(float(first.std()) - 1) < 0.03


def test_shared_noise_is_one_draw() -> None:
    first, second = seen("shared")
    assert torch.equal(first[0], first[1]) and torch.equal(first, second)
    assert abs(float(first[0].std()) - 1) < 0.06


def test_zeros_are_zeros() -> None:
    assert all((x == 0).all() for x in seen("zeros"))


def test_labels_are_replaced_by_random_classes() -> None:
    first, _ = seen("fresh", labels=True)
    assert set(first.unique().tolist()) == {-1.0, 1.0} and (first.sum(1) == 0).all()  # one of two classes
    assert abs(float((first[:, 0] > 0).float().mean()) - 0.5) < 0.02


def test_an_error_inside_restores_the_network() -> None:
    network = Recorder()
    with pytest.raises(RuntimeError, match="inside"), without_x_t(network, "zeros"):
        raise RuntimeError("inside")
    assert (network(torch.ones(1, 1, 2, 2), torch.zeros(())) == 1).all()

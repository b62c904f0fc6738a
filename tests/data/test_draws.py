"""Draws of examples: every epoch a permutation, every draw reproducible."""

from __future__ import annotations

import torch

from medseg_diffusion.data.draws import Draws
from tests.helpers.training import Points, assert_same


def test_every_epoch_of_draws_is_a_permutation() -> None:
    draws = Draws(Points(), seed=0)
    epochs = [[int(draws[5 * epoch + i]["index"]) for i in range(5)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "epochs are shuffled anew"


def test_a_draw_depends_on_its_number_and_the_seed_alone() -> None:
    draws, again = Draws(Points(), seed=0), Draws(Points(), seed=0)
    torch.manual_seed(5)
    first = {n: draws[n] for n in (0, 7, 23)}
    torch.manual_seed(6)
    for n in (23, 0, 7):
        assert_same(first[n], again[n])
    same_index = [n for n in range(25) if int(draws[n]["index"]) == int(draws[0]["index"])]
    assert len(same_index) == 5
    assert len({int(draws[n]["seed"]) for n in range(25)}) == 25, "every draw has its own seed for times and noise"
    assert len({float(draws[n]["x"][0]) for n in same_index}) == 5, "augmentation differs between epochs"
    other = Draws(Points(), seed=1)
    assert [int(other[n]["seed"]) for n in range(5)] != [int(draws[n]["seed"]) for n in range(5)]

"""A collapse of the validations is said once for each kind, and never of a healthy training that has only begun."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch

from medseg_diffusion.training.health import EMPTY, EQUAL, PATIENCE, Predictions, ValidationHealth


def said(validations: Sequence[dict[str, float]], max_steps: int = 10_000, every: int = 500) -> list[tuple[int, str]]:
    """Step and text of each warning in a sequence of validations."""
    health, best, lines = ValidationHealth(max_steps), {}, []
    for number, numbers in enumerate(validations, start=1):
        if numbers["score"] > best.get("score", float("-inf")):
            best = {**numbers, "step": float(number * every)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            health.check(number * every, numbers, best)
        lines += [(number * every, str(one.message)) for one in caught]
    return lines


GOOD = {EMPTY: 0.0, EQUAL: 0.0}


def test_a_healthy_training_is_left_alone() -> None:
    """Empty in the first quarter, then with a score that goes up and down."""
    first = [{"score": 0.0, EMPTY: 1.0, EQUAL: 1.0}] * 5
    rest = [{"score": score, **GOOD} for score in (0.3, 0.5, 0.3, 0.31, 0.6, 0.7, 0.5, 0.8, 0.79, 0.82, 0.8, 0.81)]
    assert said([*first, *rest]) == []


def test_a_loss_below_zero_falls_by_its_size() -> None:
    """The score of a generator is minus its loss."""
    assert said([{"score": -0.05 - 0.0005 * i} for i in range(20)]) == []
    (line,) = said([{"score": -0.05}] * 10 + [{"score": -0.07}] * 10)
    assert line[0] == 500 * (10 + PATIENCE) and "score was more than 25% below its best" in line[1]
    assert "score -0.07, best -0.05 at step 500" in line[1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"score": 0.0, EMPTY: 1.0, EQUAL: 1.0}, "all predictions were empty"),
        ({"score": 0.5, EMPTY: 0.0, EQUAL: 1.0}, "all predictions were equal, whatever the input"),
    ],
)
def test_what_has_collapsed_is_said_once(bad: dict[str, float], message: str) -> None:
    lines = said([{"score": 0.5, **GOOD}] * 8 + [bad] * 12)
    assert [step for step, text in lines if message in text] == [500 * (8 + PATIENCE)]
    assert all("\n" not in text and "training.learning_rate" in text for _, text in lines)
    assert sum("equal" in text for _, text in lines) <= 1, "empty predictions are equal, too, which is not said"


def test_a_training_that_never_began_to_predict_is_told_after_its_first_quarter() -> None:
    lines = said([{"score": 0.0, EMPTY: 1.0, EQUAL: 1.0}] * 20)
    assert [step for step, _ in lines] == [3000]  # the first validation after step 2500
    assert (
        said([{"score": 0.0, EMPTY: 1.0}] * 2 + [{"score": 0.1, EMPTY: 0.9}] + [{"score": 0.0, EMPTY: 1.0}] * 2) == []
    )


def test_the_numbers_of_predictions() -> None:
    predictions = Predictions()
    assert predictions.numbers() == {}
    full, empty = torch.ones(2, 3), torch.zeros(2, 3)
    predictions.add(full, expected=True)
    assert predictions.numbers() == {EMPTY: 0.0}, "one alone has no equals"
    predictions.add(empty, expected=True)
    predictions.add(empty, expected=False)
    predictions.add(torch.ones(3, 3), expected=True)
    predictions.add(full.clone(), expected=True)
    assert predictions.numbers() == {EMPTY: 0.25, EQUAL: 0.25}
    images = Predictions()
    for _ in range(3):
        images.add(torch.full((1, 4, 4), -1.0))
    assert images.numbers() == {EQUAL: 1.0}

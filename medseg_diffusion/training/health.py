"""Whether a training goes well: losses that are not finite, and validations that collapse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from medseg_diffusion.errors import MedsegError

SKIPPED_IN_A_ROW = 20
"""So many steps in a row without a finite loss and gradient end a training."""

EMPTY, EQUAL = "empty_predictions", "equal_predictions"
"""Numbers of a validation that tell a collapse, shares in [0, 1]: of the predictions without foreground where the
reference has some, and of those that equal the first one, of another input (`Predictions`)."""

FALL = 0.25
"""A score has fallen if it is worse than the best by this share of the best's size."""

PATIENCE = 3
"""Number of validations in a row that must show a collapse."""


@dataclass(frozen=True)
class StepNumbers:
    """Loss of a step, and the gradient norm of each part of the model before clipping."""

    step: int
    loss: float
    norms: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Of the whole gradient."""
        return math.hypot(*self.norms)

    @property
    def finite(self) -> bool:
        """Whether the step was taken: with a number that is not finite, the device skips it."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def __str__(self) -> str:
        norms = ", ".join(f"{norm:.4g}" for norm in self.norms)
        return f"loss {self.loss:.4g}, gradient norm {norms}"


class StepHealth:
    """Counts the steps that were skipped, says the first one of a call, and ends a training without any other.

    Args:
        precision: of the computation, for the diagnosis.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.said = False

    def check(self, numbers: StepNumbers, skipped_in_a_row: int, rate: float) -> None:
        """Looks at a skipped step, the last of ``skipped_in_a_row``, which had the learning rate ``rate``.

        Raises:
            MedsegError: `SKIPPED_IN_A_ROW` steps were skipped in a row.
        """
        where = f"{numbers}, learning rate {rate:.3g}, {self.precision}"
        if skipped_in_a_row >= SKIPPED_IN_A_ROW:
            remedy = "lower training.learning_rate"
            if self.precision != "fp32":
                remedy += ", or use --set training.precision=fp32"
            raise MedsegError(
                f"the loss or its gradient is not finite since step {numbers.step - skipped_in_a_row + 1}: the last "
                f"{skipped_in_a_row} steps were skipped ({where}); {remedy}. The last model and resume file are good"
            )
        if not self.said:
            warnings.warn(
                f"the loss or its gradient is not finite at step {numbers.step}, which is skipped ({where})",
                stacklevel=2,
            )
            self.said = True


class ValidationHealth:
    """Says in one line that the validations of a training have collapsed, once for each kind of collapse.

    The first validations of healthy trainings are often empty, and their scores go up and down. It therefore speaks
    only after the first quarter of the steps, and only of what `PATIENCE` validations in a row have shown:

    * every prediction is empty although its reference is not (`EMPTY` is 1);
    * all predictions are equal although the inputs differ (`EQUAL` is 1);
    * the score is worse than the best by more than `FALL` of the best's size.

    Args:
        max_steps: steps of the whole training.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.in_a_row: dict[str, int] = {}
        self.said: set[str] = set()

    def check(self, step: int, numbers: Mapping[str, float], best: Mapping[str, float]) -> None:
        """Looks at the numbers of the validation of a step; ``best`` are those of the best one, this one included."""
        score, highest = numbers["score"], best.get("score", -math.inf)
        is_empty = numbers.get(EMPTY, 0.0) >= 1
        shown = {
            "all predictions were empty": is_empty,
            "all predictions were equal, whatever the input": not is_empty and numbers.get(EQUAL, 0.0) >= 1,
            f"the score was more than {FALL:.0%} below its best": not score >= highest - FALL * abs(highest),
        }
        for kind, is_so in shown.items():
            self.in_a_row[kind] = self.in_a_row.get(kind, 0) + 1 if is_so else 0
            if self.in_a_row[kind] >= PATIENCE and 4 * step > self.max_steps and kind not in self.said:
                self.said.add(kind)
                was = f", best {highest:.4g} at step {best['step']:.0f}" if best else ""
                warnings.warn(
                    f"{kind} in the last {PATIENCE} validations (step {step}, score {score:.4g}{was}): "
                    "the training has probably collapsed; start again with a lower training.learning_rate",
                    stacklevel=2,
                )


class Predictions:
    """Counts what tells a collapse, over the predictions of one validation, one for each input."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.count = self.equal = self.filled = self.empty = 0

    def add(self, prediction: Tensor, expected: bool = False) -> None:
        """Takes a label map or an image; ``expected`` says that it should have a foreground, labels above 0."""
        self.count += 1
        if self.first is None:
            self.first = prediction
        self.equal += self.first.shape == prediction.shape and bool((self.first == prediction).all())
        self.filled += expected
        self.empty += expected and not bool((prediction > 0).any())

    def numbers(self) -> dict[str, float]:
        """`EMPTY`, if any prediction should have a foreground, and `EQUAL`, if there are several."""
        numbers = {}
        if self.filled:
            numbers[EMPTY] = self.empty / self.filled
        if self.count > 1:
            numbers[EQUAL] = (self.equal - 1) / (self.count - 1)
        return numbers

"""Whether a training goes well: losses that are not finite, and validations that collapse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from medseg_diffusion.errors import MedsegError

SKIPPED_IN_A_ROW = 20
"""So many steps in a row without a finite loss and gradient end a training."""

EMPTY, EQUAL = "empty_samples", "equal_samples"
"""Numbers of a validation that tell a collapse, each a share in [0, 1]: of the samples that are empty although their
references are not, and of those that are equal to the first one although the inputs differ."""

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

    * every sample is empty although its reference is not (`EMPTY` is 1);
    * all samples are equal (`EQUAL` is 1);
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
            "all samples are empty": is_empty,
            "all samples are equal, whatever their inputs": not is_empty and numbers.get(EQUAL, 0.0) >= 1,
            "the score has fallen": not score >= highest - FALL * abs(highest),
        }
        for kind, is_so in shown.items():
            self.in_a_row[kind] = self.in_a_row.get(kind, 0) + 1 if is_so else 0
            if self.in_a_row[kind] >= PATIENCE and 4 * step > self.max_steps and kind not in self.said:
                self.said.add(kind)
                was = f", best {highest:.4g} at step {best['step']:.0f}" if best else ""
                warnings.warn(
                    f"{kind} at the last {PATIENCE} validations (step {step}, score {score:.4g}{was}); "
                    "a lower training.learning_rate may help, or look at RUN with `medseg report`",
                    stacklevel=2,
                )


def share_of_equal(samples: Sequence[Tensor]) -> dict[str, float]:
    """`EQUAL` of samples of different inputs; empty for fewer than two."""
    if len(samples) < 2:
        return {}
    first, *others = samples
    equal = [first.shape == other.shape and bool((first == other).all()) for other in others]
    return {EQUAL: (1 + sum(equal)) / len(samples) if any(equal) else 0.0}

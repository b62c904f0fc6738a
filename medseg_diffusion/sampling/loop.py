"""Sampling: a denoiser and an update rule applied along a list of times.

A sampler is an update rule ``step(schedule, prediction, x_t, t, s, noise) -> x_s`` from any time t to any other time s.
The visited times are a plain list, so that a number of steps never changes the schedule that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from medseg_diffusion.diffusion.denoiser import Condition, Denoiser
from medseg_diffusion.diffusion.noise import NoiseSource, gaussian
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import NoiseSchedule
from medseg_diffusion.errors import remark

Spacing = Literal["log-snr", "trailing", "leading", "linspace"]
LOWEST_HALF_LOG_SNR = -5.1
"""log(alpha / sigma) at the end of the linear schedule of 1000 steps; everything below is pure noise."""
Noise = Callable[[], Tensor]
"""Draws new standard normal noise of the shape of x_t; deterministic steps do not call it."""
Predict = Callable[[Tensor, int], Prediction]
"""The denoiser with its condition, at a tensor and a time 1..T: for steps that need a further prediction."""


class Step(Protocol):
    """One update from time ``t`` to time ``s``; s = 0 is the clean tensor."""

    def __call__(
        self, schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: int, s: int, noise: Noise
    ) -> Tensor: ...


class Sampler(Protocol):
    """Makes the `Step` of one trajectory. Multistep methods keep their history in the step, which ends with it."""

    def begin(self, predict: Predict) -> Step: ...


def spaced(
    schedule: NoiseSchedule, count: int, how: Spacing = "log-snr", start: int | None = None, stop: int = 1
) -> list[int]:
    """The times of a trajectory of ``count`` steps from ``start`` (default T) to 0: count + 1 times, the last 0.

    Times that coincide after rounding are removed, with a warning that gives the remaining number of steps.

    Args:
        schedule: the model's noise schedule.
        count: number of steps, at least 1; if there are not more times, every time is visited.
        how: "log-snr" is uniform in log(alpha / sigma) between ``start`` and ``stop``, the default of DPM-Solver (Lu et
            al. 2022, arXiv 2206.00927, sec. 3.4). Values below -5.1 count as -5.1 there: otherwise the clipped last
            betas of the cosine schedule would take half of the steps, all in pure noise. "trailing" is start,
            start - start/N, ...; "leading" is the multiples of start // N plus 1; "linspace" is even from the start to
            1, both included (guided diffusion). With a later ``stop`` they divide start..stop in the same way.
        start: first time, 1..T.
        stop: no time below it is visited before 0, 1..start.

    Raises:
        ValueError: ``count``, ``start`` or ``stop`` is out of range.
    """
    last = schedule.num_steps if start is None else start
    if not 1 <= last <= schedule.num_steps:
        raise ValueError(f"the start must lie in 1..{schedule.num_steps}, got {last}")
    if not 1 <= stop <= last:
        raise ValueError(f"the stop must lie in 1..{last}, got {stop}")
    room = last - stop + 1
    if count < 1:
        raise ValueError(f"at least one step is needed, got {count}")
    if count >= room:
        times = list(range(last, stop - 1, -1))
    elif how == "log-snr":
        lam = schedule.half_log_snr()[stop : last + 1]
        even = torch.linspace(max(float(lam[-1]), LOWEST_HALF_LOG_SNR), float(lam[0]), count, dtype=torch.float64)
        times = [last, *(stop + int((lam - value).abs().argmin()) for value in even[1:])]
    elif how == "trailing":
        times = [round(last - i * room / count) for i in range(count)]
    elif how == "leading":
        times = [stop + i * (room // count) for i in reversed(range(count))]
    else:
        times = [round(float(value)) for value in torch.linspace(last, stop, count, dtype=torch.float64)]
    unique = sorted({t for t in times if t >= 1}, reverse=True)
    if len(unique) < count:
        remark(f"{count} steps asked for, but only {len(unique)} distinct times remain after rounding")
    return [*unique, 0]


def spread(schedule: NoiseSchedule, count: int, start: int) -> list[int]:
    """Exactly ``count`` times from ``start`` down to 1, as uniform in log(alpha / sigma) as whole numbers can be.

    Like "log-snr" of `spaced`, but times that coincide after rounding are moved to the next free one, not removed: a
    trajectory from a small ``start`` would lose many. The last time is 1; append 0 to end at the clean tensor.

    Args:
        schedule: the model's noise schedule.
        count: number of times, 1..start; with 1 the only time is ``start``.
        start: first time, 1..T.

    Raises:
        ValueError: ``count`` or ``start`` is out of range.
    """
    if not 1 <= count <= start <= schedule.num_steps:
        raise ValueError(f"needs 1 <= count <= start <= {schedule.num_steps}, got {count} times from {start}")
    lam = schedule.half_log_snr()[1 : start + 1]
    even = torch.linspace(float(lam[0]), max(float(lam[-1]), LOWEST_HALF_LOG_SNR), count, dtype=torch.float64)
    times = [0]  # ascending; the 0 is only a lower limit and is not returned
    for i, value in enumerate(even[:-1], start=1):
        nearest = 1 + int((lam - value).abs().argmin())
        times.append(min(max(nearest, times[-1] + 1), start - count + i))
    return [start, *times[:0:-1]]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    x: Tensor,
    times: Sequence[int],
    cond: Condition | None = None,
    *,
    generators: Sequence[torch.Generator] = (),
    source: NoiseSource = gaussian,
    on_step: Callable[[int, Tensor, Prediction], None] | None = None,
) -> Tensor:
    """Moves ``x`` (B, C, *S) from ``times[0]`` to ``times[-1]`` and returns the tensor at that last time.

    Args:
        denoiser: the model, which may be guided and clipped.
        sampler: DDPM, DDIM, DPM-Solver++ or Heun.
        x: the tensor at ``times[0]``: pure noise at T, or a noised image at a smaller time.
        times: strictly monotone, usually decreasing to 0 (`spaced`).
        cond: passed to the denoiser at every step, so anything costly (an encoded image) should be computed before.
        generators: one CPU generator per batch element; only stochastic steps need them.
        source: the noise that the model was trained with.
        on_step: called after every step with (time reached, x there, the prediction that led there).

    Raises:
        ValueError: ``times`` are not strictly monotone, or a stochastic sampler has too few generators.
    """
    pairs = list(pairwise(times))
    if not pairs or not (all(t > s for t, s in pairs) or all(t < s for t, s in pairs)):
        raise ValueError(f"times must be strictly monotone and at least two, got {list(times)}")

    def noise() -> Tensor:
        if len(generators) != len(x):
            raise ValueError(f"this sampler draws noise: {len(x)} generators are needed, got {len(generators)}")
        return source(x.shape[1:], generators, x)

    def predict(x_t: Tensor, t: int) -> Prediction:
        return denoiser(x_t, torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device), cond)

    step = sampler.begin(predict)
    for t, s in pairs:
        prediction = predict(x, t)
        x = step(denoiser.schedule, prediction, x, t, s, noise)
        if on_step is not None:
            on_step(s, x, prediction)
    return x

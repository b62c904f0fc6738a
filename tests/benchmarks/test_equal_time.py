"""The benchmark of equal time finds the number of steps that fits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import config, latent_config


@pytest.mark.parametrize("method", ["latent-mask", "baseline"])
def test_steps_that_fit_into_a_time_are_found(method, block_scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations and calibration count: what a step alone would leave room for is too much."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "studies")
    equal_time: Any = importlib.import_module("equal_time")
    for name, value in (("WARM", 1), ("TIMED", 4), ("TIMED_AUTOENCODER", 5)):
        monkeypatch.setattr(equal_time, name, value)
    settings = latent_config() if method == "latent-mask" else config(2).model_copy(update={"method": method})

    def measured(seconds: float) -> Callable[[Any, int], float]:
        return lambda stopwatch, max_steps: seconds if len(stopwatch.at[max_steps]) > 1 else 0.0

    monkeypatch.setattr(equal_time.Stopwatch, "seconds_per_step", measured(0.1))
    monkeypatch.setattr(equal_time.Stopwatch, "seconds_per_validation", measured(1.0))
    first = 0.1 * settings.mask_autoencoder.max_steps if method == "latent-mask" else 0.0
    calibration = 0 if method == "latent-mask" else 2  # scans, as one is validated on
    expected = (0.95 * 120 - first - (6 + calibration)) / 0.1
    assert equal_time.fitting_steps(settings, block_scans, minutes=2) == pytest.approx(expected, abs=1)
    assert equal_time.fitting_steps(settings, block_scans, minutes=0.01) == 1

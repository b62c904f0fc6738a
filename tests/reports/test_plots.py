"""Plots of any input: none, one, many and missing values."""

from __future__ import annotations

import math

import numpy as np

from medseg_diffusion.reports.plots import BOX_FROM, distributions, volume_agreement


def test_distributions_of_nothing_of_one_and_of_missing_values() -> None:
    assert distributions([], "Dice").startswith("<svg")
    plot = distributions([("a", [math.nan]), ("b", [0.5]), ("b", [0.0, 1.0])], "Dice")
    assert plot.count(">b</text>") == 2


def test_names_with_dollar_signs_are_no_formulas() -> None:
    """Such a folder of predictions ended a comparison, whose axis names the sets."""
    label = r"Dice of $\foo$ - Dice of x"
    assert f">{label}</text>" in distributions([(r"$\foo$", [0.1, 0.2])], label, bounds=None, zero=True)


def test_a_box_is_drawn_from_five_values_on() -> None:
    few = distributions([("a", np.linspace(0.2, 0.8, BOX_FROM - 1))], "Dice")
    enough = distributions([("a", np.linspace(0.2, 0.8, BOX_FROM))], "Dice")
    assert "fill-opacity: 0.25" not in few and "fill-opacity: 0.25" in enough


def test_volume_agreement_has_the_limits_of_bland_and_altman() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1.
    plot = volume_agreement("x", [10, 20, 30], [11, 22, 33], "#000000")
    for level in ("mean +2", "+1.96 SD +3.96", "1.96 SD +0.04"):
        assert level in plot
    assert "SD" not in volume_agreement("x", [10, 20, math.nan], [11, 22, 1], "#000000")

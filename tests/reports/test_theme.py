"""Colours: told apart by any eye, and legible on the pages they are for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg_diffusion.data.brain_classes import STRUCTURES
from medseg_diffusion.reports import theme

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009:
# linear RGB as seen without red, green and blue cones.
BLINDNESS = {
    "none": np.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson, "A perceptual color space for image processing", 2020."""
    lms = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.array(lab) @ np.cbrt(np.array(lms) @ np.clip(rgb, 0, 1))


def contrast_on_white(colour: str) -> float:
    """Contrast ratio of WCAG 2."""
    return 1.05 / (float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05)


@pytest.mark.parametrize("missing_cones", BLINDNESS)
def test_meanings_are_told_apart(missing_cones: str) -> None:
    colours = [theme.REFERENCE, theme.PREDICTION, *theme.CLASSES]
    seen = [oklab(np.array(BLINDNESS[missing_cones]) @ linear(colour)) for colour in colours]
    distances = {
        (a, b): np.linalg.norm(x - y) for (a, x), (b, y) in itertools.combinations(zip(colours, seen, strict=True), 2)
    }
    assert min(distances.values()) > 0.08, min(distances, key=lambda pair: distances[pair])


def test_lines_and_text_are_legible_on_white() -> None:
    assert contrast_on_white(theme.REFERENCE_ON_WHITE) >= 4.5
    assert contrast_on_white(theme.PREDICTION_ON_WHITE) >= 4.5


def test_sixty_classes_have_different_colours() -> None:
    assert len({theme.label_colour(i) for i in range(60)}) == 60
    assert [theme.label_colour(i) for i in range(12)] == list(theme.CLASSES)


def test_colour_scale_runs_from_dark_to_bright() -> None:
    for name in (theme.UNCERTAINTY, theme.ANOMALY):
        lightness = [oklab(linear("#" + bytes(colour).hex()))[0] for colour in theme.colour_scale(name)]
        assert np.all(np.diff(lightness) > -0.01) and lightness[-1] > lightness[0] + 0.4
        assert theme.css_gradient(name).count("#") == 9


# ---- classes ---------------------------------------------------------------------------------------------------------

NAMES = {value: name for value, name in enumerate(STRUCTURES.names) if value}


def seen(colour: str) -> np.ndarray:
    return oklab(linear(colour))


def test_every_structure_of_a_brain_has_its_own_colour() -> None:
    """Thirty classes are too many for eyes that miss a cone; for others, any two differ."""
    colours = theme.class_colours(NAMES)
    assert set(theme.STRUCTURES) == {
        name.removeprefix("left ").removeprefix("right ").lower() for name in NAMES.values()
    }
    pairs = itertools.combinations([*colours.values(), theme.REFERENCE, theme.PREDICTION], 2)
    assert min(float(np.linalg.norm(seen(a) - seen(b))) for a, b in pairs) > 0.05
    assert min(float(np.hypot(*seen(colour)[1:])) for colour in colours.values()) > 0.035, "not grey, as scans are"


def test_the_sides_of_a_structure_are_shades_of_one_colour() -> None:
    colours = {name: theme.class_colours(NAMES)[value] for value, name in NAMES.items()}
    for name in NAMES.values():
        if name.startswith("right "):
            left, right = seen(colours[name.replace("right", "left")]), seen(colours[name])
            assert 0.08 < np.linalg.norm(left - right) < 0.4
            hues = [np.arctan2(lab[2], lab[1]) for lab in (left, right) if np.hypot(*lab[1:]) > 0.03]
            assert len(hues) < 2 or np.cos(hues[0] - hues[1]) > 0.85, name


def test_a_class_keeps_its_colour_when_others_are_left_out() -> None:
    names = {1: "a", 2: "b", 60: "c"}
    assert theme.class_colours({60: "c"})[60] == theme.class_colours(names)[60] == theme.label_colour(59)
    assert theme.class_colours({10: NAMES[10]})[10] == theme.class_colours(NAMES)[10]
    # Values such as FreeSurfer's would repeat colours: their places do not.
    assert len(set(theme.class_colours({1: "a", 61: "b", 121: "c"}).values())) == 3

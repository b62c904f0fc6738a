"""What pages share: tables, numbers, plots that follow the theme."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

from matplotlib.figure import Figure

from medseg_diffusion.metrics.statistics import mean_interval
from medseg_diffusion.reports.page import INK, VARIABLES, interval, number, plural, relative_link, svg


def test_plots_take_their_colours_and_font_from_the_page() -> None:
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], color=INK)
    axes.set_xlabel("<b>&", color=INK)
    for element in (svg(figure, '"><script>'), svg(figure, '"><script>')):
        assert "var(--ink)" in element and INK not in element
        assert "<script>" not in element and "&lt;b&gt;&amp;" in element
        assert "<style" not in element and "<metadata" not in element
        assert "DejaVu" not in element
        assert not re.search(r'<svg[^>]* width="', element)
        ids = re.findall(r' id="([^"]*)"', element)
        assert all(f"#{name}" in element for name in ids)
    assert svg(figure, "x") == svg(figure, "x")


def test_names_in_any_script_are_drawn_without_a_warning() -> None:
    """One warning for each letter was printed, although the browser has the letters."""
    figure = Figure(figsize=(3, 2), layout="constrained")
    figure.add_subplot().set_title("\u6d77\u9a6c\u4f53")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "\u6d77\u9a6c\u4f53" in svg(figure, "x")


def test_every_variable_has_a_light_and_a_dark_colour() -> None:
    lights = [light for light, _ in VARIABLES.values()]
    assert len(set(lights)) == len(lights)  # a plot's colour is replaced by the variable of this name
    assert all(re.fullmatch(r"#[0-9a-fA-F]{6}", colour) for both in VARIABLES.values() for colour in both)


def test_numbers_that_do_not_exist_are_dashes() -> None:
    assert number(None).text == number(math.nan).text == "\u2013"
    assert math.isnan(number(None).value)
    assert interval(mean_interval([0.5])).note == ""
    assert interval(mean_interval([0.5, 0.7, 0.9]), 2).note.count("to") == 1
    assert plural(1, "case") == "1 case" and plural(1200, "class", "classes") == "1,200 classes"


def test_links_are_relative_and_quoted(tmp_path: Path) -> None:
    assert relative_link(tmp_path / "a b#?.nii.gz", tmp_path / "out") == "../a%20b%23%3F.nii.gz"

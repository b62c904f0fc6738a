"""Pages of benchmarks, generators and training runs in a browser: quiet, on a phone, with hostile names, sorted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_diffusion.metrics.generation_summary import FLOOR, GeneratorEvaluation, GeneratorRow
from medseg_diffusion.metrics.training_history import History
from medseg_diffusion.reports.benchmark_page import BenchmarkInfo, benchmark_page
from medseg_diffusion.reports.generator_page import Pictures, generator_page
from medseg_diffusion.reports.pictures import png
from medseg_diffusion.reports.run_page import Picture, RunSummary, TrainedNetwork, run_page
from tests.helpers.benchmarks import row
from tests.helpers.browser import PHONE, Visits, overflow

EVIL = "<img src=x onerror=alert(1)>\"><script>alert(2)</script>'$\\frac"


def benchmark() -> str:
    models = [f"runs/{EVIL}", "runs/a-model-with-a-long-name-that-does-not-fit-beside-a-picture"]
    rows = [
        row(model=model, factor="steps", steps=steps, dice=[0.3 + steps / 20, 0.6 + steps / 30, 0.9])
        for model in models
        for steps in (2, 1, 5, 10)
    ]
    rows += [row(factor="without x_t", steps=5, ensemble=2, x_t=x_t) for x_t in ("own", "fresh")]
    return benchmark_page(rows, BenchmarkInfo(EVIL, "test", 12, 0, EVIL))


def generator() -> str:
    from medseg_diffusion.metrics.generation import Scores

    scores = Scores(0.5, 0.5, None, 12.0, None, 0.1, 100, 200)
    rows = [GeneratorRow(FLOOR, "", 0, scores), *(GeneratorRow(f"runs/{EVIL}", "ddim", i, scores) for i in (9, 10, 20))]
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    pictures = [Pictures(title, images, [EVIL] * 16) for title in ("Real images", EVIL)]
    return generator_page(GeneratorEvaluation(EVIL, EVIL, EVIL, 200, None, rows, [EVIL]), pictures, command=EVIL)


def training() -> str:
    steps = np.arange(1.0, 401)
    validations = [
        {"step": step, "score": 0.5 + step / 1000, "loss": 0.1, f"dice_{EVIL}": 0.5} for step in range(50, 401, 50)
    ]
    history = History(steps, 1 / steps, 10 / steps, steps / 100, validations, 7200.0, 2, time.time())
    picture = Picture(1, 50, png(np.zeros((64, 64, 3), np.uint8)))
    network = TrainedNetwork(EVIL, history, 1000, "going on", ([1, 1000], [1e-3, 0]), [picture], 9)
    run = RunSummary(
        EVIL, EVIL, EVIL, EVIL, [network], "going on", f"description: {EVIL}\n" + "key: " + "x" * 300,
        {"train": (3, 40), EVIL: (1, None)}, {EVIL: EVIL}, {"path": "/" + "long" * 60}, {EVIL: 0.5},
        {EVIL: f"medseg train-segmenter {EVIL} --resume"}, [EVIL],
    )  # fmt: skip
    return run_page(run, now=time.time(), command=EVIL)


@pytest.mark.parametrize("make", [benchmark, generator, training])
def test_pages_are_quiet_and_fit_a_phone(make: Any, visit: Visits) -> None:
    text = make()
    for dark in (False, True):
        assert overflow(visit(text, PHONE, dark=dark)) == 0
    page = visit(text)
    assert overflow(page) == 0
    assert page.locator("img:not([src^='data:'])").count() == 0 and EVIL in page.locator("body").inner_text()


def test_settings_sort_by_number_and_filter(visit: Visits) -> None:
    page = visit(benchmark())
    table = page.locator(".table").first
    table.locator("th", has_text="Evaluations").locator("button").click()
    place = table.locator("thead th").all_inner_texts().index("Evaluations") + 1
    evaluations = table.locator(f"tbody tr td:nth-child({place})").all_inner_texts()
    assert evaluations == ["1", "1", "2", "2", "5", "5", "10", "10"]
    table.locator("input[type=search]").fill("10 steps")
    assert table.locator("tbody tr:visible").count() == 2


def test_plots_follow_the_theme(visit: Visits) -> None:
    """The lines of a page in the dark are brighter than those of a page in the light."""
    text = benchmark()

    def ink(dark: bool) -> Any:
        page = visit(text, dark=dark)
        return page.evaluate("getComputedStyle(document.querySelector('figure.plot svg text')).fill")

    assert ink(False) != ink(True)


def test_the_configuration_is_closed_until_it_is_asked_for(visit: Visits, tmp_path: Path) -> None:
    page = visit(training())
    config = page.locator("pre")
    assert not config.is_visible()
    page.locator("summary", has_text="Configuration").click()
    assert config.is_visible() and overflow(page) == 0

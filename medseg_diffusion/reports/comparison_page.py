"""The page of `medseg evaluate A B ... --reference REF`: what can be concluded first, then numbers, then every case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

from markupsafe import Markup

from medseg_diffusion.metrics.comparison import METHOD, Comparison
from medseg_diffusion.metrics.registry import METRICS

from .evaluation_page import metric_rules
from .page import Cell, Row, Table, interval, interval_with_missing, number, plural, render
from .plots import distributions
from .theme import class_colours

MAX_PLOTS = 6
"""Pairs of sets whose differences are plotted: the first ones."""


def comparison_page(
    comparison: Comparison,
    *,
    pages: Mapping[str, str] | None = None,
    command: str = "",
    date: str | None = None,
) -> str:
    """The text of the page.

    Args:
        comparison: The numbers.
        pages: Name of a set -> address of its own page, relative to this one.
        command: The command line; empty shows none.
        date: Date and time; None takes the present.
    """
    first = comparison.first
    return render(
        "comparison.html.j2",
        command=command,
        date=date,
        made={
            "differences": METHOD,
            "intervals": f"95 % bootstrap intervals over {first.unit} (BCa), seed {first.seed}",
            **{f"predictions {name}": folder for name, folder in comparison.folders.items()},
        },
        rules=metric_rules(first, [metric for metric in first.metrics if metric.compared]),
        title=f"Comparison of {plural(len(comparison.evaluations), 'set')} of predictions",
        lead=f"{plural(len(first.cases), 'case')} that all sets have, with "
        f"{plural(len(first.labels), 'class', 'classes')}, compared with the same references.",
        warnings=comparison.warnings,
        left_out=comparison.left_out,
        conclusions=comparison.conclusions,
        differences=_differences_table(comparison),
        means=_means_table(comparison, pages or {}),
        plots=_difference_plots(comparison),
        n_pairs=math.comb(len(comparison.evaluations), 2),
        cases=_cases_table(comparison),
    )


def _differences_table(comparison: Comparison) -> Table:
    first = comparison.first
    rows = [
        Row(
            [
                Cell(f"{one.first} \u2212 {one.second}"),
                Cell(first.labels[one.label]),
                Cell(METRICS[one.metric].heading),
                interval(one.difference, METRICS[one.metric].digits),
                number(one.difference.median, METRICS[one.metric].digits),
                number(one.p_value, 4),
                number(one.p_holm, 4),
                number(one.difference.n, 0),
                number(one.difference.n_missing, 0),
            ]
        )
        for one in comparison.differences
    ]
    headings = [
        "Sets",
        "Class",
        "Metric",
        "Mean difference",
        "Median",
        "p",
        "p (Holm)",
        first.unit.capitalize(),
        "Missing",
    ]
    return Table("Paired differences", headings, rows, sortable=True, text_columns=(1, 2), stacked=True)


def _means_table(comparison: Comparison, pages: Mapping[str, str]) -> Table:
    metrics = [metric for metric in comparison.first.metrics if metric.compared]
    colours = class_colours(comparison.first.labels)
    rows = [
        Row(
            [
                Cell(name, link=pages.get(name, "")),
                Cell(title, colour=colours[label]),
                *(interval_with_missing(evaluation.means[metric.name][label], metric.digits) for metric in metrics),
            ]
        )
        for name, evaluation in comparison.evaluations.items()
        for label, title in comparison.first.labels.items()
    ]
    headings = ["Set", "Class", *(metric.heading for metric in metrics)]
    return Table("Means of every set", headings, rows, sortable=True, text_columns=(1,), stacked=True)


def _difference_plots(comparison: Comparison) -> list[Markup]:
    """The differences of Dice of every case, one plot for each pair of sets."""
    if len(comparison.first.cases) < 2:
        return []
    plots = []
    for (name, one), (other, two) in list(combinations(comparison.evaluations.items(), 2))[:MAX_PLOTS]:
        rows = []
        for label, title in one.labels.items():
            pairs = zip(one.cases, two.cases, strict=True)
            rows.append((title, [a.metrics[label]["dice"] - b.metrics[label]["dice"] for a, b in pairs]))
        plots.append(distributions(rows, f"Dice of {name} \u2212 Dice of {other}", bounds=None, zero=True))
    return plots


def _cases_table(comparison: Comparison) -> Table:
    """The mean Dice of every case in every set, where they differ most first."""
    names = list(comparison.evaluations)
    rows: list[tuple[float, Row]] = []
    for cases in zip(*(evaluation.cases for evaluation in comparison.evaluations.values()), strict=True):
        dice = [case.mean_dice for case in cases]
        known = [value for value in dice if not math.isnan(value)]
        spread = max(known) - min(known) if known else math.nan
        row = Row([Cell(cases[0].name), *map(number, dice), number(spread)])
        rows.append((-1.0 if math.isnan(spread) else spread, row))
    rows.sort(key=lambda item: -item[0])
    return Table(
        "Cases",
        ["Case", *(f"Mean Dice, {name}" for name in names), "Largest difference"],
        [row for _, row in rows],
        sortable=True,
    )

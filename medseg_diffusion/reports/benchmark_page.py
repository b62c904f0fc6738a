"""The page and the Markdown summary of `medseg benchmark-segmenter`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from medseg_diffusion.metrics.benchmark_summary import BenchmarkRow, Comparison, compare, mean_of
from medseg_diffusion.metrics.comparison import ALPHA
from medseg_diffusion.metrics.overlap import EMPTY_RULE
from medseg_diffusion.metrics.statistics import Interval, mean_interval

from .lines import Line, line_plot
from .markdown import markdown_page, markdown_table
from .page import Cell, Row, Table, interval, limits, number, plural, render, rules_table

SCORES = {"dice": "mean Dice", "energy_distance": "GED\u00b2"}
"""Name of the score by which settings are compared."""

_REPLACEMENTS = {
    "own": "its own noised mask",
    "fresh": "fresh noise at every step",
    "shared": "one draw of noise, shared by all samples",
    "zeros": "nothing: all classes alike",
}
_RULES = {
    "Empty masks": EMPTY_RULE,
    "Intervals": "95 % bootstrap intervals over patients (BCa, seed 0); a patient's cases are averaged first.",
    "Difference from the best": "Over the same cases: patients are resampled together with both of their values. A "
    "setting is called worse if its interval leaves out 0 and p < 0.05 in the Wilcoxon signed-rank test of the paired "
    "differences, corrected by Holm's method over all pairs of settings, as the same patients tell the best.",
    "Mean Dice": "Mean over a case's classes, then over patients.",
    "HD95": "The larger of the two directed 95th percentiles of the distances between surfaces; a class that is "
    "missing from the prediction or the reference has none.",
    "ECE": "Expected calibration error over the voxels around the references of all cases, with the temperature "
    "that was fitted to the model where it holds.",
    "Seconds": "Median over cases, from the scan in memory to the mask on its grid.",
    "Evaluations": "Evaluations of the network for one case and window: steps times samples.",
}
_READER_RULES = {
    "GED\u00b2": "Generalised energy distance with 1 \u2212 IoU as the distance (Kohl et al. 2018), over all pairs of "
    "samples and of readers; 0 is perfect. It falls with the number of samples: only equal numbers are compared.",
    "Matched IoU": "Of the best one-to-one assignment of samples to readers (Kohl et al. 2019).",
    "Dice of majorities": "What at least half of the samples mark against what at least half of the readers mark.",
    "Empty samples": "Share of the samples without foreground.",
    "Frequency ECE": "Mean difference between the share of samples and the share of readers that mark a voxel.",
    "Dice, IoU, HD95": "Of the final mask against the first reader.",
}


@dataclass(frozen=True)
class BenchmarkInfo:
    """What is said about a benchmark beside its rows.

    Attributes:
        data: Folder of the cases.
        side: "validation" or "test".
        planned: Number of rows that were to be measured; more than the rows of an interrupted run.
        seed: Seed of the samples.
        command: The command line; empty shows none.
    """

    data: str
    side: str
    planned: int
    seed: int = 0
    command: str = ""


def benchmark_page(rows: Sequence[BenchmarkRow], info: BenchmarkInfo, *, date: str | None = None) -> str:
    """The text of the page.

    Args:
        rows: At least one row.
        info: What else is said.
        date: Date and time; None takes the present.
    """
    comparison = compare(rows)
    names = short_names(rows)
    ordinary, replaced = _parts(rows)
    return render(
        "benchmark.html.j2",
        command=info.command,
        date=date,
        made=_made(rows, info),
        rules=_rules(rows),
        title="Benchmark of segmenters" if len(names) > 1 else f"Benchmark of {next(iter(names.values()))}",
        lead=_lead(rows, info),
        sentences=sentences(rows, comparison),
        warnings=_warnings(rows, info, comparison),
        facts=_facts(comparison),
        plots=_plots(ordinary, comparison, names),
        settings=settings_table(ordinary, comparison, names),
        readers=_readers_table(ordinary, names),
        replaced=_replaced_table(replaced, names),
        score=SCORES[comparison.score] if comparison else "",
    )


def benchmark_markdown(rows: Sequence[BenchmarkRow], info: BenchmarkInfo) -> str:
    """A summary of a benchmark for a pull request, in GitHub-flavoured Markdown."""
    comparison, names = compare(rows), short_names(rows)
    ordinary, replaced = _parts(rows)
    tables = [settings_table(ordinary, comparison, names)]
    tables += filter(None, [_readers_table(ordinary, names), _replaced_table(replaced, names)])
    return markdown_page(
        "Benchmark of segmenters",
        [_lead(rows, info), *sentences(rows, comparison)],
        [markdown_table(table) for table in tables if table.rows],
        _warnings(rows, info, comparison),
        info.command,
    )


def _parts(rows: Sequence[BenchmarkRow]) -> tuple[list[BenchmarkRow], list[BenchmarkRow]]:
    """The settings, and the rows that say what x_t is worth."""
    replaced = [row for row in rows if row.setting.factor == "without x_t"]
    return [row for row in rows if row.setting.factor != "without x_t"], replaced


def short_names(rows: Sequence[BenchmarkRow]) -> dict[str, str]:
    """Model as given -> the last part of its path, or all of it where two models share that part."""
    names = {row.model: Path(row.model).name or row.model for row in rows}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


# ---- sentences -------------------------------------------------------------------------------------------------------


def _lead(rows: Sequence[BenchmarkRow], info: BenchmarkInfo) -> str:
    models = {row.model for row in rows}
    entries = [entry for row in rows for entry in row.by_case]
    cases, patients = (len({entry[key] for entry in entries}) for key in ("case", "patient"))
    of = f"{plural(cases, 'case')} of {plural(patients, 'patient')}"
    return f"{plural(len(models), 'model')} on {of} that training did not see ({info.side} side)."


def sentences(rows: Sequence[BenchmarkRow], comparison: Comparison | None) -> list[str]:
    """What the numbers say, and what they leave open."""
    if comparison is None:
        return ["No case has a score: every class is absent from all masks and references."]
    best, names = comparison.best, short_names(rows)
    if best is None:
        return [
            "The models were measured on different cases or classes, so none is called the best. Benchmark each by "
            "itself, or models with the same held-out cases and classes."
        ]
    said = [
        f"The best {SCORES[comparison.score]} is {_score(best, comparison)}: {_called(best, names)}, {_cost(best)}."
    ]
    behind, undecided = comparison.behind, comparison.undecided
    if behind:
        verb = "is" if len(behind) == 1 else "are"
        count = plural(len(behind), "other setting")
        said.append(
            f"{count} {verb} worse on the same patients (signed-rank test, p < {ALPHA} after correction over "
            f"{plural(comparison.n_tests, 'comparison')})."
        )
    if undecided:
        cheapest = min(undecided, key=lambda row: (row.evaluations, row.seconds))
        verb, colon = ("is", ":") if len(undecided) == 1 else ("are", "; the cheapest of them is")
        said.append(
            f"{plural(len(undecided), 'other setting')} {verb} not shown to be worse by these patients{colon} "
            f"{_called(cheapest, names)}, {_cost(cheapest)}."
        )
    if undecided and comparison.hopeless:
        said.append(
            f"So few patients cannot show a difference of any size in {plural(comparison.n_tests, 'comparison')} of "
            "settings: measure more cases, or fewer settings."
        )
    return said


def _score(row: BenchmarkRow, comparison: Comparison) -> str:
    mean = comparison.scores[comparison.rows.index(row)]
    ends = limits(mean)
    return f"{mean.mean:.3f}" + (f" (95 % interval {ends})" if ends else "")


def _called(row: BenchmarkRow, names: Mapping[str, str]) -> str:
    return f"{names[row.model]}, {row.setting}" if len(names) > 1 else str(row.setting)


def _cost(row: BenchmarkRow) -> str:
    return f"{plural(row.evaluations, 'network evaluation')} and {_seconds(row.seconds)} a case"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def _warnings(rows: Sequence[BenchmarkRow], info: BenchmarkInfo, comparison: Comparison | None) -> list[str]:
    found = []
    if len(rows) < info.planned:
        found.append(f"Only {len(rows)} of {info.planned} rows have been measured: the run was stopped.")
    if comparison is not None and comparison.best is not None and len(comparison.rows) > 1:
        if info.side == "validation":
            found.append(
                "Settings may be chosen on these cases; the one that is chosen is then measured on the test side."
            )
        else:
            found.append(
                "The best of several settings looks better than it is on the cases by which it was chosen: choose on "
                "the validation side, and measure only that setting here."
            )
    names = short_names(rows)
    found += dict.fromkeys(
        f"{names[row.model]} was calibrated on {row.calibrated_on} of its {plural(row.cases, 'case')}: its ECE looks "
        "better here than on other patients."
        for row in rows
        if row.calibrated_on
    )
    fewest = min(row.patients for row in rows)
    if fewest < 2:
        found.append("A single patient gives no intervals: these numbers do not tell one setting from another.")
    elif fewest < 10:
        found.append(f"Intervals over {plural(fewest, 'patient')} are rough.")
    return found


def _facts(comparison: Comparison | None) -> dict[str, str]:
    if comparison is None:
        return {}
    best, facts = comparison.best, {"Settings": str(len(comparison.rows))}
    if best is None:
        return facts
    score = comparison.scores[comparison.rows.index(best)]
    return {
        f"Best {SCORES[comparison.score]}": number(score.mean).text,
        "Evaluations a case": f"{best.evaluations:,}",
        "Time a case": _seconds(best.seconds),
        **facts,
        "Patients": str(best.patients),
    }


def _made(rows: Sequence[BenchmarkRow], info: BenchmarkInfo) -> dict[str, str]:
    models = dict.fromkeys(row.model for row in rows)
    return {"models": ", ".join(models), "data": info.data, "side": info.side, "seed": str(info.seed)}


def _rules(rows: Sequence[BenchmarkRow]) -> Table:
    return rules_table(_RULES | (_READER_RULES if any(row.readers for row in rows) else {}))


# ---- tables ----------------------------------------------------------------------------------------------------------

_Column = tuple[str, Callable[[BenchmarkRow], Cell]]


def settings_table(rows: Sequence[BenchmarkRow], comparison: Comparison | None, names: Mapping[str, str]) -> Table:
    """One row for each measured row, with the numbers against the reference."""
    classes = list(dict.fromkeys(name for row in rows for name in row.dice))
    columns: list[_Column] = [
        ("Evaluations", lambda row: Cell(f"{row.evaluations:,}", row.evaluations)),
        ("Seconds a case", lambda row: number(row.seconds, 2)),
    ]
    if comparison is not None:
        if comparison.score != "dice" or len(classes) > 1:
            columns.append((_heading(comparison), lambda row: interval(_of(row, comparison, comparison.scores))))
        if comparison.best is not None:
            columns.append(("Difference from the best", lambda row: _difference(row, comparison)))
    columns += [(f"Dice {name}", _class_dice(name)) for name in classes]
    columns += [
        ("IoU", lambda row: number(mean_of(row.iou))),
        ("HD95 mm", lambda row: number(mean_of(row.hd95_mm), 2)),
        ("ECE", lambda row: number(row.ece)),
    ]
    return _table("Settings", rows, columns, names)


def _heading(comparison: Comparison) -> str:
    text = SCORES[comparison.score]
    return text[0].upper() + text[1:]


def _class_dice(name: str) -> Callable[[BenchmarkRow], Cell]:
    return lambda row: interval(row.dice[name]) if name in row.dice else number(None)


def _of(row: BenchmarkRow, comparison: Comparison, values: Sequence[Interval]) -> Interval:
    """The value of the row of the comparison that has the same model and setting: it may vary another factor."""
    for other, value in zip(comparison.rows, values, strict=True):
        if other.model == row.model and str(other.setting) == str(row.setting):
            return value
    return mean_interval([])


def _difference(row: BenchmarkRow, comparison: Comparison) -> Cell:
    best = comparison.best
    if best is not None and row.model == best.model and str(row.setting) == str(best.setting):
        return Cell("best", 0.0)
    gap = _of(row, comparison, comparison.differences)
    if math.isnan(gap.mean):
        return number(None)
    ends = f"{gap.low:+.3f} to {gap.high:+.3f}" if not math.isnan(gap.low) else ""
    return Cell(f"{gap.mean:+.3f}".replace("-", "\u2212"), gap.mean, ends.replace("-", "\u2212"))


def _readers_table(rows: Sequence[BenchmarkRow], names: Mapping[str, str]) -> Table | None:
    """The samples against several readers; None for data of one reader."""
    rated = [row for row in rows if row.readers is not None]
    if not rated:
        return None
    columns: list[_Column] = [("Samples", lambda row: number(row.setting.ensemble, 0))]
    for heading, name in (
        ("GED\u00b2", "energy_distance"),
        ("Matched IoU", "matched_iou"),
        ("Dice of majorities", "majority_dice"),
        ("Empty samples", "empty_samples"),
        ("Empty readers", "empty_readers"),
    ):
        columns.append((heading, _reader_interval(name)))
    columns.append(("Frequency ECE", lambda row: number(row.readers.frequency_ece if row.readers else None)))
    columns.append(("Dice between samples", _between_samples))
    return _table("Several readers", rated, columns, names)


def _reader_interval(name: str) -> Callable[[BenchmarkRow], Cell]:
    return lambda row: number(None) if row.readers is None else interval(getattr(row.readers, name))


def _between_samples(row: BenchmarkRow) -> Cell:
    return number(row.pairwise_dice if row.setting.ensemble > 1 else None)


def _replaced_table(rows: Sequence[BenchmarkRow], names: Mapping[str, str]) -> Table | None:
    """The same weights with a replacement of x_t; None if none was measured."""
    if not rows:
        return None
    columns: list[_Column] = [("What the network sees", lambda row: Cell(_REPLACEMENTS[row.setting.x_t]))]
    if any(row.readers for row in rows):
        columns.append(
            ("GED\u00b2", lambda row: interval(row.readers.energy_distance) if row.readers else number(None))
        )
        columns.append(("Empty samples", lambda row: number(row.readers.empty_samples.mean if row.readers else None)))
    columns.append(("Mean Dice", lambda row: number(row.mean_dice)))
    columns.append(("Dice between samples", _between_samples))
    return _table("Without x_t", rows, columns, names, text_columns=(1,), factor=False)


def _table(
    name: str,
    rows: Sequence[BenchmarkRow],
    columns: Sequence[_Column],
    names: Mapping[str, str],
    text_columns: Sequence[int] = (),
    factor: bool = True,
) -> Table:
    """A table whose first columns say which setting of which model a row is, and which factor it varies."""
    said: list[_Column] = [("Setting", lambda row: Cell(str(row.setting)))]
    if len(names) > 1:
        said.append(("Model", lambda row: Cell(names[row.model])))
    if factor and len({row.setting.factor for row in rows}) > 1:
        said.append(("Varied", lambda row: Cell("" if row.setting.factor == "setting" else row.setting.factor)))
    everything = [*said, *columns]
    return Table(
        name,
        [heading for heading, _ in everything],
        [Row([cell(row) for _, cell in everything]) for row in rows],
        sortable=True,
        stacked=True,
        text_columns=(*range(1, len(said)), *(column + len(said) - 1 for column in text_columns)),
    )


# ---- plots -----------------------------------------------------------------------------------------------------------


def _plots(rows: Sequence[BenchmarkRow], comparison: Comparison | None, names: Mapping[str, str]) -> dict[str, Markup]:
    """Caption -> the score against the network evaluations, and against the seconds."""
    if comparison is None or len(comparison.rows) < 2:
        return {}
    score = SCORES[comparison.score]
    up = f"{score} ({'less' if comparison.score != 'dice' else 'more'} is better)"
    across = {"evaluations": "network evaluations per case and window", "seconds": "seconds per case"}
    return {
        f"{score} against {name}": line_plot(
            _lines(rows, comparison, names, key),
            name,
            up,
            f"{score} against {name}, one line for each model and varied factor",
            logarithmic="x",
            size=(5.2, 3.4),
        )
        for key, name in across.items()
    }


def _lines(rows: Sequence[BenchmarkRow], comparison: Comparison, names: Mapping[str, str], across: str) -> list[Line]:
    """One line for each model and factor; samplers and models of one pass are points of their own."""
    groups: dict[tuple[str, str], list[BenchmarkRow]] = {}
    for row in rows:
        groups.setdefault((row.model, _group(row)), []).append(row)
    models, factors = list(names), list(dict.fromkeys(factor for _, factor in groups))
    lines = []
    for (model, factor), own in groups.items():
        own = sorted(own, key=lambda row: float(getattr(row, across)))
        means = [_of(row, comparison, comparison.scores) for row in own]
        lines.append(
            Line(
                ", ".join(filter(None, [names[model] if len(names) > 1 else "", factor])),
                [float(getattr(row, across)) for row in own],
                [mean.mean for mean in means],
                [mean.low for mean in means],
                [mean.high for mean in means],
                colour=models.index(model) if len(models) > 1 else factors.index(factor),
                style=factors.index(factor) if len(models) > 1 else 0,
            )
        )
    return lines


def _group(row: BenchmarkRow) -> str:
    setting = row.setting
    if setting.factor == "setting":
        return f"{setting.sampler}, {plural(setting.ensemble, 'sample')}" if setting.sampler else "samples"
    names = {"steps": "more steps, 1 sample", "ensemble": "more samples", "sampler": setting.sampler}
    return names.get(setting.factor, setting.factor)

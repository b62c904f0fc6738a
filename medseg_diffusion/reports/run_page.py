"""The page of `medseg report`: how far a training is, its curves, its pictures, its data, and the command to go on."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from medseg_diffusion.metrics.training_history import History, Values, binned

from .lines import COLOURS, Line, line_plot
from .markdown import markdown_page, markdown_table
from .page import Cell, Row, Table, number, plural, render

State = Literal["finished", "going on", "stopped"]
_MANY_ROWS = 60
"""Validations that the Markdown summary lists at most; the last ones."""


@dataclass(frozen=True)
class Picture:
    """A picture that a validation has written: its number, the step if it is known, and the PNG."""

    number: int
    step: int | None
    png: bytes


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """The training of one network of a run.

    Attributes:
        title: What is trained, such as "Autoencoder (first stage)".
        history: What was logged.
        max_steps: Planned number of steps.
        state: Whether it is finished, goes on, or was stopped.
        rates: Steps and the learning rates that the configuration gives them.
        pictures: Some of the pictures of the validations.
        picture_count: Number of all of them.
        reconstructions: Pictures show images beside their reconstructions, instead of samples.
        validates_loss: The loss of a validation is that of the validation images, not of the training.
        score: What the score is, in a sentence.
    """

    title: str
    history: History
    max_steps: int
    state: State
    rates: tuple[Sequence[float], Sequence[float]] = ((), ())
    pictures: Sequence[Picture] = ()
    picture_count: int = 0
    reconstructions: bool = False
    validates_loss: bool = False
    score: str = ""


@dataclass(frozen=True, eq=False)
class RunSummary:
    """A run folder.

    Attributes:
        name: Name of the folder.
        folder: Its path.
        kind: What is trained, such as "Segmenter (categorical)".
        description: That of the configuration.
        networks: Its trainings, in their order; empty for a method without steps.
        state: Of the whole run.
        config: Text of config.yaml.
        sides: Side of the split -> number of patients and of cases; None for what is not known.
        data: Facts about the data: name -> value.
        model: Facts about the model: name -> value; empty before there is one.
        metrics: Measures of the model's card: name -> value.
        commands: What it is for -> the command line.
        warnings: What the reader should know, one sentence each.
    """

    name: str
    folder: str
    kind: str
    description: str
    networks: Sequence[TrainedNetwork]
    state: State
    config: str
    sides: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def run_page(run: RunSummary, *, now: float, command: str = "", date: str | None = None) -> str:
    """The text of the page.

    Args:
        run: The run.
        now: The present, seconds since the epoch.
        command: The command line; empty shows none.
        date: Date and time; None takes the present.
    """
    return render(
        "run.html.j2",
        command=command,
        date=date,
        made={"run": run.folder},
        run=run,
        sentences=run_sentences(run, now),
        facts=_facts(run),
        sides=_sides_table(run.sides),
        metrics=_metrics_table(run.metrics),
        networks=[
            {
                "title": network.title,
                "sentence": _capital(_sentence(network, now)) if len(run.networks) > 1 else "",
                "score": network.score,
                "validates_loss": network.validates_loss,
                "plots": _plots(network) if network.history.step else [],
                "validations": validations_table(network),
                "pictures": [_shown(picture) for picture in network.pictures],
                "picture_count": network.picture_count,
                "reconstructions": network.reconstructions,
            }
            for network in run.networks
        ],
    )


def run_markdown(run: RunSummary, *, now: float, command: str = "") -> str:
    """A summary of the run for a pull request, in GitHub-flavoured Markdown."""
    tables = [validations_table(network, _MANY_ROWS) for network in run.networks if network.history.validations]
    return markdown_page(
        f"Training run {run.name}",
        [f"{run.kind}.", *run_sentences(run, now)],
        [markdown_table(table) for table in tables],
        run.warnings,
        command,
    )


# ---- sentences and numbers -------------------------------------------------------------------------------------------


def run_sentences(run: RunSummary, now: float) -> list[str]:
    """How far the run is."""
    if not run.networks:
        return ["It is finished." if run.state == "finished" else "It holds no model: the command was stopped."]
    said = [f"{network.title}: {_sentence(network, now)}" for network in run.networks]
    if run.state == "stopped" and all(network.state == "finished" for network in run.networks):
        said.append("The networks are trained, but the model is not complete: the command was stopped after that.")
    return said


def _sentence(network: TrainedNetwork, now: float) -> str:
    history = network.history
    where = f"step {history.step:,} of {network.max_steps:,}"
    spent = f" after {duration(history.seconds)}" if history.seconds else ""
    spent += f" in {plural(history.calls, 'call')}" if history.calls > 1 else ""
    if network.state == "finished":
        said = f"finished at {where}{spent}."
    else:
        ago = "" if math.isnan(history.written) else f"; last entry {duration(max(0.0, now - history.written))} ago"
        said = f"{'going on' if network.state == 'going on' else 'stopped'} at {where}{spent}{ago}."
        left = (network.max_steps - history.step) * history.seconds_per_step
        if math.isfinite(left) and left > 0:
            said += f" The other steps take about {duration(left)}, without validations."
    best = history.best
    if best is not None:
        said += f" The best of {plural(len(history.validations), 'validation')} is that of step {int(best['step']):,}."
    return said


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def duration(seconds: float) -> str:
    """Such as "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _facts(run: RunSummary) -> dict[str, str]:
    facts: dict[str, str] = {"State": run.state}
    if not run.networks:
        return facts
    current = next((one for one in run.networks if one.state != "finished"), run.networks[-1])
    history = current.history
    facts["Step"] = f"{history.step:,} of {current.max_steps:,}"
    if (best := history.best) is not None:
        facts["Best score"] = f"{best['score']:.4g}"
        facts["at step"] = f"{int(best['step']):,}"
    if math.isfinite(history.seconds_per_step):
        facts["Seconds a step"] = f"{history.seconds_per_step:.3g}"
    total = sum(network.history.seconds for network in run.networks)
    if total:
        facts["Time spent"] = duration(total)
    return facts


def _sides_table(sides: Mapping[str, tuple[int | None, int | None]]) -> Table | None:
    shown = {side: counts for side, counts in sides.items() if any(counts)}
    if not shown:
        return None
    headings = ("Patients", "Cases")
    kept = [i for i in (0, 1) if any(counts[i] is not None for counts in shown.values())]
    rows = [Row([Cell(side), *(number(counts[i], 0) for i in kept)]) for side, counts in shown.items()]
    return Table("Split", ["Side", *(headings[i] for i in kept)], rows)


def _metrics_table(metrics: Mapping[str, float]) -> Table | None:
    rows = [Row([Cell(name), _rounded(value)]) for name, value in metrics.items()]
    return Table("Measures of the model", ["Measure", "Value"], rows) if rows else None


def validations_table(network: TrainedNetwork, most: int | None = None) -> Table:
    """One row for each validation; of more than ``most`` the last ones."""
    history = network.history
    names = list(dict.fromkeys(name for row in history.validations for name in row if name != "step"))
    rows = []
    for row in history.validations[-most if most else 0 :]:
        best = row is history.best
        step = Cell(f"{int(row['step']):,}", row["step"], "best" if best else "")
        rows.append(Row([step, *(_rounded(row.get(name)) for name in names)]))
    columns = ["Step", *(name.replace("_", " ") for name in names)]
    return Table(f"Validations: {network.title}", columns, rows, sortable=True, sorted_by=None if most else 0)


def _rounded(value: float | None) -> Cell:
    """Four significant digits."""
    return number(None) if value is None or not math.isfinite(value) else Cell(f"{value:.4g}", value)


def _shown(picture: Picture) -> dict[str, Any]:
    step = "" if picture.step is None else f", step {picture.step:,}"
    return {"caption": f"picture {picture.number}{step}", "data": b64encode(picture.png).decode("ascii")}


# ---- plots -----------------------------------------------------------------------------------------------------------


_SIZE = (5.2, 2.9)


def _plots(network: TrainedNetwork) -> list[Markup]:
    history = network.history
    plots = _validation_plots(network)
    plots += _over_steps(history.steps, history.loss, "training loss", with_range=True)
    plots += _over_steps(history.steps, history.gradient_norm, "gradient norm", with_range=True)
    if len(network.rates[0]):
        line = Line("", *network.rates, points=False)
        now = (float(history.step), "now") if network.state != "finished" and history.step else None
        plots.append(line_plot([line], "step", "learning rate", "learning rate over steps", mark=now, size=_SIZE))
    return plots + _over_steps(history.steps, history.step_seconds, "seconds a step", with_range=False)


def _over_steps(steps: Values, values: Values, name: str, with_range: bool) -> list[Markup]:
    points = binned(steps, values)
    if not len(points.steps):
        return []
    logarithmic = "y" if _spans_decades(points.middle) else ""
    low, high = (points.low, points.high) if with_range else ((), ())
    line = Line("", points.steps, points.middle, low, high, points=False)
    return [line_plot([line], "step", name, f"{name} over steps", logarithmic=logarithmic, size=_SIZE)]


def _validation_plots(network: TrainedNetwork) -> list[Markup]:
    """The numbers of the validations: shares in common plots, each other number in its own."""
    rows, best = network.history.validations, network.history.best
    mark = None if best is None else (best["step"], "best")
    left_out = {"step", "learning_rate", "score" if network.validates_loss else "loss"}
    names = dict.fromkeys(name for row in rows for name in row if name not in left_out)
    series = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    shares = [
        name
        for name, points in series.items()
        if name not in ("score", "loss") and all(0 <= value <= 1 for _, value in points)
    ]
    groups = [[name] for name in names if name not in shares]
    count = -(-len(shares) // len(COLOURS))
    groups += [shares[i * len(shares) // count : (i + 1) * len(shares) // count] for i in range(count)]
    plots = []
    for group in groups:
        lines = [
            Line(name.replace("_", " "), [x for x, _ in points], [y for _, y in points], colour=i, style=i)
            for i, (name, points) in enumerate((name, series[name]) for name in group)
        ]
        up = f"validation {lines[0].name}" if len(lines) == 1 else "validation"
        about = f"validation: {', '.join(line.name for line in lines)}"
        size = (_SIZE[0], _SIZE[1] + 0.4 * (len(lines) > 1))
        plots.append(line_plot(lines, "step", up, about, mark=mark, size=size))
    return plots


def _spans_decades(values: Values) -> bool:
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() > 20 * known.min())

"""`medseg report`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ._options import STDOUT, AsJson, Markdown, Quiet, existing, require_one_on_stdout
from ._shared import fail, print_json, write_markdown


def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run folder of a training.", callback=existing("a run folder")),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Page to write; default: RUN/report.html.")
    ] = None,
    markdown: Markdown = None,
    quiet: Quiet = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about a training, finished or running: curves, pictures, data, and the command that continues it."""
    require_one_on_stdout(markdown, as_json)
    from medseg_diffusion.reports.run_page import run_markdown, run_sentences
    from medseg_diffusion.workflows.report import report as run_report

    command = shlex.join(["medseg", *sys.argv[1:]])
    page, summary = run_report(run, output, command=command)
    now = time.time()
    write_markdown(markdown, lambda: run_markdown(summary, now=now, command=command))
    if as_json:
        networks = [
            {"network": one.title, "state": one.state, "step": one.history.step, "max_steps": one.max_steps}
            for one in summary.networks
        ]
        content = {"report": page, "state": summary.state, "networks": networks, "commands": summary.commands}
        print_json({**content, "warnings": summary.warnings})
    elif not quiet and markdown != STDOUT:
        for sentence in run_sentences(summary, now):
            typer.echo(sentence)
        for purpose, line in summary.commands.items():
            typer.echo(f"{purpose}:\n    {line}")
        typer.echo(f"report: {page}")
    for warning in () if quiet else summary.warnings:
        fail(warning, kind="warning")

"""Entry point of `medseg`: registers the commands, and turns expected failures into one line and an exit code."""

from __future__ import annotations

import io
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medseg_diffusion.errors import MedsegError, Stopped, UsageError

from . import (
    anomaly,
    benchmark_segmenter,
    calibrate_anomaly,
    calibrate_segmenter,
    check,
    configs,
    evaluate,
    evaluate_generator,
    info,
    models,
    report,
    sample,
    segment,
    synthesize_anomalies,
    train_anomaly,
    train_generator,
    train_pixel_classifier,
    train_segmenter,
)
from ._shared import fail


class _Group(TyperGroup):
    """A command group that prints an expected failure as one line on stderr instead of a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # A name that the terminal cannot print must not end a batch. Where Python was told of another way, it stays.
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # As a path, an empty text would be the current folder.
        if "" in args and not ctx.resilient_parsing:
            raise UsageError(
                "an argument is empty, perhaps a variable that is not set; give it a value or leave it out"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MedsegError as error:
            fail(str(error), kind="stopped" if isinstance(error, Stopped) else "error")
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError:  # `medseg configs list | head`: click ends in silence
            raise
        except OSError as error:  # a full disk, a folder that cannot be written to, ...
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            fail("interrupted", kind="stopped")
            raise typer.Exit(130) from error


# Groups of commands in the help.
SCANS, RESULTS = "Use a model", "Measure and report"
TRAINING, FILES = "Train and calibrate", "Data, configurations and models"

app = typer.Typer(
    name="medseg",
    cls=_Group,
    help="Medical image segmentation with diffusion models. For research only, not for clinical use.",
    epilog="Exit codes: 0 done, 1 some cases failed, 2 wrong usage, 3 bad input, 4 model missing or unusable, "
    "75 a training stopped by SIGTERM or SIGUSR1 can be continued, 130 or 143 stopped by Ctrl-C or SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("segment", rich_help_panel=SCANS)(segment.segment)
app.command("anomaly", rich_help_panel=SCANS)(anomaly.anomaly)
app.command("sample", rich_help_panel=SCANS)(sample.sample)
app.command("evaluate", rich_help_panel=RESULTS)(evaluate.evaluate)
app.command("benchmark-segmenter", rich_help_panel=RESULTS)(benchmark_segmenter.benchmark_segmenter)
app.command("evaluate-generator", rich_help_panel=RESULTS)(evaluate_generator.evaluate_generator)
app.command("report", rich_help_panel=RESULTS)(report.report)
app.command("train-segmenter", rich_help_panel=TRAINING)(train_segmenter.train_segmenter)
app.command("train-generator", rich_help_panel=TRAINING)(train_generator.train_generator)
app.command("train-anomaly", rich_help_panel=TRAINING)(train_anomaly.train_anomaly)
app.command("train-pixel-classifier", rich_help_panel=TRAINING)(train_pixel_classifier.train_pixel_classifier)
app.command("calibrate-segmenter", rich_help_panel=TRAINING)(calibrate_segmenter.calibrate_segmenter)
app.command("calibrate-anomaly", rich_help_panel=TRAINING)(calibrate_anomaly.calibrate_anomaly)
app.command("synthesize-anomalies", rich_help_panel=TRAINING)(synthesize_anomalies.synthesize_anomalies)
app.add_typer(configs.app, name="configs", rich_help_panel=FILES)
app.add_typer(models.app, name="models", rich_help_panel=FILES)
app.command("check", rich_help_panel=FILES)(check.check)
app.command("info", rich_help_panel=FILES)(info.info)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"medseg {version('medseg-diffusion')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...

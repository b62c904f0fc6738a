"""Entry point of `medseg`: registers the commands, and turns expected failures into one line and an exit code."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medseg_diffusion.errors import MedsegError

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

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MedsegError as error:
            fail(str(error))
            raise typer.Exit(error.exit_code) from error
        except OSError as error:  # a full disk, a folder that cannot be written to, ...
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            fail("interrupted", kind="stopped")
            raise typer.Exit(130) from error


app = typer.Typer(
    name="medseg",
    cls=_Group,
    help="Medical image segmentation with diffusion models. For research only, not for clinical use.",
    epilog="Exit codes: 0 done, 1 some cases failed, 2 wrong usage, 3 bad input, 4 model missing or unusable, "
    "130 or 143 stopped by Ctrl-C or SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train-generator")(train_generator.train_generator)
app.command("sample")(sample.sample)
app.command("evaluate-generator")(evaluate_generator.evaluate_generator)
app.command("segment")(segment.segment)
app.command("train-segmenter")(train_segmenter.train_segmenter)
app.command("train-pixel-classifier")(train_pixel_classifier.train_pixel_classifier)
app.command("benchmark-segmenter")(benchmark_segmenter.benchmark_segmenter)
app.command("train-anomaly")(train_anomaly.train_anomaly)
app.command("calibrate-anomaly")(calibrate_anomaly.calibrate_anomaly)
app.command("calibrate-segmenter")(calibrate_segmenter.calibrate_segmenter)
app.command("anomaly")(anomaly.anomaly)
app.command("synthesize-anomalies")(synthesize_anomalies.synthesize_anomalies)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.add_typer(configs.app, name="configs")
app.add_typer(models.app, name="models")
app.command("check")(check.check)
app.command("info")(info.info)


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

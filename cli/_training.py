"""What the training commands share: their processes, the signals that end them, and what they print at the end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from medseg_diffusion.errors import Stopped, UsageError

from ._launchers import TORCHRUN, is_task, rendezvous
from ._shared import ProgressCallback, fail, print_json, print_table, progress

if TYPE_CHECKING:
    from medseg_diffusion.training.trainer import Outcome

Config = TypeVar("Config")


def start_processes(gpus: int, device: str) -> None:
    """Train in several processes if asked to, or if a launcher has started this one together with others.

    Of a launcher (torchrun, srun, Kubernetes) this process joins the others. Otherwise, with ``gpus`` above 1, the
    command is run again in so many processes of this machine, and ends here with their exit code.

    Raises:
        UsageError: variables that are missing or contradict each other, or --gpus.
    """
    from medseg_diffusion.training.interrupt import stopped_by_signals
    from medseg_diffusion.training.launch import launch

    found = rendezvous(os.environ)
    count = int(found.get("WORLD_SIZE", "1"))
    if max(gpus, count) > 1 and device.startswith("cuda:"):
        raise UsageError(f"--device {device}: several processes take one GPU each; leave it out, or use --device cuda")
    if count == 1 and gpus > 1 and "RANK" not in os.environ:
        with stopped_by_signals("stopped before the training"):
            raise typer.Exit(launch(sys.argv, gpus, device))
    if gpus not in (1, count):
        raise UsageError(
            f"--gpus {gpus}, but the launcher has started {count} {'process' if count == 1 else 'processes'} "
            "(WORLD_SIZE, SLURM_NTASKS); leave --gpus out: each process takes one GPU"
        )
    if count == 1:  # nothing distributed is initialised for a single process
        for name in TORCHRUN:
            os.environ.pop(name, None)
    os.environ.update(found)
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if count == 1 and tasks not in ("", "1") and not is_task(os.environ):
        fail(f"SLURM_NTASKS is {tasks}, but srun has not started this process: it trains alone", kind="warning")


def configured(
    load: Callable[[str, Sequence[str]], Config], config: str, overrides: Sequence[str] | None, quiet: bool | None
) -> Config:
    """The configuration of a training. The first of several processes prints its warnings as lines."""
    from medseg_diffusion.training.launch import is_first

    with progress(quiet if is_first() else True):
        return load(config, overrides or [])


@contextmanager
def training(run: Path, quiet: bool | None, resumable: bool = True) -> Iterator[ProgressCallback]:
    """Yield the progress callback of a training; signals end it with the command to go on, and warnings are printed.

    Only the first of several processes shows anything but errors.

    Args:
        run: The run folder.
        quiet: See `progress`.
        resumable: Whether the command has --resume. Otherwise it is to be repeated.
    """
    from medseg_diffusion.training.interrupt import stopped_by_signals
    from medseg_diffusion.training.launch import is_first

    quiet = quiet if is_first() else True
    try:
        with progress(quiet) as show, stopped_by_signals("stopped outside of the training loop"):
            yield show
    except Stopped as error:
        if not is_first():  # the first process says it for all
            raise typer.Exit(error.exit_code) from error
        raise Stopped(f"{error}; continue with: {again(run, resumable)}") from error


def again(run: Path, resumable: bool = True) -> str:
    """This command, to go on: with --resume if the run has started, and without the limit of its steps."""
    arguments = sys.argv[1:]
    for i in reversed(range(len(arguments))):
        if arguments[i] == "--max-steps":
            del arguments[i : i + 2]
        elif arguments[i].startswith("--max-steps="):
            del arguments[i]
    if resumable and (run / "config.yaml").is_file() and "--resume" not in arguments:
        arguments.append("--resume")
    return shlex.join(["medseg", *arguments])


@dataclass
class Trained:
    """What is printed at the end of a command: of each training of the run what it has reached, and what comes next.

    Attributes:
        run: The run folder.
        use: The command that uses the model; MODEL stands for its path.
        outcomes: Of every training of the command, in their order; to be filled by ``on_outcome``.
    """

    run: Path
    use: str
    outcomes: list[Outcome] = field(default_factory=list)

    def next(self, model: Path) -> str:
        """The next command: to use the model, or to go on if a limit has ended one of the trainings."""
        if any(outcome.ended != "finished" for outcome in self.outcomes):
            return again(self.run)
        return self.use.replace("MODEL", shlex.quote(str(model)))

    def entries(self, model: Path) -> dict[str, Any]:
        """The end of a training for --json."""
        return {"model": model, "trainings": [asdict(outcome) for outcome in self.outcomes], "next": self.next(model)}

    def lines(self, model: Path) -> list[str]:
        """The end of a training as lines of text."""
        lines = [line for outcome in self.outcomes for line in self._lines_of(outcome)]
        return [*lines, f"model: {model}", f"next: {self.next(model)}"]

    def _lines_of(self, outcome: Outcome) -> Sequence[str]:
        name = "" if outcome.run == self.run else f"{outcome.run.relative_to(self.run)}: "
        reason = {"finished": "finished", "max_steps": "ended by --max-steps", "time_limit": "ended by --time-limit"}
        first = f"{name}{outcome.steps} of {outcome.planned} steps, {reason[outcome.ended]}"
        if not outcome.best:
            return [first]
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in outcome.best.items() if key != "step")
        return [first, f"{name}best at step {outcome.best['step']:.0f}: {numbers}"]


def print_trained(
    trained: Trained,
    model: Path,
    quiet: bool | None,
    as_json: bool,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
) -> None:
    """Print the end of a training, and ``tables`` of results by their key; only the first of several processes does."""
    from medseg_diffusion.training.launch import is_first

    if not is_first():
        return
    if as_json:
        print_json({**trained.entries(model), **tables})
    elif not quiet:
        for rows in tables.values():
            print_table(rows)
        for line in trained.lines(model):
            typer.echo(line)

"""Every command in the documentation is one that the command line takes: names, options, values, presets, keys."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from medseg_diffusion.config.load import load_config, presets
from tests.helpers.docs import ROOT, Block, Line, blocks, calls, lines_of, markdown_files, name_of, pages, spans
from tests.helpers.site import hooks

COMMANDS = {name: command for name, _, command in hooks().commands()}
PLACEHOLDERS = {
    "...",
    "RUN...",
    "CONFIG",
    "PRESET",
    "NAME",
    "SCAN",
    "MODEL",
    "DATA",
    "RUN",
    "FILE",
    "COMMAND",
    "D",
    "IMAGES",
}
"""Words that stand for what a reader types."""


def problem(words: tuple[str, ...]) -> str | None:
    """What is wrong with the words after `medseg`, or None."""
    if not words or words == ("--version",) or words == ("--help",):
        return None
    size = 2 if " ".join(words[:2]) in COMMANDS else 1
    command = COMMANDS.get(" ".join(words[:size]))
    if command is None:
        groups = {name.partition(" ")[0] for name in COMMANDS}
        return (
            None if words[0] in PLACEHOLDERS or (len(words) == 1 and words[0] in groups) else f"no command {words[0]}"
        )
    rest = [word for word in words[size:] if word != "..." and not word.startswith("$")]
    callbacks = [(parameter, parameter.callback) for parameter in command.params]
    for parameter, _ in callbacks:  # they look for files
        parameter.callback = None
    try:
        values = command.make_context(" ".join(words[:size]), list(rest)).params
    except Exception as error:  # of typer's own copy of click, or of click
        if type(error).__name__ == "MissingParameter" and len(rest) < len(words[size:]):
            return None
        return str(getattr(error, "message", None) or error) or type(error).__name__
    finally:
        for parameter, callback in callbacks:
            parameter.callback = callback
    return _configuration(values)


def _configuration(values: dict[str, object]) -> str | None:
    """What is wrong with a preset and the keys of --set."""
    config = values.get("config")
    if not isinstance(config, str) or config in PLACEHOLDERS or Path(config).suffix == ".yaml":
        return None
    if config not in presets():
        return f"no preset {config}"
    try:
        load_config(config, values.get("overrides") or [])  # type: ignore[arg-type]
    except Exception as error:
        return str(error)
    return None


def commands_of(page: Path) -> list[tuple[Block, Line]]:
    return [
        (block, call)
        for block in blocks(page)
        if block.language in ("bash", "sh", "shell")
        for line in lines_of(block.text)
        for call in calls(line)
    ]


@pytest.mark.parametrize("page", [page for page in markdown_files() if "medseg " in page.read_text()], ids=name_of)
def test_commands_are_known(page: Path) -> None:
    wrong = [f"{block.place}: {text}" for block, call in commands_of(page) if (text := problem(call.words))]
    assert wrong == []


def _span_problem(span: str) -> str | None:
    """What is wrong with a command in the running text: it may be a part, but not a wrong one."""
    words = shlex.split(span.replace("|", " "))[1:]
    size = 2 if " ".join(words[:2]) in COMMANDS else 1
    command = COMMANDS.get(" ".join(words[:size]))
    if command is None:
        return problem(tuple(words[:1]))
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [
        word for word in words[size:] if word.startswith("-") and word not in ("-", "--help") and word not in known
    ]
    return f"{words[0]} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", [page for page in markdown_files() if spans(page)], ids=name_of)
def test_commands_in_the_text_are_known(page: Path) -> None:
    assert [f"{span}: {text}" for span in spans(page) if (text := _span_problem(span))] == []


def test_what_is_wrong_is_found() -> None:
    good = "train-segmenter ensemdiff-hippocampus-small --data D -o RUN --set training.max_steps=3"
    assert problem(tuple(good.split())) is None
    for wrong, text in {
        "segmnt scan.nii.gz": "no command segmnt",
        "segment scan.nii.gz --ensembles 3": "--ensembles",
        "segment scan.nii.gz --fusion median": "median",
        "train-segmenter ensemdiff-hippocampus-small -o RUN": "data",
        good.replace("small", "tiny"): "no preset",
        good.replace("max_steps", "steps"): "unknown key",
        "sample m -o DIR and more": "more",
    }.items():
        assert text in (problem(tuple(wrong.split())) or ""), wrong
    assert _span_problem("medseg segment -m RUN") is None
    assert "--modell" in (_span_problem("medseg segment --modell RUN") or "")


def test_marks_are_known_and_have_a_reason() -> None:
    """A misspelt comment would leave a block out, or run it."""
    marked = [block for page in markdown_files() for block in blocks(page) if block.mark]
    assert marked
    assert [block.place for block in marked if block.mark not in ("not run", "slow") or len(block.reason) < 8] == []


def test_blocks_say_their_language() -> None:
    """A block without one would neither be run nor parsed. Cards of models are made by a template."""
    found = [block for page in pages() if page.name != "README.md" or page.parent == ROOT for block in blocks(page)]
    assert [block.place for block in found if block.language not in ("bash", "python", "text", "yaml")] == []


def test_the_parts_of_a_line() -> None:
    line = "resume=1 srun --kill=0 medseg segment a.nii.gz --pattern '*.gz' > out.txt && medseg info  # more medseg"
    assert list(calls(line)) == [Line(("segment", "a.nii.gz", "--pattern", "*.gz"), "out.txt"), Line(("info",))]
    assert lines_of("a \\\n   b\n\n# c\nd") == ["a b", "d"]
    assert len(ROOT.joinpath("README.md").read_text().splitlines()) <= 90  # one screen and a half

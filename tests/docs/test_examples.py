"""The code and commands of README.md and docs/ are run, page by page, on small files of the names that they use.

A training takes a step or two here: words are added to the documented ones (`fewer`), none is taken away.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig
from medseg_diffusion.config.load import load_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from tests.helpers import example_data
from tests.helpers.cli import medseg
from tests.helpers.docs import RECORDS, Block, Line, blocks, calls, lines_of, name_of, pages
from tests.helpers.generators import QUIET
from tests.helpers.site import hooks

DEVICES = {
    name for name, _, command in hooks().commands() if any("--device" in parameter.opts for parameter in command.params)
}
"""Commands with --device."""

# ---- fewer steps -----------------------------------------------------------------------------------------------------

TRAINING = (
    "max_steps=1",
    "batch_size=2",
    "validate_every=1",
    "warmup_steps=1",
    "precision=fp32",
    "channels_last=false",
)


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def of_training(words: tuple[str, ...]) -> list[str]:
    """Words that make a training of a configuration take a second."""
    settings = load_config(words[1])
    if isinstance(settings, SegmenterConfig):
        window = "[16,16,8]" if len(settings.data.window) == 3 else str(list(settings.data.window))
        calibration = ["calibration"] if settings.data.calibration_cases else []
        sides = (f"data.{side}_cases=1" for side in ("test", "validation", *calibration))
        network = ("network.channels=8", "network.num_res_blocks=1")
        inference = ("inference.steps=1", "inference.ensemble=2", f"data.window={window}")
        return sets(*(f"training.{one}" for one in TRAINING), *sides, *network, *inference)
    if isinstance(settings, GeneratorConfig):
        large = settings.data.size in (64, 128) and "data.size=32" not in words
        small = ["data.size=32" if large else "data.size=16"]  # a cascade stays one
        held_out = ["data.validation_images=1", *(["data.test_images=1"] if settings.data.test_images else [])]
        first = [f"autoencoder={short_autoencoder(settings.autoencoder)}"] if settings.autoencoder else []
        return sets(*(f"training.{one}" for one in TRAINING), *held_out, *small, *first, "sampling.steps=2")
    if isinstance(settings, AnomalyConfig):
        inner = ("data.size=16", "data.test_images=2", "data.validation_images=2")
        training = (f"training.{one}" for one in TRAINING)
        return sets(*(f"generator.{one}" for one in (*inner, *training)), "partial_noise.draws=1")
    return []


def short_autoencoder(name: str) -> str:
    """A file of the configuration ``name`` that trains for a step: --max-steps does not shorten a first stage."""
    config = load_config(name, [f"training.{one}" for one in TRAINING])
    file = Path("autoencoder.yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(file)


def fewer(words: tuple[str, ...]) -> list[str]:
    """Words that make a command quick."""
    name, more = words[0], []
    if name in ("train-segmenter", "train-generator", "train-anomaly"):
        more = [*of_training(words), "--max-steps", "1"]
    elif name == "train-pixel-classifier":
        more = sets("classifier.members=2", "classifier.min_steps=1", "classifier.max_epochs=4", "data.copies=1",
                    "data.pixels_per_class=50", "features.times=[50]")  # fmt: skip
    elif name == "sample":
        more = ["--steps", "2", "-n", "4"]
    elif name == "evaluate-generator":
        more = ["--samplers", "ddim:2,ddpm:2", "-n", "8", "--extractor", "features.onnx"]
    elif name == "benchmark-segmenter":
        more = ["-n", "2"]
    elif name == "segment" and not {"-m", "brain.nii.gz"} & set(words):
        more = ["-m", "runs/tiny"]  # in the place of the built-in model, which takes seconds for each scan
    return [*more, *(["--device", "cpu"] if name in DEVICES else [])]


def run_command(call: Line) -> str:
    """What a command prints; it must end well."""
    result = medseg(*call.words, *fewer(call.words))
    if call.output is not None:
        Path(call.output).write_text(result.stdout)
    assert result.exit_code == 0, f"medseg {' '.join(call.words)}\n{result.output}{result.stderr}\n{result.exception!r}"
    return result.output


def run_block(block: Block, namespace: dict[str, object]) -> None:
    """Run a block: Python in the namespace of its page, shell line by line."""
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), namespace)
        return
    for line in lines_of(block.text):
        found = list(calls(line))
        assert len(found) == 1 and line.startswith("medseg "), (
            f"{block.place}: {line}: is no call of medseg; mark the block"
        )
        run_command(found[0])


def code_of(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("bash", "python")]


# ---- pages -----------------------------------------------------------------------------------------------------------

SLOW = {
    "docs/tutorials/generators.md": "five trainings of generators",
    "docs/tutorials/few-labels.md": "a generator and its classifiers",
}
PAGES = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
    for page in pages()
    if not page.is_relative_to(RECORDS) and any(not block.mark for block in code_of(page))
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that all pages start from, and the model that several pages take as trained."""
    folder = tmp_path_factory.mktemp("prepared")
    example_data.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = ("--data", "Task04_Hippocampus", "-o", "runs/hippocampus")
        run_command(Line(("train-segmenter", "ensemdiff-hippocampus-small", *data)))
    return folder


@pytest.fixture
def folder(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A copy of the files for one page, as the current folder."""
    copy = tmp_path / "here"
    shutil.copytree(prepared, copy)
    page = getattr(request.node, "callspec", None)
    if page is not None and "-o runs/hippocampus" in page.params["page"].read_text():
        shutil.rmtree(copy / "runs" / "hippocampus")  # it makes its own
    monkeypatch.chdir(copy)
    yield copy
    shutil.rmtree(copy)


@QUIET
@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")  # MONAI's reader of scans says what it lacks
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: Path, folder: Path) -> None:
    """Every command ends with exit code 0 (`run_command` asserts it), and no Python raises."""
    namespace: dict[str, object] = {"__name__": "page"}
    run = [block for block in code_of(page) if not block.mark]
    for block in run:
        run_block(block, namespace)
    assert run, "a page without code has no test"


@QUIET
@pytest.mark.slow
def test_slow_code_runs(folder: Path) -> None:
    """As above, for the blocks that are marked slow."""
    slow = [block for page in pages() for block in code_of(page) if block.mark == "slow"]
    for block in slow:
        run_block(block, {"__name__": "page"})
    assert slow, "no block is marked slow: remove the mark and this test"


def test_a_block_that_cannot_run_is_noticed(folder: Path) -> None:
    for language, text in {"bash": "pip install .\n", "python": "1 / 0\n"}.items():
        with pytest.raises((AssertionError, ZeroDivisionError)):
            run_block(Block(RECORDS, 1, language, text), {})
    with pytest.raises(AssertionError, match="no such file"):
        run_block(Block(RECORDS, 1, "bash", "medseg segment nowhere.nii.gz\n"), {})

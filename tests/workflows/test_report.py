"""`medseg report`: a page about a training run of any kind, finished, stopped or going on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest

from medseg_diffusion.workflows.report import _uses, report, run_summary
from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers import pixel_classifiers, training
from tests.helpers.cli import error_lines, medseg
from tests.helpers.generators import QUIET

pytestmark = QUIET
LATER = time.time() + 86_400
"""When every training of these tests has logged nothing for long."""


@pytest.fixture(scope="module")
def stopped(block_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter that was stopped at step 2 of 4."""
    run = tmp_path_factory.mktemp("runs") / "stopped run"
    train_segmenter(training.config(), block_scans, run, max_steps=2, device="cpu")
    return run


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_command_on_the_page_continues_a_stopped_run(stopped: Path, block_scans: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "a run")
    summary = run_summary(run, LATER)
    assert summary.state == "stopped" and summary.networks[0].history.step == 2
    (line,) = summary.commands.values()
    program, *arguments = [str(block_scans) if part == "DATA" else part for part in shlex.split(line)]
    assert program == "medseg"
    result = medseg(*arguments)
    assert result.exit_code == 0, result.output
    summary = run_summary(run, LATER)
    assert summary.state == "finished" and summary.networks[0].history.step == 4
    assert any(line.startswith("medseg segment SCAN -m") for line in summary.commands.values())
    for line in summary.commands.values():
        assert medseg(shlex.split(line)[1], "--help").exit_code == 0


def test_the_page_of_a_segmenter(stopped: Path, tmp_path: Path) -> None:
    before = contents(stopped)
    page, summary = report(stopped, tmp_path / "page.html", command="medseg report")
    text = page.read_text()
    assert contents(stopped) == before, "a run that may be going on is not touched"
    # score, one class, loss, gradient norm, learning rate, seconds
    assert text.count("<svg") == 6 and "Configuration" in text and "max_steps: 4" in text
    assert summary.sides == {"train": (4, 4), "validation": (1, 1), "test": (1, 1), "calibration": (None, 0)}
    assert summary.networks[0].rates[0][-1] == 4 and summary.networks[0].rates[1][0] > 0
    assert summary.model["weights"] == "of step 2" and "The score is the mean Dice over the classes." in text


def test_a_run_goes_on_while_it_logs(stopped: Path, tmp_path: Path) -> None:
    written = run_summary(stopped, LATER).networks[0].history.written
    summary = run_summary(stopped, written + 60)
    assert summary.state == "going on" and "Should it be stopped, continue with" in summary.commands
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(stopped / "config.yaml", begun)
    page, summary = report(begun, tmp_path / "page.html")
    assert summary.state == "stopped" and "Nothing has been logged yet." in page.read_text()


def test_warnings_are_not_on_the_page_alone(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose losses were not finite looked sound on the command line and in JSON."""
    monkeypatch.setattr(
        "medseg_diffusion.workflows.report._warnings", lambda networks: ["9 steps have no finite loss."]
    )
    command = ("report", stopped, "-o", tmp_path / "page.html")
    assert error_lines(medseg(*command)) == ["medseg: warning: 9 steps have no finite loss."]
    assert json.loads(medseg(*command, "--json").stdout)["warnings"] == ["9 steps have no finite loss."]
    assert not error_lines(medseg(*command, "--quiet"))


def test_both_stages_of_a_latent_segmenter(block_scans: Path, tmp_path: Path) -> None:
    train_segmenter(training.latent_config(), block_scans, tmp_path / "run", device="cpu")
    page, summary = report(tmp_path / "run", tmp_path / "page.html")
    first, second = summary.networks
    assert (first.max_steps, first.history.step, second.max_steps, second.history.step) == (6, 6, 4, 4)
    assert "against their reconstructions" in first.score and summary.state == "finished"
    assert page.read_text().index("Autoencoder of masks (first stage)") < page.read_text().index("<h2>Segmenter</h2>")


def test_generators_show_their_pictures(image_models: dict[str, Path], tmp_path: Path) -> None:
    for name, kind in (("pixel", "Generator (pixel)"), ("autoencoder", "Autoencoder of images"), ("latent", "latent")):
        page, summary = report(image_models[name].parent, tmp_path / f"{name}.html")
        text = page.read_text()
        assert kind in summary.kind and summary.state == "finished"
        assert text.count("data:image/png;base64") == 1 and "picture 1, step 2" in text
        assert ("Images beside their reconstructions" in text) == (name == "autoencoder")
        assert "loss is that of the validation images" in text and "Traceback" not in text
    assert run_summary(image_models["latent"].parent, LATER).commands["Sample"].startswith("medseg sample")


def test_a_first_stage_that_began_alone_is_a_run(image_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(image_models["autoencoder"].parent, tmp_path / "run" / "autoencoder")
    summary = run_summary(tmp_path / "run", LATER)
    assert [network.title for network in summary.networks] == ["Autoencoder (first stage)"]
    assert summary.state == "stopped" and "train-generator CONFIG --data DATA" in next(iter(summary.commands.values()))


def test_the_networks_of_an_anomaly_model(anomaly_models: dict[str, Path], tmp_path: Path) -> None:
    latent = run_summary(anomaly_models["latent"].parent, LATER)
    assert [one.title for one in latent.networks] == ["Generator: Autoencoder (first stage)", "Generator"]
    assert latent.state == "finished" and sum(counts[0] or 0 for counts in latent.sides.values()) == 8
    assert latent.commands["Find anomalies"].startswith("medseg anomaly SCAN -m")
    run = shutil.copytree(anomaly_models["classes"].parent, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    stopped = run_summary(run, LATER)
    assert [one.title for one in stopped.networks] == ["Generator", "Classifier"]
    (line,) = stopped.commands.values()
    assert "--healthy DATA --exclude-labelled 2 --unhealthy UNHEALTHY" in line


def test_a_pixel_classifier_has_no_steps(box_scans: Path, box_generators: dict[int, Path], tmp_path: Path) -> None:
    config = pixel_classifiers.quick()
    train_pixel_classifier(config, box_generators[2], box_scans, 2, tmp_path / "run", test=False, device="cpu")
    page, summary = report(tmp_path / "run", tmp_path / "page.html")
    assert summary.state == "finished" and not summary.networks and "labelled images" in summary.data
    assert "It is finished." in page.read_text()


@pytest.mark.parametrize("kind", ["empty", "model", "file", "broken", "list"])
def test_what_is_no_run_is_one_line(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind in ("broken", "list"):
        (folder / "config.yaml").write_bytes({"broken": b"a: [", "list": b"- a\n"}[kind])
    (tmp_path / "file").touch()
    target = {"model": tiny_model, "file": tmp_path / "file"}.get(kind, folder)
    before = sorted(target.rglob("*"))
    result = medseg("report", target)
    lines = error_lines(result)
    assert result.exit_code == 3 and len(lines) == 1 and "expected" in lines[0], result.output
    assert sorted(target.rglob("*")) == before


def test_damage_and_older_versions_leave_what_can_be_read(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace("max_steps: 4", "max_steps: 4\n  gone_key: 3\n  decay_: x")
    (run / "config.yaml").write_text(config)
    (run / "split.json").write_text('{"train": ["a"')
    (run / "model" / "model.json").write_text("{")
    (run / "samples").mkdir()
    (run / "samples" / "001.png").write_bytes(b"\x89PNG half")
    page, summary = report(run, tmp_path / "page.html")
    assert summary.networks[0].max_steps == 4 and not summary.sides and not summary.model
    assert "There is no model yet" in page.read_text()


def test_hostile_names_are_inert(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "<img src=x onerror=alert(1)>")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub("^description:.*$", "description: </p><script>x()", config, flags=re.M))
    result = medseg("report", run, "--markdown", tmp_path / "summary.md", "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    page, text = (tmp_path / "page.html").read_text(), (tmp_path / "summary.md").read_text()
    assert "<img" not in page and "&lt;img src=x" in page and "<script>x()" not in page
    assert text.startswith("### Training run &lt;img") and "| 2 (best) |" in text


def test_the_command_prints_json_or_markdown_alone(stopped: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "page.html")
    printed = json.loads(medseg("report", stopped, *out, "--json").stdout)
    (network,) = printed["networks"]
    assert (network["network"], network["step"], network["max_steps"]) == ("Segmenter", 2, 4)
    assert printed["report"] == str(tmp_path / "page.html") and printed["state"] == network["state"]
    assert medseg("report", stopped, *out, "--markdown", "-").stdout.startswith("### Training run stopped run")
    assert medseg("report", stopped, *out, "--markdown", "-", "--json").exit_code == 2
    assert medseg("report", stopped, *out, "--markdown", tmp_path).exit_code == 2
    assert medseg("report", stopped, "-o", tmp_path).exit_code == 2


def test_the_page_lies_in_the_run_unless_it_is_named(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    os.utime(run / "config.yaml")
    assert medseg("report", run, "--quiet").output == "" and (run / "report.html").is_file()


def test_results_of_the_present_folder_are_named_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run, beside in ((Path("."), f"{tmp_path}-results"), (Path("runs/a"), "runs/a-results")):
        assert _uses(run, {"method": "concatenation"})["Segment"].endswith(f" -o {beside}")

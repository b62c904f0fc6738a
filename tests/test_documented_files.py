"""docs/reference/files.md names all columns and keys of the files that the commands write, and no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg_diffusion.files import write_json
from medseg_diffusion.methods.seen import SEEN
from medseg_diffusion.metrics.registry import METRICS
from medseg_diffusion.metrics.training_history import THROUGHPUT
from medseg_diffusion.models.image_source import SampleOptions
from medseg_diffusion.models.store import load_card, load_model_files, save_model
from medseg_diffusion.training.log import STEP_COLUMNS
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly
from medseg_diffusion.workflows.benchmark_segmenter import BenchmarkOptions, benchmark_segmenter
from medseg_diffusion.workflows.evaluate import EvaluateOptions, compare_predictions, evaluate
from medseg_diffusion.workflows.evaluate_generator import GeneratorEvaluationOptions, evaluate_generator
from tests.helpers import documented, segmenters, training
from tests.helpers.documented import assert_documented, names_in
from tests.helpers.masks import box
from tests.helpers.masks import save as save_mask
from tests.helpers.segmenters import calibrated, run, save, with_seen


def test_what_is_not_in_the_page_and_what_is_not_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the comparison itself: otherwise all the tests below could pass on an empty page."""
    page = tmp_path / "files.md"
    rows = ["| `a`, `b.<class>` | numbers |", "| `rows` | list |", "| `rows[].x.y` | number |", "| `any` | anything |"]
    page.write_text("\n".join(["# Files", "## one.json", "| key | content |", "|---|---|", *rows, "## two", ""]))
    monkeypatch.setattr(documented, "PAGE", page)
    good = {"a": 1, "b": {"left lung": 2}, "rows": [{"x": {"y": 3}}], "any": {"p": [{"q": 1}]}}

    def check(content: object) -> None:
        (tmp_path / "one.json").write_text(json.dumps(content))
        documented.assert_documented("one.json", tmp_path / "one.json")

    check(good)
    for more in ({"c": 1}, {"rows": [{"x": {"y": 3, "z": 4}}]}, {"rows": [{"w": 3}]}, {"a": {"inside": 1}, "a2": 1}):
        with pytest.raises(AssertionError, match="written, but not in the page"):
            check({**good, **more})
    for name in good:
        with pytest.raises(AssertionError, match="in the page, but not written"):
            check({key: value for key, value in good.items() if key != name})


# ---- evaluations ---------------------------------------------------------------------------------------------------


def test_the_metrics_of_an_evaluation() -> None:
    """The page repeats the registry: names, units, rules for empty masks and definitions."""
    page = documented.PAGE.read_text(encoding="utf-8")
    for metric in METRICS.values():
        values = (metric.both_empty, metric.prediction_empty, metric.reference_empty)
        rules = [value if isinstance(value, str) else f"{value:g}".replace("nan", "none") for value in values]
        cells = [f"`{metric.name}`", f"`{metric.key}`", metric.unit, metric.better, *rules, metric.definition]
        assert f"| {' | '.join(cells)} |" in page
    assert documented.documented("Metrics") == list(METRICS)


@pytest.fixture
def masks(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases with a score map, probabilities and a second rater."""
    for name in ("a", "b"):
        save_mask(tmp_path / "ref" / f"{name}.nii.gz", box(6))
        save_mask(tmp_path / "pred" / f"{name}_seg.nii.gz", box(4))
        save_mask(tmp_path / "other" / f"{name}_seg.nii.gz", box(5))
        p = np.where(box(4) == 1, 0.9, 0.1).astype(np.float32)
        save_mask(tmp_path / "pred" / f"{name}_prob.nii.gz", np.stack([1 - p, p], axis=-1))
        save_mask(tmp_path / "maps" / f"{name}_scores.nii.gz", p)
    (tmp_path / "table.csv").write_text("case,patient,site\na,p,north\nb,q,south\n")
    return tmp_path / "pred", tmp_path / "ref"


def test_the_files_of_an_evaluation(masks: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = masks
    table = tmp_path / "table.csv"
    options = EvaluateOptions(
        raters=[tmp_path / "other"], scores=tmp_path / "maps", patients=table, strata=(table, "site"), cldice=True
    )
    evaluate(pred, ref, tmp_path / "plain")
    evaluate(pred, ref, tmp_path / "all", options)
    for name in ("summary.json", "cases.csv"):
        assert_documented(name, tmp_path / "plain" / name, tmp_path / "all" / name)


def test_the_file_of_a_comparison(masks: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = masks
    save_mask(ref / "c.nii.gz", box(6))
    compare_predictions(
        [pred, tmp_path / "other"], ref, tmp_path / "out", EvaluateOptions(patients=tmp_path / "table.csv")
    )
    assert_documented("comparison.json", tmp_path / "out" / "comparison.json")


# ---- benchmarks and generators ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmarks(block_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The results on data of one reader, and on data of two."""
    root = tmp_path_factory.mktemp("benchmarks")
    sides = {"labels": ["bright"], "window": [8, 8, 8], "test_cases": 2, "validation_cases": 1}
    model = segmenters.make_model(root / "model", segmenters.tiny_config(data=sides))
    data = root / "two-readers"
    shutil.copytree(block_scans / "images", data / "images")
    for reader in "12":
        shutil.copytree(block_scans / "labels", data / "raters" / reader)
    options = BenchmarkOptions(settings=[("dpm++", 2, 2)], cases=2, side="test", device="cpu")
    for folder in (block_scans, data):
        benchmark_segmenter([str(model)], folder, root / f"of-{folder.name}", options)
    return sorted(root.glob("of-*"))


def test_benchmark_csv(benchmarks: list[Path]) -> None:
    assert_documented("benchmark.csv", *(folder / "benchmark.csv" for folder in benchmarks))


def test_benchmark_json(benchmarks: list[Path]) -> None:
    assert_documented("benchmark.json", *(folder / "benchmark.json" for folder in benchmarks))


def test_cases_csv_of_a_benchmark(benchmarks: list[Path]) -> None:
    assert_documented("cases.csv of a benchmark", *(folder / "cases.csv" for folder in benchmarks))


def test_scores_csv_and_json(
    pictures: Path, ball_scans: Path, ball_generator: Path, scoring_network: Path, tmp_path: Path
) -> None:
    def run(model: Path, reference: Path, output: str) -> Path:
        options = GeneratorEvaluationOptions([("ddim", 1)], SampleOptions(count=8, device="cpu"), str(scoring_network))
        evaluate_generator([str(model)], reference, tmp_path / output, options)
        return tmp_path / output

    images, volumes = run(pictures, pictures, "images"), run(ball_generator, ball_scans, "volumes")
    assert_documented("scores.csv", images / "scores.csv", volumes / "scores.csv")
    assert_documented("scores.json", images / "scores.json", volumes / "scores.json")


def test_volumes_statistics_and_failures(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a calibrated model with several members, which has all of the numbers, and of scans that fail."""
    monkeypatch.setattr("medseg_diffusion.workflows.segmentation_statistics.is_deterministic", lambda card: True)
    scans = [save(tmp_path / "in" / f"{name}.nii.gz") for name in ("a", "bb", "ccc")]
    scans[1].write_bytes(b"no scan")
    out = tmp_path / "out"
    model = calibrated(tiny_model, tmp_path / "known")
    run(scans, model, ensemble=3, output=out, volumes=True, statistics=True)
    assert_documented("volumes.csv", out / "volumes.csv")
    run(scans[:1], with_seen(model, voxel_mm={"R": [30, 40]}), output=tmp_path / "odd", statistics=True)
    assert_documented("*_statistics.json", out / "a_statistics.json", tmp_path / "odd" / "a_statistics.json")
    assert_documented("*_dseg.tsv", out / "dseg.tsv")


def test_anomalies(anomaly_scans: Path, anomaly_models: dict[str, Path], tmp_path: Path) -> None:
    scans = [anomaly_scans / "images" / f"s{i}.nii.gz" for i in (0, 1)]
    anomaly(scans, AnomalyOptions(str(anomaly_models["pixel"]), output=tmp_path, device="cpu", table=True))
    assert_documented("anomalies.csv", tmp_path / "anomalies.csv")
    saved = load_model_files(anomaly_models["pixel"])
    save_model(tmp_path / "odd", saved.card, saved.weights, "# card")
    with_seen(tmp_path / "odd", voxel_mm={"R": [30, 40]})
    anomaly(scans[:1], AnomalyOptions(str(tmp_path / "odd"), output=tmp_path / "2", device="cpu"))
    assert_documented("*_anomaly.json", tmp_path / "s0_anomaly.json", tmp_path / "2" / "s0_anomaly.json")


def test_what_a_model_has_seen(tmp_path: Path) -> None:
    """Of a model of volumes with contrast between its classes, and one of the middle of image files."""
    for name in ("brain-tissue-t1", "lung-nodule-ct"):
        write_json(tmp_path / f"{name}.json", load_card(name)[SEEN])
    assert_documented(
        "model.json: seen", *(tmp_path / f"{name}.json" for name in ("brain-tissue-t1", "lung-nodule-ct"))
    )


# ---- trainings -------------------------------------------------------------------------------------------------------


def test_the_log_of_a_training(tmp_path: Path) -> None:
    """Of a segmenter, with one validation case, on a device whose peak is not known."""
    (tmp_path / "data").mkdir()
    training.write_scans(tmp_path / "data")
    training.train_segmenter_in(str(tmp_path / "run"), str(tmp_path / "data"))
    columns = names_in(tmp_path / "run" / "log.csv") | {"equal_predictions", "flop_utilisation"}
    assert {name.replace("<class>", "block") for name in documented.documented("log.csv")} == columns
    assert documented.documented("steps.csv") == [*STEP_COLUMNS]
    assert set(THROUGHPUT) <= columns

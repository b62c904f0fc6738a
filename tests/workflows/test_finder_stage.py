"""A segmenter with a finder: trained in two stages, resumed in either, and segmenting the box that the finder finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion import build
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.errors import UsageError
from medseg_diffusion.methods.seen import SEEN
from medseg_diffusion.models.bundle_network import BundleSegmenter, bundle_card, bundle_state
from medseg_diffusion.models.finder import NOT_FOUND
from medseg_diffusion.models.segmenter import MaskSegmenter
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows import export_onnx
from medseg_diffusion.workflows.report import report
from medseg_diffusion.workflows.train_segmenter import train_segmenter
from tests.helpers.brains import write_label_maps

CONTENT: dict[str, Any] = {
    "method": "baseline",
    "data": {
        "source": "brain-labelmaps", "window": [16, 16, 16], "test_cases": 0, "validation_cases": 1,
        "examples_per_map": 2,
    },
    "preprocessing": {"spacing_mm": [1.0, 1.0, 1.0]},
    "network": {"dims": 3, "channels": 8, "channel_mult": [1, 2], "norm_groups": 4},
    "finder": {
        "spacing_mm": 4.0, "window": [16, 16, 16], "margin_mm": 4.0, "batch_size": 2, "max_steps": 3,
        "network": {"dims": 3, "channels": 8, "channel_mult": [1, 2], "norm_groups": 4},
    },
    "training": {"batch_size": 1, "max_steps": 2, "validate_every": 2, "warmup_steps": 0},
}  # fmt: skip


def config(**changes: Any) -> SegmenterConfig:
    made = parse_config({**CONTENT, **changes}, "test")
    assert isinstance(made, SegmenterConfig)
    return made


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_label_maps(tmp_path_factory.mktemp("data") / "maps")


@pytest.fixture(scope="module")
def trained(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_segmenter(config(), maps, tmp_path_factory.mktemp("runs") / "run", device="cpu")


def scan(maps: Path) -> Volume:
    labels = nib.load(sorted(maps.glob("*.nii.gz"))[0])
    return Volume(torch.from_numpy(np.asarray(labels.dataobj, np.float32))[None], labels.affine)


def test_the_model_holds_both_networks_as_they_were_trained(trained: Path) -> None:
    saved, stage = load_model_files(trained), load_model_files(trained.parent / "finder" / "model")
    own = build.finder_weights(saved.weights)
    assert own.keys() == stage.weights.keys() and own
    assert all(torch.equal(own[name], stage.weights[name]) for name in own)
    assert 1 <= stage.card["training"]["step"] <= 3 and saved.card["training"]["step"] == 2
    assert set(saved.weights) == set(build.segmenter_weights(saved.weights)) | {build.FINDER + name for name in own}


def test_only_the_box_is_segmented(trained: Path, maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model sees is the box, scaled by the box; everything beyond it is certain background."""
    model, volume = MaskSegmenter(load_model_files(trained), torch.device("cpu")), scan(maps)
    assert model.finder is not None
    box = ((8, 40), (10, 38), (4, 44))
    monkeypatch.setattr(model.finder, "box", lambda volume, device: box)
    segmentation = model.segment(volume, maps=["probabilities"])
    assert segmentation.placement.box == box and segmentation.probabilities is not None
    within = torch.zeros(volume.shape, dtype=torch.bool)
    within[tuple(slice(*side) for side in box)] = True
    assert bool((segmentation.probabilities[0][~within] == 1).all())
    cut = Volume(volume.data[:, *(slice(*side) for side in box)].clone(), volume.affine)
    monkeypatch.setattr(model.finder, "box", lambda volume, device: None)
    alone = model.segment(cut, maps=["probabilities"])
    assert alone.probabilities is not None
    part = segmentation.probabilities[:, *(slice(*side) for side in box)]
    assert torch.equal(part, alone.probabilities)


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(trained: Path, maps: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = train_segmenter(config(), maps, run, device="cpu", max_steps=1)
    assert stopped == run / "model"
    model = train_segmenter(config(), maps, run, device="cpu", resume=True)
    expected = load_model_files(trained).weights
    assert all(torch.equal(value, expected[name]) for name, value in load_model_files(model).weights.items())


def test_a_run_that_ended_between_the_stages_goes_on(trained: Path, maps: Path, tmp_path: Path) -> None:
    """The time limit ends the first stage, too; a kill just after it leaves the same files."""
    run = tmp_path / "run"
    stopped = train_segmenter(config(), maps, run, device="cpu", time_limit_min=0.0)
    assert stopped == run / "finder" / "model" and not (run / "model").exists()
    model = train_segmenter(config(), maps, run, device="cpu", resume=True)
    expected = load_model_files(trained).weights
    assert all(torch.equal(value, expected[name]) for name, value in load_model_files(model).weights.items())


def test_a_run_starts_from_both_networks_of_a_model(trained: Path, maps: Path, tmp_path: Path) -> None:
    still = {"max_steps": 1, "learning_rate": 1e-12}
    changes = {"finder": {**CONTENT["finder"], **still}, "training": {**CONTENT["training"], **still}}
    model = train_segmenter(config(**changes), maps, tmp_path / "run", device="cpu", init=trained)
    started = load_model_files(trained).weights
    for name, value in load_model_files(model).weights.items():
        torch.testing.assert_close(value, started[name], rtol=0, atol=1e-6)


def test_a_scan_without_the_organ_is_marked(trained: Path, maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a model that knows nothing about its training scans."""
    saved = load_model_files(trained)
    model = MaskSegmenter(replace(saved, card={**saved.card, SEEN: {"scans": 5}}), torch.device("cpu"))
    assert model.finder is not None
    box = tuple((0, n) for n in scan(maps).shape)
    monkeypatch.setattr(model.finder, "box", lambda volume, device: box)
    assert model.segment(scan(maps)).unlike_training == ""
    monkeypatch.setattr(model.finder, "box", lambda volume, device: None)
    for seen in (model.seen, None):
        model.seen = seen
        segmentation = model.segment(scan(maps))
        assert segmentation.quality == "check"
        assert segmentation.unlike_training == f"unlike the training scans: {NOT_FOUND}"


def test_the_report_of_a_run_shows_both_stages(trained: Path, tmp_path: Path) -> None:
    page, summary = report(trained.parent, tmp_path / "page.html")
    finder, segmenter = summary.networks
    assert (finder.max_steps, finder.history.step, segmenter.max_steps, segmenter.history.step) == (3, 3, 2, 2)
    assert "organ in coarse validation windows" in finder.score and summary.state == "finished"
    assert page.read_text().index("Finder of the organ (first stage)") < page.read_text().index("<h2>Segmenter</h2>")


def test_an_onnx_file_says_that_it_has_no_finder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter itself, which takes long, is left out: it writes the metadata alone."""

    def write(network: object, inputs: object, metadata: dict[str, str], file: Path, saved: object) -> None:
        file.write_text(json.dumps(metadata))

    monkeypatch.setattr(export_onnx, "_write", write)
    monkeypatch.setattr(export_onnx, "_check", lambda *parts: None)
    with pytest.warns(UserWarning, match="holds the segmenter alone, without the finder"):
        file = export_onnx.export_onnx(trained, tmp_path / "model.onnx")
    assert json.loads(json.loads(file.read_text())["medseg.finder"])["margin_mm"] == 4.0


def test_a_bundle_finds_the_organ_as_the_model_does(trained: Path, maps: Path) -> None:
    saved = load_model_files(trained)
    bundle = BundleSegmenter(bundle_card(saved))
    bundle.load_state_dict(bundle_state(saved))
    volume = scan(maps)
    expected = MaskSegmenter(saved, torch.device("cpu")).segment(volume).labels
    assert torch.equal(bundle(volume.data[None])[0, 0], expected)


@pytest.mark.parametrize("other", [{"orientation": "LPS"}, {"intensity": "zscore"}, {"high": 99.0}])
def test_scans_are_prepared_as_the_synthetic_heads_are(other: dict[str, Any], maps: Path, tmp_path: Path) -> None:
    """In LPS, for example, the model would call the left side right."""
    changed = config(preprocessing={"spacing_mm": [1.0, 1.0, 1.0], **other})
    with pytest.raises(UsageError, match="makes heads in RAS, scaled by percentiles"):
        train_segmenter(changed, maps, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"window": [8, 8, 8], "labels": ["a"]}}, "needs data.source: brain-labelmaps"),
        ({"preprocessing": {"spacing_mm": [1.0, 1.0, 1.0], "crop_foreground": True}}, "crop_foreground: false"),
        ({"finder": {"network": {"dims": 2}}}, "finder.network.dims must be 3"),
        ({"training": {"sharding": True}}, "not for a segmenter with a finder"),
    ],
)
def test_a_finder_that_cannot_be_trained_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)

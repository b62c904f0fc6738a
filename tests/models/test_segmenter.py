"""A trained mask segmenter: members, steps, calibration and memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.methods.ensemble import Members
from medseg_diffusion.models import passes
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.store import list_models, load_model_files, save_model
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows.segment import SegmentOptions, segment
from tests.helpers.segmenters import FLAT, calibrated, make_model, save, save_image, tiny_config


def test_members_do_not_depend_on_the_size_of_the_ensemble(tmp_path: Path, tiny_model: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    three, _ = load_segmenter(tiny_model, "cpu", ensemble=3).sample(volume, seed=5)
    one, _ = load_segmenter(tiny_model, "cpu", ensemble=1).sample(volume, seed=5)
    assert torch.equal(three.labels[:1], one.labels)
    assert not torch.equal(three.mean, one.mean)


def test_a_calibration_for_other_options_is_not_used_and_that_is_said(tmp_path: Path, tiny_model: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    path = calibrated(tiny_model, tmp_path / "calibrated")
    assert load_segmenter(path, "cpu", ensemble=3).segment(volume).intervals_ml
    for options in ({"steps": 3}, {"sampler": "ddim"}, {"ensemble": 4}, {"fusion": "majority"}):
        other = load_segmenter(path, "cpu", **{"ensemble": 3, **options})  # type: ignore[arg-type]
        claims = "no intervals, no quality and no calibrated probabilities"
        assert other.notes == [f"{claims}: the model's calibration is for dpm++ with 2 steps, 3 members, fusion mean"]
        found = other.segment(volume, maps=["probabilities"])
        assert not found.intervals_ml and found.level is None and found.quality is None
        expected = load_segmenter(tiny_model, "cpu", **{"ensemble": 3, **options})  # type: ignore[arg-type]
        plain = expected.segment(volume, maps=["probabilities"])
        torch.testing.assert_close(found.probabilities, plain.probabilities)
    with pytest.raises(ModelError, match="calibration is of another version"):
        load_segmenter(calibrated(tiny_model, tmp_path / "newer", kind="isotonic"), "cpu")


def test_a_calibration_holds_for_the_parts_it_was_fitted_to(tmp_path: Path, tiny_model: Path) -> None:
    path = calibrated(tiny_model, tmp_path / "calibrated")
    assert load_segmenter(path, "cpu", ensemble=3, keep_largest=False).aggregation.calibration is not None
    largest = load_segmenter(path, "cpu", ensemble=3, keep_largest=True)
    assert largest.aggregation.largest_part and largest.aggregation.calibration is None
    (note,) = largest.notes
    assert note.startswith("no intervals") and note.endswith("3 members, fusion mean, all parts")


def test_fast_is_one_step_and_one_mask_where_the_model_has_more(tmp_path: Path, tiny_model: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    fast = load_segmenter(tiny_model, "cpu", fast=True)
    assert (fast.num_steps, fast.ensemble, fast.notes) == (1, 1, [])
    same = load_segmenter(tiny_model, "cpu", steps=1, ensemble=1)
    one, other = (model.segment(volume, maps=["probabilities"]).probabilities for model in (fast, same))
    assert one is not None and other is not None and torch.equal(one, other)
    plain = load_segmenter(make_model(tmp_path / "plain", tiny_config(method="baseline")), "cpu", fast=True)
    assert plain.notes == ["--fast changes nothing: this model has no setting with fewer steps or masks"]


def test_a_feed_forward_model_samples_nothing(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", tiny_config(method="baseline"))
    path = calibrated(plain, tmp_path / "model", sampler="", steps=1, ensemble=1, volume_errors=[0.1])
    for options in ({"steps": 3}, {"sampler": "ddim"}):
        with pytest.raises(UsageError, match="this model is feed-forward; leave --steps and --sampler out"):
            load_segmenter(path, "cpu", **options)  # type: ignore[arg-type]
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    segmentation = load_segmenter(path, "cpu").segment(volume)
    assert len(segmentation.members) == 1 and not segmentation.members_ml and segmentation.intervals_ml


def test_members_of_a_feed_forward_model_are_jittered_passes_and_are_called_so(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", tiny_config(method="baseline", augmentation={"flip_axes": [0, 1]}))
    path = calibrated(plain, tmp_path / "model", sampler="", steps=1, ensemble=1, volume_errors=[0.1])
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    model = load_segmenter(path, "cpu", ensemble=4)
    assert model.notes[0] == "the masks are mirrored and jittered passes of a feed-forward model, not samples"
    assert len(model.notes) == 2 and "no intervals" in model.notes[1], "the calibration is of one pass"
    segmentation = model.segment(volume, seed=3)
    assert len(segmentation.members) == 4 and segmentation.members_ml and not segmentation.intervals_ml
    assert any(not torch.equal(segmentation.members[0], other) for other in segmentation.members[1:])
    again = load_segmenter(path, "cpu", ensemble=4).segment(volume, seed=3)
    assert torch.equal(again.members, segmentation.members)


def test_only_axes_that_the_training_mirrored_are_mirrored(tmp_path: Path) -> None:
    for probability, axes in ((0.3, (0, 1)), (0.0, ())):
        augmentation = {"flip_axes": [0, 1], "probability": probability}
        config = tiny_config(method="baseline", augmentation=augmentation)
        path = make_model(tmp_path / str(probability), config)
        assert load_segmenter(path, "cpu", ensemble=2).model.jitter.mirrored == axes


def test_a_mirrored_pass_swaps_the_sides_that_classes_name(tmp_path: Path) -> None:
    names = {0: "background", 1: "left hippocampus", 2: "right hippocampus", 3: "brainstem", 4: "left eye"}
    config = tiny_config(method="baseline", data={"source": "brain-labelmaps", "window": [8, 8, 8]})
    path = make_model(tmp_path / "model", config, len(names))
    saved = load_model_files(path)
    save_model(path, {**saved.card, "labels": {str(value): name for value, name in names.items()}}, saved.weights, "#")
    jitter = load_segmenter(path, "cpu", ensemble=2).model.jitter
    assert jitter.mirrored == (0,) and jitter.other_side.tolist() == [0, 2, 1, 3, 4], "an eye without another stays"


@pytest.mark.parametrize("bound", ["members", "values"])
def test_a_large_ensemble_or_scan_walks_in_parts(
    bound, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_volume(save(tmp_path / "scan.nii.gz"))
    whole = load_segmenter(tiny_model, "cpu", ensemble=5).segment(volume, maps=["probabilities"])
    model = load_segmenter(tiny_model, "cpu", ensemble=5)
    if bound == "members":
        monkeypatch.setattr(passes, "MEMBERS_AT_ONCE", 2)
    else:
        model.way = replace(model.way, values_at_once=1)
    parts = model.segment(volume, maps=["probabilities"])
    torch.testing.assert_close(parts.probabilities, whole.probabilities)
    assert torch.equal(parts.members, whole.members) and len(whole.members) == 5


def test_the_layout_of_the_configuration_is_used_and_the_agreement_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model(tmp_path / "plain", tiny_config(**FLAT), labels=3)
    last = make_model(tmp_path / "last", tiny_config(**FLAT, training={"channels_last": True}), labels=3)
    calls: list[int] = []
    known = Members.pairwise_dice
    monkeypatch.setattr(Members, "pairwise_dice", lambda self: calls.append(len(self)) or known(self))
    volume = read_volume(save_image(tmp_path / "image.png"), channels=3)
    found = [load_segmenter(path, "cpu", ensemble=2) for path in (plain, last)]
    weights = [next(p for p in one.model.parameters() if p.ndim == 4 and p.shape[1] > 1) for one in found]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    first, second = (one.segment(volume, maps=["probabilities"]) for one in found)
    torch.testing.assert_close(first.probabilities, second.probabilities, rtol=0, atol=1e-3)
    assert calls == [2, 2]


@pytest.mark.parametrize(("pairwise", "told"), [(0.9951, True), (0.98, False)])
def test_a_model_whose_members_were_equal_is_called_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairwise: float, told: bool
) -> None:
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path))
    path = make_model(tmp_path / "models" / "mine", tiny_config())
    saved = load_model_files(path)
    rows = {"own": {"pairwise_dice": pairwise, "dice": 0.8}}
    card = {**saved.card, "x_t": {"steps": 1, "members": 5, "cases": 3, "rows": rows}}
    save_model(path, card, saved.weights, "# card")
    note = "this model is deterministic: its members are equal, whatever the ensemble size"
    assert (note in load_segmenter(path, "cpu", ensemble=5).notes) == told
    assert note not in load_segmenter(path, "cpu", ensemble=1).notes
    (row,) = (model for model in list_models() if model.name == "mine")
    assert row.method == ("ensemdiff, deterministic" if told else "ensemdiff")
    scan = save(tmp_path / "scan.nii.gz")
    segment([scan], SegmentOptions(model=str(path), statistics=True, device="cpu"))
    statistics = json.loads((tmp_path / "scan_statistics.json").read_text())
    assert statistics.get("deterministic", False) == told

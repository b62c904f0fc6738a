"""Configurations: presets, strictness, overrides, and sections that mirror what they feed."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from medseg_diffusion import build
from medseg_diffusion.config.load import NOTES, load_config, load_segmenter_config, parse_config, presets
from medseg_diffusion.config.segmenter import (
    AnchorLossSection,
    DataSection,
    DynamicEncodingSection,
    ImageEncoderSection,
    SegmenterConfig,
    SemanticConditionSection,
)
from medseg_diffusion.config.shared import (
    AugmentationSection,
    InferenceSection,
    PreprocessingSection,
    TrainingSection,
    UNetSection,
)
from medseg_diffusion.data.augmentation import Augmentation
from medseg_diffusion.errors import UsageError
from medseg_diffusion.networks.medsegdiff import MedSegDiff
from medseg_diffusion.networks.medsegdiff_v2 import MedSegDiffV2
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.tasks.mask import AnchorLoss
from medseg_diffusion.training.job import training_options
from medseg_diffusion.training.trainer import TrainingOptions
from medseg_diffusion.volumes.preprocessing import Preprocessing

GIVEN_BY_THE_TASK = ("num_classes", "context_channels", "transformer_depth")
MINIMAL: dict[str, Any] = {"method": "ensemdiff", "data": {"window": [8, 8, 8]}}


def write(folder: Path, content: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_there_are_presets() -> None:
    assert len(presets()) > 0
    assert all("_" not in name and name == name.lower() for name in presets())


SEGMENTERS = [name for name in presets() if isinstance(load_config(name), SegmenterConfig)]
FULL = {
    # Millions of parameters. Ho et al. (2020) state 114 for their 256 x 256 network, which is EnsemDiff's; the authors
    # of SegDiff, MedSegDiff and MedSegDiff-V2 state none.
    "baseline-brats": 113.672,
    "ensemdiff-brats": 113.674,
    "segdiff-monuseg": 164.155,
    "medsegdiff-isic": 141.282,
    "medsegdiff-v2-isic": 257.031,
}


def test_every_full_preset_is_counted() -> None:
    assert {name for name in SEGMENTERS if not name.endswith("-small")} == set(FULL)


@pytest.mark.parametrize("name", FULL)
def test_a_full_preset_has_its_size(name) -> None:
    """Built without memory, so a change of any width or depth shows."""
    config = load_segmenter_config(name)
    assert config.network.checkpointing
    with torch.device("meta"):
        model = build.segmenter(config, 1 + len(config.data.labels))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(FULL[name], abs=2e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in FULL else []) for name in SEGMENTERS]
)
def test_a_preset_loads_builds_and_takes_a_step(name) -> None:
    config = load_segmenter_config(name)
    assert config.description
    model = build.segmenter(config, 1 + (len(config.data.labels) or 3))
    assert sum(p.numel() for p in model.parameters()) > 1000
    build.preprocessing(config.preprocessing)
    build.augmentation(config.augmentation)
    training_options(config.training)
    build.sampler(config.inference.sampler)
    build.noise_schedule(config.diffusion.schedule)
    window = [64 if name in FULL else 8] * config.network.dims
    batch = {
        "image": torch.randn(1, config.data.channels, *window),
        "label": torch.zeros(1, *window, dtype=torch.int64),
        "seed": torch.tensor([0]),
    }
    loss = model(batch)
    loss.backward()
    assert bool(loss.isfinite())


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "window"), [(3, [256, 256]), (4, [32, 32, 32])], ids=["photograph", "MRI"])
@pytest.mark.parametrize("name", [name for name in SEGMENTERS if name not in FULL])
def test_a_small_preset_takes_a_step_on_data_of_another_kind(name, channels, window) -> None:
    """RGB photographs of 256 x 256 and volumes of four contrasts, also where the preset is for something else."""
    content = load_segmenter_config(name).model_dump(mode="json")
    content["network"]["dims"] = len(window)
    content["augmentation"]["flip_axes"] = []
    content["data"] |= {"source": "scans", "labels": ["lesion"], "channels": channels, "window": window}
    content["inference"]["window"] = None
    config = parse_config(content, name)
    assert isinstance(config, SegmenterConfig)
    model = build.segmenter(config, 2)
    batch = {
        "image": torch.rand(1, channels, *window, generator=torch.Generator().manual_seed(0)),
        "label": torch.zeros(1, *window, dtype=torch.int64),
        "seed": torch.tensor([0]),
    }
    batch["label"][0, 5:20, 5:20] = 1
    loss = model(batch)
    loss.backward()
    assert bool(loss.isfinite())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients) and any(bool(g.any()) for g in gradients)


@pytest.mark.parametrize("name", presets())
def test_a_preset_survives_being_written_and_read_again(name, tmp_path: Path) -> None:
    """A model's card holds its configuration as JSON: it must come back the same."""
    config = load_config(name)
    assert config.description
    assert load_config(write(tmp_path, config.model_dump(mode="json"))) == config


def test_the_presets_for_nuclei_and_flair_differ_in_their_method_alone() -> None:
    """They are to be compared: data, augmentation, U-Net and optimisation must be the same."""
    methods = ("baseline", "ensemdiff", "segdiff", "medsegdiff", "medsegdiff-v2")
    for kind in ("nuclei", "flair"):
        five = [load_segmenter_config(f"{method}-{kind}-small") for method in methods]
        latent = load_segmenter_config(f"latent-mask-{kind}-small")
        for part in ("data", "preprocessing", "augmentation", "network", "training"):
            assert all(getattr(config, part) == getattr(five[0], part) for config in five), part
            if part != "network":  # that of latents has no patches
                assert getattr(latent, part) == getattr(five[0], part), part
        assert all(config.diffusion == five[1].diffusion for config in five[1:])
        assert (five[0].network.dims, five[0].data.channels) == (2, 3 if kind == "nuclei" else 1)


@pytest.mark.parametrize("name", ["segdiff-nuclei-small", "ldm-tiny-imagenet-small", "anomaly-patched-small"])
def test_the_configuration_of_a_run_is_one(name, tmp_path: Path) -> None:
    """RUN/config.yaml notes more, such as the seed; elsewhere these keys are unknown."""
    content = {**load_config(name).model_dump(mode="json"), **dict.fromkeys(NOTES, 3)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert load_config(tmp_path / "config.yaml") == load_config(name)
    with pytest.raises(UsageError, match="unknown key"):
        load_config(write(tmp_path, content))


def test_a_generator_is_no_segmenter() -> None:
    with pytest.raises(UsageError, match="configures a pixel; train it with train-generator"):
        load_segmenter_config("adm-tiny-imagenet-small")


# ---- strictness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ({"trainning": {}}, "trainning", "training"),
        ({"network": {"chanels": 3}}, "network.chanels", "channels"),
        ({"diffusion": {"schedule": {"steps": 3}}}, "diffusion.schedule.steps", "num_steps"),
        ({"data": {"window": [8, 8, 8], "test_case": 3}}, "data.test_case", "test_cases"),
    ],
)
def test_an_unknown_key_is_refused_with_file_path_and_nearest_key(tmp_path: Path, change, key, nearest) -> None:
    path = write(tmp_path, {**MINIMAL, **change})
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: unknown key {key}; did you mean {nearest}?"


def test_an_unknown_key_that_resembles_nothing_is_refused_with_all_keys(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key network\.zzz; known: dims, channels, "):
        load_config(write(tmp_path, {**MINIMAL, "network": {"zzz": 1}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "nnunet"},
            r"method: got 'nnunet'; known: ensemdiff, segdiff, medsegdiff, ",
        ),
        ({"training": {"batch_size": 0}}, r"training\.batch_size: .*greater than or equal to 1 \(got 0\)"),
        ({"training": {"learning_rate": "fast"}}, r"training\.learning_rate: .*number.*got 'fast'"),
        ({"network": {"channel_mult": 3}}, r"network\.channel_mult: .*tuple"),
        ({"network": {"dims": 4}}, r"network\.dims: "),
        ({"network": 3}, r"network: .*got 3"),
        ({"diffusion": {"dice_ce_weight": 1}}, "dice_ce_weight needs head: logits"),
        ({"diffusion": {"head": "logits", "target": "eps"}}, "head: logits needs target: x0"),
        ({"preprocessing": {"size": [64, 64]}}, r"preprocessing\.size resizes 2D images, but network\.dims is 3"),
        ({"preprocessing": {"size": [64, 64], "spacing_mm": [1, 1, 1]}}, "size and spacing_mm exclude each other"),
        ({"preprocessing": {"size": [64, 0]}}, r"preprocessing\.size\.1: .*greater than 0"),
        ({"preprocessing": {"orientation": "RAX"}}, "orientation: names one of R/L, A/P and S/I each, such as RAS"),
        ({"augmentation": {"flip_axes": [3]}}, r"augmentation\.flip_axes: no axis 3 in 3D"),
        ({"data": {"window": [0, 8, 8]}}, r"data\.window\.0: .*greater than 0"),
        ({"inference": {"overlap": 1.0}}, r"inference\.overlap: .*less than 1"),
        ({"data": {"window": [8, 8, 8], "merge_labels": True}}, r"data: .*merge_labels leaves one class; name it"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(tmp_path: Path, change, message) -> None:
    path = write(tmp_path, {**MINIMAL, **change})
    with pytest.raises(UsageError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "window"), [("data", [8, 8]), ("data", [8, 8, 8, 8]), ("inference", [8, 8])])
def test_a_window_of_another_dimension_is_refused(tmp_path: Path, part, window) -> None:
    content = {**MINIMAL, part: {**MINIMAL.get(part, {}), "window": window}}
    with pytest.raises(UsageError, match=rf"{part}\.window has {len(window)} numbers, but network\.dims is 3"):
        load_config(write(tmp_path, content))
    flat = {**MINIMAL, "data": {"window": [8, 8]}, "network": {"dims": 2}, "inference": {"window": [4, 4]}}
    assert load_config(write(tmp_path, flat)).inference.window == (4, 4)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="method: Field required"):
        load_config(write(tmp_path, {"data": {"window": [8, 8, 8]}}))
    with pytest.raises(UsageError, match=r"data\.window: Field required"):
        load_config(write(tmp_path, {"method": "segdiff", "data": {}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [("method: [", "not YAML"), ("- a\n- b", "holds list"), ("", "holds NoneType"), ("just words", "holds str")],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_yaml_that_names_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(UsageError, match="not YAML"):
        load_config(write(tmp_path, f"method: !!python/object/apply:pathlib.Path.touch [{marker}]"))
    assert not marker.exists()


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    name = next(iter(presets()))
    with pytest.raises(UsageError, match=rf"no preset of that name; did you mean {name}\?"):
        load_config(name[:-1])


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config(MINIMAL, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.method = "segdiff"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.training.max_steps = 1  # type: ignore[misc]


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    overrides = [
        "training.max_steps=7",
        "training.learning_rate=1.0e-5",
        "network.channel_mult=[1, 2]",
        "diffusion.schedule.name=cosine",
        "inference.window=null",
        "preprocessing.spacing_mm=[1, 1, 2.5]",
    ]
    config = load_config(write(tmp_path, {**MINIMAL, "training": {"max_steps": 5, "workers": 2}}), overrides)
    assert config.training.max_steps == 7 and config.training.workers == 2
    assert config.training.learning_rate == 1e-5
    assert config.network.channel_mult == (1, 2)
    assert config.diffusion.schedule.name == "cosine"
    assert config.preprocessing.spacing_mm == (1, 1, 2.5)
    assert load_config(write(tmp_path, MINIMAL), ["method=segdiff", "method=baseline"]).method == "baseline"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", r"expected a\.b=value"),
        ("=3", r"expected a\.b=value"),
        ("training.max_step=3", r"unknown key training\.max_step; did you mean max_steps\?"),
        ("training.max_steps=many", r"training\.max_steps: .*got 'many'"),
        ("method.name=3", "method is a value, not a section"),
        ("network.channels=[", "is not YAML"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override, message) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, MINIMAL), [override])


# ---- sections and constructors ---------------------------------------------------------------------------------------


def constructor(kind: type, without: set[str]) -> dict[str, object]:
    """Parameters of a constructor with their defaults."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in without}


@pytest.mark.parametrize(
    ("section", "kind", "given_elsewhere", "own"),
    [
        (UNetSection, UNet, {"in_channels", "out_channels", *GIVEN_BY_THE_TASK}, set()),
        (ImageEncoderSection, SegDiff, {"unet", "image_channels"}, set()),
        (DynamicEncodingSection, MedSegDiff, {"unet", "image_channels"}, set()),
        (SemanticConditionSection, MedSegDiffV2, {"unet", "image_channels", "mask_channels"}, set()),
        (AnchorLossSection, AnchorLoss, set(), set()),
        (TrainingSection, TrainingOptions, set(), {"precision", "channels_last", "compile"}),
        (PreprocessingSection, Preprocessing, {"square_pixels"}, set()),
        (AugmentationSection, Augmentation, set(), set()),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_section_mirrors_the_constructor_it_feeds(section, kind, given_elsewhere, own) -> None:
    parameters = constructor(kind, given_elsewhere)
    assert [name for name in section.model_fields if name not in own] == list(parameters)
    if section is not UNetSection:  # its defaults are those of a small CPU network, not of the publication
        defaults = section().model_dump(exclude=own)
        assert defaults == parameters


def test_options_without_a_default_are_none() -> None:
    assert all(field.default is not MISSING for field in fields(TrainingOptions))
    assert DataSection.model_fields["window"].is_required()


def test_every_name_that_a_configuration_may_use_is_built() -> None:
    base = parse_config(MINIMAL, "here").model_dump()
    for name in build.SCHEDULES:
        changed = {**base, "diffusion": {"schedule": {"name": name, "num_steps": 50}}}
        assert build.noise_schedule(parse_config(changed, name).diffusion.schedule).num_steps == 50
    names = get_args(InferenceSection.model_fields["sampler"].annotation)
    assert set(names) == set(build.SAMPLERS)
    for name in names:
        assert build.sampler(name).begin() is not None


def test_what_cannot_be_built_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="sampler 'euler' is unknown; use ddpm, ddim"):
        build.sampler("euler")
    few = parse_config({**MINIMAL, "diffusion": {"schedule": {"num_steps": 10}}}, "here")
    with pytest.raises(UsageError, match=r"schedule: every beta must lie in"):
        build.segmenter(few, 2)
    heads = {"attention_factors": [1], "channels": 8, "head_channels": 3}
    with pytest.raises(UsageError, match=r"network: head_channels \(3\) must divide"):
        build.segmenter(parse_config({**MINIMAL, "network": heads}, "here"), 2)

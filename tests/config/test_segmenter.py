"""Configurations of segmenters: what is required, what is refused, and what presets share."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_diffusion.config.load import load_config, load_segmenter_config, parse_config
from medseg_diffusion.errors import UsageError
from tests.helpers.configs import MINIMAL, write


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
        ({"diffusion": {"head": "logits", "target": "flow"}}, "head: logits needs target: x0"),
        (
            {"diffusion": {"schedule": {"name": "rectified-flow"}, "target": "eps"}},
            "target: eps gives no image at the last time of schedule rectified-flow",
        ),
        (
            {"diffusion": {"times": "logit-normal", "learned_variance": True}},
            "times: logit-normal has no learned_variance",
        ),
        (
            {"diffusion": {"times": "importance"}},
            r"diffusion\.times: .*'uniform' or 'logit-normal' \(got 'importance'\)",
        ),
        (
            {"method": "categorical", "diffusion": {"times": "logit-normal"}, "inference": {"sampler": "ddpm"}},
            "method: categorical trains a bound, which needs all times alike",
        ),
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


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config(MINIMAL, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.method = "segdiff"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.training.max_steps = 1  # type: ignore[misc]

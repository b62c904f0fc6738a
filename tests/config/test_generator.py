"""Configurations of generators that contradict themselves are refused."""

from __future__ import annotations

import pytest

from medseg_diffusion.config.load import parse_config
from medseg_diffusion.errors import UsageError
from tests.helpers.generators import small_config


def test_a_class_that_nothing_attends_to_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cross-attention needs network\.attention_factors"):
        small_config("latent", condition={"classes": "cross-attention"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "upsampler", "factor": 3, "data": {"size": 64}}, "no multiple of factor 3"),
        ({"method": "pixel", "autoencoder": "autoencoder-tiny-imagenet-small"}, "method pixel has no autoencoder"),
        ({"method": "latent"}, "method latent needs an autoencoder"),
        ({"method": "pixel", "preprocessing": {"size": [64, 64]}}, "use data.size for the size of images"),
        ({"method": "autoencoder", "preprocessing": {"size": [64, 64]}}, "use data.size for the size of images"),
        (
            {"method": "pixel", "diffusion": {"schedule": {"name": "rectified-flow"}}},
            r"diffusion: .*target: eps gives no image at the last time of schedule rectified-flow.*flow, v or x0",
        ),
        (
            {
                "method": "pixel",
                "diffusion": {"times": "logit-normal", "objective": "hybrid", "learned_variance": True},
            },
            "times: logit-normal is for objective: simple",
        ),
        ({"method": "pixel", "diffusion": {"times_std": 0}}, r"diffusion\.times_std: .*greater than 0"),
        ({"method": "pixel", "diffusion": {"times_mean": float("nan")}}, r"diffusion\.times_mean: .*"),
        (
            {"method": "pixel", "diffusion": {"times_mean": float("inf")}},
            r"diffusion\.times_mean: .*less than or equal",
        ),
        (
            {"method": "classifier", "schedule": {"name": "rectified-flow"}},
            "ends in pure noise, where a classifier cannot guide",
        ),
        (
            {"method": "patched", "diffusion": {"schedule": {"name": "rectified-flow"}, "target": "flow"}},
            "method patched needs diffusion.target: x0",
        ),
        ({"method": "autoencoder", "data": {"size": 16}}, "a side of 16 is too small for loss.discriminator_layers 3"),
        ({"method": "pixel", "data": {"labels": ["a"]}}, "data.labels and data.merge_labels are for condition.mask"),
        ({"method": "upsampler", "condition": {"mask": True}}, "for methods pixel and latent, not upsampler"),
        ({"method": "pixel", "condition": {"mask": True, "classes": "embedding"}}, "exclude each other"),
        (
            {"method": "pixel", "condition": {"mask": True}, "preprocessing": {"crop_foreground": True}},
            "crop_foreground needs an image",
        ),
        ({"method": "pixel", "condition": {"mask": True}, "data": {"merge_labels": True}}, "merge_labels leaves one"),
    ],
)
def test_contradictions_of_a_configuration_are_named(content, message) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config(content, "test")

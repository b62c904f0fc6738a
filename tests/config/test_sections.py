"""Sections of a configuration mirror the constructors that they feed."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import pytest

from medseg_diffusion.config.generator import ClassifierNetworkSection
from medseg_diffusion.config.imported import AutoencoderSection, DenoiserUNetSection, NoisyClassifierSection
from medseg_diffusion.config.pixel_classifier import PixelClassifierSection
from medseg_diffusion.config.segmenter import (
    AnchorLossSection,
    DataSection,
    DynamicEncodingSection,
    ImageEncoderSection,
    SemanticConditionSection,
)
from medseg_diffusion.config.shared import (
    AugmentationSection,
    ClassCodesSection,
    PreprocessingSection,
    TrainingSection,
    UNetSection,
    warn_of_unused,
)
from medseg_diffusion.data.augmentation import Augmentation
from medseg_diffusion.methods.label_efficient import ClassifierOptions
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.medsegdiff import MedSegDiff
from medseg_diffusion.networks.medsegdiff_v2 import MedSegDiffV2
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.tasks.mask import AnchorLoss
from medseg_diffusion.training.trainer import TrainingOptions
from medseg_diffusion.volumes.dicom_seg import Segment
from medseg_diffusion.volumes.preprocessing import Preprocessing

GIVEN_BY_THE_TASK = ("num_classes", "context_channels", "transformer_depth")
OF_CLASSIFIERS = ("num_classes", "resampling", "scale_shift", "norm_eps")


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
        (TrainingSection, TrainingOptions, set(), {"precision", "channels_last", "compile", "sharding"}),
        (PreprocessingSection, Preprocessing, {"square_pixels"}, set()),
        (AugmentationSection, Augmentation, set(), set()),
        (PixelClassifierSection, ClassifierOptions, set(), set()),
        (ClassifierNetworkSection, NoisyClassifier, {"dims", "in_channels", "size", *OF_CLASSIFIERS}, set()),
        (DenoiserUNetSection, UNet, set(), set()),
        (NoisyClassifierSection, NoisyClassifier, set(), set()),
        (AutoencoderSection, KLAutoencoder, set(), set()),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_section_mirrors_the_constructor_it_feeds(section, kind, given_elsewhere, own) -> None:
    parameters = constructor(kind, given_elsewhere)
    assert set(section.model_fields) - own == set(parameters)
    if issubclass(section, UNetSection):  # its defaults are those of a small CPU network, not of the publication
        return
    for name, default in parameters.items():
        field = section.model_fields[name]
        if default is not inspect.Parameter.empty:
            assert (name, field.get_default(call_default_factory=True)) == (name, default)


def test_options_without_a_default_are_none() -> None:
    assert all(field.default is not MISSING for field in fields(TrainingOptions))
    assert DataSection.model_fields["window"].is_required()


def test_codes_of_a_class_are_the_arguments_of_its_segment() -> None:
    """Values of SNOMED CT, which YAML reads as numbers, become text."""
    section = ClassCodesSection.model_validate({"category": [91723000, "SCT", "A"], "type": ["1", "SCT", "B"]})
    segment = Segment("name", **section.model_dump())
    assert (segment.category, segment.type) == (("91723000", "SCT", "A"), ("1", "SCT", "B"))
    assert set(ClassCodesSection.model_fields) | {"name"} == {one.name for one in fields(Segment)}
    with pytest.raises(ValueError, match="at most 16 characters"):
        ClassCodesSection.model_validate({"category": ["1" * 17, "SCT", "A"], "type": ["1", "SCT", "B"]})


def test_codes_without_a_class_are_mentioned() -> None:
    section = ClassCodesSection.model_validate({"category": ["1", "SCT", "A"], "type": ["1", "SCT", "B"]})
    warn_of_unused({"nodule": section}, ["nodule", "cyst"])
    with pytest.warns(UserWarning, match="data.codes of nodul have no effect: the classes are nodule, cyst"):
        warn_of_unused({"nodul": section}, ["nodule", "cyst"])

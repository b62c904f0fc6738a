"""Networks of models on images, restored as they are."""

from __future__ import annotations

import pytest

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.errors import ModelError
from medseg_diffusion.models.imported import restore_network
from medseg_diffusion.models.store import load_model_files
from tests.helpers.generators import QUIET

pytestmark = QUIET


def test_the_network_of_a_trained_generator_is_its_denoiser(image_models) -> None:
    network = restore_network(load_model_files(image_models["class"]))
    assert isinstance(network, NetworkDenoiser) and not network.training


def test_a_segmenter_has_no_such_network() -> None:
    with pytest.raises(ModelError, match=r"hippocampus-t1: a model for 'mask', expected image, .*denoiser"):
        restore_network(load_model_files("hippocampus-t1"))

"""A trained pixel classifier as a segmenter: slabs, members, pictures of any depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion.data.images import find_images
from medseg_diffusion.errors import InputError
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.models.pixel_segmenter import pixel_activations, pixel_preprocessing
from medseg_diffusion.volumes.fitting import to_generator_grid
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.workflows.train_pixel_classifier import train_pixel_classifier
from tests.helpers.pixel_classifiers import in_memory, quick


@pytest.mark.slow
def test_whole_batches_and_slabs_do_not_matter(box_scans, box_generators, tmp_path: Path) -> None:
    run = train_pixel_classifier(
        quick(), box_generators[2], box_scans, 1, tmp_path / "run", test=False, device="cpu"
    ).model
    volume = read_volume(box_scans / "images" / "s1.nii.gz")
    maps = ["probabilities", "uncertainty"]
    one, other = (load_segmenter(run, "cpu").segment(volume, seed, maps=maps) for seed in (0, 1))
    assert torch.equal(one.probabilities, other.probabilities)  # nothing is drawn
    # A slab is as many slices as a batch.
    for batch in (2, 4):
        model = load_segmenter(run, "cpu")
        model.way = replace(model.way, windows=replace(model.way.windows, batch_size=batch))
        slabs = model.segment(volume, maps=maps)
        torch.testing.assert_close(slabs.probabilities, one.probabilities)
        torch.testing.assert_close(slabs.uncertainty, one.uncertainty)
        assert torch.equal(slabs.members, one.members)


@pytest.mark.parametrize(("mode", "white"), [("L", 255), ("I;16", 65535), ("1", 1)])
def test_pictures_of_any_depth_are_what_the_generator_saw(mode, white, box_generators, tmp_path: Path) -> None:
    levels = np.linspace(0, white, 16 * 16).round().reshape(16, 16)
    array = levels.astype(bool) if mode == "1" else levels.astype(np.uint16 if mode == "I;16" else np.uint8)
    Image.fromarray(array).save(tmp_path / "ramp.png")
    generator = in_memory(box_generators[2])
    image, _ = pixel_preprocessing(generator).apply(read_volume(tmp_path / "ramp.png"))
    found = find_images(tmp_path)
    seen = found.pixels(found.entries[0], (16, 16), 1)[0, ..., 0].astype(np.float32) / 127.5 - 1
    given = to_generator_grid(image[..., 0][None], (16, 16))[0, 0].numpy()
    np.testing.assert_allclose(given, seen, atol=1e-6)
    assert given.min() == -1 and given.max() == 1


def test_pictures_that_no_generator_saw_are_refused(box_generators, tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "real.tif")
    with pytest.raises(InputError, match="levels from 0 to 1; expected whole levels of 8 or 16 bits"):
        pixel_preprocessing(in_memory(box_generators[2])).apply(read_volume(tmp_path / "real.tif"))


def test_activations_are_taken_where_the_generator_is(box_generators) -> None:
    """On "meta" in place of a GPU: noise that stays on the CPU would not meet the network, or draw it there."""
    generator = in_memory(box_generators[2])
    generator.task.to("meta")
    net = pixel_activations(generator, quick(), ["decoder.0"])
    blocks = net.with_blocks(["decoder.1"])(torch.zeros(1, *generator.shape, device="meta"))
    assert {block.device.type for block in blocks} == {generator.device.type} == {"meta"}


def test_members_beyond_ten_are_further_members(box_scans, box_generators, tmp_path: Path) -> None:
    config = quick()
    many = config.model_copy(
        update={"classifier": config.classifier.model_copy(update={"members": 12, "max_epochs": 1})}
    )
    run = train_pixel_classifier(
        many, box_generators[2], box_scans, 1, tmp_path / "run", test=False, device="cpu"
    ).model
    model = load_segmenter(run, "cpu")
    volume = read_volume(box_scans / "images" / "s1.nii.gz")
    torch.manual_seed(0)
    for parameter in model.model.classifiers.members.parameters():  # trained for an epoch, all are nearly the same
        torch.nn.init.normal_(parameter)
    ensemble, _ = model.sample(volume, 0)
    image = model.preprocessing.apply(volume)[0].movedim(-1, 0)
    with torch.no_grad():
        members = model.model.probabilities(image, [[0] * 12] * len(image), model.way.sampler, model.way.times)
    assert len(ensemble) == 12
    torch.testing.assert_close(ensemble.mean, members.mean(1).movedim(0, -1).float(), rtol=1e-4, atol=1e-4)

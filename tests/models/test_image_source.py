"""Images drawn from trained generators: reproducible, guided, enlarged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medseg_diffusion.errors import UsageError
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.workflows.train_generator import train_generator
from tests.helpers.generators import QUIET, small_config

pytestmark = QUIET


@pytest.mark.parametrize("name", ["pixel", "class", "latent", "token"])
def test_a_sample_is_the_same_in_any_batch(name, image_models) -> None:
    options = SampleOptions(sampler="ddpm", steps=3, device="cpu")
    source = ImageSource(image_models[name], options)
    together = source.draw([0, 1, 2]).int()
    assert together.shape == (3, 16, 16, 3)
    assert int((source.draw([2]).int() - together[2:]).abs().max()) <= 1
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", ["class", "token"])
def test_guidance_changes_samples_and_one_is_none(name, image_models) -> None:
    def draw(scale: float) -> torch.Tensor:
        source = ImageSource(image_models[name], SampleOptions(label=1, guidance=scale, steps=3, device="cpu"))
        for i, parameter in enumerate(source.generator.task.parameters()):  # two steps leave layers at zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        return source.draw([0, 1])

    plain, strong = draw(1.0), draw(4.0)
    assert torch.equal(plain, draw(1.0))
    assert not torch.equal(plain, strong)


def test_a_classifier_guides_pixels(image_models) -> None:
    def draw(scale: float) -> torch.Tensor:
        options = SampleOptions(
            label=1, classifier=str(image_models["classifier"]), classifier_scale=scale, steps=3, device="cpu"
        )
        return ImageSource(image_models["pixel"], options).draw([0, 1])

    assert torch.equal(draw(0.0), ImageSource(image_models["pixel"], SampleOptions(steps=3, device="cpu")).draw([0, 1]))
    assert not torch.equal(draw(0.0), draw(50.0))


@pytest.mark.parametrize("name", ["upsampler", "latent-upsampler"])
def test_an_upsampler_doubles_what_is_sampled(name, image_models) -> None:
    options = SampleOptions(upsampler=str(image_models[name]), steps=3, device="cpu")
    source = ImageSource(image_models["half"], options)
    assert source.draw([0, 1]).shape == (2, 16, 16, 3) and source.last.config.data.shape == (16, 16)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("pixel", {"label": 0}, "has no classes"),
        ("class", {"label": 2}, "--class 2: the model has classes 0 to 1"),
        ("pixel", {"guidance": 2.0}, "--guidance needs a model that was trained with condition.drop"),
        ("latent", {"classifier": "classifier"}, "--classifier sees pixels"),
        ("upsampler", {}, "give it with --upsampler"),
        ("pixel", {"upsampler": "upsampler"}, "does not enlarge images of 16 x 16"),
        ("half", {"upsampler": "class-upsampler"}, "needs one of 2 classes, the images have 0"),
    ],
)
def test_wishes_that_a_model_cannot_fulfil_are_refused(model, options, message, image_models) -> None:
    named = {key: str(image_models[value]) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UsageError, match=message):
        ImageSource(image_models[model], SampleOptions(device="cpu", **named))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"size": 8, "validation_images": 4}}, "its size is"),
        ({"schedule": {"name": "cosine", "num_steps": 1000}}, "its noise schedule is"),
    ],
)
def test_a_classifier_of_another_generator_is_refused(changes, message, image_models, pictures, tmp_path: Path) -> None:
    other = train_generator(small_config("classifier", **changes), pictures, tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match=message):
        ImageSource(image_models["pixel"], SampleOptions(classifier=str(other), device="cpu"))


def test_a_classifier_guides_an_unconditional_generator_to_all_its_classes_in_turn(image_models) -> None:
    source = ImageSource(image_models["pixel"], SampleOptions(classifier=str(image_models["classifier"]), device="cpu"))
    assert source.labels(range(4)).tolist() == [0, 1, 0, 1]

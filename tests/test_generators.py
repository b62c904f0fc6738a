"""Generators of images through the public functions: a training step of every preset, sampling, guidance, scores."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.generator import GeneratorConfig, ImageAutoencoderConfig, NoisyClassifierConfig
from medseg_diffusion.config.load import load_config, parse_config, presets
from medseg_diffusion.config.pixel_classifier import PixelClassifierConfig
from medseg_diffusion.config.segmenter import SegmenterConfig
from medseg_diffusion.data.image_cache import packed
from medseg_diffusion.data.latent_cache import LatentExamples, cached_latents
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.metrics.generation import Scores
from medseg_diffusion.models.generator import restore_autoencoder, restore_generator
from medseg_diffusion.models.image_source import ImageSource, SampleOptions
from medseg_diffusion.models.imported import load_model
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.extractors import extractor
from medseg_diffusion.tasks.image import enlarged, reduced
from medseg_diffusion.training.autoencoder import AutoencoderTraining, GradientSSIM, LossWeights
from medseg_diffusion.workflows.evaluate_generator import (
    GeneratorEvaluationOptions,
    Row,
    _suspicious,
    evaluate_generator,
    parse_samplers,
)
from medseg_diffusion.workflows.sample import read_png, sample_images
from medseg_diffusion.workflows.train_generator import train_generator

OTHERS = SegmenterConfig | PixelClassifierConfig | AnomalyConfig
IMAGES = [name for name in presets() if not isinstance(load_config(name), OTHERS)]
SMALL = [name for name in IMAGES if name.endswith("-small")]

pytestmark = pytest.mark.filterwarnings("ignore:LPIPS has no weights here", "ignore:.*torch.jit")


@pytest.fixture(autouse=True, scope="module")
def own_home(tmp_path_factory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSEG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of 64 x 64 images: dark on the left, dark on the right."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(24):
        pixels = generator.integers(100, 256, (64, 64, 3), dtype=np.uint8)
        pixels[:, :32] //= 1 + 3 * (i % 2)
        pixels[:, 32:] //= 4 - 3 * (i % 2)
        path = folder / ("left" if i % 2 else "right") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def small(method: str, **changes: object) -> GeneratorConfig | ImageAutoencoderConfig | NoisyClassifierConfig:
    """The smallest configuration of a method, on 16 x 16 images."""
    network: dict[str, object] = {
        "autoencoder": {"latent_channels": 2, "channels": [32, 32], "num_res_blocks": 1},
        "classifier": {
            "channels": 32,
            "channel_mult": [1, 1],
            "num_res_blocks": 1,
            "attention_factors": [2],
            "head_channels": 32,
        },
    }.get(method, {"dims": 2, "channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1})  # type: ignore[assignment]
    content = {
        "method": method,
        "data": {"size": 16, "validation_images": 4},
        "network": network,
        "training": {"batch_size": 2, "max_steps": 2, "validate_every": 2, "warmup_steps": 1, "ema_decay": 0.5},
        **({"sampling": {"sampler": "ddim", "steps": 4}} if method in ("pixel", "latent", "upsampler") else {}),
        **({"autoencoder": "autoencoder-tiny-imagenet-small"} if method == "latent" else {}),
        **({"loss": {"discriminator_channels": 8, "discriminator_layers": 1}} if method == "autoencoder" else {}),
        **changes,
    }
    found = parse_config(content, "test")
    assert not isinstance(found, OTHERS)
    return found


@pytest.fixture(scope="module")
def models(pictures, tmp_path_factory) -> dict[str, Path]:
    """One trained model of each kind; two steps each."""
    root = tmp_path_factory.mktemp("models")
    autoencoder = train_generator(small("autoencoder"), pictures, root / "autoencoder", device="cpu")
    by_class = {"condition": {"classes": "embedding"}}
    attention = {"dims": 2, "channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "attention_factors": [2]}
    by_token = {"condition": {"classes": "cross-attention", "context_channels": 8}, "network": attention}
    half = {"data": {"size": 8, "validation_images": 4}}
    configs = {
        "pixel": small("pixel", diffusion={"learned_variance": True, "objective": "hybrid"}),
        "class": small("pixel", **by_class),
        "half": small("pixel", **half),
        "upsampler": small("upsampler"),
        "class-upsampler": small("upsampler", **by_class),
        "latent-upsampler": small("upsampler", autoencoder="autoencoder-tiny-imagenet-small"),
        "classifier": small("classifier"),
        "latent": small("latent"),
        "token": small("latent", **by_token),
    }
    found = {"autoencoder": autoencoder}
    for name, config in configs.items():
        codec = autoencoder if getattr(config, "autoencoder", None) is not None else None
        found[name] = train_generator(config, pictures, root / name, autoencoder=codec, device="cpu")
    return found


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SMALL else (pytest.mark.slow,)) for n in IMAGES])
def test_a_preset_trains_for_a_step_and_is_a_loadable_model(name, pictures, models, tmp_path: Path) -> None:
    small_data = ["data.validation_images=2", "data.test_images=0"]
    config = load_config(name, ["training.batch_size=2", "training.workers=0", *small_data])
    assert not isinstance(config, OTHERS)
    if len(config.data.shape) == 3:
        for i in range(4):
            pixels = np.random.default_rng(i).random((20, 20, 20)).astype(np.float32)
            nib.save(nib.Nifti1Image(pixels, np.eye(4)), tmp_path / f"{i}.nii.gz")
        pictures = tmp_path
    if isinstance(config, GeneratorConfig) and config.autoencoder is not None:
        # The first stage of 64 x 64 images, untrained, stands for the preset's own.
        first = load_config(str(config.autoencoder), ["training.batch_size=2", "data.validation_images=2",
                                                      "training.workers=0"])  # fmt: skip
        codec = train_generator(first, pictures, tmp_path / "first", max_steps=1, device="cpu")  # type: ignore[arg-type]
    else:
        codec = None
    path = train_generator(config, pictures, tmp_path / "run", autoencoder=codec, max_steps=1, device="cpu")
    assert load_model_files(path).card["config"]["method"] == config.method
    assert (tmp_path / "run" / "log.csv").is_file()


def test_a_latent_generator_trains_its_autoencoder_first(pictures, tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text(json.dumps(small("autoencoder").model_dump(mode="json")))
    config = small("latent", autoencoder=str(first))
    run = tmp_path / "run"
    stage = train_generator(config, pictures, run, stage="autoencoder", device="cpu")
    assert stage == run / "autoencoder" / "model"
    assert not (run / "model").exists()
    path = train_generator(config, pictures, run, resume=True, device="cpu")
    weights = load_model_files(path).weights
    kept = restore_autoencoder(load_model_files(stage))[0].state_dict()
    assert all(torch.equal(weights[f"codec.{name}"], value) for name, value in kept.items())


def test_latents_have_zero_mean_and_unit_variance(pictures, models) -> None:
    """Shift and scale are stored with the autoencoder; a mean of two deviations once spoiled a latent generator."""
    codec, _ = restore_autoencoder(load_model_files(models["autoencoder"]))
    images = [torch.from_numpy(np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BOX)).copy())
              for path in sorted(pictures.rglob("*.png"))]  # fmt: skip
    image = torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    latent = codec.encode(image)
    assert torch.allclose(latent.transpose(0, 1).flatten(1).std(1), torch.ones(2), atol=0.1)
    assert torch.allclose(latent.mean((0, 2, 3)), torch.zeros(2), atol=0.1)
    assert codec.shift.abs().min() > 1e-4, "a shift of nothing would prove nothing"
    unscaled, _ = codec.moments(image)
    torch.testing.assert_close(codec.unstandardised(latent), unscaled, rtol=1e-4, atol=1e-5)


def test_the_loss_of_an_autoencoder_is_float32_under_autocast() -> None:
    """SSIM's variance is a difference of nearly equal moments: in bfloat16 the loss of flat images went to -inf."""
    torch.manual_seed(0)
    training = AutoencoderTraining(KLAutoencoder(2, 3, 3, 2, (32, 32), 1, (False, False)), GradientSSIM()).eval()
    flat = torch.linspace(-1, 1, 4).reshape(4, 1, 1, 1) + 0.01 * torch.randn(4, 3, 16, 16)
    batch = {"image": flat, "seed": torch.arange(4)}
    seen: list[torch.dtype] = []
    kept, training._perceptual[0] = training._perceptual[0], lambda a, b: (seen.append(a.dtype), kept(a, b))[1]
    with torch.no_grad():
        exact = training(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = training(batch)
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)  # what is left is the rounding of the network


def test_training_resumes_exactly(pictures, tmp_path: Path) -> None:
    config = small("pixel")
    whole = train_generator(config, pictures, tmp_path / "whole", device="cpu")
    train_generator(config, pictures, tmp_path / "parts", max_steps=1, device="cpu")
    parts = train_generator(config, pictures, tmp_path / "parts", resume=True, device="cpu")
    first, second = (load_model_files(path).weights for path in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_class_that_nothing_attends_to_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cross-attention needs network\.attention_factors"):
        small("latent", condition={"classes": "cross-attention"})


def test_options_that_do_not_fit_are_refused(pictures, models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--autoencoder and --stage are for configurations that name an autoencoder"):
        train_generator(small("pixel"), pictures, tmp_path / "a", autoencoder=models["autoencoder"])
    with pytest.raises(ModelError, match="a pixel, not an autoencoder"):
        train_generator(small("latent"), pictures, tmp_path / "b", autoencoder=models["pixel"])
    with pytest.raises(InputError, match="24 files; expected more than 0 for testing and 40"):
        train_generator(small("pixel", data={"size": 16, "validation_images": 40}), pictures, tmp_path / "c")
    with pytest.raises(ModelError, match=r"nothing\.pth: cannot load LPIPS"):
        lpips = small("autoencoder", loss={"perceptual": "lpips", "lpips_backbone": str(tmp_path / "nothing.pth")})
        train_generator(lpips, pictures, tmp_path / "d")


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixel", "class", "latent", "token"])
def test_a_sample_is_the_same_in_any_batch(name, models) -> None:
    options = SampleOptions(sampler="ddpm", steps=3, device="cpu")
    source = ImageSource(models[name], options)
    together = source.draw([0, 1, 2]).int()
    assert together.shape == (3, 16, 16, 3)
    assert int((source.draw([2]).int() - together[2:]).abs().max()) <= 1
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", ["class", "token"])
def test_guidance_changes_samples_and_one_is_none(name, models) -> None:
    def draw(scale: float) -> torch.Tensor:
        source = ImageSource(models[name], SampleOptions(label=1, guidance=scale, steps=3, device="cpu"))
        for i, parameter in enumerate(source.generator.task.parameters()):  # two steps leave layers at zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        return source.draw([0, 1])

    plain, strong = draw(1.0), draw(4.0)
    assert torch.equal(plain, draw(1.0))
    assert not torch.equal(plain, strong)


def test_a_classifier_guides_pixels(models) -> None:
    def draw(scale: float) -> torch.Tensor:
        options = SampleOptions(
            label=1, classifier=str(models["classifier"]), classifier_scale=scale, steps=3, device="cpu"
        )
        return ImageSource(models["pixel"], options).draw([0, 1])

    assert torch.equal(draw(0.0), ImageSource(models["pixel"], SampleOptions(steps=3, device="cpu")).draw([0, 1]))
    assert not torch.equal(draw(0.0), draw(50.0))


@pytest.mark.parametrize("name", ["upsampler", "latent-upsampler"])
def test_an_upsampler_doubles_what_is_sampled(name, models) -> None:
    options = SampleOptions(upsampler=str(models[name]), steps=3, device="cpu")
    source = ImageSource(models["half"], options)
    assert source.draw([0, 1]).shape == (2, 16, 16, 3) and source.last.config.data.shape == (16, 16)


def test_an_upsampler_of_latents_sees_the_low_resolution_image(models) -> None:
    found = restore_generator(load_model_files(models["latent-upsampler"]))
    assert found.shape == (2, 8, 8) and found.codec is not None
    with torch.no_grad():  # the last layer starts at zero: two steps of training hardly use the condition
        for parameter in found.task.network.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    dark, bright = (found.sample([0], "ddim", 2, low=torch.full((1, 3, 8, 8), value)) for value in (-1.0, 1.0))
    assert dark.shape == (1, 3, 16, 16) and not torch.allclose(dark, bright)


def test_a_low_resolution_image_is_brought_to_the_size_of_any_latent() -> None:
    low = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(enlarged(low, (8, 8)), low)
    torch.testing.assert_close(enlarged(low, (4, 4)), reduced(low, 2))  # means, not every other pixel
    assert enlarged(low, (16, 16)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "upsampler", "factor": 3, "data": {"size": 64}}, "no multiple of factor 3"),
        ({"method": "pixel", "autoencoder": "autoencoder-tiny-imagenet-small"}, "method pixel has no autoencoder"),
        ({"method": "latent"}, "method latent needs an autoencoder"),
        ({"method": "pixel", "preprocessing": {"size": [64, 64]}}, "use data.size for the size of images"),
        ({"method": "autoencoder", "preprocessing": {"size": [64, 64]}}, "use data.size for the size of images"),
    ],
)
def test_contradictions_of_a_configuration_are_named(content, message) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config(content, "test")


def test_the_low_resolution_image_is_that_of_the_latent_be_it_mirrored_or_not(pictures, tmp_path: Path) -> None:
    """Latents that are the images themselves show which of both sides an example took."""
    images = packed(pictures, tmp_path, 16, 3, held_out=(0, 4))
    codec = SimpleNamespace(encode=lambda image: image)
    latents = cached_latents(images, codec, "same", torch.device("cpu"))
    examples = LatentExamples(latents, images, images.part("train"), True, partial(reduced, factor=2))
    seen = set()
    for seed in range(8):
        found = examples.example(0, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found["low"], reduced(found["image"][None], 2)[0], atol=2e-3, rtol=0)
        seen.add(tuple(found["low"].flatten().tolist()))
    assert len(seen) == 2


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
def test_wishes_that_a_model_cannot_fulfil_are_refused(model, options, message, models) -> None:
    named = {key: str(models[value]) if value in models else value for key, value in options.items()}
    with pytest.raises(UsageError, match=message):
        ImageSource(models[model], SampleOptions(device="cpu", **named))


def test_generators_of_volumes_from_scans_to_scans(tmp_path: Path) -> None:
    """Pixel and latent, trained on whole scans: what is sampled is a scan of the model's voxel size."""
    (tmp_path / "scans").mkdir()
    for i in range(4):
        data = np.random.default_rng(i).random((9, 10, 8)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), tmp_path / "scans" / f"{i}.nii.gz")
    whole: dict[str, object] = {
        "data": {"size": [12, 12, 8], "channels": 1, "validation_images": 1},
        "preprocessing": {"spacing_mm": [2, 2, 2]},
    }
    network = {"dims": 3, "channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 4}
    first = small("autoencoder", **whole, loss={"discriminator_channels": 4, "discriminator_layers": 1})
    codec = train_generator(first, tmp_path / "scans", tmp_path / "codec", device="cpu")
    assert load_model_files(codec).card["training"]["perceptual_loss"] == "gradient-ssim"
    for method, given in (("pixel", None), ("latent", codec)):
        run = tmp_path / method
        config = small(method, **whole, network=network)
        model = train_generator(config, tmp_path / "scans", run, autoencoder=given, device="cpu")
        options = SampleOptions(count=2, steps=2, device="cpu")
        paths = sample_images(model, tmp_path / f"{method}-samples", options)
        image = nib.load(paths[1])
        assert image.shape == (12, 12, 8) and np.allclose(np.diag(image.affine), [2, 2, 2, 1])
        with Image.open(tmp_path / f"{method}-samples" / "grid.png") as picture:
            assert picture.size == (2 * 12 + 2, 12)
        assert sample_images(model, tmp_path / f"{method}-samples", options) == paths
    with pytest.raises(UsageError, match="makes volumes, and the scores are of images"):
        evaluate_generator([str(run)], tmp_path / "scans", tmp_path / "scores")


def test_an_interrupted_call_is_finished_with_the_same_images(models, tmp_path: Path) -> None:
    whole = sample_images(models["pixel"], tmp_path / "a", SampleOptions(count=5, device="cpu"))
    paths = sample_images(models["pixel"], tmp_path / "b", SampleOptions(count=2, device="cpu"))
    stamp = paths[0].stat().st_mtime_ns
    paths = sample_images(models["pixel"], tmp_path / "b", SampleOptions(count=5, batch_size=2, device="cpu"))
    assert paths[0].stat().st_mtime_ns == stamp
    for one, other in zip(whole, paths, strict=True):
        gap = read_png(one).astype(int) - read_png(other).astype(int)
        assert np.abs(gap).max() <= 1
    with Image.open(tmp_path / "b" / "grid.png") as grid:
        assert grid.size == (3 * 18 - 2, 2 * 18 - 2)
    with pytest.raises(UsageError, match="of other options"):
        sample_images(models["pixel"], tmp_path / "b", SampleOptions(count=5, steps=9, device="cpu"))


def test_the_trained_network_is_at_hand(models) -> None:
    loaded = load_model(models["class"])
    out = loaded.network(torch.zeros(1, 3, 16, 16), torch.tensor([5]), torch.tensor([1]))
    assert out.shape == (1, 3, 16, 16)


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A small network of random weights in the place of Inception, with its three outputs."""

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 8, 5, stride=4)
            self.fc = torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            maps = self.conv(x).relu()
            pooled = maps.mean((2, 3))
            return pooled, maps, self.fc(pooled)

    path = tmp_path_factory.mktemp("network") / "small.pt"
    torch.jit.trace(Small().eval(), torch.zeros(2, 3, 64, 64)).save(str(path))
    return path


def test_the_table_has_a_row_a_sampler_and_the_floor_and_resumes(models, pictures, network, tmp_path: Path) -> None:
    def run() -> object:
        return evaluate_generator(
            [str(models["pixel"]), str(pictures)],
            pictures,
            tmp_path / "out",
            GeneratorEvaluationOptions([("ddim", 2), ("ddpm", 4)], SampleOptions(count=10, device="cpu"), str(network)),
        )

    result = run()
    table = result.table()
    assert [row["sampler"] for row in table] == ["", "ddim-2", "ddpm-4", ""]
    assert result.extractor.startswith("small.pt (")
    assert all(row["N"] == 10 for row in table)
    own = table[-1]  # ten of the real images against all of them
    assert own["recall"] > 0.3 and own["precision"] == 1
    assert own["FID"] < min(table[1]["FID"], table[2]["FID"])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.npy")}
    again = run()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again.table() == table
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["extractor"] == result.extractor


def test_enlarged_samples_are_scored_at_their_own_size(models, pictures, network, tmp_path: Path) -> None:
    options = SampleOptions(count=6, upsampler=str(models["upsampler"]), device="cpu")
    result = evaluate_generator(
        [str(models["half"])],
        pictures,
        tmp_path / "out",
        GeneratorEvaluationOptions([("ddim", 2)], options, str(network)),
    )
    assert [row.scores.count for row in result.rows] == [6, 6]
    assert np.load(next((tmp_path / "out").rglob("*.npy"))).shape == (6, 16, 16, 3)
    saved = load_model_files(models["upsampler"])
    again = {name: value + 1 for name, value in saved.weights.items()}
    save_model(tmp_path / "retrained", saved.card, again, "")
    shutil.copytree(tmp_path / "retrained", tmp_path / "same", dirs_exist_ok=True)
    changed = SampleOptions(count=6, upsampler=str(tmp_path / "same"), device="cpu")
    evaluate_generator(
        [str(models["half"])],
        pictures,
        tmp_path / "c",
        GeneratorEvaluationOptions([("ddim", 2)], changed, str(network)),
    )
    save_model(tmp_path / "same", saved.card, saved.weights, "")
    with pytest.raises(UsageError, match="holds samples of another model"):
        evaluate_generator(
            [str(models["half"])],
            pictures,
            tmp_path / "c",
            GeneratorEvaluationOptions([("ddim", 2)], changed, str(network)),
        )
    with pytest.raises(UsageError, match="only folders of samples"):
        evaluate_generator(
            [str(pictures)], pictures, tmp_path / "d", GeneratorEvaluationOptions([("ddim", 2)], changed, str(network))
        )
    inside = sorted(extractor(str(network)).fingerprints)
    save_model(tmp_path / "cheat", {**saved.card, "loss_extractors": inside[:1]}, saved.weights, "")
    with pytest.raises(ModelError, match="cannot score it"):
        cheat = SampleOptions(count=6, upsampler=str(tmp_path / "cheat"), device="cpu")
        evaluate_generator(
            [str(models["half"])],
            pictures,
            tmp_path / "b",
            GeneratorEvaluationOptions([("ddim", 2)], cheat, str(network)),
        )


def test_a_fast_sampler_that_is_twice_as_bad_is_named() -> None:
    def row(sampler: str, steps: int, fid: float) -> Row:
        return Row("m", sampler, steps, Scores(0.5, 0.5, 2.0, fid, 1.0, 0.1, 10, 10))

    (said,) = _suspicious([row("ddim", 50, 210.1), row("ddim", 200, 190.0), row("ddpm", 1000, 100.0)])
    assert "FID 210.1 with ddim-50 is more than 2 times the 100.0 of ddpm-1000" in said


def test_what_cannot_be_scored_is_said_before_anything_is_sampled(models, pictures, network, tmp_path: Path) -> None:
    def run(*names: object, samplers: tuple[tuple[str, int], ...] = (("ddim", 2),), **changes: object) -> None:
        options = SampleOptions(count=6, device="cpu", **changes)
        evaluate_generator(
            [str(name) for name in names],
            pictures,
            tmp_path / "out",
            GeneratorEvaluationOptions(samplers, options, str(network)),
        )

    saved = load_model_files(models["pixel"])
    inside = sorted(extractor(str(network)).fingerprints)
    save_model(tmp_path / "cheat", {**saved.card, "loss_extractors": inside[:1]}, saved.weights, "")
    with pytest.raises(ModelError, match=r"was trained with small\.pt .* cannot score it"):
        run(models["half"], tmp_path / "cheat")
    save_model(tmp_path / "other" / models["pixel"].parent.name / "model", saved.card, saved.weights, "")
    with pytest.raises(UsageError, match="the name of two models or folders"):
        run(models["pixel"], tmp_path / "other" / models["pixel"].parent.name)
    with pytest.raises(UsageError, match="--guidance needs a model"):
        run(models["class"], models["pixel"], guidance=2.0)
    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "few" / f"{i}.png")
    with pytest.raises(UsageError, match="3 images are too few"):
        run(tmp_path / "few")
    stopped = tmp_path / "stopped"
    (stopped / "samples").mkdir(parents=True)
    (stopped / "config.yaml").write_text("method: pixel")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stopped / "samples" / "001.png")
    with pytest.raises(ModelError, match="found no model there"):
        run(stopped)
    assert not (tmp_path / "out").exists()


def test_samples_are_scored_without_their_overview(models, pictures, network, tmp_path: Path) -> None:
    sample_images(str(models["pixel"]), tmp_path / "s", SampleOptions(count=6, steps=2, device="cpu"))
    options = SampleOptions(count=100, device="cpu")
    result = evaluate_generator(
        [str(tmp_path / "s")], pictures, tmp_path / "out", GeneratorEvaluationOptions((), options, str(network))
    )
    assert [row.scores.count for row in result.rows] == [12, 6]  # real images in halves, and the samples
    assert "no images of it are held out" in result.warnings[-1]
    header = (tmp_path / "out" / "scores.csv").read_text().splitlines()[0]
    assert header.endswith("extractor,reference images")


def test_an_autoencoder_without_an_adversary_keeps_its_last_weights(pictures, tmp_path: Path) -> None:
    training = {"batch_size": 2, "max_steps": 4, "validate_every": 2, "warmup_steps": 1, "ema_decay": 0.5}
    loss = {"adversarial_weight": 0.0, "discriminator_channels": 8, "discriminator_layers": 1}
    model = train_generator(
        small("autoencoder", loss=loss, training=training), pictures, tmp_path / "run", device="cpu"
    )
    assert load_model_files(model).card["training"]["step"] == 4


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_whatever_asks_for_a_gradient_gets_one(adversarial) -> None:
    """Of what does not, several processes would wait for each other without end."""
    torch.manual_seed(0)
    codec = KLAutoencoder(2, 1, 1, 2, channels=(32, 32), attention_levels=(False, False))
    weights = LossWeights(adversarial=adversarial, adversarial_start=0)
    model = AutoencoderTraining(codec, GradientSSIM(), weights, 8, 1).train()
    model({"image": torch.rand(2, 1, 16, 16), "seed": torch.arange(2)}).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    asking = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("discriminator")]
    assert bool(asking) == (adversarial > 0)


def test_a_latent_run_goes_on_with_the_autoencoder_it_was_given(pictures, models, tmp_path: Path) -> None:
    given = {"autoencoder": models["autoencoder"], "device": "cpu"}
    train_generator(small("latent"), pictures, tmp_path / "run", max_steps=1, **given)
    with pytest.raises(UsageError, match="was started with --autoencoder; give the same one to --resume"):
        train_generator(small("latent"), pictures, tmp_path / "run", resume=True, device="cpu")
    assert not (tmp_path / "run" / "autoencoder").exists()
    train_generator(small("latent"), pictures, tmp_path / "run", resume=True, **given)


def test_what_no_model_can_be_built_of_leaves_no_run_behind(pictures, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(pictures.rglob("*.png"))):
        shutil.copy(file, flat / f"{i}.png")
    with pytest.raises(UsageError):
        train_generator(small("pixel", condition={"classes": "embedding"}), flat, tmp_path / "run", device="cpu")
    assert train_generator(small("pixel"), flat, tmp_path / "run", max_steps=1, device="cpu").is_dir()
    with pytest.raises(UsageError, match=r"data\.size: 15 is no multiple of 2, by which the autoencoder divides it"):
        small("autoencoder", data={"size": 15, "validation_images": 4})


def test_both_stages_hold_out_the_same_images(pictures, models, tmp_path: Path) -> None:
    data = {"size": 16, "validation_images": 4, "test_images": 5}
    with pytest.raises(ModelError, match=r"made for images with .*'test_images': 0.* this configuration has .*: 5"):
        train_generator(
            small("latent", data=data), pictures, tmp_path / "a", autoencoder=models["autoencoder"], device="cpu"
        )
    training = {"batch_size": 2, "max_steps": 1, "validate_every": 1, "warmup_steps": 1, "ema_decay": 0.5}
    stage = small("autoencoder", training=training)
    (tmp_path / "codec.yaml").write_text(json.dumps(stage.model_dump(mode="json")))
    config = small("latent", data=data, autoencoder=str(tmp_path / "codec.yaml"), training=training)
    train_generator(config, pictures, tmp_path / "b", device="cpu")
    found = load_model_files(tmp_path / "b" / "autoencoder").card
    assert found["config"]["data"]["test_images"] == 5 and found["training"]["data"]["images"] == 24 - 9


def test_workers_open_packed_images_and_latents_again(pictures, tmp_path: Path) -> None:
    images = packed(pictures, tmp_path, 16, held_out=(2, 4))
    assert len(pickle.dumps(images)) < 2000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images)).images, images.images)

    class Halved:
        def encode(self, image: torch.Tensor) -> torch.Tensor:
            return image[:, :, ::2, ::2]

    latents = cached_latents(images, Halved(), "key", torch.device("cpu"))
    assert not latents[images.part("test")].any() and latents[images.part("validation")].any()
    examples = LatentExamples(latents, images, images.part("train"), flip=False)
    copy = pickle.loads(pickle.dumps(examples))
    assert len(pickle.dumps(examples)) < 4000
    torch.testing.assert_close(
        copy.example(3, torch.Generator())["image"], examples.example(3, torch.Generator())["image"]
    )


def test_unusable_images_leave_no_run_behind(pictures, tmp_path: Path) -> None:
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    file = next(broken.rglob("*.png"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=file.name):
        train_generator(small("pixel"), broken, tmp_path / "run", device="cpu")
    assert train_generator(small("pixel"), broken, tmp_path / "run", skip_broken=True, device="cpu").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"size": 8, "validation_images": 4}}, "its size is"),
        ({"schedule": {"name": "cosine", "num_steps": 1000}}, "its noise schedule is"),
    ],
)
def test_a_classifier_of_another_generator_is_refused(changes, message, models, pictures, tmp_path: Path) -> None:
    other = train_generator(small("classifier", **changes), pictures, tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match=message):
        ImageSource(models["pixel"], SampleOptions(classifier=str(other), device="cpu"))


def test_a_classifier_guides_an_unconditional_generator_to_all_its_classes_in_turn(models) -> None:
    source = ImageSource(models["pixel"], SampleOptions(classifier=str(models["classifier"]), device="cpu"))
    assert source.labels(range(4)).tolist() == [0, 1, 0, 1]


def test_a_larger_count_adds_to_the_samples(models, pictures, network, tmp_path: Path) -> None:
    def run(count: int, output: str) -> np.ndarray:
        options = SampleOptions(count=count, batch_size=4, device="cpu")
        evaluate_generator(
            [str(models["pixel"])],
            pictures,
            tmp_path / output,
            GeneratorEvaluationOptions([("ddim", 2)], options, str(network)),
        )
        return np.load(next((tmp_path / output / "samples").rglob("*.npy")))

    few, more, anew = run(6, "out"), run(11, "out"), run(11, "new")
    assert len(few) == 6
    np.testing.assert_array_equal(more[:6], few)
    np.testing.assert_allclose(more.astype(int), anew.astype(int), atol=1)  # other batches round otherwise


def test_only_what_was_held_out_is_the_reference(pictures, network, tmp_path: Path) -> None:
    """Ranked anew in a part of the folder, images that were trained on would be called test images."""
    data = {"size": 16, "validation_images": 2, "test_images": 12}
    model = train_generator(small("pixel", data=data), pictures, tmp_path / "run", max_steps=1, device="cpu")
    held_out = restore_generator(load_model_files(model)).held_out
    assert held_out is not None
    part = tmp_path / "part"
    shutil.copytree(pictures, part)
    names = [str(file.relative_to(part)) for file in sorted(part.rglob("*.png"))]
    gone = [name for name in names if held_out.count([name])[0]][:2]  # two of the twelve
    for name in gone:
        (part / name).unlink()
    options = SampleOptions(count=10, device="cpu")
    found = evaluate_generator(
        [str(model)], part, tmp_path / "out", GeneratorEvaluationOptions([("ddim", 2)], options, str(network))
    )
    assert found.reference_count == 10


def test_models_that_see_scans_differently_are_scored_apart(tmp_path: Path, network) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        image = nib.Nifti1Image(rng.random((16, 16, 8)).astype(np.float32), np.eye(4))
        (tmp_path / "scans").mkdir(exist_ok=True)
        nib.save(image, tmp_path / "scans" / f"s{i}.nii.gz")
    data = {"size": 16, "channels": 1, "validation_images": 1}
    models = [
        train_generator(
            small("pixel", data=data, preprocessing={"intensity": how}), tmp_path / "scans", tmp_path / how,
            max_steps=1, device="cpu",
        )
        for how in ("percentile", "median")
    ]  # fmt: skip
    options = SampleOptions(count=10, device="cpu")
    with pytest.raises(UsageError, match="see scans after different preprocessing"):
        evaluate_generator(
            [str(m) for m in models],
            tmp_path / "scans",
            tmp_path / "out",
            GeneratorEvaluationOptions([("ddim", 2)], options, str(network)),
        )


def test_too_few_images_are_refused(models, pictures, network, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for i, file in enumerate(sorted(pictures.rglob("*.png"))[:7]):
        shutil.copy(file, few / f"{i}.png")
    with pytest.raises(UsageError, match="8 samples against 7 real images are too few"):
        options = SampleOptions(count=8, device="cpu")
        evaluate_generator(
            [str(models["pixel"])],
            few,
            tmp_path / "out",
            GeneratorEvaluationOptions([("ddim", 2)], options, str(network)),
        )
    with pytest.raises(UsageError, match="4 samples against 24 real images are too few"):
        evaluate_generator(
            [str(models["pixel"])],
            pictures,
            tmp_path,
            GeneratorEvaluationOptions([("ddim", 2)], SampleOptions(count=4, device="cpu"), str(network)),
        )


def test_samplers_are_parsed_or_refused() -> None:
    assert parse_samplers("ddim:50, ddpm:1000") == [("ddim", 50), ("ddpm", 1000)]
    for text in ("ddim", "euler:5", "ddim:0", "ddim:x"):
        with pytest.raises(UsageError, match="expected NAME:STEPS"):
            parse_samplers(text)

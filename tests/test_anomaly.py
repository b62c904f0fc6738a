"""Anomaly segmentation through its commands: training on healthy scans, thresholds, maps and masks, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from medseg_cli.main import app
from PIL import Image
from typer.testing import CliRunner

from medseg_diffusion.config.anomaly import AnomalyConfig
from medseg_diffusion.config.load import load_config, parse_config, presets
from medseg_diffusion.data.healthy import (
    find_healthy,
    healthy_slices,
    healthy_source,
    left_out,
    lesion_map,
    packed_healthy,
    refuse_lesions,
    require_usable,
)
from medseg_diffusion.errors import InputError, ModelError, UsageError
from medseg_diffusion.models.anomaly import AnomalyModel, DetectionOptions
from medseg_diffusion.models.anomaly_map import AnomalyMap, mask_of, on_grid, scored
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.volumes.foreground import scan_foreground
from medseg_diffusion.volumes.io import read_volume
from medseg_diffusion.volumes.preprocessing import Preprocessing
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows.anomaly import AnomalyOptions, anomaly, chosen_threshold, parse_threshold
from medseg_diffusion.workflows.anomaly_calibration import healthy_voxels
from medseg_diffusion.workflows.calibrate_anomaly import CalibrationOptions, calibrate_anomaly
from medseg_diffusion.workflows.train_anomaly import train_anomaly

ANOMALY = [name for name in presets() if isinstance(load_config(name), AnomalyConfig)]


@pytest.fixture(autouse=True, scope="module")
def own_home(tmp_path_factory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSEG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def head(seed: int, lesion: slice | None = None, shape: tuple[int, int, int] = (20, 24, 12)) -> tuple[Any, Any]:
    """A bright ellipsoid in noisy air, with a very bright block in some slices, and the block's mask."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = axes[0] ** 2 + axes[1] ** 2 < 0.8
    image = rng.normal(5, 1, shape) + inside * rng.normal(100, 4, shape)
    label = np.zeros(shape, np.uint8)
    if lesion is not None:
        label[8:13, 9:15, lesion] = 1
        image[label > 0] += 80
    return image.astype(np.float32), label


def write(path: Path, array: np.ndarray, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1])), path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Eight scans with a lesion in slices 4 to 6, labelled."""
    folder = tmp_path_factory.mktemp("scans")
    for i in range(8):
        image, label = head(i, slice(4, 7))
        write(folder / "images" / f"s{i}.nii.gz", image)
        write(folder / "labels" / f"s{i}.nii.gz", label)
    return folder


def small(method: str, size: object = 16, **changes: object) -> AnomalyConfig:
    """The smallest configuration for a kind of generator."""
    dims = 2 if isinstance(size, int) else 3
    data = {"size": size, "channels": 1, "test_images": 2, "validation_images": 2}
    network = {"dims": dims, "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    training = {"batch_size": 4, "max_steps": 6, "validate_every": 6, "warmup_steps": 1, "ema_decay": 0.5}
    generator: dict[str, Any] = {"data": data, "network": network, "training": training, "method": method}
    generator["diffusion"] = {"target": "x0" if method == "patched" else "v", "noise": "simplex"}
    generator["sampling"] = {"steps": 2}
    content: dict[str, Any] = {"method": "anomaly", "generator": generator}
    if method == "latent":
        generator["autoencoder"] = changes.pop("autoencoder")
        generator["diffusion"] = {"target": "v"}
        content["latent_healing"] = {"times": 3, "steps": 4}
    if method == "classes":
        generator |= {"method": "pixel", "condition": {"classes": "embedding", "drop": 0.5}}
        generator["diffusion"] = {"target": "v"}
        content["classifier"] = {
            "method": "classifier",
            "data": data,
            "network": {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_factors": [2],
                        "head_channels": 8, "norm_groups": 4},
            "training": training,
        }  # fmt: skip
        content["counterfactual"] = {"start": 100, "steps": 3, "scale": 1.0}
    if "noise" in changes:
        generator["diffusion"]["noise"] = changes.pop("noise")
    generator["data"] = {**data, "test_images": changes.pop("test_images", data["test_images"])}
    content |= {"partial_noise": {"start": 100, "steps": 2}} | changes
    found = parse_config(content, "test")
    assert isinstance(found, AnomalyConfig)
    return found


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("configs") / "codec.yaml"
    file.write_text(
        """
method: autoencoder
data: {size: 16, channels: 1, test_images: 2, validation_images: 2}
network: {latent_channels: 2, channels: [8, 8], num_res_blocks: 1, norm_groups: 4}
loss: {perceptual: gradient-ssim, adversarial_weight: 0.0, discriminator_channels: 4, discriminator_layers: 1}
training: {batch_size: 4, max_steps: 60, validate_every: 60, warmup_steps: 1, ema_decay: 0.5, learning_rate: 3.0e-3}
"""
    )
    return str(file)


@pytest.fixture(scope="module")
def models(scans, autoencoder, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    configs = {
        "latent": small("latent", autoencoder=autoencoder),
        "pixel": small("pixel"),
        "patched": small("patched"),
        "classes": small("classes"),
    }
    found = {}
    for name, config in configs.items():
        others = scans if config.needs_unhealthy else None
        found[name] = train_anomaly(
            config, scans, root / name, exclude_labelled=2, unhealthy=others, device="cpu"
        ).model
    return found


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANOMALY)
def test_every_preset_says_what_it_detects_with(name) -> None:
    config = load_config(name)
    assert isinstance(config, AnomalyConfig) and config.detectors
    if config.generator.method == "latent":
        stage = load_config(str(config.generator.autoencoder))
        assert (stage.data.shape, stage.preprocessing) == (config.generator.data.shape, config.generator.preprocessing)  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", ANOMALY)
def test_a_preset_trains_for_a_step_and_finds_something(name, monkeypatch, tmp_path: Path) -> None:
    """At full size, with one step and the fewest calls in detection."""
    monkeypatch.setattr("medseg_diffusion.workflows.train_generator.PICTURES", 1)
    config = load_config(name)
    assert isinstance(config, AnomalyConfig)
    shape = (40, 44, 4) if config.generator.network.dims == 2 else (40, 44, 40)
    for i in range(5):
        image, label = head(i, slice(2, 3), shape)
        write(tmp_path / "scans" / "images" / f"s{i}.nii.gz", image)
        write(tmp_path / "scans" / "labels" / f"s{i}.nii.gz", label)
    data = ["test_images=0", "validation_images=1"]
    few = ["latent_healing.times=2", "latent_healing.steps=2", "partial_noise.steps=2", "counterfactual.steps=2"]
    changes = [f"generator.data.{key}" for key in data] + ["generator.training.batch_size=1", *few]
    if config.classifier is not None:
        changes += [f"classifier.data.{key}" for key in data] + ["classifier.training.batch_size=1"]
    if config.generator.autoencoder is not None:
        stage = load_config(config.generator.autoencoder, ["training.batch_size=1", *(f"data.{key}" for key in data)])
        (tmp_path / "codec.yaml").write_text(json.dumps(stage.model_dump(mode="json")))
        changes.append(f"generator.autoencoder={tmp_path / 'codec.yaml'}")
    config = load_config(name, changes)
    assert isinstance(config, AnomalyConfig)
    # Volumes with a lesion are no healthy ones: for those the images stand alone.
    healthy = tmp_path / "scans" / ("images" if config.generator.network.dims == 3 else ".")
    others = tmp_path / "scans" if config.needs_unhealthy else None
    exclude = None if config.generator.network.dims == 3 else 1
    found = train_anomaly(
        config, healthy, tmp_path / "run", exclude_labelled=exclude, unhealthy=others, max_steps=1, device="cpu"
    )
    score = AnomalyModel(found.model, device="cpu").score(read_volume(tmp_path / "scans" / "images" / "s0.nii.gz"))
    assert score.score.shape == shape and bool(score.score.isfinite().all())


def test_slices_near_a_labelled_one_are_left_out() -> None:
    label = torch.zeros(4, 4, 10)
    label[1, 1, 4:6] = 1
    kept = {n: healthy_slices(label, 10, n).nonzero().flatten().tolist() for n in (1, 3)}
    assert kept == {1: [0, 1, 2, 3, 6, 7, 8, 9], 3: [0, 1, 8, 9]}
    assert bool(healthy_slices(None, 10, 3).all())


def test_healthy_and_unhealthy_slices_are_packed_with_their_class_and_side(scans, tmp_path: Path) -> None:
    source = healthy_source(scans, 2, scans, (2, 2))
    images = packed_healthy(source, tmp_path, (16, 16), 1, Preprocessing())
    assert images.classes == ("healthy", "unhealthy")
    # 12 slices less those closer than 2 to slices 4..6; and the 3 labelled ones.
    for part, patients in (("train", 4), ("validation", 2), ("test", 2)):
        labels = images.labels[images.part(part)]
        assert [int((labels == value).sum()) for value in (0, 1)] == [7 * patients, 3 * patients]
    bright = images.images.reshape(len(images.images), -1).max(1)
    assert len(bright) == 80


def test_every_height_is_drawn_as_often_as_it_occurs(tmp_path: Path) -> None:
    """Healthy slices are rare where lesions are: a model would hardly see that part of a healthy head."""
    for i in range(20):  # in every second scan a lesion in three of ten slices
        image, label = head(i, slice(4, 7) if i % 2 else None, (20, 24, 10))
        write(tmp_path / "all" / "images" / f"s{i:02}.nii.gz", image)
        write(tmp_path / "all" / "labels" / f"s{i:02}.nii.gz", label)
    source = healthy_source(tmp_path / "all", 1, tmp_path / "all", (0, 0))
    images = packed_healthy(source, tmp_path, (16, 16), 1, Preprocessing())
    times = np.bincount(images.epoch, minlength=len(images.images))
    healthy, unhealthy = (times[images.labels == label] for label in (0, 1))
    assert healthy[:10].tolist() == [1, 1, 1, 1, 2, 2, 2, 1, 1, 1] and healthy[10:17].tolist() == [1] * 7
    assert unhealthy.tolist() == [2] * 30
    # Where nothing is left out, every slice is drawn once.
    alone = healthy_source(tmp_path / "all" / "images", None, None, (0, 0))
    every = packed_healthy(alone, tmp_path, (16, 16), 1, Preprocessing())
    assert np.array_equal(np.sort(every.epoch), np.arange(200))


def test_lesions_among_healthy_scans_are_refused_unless_told_what_to_do(scans, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels/s\d\.nii\.gz: found 90 labelled voxels; .* --exclude-labelled 1"):
        train_anomaly(small("pixel"), scans, tmp_path / "run", device="cpu")
    # What was refused can be corrected and started in the same folder.
    trained = train_anomaly(small("pixel"), scans, tmp_path / "run", exclude_labelled=1, max_steps=1, device="cpu")
    data = load_model_files(trained.model).card["training"]["data"]
    # Four of eight patients are trained on, two hold out; 3 of 12 slices have a lesion.
    assert (data["slices for train"], data["slices left out of train"]) == (36, 12)
    assert (data["slices for validation"], data["slices left out of validation"]) == (18, 6)
    found = find_healthy(scans / "images")  # without their labels these are scans like any others
    assert len(found) == 8 and found[0].label is None


def test_small_lesions_count_whatever_the_models_voxels(tmp_path: Path) -> None:
    """A lesion of one voxel of 0.5 mm has an eighth of a voxel of 1 mm: no majority, and still a lesion."""
    for i in range(4):
        image, label = head(i, None, (40, 48, 24))
        label[20, 24, 13] = 1
        write(tmp_path / "scans" / "images" / f"s{i}.nii.gz", image, 0.5)
        write(tmp_path / "scans" / "labels" / f"s{i}.nii.gz", label, 0.5)
    found = find_healthy(tmp_path / "scans")
    with pytest.raises(InputError, match="found 1 labelled voxels"):
        refuse_lesions(found[0], None)
    _, placement = Preprocessing(spacing_mm=(1, 1, 1)).apply(read_volume(found[0].image))
    lesions = lesion_map(found[0], placement)
    assert lesions is not None and lesions[..., 6].any() and not lesions[..., :5].any() and not lesions[..., 8:].any()


def test_air_is_not_counted_as_left_out_for_a_lesion(tmp_path: Path) -> None:
    for i in range(4):
        image, label = head(i, slice(4, 6))
        image[..., :3] = 5 + np.random.default_rng(i).normal(0, 0.01, (20, 24, 3))
        write(tmp_path / "scans" / "images" / f"s{i}.nii.gz", image)
        write(tmp_path / "scans" / "labels" / f"s{i}.nii.gz", label)
    source = healthy_source(tmp_path / "scans", 1, None, (0, 0))
    images = packed_healthy(source, tmp_path, (16, 16), 1, Preprocessing())
    assert len(images.images) == 4 * 7 and left_out(images)["train"] == 4 * 2


def test_what_cannot_be_scored_is_refused_before_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for i in range(6):
        write(folder / f"v{i}.nii.gz", head(i, shape=(12, 14, 10))[0])
    write(folder / "v6.nii.gz", head(6, shape=(18, 14, 10))[0])
    with pytest.raises(InputError, match=r"v6\.nii\.gz: found 18 x 14 x 10 voxels on the model's grid"):
        train_anomaly(small("pixel", size=[16, 16, 12]), folder, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    scan = read_volume(folder / "v0.nii.gz")
    computed = replace(scan, header=replace(scan.header, modality="CT"))
    with pytest.raises(InputError, match="found modality CT; expected MR"):
        require_usable(computed, scan.shape, (16, 16), "MR")
    require_usable(computed, scan.shape, (16, 16), None)


def test_calibration_sees_no_voxel_of_a_slice_that_was_not_scored(models) -> None:
    """Slices of 1 mm on a grid of 3 mm: between a scored slice and another one lie mixtures with its zeros."""
    config = small("pixel")
    section = config.generator.preprocessing.model_copy(update={"spacing_mm": (1.0, 1.0, 3.0)})
    config = config.model_copy(update={"generator": config.generator.model_copy(update={"preprocessing": section})})
    image, _ = head(0, shape=(20, 24, 36))
    grid = on_grid(config, Volume(torch.from_numpy(image)[None], np.eye(4)))
    healthy = torch.ones(len(grid.images), dtype=torch.bool)
    healthy[4:7] = False

    class Ones:
        evaluations = 0

        def score(self, images: torch.Tensor, seeds: object) -> torch.Tensor:
            return torch.ones_like(images)

    config = config.model_copy(update={"postprocessing": config.postprocessing.model_copy(update={"median": 1})})
    found = scored(Ones(), config, grid, 0, torch.device("cpu"), only=healthy)
    inside = found.score[healthy_voxels(grid, healthy)]
    assert len(inside) > 4000 and float(inside.min()) > 0.999


def test_detectors_that_need_unhealthy_scans_say_so(scans, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scans with lesions too, for classifier-guided and .* --unhealthy"):
        train_anomaly(small("classes"), scans, tmp_path / "run", exclude_labelled=1, device="cpu")
    with pytest.raises(UsageError, match="uses only healthy scans"):
        train_anomaly(small("pixel"), scans, tmp_path / "run", exclude_labelled=1, unhealthy=scans, device="cpu")


def test_a_scan_without_a_healthy_slice_is_left_out_of_the_calibration(scans, models, tmp_path: Path) -> None:
    for i, lesion in enumerate((slice(0, 12), slice(4, 7))):
        image, label = head(20 + i, lesion)
        write(tmp_path / "more" / "images" / f"m{i}.nii.gz", image)
        write(tmp_path / "more" / "labels" / f"m{i}.nii.gz", label)
    found = calibrate_anomaly(
        models["latent"], tmp_path / "more", tmp_path / "new", CalibrationOptions(1), device="cpu"
    )
    assert {len(one.scan_scores) for one in found.calibration.values()} == {1}


def test_a_time_that_is_too_short_for_all_networks_says_so(scans, autoencoder, tmp_path: Path) -> None:
    config = small("latent", autoencoder=autoencoder)
    options: dict[str, Any] = {"exclude_labelled": 2, "device": "cpu"}
    with pytest.raises(
        UsageError, match=r"ended in the training of the autoencoder in .*generator; continue with --resume"
    ):
        train_anomaly(config, scans, tmp_path / "run", time_limit_min=1e-5, **options)
    assert train_anomaly(config, scans, tmp_path / "run", resume=True, **options).model.is_dir()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("latent", {"latent_healing": {"steps": 600}}, "latent_healing: needs steps <= start <= 1000"),
        ("latent", {"latent_healing": {"latest": 1001}}, "latent_healing: needs earliest <= latest <= 1000"),
        ("pixel", {"partial_noise": {"start": 1500}}, "partial_noise: needs steps <= start <= 1000"),
        ("patched", {"patched": {"time": 1001}}, "patched: needs time <= 1000"),
        ("classes", {"counterfactual": {"start": 100, "steps": 100}}, "counterfactual: needs steps < start <= 1000"),
        ("pixel", {"postprocessing": {"median": 4}}, "take an odd one"),
        ("classes", {"noise": "simplex"}, "classifier-guided is defined for gaussian noise"),
        ("latent", {"noise": "simplex"}, "latent-healing is defined for gaussian noise"),
        ("classes", {"test_images": 1}, "classifier: its data, preprocessing and schedule must be the generator's"),
    ],
)
def test_settings_that_no_detector_can_follow_are_refused_before_the_training(method, changes, message) -> None:
    extra = {"autoencoder": "autoencoder-slices-small"} if method == "latent" else {}
    with pytest.raises(UsageError, match=message):
        small(method, **extra, **changes)


def test_an_interrupted_run_is_resumed_to_the_same_model(scans, models, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_anomaly(small("pixel"), scans, run, exclude_labelled=2, max_steps=3, device="cpu")
    with pytest.raises(UsageError, match="add --resume"):
        train_anomaly(small("pixel"), scans, run, exclude_labelled=2, device="cpu")
    again = train_anomaly(small("pixel"), scans, run, exclude_labelled=2, resume=True, device="cpu")
    one, other = load_model_files(again.model), load_model_files(models["pixel"])
    for name, value in other.weights.items():
        torch.testing.assert_close(one.weights[name], value, rtol=1e-4, atol=1e-5)


# ---- scans in, maps and masks out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("latent", "latent-healing"),
        ("latent", "reconstruction"),
        ("pixel", "partial-noise"),
        ("patched", "patched"),
        ("classes", "classifier-guided"),
        ("classes", "counterfactual"),
    ],
)
def test_every_detector_from_scan_to_mask(name, method, scans, models, tmp_path: Path) -> None:
    scan = scans / "images" / "s0.nii.gz"
    command = [
        "anomaly",
        str(scan),
        "-m",
        str(models[name]),
        "--method",
        method,
        "-o",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [*command, "--preview"])
    assert result.exit_code == 0, result.output
    score, mask = (nib.load(tmp_path / f"s0_anomaly{end}.nii.gz") for end in ("", "_mask"))
    assert score.shape == mask.shape == (20, 24, 12) and mask.get_data_dtype() == np.uint8
    about = json.loads((tmp_path / "s0_anomaly.json").read_text())
    assert about["method"] == method and about["threshold_from"] == "auto"
    values = score.get_fdata()
    assert values.min() >= 0 and values.max() > 0
    expected = values > about["threshold"]
    # The stored threshold is rounded.
    assert (np.asarray(mask.dataobj) != expected).mean() < 1e-3
    assert 0 <= about["healthy_percentile"] <= 100 and about["healthy_scans"] == 2
    assert about["healthy_false_positive_rate"] <= 0.025 + 1e-6
    assert (tmp_path / "s0_anomaly_preview.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(app, [*command, "--skip-existing"])
    assert again.exit_code == 0 and "exists, skipped" in again.output


def test_the_threshold_has_the_rate_that_is_promised_on_the_scans_it_was_fitted_to(scans, models) -> None:
    model = AnomalyModel(models["pixel"], device="cpu")
    healthy = model.healthy_scores()
    assert healthy is not None and 0.015 < healthy.rate <= 0.025 + 1e-9
    split = json.loads((models["pixel"].parent / "split.json").read_text())
    rates = []
    for name in [name for name, side in split.items() if side == "validation"]:
        volume = read_volume(scans / "images" / f"{name}.nii.gz")
        # The seed of the calibration is that of the name.
        from medseg_diffusion.diffusion.noise import derive_seed

        found = model.score(volume, derive_seed(0, name))
        keep = torch.zeros(12, dtype=torch.bool)
        keep[[0, 1, 2, 8, 9, 10, 11]] = True
        inside = found.score[found.foreground & keep]
        rates.append(float((inside > healthy.automatic).float().mean()))
    assert float(np.mean(rates)) == pytest.approx(healthy.rate, abs=1e-6)


def test_thresholds_of_all_kinds(scans, models, tmp_path: Path) -> None:
    scan = scans / "images" / "s1.nii.gz"
    sizes = {}
    for threshold in ("q0.5", "q0.9", "auto", "q0.999", "1e9"):
        options = AnomalyOptions(str(models["pixel"]), threshold, output=tmp_path / threshold, device="cpu")
        assert [case.status for case in anomaly([scan], options)] == ["done"]
        about = json.loads((tmp_path / threshold / "s1_anomaly.json").read_text())
        sizes[threshold] = about["share_of_foreground"]
        assert about["threshold_from"] == (threshold if threshold != "1e9" else "given")
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True) and sizes["1e9"] == 0 and sizes["q0.5"] > 0.2
    for wrong in ("q1.5", "high", "nan", "q", "inf"):
        with pytest.raises(UsageError, match="expected auto, a quantile such as"):
            parse_threshold(wrong)


def test_the_map_depends_on_name_and_seed_and_on_nothing_else(scans, models) -> None:
    volume = read_volume(scans / "images" / "s1.nii.gz")
    model = AnomalyModel(models["pixel"], device="cpu")
    one, same, other = (model.score(volume, seed).score for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_small_parts_and_filtered_maps(scans, models, tmp_path: Path) -> None:
    score = torch.zeros(8, 8, 8)
    score[0, 0, 0] = score[1, 1, 1] = 2.0  # two voxels that touch at a corner
    score[4:6, 4:6, 4] = 2.0
    score[7, 7, 7] = 1.0  # not above the threshold
    score[7, 0, 0] = 9.0  # outside
    inside = torch.ones(8, 8, 8, dtype=torch.bool)
    inside[7, 0, 0] = False
    found = AnomalyMap(score, inside, 2.0, 0)
    for smallest, voxel, count in ((0, 1, 6), (2, 1, 6), (3, 1, 4), (3, 2, 6), (9, 2, 0)):
        assert int(mask_of(found, 1.0, voxel, smallest).sum()) == count
    options = AnomalyOptions(str(models["pixel"]), detection=DetectionOptions(median=3), output=tmp_path, device="cpu")
    (case,) = anomaly([scans / "images" / "s1.nii.gz"], options)
    assert case.warnings[0].startswith("the model was calibrated with another median: healthy quantiles do not hold")
    # What the file says of healthy scans would be of another map.
    about = json.loads((options.output / "s1_anomaly.json").read_text())  # type: ignore[operator]
    assert about["score"] > 0 and not [key for key in about if key.startswith("healthy")]
    found = calibrate_anomaly(
        models["pixel"],
        scans,
        tmp_path / "new",
        CalibrationOptions(2, detection=DetectionOptions(median=3)),
        device="cpu",
    )
    model = AnomalyModel(found.model, device="cpu")
    assert model.config.postprocessing.median == 3 and not model.notes
    assert AnomalyModel(found.model, DetectionOptions(median=1), "cpu").notes
    with pytest.raises(UsageError, match="--median 4"):
        AnomalyModel(models["pixel"], DetectionOptions(median=4), "cpu")
    with pytest.raises(UsageError, match="--latent-quantile is for latent-healing"):
        AnomalyModel(models["pixel"], DetectionOptions(latent_quantile=0.9), "cpu")


@pytest.mark.parametrize("name", ["latent", "pixel"])
def test_scores_count_where_the_scan_shows_something_whatever_the_model(name, scans, models) -> None:
    volume = read_volume(scans / "images" / "s1.nii.gz")
    found = AnomalyModel(models[name], device="cpu").score(volume)
    assert torch.equal(found.foreground, scan_foreground(volume))
    smaller = AnomalyModel(models[name], DetectionOptions(erosion=2), "cpu").score(volume).foreground
    assert 0 < int(smaller.sum()) < int(found.foreground.sum()) and not bool((smaller & ~found.foreground).any())


@pytest.mark.parametrize(("name", "method"), [("pixel", "partial-noise"), ("classes", "counterfactual")])
def test_evaluations_are_those_that_were_made(name, method, scans, models) -> None:
    model = AnomalyModel(models[name], DetectionOptions(method), "cpu")
    found = model.score(read_volume(scans / "images" / "s1.nii.gz"))
    assert found.evaluations == 12 * model.detector.evaluations  # twelve slices, all with foreground


def test_divergences_hardly_depend_on_the_precision_of_the_networks(models) -> None:
    detector = AnomalyModel(models["latent"], device="cpu").detector
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = detector.divergence(detector.codec.encode(images), range(4))  # type: ignore[attr-defined]
    with torch.autocast("cpu", torch.bfloat16):
        half = detector.divergence(detector.codec.encode(images), range(4))  # type: ignore[attr-defined]
    assert half.dtype == torch.float32
    assert float((half - exact).abs().mean() / exact.abs().mean()) < 0.02


@pytest.mark.parametrize("name", ["latent", "pixel", "patched", "classes"])
def test_bright_residuals_are_those_of_what_is_brighter(name, scans, models, tmp_path: Path) -> None:
    # Both are calibrated on the same scans: of latent healing the mask depends on them.
    absolute, bright = (
        calibrate_anomaly(
            models[name], scans, tmp_path / kind, CalibrationOptions(2, overrides=[f"residual={kind}"]), device="cpu"
        )
        for kind in ("absolute", "bright")
    )
    volume = read_volume(scans / "images" / "s1.nii.gz")
    for method in bright.calibration:
        both, brighter = (AnomalyModel(one.model, DetectionOptions(method), "cpu") for one in (absolute, bright))
        assert brighter.config.residual == "bright" and brighter.config.postprocessing.median == 1
        one, other = both.score(volume, 1).score, brighter.score(volume, 1).score
        assert bool((other <= one + 1e-6).all()) and 0 < float(other.sum()) < float(one.sum())


def test_calibration_changes_what_the_networks_do_not_depend_on(scans, models, tmp_path: Path) -> None:
    options = CalibrationOptions(2, overrides=["partial_noise.start=50", "quantile=0.9"])
    found = calibrate_anomaly(models["pixel"], scans, tmp_path / "new", options, device="cpu")
    config = AnomalyModel(found.model, device="cpu").config
    assert (config.partial_noise.start, config.quantile) == (50, 0.9)
    for override, message in (
        ("generator.network.channels=8", "calibration changes residual, latent_healing"),
        ("partial_noise.star=50", "unknown key partial_noise.star; did you mean start"),
        ("residual=dark", "residual: "),
    ):
        with pytest.raises(UsageError, match=message):
            options = CalibrationOptions(2, overrides=[override])
            calibrate_anomaly(models["pixel"], scans, tmp_path / "no", options, device="cpu")
    assert not (tmp_path / "no").exists()


def test_the_latent_quantile_moves_what_is_healed_and_the_threshold_does_not(scans, models) -> None:
    volume = read_volume(scans / "images" / "s1.nii.gz")
    loose, strict = (
        AnomalyModel(models["latent"], DetectionOptions(latent_quantile=quantile), "cpu").score(volume, 1).score
        for quantile in (0.5, 0.99)
    )
    assert int((loose > 0).sum()) > int((strict > 0).sum())
    models_of = [
        AnomalyModel(models["latent"], DetectionOptions(latent_quantile=quantile), "cpu") for quantile in (0.5, 0.99)
    ]
    thresholds = [chosen_threshold("auto", model) for model in models_of]
    assert thresholds[0] == thresholds[1] == AnomalyModel(models["latent"], device="cpu").healthy_scores().automatic  # type: ignore[union-attr]


def test_a_model_without_calibration_asks_for_it_and_gets_it(scans, models, tmp_path: Path) -> None:
    saved = load_model_files(models["pixel"])
    card = {key: value for key, value in saved.card.items() if key != "calibration"}
    save_model(tmp_path / "bare", card, saved.weights, "")
    command = ["anomaly", str(scans / "images" / "s0.nii.gz"), "-m", str(tmp_path / "bare"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert result.exit_code == 4 and "not calibrated for partial-noise; calibrate it with" in result.stderr
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out"), "--threshold", "0.5"]).exit_code == 0
    with pytest.raises(InputError, match="labelled voxels"):
        calibrate_anomaly(tmp_path / "bare", scans, tmp_path / "new", device="cpu")
    found = calibrate_anomaly(tmp_path / "bare", scans, tmp_path / "new", CalibrationOptions(2, 0.9), device="cpu")
    assert found.calibration["partial-noise"].rate == pytest.approx(0.1, abs=0.01)
    model = AnomalyModel(tmp_path / "new", device="cpu")
    assert model.healthy_scores() is not None and model.config.quantile == 0.9
    with pytest.raises(UsageError, match="exists; choose a new folder"):
        calibrate_anomaly(tmp_path / "bare", scans, tmp_path / "new", CalibrationOptions(2), device="cpu")


def test_what_is_written_can_be_evaluated_as_it_lies(scans, models, tmp_path: Path) -> None:
    options = AnomalyOptions(str(models["pixel"]), output=tmp_path / "found", device="cpu")
    anomaly([scans / "images"], options)
    command = ["evaluate", str(tmp_path / "found"), str(scans / "labels"), "-o", str(tmp_path / "report")]
    result = CliRunner().invoke(app, [*command, "--scores", str(tmp_path / "found"), "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 8
    assert "inside the foreground masks" in json.dumps(summary)


def test_slices_have_the_heads_proportions_whatever_the_voxels() -> None:
    """Sagittal slices of 4 mm: axial ones have pixels of 4 x 1 mm, and are no picture of square pixels as they are."""
    config = small("pixel", size=32)
    image = torch.from_numpy(head(0, shape=(40, 48, 12))[0])[None]
    cubic = on_grid(config, Volume(image, np.eye(4)))
    thick = image.unflatten(1, (10, 4)).mean(2)
    affine = np.diag([4.0, 1, 1, 1])
    affine[0, 3] = 1.5
    coarse = on_grid(config, Volume(thick, affine))
    assert coarse.images.shape == cubic.images.shape and coarse.native.shape == (10, 48, 12)
    assert float((coarse.images - cubic.images).abs().mean()) < 0.1
    assert float((coarse.inside - cubic.inside).abs().mean()) < 0.1
    for single in (image[:, 20:21], image[:, :, 24:25]):  # a sagittal and a coronal slice
        with pytest.raises(InputError, match="give the whole volume, not a single sagittal or coronal slice"):
            on_grid(config, Volume(single, np.eye(4)))


def test_erosion_leaves_the_border_of_a_crop() -> None:
    crop = torch.rand(20, 24, 12, generator=torch.Generator().manual_seed(0)) + 1
    config = small("pixel", postprocessing={"erosion": 2})
    assert bool(on_grid(config, Volume(crop[None], np.eye(4))).native.all())


def test_a_picture_is_no_scan(scans, models, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(tmp_path / "p.png")
    command = ["anomaly", str(tmp_path / "p.png"), "-m", str(models["pixel"]), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3 and "found a 2D picture; expected a volume" in result.stderr
    with pytest.raises(InputError, match="a 2D picture"):
        find_healthy(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((20, 24, 12), 7, np.float32), "the constant value 7"),
        (np.zeros((20, 24), np.float32), "a 2D image"),
        (np.random.default_rng(0).random((20, 24, 12, 2)).astype(np.float32), "a 4D image"),
        (np.where(np.arange(12) == 3, np.nan, np.ones((20, 24, 12))).astype(np.float32), "NaN or infinite voxels"),
    ],
)
def test_bad_scans_are_one_line_and_code_3(array, message, models, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.nii.gz", array)
    result = CliRunner().invoke(app, ["anomaly", str(bad), "-m", str(models["pixel"]), "--device", "cpu"])
    assert result.exit_code == 3 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.nii.gz"]


def test_one_bad_scan_stops_no_other(scans, models, tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", np.full((4, 4, 4), 1, np.float32))
    write(tmp_path / "b.nii.gz", head(3)[0])
    result = CliRunner().invoke(app, ["anomaly", str(tmp_path), "-m", str(models["pixel"]), "--device", "cpu"])
    assert result.exit_code == 1 and "1 of 2 scans failed" in result.stderr
    assert (tmp_path / "b_anomaly_mask.nii.gz").exists() and not (tmp_path / "a_anomaly_mask.nii.gz").exists()


def test_what_the_model_cannot_do_is_said(scans, models) -> None:
    with pytest.raises(UsageError, match="--method patched: this model has partial-noise"):
        AnomalyModel(models["pixel"], DetectionOptions("patched"), "cpu")
    with pytest.raises(ModelError, match="not an anomaly model"):
        AnomalyModel("brain-tissue-t1", device="cpu")


def test_whole_volumes(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / "scans" / f"v{i}.nii.gz", head(i, shape=(12, 14, 10))[0])
    config = small("pixel", size=[16, 16, 12])
    model = train_anomaly(config, tmp_path / "scans", tmp_path / "run", device="cpu").model
    sick, _ = head(9, slice(3, 7), shape=(14, 16, 11))
    found = AnomalyModel(model, device="cpu").score(read_volume(write(tmp_path / "sick.nii.gz", sick)))
    assert found.score.shape == (14, 16, 11) and found.evaluations == 2
    large = write(tmp_path / "large.nii.gz", head(9, shape=(18, 16, 11))[0])
    (case,) = anomaly([large], AnomalyOptions(str(model), device="cpu"))
    assert case.exit_code == 3 and "found 18 x 16 x 11 voxels on the model's grid; expected 4 x 4 x 3 to 16" in str(
        case.error
    )
    thin = write(tmp_path / "thin.nii.gz", head(9, shape=(12, 14, 2))[0])
    (case,) = anomaly([thin], AnomalyOptions(str(model), device="cpu"))
    assert case.exit_code == 3 and "found 12 x 14 x 2 voxels" in str(case.error)

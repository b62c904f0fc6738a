"""Loading of configurations: presets, unknown keys, broken files and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medseg_diffusion.config.load import NOTES, load_config, load_segmenter_config, presets
from medseg_diffusion.config.unread import unread_keys
from medseg_diffusion.errors import UsageError
from tests.helpers.configs import MINIMAL, write

# ---- presets ---------------------------------------------------------------------------------------------------------


def test_there_are_presets() -> None:
    assert len(presets()) > 0
    assert all("_" not in name and name == name.lower() for name in presets())


@pytest.mark.parametrize("name", presets())
def test_a_preset_survives_being_written_and_read_again(name, tmp_path: Path) -> None:
    """A model's card holds its configuration as JSON: it must come back the same."""
    config = load_config(name)
    assert config.description
    assert load_config(write(tmp_path, config.model_dump(mode="json"))) == config


@pytest.mark.parametrize("name", ["segdiff-nuclei-small", "ldm-tiny-imagenet-small", "anomaly-patched-small"])
def test_the_configuration_of_a_run_is_one(name, tmp_path: Path) -> None:
    """RUN/config.yaml notes more, such as the seed; elsewhere these keys are unknown."""
    content = {**load_config(name).model_dump(mode="json"), **dict.fromkeys(NOTES, 3)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert load_config(tmp_path / "config.yaml") == load_config(name)
    with pytest.raises(UsageError, match="unknown key"):
        load_config(write(tmp_path, content))


def test_a_generator_is_no_segmenter() -> None:
    with pytest.raises(UsageError, match="is of method pixel; train it with train-generator"):
        load_segmenter_config("adm-tiny-imagenet-small")


# ---- strictness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ({"trainning": {}}, "trainning", "training"),
        ({"network": {"chanels": 3}}, "network.chanels", "channels"),
        ({"diffusion": {"schedule": {"steps": 3}}}, "diffusion.schedule.steps", "num_steps"),
        ({"data": {"window": [8, 8, 8], "test_case": 3}}, "data.test_case", "test_cases"),
        ({"data": {"codes": {"lung": {"regoin": None}}}}, "data.codes.lung.regoin", "region"),
    ],
)
def test_an_unknown_key_is_refused_with_file_path_and_nearest_key(tmp_path: Path, change, key, nearest) -> None:
    path = write(tmp_path, {**MINIMAL, **change})
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: unknown key {key}; did you mean {nearest}?"


def test_an_unknown_key_is_told_before_other_problems(tmp_path: Path) -> None:
    """They may follow from it: with a misspelt section, the other values meet defaults."""
    path = write(tmp_path, {**MINIMAL, "data": {"window": 5}, "trainning": {"max_steps": 3}})
    with pytest.raises(UsageError, match=r"unknown key trainning; did you mean training\?"):
        load_config(path)


def test_a_misspelt_method_is_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key methd; did you mean method\?"):
        load_config(write(tmp_path, {"methd": "baseline"}))


def test_a_method_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"method: got \['baseline'\]; known: ensemdiff"):
        load_config(write(tmp_path, {**MINIMAL, "method": ["baseline"]}))


def test_an_unknown_key_that_resembles_nothing_is_refused_with_all_keys(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key network\.zzz; known: dims, channels, "):
        load_config(write(tmp_path, {**MINIMAL, "network": {"zzz": 1}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [("method: [", "not YAML"), ("- a\n- b", "holds list"), ("", "holds NoneType"), ("just words", "holds str")],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("training: {workers: 2}\nmethod: baseline\ntraining: {max_steps: 9}\n", 3, "training"),
        ("method: baseline\ntraining:\n  workers: 2\n  max_steps: 9\n  workers: 3\n", 5, "workers"),
    ],
)
def test_a_key_that_occurs_twice_is_refused(tmp_path: Path, text: str, line: int, key: str) -> None:
    """The first one would be lost in silence."""
    file = write(tmp_path, text)
    with pytest.raises(UsageError, match=rf"{file}: line {line}: the key {key} occurs a second time; keep one$"):
        load_config(file)


def test_yaml_that_names_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(UsageError, match="not YAML"):
        load_config(write(tmp_path, f"method: !!python/object/apply:pathlib.Path.touch [{marker}]"))
    assert not marker.exists()


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    name = next(iter(presets()))
    with pytest.raises(UsageError, match=rf"no preset of that name; did you mean {name}\?"):
        load_config(name[:-1])


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
        ("network.channel_mult=[1, 0]", r"network\.channel_mult\.1: .*greater than 0 \(got 0\)"),
        ("network.num_res_blocks=0", r"network\.num_res_blocks.*: .*greater than 0 \(got 0\)"),
        ("network.head_channels=0", r"network\.head_channels: .*greater than or equal to 1 \(got 0\)"),
        ("network.attention_factors=[0]", r"network\.attention_factors\.0: .*greater than 0 \(got 0\)"),
        ("image_encoder.encoder_growth=-1", r"image_encoder\.encoder_growth: .*equal to 1 \(got -1\)"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override, message) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, MINIMAL), [override])


# ---- keys without an effect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "override", "key"),
    [
        ("ensemdiff-nuclei-small", "image_encoder.encoder_channels=8", "image_encoder.encoder_channels"),
        ("segdiff-nuclei-small", "anchor_loss.every=2", "anchor_loss.every"),
        ("ensemdiff-nuclei-small", "feed_forward.loss=cross-entropy", "feed_forward.loss"),
        ("baseline-nuclei-small", "diffusion.target=v", "diffusion.target"),
        ("categorical-lung-nodule-small", "diffusion.target=v", "diffusion.target"),
        ("baseline-brain-structures-small", "augmentation.probability=0.5", "augmentation.probability"),
        ("anomaly-patched-small", "generator.diffusion.weighting=min-snr", "generator.diffusion.weighting"),
        ("anomaly-latent-healing-small", "partial_noise.start=100", "partial_noise.start"),
        ("anomaly-partial-noise-small", "counterfactual.guidance=2", "counterfactual.guidance"),
        ("anomaly-counterfactual-small", "patched.draws=2", "patched.draws"),
        ("baseline-nuclei-small", "inference.steps=4", "inference.steps"),
        ("probabilistic-unet-lung-nodule-small", "inference.sampler=ddim", "inference.sampler"),
        ("autoencoder-slices-small", "training.compile=true", "training.compile"),
        ("autoencoder-slices-small", "network.codebook_size=8", "network.codebook_size"),
        ("adm-slices-small", "factor=4", "factor"),
        ("adm-slices-small", "condition.drop=0.5", "condition.drop"),
        ("adm-class-tiny-imagenet-small", "condition.context_channels=8", "condition.context_channels"),
        ("adm-slices-small", "diffusion.times_mean=1", "diffusion.times_mean"),
        ("ensemdiff-nuclei-small", "diffusion.gamma=3", "diffusion.gamma"),
    ],
)
def test_a_key_that_nothing_reads_is_named(preset: str, override: str, key: str) -> None:
    """It would stand in the model's card as if it had counted. It stays: a method may be changed back."""
    with pytest.warns(UserWarning, match=f"without an effect, because of .*: {key}$"):
        load_config(preset, [override])


def test_another_method_names_all_that_it_ignores() -> None:
    with pytest.warns(UserWarning, match="because of method: baseline: diffusion.schedule, diffusion.head, "):
        load_config("ensemdiff-lung-nodule-small", ["method=baseline"])


@pytest.mark.parametrize("name", presets())
def test_presets_have_no_key_without_an_effect(name: str) -> None:
    assert unread_keys(load_config(name)) == {}


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("autoencoder-slices-small", ["network.quantiser=vq", "network.codebook_size=8"]),
        ("adm-slices-small", ["diffusion.weighting=min-snr", "diffusion.gamma=3"]),
        ("rf-tiny-imagenet-small", ["diffusion.times_std=2"]),
        ("mask-hippocampus-small", ["condition.drop=0.5"]),
    ],
)
def test_a_key_that_is_read_is_not_named(preset: str, overrides: list[str]) -> None:
    assert unread_keys(load_config(preset, overrides)) == {}


def test_a_codebook_has_no_divergence() -> None:
    with pytest.warns(UserWarning, match="because of network.quantiser: vq: loss.kl_weight$"):
        load_config("autoencoder-slices-small", ["network.quantiser=vq", "loss.kl_weight=1"])

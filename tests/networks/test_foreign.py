"""Imported weights give the published networks' outputs; files that do not fit, or are no weights, are refused."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks.foreign import convert, nearest, read_state
from tests.helpers import published

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(network: nn.Module) -> nn.Module:
    """Random weights everywhere: layers that start at zero would hide mistakes."""
    for i, parameter in enumerate(network.parameters()):
        generator = torch.Generator().manual_seed(i)
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
    return network.eval()


TIMES = torch.tensor([0, 999])

GUIDED: dict[str, dict[str, Any]] = {
    "scale-shift": {},
    "no scale-shift": {"scale_shift": False},
    "new order": {"new_order": True},
    "resblock up and down": {"resblock_updown": True},
    "three levels, depth 2": {"mult": (1, 1, 2), "depth": 2, "attention": (False, True, True)},
    "three levels up and down": {
        "mult": (1, 2, 2),
        "depth": 2,
        "attention": (False, False, True),
        "resblock_updown": True,
    },
    "classes": {"classes": 5},
    "learned sigma": {"out_channels": 6},
    "super-resolution": {"in_channels": 6, "out_channels": 6, "resblock_updown": True},
    "pooling": {"resample_by_convolution": False},
    "attention in the middle only": {"attention": (False, False)},
    "3D": {"dims": 3},
}


@pytest.mark.parametrize("name", sorted(GUIDED))
def test_guided_diffusions_unet(name) -> None:
    theirs = published.OpenAI(**GUIDED[name])
    settings: dict[str, Any] = {"num_heads": 2, "qkv_order": "new" if theirs.new_order else "legacy"}
    found = convert(theirs.state, "guided-diffusion", settings)
    x = normal(1, 2, theirs.in_channels, *[8] * theirs.dims)
    y = torch.tensor([1, 4]) if theirs.classes else None
    cond = {} if y is None else {"label": y}
    with torch.no_grad():
        torch.testing.assert_close(found.build()(x, TIMES, cond), theirs(x, TIMES, y), **CLOSE)
    assert found.kind == "denoiser"


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("mult", [(1, 2), (1, 2, 3, 4), (1, 1, 2)])
def test_guided_diffusions_classifier(updown, mult) -> None:
    """With one head: the published option is the width of a head, which is the same at all levels."""
    theirs = published.OpenAI(
        mult=mult,
        depth=2,
        attention=tuple(m == max(mult) for m in mult),
        heads=1,
        resblock_updown=updown,
        out_channels=7,
        classifier_side=16,
    )
    found = convert(theirs.state, "guided-diffusion", {"head_channels": 32 * max(mult)})
    x = normal(2, 2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(found.build()(x, TIMES), theirs(x, TIMES), **CLOSE)
    assert found.kind == "classifier" and found.network["size"] == [16, 16]


def test_improved_diffusions_unet() -> None:
    theirs = published.OpenAI(mult=(1, 2, 2), depth=2, attention=(False, True, True), heads=4, out_channels=6)
    found = convert(theirs.state, "improved-diffusion", {"num_heads": 4})
    x = normal(3, 2, 3, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(found.build()(x, TIMES), theirs(x, TIMES), **CLOSE)


@pytest.mark.parametrize("whole", [False, True], ids=["state dict of the U-Net", "whole checkpoint"])
def test_latent_diffusions_unet_with_a_context(whole) -> None:
    theirs = published.OpenAI(
        in_channels=4, out_channels=4, scale_shift=False, context=24, layers=2, attention=(True, True), heads=4
    )
    state = dict(theirs.state)
    if whole:
        state = {f"model.diffusion_model.{name}": value for name, value in state.items()}
        state |= {f"first_stage_model.{name}": value for name, value in published.LatentAutoencoder().state.items()}
        state["betas"] = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
        state["cond_stage_model.embedding.weight"] = normal(0, 11, 24)
    found = convert(state, "latent-diffusion", {"num_heads": 4})
    x, context = normal(4, 2, 4, 8, 8), normal(5, 2, 3, 24)
    with torch.no_grad():
        out = found.build()(x, TIMES, {"context": context})
        torch.testing.assert_close(out, theirs(x, TIMES, context=context), **CLOSE)
    assert (found.betas is not None) == whole
    if whole:
        assert any("cond_stage_model" in sentence for sentence in found.assumed)
        assert any("part=autoencoder" in sentence for sentence in found.assumed)


@pytest.mark.parametrize("attention", [(False, False), (False, True)])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a checkpoint"])
def test_latent_diffusions_autoencoder(attention, inside) -> None:
    theirs = published.LatentAutoencoder(attention=attention)
    state = dict(theirs.state)
    settings = {}
    if inside:
        state = {f"first_stage_model.{name}": value for name, value in state.items()}
        state |= {f"model.diffusion_model.{name}": value for name, value in published.OpenAI().state.items()}
        state["scale_factor"] = torch.tensor(0.5)
        settings = {"part": "autoencoder"}
    found = convert(state, "latent-diffusion", settings)
    codec = found.build()
    x, z = normal(6, 2, 3, 16, 16), normal(7, 2, 4, 8, 8)
    with torch.no_grad():
        for ours, wanted in zip(codec.moments(x), theirs.moments(x), strict=True):
            torch.testing.assert_close(ours, wanted, **CLOSE)
        scale = 0.5 if inside else 1.0
        torch.testing.assert_close(codec.encode(x), scale * theirs.moments(x)[0], **CLOSE)
        torch.testing.assert_close(codec.decode(scale * z), theirs.decode(z), **CLOSE)


MONAI_UNETS: dict[str, dict[str, Any]] = {
    "attention": {},
    "classes": {"num_class_embeds": 5},
    "context": {"with_conditioning": True, "cross_attention_dim": 16, "transformer_num_layers": 2},
    "resblock up and down": {"resblock_updown": True},
    "uneven depth": {"num_res_blocks": (1, 2)},
    "no attention but in the middle": {"attention_levels": (False, False)},
    "3D": {"spatial_dims": 3},
}


@pytest.mark.parametrize("name", sorted(MONAI_UNETS))
def test_monais_unet(name) -> None:
    options: dict[str, Any] = {
        "spatial_dims": 2,
        "in_channels": 3,
        "out_channels": 6,
        "num_res_blocks": 1,
        "channels": (32, 64),
        "attention_levels": (False, True),
        "num_head_channels": 32,
        **MONAI_UNETS[name],
    }
    theirs = awake(DiffusionModelUNet(**options))
    found = convert(theirs.state_dict(), "monai", {"head_channels": 32})
    x = normal(8, 2, 3, *[8] * options["spatial_dims"])
    cond, given = {}, {}
    if "num_class_embeds" in options:
        cond["label"] = given["class_labels"] = torch.tensor([1, 4])
    if "with_conditioning" in options:
        cond["context"] = given["context"] = normal(9, 2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(found.build()(x, TIMES, cond), theirs(x, TIMES, **given), **CLOSE)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("attention", [(False, False), (False, True)])
def test_monais_autoencoder(dims, attention) -> None:
    theirs = awake(AutoencoderKL(dims, 1, 1, (2, 2), (32, 64), attention, latent_channels=3))
    codec = convert(theirs.state_dict(), "monai").build()
    x = normal(10, 2, 1, *[8] * dims)
    with torch.no_grad():
        mean, sigma = theirs.encode(x)
        torch.testing.assert_close(codec.moments(x)[0], mean, **CLOSE)
        torch.testing.assert_close((0.5 * codec.moments(x)[1]).exp(), sigma, **CLOSE)
        torch.testing.assert_close(codec.decode(mean), theirs.decode(mean), **CLOSE)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_heads_are_asked_for() -> None:
    with pytest.raises(UsageError, match=r"--set head_channels=N or num_heads=N"):
        convert(published.OpenAI().state, "guided-diffusion")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"heads": 3}, "--set heads: unknown here; known: head_channels"), ({"qkv_order": "old"}, "use legacy or new")],
)
def test_unknown_settings_are_refused(settings, message) -> None:
    with pytest.raises(UsageError, match=message):
        convert(published.OpenAI().state, "guided-diffusion", settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle_block.0.in_layers.2.weight": None}, "missing middle_block.0.in_layers.2.weight;"),
        ({"surprise.weight": torch.zeros(1)}, "unexpected surprise.weight;"),
        ({"time_embed.2.weight": torch.zeros(7, 7)}, r"wrongly shaped time_embed.2.weight \(7, 7\) for \(128, 128\);"),
        ({f"extra.{i}": torch.zeros(1) for i in range(9)}, "unexpected extra.0, extra.1, extra.2 and 6 more;"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_the_first_few_names(change, message) -> None:
    state = {**published.OpenAI().state, **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ModelError, match=message + " it resembles a guided-diffusion or improved-diffusion U-Net"):
        convert(state, "guided-diffusion", {"num_heads": 2})


def test_weights_of_another_source_are_refused_with_the_nearest() -> None:
    monai = DiffusionModelUNet(2, 1, 1, num_res_blocks=1, channels=(32, 32), attention_levels=(False, False))
    with pytest.raises(ModelError, match=r"not a guided-diffusion network: .* it resembles a MONAI DiffusionModelUNet"):
        convert(monai.state_dict(), "guided-diffusion")
    with pytest.raises(ModelError, match="it resembles a guided-diffusion"):
        convert(published.OpenAI().state, "monai")
    assert "no known architecture" in nearest({"layer1.weight": 0})


def test_a_file_is_read_as_it_was_saved(tmp_path: Path) -> None:
    state = {"a.weight": normal(1, 2, 3), "b": normal(2, 4)}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nested.ckpt")
    save_file(state, tmp_path / "safe.safetensors")
    for name in ("plain.pt", "nested.ckpt", "safe.safetensors"):
        found = read_state(tmp_path / name)
        assert set(found) == set(state)
        for key, value in state.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_the_callbacks_of_a_lightning_checkpoint_are_ignored(tmp_path: Path, monkeypatch) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 0.5

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": {"w": torch.ones(2)}, "callbacks": {ModelCheckpoint: {"best": 1}, "x": ModelCheckpoint()}}
    torch.save(content, tmp_path / "model.ckpt")
    monkeypatch.undo()
    assert list(read_state(tmp_path / "model.ckpt")) == ["w"]


class Evil:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_of_something_else_is_refused_and_never_executed(tmp_path: Path, how) -> None:
    trap = tmp_path / "trap"
    if how == "torch":
        torch.save({"state_dict": {"w": torch.ones(1)}, "evil": Evil(trap)}, tmp_path / "bad.pt")
    else:
        (tmp_path / "bad.pt").write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(ModelError, match=r"bad.pt: .*(nothing was executed|unreadable)"):
        read_state(tmp_path / "bad.pt")
    assert not trap.exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(1)], torch.ones(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x.pt: holds \w+, expected a state dict"):
        read_state(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_damaged_file_is_refused(tmp_path: Path, name) -> None:
    if name.endswith("pt"):
        torch.save({"w": torch.ones(100)}, tmp_path / name)
    else:
        save_file({"w": torch.ones(100)}, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    with pytest.raises(ModelError, match=f"{name}: .*(unreadable|nothing was executed)"):
        read_state(tmp_path / name)
    with pytest.raises(ModelError, match="no such file"):
        read_state(tmp_path / f"no-{name}")

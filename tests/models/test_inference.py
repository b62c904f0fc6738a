"""`--compile`: equal results up to rounding, few compilations, and a network that works without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_diffusion import device
from medseg_diffusion.device import process_bytes
from medseg_diffusion.errors import UsageError, remarks
from medseg_diffusion.models import passes
from medseg_diffusion.models.anomaly import AnomalyModel
from medseg_diffusion.models.inference import MOST_SHAPES, CompiledForward, filled_up_to, placed
from medseg_diffusion.models.load import load_segmenter
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.volumes.io import read_volume
from tests.helpers import segmenters

ROUNDING = 1e-4
"""Largest difference in float32 of compiled networks, and of results in [-1, 1] after some steps."""


class Doubling(nn.Module):
    """Adds the time and the condition to 2 x, and notes the batch of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, timesteps: Tensor, cond: Any = None) -> Tensor:
        self.batches.append(len(x))
        return 2 * x + timesteps[:, None] + (0 if cond is None else cond["concat"])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile returns its argument, so that what happens around it is tested without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_a_smaller_batch_is_filled_up_and_cut(uncompiled) -> None:
    """The last batch of a scan needs no compilation of its own."""
    network, plain = placed(Doubling(), "cpu", compiled=True), Doubling()
    for batch in (4, 1, 3, 4, 5, 2):
        x, t, cond = torch.randn(batch, 6), torch.arange(batch), {"concat": torch.randn(batch, 6)}
        assert torch.equal(network(x, t, cond), plain(x, t, cond))
    assert network.batches == [4, 4, 4, 4, 5, 4]


def test_hooks_see_the_batch_that_was_asked_for(uncompiled) -> None:
    """The evaluations of an anomaly model are counted by hooks."""
    network, seen = placed(Doubling(), "cpu", compiled=True), []
    network.register_forward_hook(lambda module, inputs, out: seen.append((len(inputs[0]), len(out))))
    for batch in (4, 2):
        network(torch.zeros(batch, 1), torch.zeros(batch))
    assert seen == [(4, 4), (2, 2)]


def test_further_shapes_are_not_compiled(uncompiled) -> None:
    network = placed(Doubling(), "cpu", compiled=True)
    with remarks() as said:
        for size in range(1, MOST_SHAPES + 3):
            assert network(torch.ones(2, size), torch.zeros(2)).shape == (2, size)
    assert said == [f"--compile: {MOST_SHAPES} shapes are compiled; the network is used as it is for further ones"]


def test_after_too_little_memory_smaller_batches_are_not_filled_up(uncompiled) -> None:
    """Fewer samples at once (`passes.MemoryLimitedSegmenter`) must need less memory."""

    class Small(Doubling):
        def forward(self, x: Tensor, timesteps: Tensor, cond: Any = None) -> Tensor:
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError
            return super().forward(x, timesteps, cond)

    network = placed(Small(), "cpu", compiled=True)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        network(torch.ones(4, 3), torch.zeros(4))
    for batch in (2, 1):
        assert network(torch.ones(batch, 3), torch.zeros(batch)).shape == (batch, 3)
    assert network.batches == [2, 2]


def test_no_batch_is_filled_up_beyond_a_limit(uncompiled) -> None:
    """--max-memory allows fewer samples at once for a large scan than for the one before."""
    network = placed(Doubling(), "cpu", compiled=True)
    for most in (None, 2, None):
        filled_up_to(network, most)
        for batch in (4, 1) if most is None else (2, 1):
            network(torch.ones(batch, 3), torch.zeros(batch))
    assert network.batches == [4, 4, 2, 2, 4, 2]


def test_a_network_that_cannot_be_compiled_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def failing(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        def run(*arguments: object) -> Tensor:
            calls.append(1)
            raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no compiler\nat all"), None)

        return run

    monkeypatch.setattr(torch, "compile", failing)
    network = placed(Doubling(), "cpu", compiled=True)
    with remarks() as said:
        for _ in range(2):
            assert torch.equal(network(torch.ones(2, 3), torch.zeros(2)), 2 * torch.ones(2, 3))
    assert len(calls) == 1
    assert said == ["--compile: the network is used as it is, because compiling it failed (no compiler)"]


def test_weights_keep_their_names_and_layout(uncompiled) -> None:
    network = UNet(2, 1, 1, channels=8, channel_mult=(1, 2), num_res_blocks=1)
    names = list(network.state_dict())
    assert placed(network, "cpu", channels_last=True, compiled=True) is network
    assert list(network.state_dict()) == names and isinstance(network.forward, CompiledForward)
    assert network.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_pixel_classifiers_refuse_it() -> None:
    path = Path(__file__).parent / "stored" / "pixel-classifier"
    with pytest.raises(UsageError, match="leave --compile out"):
        load_segmenter(path, "cpu", compile=True)


def test_memory_is_estimated_from_the_network_as_it_is(tmp_path: Path, uncompiled) -> None:
    path = segmenters.make_model(tmp_path / "model", segmenters.tiny_config())
    scan = read_volume(segmenters.save(tmp_path / "scan.nii.gz"))
    model = load_segmenter(path, "cpu", max_memory=process_bytes() / 1e9 + 2, compile=True)
    assert model.segment(scan).labels.shape == scan.shape


# ---- a real compiler -------------------------------------------------------------------------------------------------

compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler, which torch.compile needs on a CPU"
)
QUIET = pytest.mark.filterwarnings("default")  # torch's own remarks on what it compiles
SMALL: dict[str, Any] = {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "2D with attention": lambda: UNet(2, 2, 1, attention_factors=(2,), head_channels=8, **SMALL),
    "3D": lambda: UNet(3, 2, 1, **SMALL),
    "encoded image": lambda: SegDiff(UNet(2, 1, 1, **SMALL), 1, 8, 1, 8),
}


def both_outputs(name: str, where: torch.device) -> tuple[Tensor, Tensor]:
    """The outputs of a network with its condition for 4 and then 2 samples, without and with compilation."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval().requires_grad_(False).to(where)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    size = [8] * (3 if name == "3D" else 2)
    x, t = torch.randn(4, 1, *size, device=where), torch.tensor([1, 30, 200, 900], device=where)
    with torch.no_grad():
        cond = network.encode_condition(torch.randn(4, 1, *size, device=where))  # type: ignore[operator]
        fewer = {key: value[:2] for key, value in cond.items()}

        def outputs() -> Tensor:
            first = network(x, t, cond)
            # The second call of a CUDA graph must leave the output of the first one alone.
            return torch.cat([network(x[:2], t[:2], fewer), first])

        plain = outputs()
        placed(network, where, compiled=True)
        return plain, torch.cat([outputs(), outputs()])[: len(plain)]


@QUIET
@pytest.mark.cuda
@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_graphs_are_equal_up_to_rounding(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    plain, compiled = both_outputs(name, torch.device("cuda"))
    assert float((plain - compiled).abs().max()) < 0.01 * float(plain.abs().max())  # TF32 of other algorithms


@QUIET
@compiler
@pytest.mark.slow
def test_the_three_commands_give_equal_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, images and anomaly maps of the models of the three commands, in float32 on any CPU."""
    for module in (device, passes):  # a CPU with AMX would compute in bfloat16
        monkeypatch.setattr(module, "autocast_dtype", lambda *arguments: None)
    scan = read_volume(segmenters.save(tmp_path / "scan.nii.gz"))
    segmenter = segmenters.make_model(tmp_path / "model", segmenters.tiny_config())
    stored = Path(__file__).parent / "stored" / "anomaly"
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 24, 18)], indexing="ij")
    inside = axes[0] ** 2 + axes[1] ** 2 < 0.8
    image = np.random.default_rng(0).normal(5, 1, inside.shape) + 100 * inside
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / "head.nii.gz")
    head = read_volume(tmp_path / "head.nii.gz")
    results: dict[bool, list[Tensor]] = {}
    for compiled in (False, True):
        masks = load_segmenter(segmenter, "cpu", ensemble=3, compile=compiled).segment(scan, 1, maps=["probabilities"])
        anomalies = AnomalyModel(stored, device="cpu", compile=compiled)
        scores = anomalies.score(head, 1).score  # before the images, which then need no compilation of their own
        images = anomalies.generator.sample([1, 2, 3], steps=2)
        assert masks.probabilities is not None
        results[compiled] = [masks.probabilities, scores, images]
        network: Any = anomalies.generator.task.denoiser.network
        assert isinstance(network.forward, CompiledForward) is compiled
        assert not compiled or network.forward._works
    for plain, other in zip(results[False], results[True], strict=True):
        assert float(plain.std()) > 0
        assert float((plain - other).abs().max()) < ROUNDING * max(1.0, float(plain.abs().max()))


@compiler
@pytest.mark.slow
def test_a_missing_compiler_is_one_warning(tmp_path: Path) -> None:
    model = segmenters.make_model(tmp_path / "model", segmenters.tiny_config())
    scan = segmenters.save(tmp_path / "scan.nii.gz")
    command = [
        sys.executable,
        "-c",
        "from medseg_cli.main import app; app()",
        "segment",
        str(scan),
        "-m",
        str(model),
        "--compile",
    ]
    # A cache of its own: what was compiled before would need no compiler.
    env = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--device", "cpu"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "scan_seg.nii.gz").is_file()
    lines = [line for line in done.stderr.splitlines() if "--compile" in line]
    assert len(lines) == 1 and "No working C++ compiler" in lines[0], done.stderr

"""How fast a training is: the peak of its device, the wait for examples, and what is left out."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from medseg_diffusion.networks.blocks import conv
from medseg_diffusion.training.batches import Batches
from medseg_diffusion.training.runtime import Runtime
from medseg_diffusion.training.throughput import Throughput, flops_of_pass, peak_bytes, peak_flops


def on_gpu(dtype: torch.dtype | None) -> Runtime:
    return cast(Runtime, SimpleNamespace(device=torch.device("cuda"), autocast=dtype))


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 495e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA GH200 480GB", 989e12, 495e12),
        ("NVIDIA RTX A6000", 155e12, 77.4e12),
        ("NVIDIA RTX A4000", None, None),
        ("NVIDIA RTX A3000 Laptop GPU", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("Something else", None, None),
    ],
)
def test_the_peak_is_that_of_the_device_and_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, half: float | None, single: float | None
) -> None:
    """Names that begin alike have different peaks."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert (peak_flops(on_gpu(torch.bfloat16)), peak_flops(on_gpu(None))) == (half, single)
    assert peak_flops(Runtime("cpu", "fp32")) is None


def test_a_system_that_tells_no_memory_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no module `resource`."""
    assert peak_bytes(torch.device("cpu")) > 1e7
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes(torch.device("cpu")) is None


class Clock:
    """Time that passes only where the test says so: a loaded machine changes nothing."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Slow(Dataset[dict[str, Tensor]]):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        self.clock.now += 0.02
        return {"image": torch.full((3,), float(draw)), "seed": torch.tensor(draw)}


def test_the_wait_for_examples_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    runtime = Runtime("cpu", "fp32")
    batches, speed = Batches(Slow(clock), 2, 3, 6, 0, runtime), Throughput(2, 0.0, runtime)
    for step in (3, 4, 5):
        assert next(batches)["seed"].tolist() == [2 * step, 2 * step + 1]
        clock.now += 0.01  # computing
    speed.read(3, batches.waited)
    assert batches.waited == pytest.approx(0.12) and speed.waiting == pytest.approx(0.12 / 0.15)
    with pytest.raises(StopIteration):
        next(batches)
    clock.now += 7
    speed.restart()  # what has passed since the reading does not count
    clock.now += 0.03
    speed.read(1, batches.waited)
    numbers = speed.numbers()
    assert numbers["seconds_per_step"] == pytest.approx((0.15 + 0.03) / 4)
    assert numbers["examples_per_s"] == pytest.approx(2 / numbers["seconds_per_step"])
    assert "flop_utilisation" not in numbers and speed.numbers() == {}, "each step counts once"


@pytest.mark.parametrize("compiled", [False, True])
def test_operations_are_counted_as_they_are_written(compiled: bool) -> None:
    """A 3 x 3 convolution from 2 to 4 channels on 8 x 8 positions: 2 x 9 x 2 x 4 x 64 in the forward pass."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, batch: Any) -> Tensor:
            assert torch.backends.cudnn.enabled, "without cuDNN, convolutions on a GPU take far more memory"
            return cast(Tensor, self.network(batch["image"])).square().mean()

    model, example = Model(), {"image": torch.randn(1, 2, 8, 8)}
    if compiled:
        model.network.compile()
    assert flops_of_pass(model, example, Runtime("cpu", "fp32")) == 3 * 2 * 9 * 2 * 4 * 64


def test_the_convolutions_of_a_single_volume_are_counted() -> None:
    """On a CPU they take a path of their own, which torch's counter does not know."""

    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = conv(3, 32, 16)

        def forward(self, batch: Any) -> Tensor:
            return cast(Tensor, self.network(batch["image"])).mean()

    volume = {"image": torch.randn(1, 32, 4, 4, 4)}
    assert flops_of_pass(Volumes(), volume, Runtime("cpu", "fp32")) == 3 * 2 * 27 * 32 * 16 * 64

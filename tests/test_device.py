"""Devices and precision are those asked for, and nothing stays on the CPU.

Fake CUDA tensors have a device and no values, and mixing devices raises; no driver is needed. What they cannot see is
left to the tests marked `cuda`: backward passes, generators on the wrong device, CPU tables indexed by CUDA times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from medseg_diffusion.device import autocast_dtype, choose_device
from medseg_diffusion.diffusion.denoiser import Clipped, NetworkDenoiser
from medseg_diffusion.diffusion.guidance import ClassifierFreeGuided, ClassifierGuided
from medseg_diffusion.diffusion.noise import Noised, generators
from medseg_diffusion.diffusion.objective import Hybrid, Simple
from medseg_diffusion.diffusion.schedule import linear
from medseg_diffusion.errors import UsageError
from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.medsegdiff import MedSegDiff
from medseg_diffusion.networks.medsegdiff_v2 import MedSegDiffV2
from medseg_diffusion.networks.noisy_classifier import NoisyClassifier
from medseg_diffusion.networks.segdiff import SegDiff
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.loop import sample
from medseg_diffusion.tasks.mask import MaskDiffusion, MaskEncoding

BOTH = pytest.mark.parametrize("dims", [2, 3])
SMALL: dict[str, Any] = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_factors": (2,)}
TIMES = [10, 5, 1, 0]

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "adm": lambda dims: UNet(dims, 1, 1, **SMALL),
    "patches": lambda dims: UNet(dims, 1, 1, patch_size=2, resampling="plain", **SMALL),
    "conv": lambda dims: UNet(dims, 1, 1, resampling="conv", scale_shift=False, **SMALL),
    "classes": lambda dims: UNet(dims, 1, 1, num_classes=3, **SMALL),
    "context": lambda dims: UNet(dims, 1, 1, context_channels=8, **SMALL),
    "checkpointing": lambda dims: UNet(dims, 1, 1, checkpointing=True, **SMALL),
    "learned variance": lambda dims: UNet(dims, 1, 2, **SMALL),
}


def condition(name: str, batch: int) -> dict[str, Tensor]:
    if name == "classes":
        return {"label": torch.zeros(batch, dtype=torch.int64)}
    return {"context": torch.zeros(batch, 2, 8)} if name == "context" else {}


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "xpu"])
def test_a_device_that_is_not_there_is_refused(name) -> None:
    with pytest.raises(UsageError, match=name):
        choose_device(name)


def test_precision_is_that_asked_for() -> None:
    cpu = choose_device("cpu")
    assert autocast_dtype(cpu, "fp32") is None
    assert autocast_dtype(cpu, "bf16") is torch.bfloat16


@BOTH
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_losses_and_samplers_stay_on_the_device(name, dims) -> None:
    schedule = linear(50)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            network = NETWORKS[name](dims)
            x, eps = torch.zeros(2, 1, *[8] * dims), torch.zeros(2, 1, *[8] * dims)
            cond = condition(name, 2)
        learned = name == "learned variance"
        denoiser = NetworkDenoiser(network, schedule, "eps", learned)
        t = torch.full((2,), 7, device="cuda")
        objective = Hybrid() if learned else Simple("min-snr")
        noised = Noised.from_noise(schedule, x, eps, t)
        loss = objective(schedule, "eps", denoiser(noised.x_t, t, cond), noised)
        assert loss.device.type == "cuda"
        for sampler in (DDPM(), DDIM(), DDIM(1.0), DPMSolver()):
            out = sample(Clipped(denoiser), sampler, x, TIMES, cond, generators=generators([1, 2]))
            assert out.device.type == "cuda" and out.shape == x.shape


@BOTH
def test_guidance_and_the_noisy_classifier_stay_on_the_device(dims) -> None:
    schedule = linear(50)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            network = NETWORKS["classes"](dims)
            classifier = NoisyClassifier(dims, 1, 3, [8] * dims, 32, (1, 2), 1, (2,), 32)
            x = torch.zeros(2, 1, *[8] * dims)
            label, null = torch.zeros(2, dtype=torch.int64), torch.full((1,), 2)
        denoiser = ClassifierFreeGuided(NetworkDenoiser(network, schedule), {"label": null}, 2.0)

        def gradient(x_t: Tensor, t: Tensor) -> Tensor:
            """Autograd through fake tensors is what these tests cannot do: the classifier's forward pass alone."""
            return classifier(x_t, t - 1).mean() * torch.ones_like(x_t)

        gradient.scale = 1.0  # type: ignore[attr-defined]
        guided = ClassifierGuided(denoiser, gradient)  # type: ignore[arg-type]
        out = sample(guided, DPMSolver(), x, TIMES, {"label": label})
        assert out.device.type == "cuda"
        out = sample(denoiser, DDPM(gradient=gradient), x, TIMES, {"label": label}, generators=generators([1, 2]))
        assert out.device.type == "cuda"


@BOTH
@pytest.mark.parametrize("kind", ["ensemdiff", "segdiff", "medsegdiff", "medsegdiff-v2"])
def test_mask_diffusion_stays_on_the_device(kind, dims) -> None:
    schedule = linear(50)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            unet = UNet(dims, 3 + (kind == "ensemdiff"), 3, **SMALL)
            network = {
                "ensemdiff": lambda: unet,
                "segdiff": lambda: SegDiff(unet, 1, 8, 1, 4),
                "medsegdiff": lambda: MedSegDiff(unet, 1, 5),
                "medsegdiff-v2": lambda: MedSegDiffV2(unet, 1, 3, depth=1),
            }[kind]()
            image = torch.zeros(2, 1, *[8] * dims)
        denoiser = NetworkDenoiser(network, schedule, "x0", head="softmax", scale=0.5)
        model = MaskDiffusion(denoiser, MaskEncoding(3, 0.5), Simple())
        probabilities = model.probabilities(image, [[1, 2], [3, 4]], DPMSolver(), TIMES)
        assert probabilities.device.type == "cuda" and probabilities.shape[:3] == (2, 2, 3)


@BOTH
@pytest.mark.parametrize("layout", ["monai", "latent-diffusion"])
def test_autoencoders_stay_on_the_device(layout, dims) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            codec = KLAutoencoder(dims, 1, 1, 3, (32, 32), 1, (False, False), layout)
            image = torch.zeros(2, 1, *[8] * dims)
        latent = codec.encode(image, generators([1, 2]))
        assert latent.device.type == codec.decode(latent).device.type == "cuda"


class Forgetful(nn.Module):
    """A network that makes a tensor without saying where."""

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        return x + torch.ones(x.shape)


def test_a_tensor_left_on_the_cpu_is_found() -> None:
    schedule = linear(50)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            x = torch.zeros(2, 1, 8, 8)
        with pytest.raises(RuntimeError, match="device"):
            sample(NetworkDenoiser(Forgetful(), schedule), DDIM(), x, TIMES)


@BOTH
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_backward_passes_have_shapes(name, dims) -> None:
    """On "meta", where tensors have shapes only."""
    with torch.device("meta"):
        network = NETWORKS[name](dims)
        x, t = torch.zeros(2, 1, *[8] * dims), torch.zeros(2, dtype=torch.int64)
        network(x, t, condition(name, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# ---- a real GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.mark.cuda
@BOTH
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_gpu_agrees_with_the_cpu(cuda, name, dims) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name](dims)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    schedule, learned = linear(50), name == "learned variance"
    x, eps, t = torch.randn(2, 1, *[8] * dims), torch.randn(2, 1, *[8] * dims), torch.tensor([3, 40])
    objective = Hybrid() if learned else Simple()
    results = []
    for device in ("cpu", cuda):
        network.to(device).zero_grad()
        denoiser = NetworkDenoiser(network, schedule, "eps", learned)
        cond = {key: value.to(device) for key, value in condition(name, 2).items()}
        noised = Noised.from_noise(schedule, x.to(device), eps.to(device), t.to(device))
        prediction = denoiser(noised.x_t, noised.t, cond)
        loss = objective(schedule, "eps", prediction, noised).mean()
        loss.backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in network.parameters() if p.grad is not None])
        out = sample(Clipped(denoiser), DDPM(), noised.x0, TIMES, cond, generators=generators([1, 2]))
        results.append((loss.detach().cpu(), gradients, out.cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-2, atol=1e-2)


@pytest.mark.cuda
def test_training_steps_on_a_gpu_lower_the_loss(cuda) -> None:
    torch.manual_seed(0)
    network = UNet(2, 2, 1, **SMALL)
    model = MaskDiffusion(NetworkDenoiser(network, linear(50), "x0"), MaskEncoding(2), Simple()).to(cuda)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    image = torch.randn(4, 1, 16, 16, device=cuda)
    batch = {"image": image, "label": (image[:, 0] > 0).long()}
    losses = []
    for step in range(60):
        batch["seed"] = torch.arange(4) + 4 * step
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

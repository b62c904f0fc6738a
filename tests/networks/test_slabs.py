"""A volume by slabs gives what the undivided volume gives."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.networks.autoencoder import KLAutoencoder
from medseg_diffusion.networks.slabs import by_slabs


def autoencoder(layout: str, **options: object) -> KLAutoencoder:
    torch.manual_seed(0)
    model = KLAutoencoder(3, 1, 1, 3, (8, 16, 8), 1, (False, False, False), layout, norm_groups=4, **options)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("layout", ["monai", "latent-diffusion"])
@given(planes=st.integers(1, 6), sides=st.tuples(st.integers(1, 3), st.integers(1, 3)), voxels=st.integers(1, 900))
@settings(max_examples=20, deadline=None)
def test_slabs_of_any_thickness_give_the_result_of_the_whole(
    layout: str, planes: int, sides: tuple[int, int], voxels: int
) -> None:
    model = autoencoder(layout)
    image = torch.randn(2, 1, 4 * planes, *(4 * side for side in sides)) + 3
    before = image.clone()
    with torch.no_grad():
        latent = model.encoder(image)
        torch.testing.assert_close(by_slabs(model.encoder.blocks, image, voxels), latent, rtol=1e-4, atol=1e-4)
        latent = latent[:, :3]
        whole = model.decoder(latent)
        torch.testing.assert_close(by_slabs(model.decoder.blocks, latent, voxels), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(image, before)


@pytest.mark.parametrize("layout", ["monai", "latent-diffusion"])
def test_slabs_are_computed_in_bfloat16_as_the_whole_is(layout: str) -> None:
    model, image = autoencoder(layout), torch.randn(1, 1, 16, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole, slabs = model.encoder(image), by_slabs(model.encoder.blocks, image, 300)
        assert slabs.dtype == whole.dtype
        assert float((slabs - whole).abs().max()) < 0.05 * float(whole.abs().max())


def test_large_volumes_are_computed_by_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding and decoding, by a threshold in voxels of the image; never with gradients."""
    model, image = autoencoder("monai"), torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        latent = model.encode(image)
        decoded = model.decode(latent)
    calls = []
    monkeypatch.setattr("medseg_diffusion.networks.autoencoder.LARGE", 16**3)
    monkeypatch.setattr(
        "medseg_diffusion.networks.autoencoder.by_slabs", lambda blocks, x: calls.append(x.shape) or by_slabs(blocks, x)
    )
    assert model.encode(image).requires_grad
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(model.encode(image), latent, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.decode(latent), decoded, rtol=1e-4, atol=1e-4)
        assert [tuple(shape[2:]) for shape in calls] == [(16, 16, 16), (4, 4, 4)]
        model.encode(image[..., :8])
    assert len(calls) == 2


HEAD = """
import resource, time, torch
from medseg_diffusion.networks.autoencoder import KLAutoencoder
model = KLAutoencoder(3, 1, 1, 3, (32, 64, 64), 1, (False, False, False), middle_attention=False).eval()
image = torch.randn(1, 1, 256, 256, 192)
with torch.no_grad():
    latent = model.encode(image)
    print(tuple(latent.shape), tuple(model.decode(latent).shape))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_whole_head_of_1_mm_needs_less_than_6_gb() -> None:
    done = subprocess.run([sys.executable, "-c", HEAD], capture_output=True, text=True, check=True)
    shapes, gigabytes = done.stdout.splitlines()
    assert shapes == "(1, 3, 64, 64, 48) (1, 1, 256, 256, 192)"
    assert float(gigabytes) < 6

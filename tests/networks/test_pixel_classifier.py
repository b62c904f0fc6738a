"""Pixel classifiers: gathering and late upsampling give what upsampling everything would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.networks.pixel_classifier import PixelClassifier, PixelClassifiers, gathered, upsampled


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_pixel(*size: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(n) for n in size])


@settings(max_examples=30, deadline=None)
@given(
    coarse=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    factor=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_gathering_is_upsampling_and_indexing_up_to_the_borders(coarse, factor, seed) -> None:
    size = [n * factor for n in coarse]
    block = normal(seed, 3, *coarse)
    whole = upsampled(block[None], size)[0].flatten(1).T
    torch.testing.assert_close(gathered(block, every_pixel(*size), size), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("coarse", "size"), [((128, 3), (181, 7)), ((181,) * 2, (128,) * 2), ((3, 100, 5), (5, 256, 4))]
)
def test_gathering_is_upsampling_at_odd_ratios(coarse, size) -> None:
    block = normal(0, 4, *coarse)
    whole = upsampled(block[None], size)[0].flatten(1).T
    torch.testing.assert_close(gathered(block, every_pixel(*size), size), whole, rtol=0, atol=1e-5)


def trained(members: int, features: int, classes: int) -> PixelClassifiers:
    """Classifiers whose every parameter and running statistic matters."""
    torch.manual_seed(0)
    model = PixelClassifiers(members, features, classes)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.3 * torch.randn_like(value) + (1.0 if "var" in name or name == "std" else 0.0))
            if "var" in name or name == "std":
                value.abs_().clamp_(min=0.1)
    return model.eval()


@pytest.mark.parametrize("size", [(16, 24), (8, 4, 12)])
def test_late_upsampling_equals_early_upsampling(size) -> None:
    shapes = [[n // 4 for n in size], [n // 2 for n in size], [n // 4 for n in size], list(size)]
    blocks = [normal(i, 2, 5 + i, *shape) for i, shape in enumerate(shapes)]
    model = trained(3, sum(block.shape[1] for block in blocks), 4)
    with torch.no_grad():
        late = model.maps(blocks, size)
        features = torch.cat([upsampled(block, size) for block in blocks], 1).movedim(1, -1)
        early = model(features.flatten(0, -2)).unflatten(1, (2, *size)).movedim(-1, 2).movedim(0, 1)
    torch.testing.assert_close(late, early, rtol=1e-4, atol=1e-4)
    top = early.topk(2, dim=2).values
    sure = top[:, :, 0] - top[:, :, 1] > 1e-3
    assert sure.float().mean() > 0.9
    assert torch.equal(late.argmax(2)[sure], early.argmax(2)[sure])
    with torch.no_grad():
        assert torch.equal(model.maps(blocks, size, members=2), late[:, :2])


def test_features_of_a_large_mean_keep_their_digits() -> None:
    """bf16 activations, of 300 with deviations of 2, in the context of bf16: as the features in float64."""
    size, blocks = (8, 8), [(300 + 2 * normal(i, 1, 6, 4, 4)).bfloat16() for i in range(2)]
    model = trained(2, 12, 3)
    model.mean.fill_(300)
    model.std.fill_(2)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found = model.maps(blocks, size)
        features = torch.cat([upsampled(block.double(), size) for block in blocks], 1).movedim(1, -1).flatten(0, -2)
        expected = model.double()(features).unflatten(1, (1, *size)).movedim(-1, 2).movedim(0, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_published_layout() -> None:
    few, many = PixelClassifier(8448, 29), PixelClassifier(8448, 30)
    assert [tuple(p.shape) for p in few.parameters() if p.ndim == 2] == [(128, 8448), (32, 128), (29, 32)]
    assert [tuple(p.shape) for p in many.parameters() if p.ndim == 2] == [(256, 8448), (128, 256), (30, 128)]
    assert [type(m).__name__ for m in few.rest] == ["ReLU", "BatchNorm1d", "Linear", "ReLU", "BatchNorm1d", "Linear"]
    assert abs(float(few.first.weight.detach().std()) - 0.02) < 1e-3


def test_standardising_undoes_shift_and_scale_of_the_features() -> None:
    model = trained(2, 6, 3)
    features = normal(1, 50, 6)
    with torch.no_grad():
        before = model(features)
        model.mean.copy_(10 * model.mean + 4)
        model.std.mul_(10)
        torch.testing.assert_close(model(10 * features + 4), before, rtol=1e-4, atol=1e-4)

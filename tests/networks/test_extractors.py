"""Feature extractors: shapes and names that the scores rely on, and that a network sees images as it was trained."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.networks import extractors
from medseg_diffusion.networks.extractors import extractor, fingerprints
from tests.helpers.downloads import published
from tests.helpers.onnx_networks import save_network


def square(image: torch.Tensor) -> torch.Tensor:
    """The central square of (H, W, 3), as a batch of one."""
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[None, top : top + side, left : left + side]


def test_efficientnet_knows_photographs() -> None:
    """A cat, an espresso and a missile, by ImageNet's classes: a wrong input scaling would show here."""
    extract = extractor("efficientnet-lite0")
    assert (extract.name, extract.maps) == ("efficientnet-lite0", "block 8, 14 x 14")
    for picture, wanted in ((data.chelsea(), range(281, 286)), (data.coffee(), [967]), (data.rocket(), [657, 744])):
        features = extract(square(torch.from_numpy(picture)))
        assert features.pooled.shape == (1, 1280)
        assert features.spatial.shape == (1, 7 * 14 * 14)
        assert int(features.logits.argmax()) in wanted


def test_inception_gives_the_pool_seven_channels_of_17_x_17_and_the_logits(tmp_path: Path, monkeypatch) -> None:
    """With random weights in torch-fidelity's layout: the published file is not at hand."""
    from torch_fidelity import feature_extractor_inceptionv3 as published

    with monkeypatch.context() as patched:
        patched.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patched.setattr(published, "load_state_dict_from_url", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        network = published.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    extract = extractor("inception", inception=tmp_path / "inception.pth")
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    features = extract(images)
    assert features.pooled.shape == (2, 2048)
    assert features.spatial.shape == (2, 7 * 17 * 17)
    assert features.logits.shape == (2, 1008)
    torch.testing.assert_close(features.pooled, network(images.permute(0, 3, 1, 2))[0])
    assert extractor(inception=tmp_path / "inception.pth").name == extract.name == "inception-2015"


def test_a_damaged_or_missing_inception_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for file in (tmp_path / "weights.pth", tmp_path / "missing.pth"):
        with pytest.raises(ModelError, match=r"extractor inception: cannot be had .*it needs torch-fidelity") as caught:
            extractor("inception", inception=file)
        assert "\n" not in str(caught.value)


def test_an_onnx_network_is_an_extractor(tmp_path: Path) -> None:
    """The mean of each colour, in [0, 1]; greyscale images become colour."""
    onnx = pytest.importorskip("onnx")
    shape = ["batch", 3, "height", "width"]
    mean = onnx.helper.make_node("ReduceMean", ["image"], ["features"], axes=[2, 3], keepdims=0)
    graph = onnx.helper.make_graph(
        [mean],
        "mean",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["batch", 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(tmp_path / "mean.onnx"))
    extract = extractor(str(tmp_path / "mean.onnx"))
    assert extract.name.startswith("mean.onnx (")
    grey = torch.full((5, 8, 8, 1), 51, dtype=torch.uint8)
    torch.testing.assert_close(extract(grey).pooled, torch.full((5, 3), 0.2))


def test_unknown_extractors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="extractor 'resnet' is unknown"):
        extractor("resnet")
    with pytest.raises(ModelError, match="no such file"):
        extractor(str(tmp_path / "network.onnx"))


WEIGHT = np.random.default_rng(0).normal(size=(8, 3, 4, 4)).astype(np.float32)


def test_a_file_has_one_or_three_outputs(tmp_path: Path) -> None:
    for count in (2, 4):
        file = save_network(tmp_path / f"{count}.onnx", WEIGHT, 4, count)
        with pytest.raises(ModelError, match="expected one output") as caught:
            extractor(str(file))
        assert "\n" not in str(caught.value)
    single = extractor(str(save_network(tmp_path / "1.onnx", WEIGHT, 4, 1)))(
        torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    )
    assert [part.shape for part in (single.pooled, single.spatial, single.logits)] == [(2, 8), (2, 0), (2, 0)]


@pytest.mark.parametrize(("stride", "side"), [(3, 21), (4, 16), (5, 13)])
def test_the_map_of_a_file_has_sides_of_14_to_17(tmp_path: Path, stride, side) -> None:
    file = str(save_network(tmp_path / "network.onnx", WEIGHT, stride))
    if side == 16:
        assert extractor(file)(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).spatial.shape == (2, 7 * 16 * 16)
    else:
        with pytest.raises(ModelError, match=f"its map is {side} x {side} for images of 64 x 64; sFID needs"):
            extractor(file)


def test_fingerprints_know_weights_by_their_values() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = fingerprints([weight, torch.zeros(4)])
    assert found == [hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]]
    assert fingerprints([weight.double(), weight.to(memory_format=torch.channels_last)]) == found * 2
    assert fingerprints([weight + 1e-6]) != found


def test_every_kind_of_extractor_has_the_fingerprints_of_its_weights(tmp_path: Path) -> None:
    file = save_network(tmp_path / "renamed.onnx", WEIGHT, 4, 1)
    assert extractor(str(file)).fingerprints == frozenset(fingerprints([torch.from_numpy(WEIGHT)]))
    assert len(extractor("efficientnet-lite0").fingerprints) > 40


def test_a_network_that_could_hold_code_is_no_extractor(tmp_path: Path) -> None:
    """TorchScript runs what is written into its file, for instance a function that writes files."""
    (tmp_path / "network.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"network.pt' is unknown; use .* or an .onnx file"):
        extractor(str(tmp_path / "network.pt"))


def test_inception_is_downloaded_on_request_only(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(extractors, "INCEPTION_URL", published(tmp_path, {}))
    monkeypatch.setattr(extractors, "_inception", lambda file, device: file.is_file())
    assert extractor("efficientnet-lite0", download=True).name == extractor().name == "efficientnet-lite0"
    assert not (tmp_path / "hub").exists()
    assert extractor(download=True) is True
    assert extractor() is True

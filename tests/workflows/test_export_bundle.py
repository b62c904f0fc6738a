"""`medseg models export --monai-bundle`: MONAI loads and runs the bundle, to the masks of `medseg segment`."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion.errors import ModelError, UsageError
from medseg_diffusion.models.bundle_network import BundleSegmenter, bundle_card, bundle_state
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.workflows.export_bundle import export_bundle
from tests.helpers import segmenters
from tests.helpers.cli import error_lines, medseg

# MONAI and Ignite warn of their own use of each other; a bundle's expressions import what they name.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def complete(path: Path, model: Path) -> Path:
    """A copy of an untrained model with all that a card is rendered from."""
    saved = load_model_files(model)
    more = {
        "task": "mask", "dims": 3, "training": {"seed": 0, "step": 1, "data": {}}, "metrics": {}, "licence": "CC0",
        "versions": {},
    }  # fmt: skip
    save_model(path, {**more, **saved.card}, saved.weights, "# card")
    return path


def bundle_of(model: Path, folder: Path) -> Path:
    result = medseg("models", "export", model, "-o", folder, "--monai-bundle")
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {"inference": {"steps": 2, "ensemble": 3, "window": [8, 8, 8], "largest_part": True}}]
)
def test_monai_runs_the_bundle_to_the_same_masks(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = segmenters.make_model(tmp_path / "untrained", segmenters.tiny_config(**changes))
    bundle = bundle_of(complete(tmp_path / "model", model), tmp_path / "bundle")
    scans = [segmenters.save(tmp_path / "scans" / f"{name}.nii.gz") for name in ("a", "scan.2")]
    ours = segmenters.run(scans, tmp_path / "model", output=tmp_path / "ours")
    monkeypatch.setattr(sys, "path", list(sys.path))  # a bundle adds its folder
    workflow = monai.bundle.ConfigWorkflow(
        str(bundle / "configs" / "inference.json"), workflow_type="inference", logging_file=False,
        bundle_root=str(bundle), dataset_dir=str(tmp_path / "scans"), output_dir=str(tmp_path / "theirs"), device="cpu",
    )  # fmt: skip
    workflow.initialize()
    assert not workflow.check_properties(), "MONAI's list of what a bundle for inference has"
    workflow.run()
    for case in ours:
        expected = nib.load(case.outputs["segmentation"])
        found = nib.load(tmp_path / "theirs" / case.outputs["segmentation"].name)
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
        assert 0 < np.asarray(expected.dataobj).mean() < 1, "an empty mask would prove nothing"


def test_monai_loads_the_network_with_its_weights(tmp_path: Path, tiny_model: Path) -> None:
    bundle = bundle_of(complete(tmp_path / "model", tiny_model), tmp_path / "bundles" / "mine")
    network = monai.bundle.load("mine", bundle_dir=bundle.parent, workflow_type="inference", device="cpu")
    weights = load_model_files(tiny_model).weights
    assert {name.removeprefix("model.") for name in network.state_dict()} == set(weights)
    for name, value in weights.items():
        torch.testing.assert_close(network.state_dict()[f"model.{name}"], value)
    labels = network(torch.rand(2, 1, 9, 8, 7))
    assert labels.shape == (2, 1, 9, 8, 7) and labels.dtype == torch.uint8


def test_a_bundle_has_the_files_of_the_specification(tmp_path: Path) -> None:
    """Also with a shape prior, which is a part of the weights."""
    bundle = bundle_of(Path("brain-tissue-t1"), tmp_path / "brain")
    files = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())
    assert files == [
        "LICENSE",
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "models/model.pt",
    ]
    if os.name == "posix":  # whoever may read the folder may enter those inside
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (bundle, *bundle.rglob("*")) if path.is_dir()}
        assert len(modes) == 1 and modes.pop() & 0o500 == 0o500
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert outputs["channel_def"]["3"] == "white matter" and outputs["value_range"] == [0, 3]
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert state["shape_prior"].dtype == torch.uint8
    readme = (bundle / "docs" / "README.md").read_text()
    assert readme.startswith("# brain\n") and "## How to run this bundle" in readme and "## Limits" in readme


@pytest.mark.parametrize("name", ["$__import__('os').getpid()", "@network", "%other.json#x"])
def test_a_card_that_monai_would_execute_is_refused(name: str, tmp_path: Path, tiny_model: Path) -> None:
    saved = load_model_files(complete(tmp_path / "model", tiny_model))
    save_model(tmp_path / "evil", {**saved.card, "labels": {"0": "background", "1": name}}, saved.weights, "# card")
    with pytest.raises(ModelError, match="MONAI would execute the text"):
        export_bundle(tmp_path / "evil", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_shape_prior_stays_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network on a GPU has its shape prior there, but the registration computes with numpy."""
    saved = load_model_files("brain-tissue-t1")
    network = BundleSegmenter(bundle_card(saved))
    network.load_state_dict(bundle_state(saved))
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self) or self)
    segmenter = network._segmenter(torch.device("cpu"))
    assert any(one.shape == saved.weights["shape_prior"].shape for one in moved)
    assert segmenter.aggregation.prior is not None


def test_other_models_and_existing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a segmenter"):
        export_bundle("flair-anomaly", tmp_path / "bundle")
    with pytest.raises(UsageError, match="exists"):
        export_bundle("hippocampus-t1", tmp_path)
    result = medseg("models", "export", "hippocampus-t1", "-o", tmp_path / "x", "--monai-bundle", "--half")
    assert result.exit_code == 2 and len(error_lines(result)) == 1
    assert list(tmp_path.iterdir()) == []

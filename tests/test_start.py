"""What starting costs: segmenting must not wait for libraries that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diffusion import build
from medseg_diffusion.config.load import parse_config
from medseg_diffusion.models.store import save_model

# None of them is needed to segment a NIfTI file with a U-Net. Together they take seconds.
UNUSED = (
    "accelerate",
    "tensorboard",
    "torch.utils.tensorboard",
    "SimpleITK",
    "jinja2",
    "matplotlib",
    "monai",
    "pandas",
    "scipy.ndimage",
    "scipy.optimize",
    "scipy.stats",
    "skimage",
    "sklearn",
    "torch._dynamo",
    "torchmetrics",
    "torchvision",
)

SEGMENT = """
import sys
from pathlib import Path

from medseg_diffusion import SegmentOptions, segment

end = sys.argv.index("--")
scan, *models = sys.argv[1:end]
for model in models:
    (result,) = segment([Path(scan)], SegmentOptions(model=model, device="cpu"))
    assert result.status == "done", result.error
print(*[name for name in sys.argv[end + 1 :] if name in sys.modules])
"""

NAMES = """
import sys
from pathlib import Path

from medseg_diffusion.volumes.inputs import find_scans

assert len(find_scans(Path(sys.argv[1]))) == 1
print(*[name for name in sys.argv[2:] if name in sys.modules])
"""


def loaded(code: str, *arguments: object) -> str:
    """What a new interpreter prints that runs ``code``."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scans") / "scan.nii.gz"
    image = np.random.default_rng(0).random((11, 13, 9)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), path)
    return path


def make_model(path: Path, method: str, window: list[int]) -> Path:
    content = {
        "method": method,
        "data": {"labels": ["bright"], "window": window},
        "network": {"channels": 8, "channel_mult": [1, 2]},
        "semantic_condition": {"depth": 1, "head_channels": 8},
        "inference": {"steps": 2, "ensemble": 2},
    }
    config = parse_config(content, "test")
    card = {
        "method": method,
        "labels": {"0": "background", "1": "bright"},
        "channels": ["T1"],
        "config": config.model_dump(mode="json"),
    }
    torch.manual_seed(0)
    save_model(path, card, build.segmenter(config, 2).state_dict(), "# card")
    return path


def test_segmenting_with_a_unet_loads_nothing_that_it_does_not_use(tmp_path: Path, scan: Path) -> None:
    methods = ["ensemdiff", "segdiff", "medsegdiff", "medsegdiff-v2", "baseline"]
    models = [make_model(tmp_path / method, method, [8, 8, 8]) for method in methods]
    models.append(make_model(tmp_path / "whole", "ensemdiff", [16, 16, 16]))
    assert loaded(SEGMENT, scan, *models, "--", *UNUSED) == ""


def test_names_of_scans_need_neither_torch_nor_arrays(scan: Path) -> None:
    assert loaded(NAMES, scan.parent, *UNUSED, "numpy", "torch", "nibabel", "pydicom") == ""


def test_the_package_and_its_help_need_no_torch() -> None:
    code = (
        "import sys, medseg_diffusion, medseg_diffusion.volumes; print(*[n for n in sys.argv[1:] if n in sys.modules])"
    )
    assert loaded(code, *UNUSED, "numpy", "torch") == ""

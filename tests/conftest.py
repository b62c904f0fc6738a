"""Fixtures of several folders.

What is trained here is trained once for all tests. Imports stay inside: a test that needs none of it does not wait.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MEDSEG_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data; tests that use it are marked `data` and skip where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA}; set MEDSEG_DATA")
    return DATA


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here; it needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own models and packed images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSEG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _denormals() -> Iterator[None]:
    """A training flushes denormal numbers: the other tests want them back."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


# ---- segmenters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def block_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small scans with a bright block, and its mask."""
    from tests.helpers import training

    folder = tmp_path_factory.mktemp("block-scans")
    training.write_scans(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained segmenter of volumes."""
    from tests.helpers import segmenters

    return segmenters.make_model(tmp_path_factory.mktemp("models") / "tiny", segmenters.tiny_config())


# ---- generators ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 64 x 64 images: dark on the left, dark on the right."""
    from tests.helpers import generators

    folder = tmp_path_factory.mktemp("pictures")
    generators.save_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def image_models(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A generator of each kind, of the pictures; trained on use."""
    from tests.helpers import generators

    return generators.train_models(pictures, tmp_path_factory.mktemp("image-models"))


@pytest.fixture(scope="session")
def scoring_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of random weights in the place of Inception."""
    from tests.helpers import generators

    path = tmp_path_factory.mktemp("network") / "small.onnx"
    generators.save_scoring_network(path)
    return path


@pytest.fixture(scope="session")
def ball_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scans of a bright ball."""
    from tests.helpers import generators

    folder = tmp_path_factory.mktemp("ball-scans")
    generators.save_balls(folder)
    return folder


@pytest.fixture(scope="session")
def ball_generator(ball_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of such volumes."""
    from tests.helpers import generators

    return generators.train_ball_generator(ball_scans, tmp_path_factory.mktemp("ball-generator") / "run")


# ---- pixel classifiers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def box_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scans of a bright box in a darker body, labelled."""
    from tests.helpers import pixel_classifiers

    folder = tmp_path_factory.mktemp("box-scans")
    pixel_classifiers.write_scans(folder)
    return folder


@pytest.fixture(scope="session")
def box_generators(box_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A generator of their slices (2) and one of volumes (3)."""
    from tests.helpers import pixel_classifiers

    return pixel_classifiers.train_generators(box_scans, tmp_path_factory.mktemp("box-generators"))


# ---- anomaly models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def anomaly_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scans with a lesion in slices 4 to 6, labelled."""
    from tests.helpers import anomaly

    folder = tmp_path_factory.mktemp("anomaly-scans")
    anomaly.write_scans(folder)
    return folder


@pytest.fixture(scope="session")
def other_scans(anomaly_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scans under the names of other patients, so that a model may be calibrated on them."""
    folder = tmp_path_factory.mktemp("other-scans")
    for path in sorted(anomaly_scans.glob("*/*")):
        copy = folder / path.parent.name / f"other-{path.name}"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def anomaly_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of the first stage of a latent model, as a file."""
    from tests.helpers import anomaly

    file = tmp_path_factory.mktemp("configs") / "codec.yaml"
    file.write_text(anomaly.AUTOENCODER)
    return str(file)


@pytest.fixture(scope="session")
def anomaly_models(
    anomaly_scans: Path, anomaly_autoencoder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An anomaly model of each kind of generator, calibrated; trained on use."""
    from tests.helpers import anomaly

    return anomaly.train_models(anomaly_scans, anomaly_autoencoder, tmp_path_factory.mktemp("anomaly-models"))

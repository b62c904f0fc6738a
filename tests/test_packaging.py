"""What is on disk is what ships. `make wheel-test` runs this against an installed wheel, from another folder."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_folder_is_listed() -> None:
    # A forgotten subpackage works in an editable install and is missing from the wheel.
    library = {path.parent for path in (ROOT / "medseg_diffusion").rglob("__init__.py")}
    on_disk = {".".join(folder.relative_to(ROOT).parts) for folder in library}
    assert sorted(SETUPTOOLS["packages"]) == sorted(on_disk | set(SETUPTOOLS["package-dir"]))


def test_modules_lie_in_packages() -> None:
    orphans = [path for path in (ROOT / "medseg_diffusion").rglob("*.py") if not (path.parent / "__init__.py").exists()]
    assert orphans == []


def test_configs_are_flat() -> None:
    assert [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent != ROOT / "configs"] == []


@pytest.mark.parametrize(
    ("package", "folder", "pattern"),
    [
        ("medseg_configs", "configs", "*.yaml"),
        ("medseg_diffusion", "medseg_diffusion", "py.typed"),
        ("medseg_diffusion", "medseg_diffusion", "pretrained/*/*"),
        ("medseg_diffusion", "medseg_diffusion", "reports/templates/*.j2"),
        ("medseg_diffusion", "medseg_diffusion", "reports/vendor/*/*"),
    ],
)
def test_data_files_are_installed(package: str, folder: str, pattern: str) -> None:
    on_disk = [path.relative_to(ROOT / folder) for path in (ROOT / folder).glob(pattern) if path.is_file()]
    assert on_disk, f"nothing matches {folder}/{pattern}"
    assert [path for path in on_disk if not files(package).joinpath(*path.parts).is_file()] == []


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from medseg_cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(*sorted({'torch', 'monai', 'numpy', 'nibabel', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

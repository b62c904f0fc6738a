"""The examples run as they are written, offline and fast, and use public names alone."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

import medseg_diffusion

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "segment_scan": ("segmented.png", "white matter: Dice 0."),
    "train_segmenter": ("run/model/model.json", "not seen in training: Dice 0."),
    "several_readers": ("readers.png", "faint: areas of"),
    "anomaly_map": ("anomaly.png", "score of the scan:"),
    "generate_images": ("drawn.png", "(16, 32, 32, 1) drawn:"),
}
"""Script -> a file that it writes, and text that it prints."""


def code_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", [*FOLDER.glob("*.py"), *FOLDER.glob("*.ipynb")], ids=lambda path: path.name)
def test_examples_use_public_names(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(code_of(path))) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [node for node in imports if isinstance(node, ast.ImportFrom) and "medseg" in (node.module or "")]
    assert ours or path.stem == "demo", "the demonstration runs the command line"
    for node in ours:
        assert node.module == "medseg_diffusion"
        assert {alias.name for alias in node.names} <= set(medseg_diffusion.__all__)
    assert path.stem == "demo" or len(code_of(path).splitlines()) < 60


def test_every_script_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SCRIPTS, "demo"}
    assert [path.name for path in FOLDER.glob("*.ipynb")] == ["segment.ipynb"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs(name: str, tmp_path: Path) -> None:
    written, printed = SCRIPTS[name]
    environment = {**os.environ, "MPLBACKEND": "agg", "MEDSEG_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(FOLDER / f"{name}.py"), str(tmp_path / "output")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert printed in result.stdout and (tmp_path / "output" / written).is_file()
    if written.endswith(".png"):
        with Image.open(tmp_path / "output" / written) as picture:
            assert len(set(picture.convert("L").tobytes())) > 10, "a picture that shows something"


@pytest.mark.filterwarnings("ignore")  # of Jupyter, in this process
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / "segment.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not stored"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "mask.nii.gz").is_file() and "grey matter': 'Dice 0." in str(outputs[-1])

"""Files of others do no harm: archives, pickles, names in pages and shells, and who may read what is written."""

from __future__ import annotations

import ast
import io
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import medseg_cli
import numpy as np
import pytest
from PIL import Image

import medseg_diffusion
from medseg_diffusion.data.images import find_images
from medseg_diffusion.errors import InputError
from medseg_diffusion.files import whole_file, whole_folder, write_files
from medseg_diffusion.volumes import archives
from medseg_diffusion.volumes.io import read_volume, write_labels
from tests.helpers import segmenters, untrusted_files
from tests.helpers.cli import medseg

SOURCES = sorted(
    path
    for package in (medseg_diffusion, medseg_cli)
    for path in Path(str(package.__file__)).parent.rglob("*.py")
)  # fmt: skip

# ---- archives --------------------------------------------------------------------------------------------------------


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, format="PNG")
    return buffer.getvalue()


def image_zip(path: Path) -> zipfile.ZipFile:
    """A zip of two images, open for more."""
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    for name in ("a.png", "b.png"):
        archive.writestr(name, picture())
    return archive


def dicom_zip(path: Path) -> zipfile.ZipFile:
    """A zip of a DICOM series, open for more."""
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    for k in range(4):
        archive.writestr(f"{k}.dcm", untrusted_files.dicom_bytes(untrusted_files.dicom_slice(k)))
    return archive


READERS: dict[str, tuple[Callable[[Path], zipfile.ZipFile], Callable[[Path], object]]] = {
    "images": (image_zip, find_images),
    "DICOM": (dicom_zip, read_volume),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/cron.d/x.png", "the path '/etc/cron.d/x.png' in a zip"),
        ("../../x.png", r"the path '\.\./\.\./x.png' in a zip"),
        ("a/../../x.png", "in a zip; expected paths inside it"),
        ("..\\x.png", "in a zip; expected paths inside it"),
        ("C:/x.png", "in a zip; expected paths inside it"),
        ("c.png", "two files named 'c.png' in a zip"),
        ("link.png", "the link 'link.png' in a zip"),
    ],
)
def test_a_zip_of_strange_entries_is_refused(kind: str, name: str, message: str, tmp_path: Path) -> None:
    write, read = READERS[kind]
    with write(tmp_path / "x.zip") as archive:
        entry = zipfile.ZipInfo(name)
        if name.startswith("link"):
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
        if name == "c.png":
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(name, picture())
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(InputError, match=message):
        read(tmp_path / "x.zip")
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", READERS)
def test_a_zip_that_unpacks_to_very_much_is_refused(kind: str, tmp_path: Path, monkeypatch) -> None:
    write, read = READERS[kind]
    with write(tmp_path / "x.zip") as archive:
        archive.writestr("bomb.png", bytes(2**20))
    assert (tmp_path / "x.zip").stat().st_size < 20_000
    monkeypatch.setattr(archives, "MOST_BYTES", 2**20)
    with pytest.raises(InputError, match=r"a zip of \d+ bytes; expected at most 1048576; unpack it"):
        read(tmp_path / "x.zip")


def test_one_entry_of_a_zip_has_a_largest_size(tmp_path: Path) -> None:
    """Also one that lies about its size: reading stops at the size that was checked."""
    with image_zip(tmp_path / "x.zip") as archive:
        archive.writestr("bomb.png", bytes(3000))
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        with pytest.raises(InputError, match=r"3000 bytes in 'bomb\.png'; expected at most 2999"):
            archives.zip_entries(archive, tmp_path / "x.zip", 2999)
        assert len(archives.zip_entries(archive, tmp_path / "x.zip", 3000)) == 3
    content = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(content.replace((3000).to_bytes(4, "little"), (30).to_bytes(4, "little")))
    collection = find_images(tmp_path / "x.zip")
    with pytest.raises(InputError, match="unreadable entry"):
        collection.read("bomb.png")


def test_a_sound_zip_is_read(tmp_path: Path) -> None:
    """The refusals above are of the entries that were added."""
    image_zip(tmp_path / "images.zip").close()
    images = find_images(tmp_path / "images.zip")
    assert images.entries and all(images.read(entry.name) for entry in images.entries)
    with dicom_zip(tmp_path / "dicom.zip") as archive:
        files = len(archive.namelist())
    volume = read_volume(tmp_path / "dicom.zip")
    assert volume.shape[2] == files > 1 and float(volume.data.max()) > float(volume.data.min())


# ---- code in data ----------------------------------------------------------------------------------------------------


CODE = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "subprocess.getoutput"}
CODE |= {"torch.jit.load", "torch.package.PackageImporter"}
"""Calls that run what a text or a file says."""


def dangerous(source: str) -> Iterator[str]:
    """The calls that run code from a file, or hand text to a shell."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and options.get("weights_only") != "True":
            yield f"{name} without weights_only=True"
        if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
            yield f"{name} with {options}"
        if name in CODE:
            yield name
        if name.split(".")[0] in ("pickle", "marshal", "shelve", "joblib", "dill"):
            yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_unpickled_and_nothing_reaches_a_shell(path: Path) -> None:
    assert not list(dangerous(path.read_text()))


@pytest.mark.parametrize(
    "source",
    ["torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "pickle.load(f)",
     "os.system(name)", "subprocess.run(name, shell=True)", "yaml.load(text, Loader)", "eval(text)",
     "torch.jit.load(path)"],
)  # fmt: skip
def test_dangerous_calls_are_noticed(source: str) -> None:
    """The check above can fail."""
    assert list(dangerous(source))
    assert not list(dangerous("torch.load(path, weights_only=True); np.load(path); subprocess.run([name])"))


# ---- names -----------------------------------------------------------------------------------------------------------

EVIL = "<img src=x onerror=alert(1)>"


def test_a_name_that_is_markup_is_text_on_every_page(tiny_model: Path, tmp_path: Path) -> None:
    scan = segmenters.save(tmp_path / "in" / f"{EVIL}.nii.gz")
    page = tmp_path / "out" / "page.html"
    command = ["segment", scan, "-m", tiny_model, "-o", tmp_path / "out", "--report", page, "--device", "cpu"]
    result = medseg(*command, "--preview")
    assert result.exit_code == 0, result.output
    result = medseg("evaluate", tmp_path / "out", tmp_path / "out", "-o", tmp_path / "scores", "--images", scan.parent)
    assert result.exit_code == 0, result.output
    pages = sorted(tmp_path.rglob("*.html"))
    assert [path.name for path in pages] == ["page.html", "report.html"]
    for path in pages:
        text = path.read_text()
        assert EVIL not in text and "&lt;img src=x onerror=alert(1)&gt;" in text


def test_a_name_that_is_a_command_is_only_a_name(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    scan = segmenters.save(Path("$(touch owned); touch owned #.nii.gz"))
    result = medseg("segment", scan, "-m", tiny_model, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "$(touch owned); touch owned #.nii.gz", "$(touch owned); touch owned #_dseg.tsv",
        "$(touch owned); touch owned #_seg.nii.gz",
    ]  # fmt: skip


# ---- permissions -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_are_private_while_they_are_written_and_then_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    usual, folder = 0o666 & ~umask, 0o777 & ~umask
    with whole_file(tmp_path / "a") as temporary:
        temporary.write_text("a patient")
        assert mode(temporary) == 0o600 and temporary.parent == tmp_path
    assert mode(tmp_path / "a") == usual
    write_files(tmp_path, {"b": "text"})
    assert mode(tmp_path / "b") == usual
    with whole_folder(tmp_path / "c") as temporary:
        (temporary / "d").write_text("a patient")
        assert mode(temporary) == 0o700
    assert mode(tmp_path / "c") == 0o700, "copies of scans stay private"
    with whole_folder(tmp_path / "e", private=False) as temporary:
        (temporary / "f").touch(mode=0o600)
        (temporary / "g").mkdir()
        (temporary / "g" / "h").touch(mode=0o600)
        assert mode(temporary) == 0o700
    assert (mode(tmp_path / "e"), mode(tmp_path / "e" / "f")) == (folder, usual)
    assert (mode(tmp_path / "e" / "g"), mode(tmp_path / "e" / "g" / "h")) == (folder, usual)
    model = segmenters.make_model(tmp_path / "model", segmenters.tiny_config())
    assert {mode(path) for path in model.iterdir()} == {usual} and mode(model) == folder
    volume = read_volume(segmenters.save(tmp_path / "scan.nii.gz"))
    for suffix in (".nii.gz", ".mha", ".mhd", ".nrrd"):
        write_labels((volume.data[0] > 0.5).int(), volume, tmp_path / f"mask{suffix}")
        assert mode(tmp_path / f"mask{suffix}") == usual


def test_a_file_that_fails_leaves_neither_itself_nor_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for write in (whole_file, whole_folder):
        with pytest.raises(OSError, match="full"), write(tmp_path / "a") as temporary:
            (temporary / "b" if temporary.is_dir() else temporary).write_text("new")
            raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"

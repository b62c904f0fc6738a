"""`medseg models export, install, remove`: models travel whole, checked, or not at all."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

from medseg_diffusion.models.store import FILES, find_model, list_models, load_model_files, model_folders
from medseg_diffusion.workflows.export_model import export_model
from medseg_diffusion.workflows.install_model import install_model
from tests.helpers.cli import error_lines, medseg


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def refused(code: int, *arguments: object) -> str:
    """The one line of a refused command."""
    result = medseg("models", *arguments)
    (line,) = error_lines(result)
    assert result.exit_code == code, result.output
    return line


# ---- there and back --------------------------------------------------------------------------------------------------


def test_a_model_travels_as_one_zip(tmp_path: Path, home: Path) -> None:
    for name in ("one", "two"):
        assert medseg("models", "export", "hippocampus-t1", "-o", tmp_path / name / "hippo.zip").exit_code == 0
    assert (tmp_path / "one" / "hippo.zip").read_bytes() == (tmp_path / "two" / "hippo.zip").read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["hippo.zip"], "nothing else is left"
    result = medseg("models", "install", tmp_path / "one" / "hippo.zip", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"name": "hippo", "model": str(home / "hippo")}
    copy, original = load_model_files("hippo"), load_model_files("hippocampus-t1")
    assert copy.sha256 == original.sha256, "weights are the same bytes"
    assert medseg("models", "show", "hippo").stdout.startswith("# hippo\n")
    assert ("hippo", "user") in [(info.name, info.source) for info in list_models()]
    assert stat.S_IMODE((home / "hippo" / "model.json").stat().st_mode) & 0o400
    assert [path.name for path in home.iterdir()] == ["hippo"]


def test_folders_and_runs_are_installed_under_their_names(tiny_model: Path, tmp_path: Path, home: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tiny_model)
    for source, arguments, name in (
        (tiny_model, (), "tiny"),
        (tmp_path / "run", (), tiny_model.parent.name),
        (tiny_model, ("--name", "b.2"), "b.2"),
    ):
        result = medseg("models", "install", source, *arguments)
        assert result.exit_code == 0 and result.stdout.startswith(f"{name}: installed in"), result.output
        assert sorted(path.name for path in (home / name).iterdir()) == sorted([*FILES, "SHA256SUMS"])
        assert find_model(name) == home / name


def test_a_name_is_taken_until_it_is_overwritten_or_removed(tiny_model: Path, tmp_path: Path, home: Path) -> None:
    assert "hidden; choose another --name, or add --overwrite" in refused(
        2, "install", tiny_model, "--name", "hippocampus-t1"
    )
    assert medseg("models", "install", tiny_model, "--name", "hippocampus-t1", "--overwrite").exit_code == 0
    assert find_model("hippocampus-t1") == home / "hippocampus-t1"
    assert "is installed" in refused(2, "install", tiny_model, "--name", "hippocampus-t1")
    assert medseg("models", "remove", "hippocampus-t1", "--yes").exit_code == 0
    assert find_model("hippocampus-t1").parent == model_folders()["package"]
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "-x", "x" * 101, "a\nb", "/etc/x"])
def test_strange_names_are_refused(name: str, tiny_model: Path, home: Path) -> None:
    assert "--name" in refused(2, "install", tiny_model, f"--name={name}")
    assert refused(4 if name else 2, "remove", "--yes", "--", name)
    assert not home.exists()


def test_removing_asks_and_keeps_what_is_built_in(tiny_model: Path, home: Path) -> None:
    install_model(tiny_model)
    from typer.testing import CliRunner

    from tests.helpers.cli import SCRIPT

    result = CliRunner().invoke(SCRIPT.load(), ["models", "remove", "tiny"], input="n\n")
    assert result.exit_code == 2 and (home / "tiny").is_dir()
    result = CliRunner().invoke(SCRIPT.load(), ["models", "remove", "tiny"], input="y\n")
    assert result.exit_code == 0 and list(home.iterdir()) == []
    assert "ships with the package" in refused(2, "remove", "hippocampus-t1", "--yes")
    assert "no installed model has this name" in refused(4, "remove", "nothing", "--yes")


# ---- damaged and hostile ---------------------------------------------------------------------------------------------


def packed(path: Path, change: Callable[[dict[str, bytes]], None], model: Path) -> Path:
    """The zip of a model whose files were changed before; names may be changed as well."""
    content = {f"m/{name}": (model / name).read_bytes() for name in (*FILES, "SHA256SUMS")}
    change(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def resealed(**changes: bytes) -> Callable[[dict[str, bytes]], None]:
    """Other files with right checksums."""

    def change(content: dict[str, bytes]) -> None:
        content.update({f"m/{name.replace('_', '.')}": data for name, data in changes.items()})
        sums = "".join(f"{hashlib.sha256(content[f'm/{name}']).hexdigest()}  {name}\n" for name in FILES)
        content["m/SHA256SUMS"] = sums.encode()

    return change


def without(name: str) -> Callable[[dict[str, bytes]], None]:
    return lambda content: content.pop(f"m/{name}") and None


def with_file(name: str, data: bytes = b"x") -> Callable[[dict[str, bytes]], None]:
    return lambda content: content.update({name: data})


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (with_file("../evil"), 3, "the path '../evil' in a zip"),
        (with_file("/etc/evil"), 3, "the path '/etc/evil' in a zip"),
        (with_file("m/weights.safetensors", bytes(10**8)), 3, "unpack to"),
        (with_file("m/SHA256SUMS", b"0" * 2**17), 3, "SHA256SUMS of 131072 bytes"),
        (with_file("n/model.json"), 3, "2 models"),
        (without("model.json"), 3, "no model"),
        (without("README.md"), 4, "incomplete model, without README.md"),
        (with_file("m/README.md"), 4, "differs from SHA256SUMS"),
        (with_file("m/SHA256SUMS", b"\xff\xfe"), 4, "no UTF-8 text"),
        (resealed(weights_safetensors=b"\x08\0\0\0\0\0\0\0nothing!"), 4, "weights.safetensors: unreadable"),
        (resealed(model_json=b"[]"), 4, "model.json: unreadable"),
        (resealed(model_json=b"[" * 10**5), 4, "model.json: unreadable"),
        (resealed(model_json=b'{"schema_version": 99}'), 4, "upgrade medseg-diffusion"),
    ],
)
def test_damaged_and_hostile_zips_leave_nothing(
    change: Callable[[dict[str, bytes]], None], code: int, message: str, tiny_model: Path, tmp_path: Path, home: Path
) -> None:
    line = refused(code, "install", packed(tmp_path / "x.zip", change, tiny_model))
    assert message in line and str(tmp_path / "x.zip") in line and "incoming" not in line
    assert list(home.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "x.zip"]


def test_what_is_no_zip_or_cut_off_or_encrypted_is_one_line(tiny_model: Path, tmp_path: Path, home: Path) -> None:
    whole = packed(tmp_path / "x.zip", lambda content: None, tiny_model).read_bytes()
    encrypted = bytearray(whole)
    encrypted[6] |= 1  # the flag of the first entry, here and in the directory
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    for number, content in enumerate((b"", b"text", whole[:2000], whole[: len(whole) // 2], bytes(encrypted))):
        (tmp_path / f"{number}.zip").write_bytes(content)
        assert "unreadable zip" in refused(3, "install", tmp_path / f"{number}.zip")
    (tmp_path / "bits.zip").write_bytes(whole[:60] + b"\xff" * 20 + whole[80:])  # inside the first compressed file
    assert "unreadable zip" in refused(3, "install", tmp_path / "bits.zip")
    assert "no such file" in refused(3, "install", tmp_path / "nowhere.zip")
    assert "found no model there" in refused(4, "install", tmp_path)
    assert list(home.iterdir()) == []


def test_a_damaged_zip_replaces_nothing(tiny_model: Path, tmp_path: Path, home: Path) -> None:
    install_model(tiny_model)
    before = (home / "tiny" / "model.json").read_bytes()
    file = packed(tmp_path / "x.zip", with_file("m/README.md"), tiny_model)
    refused(4, "install", file, "--name", "tiny", "--overwrite")
    assert (home / "tiny" / "model.json").read_bytes() == before and load_model_files("tiny")


def test_a_card_cannot_steer_the_terminal(tiny_model: Path, tmp_path: Path) -> None:
    change = resealed(README_md=b"# a\x1b[2J\x07 b\n")
    install_model(packed(tmp_path / "x.zip", change, tiny_model), "loud")
    assert medseg("models", "show", "loud").stdout == "# a[2J b\n"


def test_a_strange_card_hides_no_other_model_and_is_one_line(tiny_model: Path, tmp_path: Path, home: Path) -> None:
    card = json.loads((tiny_model / "model.json").read_text())
    for name, changed in (
        ("loud", {**card, "method": "a\x1b[2J"}),
        ("text", {**card, "x_t": {"rows": {"own": {"pairwise_dice": "high"}}}}),
        ("bare", {"schema_version": 1, "method": "ensemdiff", "task": "mask"}),
    ):
        change = resealed(model_json=json.dumps(changed).encode())
        install_model(packed(tmp_path / f"{name}.zip", change, tiny_model), name)
    result = medseg("models", "list")
    assert result.exit_code == 0 and "hippocampus-t1" in result.stdout and "\x1b" not in result.stdout
    assert "no complete card of this version" in refused(4, "export", "bare", "-o", tmp_path / "out")
    assert "not a segmenter" in refused(4, "export", "bare", "-o", tmp_path / "out", "--monai-bundle")
    assert not (tmp_path / "out").exists()


# ---- exports ---------------------------------------------------------------------------------------------------------


def test_texts_of_a_card_stay_through_an_export_and_can_be_replaced(tmp_path: Path) -> None:
    export_model("hippocampus-t1", tmp_path / "a", about={"limits": "None of this."}, licence="CC0")
    card, text = load_model_files(tmp_path / "a").card, (tmp_path / "a" / "README.md").read_text()
    assert card["about"]["data"] == load_model_files("hippocampus-t1").card["about"]["data"]
    assert "## Limits\n\nNone of this.\n" in text and "## Licence\n\nCC0\n" in text and text.startswith("# a\n")
    dtypes = [
        {one.dtype for one in load_file(path / "weights.safetensors").values()}
        for path in (tmp_path / "a", find_model("hippocampus-t1"))
    ]
    assert dtypes[0] == dtypes[1], "an export without --half does not change the file"


@pytest.mark.parametrize("output", ["hf:alone", "hf:a/b/c", "hf:../b", "hf:a/b@main"])
def test_a_repository_has_an_owner_and_a_name(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hf:" in refused(2, "export", "hippocampus-t1", "-o", output)
    assert list(tmp_path.iterdir()) == []


# ---- the hub, faked --------------------------------------------------------------------------------------------------


class FakeHub(ModuleType):
    """huggingface_hub as far as it is used; repositories are kept in memory."""

    def __init__(self) -> None:
        super().__init__("huggingface_hub")
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.HfApi = lambda: self

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", (repo_id, private, exist_ok)))
        self.repositories.setdefault(repo_id, {})

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.repositories[repo_id] |= {path.name: path.read_bytes() for path in folder_path.iterdir()}

    def snapshot_download(self, name: str, revision: str | None, local_dir: Path, allow_patterns: list[str]) -> None:
        self.calls.append(("download", (name, revision)))
        if name not in self.repositories:
            raise ConnectionError(f"404 for {name}\nRequest ID: 1")
        (local_dir / ".cache").mkdir()
        for file in allow_patterns:
            (local_dir / file).write_bytes(self.repositories[name][file])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", fake)
    return fake


def test_a_model_is_pushed_and_pulled_on_command_alone(hub: FakeHub, home: Path) -> None:
    assert medseg("models", "export", "hippocampus-t1", "-o", "hf:me/hippo").exit_code == 0
    assert sorted(hub.repositories["me/hippo"]) == sorted([*FILES, "SHA256SUMS"])
    assert hub.calls == [("create", ("me/hippo", True, True))], "a new repository is private"
    assert medseg("models", "install", "hf:me/hippo@v1").exit_code == 0
    assert hub.calls[1:] == [("download", ("me/hippo", "v1"))]
    assert load_model_files("hippo").sha256 == load_model_files("hippocampus-t1").sha256
    assert sorted(path.name for path in (home / "hippo").iterdir()) == sorted([*FILES, "SHA256SUMS"])


def test_a_hub_that_fails_is_one_line(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the hub did not answer as expected (404 for me/nothing" in refused(4, "install", "hf:me/nothing")
    hub.repositories["me/bad"] = dict.fromkeys([*FILES, "SHA256SUMS"], b"{}")
    assert "hf:me/bad" in refused(4, "install", "hf:me/bad")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install 'medseg-diffusion[hub]'" in refused(4, "install", "hf:me/hippo")
    assert list(home.iterdir()) == []

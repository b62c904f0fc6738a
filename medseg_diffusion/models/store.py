"""Writes, reads and finds model directories, which hold the weights, a card and all that is needed to use them.

model.json           everything that must be the same in sampling and in training (no pickle, no code)
weights.safetensors  the averaged weights
README.md            model card
SHA256SUMS           checksums of the other files
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_diffusion.errors import ModelError
from medseg_diffusion.files import whole_folder, write_files
from medseg_diffusion.volumes.modality import ModelInput
from medseg_diffusion.volumes.paths import MAKER

if TYPE_CHECKING:  # listing models and showing their cards needs no torch
    import torch
    from torch import Tensor

SCHEMA_VERSION = 1
X_T = "x_t"
"""Key of a card: what the noise of a mask diffusion model is worth, measured at the end of its training."""
DETERMINISTIC = 0.99
"""Members with at least this mean pairwise Dice are called equal."""
FILES = ("model.json", "weights.safetensors", "README.md")
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class ModelInfo:
    """One line of `medseg models list`.

    Attributes:
        name: Name under which commands and `load_model` find it.
        path: The model directory.
        method: Published method, and whether the model is deterministic.
        labels: Names of the classes.
        megabytes: Size of the weights.
        source: "user" (MEDSEG_HOME) or "package".
    """

    name: str
    path: Path
    method: str
    labels: tuple[str, ...]
    megabytes: float
    source: str


@dataclass(frozen=True, eq=False)
class SavedModel:
    """A model directory in memory.

    Attributes:
        path: The model directory.
        card: The content of model.json.
        weights: Tensors on the CPU, floating-point ones as float32.
        sha256: Hash of weights.safetensors.
    """

    path: Path
    card: dict[str, Any]
    weights: dict[str, Tensor]
    sha256: str

    @property
    def name(self) -> str:
        """Name of the folder, or of the run folder for RUN/model."""
        return name_of(self.path)

    @property
    def signature(self) -> str:
        """Name and weights in one line, which a NIfTI file has room for (`Volume.described`)."""
        return f"{MAKER} {self.name[:48]} {self.sha256[:12]}"

    def part(self, name: str) -> SavedModel:
        """A model inside this one. Its card is the entry ``name``, and its weights are those with the prefix "name.".

        Raises:
            KeyError: There is no such part.
        """
        return SavedModel(self.path, self.card[name], self.weights_under(name), self.sha256)

    def weights_under(self, name: str) -> dict[str, Tensor]:
        """The weights with the prefix "name.", under names without the prefix."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}


def parts_of_weights(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the weights of several parts into one mapping, which `SavedModel.part` splits again."""
    return {f"{name}.{key}": value for name, weights in parts.items() for key, value in weights.items()}


def save_model(
    path: Path,
    card: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    readme: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory, and replace an older one.

    Args:
        path: The directory.
        card: The content of model.json, without the schema version.
        weights: Tensors on any device.
        readme: The model card in Markdown.
        dtype: Type of the stored floating-point tensors; None for float32.

    Raises:
        ModelError: Weights that are not finite in this type.
    """
    import torch
    from safetensors.torch import save

    dtype = torch.float32 if dtype is None else dtype
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.detach().cpu().to(dtype).isfinite().all()):
            raise ModelError(
                f"{path}: the weights {name} have values that are not finite as {str(dtype).removeprefix('torch.')}; "
                "nothing was written"
            )
    with whole_folder(path, replace=True, private=False) as folder:
        stored = {
            k: v.detach().cpu().to(dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in weights.items()
        }
        # Not save_file: where the disk is full, it raises no OSError.
        (folder / "weights.safetensors").write_bytes(save(stored))
        _describe(folder, card, readme)


def copy_model(source: Path, path: Path, card: Mapping[str, Any], readme: str) -> None:
    """Write the model directory ``path`` with the weights of another one, byte for byte, and a new card.

    Args:
        source: The model directory with the weights.
        path: The new directory.
        card: The content of model.json, without the schema version.
        readme: The model card in Markdown.
    """
    with whole_folder(path, private=False) as folder:
        shutil.copyfile(source / "weights.safetensors", folder / "weights.safetensors")
        _describe(folder, card, readme)


def replace_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write another model.json into a model directory, whose README.md and weights stay as they are.

    Args:
        path: The model directory.
        card: The content of model.json, without the schema version.
    """
    content = _as_json(card)
    sums = [hashlib.sha256(content).hexdigest() if name == "model.json" else _sha256(path / name) for name in FILES]
    lines = "".join(f"{digest}  {name}\n" for digest, name in zip(sums, FILES, strict=True))
    write_files(path, {"model.json": content, SUMS: lines.encode()})


def _as_json(card: Mapping[str, Any]) -> bytes:
    return (json.dumps({**card, "schema_version": SCHEMA_VERSION}, indent=2, allow_nan=False) + "\n").encode()


def _describe(folder: Path, card: Mapping[str, Any], readme: str) -> None:
    """Write all files of a model beside its weights."""
    (folder / "model.json").write_bytes(_as_json(card))
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / SUMS).write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in FILES))


def load_model_files(name_or_path: str | Path | SavedModel) -> SavedModel:
    """Read a model directory and check its checksums.

    Args:
        name_or_path: A model directory, a run directory (its model/), or the name of an installed model. A model that
            was read before is returned as it is.

    Raises:
        ModelError: A model that is not found, incomplete, damaged, or written by a newer version.
    """
    if isinstance(name_or_path, SavedModel):
        return name_or_path
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = find_model(name_or_path)
    card = _read_card(path)
    lines = (line.partition("  ") for line in _read_text(path / SUMS).splitlines())
    listed = {name: digest for digest, _, name in lines}
    for name in FILES:
        if listed.get(name) != _sha256(path / name):
            raise ModelError(f"{path / name}: its SHA-256 differs from SHA256SUMS; the model is damaged, copy it again")
    try:
        stored = load_file(path / "weights.safetensors")
    except SafetensorError as error:
        raise ModelError(f"{path / 'weights.safetensors'}: unreadable ({error}); copy the model again") from error
    weights = {k: v.float() if v.is_floating_point() else v for k, v in stored.items()}
    if bad := [name for name, v in weights.items() if v.is_floating_point() and not bool(v.isfinite().all())]:
        raise ModelError(
            f"{path}: the weights {bad[0]} have values that are not finite; the model is unusable, copy it again"
        )
    return SavedModel(path, card, weights, listed["weights.safetensors"])


def load_readme(name_or_path: str | Path) -> str:
    """The card of a model as text, in Markdown.

    Raises:
        ModelError: There is no such model, or its card is no text.
    """
    path = find_model(name_or_path)
    _read_card(path)
    return _read_text(path / "README.md")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: unreadable (no UTF-8 text); copy the model again") from error


def load_card(name_or_path: str | Path) -> dict[str, Any]:
    """The content of a model's model.json."""
    return _read_card(find_model(name_or_path))


def model_input(name_or_path: str | Path) -> ModelInput:
    """What a model takes, by its card alone.

    Raises:
        ModelError: There is no such model.
    """
    path = find_model(name_or_path)
    return ModelInput.of(name_of(path), _read_card(path))


def name_of(path: Path) -> str:
    """Name of a model's folder, or of the run folder for RUN/model."""
    named = path if path.name not in ("", "..") else path.resolve()
    return named.resolve().parent.name if named.name == "model" else named.name


def find_model(name_or_path: str | Path) -> Path:
    """The model directory of a path or an installed name.

    Raises:
        ModelError: There is no such model; the message lists the installed names.
    """
    direct = Path(name_or_path)
    for candidate in (direct, direct / "model"):
        if (candidate / "model.json").is_file():
            return candidate
    installed = {info.name: info.path for info in list_models()}
    if str(name_or_path) in installed:
        return installed[str(name_or_path)]
    raise ModelError(
        f"{name_or_path}: found no model there and none installed by that name; "
        f"installed: {', '.join(installed) or 'none'}; give a model folder, a run folder or one of these names"
    )


def home() -> Path:
    """The user's folder for models and packed images: MEDSEG_HOME, default ~/.medseg."""
    return Path(os.environ.get("MEDSEG_HOME", Path.home() / ".medseg"))


def model_folders() -> dict[str, Path]:
    """The folders of installed models, in the order of the search: that of the user, then that of the package."""
    return {"user": home() / "models", "package": Path(str(resources.files("medseg_diffusion") / "pretrained"))}


def list_models() -> list[ModelInfo]:
    """The installed models. A model in the user's folder hides a packaged one of the same name."""
    models: dict[str, ModelInfo] = {}
    for source, folder in model_folders().items():
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name in models or path.name.startswith(".") or not (path / "model.json").is_file():
                continue
            try:
                card = _read_card(path)
                labels = tuple(str(name) for name in card["labels"].values())
                megabytes = (path / "weights.safetensors").stat().st_size / 1e6
                method = str(card["method"]) + (", deterministic" if is_deterministic(card) else "")
                models[path.name] = ModelInfo(path.name, path, method, labels, megabytes, source)
            except (ModelError, KeyError, AttributeError, TypeError, ValueError) as error:
                # One damaged model must not hide the others. Loading it by name reports what is wrong.
                models[path.name] = ModelInfo(path.name, path, f"unusable ({type(error).__name__})", (), 0.0, source)
    return list(models.values())


def is_deterministic(card: Mapping[str, Any]) -> bool:
    """Whether the members of a mask diffusion model were all but equal on its validation cases (`DETERMINISTIC`)."""
    return float(card.get(X_T, {}).get("rows", {}).get("own", {}).get("pairwise_dice", 0.0)) >= DETERMINISTIC


def _read_card(path: Path) -> dict[str, Any]:
    missing = [name for name in (*FILES, SUMS) if not (path / name).is_file()]
    if missing:
        raise ModelError(f"{path}: incomplete model, without {', '.join(missing)}; copy the whole folder")
    try:
        card: dict[str, Any] = json.loads((path / "model.json").read_text(encoding="utf-8"))
        version = int(card["schema_version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path / 'model.json'}: unreadable ({error}); copy the model again") from error
    if version > SCHEMA_VERSION:
        raise ModelError(
            f"{path}: written for model format {version}, this version reads up to {SCHEMA_VERSION}; "
            "upgrade medseg-diffusion"
        )
    return card


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The report on a run over scans, as JSON: what was used, and what became of every scan."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from medseg_diffusion.device import peak_process_bytes
from medseg_diffusion.errors import MedsegError
from medseg_diffusion.files import plain, write_json
from medseg_diffusion.models.card import versions
from medseg_diffusion.models.store import SavedModel
from medseg_diffusion.volumes.outputs import require_report
from medseg_diffusion.volumes.volume import Volume

from .scans import ScanResult

VERSION = 1
"""Version of the report's keys. Keys may be added under the same version."""


class RunReport:
    """Collects the report inside a ``with`` block, and writes it at the end, also if an error ends the block.

    Args:
        path: The file; None collects and writes nothing.
        command: "segment" or "anomaly".
        options: The options, a dataclass.
        files: All scans of the run, each with the files that are read for it.

    Raises:
        UsageError: A file that cannot be written.
    """

    def __init__(self, path: Path | None, command: str, options: Any, files: Mapping[Path, Sequence[Path]]) -> None:
        if path is not None:
            require_report(path, [file for each in files.values() for file in each])
        self._files = files
        self._path, self._command, self._options = path, command, options
        self._started, self._clock = _now(), time.monotonic()
        self._model: dict[str, Any] | None = None
        self._device: torch.device | None = None
        self._reading: dict[Path, float] = {}
        self._results: list[dict[str, Any]] = []

    def __enter__(self) -> RunReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            write_json(self._path, plain(self._content(error)))

    def timed(self, read: Callable[[Path], Volume]) -> Callable[[Path], Volume]:
        """The same function, whose time is noted for the scan that it reads."""

        def timed_read(path: Path) -> Volume:
            started = time.monotonic()
            try:
                return read(path)
            finally:
                self._reading[path] = time.monotonic() - started

        return timed_read

    def uses(self, saved: SavedModel, device: torch.device, settings: Mapping[str, Any]) -> None:
        """Note the model, and the settings in force after its defaults."""
        self._device = device
        self._model = {
            "name": saved.name,
            "path": saved.path.resolve(),
            "sha256": saved.sha256,
            "schema_version": saved.card["schema_version"],
            "method": saved.card["method"],
            "versions": saved.card.get("versions", {}),
            "settings": dict(settings),
        }

    def add(self, result: ScanResult) -> None:
        """Note the result of a scan."""
        if self._path is None:
            return
        self._results.append(
            {
                **asdict(result),
                "sha256": {}
                if result.status == "skipped"
                else {str(file): _sha256(file) for file in self._files[result.scan]},
                "read_seconds": self._reading.get(result.scan),
                "finished": _now(),
            }
        )

    def _content(self, error: BaseException | None) -> dict[str, Any]:
        states = [result["status"] for result in self._results]
        return {
            "version": VERSION,
            "command": self._command,
            "status": "stopped" if error is not None else "failed" if "failed" in states else "done",
            "error": None if error is None else described(error),
            "started": self._started,
            "finished": _now(),
            "seconds": time.monotonic() - self._clock,
            "versions": versions(),
            "platform": platform.platform(),
            "device": None if self._device is None else _device(self._device),
            "peak_memory_mb": None if (peak := peak_process_bytes()) is None else peak / 1e6,
            "options": asdict(self._options),
            "model": self._model,
            "counts": {state: states.count(state) for state in ("done", "skipped", "failed")},
            "scans": self._results,
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def described(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MedsegError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": str(device), "description": platform.processor() or platform.machine(), "peak_memory_mb": None}
    return {
        "name": str(device),
        "description": torch.cuda.get_device_name(device),
        "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6,
    }


def _sha256(scan: Path) -> str | None:
    """Hash of a file; of a folder, that of the lines that ``sha256sum`` prints of all files below it, sorted by path.

    None if a file cannot be read.
    """
    try:
        if scan.is_file():
            with scan.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        files = {path.relative_to(scan).as_posix(): path for path in scan.rglob("*") if path.is_file()}
        lines = "".join(f"{_sha256(files[name])}  {name}\n" for name in sorted(files))
    except OSError:
        return None
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()

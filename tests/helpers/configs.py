"""The shortest configuration, and files of configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from medseg_diffusion.config.load import load_config, presets
from medseg_diffusion.config.segmenter import SegmenterConfig

SEGMENTERS = [name for name in presets() if isinstance(load_config(name), SegmenterConfig)]
"""Names of the presets that configure a segmenter."""
MINIMAL: dict[str, Any] = {"method": "ensemdiff", "data": {"window": [8, 8, 8]}}


def write(folder: Path, content: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path

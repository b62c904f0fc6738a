"""What a model takes: the kinds of images that its channels are, and how BIDS and DICOM name these kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BIDS_SUFFIX = {"T1": "T1w", "T1c": "T1w", "T2": "T2w", "FLAIR": "FLAIR", "PD": "PDw"}
"""Kind of image -> suffix of its files in a BIDS folder. Files of the kind T1c also have the entity "ce"."""
DICOM_MODALITY = {**dict.fromkeys(BIDS_SUFFIX, "MR"), "MR": "MR", "CT": "CT", "PET": "PT"}
"""Kind of image -> DICOM modality."""

_BEFORE = r"(?<![a-z0-9])(?:3d|2d)?"
_SEQUENCES = {
    "T1": re.compile(_BEFORE + r"(t1(?![0-9])|mprage|mp-rage|spgr|bravo)"),
    "T2": re.compile(_BEFORE + r"t2(?![0-9*]|[-_ ]?star)"),
    "FLAIR": re.compile(r"flair|dark[-_ ]?fluid|(?<![a-z0-9])t2f(?![a-z])"),
    "PD": re.compile(_BEFORE + r"(pd|pdw)(?![a-z0-9])"),
}
_GENERAL = {
    "CT": re.compile(r"(?<![a-z0-9])ct(?![a-z])"),
    "PET": re.compile(r"(?<![a-z0-9])(pet|pt)(?![a-z])"),
    "MR": re.compile(r"(?<![a-z0-9])mri?(?![a-z])"),
}
_CONTRAST = re.compile(r"post(?!er)|contrast|(?<![a-z])(gd|gad|gado|ce|t1c)(?![a-z])|\+ ?c(?![a-z])|(?<![a-z])c\+")
_NATIVE = re.compile(r"(?<![a-z])(pre|non|no|without|w/o)[-_ ]*(contrast|gado?|gd|ce|c)(?![a-z])")


def kind_of(text: str) -> str | None:
    """The kind of image that a text names: the name of a channel or model, or the description of a DICOM series.

    Returns:
        "T1", "T1c" (with contrast agent), "T2", "FLAIR", "PD", "CT", "PET", "MR" (of any sequence), or None if the text
        names none or several.
    """
    text = text.lower()
    named = [name for name, pattern in _SEQUENCES.items() if pattern.search(text)]
    if named == ["T2", "FLAIR"]:
        return "FLAIR"
    if len(named) > 1:
        return None
    if named == ["T1"]:
        return "T1c" if _CONTRAST.search(_NATIVE.sub(" ", text)) else "T1"
    named = named or [name for name, pattern in _GENERAL.items() if pattern.search(text)]
    return named[0] if len(named) == 1 else None


@dataclass(frozen=True)
class ModelInput:
    """What a model takes.

    Attributes:
        model: Name of the model, for messages.
        channels: Names of its channels, in the order of the network.
    """

    model: str = "image"
    channels: tuple[str, ...] = ("image",)

    @classmethod
    def of(cls, name: str, card: Mapping[str, Any]) -> ModelInput:
        """The input of the model with this name and card (model.json)."""
        return cls(name, tuple(str(channel) for channel in card.get("channels") or ("image",)))

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """The kind of each channel (`kind_of`). That of a single channel may be told by the model's name instead."""
        kinds = tuple(kind_of(channel) for channel in self.channels)
        if len(kinds) == 1 and kinds[0] in (None, "MR"):
            return (kind_of(self.model) or kinds[0],)
        return kinds

    def __str__(self) -> str:
        count = len(self.channels)
        return f"{self.model} ({count} channel{'s' if count > 1 else ''}: {', '.join(self.channels)})"


@dataclass(frozen=True)
class SeriesChoice:
    """Which of several DICOM series is read.

    Attributes:
        named: Number of the series, the start of its UID, or a part of its description, as the user named it; None for
            the series that fits.
        kind: The kind of image that fits (`kind_of`); None if that is not known.
    """

    named: str | None = None
    kind: str | None = None

"""Names and colours of the labels in a mask, as files hold them: the header of a NIfTI file, and a table beside it.

The header has them in the XML form of Caret (code 30 of NIfTI's registered extensions), which Connectome Workbench
reads. TotalSegmentator writes the same form with code 0. Other programs skip extensions that they do not know. The
table is a *_dseg.tsv of BIDS.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

CARET = 30
"""Code of the extension."""
_MOST_BYTES = 2**24  # a table of 65535 labels has about 7 MB
_ROOT, _TABLE = "CaretExtension", "LabelTable"


@dataclass(frozen=True)
class Label:
    """Name of a label, and its colour as #RRGGBB."""

    name: str
    colour: str


LabelTable = Mapping[int, Label]
"""Label value above 0 -> its name and colour."""


def to_extension(labels: LabelTable, maps: int = 1) -> bytes:
    """The content of the extension, for a file of so many label maps along its fourth axis.

    It is filled up with spaces to a whole number of 16-byte blocks, of which NIfTI takes 8 bytes for size and code:
    bytes of value 0, which libraries would add, are no XML.
    """
    root = ET.Element(_ROOT)
    for index in range(maps):
        volume = ET.SubElement(root, "VolumeInformation", Index=str(index))
        table = ET.SubElement(volume, _TABLE)
        for value, label in sorted(labels.items()):
            red, green, blue = (int(label.colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
            shares = {"Red": f"{red:.6g}", "Green": f"{green:.6g}", "Blue": f"{blue:.6g}", "Alpha": "1"}
            ET.SubElement(table, "Label", {"Key": str(value), **shares}).text = printable_name(label.name)
        ET.SubElement(volume, "VolumeType").text = "Label"
    content = ET.tostring(root, encoding="UTF-8", xml_declaration=True)
    return content + b" " * (-(len(content) + 8) % 16)


def from_extension(content: bytes) -> dict[int, str]:
    """Label value above 0 -> name of the first label map, by the content of an extension.

    Empty for the extension of another program, and for a damaged one: names are never worth refusing a mask.
    """
    if len(content) > _MOST_BYTES:
        return {}
    try:
        text = content.decode("utf-8").strip("\0 \t\r\n")
        # Entities, which only a document type can declare, could make gigabytes of a few bytes.
        if f"<{_ROOT}" not in text or "<!DOCTYPE" in text:
            return {}
        table = ET.fromstring(text).find(f"./VolumeInformation/{_TABLE}")
        entries = [] if table is None else table.findall("Label")
        names = {int(entry.attrib["Key"]): (entry.text or "").strip() for entry in entries}
    except (ET.ParseError, ValueError, KeyError):  # a UnicodeDecodeError is a ValueError
        return {}
    return {value: name for value, name in sorted(names.items()) if value > 0 and name}


def to_tsv(labels: LabelTable) -> str:
    """The table of BIDS: the columns index, name and color."""
    text = io.StringIO()
    rows = csv.writer(text, delimiter="\t", lineterminator="\n")
    rows.writerow(("index", "name", "color"))
    rows.writerows((value, printable_name(label.name), label.colour) for value, label in sorted(labels.items()))
    return text.getvalue()


def printable_name(name: str) -> str:
    """A name without line breaks, tabs and control characters, which XML and tables cannot hold."""
    return " ".join("".join(character if character.isprintable() else " " for character in name).split())

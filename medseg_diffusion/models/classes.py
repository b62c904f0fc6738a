"""Which classes a model's masks tell apart: all, those that a user names, or the tissues that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from medseg_diffusion.errors import ModelError, UsageError

TISSUES = "tissues"
"""Entry of a model's card: name of a tissue -> names of the classes that belong to it, the tissues in their order."""
SIDES = ("left", "right")
_MOST_LISTED = 8  # classes that a message lists


def classes_of(card: Mapping[str, Any]) -> dict[int, str]:
    """Value -> name of all classes of a model, background included.

    Raises:
        KeyError, ValueError, AttributeError: A card of another kind.
    """
    return {int(value): str(name) for value, name in card["labels"].items()}


def chosen_classes(classes: Mapping[int, str], choice: str | Sequence[str | int], model: str) -> dict[int, str]:
    """Value -> name of the classes of a choice, in the order of their values, without background.

    Args:
        classes: Value -> name of all classes.
        choice: Names (in upper or lower case) and values, or a text of them with commas between. A name without its
            side selects both: "hippocampus" is "left hippocampus" and "right hippocampus".
        model: Name of the model, for the message.

    Raises:
        UsageError: A name or value that no class has, or none at all.
    """
    parts = choice.split(",") if isinstance(choice, str) else [str(part) for part in choice]
    names = [part.strip() for part in parts if part.strip()]
    foreground = {value: name for value, name in classes.items() if value}
    if not names:
        raise UsageError(f"{model}: no class is named; {_hint('', foreground, model)}")
    selected: set[int] = set()
    for name in names:
        if not (values := _selected(name, foreground)):
            raise UsageError(f"{model}: no class {name!r}; {_hint(name, foreground, model)}")
        selected |= values
    return {value: foreground[value] for value in sorted(selected)}


def tissues_of(card: Mapping[str, Any], model: str) -> tuple[dict[int, str], tuple[int, ...]]:
    """The tissues of a model of structures, by its card.

    Returns:
        Value -> name of the tissues, with background as 0; and for each class of the model, in the order of their
        values, the value of its tissue. Classes of no tissue belong to the background.

    Raises:
        UsageError: The card groups no classes into tissues.
        ModelError: It names a class that the model does not have, one twice, or none for a tissue.
    """
    classes = classes_of(card)
    groups = card.get(TISSUES)
    if not groups:
        names = ", ".join(name for value, name in classes.items() if value) if len(classes) <= _MOST_LISTED else ""
        own = f" (its classes are {names})" if names else ""
        raise UsageError(f"{model}: its card groups no classes into tissues{own}; leave --tissues out")
    try:
        owners = {name: value for value, names in enumerate(groups.values(), 1) for name in names}
        count = sum(len(names) for names in groups.values())
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{model}: the entry {TISSUES!r} of its card is no list of classes for each tissue") from error
    if unknown := [name for name in owners if name not in classes.values()]:
        raise ModelError(f"{model}: the entry {TISSUES!r} of its card names {unknown[0]!r}, which is no class of it")
    if empty := [tissue for tissue, names in groups.items() if not names]:
        raise ModelError(f"{model}: the entry {TISSUES!r} of its card names no class for {empty[0]!r}")
    if count > len(owners):
        raise ModelError(f"{model}: the entry {TISSUES!r} of its card names a class twice")
    labels = {0: classes.get(0, "background"), **dict(enumerate(map(str, groups), 1))}
    return labels, tuple(owners.get(classes[value], 0) for value in sorted(classes))


def _selected(text: str, classes: Mapping[int, str]) -> set[int]:
    """The values of the classes with this value or name, or of both sides of the structure; empty if there are none."""
    if text.isdecimal():
        return {int(text)} & classes.keys()
    name = _plain(text)
    if exact := {value for value, other in classes.items() if _plain(other) == name}:
        return exact
    sided = {f"{side} {name}" for side in SIDES}
    return {value for value, other in classes.items() if _plain(other) in sided}


def _plain(name: str) -> str:
    """A name as it is compared: lower case, with single spaces for hyphens and underscores."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _hint(unknown: str, classes: Mapping[int, str], model: str) -> str:
    """The classes, if they are few; else those with the nearest names, and how all are shown."""
    if len(classes) <= _MOST_LISTED:
        return f"its classes are {', '.join(f'{value} {name}' for value, name in classes.items())}"
    names = {_plain(name): name for name in classes.values()}
    short = {name: name.removeprefix("left ").removeprefix("right ") for name in names}
    near = get_close_matches(_plain(unknown), [*names, *short.values()], n=8, cutoff=0.6)
    nearest = [full for plain, full in names.items() if plain in near or short[plain] in near][:4]
    nearby = f"the nearest are {', '.join(nearest)}; " if nearest else ""
    return f"{nearby}`medseg models show {model}` lists all {len(classes)}"

"""The public names: all of them are listed, documented and typed, and nothing else is public."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_type_hints

import pytest
import typer
from medseg_cli.main import app

import medseg_diffusion
from medseg_diffusion.errors import MedsegError

GROUPS = {
    "models": {"list": "list_models", "show": "load_card"},
    "configs": {"list": "described_presets", "show": "load_config"},
}
"""The functions of commands whose name alone says too little. Other commands of `medseg models` are X_model."""


def functions(value: Any) -> Iterator[FunctionType]:
    """A function itself, or the public methods that a class defines; a data class documents its constructor."""
    if inspect.isfunction(value):
        yield value
        return
    for one in value.__mro__:
        if one.__module__.startswith("medseg_diffusion."):
            yield from (f for name, f in vars(one).items() if inspect.isfunction(f) and not name.startswith("_"))


def test_the_list_of_names_is_the_same_for_people_editors_and_type_checkers() -> None:
    public = [name for name in dir(medseg_diffusion) if not name.startswith("_")]
    assert public == sorted(medseg_diffusion.__all__) and len(set(public)) == len(public)
    tree = ast.parse(Path(medseg_diffusion.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = [alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == public
    with pytest.raises(AttributeError, match="has no attribute 'load_segmenter'"):
        medseg_diffusion.load_segmenter  # noqa: B018


def test_names_complete_in_a_new_interpreter_before_anything_is_imported() -> None:
    code = """
import sys, medseg_diffusion
print(*dir(medseg_diffusion))
print("torch" in sys.modules)
"""
    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert set(medseg_diffusion.__all__) <= set(lines[0].split()) and lines[1] == "False"


@pytest.mark.parametrize("name", medseg_diffusion.__all__)
def test_every_name_is_documented_and_typed(name: str) -> None:
    value = getattr(medseg_diffusion, name)
    assert value.__name__ == name and value.__module__.startswith("medseg_diffusion.")
    text = value.__doc__ or ""
    assert len(text) > 20 and not text.startswith(f"{name}("), "a data class without a docstring gets its signature"
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        texts = " ".join(one.__doc__ or "" for one in value.__mro__)  # a field may be described where it is inherited
        undocumented = [field for field in fields if not re.search(rf"\b{field}\b", texts)]
        assert not undocumented, undocumented
    for function in functions(value):
        signature = inspect.signature(function)
        named = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
        assert all(one.annotation is not one.empty for one in named), function.__qualname__
        assert signature.return_annotation is not signature.empty, function.__qualname__
        assert function.__doc__, function.__qualname__
        if "Args:" in function.__doc__ or len(named) > 2:
            missing = [one.name for one in named if not re.search(rf"^ +{one.name}: ", function.__doc__, re.MULTILINE)]
            assert not missing, f"{function.__qualname__} does not describe {missing}"


def names_of(group: typer.Typer) -> list[str]:
    found = [command.name or command.callback.__name__ for command in group.registered_commands if command.callback]
    return [name.replace("-", "_") for name in found]


def classes_in(annotation: Any) -> Iterator[type]:
    """The classes of this package in an annotation."""
    if isinstance(annotation, type) and annotation.__module__.startswith("medseg_diffusion."):
        yield annotation
    for part in get_args(annotation):
        yield from classes_in(part)


def test_what_functions_return_is_public() -> None:
    for name in medseg_diffusion.__all__:
        value = getattr(medseg_diffusion, name)
        for returned in classes_in(get_type_hints(value)["return"]) if inspect.isfunction(value) else ():
            assert returned.__name__ in medseg_diffusion.__all__, f"{name} returns {returned}"


def commands() -> list[str]:
    """The name of the function of every command."""
    found = names_of(app)
    for group in app.registered_groups:
        assert isinstance(group.name, str) and group.typer_instance is not None
        found += [GROUPS[group.name].get(name, f"{name}_model") for name in names_of(group.typer_instance)]
    return found


def test_every_command_is_a_function() -> None:
    assert len(commands()) >= 20
    forms = ["export_bundle", "export_onnx", "import_bundle"]  # options of `medseg models export` and `import`
    assert not [name for name in (*commands(), *forms) if name not in medseg_diffusion.__all__]


def test_progress_is_told_in_one_way() -> None:
    """Every function that has it takes the same kind of callback."""
    with_progress = [
        function
        for name in medseg_diffusion.__all__
        for function in functions(getattr(medseg_diffusion, name))
        if "on_progress" in inspect.signature(function).parameters
    ]
    assert len(with_progress) >= 16
    assert {inspect.signature(function).parameters["on_progress"].annotation for function in with_progress} == {
        "OnProgress"
    }
    assert not [f for f in with_progress if {"on_prepare", "on_file"} & set(inspect.signature(f).parameters)]


def test_errors_share_a_base() -> None:
    for name in ("InputError", "ModelError", "Stopped", "UsageError"):
        assert issubclass(getattr(medseg_diffusion, name), MedsegError)


def test_options_take_paths_as_texts_and_the_other_way_round() -> None:
    m, path = medseg_diffusion, Path("x")
    assert m.SegmentOptions(output="x", report="x").output == m.AnomalyOptions(output="x").output == path  # type: ignore[arg-type]
    assert m.SynthesisOptions("x").output == path  # type: ignore[arg-type]
    evaluated = m.EvaluateOptions(images="x", raters="x", strata=("x", "site"))  # type: ignore[arg-type]
    assert (evaluated.images, evaluated.raters, evaluated.strata) == (path, (path,), (path, "site"))
    assert m.InputOptions(channels=(("T1", "x"),)).channels == (("T1", path),)  # type: ignore[arg-type]
    assert m.SampleOptions(upsampler=path).upsampler == "x"  # type: ignore[arg-type]

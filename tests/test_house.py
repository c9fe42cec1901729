"""The house: every module stands in a room, and imports point down its floors, read from the imports themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cutdiff"
FLOORS = (
    {"sample", "evaluate", "plan"},
    {"bench", "training"},
    {"evaluation", "trace"},
    {"planning"},
    {"cli"},
    {"pipeline"},
    {"output"},
    {"methods"},
    {"checkpoint"},
    {"sampling", "scenes"},
    {"models"},
    {"parallel", "settings"},
    {"specs"},
    {"sources", "given"},
    {"options", "files"},
)
"""The rooms and single files of the package from the roof to the ground."""


def files() -> dict[str, Path]:
    """Every module of the package by its name, without the leading "cutdiff."."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = files()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in its text, for type checkers too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            addresses = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            addresses = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for address in addresses:
            parts = address.split(".")
            if parts[0] == "cutdiff":
                inner = parts[1:]
                while inner and ".".join(inner) not in MODULES:
                    inner = inner[:-1]
                yield ".".join(inner)


def room(name: str) -> str:
    return name.partition(".")[0]


def floor(name: str) -> int:
    """The floor of a module, counted from the roof."""
    return next(level for level, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_module_stands_in_a_room() -> None:
    rooms = set().union(*FLOORS)
    assert {room(name) for name in MODULES if name} == rooms
    assert len([*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py")]) <= 24


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_down(name: str) -> None:
    others = {target for target in imports(name) if target and room(target) != room(name)}
    upwards = [target for target in others if floor(target) <= floor(name)]
    assert not upwards, f"{name} imports {', '.join(upwards)}, which stands no lower"


def test_modules_form_no_circle() -> None:
    graph = {name: {target for target in imports(name) if target and target != name} for name in MODULES if name}
    for name, targets in graph.items():  # a module of a room runs the room's __init__ first, which is no import of it
        targets -= {package for package in MODULES if name.startswith(f"{package}.")}
    TopologicalSorter(graph).prepare()


def test_methods_import_no_other_method() -> None:
    parts = [f"methods.{name}" for name in ("shared", "in_regions", "picture", "redrawn", "tiled", "trajectory")]
    methods = {name for name in MODULES if name.startswith("methods.") and name not in parts}
    for name in methods:
        assert not methods & set(imports(name)), name


def test_kernels_know_nothing_of_the_package() -> None:
    for path in (PACKAGE.parent / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) cutdiff\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


@pytest.mark.parametrize("name", sorted({room(name) for name in MODULES if "." in name}))
def test_every_room_says_what_it_is_for(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert text is not None
    assert len(text) > 100
    assert "TODO" not in text

"""Imports only go down, as CONTRIBUTING.md's table has the house; what is said to be light, is."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mergekit_obim"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# CONTRIBUTING.md's table says what each room may import beside the standard library and itself: the
# names in backticks of its last column, libraries and rooms; None is everything. A room is a module
# or a package, less what has a room of its own, and goes by its path: `__init__` is the package's.
ROW = re.compile(r"^\| `([^`]+?)(?:/|\.py)` \|.*\| ([^|]+) \|$", re.MULTILINE)
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = {
    room.replace("/", "."): None if cell == "everything" else set(re.findall("`([^`]+)`", cell))
    for room, cell in ROW.findall(TABLE)
}
HEAVY = {"datasets", "mergekit", "numpy", "torch", "transformers"}


def room_of(module: str) -> str | None:
    """The innermost room that a module of ours is in; None if it is in none."""
    if module == "mergekit_obim":
        return "__init__"
    parts = module.split(".")[1:]
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in ROOMS), None)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere in it, by its whole name, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module, node.lineno


@functools.cache
def wanted_by(module: str) -> dict[str, int]:
    """The rooms and the libraries that a module imports, each with the line of an import."""
    wanted = {}
    for name, line in imports(MODULES[module]):
        top = name.partition(".")[0]
        if top == "mergekit_obim":
            wanted[room_of(name) or name] = line
        elif top not in sys.stdlib_module_names:
            wanted[top] = line
    wanted.pop(room_of(module) or module, None)
    return wanted


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    room = room_of(module)
    assert room is not None, (
        f"{module} is in no room: add a row to the table in CONTRIBUTING.md, below all that it "
        "imports and above all that import it"
    )
    allowed = ROOMS[room]
    if allowed is None:
        return
    for name, line in wanted_by(module).items():
        assert name in allowed, (
            f"{MODULES[module]}:{line}: {room} may not import {name}, says CONTRIBUTING.md's table"
        )


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_names_nothing_else(room: str) -> None:
    """What a room no longer imports is struck from its row, and a room that is gone with it."""
    modules = [module for module in MODULES if room_of(module) == room]
    assert modules, f"CONTRIBUTING.md's table has a row for {room}, which is no module of ours"
    unused = (ROOMS[room] or set()).difference(*map(wanted_by, modules))
    assert not unused, f"{room} imports none of {unused}: strike them in CONTRIBUTING.md's table"


def test_the_table_goes_down() -> None:
    """Whatever a room may import stands above it."""
    rooms = list(ROOMS)
    assert rooms[0] == "__init__"  # Its version; what it imports itself, it does when called.
    for index, room in enumerate(rooms[1:], 1):
        below = (ROOMS[room] or set()).intersection(rooms[index:])
        assert not below, f"CONTRIBUTING.md's table has {below} below {room}, which imports them"


def test_one_module_touches_what_mergekit_keeps_to_itself() -> None:
    private = re.compile(r"\b(?:planner|task|method)\._[a-z]|construct_param_dicts|plan_module = ")
    touching = {name for name, path in MODULES.items() if private.search(path.read_text())}
    assert touching == {"mergekit_obim.methods.mergekit_hooks"}


def within(*rooms: str) -> list[str]:
    return [module for module in MODULES if room_of(module) in rooms]


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What each step has loaded: the top-level modules, and ours in full.

    The steps share a process, from the lightest to the heaviest, because transformers and mergekit
    take seconds to import. Ours are forgotten in between; of the others, a step counts as loaded
    what those before it have loaded too.
    """
    steps = {
        "the package": ["mergekit_obim"],
        "a recipe": within("errors", "recipe"),
        "the commands": within("commands"),
        "kernels": within("kernels"),
        "calibration": within("calibration"),
        "methods": ["mergekit_obim.methods"],
    }
    code = """if True:
        import importlib, json, sys
        seen = {}
        for step, modules in json.loads(sys.argv[1]).items():
            for name in [name for name in sys.modules if name.startswith("mergekit_obim")]:
                del sys.modules[name]
            for name in modules:
                importlib.import_module(name)
            seen[step] = list(sys.modules)
        print(json.dumps(seen))"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(steps)],
        cwd=ROOT,
        # Where we are installed, importing mergekit registers the methods, and so loads them.
        env={**os.environ, "MERGEKIT_OBIM_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(steps.values())
    return {
        step: {name.partition(".")[0] for name in names} | (set(names) & set(MODULES))
        for step, names in json.loads(done.stdout).items()
    }


def test_package_is_light(loaded: dict[str, set[str]]) -> None:
    names = loaded["the package"]
    assert not names & {*HEAVY, "click", "pydantic", "safetensors"}
    assert {name for name in names if name.startswith("mergekit_obim.")} == set()


def test_reading_a_recipe_is_light(loaded: dict[str, set[str]]) -> None:
    """So that a misspelt one is told at once."""
    assert not loaded["a recipe"] & HEAVY


def test_command_line_is_light_until_it_works(loaded: dict[str, set[str]]) -> None:
    assert not loaded["the commands"] & HEAVY


def test_kernels_know_neither_mergekit_nor_transformers(loaded: dict[str, set[str]]) -> None:
    assert "torch" in loaded["kernels"]
    assert not loaded["kernels"] & {"datasets", "mergekit", "transformers"}


def test_calibrating_loads_no_merging(loaded: dict[str, set[str]]) -> None:
    names = loaded["calibration"]
    assert "mergekit_obim.kernels" in names
    assert not names & {"mergekit_obim.methods", "mergekit_obim.saliency.locate"}


def test_merging_loads_no_calibration(loaded: dict[str, set[str]]) -> None:
    names = loaded["methods"]
    assert "mergekit_obim.kernels" in names
    assert not {name for name in names if name.startswith("mergekit_obim.calibration")}

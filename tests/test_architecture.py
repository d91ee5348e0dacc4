"""Imports only go down, as CONTRIBUTING.md draws the house; what is said to be light, is."""

from __future__ import annotations

import ast
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

# What each room may import beside the standard library and itself. A room is a module or a
# package, less what has a room of its own; `mergekit_obim` is the package's own `__init__`.
ROOMS = {
    # Only once `register` is called, or a function of `api` is asked for.
    "mergekit_obim": {"mergekit", "mergekit_obim.methods", "mergekit_obim.api"},
    "mergekit_obim._autoload": {"mergekit_obim"},
    "mergekit_obim.errors": {"click"},
    "mergekit_obim.recipe": {"pydantic", "yaml", "mergekit_obim.errors"},
    "mergekit_obim.kernels": {"numpy", "torch", "mergekit_obim.errors"},
    "mergekit_obim.saliency": {
        *("huggingface_hub", "numpy", "pydantic", "safetensors", "torch", "mergekit_obim"),
        "mergekit_obim.errors",
    },
    "mergekit_obim.models": {
        *("huggingface_hub", "mergekit", "safetensors", "torch", "transformers"),
        *("filelock", "mergekit_obim.errors"),
        *("mergekit_obim.kernels", "mergekit_obim.recipe", "mergekit_obim.saliency"),
    },
    "mergekit_obim.calibration": {
        *("accelerate", "datasets", "mergekit", "numpy", "PIL", "pyarrow", "pydantic"),
        *("safetensors", "torch", "tqdm", "transformers", "mergekit_obim"),
        *("mergekit_obim.errors", "mergekit_obim.kernels", "mergekit_obim.models"),
        *("mergekit_obim.recipe", "mergekit_obim.saliency"),
    },
    "mergekit_obim.methods": {
        *("huggingface_hub", "mergekit", "numpy", "pydantic", "torch"),
        *("mergekit_obim.errors", "mergekit_obim.kernels", "mergekit_obim.models"),
        *("mergekit_obim.recipe", "mergekit_obim.saliency"),
    },
    "mergekit_obim.planned": {
        *("mergekit", "pydantic", "mergekit_obim", "mergekit_obim.errors"),
        *("mergekit_obim.methods", "mergekit_obim.models", "mergekit_obim.recipe"),
    },
    "mergekit_obim.kinship": {
        *("mergekit", "torch", "tqdm", "yaml", "mergekit_obim.errors"),
        *("mergekit_obim.kernels", "mergekit_obim.models", "mergekit_obim.recipe"),
        "mergekit_obim.saliency",
    },
    "mergekit_obim.report": {
        *("huggingface_hub", "jinja2", "matplotlib", "mergekit", "numpy", "torch", "yaml"),
        *("mergekit_obim", "mergekit_obim.errors", "mergekit_obim.kernels"),
        *("mergekit_obim.kinship", "mergekit_obim.methods", "mergekit_obim.models"),
        *("mergekit_obim.planned", "mergekit_obim.saliency"),
    },
    # Asks both sides what they would say, so it stands above them.
    "mergekit_obim.checking": {
        *("huggingface_hub", "mergekit", "pydantic", "torch", "transformers"),
        *("mergekit_obim.calibration", "mergekit_obim.errors", "mergekit_obim.kernels"),
        *("mergekit_obim.methods", "mergekit_obim.models", "mergekit_obim.planned"),
        *("mergekit_obim.recipe", "mergekit_obim.saliency"),
    },
    "mergekit_obim.api": {
        *("mergekit", "pydantic", "safetensors", "torch", "transformers", "yaml", "mergekit_obim"),
        *("mergekit_obim.calibration", "mergekit_obim.checking", "mergekit_obim.errors"),
        *("mergekit_obim.methods", "mergekit_obim.models", "mergekit_obim.planned"),
        *("mergekit_obim.recipe", "mergekit_obim.saliency"),
    },
}
EVERYTHING = {"mergekit_obim.commands"}
HEAVY = {"datasets", "mergekit", "numpy", "torch", "transformers"}


def room_of(module: str) -> str | None:
    """The innermost room that a module of ours is in; None if it is in none."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 1, -1)]
    if module == "mergekit_obim":
        return module
    return next((name for name in prefixes if name in ROOMS or name in EVERYTHING), None)


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


def load(code: str) -> set[str]:
    """Runs code in a process of its own: the top-level modules loaded then, and ours in full."""
    report = "\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-c", code + report]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    return {name.partition(".")[0] for name in names} | (names & set(MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    room = room_of(module)
    if room in EVERYTHING:
        return
    assert room is not None, f"{module} is in no room: add it to ROOMS and to CONTRIBUTING.md"
    for name, line in imports(MODULES[module]):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names:
            continue
        wanted = room_of(name) if top == "mergekit_obim" else top
        allowed = wanted == room or wanted in ROOMS[room]
        assert allowed, f"{MODULES[module]}:{line}: {room} may not import {name}"


def test_rooms_have_no_cycle() -> None:
    """The table itself goes down only: whatever a room may import stands above it."""
    seen = {"mergekit_obim"}  # Its version; What else it has breaks the cycle by being lazy.
    for room, allowed in list(ROOMS.items())[1:]:
        ours = {name for name in allowed if name.startswith("mergekit_obim")}
        assert ours <= seen, f"{room}: {ours - seen}"
        seen.add(room)


def test_one_module_touches_what_mergekit_keeps_to_itself() -> None:
    private = re.compile(r"\b(?:planner|task|method)\._[a-z]|construct_param_dicts|plan_module = ")
    touching = {name for name, path in MODULES.items() if private.search(path.read_text())}
    assert touching == {"mergekit_obim.methods.mergekit_hooks"}


def test_package_is_light() -> None:
    loaded = load("import mergekit_obim")
    assert not loaded & {*HEAVY, "click", "pydantic", "safetensors"}
    assert {name for name in loaded if name.startswith("mergekit_obim.")} == set()


def test_kernels_know_neither_mergekit_nor_transformers() -> None:
    kernels = [name for name in MODULES if name.startswith("mergekit_obim.kernels")]
    loaded = load("".join(f"import {name}\n" for name in kernels))
    assert "torch" in loaded
    assert not loaded & {"datasets", "mergekit", "transformers"}


def test_reading_a_recipe_is_light() -> None:
    """So that a misspelt one is told at once."""
    recipe = [name for name in MODULES if name.startswith("mergekit_obim.recipe")]
    assert not load("".join(f"import {name}\n" for name in recipe)) & HEAVY


def test_merging_loads_no_calibration() -> None:
    loaded = load("import mergekit_obim.methods")
    assert "mergekit_obim.kernels" in loaded
    assert not {name for name in loaded if name.startswith("mergekit_obim.calibration")}


def test_calibrating_loads_no_merging() -> None:
    modules = [name for name in MODULES if name.startswith("mergekit_obim.calibration")]
    # Where we are installed, importing mergekit registers the methods, and so loads them.
    code = "import os; os.environ['MERGEKIT_OBIM_AUTOLOAD'] = '0'\n"
    loaded = load(code + "".join(f"import {name}\n" for name in modules))
    assert not loaded & {"mergekit_obim.methods", "mergekit_obim.saliency.locate"}


def test_command_line_is_light_until_it_works() -> None:
    commands = [name for name in MODULES if name.startswith("mergekit_obim.commands.")]
    assert commands
    for module in commands:
        assert not load(f"import {module}") & HEAVY

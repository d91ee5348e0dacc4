"""Changing a recipe: a plain one, or one that ruamel.yaml keeps comments for."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from mergekit_obim.recipe.faults import Path


def setting_path(path: Path) -> Path:
    """Of a path into a parameter's value, the part that leads to the parameter.

    >>> setting_path(("models", 1, "parameters", "density", 0, "value"))
    ('models', 1, 'parameters', 'density')
    """
    return path[: path.index("parameters") + 2]


def parent_of(recipe: Any, path: Path) -> Any:
    """What holds the last step of a path."""
    for step in path[:-1]:
        recipe = recipe[step]
    return recipe


def rename(recipe: Any, path: Path, name: str) -> None:
    """Give a key another name, in the same place; one that has that name already stays."""
    mapping: MutableMapping[Any, Any] = parent_of(recipe, path)
    items = [(name if key == path[-1] else key, value) for key, value in mapping.items()]
    if name in mapping:
        del mapping[path[-1]]
        return
    mapping.clear()
    mapping.update(items)


def remove(recipe: Any, path: Path) -> None:
    """Take a key out of a mapping."""
    parent_of(recipe, path).pop(path[-1], None)

"""A recipe as it is written: its content, and the line of each key.

PyYAML reads it, as it does in mergekit, so both see the same recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import yaml

from mergekit_obim.errors import RecipeError, told_as
from mergekit_obim.recipe.faults import Path, Place


@dataclass(frozen=True)
class Document:
    """One recipe; each document of a file for mergekit-multi is one.

    Attributes:
        content: The content as ``yaml.safe_load`` returns it.
        lines: The line of each key and list entry, from 1, by the path that leads there.
        twice: The keys that stand twice in one mapping; YAML keeps the last.
        label: The recipe's name in messages, if the file has several.
        stages: The names of the file's other recipes; a model of such a name is made by that one.
    """

    content: Mapping[str, Any]
    lines: Mapping[Path, int] = field(default_factory=dict)
    twice: tuple[Place, ...] = ()
    label: str = ""
    stages: frozenset[str] = frozenset()

    def place(self, *path: str | int) -> Place:
        """Return the place of a path, with its line or that of the nearest key around it."""
        around = (path[:length] for length in range(len(path), 0, -1))
        return Place(path, next((self.lines[p] for p in around if p in self.lines), None))

    def known(self, path: Path) -> Path:
        """Return the longest beginning of a path that leads to something in the recipe."""
        found: Path = ()
        here: Any = self.content
        for step in path:
            if step not in steps_of(here):
                break
            here, found = steps_of(here)[step], (*found, step)
        return found


def steps_of(value: Any) -> Mapping[str | int, Any]:
    """Return what the keys of a mapping or the indices of a list lead to; else nothing."""
    if isinstance(value, list):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else {}


def read_documents(path: FilePath) -> list[Document]:
    """Read every recipe of a file: several are stages of one merge, for mergekit-multi.

    Raises:
        RecipeError: The file is not YAML, or a document in it is not a mapping.
    """
    with told_as(RecipeError, f"{path}: not a YAML recipe", UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
    return documents_of(text, str(path))


def documents_of(text: str, label: str) -> list[Document]:
    """Read every recipe of a YAML text, which goes by this label in messages.

    Raises:
        RecipeError: The text is not YAML, or a document in it is not a mapping.
    """
    with told_as(RecipeError, f"{label}: not a YAML recipe", yaml.YAMLError):
        documents = parse(text)
    if not documents or not all(isinstance(one.content, Mapping) for one in documents):
        raise RecipeError(
            f"{label}: not a recipe: it should be a mapping with merge_method and models"
        )
    if len(documents) == 1:
        return documents
    names = [one.content.get("name") for one in documents]
    return [
        replace(
            one,
            label=str(name or f"recipe {number}"),
            stages=frozenset(str(other) for other in names if other is not None) - {str(name)},
        )
        for number, (one, name) in enumerate(zip(documents, names, strict=True), 1)
    ]


def read_document(path: FilePath) -> Document:
    """Read a file of one recipe.

    Raises:
        RecipeError: The file is not YAML, not a mapping, or holds several recipes.
    """
    documents = read_documents(path)
    if len(documents) != 1:
        raise RecipeError(
            f"{path}: is a mergekit-multi recipe of {len(documents)} documents: give each stage a "
            "file of its own here"
        )
    return documents[0]


def parse(text: str) -> list[Document]:
    """Parse every document of a YAML text, whatever its content.

    Raises:
        yaml.YAMLError: The text is not YAML.
    """
    loader = yaml.SafeLoader(text)
    documents = []
    while loader.check_node():
        node = loader.get_node()
        lines: dict[Path, int] = {}
        twice: list[Place] = []
        if node is not None:
            _note_lines(node, (), lines, twice)
        documents.append(Document(loader.construct_document(node), lines, tuple(twice)))
    return documents


def _note_lines(
    node: yaml.Node, path: Path, lines: dict[Path, int], twice: list[Place], *around: yaml.Node
) -> None:
    if any(node is one for one in around):
        return  # an alias of what it stands in
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            line = key.start_mark.line + 1
            if below in lines:
                twice.append(Place(below, line))
            lines[below] = line
            _note_lines(value, below, lines, twice, *around, node)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            below = (*path, number)
            lines[below] = value.start_mark.line + 1
            _note_lines(value, below, lines, twice, *around, node)

"""A recipe as it is written: what YAML has, and the line of each key.

PyYAML reads it, as it does in mergekit, so both see the same recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import yaml

from mergekit_obim.errors import RecipeError, one_line
from mergekit_obim.recipe.faults import Path, Place


@dataclass(frozen=True)
class Document:
    """One recipe of a file; of mergekit-multi's files each document is one.

    Attributes:
        content: What YAML has.
        lines: The line of each key and list entry, from 1, by the path that leads there.
        twice: The keys that stand twice in one mapping; YAML keeps the last.
        label: What to call it where there are several: mergekit-multi's name for it.
        stages: The names of the file's other recipes: a model of that name is what one of them
            makes.
    """

    content: Mapping[str, Any]
    lines: Mapping[Path, int] = field(default_factory=dict)
    twice: tuple[Place, ...] = ()
    label: str = ""
    stages: frozenset[str] = frozenset()

    def place(self, *path: str | int) -> Place:
        """Where a path leads, with the line of it or else of the nearest thing around it."""
        around = (path[:length] for length in range(len(path), 0, -1))
        return Place(path, next((self.lines[p] for p in around if p in self.lines), None))

    def known(self, path: Path) -> Path:
        """As much of a path as leads to something that is written."""
        found: Path = ()
        here: Any = self.content
        for step in path:
            steps = here if isinstance(here, Mapping) else {}
            if isinstance(here, list):
                steps = dict(enumerate(here))
            if step not in steps:
                break
            here, found = steps[step], (*found, step)
        return found


def read_documents(path: FilePath) -> list[Document]:
    """Read every recipe of a file: several are stages of one merge, for mergekit-multi.

    Raises:
        RecipeError: It is not YAML, or holds something that is no mapping.
    """
    try:
        documents = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a YAML recipe: {one_line(error)}") from error
    if not documents or not all(isinstance(one.content, Mapping) for one in documents):
        raise RecipeError(
            f"{path}: not a recipe: it should be a mapping with merge_method and models"
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
        RecipeError: It is not YAML, no mapping, or holds several recipes.
    """
    documents = read_documents(path)
    if len(documents) != 1:
        raise RecipeError(
            f"{path}: is a mergekit-multi recipe of {len(documents)} documents: give each stage a "
            "file of its own here"
        )
    return documents[0]


def parse(text: str) -> list[Document]:
    """The documents of a YAML text, whatever they are.

    Raises:
        yaml.YAMLError: It is no YAML.
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

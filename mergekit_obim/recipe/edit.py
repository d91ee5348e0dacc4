"""Editing the text of a recipe at the positions that PyYAML reports, and leaving the rest alone.

ruamel.yaml, which writes the whole file again, was tried: it keeps comments, but loses those below
a key that is removed, and changes the indentation. Recipes only need small edits: a key renamed, a
value replaced, a line removed or added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from mergekit_obim.recipe.faults import Path


class NoSuchPlaceError(LookupError):
    """A path leads to nothing in the text, for example as YAML's ``<<`` merged it in."""


def renamed(text: str, path: Path, name: str) -> str:
    """Return the text with a key renamed, or removed if the new name is there already."""
    mapping, number = _entry(text, path)
    if any(key.value == name for key, _ in mapping.value):
        return removed(text, path)
    return _spliced(text, mapping.value[number][0], name)


def replaced(text: str, path: Path, value: object) -> str:
    """Return the text with a value replaced by one that is written on one line."""
    return _spliced(text, _node(text, path), flow(value))


def removed(text: str, path: Path) -> str:
    """Return the text without a key and its value, and without a mapping that this empties."""
    mapping, number = _entry(text, path)
    entries = mapping.value
    if len(entries) == 1 and len(path) > 1:
        return removed(text, path[:-1])
    key, value = entries[number]
    start, end = key.start_mark.index, _end(value)
    if mapping.flow_style and number + 1 < len(entries):
        end = entries[number + 1][0].start_mark.index
    elif mapping.flow_style:
        start = _end(entries[number - 1][1]) if number else start
    elif text[:start].rpartition("\n")[2].strip():  # `- key: …`: the dash stays
        end = entries[number + 1][0].start_mark.index if number + 1 < len(entries) else end
    else:
        start = text.rfind("\n", 0, start) + 1
        end = _line_end(text, end)
        lines = text[start:end].splitlines(keepends=True)
        comments = [line for line in lines if line.lstrip().startswith("#")]
        return text[:start] + "".join(comments) + text[end:]
    return text[:start] + text[end:]


def added(text: str, path: Path, value: object) -> str:
    """Return the text with a new key at the end of a mapping, or a new entry at that of a list."""
    parent, name = path[:-1], path[-1]
    node = _node(text, parent)
    if isinstance(node, yaml.ScalarNode) and not node.value:  # `parameters:` with nothing
        return replaced(text, parent, {name: value})
    is_list = isinstance(name, int)
    if not isinstance(node, yaml.SequenceNode if is_list else yaml.MappingNode):
        raise NoSuchPlaceError(parent)
    entry = flow(value) if is_list else f"{name}: {flow(value)}"
    if node.flow_style:
        at = _end(_last(node)) if node.value else node.end_mark.index - 1
        return text[:at] + (", " if node.value else "") + entry + text[at:]
    at = _line_end(text, _end(node))
    first = node if is_list else node.value[0][0]  # a mapping may begin with an anchor
    indent = " " * first.start_mark.column + "- " * is_list
    new_line = "" if text[:at].endswith("\n") else "\n"
    return f"{text[:at]}{new_line}{indent}{entry}\n{text[at:]}"


def flow(value: object) -> str:
    """Return a value as YAML on one line."""
    # In brackets, so that what means something there is quoted.
    text: str = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=1 << 16)
    return text.strip()[1:-1]


def _spliced(text: str, node: yaml.Node, new: str) -> str:
    start = node.start_mark.index
    # `key:` without a value has its mark at the colon.
    space = " " if text[start - 1 : start] == ":" else ""
    return text[:start] + space + new + text[_end(node) :]


def _line_end(text: str, index: int) -> int:
    """Where the next line begins, if this is not its beginning."""
    if text[index - 1 : index] == "\n":
        return index
    return text.find("\n", index) + 1 or len(text)


def _end(node: yaml.Node) -> int:
    """Where a node ends; a block's own mark is that of what follows its comments."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        return _end(_last(node))
    end: int = node.end_mark.index
    return end


def _last(node: yaml.CollectionNode) -> yaml.Node:
    """The last value of a mapping, or entry of a list."""
    last: yaml.Node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return last


def _node(text: str, path: Path) -> yaml.Node:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for step in path:
        node = dict(_steps(node)).get(step)
    if node is None:
        raise NoSuchPlaceError(path)
    return node


def _entry(text: str, path: Path) -> tuple[yaml.MappingNode, int]:
    """The mapping that holds the last step of a path, and which of its entries that is."""
    node = _node(text, path[:-1])
    if isinstance(node, yaml.MappingNode):
        for number, (key, _) in enumerate(node.value):
            if key.value == path[-1]:
                return node, number
    raise NoSuchPlaceError(path)


def _steps(node: Any) -> Iterator[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        yield from ((str(key.value), value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)

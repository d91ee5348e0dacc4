"""One row → what the model is shown of it: text, or messages for the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mergekit_obim.calibration.data.conversations import (
    CONVERSATION_FIELDS,
    Messages,
    decoded,
    read_conversation,
    read_parts,
    short,
)
from mergekit_obim.errors import CalibrationError, told_as
from mergekit_obim.recipe.calibration import DataSource

Row = Mapping[str, Any]

# The fields that may hold a row's input; the first that is there and not empty does.
INPUT_FIELDS = (
    *("messages", "prompt", "text", "question", "instruction"),
    *("conversations", "conversation", "chosen"),
)
# What an instruction is about: Alpaca's name for it, and Dolly's.
_CONTEXT_FIELDS = ("input", "context")


def row_input(row: Row, source: DataSource) -> str | Messages:
    """Returns what the model is shown of a row: text or chat messages, empty if the row is empty.

    Raises:
        CalibrationError: The row has no field that can be used, or one that cannot be read.
    """
    fields = (source.column,) if source.column else INPUT_FIELDS
    present = [name for name in fields if name in row]
    if not present:
        wanted = (
            f"column {source.column!r}" if source.column else f"field of {', '.join(INPUT_FIELDS)}"
        )
        raise CalibrationError(
            f"has no {wanted}; it has "
            f"{', '.join(map(str, row)) or 'nothing'}; name the right one with 'column:'"
        )
    for name in present:
        value = _text_or_messages(row, name)
        if not value:
            continue
        if name == "prompt" and source.include_completion:
            value = _with_completion(row, value)
        if isinstance(value, str):
            if name == "instruction" and source.column is None:
                extra = [text for field in _CONTEXT_FIELDS if (text := _text(row, field))]
                value = "\n".join([value, *extra[:1]])
            return value
        system = row.get("system")
        if isinstance(system, str) and system.strip() and value[0].get("role") != "system":
            value = [{"role": "system", "content": system}, *value]
        return value
    return ""


def row_tools(row: Row) -> list[Any] | None:
    """Returns the tools that a row offers to its conversation, or None if it has none.

    Raises:
        CalibrationError: The field is not a list of function descriptions, nor JSON of one.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        with told_as(CalibrationError, "field 'tools' is not valid JSON", ValueError):
            tools = json.loads(tools or "null")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise CalibrationError(
            f"field 'tools' should be a list of function descriptions, found {short(tools)}"
        )
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": tool}
        for tool in tools
    ]


def _with_completion(row: Row, prompt: str | Messages) -> str | Messages:
    if "completion" not in row:
        raise CalibrationError(
            "include_completion is set, but it has no field completion; "
            f"it has {', '.join(map(str, row))}"
        )
    completion = _text_or_messages(row, "completion")
    if type(completion) is not type(prompt) and completion:
        raise CalibrationError("prompt and completion should both be text or messages")
    return prompt + completion if completion else prompt  # type: ignore[operator]


def _text(row: Row, name: str) -> str:
    """Returns the text of a field, empty if the field is missing or holds something else."""
    value = row.get(name)
    return value if isinstance(value, str) and value.strip() else ""


def _text_or_messages(row: Row, name: str) -> str | Messages:
    value = row.get(name)
    named = name in CONVERSATION_FIELDS
    empty = ("", "[]") if named else ("",)
    if value is None or value == [] or (isinstance(value, str) and value.strip() in empty):
        return ""
    try:
        messages = read_conversation(value, named=named)
        if messages is not None:
            return messages
        found = decoded(value)
        plain = isinstance(found, list) and any(isinstance(item, str) for item in found)
        parts = None if plain or isinstance(found, str) else read_parts(value)
    except CalibrationError as error:
        raise CalibrationError(f"field {name!r}: {error.message}") from error
    if parts and all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    if isinstance(value, str):
        if not (value.lstrip()[0] in "[{" if named else _printed_messages(found)):
            return value
        raise CalibrationError(
            f"field {name!r} should be text, or messages as JSON; found {short(value)}, which is "
            "neither: write it with json.dumps, or save the data as .jsonl or .parquet"
        )
    raise CalibrationError(
        f"field {name!r} should be text or a list of {{role, content}} messages, "
        f"found {short(value)}; write it so, or name another field with 'column:'"
    )


def _printed_messages(found: object) -> bool:
    """Returns whether a text is messages printed as numpy does, which cannot be read back."""
    if not isinstance(found, str) or re.match(r"\s*\[\s*\{", found) is None:
        return False
    keys = set(re.findall(r"""["'](role|content|from|value)["']\s*:""", found))
    return found.rstrip().endswith("]") and (
        keys >= {"role", "content"} or keys >= {"from", "value"}
    )

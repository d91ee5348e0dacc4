"""Conversations: the usual ways to write one in a row → messages of role and content.

Rows come from many programs. OpenAI's write ``role`` and ``content``, ShareGPT's ``from`` and
``value``; content is a text or a list of parts; and where a column can only hold text (CSV, some
parquet files) all of it is JSON, or what Python prints of a list. They all mean the same, and
from here on they are the same: ``{"role": …, "content": …}`` with what else the message has,
where content is a text, a list of parts of type text and image, or None.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from mergekit_obim.errors import CalibrationError

Messages = list[dict[str, Any]]

# The fields that are called after what they hold: what is in them is a conversation.
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
# A call as ShareGPT has it, in its own words; only the chat template knows how a call is written.
CALL = "function_call"

_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
_CONTENT_KEYS = ("content", "value", "text", "parts")
# What a message may have instead of content.
_OTHER_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
# Two messages in one mapping, as in Capybara.
_PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))
_TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_KEY = re.compile(r"""["'](?:role|from|type|input|human|user)["']\s*:""")


def read_conversation(value: object, *, named: bool = False) -> Messages | None:
    """Returns the messages that a value holds, or None if it is no conversation.

    Args:
        value: The value of a row's field: a list, a mapping, or a text that has one written out.
        named: Whether the field's name says that it holds a conversation. A text in another field
            is taken for one only if there is no doubt, since a JSON document may be meant as text.

    Raises:
        CalibrationError: The conversation has something in it that cannot be measured.

    >>> read_conversation('[{"from": "human", "value": "Hi"}]')
    [{'role': 'user', 'content': 'Hi'}]
    """
    strict = isinstance(value, str) and not named
    value = decoded(value)
    if isinstance(value, Mapping):
        nested = next((value[name] for name in CONVERSATION_FIELDS if value.get(name)), None)
        if nested is not None and not isinstance(nested, str):
            value = nested
    if isinstance(value, Mapping):
        value = _by_rows(value)
    if not isinstance(value, (list, tuple)) or not value:
        return None
    items = [decoded(item) for item in value]
    if named:
        items = _unpaired(items)
    found = [item for item in items if isinstance(item, Mapping) and _is_message(item, strict)]
    if len(found) < len(items):
        return None
    return [_message(item, f"message {number}") for number, item in enumerate(found, 1)]


def read_parts(value: object) -> list[dict[str, Any]] | None:
    """Returns the parts that a value holds, each of type text or image, or None if it is no parts.

    Raises:
        CalibrationError: A part has a type that cannot be measured.

    >>> read_parts(["Hi", {"type": "input_text", "text": " there"}])
    [{'type': 'text', 'text': 'Hi'}, {'type': 'text', 'text': ' there'}]
    """
    found = decoded(value)
    if isinstance(found, Mapping):
        found = found["parts"] if isinstance(found.get("parts"), list) else [found]
    if not isinstance(found, (list, tuple)):
        return None
    known = (*_TEXT_TYPES, *_IMAGE_TYPES)
    typed = all(isinstance(item, Mapping) and item.get("type") in known for item in found)
    if isinstance(value, str) and not typed:
        return None  # a JSON document that is meant as text
    parts = [part for item in found if (part := _part(item)) is not None]
    return parts if len(parts) == len(found) else None


def decoded(value: object) -> object:
    """Returns what a text has written out, as JSON or Python, if that may be messages or parts.

    Any other value is returned unchanged.
    """
    if not isinstance(value, str):
        return value
    found = _loaded(value) if is_encoded(value) else None
    return value if found is None else decoded(found)


def is_encoded(text: str) -> bool:
    """Returns whether a text looks like messages or parts that were written out."""
    ends = text.strip()[:1] + text.strip()[-1:]
    # In a JSON text within a JSON text, the inner one's quotes have a backslash before them.
    return ends in ("[]", "{}", '""') and _KEY.search(text.replace("\\", "")) is not None


def _loaded(text: str) -> object:
    for load in (json.loads, ast.literal_eval):
        try:
            return load(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _is_message(item: Mapping[str, Any], strict: bool) -> bool:
    if strict:
        if isinstance(item.get("role"), str):
            return "content" in item
        return str(item.get("from")).lower() in _ROLES and "value" in item
    return any(isinstance(item.get(key), str) for key in ("role", "from")) and any(
        key in item for key in (*_CONTENT_KEYS, *_OTHER_KEYS)
    )


def _unpaired(items: list[Any]) -> list[Any]:
    """Makes two messages of each mapping that holds a question and its answer."""
    for keys in _PAIRS:
        if all(isinstance(item, Mapping) and item.keys() >= set(keys) for item in items):
            turns = list(zip(("user", "assistant"), keys, strict=True))
            texts = [(role, item[key]) for item in items for role, key in turns]
            return [{"role": role, "content": text} for role, text in texts if text is not None]
    return items


def _by_rows(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Turns a mapping of lists, as the datasets library may store messages, into messages."""
    columns = list(value.values())
    if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    # Parquet gives every message the fields of all others, as None; templates test for them.
    message = {key: part for key, part in item.items() if part is not None or key == "content"}
    if "role" in message:
        role = message["role"]
    else:
        speaker = message.pop("from")
        role = _ROLES.get(speaker.strip().lower())
        if role is None:
            raise CalibrationError(
                f"{where} is from {speaker!r}, which is none of {', '.join(_ROLES)}; write one of "
                "these, or role and content as the model's chat template has them"
            )
    key = next((key for key in _CONTENT_KEYS if message.get(key) is not None), None)
    call = message.get("function_call")
    if isinstance(call, Mapping) and (key is None or message[key] == ""):  # OpenAI's, until 2023
        return {"role": CALL, "content": json.dumps(call, ensure_ascii=False)}
    if key is None:
        return {**message, "role": role}
    content = message.pop(key)
    message.pop("content", None)
    return {**message, "role": role, "content": _content(content, role, where)}


def _content(content: object, role: str, where: str) -> object:
    """Returns a message's text or parts. What a tool gave back may be a mapping of its own."""
    if isinstance(content, (int, float)) or (isinstance(content, str) and not is_encoded(content)):
        return content
    of_a_tool = role not in ("system", "user", "assistant")
    try:
        parts = read_parts(content)
    except CalibrationError as error:
        if not of_a_tool:
            raise CalibrationError(f"{where} {error.message}") from error
        parts = None
    if parts is not None:
        return parts
    if of_a_tool and isinstance(content, (list, tuple)):
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, str) or of_a_tool:
        return content
    raise CalibrationError(
        f'{where}: its content should be a text or a list of {{"type": "text", "text": …}} parts, '
        f"found {short(content)}"
    )


def _part(item: object) -> dict[str, Any] | None:
    """Returns a part as chat templates know them, or None if the item is no part."""
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if not isinstance(item, Mapping):
        return None
    # Parquet gives every part the fields of all others, as None; templates test for them.
    part = {key: value for key, value in item.items() if value is not None}
    kind = part.get("type", "image" if "image" in part or "image_url" in part else "text")
    if kind in _IMAGE_TYPES:
        return {**part, "type": "image", "image": _image(part)}
    if kind in _TEXT_TYPES:
        text = next(
            (part[k] for k in (kind, "text", "content") if isinstance(part.get(k), str)), None
        )
        if text is None and "text" in item and item["text"] is None:
            text = ""
        return None if text is None else {**part, "type": "text", "text": text}
    if "type" not in part:
        return None
    raise CalibrationError(
        f"has a part of type {kind!r}, which is not measured here; keep parts of type text and "
        "image, or leave the row out"
    )


def _image(part: Mapping[str, Any]) -> object:
    """Returns what a part says of its image (a path, an address, bytes), None if nothing."""
    value = next(
        (part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None
    )
    if isinstance(value, Mapping) and "url" in value:
        return value["url"]
    return value


def short(value: object) -> str:
    """Returns a value as Python prints it, cut where it is long, for an error to quote."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

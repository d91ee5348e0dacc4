"""Messages → text: the chat template of a model, and how it wants messages written.

A chat template is a program that comes with the model. Nothing says whether it wants the content of
a message as text or as a list of parts, and what it does not understand it prints as it is, or
leaves out. So it is tried: a mark in the place of each text shows what becomes of it.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_obim.calibration.data.conversations import CALL, Messages, short
from mergekit_obim.errors import CalibrationError, told_as

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


Chat: TypeAlias = "PreTrainedTokenizerBase | ProcessorMixin"


def write_chat(
    chat: Chat,
    messages: Messages,
    date: datetime.date,
    tools: list[Any] | None = None,
    *,
    reply: bool = False,
) -> tuple[str, str, bool]:
    """Writes a conversation with a model's chat template, in the form that the template takes.

    Args:
        chat: The tokenizer of the model; for rows with images, its processor.
        messages: As ``read_conversation`` returns them. A processor's template is given the
            parts of type image too, a tokenizer's only text.
        date: The date that the template is told if it asks for today's. With the real one, the
            same recipe would be another measurement tomorrow.
        tools: Descriptions of the tools that the conversation may call.
        reply: Whether the text goes on to where the model's answer begins.

    Returns:
        The text, with special tokens; the template that wrote it; whether it asked for the date.

    Raises:
        CalibrationError: There is no template, it doesn't take these messages, or it prints
            lists or JSON in the place of text.
    """
    # Asked first: apply_chat_template tells a missing template by its own, longer error.
    if not chat.chat_template:
        raise CalibrationError(
            "holds messages, but the model's tokenizer has no chat template; add one to its "
            "folder (chat_template.jinja), or use data with prompt or text fields"
        )
    with told_as(CalibrationError, "the chat template doesn't take these messages"):
        template = _template(chat, tools)
        known = "tool_calls" in template
        calls = [_call(m, known) if m["role"] == CALL else m for m in messages]

        def apply(taken: Messages) -> str:
            return str(
                chat.apply_chat_template(
                    taken,
                    tools=tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=reply,
                )
            )

        with _stopped_clock(template, date) as asked:
            taken, text = _with_values(_as_taken(calls, apply, _forms(chat)), apply)
            again = apply(taken)
    if text != again:
        raise CalibrationError(
            "the chat template writes another text each time: take what is random out of it"
        )
    return text, template, bool(asked)


def _template(chat: Chat, tools: list[Any] | None) -> str:
    if hasattr(chat, "get_chat_template"):
        return str(chat.get_chat_template(tools=tools))
    template = chat.chat_template
    return str(template["default"] if isinstance(template, dict) else template)


def _forms(chat: Chat) -> list[Callable[[Any], Any]]:
    """Returns the forms of content that the template may take, the likelier one first."""
    if not hasattr(chat, "image_processor"):
        return [_as_text, lambda content: _as_parts(content, images=False)]
    token = getattr(chat, "image_token", None)
    return [_as_parts] + [lambda content: _as_text(content, f"{token}\n")] * bool(token)


@contextmanager
def _stopped_clock(template: str, date: datetime.date) -> Iterator[list[str]]:
    """Yields a list of what the template asks of the clock, while the date is this one."""
    # transformers gives every template its own strftime_now, and lets no caller replace it. But
    # it caches compiled templates, and a template looks in its own globals first.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    asked: list[str] = []

    def strftime_now(format: str) -> str:
        asked.append(format)
        return datetime.datetime.combine(date, datetime.time()).strftime(format)

    names = _compile_jinja_template(template).globals
    names["strftime_now"] = strftime_now
    try:
        yield asked
    finally:
        names.pop("strftime_now", None)


def _as_taken(
    messages: Messages, apply: Callable[[Messages], str], forms: list[Callable[[Any], Any]]
) -> Messages:
    """Returns the messages with each content in the first form whose text the template shows.

    A mark that comes out as the value of a key shows that the template printed what it should have
    read.

    Raises:
        CalibrationError: The template shows no text at all, or prints lists or JSON instead.
    """
    marks = {
        number: f"obim{number}mark"
        for number, message in enumerate(messages)
        if isinstance(message.get("content"), (str, list)) and message["content"]
    }
    taken: dict[int, Any] = {}
    printed: dict[int, str] = {}
    failed = False
    for form in forms:
        marked = [
            {**m, "content": form(_marked(m["content"], marks[n]))} if n in marks else m
            for n, m in enumerate(messages)
        ]
        try:
            text = apply(marked)
        except Exception:  # maybe of this form alone; if not, the real text will raise it too
            failed = True
            continue
        for number in marks.keys() - taken.keys():
            key = "text" if isinstance(marked[number]["content"], list) else "content"
            mark = marks[number]
            # What a tool gave back is often shown as JSON, and should be.
            structure = re.search(rf"""["']{key}["']\s*:\s*["']{mark}.{{0,20}}""", text)
            if structure and messages[number].get("role") != "tool":
                printed[number] = structure[0].replace(mark, "…")
            elif mark in text:
                taken[number] = form
    for number in sorted(printed.keys() - taken.keys()):
        raise CalibrationError(_prints(printed[number]))
    if marks and not taken and not failed:
        raise CalibrationError(
            "the chat template shows nothing of these messages; use the template that the model "
            "was trained with"
        )
    usual = next(iter(taken.values()), forms[0])
    return [
        {**m, "content": taken.get(n, usual)(m["content"])} if "content" in m else m
        for n, m in enumerate(messages)
    ]


def _with_values(messages: Messages, apply: Callable[[Messages], str]) -> tuple[Messages, str]:
    """Returns the messages and their text, with arguments and answers as the template takes them.

    OpenAI's rows have the arguments of a call as a JSON text, which many templates would turn into
    JSON once more. Other templates want that text, and print a mapping as Python does.

    Raises:
        CalibrationError: The template prints lists, mappings or JSON either way.
        Exception: What the template raises either way.
    """
    errors: list[Exception] = []
    wrong = ""
    for candidate in (messages, list(map(_other_values, messages))):
        try:
            text = apply(candidate)
        except Exception as error:
            errors.append(error)
            continue
        found = _misprinted(candidate, text)
        if not found:
            return candidate, text
        wrong = wrong or found
    raise CalibrationError(_prints(wrong)) if wrong else errors[0]


def _other_values(message: dict[str, Any]) -> dict[str, Any]:
    """Returns the message with mappings in the place of JSON texts, and the reverse."""
    if isinstance(content := message.get("content"), dict):
        message = {**message, "content": json.dumps(content, ensure_ascii=False)}
    calls = []
    for call in _calls_of(message):
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = json.loads(arguments)
        elif arguments is not None:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else message


def _calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list) else []
    return [c for c in calls if isinstance(c, dict) and isinstance(c.get("function", c), dict)]


def _misprinted(messages: Messages, text: str) -> str:
    """Returns a value of the messages that the text has as Python's print or as JSON in JSON."""
    for message in messages:
        arguments = [call.get("function", call).get("arguments") for call in _calls_of(message)]
        for value in [message.get("content"), *arguments]:
            # JSON may be what the template wants, and a list of numbers looks the same in both.
            as_python = str(value) if isinstance(value, (dict, list)) else ""
            if as_python and as_python != json.dumps(value) and as_python in text:
                return as_python
        for value in arguments:
            twice = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else ""
            if '\\"' in twice and twice in text:
                return twice
    return ""


def _prints(found: str) -> str:
    return (
        f"the chat template prints messages as a Python list or JSON ({short(found)}) where it "
        "should write their text; mend chat_template.jinja in the tokenizer's folder, or use data "
        "with prompt or text fields"
    )


def _marked(content: str | list[dict[str, Any]], mark: str) -> str | list[dict[str, Any]]:
    """Returns content of the same structure with a mark in the place of its text."""
    if isinstance(content, str):
        return mark
    parts = [{**part, "text": mark} if part["type"] == "text" else part for part in content]
    return parts if any("text" in p for p in parts) else [*parts, {"type": "text", "text": mark}]


def _as_text(content: Any, image: str = "") -> Any:
    """Returns content as one text. Its parts have nothing between them, as in most templates."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] if part["type"] == "text" else image for part in content)


def _as_parts(content: Any, images: bool = True) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        return content
    return [part for part in content if images or part["type"] == "text"]


def _call(message: dict[str, Any], known: bool) -> dict[str, Any]:
    """Returns ShareGPT's call as a call, or as text if the template does not know calls."""
    text = _as_text(message["content"])
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if known and all(isinstance(call, Mapping) and "name" in call for call in calls):
        return {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": call} for call in calls],
        }
    return {"role": "assistant", "content": text}

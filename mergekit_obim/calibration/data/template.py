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
from typing import TYPE_CHECKING, Any

from mergekit_obim.calibration.data.conversations import CALL, Messages, short
from mergekit_obim.errors import CalibrationError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


class ChatWriter:
    """Writes conversations with a model's chat template, in the form that the template takes.

    Attributes:
        read_clock: Whether the template has asked for the date.

    Args:
        chat: The tokenizer of the model; for rows with images, its processor.
        date: The date that the template is told if it asks for today's. With the real one, the
            same recipe would be another measurement tomorrow.
    """

    def __init__(self, chat: PreTrainedTokenizerBase | ProcessorMixin, date: datetime.date) -> None:
        self.read_clock = False
        self._chat, self._date = chat, date

    def write(
        self, messages: Messages, tools: list[Any] | None = None, *, reply: bool = False
    ) -> tuple[str, str]:
        """Returns the text of a conversation, with special tokens, and the template that wrote it.

        Args:
            messages: As ``read_conversation`` returns them. A processor's template is given the
                parts of type image too, a tokenizer's only text.
            tools: Descriptions of the tools that the conversation may call.
            reply: Whether the text goes on to where the model's answer begins.

        Raises:
            CalibrationError: There is no template, it doesn't take these messages, or it prints
                lists or JSON in the place of text.
        """
        # Asked first: apply_chat_template tells a missing template by its own, longer error.
        if not self._chat.chat_template:
            raise CalibrationError(
                "holds messages, but the model's tokenizer has no chat template; add one to its "
                "folder (chat_template.jinja), or use data with prompt or text fields"
            )
        try:
            template = self._template(tools)
            calls = _with_calls(messages, "tool_calls" in template)

            def apply(taken: Messages) -> str:
                return str(
                    self._chat.apply_chat_template(
                        taken,
                        tools=tools,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=reply,
                    )
                )

            with self._stopped_clock(template):
                taken, text = _with_values(_as_taken(calls, apply, self._forms()), apply)
                again = apply(taken)
        except CalibrationError:
            raise
        except Exception as error:  # a template is a program, with errors of its own
            raise CalibrationError(
                f"the chat template doesn't take these messages: {one_line(error)}"
            ) from error
        if text != again:
            raise CalibrationError(
                "the chat template writes another text each time: take what is random out of it"
            )
        return text, template

    def _template(self, tools: list[Any] | None) -> str:
        if hasattr(self._chat, "get_chat_template"):
            return str(self._chat.get_chat_template(tools=tools))
        template = self._chat.chat_template
        return str(template["default"] if isinstance(template, dict) else template)

    def _forms(self) -> list[Callable[[Any], Any]]:
        """Returns the forms of content that the template may take, the likelier one first."""
        if not hasattr(self._chat, "image_processor"):
            return [_as_text, lambda content: _as_parts(content, images=False)]
        token = getattr(self._chat, "image_token", None)
        return [_as_parts] + [lambda content: _as_text(content, f"{token}\n")] * bool(token)

    @contextmanager
    def _stopped_clock(self, template: str) -> Iterator[None]:
        # transformers gives every template its own strftime_now, and lets no caller replace it. But
        # it caches compiled templates, and a template looks in its own globals first.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        def strftime_now(format: str) -> str:
            self.read_clock = True
            midnight = datetime.datetime.combine(self._date, datetime.time())
            return midnight.strftime(format)

        names = _compile_jinja_template(template).globals
        names["strftime_now"] = strftime_now
        try:
            yield
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


def _with_calls(messages: Messages, known: bool) -> Messages:
    """Returns the messages with ShareGPT's calls as calls, or as text if the template has none."""
    return [_call(message, known) if message["role"] == CALL else message for message in messages]


def _call(message: dict[str, Any], known: bool) -> dict[str, Any]:
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

"""One row → what the model is shown of it: text, or messages through the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_obim.calibration.spec import DataSource
from mergekit_obim.errors import CalibrationError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

# The fields that may hold a row's input; the first that is there and not empty does.
INPUT_FIELDS = ("messages", "prompt", "text", "question", "instruction")


def row_input(row: Row, source: DataSource) -> str | Messages:
    """What the model is shown of a row: text, or chat messages. Empty if the row is.

    Raises:
        CalibrationError: saying which fields the row has, if none of them will do.
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
            if "completion" not in row:
                raise CalibrationError(
                    "include_completion is set, but it has no field completion; "
                    f"it has {', '.join(map(str, row))}"
                )
            completion = _text_or_messages(row, "completion")
            if type(completion) is not type(value) and completion:
                raise CalibrationError("prompt and completion should both be text or messages")
            return value + completion if completion else value  # type: ignore[operator]
        if name == "instruction" and source.column is None:
            extra = _text_or_messages(row, "input")
            if isinstance(value, str) and isinstance(extra, str) and extra:
                return f"{value}\n{extra}"
        return value
    return ""


def _text_or_messages(row: Row, name: str) -> str | Messages:
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, (list, tuple)) and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    ):
        # Parquet gives every message the fields of all others, as None; templates test for them.
        return [
            {key: part for key, part in message.items() if part is not None or key == "content"}
            for message in value
        ]
    raise CalibrationError(
        f"field {name!r} should be text or a list of {{role, content}} messages, "
        f"found {short(value)}"
    )


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    # Asked first: apply_chat_template tells a missing template by its own, longer error.
    if not tokenizer.chat_template:
        raise CalibrationError(
            "holds messages, but the model's tokenizer has no chat template; add one to its "
            "folder (chat_template.jinja), or use data with prompt or text fields"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # a template is a program, with errors of its own
        raise CalibrationError(
            f"the chat template doesn't take these messages: {one_line(error)}"
        ) from error
    return str(text)


def short(value: object) -> str:
    """A value as Python writes it, cut where it is long, for an error to quote."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

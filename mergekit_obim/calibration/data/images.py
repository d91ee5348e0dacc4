"""Calibration rows with images: the model's processor turns text and images into inputs together.

A row with images runs alone, because what it brings beside its tokens has a shape of its own. Its
pixels are computed twice, once to count the row's tokens and once when it runs, so that no row's
pixels wait in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from mergekit_obim.calibration.data.tokens import TokenSequence, cuts_the_end
from mergekit_obim.errors import CalibrationError, quoted, told_as

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PretrainedConfig, ProcessorMixin

# The fields that may hold a row's images; the first that is there and not empty does.
COLUMNS = ("images", "image")
# LLaVA's rows have this in the text of a message where an image goes, on a line of its own.
_PLACEHOLDER = re.compile(r"<image>\n|\n<image>$|<image>")


class RowProcessor:
    """A model's processor, used on one row at a time.

    Attributes:
        processor: The processor of transformers, with an image processor and a tokenizer.

    Args:
        processor: The processor of transformers.
        placeholders: The token ids that stand for images in the model's input.
    """

    def __init__(self, processor: ProcessorMixin, placeholders: Iterable[int]) -> None:
        self.processor = processor
        self._placeholders = {*placeholders, getattr(processor, "image_token_id", None)}

    def tokenize(
        self, text: str, images: Callable[[], list[Image]], max_length: int, template: str | None
    ) -> TokenSequence:
        """Returns the row's token sequence, cut at ``max_length`` unless that would cut an image.

        Args:
            text: The text of the row.
            images: Reads the images of the row.
            max_length: Where to cut, special tokens counted.
            template: The chat template that wrote the text, and has put special tokens and image
                tokens in already; None if none did.

        Raises:
            CalibrationError: The processor does not take the row.
        """
        read = images()
        token = getattr(self.processor, "image_token", None)
        if template is None and token and (there := text.count(token)) != len(read):
            if there:
                raise CalibrationError(
                    f"has {len(read)} images, but {there} image tokens ({token}) in its text; "
                    "write one for each, or none to have all images before the text"
                )
            text = f"{token}\n" * len(read) + text  # as LLaVA has it; some want them apart
        options: dict[str, Any] = {"add_special_tokens": template is None}
        ids = self._run(text, read, options)["input_ids"][0].tolist()
        if len(ids) > max_length:
            cut = {**options, "truncation": True, "max_length": max_length}
            try:
                shorter = self._run(text, read, cut)["input_ids"][0].tolist()
            except CalibrationError:  # most processors refuse to cut images
                shorter = []
            if self._images_in(shorter) == self._images_in(ids):
                ids, options = shorter, cut
        digest = hashlib.sha256(self.processor.image_processor.to_json_string().encode())
        for image in read:
            digest.update(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest())

        def inputs() -> BatchFeature:
            made = self._run(text, images(), options)
            del made["input_ids"]
            return made

        return TokenSequence(ids, template, inputs, digest.digest())

    def _images_in(self, ids: list[int]) -> int:
        return sum(token in self._placeholders for token in ids)

    def _run(self, text: str, images: list[Image], options: Mapping[str, Any]) -> BatchFeature:
        what = "the model's processor doesn't take this row"
        with told_as(CalibrationError, what), cuts_the_end(self.processor.tokenizer):
            made: BatchFeature = self.processor(
                text=[text], images=[images], return_tensors="pt", **options
            )
        return made


def placeholders(config: PretrainedConfig) -> set[int]:
    """Returns the token ids that stand for images in a model's input."""
    known = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return {token for token in known if token is not None}


def row_images(row: Mapping[str, Any], column: str | None, messages: object) -> list[Any]:
    """Returns a row's images, none of them read yet: its column's, or else its messages'.

    Raises:
        CalibrationError: The recipe names a column that the row lacks.
    """
    if column and column not in row:
        raise CalibrationError(
            f"has no column {column!r} for its images; it has {', '.join(map(str, row))}"
        )
    value = next((row[name] for name in ((column,) if column else COLUMNS) if row.get(name)), None)
    if value is not None:
        return list(value) if isinstance(value, (list, tuple)) else [value]
    return [item["image"] for item in image_items(messages) if item["image"] is not None]


def image_items(messages: object) -> list[dict[str, Any]]:
    """Returns all parts of type image in messages. Text has none."""
    if not isinstance(messages, list):
        return []
    parts = [part for message in messages for part in _parts(message.get("content"))]
    return [part for part in parts if part["type"] == "image"]


def with_items(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns messages with a part for each image, as the chat templates of processors want them.

    Messages without such parts get them where their text says ``<image>``, if it does so once for
    each image, and otherwise before the first user message's text.

    Raises:
        CalibrationError: The messages have image parts, but not one for each of the row's images.
    """
    listed = placed(messages, count)
    listed = [{**message, "content": _parts(message.get("content"))} for message in listed]
    there = len(image_items(listed))
    if not there:
        first = next((m for m in listed if m["role"] == "user"), listed[0])
        first["content"] = [{"type": "image"}] * count + first["content"]
    elif there != count:
        raise CalibrationError(
            f"has {count} images, but its messages have {there} items of type image; write one "
            "for each, or none to have all images before the first user message"
        )
    return listed


def _parts(content: object) -> list[dict[str, Any]]:
    if content is None or isinstance(content, list):
        return content or []
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return [{"type": "text", "text": text}]


def placed(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns messages with a part of type image in the place of each ``<image>`` in their text.

    Messages that have such parts already are returned unchanged, and so are those whose
    placeholders are more or fewer than the row's images: those are text.
    """
    if image_items(messages):
        return messages
    split = [{**m, "content": _split(_parts(m.get("content")))} for m in messages]
    return split if len(image_items(split)) == count else messages


def _split(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            found.append(part)
            continue
        for number, text in enumerate(_PLACEHOLDER.split(part["text"])):
            if number:
                found.append({"type": "image", "image": None})
            if text:
                found.append({"type": "text", "text": text})
    return found


def read_image(value: object, folder: str) -> Image:
    """Reads an image, and returns it upright and in RGB.

    Args:
        value: The path of a file, the bytes of one, or a ``data:`` address that holds them; a
            mapping of ``bytes`` or ``path``, as the ``datasets`` library stores images; or an
            image of Pillow.
        folder: The folder that a relative path starts from.

    Raises:
        CalibrationError: The image cannot be read; the message names the file.
    """
    require_pillow()
    from PIL import Image, UnidentifiedImageError
    from transformers.image_utils import load_image

    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, bytes, Image.Image)) or not value:
        raise CalibrationError(
            "its images should be files' paths, {bytes, path} or bytes, found "
            f"{type(value).__name__}"
        )
    name = "one of its images"
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise CalibrationError(
            f"its image {value} is on the network, where it may be another one tomorrow: download "
            "it, and give the file"
        )
    try:
        if isinstance(value, str) and value.startswith("data:"):
            value = b64decode(value.partition(",")[2])
        elif isinstance(value, str):
            value = os.path.join(folder, os.path.expanduser(value))
            name = f"its image {value}"
            with open(value, "rb") as file:
                value = file.read()
        return load_image(Image.open(BytesIO(value)) if isinstance(value, bytes) else value)
    except FileNotFoundError as error:
        raise CalibrationError(f"{name}: there is no such file") from error
    except UnidentifiedImageError as error:
        raise CalibrationError(f"{name} is in no format that Pillow reads") from error
    except Exception as error:  # Pillow raises nearly every kind
        raise CalibrationError(f"{name} can't be read: {quoted(error)}") from error


def require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise CalibrationError(
            "has images, and Pillow, which reads them, is not installed: "
            "pip install 'mergekit-obim[images]'"
        ) from error

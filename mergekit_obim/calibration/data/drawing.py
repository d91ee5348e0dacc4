"""Which rows are drawn, and what each one drawn becomes."""

from __future__ import annotations

import datetime
import hashlib
import heapq
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergekit_obim.calibration.data.conversations import Messages
from mergekit_obim.calibration.data.images import (
    RowProcessor,
    image_items,
    placed,
    read_image,
    row_images,
    with_items,
)
from mergekit_obim.calibration.data.rows import Rows
from mergekit_obim.calibration.data.template import Chat, write_chat
from mergekit_obim.calibration.data.text import Row, row_input, row_tools
from mergekit_obim.calibration.data.tokens import TokenSequence, tokenize
from mergekit_obim.errors import CalibrationError
from mergekit_obim.recipe.calibration import DataSource, is_local_file

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase


def sample_order(count: int, samples: int, seed: int) -> list[int]:
    """Returns the first ``samples`` of ``count`` row indices in the order that the seed gives.

    The order is that of ``sha256(f"{seed}:{index}")``: the same on every machine and in any
    language, and asking for more rows keeps the ones that fewer would give.
    """
    return heapq.nsmallest(
        samples, range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest()
    )


@dataclass
class RowReader:
    """Makes token sequences of the rows of one source.

    Attributes:
        model_label: What to call the expert in errors.
        rows: The source's.
        source: Which fields of a row are read.
        tokenizer: The expert's own.
        find_processor: Gives the expert's processor, or None if it takes no images.
        max_length: Where a sequence is cut.
        date: What a chat template is told that asks for the date.
        cut: Whether sequences of text alone are cut; they are not where rows will be packed.
        ignores_images: Whether there were images, in rows read so far, that the model can't take.
        read_clock: Whether a chat template has asked for the date.
    """

    model_label: str
    rows: Rows
    source: DataSource
    tokenizer: PreTrainedTokenizerBase
    find_processor: Callable[[], RowProcessor | None]
    max_length: int
    date: datetime.date
    cut: bool = True
    ignores_images: bool = False
    read_clock: bool = False

    def where(self, index: int) -> str:
        """Returns how a user finds a row: the file's name, and the line or row in it."""
        return f"{self.source.data}, {self.rows.where(index)}"

    def read(self, index: int) -> TokenSequence | None:
        """Returns the token sequence of a row, or None if the row is empty.

        Raises:
            CalibrationError: The row cannot be used; the message does not name it yet.
            UnicodeEncodeError: The row holds half a character.
        """
        row = self.rows[index]
        value = row_input(row, self.source)
        images = row_images(row, self.source.images, value)
        if images or image_items(value):
            processor = self.find_processor()
            if processor:
                return self._with_images(index, value, len(images), processor)
            self.ignores_images = True
            value = value if isinstance(value, str) else placed(value, len(images))
        if not value:
            return None
        text, template = self._text(value, row, self.tokenizer)
        if not text:
            return None
        return tokenize(text, self.tokenizer, self.max_length if self.cut else None, template)

    def _text(self, value: str | Messages, row: Row, chat: Chat) -> tuple[str, str | None]:
        """Returns a row's text, and the chat template that wrote it, if one did."""
        if isinstance(value, str):
            text, template = value, None
        else:
            text, template, asked = write_chat(chat, value, self.date, row_tools(row))
            self.read_clock |= asked
        text.encode()  # JSON can hold half a character, which no tokenizer takes
        return text, template

    def _with_images(
        self, index: int, value: str | Messages, count: int, processor: RowProcessor
    ) -> TokenSequence:
        folder = os.path.expanduser(self.source.data)
        if is_local_file(folder):
            folder = os.path.dirname(folder)

        def images() -> list[Any]:
            row = self.rows[index]
            found = row_images(row, self.source.images, row_input(row, self.source))
            return [read_image(image, folder) for image in found]

        if not isinstance(value, str):
            value = with_items(value, count)
        text, template = self._text(value, self.rows[index], processor.processor)
        row = processor.tokenize(text, images, self.max_length, template)
        make = row.image_inputs
        assert make is not None

        def inputs() -> BatchFeature:
            try:
                return make()
            except CalibrationError as error:  # what was there when it was tokenized has gone
                raise CalibrationError(
                    f"{self.model_label}: {self.where(index)}: {error.message}"
                ) from error

        return replace(row, image_inputs=inputs)


@dataclass(frozen=True)
class Drawn:
    """Rows that were drawn.

    Attributes:
        sequences: Their sequences, in the rows' own order.
        shared: How many of them are among the source's ``samples``, if further ones were wanted.
        usable: How many rows were found that are not empty, up to the number that was looked for.
    """

    sequences: list[TokenSequence]
    shared: int
    usable: int


def draw(reader: RowReader, seed: int, further: int = 0) -> Drawn:
    """Draws rows by the seed: those to measure, or those that come after them.

    Empty rows do not count: others are drawn in their place, as long as there are any.

    Args:
        reader: Of the source's rows.
        seed: Gives the order of drawing.
        further: If not 0, how many rows to return that come after the source's ``samples``. Fewer
            are returned if there are fewer; where there are not even a quarter of them, the last
            of the samples too.

    Raises:
        CalibrationError: A row cannot be used, which the message names, or all rows are empty.
    """
    rows, source = reader.rows, reader.source
    drawn: dict[int, TokenSequence] = {}
    looked_at = 0
    number = wanted = source.samples + further
    while True:
        order = sample_order(len(rows), wanted, seed)
        for index in order[looked_at:]:
            try:
                read = reader.read(index)
            except UnicodeEncodeError as error:  # JSON can hold it, no tokenizer takes it
                raise CalibrationError(
                    f"{reader.where(index)}: holds half a character "
                    f"({error.object[error.start]!a}); remove it"
                ) from error
            except CalibrationError as error:
                raise CalibrationError(f"{reader.where(index)}: {error.message}") from error
            if read is not None:
                drawn[index] = read
            if len(drawn) == number:
                break
        if len(drawn) == number or len(order) == len(rows):
            break
        looked_at, wanted = len(order), 2 * wanted  # empty rows: look further
    if not drawn:
        raise CalibrationError(f"{source.data}: is empty: none of its rows holds any text")
    usable, shared = len(drawn), 0
    if further:
        fresh = max(0, usable - source.samples)
        if 4 * fresh < further:
            shared = min(further, usable) - fresh
        drawn = dict(list(drawn.items())[-(fresh + shared) :])  # it is in the order of drawing
    lengths = {index: len(row.ids) for index, row in drawn.items() if row.image_inputs is not None}
    longest = max(lengths, key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > reader.max_length:
        raise CalibrationError(
            f"{reader.where(longest)}: its image tokens don't fit max_length "
            f"{reader.max_length}: with them it has {lengths[longest]} tokens, the most of "
            "all rows; raise max_length to that, or use smaller images"
        )
    return Drawn([drawn[index] for index in sorted(drawn)], shared, usable)

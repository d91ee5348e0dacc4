"""Calibration data: rows of a file or data set → token sequences.

Everything here is the same on every machine: which rows are drawn, in what order they
stand, and how they are batched. Nothing is ever padded: a batch holds sequences of one
length only, so a measurement depends neither on padding nor on the batch size. Rows with
images run alone.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_obim.calibration.images import (
    RowProcessor,
    WithImages,
    read_image,
    row_images,
    with_items,
)
from mergekit_obim.errors import CalibrationError, one_line
from mergekit_obim.recipe.calibration import (
    FILE_SUFFIXES,
    Calibration,
    DataSource,
    is_local_file,
)

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

# The fields that may hold a row's input; the first that is there and not empty does.
INPUT_FIELDS = ("messages", "prompt", "text", "question", "instruction")


class ChatText(str):
    """Text written by a chat template, which has put the special tokens in already."""

    __slots__ = ()


class Rows(Sequence[Row]):
    """The rows of one source; each is decoded only when it is asked for.

    Attributes:
        split: The split that was taken, for a data set.
    """

    def __init__(
        self,
        items: Sequence[Any],
        *,
        decode: Callable[[Any], Row] = lambda item: item,
        lines: Sequence[int] | None = None,
        split: str | None = None,
    ) -> None:
        self._items = items
        self._decode = decode
        self._lines = lines
        self.split = split

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._decode(self._items[index])

    def where(self, index: int) -> str:
        """How a user finds the row: ``line 7`` of a text file, else ``row 7``, from 1."""
        return f"line {self._lines[index]}" if self._lines else f"row {index + 1}"


@dataclass(frozen=True)
class TokenizedCalibration:
    """What one expert is measured on.

    Attributes:
        sequences: Token ids, one list per sequence, none empty; some may be ``WithImages``.
        tokens: How many token ids that is.
        content_hash: sha256 over the sequences and their images, the same on every machine.
        sources: One JSON-able mapping per source: as the recipe has it, with ``rows`` (how
            many it has) and ``sampled`` (how many were taken).
        template: sha256 of the chat template, if one was used.
        warnings: What the user should be told.
    """

    sequences: list[list[int]]
    tokens: int
    content_hash: str
    sources: list[dict[str, Any]]
    template: str | None = None
    warnings: list[str] = field(default_factory=list)


def prepare(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    model_label: str,
    limit: int | None = None,
    find_processor: Callable[[], RowProcessor | None] = lambda: None,
) -> TokenizedCalibration:
    """Reads, samples and tokenizes all of an expert's calibration data.

    Args:
        calibration: What the recipe asks for.
        tokenizer: The expert's own.
        model_label: What to call the expert in errors.
        limit: The longest sequence that the model can take, if it has such a limit.
        find_processor: Gives the expert's processor, or None if it takes no images; called only
            if a row has any.

    Raises:
        CalibrationError: if data can't be read, or has a row that can't be used.
    """
    max_length = min(calibration.max_length, limit or calibration.max_length)
    warnings = []
    if max_length < calibration.max_length:
        warnings.append(
            f"max_length is {max_length}, the longest that the model takes, instead of "
            f"{calibration.max_length}"
        )
    texts: list[str] = []
    illustrated: list[WithImages] = []
    sources = []
    for source in calibration.sources:
        try:
            rows = load_rows(source)
            reader = _Reader(model_label, rows, source, tokenizer, find_processor, max_length)
            drawn = _draw(reader, calibration.seed)
        except CalibrationError as error:
            raise CalibrationError(f"{model_label}: {error.message}") from error
        if len(drawn) < source.samples:
            warnings.append(
                f"{source.data} has {len(drawn)} usable rows, fewer than the {source.samples} "
                "samples asked for: all are used"
            )
        if reader.ignores_images:
            warnings.append(
                f"{source.data} has images, but the model takes none: only the text is used"
            )
        illustrated += [row for row in drawn if isinstance(row, WithImages)]
        texts += [row for row in drawn if isinstance(row, str)]
        described = source.model_dump(exclude_none=True)
        if rows.split is not None:
            described["split"] = rows.split
        sources.append({**described, "rows": len(rows), "sampled": len(drawn)})

    try:
        if calibration.packing:
            sequences = pack(tokenize(texts, tokenizer, None), max_length, tokenizer.eos_token_id)
        else:
            sequences = tokenize(texts, tokenizer, max_length)
    except CalibrationError as error:
        raise CalibrationError(f"{model_label}: {error.message}") from error
    sequences += illustrated
    if not sequences:
        names = ", ".join(source.data for source in calibration.sources)
        raise CalibrationError(
            f"{model_label}: {names}: the tokenizer makes no tokens of it; "
            "check the model's tokenizer files"
        )
    templates = {row.template for row in illustrated if row.template}
    if any(isinstance(text, ChatText) for text in texts):
        templates.add(tokenizer.get_chat_template())
    return TokenizedCalibration(
        sequences=sequences,
        tokens=sum(map(len, sequences)),
        content_hash=content_hash(sequences),
        sources=sources,
        template=hashlib.sha256("".join(sorted(templates)).encode()).hexdigest()
        if templates
        else None,
        warnings=warnings,
    )


# --- rows ---------------------------------------------------------------------------------


def load_rows(source: DataSource) -> Rows:
    """The rows of a file, or of a Hugging Face data set.

    Of ``.jsonl`` every non-empty line is an object; ``.json`` is a list of them, or a mapping
    with one list (``{"data": [...]}``), or lines after all; of ``.txt`` every non-empty line
    is a row; ``.csv`` has a header line. A bare string counts as ``{"text": ...}``.

    Raises:
        CalibrationError: naming the file, and the line where there is one.
    """
    if not is_local_file(source.data):
        return _load_data_set(source)
    path = os.path.expanduser(source.data)
    suffix = os.path.splitext(path)[1].lower()
    if not os.path.exists(path):
        raise CalibrationError(
            f"{source.data}: there is no such file (a relative path starts at {os.getcwd()})"
        )
    readers: dict[str, Callable[[str, DataSource], Rows]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".txt": _read_text,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if suffix not in readers:
        raise CalibrationError(
            f"{source.data}: can't tell its format; name it {', '.join(FILE_SUFFIXES)}"
        )
    try:
        rows = readers[suffix](path, source)
    except OSError as error:
        raise CalibrationError(
            f"{source.data}: can't be read: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{source.data}: is not UTF-8 text; save it as UTF-8 ({error.reason})"
        ) from error
    if not len(rows):
        raise CalibrationError(f"{source.data}: is empty: it has no rows")
    return rows


def _as_row(value: object, source: DataSource, where: str) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return value
    raise CalibrationError(
        f'{source.data}, {where}: should be an object such as {{"text": ...}}, '
        f"found {_short(value)}"
    )


def _read_json_lines(path: str, source: DataSource) -> Rows:
    lines: list[bytes] = []
    numbers: list[int] = []
    # Bytes, because str.splitlines also splits at characters that a JSON string may hold.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            try:
                _as_row(json.loads(line), source, f"line {number}")
            except ValueError as error:
                if isinstance(error, CalibrationError):
                    raise
                raise CalibrationError(
                    f"{source.data}, line {number}: is not valid JSON: {error}"
                ) from error
            lines.append(line)
            numbers.append(number)
    # Kept as bytes, a big file takes a fraction of the memory of its rows.
    return Rows(
        lines, decode=lambda line: _as_row(json.loads(line), source, "a line"), lines=numbers
    )


def _read_json(path: str, source: DataSource) -> Rows:
    with open(path, "rb") as file:
        content = file.read()
    if not content.strip():
        return Rows([])
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON lines by another name
            return _read_json_lines(path, source)
        raise CalibrationError(f"{source.data}: is not valid JSON: {error}") from error
    if isinstance(value, dict):
        lists = [key for key, items in value.items() if isinstance(items, list)]
        if not value.keys().isdisjoint([*INPUT_FIELDS, source.column]):
            value = [value]  # one row
        elif len(lists) == 1:
            value = value[lists[0]]
        else:
            raise CalibrationError(
                f"{source.data}: should be a list of rows, or a mapping with one list; "
                f"found a mapping with {', '.join(map(str, value)) or 'nothing'}"
            )
    if not isinstance(value, list):
        raise CalibrationError(f"{source.data}: should be a list of rows, found {_short(value)}")
    return Rows([_as_row(row, source, f"row {number}") for number, row in enumerate(value, 1)])


def _read_text(path: str, source: DataSource) -> Rows:
    with open(path, encoding="utf-8-sig") as file:
        kept = [(number, line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip()]
    return Rows(
        [line for _, line in kept],
        decode=lambda line: {"text": line},
        lines=[number for number, _ in kept],
    )


def _read_csv(path: str, source: DataSource) -> Rows:
    # The limit (131072 characters a field, for the whole process) is too low for documents.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # Cells beyond the header's have no name, so nothing can ask for them.
            return Rows([{k: v for k, v in row.items() if k} for row in csv.DictReader(file)])
    except csv.Error as error:
        raise CalibrationError(f"{source.data}: is not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: str, source: DataSource) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        # ParquetFile, not read_table, which reads columns into folder names like `split=train`.
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except pyarrow.ArrowException as error:
        raise CalibrationError(
            f"{source.data}: is not a readable parquet file: {one_line(error)}"
        ) from error
    return Rows(range(len(table)), decode=lambda index: table.slice(index, 1).to_pylist()[0])


def _load_data_set(source: DataSource) -> Rows:
    import datasets

    try:
        # Without a split: `datasets` prepares all splits anyway, and then says which there are.
        loaded = datasets.load_dataset(
            os.path.expanduser(source.data),
            source.config,
            split=source.split,
            revision=source.revision,
        )
    except Exception as error:  # `datasets` raises nearly every kind
        raise CalibrationError(
            f"{source.data}: is no file here and can't be loaded as a data set: {one_line(error)}"
        ) from error
    split = source.split
    if split is None:
        splits = list(loaded)
        split = "train" if "train" in splits else splits[0]
        if len(splits) > 1 and split != "train":
            raise CalibrationError(
                f"{source.data}: has no split 'train'; choose one with 'split:' from "
                f"{', '.join(splits)}"
            )
        loaded = loaded[split]
    if not len(loaded):
        raise CalibrationError(f"{source.data}: split {split} is empty: it has no rows")
    return Rows(loaded, split=split)


# --- one row ------------------------------------------------------------------------------


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
        f"found {_short(value)}"
    )


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> ChatText:
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
    return ChatText(text)


# --- sampling -----------------------------------------------------------------------------


def sample_order(count: int, samples: int, seed: int) -> list[int]:
    """The first ``samples`` of ``count`` row indices, in the order that the seed gives them.

    The order is that of ``sha256(f"{seed}:{index}")``: the same on every machine and in any
    language, and asking for more rows keeps the ones that fewer would give.
    """
    return heapq.nsmallest(
        samples, range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest()
    )


@dataclass
class _Reader:
    """Reads the rows of one source.

    Attributes:
        ignores_images: Whether there were images, in rows read so far, that the model can't take.
    """

    model_label: str
    rows: Rows
    source: DataSource
    tokenizer: PreTrainedTokenizerBase
    find_processor: Callable[[], RowProcessor | None]
    max_length: int
    ignores_images: bool = False

    def where(self, index: int) -> str:
        """How a user finds a row."""
        return f"{self.source.data}, {self.rows.where(index)}"

    def read(self, index: int) -> str | WithImages:
        """A row's text, or its tokens if it has images; empty if the row is."""
        row = self.rows[index]
        value = row_input(row, self.source)
        if images := row_images(row, self.source.images, value):
            processor = self.find_processor()
            if processor:
                return self._with_images(index, value, len(images), processor)
            self.ignores_images = True
        text = value if isinstance(value, str) else _render(value, self.tokenizer)
        text.encode()
        return text

    def _with_images(
        self, index: int, value: str | Messages, count: int, processor: RowProcessor
    ) -> WithImages:
        folder = os.path.expanduser(self.source.data)
        if is_local_file(folder):
            folder = os.path.dirname(folder)

        def images() -> list[Any]:
            found = row_images(self.rows[index], self.source.images, value)
            return [read_image(image, folder) for image in found]

        text, chat = value, False
        if not isinstance(value, str):
            text, chat = _render(with_items(value, count), processor.processor), True
        assert isinstance(text, str)
        text.encode()
        row = processor.tokenize(text, images, self.max_length, chat=chat)
        make = row.inputs

        def inputs() -> BatchFeature:
            try:
                return make()
            except CalibrationError as error:  # what was there when it was tokenized has gone
                raise CalibrationError(
                    f"{self.model_label}: {self.where(index)}: {error.message}"
                ) from error

        row.inputs = inputs
        return row


def _draw(reader: _Reader, seed: int) -> list[str | WithImages]:
    """What ``samples`` rows that are not empty hold, in the rows' own order."""
    rows, source = reader.rows, reader.source
    drawn: dict[int, str | WithImages] = {}
    looked_at = 0
    wanted = source.samples
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
            if read:
                drawn[index] = read
            if len(drawn) == source.samples:
                break
        if len(drawn) == source.samples or len(order) == len(rows):
            break
        looked_at, wanted = len(order), 2 * wanted  # empty rows: look further
    if not drawn:
        raise CalibrationError(f"{source.data}: is empty: none of its rows holds any text")
    longest = max(drawn, key=lambda index: isinstance(drawn[index], WithImages) * len(drawn[index]))
    if isinstance(drawn[longest], WithImages) and len(drawn[longest]) > reader.max_length:
        raise CalibrationError(
            f"{reader.where(longest)}: its image tokens don't fit max_length "
            f"{reader.max_length}: with them it has {len(drawn[longest])} tokens, the most of "
            "all rows; raise max_length to that, or use smaller images"
        )
    return [drawn[index] for index in sorted(drawn)]


# --- tokens -------------------------------------------------------------------------------


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[list[int]]:
    """A token sequence per text, without the empty ones.

    Special tokens are those that the tokenizer adds by itself; to :class:`ChatText`, none.

    Args:
        texts: Not empty; any number.
        tokenizer: The model's.
        max_length: Where a sequence is cut, special tokens counted; ``None`` cuts nothing.

    Raises:
        CalibrationError: if ``max_length`` leaves no room beside the special tokens.
    """
    room = tokenizer.num_special_tokens_to_add()
    if max_length is not None and max_length <= room:
        raise CalibrationError(
            f"max_length {max_length} leaves no room beside the {room} special tokens that the "
            "tokenizer adds; raise it"
        )
    sequences: list[list[int]] = []
    for text in texts:
        # Cut by the tokenizer, which keeps a closing token such as BERT's [SEP].
        ids = tokenizer(
            text,
            add_special_tokens=not isinstance(text, ChatText),
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            verbose=False,
        )["input_ids"]
        if ids:
            sequences.append([int(token) for token in ids])
    return sequences


def pack(sequences: Iterable[Sequence[int]], length: int, separator: int | None) -> list[list[int]]:
    """Joins sequences into segments of exactly ``length`` tokens.

    The incomplete segment at the end is dropped, unless there is no other.

    Args:
        sequences: Token ids.
        length: Tokens per segment.
        separator: Put between two sequences, unless the first ends in it already.
    """
    stream: list[int] = []
    for sequence in sequences:
        if stream and separator is not None and stream[-1] != separator:
            stream.append(separator)
        stream += sequence
    whole = max(len(stream) - len(stream) % length, min(len(stream), length))
    return [stream[start : start + length] for start in range(0, whole, length)]


def content_hash(sequences: Iterable[Sequence[int]]) -> str:
    """sha256 over each sequence's length and token ids, as little-endian 64-bit integers.

    After those of a sequence with images comes the sha256 of the images.
    """
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(struct.pack(f"<{len(sequence) + 1}q", len(sequence), *sequence))
        if isinstance(sequence, WithImages):
            digest.update(sequence.content)
    return digest.hexdigest()


def next_batch(ordered: Sequence[list[int]], start: int, size: int) -> Sequence[list[int]]:
    """The sequences from ``start`` on that make a batch: up to ``size``, all of one length.

    One with images is a batch of its own.

    Args:
        ordered: Token ids, sorted by length.
        start: Less than their number.
        size: At least 1.
    """
    if size < 1:
        raise ValueError(f"size should be at least 1, found {size}")
    end = start + 1
    while (
        end < min(start + size, len(ordered))
        and len(ordered[end]) == len(ordered[start])
        and not any(isinstance(sequence, WithImages) for sequence in ordered[end - 1 : end + 1])
    ):
        end += 1
    return ordered[start:end]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

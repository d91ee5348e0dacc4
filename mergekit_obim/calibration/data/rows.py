"""Reading calibration files and data sets into rows, which are not interpreted yet."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_obim.calibration.data.conversations import short
from mergekit_obim.calibration.data.text import INPUT_FIELDS, Row
from mergekit_obim.errors import CalibrationError, one_line, told_as
from mergekit_obim.recipe.calibration import FILE_SUFFIXES, DataSource, is_local_file


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """The rows of one source.

    Attributes:
        items: The rows as they are kept in memory.
        decode: Makes a row of an item; called each time that the row is asked for.
        lines: The line of each row, from 1, in a text file.
        split: The split that was taken, for a data set.
    """

    items: Sequence[Any]
    decode: Callable[[Any], Row] = lambda item: item
    lines: Sequence[int] = ()
    split: str | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.decode(self.items[index])

    def where(self, index: int) -> str:
        """Returns how a user finds a row: ``line 7`` of a text file, else ``row 7``, from 1."""
        return f"line {self.lines[index]}" if self.lines else f"row {index + 1}"


def load_rows(source: DataSource) -> Rows:
    """Returns the rows of a file, of a folder, or of a Hugging Face data set.

    Of ``.jsonl`` every non-empty line is an object; ``.json`` is a list of them, or a mapping
    with one list (``{"data": [...]}``), or lines after all; of ``.txt`` every non-empty line
    is a row; ``.csv`` has a header line. A bare string counts as ``{"text": ...}``.

    Raises:
        CalibrationError: The data cannot be read. The message names the file, and the line if
            there is one.
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
    not_text = f"{source.data}: is not UTF-8 text; save it as UTF-8"
    with (
        told_as(CalibrationError, f"{source.data}: can't be read", OSError),
        told_as(CalibrationError, not_text, UnicodeDecodeError),
    ):
        rows = readers[suffix](path, source)
    if not len(rows):
        raise CalibrationError(f"{source.data}: is empty: it has no rows")
    return rows


def _as_row(value: object, source: DataSource, where: str) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return value
    raise CalibrationError(
        f'{source.data}, {where}: should be an object such as {{"text": ...}}, found {short(value)}'
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
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                what = f"{source.data}, line {number}: is not valid JSON"
                raise CalibrationError(f"{what}: {error}") from error
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
        raise CalibrationError(f"{source.data}: should be a list of rows, found {short(value)}")
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
    not_csv = told_as(CalibrationError, f"{source.data}: is not valid CSV", csv.Error)
    try:
        with not_csv, open(path, encoding="utf-8-sig", newline="") as file:
            # Cells beyond the header's have no name, so nothing can ask for them.
            return Rows([{k: v for k, v in row.items() if k} for row in csv.DictReader(file)])
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: str, source: DataSource) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    what = f"{source.data}: is not a readable parquet file"
    # ParquetFile, not read_table, which reads columns into folder names like `split=train`.
    with (
        told_as(CalibrationError, what, pyarrow.ArrowException),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        table = file.read()
    return Rows(range(len(table)), decode=lambda index: table.slice(index, 1).to_pylist()[0])


def _load_data_set(source: DataSource) -> Rows:
    import datasets

    path = os.path.expanduser(source.data)
    markers = (
        datasets.config.DATASET_STATE_JSON_FILENAME,
        datasets.config.DATASETDICT_JSON_FILENAME,
    )
    saved = any(os.path.isfile(os.path.join(path, name)) for name in markers)
    if saved and (source.config or source.revision):
        raise CalibrationError(
            f"{source.data}: is a folder that save_to_disk wrote, which has neither config nor "
            "revision: leave them out"
        )
    try:
        loaded: Any
        if saved:
            loaded = _saved_splits(datasets.load_from_disk(path))
        else:
            # Without a split: `datasets` prepares all splits anyway, and then says which there are.
            loaded = datasets.load_dataset(
                path, source.config, split=source.split, revision=source.revision
            )
    except Exception as error:  # `datasets` raises nearly every kind
        if os.path.isdir(path):
            raise CalibrationError(
                f"{source.data}: is a folder that the datasets library can't read: "
                f"{one_line(error)}; name a file in it, or a folder of {', '.join(FILE_SUFFIXES)} "
                "files, or one that save_to_disk wrote"
            ) from error
        raise CalibrationError(
            f"{source.data}: is no file here and can't be loaded as a data set: {one_line(error)}"
        ) from error
    split = source.split
    if saved or split is None:
        split = _choose_split(list(loaded), source)
        loaded = loaded[split]
    if not len(loaded):
        raise CalibrationError(f"{source.data}: split {split} is empty: it has no rows")
    return Rows(loaded, split=split)


def _saved_splits(loaded: Any) -> dict[str, Any]:
    """Returns the splits of what ``save_to_disk`` wrote, without any formatting of columns."""
    if not isinstance(loaded, dict):
        # As the datasets library calls what has no split.
        loaded = {str(loaded.split or "train"): loaded}
    return {split: data.with_format(None) for split, data in loaded.items()}


def _choose_split(splits: list[str], source: DataSource) -> str:
    """Returns the split that the recipe names, or else ``train``, or else the only one.

    Raises:
        CalibrationError: There is no split of that name, or several and none named ``train``.
    """
    wanted = source.split or "train"
    if wanted in splits:
        return wanted
    if source.split is None and len(splits) == 1:
        return splits[0]
    raise CalibrationError(
        f"{source.data}: has no split {wanted!r}; choose one with 'split:' from {', '.join(splits)}"
    )

"""The recipe's ``calibration`` keys: what an expert is measured on, and how.

What a setting means does not depend on where it stands. From strongest to weakest:
a command-line option, an entry of a mixture, the model's ``calibration``, the recipe's
top-level ``calibration``, the default.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    ValidationError,
    model_validator,
)

from mergekit_obim.recipe.faults import Fault, Path, Place, nearest

FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
# Stands for rows that the expert writes itself.
SELF = "self"

# Keys that mean something only for a Hugging Face data set.
_HUB_KEYS = ("config", "split", "revision")
# Keys of one data source that may also stand beside `data`, for every source in it.
_SOURCE_KEYS = (*_HUB_KEYS, "column", "images", "include_completion", "samples")
# Keys that say how rows are found and read, none of which the expert's own rows need.
_READING_KEYS = tuple(key for key in _SOURCE_KEYS if key != "samples")

# How many columns of each layer's Gram matrix are measured for a merge that reads them, unless the
# recipe or the command line says another number.
USUAL_SKETCH = 16

_Positive = Annotated[int, Field(strict=True, ge=1)]


def is_local_file(data: str) -> bool:
    """Return whether ``data`` names a file, existing or not, rather than a data set.

    A file's suffix decides, or a form that no data set has (``./x``, ``/x``, ``~/x``), or a
    file of that name. A folder is left to the ``datasets`` library, which reads folders.
    ``self`` is neither: the file of that name is ``./self``.
    """
    path = os.path.expanduser(data)
    return (
        data != SELF
        and not os.path.isdir(path)
        and (
            path.lower().endswith(FILE_SUFFIXES)
            or os.path.isfile(path)
            or path.startswith((".", "/", "\\", "~"))
        )
    )


def is_here(data: str) -> bool:
    """Return whether ``data`` names a local file, existing or not, or a local folder."""
    return is_local_file(data) or (data != SELF and os.path.isdir(os.path.expanduser(data)))


def _batch_size(value: object) -> object:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("should be a whole number of at least 1, or 'auto'")


def _date(value: object) -> object:
    if isinstance(value, str):
        with suppress(ValueError):
            return datetime.date.fromisoformat(value)
    if type(value) is datetime.date:  # as YAML reads one; a datetime has a time of day
        return value
    raise ValueError("should be a date such as 2025-01-31")


def _sketch(value: object) -> object:
    if value == "full" or (type(value) is int and value >= 0):
        return value
    raise ValueError("should be a whole number of at least 0, or 'full'")


class DataSource(BaseModel):
    """One file or data set, and how its rows are read; or the expert's own writing.

    Attributes:
        data: A ``.jsonl``, ``.json``, ``.txt``, ``.csv`` or ``.parquet`` file, or the name
            of a Hugging Face data set; or ``self``: the expert writes its own rows.
        config: The data set's configuration.
        split: The data set's split; left out, ``train``, or the only one there is.
        revision: The data set's branch, tag or commit.
        column: The field that holds the input, instead of the usual ones.
        images: The field that holds a row's images, instead of ``images``.
        include_completion: Whether a row's ``completion`` follows its ``prompt``.
        samples: How many rows to draw, or to write.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(min_length=1)
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    column: str | None = None
    images: str | None = None
    include_completion: StrictBool = False
    samples: _Positive = 100  # the paper's, which finds 10 to come close (its table 5)

    @property
    def is_self(self) -> bool:
        """Whether the expert writes these rows itself."""
        return self.data == SELF

    @model_validator(mode="after")
    def _only_keys_that_mean_something(self) -> DataSource:
        if self.is_self:
            extra = [key for key in _READING_KEYS if getattr(self, key)]
            if extra:
                raise ValueError(
                    f"{' and '.join(extra)} is for files and data sets, but with data: {SELF} the "
                    f"expert writes its own rows (a file or folder of that name is ./{SELF})"
                )
            return self
        extra = [key for key in _HUB_KEYS if getattr(self, key) is not None]
        if extra and is_local_file(self.data):
            raise ValueError(f"{' and '.join(extra)} is for data sets, but {self.data} is a file")
        return self


class Calibration(BaseModel):
    """How one expert is measured: ``Calibration.model_validate`` reads a recipe's value.

    That value is a string, a mapping or a list of either (a mixture). A source's keys may
    stand beside ``data``; they then hold for every source that doesn't say otherwise.

    Attributes:
        sources: What is read, in the recipe's order (the key ``data``).
        max_length: Where a row's sequence is cut, in tokens.
        batch_size: Sequences per forward pass.
        seed: Which rows are drawn.
        packing: Join rows into full segments of ``max_length`` tokens.
        date: The date that a chat template is told if it asks for today's.
        dtype: The forward pass's dtype; ``None`` leaves it to the run.
        sketch: How many columns of each layer's Gram matrix are measured beside its diagonal;
            ``full`` for the matrix itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[DataSource, ...] = Field(alias="data", min_length=1)
    max_length: _Positive = 512
    batch_size: Annotated[int | Literal["auto"], PlainValidator(_batch_size)] = "auto"
    seed: Annotated[int, Field(strict=True)] = 0
    packing: StrictBool = False
    date: Annotated[datetime.date, PlainValidator(_date)] = datetime.date(2025, 1, 1)
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    sketch: Annotated[int | Literal["full"], PlainValidator(_sketch)] = 0

    @model_validator(mode="before")
    @classmethod
    def _give_each_source_its_keys(cls, value: object) -> dict[str, Any]:
        whole = long_form(value)
        shared = {key: whole.pop(key) for key in _SOURCE_KEYS if key in whole}
        entries = entries_of(whole)
        whole["data"] = [
            # In a mixture, `split: test` beside `data` is meant for the data sets in it.
            {**{k: v for k, v in shared.items() if len(entries) == 1 or _takes(entry, k)}, **entry}
            for entry in entries
        ]
        return whole

    @model_validator(mode="after")
    def _writes_once(self) -> Calibration:
        if sum(source.is_self for source in self.sources) > 1:
            raise ValueError(f"data has {SELF} twice; keep one, with samples for both")
        return self


def long_form(raw: object) -> dict[str, Any]:
    """Convert a calibration's short forms to the long one; keys without a value are left out.

    Raises:
        ValueError: The value has none of the forms.
    """
    if raw is None:
        return {}
    if isinstance(raw, (str, list, tuple)):
        return {"data": raw}
    if isinstance(raw, Mapping):
        return {str(key): value for key, value in raw.items() if value is not None}
    raise ValueError(f"should be a file, a data set, a mapping or a list of these, found {raw!r}")


def entries_of(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every data source under ``data`` in its long form."""
    data = calibration.get("data")
    if data is None:
        return []
    return [
        {key: value for key, value in entry.items() if value is not None}
        if isinstance(entry, Mapping)
        else entry.model_dump()
        if isinstance(entry, DataSource)
        else {"data": entry}
        for entry in (data if isinstance(data, (list, tuple)) else [data])
    ]


def laid_over(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's calibration completed by the recipe's default one, all in long form."""
    dropped: set[str] = set()
    if "data" in own and "data" in defaults:
        dropped |= {"config", "revision"}  # the default data's own, not this model's
    if "data" in own:  # what none of its sources takes was not meant for them
        taken = {key for entry in entries_of(own) for key in _SOURCE_KEYS if _takes(entry, key)}
        dropped |= set(_SOURCE_KEYS) - taken
    return {**{key: value for key, value in defaults.items() if key not in dropped}, **own}


def overridden(calibration: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a calibration whose settings the command line's options have replaced."""
    entries = entries_of(calibration)
    if "samples" in options:  # which holds for every source of a mixture
        entries = [{k: v for k, v in entry.items() if k != "samples"} for entry in entries]
    return {**calibration, "data": entries, **options}


def calibration_faults(
    calibration: Mapping[str, Any],
    label: str,
    place: Callable[[Path], Place],
    *,
    options: bool = False,
) -> Iterator[Fault]:
    """Find what is wrong with a calibration's keys and values.

    Args:
        calibration: The calibration in its long form.
        label: The beginning of each message.
        place: Gives the place in the recipe for a path in the calibration's long form.
        options: Whether the settings came from command-line options, to name those in messages.
    """
    try:
        Calibration.model_validate(calibration)
    except ValidationError as error:
        entries = entries_of(calibration)
        for found in error.errors():
            # pydantic counts a faulty entry twice: as itself, and as one too few.
            if found["loc"] == ("data",) and found["type"] == "too_short" and entries:
                continue
            phrase, near = _phrase(found, len(entries) > 1, options)
            yield Fault("calibration", label + phrase, place(found["loc"]), nearest=near)


def _phrase(found: Any, several: bool, option: bool) -> tuple[str, str | None]:
    """Return one of pydantic's errors in our words, and for an unknown key the nearest known."""
    path = found["loc"]
    in_source = len(path) > 1 and path[0] == "data"
    where = f"data entry {path[1] + 1}: " if in_source and several else ""
    key = str(path[-1]) if path and isinstance(path[-1], str) else "data"
    if found["type"] == "extra_forbidden":
        known = ["data", *_SOURCE_KEYS]
        if not in_source:
            known += [name for name in Calibration.model_fields if name != "sources"]
        near = nearest(key, known)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
        return f"{where}unknown key {key!r} ({hint})", near
    if found["type"] == "missing" or (found["type"] == "too_short" and key == "data"):
        return f"{where}{key} is missing", None
    message = found["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if isinstance(found["input"], Mapping):  # about a source as a whole
        return f"{where}{message}", None
    name = f"--{key.replace('_', '-')}" if option else key
    return f"{where}{name} {message}, found {found['input']!r}", None


def _takes(entry: Mapping[str, Any], key: str) -> bool:
    """Return whether one of the keys of a source means something for an entry's kind of data."""
    data = entry.get("data")
    if data == SELF:
        return key not in _READING_KEYS
    return key not in _HUB_KEYS or not (isinstance(data, str) and is_local_file(data))

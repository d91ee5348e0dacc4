"""The recipe's ``calibration`` keys: what an expert is measured on, and how.

A recipe is read as mergekit reads it, but only for what the pre-pass needs: who the
experts are, and their calibration. mergekit's own keys are mergekit's business.

What a setting means does not depend on where it stands. From strongest to weakest:
a command-line option, an entry of a mixture, the model's ``calibration``, the recipe's
top-level ``calibration``, the default.
"""

from __future__ import annotations

import datetime
import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
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

from mergekit_obim.errors import RecipeError
from mergekit_obim.models.references import identity, written_in_two_ways

FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")

# Keys that mean something only for a Hugging Face data set.
_HUB_KEYS = ("config", "split", "revision")
# Keys of one data source that may also stand beside `data`, for every source in it.
_SOURCE_KEYS = (*_HUB_KEYS, "column", "images", "include_completion", "samples")

_Positive = Annotated[int, Field(strict=True, ge=1)]


def is_local_file(data: str) -> bool:
    """Whether ``data`` names a file on this machine, there or missing, rather than a data set.

    A file's suffix decides, or a form that no data set has (``./x``, ``/x``, ``~/x``), or a
    file of that name. A folder is left to the ``datasets`` library, which reads folders.
    """
    path = os.path.expanduser(data)
    return not os.path.isdir(path) and (
        path.lower().endswith(FILE_SUFFIXES)
        or os.path.isfile(path)
        or path.startswith((".", "/", "\\", "~"))
    )


def is_here(data: str) -> bool:
    """Whether ``data`` is read from this machine alone: a file, there or missing, or a folder."""
    return is_local_file(data) or os.path.isdir(os.path.expanduser(data))


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


class DataSource(BaseModel):
    """One file or data set, and how its rows are read.

    Attributes:
        data: A ``.jsonl``, ``.json``, ``.txt``, ``.csv`` or ``.parquet`` file, or the name
            of a Hugging Face data set.
        config: The data set's configuration.
        split: The data set's split; left out, ``train``, or the only one there is.
        revision: The data set's branch, tag or commit.
        column: The field that holds the input, instead of the usual ones.
        images: The field that holds a row's images, instead of ``images``.
        include_completion: Whether a row's ``completion`` follows its ``prompt``.
        samples: How many rows to draw.
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

    @model_validator(mode="after")
    def _no_hub_keys_on_a_file(self) -> DataSource:
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
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[DataSource, ...] = Field(alias="data", min_length=1)
    max_length: _Positive = 512
    batch_size: Annotated[int | Literal["auto"], PlainValidator(_batch_size)] = "auto"
    seed: Annotated[int, Field(strict=True)] = 0
    packing: StrictBool = False
    date: Annotated[datetime.date, PlainValidator(_date)] = datetime.date(2025, 1, 1)
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _give_each_source_its_keys(cls, value: object) -> dict[str, Any]:
        whole = _as_mapping(value)
        shared = {key: whole.pop(key) for key in _SOURCE_KEYS if key in whole}
        entries = _entries(whole)
        for_files = {key: value for key, value in shared.items() if key not in _HUB_KEYS}
        whole["data"] = [
            # In a mixture, `split: test` beside `data` is meant for the data sets in it.
            {**(for_files if len(entries) > 1 and _is_file_entry(entry) else shared), **entry}
            for entry in entries
        ]
        return whole


@dataclass(frozen=True)
class Expert:
    """A model of the recipe that is not the base.

    Attributes:
        model: The reference in mergekit's string form, ``base@revision+lora@revision``.
        calibration: What it is measured on.
        reference: The reference as the recipe has it, for ``ModelReference.model_validate``:
            a mapping can hold what the string can't (``override_architecture``).
    """

    model: str
    calibration: Calibration
    reference: str | Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The experts of a recipe, and all that is wrong with it as far as it is read here.

    Attributes:
        experts: Those with a calibration, in the recipe's order.
        faults: One phrase each.
        uncalibrated: Experts without calibration data, and what to do about it.
    """

    experts: list[Expert]
    faults: list[str]
    uncalibrated: dict[str, str]


def read_experts(
    config: object,
    overrides: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
) -> list[Expert]:
    """The recipe's experts and their calibration, in the recipe's order: :func:`find_experts`.

    Raises:
        RecipeError: with all that is wrong, in one line.
    """
    found = find_experts(config, overrides, only)
    if found.faults or found.uncalibrated:
        raise RecipeError("; ".join([*found.faults, *found.uncalibrated.values()]))
    return found.experts


def find_experts(
    config: object,
    overrides: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
) -> Found:
    """The recipe's experts and their calibration, in the recipe's order, and what is wrong.

    Experts are the models under ``models``, ``slices`` and ``modules`` but the base; one
    that stands in several slices is one expert.

    Args:
        config: The recipe, as ``yaml.safe_load`` gives it.
        overrides: Command-line options by their name in Python (``max_length``); ``None``
            values count as not given. ``samples`` holds for every source of a mixture.
        only: If not empty, the references of the experts to return. The others need no
            calibration.
    """
    if not isinstance(config, Mapping):
        fault = f"the recipe is {_kind(config)}, not a mapping with merge_method, base_model and "
        return Found([], [fault + "models"], {})
    faults: list[str] = []
    uncalibrated: dict[str, str] = {}
    found = _find_models(config, faults)
    if not found and not faults:
        faults.append("the recipe has no model besides the base: list the experts under models")
    known = {identity(model): model for model in found}
    only = [known.get(identity(model), model) for model in only]
    for model in only:
        if model not in found:
            faults.append(
                f"--model {model}: not an expert of this recipe{_nearest(model, found, 'known')}"
            )

    options = {key: value for key, value in (overrides or {}).items() if value is not None}
    option_faults = _check({"data": "any.txt", **options}, "", option=True)
    faults += option_faults
    try:
        defaults = _as_mapping(config.get("calibration"))
    except ValueError as error:
        faults.append(f"calibration: {error}")
        defaults = {}
    # Checked on its own, so that its faults are told once and not for every model.
    default_faults = _check({"data": "any/set", **defaults}, "calibration: ")
    faults += default_faults
    if default_faults:
        defaults = {"data": "any/set"}

    experts = []
    for model, entries in found.items():
        if only and model not in only:
            continue
        calibrations: list[Calibration] = []
        given = [entry["calibration"] for entry in entries if entry.get("calibration") is not None]
        for raw in given or [{}]:
            try:
                own = _as_mapping(raw)
            except ValueError as error:
                faults.append(f"{model}: calibration: {error}")
                continue
            # The model's own keys first, so that they are checked even if it has no data.
            own_faults = _check({"data": "any/set", **own}, f"{model}: calibration: ")
            merged = _merge(defaults, own)
            if own_faults:
                faults += own_faults
            elif not _entries(merged):
                uncalibrated[model] = _no_data(model, entries)
            elif merged_faults := _check(merged, f"{model}: calibration: "):
                faults += merged_faults
            elif not option_faults:
                calibrations.append(Calibration.model_validate(_override(merged, options)))
        if any(calibration != calibrations[0] for calibration in calibrations):
            faults.append(f"{model}: has two different calibrations; keep one of them")
        if calibrations:
            experts.append(Expert(model, calibrations[0], entries[0]["model"]))
    return Found(experts, list(dict.fromkeys(faults)), uncalibrated)


def reference_string(reference: object) -> str:
    """A model reference as ``str(mergekit.common.ModelReference)`` writes it.

    A string comes back as it is. Written again here because importing mergekit takes
    seconds, and a misspelt recipe should be told at once.

    Raises:
        ValueError: if mergekit would not read it.
    """
    if isinstance(reference, str) and reference:
        parts = reference.split("+")
        if len(parts) > 2 or any(part.count("@") > 1 for part in parts):
            raise ValueError(f"{reference!r} is not of the form MODEL[@REVISION][+LORA[@REVISION]]")
        return reference
    if isinstance(reference, Mapping) and reference.get("model"):
        paths = [reference["model"]] + ([reference["lora"]] if reference.get("lora") else [])
        return "+".join(_path_string(path) for path in paths)
    raise ValueError(f"{reference!r} is not a model: write a path or a Hugging Face name")


def _path_string(path: object) -> str:
    if isinstance(path, str):
        return path
    if isinstance(path, Mapping) and isinstance(path.get("path"), str):
        revision = path.get("revision")
        return f"{path['path']}@{revision}" if revision else str(path["path"])
    raise ValueError(f"{path!r} is not a model: write a path, or {{path: …, revision: …}}")


def _find_models(config: Mapping[str, Any], faults: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Every expert's entries in the recipe, by reference; what can't be read goes to faults."""
    top_base = _read_reference(config.get("base_model"), "base_model", faults)
    found: dict[str, list[dict[str, Any]]] = {}
    listed: set[tuple[str, str]] = set()
    named = {top_base}
    base_missing = False
    for where, entry, slice_base in _model_entries(config, faults):
        model = _read_reference(entry.get("model"), where, faults)
        in_slice = where.endswith("sources")
        base = _read_reference(slice_base, where, faults) or top_base
        base_missing |= base is None
        named |= {base, model}
        if model is None:
            if entry.get("model") is None:
                faults.append(f"{where}: an entry has no 'model'")
        elif model != base:
            if not in_slice and (where, model) in listed:
                faults.append(f"model {model} is listed twice in {where}: list each expert once")
            listed.add((where, model))
            found.setdefault(model, []).append(dict(entry))
        elif not in_slice:
            faults.append(
                f"{model}: is the base_model and stands among the experts; remove it from {where}"
            )
    if base_missing and config.get("base_model") is None:
        faults.append(
            "the recipe has no base_model: add 'base_model: …', the model that the "
            "experts were fine-tuned from"
        )
    if line := written_in_two_ways(filter(None, named)):
        faults.append(line)
    return found


def _model_entries(
    config: Mapping[str, Any], faults: list[str]
) -> Iterator[tuple[str, Mapping[str, Any], object]]:
    """Yields (where it stands, the model's entry, its slice's own base_model or None)."""
    modules = config.get("modules")
    parts: list[tuple[str, Any]] = [("", config)]
    if isinstance(modules, Mapping):
        parts += [(f"modules.{name}.", part) for name, part in modules.items()]
    elif modules is not None:
        faults.append(f"modules: should be a mapping, found {_kind(modules)}")
    for prefix, part in parts:
        for entry in _mappings(part, "models", prefix, faults):
            yield f"{prefix}models", entry, None
        for piece in _mappings(part, "slices", prefix, faults):
            for entry in _mappings(piece, "sources", f"{prefix}slices.", faults):
                yield f"{prefix}slices.sources", entry, piece.get("base_model")


def _mappings(part: object, key: str, prefix: str, faults: list[str]) -> list[Mapping[str, Any]]:
    value = part.get(key) if isinstance(part, Mapping) else None
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        return value
    faults.append(f"{prefix}{key}: should be a list of mappings, found {_kind(value)}")
    return []


def _read_reference(value: object, where: str, faults: list[str]) -> str | None:
    if value is None:
        return None
    try:
        return reference_string(value)
    except ValueError as error:
        faults.append(f"{where}: {error}")
        return None


def _as_mapping(raw: object) -> dict[str, Any]:
    """A calibration's short forms in the long one. Keys without a value count as not given."""
    if raw is None:
        return {}
    if isinstance(raw, (str, list, tuple)):
        return {"data": raw}
    if isinstance(raw, Mapping):
        return {str(key): value for key, value in raw.items() if value is not None}
    raise ValueError(f"should be a file, a data set, a mapping or a list of these, found {raw!r}")


def _entries(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The long form of everything under ``data``."""
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


def _is_file_entry(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("data"), str) and is_local_file(entry["data"])


def _merge(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The model's calibration over the recipe's default one."""
    dropped: set[str] = set()
    if "data" in own and "data" in defaults:
        dropped |= {"config", "revision"}  # the default data's own, not this model's
    if "data" in own and all(map(_is_file_entry, _entries(own))):
        dropped |= set(_HUB_KEYS)
    return {**{key: value for key, value in defaults.items() if key not in dropped}, **own}


def _override(merged: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    entries = _entries(merged)
    if "samples" in options:
        entries = [{k: v for k, v in entry.items() if k != "samples"} for entry in entries]
    return {**merged, "data": entries, **options}


def _check(calibration: Mapping[str, Any], label: str, option: bool = False) -> list[str]:
    """What is wrong with a calibration's keys and values: one phrase each."""
    try:
        Calibration.model_validate(calibration)
    except ValidationError as error:
        entries = _entries(calibration)
        return [
            label + _phrase(fault, len(entries) > 1, option)
            for fault in error.errors()
            # pydantic counts a faulty entry twice: as itself, and as one too few.
            if not (fault["loc"] == ("data",) and fault["type"] == "too_short" and entries)
        ]
    return []


def _phrase(fault: Mapping[str, Any], several: bool, option: bool) -> str:
    path = fault["loc"]
    in_source = len(path) > 1 and path[0] == "data"
    where = f"data entry {path[1] + 1}: " if in_source and several else ""
    key = str(path[-1]) if path and isinstance(path[-1], str) else "data"
    if fault["type"] == "extra_forbidden":
        known = ["data", *_SOURCE_KEYS]
        if not in_source:
            known += [name for name in Calibration.model_fields if name != "sources"]
        return f"{where}unknown key {key!r}{_nearest(key, known, 'known')}"
    if fault["type"] == "missing" or (fault["type"] == "too_short" and key == "data"):
        return f"{where}{key} is missing"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if isinstance(fault["input"], Mapping):  # about a source as a whole
        return f"{where}{message}"
    name = f"--{key.replace('_', '-')}" if option else key
    return f"{where}{name} {message}, found {fault['input']!r}"


def _nearest(word: str, known: Collection[str], label: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" ({label}: {', '.join(known)})" if known else ""


def _no_data(model: str, entries: list[dict[str, Any]]) -> str:
    for entry in entries:
        if near := difflib.get_close_matches("calibration", set(entry) - {"calibration"}, n=1):
            return f"{model}: has no calibration data (did you mean 'calibration' by {near[0]!r}?)"
    return (
        f"{model}: has no calibration data; beside '- model: {model}' write 'calibration: "
        "FILE.jsonl', or for all models a top-level 'calibration: {data: FILE.jsonl}'"
    )


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list" + (f" with {_kind(value[0])}" if value else "")
    return {str: "a text", dict: "a mapping", type(None): "empty"}.get(type(value), repr(value))

"""The settings that are tried, and the recipe that each of them makes of the user's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mergekit_obim.errors import RecipeError, told_as
from mergekit_obim.recipe import Method, Part
from mergekit_obim.recipe.document import parse
from mergekit_obim.recipe.edit import NoSuchPlaceError, added, removed, replaced
from mergekit_obim.recipe.faults import nearest
from mergekit_obim.recipe.keys import INPUTS, walk
from mergekit_obim.recipe.parameters import settings_of

DEFAULT_SPACE = Path(__file__).with_name("space.yml")
AS_WRITTEN = "the recipe as it is"
BASE = "the base"
AVERAGE = "the even average"
# What a recipe says of the statistics, not of the merge: every candidate whose method has such a
# parameter keeps it.
_KEPT = ("saliency", "criterion", "unscored", "seed")


class Trial(Protocol):
    """What suggests values: optuna's trial, or :class:`Defaults`."""

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, /, *, log: bool) -> float: ...


class Range(BaseModel):
    """A parameter's values from ``low`` to ``high``; see ``space.yml`` for the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    log: bool = False
    divided: bool = False
    per_expert: bool = False
    default: float | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not self.low <= self.high:
            raise ValueError(f"low {self.low:g} is over high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low over 0, found {self.low:g}")
        if self.default is not None and not self.low <= self.default <= self.high:
            raise ValueError(f"default {self.default:g} is outside {self.low:g} … {self.high:g}")
        return self


@dataclass(frozen=True)
class Candidate:
    """One way to merge.

    Attributes:
        label: The name for people.
        method: The merge method; None for the recipe's own, with its own parameters.
        shared: The parameters of all experts.
        own: For each expert the parameters that it has for itself; the experts go by the
            references that the recipe has.
    """

    label: str
    method: str | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings(self) -> str:
        """Return the parameters that the label does not tell, in a few words."""
        told = [
            f"{name} {_shown(value)}"
            for name, value in self.shared.items()
            if f"{name}: {value}" not in self.label
        ]
        for name in dict.fromkeys(key for values in self.own.values() for key in values):
            values = [_shown(settings[name]) for settings in self.own.values()]
            told.append(f"{name} {' '.join(values)}")
        return ", ".join(told)

    def recipe(self, text: str, methods: Mapping[str, Method]) -> str:
        """Return the user's recipe, changed to merge like this; comments and order are kept.

        Args:
            text: The user's recipe.
            methods: Every merge method that mergekit has.

        Raises:
            RecipeError: A parameter stands where it cannot be changed.
        """
        if self.method is None:
            return text
        known = methods[self.method].parameters
        parts = [part for part in walk(parse(text)[0]) if isinstance(part, Part)]
        try:
            for part in parts:
                for name, _ in settings_of(part):
                    if name not in _KEPT or name not in known or name in self.shared:
                        text = removed(text, (*part.path, "parameters", name))
            text = replaced(text, ("merge_method",), self.method)
            for name, value in self.shared.items():
                text = _with(text, (), name, value)
            for part in parts:
                if part.kind in INPUTS:
                    for name, value in self.own.get(part.model or "", {}).items():
                        text = _with(text, part.path, name, value)
        except NoSuchPlaceError as error:
            raise RecipeError(
                "the recipe: a parameter is merged in by `<<`, where it cannot be changed for one "
                "mapping alone: write it out"
            ) from error
        return text


def _with(text: str, path: tuple[str | int, ...], name: str, value: Any) -> str:
    try:
        return added(text, (*path, "parameters", name), value)
    except NoSuchPlaceError:  # there are no parameters yet
        return added(text, (*path, "parameters"), {name: value})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Entry:
    """One entry of a space: a merge method, and what its parameters may be.

    Attributes:
        label: Its name, which no other entry has.
        method: The merge method.
        parameters: Each parameter's fixed value, its choices in a list, or its range.
    """

    label: str
    method: str
    parameters: Mapping[str, Any]

    def candidate(self, trial: Trial, experts: Sequence[str]) -> Candidate:
        """Return a candidate with values that a trial suggests.

        Args:
            trial: The trial, or :class:`Defaults`.
            experts: The recipe's experts.
        """
        shared: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {}
        for name, value in self.parameters.items():
            key = f"{self.label}.{name}"
            if isinstance(value, list):
                number = trial.suggest_categorical(key, range(len(value)))
                shared[name] = value[number]
            elif not isinstance(value, Range):
                shared[name] = value
            elif value.per_expert:
                for k, expert in enumerate(experts):
                    own.setdefault(expert, {})[name] = _suggested(
                        trial, f"{key}.{k}", value, len(experts)
                    )
            else:
                shared[name] = _suggested(trial, key, value, len(experts))
        return Candidate(self.label, self.method, shared, own)


def _suggested(trial: Trial, key: str, value: Range, experts: int) -> float:
    if isinstance(trial, Defaults) and value.default is not None:
        found = float(value.default)
    else:
        found = trial.suggest_float(key, value.low, value.high, log=value.log)
    found /= experts if value.divided else 1
    # Rounded down, as densities that were rounded up could add up to more than 1.
    scale = 10.0 ** (2 - math.floor(math.log10(abs(found)))) if found else 1.0
    return math.floor(found * scale + 1e-6) / scale


class Defaults:
    """A trial that suggests an entry's defaults: the middle of a range, the first choice."""

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any:
        """Return the first choice."""
        return choices[0]

    def suggest_float(self, name: str, low: float, high: float, /, *, log: bool) -> float:
        """Return the middle."""
        return math.sqrt(low * high) if log else (low + high) / 2


def first_candidates(experts: int) -> list[Candidate]:
    """Return what is always tried: the base, the even average, and the user's own recipe."""
    arithmetic = "task_arithmetic"
    return [
        Candidate(BASE, arithmetic, {"weight": 1.0, "lambda": 0.0}),
        Candidate(AVERAGE, arithmetic, {"weight": 1 / experts}),
        Candidate(AS_WRITTEN),
    ]


def read_space(path: Path, methods: Mapping[str, Method], *, weights: bool) -> list[Entry]:
    """Read a space.

    Args:
        path: Its file; of the default one, methods that this mergekit does not have are left out.
        methods: Every merge method that mergekit has.
        weights: Whether every expert is to have a weight of its own.

    Raises:
        RecipeError: The file is not YAML, or an entry is wrong.
    """
    with told_as(RecipeError, f"{path}: not YAML", (yaml.YAMLError, UnicodeDecodeError)):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not (isinstance(found, list) and found and all(isinstance(one, dict) for one in found)):
        raise RecipeError(
            f"{path}: should be a list of entries, each with merge_method and parameters"
        )
    entries: list[Entry] = []
    for number, one in enumerate(found, 1):
        if path == DEFAULT_SPACE and one["merge_method"] not in methods:
            continue
        entry = _read_entry(f"{path}, entry {number}", one, methods)
        known = methods[entry.method].parameters
        if weights and "weight" in known and known["weight"].scope != "shared":
            asked = entry.parameters.get("weight")
            whole = asked if isinstance(asked, Range) else Range(low=0.3, high=3, log=True)
            own = whole.model_copy(update={"per_expert": True})
            entry = Entry(entry.label, entry.method, {**entry.parameters, "weight": own})
        entries.append(_told_apart(entry, entries))
    return entries


def _told_apart(entry: Entry, others: Iterable[Entry]) -> Entry:
    """Return an entry under a name that no other has: its method, and what it says in words."""
    words = [f"{name}: {value}" for name, value in entry.parameters.items() if type(value) is str]
    label = entry.method + (f" ({', '.join(words)})" if words else "")
    same = sum(other.label.partition(" #")[0] == label for other in others)
    return Entry(f"{label} #{same + 1}" if same else label, entry.method, entry.parameters)


def _read_entry(where: str, entry: Mapping[str, Any], methods: Mapping[str, Method]) -> Entry:
    unknown = [key for key in entry if key not in ("merge_method", "parameters")]
    if unknown:
        raise RecipeError(f"{where}: has {unknown[0]!r}; it may have merge_method and parameters")
    method = methods.get(str(entry.get("merge_method")))
    if method is None:
        name = str(entry.get("merge_method"))
        near = nearest(name, methods)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(methods))}"
        raise RecipeError(f"{where}: merge_method: mergekit has no {name!r}; {hint}")
    given = entry.get("parameters") or {}
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: parameters should be a mapping, found {given!r}")
    parameters = {}
    for name, value in given.items():
        if name not in method.parameters:
            near = nearest(str(name), method.parameters)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(method.parameters)}"
            raise RecipeError(f"{where}: {method.name} has no parameter {name!r}; {hint}")
        parameters[str(name)] = _read_value(f"{where}: {name}", value)
        if (
            isinstance(found := parameters[name], Range)
            and found.per_expert
            and method.parameters[name].scope == "shared"
        ):
            raise RecipeError(f"{where}: {name}: is shared by all experts: leave out per_expert")
    return Entry("", method.name, parameters)


def _read_value(where: str, value: Any) -> Any:
    if isinstance(value, list) and not value:
        raise RecipeError(f"{where}: has no choices")
    if not isinstance(value, Mapping):
        return value
    try:
        return Range.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"{where}: {key + ': ' if key else ''}{message}; a range is {{low: …, high: …}}, with "
            "log, divided, per_expert and default if you like"
        ) from error

"""What is wrong with a recipe as it is written: nothing of it is opened."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods.base import MergeMethod, ParameterScope
from mergekit.tokenizer.config import TokenizerConfig
from pydantic import BaseModel

from mergekit_obim.methods.planning import PlannedMethod, setting_faults
from mergekit_obim.methods.recipes import recipe_wide_faults

# What stands in a recipe where, as mergekit reads it; `calibration` is the pre-pass's.
_CALIBRATED = (MergeConfiguration, InputModelDefinition, InputSliceDefinition)
_BELOW: dict[type[BaseModel], dict[str, type[BaseModel]]] = {
    MergeConfiguration: {
        "models": InputModelDefinition,
        "slices": OutputSliceDefinition,
        "modules": OutputModuleDefinition,
        "tokenizer": TokenizerConfig,
    },
    OutputModuleDefinition: {"models": InputModelDefinition, "slices": OutputSliceDefinition},
    OutputSliceDefinition: {"sources": InputSliceDefinition},
}
# Less alike, and it may be a key that someone keeps for themselves.
_MISSPELT = 0.75


def unknown_keys(recipe: object) -> tuple[list[str], list[str]]:
    """Keys that neither mergekit nor the pre-pass reads.

    Args:
        recipe: As ``yaml.safe_load`` gives it.

    Returns:
        Those that are misspelt, as far as one can tell, and the others: a line each.
    """
    misspelt, others = [], []
    for where, key, known in _unknown(recipe, MergeConfiguration, ""):
        near = difflib.get_close_matches(key, known, n=1, cutoff=_MISSPELT)
        line = f"{where or 'the recipe'}: mergekit ignores the key {key!r}"
        if near:
            misspelt.append(f"{line}; did you mean {near[0]}?")
        else:
            others.append(f"{line}; there it knows {', '.join(known)}")
    return misspelt, others


def _unknown(
    part: object, kind: type[BaseModel], where: str
) -> Iterator[tuple[str, str, list[str]]]:
    if not isinstance(part, Mapping):
        return
    known = [*kind.model_fields, *(["calibration"] if kind in _CALIBRATED else [])]
    for key, value in part.items():
        place = f"{where}.{key}".lstrip(".")
        if key not in known:
            yield where, str(key), known
            continue
        below = _BELOW.get(kind, {}).get(key)
        if below is None:
            continue
        if key == "modules" and isinstance(value, Mapping):
            for name, module in value.items():
                yield from _unknown(module, below, f"{place}.{name}")
        elif isinstance(value, list):
            for number, entry in enumerate(value, 1):
                name = entry.get("model") if isinstance(entry, Mapping) else None
                yield from _unknown(entry, below, f"model {name}" if name else f"{place} {number}")
        else:
            yield from _unknown(value, below, place)


def method_of(config: MergeConfiguration) -> MergeMethod:
    """The recipe's merge method.

    Raises:
        ValueError: mergekit has none of that name; the message has the nearest.
    """
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    method = known.get(config.merge_method)
    if method is None:
        near = difflib.get_close_matches(config.merge_method, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
        raise ValueError(f"merge_method: mergekit has no {config.merge_method!r}; {hint}")
    return method


def wrong_settings(config: MergeConfiguration, method: MergeMethod) -> Iterator[str]:
    """What is wrong with a recipe's values, a line each; of parameters, only with our methods'."""
    for error in recipe_wide_faults(config):
        yield error.message
    if not isinstance(method, PlannedMethod):
        return
    for where, settings, scope in settings_in(config):
        for _, error in setting_faults(method, where, settings, scope):
            yield error.message


def settings_in(config: MergeConfiguration) -> Iterator[tuple[str, Any, ParameterScope]]:
    """Yield every place of a recipe that parameters may stand in, what does, and whose they are."""
    shared, per_expert = ParameterScope.SHARED, ParameterScope.NON_BASE
    yield "parameters", config.parameters, shared
    parts: list[Any] = [config, *(config.modules or {}).values()]
    for part in parts:
        if part is not config:
            yield "module parameters", part.parameters, shared
        sources: list[Any] = list(part.models or ())
        for piece in part.slices or ():
            yield "slice parameters", piece.parameters, shared
            sources += piece.sources
        for source in sources:
            yield f"model {source.model}", source.parameters, per_expert

"""Correcting a recipe where it is clear what was meant."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_obim.recipe import edit
from mergekit_obim.recipe.document import Document, parse
from mergekit_obim.recipe.faults import Fault, Path, Place, fold, nearest
from mergekit_obim.recipe.keys import INPUTS, Part, walk
from mergekit_obim.recipe.parameters import leaves

# How alike two names have to be for one to be taken for the other.
_SURE = 0.75
_DENSITY: Path = ("parameters", "density")
# More than one change may stand in another's way: a misspelt parameter of another method is put
# right, and is taken out as such the next time.
_TIMES = 5
# What mergekit's card writer takes for a name on the Hub: `name` or `org/name`.
_LIKE_ON_THE_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def path_warnings(document: Document) -> Iterator[Fault]:
    """Warn of folders that mergekit's card writer would take for repositories on the Hub."""
    found: dict[str, list[Place]] = {}
    for path, reference in _references(document):
        for name in (part.partition("@")[0] for part in reference.split("+")):
            if name not in document.stages and _is_taken_for_the_hubs(name):
                found.setdefault(name, []).append(document.place(*path))
    for name, (place, *others) in found.items():
        message = (
            f"mergekit's model card asks the Hub whether the folder {name} is a model there: "
            "without a network the merge ends in a traceback when all is merged; write "
            f"./{name} in the recipe, or give mergekit-yaml --no-write-model-card"
        )
        yield Fault("path", message, place, level="warning", others=tuple(others))


@dataclass(frozen=True)
class Change:
    """One change to a recipe, and the reason for it."""

    what: str
    why: str


def change_lines(changes: Iterable[Change]) -> list[str]:
    """Return one line for each reason, with all the changes that were made for it."""
    grouped: dict[str, dict[str, None]] = {}
    for change in changes:
        grouped.setdefault(change.why, {})[change.what] = None
    return [f"{'; '.join(whats)}: {why}" for why, whats in grouped.items()]


def mend(text: str, find: Callable[[Document], Iterable[Fault]]) -> tuple[str, list[Change]]:
    """Correct what can be corrected without reading the models.

    Args:
        text: The recipe.
        find: Finds the faults of a recipe.

    Returns:
        The new text, and the changes.
    """
    changes: list[Change] = []
    for _ in range(_TIMES):
        before = text
        [document] = parse(text)
        for fault in fold(find(document)):
            for place in (fault.place, *fault.others):
                try:
                    mended = _mended(text, document, fault, place.path)
                except edit.NoSuchPlaceError:
                    continue  # it is written elsewhere, as by YAML's `<<`, or has just changed
                if mended is not None:
                    text = mended[0]
                    changes.append(mended[1])
        if text == before:
            break
    return text, changes


def _mended(text: str, document: Document, fault: Fault, path: Path) -> tuple[str, Change] | None:
    """Return the text with one fault corrected at one place; None if only the user can tell how."""
    where, near = str(Place(path)), fault.nearest
    if not path:
        return None
    written = _value(document, path) if fault.kind == "method" else path[-1]
    if near and nearest(str(written), [near], _SURE) is None:
        return None  # it may well be something else
    match fault.kind:
        case "key" | "parameter" | "calibration" if near:
            return edit.renamed(text, path, near), Change(f"{where} → {near}", "it was misspelt")
        case "method" if near:
            return edit.replaced(text, path, near), Change(f"{where}: {near}", "it was misspelt")
        case "parameter":
            why = "no merge method has a parameter of that name"
            return edit.removed(text, path), Change(f"{where} taken out", why)
        case "foreign":
            why = "a parameter of other merge methods changes nothing here"
            return edit.removed(text, path), Change(f"{where} taken out", why)
        case "shares":
            why = (
                "a share of a sum would shrink what the expert's elements are here, see "
                "docs/recipes.md"
            )
            what = f"{where}: {edit.flow(_value(document, path))} taken out"
            return edit.removed(text, path), Change(what, why)
        case "misplaced" if near:
            new = (*path[:-1], "parameters", near)
            text = _set(edit.removed(text, path), new, _value(document, path))
            why = "mergekit reads no parameters where it stood"
            return text, Change(f"{where} moved to {Place(new)}", why)
        case "scope":
            new = ("parameters", path[-1])
            text = _set(edit.removed(text, path), new, _value(document, path))
            return text, Change(f"{where} moved to {Place(new)}", "it is shared by all models")
        case "path":
            old = _value(document, path)
            why = "without ./ mergekit's card writer takes the folder for a name on the Hub"
            what = f"{where}: {old} → {_dotted(old)}"
            return edit.replaced(text, path, _dotted(old)), Change(what, why)
    return None


def scale_densities(text: str, total: float) -> tuple[str, list[Change]]:
    """Lower every density in proportion, so that no tensor's sum is over 1.

    Args:
        text: The recipe.
        total: The largest sum of one tensor's densities.

    Returns:
        The new text, and the changes.
    """
    changes: list[Change] = []
    why = f"the densities summed to {total:.4g}, and experts share each tensor's positions"
    [document] = parse(text)
    inputs = []
    for part in walk(document):
        if not isinstance(part, Part) or part.is_base:
            continue
        inputs += [part] if part.kind in INPUTS else []
        for leaf, value in leaves(_density(part), (*part.path, *_DENSITY)):
            if isinstance(value, int | float | str):
                scaled = _floor(float(value) / total)
                text = edit.replaced(text, leaf, scaled)
                changes.append(Change(f"{Place(leaf)}: {value} → {scaled}", why))
    # What has no density has 1/K, which counts too.
    shared = (document.content.get("parameters") or {}).get("density")
    if not _is_whole(shared) and not all(_is_whole(_density(part)) for part in inputs):
        default = _floor(1 / len({part.model for part in inputs}) / total)
        if isinstance(shared, list):
            text = edit.added(text, (*_DENSITY, len(shared)), {"value": default})
        elif shared is None:
            text = _set(text, _DENSITY, default)
        else:
            lowered = _value(parse(text)[0], _DENSITY)
            text = _set(edit.removed(text, _DENSITY), _DENSITY, [lowered, {"value": default}])
        what = f"{Place(_DENSITY)}: {default} where there was none, which means 1/K"
        changes.append(Change(what, why))
    return text, changes


def _density(part: Part) -> Any:
    return (part.content.get("parameters") or {}).get("density")


def _is_whole(setting: Any) -> bool:
    """Whether a setting has a value for every tensor."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list) and any(isinstance(one, Mapping) for one in setting):
        return any(one.get("filter") in (None, "*") for one in setting)
    return setting is not None


def _floor(density: float) -> float:
    """Rounded down, so that the sum stays at 1."""
    return math.floor(density * 1e4 + 1e-6) / 1e4  # 0.6 / 1.5 is 0.39999999999999997


def _set(text: str, path: Path, value: Any) -> str:
    """Give a parameter a value where it has none yet; its `parameters` are made if need be."""
    [document] = parse(text)
    if document.known(path) == path:
        return text
    parameters = path[:-1]
    if document.known(parameters) == parameters:
        return edit.added(text, path, value)
    return edit.added(text, parameters, {path[-1]: value})


def _value(document: Document, path: Path) -> Any:
    value: Any = document.content
    for step in path:
        value = value[step]
    return value


def _references(document: Document) -> Iterator[tuple[Path, str]]:
    """Every text that names a model, and where it stands."""
    for part in walk(document):
        if not isinstance(part, Part):
            continue
        for key in ("base_model", "model", "tokenizer_source", "source"):
            if key not in part.content:
                continue
            # As the source of a tokenizer, these two words name no model.
            is_word = part.content[key] in ("union", "base")
            if not (is_word and part.kind in ("recipe", "tokenizer") and "source" in key):
                yield from _texts(part.content[key], (*part.path, key))


def _texts(reference: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(reference, str):
        yield path, reference
    elif isinstance(reference, Mapping):
        for key in ("model", "lora", "path"):
            yield from _texts(reference.get(key), (*path, key))


def _is_taken_for_the_hubs(name: str) -> bool:
    return bool(_LIKE_ON_THE_HUB.fullmatch(name)) and os.path.exists(name)


def _dotted(reference: str) -> str:
    """A reference with ./ before what is taken for a name on the Hub."""
    return "+".join(
        f"./{part}" if _is_taken_for_the_hubs(part.partition("@")[0]) else part
        for part in reference.split("+")
    )

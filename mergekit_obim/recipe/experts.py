"""The experts of a recipe, and what each of them is measured on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mergekit_obim.recipe.calibration import (
    USUAL_SKETCH,
    Calibration,
    calibration_faults,
    entries_of,
    laid_over,
    long_form,
    overridden,
)
from mergekit_obim.recipe.document import Document, steps_of
from mergekit_obim.recipe.faults import Fault, Path, Place, nearest
from mergekit_obim.recipe.keys import Part, walk
from mergekit_obim.recipe.references import identity

# Stands for the data where the other settings are checked by themselves.
_ANY_DATA = {"data": "any/set"}


@dataclass(frozen=True)
class Expert:
    """An expert of the recipe that is to be measured.

    Attributes:
        model: The reference in mergekit's string form, ``base@revision+lora@revision``.
        calibration: The data that the expert is measured on, and how.
        reference: The reference as the recipe has it, for ``ModelReference.model_validate``:
            a mapping can hold what the string can't (``override_architecture``).
    """

    model: str
    calibration: Calibration
    reference: str | Mapping[str, Any]


@dataclass(frozen=True)
class Experts:
    """The experts of a recipe, and what is wrong with their calibration.

    Attributes:
        measured: The experts with a calibration, in the recipe's order.
        faults: What is wrong with calibration keys, options and the selection of experts.
        uncalibrated: Expert -> the fault that it has no calibration data.
        guard: The rows on which a merged model should stay as the base is, for ``obim-tune``.
    """

    measured: list[Expert]
    faults: list[Fault]
    uncalibrated: dict[str, Fault]
    guard: Calibration | None = None


def find_experts(
    document: Document,
    overrides: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
) -> Experts:
    """Find the recipe's experts and their calibration, in the recipe's order.

    Experts are the models under ``models``, ``slices`` and ``modules``, except the base and what
    another recipe of the file makes. A model in several slices is one expert.

    Args:
        document: The recipe; ``recipe_faults`` reports what is wrong with its other keys.
        overrides: Command-line options by their name in Python (``max_length``); ``None``
            values count as not given. ``samples`` holds for every source of a mixture.
        only: If not empty, the references of the experts to return. The others need no
            calibration.
    """
    [found] = find_in_all([document], overrides, only)
    return found


def find_in_all(
    documents: Sequence[Document],
    overrides: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
) -> list[Experts]:
    """Find the experts of every recipe of a file, as :func:`find_experts` does those of one.

    Returns:
        The experts of each recipe. An expert of several recipes is listed with the first.
    """
    options = {key: value for key, value in (overrides or {}).items() if value is not None}
    given = {"data": "any.txt", **options}
    wrong_options = list(calibration_faults(given, "", lambda path: Place(), options=True))
    parts = [_expert_parts(document) for document in documents]
    known = [model for found in parts for model in found]
    # However an expert is written: `./math` and `math` are one.
    spelt = {identity(model): model for model in known}
    only = [spelt.get(identity(model), model) for model in only]
    unknown = [_unknown(model, known) for model in only if model not in known]
    # One file serves all recipes, so what one of them reads is measured for all.
    usual = {"sketch": USUAL_SKETCH} if any(map(_reads_sketches, documents)) else {}
    seen: dict[str, Calibration] = {}
    every: list[Experts] = []
    for document, found in zip(documents, parts, strict=True):
        wanted = {model: own for model, own in found.items() if not only or model in only}
        experts = _read_experts(document, wanted, usual, {} if wrong_options else options)
        for expert in list(experts.measured):
            if seen.setdefault(expert.model, expert.calibration) != expert.calibration:
                experts.faults.append(_two_calibrations(document, found[expert.model][0]))
            elif any(expert.model == other.model for one in every for other in one.measured):
                experts.measured.remove(expert)
        every.append(experts)
    every[0].faults[:0] = [*wrong_options, *unknown]
    return every


def _expert_parts(document: Document) -> dict[str, list[Part]]:
    """Return expert -> the parts of the recipe that name it."""
    found: dict[str, list[Part]] = {}
    for part in walk(document):
        if isinstance(part, Part) and part.model and not (part.is_base or part.is_stage):
            found.setdefault(part.model, []).append(part)
    return found


def _reads_sketches(document: Document) -> bool:
    """Return whether the recipe's merge method reads sketches of Gram matrices."""
    parameters = document.content.get("parameters")
    statistics = parameters.get("statistics") if isinstance(parameters, Mapping) else None
    return document.content.get("merge_method") == "regmean" and statistics != "none"


def _read_experts(
    document: Document,
    found: Mapping[str, list[Part]],
    usual: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Experts:
    faults = list(_unused(document))
    defaults, wrong_defaults = _read(document, (), document.content.get("calibration"), "")
    # Checked on its own, so that its faults are reported once and not for every model.
    faults += wrong_defaults
    if wrong_defaults:
        defaults = {} if defaults and not entries_of(defaults) else _ANY_DATA

    measured: list[Expert] = []
    uncalibrated: dict[str, Fault] = {}
    for model, parts in found.items():
        calibrations: list[Calibration] = []
        calibrated = [part for part in parts if part.content.get("calibration") is not None]
        for part in calibrated or parts[:1]:
            raw, label = part.content.get("calibration"), f"model {model}: "
            # The model's own keys first, so that they are checked even if it has no data.
            own, wrong = _read(document, part.path, raw, label)
            whole = {**usual, **laid_over(defaults, own)}
            if not wrong and entries_of(whole):
                wrong = list(_faults(document, part.path, raw, whole, label))
            elif not wrong:
                # A misspelt `calibration` key is reported as such.
                if not nearest("calibration", set(map(str, part.content)) - {"calibration"}):
                    uncalibrated[model] = _no_data(document, part)
                continue
            faults += wrong
            if not wrong:
                calibrations.append(Calibration.model_validate(overridden(whole, options)))
        if any(calibration != calibrations[0] for calibration in calibrations):
            faults.append(_two_calibrations(document, calibrated[1]))
        if calibrations:
            measured.append(Expert(model, calibrations[0], parts[0].content["model"]))
    guard = None
    if document.content.get("guard") is not None:
        guard, wrong = _read_guard(document, {} if wrong_defaults else defaults, options)
        faults += wrong
    return Experts(measured, faults, uncalibrated, guard)


def _read_guard(
    document: Document, defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Calibration | None, list[Fault]]:
    """Read the calibration under ``guard``; the recipe's default one holds but for the data."""
    raw = document.content["guard"]
    own, wrong = _read(document, (), raw, "", "guard")
    whole = laid_over(defaults, own) if "data" in own else own
    if not wrong:
        wrong = list(_faults(document, (), raw, whole, "", "guard"))
    if wrong:
        return None, wrong
    return Calibration.model_validate(overridden(whole, options)), []


def _unused(document: Document) -> Iterator[Fault]:
    for part in walk(document):
        if isinstance(part, Part) and (part.is_base or part.is_stage):
            if part.content.get("calibration") is None:
                continue
            what = "is the base" if part.is_base else "is made by another recipe of this file"
            place = document.place(*part.path, "calibration")
            message = f"{part.label}: {what}, and is not measured: its calibration is not used"
            yield Fault("calibration", message, place, level="warning")


def _unknown(model: str, known: Sequence[str]) -> Fault:
    near = nearest(model, known)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
    return Fault("calibration", f"--model {model}: not an expert of this recipe ({hint})")


def _two_calibrations(document: Document, part: Part) -> Fault:
    message = f"{part.label}: has two different calibrations; keep one of them"
    return Fault("calibration", message, document.place(*part.path, "calibration"))


def _read(
    document: Document, path: Path, raw: object, label: str, key: str = "calibration"
) -> tuple[dict[str, Any], list[Fault]]:
    """A calibration in its long form, and what is wrong with it but for data that it lacks."""
    try:
        own = long_form(raw)
    except ValueError as error:
        place = document.place(*path, key)
        return {}, [Fault("calibration", f"{label}{key}: {error}", place)]
    return own, list(_faults(document, path, raw, {**_ANY_DATA, **own}, label, key))


def _faults(
    document: Document,
    path: Path,
    raw: object,
    whole: Mapping[str, Any],
    label: str,
    key: str = "calibration",
) -> Iterator[Fault]:
    place = partial(_place, document, (*path, key), raw)
    yield from calibration_faults(whole, f"{label}{key}: ", place)


def _place(document: Document, path: Path, raw: Any, inside: Path) -> Place:
    """Where a path of the long form stands in what was written, which may leave out steps."""
    for step in inside:
        if step in steps_of(raw):
            raw, path = steps_of(raw)[step], (*path, step)
    return document.place(*path)


def _no_data(document: Document, part: Part) -> Fault:
    message = (
        f"{part.label}: has no calibration data; beside '- model: {part.model}' write "
        "'calibration: FILE.jsonl', or for all models a top-level 'calibration: {data: "
        "FILE.jsonl}'"
    )
    return Fault("calibration", message, document.place(*part.path))

"""Reading a recipe: the one walk over it, for the pre-pass, ``--check`` and the merge.

``document``    the recipe as it is written, with the line of each key
``faults``      what is wrong with a recipe or its models, as values
``keys``        the keys that a recipe may have, and where
``calibration`` the ``calibration`` keys: what an expert is measured on
``experts``     the experts that are to be measured
``parameters``  the parameters of merge methods
``references``  references that are written differently and mean one model
``fix``         ``--fix``: correcting a recipe; ``edit`` changes the text and keeps its comments

Nothing here imports torch or mergekit, so that errors in a recipe are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergekit_obim.recipe.document import Document
from mergekit_obim.recipe.faults import Fault, Place, nearest
from mergekit_obim.recipe.keys import INPUTS, Part, unknown_keys, walk
from mergekit_obim.recipe.parameters import (
    Method,
    parameter_faults,
    share_warnings,
    stage_warnings,
)
from mergekit_obim.recipe.references import written_in_two_ways

# What mergekit's `dtype_from_name` knows of floating-point numbers.
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def recipe_faults(
    document: Document, methods: Mapping[str, Method] | None = None
) -> Iterator[Fault]:
    """Find everything that is wrong with a recipe as it is written, except its calibration.

    Args:
        document: The recipe.
        methods: Every merge method that mergekit has, by name; None to check neither the
            parameters nor whether the method exists.
    """
    for place in document.twice:
        message = f"{place}: stands twice in the same mapping, and YAML keeps the last; remove one"
        yield Fault("key", message, place, level="warning")
    walked = list(walk(document))
    unreadable = [one for one in walked if isinstance(one, Fault)]
    parts = [one for one in walked if isinstance(one, Part)]
    yield from unreadable
    yield from _structure(document, parts, readable=not unreadable)
    yield from _dtypes(document)
    name = document.content.get("merge_method")
    method = (methods or {}).get(str(name))
    if methods is not None and name is not None and method is None:
        near = nearest(str(name), methods)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(methods))}"
        message = f"merge_method: mergekit has no {name!r}; {hint}"
        yield Fault("method", message, document.place("merge_method"), nearest=near)
    if method is None or not method.ours:
        for part in parts:
            yield from unknown_keys(document, part)
        return
    foreign = {p for other in (methods or {}).values() for p in other.parameters}
    foreign -= method.parameters.keys()
    ignored: list[Fault] = []
    for part in parts:
        found = [*unknown_keys(document, part, method.parameters, foreign)]
        found += parameter_faults(document, part, method, foreign)
        ignored += (fault for fault in found if fault.kind == "foreign")
        yield from (fault for fault in found if fault.kind != "foreign")
    if ignored:
        names = ", ".join(dict.fromkeys(fault.message for fault in ignored))
        first, *others = (fault.place for fault in ignored)
        message = f"{method.name} ignores parameters of other merge methods: {names}"
        yield Fault("foreign", message, first, level="warning", others=tuple(others))
    yield from share_warnings(document, parts, method)
    if "saliency" in method.parameters:
        yield from stage_warnings(document, parts)


def _structure(document: Document, parts: list[Part], *, readable: bool) -> Iterator[Fault]:
    """Find what makes planning impossible: no base, no expert, or a model listed twice."""
    inputs = [part for part in parts if part.kind in INPUTS]
    if document.content.get("base_model") is None and any(part.base is None for part in inputs):
        yield Fault(
            "structure",
            "the recipe has no base_model: add 'base_model: …', the model that the experts were "
            "fine-tuned from",
        )
    if readable and not any(part.model != part.base for part in inputs):
        yield Fault(
            "structure", "the recipe has no model besides the base: list the experts under models"
        )
    named = {str(model) for part in inputs for model in (part.model, part.base) if model}
    if line := written_in_two_ways(named):
        yield Fault("structure", line)
    seen: set[tuple[object, ...]] = set()
    for part in inputs:
        key = *part.path[:-1], part.model
        if key in seen:
            message = f"{part.label}: is listed twice: list each expert once"
            yield Fault("structure", message, document.place(*part.path))
        seen.add(key)


def _dtypes(document: Document) -> Iterator[Fault]:
    for key in ("dtype", "out_dtype"):
        name = document.content.get(key)
        if name and str(name).removeprefix("torch.") not in _DTYPES:
            message = (
                f"{key}: mergekit cannot merge to {name!r}: write float32, bfloat16, float16 or "
                "float64"
            )
            yield Fault("plan", message, document.place(key))


__all__ = ["Document", "Fault", "Method", "Part", "Place", "recipe_faults"]

"""The parameters of a recipe: whether its merge method has them, and takes their values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergekit_obim.errors import RecipeError
from mergekit_obim.recipe.document import Document
from mergekit_obim.recipe.faults import Fault, Path, Place, nearest
from mergekit_obim.recipe.keys import INPUTS, Part, unknown_keys

# A weight up to this is taken for a share of a sum, where there are no others but its like.
_SHARE = 0.5


class Parameter(Protocol):
    """The part of mergekit's ``ParameterSpec`` that the reader of recipes needs."""

    @property
    def name(self) -> str: ...

    @property
    def scope(self) -> str: ...

    def validate(self, value: Any, /) -> Any: ...


@dataclass(frozen=True)
class Method:
    """A merge method as far as recipes concern it.

    Attributes:
        name: The name that recipes give under ``merge_method``.
        parameters: The parameters that a recipe may set, by name.
        ours: Whether its parameters are checked here; mergekit's own methods check theirs.
        copies: Says whether, with these parameters of the recipe, elements are copied from single
            experts, so that a weight scales them and is not a share of a sum.
    """

    name: str
    parameters: Mapping[str, Parameter]
    ours: bool
    copies: Callable[[Mapping[str, Any]], bool] = lambda parameters: False


def parameter_faults(
    document: Document, part: Part, method: Method, foreign: Collection[str]
) -> Iterator[Fault]:
    """Find what is wrong with the parameters in one part of a recipe.

    Args:
        document: The recipe.
        part: The part.
        method: The recipe's merge method, one of ours.
        foreign: The parameters that only other methods have.

    Yields:
        Errors; and for each parameter of other methods, which is ignored, a warning that has only
        its name as the message.
    """
    for name, setting in settings_of(part):
        path = (*part.path, "parameters", name)
        if name in foreign:
            yield Fault("foreign", name, document.place(*path), level="warning")
        elif name not in method.parameters:
            near = nearest(name, [*method.parameters, *sorted(foreign)])
            known = ", ".join(sorted(method.parameters))
            hint = f"did you mean {near}?" if near else f"it has {known}"
            message = f"{part.parameters_label}: {method.name} has no parameter {name!r}; {hint}"
            yield Fault("parameter", message, document.place(*path), nearest=near)
        elif part.kind in INPUTS and method.parameters[name].scope == "shared":
            # The other way round is fine: what stands under `parameters` holds for every expert.
            message = (
                f"{part.label}: parameter {name} is shared by all models: move it to the recipe's "
                "own `parameters`"
            )
            yield Fault("scope", message, document.place(*path))
        elif not part.is_base:  # whose values nobody reads
            yield from _wrong_values(document, part, method.parameters[name], setting, path)


def settings_of(part: Part) -> Iterator[tuple[str, Any]]:
    """Yield the name and the setting of each parameter in one part of a recipe."""
    settings = part.content.get("parameters")
    if isinstance(settings, Mapping):
        for name, setting in settings.items():
            yield str(name), setting


def _wrong_values(
    document: Document, part: Part, parameter: Parameter, setting: Any, path: Path
) -> Iterator[Fault]:
    for leaf, value in leaves(setting, path):
        if isinstance(value, Mapping):
            yield from unknown_keys(document, Part("condition", leaf, value, part.base, part.model))
            continue
        try:
            parameter.validate(value)
        except RecipeError as error:
            message = f"{part.parameters_label}: {error.message}"
            yield Fault("value", message, document.place(*leaf))


def leaves(setting: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield path and value for every value in a setting, a gradient, or a filter's branches.

    A branch itself, a mapping with ``filter`` and ``value``, comes before what is in it.
    """
    if isinstance(setting, list):
        for number, item in enumerate(setting):
            yield from leaves(item, (*path, number))
    elif isinstance(setting, Mapping):
        yield path, setting
        if setting.get("value") is not None:
            yield from leaves(setting["value"], (*path, "value"))
    elif setting is not None:
        yield path, setting


def stage_warnings(document: Document, parts: Sequence[Part]) -> Iterator[Fault]:
    """Warn that a model which another recipe of the file makes has no saliency yet."""
    for part in parts:
        if part.is_stage and not part.is_base and "saliency" not in dict(settings_of(part)):
            message = (
                f"{part.label}: is made by another recipe of this file, so it cannot be measured "
                "beforehand: once its experts are, `obim-saliency --combine A.safetensors "
                "B.safetensors -o C.safetensors` makes its statistics of theirs; then set "
                "`saliency: C.safetensors` below it"
            )
            yield Fault("stage", message, document.place(*part.path), level="warning")


def share_warnings(document: Document, parts: Sequence[Part], method: Method) -> Iterator[Fault]:
    """Warn of weights that were a share of a sum, under a method that copies elements.

    A recipe of Task Arithmetic or TIES gives its experts weights that add up to about 1. Where
    each element is one expert's, such a weight only makes the expert less than it is. Weights of
    0 or below are left alone: they say something on purpose.
    """
    recipe = parts[0].content.get("parameters")
    if not method.copies(recipe if isinstance(recipe, Mapping) else {}):
        return
    found: dict[Path, Any] = {}
    places: list[Place] = []
    for part in parts:
        for name, setting in settings_of(part):
            if name == "weight" and not part.is_base:
                path = (*part.path, "parameters", name)
                places.append(document.place(*path))
                found |= {p: v for p, v in leaves(setting, path) if not isinstance(v, Mapping)}
    weights = [value for value in found.values() if isinstance(value, int | float)]
    if len(weights) == len(found) and weights and 0 < min(weights) <= _SHARE:
        values = ", ".join(f"{weight:g}" for weight in dict.fromkeys(weights))
        message = (
            f"the weights ({values}) look like shares of a sum, which {method.name} does not make: "
            "an element is one expert's, and becomes base + weight · δ; leave weight out to take "
            "the expert's own element"
        )
        yield Fault("shares", message, places[0], level="warning", others=tuple(places[1:]))

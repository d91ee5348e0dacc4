"""What is wrong with a recipe, as values that say where it is.

A reader of recipes yields faults and goes on; its caller raises one error that tells them all
(:func:`raise_errors`), or lists them. So everybody who reads a recipe says the same words.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mergekit_obim.errors import ObimError, RecipeError

Path = tuple[str | int, ...]

Kind = Literal[
    "shape",  # a list where a mapping should be, and the like
    "reference",  # what should name a model and does not
    "structure",  # no base, no expert, an expert twice: nothing can be planned
    "method",  # a merge method that mergekit does not have
    "key",  # a key that nobody reads
    "misplaced",  # a parameter among the recipe's keys
    "parameter",  # a parameter that no merge method has
    "foreign",  # a parameter of another merge method
    "scope",  # a parameter for all models under one of them
    "value",  # a parameter's value
    "shares",  # weights that mean something else in the recipe's method
    "stage",  # a model that another recipe of the file makes
    "path",  # a folder that is taken for a repository on the Hub
    "calibration",  # the calibration keys of the pre-pass
    "densities",  # of one tensor, over 1
    "tensor",  # whatever else is wrong with one tensor
    "saliency",  # a saliency file
    "model",  # a model that cannot be merged
    "plan",  # what mergekit itself refuses
]

Level = Literal["error", "check_error", "warning"]


@dataclass(frozen=True)
class Place:
    """Where something stands in a recipe.

    Attributes:
        path: The keys and list positions that lead there.
        line: The line in the YAML file, from 1; None if it is not known.
    """

    path: Path = ()
    line: int | None = None

    def __str__(self) -> str:
        """The path as a reader would write it.

        >>> str(Place(("models", 1, "parameters", "density")))
        'models[1].parameters.density'
        """
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return "".join(parts).removeprefix(".")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong or unusual about a recipe or its models.

    Attributes:
        kind: What sort of thing; `--fix` goes by it.
        message: One line: the model, what was found, and the way out.
        place: Where it stands.
        level: An ``error`` ends every command before its work begins, a ``warning`` ends none. A
            ``check_error`` counts as an error in ``--check``, as the merge would go against its
            purpose, but the pre-pass and the merge only warn of it: the user may know better.
        others: Where else it stands, if one line tells of several places.
        nearest: What was probably meant, of a misspelt name.
        tensor: The tensor whose plan showed it, if one did; the message names it too.
        amount: Of densities, what they sum to.
        error: The kind of error that it is raised as.
        recipe: Which recipe of the file it is of, where there are several.
    """

    kind: Kind
    message: str
    place: Place = Place()
    level: Level = "error"
    others: tuple[Place, ...] = ()
    nearest: str | None = None
    tensor: str | None = None
    amount: float | None = None
    error: type[ObimError] = RecipeError
    recipe: str = ""

    def __str__(self) -> str:
        """The message, after the recipe's label and the line of the file where there are such."""
        line = f"line {self.place.line}" if self.place.line else ""
        return ": ".join(filter(None, (self.recipe, line, self.message)))


def fault_of(error: ObimError, kind: Kind, tensor: str | None = None) -> Fault:
    """An error that something else raised, as a value."""
    return Fault(kind, error.message, tensor=tensor, error=type(error))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one, if any is like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def labelled(faults: Iterable[Fault], label: str) -> list[Fault]:
    """The faults of one recipe of several, which each of them will name."""
    return [replace(fault, recipe=label) for fault in fold(faults)]


def setting_path(path: Path) -> Path:
    """Of a path into a parameter's value, the part that leads to the parameter.

    >>> setting_path(("models", 1, "parameters", "density", 0, "value"))
    ('models', 1, 'parameters', 'density')
    """
    return path[: path.index("parameters") + 2]


def fold(faults: Iterable[Fault]) -> list[Fault]:
    """Say once what was found in many tensors, in the order in which it was found.

    The same fault of many tensors becomes that of the first; densities that sum to over 1 become
    those that sum to most. Each says how many more tensors there are.
    """
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        what = fault.message.replace(fault.tensor, "") if fault.tensor else fault.message
        what = fault.kind if fault.kind == "densities" else what
        groups.setdefault((fault.recipe, what), []).append(fault)
    return [_folded(group) for group in groups.values()]


def _folded(group: list[Fault]) -> Fault:
    worst = max(group, key=lambda fault: fault.amount or 0)  # the first, if all are alike
    more = len({fault.tensor for fault in group}) - 1
    message = f"{worst.message} (and {more} more tensors)" if more else worst.message
    return replace(worst, message=message)


def errors_of(faults: Iterable[Fault]) -> list[Fault]:
    """The faults that stop a command."""
    return [fault for fault in faults if fault.level == "error"]


def warnings_of(faults: Iterable[Fault]) -> list[Fault]:
    """The faults that are only worth a word."""
    return [fault for fault in faults if fault.level == "warning"]


def raise_errors(faults: Iterable[Fault]) -> None:
    """Raise one error that tells every fault of level ``error``; do nothing without one.

    Raises:
        ObimError: A single fault as it is; several with their number, and then a line each. It is
            of the faults' own kind where they have one in common, else a RecipeError.
    """
    errors = fold(errors_of(faults))
    if len(errors) == 1:
        raise errors[0].error(str(errors[0]))
    if errors:
        kinds = {fault.error for fault in errors}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        lines = [f"  {fault}" for fault in errors]
        raise kind("\n".join([f"the recipe has {len(errors)} errors:", *lines]))

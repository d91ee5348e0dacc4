"""What is wrong with a recipe or its models, as values.

What finds a fault yields it and goes on; the caller raises one error that lists all of them
(:func:`raise_errors`), or prints them. So every command describes a fault in the same words.
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
    "reference",  # a value that should name a model, but does not
    "structure",  # no base, no expert, an expert twice: nothing can be planned
    "method",  # a merge method that mergekit does not have
    "key",  # an unknown key
    "misplaced",  # a parameter among the recipe's keys
    "parameter",  # a parameter that no merge method has
    "foreign",  # a parameter of another merge method
    "scope",  # a parameter of the whole recipe under one model
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
    """A place in a recipe.

    Attributes:
        path: The keys and list indices that lead to it.
        line: The line in the YAML file, from 1; None if it is unknown.
    """

    path: Path = ()
    line: int | None = None

    def __str__(self) -> str:
        """Return the path as people write it.

        >>> str(Place(("models", 1, "parameters", "density")))
        'models[1].parameters.density'
        """
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return "".join(parts).removeprefix(".")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong or unusual about a recipe or its models.

    Attributes:
        kind: The kind of fault, by which `--fix` chooses the correction.
        message: One line that names the model, says what was found, and what to do.
        place: The place in the recipe, if it has one.
        level: An ``error`` ends every command before its work begins, a ``warning`` ends none. A
            ``check_error`` counts as an error in ``--check``, as the merge would go against its
            purpose, but the pre-pass and the merge only warn of it: the user may know better.
        others: Further places, if one message is about several.
        nearest: The name that was probably meant instead of a misspelt one.
        tensor: The tensor that it was found in, if any; the message names it too.
        amount: The sum of the densities, if that is the fault.
        error: The class that it is raised as.
        recipe: The recipe's name, if the file has several.
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
        """Return the message, after the recipe's name and the line as far as they are known."""
        line = f"line {self.place.line}" if self.place.line else ""
        return ": ".join(filter(None, (self.recipe, line, self.message)))


def fault_of(error: ObimError, kind: Kind, tensor: str | None = None) -> Fault:
    """Convert an error that was raised to a fault."""
    return Fault(kind, error.message, tensor=tensor, error=type(error))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is most similar to this one; None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def labelled(faults: Iterable[Fault], label: str) -> list[Fault]:
    """Return the faults of one recipe of several, with its name in each."""
    return [replace(fault, recipe=label) for fault in fold(faults)]


def setting_path(path: Path) -> Path:
    """Shorten a path into a parameter's value to the path of the parameter.

    >>> setting_path(("models", 1, "parameters", "density", 0, "value"))
    ('models', 1, 'parameters', 'density')
    """
    return path[: path.index("parameters") + 2]


def fold(faults: Iterable[Fault]) -> list[Fault]:
    """Combine the same fault of many tensors into one, in the order of their first occurrence.

    The first tensor's fault is kept, or for densities that of the tensor with the largest sum. Its
    message says how many more tensors there are.
    """
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        what = fault.message.replace(fault.tensor, "") if fault.tensor else fault.message
        what = fault.kind if fault.kind == "densities" else what
        groups.setdefault((fault.recipe, what), []).append(fault)
    folded = []
    for group in groups.values():
        worst = max(group, key=lambda fault: fault.amount or 0)  # the first, if all are alike
        more = len({fault.tensor for fault in group}) - 1
        told = f"{worst.message} (and {more} more tensors)" if more else worst.message
        folded.append(replace(worst, message=told))
    return folded


def errors_of(faults: Iterable[Fault]) -> list[Fault]:
    """Return the faults of level ``error``."""
    return [fault for fault in faults if fault.level == "error"]


def warnings_of(faults: Iterable[Fault]) -> list[Fault]:
    """Return the faults of level ``warning``."""
    return [fault for fault in faults if fault.level == "warning"]


def raise_errors(faults: Iterable[Fault]) -> None:
    """Raise one error that lists every fault of level ``error``; do nothing without any.

    Raises:
        ObimError: There are errors. The message of a single one is its own; several are counted
            and listed on a line each. The class is that of the faults if all have the same, and
            otherwise RecipeError.
    """
    errors = fold(errors_of(faults))
    if len(errors) == 1:
        raise errors[0].error(str(errors[0]))
    if errors:
        kinds = {fault.error for fault in errors}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        lines = [f"  {fault}" for fault in errors]
        raise kind("\n".join([f"the recipe has {len(errors)} errors:", *lines]))

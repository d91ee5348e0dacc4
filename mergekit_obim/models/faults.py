"""Making faults of what is wrong with models, in the type that recipes' faults have too."""

from __future__ import annotations

from mergekit_obim.errors import CheckpointError
from mergekit_obim.recipe.faults import Fault, Level


def model_fault(level: Level, message: str) -> Fault:
    """Make a fault of something that is wrong or unusual about a model.

    Args:
        level: How severe it is; see :class:`~mergekit_obim.recipe.faults.Fault`.
        message: One line that names the model and the tensor or file, says what was found, and
            what to do.
    """
    return Fault("model", message, level=level, error=CheckpointError)


def first_few(names: list[str], most: int = 3) -> str:
    """Name some of many for one line of text.

    >>> first_few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")

"""What a look at models finds, as values: who looks decides what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line to tell the user.

    Attributes:
        severity: An ``error`` ends the command before its work begins; a ``warning`` is printed.
        message: Names the model and the tensor or file, what was found, and the way out.
    """

    severity: Literal["error", "warning"]
    message: str


def listed(names: list[str], most: int = 3) -> str:
    """Some of many names, for one line: ``a, b, c and 5 more``."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")

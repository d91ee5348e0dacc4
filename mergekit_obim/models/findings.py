"""What a look at models finds, as values: who looks decides what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or unusual about a recipe's models.

    Attributes:
        severity: An ``error`` ends every command before its work begins. A ``fault`` is an error
            of ``--check``, as merging these models would go against its purpose; the pre-pass and
            the merge only warn of it, since the user may know better. A ``warning`` is unusual.
        message: One line that names the model and the tensor or file, says what was found, and
            what to do.
    """

    severity: Literal["error", "fault", "warning"]
    message: str


def first_few(names: list[str], most: int = 3) -> str:
    """Some of many names, for one line: ``a, b, c and 5 more``."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")

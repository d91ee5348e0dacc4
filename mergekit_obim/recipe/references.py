"""Recognising references that are written differently and mean one model.

Nothing heavy is imported here, as recipes are read before mergekit is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable


def identity(reference: str) -> str:
    """Return a string that is equal for two references if they mean one model.

    Folders are compared by where they are, so ``./a``, ``a/`` and ``/home/me/a`` are one model;
    what is not on this machine is compared as it is written. mergekit compares strings only.

    Args:
        reference: A reference of the form ``model[@revision][+adapter[@revision]]``.
    """
    return "+".join(_identity(part) for part in reference.split("+"))


def _identity(part: str) -> str:
    path, at, revision = part.partition("@")
    return (os.path.realpath(path) if os.path.exists(path) else path) + at + revision


def written_in_two_ways(references: Iterable[str]) -> str | None:
    """Return a message if one of a recipe's models is written in two ways; None otherwise.

    Args:
        references: The recipe's models, with its base.
    """
    ways: dict[str, str] = {}
    for reference in sorted(set(references)):
        other = ways.setdefault(identity(reference), reference)
        if other != reference:
            return (
                f"models {other} and {reference} are one and the same, but mergekit takes them for "
                "two: write the model in one way, and list it once"
            )
    return None

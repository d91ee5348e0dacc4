"""Telling whether two model references mean one model, however its folder is written."""

from __future__ import annotations

import os


def identity(reference: str) -> str:
    """What two references have in common if they mean one model.

    Folders are compared by where they are, so ``./a``, ``a/`` and ``/home/me/a`` are one model;
    what is not on this machine is compared as it is written. mergekit compares strings only.

    Args:
        reference: In mergekit's string form, ``model[@revision][+adapter[@revision]]``.
    """
    return "+".join(_identity(part) for part in reference.split("+"))


def _identity(part: str) -> str:
    path, at, revision = part.partition("@")
    return (os.path.realpath(path) if os.path.exists(path) else path) + at + revision

"""What the functions of the Python face do alike with their arguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.errors import ObimError, RecipeError
from mergekit_obim.recipe.faults import nearest

LOG = logging.getLogger("mergekit_obim")

PathLike: TypeAlias = str | os.PathLike[str]


def refuse(whom: str, given: Mapping[str, object]) -> None:
    """Refuse arguments that would have no effect, instead of ignoring them."""
    if names := [name for name, value in given.items() if value is not None]:
        raise RecipeError(f"{', '.join(names)}: not for {whom}: leave it out")


def run_options(
    device: str | None, options: Mapping[str, Any] | None, *, quiet: bool
) -> RunOptions:
    check_options(options, [field.name for field in fields(RunOptions)])
    accelerator = torch.accelerator.current_accelerator()
    return RunOptions(
        **{"device": device or str(accelerator or "cpu"), "quiet": quiet, **(options or {})}
    )


def check_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> None:
    for key in options or {}:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise RecipeError(f"options: unknown option {key!r} ({hint})")


@contextmanager
def calling(path: Path, name: str) -> Iterator[None]:
    """Have errors and warnings call a temporary file by what the user gave in its place."""

    def told(text: str) -> str:
        return text.replace(f"{path}, line ", f"{name}, row ").replace(str(path), name)

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = told(record.getMessage()), ()
        return True

    LOG.addFilter(rename)
    try:
        yield
    except ObimError as error:
        raise type(error)(told(error.message)) from error
    finally:
        LOG.removeFilter(rename)
